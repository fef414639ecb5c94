"""What α does: the σ that a descent reaches for α from 0.25 to 4, and a signal's way through ReLU layers.

The first table takes random 3×3×3×6 kernels on 20×20 images to α. The second sends random images through ten
convolutions of 8 channels, regularized to α, with a ReLU behind each: a ReLU passes on half of a symmetric
signal's energy, and so α = 2 keeps it where α = 1 halves it at every layer.

    python examples/alpha_sweep.py --output-dir OUT      (about a minute on two cores)

prints both tables and writes alpha_sweep.csv and alpha_sweep.png.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tf_frobreg import regularize_kernel, singular_values

ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
DEPTH, CHANNELS, SIZE = 10, 8, 16


def reach(alpha, seed):
    """(σmax, mean σ, σmin, steps) of one random kernel after the descent."""
    result = regularize_kernel(np.random.RandomState(seed).randn(3, 3, 3, 6), 20, alpha=alpha)
    sigma = singular_values(result.kernel, 20)
    return sigma[0], sigma.mean(), sigma[-1], result.num_steps


def energies(alpha, seed):
    """Energy of a signal behind each ReLU, as a share of the input's."""
    random = np.random.RandomState(seed)
    signal = tf.constant(random.randn(32, SIZE, SIZE, CHANNELS))
    start, found = tf.reduce_mean(signal**2), [1.0]
    for _ in range(DEPTH):
        kernel = regularize_kernel(
            random.randn(3, 3, CHANNELS, CHANNELS), SIZE, alpha=alpha, max_steps=200, tolerance=0.0
        ).kernel
        signal = tf.nn.relu(tf.nn.conv2d(signal, kernel, 1, "SAME"))
        found.append((tf.reduce_mean(signal**2) / start).numpy())
    return found


def text(values, digits=3):
    """Mean ± standard deviation."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def geometric(values):
    """Geometric mean, and the factor that is one standard deviation of the logarithm."""
    return np.exp(np.log(values).mean(0)), np.exp(np.log(values).std(0))


def main():
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="for the table and the figure")
    parser.add_argument("--seeds", type=int, default=5, help="random kernels for each α (default: 5)")
    parser.add_argument("--force", action="store_true", help="overwrite what is in the output directory")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    files = [options.output_dir / f"alpha_sweep.{suffix}" for suffix in ("csv", "png")]
    if any(path.exists() for path in files) and not options.force:
        parser.error(f"{files[0]} or {files[1].name} exists; --force overwrites them")
    options.output_dir.mkdir(parents=True, exist_ok=True)

    seeds = range(1, options.seeds + 1)
    reached = {alpha: np.array([reach(alpha, seed) for seed in seeds]) for alpha in ALPHAS}
    passed = {alpha: np.array([energies(alpha, seed) for seed in seeds]) for alpha in ALPHAS}

    sigmas = Table(title=f"σ reached: 3×3×3×6, 20×20, {options.seeds} seeds")
    for name in ("α", "√α", "σmax", "mean σ", "σmin", "steps"):
        sigmas.add_column(name, justify="right")
    signals = Table(title=f"energy of a signal behind ReLU layers, {options.seeds} seeds")
    for name in ("α", "after 1", f"after {DEPTH}", "a layer"):
        signals.add_column(name, justify="right")
    for alpha in ALPHAS:
        high, mean, low, steps = reached[alpha].T
        sigmas.add_row(f"{alpha:g}", f"{alpha**0.5:.3f}", text(high), text(mean), text(low), text(steps, 0))
        share = passed[alpha]
        signals.add_row(
            f"{alpha:g}",
            text(share[:, 1]),
            "{:.3g} ×÷ {:.1f}".format(*geometric(share[:, -1])),
            text(share[:, -1] ** (1 / DEPTH)),
        )
    with files[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["alpha", "seed", "sigma_max", "sigma_mean", "sigma_min", "steps"])
        for alpha, rows in reached.items():
            writer.writerows([alpha, seed, *row] for seed, row in zip(seeds, rows, strict=True))
        writer.writerow([])
        writer.writerow(["alpha", "seed", *(f"energy_after_{layer}" for layer in range(DEPTH + 1))])
        for alpha, rows in passed.items():
            writer.writerows([alpha, seed, *row] for seed, row in zip(seeds, rows, strict=True))

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for column, name in ((0, "σmax"), (1, "mean σ"), (2, "σmin")):
        values = np.array([reached[alpha][:, column] / alpha**0.5 for alpha in ALPHAS])
        left.errorbar(ALPHAS, values.mean(1), values.std(1), fmt="o", capsize=3, label=name)
    left.axhline(1, color="0.6", zorder=0)
    left.set(xscale="log", xlabel="α", ylabel="σ reached, divided by √α")
    left.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
    left.minorticks_off()
    left.legend()
    for alpha in ALPHAS:
        mean, factor = geometric(passed[alpha])
        bars = [mean - mean / factor, mean * factor - mean]
        right.errorbar(range(DEPTH + 1), mean, bars, capsize=2, label=f"α = {alpha:g}")
    right.set(yscale="log", xlabel="ReLU layers", ylabel="energy, as a share of the input's")
    right.legend()
    figure.savefig(files[1], dpi=110)
    console = Console(width=110)
    console.print(sigmas, signals, f"Wrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    main()
