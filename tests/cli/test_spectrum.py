"""`tf-frobreg spectrum` as a user types it."""

import csv
import json

import keras
import numpy as np
import pytest

import tf_frobreg
import tf_frobreg.tables
from tf_frobreg import attach_regularizers, model_spectrum, plot_spectrum, singular_values


def normal(*shape):
    return np.random.RandomState(1).randn(*shape)


def test_a_kernel(directory, run):
    status, printed = run("spectrum", directory / "kernel.npy", "--input-size", 8, 9, "--strides", 2)
    assert status == 0
    sigma = singular_values(normal(3, 3, 2, 4), (8, 9), strides=2)
    (row,) = (line.split() for line in printed.out.splitlines() if line.split()[:1] == ["kernel"])
    assert row[:3] == ["kernel", "3×3×2×4", "8×9"]
    assert [float(value) for value in row[3:5]] == pytest.approx([sigma[0], sigma[-1]], rel=1e-3)
    assert float(row[5]) == pytest.approx(sigma[0] / sigma[-1], rel=1e-3)


def test_an_archive_with_what_is_no_kernel(directory, run):
    status, printed = run("spectrum", directory / "kernels.npz", "--input-size", 8)
    assert status == 0
    assert "Not measured: bias: kernel must have rank 4" in printed.out
    assert printed.out.count("3×3×2×4") == 1
    assert printed.out.count("5×3") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.keras"],
        ["model.h5"],
        ["model.weights.h5", "--model", "model.json"],
        ["model.weights.h5", "--model", "model.keras"],
    ],
    ids=" ".join,
)
def test_a_model_and_its_files(arguments, directory, tmp_path, run):
    arguments = [directory / name if "." in name else name for name in arguments]
    outputs = {name: tmp_path / f"out.{name}" for name in ("json", "csv")}
    outputs["plot"] = tmp_path / "out.png"
    options = [text for name, path in outputs.items() for text in (f"--{name}", path)]
    status, printed = run("spectrum", *arguments, *options, "--alpha", 2)
    assert status == 0
    assert "Not measured: causal: padding='causal' is not supported" in printed.out
    assert "1 Flatten" in printed.out
    model = keras.saving.load_model(directory / "model.keras", compile=False)
    content = json.loads(outputs["json"].read_text(encoding="utf-8"))
    assert content["alpha"] == 2
    kernels = {record["layer"]: record for record in content["kernels"]}
    with open(outputs["csv"], newline="", encoding="utf-8") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(kernels) == ["first", "second", "causal"]
    for name, size, geometry in [
        ("first", (8, 9), {}),
        ("second", (8, 9), {"strides": 2, "padding": "valid"}),
    ]:
        sigma = singular_values(model.get_layer(name).kernel, size, **geometry)
        penalty = np.sum((sigma**2 - 2) ** 2)
        record = kernels[name]
        assert record["sigma_max"] == pytest.approx(sigma[0], rel=1e-4)
        assert record["sigma_min"] == pytest.approx(sigma[-1], abs=1e-2 * sigma[0])
        floor = 4 * max(0, np.prod(size) * model.get_layer(name).kernel.shape[2] - sigma.size)
        assert record["penalty_floor"] == pytest.approx(floor)
        assert record["penalty"] == pytest.approx(penalty + floor, rel=1e-4)
        assert record["reason"] is None
        assert float(rows[name]["sigma_max"]) == record["sigma_max"]
        assert rows[name]["input_size"] == "8x9"
    assert kernels["causal"]["sigma_max"] is None
    assert outputs["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "alphas"),
    [([], {"first": 2.0, "second": 0.5}), (["--alpha", 3], {"first": 3.0, "second": 3.0})],
)
def test_alpha_is_that_of_the_penalty_of_each_kernel(options, alphas, directory, tmp_path, run, monkeypatch):
    model = keras.saving.load_model(directory / "model.keras", compile=False)
    overrides = {"second": {"alpha": 0.5}}
    attach_regularizers(model, alpha=2.0, exclude="causal", overrides=overrides)
    model.save(tmp_path / "model.keras")
    drawn = {}
    monkeypatch.setattr(
        tf_frobreg, "plot_spectrum", lambda *args, **kws: drawn.update(kws) or plot_spectrum(*args, **kws)
    )
    outputs = ["--json", tmp_path / "out.json", "--csv", tmp_path / "out.csv", "--plot", tmp_path / "out.png"]
    status, printed = run("spectrum", tmp_path / "model.keras", *options, *outputs)
    assert status == 0
    content = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    records = {record["layer"]: record for record in content["kernels"]}
    assert {name: record["alpha"] for name, record in records.items()} == {**alphas, "causal": None}
    assert content["alpha"] == (3.0 if options else None)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    expected = {**{name: str(alpha) for name, alpha in alphas.items()}, "causal": ""}
    assert {name: row["alpha"] for name, row in rows.items()} == expected
    for row in model_spectrum(model, alpha=3.0 if options else None)[:2]:
        assert records[row.name]["penalty"] == pytest.approx(row.penalty)
    assert drawn["alpha"] == alphas
    table = printed.out.split("\n\n")[1].splitlines()
    column = table[0].split().index("α") if not options else None
    cells = {line.split()[0]: line.split() for line in table[2:]}
    assert column is None or {name: cells[name][column] for name in cells} == {"first": "2", "second": "0.5"}
    assert printed.out.splitlines()[0].endswith(", α = 3, 1 not measured") == bool(options)


def test_the_command_prints_the_report_of_the_library(directory, run):
    _, printed = run("spectrum", directory / "model.keras")
    model = keras.saving.load_model(directory / "model.keras", compile=False)
    others = "Without a kernel: 1 Flatten, 1 InputLayer, 1 Reshape"
    assert printed.out.splitlines() == [*str(model_spectrum(model)).splitlines(), others]


def test_what_the_table_does_not_show_is_below_it(tmp_path, run):
    model = keras.Sequential([keras.Input((8, 8, 2)), keras.layers.Conv2D(3, 3, padding="same", name="conv")])
    attach_regularizers(model, padding="circular")
    model.save(tmp_path / "model.keras")
    _, printed = run("spectrum", tmp_path / "model.keras", "--json", tmp_path / "out.json")
    remark = "penalised without border (circular), measured with the layer's padding"
    assert f"conv: {remark}" in printed.out.splitlines()
    (record,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["kernels"]
    assert record["remark"] == remark
    sigma = singular_values(model.layers[0])
    assert record["sigma_max"] == pytest.approx(sigma[0], rel=1e-4)


def test_a_model_of_unknown_size(directory, run):
    status, printed = run("spectrum", directory / "open.keras")
    assert status == 1
    assert "Not measured: first: its image size is unknown" in printed.out
    status, printed = run("spectrum", directory / "open.keras", "--input-size", 6)
    assert status == 0
    assert "6×6" in printed.out


def test_zero_and_unknown_values_in_the_table_and_in_files(directory, tmp_path, run):
    np.save(tmp_path / "zero.npy", np.zeros((3, 3, 2, 2)))
    status, printed = run(
        "spectrum",
        tmp_path / "zero.npy",
        "--input-size",
        5,
        "--json",
        tmp_path / "zero.json",
        "--sigma-max-only",
    )
    assert status == 0
    (record,) = json.loads((tmp_path / "zero.json").read_text())["kernels"]
    assert record["sigma_max"] == 0
    assert record["sigma_min"] is None
    assert record["sigma_min_converged"] is None
    assert record["condition_number"] is None
    status, printed = run("spectrum", tmp_path / "zero.npy", "--input-size", 5)
    assert "∞" in printed.out
    assert "nan" not in printed.out.lower()


@pytest.mark.slow
def test_what_cannot_be_told_from_0_is_a_bound(tmp_path, run):
    np.save(tmp_path / "square.npy", normal(3, 3, 8, 8))
    status, printed = run("spectrum", tmp_path / "square.npy", "--input-size", 32)
    assert status == 0
    assert "≤ " in printed.out
    assert "≥ " in printed.out
    command = [tmp_path / "square.npy", "--input-size", 32, "--accuracy", 1e-15]
    status, printed = run("spectrum", *command, "--json", tmp_path / "square.json")
    assert status == 1
    assert "Accuracy not reached: square: σmin may be about" in printed.out
    (record,) = json.loads((tmp_path / "square.json").read_text())["kernels"]
    assert record["sigma_min_is_upper_bound"] is True


def test_a_dense_kernel_needs_no_image(directory, run):
    status, printed = run("spectrum", directory / "dense.npy")
    assert status == 0
    assert "5×3" in printed.out


def test_what_is_beyond_all_floats_is_infinite(tmp_path, run):
    np.save(tmp_path / "huge.npy", 1e300 * normal(3, 3, 2, 2))
    status, printed = run(
        "spectrum", tmp_path / "huge.npy", "--input-size", 6, "--json", tmp_path / "huge.json"
    )
    assert status == 0
    assert "nan" not in printed.out.lower()
    (record,) = json.loads((tmp_path / "huge.json").read_text())["kernels"]
    assert record["penalty"] == record["penalty_per_column"] == "inf"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(width, directory, run, monkeypatch):
    monkeypatch.setattr(tf_frobreg.tables, "terminal_width", lambda: width)
    _, printed = run("spectrum", directory / "model.keras")
    lines = printed.out.splitlines()
    assert any(line.split()[:1] == ["first"] for line in lines)
    assert "…" not in printed.out.partition("\n")[2]  # the first line has a range of σ
    assert ("The terminal is too narrow for: " in printed.out) == (width < 80)
    table = [line for line in lines if "first" in line or "σmax" in line]
    assert max(len(line) for line in table) <= width


@pytest.mark.parametrize("kind", ["sorted", "histogram"])
@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_plots(kind, ending, directory, tmp_path, run):
    output = tmp_path / f"plot.{ending}"
    status, _ = run("spectrum", directory / "model.keras", "--plot", output, "--plot-kind", kind)
    assert status == 0
    assert output.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel.npy"], "--input-size is needed for kernels without a model"),
        (["empty.npz"], "FILE must hold a kernel"),
        (["bias.npz", "--plot", "plot.png"], "--plot has nothing to draw: no kernel was measured"),
        (["open.keras", "--input-size", 1], "--input-size must suit the model"),
        (["model.keras", "--input-size", 8], "has the fixed shape (None, 8, 9, 2)"),
        (["missing.npy", "--input-size", 8], "FILE cannot be read (No such file or directory)"),
        (["junk.npz", "--input-size", 8], "FILE must be a whole .npy or .npz file"),
        (["text.txt"], "FILE must end in .npy, .npz, .keras or .h5"),
        (["model.weights.h5"], "--model is needed: weights alone are not layers"),
        (["model.weights.h5", "--model", "text.txt"], "--model must end in .keras, .h5 or .json"),
        (["model.keras", "--model", "model.json"], "--model goes with a .weights.h5 file"),
        (["model.keras", "--plot", "plot.xyz"], "--plot must end in .png, .pdf or .svg"),
        (["model.keras", "--alpha", 0], "alpha must be a finite number above 0"),
        (["model.keras", "--accuracy", "nan"], "accuracy must be a finite number above 0"),
        (["kernel.npy", "--input-size", 0], "--input-size must be at least 1"),
        (["kernel.npy", "--input-size", 8, "--padding", "full"], "padding must be one of"),
    ],
)
def test_bad_input(arguments, message, directory, run):
    before = set(directory.iterdir())
    names = {path.name for path in before} | {"missing.npy", "missing.keras", "plot.xyz", "plot.png"}
    arguments = [directory / text if text in names else text for text in arguments]
    status, printed = run("spectrum", *arguments)
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert set(directory.iterdir()) == before


def test_existing_files_and_inputs_are_kept(directory, tmp_path, run):
    output = tmp_path / "out.json"
    output.write_text("precious")
    command = [directory / "kernel.npy", "--input-size", 8, "--json"]
    status, printed = run("spectrum", *command, output)
    assert status == 2
    assert "--json exists; --force overwrites it" in printed.err
    assert output.read_text() == "precious"
    assert run("spectrum", *command, output, "--force")[0] == 0
    assert json.loads(output.read_text())["kernels"]
    status, printed = run("spectrum", *command, directory / "kernel.npy", "--force")
    assert status == 2
    assert "none of them the input" in printed.err


def test_a_kernel_in_the_order_of_pytorch_is_remarked_in_one_line(tmp_path, run):
    np.save(tmp_path / "torch.npy", normal(6, 2, 3, 3))
    status, printed = run("spectrum", tmp_path / "torch.npy", "--input-size", 8)
    assert status == 0
    (line,) = [line for line in printed.err.splitlines() if "PyTorch" in line]
    assert line.startswith("torch: A kernel of shape (6, 2, 3, 3) seems to have PyTorch's order")


def test_a_layer_without_a_size_changes_the_status(tmp_path, run):
    left, right = (keras.Input((None, None, 1), name=name) for name in ("left", "right"))
    a, b = keras.layers.Conv2D(2, 3, name="a"), keras.layers.Conv2D(2, 3, name="b")
    keras.Model([left, right], [a(left), b(right)]).save(tmp_path / "two.keras")
    status, printed = run("spectrum", tmp_path / "two.keras", "--input-size", "left=6")
    assert status == 1
    assert "1 kernel, " in printed.out
    assert "Not measured: b: its image size is unknown, (None, None): give --input-size, or" in printed.out
    status, printed = run("spectrum", tmp_path / "two.keras", "--input-size", "left=6", "right=7x8")
    assert status == 0
    status, printed = run("spectrum", tmp_path / "two.keras")
    assert status == 1
