"""Files that the commands read and write: read without unpickling, written whole or not at all."""

import contextlib
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = (".png", ".pdf", ".svg")
_UNDERSCORED = re.compile(r"\b(input_size|dilation_rate|learning_rate|max_steps)\b")  # options with dashes


class BadInput(Exception):
    """The user gave something that cannot be used. The message is one line for the terminal."""


@contextlib.contextmanager
def refusals_as_bad_input() -> Iterator[None]:
    """Turns the errors with which the library refuses an argument into `BadInput`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise BadInput(as_options(str(error))) from None


def as_options(message: str) -> str:
    """Returns a message of the library with the options of the command in place of its arguments."""
    message = re.sub(r"\b(include|exclude)='([^']*)'", r"--\1 \2", message)
    message = message.replace("input_size=None", "no input_size")
    return re.sub(_UNDERSCORED, lambda found: f"--{found[0].replace('_', '-')}", message)


def read_kernel(path: str) -> np.ndarray:
    """Returns the array in a `.npy` file. Never unpickles anything."""
    array = _load(path, ".npy file")
    if not isinstance(array, np.ndarray):
        array.close()
        raise BadInput(f"FILE must be a .npy file of one array, not an archive. Received: {path}")
    return array


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Returns the arrays in a `.npz` file by name, or the array in a `.npy` file by the file's name."""
    arrays = _load(path, ".npy or .npz file")
    if isinstance(arrays, np.ndarray):
        return {Path(path).stem: arrays}
    with arrays:
        try:
            return {name: arrays[name] for name in arrays.files}
        except _DAMAGED:
            raise _not_whole(path, ".npy or .npz file") from None


# MemoryError: a damaged header can claim a huge shape
_DAMAGED = (ValueError, EOFError, MemoryError, OSError, zipfile.BadZipFile, zlib.error)


def _load(path: str, what: str) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"FILE cannot be read ({error.strerror or error}). Received: {path}") from None
    except _DAMAGED:
        raise _not_whole(path, what) from None


def _not_whole(path: str, what: str) -> BadInput:
    return BadInput(f"FILE must be a whole {what} of plain numbers; pickles are refused. Received: {path}")


class OutputFile:
    """A file that takes its place only after it has been written to the end.

    Attributes:
        path: The path, without symbolic links.
    """

    def __init__(self, option: str, path: str, *, force: bool) -> None:
        """Checks now, before any work, that the file can be written later."""
        self.path = Path(path)
        self._option, self._force = option, force
        self._ending = self.path.suffix.lower()
        try:
            self.path = self.path.resolve()
            if self.path.exists() and not self.path.is_file():
                raise BadInput(f"{option} must be a file to write. Received: {path!r}, which is not a file")
            self._refuse_existing()
            self._make_temporary().unlink()
        except (OSError, RuntimeError) as error:  # resolve() raises RuntimeError for links in a circle
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"{option} cannot be written ({reason}). Received: {path}") from None

    def write(self, writer: Callable[[BinaryIO], Any]) -> None:
        """Calls `writer` with an open binary file, then puts the file in its place."""

        def write_open(path: Path) -> None:
            with path.open("wb") as file:
                writer(file)

        self.write_path(write_open)

    def write_text(self, writer: Callable[[TextIO], Any]) -> None:
        """Calls `writer` with an open UTF-8 text file, then puts the file in its place."""

        def write_open(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer(file)

        self.write_path(write_open)

    def write_figure(self, figure: "Figure") -> None:
        """Writes a figure in the format that the name ends in, see `PICTURES`."""
        self.write(lambda file: figure.savefig(file, format=self._ending.removeprefix("."), dpi=120))

    def write_path(self, writer: Callable[[Path], Any]) -> None:
        """Calls `writer` with the path of a file of the same ending, then puts the file in its place."""
        temporary = None
        try:
            temporary = self._make_temporary()
            writer(temporary)
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # temporary files are private, results are not
            self._refuse_existing()
            os.replace(temporary, self.path)
        except OSError as error:
            raise BadInput(f"{self._option} cannot be written ({error.strerror}): {self.path}") from None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _make_temporary(self) -> Path:
        ending = self.path.suffix[:20]
        handle, name = tempfile.mkstemp(ending, f".{self.path.name[:100]}.", self.path.parent)
        os.close(handle)
        return Path(name)

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self._force:
            raise BadInput(f"{self._option} exists; --force overwrites it. Received: {self.path}")


def size_of_images(input_size: Any, path: str) -> Any:
    """Returns --input-size for kernels without a model, or raises `BadInput` if it names inputs."""
    if isinstance(input_size, Mapping):
        names = ", ".join(input_size)
        raise BadInput(f"--input-size with names ({names}) goes with a model. Received: {path}")
    return input_size


def check_ending(option: str, path: str | None, *endings: str) -> None:
    """Raises `BadInput` if the name after an option does not end in a format that is written."""
    if path is not None and Path(path).suffix.lower() not in endings:
        wanted = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise BadInput(f"{option} must end in {wanted}. Received: {path}")


def output_files(
    paths: Mapping[str, str | None], *, force: bool, inputs: Sequence[str] = ()
) -> dict[str, OutputFile]:
    """Returns an `OutputFile` for each option with a path. All of them, and the inputs, must differ."""
    given = {option: path for option, path in paths.items() if path is not None}
    files = {option: OutputFile(option, path, force=force) for option, path in given.items()}
    every = [*(file.path for file in files.values()), *(Path(path).resolve() for path in inputs)]
    if len(set(every)) < len(every):
        raise BadInput(
            f"{', '.join(given)} must be different files, and none of them the input. "
            f"Received: {', '.join([*given.values(), *inputs])}"
        )
    return files


def written(files: dict[str, OutputFile]) -> str:
    """Returns the line that names the files."""
    return f"Wrote {', '.join(str(file.path) for file in files.values())}"
