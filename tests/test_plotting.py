"""Figures: what is drawn, and what is refused."""

import io

import numpy as np
import pytest
from ids import stable_id

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


def ends_only(sigma_max, sigma_min):
    return ExtremeSingularValues(sigma_max, sigma_min, 0.0, 0.0, True, True)


EXTREMES = ends_only(1.5, 0.25)
HISTORY = {
    "epoch": np.array([0.0, 0.5, 1.0]),
    "seconds": np.array([0.1, 0.1, 0.1]),
    "sigma_max": np.array([3.0, 1.9, 1.8]),
    "sigma_min": np.array([0.1, 0.1, 0.5]),
    "penalty": np.array([17.0, 7.0, 8.0]),
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


def names_along(axis):
    """The name of each place that has one."""
    return {round(tick.get_loc()): tick.label1.get_text() for tick in axis.get_major_ticks()}


def bars(axes, label):
    """(σ at the left end, σ at the right end) of each bar, from the top."""
    (container,) = (container for container in axes.containers if container.get_label() == label)
    by_place = sorted(container.patches, key=lambda bar: bar.get_y())
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in by_place]


def places(axes, label):
    """The place of each bar along the vertical axis."""
    (container,) = (container for container in axes.containers if container.get_label() == label)
    return [bar.get_y() + bar.get_height() / 2 for bar in container.patches]


def segments(axes, label):
    """The lines of a collection of lines."""
    (collection,) = (lines for lines in axes.collections if lines.get_label() == label)
    return np.array(collection.get_segments())


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


@pytest.mark.parametrize("results", [{}, None, 3.0, [], {"a": 1}, {"a": []}], ids=str)
def test_convergence_without_a_result_is_refused(results):
    with pytest.raises(ValueError, match="results must be a DescentResult or a non-empty dict.*Received: "):
        plot_convergence(results)


def test_sorted_spectra_have_a_panel_each():
    sigma = singular_values(KERNEL, 9)
    spectra = {"conv": sigma[::-1], "a long name of a layer in a deep model": EXTREMES}
    figure = plot_spectrum(spectra, kind="sorted", alpha=4)
    first, second = figure.axes
    assert titles(figure) == ["conv, 162 σ", "a long name o…a deep model, σmax and σmin"]
    assert dashed(first).get_ydata() == dashed(second).get_ydata() == [2.0, 2.0]
    np.testing.assert_array_equal(first.lines[-1].get_ydata(), sigma)
    assert first.get_xlim() == (0.0, 1.0)
    assert second.get_ylim() == pytest.approx((0.0, 1.05 * 2.0))


def test_a_spectrum_without_a_name_has_no_legend():
    sigma = singular_values(KERNEL, 9)
    assert titles(plot_spectrum(sigma)) == titles(plot_spectrum(sigma.tolist())) == ["162 σ"]
    assert titles(plot_spectrum(EXTREMES, kind="sorted")) == ["σmax and σmin"]
    (axes,) = plot_spectrum(EXTREMES).axes
    assert names_along(axes.yaxis) == {0: ""}
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


def test_many_histograms_have_a_colour_bar_with_names():
    figure = plot_spectrum({f"layer {n}": np.linspace(1.0, n, 50) for n in range(2, 22)}, kind="histogram")
    axes, bar = figure.axes
    assert axes.get_legend() is None
    assert len(axes.patches) == 20
    assert names_along(bar.yaxis) == {place: f"layer {place + 2}" for place in range(0, 20, 2)}
    assert as_png(figure).startswith(b"\x89PNG")


def many_spectra(count):
    return {f"layer {n}": np.linspace(0.5, 1 + n, 50) for n in range(count)}


@pytest.mark.parametrize(
    ("spectra", "panels"),
    [
        (many_spectra(1), 1),
        (many_spectra(9), 9),
        (many_spectra(10), 1),
        (many_spectra(100), 1),
        (many_spectra(3) | {"ends": EXTREMES}, 1),
    ],
    ids=["1", "9", "10", "100", "ends of one"],
)
def test_few_known_spectra_have_a_panel_each_and_all_others_share_one(spectra, panels):
    figure = plot_spectrum(spectra)
    assert len(figure.axes) == panels
    is_sorted = any("σ" in title for title in titles(figure))
    assert is_sorted == (len(spectra) < 10 and "ends" not in spectra)
    assert len(plot_spectrum(spectra, kind="sorted").axes) == len(spectra)


def test_a_bar_reaches_from_the_smallest_to_the_largest_singular_value():
    sigma = singular_values(KERNEL, 9)
    figure = plot_spectrum({"all": sigma, "two": EXTREMES, "one": [0.75]}, kind="ranges", alpha=0.25)
    (axes,) = figure.axes
    ends = bars(axes, "σmin to σmax")
    np.testing.assert_allclose(ends, [(sigma.min(), sigma.max()), (0.25, 1.5), (0.75, 0.75)], rtol=1e-14)
    assert places(axes, "σmin to σmax") == [0, 1, 2]
    middle = bars(axes, "middle 80 %")
    assert places(axes, "middle 80 %") == [0, 2]
    np.testing.assert_allclose(middle, [np.quantile(sigma, [0.1, 0.9]), (0.75, 0.75)], rtol=1e-14)
    share = np.mean((sigma >= middle[0][0]) & (sigma <= middle[0][1]))
    assert share == pytest.approx(0.8, abs=0.01)
    medians = segments(axes, "median")
    np.testing.assert_allclose(medians[:, :, 0], [[np.median(sigma)] * 2, [0.75, 0.75]])
    np.testing.assert_allclose(medians.mean(axis=1)[:, 1], [0, 2])
    assert names_along(axes.yaxis) == {0: "all", 1: "two", 2: "one"}
    assert axes.yaxis_inverted()
    np.testing.assert_array_equal(dashed(axes).get_xdata(), [0.5, 0.5])
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"σmin to σmax", "middle 80 %", "median", "√α"}


@pytest.mark.parametrize(
    ("sigma_max", "sigma_min", "scale"),
    [(1.5, 0.25, "linear"), (1.5, 0.0, "linear"), (1.5, 0.01, "symlog"), (1e6, 1.0, "symlog")],
)
def test_the_axis_of_the_bars_shows_all_ends(sigma_max, sigma_min, scale):
    spectra = {"regular": ends_only(1.0, 1.0), "other": ends_only(sigma_max, sigma_min)}
    singular = {"singular": ends_only(sigma_max, 0.0)}
    for rows in (spectra, spectra | singular):
        (axes,) = plot_spectrum(rows).axes
        assert axes.get_xscale() == scale
        left, right = axes.get_xlim()
        assert left < 0 < right
        assert sigma_max < right
        start, end = axes.transAxes.inverted().transform(axes.transData.transform([(0, 0), (sigma_max, 0)]))
        assert 0 < start[0] < 0.1 < 0.8 < end[0] < 1
        if sigma_min:  # it is told from 0
            (place,) = axes.transAxes.inverted().transform(axes.transData.transform([(sigma_min, 0)]))
            assert place[0] - start[0] > 0.05


def test_a_smallest_singular_value_that_is_noise_is_drawn_at_its_bound():
    ends = ExtremeSingularValues(1.5, 1e-17, 0.0, 2e-3, True, True)
    figure = plot_spectrum({"noise": ends, "known": EXTREMES})
    assert bars(figure.axes[0], "σmin to σmax") == [(2e-3, 1.5), (0.25, 1.5)]


def test_an_unknown_smallest_singular_value_is_not_drawn():
    figure = plot_spectrum({"both": EXTREMES, "one": ends_only(2.0, np.nan)})
    (axes,) = figure.axes
    assert places(axes, "σmin to σmax") == [0]
    (marks,) = (line for line in axes.lines if line is not dashed(axes))
    assert marks.get_label() == "σmax (σmin was not measured)"
    assert marks.get_xydata().tolist() == [[2.0, 1.0]]
    only = plot_spectrum(ends_only(2.0, np.nan)).axes[0]
    assert not only.containers
    assert as_png(figure).startswith(b"\x89PNG")


def test_many_bars_are_named_now_and_then():
    rows = {f"a_long_path_to_the_block_{n}/separable_conv_{n}/depthwise": EXTREMES for n in range(100)}
    figure = plot_spectrum(rows)
    (axes,) = figure.axes
    assert places(axes, "σmin to σmax") == list(range(100))
    names = names_along(axes.yaxis)
    assert list(names) == list(range(0, 100, 2))
    assert names[98] == "a_long_path_to_t…nv_98/depthwise"
    assert max(map(len, names.values())) <= 32
    np.testing.assert_array_equal(axes.yaxis.get_minorticklocs(), np.arange(1, 100, 2))
    assert figure.get_figheight() <= 9
    assert as_png(figure).startswith(b"\x89PNG")


def row(name, alpha):
    return KernelSpectrum(name, extremes=EXTREMES, alpha=alpha)


def test_each_row_has_its_own_target():
    rows = [row("first", 1.0), row("second", 4.0), KernelSpectrum("lstm", "it is no convolution")]
    (axes,) = plot_spectrum(rows).axes
    assert segments(axes, "√α").tolist() == [[[1.0, -0.5], [1.0, 0.5]], [[2.0, 0.5], [2.0, 1.5]]]
    assert not axes.lines
    np.testing.assert_array_equal(dashed(plot_spectrum(rows[1:]).axes[0]).get_xdata(), [2.0, 2.0])
    np.testing.assert_array_equal(dashed(plot_spectrum(rows[1]).axes[0]).get_xdata(), [2.0, 2.0])
    np.testing.assert_array_equal(dashed(plot_spectrum(rows, alpha=0.25).axes[0]).get_xdata(), [0.5, 0.5])
    panels = plot_spectrum(rows, kind="sorted").axes
    assert [list(dashed(panel).get_ydata()) for panel in panels] == [[1.0, 1.0], [2.0, 2.0]]
    (axes,) = plot_spectrum(rows, kind="histogram").axes
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [[1, 1], [2, 2]]


@pytest.mark.parametrize("sequence", [list, tuple])
def test_rows_of_a_model_are_drawn_as_they_are(sequence):
    measured = KernelSpectrum("conv", extremes=extreme_singular_values(KERNEL, 9))
    rows = sequence([measured, KernelSpectrum("lstm", "it is no convolution")])
    assert titles(plot_spectrum(rows, kind="sorted")) == ["conv, σmax and σmin"]
    (axes,) = plot_spectrum(rows).axes
    assert names_along(axes.yaxis) == {0: "conv"}
    np.testing.assert_allclose(
        bars(axes, "σmin to σmax"), [(measured.extremes.sigma_min, measured.extremes.sigma_max)]
    )
    with pytest.raises(ValueError, match="spectra must hold a measured layer. Received: spectra="):
        plot_spectrum(rows[1:])


@pytest.mark.parametrize("spectra", [{}, [], ()], ids=str)
def test_no_spectrum_is_refused(spectra):
    with pytest.raises(ValueError, match="spectra must hold a measured layer. Received: spectra="):
        plot_spectrum(spectra)


@pytest.mark.parametrize(
    "sigma",
    [
        np.zeros(0),
        [np.nan],
        [np.inf],
        [-0.1, 1.0],
        [1j],
        "abc",
        [[1.0], [1.0, 2.0]],
        None,
        {1},
        10**400,
        [True],
        ["1"],
    ],
    ids=str,
)
def test_what_is_no_spectrum_is_refused(sigma):
    for spectra in (sigma, {"layer": sigma}):
        with pytest.raises(ValueError, match="spectra must hold finite singular values, at least 0, or Extr"):
            plot_spectrum(spectra)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"kind": "bars"},
            ValueError,
            "kind must be one of .*sorted.*ranges.*histogram.* Received: kind='bars'",
        ),
        ({"kind": 3}, ValueError, "kind must be one of .* Received: kind=3"),
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
    assert labels(figure.axes[1]) == ["√α", "first", "block/second"]
    assert as_png(figure).startswith(b"\x89PNG")


def test_targets_can_be_given_by_name():
    figure = plot_spectrum({"a": [1.0], "b": EXTREMES}, kind="sorted", alpha={"a": 4.0, "b": 0.25, "c": 1.0})
    assert [dashed(axes).get_ydata()[0] for axes in figure.axes] == [2.0, 0.5]
    with pytest.raises(ValueError, match="alpha must hold α of each layer. Received: nothing for .'b'"):
        plot_spectrum({"a": [1.0], "b": EXTREMES}, alpha={"a": 4.0})


def test_few_layers_have_clearly_different_colours():
    history = {"epoch": [0.0, 1.0]}
    for n in range(8):
        history |= {f"conv{n}/sigma_max": [2.0 + n, 1.5], f"conv{n}/sigma_min": [0.001, 0.5]}
    left, right = plot_training(history).axes
    lines = [line for line in left.lines if line is not dashed(left)]
    assert len({line.get_color() for line in lines}) == 8
    assert labels(right) == ["√α", *(f"conv{n}" for n in range(8))]
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "symlog")
    assert left.get_ylim()[1] > 9


def test_lines_of_layers_with_targets_of_their_own():
    figure = plot_training(HISTORY, {"first": 1.0, "block/second": 4.0, "another": 9.0})
    for axes in figure.axes:
        targets = [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--"]
        assert targets == [[1.0, 1.0], [2.0, 2.0]]
    assert labels(figure.axes[1]) == ["√α", "first, √α = 1", "block/second, √α = 2"]
    figure = plot_training(HISTORY, {"first": 4.0, "block/second": 4.0})
    assert list(dashed(figure.axes[0]).get_ydata()) == [2.0, 2.0]
    with pytest.raises(
        ValueError, match="alpha must hold α of each layer. Received: nothing for .'block/sec"
    ):
        plot_training(HISTORY, {"first": 1.0})


def long_history(layers, measurements):
    """Epochs at irregular distances, one layer with σmin = 0, one measurement that is missing."""
    random = np.random.RandomState(1)
    epochs = np.cumsum(random.randint(1, 4, measurements)) - 1.0
    history = {"epoch": epochs, "sigma_max": epochs, "sigma_min": epochs, "penalty": epochs}
    for n in range(layers):
        history[f"conv5_block{n}_2_conv/sigma_max"] = 1 + 2 * random.rand(measurements)
        history[f"conv5_block{n}_2_conv/sigma_min"] = 0.1 + 0.9 * random.rand(measurements)
        history[f"conv5_block{n}_2_conv/gradient_norm"] = random.rand(measurements)
    history["conv5_block3_2_conv/sigma_min"][:] = 0
    history["conv5_block4_2_conv/sigma_max"][-1] = np.nan
    return history


@pytest.mark.parametrize("measurements", [1, 2, 50])
@pytest.mark.parametrize("layers", [9, 10, 100])
def test_many_layers_are_rows_of_a_heatmap(layers, measurements):
    history = long_history(layers, measurements)
    figure = plot_training(history, 4.0)
    assert titles(figure) == ["σmax", "σmin", "", ""]  # and two colour bars
    assert [bar.get_ylabel() for bar in figure.axes[2:]] == ["σ", "σ"]
    for axes, column in zip(figure.axes[:2], ("sigma_max", "sigma_min"), strict=True):
        (mesh,) = axes.collections
        sigma = np.array([history[f"conv5_block{n}_2_conv/{column}"] for n in range(layers)])
        shown = mesh.get_array()
        np.testing.assert_array_equal(np.ma.getmaskarray(shown), np.isnan(sigma))
        np.testing.assert_array_equal(shown[sigma > 0], sigma[sigma > 0])
        corners = mesh.get_coordinates()
        np.testing.assert_allclose(corners[:, 0, 1], np.arange(layers + 1) - 0.5)
        left, right = corners[0, :-1, 0], corners[0, 1:, 0]
        assert ((left < history["epoch"]) & (history["epoch"] < right)).all()
        assert mesh.norm.vmin * mesh.norm.vmax == pytest.approx(4.0)  # √α is in the middle
        colours = mesh.to_rgba(shown)
        assert (colours[sigma == 0] == [0, 0, 0, 1]).all()
        above, below = colours[sigma > 2.1], colours[(sigma < 1.9) & (sigma > 0)]
        assert (above[:, 0] > above[:, 2]).all()  # red
        assert (below[:, 0] < below[:, 2]).all()  # blue
        assert axes.yaxis_inverted()
    every = 2 if layers == 100 else 1
    assert names_along(figure.axes[0].yaxis) == {
        place: f"conv5_block{place}_2_conv" for place in range(0, layers, every)
    }
    assert figure.get_figheight() <= 9
    assert as_png(figure).startswith(b"\x89PNG")


def test_a_column_of_a_heatmap_reaches_half_the_way_to_its_neighbours():
    history = long_history(9, 3) | {"epoch": [0.0, 1.0, 4.0]}
    (mesh,) = plot_training(history).axes[0].collections
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-0.5, 0.5, 2.5, 5.5])
    history = long_history(9, 1) | {"epoch": [3.0]}
    axes = plot_training(history).axes[0]
    assert axes.get_xlim() == (2.5, 3.5)
    assert axes.get_xticks().tolist() == [3.0]


@pytest.mark.parametrize("layers", [1, 10])
@pytest.mark.parametrize(
    ("epochs", "ticks"),
    [
        ([3.0], [3.0]),
        ([0.0, 1.0], [0.0, 1.0]),
        ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]),
        ([0.0, 0.75, 1.5], [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]),
        ([0.0, 1.5, 3.0], [0.0, 1.0, 2.0, 3.0]),
        (list(range(21)), [0.0, 4.0, 8.0, 12.0, 16.0, 20.0]),
    ],
)
def test_ticks_of_epochs_lie_within_the_training(layers, epochs, ticks):
    history = {"epoch": epochs}
    for n in range(layers):
        history |= {f"{n}/sigma_max": [2.0] * len(epochs), f"{n}/sigma_min": [0.5] * len(epochs)}
    figure = plot_training(history)
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        assert axes.get_xticks().tolist() == ticks


@pytest.mark.parametrize(
    ("largest", "alpha", "ticks"),
    [
        (1.1, 1.0, [0.7, 0.8, 0.9, 1.0, 1.2, 1.5]),
        (7.0, 1.0, [0.3, 1.0, 3.0]),
        (4.0, 1.0, [0.3, 1.0, 3.0]),
        (2.5, 1.0, [0.5, 1.0, 2.0]),
        (30.0, 1.0, [0.1, 1.0, 10.0]),
        (1e5, 1.0, [1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4]),
        (3.0, 2.0, [0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0]),
    ],
)
def test_ticks_of_colours_are_round_numbers(largest, alpha, ticks):
    history = {"epoch": [0.0]}
    for n in range(9):
        history |= {f"conv{n}/sigma_max": [1 + (largest - 1) * n / 8], f"conv{n}/sigma_min": [np.nan]}
    bar = plot_training(history, alpha).axes[1]
    assert bar.get_yticks().tolist() == ticks
    assert [tick.get_text() for tick in bar.get_yticklabels()] == [f"{tick:g}" for tick in ticks]


def test_a_heatmap_of_layers_with_targets_of_their_own():
    history = long_history(9, 2)
    names = [f"conv5_block{n}_2_conv" for n in range(9)]
    figure = plot_training(history, {name: (1.0, 4.0)[n % 2] for n, name in enumerate(names)})
    assert [bar.get_ylabel() for bar in figure.axes[2:]] == ["σ/√α", "σ/√α"]
    (mesh,) = figure.axes[0].collections
    for n, name in enumerate(names):
        measured = np.isfinite(history[f"{name}/sigma_max"])
        expected = history[f"{name}/sigma_max"] / (1.0, 2.0)[n % 2]
        np.testing.assert_allclose(mesh.get_array()[n][measured], expected[measured])
    assert mesh.norm.vmin * mesh.norm.vmax == pytest.approx(1.0)
    figure = plot_training(history, dict.fromkeys(names, 4.0))
    assert [bar.get_ylabel() for bar in figure.axes[2:]] == ["σ", "σ"]


@pytest.mark.parametrize(
    ("largest", "width"), [(1.1, 1.5), (7.0, 7.0), (1e5, 1e4)], ids=["near √α", "between", "far"]
)
def test_colours_reach_to_the_farthest_value_within_limits(largest, width):
    history = {"epoch": [0.0]}
    for n in range(9):
        history |= {f"conv{n}/sigma_max": [1 + (largest - 1) * n / 8], f"conv{n}/sigma_min": [np.nan]}
    figure = plot_training(history)
    assert titles(figure) == ["σmax", ""]  # σmin was not measured
    (mesh,) = figure.axes[0].collections
    assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx((1 / width, width))
    assert mesh.colorbar.extend == ("max" if largest > 1e4 else "neither")


def test_numbers_of_the_whole_model_are_drawn_if_there_are_no_others():
    whole = {name: values for name, values in HISTORY.items() if "/" not in name}
    figure = plot_training(whole)
    assert labels(figure.axes[1]) == ["√α", "model"]
    for axes, column in zip(figure.axes, ("sigma_max", "sigma_min"), strict=True):
        np.testing.assert_array_equal(axes.lines[-1].get_ydata(), HISTORY[column])


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


def test_gradient_norms_of_many_layers_and_measurements():
    history = long_history(100, 50)
    figure = plot_gradient_norms(history)
    axes, bar = figure.axes
    assert axes.get_legend() is None
    assert bar.get_ylabel() == "epoch"
    assert bar.get_ylim() == pytest.approx((history["epoch"][0], history["epoch"][-1]))
    assert len(axes.lines) == 50
    norms = [history[f"conv5_block{n}_2_conv/gradient_norm"][7] for n in range(100)]
    np.testing.assert_array_equal(axes.lines[7].get_xydata(), np.transpose([range(100), norms]))
    brightness = [sum(line.get_color()[:3]) for line in axes.lines]
    assert brightness[0] < brightness[25] < brightness[-1]
    assert names_along(axes.xaxis) == {place: f"conv5_block{place}_2_conv" for place in range(0, 100, 2)}
    assert as_png(figure).startswith(b"\x89PNG")


def test_gradient_norms_may_all_be_zero():
    figure = plot_gradient_norms(
        {"epoch": [0.0], "first/gradient_norm": [0.0], "second/gradient_norm": [0.0]}
    )
    assert figure.axes[0].get_yscale() == "linear"
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.0, 0.0]


def without(column):
    return {name: values for name, values in HISTORY.items() if name != column}


@pytest.mark.parametrize(
    "history",
    [
        {},
        None,
        3,
        {"epoch": [0.0]},
        {"loss": [1.0]},
        without("epoch"),
        without("first/sigma_min"),
        HISTORY | {"first/sigma_min": [0.1]},
        {name: [] for name in HISTORY},
        {1: [1.0]},
        HISTORY | {"first/sigma_max": [["a"]] * len(HISTORY["epoch"])},
        HISTORY | {"first/sigma_max": [[1.0]] * len(HISTORY["epoch"])},
    ],
    ids=stable_id,
)
def test_a_training_without_measurements_is_refused(history):
    with pytest.raises(
        ValueError,
        match='history must hold .*: "epoch", "<layer>/sigma_max", "<layer>/sigma_min". Received: ',
    ):
        plot_training(history)


@pytest.mark.parametrize(
    "history",
    [{}, None, without("epoch"), {"epoch": [0.0], "first/sigma_max": [1.0]}, {1: [1.0]}],
    ids=["empty", "none", "no epoch", "no gradients", "no names"],
)
def test_gradient_norms_without_measurements_are_refused(history):
    with pytest.raises(
        ValueError, match='history must hold .*: "epoch", "<layer>/gradient_norm". Received: '
    ):
        plot_gradient_norms(history)


@pytest.mark.parametrize(
    ("alpha", "error"), [(0.0, ValueError), (-1.0, ValueError), (np.nan, ValueError), ("one", TypeError)]
)
def test_bad_targets_of_a_training(alpha, error):
    for given in (alpha, {"first": 1.0, "block/second": alpha}):
        with pytest.raises(error, match="alpha must be a .*number above 0. Received: alpha="):
            plot_training(HISTORY, given)
