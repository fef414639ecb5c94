"""Files the commands read and write: read without unpickling, written whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

__all__ = ["BadInput", "OutputFile", "output_files", "read_kernel"]


class BadInput(Exception):
    """Something the user gave cannot be used; the message is one line for the terminal."""


def read_kernel(path: str) -> np.ndarray:
    """Returns the array in a `.npy` file, and never unpickles anything."""
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"KERNEL cannot be read ({error.strerror or error}). Received: {path}") from None
    except (ValueError, EOFError) as error:
        raise BadInput(
            "KERNEL must be a whole .npy file of plain numbers; pickles are refused. "
            f"Received: {path} ({error})"
        ) from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise BadInput(f"KERNEL must be a .npy file of one array, not an archive. Received: {path}")
    return array


class OutputFile:
    """A file that takes its place only once it has been written to the end."""

    def __init__(self, option: str, path: str, *, force: bool):
        """Makes sure now, before any work, that the file can be written later."""
        self.path = Path(path).resolve()
        self._option, self._force = option, force
        if self.path.exists() and not self.path.is_file():
            raise BadInput(f"{option} must be a file to write. Received: {path}, which is none")
        self._refuse_existing()
        try:
            handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        except OSError as error:
            raise BadInput(f"{option} cannot be written ({error.strerror}). Received: {path}") from None
        os.close(handle)
        self._temporary = Path(name)

    def write(self, writer: Callable[[BinaryIO], None]) -> None:
        """Calls `writer` with an open binary file, then puts the file in its place."""
        with self._temporary.open("wb") as file:
            writer(file)
        umask = os.umask(0)
        os.umask(umask)
        self._temporary.chmod(0o666 & ~umask)  # temporary files are private, results are not
        self._refuse_existing()
        os.replace(self._temporary, self.path)

    def discard(self) -> None:
        """Leaves no trace of a file that was not written."""
        self._temporary.unlink(missing_ok=True)

    def _refuse_existing(self):
        if self.path.exists() and not self._force:
            raise BadInput(f"{self._option} exists; --force overwrites it. Received: {self.path}")


@contextlib.contextmanager
def output_files(paths: dict[str, str | None], *, force: bool) -> Iterator[dict[str, OutputFile]]:
    """Yields an `OutputFile` for each option that has a path; those not written leave no trace."""
    given = {option: path for option, path in paths.items() if path is not None}
    if len({Path(path).resolve() for path in given.values()}) < len(given):
        raise BadInput(f"{', '.join(given)} must be different files. Received: {', '.join(given.values())}")
    with contextlib.ExitStack() as stack:
        files = {}
        for option, path in given.items():
            files[option] = OutputFile(option, path, force=force)
            stack.callback(files[option].discard)
        yield files
