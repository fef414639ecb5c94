"""Figures."""

import math
import reprlib
from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from tf_frobreg.checks import check_number
from tf_frobreg.descent.algorithm_3_1 import DescentResult
from tf_frobreg.spectrum.extremes import ExtremeSingularValues
from tf_frobreg.spectrum.kernel_report import KernelSpectrum

__all__ = ["plot_convergence", "plot_gradient_norms", "plot_spectrum", "plot_training"]

KINDS = ("sorted", "histogram")
BINS = 60
LEGEND_ROWS = 18


def plot_convergence(results: DescentResult | Mapping[str, DescentResult]) -> Figure:
    """Draws σmax (blue, left axis) and σmin (red, right axis) against the step, as in Figure 4.1.

    Args:
        results: One result of `regularize_kernel(..., measure="often")`, or several by the title of their
            panel. With "rarely" there are only a few points to draw.

    Raises:
        ValueError: Where there is nothing to draw.

    Returns:
        A figure with one panel per result; `figure.savefig(path)` writes it. The steps are on a
        logarithmic scale (step + 1): the paper's step sizes do most of their work in the first twenty.

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
        _draw_sigma(left, result, "sigma_max", "σmax", "tab:blue")
        _draw_sigma(left.twinx(), result, "sigma_min", "σmin", "tab:red")
    return figure


def plot_spectrum(spectra, *, kind: str = "sorted", alpha: float = 1.0) -> Figure:
    """Draws the singular values of one or more layers, and √α as a dashed line.

    Args:
        spectra: The σ of one layer, as from `singular_values`, or a dict of them by the layer's name. An
            `ExtremeSingularValues` in place of an array draws σmax and σmin only, and so does what
            `model_spectrum` returns.
        kind: "sorted" draws one panel per layer, σ in descending order against their share. "histogram" draws
            all layers in one panel, each as the share of its σ per bin.
        alpha: α, whose root the penalty draws the σ to. Positive.

    Raises:
        ValueError, TypeError: Where an argument is invalid, or there is nothing to draw.

    Returns:
        A figure; `figure.savefig(path)` writes it.

    Example:
        >>> from tf_frobreg import singular_values
        >>> kernel = np.random.RandomState(1).randn(3, 3, 2, 4) / 6
        >>> figure = plot_spectrum(
        ...     {border: singular_values(kernel, 9, padding=border) for border in ("same", "circular")})
        >>> [axes.get_title() for axes in figure.axes]
        ['same, 162 σ', 'circular, 162 σ']
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}. Received: kind={kind!r}")
    if isinstance(spectra, (list, tuple)) and all(isinstance(row, KernelSpectrum) for row in spectra):
        spectra = {row.name: row.extremes for row in spectra if row.reason is None}
    by_name = spectra if isinstance(spectra, Mapping) else {"": spectra}
    by_name = {str(name): _as_spectrum(sigma) for name, sigma in by_name.items()}
    if not by_name:
        raise ValueError(f"spectra must not be empty. Received: spectra={spectra!r}")
    draw = _draw_histogram if kind == "histogram" else _draw_sorted
    return draw(by_name, alpha**0.5)


def _as_spectrum(sigma):
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


def _draw_sorted(spectra, target):
    columns = min(4, math.ceil(math.sqrt(len(spectra))))
    rows = math.ceil(len(spectra) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.5 * rows + 0.3), layout="constrained")
    for number, (name, sigma) in enumerate(spectra.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.axhline(target, color="0.6", linestyle="--", linewidth=1)
        if isinstance(sigma, ExtremeSingularValues):
            axes.set_title(f"{_shortened(name)}, σmax and σmin".removeprefix(", "), fontsize="small")
            axes.hlines(sigma[:2], 0, 1, color="tab:blue")
            axes.fill_between([0, 1], sigma.sigma_min, sigma.sigma_max, color="tab:blue", alpha=0.12)
            high = sigma.sigma_max
        else:
            axes.set_title(f"{_shortened(name)}, {sigma.size:,} σ".removeprefix(", "), fontsize="small")
            axes.plot((np.arange(sigma.size) + 0.5) / sigma.size, sigma, color="tab:blue")
            high = sigma[0]
        axes.set_ylim(0, 1.05 * max(high, target))
        axes.set_xlim(0, 1)
    figure.supxlabel("share of the singular values")
    figure.supylabel("σ")
    return figure


def _draw_histogram(spectra, target):
    columns = math.ceil(len(spectra) / LEGEND_ROWS)
    figure = Figure(figsize=(5.5 + 2.2 * columns, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="σ", ylabel="share of the layer's σ")
    axes.axvline(target, color="0.6", linestyle="--", linewidth=1)
    ends = [s[0] for s in spectra.values()]  # σmax of both kinds
    bins = np.linspace(0, 1.02 * max(*ends, target), BINS + 1)
    colours = _by_depth(len(spectra))
    below = 0.0
    for colour, (name, sigma) in zip(colours, spectra.items(), strict=True):
        if isinstance(sigma, ExtremeSingularValues):  # a range, under the histograms
            below -= 0.01
            axes.plot(sigma[:2], [below, below], marker="|", color=colour, label=f"{_shortened(name)} (ends)")
        else:
            weights = np.full(sigma.size, 1 / sigma.size)
            axes.hist(sigma, bins, weights=weights, histtype="step", color=colour, label=_shortened(name))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
    if list(spectra) != [""]:
        _legend(axes, len(spectra))
    return figure


def plot_training(history: Mapping[str, np.ndarray], alpha: float = 1.0) -> Figure:
    """Draws σmax and σmin of each layer against the epoch, coloured by depth, and √α as a dashed line.

    Args:
        history: As `SingularValueMonitor.history`.
        alpha: α, whose root the penalty draws the σ to.

    Returns:
        A figure with two panels.

    Raises:
        ValueError: Where there is nothing to draw.
    """
    names = [name.removesuffix("/sigma_max") for name in history if name.endswith("/sigma_max")]
    if not names:
        raise ValueError(f"history must hold measurements. Received: {reprlib.repr(history)}")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    colours = _by_depth(len(names))
    for number, (column, label) in enumerate([("sigma_max", "σmax"), ("sigma_min", "σmin")], start=1):
        axes = figure.add_subplot(1, 2, number, title=label, xlabel="epoch")
        axes.axhline(alpha**0.5, color="0.6", linestyle="--", linewidth=1)
        for name, colour in zip(names, colours, strict=True):
            values = history[f"{name}/{column}"]
            measured = np.isfinite(values)
            axes.plot(history["epoch"][measured], values[measured], ".-", color=colour, label=name)
    _legend(axes, len(names))
    return figure


def plot_gradient_norms(history: Mapping[str, np.ndarray]) -> Figure:
    """Draws the norm of the gradient in each kernel by depth, a line per measurement.

    Args:
        history: As `SingularValueMonitor.history`, of a monitor with `gradient_data`.

    Returns:
        A figure with one panel.

    Raises:
        ValueError: Where there is nothing to draw.
    """
    columns = [name for name in history if name.endswith("/gradient_norm")]
    if not columns:
        raise ValueError(f"history must hold gradient norms. Received: {reprlib.repr(history)}")
    names = [name.removesuffix("/gradient_norm") for name in columns]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(yscale="log", ylabel="norm of the gradient")
    for colour, epoch, row in zip(
        _by_depth(len(history["epoch"])),
        history["epoch"],
        np.transpose([history[column] for column in columns]),
        strict=True,
    ):
        axes.plot(range(len(names)), row, ".-", color=colour, label=f"epoch {epoch:g}")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="x-small")
    _legend(axes, len(history["epoch"]))
    return figure


def _by_depth(count):
    return colormaps["viridis"](np.linspace(0, 0.92, count))


def _shortened(name, limit=26):
    """A long name without its middle."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 + 1 :]}"


def _legend(axes, count):
    columns = math.ceil(count / LEGEND_ROWS)
    axes.legend(fontsize="x-small", ncols=columns, loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_sigma(axes, result, column, label, colour):
    values = result.history[column]
    measured = np.isfinite(values)
    axes.plot(result.history["step"][measured] + 1, values[measured], color=colour)
    axes.set_ylabel(label, color=colour)
    axes.tick_params(axis="y", labelcolor=colour)
