"""Matplotlib figures of descents, of spectra and of trainings."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tf_frobreg.checks import check_choice, check_number
from tf_frobreg.descent.algorithm_3_1 import DescentResult
from tf_frobreg.spectrum.extremes import ExtremeSingularValues
from tf_frobreg.spectrum.kernel_report import KernelSpectrum

__all__ = ["plot_convergence", "plot_gradient_norms", "plot_spectrum", "plot_training"]

KINDS = ("sorted", "ranges", "histogram")
FEW_SPECTRA = 9  # drawn in a panel each, if all σ are known
FEW_LINES = 8  # that colours tell apart
FEW_MEASUREMENTS = 10  # whose colours are explained in a legend
MOST_NAMES = 60  # along an axis
BINS = 60
LEGEND_ROWS = 18
TARGET: dict[str, Any] = {"color": "0.25", "linestyle": "--", "linewidth": 1}  # the line at √α
LINEAR_RANGE = 20  # largest σ over smallest σ, up to which a linear axis shows both
NEARLY_ZERO = 1e-4  # times √α: no axis is extended to show smaller σ
COLOUR_RANGE = (1.5, 100.0)  # least and greatest σ/√α at the end of the colours
ROUNDING = 1e-9  # relative. The value at the end of the colours is not beyond them
EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}


class _Layer(NamedTuple):
    """What to draw of a layer."""

    name: str
    sigma: np.ndarray  # in descending order. Only σmax and σmin if not `complete`. σmin may be NaN then
    complete: bool
    target: float  # √α


def plot_convergence(results: DescentResult | Mapping[str, DescentResult]) -> Figure:
    """Draws σmax (blue, left axis) and σmin (red, right axis) against the step, as in Figure 4.1.

    The steps are on a logarithmic scale (step + 1), because the paper's step sizes do most of their work in
    the first twenty steps.

    Args:
        results: A result of `regularize_kernel(..., measure="often")`, or a dict of several results by the
            title of their panel. Results of `measure="rarely"` have only a few points to draw.

    Returns:
        A figure with one panel per result. `figure.savefig(path)` writes it.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> from tf_frobreg import regularize_kernel
        >>> result = regularize_kernel(np.ones((3, 3, 1, 1)), 6, measure="often", max_steps=30)
        >>> figure = plot_convergence({"3×3×1×1": result})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['σmax', 'σmin']
    """
    if isinstance(results, DescentResult):
        results = {"": results}
    if not isinstance(results, Mapping) or not results:
        raise ValueError(
            f"results must be a DescentResult or a non-empty dict of them. Received: {reprlib.repr(results)}"
        )
    columns = math.ceil(math.sqrt(len(results)))
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    for number, (title, result) in enumerate(results.items(), start=1):
        left = figure.add_subplot(rows, columns, number, title=title, xlabel="iter + 1", xscale="log")
        _draw_steps(left, result, "sigma_max", "σmax", "tab:blue")
        _draw_steps(left.twinx(), result, "sigma_min", "σmin", "tab:red")
    return figure


def _draw_steps(axes: Axes, result: DescentResult, column: str, label: str, colour: str) -> None:
    """Draws one column of a descent at the steps where it was measured."""
    values = result.history[column]
    measured = np.isfinite(values)
    axes.plot(result.history["step"][measured] + 1, values[measured], color=colour)
    axes.set_ylabel(label, color=colour)
    axes.tick_params(axis="y", labelcolor=colour)


def plot_spectrum(
    spectra: ArrayLike
    | ExtremeSingularValues
    | KernelSpectrum
    | Mapping[str, ArrayLike | ExtremeSingularValues]
    | Sequence[KernelSpectrum],
    *,
    kind: str | None = None,
    alpha: float | Mapping[str, float] | None = None,
) -> Figure:
    """Draws the singular values of one or more layers, and √α as a dashed line.

    Args:
        spectra: The σ of one layer as `singular_values` returns them, or a dict of such arrays by the layer's
            name. An entry may be an `ExtremeSingularValues`: only σmax and σmin are known then. What
            `model_spectrum` returns can be passed as it is. Rows without a measurement are skipped.
        kind: "sorted" draws one panel per layer: σ in descending order. "ranges" draws all layers in one
            panel, the first one at the top: a bar from σmin to σmax. If all σ of a layer are known, it also
            shows the median and the middle 80 % of them. "histogram" draws all layers in one panel: the
            share of each layer's σ per bin. None means "sorted" for up to 9 layers of which all σ are known,
            and "ranges" otherwise.
        alpha: α, the target of σ². Positive. A dict holds α by the name of the layer. None takes the α of
            each row of `model_spectrum`, and 1 for arrays.

    Returns:
        A figure. `figure.savefig(path)` writes it.

    Raises:
        ValueError: If an argument is invalid, or if there is nothing to draw.
        TypeError: If an argument has the wrong type.

    Example:
        >>> from tf_frobreg import extreme_singular_values, singular_values
        >>> kernel = np.random.RandomState(1).randn(3, 3, 2, 4) / 6
        >>> borders = ("same", "circular")
        >>> figure = plot_spectrum({border: singular_values(kernel, 9, padding=border) for border in borders})
        >>> [axes.get_title() for axes in figure.axes]
        ['same, 162 σ', 'circular, 162 σ']
        >>> ends = {border: extreme_singular_values(kernel, 9, padding=border) for border in borders}
        >>> figure = plot_spectrum(ends)
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['same', 'circular']
    """
    if kind is not None:
        check_choice("kind", kind, KINDS)
    by_name = isinstance(alpha, Mapping)
    one = None if alpha is None or by_name else check_number("alpha", alpha, exclusive=True)
    layers = _check_spectra(spectra, one)
    if by_name:
        targets = _check_targets(alpha, [layer.name for layer in layers])
        layers = [layer._replace(target=float(t)) for layer, t in zip(layers, targets, strict=True)]
    if kind is None:
        few = len(layers) <= FEW_SPECTRA and all(layer.complete for layer in layers)
        kind = "sorted" if few else "ranges"
    return {"sorted": _draw_sorted, "ranges": _draw_ranges, "histogram": _draw_histograms}[kind](layers)


def _check_spectra(spectra: Any, alpha: float | None) -> list[_Layer]:
    """Returns what to draw, or raises if there is nothing."""
    if isinstance(spectra, KernelSpectrum):
        spectra = [spectra]
    if isinstance(spectra, Mapping):
        layers = [_check_spectrum(str(name), sigma, alpha or 1.0) for name, sigma in spectra.items()]
    elif isinstance(spectra, (list, tuple)) and all(isinstance(row, KernelSpectrum) for row in spectra):
        layers = [
            _check_spectrum(row.name, row.extremes, alpha or row.alpha or 1.0)
            for row in spectra
            if row.extremes is not None
        ]
    else:
        layers = [_check_spectrum("", spectra, alpha or 1.0)]
    if not layers:
        raise ValueError(f"spectra must hold a measured layer. Received: spectra={reprlib.repr(spectra)}")
    return layers


def _check_spectrum(name: str, sigma: Any, alpha: float) -> _Layer:
    """Returns what to draw of one layer, or raises if the values cannot be singular values."""
    if isinstance(sigma, ExtremeSingularValues):
        return _Layer(name, np.array(sigma[:2]), False, alpha**0.5)
    try:
        array = np.array([np.nan]) if np.iscomplexobj(sigma) else np.asarray(sigma, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array([np.nan])
    array = np.sort(array, axis=None)[::-1]
    if not array.size or not np.isfinite(array).all() or array[-1] < 0:
        raise ValueError(
            "spectra must hold finite singular values, at least 0, or ExtremeSingularValues. "
            f"Received: {reprlib.repr(sigma)}"
        )
    return _Layer(name, array, True, alpha**0.5)


def _draw_sorted(layers: Sequence[_Layer]) -> Figure:
    """Draws one panel per layer."""
    columns = min(4, math.ceil(math.sqrt(len(layers))))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.5 * rows + 0.3), layout="constrained")
    for number, (name, sigma, complete, target) in enumerate(layers, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axhline(target, **TARGET)
        if complete:
            content = f"{sigma.size:,} σ"
            axes.plot((np.arange(sigma.size) + 0.5) / sigma.size, sigma, color="tab:blue")
        else:
            content = "σmax and σmin"
            axes.hlines(sigma, 0, 1, color="tab:blue")
            axes.fill_between([0, 1], sigma[1], sigma[0], color="tab:blue", alpha=0.12)
        axes.set_title(f"{_shorten(name)}, {content}" if name else content, fontsize="small")
        axes.set_ylim(0, 1.05 * max(sigma[0], target))
        axes.set_xlim(0, 1)
    figure.supxlabel("share of the singular values")
    figure.supylabel("σ")
    return figure


def _draw_ranges(layers: Sequence[_Layer]) -> Figure:
    """Draws one bar per layer."""
    figure = Figure(figsize=(7.5, _height(len(layers))), layout="constrained")
    axes = figure.add_subplot(xlabel="σ")
    ends = np.array([layer.sigma[[0, -1]] for layer in layers])
    place = np.arange(len(layers))
    closed = np.isfinite(ends[:, 1])
    if closed.any():
        _draw_bars(axes, place[closed], ends[closed, 1], ends[closed, 0], "#9dbde0", "σmin to σmax")
    if not closed.all():
        label = "σmax (σmin was not measured)"
        axes.plot(ends[~closed, 0], place[~closed], "<", color="steelblue", label=label)
    complete = np.array([layer.complete for layer in layers])
    if complete.any():
        deciles = [np.quantile(layer.sigma, [0.1, 0.5, 0.9]) for layer in layers if layer.complete]
        low, median, high = np.transpose(deciles)
        _draw_bars(axes, place[complete], low, high, "steelblue", "middle 80 %")
        axes.vlines(median, place[complete] - 0.35, place[complete] + 0.35, color="black", label="median")
    targets = np.array([layer.target for layer in layers])
    if np.ptp(targets):
        axes.vlines(targets, place - 0.5, place + 0.5, label="√α", zorder=3, **TARGET)
    else:
        axes.axvline(targets[0], label="√α", zorder=3, **TARGET)
    _fit_scale(axes, "x", ends, targets)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer is at the top
    _name_layers(axes.yaxis, [layer.name for layer in layers])
    figure.legend(loc="outside upper center", ncols=4, fontsize="x-small", frameon=False)
    return figure


def _draw_bars(
    axes: Axes, place: np.ndarray, low: np.ndarray, high: np.ndarray, colour: str, label: str
) -> None:
    """Draws horizontal bars. Their edges show a bar without a length."""
    axes.barh(place, high - low, 0.7, low, color=colour, edgecolor="steelblue", linewidth=1.2, label=label)


def _draw_histograms(layers: Sequence[_Layer]) -> Figure:
    """Draws all layers in one panel."""
    figure = Figure(figsize=(7.7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="σ", ylabel="share of the layer's σ")
    for target in sorted({layer.target for layer in layers}):
        axes.axvline(target, **TARGET)
    largest = max(max(layer.sigma[0], layer.target) for layer in layers)
    bins = np.linspace(0, 1.02 * largest, BINS + 1).tolist()
    below = 0.0
    for colour, (name, sigma, complete, _) in zip(_by_depth(len(layers)), layers, strict=True):
        if complete:
            weights = np.full(sigma.size, 1 / sigma.size)
            axes.hist(sigma, bins, weights=weights, histtype="step", color=colour, label=_shorten(name))
        else:  # a horizontal line below the histograms
            below -= 0.01
            axes.plot(sigma, [below, below], marker="|", color=colour, label=f"{_shorten(name)} (ends)")
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
    names = [layer.name for layer in layers]
    if len(layers) > LEGEND_ROWS:
        by_depth = ScalarMappable(Normalize(0, len(layers) - 1), ListedColormap(_by_depth(256)))
        bar = figure.colorbar(by_depth, ax=axes)
        bar.ax.invert_yaxis()
        _name_layers(bar.ax.yaxis, names, LEGEND_ROWS)
    elif any(names):
        _draw_legend(axes)
    return figure


def plot_training(history: Mapping[str, ArrayLike], alpha: float | Mapping[str, float] = 1.0) -> Figure:
    """Draws σmax and σmin of each layer against the epoch, and √α.

    Up to 8 layers are lines, and √α is a dashed line. More layers are the rows of a heatmap, the first one at
    the top. Its colour is σ on a logarithmic scale: red above √α, blue below, black for smaller σ such as 0.
    What was not measured is grey.

    Args:
        history: The `history` of a `SingularValueMonitor`: a dict of columns of equal length, one entry per
            measurement. "epoch", "<layer>/sigma_max" and "<layer>/sigma_min" are drawn. If it holds no
            layer, "sigma_max" and "sigma_min" of the whole model are drawn.
        alpha: α, the target of σ². Positive. A dict holds α by the name of the layer. If these differ, a
            heatmap shows σ/√α.

    Returns:
        A figure with two panels, σmax and σmin, or with σmax alone if σmin was not measured.
        `figure.savefig(path)` writes it.

    Raises:
        ValueError: If an argument is invalid, or if there is nothing to draw.
        TypeError: If an argument has the wrong type.

    Example:
        >>> history = {
        ...     "epoch": [0.0, 1.0, 2.0],
        ...     "conv/sigma_max": [3.1, 1.6, 1.2],
        ...     "conv/sigma_min": [0.2, 0.5, 0.8]}
        >>> figure = plot_training(history)
        >>> [axes.get_title() for axes in figure.axes]
        ['σmax', 'σmin']
    """
    epochs, names, columns = _read_history(history, "sigma_max", "sigma_min")
    targets = _check_targets(alpha, names)
    panels = {"σmax": columns["sigma_max"]}
    if np.isfinite(columns["sigma_min"]).any():
        panels["σmin"] = columns["sigma_min"]
    draw = _draw_lines if len(names) <= FEW_LINES else _draw_heatmaps
    return draw(epochs, names, panels, targets)


def _check_targets(alpha: Any, names: Sequence[str]) -> np.ndarray:
    """Returns √α of each layer, or raises if one is missing."""
    if not isinstance(alpha, Mapping):
        alpha = dict.fromkeys(names, alpha)
    missing = [name for name in names if name not in alpha]
    if missing:
        raise ValueError(f"alpha must hold α of each layer. Received: nothing for {reprlib.repr(missing)}")
    return np.array([check_number("alpha", alpha[name], exclusive=True) ** 0.5 for name in names])


def _draw_lines(
    epochs: np.ndarray, names: Sequence[str], panels: Mapping[str, np.ndarray], targets: np.ndarray
) -> Figure:
    """Draws a line per layer."""
    figure = Figure(figsize=(4.2 * len(panels) + 1.6, 3.6), layout="constrained")
    for number, (title, sigma) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xlabel="epoch", ylabel="σ")
        for target in np.unique(targets):
            axes.axhline(target, **TARGET)
        if len(epochs) <= 2:
            axes.set_xticks(epochs)
        for index, (name, values) in enumerate(zip(names, sigma, strict=True)):
            label = _shorten(name) + (f", √α = {targets[index]:.3g}" if np.ptp(targets) else "")
            measured = np.isfinite(values)
            axes.plot(epochs[measured], values[measured], ".-", color=colormaps["tab10"](index), label=label)
        _fit_scale(axes, "y", sigma, targets)
    _draw_legend(axes)
    return figure


def _draw_heatmaps(
    epochs: np.ndarray, names: Sequence[str], panels: Mapping[str, np.ndarray], targets: np.ndarray
) -> Figure:
    """Draws a row per layer and a column per measurement."""
    figure = Figure(figsize=(4.6 * len(panels) + 1.4, _height(len(names))), layout="constrained")
    edges = epochs[0] + np.array([-0.5, 0.5])
    if len(epochs) > 1:  # a column reaches half the way to its neighbours
        between = (epochs[1:] + epochs[:-1]) / 2
        edges = np.array([2 * epochs[0] - between[0], *between, 2 * epochs[-1] - between[-1]])
    same = not np.ptp(targets)
    centre = targets[0] if same else 1.0
    panels_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, sigma) in zip(panels_axes, panels.items(), strict=True):
        axes.set(title=title, xlabel="epoch")
        if len(epochs) <= 2:
            axes.set_xticks(epochs)
        values = sigma if same else sigma / targets[:, np.newaxis]
        counts = values[np.isfinite(values) & (values > NEARLY_ZERO * centre)] / centre
        width = np.clip(np.exp(np.abs(np.log(counts)).max(initial=0.0)), *COLOUR_RANGE)
        low, high = centre / width, centre * width
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(names) + 1) - 0.5,
            np.maximum(values, NEARLY_ZERO * low),  # the logarithm of 0 would count as not measured
            norm=LogNorm(low * (1 - ROUNDING), high * (1 + ROUNDING)),
            cmap=colormaps["RdBu_r"].with_extremes(bad="0.75", under="black"),
        )
        beyond = bool((values < mesh.norm.vmin).any()), bool((values > mesh.norm.vmax).any())
        bar = figure.colorbar(mesh, ax=axes, label="σ" if same else "σ/√α", extend=EXTEND[beyond])
        ticks = np.geomspace(low, high, 5)
        bar.set_ticks(ticks.tolist(), labels=[f"{float(f'{tick:.2g}'):g}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.ax.axhline(centre, **TARGET)
    panels_axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first layer is at the top
    _name_layers(panels_axes[0].yaxis, names)
    return figure


def plot_gradient_norms(history: Mapping[str, ArrayLike]) -> Figure:
    """Draws the norm of the loss gradient in each kernel against its depth, one line per measurement.

    The lines are coloured by epoch, from dark to light.

    Args:
        history: The `history` of a `SingularValueMonitor(gradient_data=...)`: a dict of columns of equal
            length, one entry per measurement. "epoch" and "<layer>/gradient_norm" are drawn.

    Returns:
        A figure with one panel. `figure.savefig(path)` writes it.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> history = {
        ...     "epoch": [0.0, 1.0],
        ...     "first/gradient_norm": [0.02, 0.1],
        ...     "second/gradient_norm": [0.5, 0.2]}
        >>> figure = plot_gradient_norms(history)
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['epoch 0', 'epoch 1']
    """
    epochs, names, columns = _read_history(history, "gradient_norm")
    figure = Figure(figsize=(min(max(7.0, 0.9 + 0.22 * len(names)), 12.0), 4.6), layout="constrained")
    scale = "log" if (columns["gradient_norm"] > 0).any() else "linear"
    axes = figure.add_subplot(yscale=scale, ylabel="norm of the gradient")
    by_epoch = ScalarMappable(Normalize(epochs.min(), epochs.max()), ListedColormap(_by_depth(256)))
    size = 7 if len(names) <= FEW_LINES else 3
    for epoch, row in zip(epochs, columns["gradient_norm"].T, strict=True):
        colour = by_epoch.to_rgba(epoch)
        axes.plot(row, ".-", color=colour, linewidth=0.8, markersize=size, label=f"epoch {epoch:g}")
    axes.margins(x=0.02)
    if len(names) == 1:
        _name_layers(axes.xaxis, names)
    else:
        _name_layers(axes.xaxis, names, rotation=60, ha="right", rotation_mode="anchor")
    if len(epochs) <= FEW_MEASUREMENTS:
        _draw_legend(axes)
    else:
        figure.colorbar(by_epoch, ax=axes, label="epoch")
    return figure


def _read_history(history: Any, *columns: str) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Returns (epochs, names of the layers, each column with a row per layer) of a monitor's history."""
    keys = list(history) if isinstance(history, Mapping) else []
    first = f"/{columns[0]}"
    prefixes = {key.removesuffix(first): key.removesuffix(columns[0]) for key in keys if key.endswith(first)}
    prefixes = prefixes or {"model": ""}  # without layers, the columns of the whole model
    needed = ["epoch", *(f"{prefix}{column}" for prefix in prefixes.values() for column in columns)]
    lengths = {np.size(history[key]) if key in keys else 0 for key in needed}
    if len(lengths) > 1 or 0 in lengths:
        wanted = ", ".join(f'"<layer>/{column}"' for column in columns)
        raise ValueError(
            "history must hold the measurements of a SingularValueMonitor, in columns of equal length: "
            f'"epoch", {wanted}. Received: {reprlib.repr(history)}'
        )
    values = {
        column: np.array([history[f"{prefix}{column}"] for prefix in prefixes.values()], dtype=np.float64)
        for column in columns
    }
    return np.asarray(history["epoch"], dtype=np.float64), list(prefixes), values


def _fit_scale(axes: Axes, direction: Literal["x", "y"], sigma: np.ndarray, targets: np.ndarray) -> None:
    """Makes an axis of σ linear, or logarithmic with a linear part near 0, if that shows more."""
    counts = sigma[np.isfinite(sigma) & (sigma > NEARLY_ZERO * targets.min())]
    low, high = min(counts.min(initial=np.inf), targets.min()), max(counts.max(initial=0.0), targets.max())
    axis, set_limits = (axes.xaxis, axes.set_xlim) if direction == "x" else (axes.yaxis, axes.set_ylim)
    if high <= LINEAR_RANGE * low:
        set_limits(-0.02 * high, 1.05 * high)
        return
    set_scale = axes.set_xscale if direction == "x" else axes.set_yscale
    threshold = 10.0 ** math.floor(math.log10(low))
    set_scale("symlog", linthresh=threshold, linscale=0.5, subs=list(range(2, 10)))
    set_limits(-0.1 * threshold, 1.3 * high)
    axis.set_major_formatter("{x:g}")


def _height(count: int) -> float:
    """Returns the height in inches of a figure with `count` layers along its vertical axis."""
    return min(max(1.9, 1.1 + 0.22 * count), 9.0)


def _name_layers(axis: Axis, names: Sequence[str], most: int = MOST_NAMES, **style: Any) -> None:
    """Writes at most `most` names of layers along an axis. A short tick stands for each of the others."""
    every = math.ceil(len(names) / most)
    axis.set_ticks(range(len(names)), minor=True)
    axis.set_ticks(
        range(0, len(names), every),
        [_shorten(name, 32) for name in names[::every]],
        fontsize="x-small",
        **style,
    )


def _by_depth(count: int) -> np.ndarray:
    """Returns one colour per layer or measurement, from dark to light."""
    return np.asarray(colormaps["viridis"](np.linspace(0, 0.92, count)))


def _shorten(name: str, limit: int = 26) -> str:
    """Returns a long name without its middle."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 + 1 :]}"


def _draw_legend(axes: Axes) -> None:
    """Draws a legend to the right of the axes."""
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
