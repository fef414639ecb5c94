"""The closed form of ‖MᵀM − αI‖²_F and of its gradient, from the coincidence classes of each axis.

With S[c1, c2] = Σ K[p, q] K[r, s]ᵀ over the pairs (p, r) of class c1 on the first axis and (q, s) of
class c2 on the second, the block of MᵀM that stands at n_c1·n_c2 places,

    ‖MᵀM − αI‖²_F = Σ n_c1 n_c2 ‖S[c1, c2] − α·[c1 and c2 on the diagonal]·I‖²_F.

It stays a sum of squares: multiplied out it would cancel, in float32 down to noise near the optimum. MMᵀ
has the same form with outputs in place of inputs; the smaller of the two is the one used.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache, reduce

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_memory
from tf_frobreg.convolution.geometry import Axis, Convolution
from tf_frobreg.penalties.coincidence_classes import Coincidences, coincidences, joint_members

# Entries up to which one combined member matrix beats one per axis, which move the blocks twice.
COMBINED = 4096
# Peak memory of value and gradient, in units of the blocks K[p, q] K[r, s]ᵀ: measured 2.8 for 7×7×512×512.
BLOCK_COPIES = 3


@lru_cache(maxsize=1024)
def closed_form(conv: Convolution) -> "ClosedForm":
    """Returns the closed form for one geometry."""
    axes = conv.axes or (Axis(1, 1, 1, 1, "valid"),)  # Dense: one pixel, one tap
    groups, g, h = conv.blocks

    def gram_size(side, channels):
        # Rows and columns of M that no tap reaches are zero whatever the kernel is: they do not count.
        reached = (c.counts[c.diagonal].sum() for c in (coincidences(a, side) for a in axes))
        return math.prod(map(int, reached)) * groups * channels

    sizes = {"input": gram_size("input", g), "output": gram_size("output", h)}
    side = min(sizes, key=sizes.get)
    first = coincidences(axes[0], side, half=True)
    rest = [coincidences(a, side) for a in axes[1:]]
    parts = ()
    if sizes[side]:  # 0 where no tap meets the image, as with dilation 2 on a single pixel
        joint = joint_members(rest, [a.kernel_size for a in axes[1:]])
        joint = joint * np.sqrt(_outer(c.counts for c in rest))[:, None]
        on_diagonal = _outer(c.diagonal for c in rest)
        parts = tuple(_part(first, d, joint, on_diagonal) for d in (True, False) if d in first.diagonal)
    return ClosedForm(conv, side, sizes[side], parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The classes on the diagonal of the first axis, or those off it: they share no pair.

    Attributes:
        pairs: `(pairs, 2)`, the pairs (p, r) of the first axis.
        members: One or two matrices, (classes, pairs), whose Kronecker product has √(2n) where a pair, of the
            first axis and of all others together, belongs to a class of n places, and 0 elsewhere.
        target: √(2n) for the classes on the diagonal of all axes, 0 for others; None off the diagonal.
    """

    pairs: np.ndarray
    members: tuple[np.ndarray, ...]
    target: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class ClosedForm:
    """Value and gradient of ‖Gram − αI‖²_F, Gram the smaller of MᵀM and MMᵀ without its zero rows.

    Attributes:
        conv: The geometry.
        side: "input" where Gram = MᵀM, "output" where Gram = MMᵀ.
        gram_size: Number of rows of Gram; M has no larger rank, whatever the kernel.
        parts: The classes; those of each transposed two on the first axis are counted once, with 2n places.
    """

    conv: Convolution
    side: str
    gram_size: int
    parts: tuple[Part, ...]

    def value(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """‖Gram − αI‖²_F, with a gradient of its own: fewer matrix products than a tape would find."""
        if not self.parts:
            return tf.reduce_sum(0.0 * kernel)

        @tf.custom_gradient
        def penalty(kernel):
            taps, residuals = self._residuals(kernel, alpha)

            def first_order(upstream):
                @tf.custom_gradient
                def gradient(kernel):
                    def second_order(direction):  # a Hessian-vector product: rare, so left to a tape
                        with tf.GradientTape() as tape:
                            tape.watch(kernel)
                            _, again = self.value_and_gradient(kernel, alpha)
                        return tape.gradient(again, kernel, output_gradients=direction)

                    return self._gradient(taps, residuals), second_order

                return upstream * gradient(kernel)

            return _half_squares(residuals), first_order

        return penalty(kernel)

    def value_and_gradient(self, kernel: tf.Tensor, alpha: float) -> tuple[tf.Tensor, tf.Tensor]:
        """‖Gram − αI‖²_F and its derivative in the kernel."""
        if not self.parts:
            return tf.zeros((), kernel.dtype), tf.zeros_like(kernel)
        taps, residuals = self._residuals(kernel, alpha)
        return _half_squares(residuals), self._gradient(taps, residuals)

    def line(self, kernel: tf.Tensor, direction: tf.Tensor, alpha: float) -> list[tf.Tensor]:
        """[c1, c2, c3, c4] of ‖Gram(K + tD) − αI‖²_F = value + c1 t + c2 t² + c3 t³ + c4 t⁴.

        The residual is E0 + t·E1 + t²·E2: the coefficients are inner products of the three, and so keep their
        digits where differences of values would lose them.
        """
        if not self.parts:
            return [tf.zeros((), kernel.dtype)] * 4
        taps, zeroth = self._residuals(kernel, alpha)
        blocks = self._blocks(direction)
        coefficients = [[], [], [], []]
        for part, (left, right), e0 in zip(self.parts, taps, zeroth, strict=True):
            new_left, new_right = (_rows(blocks, ends) for ends in part.pairs.T)
            # K Dᵀ + D Kᵀ in one product, the factors side by side
            e1 = _class_sums(part, tf.concat([left, new_left], -1), tf.concat([new_right, right], -1))
            e2 = _class_sums(part, new_left, new_right)
            terms = (
                _inner(e0, e1),
                tf.nn.l2_loss(e1) + _inner(e0, e2),
                _inner(e1, e2),
                tf.nn.l2_loss(e2),
            )
            for found, term in zip(coefficients, terms, strict=True):
                found.append(term)
        return [tf.add_n(terms) for terms in coefficients]

    def _blocks(self, kernel):
        """The taps as (first axis, other axes, groups, g, h), with g the side of Gram's blocks."""
        blocks = self.conv.by_group(kernel, tf)
        if self.side == "output":
            blocks = tf.linalg.matrix_transpose(blocks)
        return tf.reshape(blocks, (self._first_size(), -1, *blocks.shape[-3:]))

    def _residuals(self, kernel, alpha):
        """The taps K[p] and K[r] of each part's pairs, (pairs, other axes, groups, g, h), and its residual.

        The residual is √(2n)·(Gram − αI), as one block per class: (classes, groups, g, g).
        """
        blocks = self._blocks(kernel)
        count, (_, rest, groups, g, _) = sum(len(part.pairs) for part in self.parts), blocks.shape
        check_memory(
            BLOCK_COPIES * kernel.dtype.size * count * rest**2 * groups * g**2,
            f"the closed form of a kernel of shape {self.conv.kernel_shape} has {count * rest**2:,} blocks",
            "no penalty on this layer, or free memory",
        )
        taps, residuals = [], []
        for part in self.parts:
            left, right = (_rows(blocks, ends) for ends in part.pairs.T)
            residual = _class_sums(part, left, right)
            if part.target is not None:
                target = alpha * _constant(part.target[:, None, None], kernel)
                residual = tf.linalg.set_diag(residual, tf.linalg.diag_part(residual) - target)
            taps.append((left, right))
            residuals.append(residual)
        return taps, residuals

    def _gradient(self, taps, residuals):
        """∂/∂K of `_half_squares`: F K[r] at p, Fᵀ K[p] at r, with F all weighted blocks of a pair (p, r)."""
        addends = [[] for _ in range(self._first_size())]
        for part, (left, right), residual in zip(self.parts, taps, residuals, strict=True):
            count, rest, groups, g, h = left.shape
            # On the diagonal pairs come in both orders or have p = r: both products are the same in the sum.
            scale = 1.0 if part.target is None else 2.0
            factors = _contract([scale * part.members[0].T, *(m.T for m in part.members[1:])], residual)
            factors = tf.reshape(factors, (count, rest, rest, groups, g, g))
            ends = [(part.pairs[:, 0], (0, 3, 1, 4, 2, 5), right)]
            if part.target is None:
                ends.append((part.pairs[:, 1], (0, 3, 2, 5, 1, 4), left))
            for indices, order, other in ends:
                products = tf.unstack(_multiply(tf.transpose(factors, order), other))
                for index, product in zip(indices, products, strict=True):
                    addends[index].append(product)
        unused = tf.zeros((groups, rest * g, h), residual.dtype)  # taps that never meet the image
        total = tf.stack([tf.add_n(products) if products else unused for products in addends])
        total = tf.transpose(tf.reshape(total, (len(addends), groups, rest, g, h)), (0, 2, 1, 3, 4))
        if self.side == "output":
            total = tf.linalg.matrix_transpose(total)
        return self.conv.from_groups(total, tf)

    def _first_size(self):
        return self.conv.kernel_size[0] if self.conv.kernel_size else 1


def _part(first: Coincidences, diagonal: bool, joint: np.ndarray, on_diagonal: np.ndarray) -> Part:
    """The part on or off the diagonal, from the first axis and the weighted members of all others."""
    chosen = first.diagonal == diagonal
    pairs = first.members[chosen].any(axis=0)
    members = first.members[chosen][:, pairs] * np.sqrt(2 * first.counts[chosen])[:, None]
    target = np.kron(members.max(axis=1), joint.max(axis=1) * on_diagonal) if diagonal else None
    combine = members.size * joint.size <= COMBINED
    return Part(first.pairs[pairs], (np.kron(members, joint),) if combine else (members, joint), target)


def _outer(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """All products of one entry of each vector, flat."""
    return reduce(np.kron, vectors, np.ones(1, dtype=np.int64))


def _class_sums(part: Part, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    """√(2n) Σ left[p, q] right[r, s]ᵀ over the pairs of each class: (classes, groups, g, g)."""
    products = tf.matmul(left[:, :, None], right[:, None], transpose_b=True)
    return tf.reshape(_contract(part.members, products), (-1, *products.shape[-3:]))


def _inner(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(left * right)


def _half_squares(residuals: Sequence[tf.Tensor]) -> tf.Tensor:
    """½ Σ residual², a sum of squares and so never negative."""
    return tf.add_n([tf.nn.l2_loss(residual) for residual in residuals])


def _contract(matrices: Sequence[np.ndarray], blocks: tf.Tensor) -> tf.Tensor:
    """The Kronecker product of one or two matrices, applied to the leading axes of `blocks`."""
    for number, matrix in enumerate(matrices):
        done = math.prod(m.shape[0] for m in matrices[:number])
        blocks = tf.reshape(blocks, (done, matrix.shape[1], -1) if number else (matrix.shape[1], -1))
        blocks = tf.matmul(_constant(matrix, blocks), blocks)
    return blocks


def _multiply(factors: tf.Tensor, taps: tf.Tensor) -> tf.Tensor:
    """Factors (pairs, groups, q, g, s, g) times taps (pairs, s, groups, g, h): (pairs, groups, q·g, h)."""
    count, groups, rest, g = factors.shape[:4]
    taps = tf.reshape(tf.transpose(taps, (0, 2, 1, 3, 4)), (count, groups, rest * g, -1))
    return tf.matmul(tf.reshape(factors, (count, groups, rest * g, rest * g)), taps)


def _rows(blocks: tf.Tensor, indices: np.ndarray) -> tf.Tensor:
    """The blocks at the indices; a slice, which copies nothing, where they follow each other."""
    start, stop = int(indices[0]), int(indices[0]) + len(indices)
    return (
        blocks[start:stop] if np.array_equal(indices, np.arange(start, stop)) else tf.gather(blocks, indices)
    )


def _constant(values: np.ndarray, like: tf.Tensor) -> tf.Tensor:
    return tf.constant(values.astype(like.dtype.as_numpy_dtype))
