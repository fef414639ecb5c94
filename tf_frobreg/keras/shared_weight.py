"""The penalties of a model, and the one weight that they share while callbacks change it."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from tf_frobreg.keras.model_weight import ModelWeight
from tf_frobreg.keras.read_layers import flat_layers
from tf_frobreg.keras.regularizer_base import WeightedRegularizer
from tf_frobreg.keras.sum_regularizer import SumRegularizer


def find_penalties(model: keras.Model, caller: str) -> list[WeightedRegularizer]:
    """Returns each penalty of the model once, also if several variables share it.

    Keras adds up the regularizers of the variables. A layer can also call a regularizer that it holds, and
    it saves those that it was given.

    Raises:
        ValueError: If there is none. The message names the caller.
    """
    stack: list[Any] = [getattr(variable, "regularizer", None) for variable in model.variables]
    stack += [value for layer in flat_layers(model) for value in vars(layer).values()]
    found: dict[int, Any] = {}
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, SumRegularizer):
            stack += value.regularizers  # not what the sum has replaced
        elif isinstance(value, keras.regularizers.Regularizer) and id(value) not in found:
            found[id(value)] = value
            if not isinstance(value, WeightedRegularizer):  # a class of the user may hold others
                stack += vars(value).values()
    penalties = [value for value in found.values() if isinstance(value, WeightedRegularizer)]
    if not penalties:
        raise ValueError(
            f"{caller} needs a model with a penalty of this package, see attach_regularizers. "
            f"Received: {model!r}"
        )
    return penalties


def share_weight(model: keras.Model, penalties: Sequence[WeightedRegularizer]) -> ModelWeight:
    """Returns the weight that all penalties of the model share. They do so from then on."""
    weights = {id(penalty.model_weight): penalty.model_weight for penalty in penalties}
    (_, weight), *others = weights.items()
    if weight is None or others:
        weight = ModelWeight()
        if others:  # functions of this model may read another weight
            forget_functions(model)
    for penalty in penalties:
        penalty.model_weight = weight
    return weight


def forget_functions(model: keras.Model) -> None:
    """Makes Keras trace its functions again."""
    model.train_function = model.test_function = None
