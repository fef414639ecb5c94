"""The commands that descend: `reproduce` and `regularize`."""

import csv
import io
import os

import numpy as np
from rich.table import Table

from tf_frobreg.cli.files import BadInput, output_files, picture_format, read_kernel
from tf_frobreg.cli.model_files import MODELS, load_model, refuse_geometry
from tf_frobreg.cli.terminal import library, progress_display, show, stop_request

PAPER_SHAPES = ((3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 6), (3, 3, 6, 3))
PAPER_SIZE = 20
TABLE_STEPS = (0, 10, 20, 50, 100)


def reproduce(options) -> int:
    """The experiment of the paper's section 4."""
    if not os.path.isdir(options.output_dir):
        raise BadInput(f"--output-dir must be a directory. Received: {options.output_dir}")
    name = "figure_4_1_uniform" if options.distribution == "uniform" else "figure_4_1"
    base = os.path.join(options.output_dir, name)
    outputs = {f"{name}{suffix} in --output-dir": f"{base}{suffix}" for suffix in (".png", ".csv")}
    figure_file, history_file = output_files(outputs, force=options.force).values()
    package = library()
    results = {}
    with stop_request() as stop:
        with progress_display() as progress:
            for shape in PAPER_SHAPES:
                title = "×".join(map(str, shape))
                kernel = _paper_kernel(shape, options.distribution, options.seed)
                results[title] = _descend(
                    package,
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
        figure = package.plot_convergence(results)
        figure_file.write(lambda file: figure.savefig(file, format="png", dpi=120))
        history_file.write(lambda file: _write_history(file, results))
    show(
        _paper_table(results, package),
        *(f"{title}: {_summary(result)}" for title, result in results.items()),
        f"Wrote {base}.png and {base}.csv",
    )
    return 0 if all(result.converged for result in results.values()) else 1


def regularize(options) -> int:
    """Algorithm 3.1 on the kernel in a file, or on all kernels of a model."""
    if options.file.endswith(MODELS):
        return _regularize_model(options)
    if options.input_size is None:
        raise BadInput(f"--input-size is needed for a kernel without a model. Received: {options.file}")
    outputs = {"--output": options.output, "--plot": options.plot, "--history": options.history}
    plot_format = picture_format(options.plot)
    kernel = read_kernel(options.file)
    files = output_files(outputs, force=options.force, inputs=[options.file])
    package = library()
    with stop_request() as stop:
        with progress_display() as progress:
            title = "×".join(map(str, kernel.shape))
            arguments = {
                "alpha": options.alpha,
                "learning_rate": options.learning_rate,
                "direction": options.direction,
                "measure": "often" if options.plot or options.history else "rarely",
                **options.geometry,
            }
            size = options.input_size
            result = _descend(package, progress, title, stop, options, kernel, size, **arguments)
        stop.writing = True
        files["--output"].write(lambda file: np.save(file, result.kernel))
        if "--plot" in files:
            figure = package.plot_convergence(result)
            files["--plot"].write(lambda file: figure.savefig(file, format=plot_format, dpi=120))
        if "--history" in files:
            files["--history"].write(lambda file: _write_history(file, {options.file: result}))
    floor = package.penalty_floor(kernel.shape, size, alpha=options.alpha, **options.geometry)
    show(
        _summary(result),
        f"R = {result.penalty:.6g} (lower bound for this shape: {floor:.6g})",
        f"Wrote {', '.join(str(file.path) for file in files.values())}",
    )
    return 0 if result.converged else 1


def _regularize_model(options) -> int:
    ending = os.path.splitext(options.file)[1]
    refuse_geometry(options)
    if not options.output.endswith(ending):
        raise BadInput(f"--output must end in {ending}, as the model does. Received: {options.output}")
    plot_format = picture_format(options.plot)
    outputs = {"--output": options.output, "--plot": options.plot, "--history": options.history}
    files = output_files(outputs, force=options.force, inputs=[options.file])
    package = library()
    model, notes = _load_compiled(options.file)
    with stop_request() as stop:
        with progress_display() as progress:
            tasks = {}

            def callback(name, step, kernel, penalty):
                note = f"R = {penalty:.6g}"
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=options.max_steps, note=note)
                    progress.start()
                progress.update(tasks[name], completed=step, note=note)
                return stop.pressed

            try:
                descent = package.regularize_model(
                    model,
                    alpha=options.alpha,
                    max_steps=options.max_steps,
                    tolerance=options.tolerance,
                    input_size=options.input_size,
                    learning_rate=options.learning_rate,
                    direction=options.direction,
                    measure="often" if options.plot or options.history else "rarely",
                    callback=callback,
                )
            except (ValueError, TypeError) as error:
                raise BadInput(str(error)) from None
        if not descent.results:
            raise BadInput(f"FILE must have a kernel that can be treated. Received: {options.file}")
        stop.writing = True
        files["--output"].write_path(model.save)
        if "--plot" in files:
            figure = package.plot_convergence(descent.results)
            files["--plot"].write(lambda file: figure.savefig(file, format=plot_format, dpi=120))
        if "--history" in files:
            files["--history"].write(lambda file: _write_history(file, descent.results))
    show(str(descent), *notes, f"Wrote {', '.join(str(file.path) for file in files.values())}")
    return 0 if descent.converged and not stop.pressed else 1


def _load_compiled(path):
    """(the model with its optimizer and losses, notes) or, where Keras cannot load those, without them."""
    try:
        return load_model(path, "FILE", compile=True), []
    except BadInput:
        note = "Without its optimizer and losses, which could not be loaded: compile it again"
        return load_model(path, "FILE"), [note]


def _descend(package, progress, title, stop, options, kernel, input_size, **arguments):
    """Runs the descent under a progress bar; what the library refuses is bad input."""
    tasks = []

    def callback(step, kernel, penalty):
        if not tasks:  # not before the arguments have passed
            tasks.append(progress.add_task(title, total=options.max_steps, note=f"R = {penalty:.6g}"))
            progress.start()
        progress.update(tasks[0], completed=step, note=f"R = {penalty:.6g}")
        return stop.pressed

    try:
        return package.regularize_kernel(
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


def _paper_table(results, package) -> Table:
    table = Table(title=f"Algorithm 3.1, {PAPER_SIZE}×{PAPER_SIZE} image, α = 1")
    for name in ("kernel", "step", "σmax", "σmin", "R", "floor"):
        table.add_column(name, justify="left" if name == "kernel" else "right")
    for title, result in results.items():
        table.add_section()
        history = result.history
        floor = package.penalty_floor(result.kernel.shape, PAPER_SIZE)
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
