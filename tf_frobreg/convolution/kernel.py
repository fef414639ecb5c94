"""Kernels as users pass them: arrays, tensors and variables, or a built Keras layer."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.backends import dtype_of, is_dense, is_known, to_array, to_tensor, to_tensorflow
from tf_frobreg.checks import received
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size, check_geometry
from tf_frobreg.convolution.layer import SEPARABLE, KernelPlace, check_layer, read_layer


def as_kernel(kernel: Any, *, check_finite: bool = True) -> Any:
    """Returns `kernel` as a float tensor of Keras' backend, or raises an error that says what is wrong.

    Args:
        kernel: Array, tensor or variable.
        check_finite: Whether to refuse NaN and infinity. Values are not known while a function is traced and
            are not checked then.

    Returns:
        A tensor of dtype float32 or float64.

    Raises:
        TypeError: If `kernel` is not a dense array of float32 or float64.
        ValueError: If `kernel` contains NaN or infinity.
    """
    return _convert(kernel, to_tensor, check_finite)


def as_tensorflow_kernel(kernel: Any) -> tf.Tensor:
    """Returns `as_kernel(kernel)` as a tensor of TensorFlow, whatever the backend of Keras is."""
    value = kernel.value if isinstance(kernel, keras.Variable) else kernel
    if not isinstance(value, (tf.Tensor, tf.Variable)) and not is_known(value):
        raise TypeError(
            "kernel must have known values, because TensorFlow computes this function. Call it outside of "
            f"what JAX traces. Received: a {type(kernel).__name__}"
        )
    return _convert(kernel, to_tensorflow)


def known_values(kernel: Any) -> np.ndarray:
    """Returns `as_kernel(kernel)` as an array, or raises an error if its values are not known yet."""
    value = kernel.value if isinstance(kernel, keras.Variable) else kernel
    if not is_known(value):
        raise TypeError(
            "kernel must have known values: singular values cannot be computed while a function is traced. "
            f"Call this function eagerly. Received: a {type(kernel).__name__}"
        )
    return _convert(kernel, to_array)


def _convert(kernel: Any, convert: Callable[[Any], Any], check_finite: bool = True) -> Any:
    """Returns the converted kernel, or raises an error that says what is wrong with it."""
    value = kernel.value if isinstance(kernel, keras.Variable) else kernel
    if not is_dense(value):
        raise TypeError(f"kernel must be a dense array. Received: a {type(kernel).__name__}")
    try:
        tensor = convert(kernel)
        dtype = dtype_of(tensor)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"kernel must be an array of float32 or float64. Received: a {type(kernel).__name__}"
            + (f" of dtype {kernel.dtype}" if isinstance(kernel, np.ndarray) else "")
        ) from error
    if dtype not in ("float32", "float64"):
        raise TypeError(f"kernel must be float32 or float64. Received: kernel.dtype={dtype}")
    if check_finite and is_known(tensor) and not np.isfinite(to_array(tensor)).all():
        raise ValueError(
            f"kernel must be finite. Received: NaN or infinity in a kernel of shape {tuple(tensor.shape)}"
        )
    return tensor


def kernel_and_convolution(
    kernel: Any,
    input_size: Size | None,
    geometry: Geometry,
    *,
    convert: Callable[[Any], Any] = as_kernel,
) -> tuple[Any, Convolution]:
    """Returns the checked kernel and its geometry, from a kernel and its geometry or from a built layer.

    Warns if the kernel seems to be in PyTorch's order. The warning points at the caller of the function that
    calls this one.

    Args:
        kernel: Array, tensor or variable, or a built Keras layer.
        input_size: Spatial size of the input. A layer can have recorded it, and a Dense kernel has none.
        geometry: The keyword arguments. For a layer only `padding` can be given.
        convert: What checks and converts the kernel: `as_kernel`, `as_tensorflow_kernel` or `known_values`.

    Returns:
        (the kernel, its geometry).

    Raises:
        TypeError: If the kernel is not an array of floats, or an argument is missing or unknown.
        ValueError: If an argument is invalid.
    """
    if isinstance(kernel, keras.layers.Layer):
        place = _place_in_layer(kernel, input_size, geometry)
        return convert(getattr(kernel, place.attribute)), place.conv
    values = convert(kernel)
    _warn_of_other_order(values)
    return values, convolution_of(values.shape, input_size, geometry)


def kernel_of(kernel: Any) -> Any:
    """Returns the checked kernel, from a kernel or from a built layer, for what needs no geometry.

    Raises:
        TypeError: If the kernel is not an array of floats, or the layer has no kernel or two.
        ValueError: If the package cannot treat the layer, or the kernel contains NaN or infinity.
    """
    if isinstance(kernel, keras.layers.Layer):
        _check_one_kernel(kernel)
        return as_kernel(kernel.kernel)
    values = as_kernel(kernel)
    _warn_of_other_order(values)
    return values


def convolution_of(kernel_shape: Any, input_size: Size | None, geometry: Geometry) -> Convolution:
    """Returns the geometry of a kernel of that shape, or of a built layer in its place.

    Raises:
        TypeError: If an argument has the wrong type, is missing or unknown.
        ValueError: If an argument is invalid.
    """
    if isinstance(kernel_shape, keras.layers.Layer):
        return _place_in_layer(kernel_shape, input_size, geometry).conv
    if input_size is None:
        if np.shape(kernel_shape) != (2,):
            raise TypeError(
                "input_size must be given: the spatial size of the layer's input, an int or one int per "
                "axis. Received: input_size=None"
            )
        input_size = ()  # of a Dense kernel
    return Convolution.of(kernel_shape, input_size, geometry)


def _place_in_layer(layer: keras.layers.Layer, input_size: Size | None, geometry: Geometry) -> KernelPlace:
    """Returns the only kernel of a layer, with the padding that `geometry` may hold."""
    check_geometry(geometry)
    repeated = sorted(geometry.keys() - {"padding"})
    if repeated:
        raise TypeError(
            f"{repeated[0]} cannot be given for a layer: it is read from the layer. "
            f"Received: {received('kernel', layer)}"
        )
    _check_one_kernel(layer)
    place = read_layer(layer, input_size)
    conv = Convolution.of(place.conv.kernel_shape, place.conv.input_size, place.conv.geometry | geometry)
    return place._replace(conv=conv)


def _check_one_kernel(layer: keras.layers.Layer) -> None:
    """Raises an error if the package cannot treat a layer, or if the layer has two kernels."""
    check_layer(layer)
    if isinstance(layer, SEPARABLE):
        raise TypeError(
            f"layer {layer.name!r} has two kernels: give layer.depthwise_kernel or layer.pointwise_kernel, "
            'with the geometry that Convolution.from_layer(layer, part="depthwise") shows'
        )


def _warn_of_other_order(kernel: Any) -> None:
    """Warns the caller of the public function, which is three calls up.

    Inside a tf.function there is no warning, because calls of AutoGraph lie between.
    """
    remark = remark_on_order(kernel.shape)
    if remark is not None and tf.executing_eagerly():
        warnings.warn(remark, stacklevel=4)


def remark_on_order(kernel_shape: Sequence[int]) -> str | None:
    """Returns a remark if a kernel seems to be in PyTorch's order, (filters, in_channels, *kernel_size).

    All axes after the first two are then one number that is a frequent kernel size. In Keras' order the first
    axes are the kernel size, and the last two are the channels. A kernel size is suspect if one of its
    numbers is even and above 4, or if one is even, they differ and the first is at least 4. 1×1 kernels need
    both. A kernel of `Conv1D` has one axis of each kind, so both axes before the last must be large.
    """
    shape = tuple(kernel_shape)
    rank = len(shape) - 2
    if rank < 1 or None in shape or len(set(shape[2:])) > 1 or shape[-1] not in (1, 3, 5, 7):
        return None
    first = shape[:rank]
    is_large = any(n > 4 and n % 2 == 0 for n in first)
    is_uneven = 4 <= shape[0] != shape[1] > 1 and any(n % 2 == 0 for n in first)
    if rank == 1:
        suspect = shape[-1] > 1 and shape[0] >= 16 and shape[0] % 2 == 0 and shape[1] >= 8
    elif shape[-1] == 1:
        suspect = is_large and is_uneven
    else:
        suspect = is_large or is_uneven
    if not suspect:
        return None
    return (
        f"A kernel of shape {shape} seems to have PyTorch's order, (filters, in_channels, *kernel_size). "
        f"Keras' order is (*kernel_size, in_channels, filters): use "
        f"kernel.transpose{(*range(2, rank + 2), 1, 0)}."
    )
