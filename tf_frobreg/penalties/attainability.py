"""Whether some kernel of a geometry has all its singular values at √α.

Block (i, i) of the smaller Gram matrix is Σ K[p]K[p]ᵀ over the taps p that reach pixel i. It must be αI for
every pixel, and the blocks off the diagonal must be 0. Three arguments can show that this is impossible:

- The taps of one pixel can be a part of the taps of another. Then the taps that only the other has must be
  0, because each addend is positive semidefinite. If no tap is left at some pixel, its block is 0.
- A pixel that t taps reach has a block of rank at most t·h, which must be at least g. t can be 0.
- If the image is large enough for all pairs of taps of each lag to meet, the kernel is an isometry of images
  without a border too. Its Fourier symbol is a matrix of s·g rows, one set per residue modulo the strides,
  and h columns. The symbol must have the full rank s·g for rows of inputs, and h for rows of outputs.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, reduce

import numpy as np

from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution, Side
from tf_frobreg.penalties.coincidence_classes import Class, count_places

# Up to this many products (pixel kinds)² · taps the first argument is tried. It takes about a second.
MOST_PRODUCTS = 10**9


@lru_cache(maxsize=256)
def is_out_of_reach(conv: Convolution) -> bool:
    """Returns whether no kernel of the geometry has all singular values at √α, as far as the arguments show.

    True is a proof. False says nothing.
    """
    rows, columns = conv.shape
    # If M is square, both Gram matrices must be αI.
    sides: Sequence[Side] = ("input", "output") if rows == columns else (conv.gram_side,)
    return any(_lacks_rank_without_border(conv, side) or _has_contradiction(conv, side) for side in sides)


def _lacks_rank_without_border(conv: Convolution, side: Side) -> bool:
    """Returns whether the third argument shows that M is no isometry."""
    _, g, h = conv.blocks
    rows = math.prod(min(axis.stride, axis.kernel_size) for axis in conv.axes) * g
    enough = rows <= h if side == "input" else h <= rows
    return not enough and all(_has_all_lags(axis, side) for axis in conv.axes)


@lru_cache(maxsize=256)
def _has_all_lags(axis: Axis, side: Side) -> bool:
    """Returns whether all pairs of taps of each lag meet somewhere on the axis, without other pairs."""
    lags: dict[tuple[int, int], Class] = defaultdict(tuple)
    for p, r in itertools.product(range(axis.kernel_size), repeat=2):
        if side == "input":
            lags[p - r, p % axis.stride] += ((p, r),)
        elif (p - r) % axis.stride == 0:
            lags[p - r, 0] += ((p, r),)
    classes = count_places(axis.shortened(), side)
    return all(tuple(sorted(pairs)) in classes for pairs in lags.values())


def _has_contradiction(conv: Convolution, side: Side) -> bool:
    _, g, h = conv.blocks
    rows, columns = (g, h) if side == "input" else (h, g)
    readers = reduce(
        np.kron, (_taps_of_pixels(axis.shortened(), side) for axis in conv.axes), np.ones((1, 1), bool)
    )
    if len(readers) ** 2 * readers.shape[1] > MOST_PRODUCTS:
        return False
    # Two taps of a kernel that wraps around onto itself can meet at a pixel. Then only their sum counts.
    wraps = any(axis.padding == "circular" and axis.span > axis.input_size for axis in conv.axes)
    while True:
        counts = readers.sum(axis=1)
        if (counts * columns < rows).any():
            return True
        # Pixel i has no tap that pixel j lacks. Then the taps that only j has are 0.
        floats = readers.astype(np.float32)
        part = floats @ (1 - floats).T == 0
        zero = ((part.T @ (1 - floats)) * floats > 0).any(axis=0)
        if wraps or not zero.any():
            return False
        readers = np.unique(readers & ~zero, axis=0)


def _taps_of_pixels(axis: Axis, side: Side) -> np.ndarray:
    """Returns the different sets of taps that pixels of one axis have, as rows of a bool matrix."""
    own = axis.taps.inputs if side == "input" else axis.taps.outputs
    size = axis.input_size if side == "input" else axis.output_size
    table = np.zeros((size, axis.kernel_size), dtype=bool)
    table[own, axis.taps.entries] = True
    return np.unique(table, axis=0)
