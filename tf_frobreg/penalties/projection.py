"""The projection of Sedghi, Gupta and Long, which clips the singular values of the border-free operator."""

import reprlib
from typing import Any, Unpack

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import kernel_and_convolution

__all__ = ["clip_singular_values"]


def clip_singular_values(
    kernel: Any,
    input_size: Size | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    **geometry: Unpack[Geometry],
) -> tf.Tensor:
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


def clip(kernel: tf.Tensor, conv: Convolution, low: float, high: float) -> tf.Tensor:
    """Returns `clip_singular_values` of checked arguments, except that it checks `conv`."""
    _check_operator(conv)
    blocks = conv.by_group(kernel, tf)  # (*kernel_size, groups, g, h)
    rank = len(conv.kernel_size)
    # The transforms act on the last axes.
    taps = tf.transpose(blocks, (rank, rank + 1, rank + 2, *range(rank)))
    spread = _dilate(taps, conv)
    sizes = [axis.input_size for axis in conv.axes]
    # The position of the taps changes only the phase of each frequency, and no singular value.
    spectrum = _FORWARD[rank](spread, sizes) if rank else taps
    matrices = tf.transpose(spectrum, (*range(3, 3 + rank), 0, 1, 2))
    sigma, left, right = tf.linalg.svd(matrices)
    sigma = tf.cast(tf.clip_by_value(sigma, low, high), left.dtype)
    clipped = tf.matmul(left * sigma[..., None, :], right, adjoint_b=True)
    clipped = tf.transpose(clipped, (rank, rank + 1, rank + 2, *range(rank)))
    image = _BACK[rank](clipped, sizes) if rank else clipped
    kept = image[(..., *(slice(0, a.span, a.dilation) for a in conv.axes))]
    return conv.from_groups(tf.transpose(kept, (*range(3, 3 + rank), 0, 1, 2)), tf)


# By the number of spatial axes. The images are real, so half of the frequencies suffice.
_FORWARD = {1: tf.signal.rfft, 2: tf.signal.rfft2d, 3: tf.signal.rfft3d}
_BACK = {1: tf.signal.irfft, 2: tf.signal.irfft2d, 3: tf.signal.irfft3d}


def _dilate(taps: tf.Tensor, conv: Convolution) -> tf.Tensor:
    """Puts zeros between the taps of a dilated kernel."""
    for number, axis in enumerate(conv.axes, start=3):
        if axis.dilation > 1:
            places = tf.one_hot(range(0, axis.span, axis.dilation), axis.span, dtype=taps.dtype)
            taps = tf.tensordot(taps, places, ((number,), (0,)))
            last = taps.shape.rank - 1
            taps = tf.transpose(taps, (*range(number), last, *range(number, last)))
    return taps


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
                f"input_size={reprlib.repr(conv.input_size)}, kernel.shape={conv.kernel_shape}"
            )
