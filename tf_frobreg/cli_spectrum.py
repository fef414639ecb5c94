"""The command `spectrum`: the singular values of kernels in a file, or of a model."""

import csv
import io
import json
import math
import os
from pathlib import Path

from rich import box
from rich.table import Table

from tf_frobreg.files import BadInput, output_files, picture_format, read_arrays
from tf_frobreg.terminal import library, progress_display, show

__all__ = ["spectrum"]

MODELS, ARRAYS = (".keras", ".h5"), (".npy", ".npz")
ENDS = (
    "sigma_max",
    "sigma_min",
    "sigma_max_error",
    "sigma_min_error",
    "sigma_max_converged",
    "sigma_min_converged",
)
PLOT_ROWS = 4096  # of the smaller side of M up to which a figure shows all singular values: 4 s


def spectrum(options) -> int:
    """Singular values and penalty of each kernel in a file."""
    plot_format = picture_format(options.plot)
    _check(options)
    outputs = {"--json": options.json, "--csv": options.csv, "--plot": options.plot}
    inputs = [path for path in (options.file, options.model) if path]
    files = output_files(outputs, force=options.force, inputs=inputs)
    arrays = read_arrays(options.file) if options.file.endswith(ARRAYS) else None
    package = library()
    try:
        if arrays is None:
            found = package.layers.read_kernels(_load_model(options), options.input_size)
            kernels = [(kernel.name, kernel.value, kernel.conv) for kernel in found.kernels]
            untreated = [(name, reason) for name, _, reason in found.untreated]
            others = found.others
        else:
            (kernels, untreated), others = _as_kernels(package, arrays, options), {}
        rows, spectra = _measure(package, kernels, options)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None
    rows += [package.models.KernelSpectrum(name, reason) for name, reason in untreated]
    if "--json" in files:
        files["--json"].write(lambda file: _write_json(file, rows, options, others))
    if "--csv" in files:
        files["--csv"].write(lambda file: _write_csv(file, rows))
    if "--plot" in files:
        if not spectra:
            raise BadInput(f"--plot has nothing to draw: no kernel was measured. Received: {options.file}")
        figure = package.plotting.plot_spectrum(spectra, kind=options.plot_kind, alpha=options.alpha)
        files["--plot"].write(lambda file: figure.savefig(file, format=plot_format, dpi=120))
    measured = [row for row in rows if row.reason is None]
    counted = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
    show(
        *([_table(measured, options)] if measured else []),
        *(f"Not measured: {row.name}: {row.reason}" for row in rows if row.reason is not None),
        *([f"Without a kernel: {counted}"] if counted else []),
        *([f"Wrote {', '.join(str(file.path) for file in files.values())}"] if files else []),
    )
    return 0 if measured and all(_reached(row, options) for row in measured) else 1


def _check(options):
    """What can be told before the file is read."""
    if not options.file.endswith(MODELS + ARRAYS):
        raise BadInput(f"FILE must end in .npy, .npz, .keras or .h5. Received: {options.file}")
    if options.file.endswith(".weights.h5"):
        if not options.model:
            raise BadInput(f"--model is needed: weights alone are no layers. Received: {options.file}")
    elif options.model:
        raise BadInput(f"--model goes with a .weights.h5 file. Received: {options.file}")
    if options.model and not options.model.endswith((*MODELS, ".json")):
        raise BadInput(f"--model must end in .keras, .h5 or .json. Received: {options.model}")
    if options.file.endswith(ARRAYS):
        if options.input_size is None:
            raise BadInput(f"--input-size is needed for kernels without a model. Received: {options.file}")
    elif options.geometry:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options.geometry)
        raise BadInput(f"{names} cannot be given: a model's layers tell theirs. Received: {options.file}")


def _as_kernels(package, arrays, options):
    """((name, kernel, geometry) of the arrays that are kernels, (name, reason) of the others)."""
    kernels, untreated = [], []
    for name, array in arrays.items():
        try:
            kernel = package.checks.as_kernel(array).numpy()
            size = () if kernel.ndim == 2 else options.input_size
            conv = package.convolution.Convolution.of(kernel.shape, size, options.geometry)
        except (ValueError, TypeError) as error:
            if len(arrays) == 1:
                raise
            untreated.append((name, str(error)))
            continue
        kernels.append((name, kernel, conv))
    return kernels, untreated


def _load_model(options):
    """The model in a file, with its weights; nothing in it is run that Keras finds unsafe."""
    if not options.model:
        return _load(options.file, "FILE")
    model = _load(options.model, "--model")
    try:
        model.load_weights(options.file)
    except Exception as error:  # whatever h5py, zipfile and Keras find wrong
        raise BadInput(f"FILE does not fit --model ({_short(error)}). Received: {options.file}") from None
    return model


def _load(path, argument):
    import keras

    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("no such file")
        if path.endswith(".json"):
            return keras.models.model_from_json(Path(path).read_text(encoding="utf-8"))
        if path.endswith(".h5"):
            _refuse_lambda(path)
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # whatever h5py, zipfile, JSON and Keras find wrong
        raise BadInput(f"{argument} cannot be loaded ({_short(error)}). Received: {path}") from None


def _refuse_lambda(path):
    """Keras before 3.11.3 ran the code in `.h5` files in spite of its safe mode."""
    import h5py

    with h5py.File(path) as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise ValueError("it holds weights only: give it the ending .weights.h5 and use --model")
    if '"Lambda"' in (config.decode() if isinstance(config, bytes) else config):
        raise ValueError("it has a Lambda layer, whose code would be run")


def _short(error):
    """The end of Keras' nested messages, which names the cause, on one line."""
    text = " ".join(str(error).split()).rpartition("Exception encountered: ")[2] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def _measure(package, kernels, options):
    """(the row of each kernel, what to draw of each)."""
    measuring = {"accuracy": options.accuracy, "low": not options.sigma_max_only}
    package.checks.check_number("alpha", options.alpha, exclusive=True)
    package.checks.check_number("accuracy", options.accuracy, exclusive=True)
    rows, spectra = [], {}
    with progress_display() as progress:
        task = progress.add_task("kernels", total=len(kernels), note="")
        progress.start()
        for name, kernel, conv in kernels:
            progress.update(task, note=name)
            row = package.models.measure(name, kernel, conv, options.alpha, **measuring)
            if options.plot and row.reason is None:
                every = min(conv.shape) <= PLOT_ROWS
                spectra[name] = (
                    package.spectrum.all_singular_values(kernel, conv, 1e-7) if every else row.extremes
                )
            rows.append(row)
            progress.advance(task)
    return rows, spectra


def _reached(row, options):
    return row.extremes.sigma_max_converged and (row.extremes.sigma_min_converged or options.sigma_max_only)


def _table(rows, options) -> Table:
    table = Table(title=f"Singular values, R for α = {options.alpha:g}", box=box.SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    names = ("kernel", "image", "σmax", "σmin", "σmax/σmin", "R", "R/column", "floor")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        ends = row.extremes
        size = "×".join(map(str, row.input_size)) or "-"
        above = "" if ends.sigma_max_converged else "≥ "
        # What cannot be told from 0, or is not known well enough, is an upper bound.
        below = "≤ " if ends.sigma_min_error >= ends.sigma_min > 0 or not ends.sigma_min_converged else ""
        values = [
            above + _digits(ends.sigma_max),
            below + _digits(ends.sigma_min),
            (above or below).replace("≤", "≥") + _digits(row.condition_number),
        ]
        if options.sigma_max_only:
            values[1:] = "-", "-"
        table.add_row(
            row.name,
            "×".join(map(str, row.kernel_shape)),
            size,
            *values,
            *(_digits(value) for value in (row.penalty, row.penalty_per_column, row.penalty_floor)),
        )
    return table


def _digits(value):
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _record(row) -> dict:
    """A row in plain values, for files; what is not a finite number is None."""
    ends = {name: row.extremes and getattr(row.extremes, name) for name in ENDS}
    record = {
        "layer": row.name,
        "kernel_shape": row.kernel_shape,
        "input_size": row.input_size,
        **ends,
        "condition_number": row.condition_number,
        "penalty": row.penalty,
        "penalty_per_column": row.penalty_per_column,
        "penalty_floor": row.penalty_floor,
        "reason": row.reason,
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }


def _write_json(file, rows, options, others):
    content = {
        "file": options.file,
        "alpha": options.alpha,
        "kernels": [_record(row) for row in rows],
        "without_kernel": others,
    }
    file.write(json.dumps(content, indent=2, ensure_ascii=False).encode())


def _write_csv(file, rows):
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    records = [_record(row) for row in rows]
    writer = csv.DictWriter(text, records[0] if records else ["layer"])
    writer.writeheader()
    for record in records:
        for name in ("kernel_shape", "input_size"):
            record[name] = None if record[name] is None else "x".join(map(str, record[name]))
        writer.writerow(record)
    text.flush()
    text.detach()
