"""All singular values of the transformation matrix M."""

import dataclasses
import math
from typing import Any, Unpack

import numpy as np
import scipy.linalg

from tf_frobreg.checks import check_memory, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry, Size
from tf_frobreg.convolution.kernel import known_values
from tf_frobreg.convolution.matrix import toeplitz_indices
from tf_frobreg.spectrum.gram_matrix import gram_matrix

__all__ = ["singular_values"]

DECOMPOSED_ROWS = 300  # up to which the Gram matrix is no faster than a singular value decomposition


def singular_values(
    kernel: Any, input_size: Size, *, accuracy: float = 1e-8, **geometry: Unpack[Geometry]
) -> np.ndarray:
    """Returns all singular values σ of M, in descending order.

    They are computed in float64, whatever the dtype of the kernel, in one of three ways:

    - "circular" padding at stride 1: a Fourier transform leaves one g×h matrix per frequency, whose singular
      values are those of M. Errors are about 1e-15·σmax, and M is never formed.
    - Otherwise the eigenvalues of the smaller Gram matrix of each group, MᵀM or MMᵀ, n rows. An error of
      about n·1e-16·σmax² of σ² is one of n·1e-16·σmax²/σ of σ: below 1e-8·σmax for any σ above a few
      1e-5·σmax, while a σ below 1e-7·σmax is noise.
    - Where that would be more than asked for, and for small M, the singular value decomposition of M, several
      times slower: errors of about 1e-15·σmax throughout.

    The last two take the memory of dense matrices of that size, and time that grows with the cube of the
    number of pixels and channels: `extreme_singular_values` goes on where they end.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable.
        input_size: Spatial size of the input image, an int or one int per axis.
        accuracy: Largest error of any σ, as a share of σmax. With 1e-6 the Gram matrix always does, up to
            4500 rows of it; 1e-14 always takes the decomposition of M.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        `(min(rows, columns),)` float64, in units of σ.

    Raises:
        ValueError: Where an argument is invalid, or the matrices would not fit in memory.
        TypeError: Where an argument has the wrong type.

    Example:
        The centre tap alone is the identity; its neighbour is a shift, which loses one column at the border:

        >>> kernel = np.zeros((3, 3, 1, 1))
        >>> kernel[1, 1] = 1.0
        >>> print(singular_values(kernel, (1, 4)))
        [1. 1. 1. 1.]
        >>> print(singular_values(np.roll(kernel, 1, axis=1), (1, 4)))
        [1. 1. 1. 0.]
    """
    kernel = known_values(kernel)
    accuracy = check_number("accuracy", accuracy, exclusive=True)
    return all_singular_values(kernel, Convolution.of(kernel.shape, input_size, geometry), accuracy)


def all_singular_values(kernel: np.ndarray, conv: Convolution, accuracy: float) -> np.ndarray:
    """`singular_values` of arguments that have been checked."""
    scale = largest_entry(kernel)
    kernel = kernel.astype(np.float64) / scale
    if has_frequencies(conv):
        found = _by_frequency(kernel, conv)
    elif gram_matrix(conv).group_size <= DECOMPOSED_ROWS:
        found = _by_decomposition(kernel, conv)
    else:
        found = _by_gram(kernel, conv)
        # An error ε·n·σmax² of σ² is one of half of that, divided by σ, of σ.
        rounding = np.finfo(np.float64).eps * found.shape[-1] * found.max() ** 2
        allowed = accuracy * found.max()
        if math.sqrt(rounding) > allowed and rounding > 2 * found.min() * allowed:
            found = _by_decomposition(kernel, conv)
    return scale * np.sort(found, axis=None)[::-1]


def has_frequencies(conv: Convolution) -> bool:
    """Whether a Fourier transform makes M block diagonal: there is no border, and no pixel is left out."""
    return conv.padding == "circular" and bool(conv.axes) and max(conv.strides) == 1


def largest_entry(kernel: np.ndarray) -> float:
    """What to divide by, as σ² of tiny or huge kernels has no float."""
    return float(np.abs(kernel).max()) or 1.0


def _by_frequency(kernel, conv):
    """One g×h matrix per frequency; half of them are conjugates of the others."""
    blocks = conv.by_group(kernel, np)
    sizes = [axis.input_size for axis in conv.axes]
    # Taps of a kernel that is larger than the image fall onto each other.
    image = np.zeros((*sizes, *blocks.shape[-3:]))
    places = np.ix_(*(np.arange(a.kernel_size) * a.dilation % a.input_size for a in conv.axes))
    np.add.at(image, places, blocks)
    axes = tuple(range(len(sizes)))
    spectrum = np.fft.rfftn(image, axes=axes)
    sigma = np.linalg.svd(spectrum, compute_uv=False)
    # The last axis holds frequencies 0 … n/2; all others but 0 and n/2 stand for two.
    times = np.full(spectrum.shape[axes[-1]], 2)
    times[0] = 1
    if sizes[-1] % 2 == 0:
        times[-1] = 1
    return np.repeat(sigma, times, axis=axes[-1])


def _by_gram(kernel, conv):
    squares = [scipy.linalg.eigvalsh(g, overwrite_a=True) for g in gram_matrix(conv).dense(kernel)]
    return np.sqrt(np.maximum(squares, 0.0))


def _by_decomposition(kernel, conv):
    """LAPACK on the M of each group."""
    kind = "transpose" if conv.transposed else "conv"
    own = dataclasses.replace(conv, kernel_shape=(*conv.kernel_size, *conv.blocks[1:]), groups=1, kind=kind)
    check_memory(
        24 * math.prod(own.shape),
        f"the singular values of M of shape {own.shape[0]} × {own.shape[1]} need a dense matrix",
        "a larger accuracy or a smaller input_size",
    )
    index = toeplitz_indices(own.kernel_shape, own.input_size, **own.geometry)
    found = []
    for block in np.moveaxis(conv.by_group(kernel, np), len(conv.kernel_size), 0):
        matrix = np.zeros(own.shape)
        np.add.at(matrix, tuple(index.positions.T), block.ravel()[index.kernel_index])
        found.append(scipy.linalg.svdvals(matrix, overwrite_a=True))
    return np.array(found)
