"""A Keras callback that changes the factor of penalties during training."""

from collections.abc import Callable
from typing import Any

import keras

from tf_frobreg.backends import to_array
from tf_frobreg.checks import check_choice, check_number, received
from tf_frobreg.keras.regularizer_base import WeightedRegularizer
from tf_frobreg.keras.shared_weight import find_penalties, forget_functions, share_weight
from tf_frobreg.keras.training_backend import keep_in_state, scope_of

__all__ = ["FactorSchedule"]


class FactorSchedule(keras.callbacks.Callback):
    """Multiplies the factor of every penalty of a model by a number that changes during training.

    A change takes effect at once, also in compiled functions and under XLA. For that the regularizers keep
    the multiplier, their `scale`, in a variable from then on. Another model that shares them and has been
    trained before must be compiled again. Under JAX `model.non_trainable_variables` contains the variables.
    `factor` itself does not change. Keras saves both with the model. The penalties are all regularizers of
    this package, on any variable of the model. A penalty may be in a `SumRegularizer`, on a variable of your
    own layer, or inside a wrapper.

    Args:
        schedule: A function of the epoch or step that returns the multiplier, at least 0. A Keras
            `LearningRateSchedule` is such a function: `PolynomialDecay(0.0, 5, 1.0)` warms up during five
            epochs.
        unit: Argument of the function: "epoch", or "step" for the number of optimizer steps so far.

    Raises:
        ValueError: If `unit` is invalid. During training: if the model has no such penalty, or the schedule
            returns a negative or infinite number.
        TypeError: If `schedule` is not a function.

    Example:
        >>> import numpy as np
        >>> from tf_frobreg import FrobeniusRegularizer
        >>> penalty = FrobeniusRegularizer(input_size=8, factor=0.1)
        >>> conv = keras.layers.Conv2D(4, 3, padding="same", kernel_regularizer=penalty)
        >>> model = keras.Sequential([keras.Input((8, 8, 1)), conv])
        >>> model.compile("sgd", "mse")
        >>> warm_up = FactorSchedule(lambda epoch: min(1.0, (epoch + 1) / 4))
        >>> x = np.ones((8, 8, 8, 1))
        >>> _ = model.fit(x, np.ones((8, 8, 8, 4)), epochs=2, verbose=0, callbacks=[warm_up])
        >>> penalty.factor, penalty.scale
        (0.1, 0.5)
    """

    def __init__(self, schedule: Callable[[int], Any], *, unit: str = "epoch") -> None:
        super().__init__()
        if not callable(schedule):
            raise TypeError(f"schedule must be a function. Received: {received('schedule', schedule)}")
        self.schedule = schedule
        self.unit = check_choice("unit", unit, ("epoch", "step"))
        self._penalties: list[WeightedRegularizer] = []

    def set_model(self, model: keras.Model) -> None:
        """Finds the penalties. Keras builds its training function after this call."""
        super().set_model(model)
        self._penalties = find_penalties(model, type(self).__name__)
        self._weight = share_weight(model, self._penalties)
        if self._weight.variable is None:
            with scope_of(model):
                self._weight.make_variable()
        if keep_in_state(model, self._weight.variable) or model not in self._weight.models:
            forget_functions(model)  # which read another variable, or numbers
        self._weight.models.add(model)

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the multiplier of an epoch."""
        if self.unit == "epoch":
            self._apply(epoch)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the multiplier of a step."""
        if self.unit == "step":
            self._apply(int(to_array(self.model.optimizer.iterations)))

    def _apply(self, number: int) -> None:
        scale = check_number(f"schedule({number})", self.schedule(number))
        # Under JAX `self.model` gives the variables their values back, which a training step takes away.
        _ = self.model
        self._weight.set_scale(scale)
        for penalty in self._penalties:
            penalty.take_scale(self._weight)
