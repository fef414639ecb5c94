"""Files that the commands read and write: read without unpickling, written whole or not at all."""

import contextlib
import io
import os
import platform
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

import numpy as np

from tf_frobreg.checks import check_memory
from tf_frobreg.text import one_line

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
        size = sum(entry.file_size for entry in arrays.zip.infolist())
        if len(set(arrays.files)) < len(arrays.files):
            raise _not_whole(path, ".npz file with a name for each array")
        with refusals_as_bad_input():
            check_memory(size, f"{path} unpacked", "a smaller file")
        try:
            return {name: arrays[name] for name in arrays.files}
        except Exception:
            raise _not_whole(path, ".npy or .npz file") from None


def _load(path: str, what: str) -> Any:
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a pipe may wait for ever
            raise OSError("it is no ordinary file")
        with open(path, "rb"):
            pass
    except (OSError, ValueError) as error:
        raise BadInput(f"FILE cannot be read ({reason_of(error)}). Received: {path}") from None
    try:
        return np.load(path, allow_pickle=False)
    except Exception:  # NumPy and zipfile raise many types. A damaged header can claim a huge shape
        raise _not_whole(path, what) from None


def _not_whole(path: str, what: str) -> BadInput:
    return BadInput(f"FILE must be a whole {what} of plain numbers; pickles are refused. Received: {path}")


def reason_of(error: Exception) -> str:
    """Returns the cause of an error of the file system in a few words. HDF5 has it within a long text."""
    found = re.search("error message = '([^']+)'", str(error))
    reason = getattr(error, "strerror", None) or (found[1] if found else error)
    return one_line(reason, 200) or type(error).__name__


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
            self._remove_leftovers()
            self._make_temporary().unlink()
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null character
            raise BadInput(f"{option} cannot be written ({reason_of(error)}). Received: {path!r}") from None

    def write(self, writer: Callable[[BinaryIO], Any]) -> None:
        """Calls `writer` with a binary file in memory, then puts the file in its place."""
        content = io.BytesIO()  # NumPy loses the last error of a file that it writes itself
        writer(content)
        self.write_path(lambda path: path.write_bytes(content.getbuffer()))

    def write_text(self, writer: Callable[[TextIO], Any]) -> None:
        """Calls `writer` with a text file in memory, then puts the file in its place, in UTF-8."""
        content = io.StringIO(newline="")
        writer(content)
        text = content.getvalue().encode("utf-8", "backslashreplace")  # names of files may hold any bytes
        self.write_path(lambda path: path.write_bytes(text))

    def write_figure(self, figure: "Figure") -> None:
        """Writes a figure in the format that the name ends in, see `PICTURES`."""
        self.write(lambda file: figure.savefig(file, format=self._ending.removeprefix("."), dpi=120))

    def write_path(self, writer: Callable[[Path], Any]) -> None:
        """Calls `writer` with the path of a file of the same ending, then puts the file in its place."""
        temporary = None
        try:
            temporary = self._make_temporary()
            writer(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())  # some errors of a file system come only now
            temporary.chmod(self._mode())
            self._put_in_place(temporary)
        except (OSError, RuntimeError) as error:  # h5py raises RuntimeError too
            raise BadInput(f"{self._option} cannot be written ({reason_of(error)}): {self.path}") from None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)

    def _put_in_place(self, temporary: Path) -> None:
        if not self._force:
            # A link takes the place only if it is free, also if another process is about to take it.
            with contextlib.suppress(OSError):  # the place is taken, or the file system has no links
                os.link(temporary, self.path)
                return
            self._refuse_existing()
        os.replace(temporary, self.path)

    def _mode(self) -> int:
        """Returns the permissions of the file that is overwritten, or those of a new file."""
        with contextlib.suppress(FileNotFoundError):
            return stat.S_IMODE(self.path.stat().st_mode)
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask

    def _make_temporary(self) -> Path:
        """Makes an empty file in the same folder. Its name says which process it belongs to."""
        prefix = f"{self._temporary_prefix()}{os.getpid()}."
        handle, name = tempfile.mkstemp(self.path.suffix[:20], prefix, self.path.parent)
        os.close(handle)
        return Path(name)

    def _temporary_prefix(self) -> str:
        return f".{self.path.name[:30]}.{platform.node()[:30]}-"

    def _remove_leftovers(self) -> None:
        """Removes the temporary files of this path that killed processes of this machine have left."""
        prefix = self._temporary_prefix()
        with contextlib.suppress(PermissionError):  # a folder may be writable, but not readable
            for other in self.path.parent.iterdir():
                owner = other.name.removeprefix(prefix).partition(".")[0]
                if other.name.startswith(prefix) and owner.isdigit() and not _is_running(int(owner)):
                    other.unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self.path.exists() and not self._force:
            raise BadInput(f"{self._option} exists; --force overwrites it. Received: {self.path}")


def _is_running(process: int) -> bool:
    """Returns whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


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
    every = [*(file.path for file in files.values()), *map(_without_links, inputs)]
    if len(set(every)) < len(every):
        raise BadInput(
            f"{', '.join(given)} must be different files, and none of them the input. "
            f"Received: {', '.join([*given.values(), *inputs])}"
        )
    return files


def _without_links(path: str) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError):  # reading it will say what is wrong
        return Path(path)


def write_files(files: Mapping[str, OutputFile], writers: Mapping[str, Callable[[OutputFile], Any]]) -> None:
    """Writes the files of the options that are given, in the order of `writers`.

    Raises:
        BadInput: If one cannot be written. The message names those that were written before.
    """
    done: list[str] = []
    for option, write in writers.items():
        if option in files:
            try:
                write(files[option])
            except BadInput as error:
                before = f". Written before: {', '.join(done)}" if done else ""
                raise BadInput(f"{error}{before}") from None
            done.append(str(files[option].path))


def written(files: Mapping[str, OutputFile]) -> str:
    """Returns the line that names the files."""
    return f"Wrote {', '.join(str(file.path) for file in files.values())}"
