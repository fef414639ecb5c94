"""Models in files: what cannot be loaded gets one line, and no code in a file is run."""

import json
import warnings
import zipfile

import h5py
import keras
import pytest

from tf_frobreg import attach_regularizers
from tf_frobreg.cli.files import BadInput
from tf_frobreg.cli.model_files import load_model, load_model_and_weights, refuse_geometry, short


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder.keras"], "FILE cannot be loaded (it is a directory)"),
        (["missing.keras"], "FILE cannot be loaded (no such file)"),
        (["junk.keras"], "FILE cannot be loaded (it is damaged, or not a .keras file"),
        (["junk.h5"], "FILE cannot be loaded ("),
        (["lambda.keras"], "Lambda"),
        (["lambda.h5"], "it has a Lambda layer, and its code would be run"),
        (["model.weights.h5", "--model", "other.keras"], "FILE does not fit --model ("),
        (["model.weights.h5", "--model", "missing.keras"], "--model cannot be loaded (no such file)"),
        (["model.keras", "--strides", 2], "--strides cannot be given: the geometry is read from the layers"),
    ],
)
def test_bad_models(arguments, message, directory, run):
    before = set(directory.iterdir())
    names = {path.name for path in before} | {"missing.keras"}
    arguments = [directory / text if text in names else text for text in arguments]
    status, printed = run("spectrum", *arguments)
    assert status == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert set(directory.iterdir()) == before


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.json"])
def test_a_model_in_every_format(name, directory):
    model = load_model(str(directory / name), "FILE")
    assert [layer.name for layer in model.layers[:2]] == ["first", "second"]


def test_weights_for_a_model(directory):
    expected = load_model(str(directory / "model.keras"), "FILE").get_weights()
    model = load_model_and_weights(str(directory / "model.json"), str(directory / "model.weights.h5"))
    assert all((a == b).all() for a, b in zip(model.get_weights(), expected, strict=True))


def test_weights_are_no_model(directory):
    with pytest.raises(BadInput, match="it holds only weights: rename it to .weights.h5 and use --model"):
        load_model(str(directory / "model.weights.h5"), "FILE")


def test_a_class_that_is_not_known_has_a_hint(tmp_path):
    class Own(keras.layers.Dense):
        pass

    keras.Sequential([keras.Input((3,)), Own(2)]).save(tmp_path / "own.keras")
    hint = (
        "in Python, load it with custom_objects={'Own': ...}: model_spectrum and regularize_model accept such"
    )
    with pytest.raises(BadInput, match=hint):
        load_model(str(tmp_path / "own.keras"), "FILE")


def not_known(kernel, convolution):
    return keras.ops.sum(kernel)


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (
            not_known,
            "in Python, load it with custom_objects={'not_known': ...}: model_spectrum and regularize_model",
        ),
        (
            lambda kernel, convolution: keras.ops.sum(kernel),
            "load it with safe_mode=False if you trust the file",
        ),
    ],
    ids=["function", "lambda"],
)
def test_a_penalty_whose_function_is_not_known_has_a_hint(function, hint, tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    attach_regularizers(model, penalty=function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the lambda
        model.save(tmp_path / "own.keras")
    with pytest.raises(BadInput, match=hint):
        load_model(str(tmp_path / "own.keras"), "FILE")


def change_configuration(path, change):
    """Changes the JSON text of a model in a file."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = change(file.attrs["model_config"])
        return
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["config.json"] = change(content["config.json"].decode()).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_a_lambda_is_found_however_it_is_spelled(ending, tmp_path):
    path = tmp_path / f"model{ending}"
    keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x)]).save(path)
    change_configuration(path, lambda text: text.replace('"Lambda"', '"\\u004cambda"'))
    with pytest.raises(BadInput, match="it has a Lambda layer, and its code would be run"):
        load_model(str(path), "FILE")


@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_a_function_of_another_module_is_not_called(ending, tmp_path):
    path = tmp_path / f"model{ending}"
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="relu")]).save(path)
    foreign = {"module": "os", "class_name": "function", "config": "getcwd", "registered_name": "function"}
    change_configuration(path, lambda text: text.replace('"relu"', json.dumps(foreign)))
    with pytest.raises(BadInput, match="Could not locate function 'getcwd'"):
        load_model(str(path), "FILE")


def test_models_of_this_package_are_loaded(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(2, 3), keras.layers.Softmax()])
    attach_regularizers(model)
    for ending in (".h5", ".keras"):
        model.save(tmp_path / f"model{ending}")
        assert len(load_model(str(tmp_path / f"model{ending}"), "FILE").losses) == 1


def test_geometry_is_refused_by_the_names_of_its_options():
    refuse_geometry({}, "model.keras")
    with pytest.raises(
        BadInput, match="^--dilation-rate, --groups cannot be given: .* Received: model.keras"
    ):
        refuse_geometry({"dilation_rate": 2, "groups": 1}, "model.keras")


def test_errors_are_short_and_on_one_line():
    assert short(ValueError("outer\nException encountered: inner\n cause")) == "inner cause"
    assert short(KeyError()) == "KeyError"
    assert short(ValueError("x" * 1000)) == f"{'x' * 200} … {'x' * 100}"


def test_arrays_that_do_not_fit_are_not_read(tmp_path):
    """A compressed array of zeros takes a few bytes in the file."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    path = tmp_path / "large.h5"
    model.save(path)
    with h5py.File(path, "r+") as file:
        file.create_dataset("zeros", (10**6, 10**6), "f8", compression="gzip", chunks=(1000, 1000))
    with pytest.raises(BadInput, match="its arrays need 8,000,000,000,... bytes or more, but .* are free"):
        load_model(str(path), "FILE")
