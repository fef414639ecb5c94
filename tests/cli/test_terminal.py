"""Ctrl-C, progress, and a standard output that may be gone."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.table import Table

from tf_frobreg.cli.files import BadInput
from tf_frobreg.cli.terminal import WIDTH, load_tensorflow, progress_display, show, stop_request


@pytest.mark.slow
@pytest.mark.parametrize("stdout", ["/dev/full", "closed pipe", "ascii"])
def test_trouble_with_standard_output_does_not_cost_the_result(stdout, kernel, tmp_path):
    output = tmp_path / "new.npy"
    arguments = ["regularize", str(kernel), "--input-size", "8", "--max-steps", "5", "--output", str(output)]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tf_frobreg", *arguments],
            stdout={"/dev/full": full, "closed pipe": writer, "ascii": subprocess.PIPE}[stdout],
            stderr=subprocess.PIPE,
            env=os.environ | ({"PYTHONIOENCODING": "ascii"} if stdout == "ascii" else {}),
        )
    os.close(writer)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert np.load(output).shape == (3, 3, 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "status"),
    [(">&-", 0), ("2>&-", 0), ("2>/dev/full", 0), ("<&- >&- 2>&-", 0), (">/dev/full", 1), ("| :", 0)],
)
def test_standard_streams_that_are_closed_or_full(redirection, status, kernel, tmp_path):
    command = f"{sys.executable} -m tf_frobreg spectrum {kernel} --input-size 8"
    for option in ("", f" --csv {tmp_path / 'result.csv'}"):
        script = f"set -o pipefail; {command}{option} {redirection}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
        assert done.returncode == (0 if option else status), done.stderr
        assert "Traceback" not in done.stderr
        assert ("σmax" in done.stdout) == redirection.startswith("2")
    assert "sigma_max" in (tmp_path / "result.csv").read_text()


@pytest.mark.slow
def test_a_terminated_command_leaves_no_files(kernel, tmp_path):
    command = [
        "regularize",
        kernel,
        "--input-size",
        "64",
        "--tolerance",
        "0",
        "--output",
        tmp_path / "new.npy",
    ]
    before = set(tmp_path.iterdir())
    with subprocess.Popen(
        [sys.executable, "-m", "tf_frobreg", *command, "--max-steps", "1000000", "--no-escape"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        time.sleep(10)
        process.terminate()
        stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "Traceback" not in stderr
    assert set(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_no_room_for_temporary_files(kernel):
    """TensorFlow needs some."""
    script = f"ulimit -f 0; {sys.executable} -m tf_frobreg spectrum {kernel} --input-size 8"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "cannot be imported ([Errno 2] No usable temporary directory" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("MPLBACKEND", 0), ("KERAS_BACKEND", 2)])
def test_a_setting_of_nonsense(name, status, kernel, tmp_path):
    command = [sys.executable, "-m", "tf_frobreg", "spectrum", kernel, "--input-size", "8"]
    done = subprocess.run(
        [*command, "--plot", tmp_path / "a.png"],
        capture_output=True,
        text=True,
        env=os.environ | {name: "nonsense"},
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1 or not status


def test_the_second_ctrl_c_ends_the_work_but_not_the_writing():
    with stop_request() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.pressed
        stop.writing = True
        signal.raise_signal(signal.SIGINT)
        stop.writing = False
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_first_ctrl_c_while_writing_is_only_noted():
    with stop_request() as stop:
        stop.writing = True
        signal.raise_signal(signal.SIGINT)
    assert stop.pressed


def test_a_pipe_has_room_for_wide_tables_and_long_lines(capfd):
    table = Table("σ" * (WIDTH - 4))
    show("σ" * 500, "[bold]", table)
    line, text, _, header, *_ = capfd.readouterr().out.splitlines()
    assert (line, text) == ("σ" * 500, "[bold]")
    assert "σ" * (WIDTH - 4) in header


def test_progress_appears_with_its_first_task(capfd):
    with progress_display():
        pass
    assert capfd.readouterr().err == ""
    with progress_display() as progress:
        progress.add_task("kernels", total=2, note="first")
        progress.start()
    assert "kernels" in capfd.readouterr().err


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)], ids=repr)
def test_a_stop_during_an_import_is_not_taken_for_a_broken_installation(stop, monkeypatch):
    def interrupted(name):
        raise ImportError("initialization failed") from stop  # as an interrupted pybind11 module does

    monkeypatch.setattr("tf_frobreg.cli.terminal.importlib.import_module", interrupted)
    with pytest.raises(type(stop)):
        load_tensorflow()


def test_a_broken_installation_is_named(monkeypatch):
    def broken(name):
        raise ImportError("no such library") from OSError("libfoo.so")

    monkeypatch.setattr("tf_frobreg.cli.terminal.importlib.import_module", broken)
    with pytest.raises(BadInput, match=r"cannot be imported \(no such library\)"):
        load_tensorflow()
