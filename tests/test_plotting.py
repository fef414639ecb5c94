"""Figures: what is drawn, and what is refused."""

import io

import numpy as np
import pytest

from tf_frobreg import (
    DescentResult,
    ExtremeSingularValues,
    KernelSpectrum,
    extreme_singular_values,
    plot_convergence,
    plot_gradient_norms,
    plot_spectrum,
    plot_training,
    regularize_kernel,
    singular_values,
)

KERNEL = np.random.RandomState(1).randn(3, 3, 2, 4) / 6
EXTREMES = ExtremeSingularValues(1.5, 0.25, 0.0, 0.0, True, True)
HISTORY = {
    "epoch": np.array([0.0, 0.5, 1.0]),
    "seconds": np.array([0.1, 0.1, 0.1]),
    "first/sigma_max": np.array([3.0, np.nan, 1.5]),
    "first/sigma_min": np.array([0.1, np.nan, 0.5]),
    "first/penalty": np.array([9.0, np.nan, 2.0]),
    "block/second/sigma_max": np.array([2.0, 1.9, 1.8]),
    "block/second/sigma_min": np.array([np.nan, np.nan, np.nan]),
    "block/second/penalty": np.array([8.0, 7.0, 6.0]),
    "first/gradient_norm": np.array([0.5, 0.25, 0.125]),
    "block/second/gradient_norm": np.array([1.0, 0.75, np.nan]),
}


def as_png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def dashed(axes):
    """The line at √α."""
    (line,) = (line for line in axes.lines if line.get_linestyle() == "--")
    return line


@pytest.fixture(scope="module")
def result() -> DescentResult:
    return regularize_kernel(KERNEL, 6, measure="often", max_steps=60)


def test_convergence_is_drawn_where_it_was_measured(result):
    figure = plot_convergence(result)
    left, right = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["σmax", "σmin"]
    assert left.get_xscale() == "log"
    for axes, column, colour in ((left, "sigma_max", "tab:blue"), (right, "sigma_min", "tab:red")):
        (line,) = axes.lines
        values = result.history[column]
        measured = np.isfinite(values)
        assert 2 < measured.sum() <= len(values)
        np.testing.assert_array_equal(line.get_xdata(), result.history["step"][measured] + 1)
        np.testing.assert_array_equal(line.get_ydata(), values[measured])
        assert line.get_color() == colour
    assert as_png(figure).startswith(b"\x89PNG")


def test_several_descents_have_a_panel_each(result):
    figure = plot_convergence({f"kernel {number}": result for number in range(3)})
    assert titles(figure)[::2] == ["kernel 0", "kernel 1", "kernel 2"]
    assert len(figure.axes) == 6


@pytest.mark.parametrize("results", [{}, None, 3.0, []], ids=str)
def test_convergence_without_a_result_is_refused(results):
    with pytest.raises(ValueError, match="results must be a DescentResult or a non-empty dict.*Received: "):
        plot_convergence(results)


def test_sorted_spectra_have_a_panel_each():
    sigma = singular_values(KERNEL, 9)
    figure = plot_spectrum({"conv": sigma[::-1], "a long name of a layer in a deep model": EXTREMES}, alpha=4)
    first, second = figure.axes
    assert titles(figure) == ["conv, 162 σ", "a long name o…a deep model, σmax and σmin"]
    assert dashed(first).get_ydata() == dashed(second).get_ydata() == [2.0, 2.0]
    np.testing.assert_array_equal(first.lines[-1].get_ydata(), sigma)
    assert first.get_xlim() == (0.0, 1.0)
    assert second.get_ylim() == pytest.approx((0.0, 1.05 * 2.0))


def test_a_spectrum_without_a_name_has_no_legend():
    sigma = singular_values(KERNEL, 9)
    assert titles(plot_spectrum(sigma)) == titles(plot_spectrum(sigma.tolist())) == ["162 σ"]
    assert titles(plot_spectrum(EXTREMES)) == ["σmax and σmin"]
    assert plot_spectrum(sigma, kind="histogram").axes[0].get_legend() is None


def test_histograms_share_a_panel():
    sigma = singular_values(KERNEL, 9)
    figure = plot_spectrum({"all": sigma, "two": EXTREMES}, kind="histogram", alpha=0.25)
    (axes,) = figure.axes
    assert sorted(labels(axes)) == ["all", "two (ends)"]
    np.testing.assert_array_equal(dashed(axes).get_xdata(), [0.5, 0.5])
    (outline,) = axes.patches
    heights = outline.get_xy()[:, 1]
    assert heights.max() <= 1.0
    assert sum(heights[1:-1:2]) == pytest.approx(1.0)  # every σ is in a bin
    ends = axes.lines[-1]
    np.testing.assert_array_equal(ends.get_xdata(), [1.5, 0.25])
    assert max(ends.get_ydata()) < 0 <= min(axes.get_yticks())


@pytest.mark.parametrize("kind", ["sorted", "histogram"])
def test_many_layers_fit(kind):
    figure = plot_spectrum({f"layer {n}": np.linspace(1.0, n, 50) for n in range(2, 22)}, kind=kind)
    assert len(figure.axes) == (20 if kind == "sorted" else 1)
    assert as_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("sequence", [list, tuple])
def test_rows_of_a_model_are_drawn_as_they_are(sequence):
    measured = KernelSpectrum("conv", extremes=extreme_singular_values(KERNEL, 9))
    rows = sequence([measured, KernelSpectrum("lstm", "it is no convolution")])
    assert titles(plot_spectrum(rows)) == ["conv, σmax and σmin"]
    with pytest.raises(ValueError, match="spectra must hold a measured layer. Received: spectra="):
        plot_spectrum(rows[1:])


@pytest.mark.parametrize("spectra", [{}, [], ()], ids=str)
def test_no_spectrum_is_refused(spectra):
    with pytest.raises(ValueError, match="spectra must hold a measured layer. Received: spectra="):
        plot_spectrum(spectra)


@pytest.mark.parametrize(
    "sigma",
    [np.zeros(0), [1.0, np.nan], [np.inf], [-0.1, 1.0], [1j], "abc", [[1.0], [1.0, 2.0]], None, object()],
    ids=["empty", "nan", "infinite", "negative", "complex", "text", "ragged", "none", "object"],
)
def test_what_is_no_spectrum_is_refused(sigma):
    for spectra in (sigma, {"layer": sigma}):
        with pytest.raises(ValueError, match="spectra must hold finite singular values, at least 0, or Extr"):
            plot_spectrum(spectra)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "bars"}, ValueError, "kind must be one of .*sorted.*histogram.* Received: kind='bars'"),
        ({"kind": None}, ValueError, "kind must be one of .* Received: kind=None"),
        ({"alpha": 0}, ValueError, "alpha must be a finite number above 0. Received: alpha=0"),
        ({"alpha": "one"}, TypeError, "alpha must be a number above 0. Received: alpha='one'"),
    ],
)
def test_bad_arguments_of_a_spectrum(arguments, error, message):
    with pytest.raises(error, match=message):
        plot_spectrum([1.0, 0.5], **arguments)


def test_a_training_is_drawn_by_layer_and_epoch():
    figure = plot_training(HISTORY, 4.0)
    assert titles(figure) == ["σmax", "σmin"]
    for axes, column in zip(figure.axes, ("sigma_max", "sigma_min"), strict=True):
        np.testing.assert_array_equal(dashed(axes).get_ydata(), [2.0, 2.0])
        lines = {line.get_label(): line for line in axes.lines if line is not dashed(axes)}
        assert list(lines) == ["first", "block/second"]
        for name, line in lines.items():
            values = HISTORY[f"{name}/{column}"]
            measured = np.isfinite(values)
            np.testing.assert_array_equal(line.get_xdata(), HISTORY["epoch"][measured])
            np.testing.assert_array_equal(line.get_ydata(), values[measured])
    assert labels(figure.axes[1]) == ["first", "block/second"]
    assert as_png(figure).startswith(b"\x89PNG")


def test_columns_may_be_lists():
    history = {name: values.tolist() for name, values in HISTORY.items()}
    assert as_png(plot_training(history)) == as_png(plot_training(HISTORY))
    assert as_png(plot_gradient_norms(history)) == as_png(plot_gradient_norms(HISTORY))


def test_gradient_norms_are_drawn_by_depth():
    figure = plot_gradient_norms(HISTORY)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["first", "block/second"]
    assert labels(axes) == ["epoch 0", "epoch 0.5", "epoch 1"]
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), [0.25, 0.75])
    assert as_png(figure).startswith(b"\x89PNG")


def without(column):
    return {name: values for name, values in HISTORY.items() if name != column}


@pytest.mark.parametrize(
    "history",
    [{}, None, 3, {"epoch": [0.0]}, {"loss": [1.0]}, without("epoch"), without("first/sigma_min")],
    ids=["empty", "none", "number", "no layer", "of Keras", "no epoch", "no σmin"],
)
def test_a_training_without_measurements_is_refused(history):
    with pytest.raises(
        ValueError,
        match='history must hold .*: columns "epoch", "<layer>/sigma_max", "<layer>/sigma_min". Received: ',
    ):
        plot_training(history)


@pytest.mark.parametrize(
    "history",
    [{}, None, without("epoch"), {"epoch": [0.0], "first/sigma_max": [1.0], "first/sigma_min": [0.5]}],
    ids=["empty", "none", "no epoch", "no gradients"],
)
def test_gradient_norms_without_measurements_are_refused(history):
    with pytest.raises(
        ValueError, match='history must hold .*: columns "epoch", "<layer>/gradient_norm". Received: '
    ):
        plot_gradient_norms(history)


@pytest.mark.parametrize(
    ("alpha", "error"), [(0.0, ValueError), (-1.0, ValueError), (np.nan, ValueError), ("one", TypeError)]
)
def test_bad_targets_of_a_training(alpha, error):
    with pytest.raises(error, match="alpha must be a .*number above 0. Received: alpha="):
        plot_training(HISTORY, alpha)
