"""A Keras callback that computes the penalties only at every n-th step."""

from collections.abc import Callable
from typing import Any

import keras

from tf_frobreg.backends import to_array
from tf_frobreg.checks import check_integer
from tf_frobreg.keras.shared_weight import find_penalties, share_weight
from tf_frobreg.keras.training_backend import new_training_function, sample_counter

__all__ = ["LazyPenalty"]


class LazyPenalty(keras.callbacks.Callback):
    """Computes the penalties of a model at every n-th training step only, with n times their weight.

    The mean weight stays the same, and the cost falls to an n-th ("lazy regularization", Karras et al.,
    arXiv:1912.04958). The other steps are those of the model without penalties. The weight changes within
    training steps only. `evaluate`, validation, saved files and a model after training have the ordinary
    penalties. `FactorSchedule` can be used beside it.

    - With Adam, 16 is a good n for factors up to 1, and 4 for a factor of 10. A larger n leaves a larger rest
      of the penalty, because Adam divides rare large gradients by their size.
    - SGD with momentum adds up the rare large steps of the penalty. It diverges if learning rate · factor · n
      is too large, at a factor of 1 already with n = 16. `examples/study_lazy.py` measures both.
    - The first step of a model counts, then every n-th one, also across several trainings. The steps are
      those that the optimizer has counted.
    - The progress bar shows the weights of the steps so far. At the end of an epoch `loss` is corrected by
      the penalties of that time, if its samples had not the mean weight. Callbacks that read `loss` must come
      after this one.
    - With `steps_per_execution` a step is one execution: all its batches have the same weight.
    - With gradient accumulation a step is one batch. `every` should divide the number of batches that are
      accumulated, or be a multiple of it.
    - TensorFlow and JAX trace two training functions, one for each kind of step. This happens in the first
      two steps, and takes as long as for the model with penalties and for the model without.
    - At the other steps TensorFlow has no gradient of the penalties, not even 0. A kernel that only its
      penalty reaches stays as it is, and a `train_step` of your own may get None for its gradient.
    - If a later callback interrupts the training in `on_train_batch_begin`, the next step of the model has
      its weight already, also without this callback.
    - The penalties are all regularizers of this package, as for `FactorSchedule`.

    Args:
        every: n. 1 computes the penalties at every step. The attribute can be set between epochs.

    Raises:
        ValueError: If `every` is below 1. During training: if the model has no penalty of this package, or
            the training has another `LazyPenalty`.
        TypeError: If `every` is no integer.

    Example:
        >>> import numpy as np
        >>> from tf_frobreg import attach_regularizers
        >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)])
        >>> _ = attach_regularizers(model, factor=0.1)
        >>> model.compile("sgd", "mse")
        >>> x, y = np.ones((64, 8, 8, 1)), np.ones((64, 6, 6, 4))
        >>> _ = model.fit(x, y, batch_size=4, verbose=0, callbacks=[LazyPenalty(every=16)])
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self._step = 0
        self._is_started = False  # whether `_step` is that of the model
        self._ordinary: Any = None  # the training function of the model
        self._count_samples: Any = None
        self._forget_samples()

    @property
    def every(self) -> int:
        """n, which can be set between epochs."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        self._every = check_integer("every", every)

    def _forget_samples(self) -> None:
        self._samples: Any = 0.0  # of this epoch, in the steps that count
        self._all_samples: Any = 0.0

    def set_model(self, model: keras.Model) -> None:
        """Finds the penalties. Keras builds its training function after this call."""
        super().set_model(model)
        # Under JAX `self.model` gives the variables their values back, which a running step must not meet.
        self._trained = model
        self._weight = share_weight(model, find_penalties(model, type(self).__name__))

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Takes back what an earlier training has left that a callback interrupted."""
        self._is_started = False
        earlier = getattr(self._trained.train_function, "__self__", None)
        if isinstance(earlier, LazyPenalty):
            self._trained.train_function = earlier._ordinary

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts to count the samples."""
        self._forget_samples()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Puts another function in the place of the model's training function, for one step.

        If a step fails or is interrupted, Keras calls no callback any more.

        Raises:
            ValueError: If the training has another `LazyPenalty`.
        """
        if not self._is_started:  # only now, because another callback may have restored the model
            self._step, self._is_started = self._count_steps(), True
        if self.every > 1:
            function = self._trained.train_function
            if function is not self._ordinary:  # the first step, or the model was compiled again
                self._ordinary, self._count_samples = function, sample_counter(self._trained)
            other = getattr(function, "__self__", None)
            if isinstance(other, LazyPenalty):
                raise ValueError(
                    "A training must have one LazyPenalty. "
                    f"Received: two, with every={other.every} and every={self.every}"
                )
            self._trained.train_function = self._train

    def _count_steps(self) -> int:
        """Returns the number of steps of earlier trainings of the model."""
        model = self.model
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # with a loss scale
        if optimizer is None:  # a `train_step` of the user has its own
            return 0
        batches = int(to_array(optimizer.iterations)) * (optimizer.gradient_accumulation_steps or 1)
        return batches // getattr(model, "steps_per_execution", 1)

    def _train(self, *arguments: Any) -> Any:
        """The training function of one step."""
        self._trained.train_function = self._ordinary
        counts = self._step % self.every == 0
        before = self._count_samples(*arguments) if counts else 0.0
        multiplier = float(self.every) if counts else 0.0
        with self._weight.in_step(multiplier):
            result = self._function(multiplier)(*arguments)
        # A step without data, after the last batch of an epoch, does not come here.
        self._step += 1
        after = self._count_samples(*(result[1:] if keras.config.backend() == "jax" else ()))
        if counts:
            # Keras counts from 0 again if a callback has evaluated the model.
            goes_on = keras.ops.cast(before >= self._all_samples, "float32")
            self._samples = goes_on * self._samples + (after - before)
        self._all_samples = after
        return result

    def _function(self, multiplier: float) -> Callable[..., Any]:
        """Returns the training function for a multiplier. Keras traces it in the first such step."""
        if keras.config.backend() == "torch":  # nothing of the penalties is traced
            return self._ordinary
        ordinary, functions = self._weight.functions.get(self._trained, (None, {}))
        if ordinary is not self._ordinary:  # the model was compiled again
            functions = {}
            self._weight.functions[self._trained] = self._ordinary, functions
        if multiplier not in functions:
            functions[multiplier] = new_training_function(self._trained)
        return functions[multiplier]

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Corrects the loss if the samples of the epoch had not the mean weight."""
        total, counted = float(to_array(self._all_samples)), float(to_array(self._samples))
        if counted > total:  # a callback has evaluated the model since then
            counted = 0.0
        surplus = self.every * counted / total - 1.0 if total else 0.0
        if logs is not None and "loss" in logs and surplus:
            logs["loss"] -= surplus * self._penalty()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Lets go of what cannot be pickled."""
        self._ordinary = self._count_samples = None
        self._forget_samples()

    def _penalty(self) -> float:
        """Returns the sum of the penalties of this package as they are now."""
        variables = [variable for variable in self.model.trainable_variables if variable.regularizer]

        def total() -> float:
            return sum(float(to_array(variable.regularizer(variable))) for variable in variables)

        with self._weight.in_step(0.0):  # leaves what else a sum or a class of the user adds
            others = total()
        return total() - others
