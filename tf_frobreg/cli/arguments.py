"""The arguments of each command: how they are parsed, and what the command gets."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from tf_frobreg import __version__
from tf_frobreg.text import one_line

if TYPE_CHECKING:
    from tf_frobreg.convolution.geometry import Geometry
    from tf_frobreg.keras.trace import InputSize

ACCURACY = 1e-4  # of σmax, if the user gives none
GEOMETRY = ("strides", "padding", "dilation_rate", "groups", "kind")


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Arguments of `tf-frobreg reproduce`."""

    command: str
    distribution: str
    seed: int
    output_dir: str
    max_steps: int
    tolerance: float
    force: bool


@dataclasses.dataclass(frozen=True)
class RegularizeOptions:
    """Arguments of `tf-frobreg regularize`."""

    command: str
    file: str
    output: str
    input_size: "InputSize | None"
    alpha: float | None
    include: list[str] | None
    exclude: list[str] | None
    learning_rate: str | float
    direction: str | None
    escape: bool
    max_steps: int
    tolerance: float
    geometry: "Geometry"  # only what the user gave
    plot: str | None
    history: str | None
    force: bool


@dataclasses.dataclass(frozen=True)
class SpectrumOptions:
    """Arguments of `tf-frobreg spectrum`."""

    command: str
    file: str
    model: str | None
    input_size: "InputSize | None"
    alpha: float | None
    accuracy: float
    sigma_max_only: bool
    lipschitz: bool
    geometry: "Geometry"  # only what the user gave
    json: str | None
    csv: str | None
    plot: str | None
    plot_kind: str | None
    force: bool


Options = ReproduceOptions | RegularizeOptions | SpectrumOptions


def parse_arguments(arguments: Sequence[str] | None) -> Options:
    """Returns the options of the command, or exits with status 2 and one line."""
    values = vars(_parser().parse_args(arguments))
    if values["command"] == "reproduce":
        return ReproduceOptions(**values)
    geometry: Any = {name: values.pop(name) for name in GEOMETRY if name in values}
    record = RegularizeOptions if values["command"] == "regularize" else SpectrumOptions
    return record(**values, geometry=geometry)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


class _PerAxis(argparse.Action):
    """Stores one int for all axes, or one int per axis."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, _size(values))


class _InputSize(argparse.Action):
    """Stores one int for all axes, one int per axis, or a dict of sizes by the name of an input or layer."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error("argument --input-size: give it once, followed by all sizes")
        named = [text.rpartition("=") for text in values]
        try:
            sizes = [[int(n) for n in size.lower().split("x")] for _, _, size in named]
        except ValueError:
            sizes = []
        plain = [size for size, (_, separator, _) in zip(sizes, named, strict=False) if not separator]
        if not sizes or (plain and len(plain) < len(named)):
            parser.error(
                f"argument --input-size: must be N, one N per axis, or NAME=N or NAME=NxN for each input. "
                f"Received: {' '.join(values)!r}"
            )
        names = [name for name, _, _ in named]
        for name in names:
            if not plain and names.count(name) > 1:
                parser.error(
                    f"argument --input-size: must have each name once. Received: {name!r} in "
                    f"{' '.join(values)!r}"
                )
        per_name = {name: _size(size) for (name, _, _), size in zip(named, sizes, strict=True)}
        setattr(namespace, self.dest, _size([n for size in plain for n in size]) if plain else per_name)


def _size(values: list[int]) -> int | list[int]:
    return values[0] if len(values) == 1 else values


PER_AXIS: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N", "action": _PerAxis}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tf-frobreg", description="Keep the singular values of convolutions near √α (arXiv:1907.11235)."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_reproduce(commands)
    _add_regularize(commands)
    _add_spectrum(commands)
    return parser


def _add_reproduce(commands: Any) -> None:
    parser = commands.add_parser(
        "reproduce",
        help="run the experiment of the paper's section 4",
        description="Run Algorithm 3.1 on the four kernels of Figure 4.1, with 20×20 images, α = 1 and the "
        "step sizes of the paper. Print a table, draw the figure, and write every step to a CSV file. "
        "Exit status: 0 converged, 1 not converged (the files are written), 2 bad input, 130 interrupted.",
    )
    parser.add_argument(
        "--distribution",
        choices=("normal", "uniform"),
        default="normal",
        help="distribution of the entries; uniform equals MATLAB's rng(SEED); rand (default: normal)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the random kernels (default: 1)")
    parser.add_argument(
        "--output-dir",
        default=".",
        help="directory for figure_4_1.png and figure_4_1.csv, or figure_4_1_uniform.* (default: .)",
    )
    _add_descent(parser)
    _add_force(parser)


def _add_regularize(commands: Any) -> None:
    parser = commands.add_parser(
        "regularize",
        help="run Algorithm 3.1 on one kernel or on a whole model",
        description="Run Algorithm 3.1 on the kernel in a .npy file, or on every kernel of a .keras or .h5 "
        "model. The geometry of a model's kernels is read from its layers. The loss of a model is ignored: a "
        "trained model can lose its accuracy, and then needs more training. Ctrl-C stops the descent and "
        "keeps the kernels reached so far. Exit status: 0 converged, 1 not converged (the result is "
        "written), 2 bad input, 130 interrupted before there was a result.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a kernel, .npy, of shape (*kernel_size, in_channels, filters); or a model, .keras or .h5",
    )
    parser.add_argument("--output", required=True, help="file for the result, of the same type as FILE")
    _add_geometry(parser)
    parser.add_argument(
        "--alpha",
        type=float,
        help="α, the target of σ² (default: α of the penalty that a model's kernel has, otherwise 1)",
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="NAME",
        help="layer of a model to regularize, wildcards allowed; can be repeated (default: all)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        metavar="NAME",
        help="layer of a model to leave as it is, wildcards allowed; can be repeated (default: none)",
    )
    parser.add_argument(
        "--learning-rate",
        type=_learning_rate,
        default="exact",
        help='λ, the factor of half the gradient, equation (3.2): "exact" (default), the best λ at each '
        'step; "paper", step sizes for images of about 20×20; or a number',
    )
    parser.add_argument(
        "--direction",
        choices=("gradient", "conjugate"),
        help='direction of the steps (default: "conjugate" with --learning-rate exact, "gradient" otherwise)',
    )
    parser.add_argument(
        "--no-escape",
        dest="escape",
        action="store_false",
        help="end in a local minimum instead of jumping out of it",
    )
    _add_descent(parser)
    parser.add_argument("--plot", help="picture of σmax and σmin against the steps (.png, .pdf, .svg)")
    parser.add_argument("--history", help=".csv file with every step")
    _add_force(parser)


def _add_spectrum(commands: Any) -> None:
    parser = commands.add_parser(
        "spectrum",
        help="show the singular values of kernels or of a whole model",
        description="Show σmax, σmin, the condition number and the penalty R of each kernel in a file. For a "
        "model, image size, strides, padding and so on are read from the layers. Bias and activation are "
        "ignored. Exit status: 0 measured, 1 accuracy not reached, nothing measured, or the image size of a "
        "layer not known, 2 bad input, 130 interrupted.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="kernels of shape (*kernel_size, in_channels, filters): .npy or .npz; or a model: .keras or "
        ".h5; or the weights of a model: .weights.h5 with --model",
    )
    parser.add_argument(
        "--model", help="model for a .weights.h5 file: .keras, .h5 or .json, as from model.to_json()"
    )
    _add_geometry(parser)
    parser.add_argument(
        "--alpha",
        type=float,
        help="α of R, the target of σ² (default: α of the penalty that a model's kernel has, otherwise 1)",
    )
    parser.add_argument(
        "--accuracy",
        type=float,
        default=ACCURACY,
        help="relative accuracy of σmax; σmin has the square root of it (default: 1e-4)",
    )
    parser.add_argument("--sigma-max-only", action="store_true", help="leave out σmin, which takes longer")
    parser.add_argument(
        "--lipschitz",
        action="store_true",
        help="show instead an upper bound of the Lipschitz constant of a model, layer by layer",
    )
    parser.add_argument("--json", help=".json file for the table, with error estimates unless --lipschitz")
    parser.add_argument("--csv", help=".csv file for the table, with error estimates unless --lipschitz")
    parser.add_argument("--plot", help="picture of the singular values (.png, .pdf, .svg)")
    parser.add_argument(
        "--plot-kind",
        choices=("sorted", "ranges", "histogram"),
        help="one panel per layer, σmin to σmax of all layers in one panel, or one histogram of all layers "
        "(default: sorted for up to 9 layers, otherwise ranges)",
    )
    _add_force(parser)


def _add_geometry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input-size",
        nargs="+",
        metavar="N",
        action=_InputSize,
        help="size of the image, N or one N per axis; required for kernels of convolutions and for models "
        "that leave it open; LEFT=32 RIGHT=64x48 gives the sizes of inputs or layers by their names",
    )
    # Without an option the default of the library holds.
    unset = argparse.SUPPRESS
    parser.add_argument("--strides", default=unset, help="strides of the layer (default: 1)", **PER_AXIS)
    parser.add_argument("--padding", default=unset, help='"same" (default), "valid" or "circular"')
    parser.add_argument(
        "--dilation-rate", default=unset, help="dilation rate of the layer (default: 1)", **PER_AXIS
    )
    parser.add_argument("--groups", default=unset, type=int, help="groups of the layer (default: 1)")
    parser.add_argument("--kind", default=unset, help='"conv" (default), "depthwise" or "transpose"')


def _add_descent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-steps", type=int, default=2000, help="maximal number of steps (default: 2000)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="stop if max(|σmax − √α|, |σmin − √α|) is at most this (default: 0.01)",
    )


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="overwrite existing output files")


def _learning_rate(text: str) -> str | float:
    if text in ("exact", "paper"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'must be "exact", "paper" or a number. Received: {text!r}'
        ) from None
