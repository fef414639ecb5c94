"""The closed form of ‖MᵀM − αI‖²_F and of its gradient, from the coincidence classes of each axis.

With S[c1, c2] = Σ K[p, q] K[r, s]ᵀ over the pairs (p, r) of class c1 on the first axis and (q, s) of
class c2 on the second, the block of MᵀM that stands at n_c1·n_c2 places,

    ‖MᵀM − αI‖²_F = Σ n_c1 n_c2 ‖S[c1, c2] − α·[c1 and c2 on the diagonal]·I‖²_F.

It stays a sum of squares: multiplied out it would cancel, in float32 down to noise near the optimum. MMᵀ
has the same form with outputs in place of inputs; the smaller of the two is the one used.
"""

import dataclasses
import math
from functools import lru_cache, reduce

import numpy as np
import tensorflow as tf

from tf_frobreg.coincidence import Coincidences, coincidences
from tf_frobreg.convolution import Axis, Convolution

__all__ = ["ClosedForm", "closed_form"]


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
    first, rest = coincidences(axes[0], side, half=True), [coincidences(a, side) for a in axes[1:]]
    atoms, atom_members = _atoms(first)
    return ClosedForm(
        conv=conv,
        side=side,
        gram_size=sizes[side],
        kernel_size=tuple(a.kernel_size for a in axes),
        atoms=atoms,
        members=(atom_members, *(_square(c, a.kernel_size) for c, a in zip(rest, axes[1:], strict=True))),
        counts=(first.counts, *(c.counts for c in rest)),
        diagonal=reduce(np.multiply.outer, [c.diagonal for c in (first, *rest)]).ravel(),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ClosedForm:
    """Value and gradient of ‖Gram − αI‖²_F, Gram the smaller of MᵀM and MMᵀ without its zero rows.

    Attributes:
        conv: The geometry.
        side: "input" where Gram = MᵀM, "output" where Gram = MMᵀ.
        gram_size: Number of rows of Gram; M has no larger rank, whatever the kernel.
        kernel_size: Spatial shape of the kernel; (1,) for Dense.
        atoms: Pairs of the first axis, in groups that no class tears apart: one matrix product each.
        members: Per axis a 0/1 matrix: the atoms (first axis) or pairs (p·k + r, others) of each class.
        counts: Per axis the number of places of each class.
        diagonal: For each class of all axes together, whether it lies on the diagonal.
    """

    conv: Convolution
    side: str
    gram_size: int
    kernel_size: tuple[int, ...]
    atoms: tuple[tuple[tuple[int, int], ...], ...]
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
        """The kernel as one (groups, rest·g, h) matrix per entry of the first axis; g ↔ h for MMᵀ."""
        blocks = self.conv.by_group(kernel, tf)
        if self.side == "output":
            blocks = tf.linalg.matrix_transpose(blocks)
        groups, g, h = blocks.shape[0], *blocks.shape[-2:]
        blocks = tf.reshape(blocks, (groups, self.kernel_size[0], -1, h))
        return tf.unstack(blocks, axis=1), g

    def _residual(self, kernel, alpha):
        """Gram − αI, as one block per class: (classes, groups, g, g)."""
        taps, g = self._taps(kernel)
        k = self.kernel_size[1:]
        products = tf.stack(
            [
                tf.matmul(
                    _join(taps, [p for p, _ in atom]), _join(taps, [r for _, r in atom]), transpose_b=True
                )
                for atom in self.atoms
            ]
        )  # (atoms, groups, rest·g, rest·g)
        products = tf.reshape(products, (*products.shape[:2], *k, g, *k, g))
        blocks = tf.transpose(products, self._pairs_first())
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
        counts = reduce(np.multiply.outer, self.counts).ravel()
        return tf.tensordot(_constant(counts, residual), tf.reduce_sum(residual**2, axis=(1, 2, 3)), 1)

    def _gradient(self, kernel, residual):
        """4 Σ T K, T the sum of the residuals of all classes that a pair belongs to."""
        classes, groups, g, _ = residual.shape
        blocks = residual
        for members, counts in zip(self.members[::-1], self.counts[::-1], strict=True):
            classes //= len(counts)
            blocks = tf.reshape(blocks, (classes, len(counts), -1))
            blocks = tf.matmul(_constant(members.T * counts, kernel), blocks)
        k = self.kernel_size[1:]
        pairs = [n for n in k for _ in range(2)]
        blocks = tf.reshape(blocks, (len(self.atoms), *pairs, groups, g, g))
        size = math.prod(k) * g
        factors = tf.transpose(blocks, np.argsort(self._pairs_first()))
        factors = tf.unstack(tf.reshape(factors, (len(self.atoms), groups, size, size)))

        taps, _ = self._taps(kernel)
        parts = [[] for _ in taps]  # of the gradient with respect to each tap
        for atom, factor in zip(self.atoms, factors, strict=True):
            left, right = ([pair[end] for pair in atom] for end in (0, 1))
            if left == right:  # a diagonal class is its own transpose: both products below are equal
                factor = 2.0 * factor
            else:
                _scatter(tf.matmul(factor, _join(taps, left), transpose_a=True), right, parts)
            _scatter(tf.matmul(factor, _join(taps, right)), left, parts)
        total = tf.stack(
            [tf.add_n(p) if p else tf.zeros_like(t) for p, t in zip(parts, taps, strict=True)], 1
        )
        total = 2.0 * tf.reshape(total, (groups, *self.conv.kernel_size, g, -1))
        if self.side == "output":
            total = tf.linalg.matrix_transpose(total)
        return self.conv.from_groups(total, tf)

    def _pairs_first(self):
        """Permutation (atoms, groups, q…, g, s…, g) → (atoms, (q, s)…, groups, g, g)."""
        rest = len(self.kernel_size) - 1
        pairs = [axis for i in range(rest) for axis in (2 + i, 3 + rest + i)]
        return [0, *pairs, 1, 2 + rest, 3 + 2 * rest]


def _atoms(classes: Coincidences):
    """Groups the pairs that belong to the same classes; returns them and the (classes, atoms) members."""
    members, which = np.unique(classes.members, axis=1, return_inverse=True)
    atoms = tuple(
        tuple((int(p), int(r)) for p, r in classes.pairs[which.ravel() == a]) for a in range(members.shape[1])
    )
    return atoms, members


def _square(classes: Coincidences, kernel_size: int) -> np.ndarray:
    """The members of each class among all kernel_size² pairs, those that never meet included."""
    members = np.zeros((len(classes.counts), kernel_size, kernel_size), dtype=np.int64)
    p, r = classes.pairs.T
    members[:, p, r] = classes.members
    return members.reshape(len(members), -1)


def _constant(values: np.ndarray, like: tf.Tensor) -> tf.Tensor:
    return tf.constant(values.astype(like.dtype.as_numpy_dtype))


def _join(taps, indices):
    """The taps side by side, so that one matrix product sums over them."""
    return taps[indices[0]] if len(indices) == 1 else tf.concat([taps[i] for i in indices], axis=-1)


def _scatter(joined, indices, parts):
    """Adds each piece of a product of joined taps to the parts of its tap."""
    for i, part in zip(indices, tf.split(joined, len(indices), axis=-1), strict=True):
        parts[i].append(part)
