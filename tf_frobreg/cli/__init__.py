"""The command line: parses arguments, checks files, calls the library, writes.

TensorFlow is imported only after these checks, so that `--help` and bad options answer at once.
"""

import sys
from collections.abc import Sequence
from io import TextIOWrapper

from tf_frobreg.cli.arguments import Options, ReproduceOptions, SpectrumOptions, parse_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after `tf-frobreg`. The default is those of the process.

    Returns:
        The exit status: 0 converged or measured; 1 not converged or not accurate, the result is written; 2
        bad input; 130 interrupted, nothing is written.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show σ and √
    options = parse_arguments(arguments)
    return _run(options)


def _run(options: Options) -> int:
    # NumPy and rich come with these modules. --help does not wait for them.
    from tf_frobreg.cli.descent import regularize, reproduce
    from tf_frobreg.cli.files import BadInput
    from tf_frobreg.cli.spectrum import spectrum

    try:
        if isinstance(options, ReproduceOptions):
            return reproduce(options)
        if isinstance(options, SpectrumOptions):
            return spectrum(options)
        return regularize(options)
    except BadInput as error:
        message = " ".join(str(error).split())
        print(f"tf-frobreg {options.command}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tf-frobreg {options.command}: interrupted, nothing written", file=sys.stderr)
        return 130
