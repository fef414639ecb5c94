"""The commands `reproduce` and `regularize`: Algorithm 3.1 on kernels."""

import csv
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
from rich.progress import Progress, TaskID
from rich.table import Table

import tf_frobreg  # its public names, and TensorFlow, are loaded when they are used
from tf_frobreg.cli.arguments import RegularizeOptions, ReproduceOptions
from tf_frobreg.cli.files import (
    PICTURES,
    BadInput,
    OutputFile,
    as_options,
    check_ending,
    output_files,
    read_kernel,
    refusals_as_bad_input,
    size_of_images,
    write_files,
    written,
)
from tf_frobreg.cli.model_files import MODELS, load_model, refuse_geometry, save_model
from tf_frobreg.cli.terminal import (
    StopRequest,
    load_tensorflow,
    progress_display,
    show,
    show_remark,
    stop_request,
)
from tf_frobreg.tables import percent, text_report
from tf_frobreg.text import printable

if TYPE_CHECKING:
    from tf_frobreg import DescentResult, ModelDescent

PAPER_SHAPES = ((3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3))
PAPER_SIZE = 20
TABLE_STEPS = (0, 10, 20, 50, 100)
INTERRUPTED = "not converged: interrupted, the kernel reached so far is kept"
LOSS_IGNORED = "The weights change now, without a look at the loss. Check the accuracy of the new model."
# A trained network kept its accuracy when its kernels moved by 20 %, and lost it at 60 %.
FAR = 0.25
MOVED_FAR = "If the model was trained, train the new one further, or use the penalty in training instead."


def reproduce(options: ReproduceOptions) -> int:
    """Runs the experiment of the paper's section 4 and returns the exit status."""
    if not os.path.isdir(options.output_dir):
        raise BadInput(f"--output-dir must be a directory. Received: {options.output_dir}")
    kernels = {_title(shape): _paper_kernel(shape, options) for shape in PAPER_SHAPES}
    name = "figure_4_1_uniform" if options.distribution == "uniform" else "figure_4_1"
    paths = {
        f"{name}{ending}": os.path.join(options.output_dir, f"{name}{ending}") for ending in (".png", ".csv")
    }
    outputs = {f"{name} in --output-dir": path for name, path in paths.items()}
    files = output_files(outputs, force=options.force)
    load_tensorflow()
    results = {}
    with stop_request() as stop:
        with progress_display() as progress, refusals_as_bad_input():
            follow = _follower(progress, stop, options.max_steps)
            for title, kernel in kernels.items():
                results[title] = tf_frobreg.regularize_kernel(
                    kernel,
                    PAPER_SIZE,
                    learning_rate="paper",
                    max_steps=options.max_steps,
                    tolerance=options.tolerance,
                    measure="often",
                    callback=functools.partial(follow, title),
                )
                if stop.pressed:
                    raise KeyboardInterrupt
        stop.writing = True
        figure, history = outputs
        write_files(
            files,
            {
                figure: lambda file: file.write_figure(tf_frobreg.plot_convergence(results)),
                history: lambda file: _write_history(file, results),
            },
        )
    show(
        _paper_table(results),
        *(f"{title}: {_summary(result)}" for title, result in results.items()),
        f"Wrote {' and '.join(paths.values())}",
    )
    return 0 if all(result.converged for result in results.values()) else 1


def regularize(options: RegularizeOptions) -> int:
    """Runs Algorithm 3.1 on the kernel in a file, or on all kernels of a model. Returns the exit status."""
    if options.file.endswith(MODELS):
        return _regularize_model(options)
    return _regularize_kernel(options)


def _regularize_kernel(options: RegularizeOptions) -> int:
    input_size = size_of_images(options.input_size, options.file)
    for name in ("include", "exclude"):
        if getattr(options, name) is not None:
            raise BadInput(f"--{name} goes with a model, not with a kernel. Received: {options.file}")
    check_ending("--output", options.output, ".npy")
    kernel = read_kernel(options.file)
    if input_size is None and kernel.ndim != 2:
        raise BadInput(f"--input-size is needed for the kernel of a convolution. Received: {options.file}")
    if input_size is None:  # the kernel of a Dense layer, which has no image
        input_size = ()
    files = _output_files(options)
    alpha = 1.0 if options.alpha is None else options.alpha
    load_tensorflow()
    from tf_frobreg.convolution.kernel import remark_on_order

    show_remark(options.file, remark_on_order(kernel.shape))
    with stop_request() as stop:
        with progress_display() as progress, refusals_as_bad_input(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A kernel .* PyTorch's order", UserWarning)  # already shown
            follow = _follower(progress, stop, options.max_steps)
            result = tf_frobreg.regularize_kernel(
                kernel,
                input_size,
                alpha=alpha,
                callback=functools.partial(follow, _title(kernel.shape)),
                **_descent_arguments(options),
                **options.geometry,
            )
        stop.writing = True
        write_files(
            files,
            {
                "--output": lambda file: file.write(lambda content: np.save(content, result.kernel)),
                "--plot": lambda file: file.write_figure(tf_frobreg.plot_convergence(result)),
                "--history": lambda file: _write_history(file, {options.file: result}),
            },
        )
    floor = tf_frobreg.penalty_floor(kernel.shape, input_size, alpha=alpha, **options.geometry)
    show(
        _summary(result),
        f"R = {result.penalty:.6g} (lower bound for this shape: {floor:.6g})",
        written(files),
    )
    return 0 if result.converged else 1


def _regularize_model(options: RegularizeOptions) -> int:
    refuse_geometry(options.geometry, options.file)
    ending = os.path.splitext(options.file)[1]
    if not options.output.endswith(ending):
        raise BadInput(f"--output must end in {ending}, as the model does. Received: {options.output}")
    files = _output_files(options)
    load_tensorflow()
    model, notes = _load_compiled(options.file)
    with stop_request() as stop:
        with progress_display() as progress, refusals_as_bad_input():
            descent = tf_frobreg.regularize_model(
                model,
                input_size=options.input_size,
                alpha=options.alpha,
                include=options.include,
                exclude=options.exclude,
                callback=_follower(progress, stop, options.max_steps, LOSS_IGNORED),
                **_descent_arguments(options),
            )
        stop.writing = True
        write_files(
            files,
            {
                "--output": lambda file: file.write_path(lambda path: save_model(model, path)),
                "--plot": lambda file: file.write_figure(tf_frobreg.plot_convergence(descent.results)),
                "--history": lambda file: _write_history(file, descent.results),
            },
        )
    show(_model_report(descent), *notes, written(files))
    return 0 if descent.converged and not stop.pressed else 1


def _output_files(options: RegularizeOptions) -> dict[str, OutputFile]:
    check_ending("--plot", options.plot, *PICTURES)
    paths = {"--output": options.output, "--plot": options.plot, "--history": options.history}
    return output_files(paths, force=options.force, inputs=[options.file])


def _descent_arguments(options: RegularizeOptions) -> dict[str, Any]:
    """Returns what both functions of the library take."""
    return {
        "learning_rate": options.learning_rate,
        "direction": options.direction,
        "escape": options.escape,
        "max_steps": options.max_steps,
        "tolerance": options.tolerance,
        "measure": "often" if options.plot or options.history else "rarely",
    }


def _load_compiled(path: str) -> tuple[Any, list[str]]:
    """Returns (model, notes for the user). The model has its optimizer and losses if Keras can load them."""
    try:
        return load_model(path, "FILE", compile=True), []
    except BadInput:
        note = "The optimizer and losses could not be loaded. Compile the new model before you train it."
        return load_model(path, "FILE"), [note]


def _follower(
    progress: Progress, stop: StopRequest, max_steps: int, remark: str | None = None
) -> Callable[[str, int, np.ndarray, float], bool]:
    """Returns a callback that shows a remark, then each step of each kernel. Ctrl-C stops the descent."""
    tasks: dict[str, TaskID] = {}

    def follow(name: str, step: int, kernel: np.ndarray, penalty: float) -> bool:
        note = f"R = {penalty:.6g}"
        if remark is not None and not tasks:
            progress.console.print(remark, markup=False, highlight=False, soft_wrap=True)
        if name not in tasks:
            for finished in tasks.values():
                progress.stop_task(finished)
            tasks[name] = progress.add_task(printable(name), total=max_steps, note=note)
            progress.start()  # the library has accepted the arguments
        progress.update(tasks[name], completed=step, note=note)
        return stop.pressed

    return follow


def _title(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _paper_kernel(shape: tuple[int, ...], options: ReproduceOptions) -> np.ndarray:
    try:
        random = np.random.RandomState(options.seed)
    except ValueError:
        raise BadInput(f"--seed must be between 0 and 2**32 - 1. Received: {options.seed}") from None
    if options.distribution == "normal":
        return random.randn(*shape)
    # MATLAB fills its arrays column by column.
    return random.random_sample(int(np.prod(shape))).reshape(shape, order="F")


def _paper_table(results: Mapping[str, "DescentResult"]) -> Table:
    table = Table(title=f"Algorithm 3.1, {PAPER_SIZE}×{PAPER_SIZE} image, α = 1")
    for name in ("kernel", "step", "σmax", "σmin", "R", "floor"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for title, result in results.items():
        table.add_section()
        history = result.history
        floor = tf_frobreg.penalty_floor(result.kernel.shape, PAPER_SIZE)
        steps = [step for step in TABLE_STEPS if step < result.num_steps] + [result.num_steps]
        for step in steps:
            table.add_row(
                title if step == steps[0] else "",
                str(step),
                f"{history['sigma_max'][step]:.4f}",
                f"{history['sigma_min'][step]:.4f}",
                _digits(history["penalty"][step]),
                f"{floor:g}",
            )
    return table


def _model_report(descent: "ModelDescent") -> str:
    """Returns a table with a row for each kernel, and what to know and to do next."""
    from tf_frobreg.keras.whole_model import (
        LEFT_COLUMNS,
        NOT_REACHED,
        OPTIONAL_COLUMNS,
        descent_remarks,
        descent_rows,
        descent_summary,
    )

    remarks = [  # only Ctrl-C makes the callback stop
        as_options(line)
        .replace(tf_frobreg.StopReason.STOPPED.value, INTERRUPTED)
        .replace(NOT_REACHED, "interrupted")
        for line in descent_remarks(descent)
    ]
    farthest = max(descent.changes.values())
    if farthest > FAR:
        remarks.append(f"Kernels moved by up to {percent(farthest)}. {MOVED_FAR}")
    return text_report(
        descent_summary(descent),
        descent_rows(descent),
        remarks,
        left=LEFT_COLUMNS,
        optional=OPTIONAL_COLUMNS,
    )


def _digits(value: float) -> str:
    """Returns two decimals, or four significant digits of a small number."""
    return f"{value:,.2f}" if value >= 100 else f"{value:.4g}"


def _summary(result: "DescentResult") -> str:
    """Returns why a descent ended, and where, in one line."""
    high, low = (result.history[name][result.num_steps] for name in ("sigma_max", "sigma_min"))
    sigma = "" if np.isnan(high) else f", σmax = {high:.5g}, σmin = {low:.5g}"
    return f"{_reason(result)}; step {result.num_steps}{sigma}{_escapes(result)}"


def _reason(result: "DescentResult") -> str:
    """Returns why a descent ended, as a sentence."""
    stopped = result.reason is tf_frobreg.StopReason.STOPPED  # only Ctrl-C makes the callback stop
    return INTERRUPTED if stopped else result.reason.value


def _escapes(result: "DescentResult") -> str:
    """Returns at which steps a descent escaped from a local minimum."""
    steps = sorted({escape.step for escape in result.escapes})
    return f", escaped from a local minimum at step {', '.join(map(str, steps))}" if steps else ""


def _write_history(output: OutputFile, results: Mapping[str, "DescentResult"]) -> None:
    """Writes one row per step of each descent. A value that was not measured stays empty."""

    def write(file: TextIO) -> None:
        writer = csv.writer(file)
        writer.writerow(["kernel", *next(iter(results.values())).history])
        for title, result in results.items():
            for row in zip(*result.history.values(), strict=True):
                writer.writerow([title, *("" if np.isnan(value) else value for value in row)])

    output.write_text(write)
