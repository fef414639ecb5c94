"""Rows of a report: what was measured of one kernel, or why it was not measured."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from geometries import CIRCULAR_CASES, KERAS_CASES, label

import tf_frobreg.checks
import tf_frobreg.spectrum.extremes
import tf_frobreg.spectrum.kernel_report
from tf_frobreg import (
    Convolution,
    ExtremeSingularValues,
    KernelSpectrum,
    ModelSpectrum,
    extreme_singular_values,
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
    assert row.alpha == 2.0
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


@pytest.mark.parametrize("part", ["ExtremesFinder", "FrobeniusPenalty"])
def test_what_does_not_fit_in_memory_before_the_search_is_a_row_with_the_reason(part, monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("20 vectors of 99 entries do not fit in memory")

    monkeypatch.setattr(tf_frobreg.spectrum.kernel_report, part, refuse)
    row = report_kernel("layer", normal(3, 3, 2, 4), Convolution((3, 3, 2, 4), 6), 1.0, accuracy=1e-4)
    reason = "20 vectors of 99 entries do not fit in memory"
    assert row == KernelSpectrum("layer", reason, kernel_shape=(3, 3, 2, 4))


def test_vectors_that_do_not_fit_in_memory_are_a_reason(searched, monkeypatch):
    monkeypatch.setattr(tf_frobreg.checks, "ALWAYS_FREE", 0)
    monkeypatch.setattr(tf_frobreg.checks, "free_memory", lambda: 10**4)
    row = report_kernel("layer", normal(3, 3, 2, 4), Convolution((3, 3, 2, 4), 6), 1.0, accuracy=1e-4)
    assert re.match("20 vectors of 72 entries: this needs 11,520 bytes, but 10,000 are free", row.reason)
    assert row.extremes is None


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


def measured(name, high, low, **values):
    """A row by hand, with σ that are converged."""
    ends = ExtremeSingularValues(high, low, 0.0, 0.0, True, True)
    fields = {"kernel_shape": (3, 3, 1, 4), "input_size": (8, 8), "penalty": 64.0, "penalty_per_column": 1.0}
    return KernelSpectrum(name, extremes=ends, **(fields | {"penalty_floor": 0.0, "alpha": 1.0} | values))


def rows_with_everything():
    """A plain row, values that are not finite, bounds, a Dense layer of another α, and what is missing."""
    bounds = ExtremeSingularValues(3.0, 0.5, 0.1, 0.5, False, False)
    return ModelSpectrum(
        [
            measured("conv", 2.0, 0.25),
            measured("huge", 1e200, 0.0, penalty=math.inf, penalty_per_column=math.inf),
            measured("high", 1.0, math.nan),
            KernelSpectrum("bounds", None, (1, 1, 2, 2), (4, 5), bounds, 12.34567, 0.5, 0.25, None, 1.0),
            measured("dense", 1.0, 1.0, kernel_shape=(5, 3), input_size=(), alpha=2.5),
            KernelSpectrum("lstm", "LSTMCell is no convolution"),
            KernelSpectrum("gru", "LSTMCell is no convolution"),
            KernelSpectrum("nan", "its kernel holds NaN or infinity", kernel_shape=(3, 3, 2, 4)),
        ]
    )


def test_a_report_as_text():
    assert str(rows_with_everything()).splitlines() == [
        "5 kernels, σ 0 … 1e+200, 3 not measured",
        "",
        "layer    kernel  image    σmax   σmin  σmax/σmin    α      R  R/column  floor",
        "─────────────────────────────────────────────────────────────────────────────",
        "conv    3×3×1×4    8×8       2   0.25          8    1     64         1      0",
        "huge    3×3×1×4    8×8  1e+200      0          ∞    1      ∞         ∞      0",
        "high    3×3×1×4    8×8       1      -          -    1     64         1      0",
        "bounds  1×1×2×2    4×5     ≥ 3  ≤ 0.5        ≥ 6    1  12.35       0.5   0.25",
        "dense       5×3      -       1      1          1  2.5     64         1      0",
        "",
        "Not measured: lstm, gru: LSTMCell is no convolution",
        "Not measured: nan: its kernel holds NaN or infinity",
    ]


def noise(name, error=2e-8, low=2.953e-17):
    ends = ExtremeSingularValues(2.0, low, 1e-8, error, True, True)
    return KernelSpectrum(name, None, (3, 3, 1, 4), (8, 8), ends, 64.0, 1.0, 0.0, None, 1.0)


def test_a_smallest_value_below_its_error_is_shown_as_the_error():
    row = noise("conv")
    assert row.condition_number == pytest.approx(1e8)
    assert str(row) == "conv  σ ≤ 2e-08 … 2, R 64"
    assert repr(row) == "KernelSpectrum(name='conv', sigma_max=2, sigma_min=2e-08)"
    lines = str(ModelSpectrum([row, measured("other", 3.0, 1.0)])).splitlines()
    assert lines[0] == "2 kernels, σ ≤ 2e-08 … 3, α = 1"
    assert lines[4].split() == ["conv", "3×3×1×4", "8×8", "2", "≤", "2e-08", "≥", "1e+08", "64", "1", "0"]
    record = row.to_dict()
    assert (record["sigma_min"], record["sigma_min_error"]) == (2e-8, 2e-8)
    assert record["sigma_min_is_upper_bound"] is True
    assert record["condition_number"] == pytest.approx(1e8)
    assert row.extremes.sigma_min == 2.953e-17
    # 0 with an error is not known to be 0. 0 without one is.
    assert str(noise("conv", low=0.0)) == "conv  σ ≤ 2e-08 … 2, R 64"
    assert str(noise("conv", low=0.0, error=0.0)) == "conv  σ 0 … 2, R 64"
    assert noise("conv", low=0.0, error=0.0).condition_number == math.inf


def test_remarks_are_below_the_table():
    rows = [dataclasses.replace(measured(name, 2.0, 1.0), remark="also applied to 4×4") for name in "ab"]
    spectrum = ModelSpectrum([*rows, measured("c", 2.0, 1.0), KernelSpectrum("d", "no matrix")])
    assert str(spectrum).splitlines()[-2:] == ["a, b: also applied to 4×4", "Not measured: d: no matrix"]
    assert "<p>a, b: also applied to 4×4</p>" in spectrum._repr_html_()
    assert [record["remark"] for record in spectrum.records()] == ["also applied to 4×4"] * 2 + [None] * 2


def test_a_report_in_one_line():
    assert repr(rows_with_everything()) == "ModelSpectrum of 5 kernels, σ 0 … 1e+200, 3 not measured"
    assert repr(ModelSpectrum([measured("conv", 2.0, 0.25)])) == "ModelSpectrum of 1 kernel, σ 0.25 … 2"
    without_low = [measured("a", 2.0, math.nan), measured("b", 3.0, math.nan)]
    assert repr(ModelSpectrum(without_low)) == "ModelSpectrum of 2 kernels, σ up to 3"
    assert repr(ModelSpectrum()) == "ModelSpectrum of 0 kernels"


def test_alpha_is_in_the_first_line_if_all_agree():
    lines = str(ModelSpectrum([measured("a", 2.0, 0.5), measured("b", 3.0, 1.0)])).splitlines()
    assert lines[0] == "2 kernels, σ 0.5 … 3, α = 1"
    assert "α" not in lines[2]
    assert "α" not in str(ModelSpectrum([measured("by hand", 2.0, 0.5, alpha=None)]))


def test_columns_without_any_value_are_left_out():
    rows = [measured("high", 2.0, math.nan, kernel_shape=(5, 3), input_size=())]
    columns = str(ModelSpectrum(rows)).splitlines()[2].split()
    assert columns == ["layer", "kernel", "σmax", "R", "R/column", "floor"]


def test_a_report_of_nothing():
    assert str(ModelSpectrum()) == "0 kernels"
    missing = ModelSpectrum([KernelSpectrum("a"), KernelSpectrum("b", "no matrix")])
    lines = ["0 kernels, 2 not measured", "", "Not measured: a: not measured", "Not measured: b: no matrix"]
    assert str(missing).splitlines() == lines
    assert missing._repr_html_().count("<p>") == 3


def test_a_report_in_a_notebook():
    html = rows_with_everything()._repr_html_()
    assert "<caption>5 kernels, σ 0 … 1e+200, 3 not measured</caption>" in html
    assert html.count("<tr>") == 6
    assert all(f">{cell}</td>" in html for cell in ("bounds", "1×1×2×2", "≥ 3", "≤ 0.5", "∞", "2.5"))
    assert html.endswith("<p>Not measured: nan: its kernel holds NaN or infinity</p>")


def test_a_report_is_a_list():
    rows = rows_with_everything()
    assert rows[0].name == "conv"
    assert [row.name for row in rows[-2:]] == ["gru", "nan"]
    assert type(rows[:2]) is list
    assert rows == list(rows)
    assert len(rows) == 8


def test_records_are_flat_plain_values():
    rows = rows_with_everything()
    records = {record["layer"]: record for record in rows.records()}
    assert list(records) == [row.name for row in rows]
    assert records["bounds"] == {
        "layer": "bounds",
        "kernel_shape": (1, 1, 2, 2),
        "input_size": (4, 5),
        "sigma_max": 3.0,
        "sigma_min": 0.5,
        "sigma_max_error": 0.1,
        "sigma_min_error": 0.5,
        "sigma_max_converged": False,
        "sigma_min_converged": False,
        "sigma_min_is_upper_bound": True,
        "condition_number": 6.0,
        "alpha": 1.0,
        "penalty": 12.34567,
        "penalty_per_column": 0.5,
        "penalty_floor": 0.25,
        "reason": None,
        "remark": None,
    }
    assert records["huge"]["penalty"] == records["huge"]["condition_number"] == math.inf
    unknown = ("sigma_min", "sigma_min_converged", "sigma_min_is_upper_bound", "condition_number")
    assert [records["high"][name] for name in unknown] == [None] * 4
    assert records["high"]["sigma_max_converged"] is True
    known = {name: value for name, value in records["nan"].items() if value is not None}
    assert known == {
        "layer": "nan",
        "kernel_shape": (3, 3, 2, 4),
        "reason": "its kernel holds NaN or infinity",
    }


def test_measured_records_hold_no_arrays(searched):
    row = report_kernel("a", normal(3, 3, 8, 8), Convolution((3, 3, 8, 8), 12), 1.0, accuracy=1e-4)
    assert row.extremes.vectors is not None
    record = row.to_dict()
    assert json.loads(json.dumps(record)) == record | {"kernel_shape": [3, 3, 8, 8], "input_size": [12, 12]}


def test_a_row_has_a_short_repr():
    extremes = extreme_singular_values(np.ones((1, 1, 1, 4)), 8)
    row = KernelSpectrum("conv", None, (1, 1, 1, 4), (8, 8), extremes, 1.0)
    assert repr(row) == "KernelSpectrum(name='conv', sigma_max=2, sigma_min=2)"
    assert repr(KernelSpectrum("a", "no matrix")) == "KernelSpectrum(name='a', reason='no matrix')"
