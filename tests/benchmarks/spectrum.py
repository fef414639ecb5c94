"""What measuring singular values costs, against the ways others take.

    pip install . && python tests/benchmarks/spectrum.py

Impulses through the Keras layer and a dense SVD of what comes out are what deel-lip's `compute_layer_sv`
does; the power iteration is the usual one, with TensorFlow's convolutions, stopped where σmax changes by less
than 1e-6 of itself. All ways of a row are run in turn, in one process: on a noisy machine compare within a
row. Tracing is left out but for the model, and so is the import. `--quick` takes small layers and one round.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_frobreg import (
    Convolution,
    extreme_singular_values,
    model_spectrum,
    regularize_kernel,
    singular_values,
    spectral_norm,
)
from tf_frobreg.spectrum.extremes import ExtremesFinder

DENSE = [(8, 3, 16), (16, 3, 16), (16, 8, 8), (32, 3, 16)]
LARGE = (32, 64)  # image, channels
IMAGES = [(256, 1), (4096, 1), (224, 64)]  # the same, so large that a search would take minutes


def random_kernel(g, h):
    """A 3×3 kernel whose σ² are 1 on average."""
    return np.random.RandomState(1).randn(3, 3, g, h) / np.sqrt(9 * g)


def keras_layer(kernel, size):
    """The layer, in float64 as the package measures."""
    layer = keras.layers.Conv2D(kernel.shape[-1], 3, padding="same", use_bias=False, dtype="float64")
    layer.build((None, size, size, kernel.shape[2]))
    layer.set_weights([kernel])
    return layer


def dense_by_impulses(layer, size, channels):
    """All singular values, from one unit impulse per input entry."""
    count = size * size * channels
    impulses = np.eye(count).reshape(count, size, size, channels)
    return np.linalg.svd(np.asarray(layer(impulses)).reshape(count, -1), compute_uv=False)


def power_iteration(kernel, size):
    """A function that returns (σmax, products) by plain power iteration, in float32."""
    kernel = tf.constant(kernel, tf.float32)
    shape = (1, size, size, kernel.shape[2])

    @tf.function
    def step(image):
        image = image / tf.norm(image)
        out = tf.nn.conv2d(image, kernel, 1, "SAME")
        return tf.nn.conv2d_transpose(out, kernel, shape, 1, "SAME"), tf.norm(out)

    def run():
        image, before, count = tf.random.stateless_normal(shape, (0, 0)), 0.0, 0
        while True:
            image, sigma = step(image)
            count += 1
            if abs(float(sigma) - before) <= 1e-6 * float(sigma):
                return float(sigma), count
            before = float(sigma)

    return run


def resnet18():
    """The 17 3×3 convolutions, three 1×1 ones and the Dense layer of a ResNet-18 for 32×32 images."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(64, 3, padding="same", use_bias=False)(inputs)
    for filters, strides in [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]:
        y = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
        y = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(y)
        y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
        y = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(y)
        if x.shape != y.shape:
            x = keras.layers.Conv2D(filters, 1, strides, use_bias=False)(x)
        x = keras.layers.Add()([x, y])
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))


def timed(function, rounds=1):
    """(median seconds, what the function returns)."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)), result


def dense_table(quick):
    """All singular values: this package against impulses and a dense SVD."""
    table = Table(title="All singular values, 3×3 kernels, zero border: seconds")
    for name in ("image", "g→h", "here", "impulses, SVD", "ratio", "largest difference / σmax"):
        table.add_column(name, justify="right")
    for size, g, h in DENSE[: 2 if quick else None]:
        kernel = random_kernel(g, h)
        layer = keras_layer(kernel, size)
        singular_values(kernel, size)
        layer(np.zeros((1, size, size, g)))
        rounds = 1 if quick or size > 16 else 5
        here, found = timed(lambda k=kernel, n=size: singular_values(k, n), rounds)
        dense, expected = timed(lambda la=layer, n=size, c=g: dense_by_impulses(la, n, c), rounds)
        error = np.abs(found - expected).max() / expected[0]
        table.add_row(
            f"{size}×{size}", f"{g}→{h}", f"{here:.3g}", f"{dense:.3g}", f"{dense / here:.1f}", f"{error:.0e}"
        )
    return table


def extremes_table(quick):
    """σmax and σmin of a large layer, from a random start and from that of a kernel near by."""
    size, channels = (16, 16) if quick else LARGE
    rounds = 1 if quick else 5
    table = Table(title=f"3×3×{channels}×{channels} at {size}×{size}: seconds")
    for name in ("kernel", "σmax", "its error", "plain power", "its σmax", "σmax and σmin", "σmin", "again"):
        table.add_column(name, justify="right")
    start = random_kernel(channels, channels)
    end = regularize_kernel(start, size, tolerance=0.0, max_steps=20 if quick else 300).kernel
    for name, kernel in (("random", start), ("regularized", end)):
        power = power_iteration(kernel, size)
        power()
        near = kernel + 1e-3 * np.random.RandomState(2).randn(*kernel.shape) * np.std(kernel)
        extreme_singular_values(kernel, size)  # traces
        norm, _ = timed(lambda k=kernel: spectral_norm(k, size), rounds)
        plain, (estimate, products) = timed(power, rounds)
        both, found = timed(lambda k=kernel: extreme_singular_values(k, size), rounds)
        again, _ = timed(lambda k=near, f=found: extreme_singular_values(k, size, start=f), rounds)
        table.add_row(
            name,
            f"{norm:.2f}",
            f"{found.sigma_max:.6f} + {found.sigma_max_error:.6f}",
            f"{plain:.2f} ({products})",
            f"{estimate:.6f}",
            f"{both:.2f}",
            f"{found.sigma_min:.5f} − {found.sigma_min_error:.5f}",
            f"{again:.2f}",
        )
    return table


def images_table(quick):
    """σmax of large images, where the peak of the symbol bounds it."""
    table = Table(title="σmax on large images, 3×3 kernels: seconds, with tracing")
    for name in ("image", "channels", "σmax", "its error / σmax", "plain power", "what it misses"):
        table.add_column(name, justify="right")
    for size, channels in IMAGES[: 1 if quick else None]:
        kernel = random_kernel(channels, channels)
        finder = ExtremesFinder(Convolution(kernel.shape, size), 1e-4, sigma_min=False)
        seconds, found = timed(lambda f=finder, k=kernel: f(k))
        plain, (estimate, products) = timed(power_iteration(kernel, size))
        missed = max(found.sigma_max - estimate, 0.0) / found.sigma_max
        error = found.sigma_max_error / found.sigma_max
        table.add_row(
            f"{size}×{size}",
            str(channels),
            f"{seconds:.2f}",
            f"{error:.0e}",
            f"{plain:.2f} ({products})",
            f"{missed:.0e}",
        )
    return table


def model_table(quick):
    """A report on all kernels of a ResNet-18."""
    table = Table(title="ResNet-18 at 32×32, 21 kernels: seconds, with tracing")
    for name in ("σmax", "σmax and σmin", "again, after a change of 0.1 %"):
        table.add_column(name, justify="right")
    if quick:
        return table
    keras.utils.set_random_seed(1)
    model = resnet18()
    high, _ = timed(lambda: model_spectrum(model, sigma_min=False))
    both, rows = timed(lambda: model_spectrum(model))
    for weight in model.trainable_weights:
        weight.assign(weight + 1e-3 * tf.math.reduce_std(weight) * tf.random.normal(weight.shape))
    again, _ = timed(lambda: model_spectrum(model, start=rows))
    table.add_row(f"{high:.1f}", f"{both:.1f}", f"{again:.1f}")
    return table


def print_peak_memory():
    """Prints the MB that σmax and σmin of the large layer need, beyond those of a tiny one."""

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024

    size, channels = LARGE
    extreme_singular_values(random_kernel(16, 16), size)
    before = peak()
    extreme_singular_values(random_kernel(channels, channels), size)
    print(peak() - before, peak())


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small layers, one round")
    parser.add_argument("--peak-memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        print_peak_memory()
        return
    console = Console(width=140)
    for table in (dense_table, extremes_table, images_table, model_table):
        console.print(table(options.quick))
    command = [sys.executable, __file__, "--peak-memory"]
    used, whole = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    console.print(
        f"σmax and σmin of 3×3×{LARGE[1]}×{LARGE[1]} at {LARGE[0]}×{LARGE[0]}: {float(used):.0f} MB above "
        f"those of a small layer, {float(whole):.0f} MB the whole process"
    )


if __name__ == "__main__":
    main()
