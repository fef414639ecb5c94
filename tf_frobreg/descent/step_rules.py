"""The step rules of a descent: each decides in which direction to go and how far.

A rule has three methods. `start` returns the first point, `next` leads from one point to the following, and
`state` returns what `start` needs to continue later.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_choice, check_integer, check_number, received
from tf_frobreg.descent.escapes import Escape, EscapePlan
from tf_frobreg.penalties.frobenius import FrobeniusPenalty

__all__ = ["paper_schedule"]

DIRECTIONS = ("gradient", "conjugate")


class Scalars(NamedTuple):
    """The numbers of a point. They come from the device as one float64 tensor. NaN if not computed.

    Attributes:
        excess: R_α − floor.
        gradient_norm: ‖∂R_α/∂K‖_F.
        steepest: 1 if the direction is steepest descent, 0 if it is a conjugate one.
        scale: Largest absolute entry of the direction.
        c1: First coefficient of the line R_α(K + t·direction/scale) = R_α(K) + c1 t + c2 t² + c3 t³ + c4 t⁴.
            Only exact steps need the line.
        c2: Second coefficient.
        c3: Third coefficient.
        c4: Fourth coefficient.
    """

    excess: float = math.nan
    gradient_norm: float = math.nan
    steepest: float = math.nan
    scale: float = math.nan
    c1: float = math.nan
    c2: float = math.nan
    c3: float = math.nan
    c4: float = math.nan


class Point(NamedTuple):
    """A kernel on the path, and what the next step needs.

    Attributes:
        kernel: The kernel.
        gradient: ∂R_α/∂K, in float64.
        direction: Direction of the next step, in float64: −gradient or a conjugate direction.
        scalars: The numbers.
        excess_by_group: The part of R_α − floor that each group adds. Computed together with the line.
    """

    kernel: tf.Tensor
    gradient: tf.Tensor
    direction: tf.Tensor
    scalars: Scalars
    excess_by_group: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is computed at each point. Rules with equal evaluations can continue each other's points.

    Attributes:
        penalty: R_α.
        tape: Whether the gradient comes from `tf.GradientTape` and not from Theorem 3.1.
        conjugate: Whether the directions are conjugate.
        line: Whether the coefficients of the line and the excess of each group are computed.
    """

    penalty: FrobeniusPenalty
    tape: bool
    conjugate: bool
    line: bool


class OptimizerState(NamedTuple):
    """The variables of an optimizer, and the settings it must have to take them over."""

    settings: tuple[type, str]
    variables: list[np.ndarray]


class State(NamedTuple):
    """What a descent needs to continue as if it had not stopped.

    Attributes:
        evaluation: How the point was computed.
        point: The last point. None if the descent diverged and therefore starts again.
        optimizer: The state of the Keras optimizer, if one makes the steps.
        recent: `excess_by_group` of the last points, for the watch on the progress.
    """

    evaluation: Evaluation
    point: Point | None
    optimizer: OptimizerState | None = None
    recent: tuple[np.ndarray, ...] = ()


class StepRule(abc.ABC):
    """The common part of the three rules.

    Args:
        evaluation: What is computed at each point.
    """

    def __init__(self, evaluation: Evaluation):
        self._evaluation = evaluation
        self._evaluate = _traced(evaluation)

    def start(self, kernel: tf.Tensor, state: State | None = None) -> Point:
        """Returns the point of `state` if it suits this rule, else steepest descent at `kernel`."""
        if state is not None and state.point is not None and state.evaluation == self._evaluation:
            return state.point
        return self._restart(kernel)

    @abc.abstractmethod
    def next(self, point: Point, step: int) -> tuple[Point | None, float]:
        """Returns the next point and the λ that leads there, or (None, NaN) if R_α cannot fall further."""

    @property
    def escapes(self) -> tuple[Escape, ...]:
        """The escapes so far. Only `EscapingSteps` has any."""
        return ()

    def can_escape(self, point: Point) -> bool:
        """Returns whether the rule would leave a stationary point. Only `EscapingSteps` does."""
        return False

    def state(self, point: Point | None) -> State:
        """Returns what `start` needs to continue from a point. None stands for a diverged descent."""
        return State(self._evaluation, point)

    def _restart(self, kernel: tf.Tensor) -> Point:
        """Returns the point at a kernel, with the direction of steepest descent."""
        zeros = tf.zeros(kernel.shape, tf.float64)
        return self._move(Point(kernel, zeros, zeros, Scalars(), np.empty(0)), 0.0)

    def _move(self, point: Point, t: float) -> Point:
        """Returns the point at kernel + t·direction."""
        new = self._evaluate(point.kernel, point.gradient, point.direction, tf.constant(t, tf.float64))
        numbers = new.scalars.numpy()
        count = len(Scalars._fields)
        return new._replace(scalars=Scalars._make(numbers[:count].tolist()), excess_by_group=numbers[count:])


class ExactSteps(StepRule):
    """Goes to the lowest point along each direction. R_α never increases."""

    def next(self, point: Point, step: int) -> tuple[Point | None, float]:
        """Returns the lowest point of the line. Tries steepest descent if a conjugate direction fails."""
        while True:
            now = point.scalars
            t = quartic_minimizer(now.c1, now.c2, now.c3, now.c4) / (now.scale or 1.0)
            new = self._move(point, t) if t else None
            # Rounding can deny the decrease that the coefficients promise. Then the step is not taken.
            if new and new.scalars.excess < now.excess:
                return new, 2.0 * t
            if now.steepest:
                return None, math.nan
            point = self._restart(point.kernel)


class EscapingSteps(ExactSteps):
    """Takes exact steps, and jumps out of local minima at which some singular values stay near 0.

    Args:
        evaluation: What is computed at each point.
        plan: Notices that the descent is stuck, and chooses the kernel to go on from.
    """

    def __init__(self, evaluation: Evaluation, plan: EscapePlan):
        super().__init__(evaluation)
        self._plan = plan

    def start(self, kernel: tf.Tensor, state: State | None = None) -> Point:
        """Also restores what the watch on the progress has seen."""
        point = super().start(kernel, state)
        if state is not None and state.point is point:
            self._plan.restore(state.recent)
        return point

    def next(self, point: Point, step: int) -> tuple[Point | None, float]:
        """Returns the next point. If the descent is stuck, it is the one after an escape, and λ is NaN."""
        self._plan.watch(point.excess_by_group)
        new, rate = super().next(point, step)
        if new is not None and self._plan.progresses:
            return new, rate
        kernel = self._plan.escape(step, point.kernel, at_end=new is None)
        if kernel is not None:
            return self._restart(kernel), math.nan
        return (None, math.nan) if self._plan.gives_up else (new, rate)

    def can_escape(self, point: Point) -> bool:
        """Returns whether some group at this point is far above its floor and has a t left."""
        return self._plan.can_escape(point.excess_by_group)

    @property
    def escapes(self) -> tuple[Escape, ...]:
        """All escapes so far."""
        return tuple(self._plan.escapes)

    def state(self, point: Point | None) -> State:
        """Adds what the watch on the progress has seen."""
        return super().state(point)._replace(recent=self._plan.recent)


class ScheduledSteps(StepRule):
    """Takes λ from a function of the step.

    Args:
        evaluation: What is computed at each point.
        schedule: λ as a function of the step.
    """

    def __init__(self, evaluation: Evaluation, schedule: Callable[[int], float]):
        super().__init__(evaluation)
        self._schedule = schedule

    def next(self, point: Point, step: int) -> tuple[Point, float]:
        """Returns the point at K + λ·½·direction. The gradient (3.2) is half of ∂R_α/∂K."""
        rate = self._schedule(step)
        return self._move(point, 0.5 * rate), rate


class OptimizerSteps(StepRule):
    """Passes the gradient (3.2) to a Keras optimizer.

    Args:
        evaluation: What is computed at each point.
        optimizer: The user's optimizer. `start` copies it, because an optimizer belongs to one variable.
    """

    def __init__(self, evaluation: Evaluation, optimizer: Any):
        super().__init__(evaluation)
        self._original = optimizer
        self._settings = type(optimizer), repr(optimizer.get_config())

    def start(self, kernel: tf.Tensor, state: State | None = None) -> Point:
        """Also restores the optimizer's variables if `state` comes from an optimizer of equal settings."""
        weight, optimizer = tf.Variable(kernel), _copy(self._original)
        optimizer.build([weight])
        before = state.optimizer if state is not None else None
        if before is not None and before.settings == self._settings:
            for variable, value in zip(optimizer.variables, before.variables, strict=True):
                variable.assign(value)

        @tf.function(autograph=False)
        def update(kernel: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
            weight.assign(kernel)
            optimizer.apply([gradient], [weight])
            return weight.read_value()

        self._optimizer, self._update = optimizer, update
        return super().start(kernel, state)

    def next(self, point: Point, step: int) -> tuple[Point, float]:
        """Returns the point after one update, and the learning rate that the optimizer had."""
        rate = float(self._optimizer.learning_rate)
        kernel = self._update(point.kernel, tf.cast(0.5 * point.gradient, point.kernel.dtype))
        return self._restart(kernel), rate

    def state(self, point: Point | None) -> State:
        """Adds the optimizer's variables, except after a divergence."""
        if point is None:
            return super().state(point)
        variables = [variable.numpy() for variable in self._optimizer.variables]
        return State(self._evaluation, point, OptimizerState(self._settings, variables))


def step_rule(
    penalty: FrobeniusPenalty,
    learning_rate: Any,
    direction: Any,
    *,
    tape: bool,
    plan: EscapePlan | None = None,
) -> StepRule:
    """Returns the rule for a learning rate and a direction, as `regularize_kernel` takes them.

    Args:
        penalty: R_α.
        learning_rate: λ.
        direction: D.
        tape: Whether the gradient comes from `tf.GradientTape`.
        plan: How to escape from local minima. Only exact steps do it.

    Raises:
        ValueError: If the learning rate or the direction is invalid, or the two do not go together.
    """
    exact = isinstance(learning_rate, str) and learning_rate == "exact"
    by_optimizer = isinstance(learning_rate, keras.optimizers.Optimizer)
    if direction is None:
        direction = "conjugate" if exact else "gradient"
    conjugate = check_choice("direction", direction, DIRECTIONS) == "conjugate"
    if by_optimizer and conjugate:
        raise ValueError(
            'direction must be "gradient" if a Keras optimizer makes the steps. '
            f"Received: {received('direction', direction)}"
        )
    evaluation = Evaluation(penalty, tape, conjugate, line=exact)
    if exact:
        return EscapingSteps(evaluation, plan) if plan else ExactSteps(evaluation)
    if by_optimizer:
        return OptimizerSteps(evaluation, learning_rate)
    return ScheduledSteps(evaluation, _schedule(learning_rate))


def quartic_minimizer(c1: float, c2: float, c3: float, c4: float) -> float:
    """Returns the global minimiser of c1 t + c2 t² + c3 t³ + c4 t⁴, or 0 if no t lies lower than t = 0."""
    if not math.isfinite(c1 + c2 + c3 + c4):
        return 0.0
    # Rounding can turn a double root into a complex pair. Its real part then stands for the root. The real
    # parts of other pairs do no harm: the minimum lies lower.
    t = np.roots([4 * c4, 3 * c3, 2 * c2, c1]).real
    values = t * (c1 + t * (c2 + t * (c3 + t * c4)))
    return float(t[np.argmin(values)]) if t.size and np.min(values) < 0 else 0.0


def paper_schedule(step: int) -> float:
    """Returns the paper's λ for a step (section 4): 1e-5 for 10 steps, 1e-4 for 10 more, then 1e-3.

    Args:
        step: Number of the step, from 0.

    Returns:
        λ, which multiplies the gradient (3.2).

    Raises:
        ValueError: If `step` is below 0.
        TypeError: If `step` is no integer.

    Example:
        >>> [paper_schedule(step) for step in (0, 9, 10, 19, 20, 1000)]
        [1e-05, 1e-05, 0.0001, 0.0001, 0.001, 0.001]
    """
    step = check_integer("step", step, minimum=0)
    return 1e-5 if step < 10 else 1e-4 if step < 20 else 1e-3


def _schedule(learning_rate: Any) -> Callable[[int], float]:
    """Returns λ as a function of the step."""
    if isinstance(learning_rate, str) and learning_rate == "paper":
        return paper_schedule
    if isinstance(learning_rate, (str, type)):
        raise ValueError(
            'learning_rate must be "exact", "paper", a positive number, a function of the step or an '
            f"instance of a Keras optimizer. Received: {received('learning_rate', learning_rate)}"
        )
    if callable(learning_rate):
        return lambda step: check_number(f"learning_rate({step})", learning_rate(step))
    constant = check_number("learning_rate", learning_rate, exclusive=True)
    return lambda step: constant


def _copy(optimizer: Any) -> Any:
    """Returns an unbuilt optimizer with the same settings."""
    config = optimizer.get_config()
    schedule = getattr(optimizer, "_learning_rate", None)
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        config["learning_rate"] = schedule  # a user's class need not be registered with Keras
    return type(optimizer).from_config(config)


@functools.lru_cache(maxsize=8)  # tracing takes longer than a hundred small steps
def _traced(evaluation: Evaluation) -> Callable[..., Any]:
    """Returns a traced function that takes a step of length t. Its `Point` has one tensor for all numbers."""
    penalty = evaluation.penalty

    @tf.function(autograph=False)
    def evaluate(
        kernel: tf.Tensor, gradient_before: tf.Tensor, direction_before: tf.Tensor, t: tf.Tensor
    ) -> Point:
        kernel += tf.cast(t * direction_before, kernel.dtype)
        if evaluation.tape:
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                excess = penalty.excess(kernel)
            gradient = tape.gradient(excess, kernel)
        else:
            excess, gradient = penalty.excess_and_gradient(kernel)
        gradient = tf.cast(gradient, tf.float64)  # products of small float32 gradients would underflow
        if evaluation.conjugate:
            direction, steepest = _conjugate_direction(gradient, gradient_before, direction_before)
        else:
            direction, steepest = -gradient, tf.constant(True)
        scale = tf.reduce_max(tf.abs(direction))
        scalars = Scalars(excess, tf.norm(gradient), steepest, scale)
        if evaluation.line:
            unit = tf.cast(tf.math.divide_no_nan(direction, scale), kernel.dtype)
            c1, c2, c3, c4 = penalty.line(kernel, unit)
            scalars = scalars._replace(c1=c1, c2=c2, c3=c3, c4=c4)
        # One tensor for all numbers, because the step waits for each copy from an accelerator.
        packed = tf.stack([tf.cast(value, tf.float64) for value in scalars])
        if evaluation.line:
            by_group = excess[None] if penalty.conv.blocks[0] == 1 else penalty.excess_by_group(kernel)
            packed = tf.concat([packed, tf.cast(by_group, tf.float64)], 0)
        return Point(kernel, gradient, direction, packed, np.empty(0))

    return evaluate


def _conjugate_direction(
    gradient: tf.Tensor, gradient_before: tf.Tensor, direction_before: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the Polak–Ribière+ direction, and whether it is steepest descent.

    It restarts by itself if the gradient does not change, and here also if it would ascend.

    Returns:
        (direction, a boolean scalar).
    """
    change = tf.reduce_sum(gradient * (gradient - gradient_before))
    beta = tf.math.divide_no_nan(tf.maximum(change, 0.0), tf.reduce_sum(gradient_before**2))
    candidate = beta * direction_before - gradient
    steepest = (beta == 0.0) | (tf.reduce_sum(candidate * gradient) >= 0.0)
    return tf.where(steepest, -gradient, candidate), steepest
