"""The command line: reads, calls the library, writes.

Nothing here imports TensorFlow before work begins, so that `--help` and bad options answer at once.
"""

import argparse
import sys
from collections.abc import Sequence

from tf_frobreg import __version__
from tf_frobreg.cli import descent, spectrum
from tf_frobreg.cli.files import BadInput

GEOMETRY = ("strides", "padding", "dilation_rate", "groups", "kind")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    0 converged; 1 not converged, what was reached is written; 2 bad input; 130 interrupted, nothing written.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # σ and √ are not in every terminal's alphabet
    options = _parser().parse_args(arguments)
    given = {name: getattr(options, name, None) for name in GEOMETRY}
    options.geometry = {name: value for name, value in given.items() if value is not None}
    try:
        return options.run(options)
    except BadInput as error:
        message = " ".join(str(error).split())
        print(f"tf-frobreg {options.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tf-frobreg {options.command}: interrupted, nothing written", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


class _PerAxis(argparse.Action):
    """One int for all axes, or one per axis."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


INPUT_SIZE = "of the image: N, or one N per axis; needed for kernels and for models that leave it open"
PER_AXIS = {"type": int, "nargs": "+", "metavar": "N", "action": _PerAxis}


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


def _add_reproduce(commands):
    parser = commands.add_parser(
        "reproduce",
        parents=[_files(), _descent()],
        help="run the experiment of the paper's section 4",
        description="Run Algorithm 3.1 on the four kernels of Figure 4.1 (20×20 image, α = 1, the paper's "
        "step sizes); print a table, draw the figure and write every recorded step to a CSV file.",
    )
    parser.add_argument(
        "--distribution",
        choices=("normal", "uniform"),
        default="normal",
        help="of the kernels' entries; uniform equals MATLAB's rng(SEED); rand (default: normal)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random kernels (default: 1)")
    parser.add_argument(
        "--output-dir",
        default=".",
        help="where figure_4_1.png and .csv go; uniform adds _uniform (default: .)",
    )
    parser.set_defaults(run=descent.reproduce)


def _add_regularize(commands):
    parser = commands.add_parser(
        "regularize",
        parents=[_files(), _descent(), _geometry()],
        help="run Algorithm 3.1 on a kernel of your own, or on a whole model",
        description="Run Algorithm 3.1 on the kernel in a .npy file, or on every kernel of a .keras or .h5 "
        "model, whose layers tell their geometry. Ctrl-C stops it and keeps what was reached. Exit status: 0 "
        "converged, 1 not converged (the result is written), 2 bad input, 130 interrupted before there was "
        "anything to write.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="kernel, .npy, (*kernel_size, in_channels, filters); or model, .keras, .h5",
    )
    parser.add_argument("--input-size", help=INPUT_SIZE, **PER_AXIS)
    parser.add_argument("--output", required=True, help="file for the result, with the ending of FILE")
    parser.add_argument("--alpha", type=float, default=1.0, help="target of σ² (default: 1)")
    parser.add_argument(
        "--learning-rate",
        type=_learning_rate,
        default="exact",
        help='λ, which multiplies half the gradient as in (3.2): "exact" (default), the best one at each '
        'step; "paper", whose steps suit images of about 20×20; or a number',
    )
    parser.add_argument(
        "--direction",
        choices=("gradient", "conjugate"),
        help='of the steps (default: "conjugate" with --learning-rate exact, "gradient" otherwise)',
    )
    parser.add_argument("--plot", help="picture of σmax and σmin against the steps (.png, .pdf, .svg)")
    parser.add_argument("--history", help=".csv file for every recorded step")
    parser.set_defaults(run=descent.regularize)


def _add_spectrum(commands):
    parser = commands.add_parser(
        "spectrum",
        parents=[_files(), _geometry()],
        help="show the singular values of kernels or of a whole model",
        description="Show σmax, σmin, the condition number and the penalty R of each kernel in a file. The "
        "layers of a model tell image size, strides, padding and so on; bias and activation do not enter. "
        "Exit status: 0 measured, 1 accuracy not reached or nothing measured, 2 bad input, 130 interrupted.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="kernels, (*kernel_size, in_channels, filters): .npy, .npz; or a model: .keras, .h5; or its "
        "weights: .weights.h5 with --model",
    )
    parser.add_argument("--model", help=".keras, .h5 or .json (model.to_json()) file for a .weights.h5 file")
    parser.add_argument("--input-size", help=INPUT_SIZE, **PER_AXIS)
    parser.add_argument("--alpha", type=float, default=1.0, help="α of R, the target of σ² (default: 1)")
    parser.add_argument(
        "--accuracy",
        type=float,
        default=1e-4,
        help="of σmax, relative; σmin has its square root (default: 1e-4)",
    )
    parser.add_argument("--sigma-max-only", action="store_true", help="leave out σmin, which takes longer")
    parser.add_argument("--json", help=".json file for the table, with error bounds")
    parser.add_argument("--csv", help=".csv file for the table, with error bounds")
    parser.add_argument("--plot", help="picture of the singular values (.png, .pdf, .svg)")
    parser.add_argument(
        "--plot-kind",
        choices=("sorted", "histogram"),
        default="sorted",
        help="one panel per layer, or all layers in one histogram (default: sorted)",
    )
    parser.set_defaults(run=spectrum.spectrum)


def _files():
    """Parent of every command."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--force", action="store_true", help="overwrite output files that exist")
    return parser


def _descent():
    """Parent of the commands that descend."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--max-steps", type=int, default=2000, help="steps at the most (default: 2000)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        help="stop where max(|σmax − √α|, |σmin − √α|) is no larger (default: 0.01)",
    )
    return parser


def _geometry():
    """Parent of the commands that read a kernel; what is not given has the library's default."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--strides", help="of the layer (default: 1)", **PER_AXIS)
    parser.add_argument("--dilation-rate", help="of the layer (default: 1)", **PER_AXIS)
    parser.add_argument("--groups", type=int, help="of the layer (default: 1)")
    parser.add_argument("--padding", help='"same" (default), "valid" or "circular"')
    parser.add_argument("--kind", help='"conv" (default), "depthwise" or "transpose"')
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
