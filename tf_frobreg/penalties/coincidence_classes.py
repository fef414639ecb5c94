"""Coincidence classes: why the closed form is exact at a cost that does not depend on the image size.

Entry (i, j) of one axis' Gram matrix is a sum over pairs (p, r) of kernel entries. A pair belongs to the sum
if one output reads input i through p and input j through r. Over the whole axis only a few different sets of
pairs occur. They are the classes. Each class occurs at many places (i, j).
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Side

# Per class and pair, from the bools here to the float64 and float32 matrices of the closed form.
BYTES_PER_MEMBER = 40
BYTES_PER_PAIR = 300  # at most, of the Python objects for a pair of taps at an output: measured 5 to 295

Class = tuple[tuple[int, int], ...]  # pairs (p, r), sorted


@dataclasses.dataclass(frozen=True)
class Coincidences:
    """The classes of one axis.

    Attributes:
        pairs: `(pairs, 2)`, the pairs (p, r) that occur in some class.
        members: `(classes, pairs)` bool, which pairs belong to which class.
        counts: `(classes,)` floats, the number of places (i, j) of each class.
        diagonal: `(classes,)` bool, whether the places of a class have i = j. These are the classes that
            contain a pair (p, p).
    """

    pairs: np.ndarray
    members: np.ndarray
    counts: np.ndarray
    diagonal: np.ndarray


@lru_cache(maxsize=1024)
def coincidences(axis: Axis, side: Side, *, half: bool = False) -> Coincidences:
    """Returns the coincidence classes of one axis.

    Args:
        axis: The axis.
        side: "input" for MᵀM, with pairs of inputs that share an output. "output" for MMᵀ, with pairs of
            outputs that share an input.
        half: Whether to keep only one of two classes that are each other's transpose, with twice the count.
    """
    classes = _count_classes(axis, side)
    if half:
        transposed = {c: _transposed(c) for c in classes}
        classes = {c: n * (1 if c == transposed[c] else 2) for c, n in classes.items() if c <= transposed[c]}
    pairs = sorted({pair for c in classes for pair in c})
    check_memory(
        BYTES_PER_MEMBER * len(classes) * len(pairs),
        f"an axis of {axis.kernel_size} taps has {len(classes):,} coincidence classes, {len(pairs):,} pairs",
        "a shorter kernel, or no penalty on this layer",
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


@lru_cache(maxsize=1024)
def rows_and_columns(axis: Axis, side: Side, *, half: bool = False) -> np.ndarray:
    """Returns how often each class of `coincidences` occurs in a row and in a column of an axis' Gram matrix.

    With `half`, a class that is its own transpose counts half. Row i then consists of the classes of row i
    and of the transposes of the classes of column i.

    Returns:
        `(2, different i, classes)` floats, first for the rows and then for the columns.
    """
    classes = coincidences(axis, side, half=half)
    number = {
        tuple(map(tuple, classes.pairs[row].tolist())): count for count, row in enumerate(classes.members)
    }
    short = axis.shortened(spans=4)
    table = np.zeros((2, short.input_size if side == "input" else short.output_size, len(number)))
    for c, where in _places_by_class(short, side).items():
        if c in number:  # with `half`, the transpose can stand for both
            weight = 0.5 if half and c == _transposed(c) else 1.0
            for i, j in where:
                table[0, i, number[c]] += weight
                table[1, j, number[c]] += weight
    return np.unique(table, axis=1)


def places(axis: Axis, side: Side) -> np.ndarray:
    """Returns a row (i, j, class) per place of one axis' Gram matrix, with the classes of `coincidences`."""
    classes = coincidences(axis, side)
    number = {
        tuple(map(tuple, classes.pairs[row].tolist())): count for count, row in enumerate(classes.members)
    }
    found = [(i, j, number[c]) for c, where in _places_by_class(axis, side).items() for i, j in where]
    return np.array(found, dtype=np.int64).reshape(-1, 3)


def joint_members(axes: Sequence[Coincidences], kernel_sizes: Sequence[int]) -> np.ndarray:
    """Returns which pairs (q, s) of flat tap indices belong to which joint class of several axes.

    A joint class is one class per axis. The result is bool, `(joint classes, pairs)`, with all pairs.
    """
    joint = np.ones((1, 1, 1), dtype=bool)  # (classes, q, s)
    for axis, k in zip(axes, kernel_sizes, strict=True):
        square = np.zeros((len(axis.counts), k, k), dtype=bool)
        square[:, axis.pairs[:, 0], axis.pairs[:, 1]] = axis.members
        joint = np.kron(joint, square)
    return joint.reshape(len(joint), -1)


def count_places(axis: Axis, side: Side) -> Counter[Class]:
    """Returns the number of places of each class, by listing all of them."""
    return Counter({c: len(where) for c, where in _places_by_class(axis, side).items()})


def _count_classes(axis: Axis, side: Side) -> dict[Class, int]:
    """Returns what `count_places` returns, at a cost that does not depend on the axis' length.

    The counts of a long axis grow linearly in its length, so two short axes determine them.
    """
    short = axis.shortened()
    if short == axis:
        return count_places(axis, side)
    repeats = (axis.input_size - short.input_size) // axis.stride
    base, longer = (
        count_places(dataclasses.replace(short, input_size=short.input_size + extra), side)
        for extra in (0, axis.stride)
    )
    return {c: base[c] + repeats * (n - base[c]) for c, n in longer.items()}


def _transposed(c: Class) -> Class:
    """Returns the class of (j, i) if `c` is that of (i, j)."""
    return tuple(sorted((r, p) for p, r in c))


def _places_by_class(axis: Axis, side: Side) -> dict[Class, list[tuple[int, int]]]:
    """Returns the places (i, j) of each class."""
    check_memory(
        BYTES_PER_PAIR * axis.output_size * axis.kernel_size**2,
        f"an axis of {axis.input_size:,} pixels whose kernel spans {axis.span:,}",
        "a smaller dilation_rate, or no penalty on this layer",
    )
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
