"""Scalar functions of a kernel with a weight. A weight of 0 computes nothing."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.backends import dtype_of, full_precision, is_known, not_compiled, operations_of

# A function of the kernel and of constant tensors. It returns a value, and a function that returns the
# gradient times a weight.
ValueAndSlope = Callable[..., tuple[Any, Callable[[Any], Any]]]


class Weight(NamedTuple):
    """What multiplies a scalar function: a number, and a tensor that a function being traced reads.

    Attributes:
        number: At least 0.
        tensor: A scalar of the kernel's dtype, at least 0. None stands for 1.
    """

    number: float = 1.0
    tensor: Any = None

    def times(self, number: float) -> "Weight":
        """Returns the weight multiplied by a number."""
        return self._replace(number=self.number * number)

    @property
    def product(self) -> Any:
        """Number times tensor."""
        return self.number if self.tensor is None else self.number * self.tensor


ONE = Weight()


class PenaltyFunction:
    """A scalar function of a kernel with its own gradient, twice differentiable.

    TensorFlow traces value and gradient together, once per shape, as a function of its own that is not
    expanded in the graph of a training step. A graph with the operations of all kernels takes long to trace,
    to optimise and to start. Weight and constants are arguments of that function, so that kernels share it.

    Args:
        function: Takes the kernel and constant tensors. Returns the value, and a function that computes the
            gradient times a weight.
        fixed_axes: TensorFlow traces it once for all kernels that agree in the lengths of so many leading
            axes. None stands for all axes.
    """

    def __init__(self, function: ValueAndSlope, *, fixed_axes: int | None = None) -> None:
        self._function = function
        self._fixed_axes = fixed_axes
        self._traced = tf.function(
            self._evaluate, autograph=False, experimental_attributes={"_noinline": True}
        )

    def __call__(
        self, kernel: Any, weight: Weight = ONE, offset: float = 0.0, constants: Sequence[np.ndarray] = ()
    ) -> Any:
        """Returns weight·(function(kernel, *constants) + offset), a scalar of the kernel's dtype.

        If the weight is 0, value and gradient are 0 and nothing is computed.

        Args:
            kernel: The kernel, a tensor of TensorFlow or of Keras' backend.
            weight: The weight.
            offset: A number.
            constants: What the function takes beside the kernel.
        """
        if weight.number == 0.0:
            return nothing(kernel)
        ops = operations_of(kernel)
        tensors = [ops.constant(array, kernel) for array in constants]
        if not isinstance(kernel, tf.Tensor):
            return self._of_keras(kernel, weight, offset, tensors)
        if tf.executing_eagerly():
            return self._eagerly(kernel, weight, offset, tensors)
        return self._in_a_graph(kernel, weight, offset, tensors)

    def _weighted(
        self, kernel: Any, weight: Any, addend: Any, constants: Sequence[Any]
    ) -> tuple[Any, Callable[[], Any]]:
        """Returns weight·function(kernel, *constants) + addend, and a function that computes the gradient."""
        value, slope = self._function(kernel, *constants)
        return weight * value + addend, lambda: slope(weight)

    def _if_active(self, kernel: Any, weight: Any, addend: Any, constants: Sequence[Any]) -> tuple[Any, Any]:
        """Returns value and gradient as `_weighted` has them, or two zeros if the weight is 0, a tensor."""

        def compute() -> tuple[Any, Any]:
            value, slope = self._weighted(kernel, weight, addend, constants)
            return value, slope()

        none = keras.ops.zeros((), dtype_of(kernel)), keras.ops.zeros_like(kernel)
        return keras.ops.cond(weight > 0, compute, lambda: none)

    def _evaluate(self, can_be_zero: bool, kernel: Any, numbers: Any, *constants: Any) -> tuple[Any, Any]:
        """Returns value and gradient for the numbers (weight, addend), and zeros if the weight is 0."""
        weight, addend = tf.unstack(numbers)
        if can_be_zero:
            return self._if_active(kernel, weight, addend, constants)
        value, slope = self._weighted(kernel, weight, addend, constants)
        return value, slope()

    def _apart(
        self, can_be_zero: bool, kernel: tf.Tensor, *tensors: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns `_evaluate` by a call of a function apart."""
        if self._fixed_axes is None:
            return self._traced(can_be_zero, kernel, *tensors)
        fixed = kernel.shape[: self._fixed_axes]
        any_kernel = tf.TensorSpec([*fixed, *[None] * (len(kernel.shape) - len(fixed))], kernel.dtype)
        traced = self._traced.get_concrete_function(can_be_zero, any_kernel, *tensors)
        value, gradient = traced(kernel, *tensors)
        gradient.set_shape(kernel.shape)
        return value, gradient

    def _in_a_graph(
        self, kernel: tf.Tensor, weight: Weight, offset: float, constants: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        numbers = tf.constant([weight.number, weight.number * offset], kernel.dtype)
        can_be_zero = weight.tensor is not None
        numbers = weight.tensor * numbers if can_be_zero else _not_folded(numbers)
        tensors = [numbers, *map(_not_folded, constants)]

        @tf.custom_gradient
        def value(kernel: Any) -> tuple:
            # Else two tapes would trace its derivatives. If that is outside XLA, XLA cannot compile them.
            found, gradient = self._apart(can_be_zero, tf.stop_gradient(kernel), *tensors)

            def again(kernel: Any) -> Any:
                return self._evaluate(can_be_zero, kernel, *tensors)[1]

            return found, lambda upstream: upstream * _differentiable(kernel, gradient, again)

        return value(kernel)

    def _eagerly(
        self, kernel: tf.Tensor, weight: Weight, offset: float, constants: Sequence[tf.Tensor]
    ) -> tf.Tensor:
        def start(kernel: Any) -> tuple[Any, Callable[[], Any]]:
            return self._weighted(kernel, weight.product, weight.product * offset, constants)

        def again(kernel: Any) -> Any:
            return start(kernel)[1]()

        @tf.custom_gradient
        def value(kernel: Any) -> tuple:
            found, slope = start(kernel)
            return found, lambda upstream: upstream * _differentiable(kernel, slope(), again)

        return value(kernel)

    def _of_keras(self, kernel: Any, weight: Weight, offset: float, constants: Sequence[Any]) -> Any:
        others = weight.product, weight.product * offset, constants
        if keras.config.backend() == "torch" and not is_known(kernel):
            # torch.func and torch.vmap do not know this kind of gradient.
            return self._weighted(kernel, *others)[0]

        def start(kernel: Any) -> tuple[Any, Callable[[], Any]]:
            if weight.tensor is None:
                return self._weighted(kernel, *others)
            found, gradient = self._if_active(kernel, *others)
            return found, lambda: gradient

        @keras.ops.custom_gradient
        def value(kernel: Any) -> tuple:
            with full_precision():
                found, slope = start(kernel)

            @not_compiled
            def first_order(*arguments: Any, upstream: Any = None) -> Any:
                if upstream is None:  # JAX passes only the derivative of what follows
                    return arguments[0] * slope()
                # PyTorch passes the kernel too. What `function` computed is no part of the graph of a second
                # derivative, for which PyTorch turns gradients on here.
                is_twice = sys.modules["torch"].is_grad_enabled()
                return upstream * (start(*arguments)[1] if is_twice else slope)()

            return found, first_order

        return value(kernel)


def _not_folded(constant: tf.Tensor) -> tf.Tensor:
    """Returns a constant that TensorFlow does not fold into a function apart.

    It would make and optimise a copy of the function for each kernel.
    """
    return tf.raw_ops.PlaceholderWithDefault(input=constant, shape=constant.shape)


def _differentiable(kernel: tf.Tensor, gradient: tf.Tensor, again: Callable[[Any], Any]) -> tf.Tensor:
    """Returns the gradient. Its own derivative in the kernel is that of `again`, which computes it again."""

    @tf.custom_gradient
    def differentiable(kernel: Any) -> tuple:
        def hessian_vector_product(direction: Any) -> Any:
            with tf.GradientTape() as tape:  # rarely needed, so left to automatic differentiation
                tape.watch(kernel)
                found = again(kernel)
            return tape.gradient(found, kernel, output_gradients=direction)

        return gradient, hessian_vector_product

    return differentiable(kernel)


def weighted(function: Callable[[Any], Any], kernel: Any, weight: Weight) -> Any:
    """Returns weight·function(kernel), or 0 without computing it if the weight is 0.

    Args:
        function: A scalar function. It may read variables, and is differentiated automatically.
        kernel: The kernel.
        weight: The weight.
    """
    if weight.tensor is None:
        return weight.number * function(kernel) if weight.number else nothing(kernel)
    product, zero = weight.product, keras.ops.zeros((), dtype_of(kernel))
    return keras.ops.cond(product > 0, lambda: product * function(kernel), lambda: zero)


def nothing(kernel: Any) -> Any:
    """Returns 0 with the gradient 0, whatever is in the kernel, a tensor or variable."""
    if keras.config.backend() == "torch":
        # PyTorch needs a gradient of every loss. One of the kernel would cost an array of its size.
        return keras.ops.zeros((), dtype_of(kernel)).requires_grad_()
    return keras.ops.sum(kernel[:0])
