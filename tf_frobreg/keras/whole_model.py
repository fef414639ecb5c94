"""Whole models: the spectrum of each layer, and Algorithm 3.1 on all of them."""

import dataclasses
import reprlib
from collections.abc import Callable, Sequence

import numpy as np

from tf_frobreg.checks import check_flag, check_number
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.descent.algorithm_3_1 import DescentResult, regularize_kernel
from tf_frobreg.keras.read_layers import read_kernels
from tf_frobreg.keras.select_kernels import Selection, select_kernels
from tf_frobreg.spectrum.kernel_report import KernelSpectrum, report_kernel

__all__ = ["ModelDescent", "model_spectrum", "regularize_model"]


DESCENT_OPTIONS = ("learning_rate", "direction", "gradient_tolerance", "measure", "gradient", "method")


def model_spectrum(
    model,
    *,
    alpha: float = 1.0,
    accuracy: float = 1e-4,
    input_size=None,
    sigma_min: bool = True,
    max_iterations: int = 1000,
    start: Sequence[KernelSpectrum] | None = None,
) -> list[KernelSpectrum]:
    """Returns σmax, σmin and the penalty of each kernel of a model.

    Each layer's geometry (image size, strides, padding, dilation, groups, data format, kind) is read from the
    layer. Bias and activation do not enter: what is measured is the linear map M. A `Dense` layer's M is its
    kernel. Layers that are shared between images of different sizes are measured for the first.

    Args:
        model: A built Keras model or layer; nested models and layers are measured too.
        alpha: α of R_α, the target of σ². Positive.
        accuracy: As for `extreme_singular_values`.
        input_size: The size of the input images, an int or one int per axis, where the model leaves it open.
            The model is then called once, on zeros.
        sigma_min: Whether σmin is wanted. σmax alone takes much less time.
        max_iterations: As for `extreme_singular_values`.
        start: What this function gave before: the searches begin there, as after each epoch of a training.

    Returns:
        One `KernelSpectrum` per kernel, in the order of the layers. Layers that have a matrix but are neither
        convolution nor Dense, or are not known well enough, come last, with the reason. A layer goes by its
        name, or by its path where the name is not unique; the two kernels of a separable convolution by
        "<layer>/depthwise" and "<layer>/pointwise".

    Raises:
        ValueError, TypeError: Where an argument is invalid, or the model has not been built.

    Example:
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((8, 8, 1)),
        ...     tf.keras.layers.Conv2D(1, 3, padding="same", kernel_initializer="ones", name="sum"),
        ...     tf.keras.layers.Flatten(),
        ...     tf.keras.layers.Dense(10, kernel_initializer="orthogonal", name="output")])
        >>> for row in model_spectrum(model):
        ...     print(row.name, f"{row.extremes.sigma_max:.2f} {row.extremes.sigma_min:.2f}")
        sum 8.29 0.00
        output 1.00 1.00
    """
    alpha = check_number("alpha", alpha, exclusive=True)
    found = read_kernels(model, input_size)
    options = {
        "accuracy": accuracy,
        "max_iterations": max_iterations,
        "sigma_min": check_flag("sigma_min", sigma_min),
    }
    before = {row.name: row for row in _check_start(start)}
    rows = [
        report_kernel(kernel.name, kernel.value, kernel.conv, alpha, start=before.get(kernel.name), **options)
        for kernel in found.kernels
    ]
    return rows + [KernelSpectrum(u.name, u.reason) for u in found.untreated]


def _check_start(start):
    rows = () if start is None else start
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, KernelSpectrum) for row in rows):
        raise TypeError(f"start must be what model_spectrum returned. Received: start={reprlib.repr(start)}")
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class ModelDescent:
    """What `regularize_model` reached; printed, it is a table.

    Attributes:
        results: The `DescentResult` of each kernel, by its name.
        left_out: Why other kernels and layers were left as they were, by their names.
    """

    results: dict[str, DescentResult]
    left_out: dict[str, str]

    @property
    def converged(self) -> bool:
        """Whether every descent reached a tolerance."""
        return all(result.converged for result in self.results.values())

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.results, *self.left_out)), default=0)
        lines = []
        for name, result in self.results.items():
            before, after = result.history["penalty"][0], result.penalty
            high, low = (result.history[end][result.num_steps] for end in ("sigma_max", "sigma_min"))
            lines.append(
                f"{name:{width}}  R {before:.4g} → {after:.4g}, σ {low:.4g} … {high:.4g}, "
                f"{result.num_steps} step{'s'[: result.num_steps != 1]}, {result.reason.value}"
            )
        return "\n".join(lines + [f"{name:{width}}  - {reason}" for name, reason in self.left_out.items()])


def regularize_model(
    model,
    *,
    alpha: float = 1.0,
    include: Selection | None = None,
    exclude: Selection | None = None,
    padding: str | None = None,
    max_steps: int = 200,
    tolerance: float = 0.01,
    input_size=None,
    callback: Callable[[str, int, np.ndarray, float], bool | None] | None = None,
    **options,
) -> ModelDescent:
    """Runs Algorithm 3.1 on every kernel of a built model, which is changed in place.

    Before training it makes each layer nearly an isometry of its images; after it, it repairs layers whose
    singular values have drifted, at a price that only the data can tell: it knows nothing of the loss. Frozen
    layers are regularized too. `FrobeniusInitializer` gives a new layer such a kernel, without the local
    minima that a normal start of as many filters as channels can end in.

    Args:
        model: As for `attach_regularizers`.
        alpha: α, the target of σ²; positive.
        include: As for `attach_regularizers`.
        exclude: As for `attach_regularizers`.
        padding: As for `attach_regularizers`.
        max_steps: Steps of each descent at the most.
        tolerance: As for `regularize_kernel`.
        input_size: As for `attach_regularizers`.
        callback: Called as `callback(name, step, kernel, penalty)` at every step; the descent at hand and all
            that would follow stop where it returns a true value.
        **options: Of `regularize_kernel`: `learning_rate`, `direction`, `gradient_tolerance`, `measure`,
            `gradient`, `method`.

    Returns:
        A `ModelDescent`, with the `DescentResult` of each kernel. Every kernel has the value that its descent
        reached, converged or not.

    Raises:
        ValueError, TypeError: Where an argument is invalid, or a kernel holds NaN or infinity; the message
            names it. No kernel has been changed then.

    Example:
        >>> tf.keras.utils.set_random_seed(1)
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((10, 10, 2)), tf.keras.layers.Conv2D(4, 3, padding="same", name="conv")])
        >>> descent = regularize_model(model)
        >>> descent.converged, descent.results["conv"].num_steps < 100
        (True, True)
        >>> print(abs(model_spectrum(model)[0].extremes.sigma_max - 1) < 0.01)
        True
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function. Received: callback={reprlib.repr(callback)}")
    if unknown := options.keys() - set(DESCENT_OPTIONS):
        raise TypeError(
            f"unknown argument {min(unknown)!r}: options are {', '.join(DESCENT_OPTIONS)}, and each layer "
            "tells its own geometry"
        )
    chosen, left_out = select_kernels(model, include, exclude, input_size)
    kernels = []
    for kernel in chosen:
        if getattr(kernel.layer, "lora_enabled", False):
            left_out[kernel.name] = "LoRA is enabled: its kernel is frozen"
        elif not np.isfinite(kernel.value).all():
            raise ValueError(
                f"the kernel of layer {kernel.name!r} must be finite. Received: NaN or infinity in it"
            )
        else:
            kernels.append((kernel, _geometry(kernel, padding)))
    results, stopped = {}, False
    for kernel, geometry in kernels:
        if stopped:
            left_out[kernel.name] = "the callback stopped before it"
            continue

        def of_kernel(step, value, penalty, name=kernel.name):
            nonlocal stopped
            stopped = bool(callback and callback(name, step, value, penalty))
            return stopped

        result = regularize_kernel(
            kernel.value,
            kernel.conv.input_size,
            alpha=alpha,
            max_steps=max_steps,
            tolerance=tolerance,
            callback=of_kernel,
            **options,
            **geometry,
        )
        getattr(kernel.layer, kernel.attribute).assign(result.kernel)
        results[kernel.name] = result
    return ModelDescent(results, left_out)


def _geometry(kernel, padding):
    """That of a layer, with another border; what does not go with it is told before any kernel is changed."""
    geometry = kernel.conv.geometry | ({} if padding is None else {"padding": padding})
    try:
        Convolution(kernel.conv.kernel_shape, kernel.conv.input_size, **geometry)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for layer {kernel.name!r}") from None
    return geometry
