"""Finds the regularizers that a model's configuration does not hold, so that a saved model lacks them."""

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import keras

from tf_frobreg.keras.attach_report import Change


def unsaved_kernels(model: keras.layers.Layer, changes: Sequence[Change]) -> set[str]:
    """Returns the names of the kernels whose regularizer a saved model lacks.

    A saved model holds the regularizers in its configuration. An entry is compared by its layer's name, its
    own name and its content. If two layers agree in all three and only one is saved, both are returned.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns about functions among the regularizers
        saved = _saved_regularizers(model)
        entries = {
            kernel.name: (kernel.layer.name, kernel.regularizer, _as_text(now)) for kernel, now in changes
        }
    lacking = Counter(entries.values()) - saved
    return {name for name, entry in entries.items() if entry in lacking}


def _saved_regularizers(model: keras.layers.Layer) -> Counter[tuple[str, str, str]]:
    """Counts (name of the layer, name of the attribute, regularizer) in a model's configuration."""
    found: Counter[tuple[str, str, str]] = Counter()
    stack: list[Any] = []
    with contextlib.suppress(Exception):  # a class without a configuration saves nothing
        stack.append(keras.saving.serialize_keras_object(model.get_config()))
    while stack:
        config = stack.pop()
        if isinstance(config, list):
            stack += config
        elif isinstance(config, dict):
            stack += config.values()
            if "name" in config:
                for attribute, value in config.items():
                    if attribute.endswith("regularizer") and value is not None:
                        found[str(config["name"]), attribute, _as_text(value)] += 1
    return found


def _as_text(regularizer: Any) -> str:
    """Returns a text that is the same for a regularizer and for its configuration."""
    with contextlib.suppress(Exception):  # a function that cannot be saved
        return json.dumps(keras.saving.serialize_keras_object(regularizer), sort_keys=True, default=repr)
    return repr(regularizer)
