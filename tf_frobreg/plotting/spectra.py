"""Figures of the singular values of layers."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tf_frobreg.checks import check_choice, check_number, received
from tf_frobreg.plotting.parts import (
    TARGET,
    by_depth,
    check_targets,
    draw_legend,
    fit_scale,
    height,
    name_layers,
    shorten,
)
from tf_frobreg.spectrum.extremes import ExtremeSingularValues
from tf_frobreg.spectrum.kernel_report import KernelSpectrum

__all__ = ["plot_spectrum"]

KINDS = ("sorted", "ranges", "histogram")
FEW_SPECTRA = 9  # drawn in a panel each, if all σ are known
BINS = 60
LEGEND_ROWS = 18


class _Layer(NamedTuple):
    """What to draw of a layer."""

    name: str
    sigma: np.ndarray  # in descending order. Only σmax and σmin if not `complete`. σmin may be NaN then
    complete: bool
    target: float  # √α


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
            name. An entry may be an `ExtremeSingularValues`: only σmax and σmin are known then. A σmin that
            cannot be distinguished from 0 is drawn at its upper bound. What
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
        targets = check_targets(alpha, [layer.name for layer in layers])
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
        raise ValueError(f"spectra must hold a measured layer. Received: {received('spectra', spectra)}")
    return layers


def _check_spectrum(name: str, sigma: Any, alpha: float) -> _Layer:
    """Returns what to draw of one layer, or raises if the values cannot be singular values."""
    if isinstance(sigma, ExtremeSingularValues):
        return _Layer(name, np.array([sigma.sigma_max, sigma.sigma_min_bound]), False, alpha**0.5)
    try:
        array = np.asarray(sigma)
        array = array.astype(np.float64) if array.dtype.kind in "fiu" else np.array([np.nan])
    except (TypeError, ValueError, OverflowError):
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
        axes.set_title(f"{shorten(name)}, {content}" if name else content, fontsize="small")
        axes.set_ylim(0, 1.05 * max(sigma[0], target))
        axes.set_xlim(0, 1)
    figure.supxlabel("share of the singular values")
    figure.supylabel("σ")
    return figure


def _draw_ranges(layers: Sequence[_Layer]) -> Figure:
    """Draws one bar per layer."""
    figure = Figure(figsize=(7.5, height(len(layers))), layout="constrained")
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
    fit_scale(axes, "x", ends, targets)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer is at the top
    name_layers(axes.yaxis, [layer.name for layer in layers])
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
    for colour, (name, sigma, complete, _) in zip(by_depth(len(layers)), layers, strict=True):
        if complete:
            weights = np.full(sigma.size, 1 / sigma.size)
            axes.hist(sigma, bins, weights=weights, histtype="step", color=colour, label=shorten(name))
        else:  # a horizontal line below the histograms
            below -= 0.01
            axes.plot(sigma, [below, below], marker="|", color=colour, label=f"{shorten(name)} (ends)")
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
    names = [layer.name for layer in layers]
    if len(layers) > LEGEND_ROWS:
        colours = ScalarMappable(Normalize(0, len(layers) - 1), ListedColormap(by_depth(256)))
        bar = figure.colorbar(colours, ax=axes)
        bar.ax.invert_yaxis()
        name_layers(bar.ax.yaxis, names, LEGEND_ROWS)
    elif any(names):
        draw_legend(axes)
    return figure
