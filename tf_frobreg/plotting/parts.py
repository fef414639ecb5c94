"""What figures have in common: the line at √α, scales, names along an axis, colours and legends."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from tf_frobreg.checks import check_number

MOST_NAMES = 60  # along an axis
TARGET: dict[str, Any] = {"color": "0.25", "linestyle": "--", "linewidth": 1}  # the line at √α
LINEAR_RANGE = 20  # largest σ over smallest σ, up to which a linear axis shows both
NEARLY_ZERO = 1e-4  # times √α: no axis is extended to show smaller σ


def check_targets(alpha: Any, names: Sequence[str]) -> np.ndarray:
    """Returns √α of each layer, or raises if one is missing."""
    if not isinstance(alpha, Mapping):
        alpha = dict.fromkeys(names, alpha)
    missing = [name for name in names if name not in alpha]
    if missing:
        raise ValueError(f"alpha must hold α of each layer. Received: nothing for {reprlib.repr(missing)}")
    return np.array([check_number("alpha", alpha[name], exclusive=True) ** 0.5 for name in names])


def fit_scale(axes: Axes, direction: Literal["x", "y"], sigma: np.ndarray, targets: np.ndarray) -> None:
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


def height(count: int) -> float:
    """Returns the height in inches of a figure with `count` layers along its vertical axis."""
    return min(max(1.9, 1.1 + 0.22 * count), 9.0)


def name_layers(axis: Axis, names: Sequence[str], most: int = MOST_NAMES, **style: Any) -> None:
    """Writes at most `most` names of layers along an axis. A short tick stands for each of the others."""
    every = math.ceil(len(names) / most)
    axis.set_ticks(range(len(names)), minor=True)
    axis.set_ticks(
        range(0, len(names), every),
        [shorten(name, 32) for name in names[::every]],
        fontsize="x-small",
        **style,
    )


def by_depth(count: int) -> np.ndarray:
    """Returns one colour per layer or measurement, from dark to light."""
    return np.asarray(colormaps["viridis"](np.linspace(0, 0.92, count)))


def shorten(name: str, limit: int = 26) -> str:
    """Returns a long name without its middle."""
    return name if len(name) <= limit else f"{name[: limit // 2]}…{name[-limit // 2 + 1 :]}"


def draw_legend(axes: Axes) -> None:
    """Draws a legend to the right of the axes."""
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
