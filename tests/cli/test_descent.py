"""The commands as a user types them."""

import csv
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

import tf_frobreg
import tf_frobreg.descent.algorithm_3_1
from tf_frobreg import singular_values
from tf_frobreg.cli import main


@pytest.fixture
def kernel(tmp_path):
    path = tmp_path / "kernel.npy"
    np.save(path, np.random.RandomState(1).randn(3, 3, 1, 3))
    return path


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["reproduce", "--help"], ["regularize", "--help"], ["nonsense"]]
)
def test_help_does_not_wait_for_tensorflow(arguments):
    command = [sys.executable, "-X", "importtime", "-m", "tf_frobreg", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (2 if arguments == ["nonsense"] else 0)
    assert "tf_frobreg.cli" in done.stderr
    assert "tensorflow" not in done.stderr


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_reproduce(distribution, tmp_path, capfd):
    arguments = ["reproduce", "--distribution", distribution, "--output-dir", str(tmp_path)]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    assert "tensorflow" not in printed.err.lower()
    assert "0000 00:00" not in printed.err  # the head of TensorFlow's own messages
    assert printed.out.count("converged: σmax and σmin are within the tolerance") == 4
    for title in ("3×3×3×1", "3×3×1×3", "3×3×3×6", "3×3×6×3"):
        assert title in printed.out
    name = "figure_4_1" if distribution == "normal" else "figure_4_1_uniform"
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = rows(tmp_path / f"{name}.csv")
    assert list(table[0]) == [
        "kernel",
        "step",
        "penalty",
        "gradient_norm",
        "learning_rate",
        "sigma_max",
        "sigma_min",
    ]
    last = [
        row for row, after in zip(table, [*table[1:], {"step": "0"}], strict=True) if after["step"] == "0"
    ]
    assert len(last) == 4
    for row in last:
        assert abs(float(row["sigma_max"]) - 1) <= 0.01
        assert abs(float(row["sigma_min"]) - 1) <= 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.csv", f"{name}.png"]
    if distribution == "uniform":
        # MATLAB's rng(1); rand: 0.4170, 0.7203, 0.0001 … down the first column.
        first = np.random.RandomState(1).random_sample(27).reshape((3, 3, 3, 1), order="F")
        assert first[:, 0, 0, 0] == pytest.approx([0.4170, 0.7203, 0.0001], abs=1e-4)
        assert float(table[0]["sigma_max"]) == pytest.approx(singular_values(first, 20)[0], rel=1e-5)


def test_reproduce_exits_1_where_a_kernel_does_not_converge(tmp_path, capfd):
    assert main(["reproduce", "--max-steps", "12", "--output-dir", str(tmp_path)]) == 1
    assert "not converged: out of steps" in capfd.readouterr().out


def test_regularize_writes_kernel_plot_and_history(kernel, tmp_path, capfd):
    outputs = [tmp_path / name for name in ("new.npy", "plot.svg", "history.csv")]
    options = ["--output", outputs[0], "--plot", outputs[1], "--history", outputs[2]]
    assert main(["regularize", str(kernel), "--input-size", "8", "9", *map(str, options)]) == 0
    printed = capfd.readouterr()
    assert "tensorflow" not in printed.err.lower()
    assert "0000 00:00" not in printed.err  # the head of TensorFlow's own messages
    assert "converged: σmax and σmin are within the tolerance" in printed.out
    sigma = singular_values(np.load(outputs[0]), (8, 9))
    assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.01
    assert b"<svg" in outputs[1].read_bytes()
    history = rows(outputs[2])
    assert [int(row["step"]) for row in history] == list(range(len(history)))
    assert all(row["sigma_max"] for row in history[:20])
    assert history[-1]["learning_rate"] == ""
    assert len(list(tmp_path.iterdir())) == 4


def test_regularize_passes_the_geometry_on(tmp_path):
    kernel = np.random.RandomState(1).randn(3, 3, 2, 1)
    np.save(tmp_path / "kernel.npy", kernel)
    output = tmp_path / "new.npy"
    options = (
        "--input-size 8 --kind depthwise --padding circular --strides 1 2 --alpha 2 --learning-rate 1e-4"
    )
    options += f" --max-steps 3 --output {output}"
    assert main(["regularize", str(tmp_path / "kernel.npy"), *options.split()]) == 1
    expected = tf_frobreg.descent.algorithm_3_1.regularize_kernel(
        kernel,
        8,
        kind="depthwise",
        padding="circular",
        strides=(1, 2),
        alpha=2,
        learning_rate=1e-4,
        max_steps=3,
    )
    np.testing.assert_allclose(np.load(output), expected.kernel, rtol=1e-14)


def test_ctrl_c_keeps_what_was_reached(kernel, tmp_path, capfd, monkeypatch):
    original = tf_frobreg.descent.algorithm_3_1.regularize_kernel

    def interrupted(*arguments, callback, **options):
        def press(step, kernel, penalty):
            if step == 30:
                signal.raise_signal(signal.SIGINT)
            return callback(step, kernel, penalty)

        return original(*arguments, callback=press, **options)

    monkeypatch.setattr(tf_frobreg.descent.algorithm_3_1, "regularize_kernel", interrupted)
    output = tmp_path / "new.npy"
    assert main(["regularize", str(kernel), "--input-size", "8", "--output", str(output)]) == 1
    assert "interrupted, what was reached is kept; step 30" in capfd.readouterr().out
    reached = original(np.load(kernel), 8, max_steps=30).kernel
    np.testing.assert_allclose(np.load(output), reached, rtol=1e-12)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert main(["reproduce", "--output-dir", str(tmp_path)]) == 130
    assert "interrupted, nothing written" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel.npy", "new.npy"]


def test_existing_files_are_kept_unless_forced(kernel, tmp_path, capfd):
    output = tmp_path / "new.npy"
    output.write_text("precious")
    command = ["regularize", str(kernel), "--input-size", "8", "--output", str(output), "--max-steps", "1"]
    assert main(command) == 2
    assert "--output exists; --force overwrites it" in capfd.readouterr().err
    assert output.read_text() == "precious"
    assert main([*command, "--force"]) == 1
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
    return path


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
    ],
)
def test_bad_kernel_files(kind, message, tmp_path, capfd):
    path = damaged(tmp_path, kind)
    output = tmp_path / "new.npy"
    before = set(tmp_path.iterdir())
    assert main(["regularize", str(path), "--input-size", "8", "--output", str(output)]) == 2
    printed = capfd.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-size", "0"], "input_size must be at least 1. Received: input_size=0"),
        (
            ["--input-size", "8", "8", "8"],
            "input_size must be an int or 2 ints",
        ),
        (
            ["--input-size", "2", "--padding", "valid"],
            "input_size must be at least the (dilated) kernel size",
        ),
        (["--input-size", "9" * 20], "input_size must be at most 2147483647"),
        (
            ["--input-size", "8", "--plot", "p" * 300 + ".png"],
            "--plot cannot be written (File name too long)",
        ),
        (["--input-size", "eight"], "argument --input-size: invalid int value: 'eight'"),
        ([], "--input-size is needed for a kernel without a model"),
        (["--input-size", "8", "--padding", "full"], "padding must be one of"),
        (["--input-size", "8", "--alpha", "0"], "alpha must be a finite number above 0. Received: alpha=0"),
        (
            ["--input-size", "8", "--alpha", "nan"],
            "alpha must be a finite number above 0. Received: alpha=nan",
        ),
        (["--input-size", "8", "--learning-rate", "fast"], "\"paper\" or a number. Received: 'fast'"),
        (["--input-size", "8", "--learning-rate", "-1"], "learning_rate must be a finite number above 0"),
        (["--input-size", "8", "--tolerance", "-1"], "tolerance must be"),
        (["--input-size", "8", "--max-steps", "-1"], "max_steps must be at least 0"),
        (
            ["--input-size", "8", "--strides", "2", "--dilation-rate", "2"],
            "strides above 1 cannot be combined",
        ),
        (["--input-size", "8", "--plot", "plot.xyz"], "--plot must end in .png, .pdf or .svg"),
        (["--input-size", "8", "--plot", "/no/such/place.png"], "--plot cannot be written (No such file"),
        (["--input-size", "8", "--history", "."], "--history must be a file to write"),
    ],
)
def test_bad_options(options, message, kernel, tmp_path, capfd):
    before = set(tmp_path.iterdir())
    try:
        status = main(["regularize", str(kernel), "--output", str(tmp_path / "new.npy"), *options])
    except SystemExit as stop:
        status = stop.code
    printed = capfd.readouterr()
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_one_file_cannot_hold_two_results(kernel, tmp_path, capfd):
    same = str(tmp_path / "same")
    command = ["regularize", str(kernel), "--input-size", "8", "--output", same, "--history", same]
    assert main(command) == 2
    assert "--output, --history must be different files, and none of them the input" in capfd.readouterr().err


def test_the_input_is_not_overwritten(kernel, tmp_path, capfd):
    before = kernel.read_bytes()
    command = [
        "regularize",
        str(kernel),
        "--input-size",
        "8",
        "--output",
        str(tmp_path / "new.npy"),
        "--force",
    ]
    assert main([*command, "--history", str(kernel)]) == 2
    assert "none of them the input" in capfd.readouterr().err
    assert kernel.read_bytes() == before


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


def test_version(capfd):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capfd.readouterr().out.strip() == tf_frobreg.__version__


def test_output_dir_must_exist(tmp_path, capfd):
    assert main(["reproduce", "--output-dir", str(tmp_path / "no")]) == 2
    assert "--output-dir must be a directory. Received: " in capfd.readouterr().err


def test_seed_out_of_range(tmp_path, capfd):
    assert main(["reproduce", "--seed", "-1", "--output-dir", str(tmp_path)]) == 2
    assert "--seed must be between 0 and 2**32 - 1. Received: -1" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
