"""Standard streams that are closed or full. They never stop the work."""

import contextlib
import os
import sys
from collections.abc import Iterator
from io import TextIOWrapper
from typing import Any


def open_closed_streams() -> None:
    """Opens the null device in place of standard streams that are closed.

    Otherwise the next file that is opened takes the number of a closed stream, and what is printed gets into
    the file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """A context in which standard error loses what it cannot take, and every character can be shown."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal can show σ and √
    stderr = sys.stderr
    sys.stderr = _Forgiving(stderr)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = stderr


def discard(stream: Any) -> None:
    """Directs a stream that has failed to the null device, with what it has not written yet."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class _Forgiving:
    """A text stream that discards what it cannot write."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text. Returns the number of characters."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes what is not written yet."""
        self._try(self._stream.flush)

    def _try(self, function: Any, *arguments: Any) -> None:
        try:
            function(*arguments)
        except OSError:
            discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
