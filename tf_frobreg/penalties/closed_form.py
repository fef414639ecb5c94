"""The closed form of ‖MᵀM − αI‖²_F and of its gradient, from the coincidence classes of each axis.

Let S[c1, c2] = Σ K[p, q] K[r, s]ᵀ, summed over the pairs (p, r) of class c1 on the first axis and the pairs
(q, s) of class c2 on the second. This block stands at n_c1·n_c2 places of MᵀM, so

    ‖MᵀM − αI‖²_F = Σ n_c1 n_c2 ‖S[c1, c2] − α·[c1 and c2 on the diagonal]·I‖²_F.

The code keeps this sum of squares. Multiplied out, its terms would cancel, in float32 down to noise near the
optimum. MMᵀ has the same form with outputs in place of inputs. The code uses the smaller of the two.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tensorflow as tf

from tf_frobreg.backends import Operations, TensorFlowOperations, dtype_of, itemsize, operations_of
from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution, Side
from tf_frobreg.penalties.class_tables import Part, build_parts, kronecker
from tf_frobreg.penalties.coincidence_classes import coincidences, rows_and_columns
from tf_frobreg.penalties.penalty_function import ONE, PenaltyFunction, Weight
from tf_frobreg.penalties.shared_forms import (
    apply_kronecker,
    one_tap_penalty,
    penalty_of_numbers,
    value_and_slope_of_numbers,
)

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
    has_numbers = (g if side == "input" else h) == 1
    # No tap meets the image of, for example, a single pixel under an even kernel with dilation 2.
    parts = build_parts(axes, side, has_numbers) if gram_size else ()
    others = [rows_and_columns(axis, side) for axis in axes[1:]]
    other_rows = np.stack([np.atleast_2d(kronecker(table[end] for table in others)) for end in (0, 1)])
    copies = _count_reached(axes, side) if all(axis.kernel_size == 1 for axis in axes) else 1
    return ClosedForm(conv, side, gram_size, parts, other_rows, copies)


@dataclasses.dataclass(frozen=True, eq=False)
class ClosedForm:
    """Value and gradient of ‖Gram − αI‖²_F. Gram is the smaller of MᵀM and MMᵀ without its zero rows.

    Attributes:
        conv: The geometry.
        side: "input" if Gram = MᵀM, "output" if Gram = MMᵀ, for M of the convolution that `conv.axes`
            describe.
        gram_size: Number of rows of Gram. The rank of M is at most this number, for every kernel.
        parts: The classes. Two classes that are each other's transpose on the first axis are counted once,
            with 2n places. If the blocks are single numbers, one part has all classes and all pairs.
        other_rows: `rows` of the parts for all axes except the first together.
        copies: How many equal blocks Gram consists of: one per pixel if the kernel has one tap, otherwise 1.
    """

    conv: Convolution
    side: Side
    gram_size: int
    parts: tuple[Part, ...]
    other_rows: np.ndarray
    copies: int

    def value(self, kernel: Any, alpha: float) -> Any:
        """Returns ‖Gram − αI‖²_F, twice differentiable."""
        return self.weighted(kernel, alpha, ONE, 0.0)

    def weighted(self, kernel: Any, alpha: float, weight: Weight, floor: float) -> Any:
        """Returns weight·(‖Gram − αI‖²_F + floor), or 0 without computing it if the weight is 0.

        It defines its own gradient, with fewer matrix products than automatic differentiation would take.
        """
        ops = operations_of(kernel)
        if self._has_one_tap:
            if self.conv.blocks[0] > 1:
                kernel = ops.reshape(self.conv.by_group(kernel, ops), self.conv.blocks)
            return one_tap_penalty(self.side, alpha)(kernel, weight.times(self.copies), floor / self.copies)
        if self._has_numbers and self.parts:
            self._check_memory(kernel)
            taps = self._taps(kernel, ops)
            return penalty_of_numbers(self._first_size)(taps, weight, floor, self._tables(alpha))
        return _penalty(self, alpha)(kernel, weight, floor)

    def value_and_slope(self, kernel: Any, alpha: float) -> tuple[Any, Callable[[Any], Any]]:
        """Returns ‖Gram − αI‖²_F, and a function of a weight that returns weight times its gradient."""
        ops = operations_of(kernel)
        if not self.parts:
            return ops.sum(0.0 * kernel), lambda weight: 0.0 * kernel
        if self._has_numbers:
            self._check_memory(kernel)
            tables = [ops.constant(table, kernel) for table in self._tables(alpha)]
            value, slope = value_and_slope_of_numbers(self._taps(kernel, ops), self._first_size, *tables)
            return value, lambda weight: self.conv.from_groups(
                ops.reshape(slope(weight), (-1, *self.conv.blocks)), ops
            )
        taps, residuals = self._residuals(kernel, alpha, ops)
        return _half_squares(residuals, ops), lambda weight: weight * self._gradient(taps, residuals, ops)

    def value_and_gradient(self, kernel: Any, alpha: float) -> tuple[Any, Any]:
        """Returns ‖Gram − αI‖²_F and its derivative in the kernel."""
        value, slope = self.value_and_slope(kernel, alpha)
        return value, slope(1.0)

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
        self._check_memory(kernel)
        blocks = self._blocks(kernel, ops)
        taps, residuals = [], []
        for part in self.parts:
            left, right = (_take(blocks, ends, ops) for ends in part.pairs.T)
            residual = _class_sums(part, left, right, ops)
            if part.target is not None:
                target = ops.constant(_targets(part, alpha)[:, None, None], kernel)
                residual = ops.subtract_from_diagonal(residual, target)
            taps.append((left, right))
            residuals.append(residual)
        return taps, residuals

    def _check_memory(self, kernel: Any) -> None:
        """Raises an error if the products of all pairs of taps do not fit in memory."""
        groups, g, h = self.conv.blocks
        rest = math.prod(self.conv.kernel_size[1:])
        count = sum(len(part.pairs) for part in self.parts) * rest**2
        size = g * h if self._has_numbers else (g if self.side == "input" else h) ** 2
        check_memory(
            BLOCK_COPIES * itemsize(kernel) * count * groups * size,
            f"the closed form of a kernel of shape {self.conv.kernel_shape} has {count:,} blocks",
            "a smaller kernel, or no penalty on this layer",
        )

    def _gradient(self, taps: list[tuple[Any, Any]], residuals: list[Any], ops: Operations) -> Any:
        """Returns the derivative of `_half_squares(residuals)` in the kernel.

        A pair (p, r) adds F K[r] to the gradient at p, and Fᵀ K[p] to the gradient at r. F is the weighted
        sum of the residuals of all classes that contain the pair.
        """
        products = []  # (their taps on the first axis, (taps, groups, rest * g, h))
        for part, (left, right), residual in zip(self.parts, taps, residuals, strict=True):
            factors = _apply_tables(part.members_of_gradient, residual, ops)
            products.append((part.pairs[:, 0], _multiply(factors, right, ops)))
            if part.target is None:
                products.append((part.pairs[:, 1], _multiply(factors, left, ops, transposed=True)))
        first, rest = self._first_size, right.shape[1]
        groups, g, h = right.shape[2:]
        total = _sum_by_tap(products, first, ops)
        total = _rearrange(
            total, (first, groups, rest, g, h), (0, 2, 1, 3, 4), (first, rest, groups, g, h), ops
        )
        if self.side == "output":
            total = ops.swap_last_axes(total)
        return self.conv.from_groups(total, ops)

    def _taps(self, kernel: Any, ops: Operations) -> Any:
        """Returns the kernel in the shape that `value_and_slope_of_numbers` takes."""
        groups, g, h = self.conv.blocks
        shape = (math.prod(self.conv.kernel_size), groups, g * h)
        return ops.reshape(self.conv.by_group(kernel, ops), shape if g * h > 1 else shape[:2])

    def _tables(self, alpha: float) -> tuple[np.ndarray, ...]:
        """Returns the target and the members that `value_and_slope_of_numbers` takes."""
        (part,) = self.parts
        target = _targets(part, alpha)
        if len(part.members) > 1:
            return target.reshape(len(part.members[0]), -1, 1), *part.members
        (matrix,) = part.members  # its columns are (p, r, q, s)
        first = self._first_size
        rest = math.isqrt(matrix.shape[1]) // first
        by_tap = matrix.reshape(-1, first, first, rest, rest).swapaxes(2, 3)
        return target[:, None], by_tap.reshape(matrix.shape)

    @property
    def _has_one_tap(self) -> bool:
        return all(size == 1 for size in self.conv.kernel_size)

    @property
    def _has_numbers(self) -> bool:
        """Whether the blocks of Gram are single numbers, as for depthwise kernels."""
        _, g, h = self.conv.blocks
        return (g if self.side == "input" else h) == 1

    @property
    def _first_size(self) -> int:
        """Number of taps on the first axis."""
        return self.conv.kernel_size[0] if self.conv.kernel_size else 1


@lru_cache(maxsize=1024)
def _penalty(form: ClosedForm, alpha: float) -> PenaltyFunction:
    """Returns `ClosedForm.value` as a function of the kernel, the same one each time, as its traces need."""
    return PenaltyFunction(lambda kernel: form.value_and_slope(kernel, alpha))


def _targets(part: Part, alpha: float) -> np.ndarray:
    """Returns α times the target of a part that has one. It is infinite for the largest α, as R_α then is."""
    with np.errstate(over="ignore"):
        return alpha * np.asarray(part.target)


def _count_reached(axes: Sequence[Axis], side: Side) -> int:
    """Returns the number of pixels that some tap reaches. At other pixels the rows of Gram are zero."""
    classes = (coincidences(axis, side) for axis in axes)
    return math.prod(int(c.counts[c.diagonal].sum()) for c in classes)


def _class_sums(part: Part, left: Any, right: Any, ops: Operations) -> Any:
    """Returns √(2n) Σ left[p, q] right[r, s]ᵀ over the pairs of each class, (classes, groups, g, g)."""
    if left.shape[1] > 1:
        left, right = ops.expand_dims(left, 2), ops.expand_dims(right, 1)
    if left.shape[-2] == 1:  # depthwise: many products of single numbers, which matmul multiplies slowly
        products = ops.sum(left * right, axis=-1, keepdims=True)
    else:
        products = ops.matmul_transposed(left, right)
    classes = math.prod(matrix.shape[0] for matrix in part.members)
    return ops.reshape(_apply_tables(part.members, products, ops), (classes, *products.shape[-3:]))


def _inner(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns the inner product of two tensors of the same shape."""
    return tf.reduce_sum(left * right)


def _half_squares(residuals: Sequence[Any], ops: Operations) -> Any:
    """Returns ½ Σ residual². A sum of squares is never negative."""
    return ops.add([ops.half_square(residual) for residual in residuals])


def _apply_tables(matrices: Sequence[np.ndarray], blocks: Any, ops: Operations) -> Any:
    """Returns `apply_kronecker` of matrices that are constants."""
    if all(matrix.size == 1 for matrix in matrices):
        return math.prod(matrix.item() for matrix in matrices) * blocks
    return apply_kronecker([ops.constant(matrix, blocks) for matrix in matrices], blocks, ops)


def _multiply(factors: Any, taps: Any, ops: Operations, *, transposed: bool = False) -> Any:
    """Returns the products of factors (pairs, q, s, groups, g, g), with q and s in one axis or two, and taps.

    The taps are (pairs, s, groups, g, h), or (pairs, q, groups, g, h) for the transposed factors. The result
    has the shape (pairs, groups, rest·g, h).
    """
    count, rest, groups, g, h = taps.shape
    order = (0, 3, 2, 5, 1, 4) if transposed else (0, 3, 1, 4, 2, 5)
    size = rest * g
    factors = _rearrange(factors, (count, rest, rest, groups, g, g), order, (count, groups, size, size), ops)
    taps = _rearrange(taps, taps.shape, (0, 2, 1, 3, 4), (count, groups, size, h), ops)
    return ops.matmul(factors, taps)


def _sum_by_tap(products: Sequence[tuple[np.ndarray, Any]], count: int, ops: Operations) -> Any:
    """Returns the sums of the products that belong to each of `count` taps, from (their taps, products)."""
    whole = [product for taps, product in products if np.array_equal(taps, np.arange(count))]
    addends: list[list[Any]] = [[] for _ in range(count)]
    for taps, product in products:
        if not any(product is one for one in whole):
            for tap, own in zip(taps, ops.unstack(product), strict=True):
                addends[tap].append(own)
    if any(addends):
        unused = ops.zeros(
            products[0][1].shape[1:], dtype_of(products[0][1])
        )  # a tap that never meets the image
        whole.append(ops.stack([ops.add_in_order(own) if own else unused for own in addends]))
    return ops.add_in_order(whole)


def _rearrange(
    tensor: Any, split: Sequence[int], order: Sequence[int], joined: Sequence[int], ops: Operations
) -> Any:
    """Returns the tensor reshaped to `split`, transposed to `order` and reshaped to `joined`.

    If the order moves only axes of length 1, one reshape does it.
    """
    moved = [axis for axis in order if split[axis] != 1]
    if moved != sorted(moved):
        tensor = ops.transpose(ops.reshape(tensor, split), order)
    return ops.reshape(tensor, joined)


def _take(blocks: Any, indices: np.ndarray, ops: Operations) -> Any:
    """Returns the blocks at the indices. Consecutive ones are a slice, which copies nothing."""
    start, stop = int(indices[0]), int(indices[0]) + len(indices)
    if np.array_equal(indices, np.arange(start, stop)):
        return blocks if len(indices) == blocks.shape[0] else blocks[start:stop]
    return ops.take(blocks, indices)
