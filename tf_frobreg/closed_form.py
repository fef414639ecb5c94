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

from tf_frobreg.coincidence import Coincidences, coincidences
from tf_frobreg.convolution import Axis, Convolution

__all__ = ["ClosedForm", "closed_form"]


# Entries up to which one combined member matrix beats one per axis, which move the blocks twice.
COMBINED = 4096


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
    first, *rest = (coincidences(a, side, half=a is axes[0]) for a in axes)
    members = first.members, _joint_members(rest, [a.kernel_size for a in axes[1:]])
    counts = first.counts, _outer(c.counts for c in rest)
    if members[0].size * members[1].size <= COMBINED:
        members, counts = (np.kron(*members),), (_outer(counts),)
    return ClosedForm(
        conv=conv,
        side=side,
        gram_size=sizes[side],
        pairs=first.pairs,
        members=members,
        counts=counts,
        diagonal=_outer(c.diagonal for c in (first, *rest)),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ClosedForm:
    """Value and gradient of ‖Gram − αI‖²_F, Gram the smaller of MᵀM and MMᵀ without its zero rows.

    Attributes:
        conv: The geometry.
        side: "input" where Gram = MᵀM, "output" where Gram = MMᵀ.
        gram_size: Number of rows of Gram; M has no larger rank, whatever the kernel.
        pairs: `(pairs, 2)`, the pairs (p, r) of the first axis' classes, one of each transposed two.
        members: One or two 0/1 matrices, (classes, pairs); their Kronecker product tells which pairs, of
            the first axis and of all others together, make up which class.
        counts: For each of them, the number of places of its classes.
        diagonal: For each class of all axes, whether it lies on the diagonal.
    """

    conv: Convolution
    side: str
    gram_size: int
    pairs: np.ndarray
    members: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    diagonal: np.ndarray

    def value(self, kernel: tf.Tensor, alpha: float) -> tf.Tensor:
        """‖Gram − αI‖²_F, with a gradient of its own: fewer matrix products than a tape would find."""
        if not self.gram_size:  # no tap meets the image, as with dilation 2 on a single pixel
            return tf.reduce_sum(0.0 * kernel)

        @tf.custom_gradient
        def penalty(kernel):
            residual = self._residual(kernel, alpha)

            def first_order(upstream):
                @tf.custom_gradient
                def gradient(kernel):
                    def second_order(direction):  # a Hessian-vector product: rare, so left to a tape
                        with tf.GradientTape() as tape:
                            tape.watch(kernel)
                            _, again = self.value_and_gradient(kernel, alpha)
                        return tape.gradient(again, kernel, output_gradients=direction)

                    return self._gradient(kernel, residual), second_order

                return upstream * gradient(kernel)

            return self._weighted_squares(residual), first_order

        return penalty(kernel)

    def value_and_gradient(self, kernel: tf.Tensor, alpha: float) -> tuple[tf.Tensor, tf.Tensor]:
        """‖Gram − αI‖²_F and its derivative in the kernel."""
        if not self.gram_size:
            return tf.zeros((), kernel.dtype), tf.zeros_like(kernel)
        residual = self._residual(kernel, alpha)
        return self._weighted_squares(residual), self._gradient(kernel, residual)

    def _taps(self, kernel):
        """The kernel as (first axis, other axes, groups, g, h), with g and h swapped for MMᵀ."""
        blocks = self.conv.by_group(kernel, tf)
        if self.side == "output":
            blocks = tf.linalg.matrix_transpose(blocks)
        first = self.conv.kernel_size[0] if self.conv.kernel_size else 1
        return tf.reshape(blocks, (first, -1, *blocks.shape[-3:]))

    def _residual(self, kernel, alpha):
        """Gram − αI, as one block per class: (classes, groups, g, g)."""
        taps = self._taps(kernel)
        left, right = (tf.gather(taps, ends) for ends in self.pairs.T)
        # K[p, q] K[r, s]ᵀ: (pairs of the first axis, q, s, groups, g, g)
        blocks = tf.matmul(left[:, :, None], right[:, None], transpose_b=True)
        block_shape = blocks.shape[-3:]
        classes = 1
        for members in self.members:
            blocks = tf.reshape(blocks, (classes, members.shape[1], -1))
            blocks = tf.matmul(_constant(members, kernel), blocks)
            classes *= members.shape[0]
        blocks = tf.reshape(blocks, (classes, *block_shape))
        shift = alpha * _constant(self.diagonal[:, None, None], kernel)
        return tf.linalg.set_diag(blocks, tf.linalg.diag_part(blocks) - shift)

    def _weighted_squares(self, residual):
        """Σ n_c ‖residual_c‖²_F."""
        rows = tf.reshape(residual, (len(self.diagonal), -1))
        return tf.reduce_sum(_constant(_outer(self.counts), residual) * tf.reduce_sum(rows**2, axis=1))

    def _gradient(self, kernel, residual):
        """2 Σ F K[r, s] at (p, q) plus 2 Σ Fᵀ K[p, q] at (r, s), F[(p, q), (r, s)] = Σ n_c residual_c."""
        blocks, classes = residual, len(self.diagonal)
        for members, counts in zip(self.members[::-1], self.counts[::-1], strict=True):
            classes //= len(counts)
            blocks = tf.reshape(blocks, (classes, len(counts), -1))
            blocks = tf.matmul(_constant(members.T * counts, kernel), blocks)
        taps = self._taps(kernel)
        first, rest, groups, g, h = taps.shape
        count = len(self.pairs)
        factors = tf.transpose(tf.reshape(blocks, (count, rest, rest, groups, g, g)), (0, 3, 1, 4, 2, 5))
        factors = tf.reshape(factors, (count, groups, rest * g, rest * g))
        taps = tf.reshape(tf.transpose(taps, (0, 2, 1, 3, 4)), (first, groups, rest * g, h))

        # On the diagonal p = r, F is symmetric and both products are one.
        left, right = self.pairs.T
        off = np.flatnonzero(left != right)
        products = [tf.matmul(factors, tf.gather(taps, right))]
        if len(off):
            products.append(tf.matmul(tf.gather(factors, off), tf.gather(taps, left[off]), transpose_a=True))
        target = np.concatenate([left, right[off]])
        weights = (
            2.0
            * (target == np.arange(first)[:, None])
            * np.r_[np.where(left == right, 2, 1), np.ones(len(off))]
        )
        stacked = tf.reshape(tf.concat(products, axis=0), (len(target), -1))
        total = tf.reshape(tf.matmul(_constant(weights, kernel), stacked), (first, groups, rest, g, h))
        total = tf.transpose(total, (0, 2, 1, 3, 4))
        if self.side == "output":
            total = tf.linalg.matrix_transpose(total)
        return self.conv.from_groups(total, tf)


def _joint_members(axes: Sequence[Coincidences], kernel_sizes: Sequence[int]) -> np.ndarray:
    """The members of each joint class of several axes, among all pairs of flat indices (q…, s…)."""
    joint = np.ones((1, 1, 1), dtype=np.int64)  # (classes, q, s)
    for axis, k in zip(axes, kernel_sizes, strict=True):
        square = np.zeros((len(axis.counts), k, k), dtype=np.int64)
        square[:, axis.pairs[:, 0], axis.pairs[:, 1]] = axis.members
        joint = np.kron(joint, square)
    return joint.reshape(len(joint), -1)


def _outer(vectors: Iterable[np.ndarray]) -> np.ndarray:
    """All products of one entry of each vector, flat."""
    return reduce(np.kron, vectors, np.ones(1, dtype=np.int64))


def _constant(values: np.ndarray, like: tf.Tensor) -> tf.Tensor:
    return tf.constant(values.astype(like.dtype.as_numpy_dtype))
