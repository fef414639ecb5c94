"""Between the commands and the terminal: progress, Ctrl-C, and an output that may be gone."""

import contextlib
import os
import signal
import sys
import tempfile
import types
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def show(*lines) -> None:
    """Prints tables and lines; a standard output that is gone or full does not undo what was written."""
    console = Console(markup=False, highlight=False, width=terminal_width())
    try:
        for line in lines:
            console.print(line, soft_wrap=isinstance(line, str))
        sys.stdout.flush()
    except (OSError, SystemExit) as error:  # rich turns a broken pipe into the latter
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = getattr(error, "strerror", None) or "closed"
        print(f"The files are written; standard output is not: {reason}", file=sys.stderr)


def terminal_width() -> int:
    """Columns of standard output; a file or pipe has no width that a table would have to be broken to."""
    return Console().width if sys.stdout.isatty() else 200


@contextlib.contextmanager
def progress_display() -> Iterator[Progress]:
    """A progress display that appears with its first task, and so leaves bad input its one line."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    try:
        yield progress
    finally:
        if progress.tasks:
            progress.stop()


@contextlib.contextmanager
def stop_request() -> Iterator[types.SimpleNamespace]:
    """Yields what tells whether Ctrl-C was `pressed`; a second one ends all but what is `writing`."""
    request = types.SimpleNamespace(pressed=False, writing=False)

    def note(*_):
        if request.pressed and not request.writing:
            raise KeyboardInterrupt
        request.pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, previous)


def library():
    """Imports the package and TensorFlow, whose messages at start are shown only if that fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log, contextlib.ExitStack() as stack:
        stderr = os.dup(2)
        stack.callback(os.close, stderr)
        stack.callback(os.dup2, stderr, 2)
        os.dup2(log.fileno(), 2)
        try:
            import tensorflow as tf

            import tf_frobreg.api

            tf.zeros(())  # looks for devices, and tells what it did not find
        except Exception:
            log.seek(0)
            os.write(stderr, log.read())
            raise
    return tf_frobreg
