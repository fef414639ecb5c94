"""Figures of trainings: singular values and gradients by epoch."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from tf_frobreg.plotting.parts import (
    NEARLY_ZERO,
    TARGET,
    by_depth,
    check_targets,
    draw_legend,
    fit_scale,
    height,
    name_layers,
    shorten,
)

__all__ = ["plot_gradient_norms", "plot_training"]

FEW_LINES = 8  # that colours tell apart
FEW_MEASUREMENTS = 10  # whose colours are explained in a legend
COLOUR_RANGE = (1.5, 1e4)  # least and greatest σ/√α at the end of the colours
ROUNDING = 1e-9  # relative. The value at the end of the colours is not beyond them
ROUND_DIGITS = ((1,), (1, 3), (1, 2, 5), (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9))  # of ticks, the fewest first
EXTEND = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}


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
    targets = check_targets(alpha, names)
    panels = {"σmax": columns["sigma_max"]}
    if np.isfinite(columns["sigma_min"]).any():
        panels["σmin"] = columns["sigma_min"]
    draw = _draw_lines if len(names) <= FEW_LINES else _draw_heatmaps
    return draw(epochs, names, panels, targets)


def _draw_lines(
    epochs: np.ndarray, names: Sequence[str], panels: Mapping[str, np.ndarray], targets: np.ndarray
) -> Figure:
    """Draws a line per layer."""
    figure = Figure(figsize=(4.2 * len(panels) + 1.6, 3.6), layout="constrained")
    for number, (title, sigma) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number, title=title, xlabel="epoch", ylabel="σ")
        for position, target in enumerate(np.unique(targets)):
            axes.axhline(target, label="_" if position else "√α", **TARGET)
        axes.set_xticks(_epoch_ticks(epochs))
        for index, (name, values) in enumerate(zip(names, sigma, strict=True)):
            label = shorten(name) + (f", √α = {targets[index]:.3g}" if np.ptp(targets) else "")
            measured = np.isfinite(values)
            axes.plot(epochs[measured], values[measured], ".-", color=colormaps["tab10"](index), label=label)
        fit_scale(axes, "y", sigma, targets)
    draw_legend(axes)
    return figure


def _draw_heatmaps(
    epochs: np.ndarray, names: Sequence[str], panels: Mapping[str, np.ndarray], targets: np.ndarray
) -> Figure:
    """Draws a row per layer and a column per measurement."""
    figure = Figure(figsize=(4.6 * len(panels) + 1.4, height(len(names))), layout="constrained")
    edges = epochs[0] + np.array([-0.5, 0.5])
    if len(epochs) > 1:  # a column reaches half the way to its neighbours
        between = (epochs[1:] + epochs[:-1]) / 2
        edges = np.array([2 * epochs[0] - between[0], *between, 2 * epochs[-1] - between[-1]])
    same = not np.ptp(targets)
    centre = targets[0] if same else 1.0
    panels_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, sigma) in zip(panels_axes, panels.items(), strict=True):
        axes.set(title=title, xlabel="epoch")
        axes.set_xticks(_epoch_ticks(epochs))
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
        ticks = _round_ticks(low, high)
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.ax.minorticks_off()
        bar.ax.axhline(centre, **TARGET)
    panels_axes[0].set_ylim(len(names) - 0.5, -0.5)  # the first layer is at the top
    name_layers(panels_axes[0].yaxis, names)
    return figure


def _epoch_ticks(epochs: np.ndarray) -> list[float]:
    """Returns ticks between the first and the last epoch: both of two, otherwise whole epochs if several."""
    if len(epochs) <= 2:
        return [float(epoch) for epoch in epochs]
    first, last = epochs[[0, -1]]
    ticks = MaxNLocator(6, integer=last - first >= 2).tick_values(first, last)
    return [float(tick) for tick in ticks if first <= tick <= last]


def _round_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers for a logarithmic scale, few of them but at least 3 if possible."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ROUND_DIGITS:
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    return ticks


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
    by_epoch = ScalarMappable(Normalize(epochs.min(), epochs.max()), ListedColormap(by_depth(256)))
    size = 7 if len(names) <= FEW_LINES else 3
    for epoch, row in zip(epochs, columns["gradient_norm"].T, strict=True):
        colour = by_epoch.to_rgba(epoch)
        axes.plot(row, ".-", color=colour, linewidth=0.8, markersize=size, label=f"epoch {epoch:g}")
    axes.margins(x=0.02)
    if len(names) == 1:
        name_layers(axes.xaxis, names)
    else:
        name_layers(axes.xaxis, names, rotation=60, ha="right", rotation_mode="anchor")
    if len(epochs) <= FEW_MEASUREMENTS:
        draw_legend(axes)
    else:
        figure.colorbar(by_epoch, ax=axes, label="epoch")
    return figure


def _read_history(history: Any, *columns: str) -> tuple[np.ndarray, list[str], dict[str, np.ndarray]]:
    """Returns (epochs, names of the layers, each column with a row per layer) of a monitor's history."""
    keys = [key for key in history if isinstance(key, str)] if isinstance(history, Mapping) else []
    first = f"/{columns[0]}"
    prefixes = {key.removesuffix(first): key.removesuffix(columns[0]) for key in keys if key.endswith(first)}
    prefixes = prefixes or {"model": ""}  # without layers, the columns of the whole model
    needed = ["epoch", *(f"{prefix}{column}" for prefix in prefixes.values() for column in columns)]
    try:
        found = {key: np.asarray(history[key], dtype=np.float64) for key in needed if key in keys}
    except (TypeError, ValueError, OverflowError):
        found = {}
    lengths = {len(found[key]) if key in found and found[key].ndim == 1 else 0 for key in needed}
    if len(lengths) > 1 or 0 in lengths:
        wanted = ", ".join(f'"<layer>/{column}"' for column in columns)
        raise ValueError(
            "history must hold the measurements of a SingularValueMonitor, in columns of equal length: "
            f'"epoch", {wanted}. Received: {reprlib.repr(history)}'
        )
    values = {
        column: np.array([found[f"{prefix}{column}"] for prefix in prefixes.values()]) for column in columns
    }
    return found["epoch"], list(prefixes), values
