"""The smaller Gram matrix of M, MᵀM or MMᵀ, put together block by block from the coincidence classes."""

import math
from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
import scipy.sparse

from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.coincidence_classes import coincidences, joint_members, places


@lru_cache(maxsize=64)
def gram_matrix(conv: Convolution) -> "GramMatrix":
    """Returns the Gram matrix of one geometry, as a function of the kernel."""
    return GramMatrix(conv)


class GramMatrix:
    """The smaller of MᵀM and MMᵀ: for each two pixels that share a tap a block, the same for a whole class.

    Its eigenvalues are the σ² of M. Rows are in the order (pixel, group, channel).

    Args:
        conv: The geometry.

    Attributes:
        group_size: Rows of each group.
        entries: Entries that are not zero for every kernel.
    """

    def __init__(self, conv: Convolution):
        self._conv = conv
        self._groups, g, h = conv.blocks
        self._side = conv.gram_side
        self._channels = g if self._side == "input" else h
        self._pixels = math.prod(getattr(axis, f"{self._side}_size") for axis in conv.axes)
        self.group_size = self._pixels * self._channels
        self._classes = [coincidences(axis, self._side) for axis in conv.axes]
        self._num_places = math.prod(int(c.counts.sum()) for c in self._classes)
        self.entries = self._num_places * self._groups * self._channels**2

    def dense(self, kernel: np.ndarray) -> Iterator[np.ndarray]:
        """One matrix per group, in float64."""
        n, g = self._pixels, self._channels
        check_memory(
            8 * (2 * self.group_size**2 + self._num_places * (g**2 + 4)),
            f"the singular values of M of shape {' × '.join(map(str, self._conv.shape))} need a dense matrix",
            "a smaller input_size, or what needs σmax and σmin only",
        )
        rows, columns, classes = self._places.T
        for blocks in np.moveaxis(self._blocks(kernel), 1, 0):
            matrix = np.zeros((n, g, n, g))
            matrix[rows, :, columns, :] = blocks[classes]
            yield matrix.reshape(n * g, n * g)

    def sparse(self, kernel: np.ndarray) -> scipy.sparse.bsr_array:
        """The whole matrix, in float64."""
        groups, g = self._groups, self._channels
        rows, columns, classes = (
            (place[:, None] * groups + np.arange(groups)).ravel() for place in self._places.T
        )
        order = scipy.sparse.csr_array(
            (np.arange(rows.size), (rows, columns)), shape=(self._pixels * groups,) * 2
        )
        blocks = self._blocks(kernel).reshape(-1, g, g)[classes[order.data]]
        return scipy.sparse.bsr_array(
            (blocks, order.indices, order.indptr), shape=(self.group_size * groups,) * 2
        )

    @cached_property
    def _places(self):
        """(row, column, class) by pixel, of all axes together."""
        joint = np.zeros((1, 3), dtype=np.int64)
        for axis, own in zip(self._conv.axes, self._classes, strict=True):
            pixels = getattr(axis, f"{self._side}_size")
            base = joint[:, None] * (pixels, pixels, len(own.counts))
            joint = (base + places(axis, self._side)).reshape(-1, 3)
        return joint

    def _blocks(self, kernel):
        """The block of each class, (classes, groups, g, g)."""
        taps = self._conv.by_group(kernel.astype(np.float64), np)
        if self._side == "output":
            taps = np.swapaxes(taps, -1, -2)
        groups, g = self._groups, self._channels
        count = math.prod(self._conv.kernel_size)
        check_memory(
            16 * groups * (count * g) ** 2,
            f"the Gram matrix of a kernel of shape {self._conv.kernel_shape} has {count}² pairs of taps",
            "a smaller kernel",
        )
        rows = np.moveaxis(taps.reshape(count, groups, g, -1), 0, 1).reshape(groups, count * g, -1)
        products = rows @ np.swapaxes(rows, 1, 2)
        pairs = products.reshape(groups, count, g, count, g).transpose(1, 3, 0, 2, 4)
        members = joint_members(self._classes, self._conv.kernel_size).astype(np.float64)
        return (members @ pairs.reshape(count**2, -1)).reshape(-1, groups, g, g)
