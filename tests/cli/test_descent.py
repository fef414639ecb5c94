"""`tf-frobreg reproduce` and `tf-frobreg regularize` as a user types them."""

import csv
import signal

import numpy as np
import pytest

import tf_frobreg
from tf_frobreg import regularize_kernel, singular_values


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_reproduce(distribution, tmp_path, run):
    status, printed = run("reproduce", "--distribution", distribution, "--output-dir", tmp_path)
    assert status == 0
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


def test_reproduce_exits_1_if_a_kernel_does_not_converge(tmp_path, run):
    status, printed = run("reproduce", "--max-steps", 12, "--output-dir", tmp_path)
    assert status == 1
    assert "not converged: out of steps" in printed.out


def test_regularize_writes_kernel_plot_and_history(kernel, tmp_path, run):
    outputs = [tmp_path / name for name in ("new.npy", "plot.svg", "history.csv")]
    options = ["--output", outputs[0], "--plot", outputs[1], "--history", outputs[2]]
    status, printed = run("regularize", kernel, "--input-size", 8, 9, *options)
    assert status == 0
    assert "converged: σmax and σmin are within the tolerance" in printed.out
    sigma = singular_values(np.load(outputs[0]), (8, 9))
    assert max(abs(sigma[0] - 1), abs(sigma[-1] - 1)) <= 0.01
    assert b"<svg" in outputs[1].read_bytes()
    history = rows(outputs[2])
    assert [int(row["step"]) for row in history] == list(range(len(history)))
    assert all(row["sigma_max"] for row in history[:20])
    assert history[-1]["learning_rate"] == ""
    assert len(list(tmp_path.iterdir())) == 4


def test_regularize_passes_the_geometry_on(tmp_path, run):
    kernel = np.random.RandomState(1).randn(3, 3, 2, 1)
    np.save(tmp_path / "kernel.npy", kernel)
    output = tmp_path / "new.npy"
    options = (
        "--input-size 8 --kind depthwise --padding circular --strides 1 2 --alpha 2 --learning-rate 1e-4"
    )
    options += f" --max-steps 3 --output {output}"
    assert run("regularize", tmp_path / "kernel.npy", *options.split())[0] == 1
    expected = regularize_kernel(
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


def test_regularize_says_at_which_steps_it_escaped(tmp_path, run):
    kernel = np.random.RandomState(0).randn(3, 3, 1, 1) / 3  # ends in a local minimum
    np.save(tmp_path / "kernel.npy", kernel)
    options = ["--input-size", 20, "--output", tmp_path / "new.npy"]
    status, printed = run("regularize", tmp_path / "kernel.npy", *options)
    assert status == 0
    (escape,) = regularize_kernel(kernel, 20).escapes
    assert f", escaped from a local minimum at step {escape.step}\n" in printed.out
    status, printed = run("regularize", tmp_path / "kernel.npy", *options, "--force", "--no-escape")
    assert status == 1
    assert "not converged" in printed.out
    assert "escaped" not in printed.out
    plain = regularize_kernel(kernel, 20, escape=False)
    np.testing.assert_allclose(np.load(tmp_path / "new.npy"), plain.kernel, rtol=1e-12)


def test_ctrl_c_keeps_what_was_reached(kernel, tmp_path, run, monkeypatch):
    def interrupted(*arguments, callback, **options):
        def press(step, kernel, penalty):
            if step == 30:
                signal.raise_signal(signal.SIGINT)
            return callback(step, kernel, penalty)

        return regularize_kernel(*arguments, callback=press, **options)

    monkeypatch.setattr(tf_frobreg, "regularize_kernel", interrupted)
    output = tmp_path / "new.npy"
    status, printed = run("regularize", kernel, "--input-size", 8, "--output", output)
    assert status == 1
    assert "interrupted, the kernel reached so far is kept; step 30" in printed.out
    reached = regularize_kernel(np.load(kernel), 8, max_steps=30).kernel
    np.testing.assert_allclose(np.load(output), reached, rtol=1e-12)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    status, printed = run("reproduce", "--output-dir", tmp_path)
    assert status == 130
    assert "interrupted, nothing written" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel.npy", "new.npy"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-size", "0"], "--input-size must be at least 1. Received: --input-size=0"),
        (
            ["--input-size", "8", "8", "8"],
            "--input-size must be an int or 2 ints",
        ),
        (
            ["--input-size", "2", "--padding", "valid"],
            "--input-size must be at least the (dilated) kernel size",
        ),
        (["--input-size", "9" * 20], "--input-size must be at most 2147483647"),
        (
            ["--input-size", "8", "--plot", "p" * 300 + ".png"],
            "--plot cannot be written (File name too long)",
        ),
        (["--input-size", "eight"], "argument --input-size: must be N, one N per axis, or NAME=N"),
        ([], "--input-size is needed for the kernel of a convolution"),
        (["--input-size", "left=8"], "--input-size with names (left) goes with a model"),
        (["--input-size", "8", "--padding", "full"], "padding must be one of"),
        (["--input-size", "8", "--alpha", "0"], "alpha must be a finite number above 0. Received: alpha=0"),
        (
            ["--input-size", "8", "--alpha", "nan"],
            "alpha must be a finite number above 0. Received: alpha=nan",
        ),
        (["--input-size", "8", "--learning-rate", "fast"], "\"paper\" or a number. Received: 'fast'"),
        (["--input-size", "8", "--learning-rate", "-1"], "--learning-rate must be a finite number above 0"),
        (["--input-size", "8", "--tolerance", "-1"], "tolerance must be"),
        (["--input-size", "8", "--max-steps", "-1"], "--max-steps must be at least 0"),
        (
            ["--input-size", "8", "--strides", "2", "--dilation-rate", "2"],
            "strides above 1 cannot be combined with --dilation-rate above 1",
        ),
        (["--input-size", "8", "--plot", "plot.xyz"], "--plot must end in .png, .pdf or .svg"),
        (["--input-size", "8", "--output", "new.keras"], "--output must end in .npy"),
        (["--input-size", "8", "--plot", "/no/such/place.png"], "--plot cannot be written (No such file"),
        (["--input-size", "8", "--history", "."], "--history must be a file to write"),
    ],
)
def test_bad_options(options, message, kernel, tmp_path, run):
    before = set(tmp_path.iterdir())
    status, printed = run("regularize", kernel, "--output", tmp_path / "new.npy", *options)
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_a_dense_kernel_needs_no_image(tmp_path, run):
    kernel = np.random.RandomState(1).randn(6, 4)
    np.save(tmp_path / "dense.npy", kernel)
    status, printed = run("regularize", tmp_path / "dense.npy", "--output", tmp_path / "new.npy")
    assert status == 0
    assert "lower bound for this shape: 2)" in printed.out
    sigma = np.linalg.svd(np.load(tmp_path / "new.npy"), compute_uv=False)
    np.testing.assert_allclose(sigma, 1, atol=0.01)
    options = ["--output", tmp_path / "new.npy", "--force", "--input-size", 8]
    status, printed = run("regularize", tmp_path / "dense.npy", *options)
    assert status == 2
    assert "--input-size must be () for a Dense kernel" in printed.err


def test_output_dir_must_exist(tmp_path, run):
    status, printed = run("reproduce", "--output-dir", tmp_path / "no")
    assert status == 2
    assert "--output-dir must be a directory. Received: " in printed.err


def test_seed_out_of_range(tmp_path, run):
    status, printed = run("reproduce", "--seed", -1, "--output-dir", tmp_path)
    assert status == 2
    assert "--seed must be between 0 and 2**32 - 1. Received: -1" in printed.err
    assert not list(tmp_path.iterdir())


def test_regularize_remarks_a_kernel_in_the_order_of_pytorch_in_one_line(tmp_path, run):
    path = tmp_path / "torch.npy"
    np.save(path, np.random.RandomState(1).randn(6, 2, 3, 3))
    arguments = ["--input-size", 8, "--max-steps", 1, "--output", tmp_path / "out.npy"]
    _, printed = run("regularize", path, *arguments)
    (line,) = [line for line in printed.err.splitlines() if "PyTorch" in line]
    assert line.startswith(f"{path}: A kernel of shape (6, 2, 3, 3) seems to have PyTorch's order")
    assert "UserWarning" not in printed.err
    assert (tmp_path / "out.npy").exists()
