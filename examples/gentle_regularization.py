"""Shows how much accuracy is left after the singular values of a trained network are brought near 1.

    python examples/gentle_regularization.py --output-dir OUT   (8 minutes on one core; with --quick one)

`regularize_model` does not look at the loss. The script trains the network of train_fashion_mnist.py. It
repairs copies of the network, and measures each copy right after the repair and after more training: one
epoch on 20,000 images. It prints a table and writes gentle_regularization.csv and gentle_regularization.png.
The repairs:

    Algorithm 3.1     the descent on all kernels, or on the convolutions alone, which leaves the head out
    tolerance         each descent stops if all σ are within this tolerance of 1
    α = mean σ²       each kernel keeps the mean of its σ²
    part of the way   K + t (K' − K), with K' from the descent on the convolutions
    clipped           σmax is bounded by clip_singular_values, 20 times over. It needs strides of 1
    scaled            each kernel is divided by its σmax. The biases are divided too, so that only the scale
                      of the logits changes
    training          two epochs on 20,000 images with a penalty on the convolutions, and no descent

A penalty stays on in the last epoch. Without the word penalty there is none. The data are those of
train_fashion_mnist.py.
"""

import csv
import functools
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from fashion_mnist import load_data
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from table_and_figure import parse_options, table_parser
from train_fashion_mnist import CONVOLUTIONS, build_model

from tf_frobreg import (
    attach_regularizers,
    clip_singular_values,
    model_spectrum,
    regularize_model,
    spectral_norm,
    transformation_matrix,
)

EPOCHS, BATCH, LATER_IMAGES = 3, 128, 20_000
HEAD = keras.layers.Dense
CLIPS = 20  # one call of clip_singular_values does not keep the bound


def kernel_layers(model):
    """Returns each layer with a kernel, its input size and its strides."""
    geometry = [(size, strides) for _, strides, size in CONVOLUTIONS] + [((), 1)]
    layers = [layer for layer in model.layers if layer.weights]
    return [(layer, *own) for layer, own in zip(layers, geometry, strict=True)]


def train(model, data, epochs=1):
    """Trains with Adam."""
    model.fit(*data, batch_size=BATCH, epochs=epochs, verbose=0)


def nothing(model, data):
    """Leaves the network as it is."""


def descend(model, data, share=1.0, factor=0.0, **options):
    """Runs Algorithm 3.1, goes a `share` of the way to its kernels, and puts the penalty on them."""
    before = model.get_weights()
    regularize_model(model, **options)
    model.set_weights(
        [old + share * (new - old) for old, new in zip(before, model.get_weights(), strict=True)]
    )
    if factor:
        attach_regularizers(model, factor, reduction="mean", exclude=HEAD)


def descend_to_own_scale(model, data):
    """Runs Algorithm 3.1 on each convolution, with α the mean of the kernel's σ²."""
    for layer, size, strides in kernel_layers(model)[:-1]:
        matrix = transformation_matrix(layer.kernel, size, strides=strides)
        mean = np.sum(matrix.values.numpy() ** 2) / min(matrix.shape)
        regularize_model(model, alpha=mean, include=layer)


def clip(model, data, high):
    """Bounds σmax of each kernel whose strides are 1."""
    for layer, size, strides in kernel_layers(model):
        for _ in range(CLIPS if strides == 1 else 0):
            layer.kernel.assign(clip_singular_values(layer.kernel, size, high=high))


def scale(model, data):
    """Divides each kernel by its σmax, and each bias by all σmax up to its layer."""
    total = 1.0
    for layer, size, strides in kernel_layers(model):
        norm = spectral_norm(layer.kernel, size, strides=strides)
        total *= norm
        layer.kernel.assign(layer.kernel / norm)
        layer.bias.assign(layer.bias / total)


def train_with_penalty(model, data, factor):
    """Trains for 2 epochs, with a penalty if the factor is not 0."""
    if factor:
        attach_regularizers(model, factor, reduction="mean", exclude=HEAD)
    train(model, data, epochs=2)


def without_head(**options):
    """Returns a repair by Algorithm 3.1 that leaves the head out."""
    return functools.partial(descend, exclude=HEAD, **options)


# group, repair: function(model, training data)
REPAIRS = {
    ("trained", "as it is"): nothing,
    ("Algorithm 3.1", "all kernels"): descend,
    ("Algorithm 3.1", "without the head"): without_head(),
    ("Algorithm 3.1", "without the head, then penalty 0.1"): without_head(factor=0.1),
    ("Algorithm 3.1", "without the head, tolerance 0.3"): without_head(tolerance=0.3),
    ("Algorithm 3.1", "without the head, tolerance 0.5"): without_head(tolerance=0.5),
    ("Algorithm 3.1", "without the head, α = 2"): without_head(alpha=2.0),
    ("Algorithm 3.1", "without the head, α = mean σ²"): descend_to_own_scale,
    ("part of the way", "1/4, without the head"): without_head(share=0.25),
    ("part of the way", "1/2, without the head"): without_head(share=0.5),
    ("σmax bounded", "clipped to 2, strides 1 only"): functools.partial(clip, high=2.0),
    ("σmax bounded", "clipped to 1, strides 1 only"): functools.partial(clip, high=1.0),
    ("σmax bounded", "scaled to 1, all kernels"): scale,
    ("training", "no penalty"): functools.partial(train_with_penalty, factor=0.0),
    ("training", "penalty 0.01"): functools.partial(train_with_penalty, factor=0.01),
    ("training", "penalty 0.1"): functools.partial(train_with_penalty, factor=0.1),
    ("training", "penalty 1"): functools.partial(train_with_penalty, factor=1.0),
}
# column: (title, format)
NUMBERS = {
    "sigma_max": ("σmax", ".2f"),
    "sigma_min": ("σmin", ".2f"),
    "product": ("∏ σmax", ".1f"),
    "moved": ("moved", ".0%"),
    "accuracy": ("accuracy", ".1%"),
    "later_sigma_max": ("σmax", ".2f"),
    "later_sigma_min": ("σmin", ".2f"),
    "later_accuracy": ("accuracy", ".1%"),
}


def measure(model, test):
    """Returns σmax, σmin, the largest σmax/σmin of a convolution, ∏ σmax of all kernels, and accuracy."""
    *convolutions, head = (row.extremes for row in model_spectrum(model, accuracy=1e-3))
    return {
        "sigma_max": max(ends.sigma_max for ends in convolutions),
        "sigma_min": min(ends.sigma_min for ends in convolutions),
        "condition": max(ends.sigma_max / ends.sigma_min for ends in convolutions),
        "product": np.prod([ends.sigma_max for ends in (*convolutions, head)]),
        "accuracy": model.evaluate(*test, batch_size=1000, verbose=0)[1],
    }


def moved(new, old):
    """Returns ‖K' − K‖ / ‖K‖ of all kernels together, from two lists of weights."""
    pairs = [(a, b) for a, b in zip(new, old, strict=True) if a.ndim > 1]
    return (sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)) ** 0.5


def run(seed, data, test, console):
    """Trains a network and yields a row for each repair of it."""
    trained = build_model(0.0, seed)
    train(trained, data, EPOCHS)
    weights = trained.get_weights()
    later_data = [part[:LATER_IMAGES] for part in data]
    for (group, name), repair in track(REPAIRS.items(), f"network {seed}", console=console):
        keras.backend.clear_session()
        model = build_model(0.0, seed)  # also sets the seed: every copy sees the images in the same order
        model.set_weights(weights)
        repair(model, later_data)
        row = {"group": group, "repair": name, "seed": seed, "moved": moved(model.get_weights(), weights)}
        row |= measure(model, test)
        train(model, later_data)
        yield row | {f"later_{column}": value for column, value in measure(model, test).items()}


def column_of(rows, key, column):
    """Returns the values of a column in the rows of one repair."""
    return np.array([row[column] for row in rows if (row["group"], row["repair"]) == key])


def table_of(rows, title):
    """Returns a table of means, of accuracies with the standard deviation."""
    table = Table(title=title)
    table.add_column("repair")
    for column, (name, _) in NUMBERS.items():
        table.add_column(f"{name}\nlater" if column.startswith("later") else name, justify="right")
    group = None
    for key in REPAIRS:
        if key[0] != group:
            group = key[0]
            table.add_section()
            table.add_row(group, style="bold")
        cells = []
        for column, (_, form) in NUMBERS.items():
            values = column_of(rows, key, column)
            spread = f" ± {values.std():{form}}" if column.endswith("accuracy") else ""
            cells.append(f"{values.mean():{form}}{spread}")
        table.add_row(f"  {key[1]}", *cells)
    return table


def draw(rows):
    """Draws accuracy against the largest σmax/σmin of a convolution, right after and after more training."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    groups = list(dict.fromkeys(group for group, _ in REPAIRS))
    for axes, prefix, title in zip(
        panels, ("", "later_"), ("right after", "after more training"), strict=True
    ):
        for group in groups:
            keys = [key for key in REPAIRS if key[0] == group]
            x, y = (
                [column_of(rows, key, f"{prefix}{column}").mean() for key in keys]
                for column in ("condition", "accuracy")
            )
            axes.plot(x, y, "o", label=group)
        axes.set(xscale="log", title=title, xlabel="largest σmax/σmin of a convolution")
        axes.grid(color="0.9")
    panels[0].set_ylabel("test accuracy")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    return figure


def main():
    """Trains, repairs and measures the networks, prints the table and writes the files."""
    parser = table_parser(__doc__, seeds=3, seeds_help="number of trained networks")
    parser.add_argument("--data-dir", help="directory with the four .gz files of Fashion-MNIST")
    parser.add_argument(
        "--quick", action="store_true", help="one network, trained on 2,000 images, as a check"
    )
    options, csv_file, figure_file = parse_options(parser, "gentle_regularization")
    try:
        data, test = load_data(options.data_dir)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if options.quick:
        data, test, options.seeds = [part[:2000] for part in data], [part[:1000] for part in test], 1
    data, test = ((images[..., None] / np.float32(255), labels) for images, labels in (data, test))
    seeds, console = range(1, options.seeds + 1), Console(stderr=True)
    rows = [row for seed in seeds for row in run(seed, data, test, console)]
    with csv_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows).savefig(figure_file, dpi=110)
    title = (
        f"Fashion-MNIST, networks: {options.seeds}. σmax and σmin of the convolutions, ∏ σmax of all kernels"
    )
    Console(width=120).print(table_of(rows, title), f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
