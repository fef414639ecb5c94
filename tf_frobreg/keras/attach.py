"""Puts the penalty on every layer of a model, and takes it off again."""

import contextlib
import dataclasses
import json
import reprlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tf_frobreg.checks import check_choice
from tf_frobreg.convolution.geometry import Size
from tf_frobreg.keras.read_layers import LayerKernel, check_model, flat_layers, own_weights
from tf_frobreg.keras.regularizers import (
    FrobeniusRegularizer,
    Replacement,
    SumRegularizer,
    regularizer_parts,
)
from tf_frobreg.keras.reports import aligned_lines
from tf_frobreg.keras.select_kernels import Candidate, Selection, check_matches, matches, select_kernels

__all__ = ["AttachReport", "attach_regularizers", "detach_regularizers"]

EXISTING = ("add", "replace", "keep")
OVERRIDES = ("factor", "alpha", "reduction", "padding")
DTYPES = ("float32", "float64")

Changes = list[tuple[LayerKernel, Replacement]]  # each kernel, and the regularizer that it got


@dataclasses.dataclass(frozen=True, eq=False)
class AttachReport:
    """What `attach_regularizers` did. `print(report)` shows one line per kernel.

    Attributes:
        attached: The new `FrobeniusRegularizer` of each kernel, by the kernel's name.
        left_out: Why other kernels and layers have none, by their names.
        remarks: What else you should know, by the kernel's name: which regularizer the penalty was added to
            or replaced, other image sizes of a shared layer, and whether a saved model lacks the penalty.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, kernel_regularizer="l2", name="conv"),
        ...     keras.layers.Dense(2, name="top")])
        >>> report = attach_regularizers(model, exclude="top")
        >>> report.attached["conv"].input_size, report.left_out, report.remarks
        ((8, 8), {'top': 'excluded'}, {'conv': 'added to L2'})
        >>> print(report)
        conv  factor 0.0001, α = 1, input 8×8, valid; added to L2
        top   - excluded
        >>> report.detach()
    """

    attached: dict[str, FrobeniusRegularizer]
    left_out: dict[str, str]
    remarks: dict[str, str]
    _model: keras.layers.Layer = dataclasses.field(repr=False)
    _changes: Changes = dataclasses.field(repr=False)

    def detach(self) -> None:
        """Puts back the regularizers that were there before. What was set since then stays."""
        for kernel, now in self._changes:
            now.detached = True
            if getattr(kernel.layer, kernel.regularizer) is now:
                setattr(kernel.layer, kernel.regularizer, _in_use(now, "replaced_in_layer"))
            for weight in kernel.layer.weights:  # with LoRA the two factors have the kernel's regularizer
                if weight.regularizer is now:
                    weight.regularizer = _in_use(now, "replaced")
        _forget_traces(self._model)

    def __str__(self) -> str:
        lines = {
            name: f"factor {penalty.factor:g}, α = {penalty.alpha:g}, {_describe(penalty)}"
            + (f"; {self.remarks[name]}" if name in self.remarks else "")
            for name, penalty in self.attached.items()
        }
        return aligned_lines(lines, self.left_out)


def attach_regularizers(
    model: keras.layers.Layer,
    factor: float = 1e-4,
    alpha: float = 1.0,
    *,
    reduction: str = "sum",
    padding: str | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    existing: str = "add",
    input_size: Size | None = None,
) -> AttachReport:
    """Puts a `FrobeniusRegularizer` on every convolution and `Dense` layer of a built model.

    The image size, strides, padding, dilation, groups, data format and kind are read from each layer. From
    then on the penalties are among `model.losses`, before and after `compile`. They are saved, loaded and
    cloned with the model.

    - Compile a model again if it contains this one and has been trained already.
    - A layer that is shared between images of different sizes is penalised for the first size. The report
      lists the others.
    - Functions that Keras has traced keep the values of `factor` and `alpha`. To change the weight during
      training use `FactorSchedule`.
    - The penalty of a frozen layer is zero until you unfreeze it, as with every Keras regularizer.
    - Detach before `enable_lora`, which passes the penalty on to the two factors.
    - Layers created inside your own subclass are re-created on loading, without the penalty. The report
      lists them. Attach again after loading, or let the `build` of your class build its layers and then
      attach to itself. Such a class saves, loads and clones with the same losses.

    Args:
        model: A built Keras model or layer: Sequential, Functional or subclassed. Nested ones are included.
        factor: Weight of each penalty, at least 0.
        alpha: α, the target of σ². Positive. 2 keeps the energy of a signal that passes through a ReLU.
        reduction: "sum" for R_α. "mean" for R_α divided by the number of columns of M, so that one factor
            suits layers of any size.
        padding: None for the padding of each layer. "circular" penalises the operators without border, whose
            minimisers use all taps.
        include: Which kernels get a penalty: a name, a layer, a layer class, a function of the layer, or a
            list of these. Names may contain wildcards (`"block*"`). The default is all kernels.
        exclude: Which of these get none, in the same form.
        overrides: Maps names, which may contain wildcards, to dicts of other values of `factor`, `alpha`,
            `reduction` or `padding`. If several names match a kernel, the last one wins.
        existing: What happens to a regularizer that a kernel already has. "add" keeps it and adds the
            penalty, "replace" removes it, and "keep" leaves the kernel as it is. "add" never gives a kernel
            a second `FrobeniusRegularizer`. It does add one to a `SpectralRegularizer`.
        input_size: Size of the input images, an int or one int per axis, if the model leaves it open.

    Returns:
        An `AttachReport`: what was attached, what was left out and why, remarks, and `.detach()`.

    Raises:
        ValueError: If an argument is invalid, the image size of a selected layer is unknown, or a name or
            class matches nothing. Nothing is attached then.
        TypeError: If an argument has the wrong type.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((28, 28, 1)),
        ...     keras.layers.Conv2D(8, 3, strides=2, name="conv"),
        ...     keras.layers.Flatten(),
        ...     keras.layers.Dense(10, name="top")])
        >>> report = attach_regularizers(model, factor=0.01, reduction="mean", exclude="top")
        >>> print(report)
        conv  factor 0.01, α = 1, input 28×28, valid, strides 2×2
        top   - excluded
        >>> len(model.losses)
        1
        >>> report.detach()
        >>> model.losses
        []
    """
    check_choice("existing", existing, EXISTING)
    kernels, left_out = select_kernels(model, include, exclude, input_size)
    values = {"factor": factor, "alpha": alpha, "reduction": reduction, "padding": padding}
    attached: dict[str, FrobeniusRegularizer] = {}
    changes: Changes = []
    for kernel, own in zip(kernels, _overridden(values, overrides, kernels), strict=True):
        penalty = _penalty(kernel, own)  # also for kernels that are left out, to refuse invalid arguments
        before = getattr(kernel.variable, "regularizer", None)
        reason = kernel.reason_to_skip(dtypes=DTYPES) or _reason_to_keep(before, existing)
        if reason is not None:
            left_out[kernel.name] = reason
            continue
        attached[kernel.name] = penalty
        now = penalty if before is None or existing == "replace" else SumRegularizer([before, penalty])
        now.replaced, now.replaced_in_layer = before, getattr(kernel.layer, kernel.regularizer)
        changes.append((kernel, now))
    for kernel, now in changes:  # nothing has been changed before this point
        setattr(kernel.layer, kernel.regularizer, now)
        kernel.variable.regularizer = now
    _forget_traces(model)
    return AttachReport(attached, left_out, _remarks(model, changes, existing), model, changes)


def detach_regularizers(model: keras.layers.Layer) -> list[str]:
    """Takes every `FrobeniusRegularizer` off a model, also those from a file or a layer's arguments.

    Other regularizers stay. `AttachReport.detach` undoes only one call of `attach_regularizers`.

    Args:
        model: A Keras model or layer.

    Returns:
        The names of the layers that had one.

    Raises:
        TypeError: If `model` is not a Keras model or layer.

    Example:
        >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="top")])
        >>> _ = attach_regularizers(model)
        >>> detach_regularizers(model), model.losses
        (['top'], [])
    """
    check_model(model)
    names = []
    for layer in flat_layers(model):
        found = False
        for name, value in list(vars(layer).items()):
            if isinstance(value, keras.regularizers.Regularizer) and _has_penalty(value):
                setattr(layer, name, _without_penalty(value))
                found = True
        for weight in own_weights(layer):
            if _has_penalty(weight.regularizer):
                weight.regularizer = _without_penalty(weight.regularizer)
                found = True
        if found:
            names.append(layer.name)
    _forget_traces(model)
    return names


def _has_penalty(regularizer: Any) -> bool:
    """Returns whether a kernel with that regularizer has the penalty."""
    return any(isinstance(part, FrobeniusRegularizer) for part in regularizer_parts(regularizer))


def _without_penalty(regularizer: Any) -> Any:
    """Returns the regularizer without the penalty, or None if nothing else is in it."""
    rest = [part for part in regularizer_parts(regularizer) if not isinstance(part, FrobeniusRegularizer)]
    return SumRegularizer(rest) if len(rest) > 1 else next(iter(rest), None)


def _in_use(regularizer: Any, replaced: str) -> Any:
    """Follows detached regularizers to the one that is now in their place. `replaced` names the place."""
    while isinstance(regularizer, Replacement) and regularizer.detached:
        regularizer = getattr(regularizer, replaced)
    return regularizer


def _overridden(
    values: dict[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None, kernels: Sequence[LayerKernel]
) -> list[dict[str, Any]]:
    """Returns the arguments of each kernel's penalty, or raises an error if `overrides` is invalid."""
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping):
        raise TypeError(
            f"overrides must be a dict of dicts by name. Received: overrides={reprlib.repr(overrides)}"
        )
    candidates = [Candidate(kernel.name, kernel.layer) for kernel in kernels]
    for pattern, own in overrides.items():
        if not isinstance(pattern, str) or not isinstance(own, Mapping) or not own.keys() <= set(OVERRIDES):
            raise ValueError(
                f"overrides must map names to dicts of {', '.join(OVERRIDES)}. "
                f"Received: overrides[{pattern!r}]={reprlib.repr(own)}"
            )
    check_matches("overrides", list(overrides), candidates, candidates)
    by_kernel = []
    for candidate in candidates:
        merged = dict(values)
        for pattern, own in overrides.items():
            if matches(pattern, candidate):
                merged |= own
        by_kernel.append(merged)
    return by_kernel


def _penalty(kernel: LayerKernel, values: Mapping[str, Any]) -> FrobeniusRegularizer:
    """Returns the penalty of a kernel, or raises an error that names the layer."""
    conv = kernel.with_padding(values["padding"]).conv
    weights = {name: value for name, value in values.items() if name != "padding"}
    with kernel.naming_errors():
        return FrobeniusRegularizer(conv.input_size, **weights, **conv.geometry)


def _reason_to_keep(before: Any, existing: str) -> str | None:
    """Returns why a kernel keeps the regularizer that it has, or None."""
    if before is not None and existing == "keep":
        return f"it has {_label(before)} already"
    if existing == "add" and _has_penalty(before):
        return "it has FrobeniusRegularizer already"
    return None


def _remarks(model: keras.layers.Layer, changes: Changes, existing: str) -> dict[str, str]:
    """Returns what the user should know about the kernels, by name."""
    unsaved = _unsaved(model, changes)
    found = {}
    for kernel, now in changes:
        remarks = []
        if now.replaced is not None:
            remarks.append(f"{'replaced' if existing == 'replace' else 'added to'} {_label(now.replaced)}")
        if now.replaced_in_layer is not now.replaced:
            remarks.append(f"{kernel.regularizer} was {_label(now.replaced_in_layer)}, without effect")
        if kernel.other_sizes:
            sizes = " and ".join(map(_times, kernel.other_sizes))
            remarks.append(f"applied to {sizes} too, penalised for {_times(kernel.conv.input_size)}")
        if kernel.name in unsaved:
            remarks.append("not in the model's configuration: attach again after loading")
        if remarks:
            found[kernel.name] = "; ".join(remarks)
    return found


def _unsaved(model: keras.layers.Layer, changes: Changes) -> set[str]:
    """Returns the names of the kernels whose regularizer a saved model lacks.

    A saved model holds the regularizers in its configuration. An entry is compared by its layer's name, its
    own name and its content. If two layers agree in all three and only one is saved, both are returned.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns about functions among the regularizers
        saved = _saved_regularizers(model)
        entries = {
            kernel.name: (kernel.layer.name, kernel.regularizer, _as_text(now)) for kernel, now in changes
        }
    lacking = Counter(entries.values()) - saved
    return {name for name, entry in entries.items() if entry in lacking}


def _saved_regularizers(model: keras.layers.Layer) -> Counter[tuple[str, str, str]]:
    """Counts (name of the layer, name of the attribute, regularizer) in a model's configuration."""
    found: Counter[tuple[str, str, str]] = Counter()
    stack: list[Any] = []
    with contextlib.suppress(Exception):  # a class without a configuration saves nothing
        stack.append(keras.saving.serialize_keras_object(model.get_config()))
    while stack:
        config = stack.pop()
        if isinstance(config, list):
            stack += config
        elif isinstance(config, dict):
            stack += config.values()
            if "name" in config:
                for attribute, value in config.items():
                    if attribute.endswith("regularizer") and value is not None:
                        found[str(config["name"]), attribute, _as_text(value)] += 1
    return found


def _as_text(regularizer: Any) -> str:
    """Returns a text that is the same for a regularizer and for its configuration."""
    with contextlib.suppress(Exception):  # a function that cannot be saved
        return json.dumps(keras.saving.serialize_keras_object(regularizer), sort_keys=True, default=repr)
    return repr(regularizer)


def _forget_traces(model: keras.layers.Layer) -> None:
    """Discards the functions that Keras traced before, because they do not have the new losses."""
    for name in ("train_function", "test_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def _describe(penalty: FrobeniusRegularizer) -> str:
    """Returns a layer's geometry in words, without what is 1."""
    if penalty.input_size == ():
        return "Dense"
    words = [f"input {_times(penalty.input_size)}", penalty.padding]
    for name, value in (("strides", penalty.strides), ("dilation_rate", penalty.dilation_rate)):
        if np.any(np.not_equal(value, 1)):
            words.append(f"{name} {_times(value)}")
    if penalty.groups != 1:
        words.append(f"{penalty.groups} groups")
    if penalty.kind != "conv":
        words.append(penalty.kind)
    return ", ".join(words)


def _times(size: int | Sequence[int | None]) -> str:
    """Returns (3, 4) as 3×4."""
    return "×".join(map(str, (size,) if isinstance(size, int) else size))


def _label(regularizer: Any) -> str:
    """Returns the names of a regularizer's parts."""
    parts = regularizer_parts(regularizer)
    return " + ".join(getattr(part, "__name__", type(part).__name__) for part in parts) or "none"
