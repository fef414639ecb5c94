"""Keras callbacks: watch the singular values of a training, and change the factor of its penalties."""

import math
import reprlib
import time

import numpy as np
import tensorflow as tf

from tf_frobreg.checks import check_accuracy, check_flag, check_integer, check_number
from tf_frobreg.keras.read_layers import flat_layers
from tf_frobreg.keras.regularizers import SumRegularizer, WeightedRegularizer
from tf_frobreg.keras.select_kernels import Selection, check_selection, select_kernels
from tf_frobreg.plotting import plot_gradient_norms, plot_training
from tf_frobreg.spectrum.kernel_report import report_kernel

__all__ = ["FactorSchedule", "SingularValueMonitor"]

keras = tf.keras

UNITS = ("epoch", "batch")


class SingularValueMonitor(keras.callbacks.Callback):
    """Logs σmax, σmin and R_α of each layer while a model trains.

    They go into `logs` as "<layer>/sigma_max", "<layer>/sigma_min" and "<layer>/penalty", and so into
    `History` and, where they stand behind this callback in the list, into `CSVLogger` and `TensorBoard`. In
    an epoch without a measurement they are NaN. Each search starts at the vectors of the one before.

    Args:
        every: Measure after each so many epochs or batches; besides, before the first. With Keras'
            `steps_per_execution`, at the end of the execution in which that many are full.
        unit: What `every` counts, "epoch" or "batch".
        include: Which kernels, as for `attach_regularizers`.
        exclude: Which not.
        alpha: α of R_α.
        accuracy: As for `extreme_singular_values`.
        sigma_min: Whether σmin is wanted; without it a measurement takes a fraction of the time.
        max_seconds: Time after which a measurement begins with no other kernel: those that are left are NaN,
            and come first in the next one.
        max_iterations: As for `extreme_singular_values`.
        gradient_data: (x, y), a batch of arrays: the norm in each kernel of the gradient on it of the whole
            loss, penalties included, is recorded at each measurement too, for `plot_gradients`. The model
            must be compiled with a loss.
        input_size: The size of the input images, where the model leaves it open.

    Attributes:
        history: Columns "epoch" (a fraction between epochs), "seconds" (what each measurement took), three of
            each kernel as above, and "<layer>/gradient_norm" if asked for; a row per measurement. A second
            `fit` of the same model goes on; where it counts its epochs from 0 again, they are counted on.
        cost: A sentence: how many measurements, and what share of the training's time they took.

    Raises:
        ValueError, TypeError: Where an argument is invalid; when training starts, as `attach_regularizers`.

    Example:
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((8, 8, 1)), tf.keras.layers.Conv2D(4, 3, name="conv"),
        ...     tf.keras.layers.Flatten(), tf.keras.layers.Dense(1)])
        >>> model.compile("sgd", "mse")
        >>> monitor = SingularValueMonitor(include="conv")
        >>> history = model.fit(np.ones((8, 8, 8, 1)), np.ones(8), epochs=2, verbose=0, callbacks=[monitor])
        >>> len(history.history["conv/sigma_max"]), monitor.history["epoch"].tolist()
        (2, [0.0, 1.0, 2.0])
        >>> figure = monitor.plot()
    """

    def __init__(
        self,
        every: int = 1,
        *,
        unit: str = "epoch",
        include: Selection | None = None,
        exclude: Selection | None = None,
        alpha: float = 1.0,
        accuracy: float = 1e-4,
        sigma_min: bool = True,
        max_seconds: float = 60.0,
        max_iterations: int = 1000,
        gradient_data=None,
        input_size=None,
    ):
        super().__init__()
        self.every = check_integer("every", every)
        if unit not in UNITS:
            raise ValueError(f"unit must be one of {UNITS}. Received: unit={unit!r}")
        self.unit = unit
        self._selection = (
            check_selection("include", include),
            check_selection("exclude", exclude),
            input_size,
        )
        self._alpha = check_number("alpha", alpha, exclusive=True)
        self._options = {
            "accuracy": check_accuracy(accuracy),
            "max_iterations": check_integer("max_iterations", max_iterations),
            "sigma_min": check_flag("sigma_min", sigma_min),
        }
        self._max_seconds = check_number("max_seconds", max_seconds)
        self._gradient_data = _check_batch(gradient_data)
        self._watched, self._rows, self._measured = None, [], {}
        # Epochs trained so far, what a fit's own count of them lacks, and the same for batches.
        self._trained, self._offset, self._begins = 0.0, 0.0, True
        self._epoch, self._batch, self._batches = 0.0, 0, 0
        self._started = self._ended = None

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The columns that were recorded."""
        return {name: np.array([row[name] for row in self._rows]) for name in (self._rows or [{}])[0]}

    @property
    def cost(self) -> str:
        """What the measurements took."""
        if not self._rows:
            return "no measurement"
        seconds = sum(row["seconds"] for row in self._rows)
        training = (self._ended or time.perf_counter()) - self._started
        share = seconds / training
        return f"{len(self._rows)} measurements, {seconds:.1f} s, {share:.1%} of the training's time"

    def plot(self):
        """Draws σmax and σmin of each kernel against the epoch; returns a Matplotlib figure."""
        return plot_training(self.history, self._alpha)

    def plot_gradients(self):
        """Draws the gradient's norm by depth, a line per measurement; returns a Matplotlib figure."""
        if self._gradient_data is None:
            raise ValueError("gradient_data must be given to draw gradients. Received: gradient_data=None")
        return plot_gradient_norms(self.history)

    def on_train_begin(self, logs=None):
        """Finds the kernels."""
        self._kernels, _ = select_kernels(self.model, *self._selection)
        if self._watched is not self.model:
            self._watched, self._rows, self._measured = self.model, [], {}
            self._trained, self._batches = 0.0, 0
        self._started, self._ended = self._started or time.perf_counter(), None
        self._begins = True

    def on_epoch_begin(self, epoch, logs=None):
        """Measures before the first step."""
        if self._begins:
            self._offset = max(0.0, self._trained - epoch)
            self._begins = False
        self._epoch = epoch + self._offset
        if not self._rows:
            self._measure(self._epoch)

    def on_train_batch_begin(self, batch, logs=None):
        """Notes where training is."""
        self._batch = batch

    def on_train_batch_end(self, batch, logs=None):
        """Measures where batches are counted."""
        # Keras calls this once for several steps where it executes them together.
        per_epoch = self.params.get("steps") or math.inf
        done = min(self._batch + getattr(self.model, "steps_per_execution", 1), per_epoch)
        before, self._batches = self._batches, self._batches + done - self._batch
        self._trained = self._epoch + done / per_epoch
        if self.unit == "batch" and self._batches // self.every > before // self.every:
            self._into(logs, self._measure(self._trained))

    def on_epoch_end(self, epoch, logs=None):
        """Measures where epochs are counted."""
        self._trained = self._epoch + 1.0
        if self.unit == "batch":
            self._into(logs, self._rows[-1])
        elif int(self._trained) % self.every == 0:
            self._into(logs, self._measure(self._trained))
        else:
            self._into(logs, dict.fromkeys(self._rows[-1], math.nan))

    def on_train_end(self, logs=None):
        """Stops the clock."""
        self._ended = time.perf_counter()

    def _into(self, logs, row):
        if logs is not None:
            logs.update({name: value for name, value in row.items() if "/" in name})

    def _measure(self, epoch):
        start = time.perf_counter()
        row = {"epoch": epoch, "seconds": 0.0}
        names = ("sigma_max", "sigma_min", "penalty")
        row |= {f"{kernel.name}/{name}": math.nan for kernel in self._kernels for name in names}
        # Those that were not reached, or longest ago, come first.
        order = sorted(self._kernels, key=lambda kernel: self._measured.get(kernel.name, (-1, None))[0])
        for kernel in order:
            if time.perf_counter() - start > self._max_seconds:
                break
            _, before = self._measured.get(kernel.name, (None, None))
            found = report_kernel(
                kernel.name, kernel.value, kernel.conv, self._alpha, start=before, **self._options
            )
            if found.reason is None:
                values = (*found.extremes[:2], found.penalty)
                row |= {f"{kernel.name}/{name}": value for name, value in zip(names, values, strict=True)}
            self._measured[kernel.name] = len(self._rows), found if found.reason is None else None
        if self._gradient_data is not None:
            row |= self._gradient_norms()
        row["seconds"] = time.perf_counter() - start
        self._rows.append(row)
        return row

    def _gradient_norms(self):
        x, y = self._gradient_data
        variables = [getattr(kernel.layer, kernel.attribute) for kernel in self._kernels]
        with tf.GradientTape() as tape:
            for variable in variables:
                tape.watch(tf.convert_to_tensor(variable.value))
            try:
                loss = self.model.compute_loss(x, y, self.model(x, training=False))
            except (ValueError, TypeError, tf.errors.OpError) as error:
                cause = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"gradient_data must be a batch that suits the model and its loss: they fail ({cause})"
                ) from None
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        return {
            f"{kernel.name}/gradient_norm": math.nan if gradient is None else float(tf.norm(gradient))
            for kernel, gradient in zip(self._kernels, gradients, strict=True)
        }


def _check_batch(data):
    if data is None:
        return None
    pair = data if isinstance(data, (tuple, list)) and len(data) == 2 else (None, None)
    if any(part is None or isinstance(part, str) for part in pair):
        raise TypeError(
            f"gradient_data must be (x, y), a batch of arrays. Received: gradient_data={reprlib.repr(data)}"
        )
    counts = {len(part) for part in tf.nest.flatten(pair) if np.ndim(part)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "gradient_data must be (x, y) with as many labels as images, one at least. Received: "
            f"{' and '.join(map(str, sorted(counts))) or 'numbers'} of them"
        )
    return tuple(pair)


class FactorSchedule(keras.callbacks.Callback):
    """Multiplies the factor of every penalty of a model by a number that changes during training.

    It takes effect at once, in compiled functions and under XLA too: the regularizers keep the number, their
    `scale`, in a variable from then on. `factor` itself stays the plain number it is; both are saved with the
    model. It works on `FrobeniusRegularizer`, `SpectralRegularizer` and `ReshapedRegularizer`.

    Args:
        schedule: A function of the epoch or step that returns the multiplier, at least 0, such as a Keras
            `LearningRateSchedule`: `PolynomialDecay(0.0, 5, 1.0)` warms up during five epochs.
        unit: What the function is given: "epoch", or "step" for the optimizer's steps so far.

    Raises:
        ValueError, TypeError: Where an argument is invalid; when training starts, where the model has no such
            regularizer.

    Example:
        >>> from tf_frobreg import FrobeniusRegularizer
        >>> penalty = FrobeniusRegularizer(input_size=8, factor=0.1)
        >>> conv = tf.keras.layers.Conv2D(4, 3, padding="same", kernel_regularizer=penalty)
        >>> model = tf.keras.Sequential([tf.keras.Input((8, 8, 1)), conv])
        >>> model.compile("sgd", "mse")
        >>> warm_up = FactorSchedule(lambda epoch: min(1.0, (epoch + 1) / 4))
        >>> x = np.ones((8, 8, 8, 1))
        >>> _ = model.fit(x, np.ones((8, 8, 8, 4)), epochs=2, verbose=0, callbacks=[warm_up])
        >>> penalty.factor, penalty.scale
        (0.1, 0.5)
    """

    def __init__(self, schedule, *, unit: str = "epoch"):
        super().__init__()
        if not callable(schedule):
            raise TypeError(f"schedule must be a function. Received: schedule={schedule!r}")
        if unit not in ("epoch", "step"):
            raise ValueError(f"unit must be one of ('epoch', 'step'). Received: unit={unit!r}")
        self._schedule, self._unit = schedule, unit

    def set_model(self, model):
        """Finds the regularizers; Keras makes its training function after this."""
        super().set_model(model)
        self._regularizers = _weighted_regularizers(model)
        if not self._regularizers:
            raise ValueError(
                "FactorSchedule needs a model with a FrobeniusRegularizer, see attach_regularizers. "
                f"Received: {model!r}"
            )
        with model.distribute_strategy.scope():
            made = [regularizer.make_adjustable() for regularizer in self._regularizers]
        if any(made):  # a function traced before holds the old number
            model.train_function = model.test_function = None

    def on_epoch_begin(self, epoch, logs=None):
        """Sets the multiplier of an epoch."""
        if self._unit == "epoch":
            self._apply(epoch)

    def on_train_batch_begin(self, batch, logs=None):
        """Sets the multiplier of a step."""
        if self._unit == "step":
            self._apply(int(self.model.optimizer.iterations.numpy()))

    def _apply(self, n):
        scale = check_number(f"schedule({n})", self._schedule(n))
        for regularizer in self._regularizers:
            regularizer.scale = scale


def _weighted_regularizers(model):
    found = {}
    for layer in flat_layers(model):
        for value in vars(layer).values():
            for part in value.regularizers if isinstance(value, SumRegularizer) else [value]:
                if isinstance(part, WeightedRegularizer):
                    found[id(part)] = part
    return list(found.values())
