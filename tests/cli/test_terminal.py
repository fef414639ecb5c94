"""Ctrl-C, progress, and a standard output that may be gone."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from rich.table import Table

from tf_frobreg.cli.terminal import WIDTH, progress_display, show, stop_request


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
