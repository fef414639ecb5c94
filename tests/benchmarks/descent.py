"""What the untuned descent saves: exact conjugate steps against the paper's λ, and a large layer.

    pip install . && python tests/benchmarks/descent.py

The two are run in turn, over and over in one process, and the medians are shown: on a noisy machine compare
within a row. Tracing is left out, the looks at σ are not. `--quick` takes one round.
"""

import argparse
import os
import time
from functools import partial

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from tf_frobreg import regularize_kernel

SHAPES = [(3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3)]


def timed(function):
    """(seconds, what the function returns)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main():
    """Prints the two tables."""
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


if __name__ == "__main__":
    main()
