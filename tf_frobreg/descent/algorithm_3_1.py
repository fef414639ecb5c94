"""Algorithm 3.1: descent on the penalty of one kernel."""

import dataclasses
import enum
import reprlib
from collections.abc import Callable
from typing import Unpack

import numpy as np

from tf_frobreg.checks import check_choice, check_integer, check_number
from tf_frobreg.convolution.geometry import Convolution, Geometry
from tf_frobreg.convolution.kernel import as_kernel
from tf_frobreg.descent.step_rules import Steps
from tf_frobreg.descent.stopping import Convergence
from tf_frobreg.penalties.frobenius import METHODS, FrobeniusPenalty

__all__ = ["DescentResult", "StopReason", "regularize_kernel"]

COLUMNS = ("step", "penalty", "gradient_norm", "learning_rate", "sigma_max", "sigma_min")


class StopReason(enum.Enum):
    """Why a descent ended; the value is the sentence to show."""

    CONVERGED = "converged: σmax and σmin are within the tolerance of √α"
    STATIONARY = "converged: the gradient is below its tolerance"
    STALLED = "not converged: R falls no further from here, a stationary point or the limit of the precision"
    MAX_STEPS = "not converged: out of steps"
    DIVERGED = "diverged: the penalty is no longer finite, λ is too large; the kernel with the lowest is kept"
    OVERFLOW = "not started: the penalty of this kernel is beyond its dtype; scale the kernel down"
    STOPPED = "not converged: stopped by the callback"


@dataclasses.dataclass(frozen=True, eq=False)
class DescentResult:
    """What a descent reached. Given to `regularize_kernel` in place of a kernel, it is continued.

    Attributes:
        kernel: The kernel, an array of the shape and dtype of the one given.
        penalty: R_α of `kernel`.
        num_steps: Steps taken from the kernel first given to `kernel`.
        reason: A `StopReason`; `reason.value` is a sentence.
        history: Columns of equal length, one row per step from 0 (before any step) on: "step"; "penalty",
            R_α; "gradient_norm", ‖∂R_α/∂K‖_F; "learning_rate", the λ of the step taken from there (NaN
            at the last row); "sigma_max" and "sigma_min", NaN at the steps where they were not measured.
            Where a descent diverged there are rows beyond `num_steps`, up to the penalty that is not finite.
    """

    kernel: np.ndarray
    penalty: float
    num_steps: int
    reason: StopReason
    history: dict[str, np.ndarray]
    _state: "_State" = dataclasses.field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether a tolerance was reached: that on σ, or `gradient_tolerance`, which says nothing of σ."""
        return self.reason in (StopReason.CONVERGED, StopReason.STATIONARY)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """What a descent needs to go on as if it had not stopped."""

    conv: Convolution
    alpha: float
    steps: tuple


def regularize_kernel(
    kernel,
    input_size,
    *,
    alpha: float = 1.0,
    learning_rate="exact",
    direction: str | None = None,
    max_steps: int = 2000,
    tolerance: float = 0.01,
    gradient_tolerance: float = 0.0,
    measure: str = "rarely",
    gradient: str = "theorem",
    method: str = "closed_form",
    callback: Callable[[int, np.ndarray, float], bool | None] | None = None,
    **geometry: Unpack[Geometry],
) -> DescentResult:
    """Runs Algorithm 3.1, K ← K + λD with D = −G, G = ½ ∂R_α/∂K as in equation (3.2), or a better D and λ.

    As it stands it needs no tuning: R_α(K + tD) is a polynomial of degree 4 in t, and "exact" goes to its
    lowest point at each step. It never increases R_α and cannot diverge. The paper's own algorithm is
    `learning_rate="paper"`.

    (3.2) is half the derivative of R_α, and the step sizes printed in the paper belong to it: with the
    whole derivative the same steps overshoot and oscillate for ever. Every λ here multiplies (3.2).

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable. It
            is not modified. A `DescentResult` is continued: its steps count on, for a learning rate that
            depends on them too, and its history grows; with the same settings so do its conjugate
            directions and its Keras optimizer, as if there had been no stop. All arguments but alpha and the
            geometry may change; `max_steps` counts the new steps.
        input_size: Spatial size of the input image, an int or one int per axis.
        alpha: α, the target of σ². Positive.
        learning_rate: λ: "exact" (negative where the lowest point lies behind); "paper" (`paper_schedule`);
            a positive number; a function of the step such as a Keras `LearningRateSchedule`; or a Keras
            optimizer, of which a copy makes the steps from the gradients (3.2). The gradient grows with the
            image, so a λ of one's own has to shrink with it:
            the paper's suits images up to about 22×22; a 3×3×3×6 kernel oscillates with it at 24×24 and
            diverges at 32×32.
        direction: D: "gradient" for −G or "conjugate" for Polak–Ribière+ directions, which restart where
            they would ascend. By default "conjugate" with "exact", "gradient" otherwise.
        max_steps: Steps to take at the most.
        tolerance: Stop where max(|σmax − √α|, |σmin − √α|), equation (1.1), is no larger; 0 never does.
        gradient_tolerance: Stop where ‖∂R_α/∂K‖_F is no larger; 0 never does.
        measure: How often σ is measured. "rarely": where R_α leaves open whether the tolerance is reached,
            which a few looks tell, and at the end; not at all with `tolerance=0`. "often": besides, at each
            of the first 40 steps, then at round intervals of at most a twentieth of the steps so far, for
            a figure such as Figure 4.1.
        gradient: Where G comes from: "theorem" (the formula of `frobenius_gradient`) or "tape"
            (`tf.GradientTape` through `frobenius_penalty`).
        method: As for `frobenius_penalty`, for R_α and G; the exact step uses the closed form.
        callback: Called as `callback(step, kernel, penalty)` at every step before it is taken; the
            descent stops where it returns a true value.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.Convolution`.

    Returns:
        A `DescentResult`. Not converging is a result, no error: look at `.converged` and `.reason`.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        >>> start = np.random.RandomState(1).randn(3, 3, 1, 3)
        >>> result = regularize_kernel(start, 20)
        >>> print(result.num_steps < 100, result.reason.value)
        True converged: σmax and σmin are within the tolerance of √α
        >>> print(result.history["sigma_max"][-1].round(2), result.history["sigma_min"][-1].round(2))
        1.0 0.99
        >>> print(regularize_kernel(start, 20, learning_rate="paper").num_steps > 1000)
        True
        >>> further = regularize_kernel(result, 20, tolerance=0.005)
        >>> print(further.num_steps > result.num_steps, len(further.history["step"]) == further.num_steps + 1)
        True True
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    tolerance = check_number("tolerance", tolerance)
    gradient_tolerance = check_number("gradient_tolerance", gradient_tolerance)
    max_steps = check_integer("max_steps", max_steps, minimum=0)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable. Received: callback={reprlib.repr(callback)}")
    before = kernel if isinstance(kernel, DescentResult) else None
    kernel = as_kernel(before.kernel if before else kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    steps = Steps(conv, alpha, learning_rate, direction, gradient, check_choice("method", method, METHODS))
    convergence = Convergence(conv, alpha, tolerance, measure)
    rows = _rows(before, conv, alpha) if before else []
    point = steps.resume(kernel, before._state.steps) if before else steps.start(kernel)
    penalty_floor = FrobeniusPenalty(conv, alpha).floor

    first, best, reason = len(rows), None, None
    while reason is None:
        step = len(rows)
        row = dict.fromkeys(COLUMNS, np.nan)
        row |= {"step": step, "penalty": point.excess + penalty_floor, "gradient_norm": point.slope_norm}
        rows.append(row)
        if not np.isfinite(point.excess):
            reason = StopReason.DIVERGED if best else StopReason.OVERFLOW
            point, row = best or (point, row)
            break
        if best is None or point.excess < best[0].excess:
            best = point, row
        kernel = point.kernel.numpy()
        if convergence.reached(step, kernel, point.excess, row):
            reason = StopReason.CONVERGED
        elif row["gradient_norm"] <= gradient_tolerance > 0:
            reason = StopReason.STATIONARY
        # The first step of a continued descent has been seen already.
        asked = callback and (step > first or not before) and callback(step, kernel, row["penalty"])
        if reason is None and step - first == max_steps:
            reason = StopReason.MAX_STEPS
        if reason is None and asked:
            reason = StopReason.STOPPED
        if reason is None:
            new, row["learning_rate"] = steps.next(point, step)
            if new is None:
                reason = StopReason.STALLED
            point = new or point

    if np.isfinite(row["penalty"]) and (tolerance > 0 or measure == "often"):
        convergence.measure(point.kernel.numpy(), row)
    state = _State(conv, alpha, steps.suspend(None if reason is StopReason.DIVERGED else point))
    history = {column: np.array([row[column] for row in rows]) for column in COLUMNS}
    return DescentResult(point.kernel.numpy(), row["penalty"], int(row["step"]), reason, history, state)


def _rows(before: DescentResult, conv: Convolution, alpha: float) -> list[dict[str, float]]:
    """The rows of a descent to be continued, but for the last, which is made anew."""
    state = before._state
    if (conv, alpha) != (state.conv, state.alpha):
        raise ValueError(
            "a DescentResult is continued with the geometry and the alpha it was made with; use "
            f"result.kernel to begin anew. Received: alpha={alpha}, {conv} after alpha={state.alpha}, "
            f"{state.conv}"
        )
    columns = {name: before.history[name][: before.num_steps].tolist() for name in COLUMNS}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
