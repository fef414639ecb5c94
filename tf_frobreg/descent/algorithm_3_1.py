"""Algorithm 3.1: descent on the penalty of one kernel."""

import dataclasses
import enum
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import numpy as np

from tf_frobreg.checks import check_choice, check_flag, check_integer, check_number, received
from tf_frobreg.convolution.geometry import Geometry, Size
from tf_frobreg.convolution.kernel import as_tensorflow_kernel, kernel_and_convolution
from tf_frobreg.descent.escapes import Escape, EscapePlan
from tf_frobreg.descent.step_rules import Point, State, StepRule, step_rule
from tf_frobreg.descent.stopping import ConvergenceCheck
from tf_frobreg.penalties.attainability import is_out_of_reach
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.penalties.units import check_alpha_fits

__all__ = ["DescentResult", "StopReason", "regularize_kernel"]

METHODS = ("closed_form", "sparse", "tape")
GRADIENTS = ("theorem", "tape")


class StopReason(enum.Enum):
    """Why a descent ended. The value is a sentence for the user.

    Attributes:
        CONVERGED: σmax and σmin are within `tolerance`.
        STATIONARY: The norm of the gradient is within `gradient_tolerance`.
        STALLED: No step along the gradient lowers R_α.
        OUT_OF_REACH: No kernel of this geometry has all singular values at √α. The descent ended because R_α
            hardly fell any more, or because it was out of steps.
        MAX_STEPS: `max_steps` steps were taken.
        DIVERGED: R_α became infinite or NaN.
        OVERFLOW: R_α of the first kernel was infinite or NaN.
        STOPPED: The callback returned a true value.

    Example:
        >>> print(StopReason.MAX_STEPS.value)
        not converged: out of steps; continue with more steps and escape=True, or use a larger tolerance
    """

    CONVERGED = "converged: σmax and σmin are within the tolerance of √α"
    STATIONARY = "converged: the gradient is below its tolerance"
    STALLED = (
        "not converged: R falls no further; use escape=True, float64, a larger tolerance or an image size "
        "that the strides divide, and scale a kernel up whose gradient is 0"
    )
    OUT_OF_REACH = (
        "not converged: no kernel of this geometry reaches √α, because some pixels have too few taps and "
        "channels; the lowest R found is kept; fewer filters, or no border if there is one, can help"
    )
    MAX_STEPS = (
        "not converged: out of steps; continue with more steps and escape=True, or use a larger tolerance"
    )
    DIVERGED = "diverged: λ is too large, the penalty is not finite; the kernel with the lowest one is kept"
    OVERFLOW = "not started: the penalty of this kernel exceeds its dtype; scale the kernel down"
    STOPPED = "not converged: stopped by the callback; pass the result again to go on"


class _Row(NamedTuple):
    """One row of a history."""

    step: int
    penalty: float
    gradient_norm: float
    learning_rate: float
    sigma_max: float
    sigma_min: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DescentResult:
    """The outcome of a descent. Pass it to `regularize_kernel` instead of a kernel to continue the descent.

    `regularize_kernel` also accepts a result that you make yourself, for example from saved arrays. It then
    begins with steepest descent at `kernel`, and counts the steps on. It cannot check that the geometry and
    alpha are those of the earlier descent.

    Attributes:
        kernel: The kernel, an array with the shape and dtype of the first one.
        penalty: R_α of `kernel`.
        num_steps: Number of steps from the first kernel to `kernel`.
        reason: A `StopReason`. `reason.value` is a sentence.
        history: Columns of equal length with one row per step. Row 0 is the first kernel. "penalty" is R_α,
            "gradient_norm" is ‖∂R_α/∂K‖_F. "learning_rate" is the λ of the step that starts at this row, and
            NaN in the last row and at an escape. "sigma_max" and "sigma_min" are NaN at steps at which they
            were not measured. "step" is the number of the row. After a divergence, the rows beyond
            `num_steps` lead to the first penalty that is not finite. `pandas.DataFrame(result.history)` takes
            it as it is.
        escapes: The jumps out of local minima. R_α can increase at an escape, and with "exact" steps nowhere
            else.

    Example:
        >>> start = np.random.RandomState(1).randn(3, 3, 1, 3)
        >>> first = regularize_kernel(start, 20, max_steps=30)
        >>> saved = DescentResult(first.kernel, first.penalty, first.num_steps, first.reason, first.history)
        >>> result = regularize_kernel(saved, 20)
        >>> print(saved.converged, result.converged, len(result.history["step"]) == result.num_steps + 1)
        False True True
    """

    kernel: np.ndarray
    penalty: float
    num_steps: int
    reason: StopReason
    history: dict[str, np.ndarray]
    escapes: tuple[Escape, ...] = ()
    _state: State | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.reason, StopReason):
            raise TypeError(f"reason must be a StopReason. Received: {received('reason', self.reason)}")
        if not isinstance(self.history, Mapping):
            raise TypeError(
                f"history must be a dict of columns. Received: {received('history', self.history)}"
            )
        if not isinstance(self.escapes, Sequence) or not all(isinstance(e, Escape) for e in self.escapes):
            raise TypeError(
                f"escapes must be a sequence of Escape. Received: {received('escapes', self.escapes)}"
            )
        object.__setattr__(self, "escapes", tuple(self.escapes))

    def __repr__(self) -> str:
        """Returns one line without arrays."""
        low, high = self._sigma()
        return (
            f"DescentResult(penalty={self.penalty:.4g}, num_steps={self.num_steps}, sigma_min={low:.4g}, "
            f"sigma_max={high:.4g}, escapes={self._jumps()}, reason={self.reason.name})"
        )

    def __str__(self) -> str:
        low, high = self._sigma()
        measured = "" if math.isnan(low + high) else f"σ {low:.4g} … {high:.4g}, "
        jumps = self._jumps()
        escaped = f", {jumps} escape{'' if jumps == 1 else 's'}" if jumps else ""
        return f"R {self.penalty:.4g} after {self.num_steps} steps{escaped}, {measured}{self.reason.value}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the outcome as flat plain values, without the kernel and the history.

        Returns:
            "penalty", "num_steps", "reason" (a sentence), "converged", "sigma_min" and "sigma_max" (None if
            they were not measured), and "escapes": the number of steps at which the descent escaped.
        """
        low, high = (None if math.isnan(sigma) else float(sigma) for sigma in self._sigma())
        return {
            "penalty": float(self.penalty),
            "num_steps": int(self.num_steps),
            "reason": self.reason.value,
            "converged": self.converged,
            "sigma_min": low,
            "sigma_max": high,
            "escapes": self._jumps(),
        }

    def _sigma(self) -> tuple[float, float]:
        """Returns (σmin, σmax) of `kernel`, NaN if they were not measured."""
        columns = [np.asarray(self.history.get(name, ())) for name in ("sigma_min", "sigma_max")]
        low, high = (c[self.num_steps] if len(c) > self.num_steps else math.nan for c in columns)
        return low, high

    def _jumps(self) -> int:
        """Returns at how many steps the descent escaped. Several groups can escape at the same step."""
        return len({escape.step for escape in self.escapes})

    @property
    def converged(self) -> bool:
        """Whether a tolerance was reached. `gradient_tolerance` alone says nothing about σ."""
        return self.reason in (StopReason.CONVERGED, StopReason.STATIONARY)


def regularize_kernel(
    kernel: Any,
    input_size: Size | None = None,
    *,
    alpha: float = 1.0,
    learning_rate: Any = "exact",
    direction: str | None = None,
    max_steps: int = 2000,
    tolerance: float = 0.01,
    gradient_tolerance: float = 0.0,
    measure: str = "rarely",
    gradient: str | None = None,
    method: str = "closed_form",
    escape: bool = True,
    callback: Callable[[int, np.ndarray, float], bool | None] | None = None,
    **geometry: Unpack[Geometry],
) -> DescentResult:
    """Runs Algorithm 3.1, K ← K + λD with D = −G and G = ½ ∂R_α/∂K as in equation (3.2).

    The defaults replace the paper's D and λ and need no tuning. R_α(K + tD) is a polynomial of degree 4 in t,
    and each "exact" step goes to its lowest point. R_α never increases, and the descent cannot diverge.
    `learning_rate="paper"` runs the paper's own algorithm.

    (3.2) is half the derivative of R_α, and every λ multiplies (3.2). The paper's step sizes assume this:
    with the whole derivative they overshoot, and σ oscillates forever.

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable,
            or a built Keras layer. It is not modified. A `DescentResult` is continued: its steps count on and
            its history grows. If the settings are the same, its conjugate directions and its Keras optimizer
            go on as if there had been no stop. You may change all arguments except alpha and the geometry.
        input_size: Spatial size of the input image, an int or one int per axis. A layer may know its own.
        alpha: α, the target of σ². Positive.
        learning_rate: λ. "exact" (negative if the lowest point lies behind), "paper" (`paper_schedule`), a
            positive number, a function of the step such as a Keras `LearningRateSchedule`, or a Keras
            optimizer. A copy of the optimizer makes the steps from the gradients (3.2). The gradient grows
            with the image, so a fixed λ must shrink with it. The paper's λ suits images up to about 22×22: a
            3×3×3×6 kernel oscillates with it at 24×24 and diverges at 32×32.
        direction: D. "gradient" for −G, or "conjugate" for Polak–Ribière+ directions, which restart if they
            would ascend. The default is "conjugate" with "exact", and "gradient" otherwise.
        max_steps: Maximal number of steps, not counting those of a `DescentResult` that is continued.
        tolerance: Stop if max(|σmax − √α|, |σmin − √α|), equation (1.1), is at most this. 0 disables it.
        gradient_tolerance: Stop if ‖∂R_α/∂K‖_F is at most this, and the descent will not escape from there.
            0 disables it.
        measure: How often σ is measured. "rarely": only if R_α alone cannot decide convergence, and at the
            end; never with `tolerance=0`. If M has more than 20,000 rows and columns, σ is measured at the
            end only. Before, a bound on |σ² − α| decides, at the cost of a step. "never": only R_α and the
            bound decide. "often": also at each of the first 40 steps, and then at intervals of at most a
            twentieth of the steps so far. A figure such as Figure 4.1 needs this.
        gradient: Older spelling of the source of G: "theorem" for its formula, "tape" for `tf.GradientTape`.
        method: How R_α and G are computed: "closed_form", "sparse" (Theorem 3.1 on the explicit matrix M), or
            "tape" (`tf.GradientTape` through `frobenius_penalty`). The polynomial of the exact steps always
            comes from the closed form.
        escape: Whether "exact" steps leave local minima at which some σ stay near 0. A group is stuck if its
            part of R_α is more than 0.1 α² above the floor and falls by less than 5 % in 20 steps. There the
            descent goes on at (1 − t)·K + t·Q. Q is the nearest kernel with all σ at √α and, at stride 1,
            only one tap: √α times the polar factor of the sum of all taps. The first t is 0.1. A group that
            gets stuck again takes 0.2, 0.35, 0.5, 0.7, 0.9 and 1. Other step rules never escape.
        callback: Called as `callback(step, kernel, penalty)` before every step. A true value stops the
            descent.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups` and `kind`, as for
            `tf_frobreg.Convolution`.

    Returns:
        A `DescentResult`. A descent that does not converge raises no error: look at `.converged` and
        `.reason`.

    Raises:
        ValueError: If an argument is invalid, or if the computation does not fit in memory. The message
            names the argument.
        TypeError: If an argument has the wrong type.

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
    tolerance = check_number("tolerance", tolerance)
    gradient_tolerance = check_number("gradient_tolerance", gradient_tolerance)
    max_steps = check_integer("max_steps", max_steps, minimum=0)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable. Received: {received('callback', callback)}")
    method, tape = _method_and_tape(method, gradient)
    before = kernel if isinstance(kernel, DescentResult) else None
    kernel, conv = kernel_and_convolution(
        before.kernel if before else kernel, input_size, geometry, convert=as_tensorflow_kernel
    )
    penalty = FrobeniusPenalty(conv, alpha, method)
    check_alpha_fits(penalty.alpha, kernel)
    escapes = before.escapes if before else ()
    plan = EscapePlan(penalty, tolerance, escapes) if check_flag("escape", escape) else None
    rule = step_rule(penalty, learning_rate, direction, tape=tape, plan=plan)
    check = ConvergenceCheck(penalty, tolerance, measure)
    rows = _rows(before, penalty) if before else []
    stop_reason = functools.partial(
        _stop_reason,
        first=len(rows),
        continued=before is not None,
        max_steps=max_steps,
        gradient_tolerance=gradient_tolerance,
        callback=callback,
        can_escape=rule.can_escape,
    )
    start = rule.start(kernel, before._state if before else None)
    reason, step, end = _descend(start, rows, penalty.floor, rule, check, stop_reason)
    if math.isnan(rows[step].sigma_max):
        sigma_max, sigma_min = check.final_sigma(end.kernel)
        rows[step] = rows[step]._replace(sigma_max=sigma_max, sigma_min=sigma_min)
    if reason in (StopReason.STALLED, StopReason.MAX_STEPS):
        if check.is_within(end.kernel, rows[step].sigma_max, rows[step].sigma_min):
            reason = StopReason.CONVERGED
        elif tolerance > 0 and is_out_of_reach(conv):
            reason = StopReason.OUT_OF_REACH
    columns = zip(*rows, strict=True)
    history = {name: np.array(column) for name, column in zip(_Row._fields, columns, strict=True)}
    state = rule.state(None if reason is StopReason.DIVERGED else end)
    escapes = rule.escapes or escapes
    return DescentResult(end.kernel.numpy(), rows[step].penalty, step, reason, history, escapes, state)


def _descend(
    point: Point,
    rows: list[_Row],
    floor: float,
    rule: StepRule,
    check: ConvergenceCheck,
    stop_reason: Callable[[int, Point, float, bool], StopReason | None],
) -> tuple[StopReason, int, Point]:
    """Takes steps until there is a reason to stop, and appends a row for each point.

    Returns:
        (the reason, the step of the point to keep, that point).
    """
    lowest = len(rows), point
    while True:
        step, scalars = len(rows), point.scalars
        penalty = scalars.excess + floor
        if scalars.excess < lowest[1].scalars.excess:
            lowest = step, point
        verdict = check(step, point.kernel, scalars.excess)
        reason = stop_reason(step, point, penalty, verdict.converged)
        following, rate = rule.next(point, step) if reason is None else (None, math.nan)
        norm = scalars.gradient_norm
        if reason is StopReason.OVERFLOW:  # NaN is a difference of two numbers beyond the dtype
            penalty, norm = math.inf, math.inf if math.isnan(norm) else norm
        rows.append(_Row(step, penalty, norm, rate, verdict.sigma_max, verdict.sigma_min))
        if following is None:
            break
        if math.isnan(rate):  # an escape
            check.restart()
        point = following
    if reason is StopReason.DIVERGED:
        step, point = lowest
    return reason or StopReason.STALLED, step, point


def _stop_reason(
    step: int,
    point: Point,
    penalty: float,
    converged: bool,
    *,
    first: int,
    continued: bool,
    max_steps: int,
    gradient_tolerance: float,
    callback: Callable[[int, np.ndarray, float], bool | None] | None,
    can_escape: Callable[[Point], bool],
) -> StopReason | None:
    """Returns why the descent stops at a point, or None. The callback sees every point that is finite."""
    if not math.isfinite(point.scalars.excess):
        return StopReason.DIVERGED if step > first else StopReason.OVERFLOW
    # The callback has seen the first point of a continued descent before.
    seen = continued and step == first
    stopped = callback is not None and not seen and callback(step, point.kernel.numpy(), penalty)
    if converged:
        return StopReason.CONVERGED
    if point.scalars.gradient_norm <= gradient_tolerance > 0 and not can_escape(point):
        return StopReason.STATIONARY
    if step - first == max_steps:
        return StopReason.MAX_STEPS
    return StopReason.STOPPED if stopped else None


def _method_and_tape(method: Any, gradient: Any) -> tuple[str, bool]:
    """Returns the method of `FrobeniusPenalty`, and whether the gradient comes from a tape."""
    check_choice("method", method, METHODS)
    if gradient is not None:
        check_choice("gradient", gradient, GRADIENTS)
    if method == "tape" and gradient == "theorem":
        raise ValueError(
            f'gradient must be "tape" or None if method="tape". Received: {received("gradient", gradient)}'
        )
    tape = "tape" in (method, gradient)
    return "closed_form" if method == "tape" else method, tape


def _rows(before: DescentResult, penalty: FrobeniusPenalty) -> list[_Row]:
    """Returns the rows of a descent to be continued, except the last, which is computed again."""
    if before._state is not None:
        earlier = before._state.evaluation.penalty
        if (penalty.conv, penalty.alpha) != (earlier.conv, earlier.alpha):
            raise ValueError(
                "a DescentResult can be continued only with its own geometry and alpha. To begin again with "
                f"others, pass result.kernel. Received: alpha={penalty.alpha}, {penalty.conv}, after "
                f"alpha={earlier.alpha}, {earlier.conv}"
            )
    count = check_integer("num_steps", before.num_steps, minimum=0)
    columns = []
    for name in _Row._fields:
        column = np.asarray(before.history.get(name, ()))[:count].tolist()
        if len(column) < count:
            raise ValueError(
                f"history must have a column {name!r} with a row for each of the num_steps={count} steps. "
                f"Received: {len(column)} rows"
            )
        columns.append(column)
    return [_Row(*values) for values in zip(*columns, strict=True)]
