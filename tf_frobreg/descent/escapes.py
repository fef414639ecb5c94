"""Escapes from local minima of R_α at which some singular values stay near 0.

Kernels near an isometry fall into classes: along each axis the determinant of the Fourier symbol of a square
kernel winds around 0 a fixed number of times. No path leads from one class to another without σ = 0. In the
wrong class the border loses pixels, or zeros of the symbol remain. An escape jumps over such a barrier.
"""

from collections import Counter, deque
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_frobreg.convolution.isometric_patch import isometric_patch
from tf_frobreg.penalties.attainability import is_out_of_reach
from tf_frobreg.penalties.frobenius import FrobeniusPenalty

__all__ = ["Escape"]

# A group that is stuck again takes the next one. Of the 572 starts of examples/landscape.py that escape, 510
# need no more than 0.5, and none more than 0.7.
FRACTIONS = (0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)
# A descent makes no progress if its excess falls by less than this share in this number of steps.
WINDOW, LEAST_DECREASE = 20, 0.05
# If no kernel can reach √α, the descent gives up more slowly: it may only be passing a saddle.
WINDOW_OUT_OF_REACH, LEAST_DECREASE_OUT_OF_REACH = 100, 1e-3
# In units of α². One lost pixel, σ = 0, adds 1. A slow end phase is below.
STUCK_EXCESS = 0.1


class Escape(NamedTuple):
    """A jump out of a local minimum, from K to (1 − t)·K + t·Q, with Q the nearest isometric patch kernel.

    Attributes:
        step: Row of the history that holds K. The next row holds the new kernel, and R_α may be larger there.
        t: How far the jump leads, from 0 to 1.
        groups: Groups of the convolution that jumped, from 0. A depthwise kernel has one per channel.

    Example:
        >>> from tf_frobreg import regularize_kernel
        >>> start = np.random.RandomState(0).randn(3, 3, 1, 1) / 3
        >>> result = regularize_kernel(start, 20)
        >>> print(result.converged, [(escape.t, escape.groups) for escape in result.escapes])
        True [(0.1, (0,))]
    """

    step: int
    t: float
    groups: tuple[int, ...]


class EscapePlan:
    """Notices that a descent is stuck, and chooses the kernel to go on from.

    Args:
        penalty: R_α.
        tolerance: Of the descent, on max(|σmax − √α|, |σmin − √α|).
        escapes: Earlier escapes of a descent that is continued.
    """

    def __init__(self, penalty: FrobeniusPenalty, tolerance: float, escapes: Sequence[Escape] = ()):
        conv, alpha = penalty.conv, penalty.alpha
        self._penalty = penalty
        self._patch = isometric_patch(conv)
        self._out_of_reach = is_out_of_reach(conv)
        self._tolerance = tolerance
        within = max(alpha**0.5 - tolerance, 0.0) ** 2 - alpha  # σ² − α at the lower end of the tolerance
        self._stuck_excess = max(STUCK_EXCESS * alpha * alpha, within * within)  # α² can be infinite
        window = WINDOW_OUT_OF_REACH if self._out_of_reach else WINDOW
        self._recent: deque[np.ndarray] = deque(maxlen=window + 1)
        self.escapes = list(escapes)

    @property
    def recent(self) -> tuple[np.ndarray, ...]:
        """The excess of each group at the last points, for `restore`."""
        return tuple(self._recent)

    def restore(self, recent: Sequence[np.ndarray]) -> None:
        """Goes on from the `recent` of an earlier plan."""
        self._recent.extend(recent)

    def watch(self, excess_by_group: np.ndarray) -> None:
        """Notes the excess of each group at one more point."""
        self._recent.append(excess_by_group)

    @property
    def progresses(self) -> bool:
        """Whether R_α falls, and groups that do not fall are no more than half of it."""
        if len(self._recent) < (self._recent.maxlen or 0):  # too early to judge
            return True
        now = self._recent[-1].sum()
        if self._out_of_reach:
            return bool(now <= (1 - LEAST_DECREASE_OUT_OF_REACH) * self._recent[0].sum())
        return bool(self._recent[-1][self._stuck()].sum() < now / 2)

    @property
    def gives_up(self) -> bool:
        """Whether to stop a descent without progress, because its tolerance cannot be reached."""
        return self._out_of_reach and self._tolerance > 0

    def escape(self, step: int, kernel: tf.Tensor, *, at_end: bool) -> tf.Tensor | None:
        """Returns the kernel to go on from, and notes the escape. None if no group has to jump.

        Args:
            step: Row of the history that holds the kernel.
            kernel: The kernel at which the descent makes no progress.
            at_end: Whether no further step lowers R_α.
        """
        fractions = self._fractions(self._stuck(at_end=at_end))
        if not any(fractions) or not self._patch_attains_floor:
            return None
        conv = self._penalty.conv
        isometry = self._patch.nearest_isometry(kernel.numpy(), self._penalty.alpha)
        t = np.array(fractions)[:, None, None]
        start, end = (conv.by_group(array.astype(np.float64), np) for array in (kernel.numpy(), isometry))
        mixed = conv.from_groups(start + t * (end - start), np)
        self.escapes += [
            Escape(step, fraction, tuple(group for group, f in enumerate(fractions) if f == fraction))
            for fraction in sorted({f for f in fractions if f})
        ]
        self._recent.clear()
        return tf.constant(mixed.astype(kernel.dtype.as_numpy_dtype))

    def can_escape(self, excess_by_group: np.ndarray) -> bool:
        """Returns whether some group is far above its floor, and has a t left."""
        far = excess_by_group > self._stuck_excess
        return any(self._fractions(far)) and self._patch_attains_floor

    @cached_property
    def _patch_attains_floor(self) -> bool:
        """Whether the patch kernel has the lowest R_α. Otherwise a jump towards it promises nothing."""
        conv = self._penalty.conv
        isometry = self._patch.nearest_isometry(np.zeros(conv.kernel_shape), self._penalty.alpha)
        return bool(self._penalty.excess(tf.constant(isometry)) <= self._stuck_excess)

    def _stuck(self, *, at_end: bool = False) -> np.ndarray:
        """Returns which groups are far above their floor and do not fall."""
        now, before = self._recent[-1], self._recent[0]
        return (now > self._stuck_excess) & (at_end | (now > (1 - LEAST_DECREASE) * before))

    def _fractions(self, stuck: np.ndarray) -> list[float]:
        """Returns how far each group has to jump, 0 for groups that are not stuck or have tried every t."""
        if self._out_of_reach:
            return [0.0] * len(stuck)
        jumps = Counter(group for escape in self.escapes for group in escape.groups)
        remaining = [FRACTIONS[jumps[group] :] for group in range(len(stuck))]
        return [
            left[0] if is_stuck and left else 0.0 for is_stuck, left in zip(stuck, remaining, strict=True)
        ]
