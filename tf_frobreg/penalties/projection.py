"""The projection of Sedghi, Gupta and Long: it clips the singular values of the border-free operator."""

import reprlib
from typing import Any, Unpack

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import as_kernel

__all__ = ["clip_singular_values"]


def clip_singular_values(
    kernel: Any, input_size: Size, *, low: float = 0.0, high: float = 1.0, **geometry: Unpack[Geometry]
) -> tf.Tensor:
    """Returns the kernel with the singular values of its border-free operator clipped to [low, high].

    As in H. Sedghi, V. Gupta and P. Long, "The singular values of convolutional layers" (ICLR 2019),
    reference [12] of the paper: a Fourier transform turns the operator of an image that repeats itself into
    one small matrix per frequency; their singular values are clipped, and of the kernel that results, as
    large as the image, the k×k taps are kept. The cut moves the singular values again, and the real layer's
    border moves them once more: neither bound holds exactly after it. Repeated calls come closer.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis; at least the dilated kernel.
        low: Least σ, at least 0. The paper of Sedghi, Gupta and Long has 0: no bound from below.
        high: Largest σ.
        **geometry: `strides` (must be 1), `padding` (which does not matter: the operator has no border),
            `dilation_rate`, `groups`, `kind`, as in `tf_frobreg.Convolution`.

    Returns:
        A tensor of the kernel's shape and dtype.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

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
    kernel = as_kernel(kernel)
    return clip(kernel, Convolution.of(kernel.shape, input_size, geometry), low, high)


def clip(kernel: tf.Tensor, conv: Convolution, low: float, high: float) -> tf.Tensor:
    """Returns `clip_singular_values` of checked arguments, except that it checks `conv`."""
    _check_operator(conv)
    blocks = conv.by_group(kernel, tf)  # (*kernel_size, groups, g, h)
    rank = len(conv.kernel_size)
    # The transforms act on the last axes.
    taps = tf.transpose(blocks, (rank, rank + 1, rank + 2, *range(rank)))
    spread = _dilate(taps, conv)
    sizes = [axis.input_size for axis in conv.axes]
    # Where the taps stand only turns the phase of each frequency, which no singular value sees.
    spectrum = _FORWARD[rank](spread, sizes) if rank else taps
    matrices = tf.transpose(spectrum, (*range(3, 3 + rank), 0, 1, 2))
    sigma, left, right = tf.linalg.svd(matrices)
    sigma = tf.cast(tf.clip_by_value(sigma, low, high), left.dtype)
    clipped = tf.matmul(left * sigma[..., None, :], right, adjoint_b=True)
    clipped = tf.transpose(clipped, (rank, rank + 1, rank + 2, *range(rank)))
    image = _BACK[rank](clipped, sizes) if rank else clipped
    kept = image[(..., *(slice(0, a.span, a.dilation) for a in conv.axes))]
    return conv.from_groups(tf.transpose(kept, (*range(3, 3 + rank), 0, 1, 2)), tf)


# By the number of spatial axes; the images are real, so that half of the frequencies suffices.
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
    """Returns the bounds as floats, or raises."""
    low, high = check_number("low", low), check_number("high", high, exclusive=True)
    if low > high:
        raise ValueError(f"low must be at most high. Received: low={low}, high={high}")
    return low, high


def check_strides(strides: Any) -> None:
    """Raises if a stride is above 1."""
    if np.max(strides, initial=1) > 1:
        raise ValueError(f"strides must be 1 for the projection. Received: strides={strides}")


def _check_operator(conv: Convolution) -> None:
    check_strides(conv.strides)
    for axis in conv.axes:
        if axis.input_size < axis.span:
            raise ValueError(
                "input_size must be at least the (dilated) kernel size for the projection. Received: "
                f"input_size={reprlib.repr(conv.input_size)}, kernel.shape={conv.kernel_shape}"
            )
