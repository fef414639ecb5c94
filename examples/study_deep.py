"""Studies gradients and accuracy of plain deep networks on Fashion-MNIST, for many starts and penalties.

    python examples/study_deep.py --output-dir examples/results

The runs take about five hours on two cores; with --quick a minute. A study that was stopped continues. The
script prints tables and writes study_deep.csv, study_deep.png (accuracy) and study_deep_gradients.png.

The networks are 3×3 convolutions of 16 filters without skip connections, then a Dense layer. The first three
convolutions have strides 2 and reduce 28×28 images to 4×4. Training uses 10,000 images, 4 epochs, batches of
100 and Adam with cosine decay. α is 2 with ReLU and 1 with tanh. The starts are:

    Glorot, He         Keras' normal initializers
    orthogonal         the reshaped kernel is orthogonal, with gain √α
    delta-orthogonal   `FrobeniusInitializer` without noise: an isometry, except for the strides
    usual              He with ReLU, Glorot with tanh; with "batch norm." also batch normalisation
    Algorithm 3.1      the usual start, then Algorithm 3.1 to α on every kernel

Learning rate and factor of each method are chosen from four pairs on 2,000 validation images. The chosen pair
has the highest accuracy in the worse of two seeds, because a network should train from every seed. A pair of
depth 40 is used for all depths up to 40; greater depths have their own. The second seed is skipped if no pair
is above chance with the first. The rate is multiplied by 40/depth. Test accuracies are those of other seeds.

On 4×4 images a third of the taps read zeros. He's start and the orthogonal start ignore this. M includes it.
"""

import itertools
import os
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from fashion_mnist import load_data
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import run_all, study_files, study_parser, values

from tf_frobreg import FrobeniusInitializer, ReshapedRegularizer, attach_regularizers, regularize_model

ALPHA = {"relu": 2.0, "tanh": 1.0}
DEPTHS = {"relu": (10, 20, 40, 80), "tanh": (10, 20, 40, 80)}
USUAL = {"relu": "he_normal", "tanh": "glorot_normal"}
RATE_DEPTH = 40  # the depth at which a learning rate is used as given
CHANCE, TRAINED = 0.15, 0.7  # accuracy: at most this is chance, at least this is trained

# method: (start, border for Algorithm 3.1 on the start, penalty)
METHODS = {
    "none, Glorot": ("glorot_normal", None, None),
    "none, He": ("he_normal", None, None),
    "none, orthogonal": ("orthogonal", None, None),
    "none, delta-orthogonal": ("delta", None, None),
    "none, usual, batch norm.": ("usual", None, "normalisation"),
    "L2, usual": ("usual", None, "l2"),
    "reshaped, usual": ("usual", None, "reshaped"),
    "circular, usual": ("usual", None, "circular"),
    "Frobenius, usual": ("usual", None, "frobenius"),
    "none, Algorithm 3.1": ("usual", "same", None),
    "L2, Algorithm 3.1": ("usual", "same", "l2"),
    "reshaped, Algorithm 3.1": ("usual", "same", "reshaped"),
    "circular, Algorithm 3.1": ("usual", "circular", "circular"),
    "Frobenius, Algorithm 3.1": ("usual", "same", "frobenius"),
}
# penalty: four pairs (learning rate at depth 40, factor)
SETTINGS = {
    None: [(rate, 0.0) for rate in (5e-4, 1e-3, 2e-3, 4e-3)],
    "normalisation": [(rate, 0.0) for rate in (5e-4, 1e-3, 2e-3, 4e-3)],
    "l2": [(rate, factor) for rate in (1e-3, 2e-3) for factor in (1e-4, 1e-3)],
    "reshaped": [(rate, factor) for rate in (1e-3, 2e-3) for factor in (1e-3, 1e-2)],
    "circular": [(rate, factor) for rate in (1e-3, 2e-3) for factor in (0.01, 0.1)],
    "frobenius": [(rate, factor) for rate in (1e-3, 2e-3) for factor in (0.01, 0.1)],
}


def initializer(start, activation, size, strides):
    """Returns the initializer of one layer."""
    if start == "orthogonal":
        return keras.initializers.Orthogonal(ALPHA[activation] ** 0.5)
    if start == "delta":
        return FrobeniusInitializer(size, ALPHA[activation], noise=0.0, strides=strides)
    return USUAL[activation] if start == "usual" else start


def build(depth, activation, start, penalty, factor):
    """Returns the network with its penalty."""
    alpha = ALPHA[activation]
    model = keras.Sequential([keras.Input((28, 28, 1))])
    for number, size in zip(range(depth), itertools.chain((28, 14, 7), itertools.repeat(4)), strict=False):
        strides = 2 if number < 3 else 1
        layer = keras.layers.Conv2D(
            16, 3, strides, padding="same", kernel_initializer=initializer(start, activation, size, strides)
        )
        if penalty == "l2":
            layer.kernel_regularizer = keras.regularizers.L2(factor)
        elif penalty == "reshaped":
            layer.kernel_regularizer = ReshapedRegularizer(factor, alpha)
        model.add(layer)
        if penalty == "normalisation":
            model.add(keras.layers.BatchNormalization())
        model.add(keras.layers.Activation(activation))
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10))
    if penalty in ("circular", "frobenius"):
        attach_regularizers(
            model,
            factor,
            alpha,
            reduction="mean",
            padding="circular" if penalty == "circular" else None,
            include=keras.layers.Conv2D,
        )
    return model


def gradient_norms(model, x, y):
    """Returns the norm of the loss's gradient, without penalties, in each convolution's kernel."""
    kernels = [layer.kernel.value for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x))
    gradients = tape.gradient(loss, kernels)
    # in float32 the square of a value below 1e-19 would underflow
    return " ".join(f"{float(tf.norm(tf.cast(one, tf.float64))):.4g}" for one in gradients)


def train(data_dir, activation, depth, method, rate, factor, seed, epochs, images):
    """Trains one network and measures it. Seeds up to 0 are for choosing settings, on validation images."""
    began = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed % 2**32)  # Keras accepts no negative seed
    (x, y), test = load_data(data_dir)
    (x, y), measured = (x[:images], y[:images]), (x[-2000:], y[-2000:]) if seed <= 0 else test
    x, x_measured = ((part[..., None] / np.float32(255) - 0.286) / 0.353 for part in (x, measured[0]))
    start, border, penalty = METHODS[method]
    model = build(depth, activation, start, penalty, factor)
    if border:
        regularize_model(
            model,
            alpha=ALPHA[activation],
            include=keras.layers.Conv2D,
            padding=border,
            max_steps=60,
            escape=False,  # as in the runs of examples/results, which are older than escapes
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    decay = keras.optimizers.schedules.CosineDecay(rate * RATE_DEPTH / depth, epochs * len(x) // 100)
    # on these small images a step takes twice as long with XLA, and tracing takes longer
    model.compile(keras.optimizers.Adam(decay), loss, metrics=["accuracy"], jit_compile=False)
    norms = [gradient_norms(model, x[:500], y[:500])]
    accuracies = []
    for some in (1, epochs - 1):
        history = model.fit(x, y, batch_size=100, epochs=some, verbose=0).history
        accuracies += history.get("accuracy", [])
        norms.append(gradient_norms(model, x[:500], y[:500]))
    return {
        "accuracy": model.evaluate(x_measured, measured[1], batch_size=500, verbose=0)[1],
        "training_accuracy": " ".join(f"{value:.4f}" for value in accuracies),
        "gradient_at_start": norms[0],
        "gradient_after_1": norms[1],
        "gradient_at_end": norms[-1],
        "seconds": round(time.perf_counter() - began, 1),
    }


def choose(rows, activation, depth, method):
    """Returns (learning rate, factor) with the highest validation accuracy in the worst seed."""
    kind = {"activation": activation, "depth": depth, "method": method}
    tried = dict.fromkeys(zip(*(values(rows, name, **kind) for name in ("rate", "factor")), strict=True))
    return max(
        tried,
        key=lambda pair: accuracies(rows, activation, depth, method, rate=pair[0], factor=pair[1]).min(),
    )


def accuracies(rows, activation, depth, method, **wanted):
    """Returns the accuracies of the runs of one kind."""
    return values(rows, "accuracy", activation=activation, depth=depth, method=method, **wanted)


def tried_table(tried, activation, depth):
    """Returns a table of all settings tried at one depth, on validation images."""
    found = Table(title=f"{activation}, depth {depth}, validation: rate, factor and accuracy of each seed")
    found.add_column("penalty, start")
    mine = [row for row in tried if (row["activation"], row["depth"]) == (activation, str(depth))]
    for method in dict.fromkeys(row["method"] for row in mine):
        cells = {}
        for row in mine:
            if row["method"] == method:
                cells.setdefault((row["rate"], row["factor"]), []).append(f"{float(row['accuracy']):.0%}")
        found.add_row(
            method,
            *(f"{knobs(*map(float, pair))}\n{' '.join(accuracies)}" for pair, accuracies in cells.items()),
        )
    return found


def knobs(rate, factor):
    """Returns learning rate and factor as text."""
    return f"{rate:g}" + f", {factor:g}" * bool(factor)


def table(rows, activation, depths, methods):
    """Returns a table of test accuracy, number of trained runs, rate and factor by method and depth."""
    found = Table(
        title=f"{activation}, α = {ALPHA[activation]:g}: test accuracy, runs that reached 70 %, rate, factor"
    )
    found.add_column("penalty, start")
    for depth in depths:
        found.add_column(f"depth {depth}", justify="right")
    for method in methods:
        cells = []
        for depth in depths:
            kind = {"activation": activation, "depth": depth, "method": method}
            reached = accuracies(rows, **kind)
            rate, factor = (values(rows, column, **kind)[0] for column in ("rate", "factor"))
            trained = f"{(reached >= TRAINED).sum()}/{len(reached)}"
            cells.append(f"{reached.mean():.1%} ± {reached.std():.1%}, {trained}\n{knobs(rate, factor)}")
        found.add_row(method, *cells)
    return found


def norms(rows, column, **wanted):
    """Returns the geometric mean over the seeds of the gradient's norm in each layer."""
    logs = [
        np.log(np.maximum(np.array(row[column].split(), dtype=float), 1e-30))
        for row in rows
        if all(row[name] == str(value) for name, value in wanted.items())
    ]
    return np.exp(np.mean(logs, 0))


def color(method):
    """Returns the colour of the method's penalty."""
    colors = {"l2": "C1", "reshaped": "C2", "circular": "C0", "frobenius": "C3", "normalisation": "C4"}
    return colors.get(METHODS[method][2], "0.2")


def draw(rows, depths, methods):
    """Draws the accuracy of every run: a panel per activation and depth, a line per method."""
    figure = Figure(figsize=(13, 0.5 + (0.6 + 0.21 * len(methods)) * len(depths)), layout="constrained")
    most = max(map(len, depths.values()))
    panels = figure.subplots(len(depths), most, squeeze=False, sharex=True, sharey=True)
    for (activation, some), row in zip(depths.items(), panels, strict=True):
        for axes, depth in zip(row, some, strict=True):
            for place, method in enumerate(methods):
                found = accuracies(rows, activation, depth, method)
                axes.plot(found.mean(), place, "|", markersize=13, color=color(method))
                axes.plot(
                    found, np.full(len(found), place), "o", markersize=4.5, alpha=0.5, color=color(method)
                )
            axes.axvline(0.1, color="0.7", linestyle=":", zorder=0)
            axes.set_title(
                f"{activation}, α = {ALPHA[activation]:g}: {depth} convolutions", fontsize="medium"
            )
            axes.set_xlim(0, 1)
            axes.set_xticks([0.1, 0.4, 0.7, 1], ["chance", "40 %", "70 %", ""])
            axes.grid(axis="y", color="0.93")
    panels[0, 0].set_yticks(range(len(methods)), methods)
    panels[0, 0].invert_yaxis()
    figure.supxlabel("test accuracy: one point per seed, a bar at the mean", fontsize="medium")
    return figure


def draw_gradients(rows, depths, methods):
    """Draws the gradients in each layer at the greatest depth, and in the first layer at every depth."""
    figure = Figure(figsize=(15, 0.8 + 3.4 * len(depths)), layout="constrained")
    whens = {
        "gradient_at_start": "at the start",
        "gradient_after_1": "after one epoch",
        "gradient_at_end": "at the end",
    }
    panels = figure.subplots(len(depths), len(whens) + 1, squeeze=False, sharey=True)
    for (activation, some), row in zip(depths.items(), panels, strict=True):
        row[0].set(ylabel="norm of the gradient", yscale="log", ylim=(1e-12, 1e3))
        for method in methods:
            for axes, (column, when) in zip(row, whens.items(), strict=False):
                by_layer = norms(rows, column, activation=activation, method=method, depth=some[-1])
                axes.plot(range(1, len(by_layer) + 1), by_layer, **line(method))
                axes.set(xlabel="layer", title=f"{activation}, {some[-1]} convolutions, {when}")
            firsts = [
                norms(rows, "gradient_at_start", activation=activation, method=method, depth=depth)[0]
                for depth in some
            ]
            row[-1].plot(some, firsts, marker=".", **line(method))
        row[-1].set(xscale="log", xlabel="convolutions", title=f"{activation}, first layer, at the start")
        row[-1].set_xticks(some, [str(depth) for depth in some])
        row[-1].minorticks_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=4, fontsize="small", title="penalty, start"
    )
    return figure


def line(method):
    """Returns the style of the method's line. It is thick if the start is Algorithm 3.1."""
    start, border, _ = METHODS[method]
    dashes = {"glorot_normal": ":", "orthogonal": "-.", "delta": (0, (6, 1.5))}
    style = {"linewidth": 2.4} if border else {"linestyle": dashes.get(start, "--")}
    return {"color": color(method), "label": method} | style


def main():
    """Chooses the settings, runs the study, prints the tables and draws the figures."""
    options = study_parser(__doc__).parse_args()
    csv_file, figure_file = study_files(options, "study_deep")
    size = {"epochs": 4, "images": 10_000}
    seeds, depths, methods, first = range(1, options.seeds + 1), DEPTHS, list(METHODS), RATE_DEPTH
    tries, more_seeds = None, (-1,)  # pairs to try (None: all), seeds beside 0
    if options.quick:
        size, depths, first = {"epochs": 1, "images": 500}, {"relu": (5, 10)}, 10
        tries, more_seeds = 1, ()
        methods = [
            "none, He",
            "none, delta-orthogonal",
            "none, usual, batch norm.",
            "Frobenius, Algorithm 3.1",
        ]

    def job(activation, depth, method, rate, factor, seed):
        names = ("activation", "depth", "method", "rate", "factor", "seed")
        return dict(zip(names, (activation, depth, method, rate, factor, seed), strict=True)) | size

    def run(jobs):
        return run_all(train, list(jobs), csv_file, options)

    kinds = [
        (activation, depth, method)
        for activation, some in depths.items()
        for depth in some
        if depth >= first
        for method in methods
    ]
    settings = [(*kind, *pair) for kind in kinds for pair in SETTINGS[METHODS[kind[2]][2]][:tries]]
    tried = run(job(*setting, 0) for setting in settings)
    hopeful = {kind for kind in kinds if accuracies(tried, *kind).max() > CHANCE}
    tried += run(job(*setting, seed) for setting in settings if setting[:3] in hopeful for seed in more_seeds)
    rows = run(
        job(activation, depth, method, *choose(tried, activation, max(depth, first), method), seed)
        for seed in seeds
        for activation, some in depths.items()
        for depth in some
        for method in methods
    )
    draw(rows, depths, methods).savefig(figure_file, dpi=110)
    gradients_file = figure_file.with_stem(f"{figure_file.stem}_gradients")
    draw_gradients(rows, depths, methods).savefig(gradients_file, dpi=110)
    console = Console(width=150)
    for activation in depths:
        for depth in depths[activation]:
            if depth >= first:
                console.print(tried_table(tried, activation, depth))
        console.print(table(rows, activation, depths[activation], methods))
    console.print(f"Wrote {csv_file}, {figure_file} and {gradients_file}")


if __name__ == "__main__":
    sys.exit(main())
