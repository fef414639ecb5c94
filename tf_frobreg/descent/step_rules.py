"""The steps of a descent: in which direction, and how far. One call of a traced function makes each."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_number
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.penalties.frobenius import FrobeniusPenalty

__all__ = ["paper_schedule"]

DIRECTIONS = ("gradient", "conjugate")
GRADIENTS = ("theorem", "tape")


class Point(NamedTuple):
    """A kernel on the way, and what the step from there needs.

    Attributes:
        kernel: The kernel.
        slope: ∂R_α/∂K, in float64.
        direction: Of the next step, in float64: −slope, or a conjugate one.
        excess: R_α without its floor.
        slope_norm: ‖∂R_α/∂K‖_F.
        steepest: Whether `direction` is −slope.
        scale: The largest entry of `direction`.
        line: c1 … c4 of R_α along direction / scale, where the exact step needs them.
    """

    kernel: tf.Tensor
    slope: tf.Tensor
    direction: tf.Tensor
    excess: float
    slope_norm: float
    steepest: bool
    scale: float
    line: tuple[float, ...]


class Steps:
    """Leads from one point to the next, by the rule that `learning_rate` names.

    Args:
        conv: The geometry.
        alpha: α.
        learning_rate: As for `regularize_kernel`.
        direction: As for `regularize_kernel`.
        gradient: As for `regularize_kernel`.
        method: As for `regularize_kernel`.
    """

    def __init__(self, conv: Convolution, alpha: float, learning_rate, direction, gradient: str, method: str):
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {GRADIENTS}. Received: gradient={gradient!r}")
        self.exact = isinstance(learning_rate, str) and learning_rate == "exact"
        self._optimizer = None
        if isinstance(learning_rate, tf.keras.optimizers.Optimizer):
            self._optimizer = _KerasOptimizer(learning_rate)
        elif not self.exact:
            self._schedule = _schedule(learning_rate)
        if direction is None:
            direction = "conjugate" if self.exact else "gradient"
        if direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}. Received: direction={direction!r}")
        if self._optimizer and direction == "conjugate":
            raise ValueError(
                'direction must be "gradient" where a Keras optimizer makes the steps. '
                f"Received: direction={direction!r}"
            )
        self.rule = (self.exact, direction, gradient, method)
        self._evaluate = _traced(conv, alpha, direction == "conjugate", self.exact, gradient, method)

    def start(self, kernel: tf.Tensor) -> Point:
        """The point at a kernel, whose direction is steepest descent."""
        zeros = tf.zeros(kernel.shape, tf.float64)
        return self._point(kernel, zeros, zeros, 0.0)

    def next(self, point: Point, step: int) -> tuple[Point | None, float]:
        """The point after `point` and the λ that led there; None where "exact" finds none with a lower R."""
        if self._optimizer:
            kernel, rate = self._optimizer.step(point)
            return self.start(kernel), rate
        if not self.exact:
            rate = self._schedule(step)
            return self._along(point, 0.5 * rate), rate
        while True:
            t = quartic_minimizer(point.line) / (point.scale or 1.0)
            new = self._along(point, t) if t else None
            # Rounding can deny the decrease that the coefficients promise; then the step is not taken.
            if new and new.excess < point.excess:
                return new, 2.0 * t
            if point.steepest:
                return None, np.nan
            point = self.start(point.kernel)

    def suspend(self, point: Point | None) -> tuple:
        """What `resume` needs to go on from a point as if there had been no stop."""
        return self.rule, point, self._optimizer and self._optimizer.state()

    def resume(self, kernel: tf.Tensor, suspended: tuple) -> Point:
        """The point at a kernel: as it was, if the same rule goes on; an optimizer's state goes with it."""
        rule, point, state = suspended
        if self._optimizer and point is not None:
            self._optimizer.resume_from = state
        return point if point is not None and rule == self.rule else self.start(kernel)

    def _along(self, point, t):
        return self._point(point.kernel, point.slope, point.direction, t)

    def _point(self, kernel, slope, direction, t):
        *tensors, numbers = self._evaluate(kernel, slope, direction, tf.constant(t, tf.float64))
        excess, norm, steepest, scale, *line = numbers.numpy().tolist()
        return Point(*tensors, excess, norm, bool(steepest), scale, tuple(line))


class _KerasOptimizer:
    """A copy of a Keras optimizer, which can belong to one variable only, at work on a kernel."""

    def __init__(self, optimizer):
        config = optimizer.get_config()
        schedule = getattr(optimizer, "_learning_rate", None)
        if isinstance(schedule, tf.keras.optimizers.schedules.LearningRateSchedule):
            config["learning_rate"] = schedule  # one of the user's own need not be registered with Keras
        self._own = type(optimizer).from_config(config)
        self._identity = type(optimizer), repr(optimizer.get_config())
        self._update = None
        self.resume_from = None

    def step(self, point):
        """The kernel after one update with the gradient (3.2), and the learning rate it used."""
        if self._update is None:
            self._build(point.kernel)
        rate = float(self._own.learning_rate)
        return self._update(point.kernel, tf.cast(0.5 * point.slope, point.kernel.dtype)), rate

    def state(self):
        """What `resume_from` takes: only an optimizer of the same settings goes on with these values."""
        return self._identity, [variable.numpy() for variable in self._own.variables]

    def _build(self, kernel):
        weight = tf.Variable(kernel)
        self._own.build([weight])
        identity, values = self.resume_from or (None, [])
        if identity == self._identity:
            for variable, value in zip(
                self._own.variables, values, strict=False
            ):  # none if no step was taken
                variable.assign(value)

        @tf.function(autograph=False)
        def update(kernel, gradient):
            weight.assign(kernel)
            self._own.apply([gradient], [weight])
            return weight.read_value()

        self._update = update


def quartic_minimizer(coefficients: Sequence[float]) -> float:
    """The global minimiser of c1 t + c2 t² + c3 t³ + c4 t⁴; 0 where none lies lower than t = 0."""
    c1, c2, c3, c4 = coefficients
    if not math.isfinite(c1 + c2 + c3 + c4):
        return 0.0
    # Where rounding turns a double root into a complex pair its real part still stands for it; that of any
    # other pair is a candidate too many, and loses.
    t = np.roots([4 * c4, 3 * c3, 2 * c2, c1]).real
    values = t * (c1 + t * (c2 + t * (c3 + t * c4)))
    return float(t[values.argmin()]) if t.size and values.min() < 0 else 0.0


def paper_schedule(step: int) -> float:
    """Returns the paper's λ for a step (section 4): 1e-5 for 10 steps, 1e-4 for 10 more, then 1e-3.

    Example:
        >>> [paper_schedule(step) for step in (0, 9, 10, 19, 20, 1000)]
        [1e-05, 1e-05, 0.0001, 0.0001, 0.001, 0.001]
    """
    return 1e-5 if step < 10 else 1e-4 if step < 20 else 1e-3


def _schedule(learning_rate) -> Callable[[int], float]:
    if isinstance(learning_rate, str) and learning_rate == "paper":
        return paper_schedule
    if isinstance(learning_rate, (str, type)):
        raise ValueError(
            'learning_rate must be "exact", "paper", a positive number, a function of the step or an '
            f"instance of a Keras optimizer. Received: learning_rate={learning_rate!r}"
        )
    if callable(learning_rate):
        return lambda step: check_number(f"learning_rate({step})", learning_rate(step))
    constant = check_number("learning_rate", learning_rate, exclusive=True)
    return lambda step: constant


@functools.lru_cache(maxsize=8)  # tracing takes longer than a hundred small steps
def _traced(conv: Convolution, alpha: float, conjugate: bool, line: bool, gradient: str, method: str):
    """One traced function: a step of length t from one point, and all that the next step needs."""
    penalty = FrobeniusPenalty(conv, alpha, method)

    def excess_and_gradient(kernel):
        if gradient == "theorem":
            return penalty.excess_and_gradient(kernel)
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            excess = penalty.excess(kernel)
        return excess, tape.gradient(excess, kernel)

    @tf.function(autograph=False)
    def function(kernel, slope_before, direction_before, t):
        kernel += tf.cast(t * direction_before, kernel.dtype)
        excess, slope = excess_and_gradient(kernel)
        slope = tf.cast(slope, tf.float64)  # products of small float32 gradients would underflow
        direction, steepest = -slope, tf.constant(True)
        if conjugate:  # Polak–Ribière+, which restarts by itself where the gradients do not change
            change = tf.reduce_sum(slope * (slope - slope_before))
            beta = tf.math.divide_no_nan(tf.maximum(change, 0.0), tf.reduce_sum(slope_before**2))
            candidate = beta * direction_before - slope
            steepest = (beta == 0.0) | (tf.reduce_sum(candidate * slope) >= 0.0)
            direction = tf.where(steepest, direction, candidate)
        scale = tf.reduce_max(tf.abs(direction))
        numbers = [excess, tf.norm(slope), steepest, scale]
        if line:
            unit = tf.cast(tf.math.divide_no_nan(direction, scale), kernel.dtype)
            numbers += penalty.line(kernel, unit)
        return kernel, slope, direction, tf.stack([tf.cast(number, tf.float64) for number in numbers])

    return function
