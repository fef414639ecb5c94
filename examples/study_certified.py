"""Studies what σ near 1 is good for: certificates against perturbations, and what they cost.

    pip install ".[benchmark]" && python examples/study_certified.py --output-dir examples/results

The runs, 284, take about two hours on two cores; with --quick a minute. A study that was stopped continues.
The script prints tables and writes study_certified.csv and study_certified.png.

The network has three 3×3 convolutions (16, 32 and 64 filters, strides 1, 2 and 2, ReLU) and a Dense head. The
border is "same", with "Frobenius, valid" it is "valid". It is trained on 20,000 images of Fashion-MNIST.
Every kernel is penalised. The loss is the cross-entropy of scale·logits: a network that does not stretch has
small logits, and cross-entropy cannot be confident with them.

An image is certified at ε if it is classified rightly and its `certified_radius` is above ε: no perturbation
of L2 norm ε changes its class (pixels from 0 to 1). Projected gradient descent (PGD, Madry et al., 2018)
attacks the first 250 images at the same ε. Its accuracy is an upper bound of what can be certified of them.

A method has up to 12 settings: three scales and four strengths. For a penalty the strength is its factor, for
"clip" the largest σ. "none" and "Algorithm 3.1" have no strength. deel-lip's layers and losses need Keras 2,
see train_deel_lip.py. Seed 0 tries all settings on validation images. Of each method, up to four settings are
trained with the other seeds: those with the highest accuracy, with the highest accuracy if the Lipschitz
bound is below 3, with the most certified images at 0.1 if the accuracy is within 2 points of "none", and with
the most certified images at 0.25.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from attacks import pgd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import run_all, study_files, study_parser, values
from study_generalization import cross_entropy, training_data

from tf_frobreg import (
    SingularValueClip,
    SpectralRegularizer,
    attach_regularizers,
    certified_radius,
    lipschitz_bound,
    model_spectrum,
    regularize_model,
)

LAYERS = ((16, 1), (32, 2), (64, 2))  # filters and stride of the convolutions
RADII = (0.1, 0.25, 0.5, 1.0)
SCALES = (1.0, 10.0, 30.0)
DECADES = (0.1, 1.0, 10.0, 100.0)
SMALLER = "2-norm, smaller Gram"
DEEL = "deel-lip"
# method: its strengths
METHODS = {
    "none": (0.0,),
    "Frobenius": DECADES,
    "Frobenius, valid": DECADES,
    "circular": DECADES,
    "reshaped": DECADES,
    "2-norm": (1e-3, 1e-2, 1e-1, 1.0),
    SMALLER: (1e-3, 1e-2, 1e-1, 1.0),
    "L2": (1e-4, 1e-3, 1e-2, 1e-1),
    "clip": (0.7, 1.0, 1.4, 2.0),
    "Algorithm 3.1": (0.0,),
    DEEL: (0.0, 1.0, 10.0, 100.0),
}
RATE, BATCH = 3e-3, 128
ATTACKED, STEPS = 250, 20
SMALL_BOUND, SMALL_PRICE = 3.0, 0.02


def build(method, strength, activation="relu"):
    """Returns the network with the method's penalty, constraint or start."""
    clip = functools.partial(SingularValueClip, high=strength) if method == "clip" else None

    def penalty(size, strides=1):  # for a layer that is not built yet: a built one ignores it
        if method == SMALLER:
            return SpectralRegularizer(size, strength, gram="smaller", strides=strides)
        return keras.regularizers.L2(strength) if method == "L2" else None

    model = keras.Sequential([keras.Input((28, 28, 1))])
    border = "valid" if method == "Frobenius, valid" else "same"
    size = 28
    for filters, stride in LAYERS:
        own = {"kernel_constraint": clip and clip(size), "kernel_regularizer": penalty(size, stride)}
        model.add(keras.layers.Conv2D(filters, 3, stride, padding=border, activation=activation, **own))
        size = -(-size // stride)
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, kernel_constraint=clip and clip(()), kernel_regularizer=penalty(())))
    if method in ("Frobenius", "Frobenius, valid", "circular"):
        padding = "circular" if method == "circular" else None
        attach_regularizers(model, strength, padding=padding)
    elif method in ("reshaped", "2-norm"):
        attach_regularizers(model, strength, penalty={"2-norm": "spectral"}.get(method, method))
    elif method == "Algorithm 3.1":
        regularize_model(model)
    return model


def fit(model, x, y, scale, epochs):
    """Trains with Adam and a learning rate that falls to 0, on the cross-entropy of scale·logits."""
    rate = keras.optimizers.schedules.CosineDecay(RATE, epochs * -(-len(x) // BATCH))
    model.compile(keras.optimizers.Adam(rate), cross_entropy(scale))
    model.fit(x, y, epochs=epochs, batch_size=BATCH, verbose=0)


def train_deel_lip(model, x, y, strength, scale, epochs, seed):
    """Trains deel-lip's layers in a process of its own, and gives the model their weights."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "images.npz"), Path(folder, "weights.npz")
        np.savez(source, x=x, y=y)
        words = [target, strength, scale, epochs, seed]
        command = [sys.executable, Path(__file__).with_name("train_deel_lip.py"), source, *map(str, words)]
        subprocess.run(
            command, check=True, env=os.environ | {"TF_USE_LEGACY_KERAS": "1"}, stderr=subprocess.DEVNULL
        )
        with np.load(target) as found:
            weights, logits = [found[name] for name in found.files if name != "logits"], found["logits"]
    model.set_weights(weights)
    for layer in model.layers[: len(LAYERS)]:
        layer.activation = group_sort
    np.testing.assert_allclose(model.predict(x[: len(logits)], verbose=0), logits, atol=1e-3)


def group_sort(x):
    """Sorts each pair of neighbouring channels. It only exchanges entries, so it does not stretch."""
    pairs = keras.ops.reshape(x, (-1, x.shape[-1] // 2, 2))
    return keras.ops.reshape(keras.ops.sort(pairs, axis=-1), (-1, *x.shape[1:]))


def train(data_dir, method, strength, scale, seed, images, epochs):
    """Trains one network and measures it. Seed 0 is for choosing settings, on validation images."""
    began = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), (x_measured, y_measured) = training_data(data_dir, images, seed)
    model = build(method, strength)
    if method == DEEL:
        train_deel_lip(model, x, y, strength, scale, epochs, seed)
        linear = build("none", 0.0, "linear")  # GroupSort does not stretch, as little as no activation
        linear.set_weights(model.get_weights())
        bound = lipschitz_bound(linear)
    else:
        fit(model, x, y, scale, epochs)
        bound = lipschitz_bound(model)
    right = model.predict(x_measured, batch_size=500, verbose=0).argmax(1) == y_measured
    found = {"accuracy": float(right.mean()), "bound": float(bound)}
    radii = certified_radius(model, x_measured, bound)
    part = x_measured[:ATTACKED], y_measured[:ATTACKED]
    for radius in RADII:
        certified = right & (radii > radius)
        moved = pgd(model, *part, radius, STEPS)
        withstood = right[:ATTACKED] & (model.predict(moved, batch_size=500, verbose=0).argmax(1) == part[1])
        if (certified[:ATTACKED] & ~withstood).any():
            raise RuntimeError(
                f"an attack of {radius} changed a certified class: {method}, {strength}, {scale}"
            )
        found |= {
            f"certified_{radius}": float(certified.mean()),
            f"attacked_{radius}": float(withstood.mean()),
        }
    for number, row in enumerate(model_spectrum(model, sigma_min=False), 1):
        found[f"sigma_max_{number}"] = row.extremes.sigma_max
    for number, layer in enumerate(model.layers[: len(LAYERS)], 1):
        energy = np.square(layer.kernel.numpy()).sum((2, 3))
        found[f"centre_{number}"] = float(energy[1, 1] / energy.sum())
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def settings_of(rows, method):
    """Returns the (strength, scale) of a method, from its rows."""
    return sorted({(float(r["strength"]), float(r["scale"])) for r in rows if r["method"] == method})


def best(tried, method):
    """Returns the settings of a method that are best in accuracy or certificates, see above."""
    own = [row for row in tried if row["method"] == method]
    small = [row for row in own if float(row["bound"]) < SMALL_BOUND]
    least = values(tried, "accuracy", method="none").max() - SMALL_PRICE
    cheap = [row for row in own if float(row["accuracy"]) > least]
    wanted = [
        (own, "accuracy"),
        (small or own, "accuracy"),
        (cheap or own, "certified_0.1"),
        (own, "certified_0.25"),
    ]
    chosen = [max(some, key=lambda row, one=column: float(row[one])) for some, column in wanted]
    return sorted({(float(row["strength"]), float(row["scale"])) for row in chosen})


def table(rows, methods):
    """Returns a table of the chosen settings: means and standard deviations over the seeds, in %."""
    found = Table(title="Test images: mean ± standard deviation over the seeds, in %")
    for name in ("method", "strength", "scale", "accuracy", "Lipschitz bound", "centre taps"):
        found.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for radius in RADII:
        found.add_column(f"certified, PGD\nat {radius}", justify="right", no_wrap=True)
    for method in methods:
        for strength, scale in settings_of(rows, method):
            own = functools.partial(values, rows, method=method, strength=strength, scale=scale)
            centre = np.mean([own(f"centre_{number}") for number in range(1, 1 + len(LAYERS))])
            cells = []
            for radius in RADII:
                certified, attacked = (100 * own(f"{kind}_{radius}") for kind in ("certified", "attacked"))
                cells.append(f"{certified.mean():.1f} ± {certified.std():.1f}, {attacked.mean():.0f}")
            found.add_row(
                method,
                f"{strength:g}",
                f"{scale:g}",
                f"{100 * own('accuracy').mean():.1f} ± {100 * own('accuracy').std():.1f}",
                f"{own('bound').mean():.3g} ± {own('bound').std():.2g}",
                f"{100 * centre:.0f}",
                *cells,
            )
        found.add_section()
    return found


def draw(rows, tried, methods):
    """Draws certified accuracy against accuracy, a panel for each ε.

    Points are means and standard deviations on test images. A line joins those settings of a method that no
    other one of it beats in both, of all that were tried with one seed on validation images.
    """
    figure = Figure(figsize=(13, 4.7), layout="constrained")
    colors = dict(
        zip(METHODS, ("0.2", "C3", "C6", "C1", "C2", "C0", "C5", "C4", "0.6", "C8", "C9"), strict=True)
    )
    for axes, radius in zip(figure.subplots(1, len(RADII)), RADII, strict=True):
        for method in methods:
            names = "accuracy", f"certified_{radius}"
            front = sorted(zip(*(100 * values(tried, name, method=method) for name in names), strict=True))
            front = [(x, y) for x, y in front if not any(p > x and q >= y for p, q in front)]
            strong = {"linewidth": 2 if method in ("Frobenius", "circular") else 1, "color": colors[method]}
            axes.plot(*zip(*front, strict=True), "-", alpha=0.6, **strong)
            points = []
            for strength, scale in settings_of(rows, method):
                own = functools.partial(values, rows, method=method, strength=strength, scale=scale)
                cells = [100 * own(name) for name in names]
                points.append([part for cell in cells for part in (cell.mean(), cell.std())])
            x, x_spread, y, y_spread = np.array(points).T
            style = {"fmt": "o", "markersize": 4, "capsize": 2, "color": colors[method]}
            axes.errorbar(x, y, y_spread, x_spread, label=method, **style)
        axes.set(title=f"ε = {radius}", xlabel="accuracy, %", ylim=(-3, 85))
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, right - 20), right)  # without the settings that hardly learn
        axes.grid(color="0.92")
    figure.axes[0].set_ylabel("certified at ε, % of the images")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(methods) // 2))
    return figure


def main():
    """Chooses the settings, runs the study, prints the table and draws the figure."""
    options = study_parser(__doc__).parse_args()
    csv_file, figure_file = study_files(options, "study_certified")
    methods, scales, size = METHODS, SCALES, {"images": 20_000, "epochs": 4}
    if options.quick:
        methods = {
            method: METHODS[method][-2:-1] or METHODS[method] for method in ("none", "Frobenius", "clip")
        }
        scales, size = SCALES[2:3], {"images": 500, "epochs": 1}

    def job(method, strength, scale, seed):
        return {"method": method, "strength": strength, "scale": scale, "seed": seed} | size

    def run(jobs):
        return run_all(train, list(jobs), csv_file, options)

    tried = run(
        job(method, strength, scale, 0)
        for method, strengths in methods.items()
        for strength in strengths
        for scale in scales
    )
    rows = run(
        job(method, *setting, seed)
        for method in methods
        for setting in best(tried, method)
        for seed in range(1, options.seeds + 1)
    )
    draw(rows, tried, methods).savefig(figure_file, dpi=110)
    Console(width=170).print(table(rows, methods), f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
