"""The command `spectrum`: the singular values of kernels in a file, or of a model."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from rich.table import Table

import tf_frobreg  # its public names, and TensorFlow, are loaded when they are used
from tf_frobreg.checks import check_accuracy, check_number
from tf_frobreg.cli.arguments import SpectrumOptions
from tf_frobreg.cli.files import (
    PICTURES,
    BadInput,
    check_ending,
    output_files,
    read_arrays,
    refusals_as_bad_input,
    written,
)
from tf_frobreg.cli.model_files import MODELS, load_model, load_model_and_weights, refuse_geometry
from tf_frobreg.cli.terminal import fitting_table, load_tensorflow, progress_display, show

if TYPE_CHECKING:
    from tf_frobreg import Convolution, ExtremeSingularValues, KernelSpectrum

ARRAYS = (".npy", ".npz")
PLOT_ROWS = 4096  # of the smaller side of M, up to which a figure shows all singular values: 4 s
# Columns of the table that can be left out, the first one first.
OPTIONAL_COLUMNS = ("floor", "R/column", "kernel", "σmax/σmin", "image", "R")


class _Kernel(NamedTuple):
    """A kernel to measure."""

    name: str
    value: np.ndarray
    conv: "Convolution"


class _Contents(NamedTuple):
    """What a file holds: kernels, rows for what cannot be measured, the number of other layers by type."""

    kernels: list[_Kernel]
    untreated: list["KernelSpectrum"]
    others: dict[str, int]


def spectrum(options: SpectrumOptions) -> int:
    """Shows and writes singular values and penalty of each kernel in a file. Returns the exit status."""
    _check(options)
    outputs = {"--json": options.json, "--csv": options.csv, "--plot": options.plot}
    inputs = [path for path in (options.file, options.model) if path]
    files = output_files(outputs, force=options.force, inputs=inputs)
    arrays = read_arrays(options.file) if options.file.endswith(ARRAYS) else None
    load_tensorflow()
    with refusals_as_bad_input():
        contents = _contents_of_model(options) if arrays is None else _contents_of_arrays(arrays, options)
        if not contents.kernels and not contents.untreated:
            raise BadInput(f"FILE must hold a kernel. Received: {options.file}")
        rows, spectra = _measure(contents.kernels, options)
    rows += contents.untreated
    if "--plot" in files and not spectra:
        raise BadInput(f"--plot has nothing to draw: no kernel was measured. Received: {options.file}")
    if "--json" in files:
        content = {
            "file": options.file,
            "alpha": options.alpha,
            "kernels": [_record(row) for row in rows],
            "without_kernel": contents.others,
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        files["--json"].write_text(lambda file: file.write(f"{text}\n"))
    if "--csv" in files:
        files["--csv"].write_text(lambda file: _write_csv(file, rows))
    if "--plot" in files:
        figure = tf_frobreg.plot_spectrum(spectra, kind=options.plot_kind, alpha=options.alpha)
        files["--plot"].write_figure(figure)
    measured = [(row, row.extremes) for row in rows if row.extremes is not None]
    missed = [line for row, ends in measured for line in _missed(row.name, ends, options)]
    others = ", ".join(f"{count} {name}" for name, count in sorted(contents.others.items()))
    show(
        *(_table([_cells(row, ends, options) for row, ends in measured], options) if measured else []),
        *(f"Accuracy not reached: {line}" for line in missed),
        *(f"Not measured: {row.name}: {row.reason}" for row in rows if row.reason is not None),
        *([f"Without a kernel: {others}"] if others else []),
        *([written(files)] if files else []),
    )
    return 0 if measured and not missed else 1


def _check(options: SpectrumOptions) -> None:
    """Raises `BadInput` for what is wrong whatever the file holds."""
    check_ending("--plot", options.plot, *PICTURES)
    if not options.file.endswith(MODELS + ARRAYS):
        raise BadInput(f"FILE must end in .npy, .npz, .keras or .h5. Received: {options.file}")
    if options.file.endswith(".weights.h5"):
        if not options.model:
            raise BadInput(f"--model is needed: weights alone are not layers. Received: {options.file}")
    elif options.model:
        raise BadInput(f"--model goes with a .weights.h5 file. Received: {options.file}")
    if options.model and not options.model.endswith((*MODELS, ".json")):
        raise BadInput(f"--model must end in .keras, .h5 or .json. Received: {options.model}")
    if not options.file.endswith(ARRAYS):
        refuse_geometry(options.geometry, options.file)
    with refusals_as_bad_input():
        check_number("alpha", options.alpha, exclusive=True)
        check_accuracy(options.accuracy)


def _contents_of_model(options: SpectrumOptions) -> _Contents:
    from tf_frobreg.keras.read_layers import read_kernels

    if options.model:
        model = load_model_and_weights(options.model, options.file)
    else:
        model = load_model(options.file, "FILE")
    found = read_kernels(model, options.input_size)
    kernels = [_Kernel(kernel.name, kernel.value, kernel.conv) for kernel in found.kernels]
    untreated = [tf_frobreg.KernelSpectrum(layer.name, layer.reason) for layer in found.untreated]
    return _Contents(kernels, untreated, found.others)


def _contents_of_arrays(arrays: Mapping[str, np.ndarray], options: SpectrumOptions) -> _Contents:
    from tf_frobreg.convolution.kernel import as_kernel

    kernels, untreated = [], []
    for name, array in arrays.items():
        try:
            kernel = as_kernel(array).numpy()
            if kernel.ndim == 2:  # a Dense layer has neither image nor geometry
                conv = tf_frobreg.Convolution.of(kernel.shape, (), {})
            elif options.input_size is None:
                raise ValueError("--input-size is needed for kernels without a model")
            else:
                conv = tf_frobreg.Convolution.of(kernel.shape, options.input_size, options.geometry)
        except (ValueError, TypeError) as error:
            if len(arrays) == 1:
                raise
            untreated.append(tf_frobreg.KernelSpectrum(name, str(error)))
        else:
            kernels.append(_Kernel(name, kernel, conv))
    return _Contents(kernels, untreated, {})


def _measure(
    kernels: Sequence[_Kernel], options: SpectrumOptions
) -> tuple[list["KernelSpectrum"], dict[str, Any]]:
    """Returns (a row per kernel, what to draw of each measured kernel)."""
    from tf_frobreg.spectrum.all_values import all_singular_values
    from tf_frobreg.spectrum.kernel_report import report_kernel

    rows, spectra = [], {}
    with progress_display() as progress:
        if kernels:
            task = progress.add_task("kernels", total=len(kernels), note="")
            progress.start()
        for kernel in kernels:
            progress.update(task, note=kernel.name)
            row = report_kernel(
                *kernel, options.alpha, accuracy=options.accuracy, sigma_min=not options.sigma_max_only
            )
            if options.plot and row.reason is None:
                every = min(kernel.conv.shape) <= PLOT_ROWS
                spectra[kernel.name] = (
                    all_singular_values(kernel.value, kernel.conv, 1e-7) if every else row.extremes
                )
            rows.append(row)
            progress.advance(task)
    return rows, spectra


def _missed(name: str, ends: "ExtremeSingularValues", options: SpectrumOptions) -> Iterator[str]:
    """Yields a line for each singular value that did not reach the accuracy."""
    if not ends.sigma_max_converged:
        yield f"{name}: σmax may be about {ends.sigma_max_error:.2g} larger"
    if not ends.sigma_min_converged and not options.sigma_max_only:
        yield f"{name}: σmin may be about {ends.sigma_min_error:.2g} smaller"


def _cells(row: "KernelSpectrum", ends: "ExtremeSingularValues", options: SpectrumOptions) -> dict[str, str]:
    """Returns a row of the table by column."""
    at_most = "≤ " if _is_upper_bound(ends) else ""
    at_least = "≥ " if _is_upper_bound(ends) else ""
    cells = {
        "layer": row.name,
        "kernel": _times(row.kernel_shape),
        "image": _times(row.input_size),
        "σmax": ("" if ends.sigma_max_converged else "≥ ") + _digits(ends.sigma_max),
        "σmin": at_most + _digits(ends.sigma_min),
        "σmax/σmin": at_least + _digits(row.condition_number),
        "R": _digits(row.penalty),
        "R/column": _digits(row.penalty_per_column),
        "floor": _digits(row.penalty_floor),
    }
    if options.sigma_max_only:
        del cells["σmin"], cells["σmax/σmin"]
    return cells


def _table(rows: Sequence[dict[str, str]], options: SpectrumOptions) -> Iterator[Table | str]:
    """Yields a table that fits the terminal, and a line that names the columns it left out."""
    title = f"Singular values, R for α = {options.alpha:g}"
    table, left_out = fitting_table(rows, left=["layer"], optional=OPTIONAL_COLUMNS, title=title)
    yield table
    if left_out:
        yield f"The terminal is too narrow for: {', '.join(left_out)}. --csv writes all columns."


def _is_upper_bound(ends: "ExtremeSingularValues") -> bool:
    """Whether σmin is only an upper bound: it is not distinguishable from 0, or not accurate."""
    return ends.sigma_min_error >= ends.sigma_min > 0 or not ends.sigma_min_converged


def _times(size: Sequence[int] | None) -> str:
    return "×".join(map(str, size)) if size else "-"


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _record(row: "KernelSpectrum") -> dict[str, Any]:
    """Returns a row for files in plain values. What was not measured is None, and infinity is "inf"."""
    ends = row.extremes
    no_sigma_min = ends is None or math.isnan(ends.sigma_min)
    record = {
        "layer": row.name,
        "kernel_shape": row.kernel_shape,
        "input_size": row.input_size,
        "sigma_max": ends and ends.sigma_max,
        "sigma_min": ends and ends.sigma_min,
        "sigma_max_error": ends and ends.sigma_max_error,
        "sigma_min_error": ends and ends.sigma_min_error,
        "sigma_max_converged": ends and ends.sigma_max_converged,
        "sigma_min_converged": None if no_sigma_min else ends and ends.sigma_min_converged,
        "sigma_min_is_upper_bound": None if no_sigma_min else ends and _is_upper_bound(ends),
        "condition_number": row.condition_number,
        "penalty": row.penalty,
        "penalty_per_column": row.penalty_per_column,
        "penalty_floor": row.penalty_floor,
        "reason": row.reason,
    }
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    return value


def _write_csv(file: TextIO, rows: Sequence["KernelSpectrum"]) -> None:
    records = [_record(row) for row in rows]
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    for record in records:
        for name in ("kernel_shape", "input_size"):
            record[name] = None if record[name] is None else "x".join(map(str, record[name]))
        writer.writerow(record)
