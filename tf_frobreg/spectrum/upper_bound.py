"""σmax of one layer from above: a number that σmax does not exceed, not an estimate."""

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg

from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.spectrum.all_values import all_singular_values, largest_entry
from tf_frobreg.spectrum.symbol import symbol_peak, torus_peak

# The times are those of two cores.
DECOMPOSED = 1500  # rows of the smaller Gram matrix, up to which all singular values are computed: 1 to 3 s
TORUS_WORK = 2e10  # multiplications for the frequencies of a torus: up to 14 s
SYMBOL_WORK = 2.5e10  # multiplications for a search over all frequencies: up to 18 s
LARGEST_WORK = 4e11  # multiplications for the coarsest cells, if they are more: up to 5 min
ACCURACY = 1e-3  # at which a search over all frequencies stops
DECOMPOSITION = 1e-6  # accuracy of the smallest σ, which is not used: a finer one takes longer
UNIT = float(np.finfo(np.float64).eps)


class UpperBound(NamedTuple):
    """A bound of σmax from above.

    Attributes:
        value: The bound, in units of σ.
        method: "decomposition" if it is σmax itself, "torus" and "symbol" for a layer on a larger image of
            which M is a part, "taps" for the norms of parts of the kernel.
    """

    value: float
    method: str


def sigma_max_bound(kernel: np.ndarray, conv: Convolution) -> UpperBound:
    """Returns a number that σmax of M does not exceed, by the closest method that is quick enough.

    - If the smaller Gram matrix has up to 1500 rows, all singular values are computed.
    - Otherwise M is a part of the matrix of a layer on a torus that is a little larger than the image. A
      part of a matrix has no larger norm. The symbol at the frequencies of the torus gives its σmax.
    - If there are too many of these, the peak of the symbol over all frequencies is bounded cell by cell.
    - For enormous kernels, M is a sum of one shift per tap, and a product with the map that reads patches.
      Either gives a bound from the norms of matrices in the kernel (Tsuzuku et al. 2018).

    These are float64 computations. An allowance of 8·ε·(n + m) is added, relative to the bound, for n×m
    matrices and ε = 2e-16. The errors of LAPACK are usually much smaller.

    Args:
        kernel: The kernel, of shape `conv.kernel_shape`.
        conv: The geometry.

    Returns:
        The bound, and how it was found.

    Raises:
        ValueError: If the kernel holds NaN or infinity.
    """
    if not np.isfinite(kernel).all():
        raise ValueError("its kernel holds NaN or infinity")
    scale = largest_entry(kernel)
    kernel = kernel.astype(np.float64) / scale
    if not kernel.any():
        return UpperBound(0.0, "decomposition")
    found = _scaled_bound(kernel, conv)
    _, g, h = conv.blocks
    allowance = 8 * UNIT * (math.prod(conv.kernel_size) * (g + h) + min(min(conv.shape), DECOMPOSED))
    return found._replace(value=scale * found.value * (1 + allowance))


def _scaled_bound(kernel: np.ndarray, conv: Convolution) -> UpperBound:
    groups = conv.blocks[0]
    if not conv.axes:
        return UpperBound(spectral_norm_of(kernel), "decomposition")
    rows = min(conv.shape) // groups
    if rows <= DECOMPOSED and groups * rows**3 <= DECOMPOSED**3:
        return UpperBound(float(all_singular_values(kernel, conv, DECOMPOSITION)[0]), "decomposition")
    peak = torus_peak(kernel, conv, TORUS_WORK)
    if peak is not None:
        return UpperBound(peak, "torus")
    work = SYMBOL_WORK
    while work <= LARGEST_WORK:  # the first search that is long enough for the coarsest cells
        found = symbol_peak(kernel, conv, ACCURACY, work)
        if found is not None:
            return UpperBound(found.upper, "symbol")
        work *= 4
    return UpperBound(_taps_bound(kernel, conv), "taps")


def _taps_bound(kernel: np.ndarray, conv: Convolution) -> float:
    """Returns the smaller of two bounds from the norms of parts of the kernel."""
    groups, g, h = conv.blocks
    blocks = conv.by_group(kernel, np).reshape(-1, groups, g, h).swapaxes(0, 1)  # (groups, taps, g, h)
    # An input is read by at most ⌈k/stride⌉ outputs on an axis, so reading patches has the root as its norm.
    patches = math.prod(-(-axis.kernel_size // axis.stride) for axis in conv.axes)
    return max(
        min(
            sum(spectral_norm_of(tap) for tap in taps),
            math.sqrt(patches) * spectral_norm_of(taps.reshape(-1, h)),
        )
        for taps in blocks
    )


def spectral_norm_of(matrix: np.ndarray) -> float:
    """Returns the largest singular value of a matrix, from the smaller Gram matrix."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    size = matrix.shape[1]
    square = scipy.linalg.eigvalsh(matrix.T @ matrix, subset_by_index=(size - 1, size - 1))[0]
    return math.sqrt(max(float(square), 0.0))
