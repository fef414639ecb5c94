"""Model files the commands read: nothing in them is run that Keras finds unsafe."""

import os
import warnings
import zipfile
from pathlib import Path

from tf_frobreg.cli.files import BadInput

MODELS = (".keras", ".h5")


def refuse_geometry(options) -> None:
    """Options such as --strides are for kernels: beside a model they would be ignored."""
    if options.geometry:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options.geometry)
        raise BadInput(f"{names} cannot be given: a model's layers tell theirs. Received: {options.file}")


def load_model(path: str, argument: str, *, compile: bool = False):
    """Returns the Keras model in a `.keras`, `.h5` or `.json` file; `argument` is named where that fails."""
    import keras

    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("it is a directory" if os.path.isdir(path) else "no such file")
        if path.endswith(".json"):
            return keras.models.model_from_json(Path(path).read_text(encoding="utf-8"))
        if path.endswith(".keras") and not zipfile.is_zipfile(path):
            raise ValueError("it is damaged, or no .keras file, which is a zip archive")
        if path.endswith(".h5"):
            _refuse_lambda(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optimizers that have not made a step yet, for one
            return keras.saving.load_model(path, compile=compile, safe_mode=True)
    except Exception as error:  # whatever h5py, zipfile, JSON and Keras find wrong
        hint = "; in Python, model_spectrum and regularize_model take such models"
        hint = hint if "Could not locate class" in str(error) else ""
        raise BadInput(f"{argument} cannot be loaded ({short(error)}{hint}). Received: {path}") from None


def _refuse_lambda(path):
    """Keras before 3.11.3 ran the code in `.h5` files in spite of its safe mode."""
    import h5py

    with h5py.File(path) as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise ValueError("it holds weights only: give it the ending .weights.h5 and use --model")
    if '"Lambda"' in (config.decode() if isinstance(config, bytes) else config):
        raise ValueError("it has a Lambda layer, whose code would be run")


def short(error: Exception) -> str:
    """The end of Keras' nested messages, which names the cause, on one line."""
    text = " ".join(str(error).split()).rpartition("Exception encountered: ")[2] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"
