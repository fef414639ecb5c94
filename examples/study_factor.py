"""Studies how the factor, α and the border of the penalty change a small network.

    python examples/study_factor.py --output-dir examples/results

The runs, 280, take about forty minutes on two cores; with --quick a minute. A study that was stopped
continues. The script prints tables and writes study_factor.csv and study_factor.png.

The network of study_generalization.py is trained on 5,000 images of Fashion-MNIST with factors over five
decades. The penalty is on the convolutions, with reduction "mean". There are four kinds:

    zero border, α = 1   layers and penalty with a zero border
    zero border, α = 2   the same with α = 2
    circular, α = 1      the same layers, penalty with border "circular"
    valid, α = 1         layers and penalty with border "valid"

The loss is the cross-entropy of scale·logits. Every setting is trained with scale 1 and with scale 30: layers
that do not stretch have small logits, with which cross-entropy cannot be confident.

The tables show the test accuracy, and three values of the third convolution (3×3, 16 filters on 16 channels,
strides 1): σmax, σmin and the share of the energy ‖K‖² in the centre tap.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import in_points, run_all, study_files, study_parser, values
from study_generalization import accuracy, build, fit, training_data

from tf_frobreg import attach_regularizers, model_spectrum

# name: (α, border of the layers, border of the penalty)
KINDS = {
    "zero border, α = 1": (1.0, "same", None),
    "zero border, α = 2": (2.0, "same", None),
    "circular, α = 1": (1.0, "same", "circular"),
    "valid, α = 1": (1.0, "valid", None),
}
RATE = 1e-3
SCALES = (1.0, 30.0)
FACTORS = (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
LAYER = 2  # index of the third convolution in the model


def train(data_dir, kind, factor, scale, seed, images, epochs):
    """Trains one network and returns the measured values."""
    began = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), test = training_data(data_dir, images, seed)
    alpha, border, padding = KINDS[kind]
    model = build(border)
    if factor:
        options = {"reduction": "mean", "padding": padding, "include": keras.layers.Conv2D}
        attach_regularizers(model, factor, alpha, **options)
    fit(model, x, y, RATE, epochs, 50, scale)
    kernel = np.asarray(model.layers[LAYER].kernel)
    taps = (kernel**2).sum((2, 3)).ravel() / (kernel**2).sum()
    sigma = model_spectrum(model)[LAYER].extremes
    return {
        "accuracy": accuracy(model, *test),
        "sigma_max": sigma.sigma_max,
        "sigma_min": sigma.sigma_min,
        "centre": taps[4],
        "taps": " ".join(f"{share:.4f}" for share in taps),
        "seconds": round(time.perf_counter() - began, 1),
    }


def table(rows, kinds, factors, scale):
    """Returns a table of means and standard deviations over the seeds, with differences in points.

    For σmin it shows median and range.
    """
    found = Table(
        title=f"Scale {scale:g}, third convolution, 3×3×16×16; "
        "mean ± standard deviation; σmin: median, least–greatest"
    )
    names = ("test accuracy", "difference to factor 0, scale 1", "σmax", "σmin", "energy in the centre tap")
    for name in ("kind", "factor", *names):
        found.add_column(name, justify="left" if name == "kind" else "right", no_wrap=name == "kind")
    for kind in kinds:
        for factor in factors:
            own = values(rows, "accuracy", kind=kind, factor=factor, scale=scale)
            plain = values(rows, "accuracy", kind=kind, factor=factors[0], scale=SCALES[0])
            sigma_max, sigma_min, centre = (
                values(rows, column, kind=kind, factor=factor, scale=scale)
                for column in ("sigma_max", "sigma_min", "centre")
            )
            found.add_row(
                kind,
                f"{factor:g}",
                f"{own.mean():.1%} ± {own.std():.1%}",
                in_points(own - plain),
                f"{sigma_max.mean():.2f} ± {sigma_max.std():.2f}",
                f"{np.median(sigma_min):.2f}, {sigma_min.min():.2f}–{sigma_min.max():.2f}",
                f"{centre.mean():.0%} ± {centre.std():.0%}",
            )
        found.add_section()
    return found


def draw(rows, kinds, factors):
    """Draws accuracy, σ and the share of the centre tap against the factor, and the energy of each tap."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 1))
    grid = above.subplots(len(SCALES), 3, sharex=True, sharey="col")
    pressed = [factor for factor in factors if factor]
    places = [pressed[0] / 10, *pressed]
    titles = {
        "accuracy": "test accuracy",
        "sigma_max": "σmax (solid), σmin (dashed): median and range",
        "centre": "energy in the centre tap",
    }
    for panels, scale in zip(grid, SCALES, strict=True):
        for number, kind in enumerate(kinds):
            aside = 1.2 ** (number - (len(kinds) - 1) / 2)  # so that no kind hides another
            for axes, column in zip(panels, titles, strict=True):
                for one in [column] + ["sigma_min"] * (column == "sigma_max"):
                    cells = np.array(
                        [values(rows, one, kind=kind, factor=factor, scale=scale) for factor in factors]
                    )
                    middle, spread = cells.mean(1), cells.std(1)
                    if column == "sigma_max":  # in some runs σmin is near 0, in others near √α
                        middle = np.median(cells, 1)
                        spread = [middle - cells.min(1), cells.max(1) - middle]
                    style = {"color": f"C{number}", "linestyle": "--" if one == "sigma_min" else "-"}
                    beside = np.multiply(places, aside)
                    axes.errorbar(beside, middle, spread, marker=".", capsize=2, label=kind, **style)
        panels[0].set_ylabel(f"logits × {scale:g}")
    for axes, title in zip(grid[0], titles.values(), strict=True):
        axes.set_title(title)
    for axes in grid[-1]:
        axes.set(xscale="log", xlabel="factor")
        axes.set_xticks(places, ["0", *(f"{factor:g}" for factor in pressed)])
        axes.minorticks_off()
    grid[0, 1].set_yscale("symlog", linthresh=1)
    grid[0, 1].set_yticks([0, 0.5, 1, 2, 4], ["0", "0.5", "1", "2", "4"])
    grid[0, 0].legend(fontsize="small")
    borders = [kind for kind in kinds if kind.endswith("α = 1")]
    shown = [(kind, factor) for kind in borders for factor in (factors[0], factors[-3], factors[-1])]
    below.suptitle(f"share of the energy in each tap, logits × {SCALES[-1]:g}", fontsize="medium")
    for axes, (kind, factor) in zip(below.subplots(1, len(shown)), shown, strict=True):
        wanted = kind, str(factor), str(SCALES[-1])
        chosen = [row for row in rows if (row["kind"], row["factor"], row["scale"]) == wanted]
        energy = np.mean([np.array(row["taps"].split(), dtype=float) for row in chosen], 0).reshape(3, 3)
        axes.imshow(energy, cmap="viridis", vmin=0, vmax=1)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{kind.split(',')[0]}, factor {factor:g}", fontsize=8)
        for (i, j), share in np.ndenumerate(energy):
            axes.text(
                j, i, f"{share:.0%}", ha="center", va="center", fontsize=7, color="w" if share < 0.6 else "k"
            )
    return figure


def main():
    """Runs the study, prints the table and draws the figure."""
    options = study_parser(__doc__).parse_args()
    csv_file, figure_file = study_files(options, "study_factor")
    kinds, factors, seeds = list(KINDS), FACTORS, range(1, options.seeds + 1)
    size = {"images": 5000, "epochs": 12}
    if options.quick:
        kinds, factors, size = kinds[:1] + kinds[2:], FACTORS[::3], {"images": 500, "epochs": 2}
    jobs = [
        {"kind": kind, "factor": factor, "scale": scale, "seed": seed} | size
        for seed in seeds
        for kind in kinds
        for factor in factors
        for scale in SCALES
    ]
    rows = run_all(train, jobs, csv_file, options)
    draw(rows, kinds, factors).savefig(figure_file, dpi=110)
    console = Console(width=120)
    for scale in SCALES:
        console.print(table(rows, kinds, factors, scale))
    console.print(f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
