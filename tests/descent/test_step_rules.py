"""The rules one by one, then exact steps, conjugate directions, Keras optimizers and continued descents."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, cases, label
from hypothesis import given, settings
from hypothesis import strategies as st
from ids import stable_id

from tf_frobreg import (
    StopReason,
    frobenius_gradient,
    frobenius_penalty,
    paper_schedule,
    penalty_excess,
    regularize_kernel,
    singular_values,
)
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.descent.step_rules import (
    ExactSteps,
    OptimizerSteps,
    ScheduledSteps,
    quartic_minimizer,
    step_rule,
)
from tf_frobreg.penalties.frobenius import FrobeniusPenalty

PAPER_KERNELS = [(3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3)]
# Rectangular kernels and images, other borders, groups, every kind of layer.
OTHERS = [case for case in KERAS_CASES + CIRCULAR_CASES if np.prod(case.kernel_shape) > 12]


def normal(*shape, seed=1):
    return np.random.RandomState(seed).randn(*shape)


def falls(history):
    return (np.diff(history["penalty"]) <= 0).all()


RULES = {
    "exact": ("exact", None, ExactSteps),
    "exact, steepest": ("exact", "gradient", ExactSteps),
    "paper": ("paper", None, ScheduledSteps),
    "number, conjugate": (1e-5, "conjugate", ScheduledSteps),
    "function": (lambda step: 1e-5 / (1 + step), None, ScheduledSteps),
    "Adam": (keras.optimizers.Adam(0.02), None, OptimizerSteps),
}


def make_rule(name, *, tape=False, alpha=0.7):
    learning_rate, direction, _ = RULES[name]
    penalty = FrobeniusPenalty(Convolution((3, 3, 2, 3), 8), alpha)
    return step_rule(penalty, learning_rate, direction, tape=tape)


def same_point(left, right):
    arrays = zip(left[:3], right[:3], strict=True)
    np.testing.assert_equal(left.scalars, right.scalars)
    return all(np.array_equal(a, b) for a, b in arrays)


@pytest.mark.parametrize("name", RULES)
def test_the_learning_rate_chooses_the_rule(name):
    assert type(make_rule(name)) is RULES[name][2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tape", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_starts_with_steepest_descent(name, tape, dtype):
    kernel = normal(3, 3, 2, 3).astype(dtype)
    point = make_rule(name, tape=tape).start(tf.constant(kernel))
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    gradient = frobenius_gradient(kernel, 8, alpha=0.7).numpy()
    assert np.array_equal(point.kernel, kernel)
    np.testing.assert_allclose(point.gradient, gradient, rtol=tolerance, atol=tolerance * abs(gradient).max())
    assert np.array_equal(point.direction, -point.gradient)
    scalars = point.scalars
    assert scalars.excess == pytest.approx(penalty_excess(kernel, 8, alpha=0.7).numpy(), rel=tolerance)
    assert scalars.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=tolerance)
    assert scalars.steepest
    assert scalars.scale == np.abs(point.gradient).max()
    # The slope of the line is −‖gradient‖² / scale. Only exact steps need the line.
    slope = -(scalars.gradient_norm**2) / scalars.scale
    assert scalars.c1 == pytest.approx(slope if "exact" in name else np.nan, rel=10 * tolerance, nan_ok=True)
    assert np.isnan(scalars[4:]).all() == ("exact" not in name)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_continues_from_a_state(name):
    rule = make_rule(name)
    point = rule.start(tf.constant(normal(3, 3, 2, 3)))
    for step in range(4):
        point, rate = rule.next(point, step)
        assert rate == pytest.approx(
            {"paper": 1e-5, "number, conjugate": 1e-5, "function": 1e-5 / (1 + step), "Adam": 0.02}.get(
                name, rate
            )
        )
    state = rule.state(point)
    expected, rate = rule.next(point, 4)
    other = make_rule(name)
    resumed, other_rate = other.next(other.start(point.kernel, state), 4)
    assert same_point(resumed, expected)
    assert other_rate == rate


@pytest.mark.parametrize("name", RULES)
def test_a_rule_restarts_from_the_state_of_another_rule(name):
    for other in RULES:
        rule, before = make_rule(name), make_rule(other)
        point, _ = before.next(before.start(tf.constant(normal(3, 3, 2, 3))), 0)
        fresh = rule.start(point.kernel)
        if other != name:
            assert same_point(rule.start(point.kernel, before.state(point)), fresh)
        assert same_point(rule.start(point.kernel, before.state(None)), fresh)


def test_a_rule_with_another_penalty_or_a_tape_restarts():
    rule = make_rule("exact")
    point = rule.start(tf.constant(normal(3, 3, 2, 3)))
    for step in range(3):
        point, _ = rule.next(point, step)
    assert not point.scalars.steepest
    assert make_rule("exact").start(point.kernel, rule.state(point)) is point
    for other in (make_rule("exact", alpha=0.8), make_rule("exact", tape=True)):
        assert other.start(point.kernel, rule.state(point)).scalars.steepest


def test_a_conjugate_direction_that_fails_is_replaced_by_steepest_descent():
    rule = make_rule("exact")
    point = rule.start(tf.constant(normal(3, 3, 2, 3)))
    flat = point.scalars._replace(steepest=0.0, c1=0.0, c2=0.0, c3=0.0, c4=0.0)
    wrong = point._replace(direction=tf.zeros_like(point.direction), scalars=flat)
    assert same_point(rule.next(wrong, 0)[0], rule.next(point, 0)[0])
    stuck = wrong._replace(scalars=flat._replace(steepest=1.0))
    new, rate = rule.next(stuck, 0)
    assert new is None
    assert np.isnan(rate)


def test_a_point_that_rounding_denies_is_not_taken():
    rule = make_rule("exact, steepest")
    point = rule.start(tf.constant(normal(3, 3, 2, 3)))
    lowest, _ = rule.next(point, 0)
    denied = point._replace(scalars=point.scalars._replace(excess=lowest.scalars.excess))
    assert rule.next(denied, 0)[0] is None


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3), st.floats(0.01, 10))
@settings(max_examples=200, deadline=None)
def test_quartic_minimizer_is_global(lower, leading):
    coefficients = [*lower, leading]
    t = quartic_minimizer(*coefficients)
    polynomial = np.polynomial.Polynomial([0.0, *coefficients])
    reach = 2 + max(abs(c) / leading for c in lower)  # beyond Cauchy's bound on the roots
    grid = np.linspace(-reach, reach, 20001)
    assert polynomial(t) <= polynomial(grid).min() + 1e-9


@pytest.mark.parametrize("coefficients", [(0, 0, 0, 0), (0, 1, 0, 1), (np.nan, 1, 1, 1), (-1, np.inf, 0, 1)])
def test_quartic_minimizer_stays_where_nothing_is_lower(coefficients):
    assert quartic_minimizer(*coefficients) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", PAPER_KERNELS)
def test_no_tuning_takes_at_most_100_steps_on_the_papers_kernels(shape, dtype):
    result = regularize_kernel(normal(*shape).astype(dtype), 20)
    assert result.reason is StopReason.CONVERGED
    assert result.num_steps <= 100
    sigma = singular_values(result.kernel, 20)
    assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.01
    assert falls(result.history)
    assert np.isfinite(result.history["sigma_max"]).sum() <= 5  # σ is measured a few times only


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("direction", ["gradient", "conjugate"])
@pytest.mark.parametrize("case", OTHERS, ids=label)
def test_exact_steps_never_raise_the_penalty(case, direction, dtype):
    start = case.kernel(dtype=dtype)
    result = regularize_kernel(
        start,
        case.image,
        alpha=0.7,
        direction=direction,
        max_steps=60,
        tolerance=0.0,
        escape=False,
        **case.geometry,
    )
    assert falls(result.history)
    assert result.reason in (StopReason.MAX_STEPS, StopReason.STALLED)
    assert result.num_steps >= 1


@pytest.mark.slow
@given(cases(), st.integers(0, 2**31), st.sampled_from([1e-12, 1e-3, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_exact_steps_neither_fail_nor_diverge(case, seed, scale):
    start = scale * case.kernel(seed=seed % 1000)
    result = regularize_kernel(start, case.image, max_steps=40, escape=False, **case.geometry)
    assert falls(result.history)
    assert result.reason is not StopReason.DIVERGED
    assert np.isfinite(result.kernel).all()


def other_random_kernel(seed, dtype):
    random = np.random.RandomState(seed)
    shape, size = (*random.randint(1, 6, 2), *random.randint(1, 9, 2)), random.randint(6, 15)
    return random.randn(*shape).astype(dtype), size


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(20))
def test_other_random_kernels_neither_fail_nor_diverge(seed, dtype):
    start, size = other_random_kernel(seed, dtype)
    shape = start.shape
    result = regularize_kernel(start, size, max_steps=300, escape=False)
    assert falls(result.history)
    assert result.penalty < 0.1 * result.history["penalty"][0] or shape[2] > shape[3]  # its floor is high
    if result.converged:
        sigma = singular_values(result.kernel, size)
        assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.0101
    else:
        assert result.reason in (StopReason.MAX_STEPS, StopReason.STALLED)
        assert shape[2] == shape[3]  # only square kernels have local minima to end in


@pytest.mark.parametrize("seed", range(0, 20, 2))
def test_other_random_kernels_converge_with_escapes(seed):
    start, size = other_random_kernel(seed, ("float32", "float64")[seed // 2 % 2])
    result = regularize_kernel(start, size, max_steps=800)
    assert result.reason is StopReason.CONVERGED
    sigma = singular_values(result.kernel, size)
    assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.0101
    rises = np.flatnonzero(np.diff(result.history["penalty"]) > 0)
    assert set(rises) <= {escape.step for escape in result.escapes}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_at_the_optimum_rounding_ends_the_descent(dtype):
    # The minima of convolutions are flat, and the path to their bottom is endless. A Dense layer has others.
    result = regularize_kernel(normal(6, 3).astype(dtype), (), tolerance=0.0)
    assert result.reason is StopReason.STALLED
    assert not result.converged
    assert falls(result.history)
    assert np.abs(singular_values(result.kernel, ()) - 1).max() < (1e-5 if dtype == "float32" else 1e-13)


def test_the_zero_kernel_is_a_stationary_point_and_no_success():
    result = regularize_kernel(np.zeros((3, 3, 1, 2)), 6, escape=False)
    assert (result.reason, result.num_steps) == (StopReason.STALLED, 0)
    assert not result.converged


@pytest.mark.slow
def test_steepest_descent_takes_the_same_path_as_a_line_search():
    kernel = normal(3, 3, 1, 2)
    result = regularize_kernel(kernel, 5, direction="gradient", max_steps=3, tolerance=0.0)
    for rate in result.history["learning_rate"][:3]:
        with tf.GradientTape() as tape:
            variable = tf.Variable(kernel)
            half = 0.5 * frobenius_penalty(variable, 5)
        slope = tape.gradient(half, variable).numpy()
        rates = rate * np.linspace(0, 3, 301)
        values = [frobenius_penalty(kernel - r * slope, 5).numpy() for r in rates]
        assert np.argmin(values) == 100
        kernel = kernel - rate * slope
    np.testing.assert_allclose(result.kernel, kernel, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "gradient"},
        {"learning_rate": "paper"},
        {"learning_rate": keras.optimizers.Adam(0.02)},
        {"learning_rate": keras.optimizers.SGD(1e-4, momentum=0.5)},
    ],
    ids=stable_id,
)
def test_a_continued_descent_is_the_uninterrupted_one(options):
    options = {"measure": "often", "tolerance": 0.0} | options
    whole = regularize_kernel(normal(3, 3, 2, 3), 8, max_steps=30, **options)
    part = regularize_kernel(normal(3, 3, 2, 3), 8, callback=lambda step, *_: step == 13, **options)
    assert part.num_steps == 13
    rest = regularize_kernel(part, 8, max_steps=17, **options)
    assert (rest.num_steps, rest.reason) == (30, whole.reason)
    assert np.array_equal(rest.kernel, whole.kernel)
    for column, values in whole.history.items():
        np.testing.assert_array_equal(rest.history[column], values)
    assert part.num_steps == 13  # the argument is not changed
    assert len(part.history["step"]) == 14


@pytest.mark.parametrize("direction", [None, "gradient"])
@pytest.mark.parametrize("first", ["exact", "paper", 1e-5, keras.optimizers.Adam(0.01)], ids=stable_id)
def test_a_descent_may_go_on_by_another_rule(first, direction):
    start = regularize_kernel(normal(3, 3, 2, 3), 8, learning_rate=first, max_steps=5, tolerance=0.0)
    for rate in ("exact", 1e-5, keras.optimizers.SGD(1e-5)):
        direction_now = direction if rate == "exact" else None
        rest = regularize_kernel(
            start, 8, learning_rate=rate, direction=direction_now, max_steps=5, tolerance=0.0
        )
        anew = regularize_kernel(
            start.kernel, 8, learning_rate=rate, direction=direction_now, max_steps=5, tolerance=0.0
        )
        if (rate, direction) != (first, None):
            np.testing.assert_allclose(rest.kernel, anew.kernel, rtol=1e-12)


@pytest.mark.parametrize("rate", ["exact", keras.optimizers.Adam(0.02)], ids=stable_id)
def test_a_continued_descent_without_a_step_loses_nothing(rate):
    options = {"learning_rate": rate, "tolerance": 0.0}
    whole = regularize_kernel(normal(3, 3, 2, 3), 8, max_steps=10, **options)
    part = regularize_kernel(normal(3, 3, 2, 3), 8, max_steps=6, **options)
    part = regularize_kernel(part, 8, max_steps=0, **options)
    assert part.num_steps == 6
    rest = regularize_kernel(part, 8, max_steps=4, **options)
    assert np.array_equal(rest.kernel, whole.kernel)
    np.testing.assert_equal(rest.history, whole.history)


def test_a_continued_optimizer_with_other_settings_starts_afresh():
    options = {"max_steps": 5, "tolerance": 0.0}
    start = regularize_kernel(normal(3, 3, 1, 2), 8, learning_rate=keras.optimizers.Adam(0.1), **options)
    slower = keras.optimizers.Adam(1e-3)
    rest = regularize_kernel(start, 8, learning_rate=slower, **options)
    assert rest.history["learning_rate"][5:10] == pytest.approx(1e-3)
    anew = regularize_kernel(start.kernel, 8, learning_rate=slower, **options)
    np.testing.assert_allclose(rest.kernel, anew.kernel, rtol=1e-12)


def test_an_optimizer_may_have_an_unregistered_schedule():
    class Halving(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 1e-3 * 0.5 ** tf.cast(step, "float32")

        def get_config(self):
            return {}

    optimizer = keras.optimizers.Adam(Halving())
    result = regularize_kernel(normal(3, 3, 1, 2), 8, learning_rate=optimizer, max_steps=3, tolerance=0.0)
    assert result.history["learning_rate"][:3] == pytest.approx([1e-3, 5e-4, 2.5e-4])


def test_the_callback_sees_a_continued_step_once():
    seen = []

    def callback(step, kernel, penalty):
        seen.append(step)

    start = regularize_kernel(normal(3, 3, 1, 2), 8, max_steps=3, tolerance=0.0, callback=callback)
    regularize_kernel(start, 8, max_steps=2, tolerance=0.0, callback=callback)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_result_is_continued_with_its_own_geometry_only():
    result = regularize_kernel(normal(3, 3, 1, 2), 8, max_steps=2)
    for changed in ({"input_size": 9}, {"input_size": 8, "alpha": 2.0}, {"input_size": 8, "strides": 2}):
        with pytest.raises(ValueError, match="only with its own geometry and alpha. .*pass result.kernel"):
            regularize_kernel(result, **changed)


def test_a_diverged_result_is_continued_from_its_best_kernel():
    rates = {"learning_rate": lambda step: 1e9 if step == 3 else 1e-5}
    result = regularize_kernel(normal(3, 3, 1, 2), 8, **rates)
    assert (result.reason, result.num_steps) == (StopReason.DIVERGED, 3)
    again = regularize_kernel(result, 8)
    assert again.converged
    assert np.isfinite(again.history["penalty"]).all()
    assert np.array_equal(again.history["step"], np.arange(again.num_steps + 1))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["Adam", "SGD", "RMSprop", "Lion", "Nadam"])
def test_a_keras_optimizer_may_make_the_steps(name, dtype):
    config = {"learning_rate": 1e-5 if name == "SGD" else 1e-3}
    optimizer = keras.optimizers.get({"class_name": name, "config": config})
    kernel = normal(3, 3, 1, 2).astype(dtype)
    result = regularize_kernel(kernel, 6, learning_rate=optimizer, max_steps=20, tolerance=0.0)
    assert result.kernel.dtype == dtype
    assert result.penalty < result.history["penalty"][0]
    assert result.history["learning_rate"][0] == pytest.approx(config["learning_rate"])
    assert not optimizer.built  # the user's object is not used
    variable = keras.Variable(kernel, dtype=dtype)
    own = keras.optimizers.get({"class_name": name, "config": config})
    with tf.GradientTape() as tape:
        half = 0.5 * frobenius_penalty(variable, 6)
    own.apply(tape.gradient(half, [variable.value]), [variable])
    first = regularize_kernel(kernel, 6, learning_rate=optimizer, max_steps=1, tolerance=0.0).kernel
    np.testing.assert_allclose(first, variable.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "newton"}, "direction must be one of .*Received: direction='newton'"),
        ({"learning_rate": keras.optimizers.Adam}, "instance of a Keras optimizer"),
        ({"measure": "always"}, "measure must be one of .*Received: measure='always'"),
        (
            {"learning_rate": keras.optimizers.Adam(), "direction": "conjugate"},
            'direction must be "gradient" if a Keras optimizer makes the steps',
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        regularize_kernel(np.ones((3, 3, 1, 1)), 8, **arguments)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (None, TypeError), ("x", TypeError)])
def test_a_step_that_is_no_number_is_refused(step, error):
    with pytest.raises(error, match=f"step must be .*Received: step={step!r}"):
        paper_schedule(step)
