"""What the untuned descent saves: exact conjugate steps against the paper's λ, a large layer, an initializer.

    pip install . && python tests/benchmarks/descent.py

The two step rules run in turn, over and over in one process. The first table shows the medians. On a noisy
machine compare within a row. The first table leaves out tracing, and counts the measurements of σ. The last
table counts tracing too. `--quick` takes one round.
"""

import argparse
import os
import time
from functools import partial

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from tf_frobreg import FrobeniusInitializer, extreme_singular_values, regularize_kernel

SHAPES = [(3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3)]
INITIALIZED = [((3, 3, 64, 64), {}), ((3, 3, 512, 1), {"kind": "depthwise"})]


def timed(function):
    """(seconds, what the function returns)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main():
    """Prints the three tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round, 50 steps on the large layer")
    options = parser.parse_args()
    rounds = 1 if options.quick else 9

    table = Table(title="until σ is within 0.01 of 1, 20×20 image, seed 1")
    for name in ("kernel", "steps: paper", "exact", "ms: paper", "exact", "paper : exact"):
        table.add_column(name, justify="right")
    totals = np.zeros(2)
    for shape in SHAPES:
        kernel = np.random.RandomState(1).randn(*shape)
        rates = ("paper", "exact")
        for rate in rates:
            regularize_kernel(kernel, 20, learning_rate=rate, max_steps=1)  # traces
        runs = [
            [timed(partial(regularize_kernel, kernel, 20, learning_rate=rate)) for rate in rates]
            for _ in range(rounds)
        ]
        medians = 1e3 * np.median([[seconds for seconds, _ in run] for run in runs], axis=0)
        totals += medians
        steps = [str(result.num_steps) for _, result in runs[0]]
        ratio = f"{medians[0] / medians[1]:.1f}"
        table.add_row("×".join(map(str, shape)), *steps, *(f"{ms:.0f}" for ms in medians), ratio)
    table.add_row("all", "", "", *(f"{ms:.0f}" for ms in totals), f"{totals[0] / totals[1]:.1f}")
    console = Console()
    console.print(table)

    count = 50 if options.quick else 1000
    kernel = np.random.RandomState(1).randn(3, 3, 64, 64) / 24
    table = Table(title="3×3×64×64, 32×32 image")
    for name in ("steps", "seconds, with tracing", "R at first", "R at last"):
        table.add_column(name, justify="right")
    seconds, result = timed(partial(regularize_kernel, kernel, 32, tolerance=0.0, max_steps=count))
    first, last = result.history["penalty"][[0, -1]]
    table.add_row(str(result.num_steps), f"{seconds:.1f}", f"{first:.4g}", f"{last:.4g}")
    console.print(table)

    table = Table(title="FrobeniusInitializer, 32×32 image, float64")
    for name in ("kernel", "seconds: first", "other seed", "copy", "σmax", "σmin"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for shape, geometry in INITIALIZED:
        first, other = (FrobeniusInitializer(32, seed=seed, **geometry) for seed in (1, 2))
        times = [timed(partial(start, shape, "float64"))[0] for start in (first, other, first.clone())]
        ends = extreme_singular_values(first(shape, "float64"), 32, accuracy=1e-3, **geometry)
        title = f"{'×'.join(map(str, shape))} {geometry.get('kind', '')}"
        table.add_row(title, *(f"{s:.2f}" for s in times), f"{ends.sigma_max:.3f}", f"{ends.sigma_min:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
