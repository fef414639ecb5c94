"""Between the commands and the terminal: tables, progress, Ctrl-C, and the messages of TensorFlow."""

import contextlib
import dataclasses
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tf_frobreg.cli.files import BadInput
from tf_frobreg.cli.streams import discard
from tf_frobreg.tables import terminal_width
from tf_frobreg.text import one_line

WIDTH = 200  # of a file or a pipe


def show(*lines: str | Table) -> bool:
    """Prints lines and tables. The files are already written, so a closed or full output is no error.

    Returns:
        Whether standard output took them, or its reader has closed it.
    """
    console = Console(markup=False, highlight=False, width=terminal_width() or WIDTH)
    try:
        for line in lines:
            console.print(line, soft_wrap=isinstance(line, str))
        sys.stdout.flush()
    except (OSError, SystemExit) as error:  # rich raises SystemExit for a broken pipe
        discard(sys.stdout)
        reason = getattr(error, "strerror", None) or "closed"
        print(f"Standard output failed ({reason}). The files are written", file=sys.stderr)
        return isinstance(error, (BrokenPipeError, SystemExit))
    return True


def show_remark(name: str, remark: str | None) -> None:
    """Prints a remark on a kernel, if there is one, as a line on standard error."""
    if remark is not None:
        print(one_line(f"{name}: {remark}"), file=sys.stderr)


@contextlib.contextmanager
def progress_display() -> Iterator[Progress]:
    """Yields a progress display. Start it with its first task: bad input then prints only its one line."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    try:
        yield progress
    finally:
        if progress.tasks:
            progress.stop()


@dataclasses.dataclass
class StopRequest:
    """Whether the user pressed Ctrl-C.

    Attributes:
        pressed: Whether Ctrl-C was pressed.
        writing: Whether files are being written. A second Ctrl-C does not interrupt that.
    """

    pressed: bool = False
    writing: bool = False


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Yields a `StopRequest`. The first Ctrl-C sets `pressed`, a second one raises KeyboardInterrupt."""
    request = StopRequest()

    def note(*_: Any) -> None:
        if request.pressed and not request.writing:
            raise KeyboardInterrupt
        request.pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


def _scratch_file() -> Any:
    """Returns an open binary file that nobody keeps. It loses what is written if there is no room for one."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "r+b")


def _stop_behind(error: BaseException) -> BaseException | None:
    """Returns the Ctrl-C or the exit behind an error. C code that is interrupted can raise ImportError."""
    cause: BaseException | None = error
    while isinstance(cause, Exception):
        cause = cause.__cause__ or cause.__context__
    return cause


def load_tensorflow() -> None:
    """Imports TensorFlow and the public names. Shows the messages of TensorFlow only if that fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    with _scratch_file() as log, contextlib.ExitStack() as stack:
        stderr = os.dup(2)
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        os.dup2(log.fileno(), 2)
        try:
            import tensorflow as tf

            importlib.import_module("tf_frobreg.api")
            tf.zeros(())  # looks for devices, and reports what it did not find
        except Exception as error:
            if (stop := _stop_behind(error)) is not None:
                raise stop from None
            # a broken installation, a wrong KERAS_BACKEND, no room for files
            if isinstance(error, (ImportError, ValueError, OSError)):
                raise BadInput(f"Keras or TensorFlow cannot be imported ({one_line(error)})") from None
            log.seek(0)
            os.write(stderr, log.read())
            raise
