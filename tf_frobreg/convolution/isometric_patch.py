"""The patch of a kernel: taps that read every pixel exactly once, so that one matrix makes M an isometry.

At stride 1 the patch is a single tap. With strides it has as many taps on each axis as the stride. A kernel
that is zero outside its patch maps disjoint windows of the image, each by the same matrix. If that matrix has
orthogonal rows or columns of norm √α, all singular values of M are √α.
"""

import dataclasses
import math
from functools import lru_cache

import numpy as np

from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution, Side


@dataclasses.dataclass(frozen=True)
class IsometricPatch:
    """The patch of one geometry.

    Attributes:
        conv: The geometry.
        firsts: First tap of the patch on each axis.
        counts: Number of taps of the patch on each axis.
    """

    conv: Convolution
    firsts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, taps · g, h), the shape of the matrices of the groups."""
        groups, g, h = self.conv.blocks
        return groups, math.prod(self.counts) * g, h

    def place(self, matrices: np.ndarray) -> np.ndarray:
        """Returns the kernel that is zero outside the patch, as `(*kernel_size, groups, g, h)`.

        Args:
            matrices: One matrix per group, of shape `matrix_shape`.
        """
        groups, g, h = self.conv.blocks
        blocks = np.zeros((*self.conv.kernel_size, groups, g, h))
        taps = tuple(slice(f, f + count) for f, count in zip(self.firsts, self.counts, strict=True))
        blocks[taps] = np.moveaxis(matrices.reshape(groups, *self.counts, g, h), 0, -3)
        return blocks

    def fold(self, blocks: np.ndarray) -> np.ndarray:
        """Returns the sum of the taps that are congruent modulo the patch, as matrices of `matrix_shape`.

        At stride 1 this is the response to constant images.

        Args:
            blocks: A kernel as `(*kernel_size, groups, g, h)`.
        """
        folded = np.zeros((*self.counts, *blocks.shape[-3:]))
        for tap in np.ndindex(*self.conv.kernel_size):
            place = tuple((p - f) % n for p, f, n in zip(tap, self.firsts, self.counts, strict=True))
            folded[place] += blocks[tap]
        return np.moveaxis(folded, -3, 0).reshape(self.matrix_shape)

    def nearest_isometry(self, kernel: np.ndarray, alpha: float) -> np.ndarray:
        """Returns the kernel of the patch whose matrices are √α times the polar factors of the folded kernel.

        Args:
            kernel: A kernel of the geometry's shape.
            alpha: α, the target of σ².
        """
        folded = self.fold(self.conv.by_group(kernel.astype(np.float64), np))
        left, _, right = np.linalg.svd(folded, full_matrices=False)
        return self.conv.from_groups(self.place(alpha**0.5 * (left @ right)), np).astype(kernel.dtype)


@lru_cache(maxsize=256)
def isometric_patch(conv: Convolution) -> IsometricPatch:
    """Returns the patch of a geometry. If none reads every pixel once, it is the centre of the kernel."""
    found = [_patch_of_axis(axis.shortened(), conv.gram_side) for axis in conv.axes]
    return IsometricPatch(conv, tuple(first for first, _ in found), tuple(count for _, count in found))


def _patch_of_axis(axis: Axis, side: Side) -> tuple[int, int]:
    """Returns (first tap, number of taps) on one axis.

    If rows of the smaller Gram matrix are inputs, the patch must read each of them once. If they are outputs,
    each of them must have all taps of the patch, and their windows must not overlap.
    """
    most = min(axis.stride, axis.kernel_size)
    middle = (axis.kernel_size - most) // 2 if axis.padding == "valid" else axis.pad // axis.dilation
    middle = min(middle, axis.kernel_size - most)
    reached = np.unique(axis.taps.inputs)
    for count in range(most, 0, -1):
        for first in sorted(range(axis.kernel_size - count + 1), key=lambda first: abs(first - middle)):
            inside = (axis.taps.entries >= first) & (axis.taps.entries < first + count)
            inputs = axis.taps.inputs[inside]
            once = len(np.unique(inputs)) == len(inputs)
            # On a tiny image, some taps meet no pixel.
            used = len(np.unique(axis.taps.entries[inside])) == count
            wanted = len(reached) if side == "input" else count * axis.output_size
            if once and used and len(inputs) == wanted:
                return first, count
    return middle, most
