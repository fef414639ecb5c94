"""What penalties on every kernel add to a training step of well-known networks, and what watching σ adds.

    pip install . && python tests/benchmarks/overhead.py

The networks are those of `keras.applications` with random weights, random images and labels, and SGD. Every
kernel is regularized. The compared models are: without penalties ("plain"), with the penalties at every step,
and with `LazyPenalty(every=n)`. `KERAS_BACKEND` chooses the backend. JAX always compiles, and has no graph
whose operations could be counted.

- A step: one process holds the three models and runs their steps in turn. The medians are shown. On a noisy
  machine compare within a row. "± %" is the median deviation of the plain step from its median.
- Every n: computed from two medians of the lazy model, (step with penalties + (n − 1) · step without) / n.
  `--fit` compares this with `model.fit` on 32 batches: `--fit --networks MobileNetV2 --size 96`.
- Beyond 1.1/n: what every n adds to the plain step, less 1.1/n of what penalties at every step add.
- First step: the first two steps less two ordinary ones, each model in a process of its own. They contain
  tracing and compilation. `LazyPenalty` has a function with penalties, and one without in the second step.
- Memory: the peak of the accelerator, or of the whole process with its libraries, after these steps.
- Nodes: the operations in the graph of the training step and in the functions that it calls. `LazyPenalty`
  has two graphs.

The last table is of a ResNet-18 for 32×32 images under TensorFlow: an epoch of 50,000 images is computed from
a step of 128. `SingularValueMonitor` measures before training, where it has no vectors to start from, and
after a step.
"""

import argparse
import csv
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from tf_frobreg import LazyPenalty, SingularValueMonitor, attach_regularizers
from tf_frobreg.keras.shared_weight import find_penalties, share_weight

NETWORKS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121")
SMALLEST = "MobileNetV2"  # XLA compiles for minutes on a CPU
POLICIES = {"float32": "float32", "mixed": "mixed_bfloat16"}
KINDS = ("plain", "every step", "every n")
EVERY = (4, 16)
PENALISED = {"every\nstep": "every step"} | {f"every\n{every}": f"every {every}" for every in EVERY}
FIT_BATCHES = 32
MB = 2**20


class Case(NamedTuple):
    """A row of the tables."""

    network: str
    batch: int
    jit: bool
    size: int
    precision: str
    rounds: int


def in_own_process(function, *arguments):
    """What the function returns in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def build(case, kind):
    """The compiled network, the same each time, and the report of its penalties."""
    if keras.config.backend() != "tensorflow":
        tf.config.set_visible_devices([], "GPU")  # TensorFlow would take all its memory
    keras.mixed_precision.set_dtype_policy(POLICIES[case.precision])
    keras.utils.set_random_seed(1)
    make = getattr(keras.applications, case.network)
    model = make(weights=None, input_shape=(case.size, case.size, 3), classes=10)
    report = None if kind == "plain" else attach_regularizers(model, factor=1e-4, reduction="mean")
    loss = keras.losses.SparseCategoricalCrossentropy()
    model.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=case.jit)
    return model, report


def data(case, batches=1):
    """Random images and labels."""
    random = np.random.RandomState(0)
    count = batches * case.batch
    return random.rand(count, case.size, case.size, 3).astype("float32"), random.randint(10, size=count)


def training_step(model, kind, x, y):
    """A function that trains a step and returns its seconds. "every n" has penalties at every third one."""
    lazy = LazyPenalty(every=3) if kind == "every n" else None
    if lazy is not None:
        lazy.set_model(model)
        model.make_train_function()
        lazy.on_train_begin()

    def step():
        start = time.perf_counter()
        if lazy is not None:
            lazy.on_train_batch_begin(0)
        float(model.train_on_batch(x, y))
        return time.perf_counter() - start

    return step


def steps_in_turn(case):
    """Seconds of the steps by name. Steps with penalties slow the next step down, whichever it is."""
    x, y = map(keras.ops.convert_to_tensor, data(case))
    plain, always, lazy = (training_step(build(case, kind)[0], kind, x, y) for kind in KINDS)
    order = (
        {"with": lazy, "without": lazy, "plain": plain},
        {"without": lazy, "every step": always, "plain": plain},
    )
    seconds = {name: [] for part in order for name in part}
    for number in range(1 + case.rounds):
        for part in order:
            for name, step in part.items():
                found = step()
                if number > 0:  # the first round compiles
                    seconds[name].append(found)
    return seconds


def first_step(case, kind, count):
    """Seconds of the first steps beyond ordinary ones, peak memory and, if `count`, number of operations."""
    model, report = build(case, kind)
    x, y = map(keras.ops.convert_to_tensor, data(case))
    step = training_step(model, kind, x, y)
    first, second, *later = (step() for _ in range(8 if case.rounds > 3 else 5))
    first += second - min(later[1::3]) - min(later[::3])  # with and without penalties, if lazy
    device, peak = device_and_peak_memory()
    found = {"device": device, f"first {kind}": first, f"MB {kind}": peak}
    if count and keras.config.backend() == "tensorflow":
        found[f"operations {kind}"] = count_operations(model, kind, x, y)
    if report is not None:
        found |= {"kernels": len(report.attached), "left out": len(report.left_out)}
    return found


def device_and_peak_memory():
    """The name of the device, and the peak of its memory in MB."""
    backend = keras.config.backend()
    if backend == "tensorflow" and (devices := tf.config.list_physical_devices("GPU")):
        name = tf.config.experimental.get_device_details(devices[0])["device_name"]
        return name, tf.config.experimental.get_memory_info("GPU:0")["peak"] / MB
    if backend == "jax":
        import jax

        device = jax.local_devices()[0]
        if statistics := device.memory_stats():
            return device.device_kind, statistics["peak_bytes_in_use"] / MB
    if backend == "torch":
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / MB
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent's peak in
    return f"{os.cpu_count()} CPU cores", int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def count_operations(model, kind, x, y):
    """Operations of the graphs of a training step, with those of the functions that they call."""
    contexts = [nullcontext()]
    if kind == "every n":
        weight = share_weight(model, find_penalties(model, kind))
        contexts = [weight.in_step(2.0), weight.in_step(0.0)]
    count = 0
    for context in contexts:
        step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
        with context:
            graph = step.get_concrete_function(x, y).graph
        functions = graph.as_graph_def().library.function
        count += len(graph.get_operations()) + sum(len(function.node_def) for function in functions)
    return count


def fit_seconds(case):
    """Seconds of a batch in `fit`: plain, every step, and with `LazyPenalty`."""
    x, y = data(case, FIT_BATCHES)
    models = [build(case, kind)[0] for kind in KINDS]
    fits = [(models[0], None), (models[1], None), *((models[2], every) for every in EVERY)]

    def seconds(model, every):
        callbacks = [] if every is None else [LazyPenalty(every)]
        start = time.perf_counter()
        model.fit(x, y, batch_size=case.batch, verbose=0, callbacks=callbacks)
        return (time.perf_counter() - start) / FIT_BATCHES

    rounds = [[seconds(*fit) for fit in fits] for _ in range(1 + case.rounds)]
    return np.median(rounds[1:], axis=0)


def measure(case, operations, with_first_step):
    """All figures of a case. `operations` keeps those of the network."""
    row = case._asdict() | {"backend": keras.config.backend()}
    for kind in KINDS if with_first_step else ():
        row |= in_own_process(first_step, case, kind, case.network not in operations)
    counted = {name: value for name, value in row.items() if name.startswith("operations")}
    row |= operations.setdefault(case.network, counted)
    steps = in_own_process(steps_in_turn, case)
    row |= {name: np.median(seconds) for name, seconds in steps.items()}
    plain, always, with_penalties, without = (
        row[name] for name in ("plain", "every step", "with", "without")
    )
    row["spread"] = np.median(np.abs(np.array(steps["plain"]) - plain)) / plain
    for every in EVERY:
        mean = (with_penalties + (every - 1) * without) / every
        row[f"every {every}"] = mean
        row[f"beyond {every}"] = (mean - plain - 1.1 / every * (always - plain)) / plain
    return row


def new_table(title, columns):
    """A table of the cases. Its first columns name them."""
    table = Table(title=title)
    for number, name in enumerate(("network", "batch", "XLA", *columns)):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    return table


def case_cells(row):
    """What names a case."""
    return row["network"], str(row["batch"]), "yes" if row["jit"] else "no"


def step_table(rows):
    """The seconds of a step."""
    columns = ["plain\ns", "± %"]
    columns += [f"{name}\n{unit}" for unit in ("s", "ratio") for name in PENALISED]
    columns += [f"beyond\n1.1/{every}\n%" for every in EVERY]
    table = new_table(f"A training step, {conditions(rows[0])}", columns)
    for row in rows:
        cells = [f"{row['plain']:.3g}", f"{100 * row['spread']:.1f}"]
        cells += [f"{row[name]:.3g}" for name in PENALISED.values()]
        cells += [f"×{row[name] / row['plain']:.2f}" for name in PENALISED.values()]
        cells += [f"{100 * row[f'beyond {every}']:+.1f}" for every in EVERY]
        table.add_row(*case_cells(row), *cells)
    return table


def cost_table(rows):
    """The first step, the memory and the number of operations."""
    heads = ("plain", "every\nstep", "every\nn")
    columns = [f"{name}\n{head}" for name in ("first\ns", "peak\nMB", "nodes") for head in heads]
    table = new_table(
        f"First step, peak memory and nodes of the graph, {conditions(rows[0])}", ["kernels", *columns]
    )
    for row in rows:
        first, memory, operations = (
            [row.get(f"{name} {kind}") for kind in KINDS] for name in ("first", "MB", "operations")
        )
        cells = [str(row["kernels"]), f"{first[0]:.3g}"]
        cells += [f"×{own / first[0]:.2f}" if first[0] > 0 else "-" for own in first[1:]]
        cells += [f"{memory[0]:.0f}", *(f"{own - memory[0]:+.0f}" for own in memory[1:])]
        if None not in operations:
            cells += [str(operations[0]), *(f"{own - operations[0]:+d}" for own in operations[1:])]
        table.add_row(*case_cells(row), *cells)
    return table


def fit_table(case, row):
    """What `fit` takes, beside what was computed from the steps."""
    seconds = in_own_process(fit_seconds, case)
    columns = ["plain\ns", *(f"{name}\nratio" for name in PENALISED)]
    columns += [f"every\n{every}\ncomputed" for every in EVERY]
    table = new_table(f"model.fit on {FIT_BATCHES} batches, {conditions(row)}", columns)
    ratios = [*seconds[1:] / seconds[0], *(row[f"every {every}"] / row["plain"] for every in EVERY)]
    table.add_row(*case_cells(row), f"{seconds[0]:.3g}", *(f"×{ratio:.3f}" for ratio in ratios))
    return table


def conditions(row):
    """What all cases have in common."""
    device = row.get("device", f"{os.cpu_count()} CPU cores")
    return f"{row['size']}×{row['size']}, {POLICIES[row['precision']]}, {row['backend']}, {device}"


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


def cases(options):
    """The cases in the order in which they are measured."""
    smallest = min(options.batches)
    for batch in options.batches:
        rounds = options.rounds or (7 if batch <= 8 else 3)
        for network in options.networks:
            jits = {"no": [False], "yes": [True], "both": [False, True], None: [False]}[options.jit]
            if options.jit is None and not options.quick and (network, batch) == (SMALLEST, smallest):
                jits = [False, True]
            if keras.config.backend() == "jax":
                jits = [True]
            for jit in jits:
                yield Case(network, batch, jit, options.size, options.precision, rounds)


def arguments():
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{SMALLEST}, 32×32, batch 8, one round, no ResNet-18"
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 8 32")
    parser.add_argument("--rounds", type=int, help="default: 7 for batches up to 8, else 3")
    parser.add_argument("--size", type=int, help="of the images (default: 224)")
    parser.add_argument("--precision", choices=list(POLICIES), default="float32", help="default: float32")
    parser.add_argument(
        "--jit",
        choices=("no", "yes", "both"),
        help=f"compile with XLA (default: both for {SMALLEST} and the smallest batch, else no)",
    )
    parser.add_argument("--steps-only", action="store_true", help="leave out the first step and ResNet-18")
    parser.add_argument("--fit", action="store_true", help="also measure `fit`, for the first case")
    parser.add_argument("--csv", type=Path, help="a file for all figures. Each case is written when measured")
    options = parser.parse_args()
    options.networks = options.networks or ([SMALLEST] if options.quick else NETWORKS)
    options.batches = options.batches or ([8] if options.quick else [8, 32])
    options.rounds = options.rounds or (1 if options.quick else None)
    options.size = options.size or (32 if options.quick else 224)
    return options


def main():
    """Prints the tables."""
    options = arguments()
    console = Console(width=120)
    rows, operations = [], {}
    try:
        for case in cases(options):
            rows.append(measure(case, operations, not options.steps_only))
            if options.csv:
                save(options.csv, rows)
    finally:  # a run that is cut short shows what it has
        if rows:
            console.print(step_table(rows))
            if not options.steps_only:
                console.print(cost_table(rows))
    if options.fit:
        console.print(fit_table(next(cases(options)), rows[0]))
    if not (options.quick or options.steps_only) and keras.config.backend() == "tensorflow":
        console.print(monitor_table())


def save(path, rows):
    """Writes the rows as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
