"""The command `spectrum`: the singular values of kernels in a file, or of a model."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

import tf_frobreg  # its public names, and TensorFlow, are loaded when they are used
from tf_frobreg.checks import check_accuracy, check_number
from tf_frobreg.cli.arguments import SpectrumOptions
from tf_frobreg.cli.files import (
    PICTURES,
    BadInput,
    as_options,
    check_ending,
    output_files,
    read_arrays,
    refusals_as_bad_input,
    size_of_images,
    write_files,
    written,
)
from tf_frobreg.cli.lipschitz import check_lipschitz, show_lipschitz
from tf_frobreg.cli.model_files import MODELS, load_model, load_model_and_weights, refuse_geometry
from tf_frobreg.cli.terminal import load_tensorflow, progress_display, show, show_remark
from tf_frobreg.tables import text_report
from tf_frobreg.text import printable

if TYPE_CHECKING:
    from tf_frobreg import Convolution, KernelSpectrum

ARRAYS = (".npy", ".npz")
PLOT_ROWS = 4096  # of the smaller side of M, up to which a figure shows all singular values: 4 s


class _Kernel(NamedTuple):
    """A kernel to measure, α of its R, and what its row does not show."""

    name: str
    value: np.ndarray
    conv: "Convolution"
    alpha: float
    remark: str | None = None


class _Contents(NamedTuple):
    """What a file holds.

    Attributes:
        kernels: The kernels to measure.
        untreated: Rows for what cannot be measured.
        others: Number of other layers, by type.
        lacks_size: Whether something is not measured only because its image size is not known.
    """

    kernels: list[_Kernel]
    untreated: list["KernelSpectrum"]
    others: dict[str, int]
    lacks_size: bool = False


def spectrum(options: SpectrumOptions) -> int:
    """Shows and writes singular values and penalty of each kernel in a file. Returns the exit status."""
    _check(options)
    outputs = {"--json": options.json, "--csv": options.csv, "--plot": options.plot}
    inputs = [path for path in (options.file, options.model) if path]
    files = output_files(outputs, force=options.force, inputs=inputs)
    arrays = read_arrays(options.file) if options.file.endswith(ARRAYS) else None
    load_tensorflow()
    if options.lipschitz:
        return show_lipschitz(_model(options), options, files)
    with refusals_as_bad_input():
        contents = _contents_of_model(options) if arrays is None else _contents_of_arrays(arrays, options)
        if not contents.kernels and not contents.untreated:
            raise BadInput(f"FILE must hold a kernel. Received: {options.file}")
        rows, spectra = _measure(contents.kernels, options)
    rows = [*rows, *contents.untreated]
    if "--plot" in files and not spectra:
        raise BadInput(f"--plot has nothing to draw: no kernel was measured. Received: {options.file}")
    text = _json(options.file, rows, contents.others)
    alphas = {kernel.name: kernel.alpha for kernel in contents.kernels}
    write_files(
        files,
        {
            "--json": lambda file: file.write_text(lambda content: content.write(f"{text}\n")),
            "--csv": lambda file: file.write_text(lambda content: _write_csv(content, rows)),
            "--plot": lambda file: file.write_figure(
                tf_frobreg.plot_spectrum(spectra, kind=options.plot_kind, alpha=alphas)
            ),
        },
    )
    missed = [line for row in rows for line in _missed(row)]
    others = ", ".join(f"{count} {name}" for name, count in sorted(contents.others.items()))
    is_shown = show(
        _report(rows, missed),
        *([f"Without a kernel: {others}"] if others else []),
        *([written(files)] if files else []),
    )
    is_measured = any(row.reason is None for row in rows) and not contents.lacks_size
    return 0 if is_measured and not missed and (is_shown or files) else 1


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
    if options.lipschitz:
        check_lipschitz(options)
    if not options.file.endswith(ARRAYS):
        refuse_geometry(options.geometry, options.file)
    with refusals_as_bad_input():
        if options.alpha is not None:
            check_number("alpha", options.alpha, exclusive=True)
        check_accuracy(options.accuracy)


def _model(options: SpectrumOptions) -> Any:
    if options.model:
        return load_model_and_weights(options.model, options.file)
    return load_model(options.file, "FILE")


def _contents_of_model(options: SpectrumOptions) -> _Contents:
    from tf_frobreg.keras.own_penalty import remark_on, target_of
    from tf_frobreg.keras.read_layers import read_kernels

    found = read_kernels(_model(options), options.input_size)
    kernels = [
        _Kernel(
            kernel.name,
            kernel.value,
            kernel.conv,
            target_of(kernel, options.alpha).alpha,
            remark_on(kernel),
        )
        for kernel in found.kernels
    ]
    untreated = [tf_frobreg.KernelSpectrum(layer.name, as_options(layer.reason)) for layer in found.untreated]
    lacks_size = any(layer.of_unknown_size for layer in found.untreated)
    return _Contents(kernels, untreated, found.others, lacks_size)


def _contents_of_arrays(arrays: Mapping[str, np.ndarray], options: SpectrumOptions) -> _Contents:
    from tf_frobreg.convolution.kernel import known_values, remark_on_order

    kernels, untreated = [], []
    alpha = 1.0 if options.alpha is None else options.alpha
    input_size = size_of_images(options.input_size, options.file)
    for name, array in arrays.items():
        try:
            kernel = known_values(array)
            show_remark(name, remark_on_order(kernel.shape))
            if kernel.ndim == 2:  # a Dense layer has neither image nor geometry
                conv = tf_frobreg.Convolution.of(kernel.shape, (), {})
            elif input_size is None:
                raise ValueError("--input-size is needed for kernels without a model")
            else:
                conv = tf_frobreg.Convolution.of(kernel.shape, input_size, options.geometry)
        except (ValueError, TypeError) as error:
            if len(arrays) == 1:
                raise
            untreated.append(tf_frobreg.KernelSpectrum(name, as_options(str(error))))
        else:
            kernels.append(_Kernel(name, kernel, conv, alpha))
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
            progress.update(task, note=printable(kernel.name))
            row = report_kernel(
                kernel.name,
                kernel.value,
                kernel.conv,
                kernel.alpha,
                accuracy=options.accuracy,
                sigma_min=not options.sigma_max_only,
                remark=kernel.remark,
            )
            if options.plot and row.reason is None:
                every = min(kernel.conv.shape) <= PLOT_ROWS
                spectra[kernel.name] = (
                    all_singular_values(kernel.value, kernel.conv, 1e-7) if every else row.extremes
                )
            rows.append(row)
            progress.advance(task)
    return rows, spectra


def _missed(row: "KernelSpectrum") -> Iterator[str]:
    """Yields a line for each singular value that did not reach the accuracy."""
    ends = row.extremes
    if ends is not None and not ends.sigma_max_converged:
        yield f"{row.name}: σmax may be about {ends.sigma_max_error:.2g} larger"
    if ends is not None and not ends.sigma_min_converged and not math.isnan(ends.sigma_min):
        yield f"{row.name}: σmin may be about {min(ends.sigma_min_error, ends.sigma_min_bound):.2g} smaller"


def _report(rows: Sequence["KernelSpectrum"], missed: Sequence[str]) -> str:
    """Returns a table, and what was not accurate or not measured."""
    from tf_frobreg.spectrum.kernel_report import (
        LEFT_COLUMNS,
        OPTIONAL_COLUMNS,
        spectrum_remarks,
        spectrum_rows,
        spectrum_summary,
    )

    return text_report(
        spectrum_summary(rows),
        spectrum_rows(rows),
        [*(f"Accuracy not reached: {line}" for line in missed), *spectrum_remarks(rows)],
        left=LEFT_COLUMNS,
        optional=OPTIONAL_COLUMNS,
        hint=" --csv writes all columns.",
    )


def _json(path: str, rows: Sequence["KernelSpectrum"], others: Mapping[str, int]) -> str:
    """Returns the rows as JSON, which has no infinity. `alpha` of the file is null if the kernels' differ."""
    from tf_frobreg.spectrum.kernel_report import common_alpha

    kernels = [
        {name: "inf" if value == math.inf else value for name, value in row.to_dict().items()} for row in rows
    ]
    content = {"file": path, "alpha": common_alpha(rows), "kernels": kernels, "without_kernel": others}
    return json.dumps(content, indent=2, ensure_ascii=False)


def _write_csv(file: TextIO, rows: Sequence["KernelSpectrum"]) -> None:
    records = [row.to_dict() for row in rows]
    writer = csv.DictWriter(file, records[0])
    writer.writeheader()
    for record in records:
        for name in ("kernel_shape", "input_size"):
            record[name] = None if record[name] is None else "x".join(map(str, record[name]))
        writer.writerow(record)
