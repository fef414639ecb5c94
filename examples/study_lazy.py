"""Studies whether a penalty that is computed only at every n-th step still does its work.

    python examples/study_lazy.py --output-dir examples/results

The runs take a quarter of an hour on two free cores; with --quick a minute. A study that was stopped
continues. The script prints tables and writes study_lazy.csv and study_lazy.png.

The network of study_generalization.py is trained on 5,000 images of Fashion-MNIST: 12 epochs, 1,200 steps.
The penalties are on the convolutions, with α = 1 and reduction "mean". `LazyPenalty(n)` computes them at
every n-th step with n times their weight. The optimizers are Adam and SGD with momentum 0.9. The learning
rate of SGD is chosen from three with seed 0, without a penalty: the lowest whose accuracy on 5,000 validation
images is within one standard error of the best. The rate of Adam is what study_generalization.py chose.

The first table of an optimizer shows σmax of the four convolutions and what is left of the penalty: R − floor
per column of M, the mean of the layers. The second shows the accuracies on test images, as in
study_generalization.py. A run has failed if its weights are not finite or if it only guesses the classes.
Means are over the other runs.

SGD with momentum sums up the large steps of the penalty. The first of all tables shows the greatest factor
with which it is stable near σ = 1, by the theory of a quadratic penalty. For greater σ it is less.
"""

import functools
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from attacks import fgsm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.console import Console
from rich.table import Table
from runs import run_all, study_files, study_parser, values
from study_generalization import COLUMNS, VALIDATION, accuracy, penalised, training_data

from tf_frobreg import LazyPenalty, model_spectrum

MOMENTUM = 0.9
OPTIMIZERS = {
    "Adam": keras.optimizers.Adam,
    "SGD": functools.partial(keras.optimizers.SGD, momentum=MOMENTUM),
}
ADAM_RATE = 1e-3
SGD_RATES = (3e-3, 1e-2, 3e-2)
FACTORS = (0.01, 1.0, 10.0)
EVERY = (1, 4, 16, 64)
CURVATURE = 8  # of the first convolution: it has one channel, and (σ² − 1)² has this second derivative at 1
GUESSING = 0.2  # of ten classes, 0.1 are right by chance
LAYERS = {f"sigma_max_{number}": f"σmax {number}" for number in range(1, 5)}
MEASURED = LAYERS | {"excess": "R − floor"}
ACCURACIES = {name: COLUMNS[name] for name in ("accuracy", "noisy", "attacked")}


def train(data_dir, optimizer, rate, factor, every, seed, images, epochs):
    """Trains one network and measures it. The values of a network that is not finite are NaN."""
    began = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), (x_measured, y_measured) = training_data(data_dir, images, seed)
    model = penalised("Frobenius" if factor else "none", factor)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(OPTIMIZERS[optimizer](rate), loss)
    lazy = [LazyPenalty(every)] if factor else []
    model.fit(x, y, batch_size=50, epochs=epochs, verbose=0, callbacks=lazy)
    found = dict.fromkeys(ACCURACIES | MEASURED, float("nan"))
    if all(np.isfinite(weights).all() for weights in model.get_weights()):
        noise = np.random.RandomState(seed).normal(0, 0.2, x_measured.shape).astype("float32")
        spectrum = model_spectrum(model, sigma_min=False)[: len(LAYERS)]
        found = {
            "accuracy": accuracy(model, x_measured, y_measured),
            "noisy": accuracy(model, np.clip(x_measured + noise, 0, 1), y_measured),
            "attacked": accuracy(model, fgsm(model, x_measured, y_measured, 0.02), y_measured),
            **{name: row.extremes.sigma_max for name, row in zip(LAYERS, spectrum, strict=True)},
            "excess": np.mean(
                [(row.penalty - row.penalty_floor) / row.convolution.shape[1] for row in spectrum]
            ),
        }
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def chosen(tried):
    """Returns the lowest learning rate whose accuracy is within one standard error of the best."""
    accuracy_of = {float(row["rate"]): float(row["accuracy"]) for row in tried}
    best = max(accuracy_of.values())
    error = (best * (1 - best) / VALIDATION) ** 0.5
    return min(rate for rate, found in accuracy_of.items() if found >= best - error)


def stable_factor(rate, every):
    """Returns the greatest factor with which SGD is stable.

    The matrix that takes weight and momentum over n steps then has its eigenvalues in the unit circle.
    """
    kept = MOMENTUM**every
    return 2 * (1 + kept) / (1 - kept) * (1 - MOMENTUM) / (every * CURVATURE * rate)


def settings(factors):
    """Returns all pairs of a factor and n."""
    return [(0.0, 1), *((factor, every) for factor in factors for every in EVERY)]


def cell(rows, column, optimizer, rate, factor, every):
    """Returns a column as numbers, one per seed. Runs that have failed are NaN."""
    numbers, right = (
        values(rows, name, optimizer=optimizer, rate=rate, factor=factor, every=every)
        for name in (column, "accuracy")
    )
    return np.where(right > GUESSING, numbers, np.nan)


def spread(numbers, form, sign=""):
    """Returns mean ± standard deviation of those numbers that are not NaN."""
    numbers = numbers[~np.isnan(numbers)]
    return f"{numbers.mean():{sign}{form}} ± {numbers.std():{form}}" if len(numbers) else "–"


def table(rows, optimizer, rate, factors, columns, title):
    """Returns a table of means and standard deviations, and how they compare to those of n = 1."""
    found = Table(title=f"{optimizer}, rate {rate:g}: {title}")
    for name in ("factor", "n", *columns.values(), "failed"):
        found.add_column(name, justify="right", no_wrap=True)
    for factor, every in settings(factors):
        texts = []
        for column in columns:
            own, often = (cell(rows, column, optimizer, rate, factor, n) for n in (every, 1))
            if column in ACCURACIES:
                text, other = spread(own, ".1%"), spread(100 * (own - often), ".2f", "+")
            else:
                form = ".2g" if column == "excess" else ".2f"
                text, other = spread(own, form), spread(own / often, ".2f")
            texts.append(text if every == 1 else f"{text}\n{other}")
        failed = np.isnan(own)
        found.add_row(f"{factor:g}", str(every), *texts, f"{failed.sum()} of {failed.size}")
        if every == EVERY[-1] or not factor:
            found.add_section()
    return found


def rate_table(tried):
    """Returns a table of the learning rates tried, and of the factors with which they are stable."""
    found = Table(title="SGD: accuracy without a penalty, greatest stable factor")
    for name in ("rate", "accuracy", *(f"n = {every}" for every in EVERY)):
        found.add_column(name, justify="right")
    for row in tried:
        rate = float(row["rate"])
        factors = (f"{stable_factor(rate, every):.3g}" for every in EVERY)
        found.add_row(f"{rate:g}", f"{float(row['accuracy']):.1%}", *factors)
    return found


def draw(rows, optimizers, factors):
    """Draws σmax and the accuracies against n, one row of panels for each optimizer and rate."""
    columns = MEASURED | ACCURACIES
    figure = Figure(figsize=(18, 3.1 * len(optimizers) + 0.4), layout="constrained")
    grid = figure.subplots(len(optimizers), len(columns), sharex=True, sharey="col")
    for (optimizer, rate), panels in zip(optimizers, grid, strict=True):
        for axes, (column, title) in zip(panels, columns.items(), strict=True):
            for number, (factor, numbers) in enumerate([(0.0, (1,)), *((one, EVERY) for one in factors)]):
                cells = {every: cell(rows, column, optimizer, rate, factor, every) for every in numbers}
                worked = {every: own[~np.isnan(own)] for every, own in cells.items()}
                means, spreads = (
                    np.array([getattr(own, name)() if len(own) else np.nan for own in worked.values()])
                    for name in ("mean", "std")
                )
                if factor:
                    beside = np.multiply(numbers, 1.08 ** (number - 2))  # so that no factor hides another
                    style = {"marker": ".", "capsize": 2, "color": f"C{number - 1}"}
                    axes.errorbar(beside, means, spreads, label=f"factor {factor:g}", **style)
                    for place in beside[np.isnan(means)]:
                        height = axes.get_xaxis_transform()
                        axes.plot(place, 0.05 * (number - 1), "x", color=f"C{number - 1}", transform=height)
                else:
                    axes.axhline(means[0], color="0.4", linestyle="--", label="no penalty")
                    axes.axhspan(*(means + spreads * (-1, 1)), color="0.9")
            axes.set_title(f"{optimizer}: {title}", fontsize="medium")
            axes.set(xscale="log", xlabel="n")
            axes.set_xticks(EVERY, EVERY)
            axes.minorticks_off()
            axes.margins(y=0.2)
            axes.tick_params(labelbottom=True)
            if column == "excess":
                axes.set_yscale("log")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    handles.append(Line2D([], [], marker="x", linestyle="", color="0.4"))
    labels.append("all runs failed")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def main():
    """Chooses the learning rate, runs the study, prints the tables and draws the figure."""
    options = study_parser(__doc__).parse_args()
    csv_file, figure_file = study_files(options, "study_lazy")
    factors, rates, size = FACTORS, SGD_RATES, {"images": 5000, "epochs": 12}
    if options.quick:
        factors, rates, size = FACTORS[1:2], SGD_RATES[1:2], {"images": 500, "epochs": 7}

    def run(jobs):
        return run_all(train, list(jobs), csv_file, options)

    def job(optimizer, rate, factor=0.0, every=1, seed=0):
        setting = {"optimizer": optimizer, "rate": rate, "factor": factor, "every": every, "seed": seed}
        return setting | size

    tried = run(job("SGD", rate) for rate in rates)
    optimizers = [("Adam", ADAM_RATE), ("SGD", chosen(tried))]
    rows = run(
        job(*optimizer, *setting, seed)
        for seed in range(1, options.seeds + 1)
        for optimizer in optimizers
        for setting in settings(factors)
    )
    draw(rows, optimizers, factors).savefig(figure_file, dpi=110)
    console = Console(width=120)
    console.print(rate_table(tried), "")
    for optimizer in optimizers:
        for columns, title in [
            (MEASURED, "mean ± standard deviation; below: ratio to n = 1"),
            (ACCURACIES, "mean ± standard deviation; below: points to n = 1"),
        ]:
            console.print(table(rows, *optimizer, factors, columns, title), "")
    console.print(f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
