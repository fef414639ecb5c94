"""Model files that the commands read. Code in them that Keras finds unsafe is not run."""

import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tf_frobreg.checks import free_memory
from tf_frobreg.cli.files import BadInput
from tf_frobreg.cli.hdf5 import check_hdf5, read_all
from tf_frobreg.text import one_line

MODELS = (".keras", ".h5")
LARGEST_CONFIGURATION = 1 << 26  # bytes
SMALLEST_MODEL = 1 << 16  # bytes
IN_PYTHON = "model_spectrum and regularize_model accept such a model"


def refuse_geometry(geometry: Mapping[str, Any], path: str) -> None:
    """Raises `BadInput` for options such as --strides, which would be ignored for a model."""
    if geometry:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in geometry)
        raise BadInput(
            f"{names} cannot be given: the geometry is read from the layers of the model. Received: {path}"
        )


def load_model(path: str, argument: str, *, compile: bool = False) -> Any:
    """Returns the Keras model in a `.keras`, `.h5` or `.json` file. An error names `argument`."""
    import keras

    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("it is a directory" if os.path.isdir(path) else "no such file")
        text = _read_configuration(path)
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("it holds no model")
        _refuse_code(config)
        if path.endswith(".json"):
            return keras.models.model_from_json(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example about an optimizer that has not made a step yet
            return keras.saving.load_model(path, compile=compile, safe_mode=True)
    except Exception as error:  # h5py, zipfile, JSON and Keras raise many types
        hint = ""
        if found := re.search("Could not locate (?:class|function) '([^']+)'", str(error)):
            hint = f"; in Python, load it with custom_objects={{{found[1]!r}: ...}}: {IN_PYTHON}"
        elif "deserialization of a Python lambda" in str(error):
            hint = f"; in Python, load it with safe_mode=False if you trust the file: {IN_PYTHON}"
        raise BadInput(f"{argument} cannot be loaded ({short(error)}{hint}). Received: {path}") from None


def load_model_and_weights(model_path: str, weights_path: str) -> Any:
    """Returns the Keras model in one file (--model) with the weights in another (FILE)."""
    model = load_model(model_path, "--model")
    try:
        check_hdf5(weights_path, free_memory())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says the same
            model.load_weights(weights_path)
    except Exception as error:  # h5py, zipfile and Keras raise many types
        raise BadInput(f"FILE does not fit --model ({short(error)}). Received: {weights_path}") from None
    return model


def save_model(model: Any, path: Path) -> None:
    """Saves a model in an existing file. Reads it once: HDF5 and zip may lose the last error of a disk.

    Raises:
        OSError: If the disk has no room for the model, or the file is not whole.
    """
    import keras

    optimizer = getattr(model, "optimizer", None)  # a model that was never compiled has no such attribute
    variables = [*model.variables, *(optimizer.variables if optimizer else [])]
    size = sum(keras.ops.convert_to_numpy(variable).nbytes for variable in variables)
    with path.open("rb+") as file:  # h5py ends the process if the disk is full
        os.posix_fallocate(file.fileno(), 0, size + SMALLEST_MODEL)
    model.save(path)
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise OSError("the file is not whole")
        return
    import h5py

    with h5py.File(path) as file:
        read_all(file)


def _read_configuration(path: str) -> str:
    """Returns the JSON text in a file that says which layers a model has. Checks the rest of the file."""
    if path.endswith(".json"):
        return Path(path).read_text(encoding="utf-8")
    if path.endswith(".keras"):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is damaged, or not a .keras file, which is a zip archive")
        check_hdf5(path, free_memory())
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("config.json").file_size > LARGEST_CONFIGURATION:
                raise ValueError("its config.json is too large")
            return archive.read("config.json").decode("utf-8")
    check_hdf5(path, free_memory())
    import h5py

    with h5py.File(path) as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise ValueError("it holds only weights: rename it to .weights.h5 and use --model")
    return config.decode("utf-8") if isinstance(config, bytes) else config


def _refuse_code(config: Any) -> None:
    """Refuses a parsed configuration that names code which is not of Keras or of this package.

    Keras before 3.11.3 ran some of it even in its safe mode. Only what is listed here is allowed.

    Raises:
        ValueError: If it names such code.
    """
    if not isinstance(config, (dict, list)):
        return
    if isinstance(config, dict):
        kind, module = config.get("class_name"), config.get("module")
        if kind == "Lambda":
            raise ValueError("it has a Lambda layer, and its code would be run")
        if kind == "__lambda__":
            raise ValueError("deserialization of a Python lambda would run its code")
        is_function = kind == "function"
        is_by_name = is_function and module == "builtins"  # Keras looks for it among registered functions
        is_ours = module is None or str(module).partition(".")[0] in ("keras", "tf_frobreg")
        if kind is not None and not is_by_name and not is_ours:
            name = config.get("config") if is_function else kind
            raise ValueError(f"Could not locate {'function' if is_function else 'class'} '{name}'")
    for part in config.values() if isinstance(config, dict) else config:
        _refuse_code(part)


def short(error: Exception) -> str:
    """Returns the cause at the end of Keras' nested messages, on one line."""
    return one_line(str(error).rpartition("Exception encountered: ")[2], 300) or type(error).__name__
