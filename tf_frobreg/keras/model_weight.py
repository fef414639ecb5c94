"""What the callbacks of a training multiply all penalties of a model by."""

import contextlib
import weakref
from collections.abc import Iterator, MutableMapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_frobreg.backends import dtype_of, is_known
from tf_frobreg.keras.training_backend import new_variable, read_variable
from tf_frobreg.penalties.penalty_function import Weight, nothing


class ModelWeight:
    """A number that multiplies all penalties of a model.

    It is the product of two. The first is the `scale` of `FactorSchedule`, which TensorFlow and JAX read from
    a variable. The second is the multiplier of `LazyPenalty`, which counts only while a training step runs or
    is traced. TensorFlow and JAX trace one function per multiplier. PyTorch traces nothing, because
    `torch.compile` leaves the penalties out.

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
        self._has_gradient = False  # whether a penalty of this step has one

    def __reduce__(self) -> tuple[type, tuple]:
        return ModelWeight, ()  # a copy belongs to no model

    @property
    def is_off(self) -> bool:
        """Whether this training step computes no penalty."""
        return self._multiplier == 0.0

    def nothing(self, kernel: Any) -> Any:
        """Returns 0 for a step without penalties.

        With TensorFlow only the first one has a gradient, because Keras refuses a step without any. Gradients
        of 0 for all kernels would be arrays of their size, which TensorFlow writes and adds.
        """
        if keras.config.backend() == "tensorflow" and self._has_gradient:
            return tf.zeros((), dtype_of(kernel))
        self._has_gradient = True
        return nothing(kernel)

    def make_variable(self) -> None:
        """Makes the variable of `scale`, with the value 1."""
        self.scale, self.variable = 1.0, new_variable(np.ones(()), "penalty_scale")

    def set_scale(self, scale: float) -> None:
        """Sets `scale`, which has its variable."""
        if scale != self.scale:
            self.scale = scale
            self.variable.assign(scale)

    @contextlib.contextmanager
    def in_step(self, multiplier: float) -> Iterator[None]:
        """A context in which a training step runs or is traced, with this multiplier."""
        self._multiplier, self._has_gradient = multiplier, False
        try:
            yield
        finally:
            self._multiplier = None

    def read(self, dtype: str) -> Weight:
        """Returns the number, with a tensor of `dtype` as the part that a function being traced reads."""
        number = 1.0 if self._multiplier is None else self._multiplier
        if self.scale is None:
            return Weight(number)
        tensor = _while_tracing(self.variable, dtype)
        return Weight(number * self.scale) if tensor is None else Weight(number, tensor)


def _while_tracing(variable: Any, dtype: str) -> Any:
    """Returns a variable as a tensor of `dtype` if a function is being traced, otherwise None."""
    if variable is None or keras.config.backend() == "torch":  # which traces nothing
        return None
    if is_known(variable.value if isinstance(variable, keras.Variable) else variable):
        return None
    return read_variable(variable, dtype)
