"""The projection of Sedghi, Gupta and Long, which clips the singular values of the border-free operator."""

import math
from typing import Any, Unpack

import keras
import numpy as np

from tf_frobreg.backends import KerasOperations, dtype_of, itemsize
from tf_frobreg.checks import check_memory, check_number, received
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import kernel_and_convolution

__all__ = ["clip_singular_values"]

# Peak memory, in units of one complex128 block per frequency.
SPECTRA = 4


def clip_singular_values(
    kernel: Any,
    input_size: Size | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    **geometry: Unpack[Geometry],
) -> Any:
    """Returns the kernel with the singular values of its border-free operator clipped to [low, high].

    This is the projection of H. Sedghi, V. Gupta and P. Long, "The singular values of convolutional layers"
    (ICLR 2019), reference [12] of the paper. On an image that repeats itself, a Fourier transform turns the
    operator into one small matrix per frequency. The singular values of these matrices are clipped. The
    resulting kernel is as large as the image, and only its k×k taps are kept.

    Neither bound holds exactly afterwards. Cutting the kernel moves the singular values again, and so does
    the border of the real layer. Repeated calls come closer to the bounds.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. At least the size of the
            dilated kernel. A layer may know its own.
        low: Lower bound of σ, at least 0. Sedghi, Gupta and Long have no lower bound, as with 0.
        high: Upper bound of σ, positive and at least `low`.
        **geometry: `dilation_rate`, `groups` and `kind`, as for `tf_frobreg.Convolution`. `strides` above 1
            are refused. `padding` has no effect, because the operator has no border.

    Returns:
        A tensor of the kernel's shape and dtype.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import numpy as np
        >>> from tf_frobreg import singular_values
        >>> kernel = np.random.RandomState(1).randn(3, 3, 2, 2)
        >>> for _ in range(3):
        ...     print(singular_values(kernel, 8, padding="circular").max().round(2), end=" ")
        ...     kernel = clip_singular_values(kernel, 8)
        7.91 1.36 1.2
    """
    low, high = check_interval(low, high)
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry)
    return clip(kernel, conv, low, high)


def clip(kernel: Any, conv: Convolution, low: float, high: float) -> Any:
    """Returns `clip_singular_values` of checked arguments, except that it checks `conv`."""
    _check_operator(conv)
    frequencies, blocks = math.prod(conv.input_size), math.prod(conv.blocks)
    check_memory(
        SPECTRA * 16 * frequencies * blocks,
        f"the projection for {received('input_size', conv.input_size)} has {frequencies:,} frequencies",
        "a smaller input_size",
    )
    rank = len(conv.kernel_size)
    spectrum = keras.ops.cast(conv.by_group(kernel, keras.ops), f"complex{16 * itemsize(kernel)}")
    # The position of the taps changes only the phase of each frequency, and no singular value.
    for number, axis in enumerate(conv.axes):
        phases = _fourier(axis, half=number == rank - 1)
        spectrum = _along(number, phases, spectrum)
    left, sigma, right = keras.ops.svd(spectrum, full_matrices=False)  # (*frequencies, groups, ·, ·)
    bounds = (keras.ops.full_like(sigma, low), keras.ops.full_like(sigma, high))
    sigma = keras.ops.cast(keras.ops.clip(sigma, *bounds), dtype_of(left))
    # keras.ops.matmul would round complex128 to complex64.
    taps = (left * sigma[..., None, :]) @ right
    for number, axis in enumerate(conv.axes):
        taps = _along(number, _inverse_fourier(axis, half=number == rank - 1), taps)
    return conv.from_groups(keras.ops.real(taps), keras.ops)


def _fourier(axis: Axis, *, half: bool) -> np.ndarray:
    """Returns the transform from the taps of an axis to its frequencies, `(frequencies, taps)`.

    The taps are real, so half of the frequencies suffice on one axis.
    """
    frequencies = np.arange(axis.input_size // 2 + 1 if half else axis.input_size)
    places = np.arange(0, axis.span, axis.dilation)
    return np.exp(-2j * np.pi / axis.input_size * np.outer(frequencies, places))


def _inverse_fourier(axis: Axis, *, half: bool) -> np.ndarray:
    """Returns the transform from the frequencies to the taps, `(taps, frequencies)`.

    It leaves out the rest of the image. With half of the frequencies the real part of the result counts.
    """
    inverse = _fourier(axis, half=half).conj().T / axis.input_size
    if half:  # each frequency also stands for its conjugate, except those that are their own
        own = np.arange(inverse.shape[1]) * 2 % axis.input_size == 0
        inverse *= np.where(own, 1, 2)
    return inverse


def _along(axis: int, matrix: np.ndarray, tensor: Any) -> Any:
    """Returns the matrix times the tensor along an axis."""
    first = keras.ops.moveaxis(tensor, axis, 0)
    product = KerasOperations.constant(matrix, tensor) @ keras.ops.reshape(first, (matrix.shape[1], -1))
    return keras.ops.moveaxis(keras.ops.reshape(product, (-1, *first.shape[1:])), 0, axis)


def check_interval(low: Any, high: Any) -> tuple[float, float]:
    """Returns the bounds as floats, or raises an error that names the wrong one."""
    low, high = check_number("low", low), check_number("high", high, exclusive=True)
    if low > high:
        raise ValueError(f"low must be at most high. Received: low={low}, high={high}")
    return low, high


def check_strides(strides: Any) -> None:
    """Raises an error if a stride is above 1."""
    if np.max(strides, initial=1) > 1:
        raise ValueError(f"strides must be 1 for the projection. Received: strides={strides}")


def _check_operator(conv: Convolution) -> None:
    """Raises an error if the projection is not defined for this geometry."""
    check_strides(conv.strides)
    for axis in conv.axes:
        if axis.input_size < axis.span:
            raise ValueError(
                "input_size must be at least the (dilated) kernel size for the projection. Received: "
                f"{received('input_size', conv.input_size)}, kernel.shape={conv.kernel_shape}"
            )
