"""The command line: parses arguments, checks files, calls the library, writes.

TensorFlow is imported only after these checks, so that `--help` and bad options answer at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from tf_frobreg.cli.arguments import Options, ReproduceOptions, SpectrumOptions, parse_arguments
from tf_frobreg.cli.streams import forgiving_streams, open_closed_streams
from tf_frobreg.text import one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after `tf-frobreg`. The default is those of the process.

    Returns:
        The exit status: 0 converged or measured; 1 not converged or not accurate, the result is written; 2
        bad input; 130 interrupted, nothing is written; 143 terminated.
    """
    open_closed_streams()
    with forgiving_streams():
        options = parse_arguments(arguments)
        os.environ["MPLBACKEND"] = "agg"  # figures are only written, and another name may be wrong
        if threading.current_thread() is not threading.main_thread():
            return _run(options)
        previous = signal.signal(signal.SIGTERM, _terminate)
        try:
            return _run(options)
        finally:
            signal.signal(signal.SIGTERM, previous)


def _terminate(*_: object) -> NoReturn:
    """Ends the process like a default SIGTERM, after what is half done has been cleaned up."""
    raise SystemExit(128 + signal.SIGTERM)


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
        print(f"tf-frobreg {options.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tf-frobreg {options.command}: interrupted, nothing written", file=sys.stderr)
        return 130
