"""The command line: reads, calls the library, writes.

Nothing here imports TensorFlow before work begins, so that `--help` and bad options answer at once.
"""

import argparse
import contextlib
import csv
import io
import os
import sys
import tempfile
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from tf_frobreg import __version__
from tf_frobreg.files import BadInput, output_files, read_kernel
from tf_frobreg.terminal import progress_display, show, stop_request

__all__ = ["main"]

PAPER_SHAPES = ((3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3))
PAPER_SIZE = 20
TABLE_STEPS = (0, 10, 20, 50, 100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0 converged; 1 not converged, what was reached is written; 2 bad input; 130 interrupted, nothing written.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # σ and √ are not in every terminal's alphabet
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BadInput as error:
        message = " ".join(str(error).split())
        print(f"tf-frobreg {options.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tf-frobreg {options.command}: interrupted, nothing written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    class OneLineParser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: error: {message}\n")

    parser = OneLineParser(
        prog="tf-frobreg", description="Keep the singular values of convolutions near √α (arXiv:1907.11235)."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    descent = argparse.ArgumentParser(add_help=False)
    descent.add_argument("--max-steps", type=int, default=2000, help="steps at the most (default: 2000)")
    descent.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="stop where max(|σmax − √α|, |σmin − √α|) is no larger (default: 0.01)",
    )
    descent.add_argument("--force", action="store_true", help="overwrite output files that exist")

    reproduce = commands.add_parser(
        "reproduce",
        parents=[descent],
        help="run the experiment of the paper's section 4",
        description="Run Algorithm 3.1 on the four kernels of Figure 4.1 (20×20 image, α = 1, the paper's "
        "step sizes); print a table, draw the figure and write every recorded step to a CSV file.",
    )
    reproduce.add_argument(
        "--distribution",
        choices=("normal", "uniform"),
        default="normal",
        help="of the kernels' entries; uniform equals MATLAB's rng(SEED); rand (default: normal)",
    )
    reproduce.add_argument("--seed", type=int, default=1, help="of the random kernels (default: 1)")
    reproduce.add_argument(
        "--output-dir",
        default=".",
        help="where figure_4_1.png and .csv go; uniform adds _uniform (default: .)",
    )
    reproduce.set_defaults(run=_reproduce)

    regularize = commands.add_parser(
        "regularize",
        parents=[descent],
        help="run Algorithm 3.1 on a kernel of your own",
        description="Run Algorithm 3.1 on the kernel in a .npy file. Ctrl-C stops it and keeps what was "
        "reached. Exit status: 0 converged, 1 not converged (the kernel is written), 2 bad input, 130 "
        "interrupted before there was anything to write.",
    )
    regularize.add_argument(
        "kernel", metavar="KERNEL", help=".npy file, (*kernel_size, in_channels, filters)"
    )
    size = {"type": int, "nargs": "+", "metavar": "N"}
    regularize.add_argument("--input-size", required=True, help="of the image: N, or one N per axis", **size)
    regularize.add_argument("--output", required=True, help=".npy file for the regularized kernel")
    regularize.add_argument("--alpha", type=float, default=1.0, help="target of σ² (default: 1)")
    regularize.add_argument(
        "--learning-rate",
        type=_learning_rate,
        default="exact",
        help='λ, which multiplies half the gradient as in (3.2): "exact" (default), the best one at each '
        'step; "paper", whose steps suit images of about 20×20; or a number',
    )
    regularize.add_argument(
        "--direction",
        choices=("gradient", "conjugate"),
        help='of the steps (default: "conjugate" with --learning-rate exact, "gradient" otherwise)',
    )
    regularize.add_argument("--strides", help="of the layer (default: 1)", default=[1], **size)
    regularize.add_argument("--dilation-rate", help="of the layer (default: 1)", default=[1], **size)
    regularize.add_argument("--groups", type=int, default=1, help="of the layer (default: 1)")
    regularize.add_argument("--padding", default="same", help='"same" (default), "valid" or "circular"')
    regularize.add_argument("--kind", default="conv", help='"conv" (default), "depthwise" or "transpose"')
    regularize.add_argument("--plot", help="picture of σmax and σmin against the steps (.png, .pdf, .svg)")
    regularize.add_argument("--history", help=".csv file for every recorded step")
    regularize.set_defaults(run=_regularize)
    return parser


def _learning_rate(text: str) -> str | float:
    if text in ("exact", "paper"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'must be "exact", "paper" or a number. Received: {text!r}'
        ) from None


def _reproduce(options) -> int:
    if not os.path.isdir(options.output_dir):
        raise BadInput(f"--output-dir must be a directory. Received: {options.output_dir}")
    name = "figure_4_1_uniform" if options.distribution == "uniform" else "figure_4_1"
    base = os.path.join(options.output_dir, name)
    outputs = {f"{name}{suffix} in --output-dir": f"{base}{suffix}" for suffix in (".png", ".csv")}
    figure_file, history_file = output_files(outputs, force=options.force).values()
    library = _library()
    results = {}
    with stop_request() as stop:
        with progress_display() as progress:
            for shape in PAPER_SHAPES:
                title = "×".join(map(str, shape))
                kernel = _paper_kernel(shape, options.distribution, options.seed)
                results[title] = _descend(
                    library,
                    progress,
                    title,
                    stop,
                    options,
                    kernel,
                    PAPER_SIZE,
                    learning_rate="paper",
                    measure="often",
                )
                if stop.pressed:
                    raise KeyboardInterrupt
        stop.writing = True
        figure = library.plotting.plot_convergence(results)
        figure_file.write(lambda file: figure.savefig(file, format="png", dpi=120))
        history_file.write(lambda file: _write_history(file, results))
    show(
        _paper_table(results, library),
        *(f"{title}: {_summary(result)}" for title, result in results.items()),
        f"Wrote {base}.png and {base}.csv",
    )
    return 0 if all(result.converged for result in results.values()) else 1


def _regularize(options) -> int:
    outputs = {"--output": options.output, "--plot": options.plot, "--history": options.history}
    plot_format = os.path.splitext(options.plot or "")[1].lstrip(".").lower()
    if options.plot is not None and plot_format not in ("png", "pdf", "svg"):
        raise BadInput(f"--plot must end in .png, .pdf or .svg. Received: {options.plot}")
    kernel = read_kernel(options.kernel)
    files = output_files(outputs, force=options.force, inputs=[options.kernel])
    library = _library()
    size, strides, dilation_rate = (
        values[0] if len(values) == 1 else values
        for values in (options.input_size, options.strides, options.dilation_rate)
    )
    geometry = {
        "strides": strides,
        "dilation_rate": dilation_rate,
        "padding": options.padding,
        "groups": options.groups,
        "kind": options.kind,
    }
    with stop_request() as stop:
        with progress_display() as progress:
            title = "×".join(map(str, kernel.shape))
            arguments = {
                "alpha": options.alpha,
                "learning_rate": options.learning_rate,
                "direction": options.direction,
                "measure": "often" if options.plot or options.history else "rarely",
                **geometry,
            }
            result = _descend(library, progress, title, stop, options, kernel, size, **arguments)
        stop.writing = True
        files["--output"].write(lambda file: np.save(file, result.kernel))
        if "--plot" in files:
            figure = library.plotting.plot_convergence(result)
            files["--plot"].write(lambda file: figure.savefig(file, format=plot_format, dpi=120))
        if "--history" in files:
            files["--history"].write(lambda file: _write_history(file, {options.kernel: result}))
    floor = library.penalty.penalty_floor(kernel.shape, size, alpha=options.alpha, **geometry)
    show(
        _summary(result),
        f"R = {result.penalty:.6g} (lower bound for this shape: {floor:.6g})",
        f"Wrote {', '.join(str(file.path) for file in files.values())}",
    )
    return 0 if result.converged else 1


def _descend(library, progress, title, stop, options, kernel, input_size, **arguments):
    """Runs the descent under a progress bar; what the library refuses is bad input."""
    tasks = []

    def callback(step, kernel, penalty):
        if not tasks:  # not before the arguments have passed
            tasks.append(progress.add_task(title, total=options.max_steps, penalty=penalty))
            progress.start()
        progress.update(tasks[0], completed=step, penalty=penalty)
        return stop.pressed

    try:
        return library.descent.regularize_kernel(
            kernel,
            input_size,
            max_steps=options.max_steps,
            tolerance=options.tolerance,
            callback=callback,
            **arguments,
        )
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None


def _paper_kernel(shape, distribution, seed):
    try:
        random = np.random.RandomState(seed)
    except ValueError:
        raise BadInput(f"--seed must be between 0 and 2**32 - 1. Received: {seed}") from None
    if distribution == "normal":
        return random.randn(*shape)
    # MATLAB fills its arrays column by column.
    return random.random_sample(int(np.prod(shape))).reshape(shape, order="F")


def _paper_table(results, library) -> Table:
    table = Table(title=f"Algorithm 3.1, {PAPER_SIZE}×{PAPER_SIZE} image, α = 1")
    for name in ("kernel", "step", "σmax", "σmin", "R", "floor"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for title, result in results.items():
        table.add_section()
        history = result.history
        floor = library.penalty.penalty_floor(result.kernel.shape, PAPER_SIZE)
        steps = [step for step in TABLE_STEPS if step < result.num_steps] + [result.num_steps]
        for step in steps:
            table.add_row(
                title if step == steps[0] else "",
                str(step),
                f"{history['sigma_max'][step]:.4f}",
                f"{history['sigma_min'][step]:.4f}",
                _significant(history["penalty"][step]),
                f"{floor:g}",
            )
    return table


def _significant(value: float) -> str:
    """Two decimals, or four digits where those would be mostly zeros."""
    return f"{value:,.2f}" if value >= 100 else f"{value:.4g}"


def _summary(result) -> str:
    reason = result.reason.value
    if result.reason.name == "STOPPED":  # the callback stops for nothing but Ctrl-C
        reason = "not converged: interrupted, what was reached is kept"
    high, low = (result.history[name][result.num_steps] for name in ("sigma_max", "sigma_min"))
    sigma = "" if np.isnan(high) else f", σmax = {high:.5g}, σmin = {low:.5g}"
    return f"{reason}; step {result.num_steps}{sigma}"


def _write_history(file, results) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    columns = next(iter(results.values())).history
    writer.writerow(["kernel", *columns])
    for title, result in results.items():
        for row in zip(*result.history.values(), strict=True):
            # What was not measured stays empty.
            writer.writerow([title, *("" if np.isnan(value) else value for value in row)])
    text.flush()
    text.detach()


def _library():
    """Imports the package and TensorFlow, whose messages at start are shown only if that fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as stack:
        stderr = os.dup(2)
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        os.dup2(log.fileno(), 2)
        try:
            import tensorflow as tf

            import tf_frobreg.descent
            import tf_frobreg.penalty
            import tf_frobreg.plotting

            tf.zeros(())  # looks for devices, and tells what it did not find
        except Exception:
            log.seek(0)
            os.write(stderr, log.read())
            raise
    return tf_frobreg
