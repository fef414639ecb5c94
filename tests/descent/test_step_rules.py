"""Steps that need no tuning: the exact one, conjugate directions, and what may be asked for instead."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, cases, label
from hypothesis import given, settings
from hypothesis import strategies as st
from ids import stable_id

from tf_frobreg import StopReason, frobenius_penalty, regularize_kernel, singular_values
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.descent.step_rules import quartic_minimizer
from tf_frobreg.penalties.closed_form import closed_form

PAPER_KERNELS = [(3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3)]
# Beyond the paper's: rectangular kernels and images, other borders, groups, every kind of layer.
OTHERS = [case for case in KERAS_CASES + CIRCULAR_CASES if np.prod(case.kernel_shape) > 12]


def normal(*shape, seed=1):
    return np.random.RandomState(seed).randn(*shape)


def falls(history):
    return (np.diff(history["penalty"]) <= 0).all()


@pytest.mark.parametrize("case", KERAS_CASES + CIRCULAR_CASES, ids=label)
def test_the_line_is_the_penalty_along_a_direction(case):
    kernel, direction = case.kernel(), case.kernel(seed=1)
    form = closed_form(Convolution.of(kernel.shape, case.image, case.geometry))
    line = [c.numpy() for c in form.line(tf.constant(kernel), tf.constant(direction), 1.5)]
    for t in (-2.0, -0.3, 0.1, 1.0):
        change = np.polyval([*line[::-1], 0.0], t)
        ends = [
            frobenius_penalty(k, case.image, alpha=1.5, **case.geometry)
            for k in (kernel, kernel + t * direction)
        ]
        assert change == pytest.approx((ends[1] - ends[0]).numpy(), rel=1e-10, abs=1e-10)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3), st.floats(0.01, 10))
@settings(max_examples=200, deadline=None)
def test_quartic_minimizer_is_global(lower, leading):
    coefficients = [*lower, leading]
    t = quartic_minimizer(coefficients)
    polynomial = np.polynomial.Polynomial([0.0, *coefficients])
    reach = 2 + max(abs(c) / leading for c in lower)  # Cauchy's bound on the roots, and more
    grid = np.linspace(-reach, reach, 20001)
    assert polynomial(t) <= polynomial(grid).min() + 1e-9


@pytest.mark.parametrize("coefficients", [(0, 0, 0, 0), (0, 1, 0, 1), (np.nan, 1, 1, 1), (-1, np.inf, 0, 1)])
def test_quartic_minimizer_stays_where_nothing_is_lower(coefficients):
    assert quartic_minimizer(coefficients) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", PAPER_KERNELS)
def test_no_tuning_takes_at_most_100_steps_on_the_papers_kernels(shape, dtype):
    result = regularize_kernel(normal(*shape).astype(dtype), 20)
    assert result.reason is StopReason.CONVERGED
    assert result.num_steps <= 100
    sigma = singular_values(result.kernel, 20)
    assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.01
    assert falls(result.history)
    assert np.isfinite(result.history["sigma_max"]).sum() <= 5  # σ is looked at a few times only


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("direction", ["gradient", "conjugate"])
@pytest.mark.parametrize("case", OTHERS, ids=label)
def test_exact_steps_never_raise_the_penalty(case, direction, dtype):
    start = case.kernel(dtype=dtype)
    result = regularize_kernel(
        start, case.image, alpha=0.7, direction=direction, max_steps=60, tolerance=0.0, **case.geometry
    )
    assert falls(result.history)
    assert result.reason in (StopReason.MAX_STEPS, StopReason.STALLED)
    assert result.num_steps >= 1


@given(cases(), st.integers(0, 2**31), st.sampled_from([1e-12, 1e-3, 1.0, 1e6]))
@settings(max_examples=30, deadline=None)
def test_exact_steps_neither_fail_nor_diverge(case, seed, scale):
    start = scale * case.kernel(seed=seed % 1000)
    result = regularize_kernel(start, case.image, max_steps=40, **case.geometry)
    assert falls(result.history)
    assert result.reason is not StopReason.DIVERGED
    assert np.isfinite(result.kernel).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(20))
def test_other_random_kernels_neither_fail_nor_diverge(seed, dtype):
    random = np.random.RandomState(seed)
    shape, size = (*random.randint(1, 6, 2), *random.randint(1, 9, 2)), random.randint(6, 15)
    result = regularize_kernel(random.randn(*shape).astype(dtype), size, max_steps=300)
    assert falls(result.history)
    assert result.penalty < 0.1 * result.history["penalty"][0] or shape[2] > shape[3]  # whose floor is high
    if result.converged:
        sigma = singular_values(result.kernel, size)
        assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.0101
    else:
        assert result.reason in (StopReason.MAX_STEPS, StopReason.STALLED)
        assert shape[2] == shape[3]  # only square kernels have local minima to end in


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_at_the_optimum_rounding_ends_the_descent(dtype):
    # Of a Dense layer: the minima of convolutions are flat, and the way to their bottom is endless.
    result = regularize_kernel(normal(6, 3).astype(dtype), (), tolerance=0.0)
    assert result.reason is StopReason.STALLED
    assert not result.converged
    assert falls(result.history)
    assert np.abs(singular_values(result.kernel, ()) - 1).max() < (1e-5 if dtype == "float32" else 1e-13)


def test_the_zero_kernel_is_a_stationary_point_and_no_success():
    result = regularize_kernel(np.zeros((3, 3, 1, 2)), 6)
    assert (result.reason, result.num_steps) == (StopReason.STALLED, 0)
    assert not result.converged


def test_steepest_descent_goes_the_same_way_with_a_line_search_of_its_own():
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
    assert part.num_steps == 13  # what was given is as it was
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
        with pytest.raises(ValueError, match="use result.kernel to begin anew"):
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
    assert not optimizer.built  # the user's own is left alone
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
        ({"measure": "never"}, "measure must be one of .*Received: measure='never'"),
        (
            {"learning_rate": keras.optimizers.Adam(), "direction": "conjugate"},
            'direction must be "gradient" where a Keras optimizer makes the steps',
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        regularize_kernel(np.ones((3, 3, 1, 1)), 8, **arguments)
