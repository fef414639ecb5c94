"""Algorithm 3.1: the paper's figures, the methods, and every way in which a descent can end."""

import copy
import dataclasses
import pickle

import keras
import numpy as np
import pytest
from ids import stable_id

import tf_frobreg.checks
from tf_frobreg import (
    DescentResult,
    Escape,
    StopReason,
    frobenius_penalty,
    paper_schedule,
    penalty_floor,
    regularize_kernel,
    singular_values,
)
from tf_frobreg.penalties import explicit_form
from tf_frobreg.penalties.closed_form import ClosedForm

PAPER_KERNELS = [(3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3)]


def normal(*shape):
    return np.random.RandomState(1).randn(*shape)


@pytest.mark.parametrize("shape", PAPER_KERNELS)
def test_the_papers_steps_reproduce_figure_4_1(shape):
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


@pytest.mark.slow
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
    # With the whole ∂R/∂K the same step sizes overshoot: σmax oscillates and never settles.
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


@pytest.mark.parametrize("learning_rate", ["exact", "paper"])
@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"gradient": "theorem"}, {}),
        ({"gradient": None}, {"method": "closed_form"}),
        ({"gradient": "tape"}, {"method": "tape"}),
        ({"gradient": "tape", "method": "tape"}, {"method": "tape"}),
        ({"gradient": "theorem", "method": "closed_form"}, {}),
        ({"gradient": "theorem", "method": "sparse"}, {"method": "sparse"}),
        ({"gradient": "tape", "method": "closed_form"}, {"method": "tape"}),
    ],
    ids=str,
)
def test_the_older_spelling_of_the_methods_gives_equal_descents(older, newer, learning_rate):
    options = {"learning_rate": learning_rate, "max_steps": 6, "tolerance": 0.0}
    first, second = (
        regularize_kernel(normal(3, 3, 2, 3), 6, **options, **spelling) for spelling in (older, newer)
    )
    assert np.array_equal(first.kernel, second.kernel)
    np.testing.assert_equal(first.history, second.history)


@pytest.mark.parametrize("learning_rate", ["exact", "paper", keras.optimizers.Adam(0.01)], ids=stable_id)
def test_the_three_methods_take_the_same_path(learning_rate):
    options = {"learning_rate": learning_rate, "max_steps": 8, "tolerance": 0.0, "measure": "often"}
    paths = [
        regularize_kernel(normal(3, 3, 2, 3), 6, method=method, **options).history
        for method in ("closed_form", "sparse", "tape")
    ]
    for path in paths[1:]:
        for column, values in path.items():
            np.testing.assert_allclose(values, paths[0][column], rtol=1e-9)


def test_each_method_uses_its_own_computation(monkeypatch):
    used = []

    def record(target, name):
        original = getattr(target, name)

        def recorder(*args, **kwargs):
            used.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(target, name, recorder)

    record(explicit_form, "penalty")
    record(explicit_form, "penalty_and_gradient")
    record(ClosedForm, "value")
    record(ClosedForm, "value_and_gradient")
    spellings = {
        ("closed_form", None): {"value_and_gradient"},
        ("sparse", None): {"penalty_and_gradient"},
        ("tape", None): {"value"},
        ("sparse", "tape"): {"penalty"},
    }
    for number, ((method, gradient), expected) in enumerate(spellings.items()):
        used.clear()
        # Another alpha for each, because traced functions are kept.
        options = {"alpha": 1.37 + number, "max_steps": 1, "tolerance": 0.0, "learning_rate": 1e-6}
        regularize_kernel(normal(3, 3, 1, 2), 5, method=method, gradient=gradient, **options)
        assert set(used) == expected


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
    # Only the first step is small enough.
    result = regularize_kernel(kernel, 8, learning_rate=lambda step: rate if step else 1e-5)
    assert result.reason is StopReason.DIVERGED
    assert not result.converged
    assert result.num_steps == 1
    assert result.penalty == np.nanmin(result.history["penalty"]) == result.history["penalty"][1]
    assert result.penalty == pytest.approx(frobenius_penalty(result.kernel, 8).numpy(), rel=1e-5)
    assert len(result.history["step"]) > 2
    assert not np.isfinite(result.history["penalty"][-1])


@pytest.mark.parametrize(("scale", "alpha", "dtype"), [(1e30, 1.0, "float32"), (1.0, 1e200, "float64")])
def test_a_kernel_whose_penalty_overflows_is_given_back(scale, alpha, dtype):
    kernel = np.full((3, 3, 1, 1), scale, dtype)
    result = regularize_kernel(kernel, 8, alpha=alpha)
    assert (result.reason, result.num_steps) == (StopReason.OVERFLOW, 0)
    assert not result.converged
    assert np.array_equal(result.kernel, kernel)
    assert result.penalty == result.history["penalty"][0] == result.history["gradient_norm"][0] == np.inf
    assert result.history["sigma_max"][0] == pytest.approx(singular_values(kernel, 8)[0], rel=1e-6)


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


@pytest.mark.parametrize("measure", ["never", "rarely", "often"])
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_without_memory_for_sigma_it_is_nan(measure, tolerance):
    options = {"max_steps": 2, "tolerance": tolerance, "learning_rate": 1e-14, "measure": measure}
    result = regularize_kernel(normal(3, 3, 8, 8), 10**5, **options)
    assert (result.num_steps, result.reason) == (2, StopReason.MAX_STEPS)
    assert (np.diff(result.history["penalty"]) < 0).all()
    assert np.isnan(result.history["sigma_max"]).all()
    assert np.isnan(result.history["sigma_min"]).all()


@pytest.mark.parametrize("measure", ["rarely", "often"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_without_memory_for_sigma_the_bound_decides(monkeypatch, alpha, measure):
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 10**7)
    options = {"alpha": alpha, "measure": measure}
    result = regularize_kernel(normal(3, 3, 3, 6), 300, **options)
    assert result.reason is StopReason.CONVERGED
    assert np.isnan([result.history[name] for name in ("sigma_max", "sigma_min")]).all()
    # The classes of a large image occur on a small one too, so the bound holds there.
    sigma = singular_values(result.kernel, 12)
    assert np.abs(sigma - alpha**0.5).max() <= 0.01
    assert regularize_kernel(result, 300, **options).num_steps == result.num_steps


def made_by_hand(result):
    return DescentResult(result.kernel, result.penalty, result.num_steps, result.reason, result.history)


def test_a_result_can_be_made_by_hand():
    result = DescentResult(
        kernel=np.ones((3, 3)), penalty=3.0, num_steps=0, reason=StopReason.STOPPED, history={}
    )
    assert not result.converged
    assert result.reason.value == "not converged: stopped by the callback; pass the result again to go on"
    assert result.escapes == ()
    assert repr(result) == (
        "DescentResult(penalty=3, num_steps=0, sigma_min=nan, sigma_max=nan, escapes=0, reason=STOPPED)"
    )
    assert str(result) == f"R 3 after 0 steps, {result.reason.value}"
    for reason in StopReason:
        assert DescentResult(np.ones((3, 3)), 3.0, 0, reason, {}).converged == reason.value.startswith(
            "converged"
        )


@pytest.mark.parametrize("reason", [reason for reason in StopReason if "not" in reason.value.split(":")[0]])
def test_what_has_not_converged_names_a_remedy(reason):
    remedies = {
        StopReason.STALLED: ["escape=True", "float64", "a larger tolerance"],
        StopReason.OUT_OF_REACH: ["fewer filters", "can help"],
        StopReason.MAX_STEPS: ["more steps", "a larger tolerance"],
        StopReason.OVERFLOW: ["scale the kernel down"],
        StopReason.STOPPED: ["pass the result again to go on"],
    }
    assert all(remedy in reason.value.split("; ")[-1] for remedy in remedies[reason])


@pytest.mark.parametrize("escapes", [5, None, [(3, 0.1, (0,))], [Escape(3, 0.1, (0,)), "x"], iter([])])
def test_escapes_of_a_result_are_escapes(escapes):
    with pytest.raises(TypeError, match="escapes must be a sequence of Escape. Received: escapes="):
        DescentResult(np.ones((3, 3)), 3.0, 0, StopReason.STOPPED, {}, escapes)


def test_escapes_of_a_result_may_be_a_list():
    escape = Escape(3, 0.1, (0,))
    assert DescentResult(np.ones((3, 3)), 3.0, 0, StopReason.STOPPED, {}, [escape]).escapes == (escape,)


@pytest.mark.parametrize("direction", ["gradient", "conjugate"])
def test_a_result_made_by_hand_is_continued_with_steepest_descent(direction):
    options = {"direction": direction, "tolerance": 0.0}
    first = regularize_kernel(normal(3, 3, 2, 3), 8, max_steps=6, **options)
    rest = regularize_kernel(made_by_hand(first), 8, max_steps=5, **options)
    anew = regularize_kernel(first.kernel, 8, max_steps=5, **options)
    whole = regularize_kernel(first, 8, max_steps=5, **options)
    assert (rest.num_steps, rest.reason) == (11, StopReason.MAX_STEPS)
    assert np.array_equal(rest.kernel, anew.kernel)
    assert np.array_equal(rest.kernel, whole.kernel) == (direction == "gradient")
    assert np.array_equal(rest.history["step"], np.arange(12))
    for column in ("penalty", "gradient_norm", "learning_rate"):
        np.testing.assert_array_equal(rest.history[column][:6], first.history[column][:6])
        np.testing.assert_array_equal(rest.history[column][6:], anew.history[column])


def test_a_result_made_by_hand_counts_its_steps_on():
    steps = []
    result = DescentResult(normal(3, 3, 1, 2), np.nan, 0, StopReason.STOPPED, {})
    first = regularize_kernel(result, 6, max_steps=3, learning_rate="paper", tolerance=0.0)
    assert first.num_steps == 3
    regularize_kernel(
        made_by_hand(first),
        6,
        max_steps=2,
        learning_rate=lambda step: steps.append(step) or 1e-5,
        tolerance=0.0,
    )
    assert steps == [3, 4]


def test_a_result_made_by_hand_may_have_lists_for_columns_and_another_geometry():
    first = regularize_kernel(normal(3, 3, 1, 2), 6, max_steps=3)
    lists = {name: column.tolist() for name, column in first.history.items()}
    result = DescentResult(first.kernel, first.penalty, 3, first.reason, lists)
    rest = regularize_kernel(result, 7, alpha=2.0, padding="circular", max_steps=2)
    anew = regularize_kernel(first.kernel, 7, alpha=2.0, padding="circular", max_steps=2)
    assert np.array_equal(rest.kernel, anew.kernel)
    assert rest.history["step"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_steps": 5}, "history must have a column 'step' .* num_steps=5 steps. Received: 4 rows"),
        ({"history": {}}, "history must have a column 'step' .* num_steps=3 steps. Received: 0 rows"),
        ({"num_steps": -1}, "num_steps must be at least 0"),
        ({"num_steps": 1.5}, "num_steps must be an integer"),
        ({"kernel": np.full((3, 3, 1, 2), np.nan)}, "kernel must be finite"),
    ],
)
def test_a_wrong_result_is_refused_by_name(changed, message):
    first = regularize_kernel(normal(3, 3, 1, 2), 6, max_steps=3, tolerance=0.0)
    with pytest.raises((ValueError, TypeError), match=message):
        regularize_kernel(dataclasses.replace(made_by_hand(first), **changed), 6)


@pytest.mark.parametrize(
    "duplicate", [lambda r: pickle.loads(pickle.dumps(r)), copy.deepcopy], ids=["pickle", "copy"]
)
@pytest.mark.parametrize("learning_rate", ["exact", keras.optimizers.Adam(0.01)], ids=stable_id)
def test_a_copied_result_is_continued_like_the_original(learning_rate, duplicate):
    options = {"learning_rate": learning_rate, "max_steps": 5, "tolerance": 0.0}
    first = regularize_kernel(normal(3, 3, 1, 2), 8, **options)
    rest, copied = (regularize_kernel(result, 8, **options) for result in (first, duplicate(first)))
    assert np.array_equal(rest.kernel, copied.kernel)
    np.testing.assert_equal(rest.history, copied.history)


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
        ({"escape": 1}, "escape must be True or False. Received: escape=1"),
        ({"gradient": "numeric"}, "gradient must be one of .*Received: gradient='numeric'"),
        ({"method": "dense"}, "method must be one of .*'tape'.*Received: method='dense'"),
        ({"method": "theorem"}, "method must be one of .*Received: method='theorem'"),
        ({"gradient": "sparse"}, "gradient must be one of .*Received: gradient='sparse'"),
        (
            {"method": "tape", "gradient": "theorem"},
            'gradient must be "tape" or None if method="tape". Received: gradient=\'theorem\'',
        ),
        ({"kernel": np.full((3, 3, 1, 1), np.nan)}, "kernel must be finite"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        regularize_kernel(**{"kernel": np.ones((3, 3, 1, 1)), "input_size": 8} | arguments)


STUCK = np.random.RandomState(0).randn(5, 4, 4) / 20**0.5  # two windings: two pixels are lost


@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_a_small_gradient_in_a_local_minimum_is_no_success(tolerance):
    options = {"gradient_tolerance": 1e-3, "tolerance": tolerance}
    plain = regularize_kernel(STUCK, 32, escape=False, **options)
    assert plain.reason is StopReason.STATIONARY
    assert plain.penalty == pytest.approx(2.0, abs=1e-4)
    result = regularize_kernel(STUCK, 32, **options)
    assert result.converged
    assert result.escapes
    assert result.penalty < 0.01


def test_a_printed_result_shows_the_escapes_and_sigma():
    result = regularize_kernel(STUCK, 32)
    low, high = (result.history[name][-1] for name in ("sigma_min", "sigma_max"))
    assert str(result) == (
        f"R {result.penalty:.4g} after {result.num_steps} steps, {len(result.escapes)} escapes, "
        f"σ {low:.4g} … {high:.4g}, {StopReason.CONVERGED.value}"
    )
    assert repr(result) == (
        f"DescentResult(penalty={result.penalty:.4g}, num_steps={result.num_steps}, sigma_min={low:.4g}, "
        f"sigma_max={high:.4g}, escapes={len(result.escapes)}, reason=CONVERGED)"
    )
    assert result.to_dict() == {
        "penalty": result.penalty,
        "num_steps": result.num_steps,
        "reason": StopReason.CONVERGED.value,
        "converged": True,
        "sigma_min": low,
        "sigma_max": high,
        "escapes": len(result.escapes),
    }
    assert {type(value) for value in result.to_dict().values()} == {float, int, str, bool}
    unmeasured = regularize_kernel(STUCK, 32, tolerance=0.0, max_steps=1)
    assert (unmeasured.to_dict()["sigma_min"], unmeasured.to_dict()["sigma_max"]) == (None, None)
    two_groups = dataclasses.replace(unmeasured, escapes=[Escape(0, 0.1, (0,)), Escape(0, 0.2, (1,))])
    assert two_groups.to_dict()["escapes"] == 1  # at the same step
    assert str(unmeasured) == f"R {unmeasured.penalty:.4g} after 1 steps, {StopReason.MAX_STEPS.value}"
