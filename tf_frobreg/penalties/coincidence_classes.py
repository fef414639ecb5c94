"""Coincidence classes: what makes the closed form exact at a cost that does not depend on the image size.

Entry (i, j) of one axis' Gram matrix collects the pairs (p, r) of kernel entries through which one output
reads both input i and input j. Over the whole axis these sets of pairs take only a few distinct values,
the classes, each at many places (i, j).
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.geometry import Axis

# Per class and pair, from the bools here to the float64 and float32 matrices of the closed form.
BYTES_PER_MEMBER = 40


@dataclasses.dataclass(frozen=True)
class Coincidences:
    """The classes of one axis.

    Attributes:
        pairs: `(pairs, 2)`, the pairs (p, r) that occur in some class.
        members: `(classes, pairs)` bool: which pairs make up which class.
        counts: `(classes,)` floats, at how many (i, j) each class occurs.
        diagonal: `(classes,)` bool: whether those (i, j) have i = j. (A class that holds a pair (p, p)
            lies on the diagonal, and no other does.)
    """

    pairs: np.ndarray
    members: np.ndarray
    counts: np.ndarray
    diagonal: np.ndarray


@lru_cache(maxsize=1024)
def coincidences(axis: Axis, side: str, *, half: bool = False) -> Coincidences:
    """Returns the coincidence classes of one axis.

    Args:
        axis: The axis.
        side: "input" for MᵀM: pairs of inputs that share an output; "output" for MMᵀ.
        half: Keep one of each two classes that are each other's transpose, and count it twice.
    """
    classes = _count_classes(axis, side)
    if half:
        transposed = {c: tuple(sorted((r, p) for p, r in c)) for c in classes}
        classes = {c: n * (1 if c == transposed[c] else 2) for c, n in classes.items() if c <= transposed[c]}
    pairs = sorted({pair for c in classes for pair in c})
    check_memory(
        BYTES_PER_MEMBER * len(classes) * len(pairs),
        f"an axis of {axis.kernel_size} taps has {len(classes):,} coincidence classes, {len(pairs):,} pairs",
        "no penalty on this layer, or a shorter kernel",
    )
    number = {pair: i for i, pair in enumerate(pairs)}
    members = np.zeros((len(classes), len(pairs)), dtype=bool)
    for row, c in zip(members, classes, strict=True):
        row[[number[pair] for pair in c]] = True
    return Coincidences(
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        members=members,
        counts=np.array(list(classes.values()), dtype=float),
        diagonal=np.array([any(p == r for p, r in c) for c in classes], dtype=bool),
    )


def places(axis: Axis, side: str) -> np.ndarray:
    """Returns the rows (i, j, class) of one axis' Gram matrix, `class` numbered as by `coincidences`."""
    classes = coincidences(axis, side)
    number = {
        tuple(map(tuple, classes.pairs[row].tolist())): count for count, row in enumerate(classes.members)
    }
    found = [(i, j, number[c]) for c, where in _places(axis, side).items() for i, j in where]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def joint_members(axes: Sequence[Coincidences], kernel_sizes: Sequence[int]) -> np.ndarray:
    """The members of each joint class of several axes, among all pairs of flat indices (q…, s…)."""
    joint = np.ones((1, 1, 1), dtype=bool)  # (classes, q, s)
    for axis, k in zip(axes, kernel_sizes, strict=True):
        square = np.zeros((len(axis.counts), k, k), dtype=bool)
        square[:, axis.pairs[:, 0], axis.pairs[:, 1]] = axis.members
        joint = np.kron(joint, square)
    return joint.reshape(len(joint), -1)


def _count_classes(axis: Axis, side: str) -> dict[tuple, int]:
    """Maps each class, a sorted tuple of pairs, to its number of places.

    Beyond a few kernel widths a longer axis only repeats its interior: the numbers grow linearly, with
    the period of the stride. Two short axes therefore tell the classes of a long one.
    """
    period = axis.stride
    short = 2 * axis.span + 2 * period
    repeats = (axis.input_size - short) // period
    if repeats <= 1:
        return _count(axis, side)
    base_size = axis.input_size - repeats * period
    base, longer = (
        _count(dataclasses.replace(axis, input_size=base_size + extra), side) for extra in (0, period)
    )
    return {c: base[c] + repeats * (n - base[c]) for c, n in longer.items()}


def _places(axis: Axis, side: str) -> dict[tuple, list[tuple[int, int]]]:
    """Maps each class, a sorted tuple of pairs, to the places (i, j) where it occurs."""
    outputs, inputs, entries = axis.taps
    own, shared = (inputs, outputs) if side == "input" else (outputs, inputs)
    meeting = defaultdict(list)
    for s, i, p in zip(shared.tolist(), own.tolist(), entries.tolist(), strict=True):
        meeting[s].append((i, p))
    pairs_at = defaultdict(list)
    for taps in meeting.values():
        for i, p in taps:
            for j, r in taps:
                pairs_at[i, j].append((p, r))
    found = defaultdict(list)
    for place, pairs in pairs_at.items():
        found[tuple(sorted(pairs))].append(place)
    return found


def _count(axis: Axis, side: str) -> Counter:
    return Counter({c: len(where) for c, where in _places(axis, side).items()})
