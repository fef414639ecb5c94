"""A Keras callback that watches singular values during training."""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from tf_frobreg.backends import to_array
from tf_frobreg.checks import check_accuracy, check_choice, check_flag, check_integer, check_number, received
from tf_frobreg.keras.own_penalty import Target, target_of, warn_of_geometry
from tf_frobreg.keras.select_kernels import Selection, check_selection, select_kernels
from tf_frobreg.keras.trace import InputSize, check_input_size
from tf_frobreg.keras.training_backend import gradient_function
from tf_frobreg.keras.training_clock import TrainingClock
from tf_frobreg.plotting.trainings import plot_gradient_norms, plot_training
from tf_frobreg.spectrum.kernel_report import KernelSpectrum, report_kernel
from tf_frobreg.tables import count

__all__ = ["SingularValueMonitor"]

LONG_MEASUREMENT = 10.0  # seconds
LARGE_SHARE = 0.2  # of the training's time
SETTLED = 10.0  # seconds of training after which the share counts


class SingularValueMonitor(keras.callbacks.Callback):
    """Measures σmax, σmin and R_α of each layer during training.

    It writes three numbers of the whole model into `logs`: "sigma_max", the largest σmax of all kernels,
    "sigma_min", the smallest σmin, and "penalty", the sum over the kernels of R_α = ‖MᵀM − αI‖²_F divided by
    the number of columns of M. This sum has no factors, and it is the same for both values of `reduction`. It
    is a measure, not a part of the loss: kernels without a Frobenius penalty count too.

    The numbers appear in the progress line and in `History`. `CSVLogger`, `TensorBoard` and `ModelCheckpoint`
    see them if they come after this callback in the list. After an epoch without a measurement they are NaN.
    `history` holds the numbers of each kernel.

    A kernel's own `FrobeniusRegularizer` decides what R_α is: its α, and its padding if that is "circular".
    If it has none, its `SpectralRegularizer` or `ReshapedRegularizer` does. R_α of other kernels is that of
    the layer with α = 1. σ is that of the same operator. If a penalty has another geometry than its layer in
    this model, a warning says so. The layer's own geometry is measured then.

    A σmin that cannot be distinguished from 0 is recorded as its upper bound.

    Each search starts at the singular vectors found before. If the measurements take long, a warning says how
    long.

    Args:
        every: Number of epochs or batches from one measurement to the next. The first measurement comes
            before the first step. With Keras' `steps_per_execution` the monitor measures at the end of the
            execution that completes the number.
        unit: Unit of `every`, "epoch" or "batch".
        include: Which kernels to measure: a name with wildcards such as "block*", a layer, a layer class, a
            function of the layer that returns a bool, or a list of those. None means all.
        exclude: Which kernels to leave out, in the same form.
        alpha: α of R_α, the target of σ², for all kernels. Positive. None takes α of each kernel's own
            penalty, and 1 for kernels without one.
        accuracy: Error estimate of σmax to reach, relative to σmax. σmin has the square root of it.
        sigma_min: Whether to measure σmin. Without σmin, a measurement takes a fraction of the time.
        max_seconds: Time limit per measurement. Kernels not reached are recorded as NaN and measured first
            next time. The numbers of the whole model then contain their latest values, if there are any.
        max_iterations: Approximate limit on products with the Gram matrix, for each singular value and each
            solver.
        gradient_data: A batch of arrays `(x, y)`. Each measurement then also records the norm of the gradient
            of the loss, including penalties, with respect to each kernel. `plot_gradients` draws these norms.
            The model must be compiled with a loss.
        input_size: Size of the input images, if the model leaves it open. An int or one int per axis, or a
            dict of these by the name of an input or of a layer.
        per_kernel: Whether `logs` also hold the numbers of each kernel, under their names in `history`.

    Attributes:
        history: A dict of columns with one row per measurement: "epoch" (a fraction within an epoch),
            "seconds" (duration of the measurement), the three columns named above, and for each kernel
            "<layer>/sigma_max", "<layer>/sigma_min" and "<layer>/penalty", R_α per column. With
            `gradient_data` also "<layer>/gradient_norm". A second `fit` of the same model adds rows. If its
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
        >>> list(history.history), monitor.history["epoch"].tolist()
        (['loss', 'sigma_max', 'sigma_min', 'penalty'], [0.0, 1.0, 2.0])
        >>> print(monitor.history["conv/sigma_max"].shape)
        (3,)
        >>> figure = monitor.plot()
    """

    def __init__(
        self,
        every: int = 1,
        *,
        unit: str = "epoch",
        include: Selection | None = None,
        exclude: Selection | None = None,
        alpha: float | None = None,
        accuracy: float = 1e-4,
        sigma_min: bool = True,
        max_seconds: float = 60.0,
        max_iterations: int = 1000,
        gradient_data: tuple[Any, Any] | None = None,
        input_size: InputSize | None = None,
        per_kernel: bool = False,
    ) -> None:
        super().__init__()
        self.every = check_integer("every", every)
        self.unit = check_choice("unit", unit, ("epoch", "batch"))
        self.include = check_selection("include", include)
        self.exclude = check_selection("exclude", exclude)
        self.alpha = None if alpha is None else check_number("alpha", alpha, exclusive=True)
        self.accuracy = check_accuracy(accuracy)
        self.sigma_min = check_flag("sigma_min", sigma_min)
        self.max_seconds = check_number("max_seconds", max_seconds)
        self.max_iterations = check_integer("max_iterations", max_iterations)
        self.gradient_data = _check_batch(gradient_data)
        self.input_size = check_input_size(input_size)
        self.per_kernel = check_flag("per_kernel", per_kernel)
        self._watch(None)

    def _watch(self, model: keras.Model | None) -> None:
        """Forgets what was recorded, for another model."""
        self._watched = model
        self._clock = TrainingClock()
        self._targets: list[Target] = []
        self._measurements: list[_Measurement] = []
        self._latest: dict[str, _Found] = {}  # by kernel, the oldest first
        self._alphas: dict[str, float] = {}
        self._gradients: Callable[[], list[Any]] | None = None
        self._warned_of_geometry = self._warned_of_share = False

    @property
    def history(self) -> dict[str, np.ndarray]:
        """The recorded columns."""
        if not self._measurements:
            return {}
        rows = [{"epoch": row.epoch, "seconds": row.seconds, **row.values} for row in self._measurements]
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}

    @property
    def cost(self) -> str:
        """The number of measurements and their share of the training time."""
        if not self._measurements:
            return "no measurement"
        seconds = sum(measurement.seconds for measurement in self._measurements)
        share = seconds / self._clock.seconds
        return f"{len(self._measurements)} measurements, {seconds:.1f} s, {share:.1%} of the training's time"

    def plot(self) -> Figure:
        """Draws σmax and σmin of each kernel against the epoch, with √α of each kernel.

        Returns:
            A Matplotlib figure.

        Raises:
            ValueError: If nothing was measured yet.
        """
        self._check_measured()
        return plot_training(self.history, self._alphas)

    def plot_gradients(self) -> Figure:
        """Draws the norm of the gradient by depth, with one line per measurement.

        Returns:
            A Matplotlib figure.

        Raises:
            ValueError: If the monitor has no `gradient_data`, or if nothing was measured yet.
        """
        if self.gradient_data is None:
            raise ValueError("gradient_data must be given to draw gradients. Received: gradient_data=None")
        self._check_measured()
        return plot_gradient_norms(self.history)

    def _check_measured(self) -> None:
        if not self._measurements:
            raise ValueError(
                "nothing was measured yet: draw the monitor after model.fit(..., callbacks=[monitor])"
            )

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the kernels."""
        if self._watched is not self.model:
            self._watch(self.model)
        self._find_targets()
        self._clock.start_fit()

    def _find_targets(self) -> None:
        """Finds the kernels. A model can have none before its first step, which builds its layers."""
        kernels = select_kernels(self.model, self.include, self.exclude, self.input_size).kernels
        self._targets = [target_of(kernel, self.alpha) for kernel in kernels]
        self._alphas |= {target.kernel.name: target.alpha for target in self._targets}
        if not self._warned_of_geometry:
            self._warned_of_geometry = warn_of_geometry(self._targets)
        self._gradients = None  # that of the last fit may have other kernels

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
            self._log(logs, self._measure().values)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures after every so many epochs."""
        self._clock.end_epoch()
        if self.unit == "batch":
            self._log(logs, self._measurements[-1].values)
        elif int(self._clock.epochs) % self.every == 0:
            self._log(logs, self._measure().values)
        else:
            self._log(logs, dict.fromkeys(self._measurements[-1].values, math.nan))

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stops the clock."""
        self._clock.end_fit()
        if not self._targets:
            warnings.warn(
                "SingularValueMonitor found no kernel that it can measure. print(model_spectrum(model)) says "
                "why.",
                stacklevel=2,
            )

    def _log(self, logs: dict[str, Any] | None, values: dict[str, float]) -> None:
        if logs is not None:
            for name, value in values.items():
                is_logged = self.per_kernel or name in OF_THE_MODEL
                if is_logged and (self.sigma_min or not name.endswith("sigma_min")):
                    logs[name] = value

    def _measure(self) -> "_Measurement":
        """Adds a row to the history and returns it."""
        start = time.perf_counter()
        # Under JAX `self.model` gives the variables their values back, which a training step takes away.
        _ = self.model
        if not self._targets:
            self._find_targets()
        oldest_first = {name: position for position, name in enumerate(self._latest)}
        measured: dict[str, _Found] = {}
        for target in sorted(self._targets, key=lambda target: oldest_first.get(target.kernel.name, -1)):
            if time.perf_counter() - start > self.max_seconds:
                break
            measured[target.kernel.name] = self._measure_kernel(target)
        names = [target.kernel.name for target in self._targets]
        latest = [self._latest[name] for name in names if name in self._latest] if measured else []
        values = dict(zip(OF_THE_MODEL, _of_the_model(latest), strict=True))
        for name in names:
            values |= measured.get(name, NOT_FOUND).columns(name)
        if self.gradient_data is not None:
            values |= self._gradient_norms(*self.gradient_data)
        measurement = _Measurement(self._clock.epochs, time.perf_counter() - start, values)
        self._measurements.append(measurement)
        self._warn_of_cost()
        return measurement

    def _measure_kernel(self, target: Target) -> "_Found":
        kernel = target.kernel
        before = self._latest.pop(kernel.name, NOT_FOUND)
        row = report_kernel(
            kernel.name,
            kernel.value,
            kernel.conv,
            target.alpha,
            accuracy=self.accuracy,
            max_iterations=self.max_iterations,
            sigma_min=self.sigma_min,
            start=before.row,
        )
        found = NOT_FOUND._replace(row=row)
        if row.extremes is not None and row.penalty_per_column is not None:
            found = _Found(row.extremes.sigma_max, row.extremes.sigma_min_bound, row.penalty_per_column, row)
        self._latest[kernel.name] = found
        return found

    def _warn_of_cost(self) -> None:
        """Warns if the first measurement was long, and once if the later ones have a large share."""
        first, *later = (measurement.seconds for measurement in self._measurements)
        training = self._clock.seconds - first
        if not later and first > LONG_MEASUREMENT:
            cost = f"The first measurement took {first:.0f} s"
        elif (
            later and training > SETTLED and sum(later) > LARGE_SHARE * training and not self._warned_of_share
        ):
            share, mean = sum(later) / training, sum(later) / len(later)
            cost = f"{mean:.1f} s per measurement are {share:.0%} of the training's time"
            self._warned_of_share = True
        else:
            return
        ways = ["a larger every", "include=", *(["sigma_min=False"] if self.sigma_min else [])]
        warnings.warn(
            f"SingularValueMonitor measures {count(len(self._targets), 'kernel')}. {cost}. "
            f"To save time use {', '.join(ways)} or a smaller max_seconds.",
            stacklevel=2,
        )

    def _gradient_norms(self, x: Any, y: Any) -> dict[str, float]:
        kernels = [target.kernel for target in self._targets]
        norms = {f"{kernel.name}/gradient_norm": math.nan for kernel in kernels}
        # A kernel with LoRA is a sum. It has no variable to differentiate by.
        variables = {kernel.name: kernel.variable for kernel in kernels if kernel.variable is not None}
        if self._gradients is None:
            model, own = self.model, {id(variable) for variable in variables.values()}
            self._gradients = gradient_function(
                lambda: model.compute_loss(x, y, model(x, training=False)),
                list(variables.values()),
                [variable for variable in model.variables if id(variable) not in own],
            )
        try:
            found = self._gradients()
        except (ValueError, TypeError, RuntimeError, tf.errors.OpError) as error:
            cause = " ".join(str(error).split())[:200]
            raise ValueError(
                "gradient_data must be a batch that suits the model and its loss. Computing the loss "
                f"failed: {cause}"
            ) from None
        for name, gradient in zip(variables, found, strict=True):
            if gradient is not None:
                norms[f"{name}/gradient_norm"] = float(np.linalg.norm(to_array(gradient)))
        return norms


class _Measurement(NamedTuple):
    """One row of the history, with the values by their names in `logs`."""

    epoch: float
    seconds: float
    values: dict[str, float]


class _Found(NamedTuple):
    """What one measurement found of a kernel."""

    sigma_max: float
    sigma_min: float
    penalty: float
    row: KernelSpectrum | None  # where the next search starts

    def columns(self, name: str) -> dict[str, float]:
        """Returns the numbers by their names in the history."""
        return {f"{name}/{column}": value for column, value in zip(OF_THE_MODEL, self[:3], strict=True)}


OF_THE_MODEL = _Found._fields[:3]
NOT_FOUND = _Found(math.nan, math.nan, math.nan, None)


def _of_the_model(found: Sequence[_Found]) -> tuple[float, float, float]:
    """Returns the largest σmax, the smallest σmin and the sum of the penalties, without what is NaN."""

    def known(values: Iterable[float]) -> list[float]:
        return [value for value in values if not math.isnan(value)]

    penalties = known(one.penalty for one in found)
    return (
        max(known(one.sigma_max for one in found), default=math.nan),
        min(known(one.sigma_min for one in found), default=math.nan),
        sum(penalties) if penalties else math.nan,
    )


def _check_batch(data: Any) -> tuple[Any, Any] | None:
    """Returns (x, y) if both hold the same number of samples."""
    if data is None:
        return None
    x, y = data if isinstance(data, (tuple, list)) and len(data) == 2 else (None, None)
    if any(part is None or isinstance(part, str) for part in (x, y)):
        raise TypeError(
            f"gradient_data must be (x, y), a batch of arrays. Received: {received('gradient_data', data)}"
        )
    counts = {len(part) for part in keras.tree.flatten((x, y)) if np.ndim(part)}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "gradient_data must be (x, y) with as many labels as images, at least one. Received: "
            f"{' and '.join(map(str, sorted(counts))) or 'numbers'} of them"
        )
    return x, y
