"""Tensors of TensorFlow and of Keras' backend: which functions act on them, and what `keras.ops` lacks.

The package itself computes with TensorFlow, whatever the backend of Keras is. What a layer calls during
training computes with tensors of that backend. Code for both takes its functions from `operations_of`. These
have the names that they have in `keras.ops`.
"""

import contextlib
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class TensorFlowOperations:
    """Functions for tensors of TensorFlow."""

    transpose = staticmethod(tf.transpose)
    concatenate = staticmethod(tf.concat)
    expand_dims = staticmethod(tf.expand_dims)
    matmul = staticmethod(tf.matmul)
    sum = staticmethod(tf.reduce_sum)
    stack = staticmethod(tf.stack)
    einsum = staticmethod(tf.einsum)
    unstack = staticmethod(tf.unstack)
    zeros = staticmethod(tf.zeros)

    # The order in which `add` adds depends on timing, and so may the last digit.
    @staticmethod
    def add(tensors: Sequence[Any]) -> Any:
        """Returns the sum of tensors of the same shape."""
        return tf.add_n(tensors) if len(tensors) > 1 else tensors[0]

    half_square = staticmethod(tf.nn.l2_loss)
    swap_last_axes = staticmethod(tf.linalg.matrix_transpose)

    @staticmethod
    def reshape(tensor: Any, shape: Sequence[int]) -> Any:
        """Returns the tensor with another shape. A graph would keep, and pay for, the same shape."""
        return tensor if tensor.shape.as_list() == list(shape) else tf.reshape(tensor, shape)

    @staticmethod
    def take(tensor: Any, indices: np.ndarray, axis: int = 0) -> Any:
        """Returns the entries of an axis."""
        return tf.gather(tensor, indices, axis=axis)

    @staticmethod
    def pad(tensor: Any, added: Sequence[tuple[int, int]]) -> Any:
        """Returns the tensor with zeros before and after each axis."""
        # Not tf.pad: TensorFlow 2.21 fuses Pad with a float32 Conv3D into an operation that ignores the
        # padding.
        zero = tf.zeros((), tensor.dtype)
        return tf.raw_ops.PadV2(input=tensor, paddings=added, constant_values=zero)

    @staticmethod
    def convolve(images: Any, kernel: Any, strides: tuple[int, ...], dilation: tuple[int, ...]) -> Any:
        """Returns the convolution without padding, channels last."""
        return tf.nn.convolution(
            images,
            kernel,
            strides=strides,
            padding="VALID",
            dilations=dilation,
            data_format=("NWC", "NHWC", "NDHWC")[len(strides) - 1],  # eager 3-D gradients need it
        )

    @staticmethod
    def adjoint(function: Callable[[Any], Any], zeros: Any, outputs: Any) -> Any:
        """Returns the adjoint of a linear function of `zeros`, applied to `outputs`."""
        with tf.GradientTape() as tape:
            tape.watch(zeros)
            found = function(zeros)
        return tape.gradient(found, zeros, output_gradients=outputs)

    @staticmethod
    def add_in_order(tensors: Sequence[Any]) -> Any:
        """Returns the sum of tensors of the same shape."""
        return tf.reduce_sum(tensors, axis=0) if len(tensors) > 2 else sum(tensors[1:], tensors[0])

    @staticmethod
    def matmul_transposed(left: Any, right: Any) -> Any:
        """Returns left·rightᵀ, for the last two axes."""
        return tf.matmul(left, right, transpose_b=True)

    @staticmethod
    def constant(values: np.ndarray, like: Any) -> Any:
        """Returns a constant of the dtype of `like`. Numbers beyond the dtype become infinite."""
        with np.errstate(over="ignore"):
            return tf.constant(values.astype(like.dtype.as_numpy_dtype))

    @staticmethod
    def subtract_from_diagonal(matrices: Any, values: Any) -> Any:
        """Returns the square matrices less the values, which broadcast, on their diagonals."""
        # The functions of tf.linalg also take other diagonals, for which they add five constants.
        diagonal = tf.raw_ops.MatrixDiagPart(input=matrices) - values
        return tf.raw_ops.MatrixSetDiag(input=matrices, diagonal=diagonal)


class KerasOperations:
    """Functions for tensors of Keras' backend."""

    transpose = staticmethod(keras.ops.transpose)
    concatenate = staticmethod(keras.ops.concatenate)
    expand_dims = staticmethod(keras.ops.expand_dims)
    # Not keras.ops.matmul: it rounds float64 to float32 under PyTorch.
    matmul = staticmethod(operator.matmul)
    sum = staticmethod(keras.ops.sum)
    stack = staticmethod(keras.ops.stack)
    zeros = staticmethod(keras.ops.zeros)

    pad = staticmethod(keras.ops.pad)
    einsum = staticmethod(keras.ops.einsum)

    @staticmethod
    def reshape(tensor: Any, shape: Sequence[int]) -> Any:
        """Returns the tensor with another shape. Under PyTorch keras.ops.reshape takes 40 times as long."""
        return tensor.reshape(tuple(shape))

    @staticmethod
    def take(tensor: Any, indices: np.ndarray, axis: int = 0) -> Any:
        """Returns the entries of an axis."""
        return tensor[indices] if axis == 0 else keras.ops.take(tensor, indices, axis=axis)

    @staticmethod
    def convolve(images: Any, kernel: Any, strides: tuple[int, ...], dilation: tuple[int, ...]) -> Any:
        """Returns the convolution without padding, channels last."""
        return keras.ops.conv(
            images,
            kernel,
            strides=strides,
            padding="valid",
            data_format="channels_last",
            dilation_rate=dilation,
        )

    @staticmethod
    def adjoint(function: Callable[[Any], Any], zeros: Any, outputs: Any) -> Any:
        """Returns the adjoint of a linear function of `zeros`, applied to `outputs`."""
        if keras.config.backend() == "jax":
            (found,) = sys.modules["jax"].linear_transpose(function, zeros)(outputs)
            return found
        torch = sys.modules["torch"]
        with torch.enable_grad():  # also while an outer context turns gradients off
            return torch.autograd.functional.vjp(function, zeros, outputs, create_graph=True)[1]

    @staticmethod
    def swap_last_axes(tensor: Any) -> Any:
        """Returns the transposes of matrices."""
        return keras.ops.swapaxes(tensor, -1, -2)

    @staticmethod
    def unstack(tensor: Any) -> list[Any]:
        """Returns the entries of the first axis as a list."""
        return [tensor[number] for number in range(tensor.shape[0])]

    @staticmethod
    def add(tensors: Sequence[Any]) -> Any:
        """Returns the sum of tensors of the same shape."""
        return sum(tensors[1:], tensors[0])

    add_in_order = add

    @staticmethod
    def half_square(tensor: Any) -> Any:
        """Returns half the sum of the squares."""
        return 0.5 * keras.ops.sum(tensor * tensor)

    @staticmethod
    def matmul_transposed(left: Any, right: Any) -> Any:
        """Returns left·rightᵀ, for the last two axes."""
        return left @ keras.ops.swapaxes(right, -1, -2)

    @staticmethod
    def constant(values: np.ndarray, like: Any) -> Any:
        """Returns a constant of the dtype of `like`."""
        return keras.ops.convert_to_tensor(values, dtype=dtype_of(like))

    @staticmethod
    def subtract_from_diagonal(matrices: Any, values: Any) -> Any:
        """Returns the square matrices less the values, which broadcast, on their diagonals."""
        unit = keras.ops.eye(matrices.shape[-1], dtype=dtype_of(matrices))
        return matrices - values[..., None] * unit


Operations = type[TensorFlowOperations] | type[KerasOperations]


def operations_of(tensor: Any) -> Operations:
    """Returns the functions for tensors of this kind."""
    return TensorFlowOperations if isinstance(tensor, (tf.Tensor, tf.Variable)) else KerasOperations


def dtype_of(tensor: Any) -> str:
    """Returns the name of a dtype, for example "float32"."""
    return keras.backend.standardize_dtype(tensor.dtype)


def to_tensor(value: Any) -> Any:
    """Returns a tensor of Keras' backend, differentiable in `value` if that is of the same backend.

    Args:
        value: Array, tensor or variable of any backend.

    Raises:
        TypeError: If `value` cannot be converted: it is sparse, for example, or a tensor of another backend
            that is being traced.
        ValueError: If `value` is no array.
    """
    if keras.config.backend() == "tensorflow":
        return to_tensorflow(value)
    if isinstance(value, keras.Variable):
        value = value.value
    return value if keras.ops.is_tensor(value) else keras.ops.convert_to_tensor(to_array(value))


def to_tensorflow(value: Any) -> Any:
    """Returns a tensor of TensorFlow, differentiable in `value` if that is of TensorFlow.

    Args:
        value: Array, tensor or variable of any backend.

    Raises:
        TypeError: If `value` cannot be converted: it is sparse, for example, or a tensor of another backend
            that is being traced.
        ValueError: If `value` is no array.
    """
    if isinstance(value, keras.Variable):
        value = value.value
    return tf.convert_to_tensor(to_array(value) if _is_foreign(value) else value)


def to_array(value: Any) -> np.ndarray:
    """Returns the values of an array, tensor or variable of any backend.

    Raises:
        TypeError: If the values are not known, because a function is being traced.
        ValueError: If `value` is no array.
    """
    if isinstance(value, keras.Variable):
        value = value.value
    if not is_known(value):
        raise TypeError(f"the values of a {type(value).__name__} are not known while a function is traced")
    if isinstance(value, (tf.Tensor, tf.Variable)):
        return value.numpy()
    if keras.ops.is_tensor(value):
        return keras.ops.convert_to_numpy(value)
    if hasattr(value, "detach"):  # of PyTorch, while Keras has another backend
        value = value.detach().cpu()
    return np.asarray(value)


def is_known(value: Any) -> bool:
    """Returns whether the values of a tensor are known: not while a function is traced or transformed."""
    if isinstance(value, (tf.Tensor, tf.Variable)):
        return tf.executing_eagerly()
    if hasattr(value, "data_ptr"):  # of PyTorch
        try:
            return bool(value.data_ptr()) or not math.prod(value.shape)
        except RuntimeError:  # inside torch.func or torch.vmap
            return False
    jax = sys.modules.get("jax")
    return jax is None or not isinstance(value, jax.core.Tracer)


def is_dense(value: Any) -> bool:
    """Returns whether a tensor or array is dense."""
    if isinstance(value, (tf.SparseTensor, tf.IndexedSlices, tf.RaggedTensor)):
        return False
    if hasattr(value, "layout") and hasattr(value, "detach"):  # of PyTorch
        return str(value.layout) == "torch.strided"
    return "sparse" not in type(value).__module__


def _is_foreign(value: Any) -> bool:
    """Returns whether a value is a tensor of JAX or PyTorch."""
    return type(value).__module__.partition(".")[0] in ("torch", "jax", "jaxlib")


def itemsize(tensor: Any) -> int:
    """Returns the bytes of one entry."""
    return np.dtype(dtype_of(tensor)).itemsize


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that TensorFlow or JAX traces once. PyTorch runs it as it is."""
    if keras.config.backend() == "tensorflow":
        return tf.function(function, autograph=False)
    if keras.config.backend() == "jax":
        return sys.modules["jax"].jit(function)
    return function


def check_tensorflow(argument: str, tensor: Any) -> None:
    """Raises ValueError if the tensor is not one of TensorFlow, without which the argument cannot be used."""
    if not isinstance(tensor, tf.Tensor):
        raise ValueError(
            f"{argument} needs TensorFlow as the backend of Keras. "
            f"Received: KERAS_BACKEND={keras.config.backend()}"
        )


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that `torch.compile` runs as it is, because it cannot follow it. For a decorator."""
    if keras.config.backend() != "torch":
        return function
    return sys.modules["torch"].compiler.disable(function)


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function in which `torch.autocast` has no effect. For a decorator."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with full_precision():
            return function(*arguments, **options)

    return call if keras.config.backend() == "torch" else function


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Turns `torch.autocast` off, which would compute matrix products in 16 bits."""
    with contextlib.ExitStack() as stack:
        if keras.config.backend() == "torch":
            torch = sys.modules["torch"]
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
        yield
