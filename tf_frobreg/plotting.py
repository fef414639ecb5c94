"""Matplotlib figures of descents, of spectra and of trainings."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from tf_frobreg.checks import check_choice, check_number
from tf_frobreg.descent.algorithm_3_1 import DescentResult
from tf_frobreg.spectrum.extremes import ExtremeSingularValues
from tf_frobreg.spectrum.kernel_report import KernelSpectrum

__all__ = ["plot_convergence", "plot_gradient_norms", "plot_spectrum", "plot_training"]

KINDS = ("sorted", "histogram")
BINS = 60
LEGEND_ROWS = 18

Spectrum = np.ndarray | ExtremeSingularValues  # σ in descending order, or only σmax and σmin


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
    | Mapping[str, ArrayLike | ExtremeSingularValues]
    | Sequence[KernelSpectrum],
    *,
    kind: str = "sorted",
    alpha: float = 1.0,
) -> Figure:
    """Draws the singular values of one or more layers, and √α as a dashed line.

    Args:
        spectra: The σ of one layer as `singular_values` returns them, or a dict of such arrays by the layer's
            name. If an entry is an `ExtremeSingularValues`, only σmax and σmin are drawn. The rows that
            `model_spectrum` returns can be passed as they are; rows without a measurement are skipped.
        kind: "sorted" draws one panel per layer: σ in descending order. "histogram" draws all layers in one
            panel: the share of each layer's σ per bin.
        alpha: α, the target of σ². Positive.

    Returns:
        A figure. `figure.savefig(path)` writes it.

    Raises:
        ValueError: If an argument is invalid, or if there is nothing to draw.
        TypeError: If an argument has the wrong type.

    Example:
        >>> from tf_frobreg import singular_values
        >>> kernel = np.random.RandomState(1).randn(3, 3, 2, 4) / 6
        >>> figure = plot_spectrum(
        ...     {border: singular_values(kernel, 9, padding=border) for border in ("same", "circular")})
        >>> [axes.get_title() for axes in figure.axes]
        ['same, 162 σ', 'circular, 162 σ']
    """
    target = check_number("alpha", alpha, exclusive=True) ** 0.5
    draw = _draw_histograms if check_choice("kind", kind, KINDS) == "histogram" else _draw_sorted
    return draw(_check_spectra(spectra), target)


def _check_spectra(spectra: Any) -> dict[str, Spectrum]:
    """Returns the spectra by name, or raises if there are none."""
    if isinstance(spectra, Mapping):
        by_name = {str(name): _check_spectrum(sigma) for name, sigma in spectra.items()}
    elif isinstance(spectra, (list, tuple)) and all(isinstance(row, KernelSpectrum) for row in spectra):
        by_name = {row.name: row.extremes for row in spectra if row.extremes is not None}
    else:
        by_name = {"": _check_spectrum(spectra)}
    if not by_name:
        raise ValueError(f"spectra must hold a measured layer. Received: spectra={reprlib.repr(spectra)}")
    return by_name


def _check_spectrum(sigma: Any) -> Spectrum:
    """Returns the singular values of one layer in descending order, or raises if they cannot be such."""
    if isinstance(sigma, ExtremeSingularValues):
        return sigma
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
    return array


def _draw_sorted(spectra: Mapping[str, Spectrum], target: float) -> Figure:
    """Draws one panel per layer."""
    columns = min(4, math.ceil(math.sqrt(len(spectra))))
    rows = math.ceil(len(spectra) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.5 * rows + 0.3), layout="constrained")
    for number, (name, sigma) in enumerate(spectra.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axhline(target, color="0.6", linestyle="--", linewidth=1)
        if isinstance(sigma, ExtremeSingularValues):
            content = "σmax and σmin"
            axes.hlines(sigma[:2], 0, 1, color="tab:blue")
            axes.fill_between([0, 1], sigma.sigma_min, sigma.sigma_max, color="tab:blue", alpha=0.12)
        else:
            content = f"{sigma.size:,} σ"
            axes.plot((np.arange(sigma.size) + 0.5) / sigma.size, sigma, color="tab:blue")
        axes.set_title(f"{_shorten(name)}, {content}" if name else content, fontsize="small")
        axes.set_ylim(0, 1.05 * max(sigma[0], target))  # sigma[0] is σmax of both kinds
        axes.set_xlim(0, 1)
    figure.supxlabel("share of the singular values")
    figure.supylabel("σ")
    return figure


def _draw_histograms(spectra: Mapping[str, Spectrum], target: float) -> Figure:
    """Draws all layers in one panel."""
    columns = math.ceil(len(spectra) / LEGEND_ROWS)
    figure = Figure(figsize=(5.5 + 2.2 * columns, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="σ", ylabel="share of the layer's σ")
    axes.axvline(target, color="0.6", linestyle="--", linewidth=1)
    largest = max(sigma[0] for sigma in spectra.values())  # sigma[0] is σmax of both kinds
    bins = np.linspace(0, 1.02 * max(largest, target), BINS + 1).tolist()
    below = 0.0
    for colour, (name, sigma) in zip(_by_depth(len(spectra)), spectra.items(), strict=True):
        if isinstance(sigma, ExtremeSingularValues):  # a horizontal line below the histograms
            below -= 0.01
            axes.plot(sigma[:2], [below, below], marker="|", color=colour, label=f"{_shorten(name)} (ends)")
        else:
            weights = np.full(sigma.size, 1 / sigma.size)
            axes.hist(sigma, bins, weights=weights, histtype="step", color=colour, label=_shorten(name))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
    if list(spectra) != [""]:
        _draw_legend(axes, len(spectra))
    return figure


def plot_training(history: Mapping[str, ArrayLike], alpha: float = 1.0) -> Figure:
    """Draws σmax and σmin of each layer against the epoch, and √α as a dashed line.

    The layers are coloured by depth, from dark to light. Measurements that are NaN are left out.

    Args:
        history: The `history` of a `SingularValueMonitor`: a dict of columns of equal length, one entry per
            measurement. "epoch", "<layer>/sigma_max" and "<layer>/sigma_min" are drawn.
        alpha: α, the target of σ². Positive.

    Returns:
        A figure with two panels, σmax and σmin. `figure.savefig(path)` writes it.

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
    target = check_number("alpha", alpha, exclusive=True) ** 0.5
    names = _check_history(history, "sigma_max", "sigma_min")
    epochs = np.asarray(history["epoch"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colours = _by_depth(len(names))
    for number, (column, label) in enumerate([("sigma_max", "σmax"), ("sigma_min", "σmin")], start=1):
        axes = figure.add_subplot(1, 2, number, title=label, xlabel="epoch")
        axes.axhline(target, color="0.6", linestyle="--", linewidth=1)
        for name, colour in zip(names, colours, strict=True):
            values = np.asarray(history[f"{name}/{column}"])
            measured = np.isfinite(values)
            axes.plot(epochs[measured], values[measured], ".-", color=colour, label=name)
    _draw_legend(axes, len(names))
    return figure


def plot_gradient_norms(history: Mapping[str, ArrayLike]) -> Figure:
    """Draws the norm of the loss gradient in each kernel against its depth, one line per measurement.

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
    names = _check_history(history, "gradient_norm")
    epochs = np.asarray(history["epoch"])
    norms = np.transpose([history[f"{name}/gradient_norm"] for name in names])  # (measurements, kernels)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(yscale="log", ylabel="norm of the gradient")
    for colour, epoch, row in zip(_by_depth(len(epochs)), epochs, norms, strict=True):
        axes.plot(range(len(names)), row, ".-", color=colour, label=f"epoch {epoch:g}")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="x-small")
    _draw_legend(axes, len(epochs))
    return figure


def _check_history(history: Any, *columns: str) -> list[str]:
    """Returns the names of the layers that a monitor's history holds, or raises if a column is missing."""
    first = f"/{columns[0]}"
    keys = list(history) if isinstance(history, Mapping) else []
    names = [key.removesuffix(first) for key in keys if key.endswith(first)]
    needed = {"epoch", *(f"{name}/{column}" for name in names for column in columns)}
    if not names or not needed <= set(keys):
        wanted = ", ".join(f'"<layer>/{column}"' for column in columns)
        raise ValueError(
            f'history must hold the measurements of a SingularValueMonitor: columns "epoch", {wanted}. '
            f"Received: {reprlib.repr(history)}"
        )
    return names


def _by_depth(count: int) -> np.ndarray:
    """Returns one colour per layer or measurement, from dark to light."""
    return np.asarray(colormaps["viridis"](np.linspace(0, 0.92, count)))


def _shorten(name: str, limit: int = 26) -> str:
    """Returns a long name without its middle."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 + 1 :]}"


def _draw_legend(axes: Axes, count: int) -> None:
    """Draws a legend of `count` lines to the right of the axes."""
    columns = math.ceil(count / LEGEND_ROWS)
    axes.legend(fontsize="x-small", ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))
