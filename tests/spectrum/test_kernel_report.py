"""Rows of a report: what was measured of one kernel, or why it was not measured."""

import math

import numpy as np
import pytest
from geometries import CIRCULAR_CASES, KERAS_CASES, label

import tf_frobreg.checks
import tf_frobreg.spectrum.extremes
from tf_frobreg import (
    Convolution,
    ExtremeSingularValues,
    KernelSpectrum,
    frobenius_penalty,
    penalty_floor,
    singular_values,
)
from tf_frobreg.spectrum.kernel_report import report_kernel


def normal(*shape):
    return np.random.RandomState(1).randn(*shape)


@pytest.fixture
def searched(monkeypatch):
    """Sends small layers through the search that large layers need."""
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "DENSE_ROWS", 5)
    monkeypatch.setattr(tf_frobreg.spectrum.extremes, "RESCUE_ROWS", 0)


@pytest.mark.parametrize("case", [*KERAS_CASES, *CIRCULAR_CASES], ids=label)
def test_a_row_holds_the_singular_values_and_the_penalty(case):
    kernel = case.kernel()
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    row = report_kernel("layer", kernel, conv, 2.0, accuracy=1e-4)
    sigma = singular_values(kernel, case.image, accuracy=1e-14, **case.geometry)
    assert (row.name, row.reason) == ("layer", None)
    assert (row.kernel_shape, row.input_size, row.convolution) == (kernel.shape, case.image, conv)
    assert row.extremes[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-6, abs=1e-8 * sigma[0])
    expected = float(frobenius_penalty(kernel, case.image, alpha=2.0, **case.geometry))
    assert row.penalty == pytest.approx(expected)
    assert row.penalty_per_column == pytest.approx(expected / conv.shape[1])
    assert row.penalty_floor == penalty_floor(kernel.shape, case.image, alpha=2.0, **case.geometry)
    high, low = row.extremes[:2]
    assert row.condition_number == (high / low if low else np.inf)


def test_the_penalty_of_a_float32_kernel_is_computed_in_float64():
    conv, kernel = Convolution((3, 3, 2, 4), 6), normal(3, 3, 2, 4).astype("float32")
    row = report_kernel("layer", kernel, conv, 1.0, accuracy=1e-4)
    assert row.penalty == float(frobenius_penalty(kernel.astype("float64"), 6))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_kernel_that_is_not_finite_is_not_measured(value):
    kernel = normal(3, 3, 2, 4)
    kernel[1, 2, 0, 3] = value
    row = report_kernel("layer", kernel, Convolution(kernel.shape, 6), 1.0, accuracy=1e-4)
    assert row == KernelSpectrum("layer", "its kernel holds NaN or infinity", kernel_shape=(3, 3, 2, 4))
    assert row.condition_number is None


def test_a_kernel_that_needs_too_much_memory_is_not_measured(monkeypatch):
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 5 * 10**7)
    conv, kernel = Convolution((7, 7, 64, 64), 3), normal(7, 7, 64, 64)
    row = report_kernel("layer", kernel, conv, 1.0, accuracy=1e-4)
    assert "has 49² pairs of taps" in row.reason
    assert row == KernelSpectrum("layer", row.reason, kernel_shape=conv.kernel_shape)


def test_a_penalty_beyond_all_floats_is_infinite():
    conv = Convolution((1, 1, 1, 1), 2)
    row = report_kernel("layer", np.full((1, 1, 1, 1), 1e150), conv, 1.0, accuracy=1e-4)
    assert row.penalty == row.penalty_per_column == math.inf
    assert row.extremes.sigma_max == pytest.approx(1e150)


def test_sigma_min_can_be_left_out(searched):
    conv = Convolution((3, 3, 2, 4), 6)
    row = report_kernel("layer", normal(3, 3, 2, 4), conv, 1.0, accuracy=1e-4, sigma_min=False)
    assert row.extremes.sigma_max_converged
    assert math.isnan(row.extremes.sigma_min)
    assert math.isnan(row.condition_number)


def test_a_search_starts_at_the_row_before(searched, monkeypatch):
    starts = []
    finder = tf_frobreg.spectrum.extremes.ExtremesFinder.__call__

    def recorded(self, kernel, start=None):
        starts.append(start)
        return finder(self, kernel, start)

    monkeypatch.setattr(tf_frobreg.spectrum.extremes.ExtremesFinder, "__call__", recorded)
    conv, kernel = Convolution((3, 3, 8, 8), 12), normal(3, 3, 8, 8)
    before = report_kernel("layer", kernel, conv, 1.0, accuracy=1e-4)
    row = report_kernel("layer", 1.01 * kernel, conv, 1.0, accuracy=1e-4, start=before)
    assert row.extremes.sigma_max == pytest.approx(1.01 * before.extremes.sigma_max, rel=2e-4)
    # A row of another geometry, or without a measurement, is not used.
    report_kernel("layer", kernel, Convolution((3, 3, 8, 8), 11), 1.0, accuracy=1e-4, start=before)
    report_kernel("layer", kernel, conv, 1.0, accuracy=1e-4, start=KernelSpectrum("layer", "unknown"))
    assert starts == [None, before.extremes, None, None]


def test_a_limit_on_iterations_is_kept(searched):
    conv = Convolution((3, 3, 8, 8), 12)
    row = report_kernel("layer", normal(3, 3, 8, 8), conv, 1.0, accuracy=1e-4, max_iterations=2)
    assert not row.extremes.converged


def test_the_condition_number_is_never_above_the_true_one(searched):
    kernel = normal(3, 3, 8, 8)
    sigma = singular_values(kernel, 12)
    for iterations in (2, 1000):
        row = report_kernel(
            "layer", kernel, Convolution(kernel.shape, 12), 1.0, accuracy=1e-4, max_iterations=iterations
        )
        assert 1.0 <= row.condition_number <= sigma[0] / sigma[-1] * (1 + 1e-9)
        assert row.condition_number == row.extremes.sigma_max / row.extremes.sigma_min


@pytest.mark.parametrize(
    ("alpha", "options", "message"),
    [
        (0.0, {"accuracy": 1e-4}, "alpha must be a finite number above 0"),
        (1.0, {"accuracy": 1.0}, "accuracy must be below 1. Received: accuracy=1.0"),
        (1.0, {"accuracy": 1e-4, "max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_bad_arguments_are_no_reason_but_an_error(alpha, options, message):
    with pytest.raises(ValueError, match=message):
        report_kernel("layer", np.ones((1, 1, 1, 1)), Convolution((1, 1, 1, 1), 2), alpha, **options)


def test_rows_as_text():
    extremes = ExtremeSingularValues(2.0, 0.25, 0.0, 0.0, True, True)
    row = KernelSpectrum("conv", None, (3, 3, 1, 4), (8, 8), extremes, 12.5, 0.2, 0.0)
    assert str(row) == "conv  σ 0.25 … 2, R 12.5"
    assert row.condition_number == 8.0
    assert str(KernelSpectrum("lstm", "LSTMCell is no convolution")) == "lstm  - LSTMCell is no convolution"
    assert str(KernelSpectrum("conv")) == "conv  - not measured"
    assert KernelSpectrum("conv").condition_number is None
