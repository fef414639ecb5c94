"""When a descent looks at σ, and whether σmax and σmin are within the tolerance of √α, equation (1.1)."""

import math
from collections.abc import Callable

import numpy as np

from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.all_values import DECOMPOSED_ROWS
from tf_frobreg.spectrum.extremes import ExtremesFinder

MEASURES = ("rarely", "often")


class Convergence:
    """Follows a descent. R_α bounds σ, and so σ has to be measured only where R_α leaves it open.

    R_α − floor is Σ (σ² − α)² over n singular values: its root is no smaller than the largest |σ² − α|, and
    √n times that no smaller than its root.

    Args:
        conv: The geometry.
        alpha: α.
        tolerance: On max(|σmax − √α|, |σmin − √α|); 0 is never reached.
        measure: As for `regularize_kernel`.
    """

    def __init__(self, conv: Convolution, alpha: float, tolerance: float, measure: str):
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {MEASURES}. Received: measure={measure!r}")
        self._often = measure == "often"
        self._tolerance, self._target = tolerance, alpha**0.5
        self._extremes = _extremes(conv, tolerance)
        size = FrobeniusPenalty(conv, alpha).num_singular_values
        above = 2 * self._target * tolerance + tolerance**2  # σ² − α where σ = √α + tolerance
        below = 2 * self._target * tolerance - tolerance**2  # α − σ² where σ = √α − tolerance
        self._certain = (below if tolerance < self._target else above) ** 2
        self._open = size * above**2
        if tolerance == 0 or (size < min(conv.shape) and tolerance < self._target):
            # Rows or columns of M that no tap reaches leave σmin = 0, and R_α does not count it.
            self._certain = self._open = -math.inf
        self._look_below, self._look_at = self._open, 0

    def reached(self, step: int, kernel: np.ndarray, excess: float, row: dict[str, float]) -> bool:
        """Whether the kernel is within the tolerance; what is measured for it goes into `row`."""
        certain = excess <= self._certain
        # σmin can still move where R_α hardly does any more: hence the look at times.
        due = excess <= self._look_below or (excess <= self._open and step >= self._look_at)
        if not (certain or due or (self._often and step % _interval(step) == 0)):
            return False
        distance = self.measure(kernel, row)
        if math.isnan(distance):
            return certain
        if distance <= self._tolerance:
            return self._tolerance > 0
        if certain:  # but for rounding, which R_α of tiny tolerances is made of
            self._certain = -math.inf
        # Near √α the distance goes as the root of R_α: the next look is a little below where it will be met.
        self._look_below = min(self._open, excess * 0.95 * min(1.0, (self._tolerance / distance) ** 2))
        self._look_at = step + max(100, step // 4)
        return False

    def measure(self, kernel: np.ndarray, row: dict[str, float]) -> float:
        """Puts σmax and σmin into `row` and returns (1.1); NaN where they cannot be had."""
        if math.isnan(row["sigma_max"]):
            row["sigma_max"], row["sigma_min"] = self._extremes(kernel)
        return max(abs(row["sigma_max"] - self._target), abs(row["sigma_min"] - self._target))


def _extremes(conv: Convolution, tolerance: float) -> Callable[[np.ndarray], tuple[float, float]]:
    """A function that returns (σmax, σmin) of a kernel, or NaN where they cannot be had, without raising."""
    accuracy = min(1e-4, 1e-2 * tolerance) or 1e-6
    try:
        extremes = ExtremesFinder(conv, accuracy, dense_rows=DECOMPOSED_ROWS)  # a look has to be quick
    except ValueError as error:
        if tolerance == 0:
            return lambda kernel: (math.nan, math.nan)
        raise ValueError(
            f"tolerance needs σ, which cannot be measured ({error}) Use tolerance=0, and gradient_tolerance "
            f"to stop. Received: tolerance={tolerance}"
        ) from None
    found = None

    def measure(kernel):
        nonlocal found
        try:
            found = extremes(kernel, found)
        except ValueError:  # a descent is not to end because memory is short for a moment
            return math.nan, math.nan
        return (
            found.sigma_max if found.sigma_max_converged else math.nan,
            found.sigma_min if found.sigma_min_converged else math.nan,
        )

    return measure


def _interval(step: int) -> int:
    """Steps between measurements: each of the first 40, then 2, 5, 10, 20, …, a twentieth of the steps."""
    most = max(step / 20, 1)
    decade = 10 ** int(math.log10(most))
    return decade * max(n for n in (1, 2, 5) if n * decade <= most)
