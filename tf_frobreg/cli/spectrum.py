"""The command `spectrum`: the singular values of kernels in a file, or of a model."""

import csv
import io
import json
import math
import warnings

from rich import box
from rich.cells import cell_len
from rich.table import Table

from tf_frobreg.checks import check_accuracy, check_number
from tf_frobreg.cli.files import BadInput, output_files, picture_format, read_arrays
from tf_frobreg.cli.model_files import MODELS, load_model, refuse_geometry, short
from tf_frobreg.cli.terminal import library, progress_display, show, terminal_width

ARRAYS = (".npy", ".npz")
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
            from tf_frobreg.keras.read_layers import read_kernels

            found = read_kernels(_load_model(options), options.input_size)
            kernels = [(kernel.name, kernel.value, kernel.conv) for kernel in found.kernels]
            untreated = [(u.name, u.reason) for u in found.untreated]
            others = found.others
        else:
            (kernels, untreated), others = _as_kernels(package, arrays, options), {}
        if not kernels and not untreated:
            raise BadInput(f"FILE must hold a kernel. Received: {options.file}")
        rows, spectra = _measure(package, kernels, options)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None
    rows += [package.KernelSpectrum(name, reason) for name, reason in untreated]
    if "--plot" in files and not spectra:
        raise BadInput(f"--plot has nothing to draw: no kernel was measured. Received: {options.file}")
    if "--json" in files:
        files["--json"].write(lambda file: _write_json(file, rows, options, others))
    if "--csv" in files:
        files["--csv"].write(lambda file: _write_csv(file, rows))
    if "--plot" in files:
        figure = package.plot_spectrum(spectra, kind=options.plot_kind, alpha=options.alpha)
        files["--plot"].write(lambda file: figure.savefig(file, format=plot_format, dpi=120))
    measured = [row for row in rows if row.reason is None]
    counted = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
    show(
        *(_table(measured, options) if measured else []),
        *(f"Accuracy not reached: {text}" for row in measured for text in _missed(row, options)),
        *(f"Not measured: {row.name}: {row.reason}" for row in rows if row.reason is not None),
        *([f"Without a kernel: {counted}"] if counted else []),
        *([f"Wrote {', '.join(str(file.path) for file in files.values())}"] if files else []),
    )
    return 0 if measured and not any(_missed(row, options) for row in measured) else 1


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
    if not options.file.endswith(ARRAYS):
        refuse_geometry(options)


def _as_kernels(package, arrays, options):
    """((name, kernel, geometry) of the arrays that are kernels, (name, reason) of the others)."""
    from tf_frobreg.convolution.kernel import as_kernel

    kernels, untreated = [], []
    for name, array in arrays.items():
        try:
            kernel = as_kernel(array).numpy()
            size, geometry = options.input_size, options.geometry
            if kernel.ndim == 2:  # of a Dense layer, which has neither image nor geometry
                size, geometry = (), {}
            elif size is None:
                raise ValueError("--input-size is needed for kernels without a model")
            conv = package.Convolution.of(kernel.shape, size, geometry)
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
        return load_model(options.file, "FILE")
    model = load_model(options.model, "--model")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says the same
            model.load_weights(options.file)
    except Exception as error:  # whatever h5py, zipfile and Keras find wrong
        raise BadInput(f"FILE does not fit --model ({short(error)}). Received: {options.file}") from None
    return model


def _measure(package, kernels, options):
    """(the row of each kernel, what to draw of each)."""
    from tf_frobreg.spectrum.all_values import all_singular_values
    from tf_frobreg.spectrum.kernel_report import report_kernel

    measuring = {"accuracy": options.accuracy, "sigma_min": not options.sigma_max_only}
    check_number("alpha", options.alpha, exclusive=True)
    check_accuracy(options.accuracy)
    rows, spectra = [], {}
    with progress_display() as progress:
        task = None
        for name, kernel, conv in kernels:
            if task is None:
                task = progress.add_task("kernels", total=len(kernels), note="")
                progress.start()
            progress.update(task, note=name)
            row = report_kernel(name, kernel, conv, options.alpha, **measuring)
            if options.plot and row.reason is None:
                every = min(conv.shape) <= PLOT_ROWS
                spectra[name] = all_singular_values(kernel, conv, 1e-7) if every else row.extremes
            rows.append(row)
            progress.advance(task)
    return rows, spectra


def _missed(row, options):
    """What did not reach the accuracy asked for, a line each."""
    ends, lines = row.extremes, []
    if not ends.sigma_max_converged:
        lines.append(f"{row.name}: σmax may be up to {ends.sigma_max_error:.2g} larger")
    if not (ends.sigma_min_converged or options.sigma_max_only):
        lines.append(f"{row.name}: σmin may be up to {ends.sigma_min_error:.2g} smaller")
    return lines


def _table(rows, options):
    """A table as wide as the terminal allows, and a line that says what it left out."""
    columns = {
        "layer": [row.name for row in rows],
        "kernel": ["×".join(map(str, row.kernel_shape)) for row in rows],
        "image": ["×".join(map(str, row.input_size)) or "-" for row in rows],
        "σmax": [_bound("≥", row.extremes.sigma_max, not row.extremes.sigma_max_converged) for row in rows],
        "σmin": [_bound("≤", row.extremes.sigma_min, _is_bound(row.extremes)) for row in rows],
        "σmax/σmin": [_bound("≥", row.condition_number, _is_bound(row.extremes)) for row in rows],
        "R": [_digits(row.penalty) for row in rows],
        "R/column": [_digits(row.penalty_per_column) for row in rows],
        "floor": [_digits(row.penalty_floor) for row in rows],
    }
    if options.sigma_max_only:
        del columns["σmin"], columns["σmax/σmin"]
    widths = {name: max(map(cell_len, (name, *values))) + 3 for name, values in columns.items()}
    left_out = []
    for name in ("floor", "R/column", "kernel", "σmax/σmin", "image", "R"):
        if sum(widths.values()) + 1 > terminal_width() and name in widths:
            del widths[name]
            left_out.append(name)
    table = Table(title=f"Singular values, R for α = {options.alpha:g}", box=box.SIMPLE_HEAD)
    for name in widths:
        table.add_column(name, justify="left" if name == "layer" else "right", overflow="fold")
    for values in zip(*(columns[name] for name in widths), strict=True):
        table.add_row(*values)
    yield table
    if left_out:
        yield f"Left out for want of width: {', '.join(reversed(left_out))}. --csv has them."


def _is_bound(ends):
    """Whether σmin is but an upper bound: it cannot be told from 0, or is not known well enough."""
    return ends.sigma_min_error >= ends.sigma_min > 0 or not ends.sigma_min_converged


def _bound(sign, value, is_bound):
    return f"{sign} {_digits(value)}" if is_bound else _digits(value)


def _digits(value):
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _record(row) -> dict:
    """A row in plain values, for files: what was not measured is None, what is infinite "inf"."""
    ends = {name: row.extremes and getattr(row.extremes, name) for name in ENDS}
    without_low = row.extremes is not None and math.isnan(row.extremes.sigma_min)
    if without_low:
        ends["sigma_min_converged"] = None
    record = {
        "layer": row.name,
        "kernel_shape": row.kernel_shape,
        "input_size": row.input_size,
        **ends,
        "sigma_min_is_upper_bound": None if without_low else row.extremes and _is_bound(row.extremes),
        "condition_number": row.condition_number,
        "penalty": row.penalty,
        "penalty_per_column": row.penalty_per_column,
        "penalty_floor": row.penalty_floor,
        "reason": row.reason,
    }
    return {name: _plain(value) for name, value in record.items()}


def _plain(value):
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    return value


def _write_json(file, rows, options, others):
    content = {
        "file": options.file,
        "alpha": options.alpha,
        "kernels": [_record(row) for row in rows],
        "without_kernel": others,
    }
    file.write(f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode())


def _write_csv(file, rows):
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    records = [_record(row) for row in rows]
    writer = csv.DictWriter(text, records[0])
    writer.writeheader()
    for record in records:
        for name in ("kernel_shape", "input_size"):
            record[name] = None if record[name] is None else "x".join(map(str, record[name]))
        writer.writerow(record)
    text.flush()
    text.detach()
