"""The paper's open question: how many iterations, and how much time, each method takes to bring σ near 1.

From random kernels, until max(|σmax − 1|, |σmin − 1|) of the true matrix M is at most 0.1, 0.05 and 0.01:

    frobenius     K ← K − λG on ‖MᵀM − I‖²_F, Algorithm 3.1
    2-norm        the same on ‖MᵀM − I‖₂ with two power steps an iteration, reference [7] of the paper
    reshaped      the same on ‖WᵀW − I‖²_F, W the h × (gkk) matrix, references [1, 3, 11, 17]
    clip [0, 1]   projection of the border-free operator, reference [12]; an iteration is one projection
    clip [1, 1]   the same, with the bound from below that [12] does not have
    steepest      regularize_kernel(direction="gradient"): exact steps along −G, nothing to tune
    conjugate     regularize_kernel(): exact steps along conjugate directions, nothing to tune
    l-bfgs        SciPy's L-BFGS-B on ‖MᵀM − I‖²_F, nothing to tune

The first three take the paper's steps: λ/100 ten times, λ/10 ten times, then λ (the paper's λ is 1e-3), each
with the λ of the grid that gets farthest, and there first, on this kernel. Where M has more columns than rows
the 2-norm leaves out the σ that are 0 for every kernel: with them it could not fall below 1.

    python examples/compare_methods.py --output-dir OUT

takes about 40 minutes on two cores (with --quick: one), prints the tables and writes compare_methods.csv and
compare_methods.png. Times leave out tracing and the looks at σ.
"""

import argparse
import csv
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.optimize
import tensorflow as tf
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tf_frobreg
from tf_frobreg import SpectralRegularizer, clip_singular_values, extreme_singular_values, penalty_excess

GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
TARGETS = (0.1, 0.05, 0.01)
PAPER = [((3, 3, 3, 1), 20), ((3, 3, 1, 3), 20), ((3, 3, 3, 6), 20), ((3, 3, 6, 3), 20)]
LARGE = ((3, 3, 16, 16), 32)
SHOWN = [((3, 3, 3, 6), 20), LARGE]  # in the figure


def other_kernels(count=20):
    """Random shapes beyond the paper's: even and rectangular kernels, more or fewer filters than channels."""
    random = np.random.RandomState(0)
    return [
        ((*random.randint(1, 6, 2), *random.randint(1, 9, 2)), random.randint(6, 15)) for _ in range(count)
    ]


class Progress:
    """Looks at σ now and then, and at the clock, which stands still meanwhile."""

    def __init__(self, size, max_steps, looks):
        self.size, self.max_steps, self.looks, self.rows = size, max_steps, looks, []
        self.seconds, self.started = 0.0, time.perf_counter()

    def __call__(self, step, kernel, *_):
        """Takes the kernel after `step` iterations; tells whether there is nothing more to see."""
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
    """The paper's schedule, for any λ in place of its 1e-3."""
    return rate * (0.01 if step < 10 else 0.1 if step < 20 else 1.0)


def descend(penalty, progress, kernel, rate):
    """K ← K − λ·½∂P/∂K on any differentiable penalty P."""

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
    """Algorithm 3.1."""
    descend(lambda k: penalty_excess(k, progress.size), progress, kernel, rate)


def spectral(progress, kernel, rate):
    """The 2-norm, whose power steps go on from iteration to iteration."""
    descend(SpectralRegularizer(progress.size, factor=1.0, gram="smaller"), progress, kernel, rate)


def reshaped(progress, kernel, rate):
    """The kernel as a plain matrix."""
    descend(tf_frobreg.reshaped_penalty, progress, kernel, rate)


def clip(progress, kernel, low):
    """Repeated projections."""
    project = tf.function(
        lambda k: clip_singular_values(k, progress.size, low=low, high=1.0), autograph=False
    )
    project(kernel)
    progress.started, number = time.perf_counter(), 0
    while not progress(number, kernel):
        kernel, number = project(kernel), number + 1


def exact(progress, kernel, direction):
    """Algorithm 3.1 with exact steps."""
    run = partial(tf_frobreg.regularize_kernel, kernel, progress.size, direction=direction, tolerance=0.0)
    run(max_steps=1)
    progress.started = time.perf_counter()
    result = run(max_steps=progress.max_steps, callback=progress)
    if progress.rows[-1][0] < result.num_steps:  # it stalled between two looks
        progress.looks = {result.num_steps}
        progress(result.num_steps, result.kernel)


def lbfgs(progress, kernel):
    """SciPy's L-BFGS-B on the same penalty and gradient."""
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
    """(iteration, seconds) at which each target was first seen, None where it was not."""
    return [next(((row[0], row[1]) for row in rows if row[4] <= target), None) for target in TARGETS]


def rank(rows):
    """What makes one λ better than another: more targets, then fewer iterations, then the distance left."""
    found = [at[0] for at in reached(rows) if at]
    return (-len(found), found[-1] if found else 0, rows[-1][4])


def run(shape, size, seed, max_steps, looks):
    """The progress of each method from one random kernel: {method: (λ, rows)}."""
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
    """0, 1, 2, … thinning out so that each is at most `ratio` beyond the one before."""
    steps = [0]
    while steps[-1] < max_steps:
        steps.append(max(steps[-1] + 1, int(steps[-1] * ratio)))
    return set(steps)


def table(title, results):
    """One row per method: medians over the kernels where the target was reached, and their range."""
    found = Table(title=title)
    found.add_column("method")
    for name in (
        "best λ",
        *(f"≤ {t}: iterations" for t in TARGETS),
        "ms to ≤ 0.05",
        "ms each",
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
    """Median (lowest–highest), and in how many of the runs."""
    if not values:
        return "not reached"
    text = f"{np.median(values):.0f}"
    if max(values) > min(values):
        text += f" ({min(values)}–{max(values)})"
    return text if len(values) == count else f"{text} in {len(values)}/{count}"


def draw(results):
    """Progress against iterations and against time; one line per seed."""
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
    """Runs, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="for the table and the figure")
    parser.add_argument("--seeds", type=int, default=3, help="random kernels of each shape (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a few kernels and few steps, to see it work")
    parser.add_argument("--force", action="store_true", help="overwrite what is in the output directory")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    files = [options.output_dir / f"compare_methods.{suffix}" for suffix in ("csv", "png")]
    if any(path.exists() for path in files) and not options.force:
        parser.error(f"{files[0]} or {files[1].name} exists; --force overwrites them")
    options.output_dir.mkdir(parents=True, exist_ok=True)

    seeds = range(1, 1 + (1 if options.quick else options.seeds))
    steps = 60 if options.quick else 2000
    fine, coarse = look_steps(steps, 1.1), look_steps(steps // 8, 2.0)
    paper = PAPER[2:3] if options.quick else PAPER
    jobs = [("paper's kernels", *case, seed, steps, fine) for case in paper for seed in seeds]
    others = other_kernels(2 if options.quick else 20)
    jobs += [("other kernels", *case, 1, steps // 2, fine) for case in others]
    if not options.quick:
        jobs += [("3×3×16×16, 32×32", *LARGE, seed, steps // 8, coarse) for seed in seeds]
    results = {}
    for group, shape, size, *rest in track(jobs, console=Console(stderr=True)):
        results.setdefault(group, []).append((shape, size, rest[0], run(shape, size, *rest)))

    with files[0].open("w", newline="", encoding="utf-8") as file:
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
    draw({title: runs for title, runs in shown.items() if runs}).savefig(files[1], dpi=110)
    console = Console(width=150)
    for group, runs in results.items():
        console.print(table(f"{group}: {len(runs)} runs", [found for *_, found in runs]))
    console.print(f"Wrote {files[0]} and {files[1]}")


if __name__ == "__main__":
    main()
