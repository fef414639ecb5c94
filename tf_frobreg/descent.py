"""Algorithm 3.1: gradient descent on the penalty of one kernel."""

import dataclasses
import enum
import functools
import math
import reprlib
from collections.abc import Callable
from typing import Unpack

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import as_kernel, check_integer, check_number
from tf_frobreg.convolution import Convolution, Geometry
from tf_frobreg.penalty import check_method, evaluate, evaluate_gradient
from tf_frobreg.spectrum import extremes_of

__all__ = ["DescentResult", "StopReason", "paper_schedule", "regularize_kernel"]

GRADIENTS = ("theorem", "tape")
DENSE_ROWS = 2000  # up to which σ may take a dense eigensolver, 0.4 s, when Lanczos fails
COLUMNS = ("step", "penalty", "gradient_norm", "learning_rate", "sigma_max", "sigma_min")


class StopReason(enum.Enum):
    """Why a descent ended; the value is the sentence to show."""

    CONVERGED = "converged: σmax and σmin are within the tolerance of √α"
    STATIONARY = "converged: the gradient is below its tolerance"
    MAX_STEPS = "not converged: out of steps"
    DIVERGED = "diverged: the penalty is no longer finite, λ is too large; the last finite kernel is kept"
    STOPPED = "not converged: stopped by the callback"


@dataclasses.dataclass(frozen=True, eq=False)
class DescentResult:
    """What a descent reached.

    Attributes:
        kernel: The kernel, an array of the shape and dtype of the one given.
        penalty: R_α of `kernel`.
        num_steps: Steps taken from the kernel given to `kernel`.
        reason: A `StopReason`; `reason.value` is a sentence.
        history: Columns of equal length, one row per step from 0 (before any step) on: "step"; "penalty",
            R_α; "gradient_norm", ‖∂R_α/∂K‖_F; "learning_rate", the λ of the step taken from there (NaN
            at the last row); "sigma_max" and "sigma_min", NaN at the steps where they were not measured.
            A descent that diverged has one row more, that of the kernel whose penalty is not finite.
    """

    kernel: np.ndarray
    penalty: float
    num_steps: int
    reason: StopReason
    history: dict[str, np.ndarray]

    @property
    def converged(self) -> bool:
        """Whether a tolerance was reached: that on σ, or `gradient_tolerance`, which says nothing of σ."""
        return self.reason in (StopReason.CONVERGED, StopReason.STATIONARY)


def paper_schedule(step: int) -> float:
    """Returns the paper's λ for a step (section 4): 1e-5 for 10 steps, 1e-4 for 10 more, then 1e-3.

    Example:
        >>> [paper_schedule(step) for step in (0, 9, 10, 19, 20, 1000)]
        [1e-05, 1e-05, 0.0001, 0.0001, 0.001, 0.001]
    """
    return 1e-5 if step < 10 else 1e-4 if step < 20 else 1e-3


def regularize_kernel(
    kernel,
    input_size,
    *,
    alpha: float = 1.0,
    learning_rate: str | float | Callable = "paper",
    max_steps: int = 2000,
    tolerance: float = 0.01,
    gradient_tolerance: float = 0.0,
    gradient: str = "theorem",
    method: str = "closed_form",
    callback: Callable[[int, np.ndarray, float], bool | None] | None = None,
    **geometry: Unpack[Geometry],
) -> DescentResult:
    """Runs Algorithm 3.1: K ← K − λG, with G = ½ ∂R_α/∂K as in equation (3.2).

    (3.2) is half the derivative of R_α, and the step sizes printed in the paper belong to it: with the
    whole derivative the same steps overshoot and oscillate for ever. Every λ here multiplies (3.2).

    Args:
        kernel: `(*kernel_size, in_channels, filters)`, float32 or float64; array, tensor or variable. It
            is not modified.
        input_size: Spatial size of the input image, an int or one int per axis.
        alpha: α, the target of σ². Positive.
        learning_rate: λ: "paper" (`paper_schedule`), a positive number, or a function of the step such as
            a Keras `LearningRateSchedule`. The gradient grows with the image, so λ has to shrink with it:
            the paper's suits images up to about 22×22; a 3×3×3×6 kernel oscillates with it at 24×24 and
            diverges at 32×32.
        max_steps: Steps to take at the most.
        tolerance: Stop where max(|σmax − √α|, |σmin − √α|), equation (1.1), is no larger; 0 never does.
            σ is measured at each of the first 40 steps, then at round intervals of at most a twentieth of
            the steps so far. It needs the memory of M as a sparse matrix.
        gradient_tolerance: Stop where ‖∂R_α/∂K‖_F is no larger; 0 never does.
        gradient: Where G comes from: "theorem" (the formula of `frobenius_gradient`) or "tape"
            (`tf.GradientTape` through `frobenius_penalty`).
        method: As for `frobenius_penalty`.
        callback: Called as `callback(step, kernel, penalty)` at every step before it is taken; the
            descent stops where it returns True.
        **geometry: `strides`, `padding`, `dilation_rate`, `groups`, `kind`, as in
            `tf_frobreg.convolution.Convolution`.

    Returns:
        A `DescentResult`. Not converging is a result, no error: look at `.converged` and `.reason`.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        >>> start = np.random.RandomState(1).randn(3, 3, 1, 3)
        >>> result = regularize_kernel(start, 20)
        >>> print(result.num_steps, result.reason.value)
        1500 converged: σmax and σmin are within the tolerance of √α
        >>> for name in ("sigma_max", "sigma_min"):
        ...     print(name, result.history[name][[0, 20, -1]].round(2))
        sigma_max [8.45 1.26 1.  ]
        sigma_min [2.07 0.54 0.99]
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    tolerance = check_number("tolerance", tolerance)
    gradient_tolerance = check_number("gradient_tolerance", gradient_tolerance)
    max_steps = check_integer("max_steps", max_steps, minimum=0)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient must be one of {GRADIENTS}. Received: gradient={gradient!r}")
    schedule = _schedule(learning_rate)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable. Received: callback={reprlib.repr(callback)}")
    kernel = as_kernel(kernel)
    conv = Convolution.of(kernel.shape, input_size, geometry)
    function = _penalty_and_gradient(conv, alpha, check_method(method), gradient)

    extremes = _measure(conv, tolerance)

    def distance(kernel, row):  # (1.1); NaN where it cannot be measured
        row["sigma_max"], row["sigma_min"] = extremes(kernel.numpy())
        return max(abs(row["sigma_max"] - alpha**0.5), abs(row["sigma_min"] - alpha**0.5))

    rows, reason, measured_next, previous = [], None, 0, kernel
    while reason is None:
        step = len(rows)
        penalty, slope = function(kernel)
        row = dict.fromkeys(COLUMNS, np.nan)
        row |= {"step": step, "penalty": float(penalty), "gradient_norm": float(tf.norm(slope))}
        rows.append(row)
        if not np.isfinite(row["penalty"]):
            kernel, reason = previous, StopReason.DIVERGED
            break
        if step == measured_next:
            measured_next += _interval(step)
            if distance(kernel, row) <= tolerance > 0:
                reason = StopReason.CONVERGED
        if reason is None and row["gradient_norm"] <= gradient_tolerance > 0:
            reason = StopReason.STATIONARY
        asked = callback is not None and callback(step, kernel.numpy(), row["penalty"])
        if reason is None and step == max_steps:
            reason = StopReason.MAX_STEPS
        if reason is None and asked:
            reason = StopReason.STOPPED
        if reason is None:
            row["learning_rate"] = schedule(step)
            previous, kernel = kernel, kernel - _scalar(0.5 * row["learning_rate"], kernel.dtype) * slope

    reached = rows[-2 if reason is StopReason.DIVERGED and len(rows) > 1 else -1]
    if np.isfinite(reached["penalty"]) and np.isnan(reached["sigma_max"]):
        distance(kernel, reached)
    history = {column: np.array([row[column] for row in rows]) for column in COLUMNS}
    return DescentResult(kernel.numpy(), reached["penalty"], int(reached["step"]), reason, history)


def _measure(conv: Convolution, tolerance: float) -> Callable[[np.ndarray], tuple[float, float]]:
    """A function that returns (σmax, σmin) of a kernel, or NaN where they cannot be had, without raising."""
    accuracy = min(1e-6, 1e-3 * max(tolerance, 1e-9))
    try:
        extremes = extremes_of(
            conv.kernel_shape, conv.input_size, accuracy=accuracy, dense_rows=DENSE_ROWS, **conv.geometry
        )
    except ValueError as error:
        if tolerance == 0:
            return lambda kernel: (np.nan, np.nan)
        raise ValueError(
            f"tolerance needs σ, which cannot be measured ({error}) Use tolerance=0, and gradient_tolerance "
            f"to stop. Received: tolerance={tolerance}"
        ) from None

    def measure(kernel):
        try:
            return extremes(kernel)
        except ValueError:  # a descent is not to end because one σmin is too hard for the memory at hand
            return np.nan, np.nan

    return measure


def _interval(step: int) -> int:
    """Steps to the next measurement of σ: 1, 2, 5, 10, 20, …, at most a twentieth of `step`."""
    most = max(step / 20, 1)
    decade = 10 ** int(math.log10(most))
    return decade * max(n for n in (1, 2, 5) if n * decade <= most)


def _scalar(value: float, dtype: tf.DType) -> np.generic:
    with np.errstate(over="ignore"):  # infinite steps end as divergence
        return dtype.as_numpy_dtype(value)


def _schedule(learning_rate) -> Callable[[int], float]:
    if isinstance(learning_rate, str):
        if learning_rate == "paper":
            return paper_schedule
        raise ValueError(
            'learning_rate must be "paper", a positive number or a function of the step. '
            f"Received: learning_rate={learning_rate!r}"
        )
    if callable(learning_rate):
        return lambda step: check_number(f"learning_rate({step})", learning_rate(step))
    constant = check_number("learning_rate", learning_rate, exclusive=True)
    return lambda step: constant


@functools.lru_cache(maxsize=8)  # tracing takes longer than a hundred small steps
def _penalty_and_gradient(conv: Convolution, alpha: float, method: str, gradient: str):
    """One traced function of the kernel that returns R_α and ∂R_α/∂K."""

    @tf.function(autograph=False)
    def function(kernel):
        if gradient == "theorem":
            return evaluate_gradient(kernel, conv, alpha, method)
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            penalty = evaluate(kernel, conv, alpha, method)
        return penalty, tape.gradient(penalty, kernel)

    return function
