"""The stopping criterion alone: when it measures σ, what it decides, and that it changes nothing."""

import math

import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, label

import tf_frobreg.descent.stopping
from tf_frobreg import penalty_excess, singular_values
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.convolution.isometric_patch import isometric_patch
from tf_frobreg.descent.stopping import ConvergenceCheck, Verdict
from tf_frobreg.penalties.frobenius import FrobeniusPenalty
from tf_frobreg.spectrum.extremes import ExtremeSingularValues

CASES = KERAS_CASES + CIRCULAR_CASES
UNMEASURED = (math.nan, math.nan)
CONV = Convolution((3, 3, 1, 2), 6)  # σ is measured by all 36 singular values


def identity(scale=1.0):
    """A kernel with every σ equal to `scale`."""
    kernel = np.zeros((3, 3, 1, 2))
    kernel[1, 1, 0, 0] = scale
    return tf.constant(kernel)


def excess(kernel, conv=CONV, alpha=1.0):
    return float(penalty_excess(kernel, conv.input_size, alpha=alpha, **conv.geometry))


def make_check(tolerance=0.01, measure="rarely", conv=CONV, alpha=1.0):
    return ConvergenceCheck(FrobeniusPenalty(conv, alpha), tolerance, measure)


@pytest.fixture
def found(monkeypatch):
    """Replaces the search for σ. Returns a list of the values to be found, and a list of the kernels."""
    values, kernels = [], []

    class Finder:
        def __init__(self, conv, accuracy, *, dense_rows):
            self.accuracy = accuracy

        def __call__(self, kernel, start):
            kernels.append(kernel)
            value = values.pop(0) if values else (1.0, 1.0)
            if isinstance(value, Exception):
                raise value
            known = [not math.isnan(v) for v in value]
            return ExtremeSingularValues(*np.nan_to_num(value, nan=1.0), 0.0, 0.0, *known)

    monkeypatch.setattr(tf_frobreg.descent.stopping, "ExtremesFinder", Finder)
    return values, kernels


@pytest.fixture
def bounds(monkeypatch):
    """Replaces the bound. Returns a list of the values to be found, and a list of the kernels."""
    values, kernels = [], []

    def deviation_bound(penalty, kernel):
        kernels.append(kernel)
        return tf.constant(values.pop(0) if values else 0.0, tf.float64)

    monkeypatch.setattr(FrobeniusPenalty, "deviation_bound", deviation_bound)
    return values, kernels


@pytest.mark.parametrize("alpha", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("tolerance", [1e-6, 0.01, 0.4, 3.0])
@pytest.mark.parametrize("scale", [1e-9, 0.2, 0.99, 1.009, 1.02, 1.5, 10.0])
def test_the_verdict_is_equation_1_1(scale, tolerance, alpha):
    kernel = identity(scale * alpha**0.5)
    verdict = make_check(tolerance, alpha=alpha)(0, kernel, excess(kernel, alpha=alpha))
    sigma = scale * alpha**0.5
    assert verdict.converged == (abs(sigma - alpha**0.5) <= tolerance)
    if verdict.converged:
        assert verdict[:2] == pytest.approx((sigma, sigma))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_verdict_agrees_with_all_singular_values(case):
    kernel = case.kernel()
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    sigma = singular_values(kernel, case.image, **case.geometry)
    distance = max(abs(sigma[0] - 1), abs(sigma[-1] - 1))
    for tolerance in (0.9 * distance, 1.1 * distance):
        verdict = make_check(tolerance, conv=conv)(0, tf.constant(kernel), excess(kernel, conv))
        assert verdict.converged == (tolerance > distance)
        if verdict.converged:
            assert verdict[:2] == pytest.approx((sigma[0], sigma[-1]), abs=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("tolerance", [1e-6, 0.01, 0.4, 3.0])
def test_sigma_is_not_measured_if_r_shows_that_no_kernel_has_converged(found, tolerance, alpha):
    _, kernels = found
    check = make_check(tolerance, alpha=alpha)
    # The largest excess of a converged kernel: all 36 σ lie at √α + tolerance.
    largest = 36 * ((alpha**0.5 + tolerance) ** 2 - alpha) ** 2
    for step in range(1000):
        verdict = check(step, identity(), 1.001 * largest)
        np.testing.assert_equal(verdict, Verdict(*UNMEASURED, False))
    assert not kernels
    check(1000, identity(), 0.999 * largest)
    assert len(kernels) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("measure", ["rarely", "often"])
def test_a_kernel_without_a_finite_penalty_is_not_measured(found, measure, value):
    verdict = make_check(measure=measure)(0, tf.constant(np.full((3, 3, 1, 2), value)), value)
    np.testing.assert_equal(verdict, Verdict(*UNMEASURED, False))
    assert not found[1]


def test_a_check_changes_none_of_its_arguments():
    kernel = identity(1.001)
    penalty = FrobeniusPenalty(CONV, 1.0)
    before = kernel.numpy().copy(), (penalty.conv, penalty.alpha, penalty.method)
    check = ConvergenceCheck(penalty, 0.01, "often")
    verdicts = [check(0, kernel, excess(kernel)) for _ in range(3)]
    assert verdicts[0].converged
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert check.final_sigma(kernel) == verdicts[0][:2]
    assert np.array_equal(kernel, before[0])
    assert (penalty.conv, penalty.alpha, penalty.method) == before[1]
    with pytest.raises(AttributeError):
        verdicts[0].sigma_max = 2.0


def check_the_wait(check, kernels):
    """Every look finds twice what is allowed. A quarter of R brings it there. `kernels` lists the looks."""
    check(0, identity(), 0.01)
    assert len(kernels) == 1
    for step in range(1, 100):
        assert not check(step, identity(), 0.951 * 0.01 / 4).converged
    assert len(kernels) == 1
    check(99, identity(), 0.949 * 0.01 / 4)
    assert len(kernels) == 2
    check(198, identity(), 0.005)
    assert len(kernels) == 2
    check(199, identity(), 0.005)
    assert len(kernels) == 3


def test_after_a_measurement_the_next_waits_for_a_lower_r_or_a_later_step(found):
    values, kernels = found
    values += [(1.02, 1.0)] * 3
    check = make_check(0.01)
    check_the_wait(check, kernels)
    # From step 400 on the wait is a quarter of the steps.
    values += [(1.02, 1.0)] * 2
    check(1000, identity(), 0.005)
    check(1249, identity(), 0.005)
    assert len(kernels) == 4
    check(1250, identity(), 0.005)
    assert len(kernels) == 5


def test_often_measures_in_regular_intervals(found):
    _, kernels = found
    check = make_check(0.0, measure="often")
    measured = [step for step in range(1001) if not math.isnan(check(step, identity(), 5.0).sigma_max)]
    assert len(kernels) == len(measured)
    assert measured[:40] == list(range(40))
    assert [step for step in measured if 40 <= step < 100] == list(range(40, 100, 2))
    assert [step for step in measured if 100 <= step < 200] == list(range(100, 200, 5))
    assert [step for step in measured if 200 <= step < 400] == list(range(200, 400, 10))
    assert [step for step in measured if 400 <= step < 1000] == list(range(400, 1000, 20))
    assert measured[-1] == 1000


def test_with_tolerance_0_no_kernel_converges(found):
    _, kernels = found
    rarely, often = make_check(0.0), make_check(0.0, measure="often")
    np.testing.assert_equal(rarely(0, identity(), 0.0), Verdict(*UNMEASURED, False))
    np.testing.assert_equal(rarely.final_sigma(identity()), UNMEASURED)
    assert not kernels
    assert often(0, identity(), 0.0) == Verdict(1.0, 1.0, False)
    assert often.final_sigma(identity()) == (1.0, 1.0)
    assert len(kernels) == 2


def test_a_value_that_cannot_be_measured_is_left_to_r(found):
    values, _ = found
    certain = (2 * 0.01 - 0.01**2) ** 2  # every kernel with this excess has converged
    for missing in ((math.nan, math.nan), (1.0, math.nan), (math.nan, 1.0), ValueError("no memory now")):
        values[:] = [missing, missing]
        sigma = UNMEASURED if isinstance(missing, ValueError) else missing
        check = make_check(0.01)
        np.testing.assert_equal(check(0, identity(), 1.01 * certain), Verdict(*sigma, False))
        np.testing.assert_equal(check(1, identity(), 0.99 * certain), Verdict(*sigma, True))


@pytest.mark.parametrize("wrong", [(1.02, 1.0), (1.0, 0.98), (1.02, math.nan), (math.nan, 0.98)])
def test_a_measured_value_outside_the_tolerance_overrules_r(found, wrong):
    values, kernels = found
    values += [wrong]
    check = make_check(0.01)
    np.testing.assert_equal(check(0, identity(), 0.0), Verdict(*wrong, False))
    # Rounding has made R wrong. It is not trusted again.
    assert not check(1, identity(), 1e-9).converged
    assert len(kernels) == 1


def test_r_does_not_decide_if_it_does_not_count_every_singular_value(found):
    values, kernels = found
    values += [(1.0, 0.0)]
    strided = Convolution((1, 1, 2, 4), 6, strides=2)  # no tap reaches 54 of 72 columns
    assert FrobeniusPenalty(strided, 1.0).num_singular_values < min(strided.shape)
    check = make_check(0.01, conv=strided)
    np.testing.assert_equal(check(0, tf.zeros((1, 1, 2, 4), tf.float64), 0.0), Verdict(*UNMEASURED, False))
    assert not kernels
    # A tolerance of √α or more allows σmin = 0.
    assert make_check(1.0, conv=strided)(0, tf.zeros((1, 1, 2, 4), tf.float64), 0.0).converged


def nearly_isometric(case, alpha):
    conv = Convolution.of(case.kernel_shape, case.image, case.geometry)
    nearest = isometric_patch(conv).nearest_isometry(case.kernel(), alpha)
    return conv, nearest + 1e-4 * case.kernel(1)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_without_measurements_the_bound_is_compared_with_the_tolerance(found, case, alpha):
    conv, kernel = nearly_isometric(case, alpha)
    penalty = FrobeniusPenalty(conv, alpha)
    now, bound = (float(f(tf.constant(kernel))) for f in (penalty.excess, penalty.deviation_bound))
    for share in (0.99, 1.01):
        allowed = share * bound
        if allowed >= alpha:  # no kernel of this geometry is near an isometry
            continue
        tolerance = alpha**0.5 - (alpha - allowed) ** 0.5
        verdict = make_check(tolerance, "never", conv, alpha)(0, tf.constant(kernel), now)
        counted = penalty.num_singular_values == min(conv.shape)
        np.testing.assert_equal(
            verdict, Verdict(*UNMEASURED, counted and (allowed >= bound or now <= allowed**2))
        )
        if verdict.converged:
            sigma = singular_values(kernel, case.image, **case.geometry)
            assert np.abs(sigma - alpha**0.5).max() <= tolerance
    assert not found[1]


def test_sigma_is_never_measured_if_it_must_not_be(found, bounds):
    bounds[0][:] = [1.0] * 2000
    check = make_check(0.01, "never")
    for step in range(1000):
        np.testing.assert_equal(
            check(step, identity(), 0.0005 + 0.01 / (1 + step)), Verdict(*UNMEASURED, False)
        )
    np.testing.assert_equal(check.final_sigma(identity()), UNMEASURED)
    assert bounds[1]
    assert not found[1]


def test_the_bound_is_not_needed_if_r_decides(bounds):
    check = make_check(0.01, "never")
    largest = 36 * (2 * 0.01 + 0.01**2) ** 2  # every larger excess shows that some σ is too far away
    smallest = (2 * 0.01 - 0.01**2) ** 2  # every smaller one shows that no σ is
    assert not check(0, identity(), 1.001 * largest).converged
    assert check(1, identity(), 0.999 * smallest).converged
    assert not bounds[1]
    assert check(2, identity(), 0.999 * largest).converged
    assert len(bounds[1]) == 1


def test_after_a_look_at_the_bound_the_next_waits_for_a_lower_r_or_a_later_step(bounds):
    values, kernels = bounds
    allowed = 2 * 0.01 - 0.01**2
    values += [2 * allowed] * 3
    check_the_wait(make_check(0.01, "never"), kernels)


@pytest.mark.parametrize("measure", ["never", "rarely"])
def test_after_an_escape_the_next_look_is_due_at_once(found, bounds, measure):
    found[0][:] = [(1.02, 1.0)] * 3
    bounds[0][:] = [0.04] * 3
    looks = found[1] if measure == "rarely" else bounds[1]
    check = make_check(0.01, measure)
    for step in range(3):
        check(step, identity(), 0.01)
    assert len(looks) == 1
    check.restart()
    for step in range(3, 6):
        check(step, identity(), 0.01)
    assert len(looks) == 2


@pytest.mark.parametrize("rows", [35, 36])
def test_sigma_of_a_large_layer_is_measured_at_the_end_only(monkeypatch, found, bounds, rows):
    monkeypatch.setattr(tf_frobreg.descent.stopping, "SEARCHED_ROWS", rows)
    assert min(CONV.shape) == 36
    by_bound = rows < 36
    bounds[0][:] = [1.0]
    check = make_check(0.01)
    verdict = check(0, identity(), 0.01)
    np.testing.assert_equal(verdict, Verdict(*UNMEASURED, False) if by_bound else Verdict(1.0, 1.0, True))
    assert (len(found[1]), len(bounds[1])) == ((0, 1) if by_bound else (1, 0))
    assert check.final_sigma(identity()) == (1.0, 1.0)


def test_often_measures_large_layers_too(monkeypatch, found, bounds):
    monkeypatch.setattr(tf_frobreg.descent.stopping, "SEARCHED_ROWS", 1)
    found[0][:] = [(1.5, 0.5)] * 1000
    check = make_check(0.01, "often")
    measured = [step for step in range(100) if not math.isnan(check(step, identity(), 5.0).sigma_max)]
    assert measured == [*range(40), *range(40, 100, 2)]
    assert not bounds[1]  # R shows that the kernel is far from converged
    assert check(101, identity(), 0.001).converged  # no measurement at this step, so the bound decides
    assert len(bounds[1]) == 1


@pytest.mark.parametrize("measure", ["never", "rarely", "often"])
def test_without_memory_for_sigma_the_bound_decides(bounds, measure):
    conv = Convolution((3, 3, 8, 8), 10**5)
    check = make_check(0.01, measure, conv)
    bounds[0][:] = [1.0, 0.0199]
    for converged in (False, True):
        verdict = check(0, tf.zeros(conv.kernel_shape), 1.0)
        np.testing.assert_equal(verdict, Verdict(*UNMEASURED, converged))
        check.restart()
    np.testing.assert_equal(check.final_sigma(tf.zeros(conv.kernel_shape)), UNMEASURED)
    unlimited = make_check(0.0, measure, conv)
    np.testing.assert_equal(unlimited(0, tf.zeros(conv.kernel_shape), 1.0), Verdict(*UNMEASURED, False))


@pytest.mark.parametrize(
    ("sigma", "tolerance", "expected"),
    [
        ((1.009, 0.991), 0.01, True),
        ((1.011, 0.991), 0.01, False),
        ((1.009, 0.989), 0.01, False),
        ((1.0, 1.0), 0.0, False),
        ((1.0, math.nan), 0.01, False),
        ((math.nan, 1.0), 0.01, False),
    ],
)
def test_at_the_end_the_measured_values_decide(bounds, sigma, tolerance, expected):
    assert make_check(tolerance).is_within(identity(), *sigma) == expected
    assert not bounds[1]


def test_at_the_end_the_bound_decides_if_nothing_was_measured(bounds):
    bounds[0][:] = [0.0199, 0.02]
    check = make_check(0.01, "never")
    assert check.is_within(identity(), *UNMEASURED)
    assert not check.is_within(identity(), *UNMEASURED)
    assert len(bounds[1]) == 2
    strided = Convolution((1, 1, 2, 4), 6, strides=2)  # R and the bound do not count every σ
    for check in (make_check(0.0, "never"), make_check(0.01, "never", strided)):
        assert not check.is_within(identity(), *UNMEASURED)


@pytest.mark.parametrize("measure", ["always", None, 1, True])
def test_measure_must_be_a_known_word(measure):
    with pytest.raises(ValueError, match="one of .*'never', 'rarely', 'often'.*Received: measure="):
        make_check(measure=measure)
