"""Whole models: the spectrum of each layer, and Algorithm 3.1 on all of them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tf_frobreg.checks import check_flag, check_number, received
from tf_frobreg.descent.algorithm_3_1 import DescentResult, StopReason, regularize_kernel
from tf_frobreg.keras.own_penalty import remark_on, target_of
from tf_frobreg.keras.read_layers import read_kernels
from tf_frobreg.keras.select_kernels import Selection, select_kernels
from tf_frobreg.keras.trace import InputSize
from tf_frobreg.spectrum.kernel_report import KernelSpectrum, ModelSpectrum, report_kernel
from tf_frobreg.tables import (
    UNKNOWN,
    Report,
    Row,
    count,
    digits,
    known_columns,
    names_by_reason,
    percent,
)

__all__ = ["ModelDescent", "model_spectrum", "regularize_model"]

NOT_REACHED = "the callback stopped before it"
LEFT_COLUMNS = ("kernel", "result")
# Columns that a narrow terminal lacks, the first one first.
OPTIONAL_COLUMNS = ("R before", "R after", "escapes", "α", "steps")


def model_spectrum(
    model: keras.layers.Layer,
    *,
    alpha: float | None = None,
    accuracy: float = 1e-4,
    input_size: InputSize | None = None,
    sigma_min: bool = True,
    max_iterations: int = 1000,
    start: Sequence[KernelSpectrum] | None = None,
) -> ModelSpectrum:
    """Returns σmax, σmin and the penalty R_α = ‖MᵀM − αI‖²_F of each kernel of a model.

    M is the transformation matrix of equations (2.1) and (3.1), without bias and activation. The M of a
    `Dense` layer is its kernel. The geometry (image size, strides, padding, dilation, groups, data format and
    kind) is read from each layer. A layer that is shared between images of different sizes is measured for
    one of them. The row says for which one, and `remark` lists the others.

    Args:
        model: A built Keras model or layer. Nested models and layers are measured too.
        alpha: α of R_α, the target of σ². Positive. None takes α of each kernel's own penalty, and 1 for
            kernels without one.
        accuracy: Below 1. The error estimate of σmax to reach, relative to σmax.
        input_size: Size of the input images, an int or one int per axis, if the model leaves it open. A dict
            gives several sizes by the names of inputs or layers.
        sigma_min: Whether to search for σmin. σmax alone takes much less time.
        max_iterations: Approximate limit on products with the Gram matrix, for each singular value and each
            solver.
        start: An earlier result of this function. The searches begin there, for example after each epoch of
            a training.

    Returns:
        A `ModelSpectrum`, a list that prints as a table. Its `records()` returns flat dicts, as
        `pandas.DataFrame` takes them. It holds one `KernelSpectrum` per kernel, in the order of the layers.
        Then one with a reason for each layer that has a matrix but cannot be measured. A row has the name of
        the layer, or its path if the name is not unique. The two kernels of a separable convolution are
        "<layer>/depthwise" and "<layer>/pointwise".

    Raises:
        ValueError: If an argument is invalid, or the model has not been built.
        TypeError: If an argument has the wrong type.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)),
        ...     keras.layers.Conv2D(1, 3, padding="same", kernel_initializer="ones", name="sum"),
        ...     keras.layers.Flatten(),
        ...     keras.layers.Dense(10, kernel_initializer="orthogonal", name="output")])
        >>> for row in model_spectrum(model):
        ...     print(row.name, f"{row.extremes.sigma_max:.2f} {row.extremes.sigma_min:.2f}")
        sum 8.29 0.00
        output 1.00 1.00
    """
    if alpha is not None:
        alpha = check_number("alpha", alpha, exclusive=True)
    sigma_min = check_flag("sigma_min", sigma_min)
    before = {row.name: row for row in _check_start(start)}
    found = read_kernels(model, input_size)
    rows = [
        report_kernel(
            kernel.name,
            kernel.value,
            kernel.conv,
            target_of(kernel, alpha).alpha,
            accuracy=accuracy,
            max_iterations=max_iterations,
            sigma_min=sigma_min,
            start=before.get(kernel.name),
            remark=remark_on(kernel),
        )
        for kernel in found.kernels
    ]
    rows += [KernelSpectrum(layer.name, layer.reason) for layer in found.untreated]
    return ModelSpectrum(rows)


def _check_start(start: Any) -> Sequence[KernelSpectrum]:
    """Returns the rows to start from, or raises an error if they are not rows."""
    rows = () if start is None else start
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, KernelSpectrum) for row in rows):
        raise TypeError(f"start must be what model_spectrum returned. Received: {received('start', start)}")
    return rows


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelDescent(Report):
    """What `regularize_model` reached. `print(descent)` shows a table with one row per kernel.

    Attributes:
        results: The `DescentResult` of each kernel, by the kernel's name.
        left_out: Why other kernels and layers were left as they were, by their names.
        alphas: α of each kernel's descent.
        changes: How far each kernel moved: ‖K' − K‖_F / ‖K‖_F, with K before and K' after the descent. ∞ if
            K was 0.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, padding="same", name="conv"),
        ...     keras.layers.Dense(2, name="top")])
        >>> descent = regularize_model(model, exclude="top")
        >>> print(descent)
        1 of 1 kernel converged, 1 left out
        <BLANKLINE>
        kernel  α  R before  R after    σmax    σmin  steps  escapes  moved  result
        ─────────────────────...
        conv    1  ...  converged
        <BLANKLINE>
        Left out: top: excluded
        >>> descent
        ModelDescent: 1 of 1 kernel converged, 1 left out
        >>> [(record["layer"], record["reason"]) for record in descent.records()]
        [('conv', 'converged: σmax and σmin are within the tolerance of √α'), ('top', 'left out: excluded')]
    """

    _left_columns = LEFT_COLUMNS
    _optional_columns = OPTIONAL_COLUMNS

    results: dict[str, DescentResult]
    left_out: dict[str, str]
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    changes: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether every descent reached a tolerance."""
        return all(result.converged for result in self.results.values())

    def records(self) -> list[dict[str, Any]]:
        """Returns flat plain values: `pandas.DataFrame(descent.records())` is a table.

        Returns:
            One dict per kernel: "layer", "alpha", "penalty_before", the values of `DescentResult.to_dict`,
            and "change". Then one for each kernel and layer that was left out, with its reason. What is not
            known is None.
        """
        records = [
            {
                "layer": name,
                "alpha": self.alphas.get(name),
                "penalty_before": _penalty_before(result),
                **result.to_dict(),
                "change": self.changes.get(name),
            }
            for name, result in self.results.items()
        ]
        columns = records[0] if records else {"layer": None, "reason": None}
        for name, reason in self.left_out.items():
            records.append({**dict.fromkeys(columns), "layer": name, "reason": f"left out: {reason}"})
        return records

    def __repr__(self) -> str:
        return f"ModelDescent: {descent_summary(self)}"

    def _parts(self) -> tuple[str, list[Row], list[str]]:
        return descent_summary(self), descent_rows(self), descent_remarks(self)


def descent_summary(descent: ModelDescent) -> str:
    """Returns the first line of a report."""
    converged = sum(result.converged for result in descent.results.values())
    line = f"{converged} of {count(len(descent.results), 'kernel')} converged"
    return f"{line}, {len(descent.left_out)} left out" if descent.left_out else line


def descent_rows(descent: ModelDescent) -> list[Row]:
    """Returns the table of a report."""
    rows = []
    for name, result in descent.results.items():
        values = result.to_dict()
        alpha = descent.alphas.get(name)
        rows.append(
            {
                "kernel": name,
                "α": UNKNOWN if alpha is None else f"{alpha:g}",
                "R before": digits(_penalty_before(result)),
                "R after": digits(result.penalty),
                "σmax": digits(values["sigma_max"], ".4f"),
                "σmin": digits(values["sigma_min"], ".4f"),
                "steps": str(result.num_steps),
                "escapes": str(values["escapes"]),
                "moved": percent(descent.changes.get(name)),
                "result": _outcome(result.reason),
            }
        )
    return known_columns(rows)


def descent_remarks(descent: ModelDescent) -> list[str]:
    """Returns lines on the results that are no success, and on what was left out."""
    failed = dict.fromkeys(result.reason for result in descent.results.values() if not result.converged)
    left_out = names_by_reason(descent.left_out)
    return [
        *(f"{_outcome(reason)}: {reason.value}" for reason in failed),
        *(f"Left out: {names}: {reason}" for reason, names in left_out.items()),
    ]


def _outcome(reason: StopReason) -> str:
    """Returns a reason in two words."""
    return reason.name.lower().replace("_", " ")


def _penalty_before(result: DescentResult) -> float | None:
    """Returns R_α of the first kernel, or None if the result has no history."""
    penalties = result.history.get("penalty")
    return None if penalties is None or not len(penalties) else float(penalties[0])


def regularize_model(
    model: keras.layers.Layer,
    *,
    alpha: float | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    padding: str | None = None,
    max_steps: int = 1000,
    tolerance: float = 0.01,
    input_size: InputSize | None = None,
    callback: Callable[[str, int, np.ndarray, float], bool | None] | None = None,
    learning_rate: Any = "exact",
    direction: str | None = None,
    gradient_tolerance: float = 0.0,
    measure: str = "rarely",
    gradient: str | None = None,
    method: str = "closed_form",
    escape: bool = True,
) -> ModelDescent:
    """Runs Algorithm 3.1 on every kernel of a built model, and changes the model in place.

    Before training, it makes each layer nearly an isometry of its images. After training, it brings back
    singular values that have drifted, but it ignores the loss. A network whose σ are far from √α loses its
    accuracy: one that was trained on Fashion-MNIST without a penalty falls from 88 % to about 10 %. Leaving
    the head out or a larger tolerance changes little there. Two ways are gentler: further training with
    `FrobeniusRegularizer`, or a quarter of the way, K + (K' − K)/4, with K before and K' after the descent.
    Frozen layers are regularized too.

    Args:
        model: A built Keras model or layer: Sequential, Functional or subclassed. Nested ones are included.
        alpha: α, the target of σ². Positive. None takes α of each kernel's own penalty, and 1 for
            kernels without one.
        include: Which kernels to regularize: a name, a layer, a layer class, a function of the layer, or a
            list of these. Names may contain wildcards (`"block*"`). The default is all kernels.
        exclude: Which of these to leave as they are, in the same form.
        padding: None for the padding of each layer. "circular" regularizes the operators without border.
        max_steps: Maximal number of steps of each descent.
        tolerance: Stop a descent if max(|σmax − √α|, |σmin − √α|), equation (1.1), is at most this.
        input_size: Size of the input images, an int or one int per axis, if the model leaves it open. A dict
            gives several sizes by the names of inputs or layers.
        callback: Called as `callback(name, step, kernel, penalty)` at every step. A true value stops this
            descent, and the kernels after it are left as they are.
        learning_rate: λ, see `regularize_kernel`: "exact", "paper", a number, a function of the step or a
            Keras optimizer.
        direction: "gradient" or "conjugate". The default is "conjugate" with "exact", and "gradient"
            otherwise.
        gradient_tolerance: Stop a descent if ‖∂R_α/∂K‖_F is at most this. 0 disables it.
        measure: How often σ is measured, "never", "rarely" or "often".
        gradient: Older spelling of two methods: "theorem" for the default, "tape" for `method="tape"`.
        method: How R_α and its gradient are computed: "closed_form", "sparse" or "tape".
        escape: Whether "exact" steps leave local minima at which some σ stay near 0.

    Returns:
        A `ModelDescent` with the `DescentResult` of each kernel. Every kernel has the value that its descent
        reached, converged or not.

    Raises:
        ValueError: If an argument is invalid, no kernel is left to regularize, or a kernel holds NaN or
            infinity. No kernel is changed then.
        TypeError: If an argument has the wrong type. No kernel is changed then.

    Example:
        >>> keras.utils.set_random_seed(1)
        >>> model = keras.Sequential([
        ...     keras.Input((10, 10, 2)), keras.layers.Conv2D(4, 3, padding="same", name="conv")])
        >>> descent = regularize_model(model)
        >>> descent.converged, descent.results["conv"].num_steps < 100
        (True, True)
        >>> print(abs(model_spectrum(model)[0].extremes.sigma_max - 1) < 0.01)
        True
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function. Received: {received('callback', callback)}")
    selected, left_out = select_kernels(model, include, exclude, input_size)
    kernels = []
    for kernel in selected:
        if (reason := kernel.reason_to_skip()) is not None:
            left_out[kernel.name] = reason
        elif not np.isfinite(kernel.value).all():
            raise ValueError(
                f"the kernel of layer {kernel.name!r} must be finite. Received: NaN or infinity in it"
            )
        else:
            kernels.append(kernel.with_padding(padding))
    if not kernels:
        reasons = "; ".join(f"{names}: {reason}" for reason, names in names_by_reason(left_out).items())
        raise ValueError(f"model must have a kernel to regularize. Received: {reasons or 'none'}")
    descent, stop = ModelDescent({}, left_out), _StopRequest(callback)
    for kernel in kernels:
        if stop.requested:
            left_out[kernel.name] = NOT_REACHED
            continue
        before = kernel.value
        alpha_here = target_of(kernel, alpha).alpha
        result = regularize_kernel(
            before,
            kernel.conv.input_size,
            alpha=alpha_here,
            learning_rate=learning_rate,
            direction=direction,
            max_steps=max_steps,
            tolerance=tolerance,
            gradient_tolerance=gradient_tolerance,
            measure=measure,
            gradient=gradient,
            method=method,
            escape=escape,
            callback=stop.callback_of(kernel.name),
            **kernel.conv.geometry,
        )
        kernel.variable.assign(result.kernel)
        descent.results[kernel.name] = result
        descent.alphas[kernel.name] = alpha_here
        descent.changes[kernel.name] = _change(before, result.kernel)
    return descent


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Returns ‖after − before‖_F / ‖before‖_F, ∞ for a kernel that was 0."""
    distance, size = float(np.linalg.norm(after - before)), float(np.linalg.norm(before))
    return distance / size if size else math.inf if distance else 0.0


class _StopRequest:
    """Passes the steps of each kernel on to a callback, and keeps whether the callback asked to stop."""

    def __init__(self, callback: Callable[[str, int, np.ndarray, float], bool | None] | None) -> None:
        self._callback = callback
        self.requested = False

    def callback_of(self, name: str) -> Callable[[int, np.ndarray, float], bool] | None:
        """Returns the callback for the descent of one kernel."""
        callback = self._callback
        if callback is None:
            return None

        def at_step(step: int, kernel: np.ndarray, penalty: float) -> bool:
            self.requested = bool(callback(name, step, kernel, penalty))
            return self.requested

        return at_step
