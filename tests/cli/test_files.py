"""Files are read without unpickling, and written whole or not at all."""

import contextlib
import os
import pickle
import re
import resource
import subprocess
import sys

import keras
import numpy as np
import pytest

from tf_frobreg.cli.files import (
    PICTURES,
    BadInput,
    OutputFile,
    as_options,
    check_ending,
    output_files,
    read_arrays,
    reason_of,
    refusals_as_bad_input,
    write_files,
)
from tf_frobreg.cli.model_files import save_model


def test_existing_files_are_kept_unless_forced(kernel, tmp_path, run):
    output = tmp_path / "new.npy"
    output.write_text("precious")
    command = ["regularize", kernel, "--input-size", 8, "--output", output, "--max-steps", 1]
    status, printed = run(*command)
    assert status == 2
    assert "--output exists; --force overwrites it" in printed.err
    assert output.read_text() == "precious"
    assert run(*command, "--force")[0] == 1
    assert np.load(output).shape == (3, 3, 1, 3)


def damaged(tmp_path, kind):
    path = tmp_path / f"{kind}.npy"
    if kind == "truncated":
        np.save(path, np.ones((3, 3, 4, 4)))
        path.write_bytes(path.read_bytes()[:-50])
    elif kind == "pickled":
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "bare_pickle":
        path.write_bytes(pickle.dumps(np.ones(3)))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "huge_header":
        np.save(path, np.ones((3, 3, 1, 1)))
        path.write_bytes(
            path.read_bytes().replace(b"(3, 3, 1, 1)", b"(9999999999,)").replace(b" \n", b"\n", 1)
        )
    elif kind == "archive":
        with open(path, "wb") as file:
            np.savez(file, np.ones((3, 3, 1, 1)))
    elif kind == "integer":
        np.save(path, np.ones((3, 3, 1, 1), dtype=int))
    elif kind == "complex":
        np.save(path, np.ones((3, 3, 1, 1), dtype=complex))
    elif kind == "nan":
        np.save(path, np.full((3, 3, 1, 1), np.nan))
    elif kind == "flat":
        np.save(path, np.ones(9))
    elif kind == "no_entries":
        np.save(path, np.ones((3, 3, 1, 0)))
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    elif kind in HEADERS:
        np.save(path, np.ones((3, 3, 1, 1)))
        whole = path.read_bytes()
        end = whole.index(b"\n")
        path.write_bytes(whole[:10] + HEADERS[kind].ljust(end - 10) + whole[end:])
    return path


# What NumPy's parser of headers raises: TokenError, IndentationError, SyntaxError, TypeError, KeyError.
HEADERS = {
    "open_bracket": b"{'descr': '<f8', 'fortran_order': False, 'shape': (3, 3",
    "indented": b"{\n  1\n 2}",
    "not_python": b"{'descr': '<f8' 'shape'",
    "unhashable": b"{[]: 1}",
    "other_keys": b"{'a': 1}",
    "odd_type": b"{'descr': ('<f8', []), 'fortran_order': False, 'shape': (9,), }",
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "FILE cannot be read (No such file or directory). Received: "),
        ("directory", "FILE cannot be read (Is a directory). Received: "),
        ("truncated", "FILE must be a whole .npy file"),
        ("pickled", "FILE must be a whole .npy file"),
        ("bare_pickle", "FILE must be a whole .npy file"),
        ("empty", "FILE must be a whole .npy file"),
        ("huge_header", "FILE must be a whole .npy file"),
        ("archive", "FILE must be a .npy file of one array"),
        ("integer", "kernel must be float32 or float64. Received: kernel.dtype=int64"),
        ("complex", "kernel must be float32 or float64. Received: kernel.dtype=complex128"),
        ("nan", "kernel must be finite"),
        ("flat", "kernel must have rank 4"),
        ("no_entries", "must not be empty"),
        ("pipe", "FILE cannot be read (it is no ordinary file)"),
        ("circle", "FILE cannot be read (Too many levels of symbolic links)"),
        *((kind, "FILE must be a whole .npy file") for kind in HEADERS),
    ],
)
def test_bad_kernel_files(kind, message, tmp_path, run):
    path = damaged(tmp_path, kind)
    output = tmp_path / "new.npy"
    before = set(tmp_path.iterdir())
    status, printed = run("regularize", path, "--input-size", 8, "--output", output)
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_an_archive_of_arrays(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.zeros(3))
    np.save(tmp_path / "one.npy", np.ones(2))
    assert {name: array.shape for name, array in read_arrays(tmp_path / "two.npz").items()} == {
        "a": (2,),
        "b": (3,),
    }
    assert list(read_arrays(tmp_path / "one.npy")) == ["one"]
    whole = (tmp_path / "two.npz").read_bytes()
    (tmp_path / "two.npz").write_bytes(whole.replace(b"NUMPY", b"NUMPI"))
    with pytest.raises(BadInput, match="FILE must be a whole .npy or .npz file of plain numbers"):
        read_arrays(tmp_path / "two.npz")


@pytest.mark.parametrize(
    ("place", "byte"),
    [(8, b"\x63"), (6, b"\x01")],
    ids=["compression_method", "encrypted"],
)
def test_archives_that_cannot_be_unpacked(place, byte, tmp_path):
    """Byte 8 of an entry is its method, byte 6 has the flag of encryption. The directory repeats both."""
    path = tmp_path / "kernels.npz"
    np.savez_compressed(path, a=np.ones(2))
    whole = bytearray(path.read_bytes())
    directory = whole.index(b"PK\x01\x02")
    whole[place : place + 1] = whole[directory + place + 2 : directory + place + 3] = byte
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="FILE must be a whole .npy or .npz file of plain numbers"):
        read_arrays(str(path))


def test_a_path_with_a_null_character(tmp_path):
    with pytest.raises(BadInput, match="FILE cannot be read .*null"):
        read_arrays("a\0b.npy")
    with pytest.raises(BadInput, match="--csv cannot be written .*null"):
        OutputFile("--csv", str(tmp_path / "a\0b.csv"), force=False)


def test_one_file_cannot_hold_two_results(kernel, tmp_path, run):
    same = tmp_path / "same.npy"
    status, printed = run("regularize", kernel, "--input-size", 8, "--output", same, "--history", same)
    assert status == 2
    assert "--output, --history must be different files, and none of them the input" in printed.err


def test_the_input_is_not_overwritten(kernel, tmp_path, run):
    before = kernel.read_bytes()
    command = ["regularize", kernel, "--input-size", 8, "--output", tmp_path / "new.npy", "--force"]
    status, printed = run(*command, "--history", kernel)
    assert status == 2
    assert "none of them the input" in printed.err
    assert kernel.read_bytes() == before


def test_a_file_that_is_not_written_to_the_end_leaves_nothing(tmp_path):
    path = tmp_path / "result.csv"
    path.write_text("precious")
    output = OutputFile("--csv", str(path), force=True)

    def half(file):
        file.write("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.write_text(half)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]
    output.write_text(lambda file: file.write("σ\n"))
    assert path.read_bytes() == "σ\n".encode()
    assert path.stat().st_mode & 0o077 == 0o044 & ~umask()


def test_names_of_any_bytes_are_written(tmp_path):
    path = tmp_path / "result.csv"
    OutputFile("--csv", str(path), force=False).write_text(lambda file: file.write("k\udcff.npy"))
    assert path.read_text() == "k\\udcff.npy"


@contextlib.contextmanager
def largest_file(size):
    """A context in which no file can grow beyond a size. A full disk raises such errors too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "array": lambda output: output.write(lambda file: np.save(file, np.ones((3, 3, 4, 4)))),
    "text": lambda output: output.write_text(lambda file: file.write("σ" * 1000)),
    "model": lambda output: output.write_path(
        lambda path: save_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(500)]), path)
    ),
}


@pytest.mark.parametrize(
    ("kind", "ending"), [("array", ".npy"), ("text", ".csv"), ("model", ".keras"), ("model", ".h5")]
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_what_was_there(kind, ending, exists, tmp_path):
    path = tmp_path / f"result{ending}"
    if exists:
        path.write_text("precious")
    output = OutputFile("--output", str(path), force=True)
    with largest_file(1024), pytest.raises(BadInput, match="--output cannot be written .File too large.: "):
        WRITERS[kind](output)
    assert list(tmp_path.iterdir()) == [path] * exists
    if exists:
        assert path.read_text() == "precious"
    WRITERS[kind](output)
    assert path.stat().st_size > 1024


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_an_overwritten_file_keeps_its_permissions(mode, tmp_path):
    path = tmp_path / "result.csv"
    path.write_text("old")
    path.chmod(mode)
    OutputFile("--csv", str(path), force=True).write_text(lambda file: file.write("new"))
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


KILLED = """
import os, sys
from tf_frobreg.cli.files import OutputFile
OutputFile("--csv", sys.argv[1], force=True).write_path(lambda path: os.kill(os.getpid(), 9))
"""


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    path = tmp_path / "result.csv"
    path.write_text("precious")
    assert subprocess.run([sys.executable, "-c", KILLED, path]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    other = OutputFile("--csv", str(path), force=True)

    def write(temporary):  # of a process that is running
        OutputFile("--csv", str(path), force=True)
        assert temporary.exists()
        temporary.write_text("new")

    other.write_path(write)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "new"


def test_a_file_that_fails_names_those_before_it(tmp_path):
    options = {"--csv": str(tmp_path / "a.csv"), "--json": None, "--plot": str(tmp_path / "a.png")}
    files = output_files(options, force=False)

    def fail(file):
        raise BadInput("--plot cannot be written")

    write = WRITERS["text"]
    with pytest.raises(BadInput, match=r"^--plot cannot be written. Written before: .*a\.csv$"):
        write_files(files, {"--csv": write, "--json": fail, "--plot": fail})
    with pytest.raises(BadInput, match="^--plot cannot be written$"):
        write_files(files, {"--plot": fail})


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_that_appears_during_the_work_is_kept(tmp_path):
    path = tmp_path / "result.csv"
    output = OutputFile("--csv", str(path), force=False)
    path.write_text("precious")
    with pytest.raises(BadInput, match="--csv exists; --force overwrites it"):
        output.write_text(lambda file: file.write("new"))
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_only_options_with_a_path_are_outputs(tmp_path):
    files = output_files({"--json": None, "--csv": str(tmp_path / "a.csv")}, force=False)
    assert list(files) == ["--csv"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [None, "a.png", "a.PDF", "a.b.svg"])
def test_names_of_pictures(name):
    check_ending("--plot", name, *PICTURES)


@pytest.mark.parametrize("name", ["a", "a.jpg", ".png", ""])
def test_names_that_are_no_pictures(name):
    with pytest.raises(BadInput, match="--plot must end in .png, .pdf or .svg. Received: "):
        check_ending("--plot", name, *PICTURES)


def test_names_of_kernels():
    check_ending("--output", "a.NPY", ".npy")
    with pytest.raises(BadInput, match="--output must end in .npy. Received: a.keras"):
        check_ending("--output", "a.keras", ".npy")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("input_size must be at most 9: input_size=10", "--input-size must be at most 9: --input-size=10"),
        (
            "give input_size. Or leave it out, exclude='a b'",
            "give --input-size. Or leave it out, --exclude a b",
        ),
        ("include must match. Received: include='x'", "include must match. Received: --include x"),
        ("Received: input_size=None", "Received: no --input-size"),
        ("max_steps, learning_rate, dilation_rate=2", "--max-steps, --learning-rate, --dilation-rate=2"),
        (
            "my_input_size, input_sizes, kernel.shape=(3, 3)",
            "my_input_size, input_sizes, kernel.shape=(3, 3)",
        ),
    ],
)
def test_messages_of_the_library_name_the_options_of_the_command(message, shown):
    assert as_options(message) == shown
    with pytest.raises(BadInput, match=re.escape(shown)), refusals_as_bad_input():
        raise ValueError(message)


def test_long_and_odd_names_of_files_are_shortened(run):
    status, printed = run("spectrum", f"{'x' * 5000}\x1b[31m\n.npy", "--input-size", 4)
    assert status == 2
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 1100
    status, printed = run("spectrum", "a.npy", "--padding", "y" * 5000)
    assert status == 2
    assert len(printed.err) < 1200


def test_the_reason_of_an_error_is_short():
    text = "Unable to open file (file = 'm.h5', errno = 21, error message = 'Is a directory', flags = 0)"
    assert reason_of(OSError(text)) == "Is a directory"
    assert reason_of(OSError(28, "No space left on device", "m.h5")) == "No space left on device"
    assert reason_of(OSError("it is\ndamaged")) == "it is damaged"
    assert reason_of(OSError()) == "OSError"
