"""Trains a small convolutional network on Fashion-MNIST with and without the regularizer.

    python examples/train_fashion_mnist.py      (a few minutes on two cores; with --quick about 20 seconds)

The script prints the test accuracy and the singular values of each convolution for both networks. It saves
both models and the kernels of their second convolution. The data come from Debian's package
dataset-fashion-mnist if it is installed, otherwise from `keras.datasets`, which downloads them.
`--data-dir` names another directory with the four .gz files.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from fashion_mnist import load_data
from rich.console import Console
from rich.table import Table

from tf_frobreg import FrobeniusRegularizer, extreme_singular_values

# (filters, strides, size of the layer's input image)
CONVOLUTIONS = [(16, 1, 28), (16, 2, 28), (32, 2, 14)]


def build_model(factor, seed):
    """Returns a network of three convolutions and a dense layer. `factor=0` means no penalty."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((28, 28, 1))])
    for filters, strides, input_size in CONVOLUTIONS:
        regularizer = None
        if factor:
            regularizer = FrobeniusRegularizer(input_size, factor, strides=strides, reduction="mean")
        model.add(
            keras.layers.Conv2D(
                filters, 3, strides, padding="same", activation="relu", kernel_regularizer=regularizer
            )
        )
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
    return model


def spectrum(model):
    """Returns the extreme singular values of each convolution."""
    return [
        extreme_singular_values(layer.kernel, size, strides=strides)
        for layer, (_, strides, size) in zip(model.layers, CONVOLUTIONS, strict=False)
    ]


def main():
    """Trains both networks, compares and saves them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="directory with the four .gz files of Fashion-MNIST")
    parser.add_argument(
        "--output-dir",
        default="fashion_mnist",
        help="directory for models and kernels (default: fashion_mnist)",
    )
    parser.add_argument("--factor", type=float, default=0.01, help="weight of the penalty (default: 0.01)")
    parser.add_argument("--epochs", type=int, default=5, help="number of epochs (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="random seed (default: 1)")
    parser.add_argument("--quick", action="store_true", help="one epoch on 2,000 images, as a check")
    parser.add_argument("--force", action="store_true", help="overwrite the files of an earlier run")
    options = parser.parse_args()

    output = Path(options.output_dir)
    if output.exists() and any(output.iterdir()) and not options.force:
        sys.exit(f"--output-dir is not empty. --force overwrites the files in it. Received: {output}")
    try:
        train, test = load_data(options.data_dir)
    except FileNotFoundError as error:
        sys.exit(str(error))
    if options.quick:
        train, test, options.epochs = [part[:2000] for part in train], [part[:1000] for part in test], 1
    (x, y), (x_test, y_test) = (
        (images[..., None] / np.float32(255), labels) for images, labels in (train, test)
    )

    output.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"Fashion-MNIST, {len(x):,} images, {options.epochs} epochs, seed {options.seed}")
    table.add_column("regularizer")
    table.add_column("test accuracy", justify="right")
    for number in range(1, len(CONVOLUTIONS) + 1):
        table.add_column(f"conv {number}\nσmax / σmin", justify="right")
    for name, factor in [("none", 0.0), ("frobenius", options.factor)]:
        model = build_model(factor, options.seed)
        print(f"Training with regularizer: {name}", flush=True)
        model.fit(x, y, batch_size=128, epochs=options.epochs, verbose=2)
        accuracy = model.evaluate(x_test, y_test, verbose=0)[1]
        values = (f"{s.sigma_max:.2f} / {s.sigma_min:.3f}" for s in spectrum(model))
        table.add_row(name, f"{accuracy:.1%}", *values)
        model.save(output / f"{name}.keras")
        np.save(output / f"{name}_conv2.npy", model.layers[1].kernel.numpy())
    Console().print(table)
    print(f"Saved models and kernels in {output}")


if __name__ == "__main__":
    main()
