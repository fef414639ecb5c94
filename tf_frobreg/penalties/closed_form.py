"""The closed form of ‖MᵀM − αI‖²_F and of its gradient, from the coincidence classes of each axis.

Let S[c1, c2] = Σ K[p, q] K[r, s]ᵀ, summed over the pairs (p, r) of class c1 on the first axis and the pairs
(q, s) of class c2 on the second. This block stands at n_c1·n_c2 places of MᵀM, so

    ‖MᵀM − αI‖²_F = Σ n_c1 n_c2 ‖S[c1, c2] − α·[c1 and c2 on the diagonal]·I‖²_F.

The code keeps this sum of squares. Multiplied out, its terms would cancel, in float32 down to noise near the
optimum. MMᵀ has the same form with outputs in place of inputs. The code uses the smaller of the two.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from tf_frobreg.backends import Operations, TensorFlowOperations, dtype_of, itemsize, operations_of
from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution, Side
from tf_frobreg.penalties.coincidence_classes import (
    Coincidences,
    coincidences,
    joint_members,
    rows_and_columns,
)

# Up to this many entries one combined member matrix is faster than two, which move the blocks twice.
COMBINED = 4096
# Peak memory of value and gradient, in units of the blocks K[p, q] K[r, s]ᵀ: measured 2.8 for 7×7×512×512.
BLOCK_COPIES = 3


@lru_cache(maxsize=1024)
def closed_form(conv: Convolution) -> "ClosedForm":
    """Returns the closed form for one geometry."""
    axes = conv.axes or (Axis(1, 1, 1, 1, "valid"),)  # Dense: one pixel, one tap
    groups, g, h = conv.blocks
    num_inputs = _count_reached(axes, "input") * groups * g
    num_outputs = _count_reached(axes, "output") * groups * h
    side: Side = "input" if num_inputs <= num_outputs else "output"
    gram_size = min(num_inputs, num_outputs)
    # No tap meets the image of, for example, a single pixel under an even kernel with dilation 2.
    parts = _build_parts(axes, side) if gram_size else ()
    others = [rows_and_columns(axis, side) for axis in axes[1:]]
    other_rows = np.stack([np.atleast_2d(_kronecker(table[end] for table in others)) for end in (0, 1)])
    return ClosedForm(conv, side, gram_size, parts, other_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The classes on the diagonal of the first axis, or the classes off it. The two parts share no pair.

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


@dataclasses.dataclass(frozen=True, eq=False)
class ClosedForm:
    """Value and gradient of ‖Gram − αI‖²_F. Gram is the smaller of MᵀM and MMᵀ without its zero rows.

    Attributes:
        conv: The geometry.
        side: "input" if Gram = MᵀM, "output" if Gram = MMᵀ, for M of the convolution that `conv.axes`
            describe.
        gram_size: Number of rows of Gram. The rank of M is at most this number, for every kernel.
        parts: The classes. Two classes that are each other's transpose on the first axis are counted once,
            with 2n places.
        other_rows: `rows` of the parts for all axes except the first together.
    """

    conv: Convolution
    side: Side
    gram_size: int
    parts: tuple[Part, ...]
    other_rows: np.ndarray

    def value(self, kernel: Any, alpha: float) -> Any:
        """Returns ‖Gram − αI‖²_F, twice differentiable.

        It defines its own gradient, with fewer matrix products than automatic differentiation would take.
        """
        ops = operations_of(kernel)
        if not self.parts:
            return ops.sum(0.0 * kernel)

        def value_and_gradient(kernel: Any) -> tuple[Any, Callable[[], Any]]:
            taps, residuals = self._residuals(kernel, alpha, ops)
            return _half_squares(residuals, ops), lambda: self._gradient(taps, residuals, ops)

        return ops.with_gradient(value_and_gradient, kernel)

    def value_and_gradient(self, kernel: Any, alpha: float) -> tuple[Any, Any]:
        """Returns ‖Gram − αI‖²_F and its derivative in the kernel."""
        ops = operations_of(kernel)
        if not self.parts:
            return ops.sum(0.0 * kernel), 0.0 * kernel
        taps, residuals = self._residuals(kernel, alpha, ops)
        return _half_squares(residuals, ops), self._gradient(taps, residuals, ops)

    def value_by_group(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """Returns the part of `value` that each group of the convolution adds, `(groups,)`."""
        if not self.parts:
            return tf.zeros(self.conv.blocks[0], kernel.dtype)
        _, residuals = self._residuals(kernel, alpha, TensorFlowOperations)
        return tf.add_n([0.5 * tf.reduce_sum(residual**2, axis=(0, 2, 3)) for residual in residuals])

    def deviation_bound(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """Returns an upper bound on ‖Gram − αI‖₂, the largest |σ² − α|.

        The norm of a symmetric block matrix is at most its largest row sum of block norms. The norm of a
        block B is at most ‖BBᵀBBᵀ‖_F^¼. The cost does not depend on the image size.
        """
        if not self.parts:
            return tf.zeros((), tf.float64)
        _, residuals = self._residuals(kernel, alpha, TensorFlowOperations)
        sums = []  # of each part: (rows of the first axis, rows of the others, groups)
        for part, residual in zip(self.parts, residuals, strict=True):
            blocks = tf.cast(residual, tf.float64) / part.weights[:, None, None, None]
            squares = tf.matmul(blocks, blocks, transpose_b=True)
            norms = tf.norm(tf.matmul(squares, squares), axis=(-2, -1)) ** 0.25
            norms = tf.reshape(norms, (part.rows.shape[-1], self.other_rows.shape[-1], -1))
            # A class of the first axis also stands for its transpose. There the other axes' classes are
            # transposed too, so the second addend (x = 1) counts columns.
            sums.append(tf.einsum("xac,xbd,cdg->abg", part.rows, self.other_rows, norms))
        return tf.reduce_max(tf.add_n(sums))

    def line(self, kernel: tf.Tensor, direction: tf.Tensor, alpha: float) -> list[tf.Tensor]:
        """Returns [c1, c2, c3, c4] of ‖Gram(K + tD) − αI‖²_F = value + c1 t + c2 t² + c3 t³ + c4 t⁴.

        The residual along the line is E0 + t·E1 + t²·E2, and the coefficients are inner products of the
        three. Differences of values would lose digits.
        """
        if not self.parts:
            return [tf.zeros((), kernel.dtype)] * 4
        ops = TensorFlowOperations
        taps, zeroth = self._residuals(kernel, alpha, ops)
        blocks = self._blocks(direction, ops)
        coefficients = []  # of each part
        for part, (left, right), e0 in zip(self.parts, taps, zeroth, strict=True):
            new_left, new_right = (_take(blocks, ends, ops) for ends in part.pairs.T)
            # K Dᵀ + D Kᵀ in one product, with the factors side by side
            e1 = _class_sums(part, tf.concat([left, new_left], -1), tf.concat([new_right, right], -1), ops)
            e2 = _class_sums(part, new_left, new_right, ops)
            coefficients.append(
                (_inner(e0, e1), tf.nn.l2_loss(e1) + _inner(e0, e2), _inner(e1, e2), tf.nn.l2_loss(e2))
            )
        return [tf.add_n(terms) for terms in zip(*coefficients, strict=True)]

    def _blocks(self, kernel: Any, ops: Operations) -> Any:
        """Returns the taps as (first axis, other axes, groups, g, h). Gram has blocks of g × g."""
        blocks = self.conv.by_group(kernel, ops)
        if self.side == "output":
            blocks = ops.swap_last_axes(blocks)
        return ops.reshape(blocks, (self._first_size, -1, *blocks.shape[-3:]))

    def _residuals(
        self, kernel: Any, alpha: float, ops: Operations
    ) -> tuple[list[tuple[Any, Any]], list[Any]]:
        """Returns the taps of each part's pairs, and the residual √(2n)·(Gram − αI) of each part.

        The taps are K[p] and K[r], each `(pairs, other axes, groups, g, h)`. The residual has one block per
        class, `(classes, groups, g, g)`.
        """
        blocks = self._blocks(kernel, ops)
        _, rest, groups, g, _ = blocks.shape
        count = sum(len(part.pairs) for part in self.parts) * rest**2
        check_memory(
            BLOCK_COPIES * itemsize(kernel) * count * groups * g**2,
            f"the closed form of a kernel of shape {self.conv.kernel_shape} has {count:,} blocks",
            "a smaller kernel, or no penalty on this layer",
        )
        taps, residuals = [], []
        for part in self.parts:
            left, right = (_take(blocks, ends, ops) for ends in part.pairs.T)
            residual = _class_sums(part, left, right, ops)
            if part.target is not None:
                target = alpha * ops.constant(part.target[:, None, None], kernel)
                residual = ops.subtract_from_diagonal(residual, target)
            taps.append((left, right))
            residuals.append(residual)
        return taps, residuals

    def _gradient(self, taps: list[tuple[Any, Any]], residuals: list[Any], ops: Operations) -> Any:
        """Returns the derivative of `_half_squares(residuals)` in the kernel.

        A pair (p, r) adds F K[r] to the gradient at p, and Fᵀ K[p] to the gradient at r. F is the weighted
        sum of the residuals of all classes that contain the pair.
        """
        addends: list[list[Any]] = [[] for _ in range(self._first_size)]  # by tap of the first axis
        for part, (left, right), residual in zip(self.parts, taps, residuals, strict=True):
            count, rest, groups, g, h = left.shape
            # The part on the diagonal contains (r, p) with each (p, r). Both products have the same sum, so
            # twice the first one suffices.
            scale = 1.0 if part.target is None else 2.0
            weights = [scale * part.members[0].T, *(m.T for m in part.members[1:])]
            factors = _apply_kronecker(weights, residual, ops)
            factors = ops.reshape(factors, (count, rest, rest, groups, g, g))
            ends = [(part.pairs[:, 0], (0, 3, 1, 4, 2, 5), right)]
            if part.target is None:
                ends.append((part.pairs[:, 1], (0, 3, 2, 5, 1, 4), left))
            for indices, order, other in ends:
                products = ops.unstack(_multiply(ops.transpose(factors, order), other, ops))
                for index, product in zip(indices, products, strict=True):
                    addends[index].append(product)
        unused = ops.zeros((groups, rest * g, h), dtype_of(residual))  # for taps that never meet the image
        total = ops.stack([ops.add_in_order(products) if products else unused for products in addends])
        total = ops.transpose(ops.reshape(total, (len(addends), groups, rest, g, h)), (0, 2, 1, 3, 4))
        if self.side == "output":
            total = ops.swap_last_axes(total)
        return self.conv.from_groups(total, ops)

    @property
    def _first_size(self) -> int:
        """Number of taps on the first axis."""
        return self.conv.kernel_size[0] if self.conv.kernel_size else 1


def _count_reached(axes: Sequence[Axis], side: Side) -> int:
    """Returns the number of pixels that some tap reaches. At other pixels the rows of Gram are zero."""
    classes = (coincidences(axis, side) for axis in axes)
    return math.prod(int(c.counts[c.diagonal].sum()) for c in classes)


def _build_parts(axes: Sequence[Axis], side: Side) -> tuple[Part, ...]:
    """Returns the part on the diagonal and the part off it, without an empty one."""
    first = coincidences(axes[0], side, half=True)
    rest = [coincidences(axis, side) for axis in axes[1:]]
    joint = joint_members(rest, [axis.kernel_size for axis in axes[1:]])
    joint = joint * np.sqrt(_kronecker(c.counts for c in rest))[:, None]
    on_diagonal = _kronecker(c.diagonal for c in rest)
    rows = rows_and_columns(axes[0], side, half=True)
    return tuple(
        _build_part(first, rows, d, joint, on_diagonal) for d in (True, False) if d in first.diagonal
    )


def _build_part(
    first: Coincidences, rows: np.ndarray, diagonal: bool, joint: np.ndarray, on_diagonal: np.ndarray
) -> Part:
    """Returns one part, from the first axis and the weighted members of all other axes."""
    chosen = first.diagonal == diagonal
    pairs = first.members[chosen].any(axis=0)
    members = first.members[chosen][:, pairs] * np.sqrt(2 * first.counts[chosen])[:, None]
    target = np.kron(members.max(axis=1), joint.max(axis=1) * on_diagonal) if diagonal else None
    weights = np.kron(members.max(axis=1), joint.max(axis=1))
    combine = members.size * joint.size <= COMBINED
    matrices = (np.kron(members, joint),) if combine else (members, joint)
    return Part(first.pairs[pairs], matrices, target, weights, rows[:, :, chosen])


def _kronecker(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the Kronecker product of vectors or of matrices. That of no array is 1."""
    product = np.ones(1)
    for array in arrays:
        product = np.kron(product, array)
    return product


def _class_sums(part: Part, left: Any, right: Any, ops: Operations) -> Any:
    """Returns √(2n) Σ left[p, q] right[r, s]ᵀ over the pairs of each class, (classes, groups, g, g)."""
    left, right = left[:, :, None], right[:, None]
    if left.shape[-2] == 1:  # depthwise: many products of single numbers, which matmul multiplies slowly
        products = ops.sum(left * right, axis=-1, keepdims=True)
    else:
        products = ops.matmul_transposed(left, right)
    return ops.reshape(_apply_kronecker(part.members, products, ops), (-1, *products.shape[-3:]))


def _inner(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns the inner product of two tensors of the same shape."""
    return tf.reduce_sum(left * right)


def _half_squares(residuals: Sequence[Any], ops: Operations) -> Any:
    """Returns ½ Σ residual². A sum of squares is never negative."""
    return ops.add([ops.half_square(residual) for residual in residuals])


def _apply_kronecker(matrices: Sequence[np.ndarray], blocks: Any, ops: Operations) -> Any:
    """Applies the Kronecker product of one or two matrices to the leading axes of `blocks`."""
    for number, matrix in enumerate(matrices):
        done = math.prod(m.shape[0] for m in matrices[:number])
        blocks = ops.reshape(blocks, (done, matrix.shape[1], -1) if number else (matrix.shape[1], -1))
        blocks = ops.matmul(ops.constant(matrix, blocks), blocks)
    return blocks


def _multiply(factors: Any, taps: Any, ops: Operations) -> Any:
    """Returns factors (pairs, groups, q, g, s, g) times taps (pairs, s, groups, g, h).

    The result has the shape (pairs, groups, q·g, h).
    """
    count, groups, rest, g = factors.shape[:4]
    taps = ops.reshape(ops.transpose(taps, (0, 2, 1, 3, 4)), (count, groups, rest * g, -1))
    return ops.matmul(ops.reshape(factors, (count, groups, rest * g, rest * g)), taps)


def _take(blocks: Any, indices: np.ndarray, ops: Operations) -> Any:
    """Returns the blocks at the indices. Consecutive ones are a slice, which copies nothing."""
    start, stop = int(indices[0]), int(indices[0]) + len(indices)
    if np.array_equal(indices, np.arange(start, stop)):
        return blocks[start:stop]
    return ops.take(blocks, indices)
