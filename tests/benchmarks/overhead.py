"""What the penalty adds to a training step of well-known networks, and what watching σ adds to an epoch.

    pip install . && python tests/benchmarks/overhead.py

Random images and labels, batch 8, SGD, float32, the networks of `keras.applications` at their usual 224×224
with random weights, every kernel regularized. The step with penalties and the one without are run in turn,
and medians are shown: on a noisy machine compare within a row. Tracing is left out.

The second table is of a ResNet-18 for 32×32 images: an epoch of 50,000 images is reckoned from a step of 128,
and `SingularValueMonitor` measures before training, where it has no vectors to begin from, and after a step.
`--quick` takes 32×32 images and one round, and leaves the second table out.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_frobreg import SingularValueMonitor, attach_regularizers

NETWORKS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121")
BATCH = 8


def training_step(model, x, y):
    """A compiled step of SGD, and its loss."""
    model.compile(keras.optimizers.SGD(1e-3), keras.losses.SparseCategoricalCrossentropy(), jit_compile=False)

    def step():
        return float(model.train_on_batch(x, y))

    step()
    return step


def build(name, size):
    """The network, the same each time."""
    keras.utils.set_random_seed(1)
    return getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10)


def measure(name, size, rounds):
    """A row of the table."""
    random = np.random.RandomState(0)
    x = random.rand(BATCH, size, size, 3).astype("float32")
    y = random.randint(10, size=BATCH)
    plain, regularized = build(name, size), build(name, size)
    start = time.perf_counter()
    report = attach_regularizers(regularized, factor=1e-4, reduction="mean")
    attaching = time.perf_counter() - start
    steps = [training_step(model, x, y) for model in (plain, regularized)]
    seconds = [[], []]
    for _ in range(rounds):
        for step, own in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
    medians = [float(np.median(own)) for own in seconds]
    return attaching, len(report.attached), len(report.left_out), *medians


def monitor_table():
    """The share of an epoch that watching all kernels takes."""
    from spectrum import resnet18  # the script beside this one

    keras.utils.set_random_seed(1)
    model = resnet18()
    random = np.random.RandomState(0)
    x, y = random.rand(128, 32, 32, 3).astype("float32"), random.randint(10, size=128)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), loss, jit_compile=False)
    model.train_on_batch(x, y)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        model.train_on_batch(x, y)
        seconds.append(time.perf_counter() - start)
    epoch = float(np.median(seconds)) * 50_000 / 128
    table = Table(title="ResNet-18 at 32×32, 21 kernels: seconds")
    for name in ("", "step of 128", "epoch of 50,000", "first look", "share", "later look", "share"):
        table.add_column(name, justify="right")
    for name, options in (("σmax, σmin", {}), ("σmax", {"sigma_min": False})):
        monitor = SingularValueMonitor(**options)
        model.fit(x, y, batch_size=128, verbose=0, callbacks=[monitor])
        first, later = monitor.history["seconds"]
        parts = (float(np.median(seconds)), epoch, first, first / epoch, later, later / epoch)
        formats = ("{:.2f}", "{:.0f}", "{:.1f}", "{:.1%}", "{:.1f}", "{:.1%}")
        table.add_row(name, *(form.format(part) for form, part in zip(formats, parts, strict=True)))
    return table


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="32×32 images, one round")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="default: all")
    options = parser.parse_args()
    size, rounds = (32, 1) if options.quick else (224, 5)
    table = Table(title=f"Training step at {size}×{size}, batch {BATCH}, {os.cpu_count()} cores: seconds")
    for name in ("network", "kernels", "left out", "attaching", "step", "regularized", "ratio"):
        table.add_column(name, justify="right")
    for name in options.networks:
        attaching, attached, left_out, plain, regularized = measure(name, size, rounds)
        ratio = f"{regularized / plain:.2f}"
        seconds = (f"{value:.3g}" for value in (attaching, plain, regularized))
        table.add_row(name, str(attached), str(left_out), *seconds, ratio)
        tf.keras.backend.clear_session()
    console = Console(width=120)
    console.print(table)
    if not options.quick:
        console.print(monitor_table())


if __name__ == "__main__":
    main()
