"""The coincidence classes of a convolution as tables that the closed form multiplies with."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Side
from tf_frobreg.penalties.coincidence_classes import (
    Coincidences,
    coincidences,
    joint_members,
    rows_and_columns,
)

# Up to this many entries one combined member matrix is faster than two, which move the blocks twice.
COMBINED = 4096
# The same for blocks of one number.
COMBINED_NUMBERS = 8192


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The classes on the diagonal of the first axis, the classes off it, or all. Parts share no pair.

    Attributes:
        pairs: `(pairs, 2)`, the pairs (p, r) of the first axis.
        members: One or two matrices `(classes, pairs)`. Their Kronecker product has one row per joint class
            and one column per pair of the first axis and of all other axes together. It is √(2n) if the pair
            belongs to the class, which has n places, and 0 otherwise.
        target: `(joint classes,)`, √(2n) for classes on the diagonal of all axes and 0 for others. None for
            the part off the diagonal.
        weights: `(joint classes,)`, √(2n) for all classes.
        rows: `(2, different rows, classes)`, what `rows_and_columns` returns for the first axis: how often
            each class occurs in a row and in a column of the axis' Gram matrix.
    """

    pairs: np.ndarray
    members: tuple[np.ndarray, ...]
    target: np.ndarray | None
    weights: np.ndarray
    rows: np.ndarray

    @cached_property
    def members_of_gradient(self) -> tuple[np.ndarray, ...]:
        """The transposed `members`, times 2 on the diagonal.

        The part on the diagonal contains (r, p) with each (p, r). Both products of the gradient have the same
        sum, so twice the first one suffices.
        """
        scale = 1.0 if self.target is None else 2.0
        return scale * self.members[0].T, *(matrix.T for matrix in self.members[1:])


def build_parts(axes: Sequence[Axis], side: Side, has_numbers: bool) -> tuple[Part, ...]:
    """Returns the part on the diagonal of the first axis and the part off it, without an empty one.

    If the blocks are single numbers, one part holds all classes, each of them once, and all pairs.
    """
    first = coincidences(axes[0], side, half=not has_numbers)
    rest = [coincidences(axis, side) for axis in axes[1:]]
    joint = joint_members(rest, [axis.kernel_size for axis in axes[1:]])
    joint = joint * np.sqrt(kronecker(c.counts for c in rest))[:, None]
    on_diagonal = kronecker(c.diagonal for c in rest)
    rows = rows_and_columns(axes[0], side, half=not has_numbers)
    if not has_numbers:
        chosen = [c for c in (first.diagonal, ~first.diagonal) if c.any()]
        return tuple(_build_part(first, rows, c, joint, on_diagonal, COMBINED) for c in chosen)
    size = axes[0].kernel_size
    pairs = np.array(list(itertools.product(range(size), repeat=2)))
    first = dataclasses.replace(first, pairs=pairs, members=joint_members([first], [size]))
    rows = rows * np.array([1.0, 0.0])[:, None, None]  # no class stands for its transpose too
    every = np.full_like(first.diagonal, True)
    return (_build_part(first, rows, every, joint, on_diagonal, COMBINED_NUMBERS),)


def _build_part(
    first: Coincidences,
    rows: np.ndarray,
    chosen: np.ndarray,
    joint: np.ndarray,
    on_diagonal: np.ndarray,
    limit: int,
) -> Part:
    """Returns the part of the chosen classes of the first axis, and of all classes of the other axes.

    Its member matrices are combined if the product has at most `limit` entries.
    """
    used = np.full(len(first.pairs), True) if chosen.all() else first.members[chosen].any(axis=0)
    members = first.members[chosen][:, used] * np.sqrt(2 * first.counts[chosen])[:, None]
    weights = np.kron(members.max(axis=1), joint.max(axis=1))
    on_both = np.kron(first.diagonal[chosen], on_diagonal)
    target = weights * on_both if first.diagonal[chosen].any() else None
    combine = members.size * joint.size <= limit
    matrices = (np.kron(members, joint),) if combine else (members, joint)
    return Part(first.pairs[used], matrices, target, weights, rows[:, :, chosen])


def kronecker(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the Kronecker product of vectors or of matrices. That of no array is 1."""
    product = np.ones(1)
    for array in arrays:
        product = np.kron(product, array)
    return product
