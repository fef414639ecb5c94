"""The command `regularize` on a model."""

import csv

import keras
import numpy as np
import pytest
from small_models import named_model

from tf_frobreg import model_spectrum
from tf_frobreg.cli import main


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
    assert "conv     R " in capfd.readouterr().out
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
        (["--output", "new.keras", "--input-size", "9"], "input_size goes with a model that leaves the size"),
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
