"""Commands that are killed, interrupted, lack room or memory, or meet each other in one folder.

Each output is absent, as it was before, or whole.
"""

import csv
import random
import re
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "tf_frobreg"]
REPLACES = """
import itertools, sys
import numpy as np
from tf_frobreg.cli.files import OutputFile

for value in itertools.count():
    OutputFile("--output", sys.argv[1], force=True).write(lambda file: np.save(file, np.full(10**6, value)))
    print(value, flush=True)
"""


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_kill_while_files_are_replaced(tmp_path):
    """Each run replaces a file of 8 MB without end, and is killed at a random time after the first."""
    path = tmp_path / "result.npy"
    chance = random.Random(0)
    killed_while_writing = 0
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", REPLACES, path], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            process.kill()
        found = np.load(path)
        assert found.shape == (10**6,)
        assert (found == found[0]).all()
        assert len(leftovers(tmp_path)) <= 1  # the next process removes it
        killed_while_writing += len(leftovers(tmp_path))
    assert killed_while_writing


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A kernel and a model whose regularization takes some seconds."""
    folder = tmp_path_factory.mktemp("inputs")
    np.save(folder / "kernel.npy", np.random.RandomState(0).randn(3, 3, 8, 8))
    keras.utils.set_random_seed(0)
    convolutions = [keras.layers.Conv2D(16, 3, padding="same") for _ in range(4)]
    model = keras.Sequential([keras.Input((16, 16, 3)), *convolutions])
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    return folder


def arguments_of(name, inputs, folder):
    """A command, and what reads each of its outputs."""
    if name == "reproduce":
        files = {folder / "figure_4_1.png": is_picture, folder / "figure_4_1.csv": has_rows}
        return ["reproduce", "--output-dir", folder], files
    if name == "kernel":
        outputs = {folder / "new.npy": np.load, folder / "new.csv": has_rows}
        options = ["--input-size", "32", "--tolerance", "1e-9", "--max-steps", "3000"]
        path = inputs / "kernel.npy"
    else:
        outputs = {folder / "new.keras": keras.saving.load_model, folder / "new.csv": has_rows}
        options, path = ["--tolerance", "1e-5"], inputs / "model.keras"
    output, history = outputs
    return ["regularize", path, *options, "--output", output, "--history", history], outputs


def is_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")


def has_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda stop: stop.name)
@pytest.mark.parametrize("name", ["kernel", "model", "reproduce"])
def test_a_signal_at_a_random_time(name, stop, inputs, tmp_path):
    chance = random.Random(f"{name} {stop}")
    for seconds in (chance.uniform(0.3, 4), chance.uniform(4, 12)):
        arguments, outputs = arguments_of(name, inputs, tmp_path)
        with subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a job in the background of a shell ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            time.sleep(seconds)
            process.send_signal(stop)
            _, stderr = process.communicate(timeout=120)
        # It may have ended before, or have been about to write.
        assert process.returncode in {0, 1, 130, 143, -stop}, stderr
        assert "Traceback" not in stderr
        written = [path for path in outputs if path.exists()]
        if process.returncode in (0, 1):
            assert written == list(outputs)
        if stop is not signal.SIGKILL:
            assert not leftovers(tmp_path)
        for path in written:
            outputs[path](path)
            path.unlink()


@pytest.mark.parametrize("ending", [".npy", ".keras", ".h5"])
def test_a_disk_without_room(ending, inputs, tmp_path):
    path = inputs / {".npy": "kernel.npy"}.get(ending, f"model{ending}")
    output = tmp_path / f"new{ending}"
    output.write_bytes(b"precious")
    size = ["--input-size 6"] if ending == ".npy" else []
    command = ["ulimit -f 1;", *COMMAND, "regularize", path, *size, "--max-steps 2 --force --output", output]
    done = subprocess.run(
        ["bash", "-c", " ".join(map(str, command))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert "--output cannot be written (File too large)" in done.stderr
    assert "Wrote" not in done.stdout
    assert output.read_bytes() == b"precious"
    assert not leftovers(tmp_path)


def test_too_little_memory(inputs):
    """The limit of the process counts, and the layer is refused before anything is allocated."""
    limit = 12_000_000  # KiB
    command = [f"ulimit -v {limit};", *COMMAND, "spectrum", inputs / "kernel.npy", "--input-size 40000"]
    done = subprocess.run(
        ["bash", "-c", " ".join(map(str, command))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    free = re.search(r"Not measured: .* this needs [\d,]+ bytes, but ([\d,]+) are free", done.stdout)
    assert 0 < int(free[1].replace(",", "")) < 1024 * limit


@pytest.mark.parametrize("force", [False, True])
def test_two_commands_with_one_output(force, inputs, tmp_path):
    output = tmp_path / "new.npy"
    command = [*COMMAND, "regularize", inputs / "kernel.npy", "--input-size", "8", "--output", output]
    both = [
        subprocess.Popen([*command, *(["--force"] if force else [])], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    statuses = sorted(process.returncode for process in both)
    assert statuses == ([0, 0] if force else [0, 2])
    if not force:
        assert "--output exists; --force overwrites it" in "".join(errors)
    assert np.load(output).shape == (3, 3, 8, 8)
    assert list(tmp_path.iterdir()) == [output]
