"""What the callbacks of a training multiply all penalties of a model by."""

import contextlib
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.backends import is_known
from tf_frobreg.keras.training_backend import new_variable


class ModelWeight:
    """A number that multiplies all penalties of a model.

    It is the product of two. The first is the `scale` of `FactorSchedule`. The second is the multiplier of
    `LazyPenalty`, which counts only while a training step runs or is traced. TensorFlow and JAX read `scale`
    from a variable, and TensorFlow the multiplier too. JAX traces one function per multiplier. PyTorch traces
    nothing, because `torch.compile` leaves the penalties out.

    Attributes:
        scale: The `scale` of all penalties. None if each has its own.
        variable: Holds `scale`. None if that is None.
        models: The models whose functions read the variable.
        functions: By model, Keras' training function and those that `LazyPenalty` made beside it.
    """

    def __init__(self) -> None:
        self.scale: float | None = None
        self.variable: Any = None
        self.models: weakref.WeakSet[keras.Model] = weakref.WeakSet()
        self.functions: MutableMapping[keras.Model, tuple[Any, dict]] = weakref.WeakKeyDictionary()
        self._multiplier: float | None = None  # None outside of training steps
        self._step_variable: Any = None
        self._in_step_variable = 1.0

    def __reduce__(self) -> tuple[type, tuple]:
        return ModelWeight, ()  # a copy belongs to no model

    @property
    def is_off(self) -> bool:
        """Whether no penalty is computed or traced now."""
        return self._multiplier == 0.0 and (keras.config.backend() != "tensorflow" or tf.executing_eagerly())

    def make_variable(self) -> None:
        """Makes the variable of `scale`, with the value 1."""
        self.scale, self.variable = 1.0, new_variable(np.ones(()), "penalty_scale")

    def set_scale(self, scale: float) -> None:
        """Sets `scale`, which has its variable."""
        if scale != self.scale:
            self.scale = scale
            self.variable.assign(scale)

    def make_step_variable(self) -> None:
        """Makes the variable of the multiplier, if the backend needs it."""
        if self._step_variable is None and keras.config.backend() == "tensorflow":
            self._step_variable = new_variable(np.ones(()), "penalty_multiplier")

    @contextlib.contextmanager
    def in_step(self, multiplier: float) -> Iterator[None]:
        """A context in which a training step runs or is traced, with this multiplier."""
        if self._step_variable is not None and multiplier != self._in_step_variable:
            self._step_variable.assign(multiplier)
            self._in_step_variable = multiplier
        self._multiplier = multiplier
        try:
            yield
        finally:
            self._multiplier = None

    def read(self, dtype: str) -> Any:
        """Returns the number: a float, or a scalar tensor of `dtype` if traced functions read it."""
        number: Any = 1.0
        for value, variable in ((self.scale, self.variable), (self._multiplier, self._step_variable)):
            if value is not None:
                number = number * _read(value, variable, dtype)
        return number


def _read(value: float, variable: Any, dtype: str) -> Any:
    """Returns a number as a float if that is up to date, or as a tensor of its variable."""
    if variable is None or keras.config.backend() == "torch":
        return value
    tensor = keras.ops.convert_to_tensor(variable)
    return value if is_known(tensor) else keras.ops.cast(tensor, dtype)
