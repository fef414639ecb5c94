"""Shows the effect of α on the singular values and on a signal that passes through ReLU layers.

    python examples/alpha_sweep.py --output-dir OUT      (about a minute on two cores)

The script prints two tables for α from 0.25 to 4 and writes alpha_sweep.csv and alpha_sweep.png.

The first table shows the σ that a descent reaches from random 3×3×3×6 kernels on 20×20 images. The second
table shows the energy of random images after ten convolutions of 8 channels, each regularized to α and
followed by a ReLU. A ReLU halves the energy of a symmetric signal, so α = 2 keeps the energy and α = 1 halves
it in every layer.
"""

import csv

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from table_and_figure import parse_options, table_parser

from tf_frobreg import regularize_kernel, singular_values

ALPHAS = (0.25, 0.5, 1.0, 2.0, 4.0)
DEPTH, CHANNELS, SIZE = 10, 8, 16


def reach(alpha, seed):
    """Returns (σmax, mean σ, σmin, steps) of one random kernel after the descent."""
    result = regularize_kernel(np.random.RandomState(seed).randn(3, 3, 3, 6), 20, alpha=alpha)
    sigma = singular_values(result.kernel, 20)
    return sigma[0], sigma.mean(), sigma[-1], result.num_steps


def energies(alpha, seed):
    """Returns the energy of a signal after each ReLU, divided by the energy of the input."""
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
    """Returns mean ± standard deviation as text."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def geometric(values):
    """Returns the geometric mean, and the standard deviation of the logarithm as a factor."""
    return np.exp(np.log(values).mean(0)), np.exp(np.log(values).std(0))


def main():
    """Runs the descents, prints the tables and writes the files."""
    parser = table_parser(__doc__, seeds=5, seeds_help="random kernels for each α")
    options, csv_file, figure_file = parse_options(parser, "alpha_sweep")
    seeds = range(1, options.seeds + 1)
    reached = {alpha: np.array([reach(alpha, seed) for seed in seeds]) for alpha in ALPHAS}
    passed = {alpha: np.array([energies(alpha, seed) for seed in seeds]) for alpha in ALPHAS}

    sigmas = Table(title=f"Singular values reached: 3×3×3×6, 20×20, {options.seeds} seeds")
    for name in ("α", "√α", "σmax", "mean σ", "σmin", "steps"):
        sigmas.add_column(name, justify="right")
    signals = Table(title=f"Energy of a signal after ReLU layers, {options.seeds} seeds")
    for name in ("α", "after 1", f"after {DEPTH}", "per layer"):
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
    with csv_file.open("w", newline="", encoding="utf-8") as file:
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
    right.set(yscale="log", xlabel="ReLU layers", ylabel="energy divided by the input's energy")
    right.legend()
    figure.savefig(figure_file, dpi=110)
    console = Console(width=110)
    console.print(sigmas, signals, f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
