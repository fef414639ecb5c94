"""Algorithm 3.1: the paper's story in numbers, and every way in which a descent can end."""

import keras
import numpy as np
import pytest

from tf_frobreg import (
    StopReason,
    frobenius_penalty,
    paper_schedule,
    penalty_floor,
    regularize_kernel,
    singular_values,
)

PAPER_KERNELS = [(3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3)]


def normal(*shape):
    return np.random.RandomState(1).randn(*shape)


@pytest.mark.parametrize("shape", PAPER_KERNELS)
def test_the_papers_steps_tell_the_story_of_figure_4_1(shape):
    result = regularize_kernel(normal(*shape), 20, learning_rate="paper", measure="often")
    history = result.history
    high, low = history["sigma_max"], history["sigma_min"]
    # Both fall for about 20 steps …
    assert (np.diff(high[:20]) < 0).all()
    assert (np.diff(low[:20]) < 0).all()
    # … then σmax stays near 1 and σmin climbs …
    assert np.nanmax(np.abs(high[30:] - 1)) < 0.15
    turn = np.nanargmin(low)
    assert 20 <= turn <= 60
    climb = low[30:][np.isfinite(low[30:])]
    assert (np.diff(climb[climb.argmin() :]) > 0).all()
    # … until both are within 0.01 of 1, measured here on all of M.
    assert result.reason is StopReason.CONVERGED
    assert 1200 <= result.num_steps <= 1600
    sigma = singular_values(result.kernel, 20)
    assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.01
    floor = penalty_floor(shape, 20)
    assert (history["penalty"] >= floor).all()
    assert result.penalty == pytest.approx(floor, abs=0.02)


def test_the_papers_steps_belong_to_half_the_gradient():
    def sigma(scale, steps):
        result = regularize_kernel(
            normal(3, 3, 3, 6),
            20,
            learning_rate=lambda step: scale * paper_schedule(step),
            measure="often",
            max_steps=steps,
        )
        return [(result.history[name]) for name in ("sigma_max", "sigma_min")]

    half_max, half_min = sigma(1.0, 100)
    for step, high, low in [(0, 10.945, 1.524), (10, 2.759, 0.577), (20, 1.262, 0.255), (50, 1.064, 0.206)]:
        assert half_max[step] == pytest.approx(high, abs=1e-3)
        assert half_min[step] == pytest.approx(low, abs=1e-3)
    assert (half_max[100], half_min[100]) == (pytest.approx(1.038, abs=1e-3), pytest.approx(0.314, abs=1e-3))
    # With all of ∂R/∂K the same step sizes overshoot for ever: σmax swings about and never settles.
    full_max, _ = sigma(2.0, 2000)
    late = full_max[1000:][np.isfinite(full_max[1000:])]
    assert len(late) > 10
    assert (late > 1.01).all()
    assert np.ptp(late) > 0.2


def test_theorem_and_tape_and_explicit_m_take_the_same_path():
    options = {"learning_rate": "paper", "measure": "often", "max_steps": 25, "tolerance": 0.0}
    paths = [
        regularize_kernel(normal(3, 3, 2, 3), 6, gradient=gradient, method=method, **options).history
        for gradient in ("theorem", "tape")
        for method in ("closed_form", "sparse")
    ]
    for path in paths[1:]:
        for column in ("penalty", "gradient_norm", "learning_rate", "sigma_max", "sigma_min"):
            np.testing.assert_allclose(path[column], paths[0][column], rtol=1e-9)


def test_history_has_a_row_per_step_and_thins_out_the_singular_values():
    options = {"learning_rate": 1e-4, "measure": "often", "max_steps": 300, "tolerance": 0.0}
    result = regularize_kernel(normal(3, 3, 1, 3), 8, **options)
    history = result.history
    assert result.reason is StopReason.MAX_STEPS
    assert not result.converged
    assert np.array_equal(history["step"], np.arange(301))
    assert {len(column) for column in history.values()} == {301}
    measured = np.flatnonzero(np.isfinite(history["sigma_max"]))
    assert set(range(40)) | {50, 100, 200, 300} <= set(measured)
    assert len(measured) < 110
    assert (history["learning_rate"][:-1] == 1e-4).all()
    assert np.isnan(history["learning_rate"][-1])
    assert history["penalty"][-1] == result.penalty == frobenius_penalty(result.kernel, 8).numpy()


def test_input_is_not_modified_and_dtype_is_kept():
    for dtype in ("float32", "float64"):
        kernel = normal(3, 3, 2, 2).astype(dtype)
        before = kernel.copy()
        result = regularize_kernel(kernel, 8, max_steps=5)
        assert result.kernel.dtype == dtype
        assert np.array_equal(kernel, before)
        assert not np.array_equal(result.kernel, before)


def test_an_orthogonal_kernel_converges_without_a_step():
    kernel = np.zeros((3, 3, 2, 2))
    kernel[1, 1] = np.eye(2)
    result = regularize_kernel(kernel, 8)
    assert (result.reason, result.num_steps) == (StopReason.CONVERGED, 0)
    assert np.array_equal(result.kernel, kernel)


@pytest.mark.parametrize("alpha", [0.25, 4.0])
def test_alpha_is_the_target_of_sigma_squared(alpha):
    result = regularize_kernel(normal(3, 3, 1, 2), 6, alpha=alpha, max_steps=20000)
    assert result.converged
    np.testing.assert_allclose(singular_values(result.kernel, 6), alpha**0.5, atol=0.01)


def test_stops_by_the_gradient():
    options = {"tolerance": 0.0, "gradient_tolerance": 1.0, "measure": "often"}
    result = regularize_kernel(normal(3, 3, 1, 2), 8, **options)
    assert result.reason is StopReason.STATIONARY
    assert result.converged
    norms = result.history["gradient_norm"]
    assert norms[-1] <= 1.0 < norms[-2]
    assert np.isfinite(result.history["sigma_min"][-1])


@pytest.mark.parametrize("rate", [10.0, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_diverged_descent_gives_back_the_kernel_with_the_lowest_penalty(dtype, rate):
    kernel = normal(3, 3, 2, 3).astype(dtype)
    # A first small step does good; those that follow do not.
    result = regularize_kernel(kernel, 8, learning_rate=lambda step: rate if step else 1e-5)
    assert result.reason is StopReason.DIVERGED
    assert not result.converged
    assert result.num_steps == 1
    assert result.penalty == np.nanmin(result.history["penalty"]) == result.history["penalty"][1]
    assert result.penalty == pytest.approx(frobenius_penalty(result.kernel, 8).numpy(), rel=1e-5)
    assert len(result.history["step"]) > 2
    assert not np.isfinite(result.history["penalty"][-1])


def test_a_kernel_whose_penalty_overflows_is_given_back():
    kernel = np.full((3, 3, 1, 1), 1e30, "float32")
    result = regularize_kernel(kernel, 8)
    assert (result.reason, result.num_steps) == (StopReason.OVERFLOW, 0)
    assert not result.converged
    assert np.array_equal(result.kernel, kernel)


def test_callback_sees_every_step_and_can_stop():
    seen = []

    def callback(step, kernel, penalty):
        seen.append((step, kernel.shape, penalty))
        return step == 7

    result = regularize_kernel(normal(3, 3, 1, 2), 8, callback=callback)
    assert (result.reason, result.num_steps) == (StopReason.STOPPED, 7)
    assert [step for step, _, _ in seen] == list(range(8))
    assert [penalty for _, _, penalty in seen] == result.history["penalty"].tolist()


def test_learning_rate_may_be_a_keras_schedule():
    schedule = keras.optimizers.schedules.ExponentialDecay(1e-4, decay_steps=10, decay_rate=0.5)
    rates = regularize_kernel(normal(3, 3, 1, 2), 6, learning_rate=schedule, max_steps=20).history[
        "learning_rate"
    ]
    np.testing.assert_allclose(rates[:20], 1e-4 * 0.5 ** (np.arange(20) / 10), rtol=1e-5)


def test_without_room_for_m_only_the_tolerance_is_refused():
    kernel = normal(3, 3, 8, 8)
    with pytest.raises(ValueError, match="tolerance needs σ, which cannot be measured .*Use tolerance=0"):
        regularize_kernel(kernel, 10**5, max_steps=2)
    result = regularize_kernel(kernel, 10**5, max_steps=2, tolerance=0.0, learning_rate=1e-14)
    assert result.num_steps == 2
    assert (np.diff(result.history["penalty"]) < 0).all()
    assert np.isnan(result.history["sigma_max"]).all()


def test_no_step_at_all():
    result = regularize_kernel(normal(3, 3, 1, 2), 6, max_steps=0)
    assert (result.reason, result.num_steps) == (StopReason.MAX_STEPS, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be .*Received: learning_rate='fast'"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"learning_rate": lambda step: None}, r"learning_rate\(0\) must be a number"),
        ({"callback": 5}, "callback must be callable. Received: callback=5"),
        ({"max_steps": -1}, "max_steps must be at least 0"),
        ({"max_steps": 1.5}, "max_steps must be an integer"),
        ({"tolerance": -0.1}, "tolerance must be"),
        ({"gradient_tolerance": float("inf")}, "gradient_tolerance must be"),
        ({"alpha": 0}, "alpha must be"),
        ({"gradient": "numeric"}, "gradient must be one of .*Received: gradient='numeric'"),
        ({"method": "dense"}, "method must be one of"),
        ({"kernel": np.full((3, 3, 1, 1), np.nan)}, "kernel must be finite"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        regularize_kernel(**{"kernel": np.ones((3, 3, 1, 1)), "input_size": 8} | arguments)
