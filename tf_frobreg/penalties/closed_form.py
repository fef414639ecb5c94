"""The closed form of ‖MᵀM − αI‖²_F and of its gradient, from the coincidence classes of each axis.

Let S[c1, c2] = Σ K[p, q] K[r, s]ᵀ, summed over the pairs (p, r) of class c1 on the first axis and the pairs
(q, s) of class c2 on the second. This block stands at n_c1·n_c2 places of MᵀM, so

    ‖MᵀM − αI‖²_F = Σ n_c1 n_c2 ‖S[c1, c2] − α·[c1 and c2 on the diagonal]·I‖²_F.

The code keeps this sum of squares. Multiplied out, its terms would cancel, in float32 down to noise near the
optimum. MMᵀ has the same form with outputs in place of inputs. The code uses the smaller of the two.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import tensorflow as tf

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

    def value(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """Returns ‖Gram − αI‖²_F, twice differentiable.

        It defines its own gradient, with fewer matrix products than automatic differentiation would take.
        """
        if not self.parts:
            return tf.reduce_sum(0.0 * kernel)

        @tf.custom_gradient
        def penalty(kernel: tf.Tensor) -> tuple:
            taps, residuals = self._residuals(kernel, alpha)

            def first_order(upstream: tf.Tensor) -> tf.Tensor:
                return upstream * self._differentiable_gradient(kernel, alpha, taps, residuals)

            return _half_squares(residuals), first_order

        return penalty(kernel)

    def value_and_gradient(self, kernel: tf.Tensor, alpha: float) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns ‖Gram − αI‖²_F and its derivative in the kernel."""
        if not self.parts:
            return tf.zeros((), kernel.dtype), tf.zeros_like(kernel)
        taps, residuals = self._residuals(kernel, alpha)
        return _half_squares(residuals), self._gradient(taps, residuals)

    def value_by_group(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """Returns the part of `value` that each group of the convolution adds, `(groups,)`."""
        if not self.parts:
            return tf.zeros(self.conv.blocks[0], kernel.dtype)
        _, residuals = self._residuals(kernel, alpha)
        return tf.add_n([0.5 * tf.reduce_sum(residual**2, axis=(0, 2, 3)) for residual in residuals])

    def deviation_bound(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """Returns an upper bound on ‖Gram − αI‖₂, the largest |σ² − α|.

        The norm of a symmetric block matrix is at most its largest row sum of block norms. The norm of a
        block B is at most ‖BBᵀBBᵀ‖_F^¼. The cost does not depend on the image size.
        """
        if not self.parts:
            return tf.zeros((), tf.float64)
        _, residuals = self._residuals(kernel, alpha)
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
        taps, zeroth = self._residuals(kernel, alpha)
        blocks = self._blocks(direction)
        coefficients = []  # of each part
        for part, (left, right), e0 in zip(self.parts, taps, zeroth, strict=True):
            new_left, new_right = (_take(blocks, ends) for ends in part.pairs.T)
            # K Dᵀ + D Kᵀ in one product, with the factors side by side
            e1 = _class_sums(part, tf.concat([left, new_left], -1), tf.concat([new_right, right], -1))
            e2 = _class_sums(part, new_left, new_right)
            coefficients.append(
                (_inner(e0, e1), tf.nn.l2_loss(e1) + _inner(e0, e2), _inner(e1, e2), tf.nn.l2_loss(e2))
            )
        return [tf.add_n(terms) for terms in zip(*coefficients, strict=True)]

    def _blocks(self, kernel: tf.Tensor) -> tf.Tensor:
        """Returns the taps as (first axis, other axes, groups, g, h). Gram has blocks of g × g."""
        blocks = self.conv.by_group(kernel, tf)
        if self.side == "output":
            blocks = tf.linalg.matrix_transpose(blocks)
        return tf.reshape(blocks, (self._first_size, -1, *blocks.shape[-3:]))

    def _residuals(
        self, kernel: tf.Tensor, alpha: float
    ) -> tuple[list[tuple[tf.Tensor, tf.Tensor]], list[tf.Tensor]]:
        """Returns the taps of each part's pairs, and the residual √(2n)·(Gram − αI) of each part.

        The taps are K[p] and K[r], each `(pairs, other axes, groups, g, h)`. The residual has one block per
        class, `(classes, groups, g, g)`.
        """
        blocks = self._blocks(kernel)
        _, rest, groups, g, _ = blocks.shape
        count = sum(len(part.pairs) for part in self.parts) * rest**2
        check_memory(
            BLOCK_COPIES * kernel.dtype.size * count * groups * g**2,
            f"the closed form of a kernel of shape {self.conv.kernel_shape} has {count:,} blocks",
            "a smaller kernel, or no penalty on this layer",
        )
        taps, residuals = [], []
        for part in self.parts:
            left, right = (_take(blocks, ends) for ends in part.pairs.T)
            residual = _class_sums(part, left, right)
            if part.target is not None:
                target = alpha * _constant(part.target[:, None, None], kernel)
                residual = tf.linalg.set_diag(residual, tf.linalg.diag_part(residual) - target)
            taps.append((left, right))
            residuals.append(residual)
        return taps, residuals

    def _gradient(self, taps: list[tuple[tf.Tensor, tf.Tensor]], residuals: list[tf.Tensor]) -> tf.Tensor:
        """Returns the derivative of `_half_squares(residuals)` in the kernel.

        A pair (p, r) adds F K[r] to the gradient at p, and Fᵀ K[p] to the gradient at r. F is the weighted
        sum of the residuals of all classes that contain the pair.
        """
        addends: list[list[tf.Tensor]] = [[] for _ in range(self._first_size)]  # by tap of the first axis
        for part, (left, right), residual in zip(self.parts, taps, residuals, strict=True):
            count, rest, groups, g, h = left.shape
            # The part on the diagonal contains (r, p) with each (p, r). Both products have the same sum, so
            # twice the first one suffices.
            scale = 1.0 if part.target is None else 2.0
            weights = [scale * part.members[0].T, *(m.T for m in part.members[1:])]
            factors = tf.reshape(_apply_kronecker(weights, residual), (count, rest, rest, groups, g, g))
            ends = [(part.pairs[:, 0], (0, 3, 1, 4, 2, 5), right)]
            if part.target is None:
                ends.append((part.pairs[:, 1], (0, 3, 2, 5, 1, 4), left))
            for indices, order, other in ends:
                products = tf.unstack(_multiply(tf.transpose(factors, order), other))
                for index, product in zip(indices, products, strict=True):
                    addends[index].append(product)
        unused = tf.zeros((groups, rest * g, h), residual.dtype)  # for taps that never meet the image
        # The order in which tf.add_n adds depends on timing, and so would the last digit.
        total = tf.stack([tf.reduce_sum(products, axis=0) if products else unused for products in addends])
        total = tf.transpose(tf.reshape(total, (len(addends), groups, rest, g, h)), (0, 2, 1, 3, 4))
        if self.side == "output":
            total = tf.linalg.matrix_transpose(total)
        return self.conv.from_groups(total, tf)

    def _differentiable_gradient(
        self,
        kernel: tf.Tensor,
        alpha: float,
        taps: list[tuple[tf.Tensor, tf.Tensor]],
        residuals: list[tf.Tensor],
    ) -> tf.Tensor:
        """Returns `_gradient(taps, residuals)`, which a tape can differentiate again."""

        @tf.custom_gradient
        def gradient(kernel: tf.Tensor) -> tuple:
            def hessian_vector_product(direction: tf.Tensor) -> tf.Tensor:
                with tf.GradientTape() as tape:  # rarely needed, so left to automatic differentiation
                    tape.watch(kernel)
                    _, again = self.value_and_gradient(kernel, alpha)
                return tape.gradient(again, kernel, output_gradients=direction)

            return self._gradient(taps, residuals), hessian_vector_product

        return gradient(kernel)

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


def _class_sums(part: Part, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns √(2n) Σ left[p, q] right[r, s]ᵀ over the pairs of each class, (classes, groups, g, g)."""
    left, right = left[:, :, None], right[:, None]
    if left.shape[-2] == 1:  # depthwise: many products of single numbers, which matmul multiplies slowly
        products = tf.reduce_sum(left * right, axis=-1, keepdims=True)
    else:
        products = tf.matmul(left, right, transpose_b=True)
    return tf.reshape(_apply_kronecker(part.members, products), (-1, *products.shape[-3:]))


def _inner(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """Returns the inner product of two tensors of the same shape."""
    return tf.reduce_sum(left * right)


def _half_squares(residuals: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns ½ Σ residual². A sum of squares is never negative."""
    return tf.add_n([tf.nn.l2_loss(residual) for residual in residuals])


def _apply_kronecker(matrices: Sequence[np.ndarray], blocks: tf.Tensor) -> tf.Tensor:
    """Applies the Kronecker product of one or two matrices to the leading axes of `blocks`."""
    for number, matrix in enumerate(matrices):
        done = math.prod(m.shape[0] for m in matrices[:number])
        blocks = tf.reshape(blocks, (done, matrix.shape[1], -1) if number else (matrix.shape[1], -1))
        blocks = tf.matmul(_constant(matrix, blocks), blocks)
    return blocks


def _multiply(factors: tf.Tensor, taps: tf.Tensor) -> tf.Tensor:
    """Returns factors (pairs, groups, q, g, s, g) times taps (pairs, s, groups, g, h).

    The result has the shape (pairs, groups, q·g, h).
    """
    count, groups, rest, g = factors.shape[:4]
    taps = tf.reshape(tf.transpose(taps, (0, 2, 1, 3, 4)), (count, groups, rest * g, -1))
    return tf.matmul(tf.reshape(factors, (count, groups, rest * g, rest * g)), taps)


def _take(blocks: tf.Tensor, indices: np.ndarray) -> tf.Tensor:
    """Returns the blocks at the indices. Consecutive ones are a slice, which copies nothing."""
    start, stop = int(indices[0]), int(indices[0]) + len(indices)
    if np.array_equal(indices, np.arange(start, stop)):
        return blocks[start:stop]
    return tf.gather(blocks, indices)


def _constant(values: np.ndarray, like: tf.Tensor) -> tf.Tensor:
    """Returns a constant of the dtype of `like`."""
    return tf.constant(values.astype(like.dtype.as_numpy_dtype))
