"""The stopping criterion of a descent: σmax and σmin are within the tolerance of √α, equation (1.1)."""

import contextlib
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_choice
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.all_values import DECOMPOSED_ROWS
from tf_frobreg.spectrum.extremes import ExtremesFinder, ExtremeSingularValues


class Verdict(NamedTuple):
    """What a check found.

    Attributes:
        sigma_max: σmax, or NaN if it was not measured.
        sigma_min: σmin, or NaN if it was not measured.
        converged: Whether both are within the tolerance.
    """

    sigma_max: float = math.nan
    sigma_min: float = math.nan
    converged: bool = False


MEASURES = ("never", "rarely", "often")
# Rows of the smaller Gram matrix up to which the descent searches for σ at points on its way. A search takes
# about 0.1 s there, and longer than a step of the descent for most larger layers.
SEARCHED_ROWS = 20_000


class ConvergenceCheck:
    """Decides whether a kernel has converged. It measures σ only if R_α alone cannot decide.

    The excess R_α − floor is Σ (σ² − α)² over n singular values. Its root is at least the largest |σ² − α|,
    and at most √n times that. For large layers `deviation_bound` decides. It is 1 to 4 times the largest
    |σ² − α|, at the cost of a step.

    A check changes nothing that it is given. It remembers when the next measurement is due.

    Args:
        penalty: R_α.
        tolerance: On max(|σmax − √α|, |σmin − √α|). With 0 no kernel converges.
        measure: "never", "rarely" or "often", as in `regularize_kernel`.

    Raises:
        ValueError: If `measure` is invalid.
    """

    def __init__(self, penalty: FrobeniusPenalty, tolerance: float, measure: str):
        check_choice("measure", measure, MEASURES)
        self._often = measure == "often"
        self._tolerance, self._target = tolerance, penalty.alpha**0.5
        self._sigma = _SigmaFinder(penalty.conv, tolerance)
        self._measures_at_end = self._often or (measure == "rarely" and tolerance > 0)
        self._by_bound = (
            measure == "never" or min(penalty.conv.shape) > SEARCHED_ROWS or not self._sigma.available
        )
        self._bound = penalty.deviation_bound  # rarely called, so tracing would take longer
        size = penalty.num_singular_values
        square = tolerance * tolerance  # ** would raise OverflowError
        above = 2 * self._target * tolerance + square  # σ² − α at σ = √α + tolerance
        below = 2 * self._target * tolerance - square  # α − σ² at σ = √α − tolerance
        # Up to the first excess every kernel has converged. Above the second no kernel has.
        self._allowed = below if tolerance < self._target else above  # largest |σ² − α| that has converged
        self._sufficient = self._allowed**2
        self._necessary = size * above**2
        if tolerance == 0 or (size < min(penalty.conv.shape) and tolerance < self._target):
            # Rows or columns of M that no tap reaches leave σmin = 0, and R_α does not count it.
            self._sufficient = self._necessary = -math.inf
        self.restart()

    def restart(self) -> None:
        """Forgets when the next measurement is due, because the descent goes on at another kernel."""
        self._due_excess, self._due_step = self._necessary, 0

    def __call__(self, step: int, kernel: tf.Tensor, excess: float) -> Verdict:
        """Returns the verdict on the kernel of one step."""
        if not math.isfinite(excess):
            return Verdict()
        certain = excess <= self._sufficient
        # σmin can still move when R_α hardly does. Therefore a later step is due even at the same R_α.
        due = excess <= self._due_excess or (excess <= self._necessary and step >= self._due_step)
        looks = self._often and self._sigma.available and step % _interval(step) == 0
        if looks or ((certain or due) and not self._by_bound):
            return self._verdict_by_measurement(step, kernel, excess, certain)
        if certain or due:
            return self._verdict_by_bound(step, kernel, excess, certain)
        return Verdict()

    def final_sigma(self, kernel: tf.Tensor) -> tuple[float, float]:
        """Returns (σmax, σmin) for the last row of a history. They are NaN if σ is never to be measured."""
        return self._sigma(kernel.numpy()) if self._measures_at_end else (math.nan, math.nan)

    def is_within(self, kernel: tf.Tensor, sigma_max: float, sigma_min: float) -> bool:
        """Returns whether both values of the last kernel are within the tolerance.

        If neither was measured, the bound decides.
        """
        if math.isnan(sigma_max) and math.isnan(sigma_min):
            # −inf: R_α and the bound do not count every singular value, or the tolerance is 0
            return self._necessary > -math.inf and float(self._bound(kernel)) <= self._allowed
        distances = abs(sigma_max - self._target), abs(sigma_min - self._target)
        return self._tolerance > 0 and all(distance <= self._tolerance for distance in distances)

    def _verdict_by_measurement(self, step: int, kernel: tf.Tensor, excess: float, certain: bool) -> Verdict:
        sigma = self._sigma(kernel.numpy())
        distances = [abs(value - self._target) for value in sigma if not math.isnan(value)]
        distance = max(distances, default=0.0)
        # If a value could not be measured, only R_α can show that it is within the tolerance.
        known = certain or len(distances) == 2
        converged = known and distance <= self._tolerance and self._tolerance > 0
        if distances and not converged:
            self._postpone(step, excess, distance / self._tolerance if self._tolerance else math.inf)
        return Verdict(*sigma, converged)

    def _verdict_by_bound(self, step: int, kernel: tf.Tensor, excess: float, certain: bool) -> Verdict:
        deviation = 0.0 if certain else float(self._bound(kernel))
        converged = deviation <= self._allowed
        if not converged:
            self._postpone(step, excess, deviation / self._allowed)
        return Verdict(converged=converged)

    def _postpone(self, step: int, excess: float, times: float) -> None:
        """Sets when the next look is due, after σ was found to be this many times the tolerance away."""
        if excess <= self._sufficient:  # rounding, which dominates R_α if the tolerance is tiny
            self._sufficient = -math.inf
        # Near √α the distance is proportional to the root of R_α. The next look is due a little below the R_α
        # at which the distance will equal the tolerance.
        self._due_excess = min(self._necessary, excess * 0.95 / max(times, 1.0) ** 2)
        self._due_step = step + max(100, step // 4)


class _SigmaFinder:
    """Measures σmax and σmin of one kernel after another. Each search starts from the last result."""

    def __init__(self, conv: Convolution, tolerance: float):
        accuracy = min(1e-4, 1e-2 * tolerance) or 1e-6
        self._last: ExtremeSingularValues | None = None
        self._extremes: ExtremesFinder | None = None
        with contextlib.suppress(ValueError):  # no memory for the search
            # The search takes over from fewer rows than elsewhere: a measurement must be fast.
            self._extremes = ExtremesFinder(conv, accuracy, dense_rows=DECOMPOSED_ROWS)

    @property
    def available(self) -> bool:
        """Whether there is enough memory for a search."""
        return self._extremes is not None

    def __call__(self, kernel: np.ndarray) -> tuple[float, float]:
        """Returns (σmax, σmin). A value is NaN if it could not be measured."""
        if self._extremes is None:
            return math.nan, math.nan
        try:
            found = self._last = self._extremes(kernel, self._last)
        except ValueError:  # memory that is short for a moment must not end a descent
            return math.nan, math.nan
        return (
            found.sigma_max if found.sigma_max_converged else math.nan,
            found.sigma_min if found.sigma_min_converged else math.nan,
        )


def _interval(step: int) -> int:
    """Returns the steps between measurements: 1 for the first 40, then 2, 5, 10, … up to a twentieth."""
    most = max(step / 20, 1)
    decade = 10 ** int(math.log10(most))
    return decade * max(n for n in (1, 2, 5) if n * decade <= most)
