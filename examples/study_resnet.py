"""Studies which starts and penalties train a residual network without batch normalisation.

    python examples/study_resnet.py --output-dir examples/results

The runs take minutes on an accelerator, see below, and hours on two cores; with --quick a minute. A study
that was stopped continues. The script prints two tables and writes study_resnet.csv and study_resnet.png.

The network is the ResNet-20 of He et al. (2016) for 32×32 images: a convolution, nine blocks of two 3×3
convolutions with 16, 32 and 64 filters, and a Dense head. The images are those of Fashion-MNIST with a black
border. SGD with momentum 0.9 trains it, and the learning rate falls to 0. "Algorithm 3.1" starts with the
kernels that `regularize_model` makes of the He start. The penalty is on every kernel. α is 1 for both.
"zero branches" starts the second convolution of each block at 0, so that every block starts as the identity.

Two seeds try the learning rates on validation images. The other seeds use the best one of each method.

The runs in examples/results were trained under JAX on one NVIDIA H100, in twelve minutes. TensorFlow had
computed the kernels of Algorithm 3.1 before.
"""

import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import run_all, study_files, study_parser, values
from study_generalization import accuracy, training_data

from tf_frobreg import attach_regularizers, regularize_model

# method: (start, factor of the penalty, batch normalisation)
METHODS = {
    "Glorot": ("glorot_uniform", 0.0, False),
    "He": ("he_normal", 0.0, False),
    "orthogonal": ("orthogonal", 0.0, False),
    "Algorithm 3.1": ("algorithm", 0.0, False),
    "He, penalty": ("he_normal", 0.01, False),
    "Algorithm 3.1, penalty": ("algorithm", 0.01, False),
    "He, zero branches": ("zero", 0.0, False),
    "He, batch norm.": ("he_normal", 0.0, True),
}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BATCH = 128
TRIES = (0, 100)  # the seeds that choose a rate. One seed can train by luck with a rate that is too high


def build(start, normalised):
    """Returns the network."""
    kernels = "he_normal" if start in ("algorithm", "zero") else start

    def convolve(x, filters, size, stride, last=False):
        own = "zeros" if last and start == "zero" else kernels
        x = keras.layers.Conv2D(filters, size, stride, padding="same", kernel_initializer=own)(x)
        return keras.layers.BatchNormalization()(x) if normalised else x

    inputs = keras.Input((32, 32, 1))
    x = keras.layers.ReLU()(convolve(inputs, 16, 3, 1))
    for filters in (16, 32, 64):
        for block in range(3):
            stride = 2 if filters > 16 and block == 0 else 1
            y = keras.layers.ReLU()(convolve(x, filters, 3, stride))
            y = convolve(y, filters, 3, 1, last=True)
            if stride > 1:
                x = convolve(x, filters, 1, stride)
            x = keras.layers.ReLU()(keras.layers.Add()([x, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, kernel_initializer=kernels)(x))


def bordered(images):
    """Returns images of 28×28 with a border of two black pixels."""
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))


def train(data_dir, method, rate, seed, images, epochs):
    """Trains one network and measures it. The seeds of `TRIES` choose the rate, on validation images."""
    began = time.perf_counter()
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    (x, y), (x_measured, y_measured) = training_data(data_dir, images, 0 if seed in TRIES else seed)
    start, factor, normalised = METHODS[method]
    model = build(start, normalised)
    if start == "algorithm":
        regularize_model(model)
    if factor:
        attach_regularizers(model, factor)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * -(-len(x) // BATCH))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), loss, metrics=["accuracy"])
    history = model.fit(bordered(x), y, batch_size=BATCH, epochs=epochs, verbose=0).history
    return {
        "accuracy": accuracy(model, bordered(x_measured), y_measured),
        "first": history["accuracy"][0],
        "last": history["accuracy"][-1],
        "backend": keras.config.backend(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def best(tried, method, rates):
    """Returns the learning rate with the highest accuracy on validation images."""
    return max(rates, key=lambda rate: values(tried, "accuracy", method=method, rate=rate).mean())


def tried_table(tried, methods, rates):
    """Returns a table of what seed 0 tried."""
    found = Table("method", title="Validation images, mean of two seeds: accuracy by learning rate, %")
    for rate in rates:
        found.add_column(f"{rate:g}", justify="right")
    for method in methods:
        cells = (100 * values(tried, "accuracy", method=method, rate=rate).mean() for rate in rates)
        found.add_row(method, *(f"{cell:.1f}" for cell in cells))
    return found


def table(rows, methods):
    """Returns a table of means and standard deviations over the seeds."""
    found = Table("method", title="Test images: mean ± standard deviation over the seeds, in %")
    for name in ("rate", "accuracy", "lowest", "training, first epoch", "training, last epoch"):
        found.add_column(name, justify="right")
    for method in methods:
        cells = {name: 100 * values(rows, name, method=method) for name in ("accuracy", "first", "last")}
        texts = {name: f"{cell.mean():.1f} ± {cell.std():.1f}" for name, cell in cells.items()}
        rate = values(rows, "rate", method=method)[0]
        lowest = f"{cells['accuracy'].min():.1f}"
        found.add_row(method, f"{rate:g}", texts["accuracy"], lowest, texts["first"], texts["last"])
    return found


def draw(rows, methods):
    """Draws the accuracy of every seed, and the training accuracy of the first epoch."""
    figure = Figure(figsize=(9, 0.4 * len(methods) + 1.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"accuracy": "test accuracy, %", "first": "training accuracy in the first epoch, %"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for place, method in enumerate(methods):
            found = 100 * values(rows, column, method=method)
            axes.plot(found, np.full(len(found), place), "o", alpha=0.5, color=f"C{place}")
            axes.plot(found.mean(), place, "|", color="k", markersize=14)
        axes.set(title=title)
        axes.grid(axis="x", color="0.9")
    panels[0].set_yticks(range(len(methods)), list(methods))
    panels[0].invert_yaxis()
    return figure


def main():
    """Chooses the learning rates, runs the study, prints the tables and draws the figure."""
    options = study_parser(__doc__).parse_args()
    csv_file, figure_file = study_files(options, "study_resnet")
    methods, rates, size = list(METHODS), RATES, {"images": 20_000, "epochs": 8}
    tries = TRIES
    if options.quick:
        methods, rates, tries = methods[1:4:2], RATES[2:3], TRIES[:1]
        size = {"images": 256, "epochs": 1}

    def run(jobs):
        return run_all(train, list(jobs), csv_file, options)

    tried = run(
        {"method": method, "rate": rate, "seed": seed} | size
        for method in methods
        for rate in rates
        for seed in tries
    )
    rows = run(
        {"method": method, "rate": best(tried, method, rates), "seed": seed} | size
        for method in methods
        for seed in range(1, options.seeds + 1)
    )
    draw(rows, methods).savefig(figure_file, dpi=110)
    console = Console(width=120)
    console.print(tried_table(tried, methods, rates), table(rows, methods))
    console.print(f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
