"""The smaller Gram matrix of M, MᵀM or MMᵀ, assembled block by block from the coincidence classes."""

import math
from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import scipy.sparse

from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.coincidence_classes import coincidences, joint_members, places


class BlockPlaces(NamedTuple):
    """The block of class `classes[t]` stands at pixels (`rows[t]`, `columns[t]`), for every t."""

    rows: np.ndarray
    columns: np.ndarray
    classes: np.ndarray


@lru_cache(maxsize=64)
def gram_matrix(conv: Convolution) -> "GramMatrix":
    """Returns the Gram matrix of one geometry, as a function of the kernel."""
    return GramMatrix(conv)


class GramMatrix:
    """The smaller of MᵀM and MMᵀ. Its eigenvalues are the σ² of M.

    Each pair of pixels that share a tap has one block per group. All pairs of one coincidence class have the
    same block. Rows are in the order (pixel, group, channel).

    Args:
        conv: The geometry.

    Attributes:
        group_size: Number of rows of one group's matrix.
        entries: Number of entries that are not zero for every kernel.
    """

    def __init__(self, conv: Convolution):
        self._conv = conv
        self._side = conv.gram_side
        *self._sizes, channels = conv.output_shape if conv.wide else conv.input_shape
        self._groups = conv.blocks[0]
        self._channels = channels // self._groups
        self._pixels = math.prod(self._sizes)
        self.group_size = self._pixels * self._channels
        self._classes = [coincidences(axis, self._side) for axis in conv.axes]
        self._num_places = math.prod(int(axis.counts.sum()) for axis in self._classes)
        self.entries = self._num_places * self._groups * self._channels**2

    def dense(self, kernel: np.ndarray) -> Iterator[np.ndarray]:
        """Yields one matrix per group, in float64."""
        n, g = self._pixels, self._channels
        check_memory(
            8 * (2 * self.group_size**2 + self._num_places * (g**2 + 4)),
            f"the singular values of M of shape {' × '.join(map(str, self._conv.shape))} need a dense matrix",
            "extreme_singular_values or a smaller input_size",
        )
        at = self._places
        for blocks in np.moveaxis(self._blocks(kernel), 1, 0):  # (classes, g, g) of one group
            matrix = np.zeros((n, g, n, g))
            matrix[at.rows, :, at.columns, :] = blocks[at.classes]
            yield matrix.reshape(n * g, n * g)

    def sparse(self, kernel: np.ndarray) -> scipy.sparse.bsr_array:
        """Returns the matrix of all groups together, in float64."""
        groups, g = self._groups, self._channels

        def per_group(numbers: np.ndarray) -> np.ndarray:
            return (numbers[:, None] * groups + np.arange(groups)).ravel()

        rows, columns = per_group(self._places.rows), per_group(self._places.columns)
        # This matrix holds the number of each block. Its format sorts the blocks by row.
        order = scipy.sparse.csr_array(
            (np.arange(rows.size), (rows, columns)), shape=(self._pixels * groups,) * 2
        )
        blocks = self._blocks(kernel).reshape(-1, g, g)[per_group(self._places.classes)[order.data]]
        return scipy.sparse.bsr_array(
            (blocks, order.indices, order.indptr), shape=(self.group_size * groups,) * 2
        )

    @cached_property
    def _places(self) -> BlockPlaces:
        """Where each block stands, for all axes together."""
        first = np.zeros(1, dtype=np.int64)
        joint = BlockPlaces(rows=first, columns=first, classes=first)
        for size, axis, classes in zip(self._sizes, self._conv.axes, self._classes, strict=True):
            rows, columns, numbers = places(axis, self._side).T
            joint = BlockPlaces(
                rows=_flat_index(joint.rows, rows, size),
                columns=_flat_index(joint.columns, columns, size),
                classes=_flat_index(joint.classes, numbers, len(classes.counts)),
            )
        return joint

    def _blocks(self, kernel: np.ndarray) -> np.ndarray:
        """Returns the block of each class, `(classes, groups, g, g)`."""
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


def _flat_index(outer: np.ndarray, inner: np.ndarray, size: int) -> np.ndarray:
    """Returns the flat indices of all pairs (outer, inner), the inner one varying fastest."""
    return (outer[:, None] * size + inner).ravel()
