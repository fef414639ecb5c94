"""What the closed form costs: value and gradient against the explicit matrix, deel-lip, and a training step.

    pip install ".[benchmark]" && python tests/benchmarks/closed_form.py

All columns of a row are measured in turn, over and over in one run, and the medians are shown: on a noisy
machine compare within a row, not between runs. `--quick` takes one round of each.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_frobreg import frobenius_penalty

# (N, k, g, h)
CASES = [
    (20, 3, 3, 6),
    (32, 3, 16, 16),
    (32, 3, 64, 64),
    (16, 3, 128, 128),
    (8, 3, 256, 256),
    (8, 3, 512, 512),
    (32, 5, 64, 64),
    (32, 7, 64, 64),
]
SIZES = [8, 32, 128, 512]
BATCH = 128
REPEATS = 4
EXPLICIT_LIMIT = 5000  # columns of M up to which its dense Gram matrix is worth waiting for


def random_kernel(k, g, h):
    """A float32 kernel of the size that Keras would start with."""
    scale = (k * k * (g + h) / 2) ** -0.5
    return tf.constant(np.random.RandomState(0).standard_normal((k, k, g, h)) * scale, tf.float32)


def with_gradient(function):
    """A function that also returns its gradient."""

    def call(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x)
        return value, tape.gradient(value, x)

    return call


def compiled(function, *arguments, jit=False):
    """The function traced, run once, and bound to its arguments."""
    traced = tf.function(function, jit_compile=jit, autograph=False)
    call = partial(traced, *arguments)
    call()
    return call


def lorth(kernel):
    """deel-lip's penalty of the border-free operator, α = 1, or None where it is not installed."""
    try:
        from deel.lip.regularizers import LorthRegularizer
    except ImportError:
        return None
    return compiled(with_gradient(LorthRegularizer(kernel_shape=tuple(kernel.shape))), kernel)


def training_step(size, kernel):
    """Forward and backward pass of the convolution alone, at batch 128."""
    images = tf.random.normal((BATCH, size, size, kernel.shape[2]))

    def step(images, kernel):
        with tf.GradientTape() as tape:
            tape.watch([images, kernel])
            loss = tf.reduce_sum(tf.nn.conv2d(images, kernel, 1, "SAME") ** 2)
        return tape.gradient(loss, [images, kernel])

    return compiled(step, images, kernel)


def two_products(k, g, h):
    """The matrix products that bound the closed form: (k²g × h)(h × k²g) and (k²g × k²g)(k²g × h)."""
    flat, square = tf.random.normal((k * k * g, h)), tf.random.normal((k * k * g, k * k * g))
    return compiled(lambda a, b: (tf.matmul(a, a, transpose_b=True), tf.matmul(b, a)), flat, square)


def medians(calls, seconds, quick):
    """Median time of each call in ms, all of them in turn until the time is up."""
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while not times[next(iter(calls))] or (not quick and time.perf_counter() < end):
        for name, call in calls.items():
            call()  # not counted: the caches still belong to the call before
            for _ in range(REPEATS):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in times.items()}


def peak_memory(size, k, g, h):
    """MB above the kernel's own that value and gradient need, in a process of their own."""
    command = [sys.executable, str(Path(__file__)), "--peak-memory", *map(str, (size, k, g, h))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak_memory(size, k, g, h):
    """Prints what the process grew by beyond a penalty of a tiny kernel."""

    def measure(kernel):
        compiled(with_gradient(lambda x: frobenius_penalty(x, size)), kernel)
        status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak in
        return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024

    kernel = random_kernel(k, g, h)
    small = measure(random_kernel(k, 1, 1))
    print(measure(kernel) - small)


def main():
    """Prints the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20, help="per row (default: 20)")
    parser.add_argument("--quick", action="store_true", help="one repeat of each, to see it run")
    parser.add_argument("--largest", type=int, default=512, help="leave out more channels (default: 512)")
    parser.add_argument("--peak-memory", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_memory:
        print_peak_memory(*options.peak_memory)
        return
    tf.get_logger().setLevel("ERROR")  # many small traced functions are what is wanted here
    warnings.filterwarnings("ignore", "LorthRegularizer: warning configuration")
    console = Console(width=124)
    table = Table(title=f"Value and gradient, ms (median); float32, {os.cpu_count()} cores")
    table.add_column("kernel, image", no_wrap=True)
    for column in (
        "closed\nform",
        "its\nXLA",
        "sparse\nM",
        "deel-\nlip",
        "2 pro-\nducts",
        f"step at\n{BATCH}",
        "sparse:\nclosed",
        "deel-lip:\nclosed",
        "closed:\n2 prod.",
        "closed:\nstep",
        "peak\nMB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for size, k, g, h in CASES:
        if max(g, h) > options.largest:
            continue
        kernel = random_kernel(k, g, h)
        closed = with_gradient(lambda x, size=size: frobenius_penalty(x, size))
        calls = {
            "closed": compiled(closed, kernel),
            "xla": compiled(closed, kernel, jit=True),
            "products": two_products(k, g, h),
            "step": training_step(size, kernel),
            "lorth": lorth(kernel),
        }
        if size * size * min(g, h) <= EXPLICIT_LIMIT:
            explicit = with_gradient(lambda x, size=size: frobenius_penalty(x, size, method="sparse"))
            calls["explicit"] = compiled(explicit, kernel)
        found = medians({n: c for n, c in calls.items() if c is not None}, options.seconds, options.quick)
        table.add_row(
            f"{k}×{k}×{g}×{h}, {size}",
            *(f"{found[n]:.3g}" if n in found else "-" for n in ("closed", "xla", "explicit", "lorth")),
            *(f"{found[n]:.3g}" for n in ("products", "step")),
            f"{found['explicit'] / found['closed']:.0f}" if "explicit" in found else "-",
            f"{found['lorth'] / found['closed']:.1f}" if "lorth" in found else "-",
            f"{found['closed'] / found['products']:.2f}",
            f"{found['closed'] / found['step']:.1%}",
            f"{peak_memory(size, k, g, h):.0f}",
        )
    console.print(table)

    kernel = random_kernel(3, 64, 64)
    calls = {n: compiled(with_gradient(lambda x, n=n: frobenius_penalty(x, n)), kernel) for n in SIZES}
    found = medians(calls, options.seconds, options.quick)
    table = Table(title="3×3×64×64 on images of any size")
    for column in ("image", "ms", "ratio"):
        table.add_column(column, justify="right")
    for n in SIZES:
        table.add_row(f"{n}×{n}", f"{found[n]:.3g}", f"{found[n] / found[SIZES[0]]:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
