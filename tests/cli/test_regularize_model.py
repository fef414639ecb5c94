"""The command `regularize` on a model."""

import csv
import re
import signal

import keras
import numpy as np
import pytest
from small_models import named_model

import tf_frobreg.tables
from tf_frobreg import attach_regularizers, model_spectrum, regularize_model
from tf_frobreg.cli import main
from tf_frobreg.cli.descent import LOSS_IGNORED, MOVED_FAR


@pytest.fixture
def model_file(tmp_path):
    """A model in a file of its own. α of its penalties is 2, and "top" has none."""
    model = named_model()
    attach_regularizers(model, alpha=2.0, exclude="top")
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "model.keras"
    model.save(path)
    return path


@pytest.fixture
def depthwise_file(tmp_path):
    """A model whose only kernel escapes from a local minimum."""
    keras.utils.set_random_seed(3)
    layer = keras.layers.DepthwiseConv2D(3, padding="same", name="depthwise")
    path = tmp_path / "depthwise.keras"
    keras.Sequential([keras.Input((12, 12, 8)), layer]).save(path)
    return path


def table(printed):
    """The rows of the printed table: cells by the name of the column, by the name of the kernel."""
    lines = [
        line.split()
        for line in printed.replace("R before", "R_before").replace("R after", "R_after").splitlines()
    ]
    start = next(number for number, line in enumerate(lines) if line[:1] == ["kernel"])
    rows = {}
    for cells in lines[start + 2 :]:
        if not cells:
            break
        count = len(lines[start]) - 1
        rows[cells[0]] = dict(zip(lines[start], [*cells[:count], " ".join(cells[count:])], strict=True))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".keras", ".h5"])
def test_from_the_shell(ending, tmp_path, capfd):
    model = named_model()
    if ending == ".keras":  # Keras does not always read a loss in its own old format again
        model.compile("adam", "mse")
        model.train_on_batch(np.ones((2, 9, 8, 2)), np.ones((2, 4)))
    source, target = tmp_path / f"model{ending}", tmp_path / f"new{ending}"
    model.save(source)
    before = source.read_bytes()
    outputs = ["--output", target, "--history", tmp_path / "history.csv", "--plot", tmp_path / "plot.png"]
    assert main(["regularize", *map(str, [source, *outputs])]) == 0
    assert list(table(capfd.readouterr().out)) == ["conv", "strided", "top"]
    assert source.read_bytes() == before
    new = keras.saving.load_model(target)
    if ending == ".keras":
        assert int(new.optimizer.iterations.numpy()) == 1
    for row in model_spectrum(new):
        assert abs(row.extremes.sigma_max - 1) <= 0.0101
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as file:
        assert {row["kernel"] for row in csv.DictReader(file)} == {"conv", "strided", "top"}
    assert main(["regularize", *map(str, [source, *outputs])]) == 2  # nothing is overwritten
    assert "exists; --force" in capfd.readouterr().err
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "new.npy"], "--output must end in .keras, as the model does"),
        (
            ["--output", "new.keras", "--strides", "2"],
            "--strides cannot be given: the geometry is read from the layers",
        ),
        (["--output", "new.keras", "--alpha", "0"], "alpha must be a finite number above 0"),
        (
            ["--output", "new.keras", "--input-size", "9"],
            "--input-size goes with a model that leaves the size",
        ),
        (["--output", "model.keras", "--force"], "none of them the input"),
    ],
)
def test_bad_options(options, message, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named_model().save("model.keras")
    assert main(["regularize", "model.keras", *options]) == 2
    printed = capfd.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.keras"]


def test_a_model_whose_loss_is_not_known_is_taken_without(tmp_path, capfd):
    def own_loss(y, x):
        return keras.ops.mean(x - y)

    model = named_model()
    model.compile("adam", own_loss)
    model.save(tmp_path / "model.keras")
    arguments = [tmp_path / "model.keras", "--output", tmp_path / "new.keras", "--max-steps", 3]
    assert main(["regularize", *map(str, arguments)]) == 1
    assert "The optimizer and losses could not be loaded" in capfd.readouterr().out


def test_alpha_is_that_of_the_penalties_in_the_file(model_file, tmp_path, run):
    status, printed = run("regularize", model_file, "--output", tmp_path / "new.keras")
    assert status == 0
    rows = table(printed.out)
    assert {name: row["α"] for name, row in rows.items()} == {"conv": "2", "strided": "2", "top": "1"}
    new = keras.saving.load_model(tmp_path / "new.keras")
    for row, target in zip(model_spectrum(new), (2**0.5, 2**0.5, 1.0), strict=True):
        assert abs(row.extremes.sigma_max - target) <= 0.0101
        assert abs(row.extremes.sigma_min - target) <= 0.0101
    assert new.get_layer("conv").kernel_regularizer.alpha == 2.0  # the penalty stays


def test_the_command_prints_the_report_of_the_library(model_file, tmp_path, run):
    options = ["--exclude", "conv", "--max-steps", 3]
    _, printed = run("regularize", model_file, *options, "--output", tmp_path / "new.keras")
    descent = regularize_model(keras.saving.load_model(model_file), exclude="conv", max_steps=3)
    lines = str(descent).splitlines()
    assert printed.out.splitlines()[: len(lines)] == lines


def test_alpha_on_the_command_line_comes_first(model_file, tmp_path, run):
    status, printed = run("regularize", model_file, "--alpha", 0.5, "--output", tmp_path / "new.keras")
    assert status == 0
    assert {row["α"] for row in table(printed.out).values()} == {"0.5"}
    for row in model_spectrum(keras.saving.load_model(tmp_path / "new.keras")):
        assert abs(row.extremes.sigma_max - 0.5**0.5) <= 0.0101


@pytest.mark.parametrize(
    ("options", "kernels", "left_out"),
    [
        (["--exclude", "top"], ["conv", "strided"], {"top": "excluded"}),
        (["--exclude", "top", "--exclude", "conv"], ["strided"], {"conv": "excluded", "top": "excluded"}),
        (["--include", "top"], ["top"], {"conv": "not included", "strided": "not included"}),
        (["--include", "top", "--include", "c*"], ["conv", "top"], {"strided": "not included"}),
        (
            ["--include", "*t*", "--exclude", "s*"],
            ["top"],
            {"conv": "not included", "strided": "excluded"},
        ),
    ],
)
def test_selected_kernels_change_and_the_others_stay(options, kernels, left_out, model_file, tmp_path, run):
    status, printed = run("regularize", model_file, *options, "--output", tmp_path / "new.keras")
    assert status == 0
    assert list(table(printed.out)) == kernels
    assert printed.out.startswith(f"{len(kernels)} of {len(kernels)} kernel")
    assert printed.out.splitlines()[0].endswith(f" converged, {len(left_out)} left out")
    lines = [line for line in printed.out.splitlines() if line.startswith("Left out: ")]
    found = [line.removeprefix("Left out: ").split(": ") for line in lines]
    assert {name: reason for names, reason in found for name in names.split(", ")} == left_out
    before, after = (keras.saving.load_model(path) for path in (model_file, tmp_path / "new.keras"))
    for name in ("conv", "strided", "top"):
        changed = np.any(np.asarray(before.get_layer(name).kernel) != after.get_layer(name).kernel)
        assert changed == (name in kernels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--include", "dense*"], "Received: --include dense*. Names: conv, strided, top"),
        (["--exclude", "conv", "--exclude", "tpo"], "--exclude tpo (did you mean 'top'?). Names: conv"),
        (
            ["--include", "top", "--exclude", "top"],
            "model must have a kernel to regularize. Received: conv, strided: not included; top: excluded",
        ),
    ],
)
def test_names_that_leave_nothing_are_refused(options, message, model_file, tmp_path, run):
    status, printed = run("regularize", model_file, *options, "--output", tmp_path / "new.keras")
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1  # so the remark about the loss is not there
    assert not (tmp_path / "new.keras").exists()


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_kernel_without_a_model_has_no_names(option, kernel, tmp_path, run):
    options = ["--input-size", 8, "--output", tmp_path / "new.npy", option, "conv"]
    status, printed = run("regularize", kernel, *options)
    assert status == 2
    assert printed.err == (
        f"tf-frobreg regularize: error: {option} goes with a model, not with a kernel. Received: {kernel}\n"
    )


def test_a_remark_that_the_loss_is_ignored_comes_before_the_first_step(model_file, tmp_path, run):
    status, printed = run("regularize", model_file, "--max-steps", 1, "--output", tmp_path / "new.keras")
    assert status == 1
    first, *progress = printed.err.splitlines()
    assert first == LOSS_IGNORED
    assert any("conv" in line for line in progress)
    assert LOSS_IGNORED not in printed.out


def test_no_remark_about_a_loss_for_a_kernel_without_a_model(kernel, tmp_path, run):
    assert (
        LOSS_IGNORED
        not in run("regularize", kernel, "--input-size", 8, "--output", tmp_path / "k.npy")[1].err
    )


def test_no_remark_if_nothing_begins(model_file, tmp_path, run):
    status, printed = run("regularize", model_file, "--max-steps", -1, "--output", tmp_path / "new.keras")
    assert status == 2
    message = "error: --max-steps must be at least 0. Received: --max-steps=-1\n"
    assert printed.err == f"tf-frobreg regularize: {message}"


def test_kernels_that_did_not_converge_have_a_line_with_a_remedy(model_file, tmp_path, run):
    options = ["--max-steps", 3, "--exclude", "top", "--output", tmp_path / "new.keras"]
    status, printed = run("regularize", model_file, *options)
    assert status == 1
    rows = table(printed.out)
    assert [(row["steps"], row["result"]) for row in rows.values()] == [("3", "max steps")] * 2
    lines = printed.out.splitlines()
    assert lines[0] == "0 of 2 kernels converged, 1 left out"
    reason = "out of steps; continue with more steps and escape=True, or use a larger tolerance"
    assert f"max steps: not converged: {reason}" in lines
    assert (tmp_path / "new.keras").exists()


def test_a_kernel_out_of_reach_is_written_and_explained(tmp_path, run):
    layer = keras.layers.Conv2D(8, 3, name="conv")
    keras.Sequential([keras.Input((9, 9, 4)), layer]).save(tmp_path / "model.keras")
    status, printed = run("regularize", tmp_path / "model.keras", "--output", tmp_path / "new.keras")
    assert status == 1
    assert table(printed.out)["conv"]["result"] == "out of reach"
    assert "out of reach: not converged: no kernel of this geometry reaches √α" in printed.out
    assert (tmp_path / "new.keras").exists()


def test_escapes_are_counted_and_can_be_switched_off(depthwise_file, tmp_path, run):
    status, printed = run("regularize", depthwise_file, "--output", tmp_path / "new.keras")
    assert status == 0
    row = table(printed.out)["depthwise"]
    assert int(row["escapes"]) > 0
    assert row["result"] == "converged"
    status, printed = run("regularize", depthwise_file, "--no-escape", "--output", tmp_path / "plain.keras")
    assert status == 1
    row = table(printed.out)["depthwise"]
    assert row["escapes"] == "0"
    assert row["result"] != "converged"


def test_the_table_says_how_far_each_kernel_moved(model_file, tmp_path, run):
    _, printed = run("regularize", model_file, "--exclude", "top", "--output", tmp_path / "new.keras")
    before, after = (keras.saving.load_model(path) for path in (model_file, tmp_path / "new.keras"))
    rows = table(printed.out)
    for name in ("conv", "strided"):
        old, new = (np.asarray(model.get_layer(name).kernel) for model in (before, after))
        assert rows[name]["moved"] == f"{np.linalg.norm(new - old) / np.linalg.norm(old):.0%}"


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (79, []),
        (70, ["R before"]),
        (60, ["R before", "R after"]),
        (50, ["R before", "R after", "escapes", "α"]),
    ],
)
def test_the_table_fits_the_terminal(width, missing, model_file, tmp_path, run, monkeypatch):
    monkeypatch.setattr(tf_frobreg.tables, "terminal_width", lambda: width)
    _, printed = run("regularize", model_file, "--exclude", "top", "--output", tmp_path / "new.keras")
    lines = printed.out.splitlines()
    rows = table(printed.out)
    for row in rows.values():
        assert re.fullmatch(r"1\.4\d{3}", row["σmax"])  # no number is broken over two lines
        assert row["result"] == "converged"
    assert all(len(line) <= width for line in lines[: len(rows) + 4])
    names = [name.replace("_", " ") for name in next(iter(rows.values()))]
    assert set(missing).isdisjoint(names)
    remark = f"The terminal is too narrow for: {', '.join(missing)}."
    assert (remark in lines) == bool(missing)


def test_a_model_without_kernels_is_refused(tmp_path, run):
    keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()]).save(tmp_path / "model.keras")
    status, printed = run("regularize", tmp_path / "model.keras", "--output", tmp_path / "new.keras")
    assert status == 2
    assert "model must have a kernel to regularize. Received: none" in printed.err
    assert printed.err.count("\n") == 1


def test_kernels_that_moved_far_get_advice(model_file, tmp_path, run):
    _, printed = run("regularize", model_file, "--output", tmp_path / "new.keras")
    farthest = max((row["moved"] for row in table(printed.out).values()), key=lambda text: int(text[:-1]))
    assert f"Kernels moved by up to {farthest}. {MOVED_FAR}\n" in printed.out
    again = ["regularize", tmp_path / "new.keras", "--tolerance", 0.009, "--output", tmp_path / "again.keras"]
    status, printed = run(*again)
    assert status == 0
    assert MOVED_FAR not in printed.out


def test_ctrl_c_keeps_the_kernels_reached_so_far(model_file, tmp_path, run, monkeypatch):
    regularize_model = tf_frobreg.regularize_model

    def interrupted(*arguments, callback, **options):
        def press(name, step, kernel, penalty):
            if (name, step) == ("strided", 3):
                signal.raise_signal(signal.SIGINT)
            return callback(name, step, kernel, penalty)

        return regularize_model(*arguments, callback=press, **options)

    monkeypatch.setattr(tf_frobreg, "regularize_model", interrupted)
    status, printed = run("regularize", model_file, "--output", tmp_path / "new.keras")
    assert status == 1
    lines = printed.out.splitlines()
    assert "stopped: not converged: interrupted, the kernel reached so far is kept" in lines
    assert "Left out: top: interrupted" in lines
    assert "callback" not in printed.out
    rows = table(printed.out)
    assert (rows["conv"]["result"], rows["strided"]["steps"]) == ("converged", "3")
    assert rows["strided"]["result"] == "stopped"
    before, after = (keras.saving.load_model(path) for path in (model_file, tmp_path / "new.keras"))
    np.testing.assert_array_equal(before.get_layer("top").kernel, after.get_layer("top").kernel)
    assert np.any(np.asarray(before.get_layer("strided").kernel) != after.get_layer("strided").kernel)
