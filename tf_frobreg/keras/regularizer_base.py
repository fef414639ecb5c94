"""What the Keras regularizers of this package have in common."""

import contextlib
import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.backends import dtype_of, not_compiled
from tf_frobreg.checks import check_number, received
from tf_frobreg.convolution.geometry import Convolution, Geometry
from tf_frobreg.convolution.kernel import as_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.keras.model_weight import ModelWeight
from tf_frobreg.penalties.penalty_function import Weight

# Arguments that the repr of a regularizer shows also if they have their default.
ALWAYS_SHOWN = ("input_size", "factor", "alpha")
# Arguments that FactorSchedule changes.
SCHEDULED = ("factor", "scale")


class Replacement(keras.regularizers.Regularizer):
    """A regularizer that can take the place of another one and give it back. Internal.

    Keras keeps a regularizer in two places: the kernel's variable has the one that is computed, the layer the
    one that is saved. The attributes are not saved with a model.

    Attributes:
        replaced: The variable's regularizer before `attach_regularizers` put this one there, or None.
        replaced_in_layer: The layer's. It differs if the layer's attribute was set after building.
        detached: Whether `AttachReport.detach` has taken this one off.
    """

    replaced: Any = None
    replaced_in_layer: Any = None
    detached: bool = False

    def __repr__(self) -> str:
        """Returns a call of the constructor. Arguments that have their default are left out, except three."""
        parts = []
        for name, default in _parameters(type(self)).items():
            value = getattr(self, name, default)
            # A class of the user can have arguments of any type.
            is_plain = isinstance(value, (int, float, str, tuple))
            is_default = is_plain and value in (default, (default,) * np.size(value))
            if name in ALWAYS_SHOWN or not is_default:
                parts.append(f"{name}={describe(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def describe(value: Any) -> str:
    """Returns an argument of a regularizer as text. Regularizers and functions are shown by name."""
    if isinstance(value, list):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, keras.regularizers.Regularizer) and not isinstance(value, Replacement):
        config: dict[str, Any] = {}
        with contextlib.suppress(Exception):  # a class of the user may have none
            config = value.get_config()
        return f"{type(value).__name__}({', '.join(f'{name}={own!r}' for name, own in config.items())})"
    return function_name(value) if inspect.isroutine(value) else repr(value)


def function_name(function: Any) -> str:
    """Returns the name of a function, or of the type of another callable."""
    return getattr(function, "__name__", type(function).__name__)


def _parameters(kind: type) -> dict[str, Any]:
    """Returns the defaults of a constructor's arguments by name, with the geometry one by one."""
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            defaults[name] = parameter.default
        elif issubclass(kind, TakesGeometry):
            own = inspect.signature(Convolution).parameters
            defaults |= {name: own[name].default for name in Geometry.__annotations__}
    return defaults


def check_constant(name: str, value: Any, *, exclusive: bool = False) -> float:
    """Returns `value` as a plain float, or raises an error. A variable would keep only its value of now."""
    if isinstance(value, (keras.Variable, tf.Variable)):
        instead = (
            "FactorSchedule changes the weight of a penalty during training"
            if name in SCHEDULED
            else f"Write float({name}) for its present value"
        )
        raise TypeError(
            f"{name} must be a number, not a variable, because its value would be frozen. {instead}. "
            f"Received: {received(name, value)}"
        )
    return check_number(name, value, exclusive=exclusive)


class WeightedRegularizer(Replacement):
    """A penalty times `factor` times `scale`, a number that `FactorSchedule` changes. Internal.

    A subclass computes the penalty in `evaluate`.

    Args:
        factor: Weight of the penalty, at least 0.
        scale: Multiplier of `factor`, at least 0.
    """

    def __init__(self, factor: float, scale: float) -> None:
        self.factor = check_constant("factor", factor)
        self._scale = check_constant("scale", scale)
        self.model_weight: ModelWeight | None = None  # what the callbacks of a training change

    @not_compiled
    def __call__(self, x: Any) -> Any:
        """Returns the penalty of the kernel `x`, a scalar of its dtype. A weight of 0 computes nothing."""
        shared = self.model_weight
        if shared is not None and shared.is_off:
            return shared.nothing(x)
        kernel = as_kernel(x, check_finite=False)  # a diverging training shows a NaN loss and goes on
        number = self.factor * (self._scale if shared is None or shared.scale is None else 1.0)
        if shared is None or not number:
            return self.evaluate(x, kernel, Weight(number))
        return self.evaluate(x, kernel, shared.read(dtype_of(kernel)).times(number))

    def evaluate(self, x: Any, kernel: Any, weight: Weight) -> Any:
        """Returns the weight times the penalty, a scalar of the kernel's dtype.

        Args:
            x: What Keras passes: the variable of the kernel, or its value.
            kernel: The value.
            weight: The weight. If it is 0, nothing must be computed.
        """
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """Multiplier of `factor`. Only a change by `FactorSchedule` reaches functions traced before."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = check_number("scale", value)
        if self.model_weight is not None and self.model_weight.scale is not None:
            self.model_weight = None  # which has the number of all penalties of the model

    def take_scale(self, weight: ModelWeight) -> None:
        """Takes part in a model's weight, with its `scale`."""
        self.model_weight = weight
        if weight.scale is not None:
            self._scale = weight.scale

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as plain values, with `scale` only if it is not 1."""
        return {"factor": self.factor} | ({} if self.scale == 1.0 else {"scale": self.scale})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"model_weight": None}  # a copy does not share the variable
