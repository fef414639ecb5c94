"""Keras callbacks: watch singular values during training, and change the factor of penalties."""

import math
import reprlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from tf_frobreg.checks import check_accuracy, check_choice, check_flag, check_integer, check_number
from tf_frobreg.convolution.geometry import Size
from tf_frobreg.keras.read_layers import LayerKernel, flat_layers
from tf_frobreg.keras.regularizers import WeightedRegularizer, regularizer_parts
from tf_frobreg.keras.select_kernels import Selection, check_selection, select_kernels
from tf_frobreg.keras.training_clock import TrainingClock
from tf_frobreg.plotting import plot_gradient_norms, plot_training
from tf_frobreg.spectrum.kernel_report import KernelSpectrum, report_kernel

__all__ = ["FactorSchedule", "SingularValueMonitor"]


class SingularValueMonitor(keras.callbacks.Callback):
    """Logs σmax, σmin and R_α of each layer during training.

    Their names in `logs` are "<layer>/sigma_max", "<layer>/sigma_min" and "<layer>/penalty". They appear in
    `History`, and in `CSVLogger` and `TensorBoard` if those come after this callback in the list. After an
    epoch without a measurement they are NaN. Each search starts at the singular vectors found before.

    Args:
        every: Number of epochs or batches from one measurement to the next. The first measurement comes
            before the first step. With Keras' `steps_per_execution` the monitor measures at the end of the
            execution that completes the number.
        unit: Unit of `every`, "epoch" or "batch".
        include: Which kernels to measure: a name with wildcards such as "block*", a layer, a layer class, a
            function of the layer that returns a bool, or a list of those. None means all.
        exclude: Which kernels to leave out, in the same form.
        alpha: α of R_α, the target of σ². Positive.
        accuracy: Error estimate of σmax to reach, relative to σmax. σmin has the square root of it.
        sigma_min: Whether to measure σmin. Without σmin, a measurement takes a fraction of the time.
        max_seconds: Time limit per measurement. Kernels not reached are recorded as NaN and measured first
            next time.
        max_iterations: Approximate limit on products with the Gram matrix, for each singular value and each
            solver.
        gradient_data: A batch of arrays `(x, y)`. Each measurement then also records the norm of the gradient
            of the loss, including penalties, with respect to each kernel. `plot_gradients` draws these norms.
            The model must be compiled with a loss.
        input_size: Size of the input images, if the model leaves it open. An int or one int per axis.

    Attributes:
        history: A dict of columns with one row per measurement: "epoch" (a fraction within an epoch),
            "seconds" (duration of the measurement), the three columns of each kernel named above, and
            "<layer>/gradient_norm" with `gradient_data`. A second `fit` of the same model adds rows. If its
            epochs start at 0 again, the monitor adds the number of epochs before it.
        cost: A sentence: the number of measurements and their share of the training time.

    Raises:
        ValueError: If an argument has an invalid value. When training starts: if `include` or `exclude`
            matches no layer, or the image size of a selected layer is unknown.
        TypeError: If an argument has a wrong type.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, name="conv"),
        ...     keras.layers.Flatten(), keras.layers.Dense(1)])
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
        gradient_data: tuple[Any, Any] | None = None,
        input_size: Size | None = None,
    ) -> None:
        super().__init__()
        self.every = check_integer("every", every)
        self.unit = check_choice("unit", unit, ("epoch", "batch"))
        self.include = check_selection("include", include)
        self.exclude = check_selection("exclude", exclude)
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.accuracy = check_accuracy(accuracy)
        self.sigma_min = check_flag("sigma_min", sigma_min)
        self.max_seconds = check_number("max_seconds", max_seconds)
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.gradient_data = _check_batch(gradient_data)
        self.input_size = input_size
        self._watch(None)

    def _watch(self, model: keras.Model | None) -> None:
        """Forgets what was recorded, for another model."""
        self._watched = model
        self._clock = TrainingClock()
        self._kernels: list[LayerKernel] = []
        self._measurements: list[_Measurement] = []
        self._latest: dict[str, KernelSpectrum] = {}  # by kernel, the oldest first

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The recorded columns."""
        if not self._measurements:
            return {}
        columns = {
            "epoch": [measurement.epoch for measurement in self._measurements],
            "seconds": [measurement.seconds for measurement in self._measurements],
        }
        for name in self._measurements[0].values:
            columns[name] = [measurement.values[name] for measurement in self._measurements]
        return {name: np.array(column) for name, column in columns.items()}

    @property
    def cost(self) -> str:
        """The number of measurements and their share of the training time."""
        if not self._measurements:
            return "no measurement"
        seconds = sum(measurement.seconds for measurement in self._measurements)
        share = seconds / self._clock.seconds
        return f"{len(self._measurements)} measurements, {seconds:.1f} s, {share:.1%} of the training's time"

    def plot(self) -> Figure:
        """Draws σmax and σmin of each kernel against the epoch. Returns a Matplotlib figure."""
        return plot_training(self.history, self.alpha)

    def plot_gradients(self) -> Figure:
        """Draws the norm of the gradient by depth, with one line per measurement.

        Returns:
            A Matplotlib figure.

        Raises:
            ValueError: If the monitor has no `gradient_data`.
        """
        if self.gradient_data is None:
            raise ValueError("gradient_data must be given to draw gradients. Received: gradient_data=None")
        return plot_gradient_norms(self.history)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the kernels."""
        kernels = select_kernels(self.model, self.include, self.exclude, self.input_size).kernels
        if self._watched is not self.model:
            self._watch(self.model)
        self._kernels = kernels
        self._clock.start_fit()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures before the first step."""
        self._clock.start_epoch(epoch)
        if not self._measurements:
            self._measure()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures after every so many batches."""
        before = self._clock.batches
        # Keras calls this once for the batches that it executes together.
        self._clock.count_batches(getattr(self.model, "steps_per_execution", 1), self.params.get("steps"))
        if self.unit == "batch" and self._clock.batches // self.every > before // self.every:
            _log(logs, self._measure().values)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures after every so many epochs."""
        self._clock.end_epoch()
        if self.unit == "batch":
            _log(logs, self._measurements[-1].values)
        elif int(self._clock.epochs) % self.every == 0:
            _log(logs, self._measure().values)
        else:
            _log(logs, dict.fromkeys(self._measurements[-1].values, math.nan))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops the clock."""
        self._clock.end_fit()

    def _measure(self) -> "_Measurement":
        """Adds a row to the history and returns it."""
        start = time.perf_counter()
        values = {column: math.nan for kernel in self._kernels for column in _columns(kernel.name)}
        oldest_first = {name: position for position, name in enumerate(self._latest)}
        for kernel in sorted(self._kernels, key=lambda kernel: oldest_first.get(kernel.name, -1)):
            if time.perf_counter() - start > self.max_seconds:
                break
            values |= self._measure_kernel(kernel)
        if self.gradient_data is not None:
            values |= self._gradient_norms(*self.gradient_data)
        measurement = _Measurement(self._clock.epochs, time.perf_counter() - start, values)
        self._measurements.append(measurement)
        return measurement

    def _measure_kernel(self, kernel: LayerKernel) -> dict[str, float]:
        found = report_kernel(
            kernel.name,
            kernel.value,
            kernel.conv,
            self.alpha,
            accuracy=self.accuracy,
            max_iterations=self.max_iterations,
            sigma_min=self.sigma_min,
            start=self._latest.pop(kernel.name, None),
        )
        self._latest[kernel.name] = found
        if found.extremes is None or found.penalty is None:
            return {}
        numbers = (found.extremes.sigma_max, found.extremes.sigma_min, found.penalty)
        return dict(zip(_columns(kernel.name), numbers, strict=True))

    def _gradient_norms(self, x: Any, y: Any) -> dict[str, float]:
        norms = {f"{kernel.name}/gradient_norm": math.nan for kernel in self._kernels}
        # A kernel with LoRA is a sum. It has no variable to differentiate by.
        variables = {
            kernel.name: kernel.variable.value for kernel in self._kernels if kernel.variable is not None
        }
        with tf.GradientTape() as tape:
            tape.watch(list(variables.values()))  # frozen variables too
            try:
                loss = self.model.compute_loss(x, y, self.model(x, training=False))
            except (ValueError, TypeError, tf.errors.OpError) as error:
                cause = " ".join(str(error).split())[:200]
                raise ValueError(
                    "gradient_data must be a batch that suits the model and its loss. Computing the loss "
                    f"failed: {cause}"
                ) from None
        for name, gradient in tape.gradient(loss, variables).items():
            if gradient is not None:
                norms[f"{name}/gradient_norm"] = float(tf.norm(gradient))
        return norms


class _Measurement(NamedTuple):
    """One row of the history, with the values by their names in `logs`."""

    epoch: float
    seconds: float
    values: dict[str, float]


def _columns(name: str) -> tuple[str, str, str]:
    """Returns the names in `logs` of what is measured of a kernel."""
    return f"{name}/sigma_max", f"{name}/sigma_min", f"{name}/penalty"


def _log(logs: dict[str, Any] | None, values: dict[str, float]) -> None:
    if logs is not None:
        logs.update(values)


def _check_batch(data: Any) -> tuple[Any, Any] | None:
    """Returns (x, y) if both hold the same number of samples."""
    if data is None:
        return None
    x, y = data if isinstance(data, (tuple, list)) and len(data) == 2 else (None, None)
    if any(part is None or isinstance(part, str) for part in (x, y)):
        raise TypeError(
            f"gradient_data must be (x, y), a batch of arrays. Received: gradient_data={reprlib.repr(data)}"
        )
    counts = {len(part) for part in tf.nest.flatten((x, y)) if np.ndim(part)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "gradient_data must be (x, y) with as many labels as images, at least one. Received: "
            f"{' and '.join(map(str, sorted(counts))) or 'numbers'} of them"
        )
    return x, y


class FactorSchedule(keras.callbacks.Callback):
    """Multiplies the factor of every penalty of a model by a number that changes during training.

    A change takes effect at once, also in compiled functions and under XLA. For that the regularizers keep
    the multiplier, their `scale`, in a variable from then on. `factor` itself does not change. Keras saves
    both with the model. The penalties are `FrobeniusRegularizer`, `SpectralRegularizer` and
    `ReshapedRegularizer`.

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
            raise TypeError(f"schedule must be a function. Received: schedule={schedule!r}")
        self.schedule = schedule
        self.unit = check_choice("unit", unit, ("epoch", "step"))
        self._penalties: list[WeightedRegularizer] = []

    def set_model(self, model: keras.Model) -> None:
        """Finds the penalties. Keras builds its training function after this call."""
        super().set_model(model)
        self._penalties = _find_penalties(model)
        if not self._penalties:
            raise ValueError(
                "FactorSchedule needs a model with a FrobeniusRegularizer, see attach_regularizers. "
                f"Received: {model!r}"
            )
        with model.distribute_strategy.scope():
            changed = [penalty.make_adjustable() for penalty in self._penalties]
        if any(changed):  # a function traced earlier holds the old number
            model.train_function = model.test_function = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the multiplier of an epoch."""
        if self.unit == "epoch":
            self._apply(epoch)

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Sets the multiplier of a step."""
        if self.unit == "step":
            self._apply(int(self.model.optimizer.iterations.numpy()))

    def _apply(self, number: int) -> None:
        scale = check_number(f"schedule({number})", self.schedule(number))
        for penalty in self._penalties:
            penalty.scale = scale


def _find_penalties(model: keras.Model) -> list[WeightedRegularizer]:
    """Returns each penalty of the model once, also if several layers share it."""
    attributes = (value for layer in flat_layers(model) for value in vars(layer).values())
    parts = (part for value in attributes for part in regularizer_parts(value))
    return list({id(part): part for part in parts if isinstance(part, WeightedRegularizer)}.values())
