"""`tf-frobreg spectrum --lipschitz` as a user types it."""

import csv
import json
import warnings

import keras
import pytest

from tf_frobreg import lipschitz_bound

L = keras.layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lipschitz")
    keras.utils.set_random_seed(1)
    layers = [L.Conv2D(3, 3, padding="same", activation="relu", name="conv"), L.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers, L.Dense(2, name="top")])
    model.save(path / "model.keras")
    model.save_weights(path / "model.weights.h5")
    (path / "model.json").write_text(model.to_json(), encoding="utf-8")
    keras.Sequential([keras.Input((4,)), L.Dense(2, activation="softmax", name="top")]).save(
        path / "softmax.keras"
    )
    keras.Sequential([keras.Input((None, None, 1)), L.Conv2D(1, 3)]).save(path / "open.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of a model that is not built
        keras.Sequential([L.Dense(2)]).save(path / "unbuilt.keras")
    keras.Sequential([keras.Input((0, 4, 1)), L.GlobalAveragePooling2D(name="mean")]).save(
        path / "empty.keras"
    )
    return path


def test_the_table_and_the_files(folder, tmp_path, run):
    expected = lipschitz_bound(keras.saving.load_model(folder / "model.keras"))
    outputs = [tmp_path / "out.json", tmp_path / "out.csv"]
    status, printed = run(
        "spectrum", folder / "model.keras", "--lipschitz", "--json", outputs[0], "--csv", outputs[1]
    )
    assert status == 0
    assert str(expected) in printed.out
    content = json.loads(outputs[0].read_text(encoding="utf-8"))
    assert content["lipschitz_bound"] == expected.value
    assert content["layers"] == expected.records()
    with outputs[1].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == [row.name for row in expected.layers]
    assert [float(row["from_input"]) for row in rows] == [row.from_input for row in expected.layers]


def test_weights_with_a_model(folder, run):
    status, printed = run(
        "spectrum", folder / "model.weights.h5", "--model", folder / "model.json", "--lipschitz"
    )
    assert status == 0
    assert "Lipschitz constant at most" in printed.out


def test_a_size_for_an_open_model(folder, run):
    status, printed = run("spectrum", folder / "open.keras", "--lipschitz", "--input-size", 9)
    assert status == 0
    assert "conv2d" in printed.out


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("kernel.npy", [], "--lipschitz needs a model, .keras or .h5"),
        ("model.keras", ["--alpha", 2], "--alpha cannot be combined with --lipschitz"),
        ("model.keras", ["--accuracy", 0.1], "--accuracy cannot be combined with --lipschitz"),
        ("model.keras", ["--plot", "x.png"], "--plot cannot be combined with --lipschitz"),
        ("model.keras", ["--strides", 2], "--strides cannot be given"),
        ("softmax.keras", [], "layer 'top' (Dense) cannot be bounded: its activation is softmax"),
        ("open.keras", [], "--input-size must be given"),
        ("unbuilt.keras", [], "FILE must hold a model that was built before it was saved"),
        (
            "empty.keras",
            [],
            "(Sequential) cannot be bounded: its input has no entries",
        ),
    ],
)
def test_refusals(file, options, message, folder, run):
    status, printed = run("spectrum", folder / file, "--lipschitz", *options)
    assert status == 2
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
