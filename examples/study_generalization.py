"""Studies how penalties change the generalization of a small network on Fashion-MNIST.

    python examples/study_generalization.py --output-dir examples/results

The runs take about an hour on two cores; with --quick a minute. A study that was stopped continues. The
script prints tables and writes study_generalization.csv and study_generalization.png.

The network has four convolutions with ReLU and a Dense layer, and is trained with Adam. The penalties are on
the convolutions, α = 1. There are four tasks: 1,000, 5,000 or 55,000 training images, and 5,000 images with
30 % of the labels drawn at random. Four values are measured:

    test accuracy
    training − test   training accuracy minus test accuracy
    with noise        test accuracy under Gaussian noise, standard deviation 0.2 of the grey range
    under FGSM        test accuracy under an FGSM attack of 0.02 of the grey range

Settings are chosen on 5,000 validation images with seed 0. First, the learning rate is chosen from five
without a penalty. Then, with this rate, the factor of each penalty is chosen from five. The results are those
of other seeds. Slower training also helps against the attack. For comparison, "none, lower rate" has the next
lower learning rate and no penalty.
"""

import functools
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from attacks import fgsm
from fashion_mnist import load_data
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import in_points, run_all, study_files, study_parser, values

from tf_frobreg import ReshapedRegularizer, attach_regularizers, model_spectrum

TASKS = {
    "1,000 images": {"images": 1000, "random_labels": 0.0, "epochs": 30, "batch": 50},
    "5,000 images": {"images": 5000, "random_labels": 0.0, "epochs": 12, "batch": 50},
    "55,000 images": {"images": 55000, "random_labels": 0.0, "epochs": 3, "batch": 100},
    "5,000, 30 % of labels random": {"images": 5000, "random_labels": 0.3, "epochs": 12, "batch": 50},
}
VALIDATION = 5000
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)
SLOWER = "none, lower rate"
DECADES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# method: factors to choose from
METHODS = {
    "none": (),
    SLOWER: (),
    "L2": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "reshaped": DECADES,
    "circular": DECADES,
    "Frobenius": DECADES,
}
COLUMNS = {
    "accuracy": "test accuracy",
    "gap": "training − test",
    "noisy": "with noise",
    "attacked": "under FGSM",
}


def build(padding="same", regularizer=None):
    """Returns a network of four convolutions and a Dense layer."""
    model = keras.Sequential([keras.Input((28, 28, 1))])
    for filters, strides in [(8, 1), (16, 2), (16, 1), (32, 2)]:
        own = regularizer and regularizer()
        model.add(
            keras.layers.Conv2D(
                filters, 3, strides, padding=padding, activation="relu", kernel_regularizer=own
            )
        )
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10))
    return model


def penalised(method, factor):
    """Returns the network with the penalty `method`."""
    own = {"L2": keras.regularizers.L2, "reshaped": ReshapedRegularizer}.get(method)
    model = build(regularizer=own and functools.partial(own, factor))
    if method in ("circular", "Frobenius"):
        padding = "circular" if method == "circular" else None
        attach_regularizers(model, factor, reduction="mean", padding=padding, include=keras.layers.Conv2D)
    return model


def training_data(data_dir, images, seed, random_labels=0.0):
    """Returns ((x, y) for training, (x, y) for measuring): validation images for seed 0, else test images."""
    (x, y), test = load_data(data_dir)
    random = np.random.RandomState(seed)
    measured = (x[-VALIDATION:], y[-VALIDATION:]) if seed == 0 else test
    chosen = random.permutation(len(x) - VALIDATION)[:images]
    scaled = (part[..., None] / np.float32(255) for part in (x[chosen], measured[0]))
    return tuple(zip(scaled, (randomised(y[chosen], random_labels, random), measured[1]), strict=True))


def randomised(labels, share, random):
    """Returns the labels, each replaced with probability `share` by one of the ten at random."""
    changed = random.rand(len(labels)) < share
    return np.where(changed, random.randint(10, size=len(labels)), labels)


def cross_entropy(scale):
    """Returns the cross-entropy of scale·logits as a loss function."""
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return lambda labels, logits: entropy(labels, scale * logits)


def fit(model, x, y, rate, epochs, batch, scale=1.0):
    """Trains with Adam on the cross-entropy of scale·logits."""
    model.compile(keras.optimizers.Adam(rate), cross_entropy(scale))
    model.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)


def accuracy(model, x, y):
    """Returns the share of images that are classified correctly."""
    return float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(1) == y))


def train(data_dir, task, method, rate, factor, seed, images, random_labels, epochs, batch):
    """Trains one network and measures it. Seed 0 is for choosing settings, on validation images."""
    began = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), (x_measured, y_measured) = training_data(data_dir, images, seed, random_labels)
    model = penalised(method, factor)
    fit(model, x, y, rate, epochs, batch)
    random = np.random.RandomState(seed)
    noise = random.normal(0, 0.2, x_measured.shape).astype("float32")
    like_training = randomised(y_measured, random_labels, random)  # otherwise the gap would compare two tasks
    sigma = [row.extremes.sigma_max for row in model_spectrum(model, sigma_min=False)[:-1]]
    return {
        "accuracy": accuracy(model, x_measured, y_measured),
        "gap": accuracy(model, x, y) - accuracy(model, x_measured, like_training),
        "noisy": accuracy(model, np.clip(x_measured + noise, 0, 1), y_measured),
        "attacked": accuracy(model, fgsm(model, x_measured, y_measured, 0.02), y_measured),
        "sigma_max": " ".join(f"{value:.4g}" for value in sigma),
        "seconds": round(time.perf_counter() - began, 1),
    }


def best(rows, task, method):
    """Returns (learning rate, factor) with the highest validation accuracy."""
    mine = [row for row in rows if (row["task"], row["method"]) == (task, method)]
    row = max(mine, key=lambda row: float(row["accuracy"]))
    return float(row["rate"]), float(row["factor"])


def lower(rates, rate):
    """Returns the next lower of the learning rates, or the lowest."""
    return rates[max(0, rates.index(rate) - 1)]


def tried_table(tried, task):
    """Returns a table of all settings tried, on validation images."""
    found = Table(title=f"{task}, validation: accuracy, FGSM accuracy, by factor (none: by rate)")
    rows = {
        method: [row for row in tried if (row["task"], row["method"]) == (task, method)] for method in METHODS
    }
    found.add_column("penalty")
    for _ in range(max(map(len, rows.values()))):
        found.add_column("", justify="right")
    for method, mine in rows.items():
        name = "factor" if method != "none" else "rate"
        cells = [
            f"{float(row[name]):g}\n{float(row['accuracy']):.1%}, {float(row['attacked']):.1%}"
            for row in sorted(mine, key=lambda row: float(row[name]))
        ]
        if cells:
            found.add_row(method, *cells)
    return found


def table(rows, task, chosen):
    """Returns a table of means and standard deviations, of the values and of their differences to "none"."""
    found = Table(title=f"{task}: mean ± standard deviation; second line: difference to none, points")
    found.add_column("penalty")
    for name in ("rate", "factor", *COLUMNS.values()):
        found.add_column(name, justify="right")
    for method, (rate, factor) in chosen.items():
        texts = []
        for column in COLUMNS:
            plain, own = (values(rows, column, task=task, method=name) for name in ("none", method))
            text = f"{own.mean():.1%} ± {own.std():.1%}"
            texts.append(text if method == "none" else f"{text}\n{in_points(own - plain)}")
        found.add_row(method, f"{rate:g}", f"{factor:g}" if factor else "", *texts)
    return found


def draw(rows, tried, chosen):
    """Draws the four values of each task, and accuracy under attack against accuracy for all settings."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    panels, below = figure.subplots(2, len(COLUMNS))
    colors = dict(zip(METHODS, ("0.2", "0.6", "C1", "C2", "C0", "C3"), strict=True))
    for axes, task in zip(below, chosen, strict=False):
        for method, color in colors.items():
            mine = [row for row in tried if (row["task"], row["method"]) == (task, method)]
            mine.sort(key=lambda row: (float(row["factor"]), float(row["rate"])))
            price = [[float(row[column]) for row in mine] for column in ("accuracy", "attacked")]
            axes.plot(*price, "o-", markersize=4, color=color)
            for row in (mine[0], mine[-1]) if method == "none" else mine[-1:]:
                knob = float(row["rate" if method == "none" else "factor"])
                place = float(row["accuracy"]), float(row["attacked"])
                axes.annotate(f"{knob:g}", place, fontsize=7, color=color)
        axes.set(title=f"{task}:\nall settings tried", xlabel="validation accuracy", ylabel="under FGSM")
        axes.locator_params(axis="x", nbins=5)
    for axes in below[len(chosen) :]:
        axes.set_axis_off()
    for axes, (column, label) in zip(panels, COLUMNS.items(), strict=True):
        for number, (method, color) in enumerate(colors.items()):
            cells = [values(rows, column, task=task, method=method) for task in chosen]
            places = np.arange(len(chosen)) + 0.13 * (number - 2.5)
            means, spreads = [cell.mean() for cell in cells], [cell.std() for cell in cells]
            axes.errorbar(places, means, spreads, fmt="o", markersize=4, capsize=2, color=color, label=method)
        axes.set_title(label)
        names = [
            task.replace(" images", "\nimages").replace(", 30 % of labels", ",\n30 %\n") for task in chosen
        ]
        axes.set_xticks(range(len(chosen)), names, fontsize=8)
        axes.grid(axis="y", color="0.9")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS))
    return figure


def main():
    """Chooses the settings, runs the study, prints the tables and draws the figure."""
    options = study_parser(__doc__).parse_args()
    csv_file, figure_file = study_files(options, "study_generalization")
    tasks, seeds, rates, methods = TASKS, range(1, options.seeds + 1), RATES, METHODS
    if options.quick:
        tasks = {"500 images": TASKS["1,000 images"] | {"images": 500, "epochs": 4}}
        rates, methods = RATES[1:3], {method: factors[-1:] for method, factors in METHODS.items()}

    def run(jobs):
        return run_all(train, list(jobs), csv_file, options)

    def candidate(task, method, rate, factor, seed=0):
        return {"task": task, "method": method, "rate": rate, "factor": factor, "seed": seed} | tasks[task]

    tried = run(candidate(task, "none", rate, 0.0) for task in tasks for rate in rates)
    rate_of = {task: best(tried, task, "none")[0] for task in tasks}
    tried += run(
        candidate(task, method, rate_of[task], factor)
        for task in tasks
        for method, factors in methods.items()
        for factor in factors
    )
    chosen = {
        task: {
            method: (lower(rates, rate_of[task]), 0.0) if method == SLOWER else best(tried, task, method)
            for method in methods
        }
        for task in tasks
    }
    rows = run(
        candidate(task, method, *chosen[task][method], seed)
        for seed in seeds
        for task in tasks
        for method in methods
    )
    draw(rows, tried, chosen).savefig(figure_file, dpi=110)
    console = Console(width=120)
    for task in tasks:
        console.print(tried_table(tried, task), table(rows, task, chosen[task]), "")
    console.print(f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
