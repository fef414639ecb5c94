"""Studies from which starts Algorithm 3.1 brings all singular values to √α, and in how many steps.

    python examples/landscape.py --output-dir examples/results

The runs take about 20 minutes on one core; with --quick a minute. A study that was stopped continues. The
script prints tables and writes landscape.csv and landscape.png.

A start has converged if max(|σmax − √α|, |σmin − √α|) of the true matrix M, measured after the run, is at
most 0.01. In every kind of layer here some kernel reaches √α. Each kind has 8 normal starts for α = 1 and 2
of each other sort. The starts:

    normal    a normal kernel, divided so that σ is about 1
    uniform   uniform on [0, 1), as in the paper's section 2; σmax is large
    He        HeNormal of Keras, float32
    Glorot    GlorotUniform of Keras, float32
    trained   Keras trains a layer of this kind for 2 epochs on 500 images of Fashion-MNIST, from He.
              The images are resized and reshaped to the input of the layer. float32

The methods:

    escaping   regularize_kernel with its defaults, up to 1,500 steps; all starts, α = 1 and 2
    plain      the same with escape=False
    L-BFGS     SciPy's L-BFGS-B on R − floor with its exact gradient, nothing to tune, about 1,500
               evaluations. It stops early only if σ has converged or no further decrease is found
    Lorth      K ← K − λ∇L on deel-lip's LorthRegularizer in float32, up to 2,000 steps. Lorth has no border:
               it runs only for 2-D convolutions with circular border and strides 1. Each kind gets the λ of
               five that converges from most starts. σ is measured every 20 steps

The last three run from the normal starts with α = 1, and all methods get the same kernels. A step of L-BFGS
is one evaluation of R and its gradient. The steps of the other methods each contain one.

Achour, Malgouyres and Mamalet (JMLR 2022, "Existence, stability and scalability of orthogonal convolutional
neural networks") prove that nearly every layer in use has an orthogonal kernel if its border is circular.
They minimize Lorth, and report that layers with filters = channels · strides² are hard to optimize. deel-lip
warns of them. Here, nine of ten starts from which the last three methods fail belong to such layers, with
every border.
"""

import functools
import importlib.util
import itertools
import math
import os
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # for the processes: each has one core

import keras
import numpy as np
import scipy.optimize
import tensorflow as tf
from fashion_mnist import load_data
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import run_all, study_files, study_parser, values

from tf_frobreg import Convolution, extreme_singular_values, penalty_excess, regularize_kernel

SEEDS = 8
TOLERANCE, ACCURACY = 0.01, 1e-4
MOST_STEPS = 1500
RATES, LORTH_STEPS, LORTH_LOOKS = (0.003, 0.01, 0.03, 0.1, 0.2), 2000, 20
WIDE = 5000  # kernels of more weights have at most two seeds
STARTS = ("normal", "uniform", "He", "Glorot", "trained")
METHODS = {"escaping": "C3", "plain": "0.45", "L-BFGS": "C0", "Lorth": "C2"}  # and their colours

# group: (shape of the kernel, input size, geometry) of each kind
GROUPS = {
    "as many filters as channels": [
        ((3, 3, 1, 1), 20, {}),
        ((3, 3, 1, 1), 5, {}),
        ((3, 3, 2, 2), 12, {}),
        ((5, 5, 2, 2), 12, {}),
        ((3, 3, 4, 4), 12, {}),
        ((3, 3, 4, 4), 4, {}),
        ((3, 3, 8, 8), 12, {}),
        ((3, 3, 16, 16), 16, {}),
        ((3, 3, 32, 32), 12, {}),
        ((3, 3, 64, 64), 12, {}),
        ((7, 7, 4, 4), 16, {}),
        ((5, 1, 4, 4), 12, {}),
        ((2, 2, 4, 4), 12, {}),
        ((4, 4, 2, 2), 12, {}),
        ((3, 3, 4, 4), 16, {"dilation_rate": 2}),
        ((1, 1, 8, 8), 12, {}),
    ],
    "more or fewer filters": [
        ((3, 3, 3, 1), 20, {}),
        ((3, 3, 3, 6), 20, {}),
        ((3, 3, 8, 9), 12, {}),
        ((3, 3, 16, 32), 12, {}),
    ],
    "circular border": [
        ((3, 3, 1, 1), 20, {"padding": "circular"}),
        ((3, 3, 4, 4), 12, {"padding": "circular"}),
        ((3, 3, 16, 16), 16, {"padding": "circular"}),
        ((3, 3, 4, 8), 12, {"padding": "circular"}),
        ((3, 3, 8, 4), 12, {"padding": "circular"}),
        ((3, 3, 4, 16), 12, {"padding": "circular", "strides": 2}),
    ],
    "valid border": [
        ((3, 3, 4, 4), 12, {"padding": "valid"}),
        ((3, 3, 16, 16), 16, {"padding": "valid"}),
        ((3, 3, 8, 4), 12, {"padding": "valid"}),
        ((2, 2, 4, 16), 16, {"padding": "valid", "strides": 2}),
    ],
    "strides": [
        ((3, 3, 4, 8), 16, {"strides": 2}),
        ((3, 3, 4, 16), 16, {"strides": 2}),
        ((3, 3, 4, 8), 12, {"strides": (2, 1)}),
        ((7, 7, 3, 16), 20, {"strides": 2}),
    ],
    "groups and depthwise": [
        ((3, 3, 2, 8), 12, {"groups": 4}),
        ((3, 3, 4, 8), 12, {"groups": 2}),
        ((3, 3, 8, 1), 16, {"kind": "depthwise"}),
        ((5, 5, 4, 1), 16, {"kind": "depthwise"}),
        ((3, 3, 4, 2), 16, {"kind": "depthwise"}),
        ((3, 3, 8, 1), 16, {"kind": "depthwise", "strides": 2}),
        ((3, 3, 8, 1), 12, {"kind": "depthwise", "padding": "circular"}),
    ],
    "transposed": [
        ((3, 3, 4, 4), 12, {"kind": "transpose"}),
        ((3, 3, 4, 8), 8, {"kind": "transpose", "strides": 2}),
        ((4, 4, 4, 16), 8, {"kind": "transpose", "strides": 2}),
    ],
    "other ranks": [
        ((5, 4, 4), 32, {}),
        ((3, 8, 8), 16, {}),
        ((4, 4, 8), 32, {"strides": 2}),
        ((5, 8, 1), 32, {"kind": "depthwise"}),
        ((3, 3, 3, 2, 2), 8, {}),
        ((3, 3, 3, 1, 8), 6, {"strides": 2}),
        ((16, 16), (), {}),
    ],
}


def name_of(shape, size, geometry):
    """Returns the name of a kind, such as "3×3×4×16 at 12, circular, strides 2"."""
    rank = len(shape) - 2
    words = {
        "kind": "{}",
        "groups": "{} groups",
        "padding": "{}",
        "strides": "strides {}",
        "dilation_rate": "dilation {}",
    }
    parts = ["×".join(map(str, shape)) + (f" at {size}" if rank else ", Dense")]
    parts += [words[key].format(geometry[key]) for key in words if key in geometry]
    return ", ".join(parts).replace("transpose", "transposed")


KINDS = {name_of(*kind): kind for kinds in GROUPS.values() for kind in kinds}
QUICK = ("3×3×1×1 at 20", "3×3×4×4 at 12", "3×3×4×4 at 12, circular", "3×3×8×1 at 16, depthwise")


def start_kernel(data_dir, name, start, seed):
    """Returns the kernel that a run begins with."""
    shape, *_ = KINDS[name]
    random = np.random.RandomState(seed)
    if start == "normal":
        return random.randn(*shape) / math.sqrt(math.prod(shape[:-2]) * max(shape[-2:]))
    if start == "uniform":
        return random.random_sample(shape)
    if start == "trained":
        return trained_kernel(data_dir, name, seed)
    initializer = {"He": keras.initializers.HeNormal, "Glorot": keras.initializers.GlorotUniform}[start]
    return np.asarray(initializer(seed)(shape, "float32"))


@functools.lru_cache(maxsize=8)  # for the other α
def trained_kernel(data_dir, name, seed, images=500, epochs=2):
    """Trains a layer, ReLU and a Dense head, and returns the kernel of the layer."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    layer = layer_of(name)
    (x, y), _ = load_data(data_dir)
    chosen = np.random.RandomState(seed).permutation(len(x))[:images]
    x = as_input(x[chosen] / np.float32(255), name)
    model = keras.Sequential(
        [keras.Input(x.shape[1:]), layer, keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, jit_compile=False)
    model.fit(x, y[chosen], batch_size=25, epochs=epochs, verbose=0)
    return np.asarray(layer.weights[0])


def layer_of(name):
    """Returns the Keras layer of a kind. With a circular border it expects images that are wrapped before."""
    shape, _, geometry = KINDS[name]
    *kernel_size, before_last, last = shape
    options = {key: value for key, value in geometry.items() if key not in ("kind", "padding")}
    options |= {"use_bias": False, "kernel_initializer": "he_normal"}
    if not kernel_size:
        return keras.layers.Dense(last, **options)
    padding = geometry.get("padding", "same")
    options |= {"kernel_size": kernel_size, "padding": "valid" if padding == "circular" else padding}
    rank, kind = f"{len(kernel_size)}D", geometry.get("kind", "conv")
    if kind == "depthwise":
        options["depthwise_initializer"] = options.pop("kernel_initializer")
        return getattr(keras.layers, f"DepthwiseConv{rank}")(depth_multiplier=last, **options)
    if kind == "transpose":
        return getattr(keras.layers, f"Conv{rank}Transpose")(before_last, **options)
    return getattr(keras.layers, f"Conv{rank}")(last, **options)


def as_input(images, name):
    """Returns images as the input of a layer: the first axis is kept, all others come from the columns."""
    shape, size, geometry = KINDS[name]
    *spatial, channels = Convolution(shape, size, **geometry).input_shape
    rows = spatial[0] if spatial else 1
    columns = math.prod(spatial[1:]) * channels
    x = tf.image.resize(images[..., None], (rows, columns), antialias=True).numpy()
    x = x.reshape(-1, *spatial, channels)
    if geometry.get("padding") == "circular":
        beyond = [kernel - 1 for kernel in shape[:-2]]
        widths = [(0, 0), *((one // 2, one - one // 2) for one in beyond), (0, 0)]
        x = np.pad(x, widths, mode="wrap")
    return x


def distance(kernel, name, alpha=1.0):
    """Returns max(|σmax − √α|, |σmin − √α|)."""
    _, size, geometry = KINDS[name]
    sigma = extreme_singular_values(kernel, size, accuracy=ACCURACY, **geometry)
    return max(abs(sigma.sigma_max - alpha**0.5), abs(sigma.sigma_min - alpha**0.5))


def descend(kernel, name, alpha, escape):
    """Runs Algorithm 3.1. Returns (kernel, steps, escapes)."""
    _, size, geometry = KINDS[name]
    options = {"alpha": alpha, "max_steps": MOST_STEPS, "escape": escape}
    result = regularize_kernel(kernel, size, **options, **geometry)
    return result.kernel, result.num_steps, result.escapes


def lbfgs(kernel, name):
    """Runs SciPy's L-BFGS-B. Returns (kernel, evaluations, ())."""
    shape, size, geometry = KINDS[name]
    evaluate = value_and_gradient(name)
    steps, excess = 0, math.inf
    # Above this R − floor, no kernel has converged.
    due = min(Convolution(shape, size, **geometry).shape) * ((1 + TOLERANCE) ** 2 - 1) ** 2

    def function(flat):
        nonlocal steps, excess
        value, gradient = evaluate(tf.constant(flat))
        steps, excess = steps + 1, float(value)
        return excess, gradient.numpy()

    def callback(flat):
        nonlocal due
        if excess <= due:
            due = 0.9 * excess
            if distance(flat.reshape(shape), name) <= TOLERANCE:
                raise StopIteration

    options = {"maxiter": MOST_STEPS, "maxfun": MOST_STEPS, "ftol": 0.0, "gtol": 0.0}
    found = scipy.optimize.minimize(
        function, kernel.ravel(), jac=True, method="L-BFGS-B", callback=callback, options=options
    )
    return found.x.reshape(shape), steps, ()


@functools.lru_cache(maxsize=4)
def value_and_gradient(name):
    """Returns a compiled function from a flat kernel to R − floor and its gradient."""
    shape, size, geometry = KINDS[name]

    @tf.function(autograph=False)
    def evaluate(flat):
        with tf.GradientTape() as tape:
            tape.watch(flat)
            value = penalty_excess(tf.reshape(flat, shape), size, **geometry)
        return value, tape.gradient(value, flat)

    return evaluate


def lorth(kernel, name, rate):
    """Runs gradient descent on deel-lip's Lorth. Returns (kernel, steps, ())."""
    descend_lorth = lorth_steps(kernel.shape)
    found, steps = tf.constant(kernel, tf.float32), 0
    while steps < LORTH_STEPS:
        following = descend_lorth(found, tf.constant(rate))
        if not np.isfinite(following).all() or np.abs(following).max() > 1e3:
            break
        found, steps = following, steps + LORTH_LOOKS
        if distance(found, name) <= TOLERANCE:
            break
    return found.numpy(), steps, ()


@functools.lru_cache(maxsize=4)
def lorth_steps(shape):
    """Returns a compiled function from a kernel and λ to the kernel some steps later."""
    from deel.lip.regularizers import LorthRegularizer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LorthRegularizer: warning configuration")
        penalty = LorthRegularizer(kernel_shape=shape)

    @tf.function(autograph=False)
    def steps(kernel, rate):
        for _ in range(LORTH_LOOKS):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                value = penalty(kernel)
            kernel = kernel - rate * tape.gradient(value, kernel)
        return kernel

    return steps


def run(data_dir, kind, method, start, alpha, rate, seed):
    """Runs one method from one start. The seconds include tracing, which is done once per kind."""
    kernel = start_kernel(data_dir, kind, start, seed)
    began = time.perf_counter()
    if method == "L-BFGS":
        found, steps, escapes = lbfgs(kernel, kind)
    elif method == "Lorth":
        found, steps, escapes = lorth(kernel, kind, rate)
    else:
        found, steps, escapes = descend(kernel, kind, alpha, escape=method == "escaping")
    seconds = time.perf_counter() - began
    away = distance(found, kind, alpha)
    return {
        "converged": int(away <= TOLERANCE),
        "steps": steps,
        "escapes": len({escape.step for escape in escapes}),
        "t": max((escape.t for escape in escapes), default=0.0),
        "change": f"{np.linalg.norm(found - kernel) / np.linalg.norm(kernel):.4g}",
        "distance": f"{away:.4g}",
        "seconds": round(seconds, 2),
    }


def is_square(name):
    """Returns whether filters = channels · product of the strides, in each group."""
    shape, size, geometry = KINDS[name]
    channels = 1 if geometry.get("kind") == "depthwise" else shape[-2]
    return shape[-1] == channels * math.prod(Convolution(shape, size, **geometry).strides)


def has_lorth(name):
    """Returns whether Lorth is the penalty of this layer: circular border, strides 1, two dimensions."""
    shape, _, geometry = KINDS[name]
    return len(shape) == 4 and geometry == {"padding": "circular"}


def all_jobs(names, seeds):
    """Yields the runs. The starts of the comparison have all seeds, the others a quarter of them."""
    for name, start, alpha in itertools.product(names, STARTS, (1.0, 2.0)):
        compared = (start, alpha) == ("normal", 1.0)
        count = seeds if compared else math.ceil(seeds / 4)
        if math.prod(KINDS[name][0]) > WIDE:
            count = min(count, 2)
        for seed, method in itertools.product(range(1, count + 1), METHODS if compared else ["escaping"]):
            job = {"kind": name, "method": method, "start": start, "alpha": alpha}
            yield from (job | {"rate": rate, "seed": seed} for rate in rates_of(name, method))


def rates_of(name, method):
    """Returns the λ to try: only those of Lorth are chosen here."""
    if method == "Lorth":
        return RATES if has_lorth(name) else ()
    return ("",)


def best_rate(rows, name):
    """Returns the λ of Lorth that converges from most starts, and in the fewest steps."""

    def rank(rate):
        own = {"kind": name, "method": "Lorth", "rate": rate}
        return values(rows, "converged", **own).sum(), -values(rows, "steps", **own).sum()

    return max(RATES, key=rank)


def compared_rows(rows, name, method):
    """Returns the rows of one method from the normal starts with α = 1. Those of Lorth have its best λ."""
    rate = best_rate(rows, name) if method == "Lorth" else ""
    wanted = {"kind": name, "method": method, "start": "normal", "alpha": "1.0", "rate": str(rate)}
    return [row for row in rows if wanted.items() <= row.items()]


def groups_of(names):
    """Yields (group, its kinds among the names)."""
    for group, kinds in GROUPS.items():
        own = [name for name in (name_of(*kind) for kind in kinds) if name in names]
        if own:
            yield group, own


def escaping_table(rows, names):
    """Returns a table of all starts of the escaping descent, a row per kind."""
    found = Table(title="regularize_kernel from all starts, α = 1 and 2")
    found.add_column("kernel and input size", no_wrap=True)
    for column in (
        "starts",
        "converged",
        "steps,\nmedian",
        "\nworst",
        "starts that\nescape",
        "escapes,\nmost",
        "largest\nt",
        "change,\nmedian",
    ):
        found.add_column(column, justify="right")

    def cells(**wanted):
        converged, steps, escapes, t, change = (
            values(rows, column, method="escaping", **wanted)
            for column in ("converged", "steps", "escapes", "t", "change")
        )
        return (
            f"{len(steps)}",
            f"{converged.mean():.0%}",
            f"{np.median(steps):.0f}",
            f"{steps.max():.0f}",
            f"{(escapes > 0).mean():.0%}",
            f"{escapes.max():.0f}",
            f"{t.max():g}",
            f"{np.median(change):.2f}",
        )

    for group, own in groups_of(names):
        found.add_section()
        found.add_row(f"[bold]{group}[/bold]")
        for name in own:
            found.add_row(f"  {name}", *cells(kind=name))
    for title, column, some in (("by start", "start", STARTS), ("by α", "alpha", (1.0, 2.0))):
        found.add_section()
        found.add_row(f"[bold]{title}[/bold]")
        for one in some:
            found.add_row(f"  {one}", *cells(**{column: one}))
    found.add_section()
    found.add_row("[bold]all[/bold]", *cells())
    return found


def comparison_table(rows, names, methods):
    """Returns a table of the methods from the same starts, a row per kind."""
    found = Table(
        title="Normal starts, α = 1: starts that converge, and their steps, median and worst",
        caption="Lorth with the best λ of each kind. As many outputs: filters = channels · strides²",
    )
    found.add_column("kernel and input size", no_wrap=True)
    for method in methods:
        found.add_column(method, justify="right")

    def cell(some):
        if not some:
            return ""
        steps = [int(row["steps"]) for row in some if row["converged"] == "1"]
        text = f"{len(steps)} of {len(some)}"
        return f"{text}: {np.median(steps):.0f}, {max(steps)}" if steps else text

    for group, own in groups_of(names):
        found.add_section()
        found.add_row(f"[bold]{group}[/bold]")
        for name in own:
            found.add_row(f"  {name}", *(cell(compared_rows(rows, name, method)) for method in methods))
    found.add_section()
    for title, some in {
        "as many outputs as inputs": [name for name in names if is_square(name)],
        "other kinds": [name for name in names if not is_square(name)],
        "all": names,
    }.items():
        total = [[row for name in some for row in compared_rows(rows, name, method)] for method in methods]
        found.add_row(f"[bold]{title}[/bold]", *(cell(part) for part in total))
    return found


def draw(rows, names, methods):
    """Draws the share of starts that converge and the steps that they need, a line per kind."""
    figure = Figure(figsize=(12.5, 1.6 + 0.25 * len(names)), layout="constrained")
    shares, needed = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
    places, place = {}, 0.0
    for number, (group, own) in enumerate(groups_of(names)):
        if number % 2:
            for axes in (shares, needed):
                axes.axhspan(place - 0.6, place + len(own) - 0.4, color="0.95", zorder=0)
        title = {"fontsize": 8, "style": "italic", "color": "0.35", "ha": "right", "va": "center"}
        needed.text(0.99, place, group, transform=needed.get_yaxis_transform(), **title)
        places |= {name: place + line for line, name in enumerate(own)}
        place += len(own) + 0.2
    for number, method in enumerate(methods):
        color = METHODS[method]
        style = {"color": color, "marker": "os^D"[list(METHODS).index(method)], "linestyle": ""}
        for name in names:
            some = compared_rows(rows, name, method)
            steps = [int(row["steps"]) for row in some if row["converged"] == "1"]
            at = places[name] + 0.17 * (number - (len(methods) - 1) / 2)
            if some:
                shares.plot(len(steps) / len(some), at, markersize=4.5, **style)
            if steps:
                needed.plot([np.median(steps), max(steps)], [at, at], color=color, linewidth=1.2)
                needed.plot(np.median(steps), at, markersize=4.5, **style)
                needed.plot(max(steps), at, "|", color=color, markersize=6)
            if method == "escaping":
                worst = values(rows, "steps", kind=name, method=method).max()
                needed.plot(worst, at, markersize=7, markerfacecolor="none", **style)
        shares.plot([], [], label=method, markersize=4.5, **style)
        if method == "escaping":
            label = "escaping, worst of all starts, α = 1 and 2"
            shares.plot([], [], label=label, markersize=7, markerfacecolor="none", **style)
    shares.set(xlim=(-0.04, 1.04), ylim=(place - 0.4, -0.8))
    shares.set_yticks(list(places.values()), list(places), fontsize=8)
    shares.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    shares.set_title("normal starts, α = 1: share that converges", fontsize="medium")
    needed.set_title("steps of those that converge: median to worst", fontsize="medium")
    needed.set(xscale="log", xlim=(3, 2600))
    ticks = [5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    needed.set_xticks(ticks, [str(tick) for tick in ticks])
    needed.minorticks_off()
    for axes in (shares, needed):
        axes.grid(axis="x", color="0.85")
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=len(methods) + 1)
    return figure


def main():
    """Runs the study, prints the tables and draws the figure."""
    options = study_parser(__doc__, seeds=SEEDS).parse_args()
    csv_file, figure_file = study_files(options, "landscape")
    console = Console(width=140)
    names, methods = list(KINDS), list(METHODS)
    if options.quick:
        names = [name for name in names if name in QUICK]
    if importlib.util.find_spec("deel") is None:
        methods.remove("Lorth")
        console.print('Lorth is left out: deel-lip is not installed (pip install "tf_frobreg[benchmark]").')
    jobs = [job for job in all_jobs(names, options.seeds) if job["method"] in methods]
    rows = run_all(run, jobs, csv_file, options, runs_per_process=100)
    draw(rows, names, methods).savefig(figure_file, dpi=110)
    console.print(escaping_table(rows, names), comparison_table(rows, names, methods))
    console.print(f"Wrote {csv_file} and {figure_file}")


if __name__ == "__main__":
    main()
