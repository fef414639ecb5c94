"""Figures of descents."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tf_frobreg.checks import received
from tf_frobreg.descent.algorithm_3_1 import DescentResult

__all__ = ["plot_convergence"]


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
    is_dict = isinstance(results, Mapping) and results
    if not is_dict or not all(isinstance(result, DescentResult) for result in results.values()):
        raise ValueError(
            "results must be a DescentResult or a non-empty dict of them. "
            f"Received: {received('results', results)}"
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
