"""Compares how many iterations, and how much time, each method needs to move σ close to 1.

    python examples/compare_methods.py --output-dir OUT   (40 minutes on two cores; with --quick one minute)

The script prints one table per group of kernels and writes compare_methods.csv and compare_methods.png. It
starts from random kernels. A method reaches a target if max(|σmax − 1|, |σmin − 1|) of the true matrix M is
at most 0.1, 0.05 or 0.01. The methods:

    frobenius     K ← K − λG on ‖MᵀM − I‖²_F: Algorithm 3.1 of the paper
    2-norm        the same on ‖MᵀM − I‖₂, with two power steps per iteration: Guo and Ye, 2019
    reshaped      the same on ‖WᵀW − I‖²_F, W the kernel as an h × (gkk) matrix
    clip [0, 1]   the projection of the border-free operator, repeated: Sedghi, Gupta and Long, 2019
    clip [1, 1]   the same with a lower bound, which Sedghi, Gupta and Long do not have
    steepest      regularize_kernel(direction="gradient"): exact steps along −G, nothing to tune
    conjugate     regularize_kernel(): exact steps along conjugate directions, nothing to tune
    l-bfgs        SciPy's L-BFGS-B on ‖MᵀM − I‖²_F, nothing to tune

The first three use the paper's schedule: λ/100 for ten steps, λ/10 for ten steps, then λ. The paper's λ is
1e-3. Here each kernel gets the best λ of a grid: the one that reaches the most targets in the fewest steps.
If M has more columns than rows, some σ are 0 for every kernel. The 2-norm ignores them, because with them it
could not fall below 1. Times exclude tracing and the measurements of σ.
"""

import csv
import time
from functools import partial

import numpy as np
import scipy.optimize
import tensorflow as tf
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from table_and_figure import parse_options, table_parser

import tf_frobreg
from tf_frobreg import SpectralRegularizer, clip_singular_values, extreme_singular_values, penalty_excess

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TARGETS = (0.1, 0.05, 0.01)
PAPER = [((3, 3, 3, 1), 20), ((3, 3, 1, 3), 20), ((3, 3, 3, 6), 20), ((3, 3, 6, 3), 20)]
LARGE = ((3, 3, 16, 16), 32)
SHOWN = [((3, 3, 3, 6), 20), LARGE]  # the kernels of the figure


def other_kernels(count=20):
    """Returns random shapes: even and rectangular kernels, more or fewer filters than channels."""
    random = np.random.RandomState(0)
    return [
        ((*random.randint(1, 6, 2), *random.randint(1, 9, 2)), random.randint(6, 15)) for _ in range(count)
    ]


class Progress:
    """Measures σ at the steps in `looks`, and the time of a method without these measurements."""

    def __init__(self, size, max_steps, looks):
        self.size, self.max_steps, self.looks, self.rows = size, max_steps, looks, []
        self.seconds, self.started = 0.0, time.perf_counter()

    def __call__(self, step, kernel, *_):
        """Records the kernel after `step` iterations. Returns whether the method should stop."""
        self.seconds += time.perf_counter() - self.started
        done = step >= self.max_steps
        if step in self.looks or done:
            kernel = np.asarray(kernel, dtype=np.float64)
            if not np.isfinite(kernel).all() or np.abs(kernel).max() > 1e3:
                done = True
            else:
                sigma = extreme_singular_values(kernel, self.size, accuracy=1e-4)
                distance = max(abs(sigma.sigma_max - 1), abs(sigma.sigma_min - 1))
                self.rows.append((step, self.seconds, *sigma[:2], distance))
                done = done or distance <= TARGETS[-1]
        self.started = time.perf_counter()
        return done


def ramp(step, rate):
    """Returns λ of the paper's schedule at a step, with `rate` in place of 1e-3."""
    return rate * (0.01 if step < 10 else 0.1 if step < 20 else 1.0)


def descend(penalty, progress, kernel, rate):
    """Runs K ← K − λ·½∂P/∂K on any differentiable penalty P."""

    @tf.function(autograph=False)
    def step(kernel, rate):
        with tf.GradientTape() as tape:
            tape.watch(kernel)
            value = penalty(kernel)
        return kernel - 0.5 * rate * tape.gradient(value, kernel)

    step(kernel, tf.constant(0.0, kernel.dtype))  # traces
    progress.started, number = time.perf_counter(), 0
    while not progress(number, kernel):
        kernel = step(kernel, tf.constant(ramp(number, rate), kernel.dtype))
        number += 1


def frobenius(progress, kernel, rate):
    """Runs Algorithm 3.1."""
    descend(lambda k: penalty_excess(k, progress.size), progress, kernel, rate)


def spectral(progress, kernel, rate):
    """Descends on the 2-norm. Its power iteration continues from one iteration to the next."""
    descend(SpectralRegularizer(progress.size, factor=1.0, gram="smaller"), progress, kernel, rate)


def reshaped(progress, kernel, rate):
    """Descends on the penalty of the reshaped kernel."""
    descend(tf_frobreg.reshaped_penalty, progress, kernel, rate)


def clip(progress, kernel, low):
    """Repeats the projection."""
    project = tf.function(
        lambda k: clip_singular_values(k, progress.size, low=low, high=1.0), autograph=False
    )
    project(kernel)
    progress.started, number = time.perf_counter(), 0
    while not progress(number, kernel):
        kernel, number = project(kernel), number + 1


def exact(progress, kernel, direction):
    """Runs Algorithm 3.1 with exact steps."""
    run = partial(tf_frobreg.regularize_kernel, kernel, progress.size, direction=direction, tolerance=0.0)
    run(max_steps=1)
    progress.started = time.perf_counter()
    result = run(max_steps=progress.max_steps, callback=progress)
    if progress.rows[-1][0] < result.num_steps:  # it stalled between two measurements
        progress.looks = {result.num_steps}
        progress(result.num_steps, result.kernel)


def lbfgs(progress, kernel):
    """Runs SciPy's L-BFGS-B on the Frobenius penalty and its gradient."""
    shape = kernel.shape

    @tf.function(autograph=False)
    def evaluate(flat):
        with tf.GradientTape() as tape:
            tape.watch(flat)
            value = penalty_excess(tf.reshape(flat, shape), progress.size)
        return value, tape.gradient(value, flat)

    def function(flat):
        value, slope = evaluate(tf.constant(flat))
        return value.numpy(), slope.numpy()

    steps = iter(range(1, progress.max_steps + 1))

    def callback(flat):
        if progress(next(steps), flat.reshape(shape)):
            raise StopIteration

    start = kernel.numpy().ravel()
    function(start)
    progress.started = time.perf_counter()
    if not progress(0, kernel):
        options = {"maxiter": progress.max_steps, "maxfun": 10**6, "ftol": 0.0, "gtol": 0.0}
        scipy.optimize.minimize(
            function, start, jac=True, method="L-BFGS-B", callback=callback, options=options
        )


METHODS = {
    "frobenius": [(rate, partial(frobenius, rate=rate)) for rate in GRID],
    "2-norm": [(rate, partial(spectral, rate=rate)) for rate in GRID],
    "reshaped": [(rate, partial(reshaped, rate=rate)) for rate in GRID],
    "clip [0, 1]": [(None, partial(clip, low=0.0))],
    "clip [1, 1]": [(None, partial(clip, low=1.0))],
    "steepest": [(None, partial(exact, direction="gradient"))],
    "conjugate": [(None, partial(exact, direction="conjugate"))],
    "l-bfgs": [(None, lbfgs)],
}


def reached(rows):
    """Returns (iteration, seconds) at which each target was first reached, or None."""
    return [next(((row[0], row[1]) for row in rows if row[4] <= target), None) for target in TARGETS]


def rank(rows):
    """Returns the key by which the best λ is chosen: most targets, fewest iterations, smallest distance."""
    found = [at[0] for at in reached(rows) if at]
    return (-len(found), found[-1] if found else 0, rows[-1][4])


def run(shape, size, seed, max_steps, looks):
    """Runs every method from one random kernel. Returns {method: (best λ, rows)}."""
    kernel = tf.constant(np.random.RandomState(seed).randn(*shape))
    found = {}
    for method, variants in METHODS.items():
        if method.startswith("clip") and size < max(shape[:2]):
            continue
        tried = []
        for rate, function in variants:
            progress = Progress(size, max_steps, looks)
            function(progress, kernel)
            tried.append((rate, progress.rows))
        found[method] = min(tried, key=lambda one: rank(one[1]))
    return found


def look_steps(max_steps, ratio):
    """Returns the steps 0, 1, 2, … at which σ is measured, each at most `ratio` times the one before."""
    steps = [0]
    while steps[-1] < max_steps:
        steps.append(max(steps[-1] + 1, int(steps[-1] * ratio)))
    return set(steps)


def table(title, results):
    """Returns a table of one row per method: medians and ranges over the kernels that reached a target."""
    found = Table(title=title)
    found.add_column("method")
    for name in (
        "best λ",
        *(f"≤ {t}: iterations" for t in TARGETS),
        "ms to ≤ 0.05",
        "ms per iteration",
        "σmax",
        "σmin",
    ):
        found.add_column(name, justify="right")
    for method in METHODS:
        runs = [result[method] for result in results if method in result]
        ends = [rows[-1] for _, rows in runs]
        times = [reached(rows) for _, rows in runs]
        rates = sorted({rate for rate, _ in runs if rate})
        cells = [spread([at[i][0] for at in times if at[i]], len(runs)) for i in range(len(TARGETS))]
        seconds = [1e3 * at[1][1] for at in times if at[1]]
        each = [1e3 * end[1] / end[0] for end in ends if end[0]]
        found.add_row(
            method,
            {0: "", 1: f"{rates[0]:g}" if rates else ""}.get(
                len(rates), f"{rates[0]:g} … {rates[-1]:g}" if rates else ""
            ),
            *cells,
            f"{np.median(seconds):.3g}" if seconds else "-",
            f"{np.median(each):.2g}",
            *(f"{np.median([end[i] for end in ends]):.3f}" for i in (2, 3)),
        )
    return found


def spread(values, count):
    """Returns median (lowest–highest), and how many of the runs these are if not all."""
    if not values:
        return "not reached"
    text = f"{np.median(values):.0f}"
    if max(values) > min(values):
        text += f" ({min(values)}–{max(values)})"
    return text if len(values) == count else f"{text} in {len(values)}/{count}"


def draw(results):
    """Draws the distance to 1 against iterations and against time, one line per method and seed."""
    figure = Figure(figsize=(11, 4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (title, runs), pair in zip(results.items(), panels, strict=True):
        for number, method in enumerate(METHODS):
            for one in runs:
                if method in one:
                    steps, seconds, _, _, distance = np.array(one[method][1]).T
                    for axes, x in zip(pair, (steps[1:], 1e3 * seconds[1:]), strict=True):
                        style = {"color": f"C{number}", "linewidth": 2.2 if method == "conjugate" else 1.2}
                        axes.plot(x, distance[1:], label=method if one is runs[0] else None, **style)
        for axes, label in zip(pair, ("iterations", "milliseconds"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=label, title=title)
            axes.set_ylabel("max(|σmax − 1|, |σmin − 1|)")
            for target in TARGETS:
                axes.axhline(target, color="0.8", linewidth=0.8, zorder=0)
    panels[0, 0].legend(fontsize=8)
    return figure


def main():
    """Runs the methods, prints the tables and writes the files."""
    parser = table_parser(__doc__, seeds=3, seeds_help="random kernels of each shape")
    parser.add_argument("--quick", action="store_true", help="few kernels and few steps, as a check")
    options, csv_file, figure_file = parse_options(parser, "compare_methods")
    seeds = range(1, 1 + (1 if options.quick else options.seeds))
    steps = 60 if options.quick else 2000
    fine, coarse = look_steps(steps, 2.0 if options.quick else 1.1), look_steps(steps // 8, 2.0)
    paper = PAPER[2:3] if options.quick else PAPER
    jobs = [("paper's kernels", *case, seed, steps, fine) for case in paper for seed in seeds]
    others = other_kernels(1 if options.quick else 20)
    jobs += [("other kernels", *case, 1, steps // 2, fine) for case in others]
    if not options.quick:
        jobs += [("3×3×16×16, 32×32", *LARGE, seed, steps // 8, coarse) for seed in seeds]
    results = {}
    for group, shape, size, *rest in track(jobs, console=Console(stderr=True)):
        results.setdefault(group, []).append((shape, size, rest[0], run(shape, size, *rest)))

    with csv_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        numbers = ("iteration", "seconds", "sigma_max", "sigma_min", "distance")
        writer.writerow(["group", "kernel", "image", "seed", "method", "best_rate", *numbers])
        for group, runs in results.items():
            for shape, size, seed, found in runs:
                for method, (rate, rows) in found.items():
                    for row in rows:
                        writer.writerow([group, "×".join(map(str, shape)), size, seed, method, rate, *row])
    shown = {
        f"{'×'.join(map(str, shape))}, image {size}×{size}": [
            found for runs in results.values() for *case, _, found in runs if case == [shape, size]
        ]
        for shape, size in SHOWN
    }
    draw({title: runs for title, runs in shown.items() if runs}).savefig(figure_file, dpi=110)
    console = Console(width=150)
    for group, runs in results.items():
        console.print(table(f"{group}: {len(runs)} runs", [found for *_, found in runs]))
    console.print(f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
