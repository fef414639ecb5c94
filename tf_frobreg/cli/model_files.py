"""Model files that the commands read. Code in them that Keras finds unsafe is not run."""

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tf_frobreg.cli.files import BadInput

MODELS = (".keras", ".h5")
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
        if path.endswith(".json"):
            return keras.models.model_from_json(Path(path).read_text(encoding="utf-8"))
        if path.endswith(".keras") and not zipfile.is_zipfile(path):
            raise ValueError("it is damaged, or not a .keras file, which is a zip archive")
        if path.endswith(".h5"):
            _refuse_lambda(path)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says the same
            model.load_weights(weights_path)
    except Exception as error:  # h5py, zipfile and Keras raise many types
        raise BadInput(f"FILE does not fit --model ({short(error)}). Received: {weights_path}") from None
    return model


def _refuse_lambda(path: str) -> None:
    """Raises ValueError if an `.h5` file holds code. Keras before 3.11.3 ran it even in its safe mode."""
    import h5py

    with h5py.File(path) as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise ValueError("it holds only weights: rename it to .weights.h5 and use --model")
    if '"Lambda"' in (config.decode() if isinstance(config, bytes) else config):
        raise ValueError("it has a Lambda layer, and its code would be run")


def short(error: Exception) -> str:
    """Returns the cause at the end of Keras' nested messages, on one line."""
    text = " ".join(str(error).split()).rpartition("Exception encountered: ")[2] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"
