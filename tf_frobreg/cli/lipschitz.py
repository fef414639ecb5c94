"""`spectrum --lipschitz`: an upper bound of a model's Lipschitz constant."""

import csv
import json
from typing import Any, TextIO

import tf_frobreg  # its public names, and TensorFlow, are loaded when they are used
from tf_frobreg.cli.arguments import ACCURACY, SpectrumOptions
from tf_frobreg.cli.files import BadInput, OutputFile, refusals_as_bad_input, write_files, written
from tf_frobreg.cli.terminal import show


def check_lipschitz(options: SpectrumOptions) -> None:
    """Raises `BadInput` for options that do not go with --lipschitz."""
    others = {
        "--alpha": options.alpha is not None,
        "--accuracy": options.accuracy != ACCURACY,
        "--sigma-max-only": options.sigma_max_only,
        "--plot": options.plot is not None,
        "--plot-kind": options.plot_kind is not None,
    }
    if options.file.endswith((".npy", ".npz")):
        raise BadInput(f"--lipschitz needs a model, .keras or .h5. Received: {options.file}")
    if given := [name for name, is_given in others.items() if is_given]:
        raise BadInput(f"{', '.join(given)} cannot be combined with --lipschitz, which has no such choice")


def show_lipschitz(model: Any, options: SpectrumOptions, files: dict[str, OutputFile]) -> int:
    """Shows and writes the bound of a model. Returns the exit status."""
    if model.layers and not model.built:  # nobody can call it here
        raise BadInput(f"FILE must hold a model that was built before it was saved. Received: {options.file}")
    with refusals_as_bad_input():
        bound = tf_frobreg.lipschitz_bound(model, options.input_size)
    records = bound.records()
    content = {"file": options.file, "lipschitz_bound": bound.value, "layers": records}
    text = json.dumps(content, indent=2, ensure_ascii=False)

    def write_csv(file: TextIO) -> None:
        writer = csv.DictWriter(file, ["layer", "kind", "bound", "from_input", "method"])
        writer.writeheader()
        writer.writerows(records)

    write_files(
        files,
        {
            "--json": lambda file: file.write_text(lambda stream: stream.write(f"{text}\n")),
            "--csv": lambda file: file.write_text(write_csv),
        },
    )
    is_shown = show(str(bound), *([written(files)] if files else []))
    return 0 if is_shown or files else 1
