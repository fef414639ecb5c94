"""All singular values of the transformation matrix M."""

import dataclasses
import math
from typing import Any, Unpack

import numpy as np
import scipy.linalg

from tf_frobreg.checks import check_memory, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import kernel_and_convolution, known_values
from tf_frobreg.convolution.matrix import toeplitz_indices
from tf_frobreg.spectrum.gram_matrix import gram_matrix

__all__ = ["singular_values"]

DECOMPOSED_ROWS = 300  # of the smaller Gram matrix, up to which decomposing M itself is as fast


def singular_values(
    kernel: Any, input_size: Size | None = None, *, accuracy: float = 1e-8, **geometry: Unpack[Geometry]
) -> np.ndarray:
    """Returns all singular values σ of M, in descending order.

    M is the transformation matrix of equations (2.1) and (3.1). The values are computed in float64, even for
    a float32 kernel, in one of three ways:

    - If `padding="circular"` and the strides are 1, a Fourier transform gives one g×h matrix per frequency.
      The singular values of these matrices are those of M. Errors are about 1e-15·σmax.
    - Otherwise σ² are the eigenvalues of the smaller Gram matrix of each group, MᵀM or MMᵀ with n rows. The
      error of σ² is about n·1e-16·σmax², so the error of σ is about n·1e-16·σmax²/σ. That is below 1e-8·σmax
      for every σ above a few 1e-5·σmax. A σ below 1e-7·σmax is noise.
    - If that error is larger than `accuracy`, and for small M, M itself is decomposed. This is several times
      slower. Errors are about 1e-15·σmax for every σ.

    The second and third way hold dense matrices in memory. Their time grows with the cube of the number of
    pixels times channels. Use `extreme_singular_values` for larger layers.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        accuracy: Largest error of any σ, relative to σmax. At 1e-6 the Gram matrix is accurate enough up to
            4500 rows. At 1e-14 M itself is always decomposed.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        A float64 array of shape `(min(rows, columns),)`, in units of σ.

    Raises:
        ValueError: If an argument is invalid, or if the matrices do not fit in memory.
        TypeError: If an argument has the wrong type.

    Example:
        A kernel with only its centre tap is the identity. A kernel with only the tap beside it is a shift,
        which loses one column at the border:

        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 1.0
        >>> print(singular_values(kernel, (1, 4)))
        [1. 1. 1. 1.]
        >>> print(singular_values(np.roll(kernel, 1, axis=1), (1, 4)))
        [1. 1. 1. 0.]
    """
    kernel, conv = kernel_and_convolution(kernel, input_size, geometry, convert=known_values)
    return all_singular_values(kernel, conv, check_number("accuracy", accuracy, exclusive=True))


def all_singular_values(kernel: np.ndarray, conv: Convolution, accuracy: float) -> np.ndarray:
    """Returns `singular_values` of checked arguments."""
    scale = largest_entry(kernel)
    kernel = kernel.astype(np.float64) / scale
    if has_frequencies(conv):
        found = _by_frequency(kernel, conv)
    elif gram_matrix(conv).group_size <= DECOMPOSED_ROWS:
        found = _by_decomposition(kernel, conv)
    else:
        found = _by_eigenvalues(kernel, conv)
        # The error of σ² is about ε·n·σmax², and the error of σ is that of σ² divided by 2σ.
        rounding = np.finfo(np.float64).eps * found.shape[-1] * found.max() ** 2
        allowed = accuracy * found.max()
        if math.sqrt(rounding) > allowed and rounding > 2 * found.min() * allowed:
            found = _by_decomposition(kernel, conv)
    return scale * np.sort(found, axis=None)[::-1]


def has_frequencies(conv: Convolution) -> bool:
    """Returns whether a Fourier transform makes M block diagonal: no border, and no pixel is skipped."""
    return conv.padding == "circular" and bool(conv.axes) and max(conv.strides) == 1


def largest_entry(kernel: np.ndarray) -> float:
    """Returns the scale to divide a kernel by, so that σ² neither overflows nor underflows."""
    return float(np.abs(kernel).max()) or 1.0


def _by_frequency(kernel: np.ndarray, conv: Convolution) -> np.ndarray:
    """Returns the singular values of one g×h matrix per frequency."""
    blocks = conv.by_group(kernel, np)
    sizes = [axis.input_size for axis in conv.axes]
    # If the kernel is larger than the image, several taps fall onto one pixel and add up.
    image = np.zeros((*sizes, *blocks.shape[-3:]))
    places = np.ix_(*(np.arange(a.kernel_size) * a.dilation % a.input_size for a in conv.axes))
    np.add.at(image, places, blocks)
    axes = tuple(range(len(sizes)))
    spectrum = np.fft.rfftn(image, axes=axes)
    sigma = np.linalg.svd(spectrum, compute_uv=False)
    # The last axis holds the frequencies 0 … n/2. Each counts for its conjugate too, except 0 and n/2.
    times = np.full(spectrum.shape[axes[-1]], 2)
    times[0] = 1
    if sizes[-1] % 2 == 0:
        times[-1] = 1
    return np.repeat(sigma, times, axis=axes[-1])


def _by_eigenvalues(kernel: np.ndarray, conv: Convolution) -> np.ndarray:
    """Returns the roots of the eigenvalues of each group's Gram matrix."""
    squares = [scipy.linalg.eigvalsh(block, overwrite_a=True) for block in gram_matrix(conv).dense(kernel)]
    return np.sqrt(np.maximum(squares, 0.0))


def _by_decomposition(kernel: np.ndarray, conv: Convolution) -> np.ndarray:
    """Returns the singular values of each group's M by LAPACK."""
    kind = "transpose" if conv.transposed else "conv"
    group = dataclasses.replace(conv, kernel_shape=(*conv.kernel_size, *conv.blocks[1:]), groups=1, kind=kind)
    check_memory(
        24 * math.prod(group.shape),
        f"the singular values of M of shape {group.shape[0]} × {group.shape[1]} need a dense matrix",
        "extreme_singular_values, a larger accuracy or a smaller input_size",
    )
    index = toeplitz_indices(group.kernel_shape, group.input_size, **group.geometry)
    found = []
    for block in np.moveaxis(conv.by_group(kernel, np), len(conv.kernel_size), 0):
        matrix = np.zeros(group.shape)
        np.add.at(matrix, tuple(index.positions.T), block.ravel()[index.kernel_index])
        found.append(scipy.linalg.svdvals(matrix, overwrite_a=True))
    return np.array(found)
