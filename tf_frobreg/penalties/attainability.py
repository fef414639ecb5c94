"""Whether some kernel of a geometry has all its singular values at √α.

Block (i, i) of the smaller Gram matrix is Σ K[p]K[p]ᵀ over the taps p that reach pixel i. It must be αI for
every pixel. Two elementary arguments can show that this is impossible:

- The taps of one pixel can be a part of the taps of another. Then the taps that only the other has must be
  0, because each addend is positive semidefinite. If no tap is left at some pixel, its block is 0.
- A pixel that t taps reach has a block of rank at most t·h, which must be at least g. t can be 0.
"""

from collections.abc import Sequence
from functools import lru_cache, reduce

import numpy as np

from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution, Side

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
    return any(_has_contradiction(conv, side) for side in sides)


def _has_contradiction(conv: Convolution, side: Side) -> bool:
    _, g, h = conv.blocks
    rows, columns = (g, h) if side == "input" else (h, g)
    readers = reduce(
        np.kron, (_taps_of_pixels(axis.shortened(), side) for axis in conv.axes), np.ones((1, 1), bool)
    )
    if len(readers) ** 2 * readers.shape[1] > MOST_PRODUCTS:
        return False
    while True:
        counts = readers.sum(axis=1)
        if (counts * columns < rows).any():
            return True
        # Pixel i has no tap that pixel j lacks. Then the taps that only j has are 0.
        floats = readers.astype(np.float32)
        part = floats @ (1 - floats).T == 0
        zero = ((part.T @ (1 - floats)) * floats > 0).any(axis=0)
        if not zero.any():
            return False
        readers = np.unique(readers & ~zero, axis=0)


def _taps_of_pixels(axis: Axis, side: Side) -> np.ndarray:
    """Returns the different sets of taps that pixels of one axis have, as rows of a bool matrix."""
    own = axis.taps.inputs if side == "input" else axis.taps.outputs
    size = axis.input_size if side == "input" else axis.output_size
    table = np.zeros((size, axis.kernel_size), dtype=bool)
    table[own, axis.taps.entries] = True
    return np.unique(table, axis=0)
