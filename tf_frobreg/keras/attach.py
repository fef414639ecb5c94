"""Puts the penalty on every layer of a model, and takes it off again."""

import contextlib
import dataclasses
import reprlib
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tensorflow as tf

from tf_frobreg.keras.read_layers import LayerKernel, check_model, flat_layers, own_weights
from tf_frobreg.keras.regularizers import FrobeniusRegularizer, SumRegularizer
from tf_frobreg.keras.select_kernels import Selection, matches, no_match, select_kernels

__all__ = ["AttachReport", "attach_regularizers", "detach_regularizers"]

keras = tf.keras

EXISTING = ("add", "replace", "keep")
OVERRIDES = ("factor", "alpha", "reduction", "padding")

_undone = weakref.WeakKeyDictionary()  # regularizers that were detached, and what came in their place


@dataclasses.dataclass(frozen=True, eq=False)
class AttachReport:
    """What `attach_regularizers` did; printed, it is a table.

    Attributes:
        attached: The new penalty of each kernel, by its name: a `FrobeniusRegularizer`.
        left_out: Why other kernels and layers have none, by their names.
        remarks: What else there is to know, by the kernel's name: which regularizer the penalty was added to
            or replaced, other image sizes of a shared layer, and whether a saved model would lack it.
    """

    attached: dict[str, FrobeniusRegularizer]
    left_out: dict[str, str]
    remarks: dict[str, str]
    _model: keras.layers.Layer = dataclasses.field(repr=False)
    _changes: list["_Change"] = dataclasses.field(repr=False)

    def detach(self) -> None:
        """Puts back the regularizers that were there before; what was set since then stays."""
        for change in self._changes:
            _undone[change.now] = change.before
            layer, attribute = change.kernel.layer, change.kernel.regularizer
            if getattr(layer, attribute) is change.now:
                setattr(layer, attribute, _standing(change.before_in_layer))
            for weight in layer.weights:  # factors of LoRA too, which take over that of the kernel
                if weight.regularizer is change.now:
                    weight.regularizer = _standing(change.before)
        _forget_traces(self._model)

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.attached, *self.left_out)), default=0)
        lines = [
            f"{name:{width}}  factor {penalty.factor:g}, α = {penalty.alpha:g}, {_told(penalty)}"
            + (f"; {self.remarks[name]}" if name in self.remarks else "")
            for name, penalty in self.attached.items()
        ]
        return "\n".join(lines + [f"{name:{width}}  - {reason}" for name, reason in self.left_out.items()])


class _Change(NamedTuple):
    """One kernel's regularizers: the variable's is what is computed, the layer's attribute what is saved."""

    kernel: LayerKernel
    before: Callable | None
    before_in_layer: Callable | None
    now: Callable


def attach_regularizers(
    model,
    factor: float = 1e-4,
    alpha: float = 1.0,
    *,
    reduction: str = "sum",
    padding: str | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    overrides: Mapping[str, Mapping] | None = None,
    existing: str = "add",
    input_size=None,
) -> AttachReport:
    """Puts a `FrobeniusRegularizer` on every convolution and `Dense` layer of a built model.

    Image size, strides, padding, dilation, groups, data format and kind of each layer are read from the
    layer. The penalties are among `model.losses` from then on, before and after `compile`, and are saved,
    loaded and cloned with the model. A model that contains this one and has been trained already has to be
    compiled again. A layer that is shared between images of different sizes is penalised for the first; the
    report remarks it. Functions that Keras has traced hold `factor` and `alpha` as they were: a weight that
    changes during training takes a `FactorSchedule`. Frozen layers keep their penalty, which counts only
    while they are trainable, as with every Keras regularizer; detach before `enable_lora`, which puts it on
    the factors too. Where a class of your own makes layers in its code, Keras makes them anew when it loads
    the model, without the penalty: the report remarks which, and attaching again restores it. A class whose
    `build` builds its layers and then attaches to itself saves, loads and clones with the same losses.

    Args:
        model: A built Keras model or layer: Sequential, Functional or subclassed, nested ones included.
        factor: Weight of each penalty, at least 0.
        alpha: α, the target of σ²; positive. 2 keeps the energy of a signal that goes through a ReLU.
        reduction: "sum", or "mean" for R_α by column, so that one factor suits layers of any size.
        padding: None for each layer's own; "circular" to penalise the border-free operators, whose
            minimisers use all taps.
        include: Which kernels: a name, which may hold wildcards (`"block*"`), a layer, a layer class, a
            function of the layer, or several of those in a list. All by default.
        exclude: Which of them not, likewise.
        overrides: By name, which may hold wildcards, a dict of other values of `factor`, `alpha`, `reduction`
            or `padding`; later ones win.
        existing: What becomes of a regularizer that is there already: "add" keeps it and adds the penalty,
            "replace" drops it, "keep" leaves the kernel as it is. A penalty of this package is never added a
            second time.
        input_size: The size of the input images, an int or one int per axis, where the model leaves it open.

    Returns:
        An `AttachReport`: what was attached, what was left out and why, remarks, and `.detach()`.

    Raises:
        ValueError, TypeError: Where an argument is invalid, a selected layer's image size is unknown, or a
            name or class matches nothing. Nothing has been attached then.

    Example:
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((28, 28, 1)),
        ...     tf.keras.layers.Conv2D(8, 3, strides=2, name="conv"),
        ...     tf.keras.layers.Flatten(),
        ...     tf.keras.layers.Dense(10, name="top")])
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
    if existing not in EXISTING:
        raise ValueError(f"existing must be one of {EXISTING}. Received: existing={existing!r}")
    chosen, left_out = select_kernels(model, include, exclude, input_size)
    values = {"factor": factor, "alpha": alpha, "reduction": reduction, "padding": padding}
    by_kernel = _overridden(values, overrides, chosen)
    attached, changes = {}, []
    for kernel, own in zip(chosen, by_kernel, strict=True):
        # With LoRA a layer's kernel is no variable.
        before = getattr(getattr(kernel.layer, kernel.attribute), "regularizer", None)
        penalty = _penalty(kernel, own)  # made even where it is not used: bad arguments are to be told
        if reason := _reason_to_leave(kernel, before, existing):
            left_out[kernel.name] = reason
            continue
        now = penalty if before is None or existing == "replace" else SumRegularizer([before, penalty])
        attached[kernel.name] = penalty
        changes.append(_Change(kernel, before, getattr(kernel.layer, kernel.regularizer), now))
    for kernel, _, _, now in changes:
        setattr(kernel.layer, kernel.regularizer, now)
        getattr(kernel.layer, kernel.attribute).regularizer = now
    _forget_traces(model)
    return AttachReport(attached, left_out, _remarks(model, changes, existing), model, changes)


def detach_regularizers(model) -> list[str]:
    """Takes every `FrobeniusRegularizer` off a model, also those from a file or a layer's arguments.

    Other regularizers stay. `AttachReport.detach` undoes one `attach_regularizers` only.

    Args:
        model: A Keras model or layer.

    Returns:
        The names of the layers that had one.

    Raises:
        TypeError: Where `model` is no Keras model or layer.

    Example:
        >>> model = tf.keras.Sequential([tf.keras.Input((8,)), tf.keras.layers.Dense(4, name="top")])
        >>> _ = attach_regularizers(model)
        >>> detach_regularizers(model), model.losses
        (['top'], [])
    """
    check_model(model)
    names = []
    for layer in flat_layers(model):
        found = False
        for name, value in list(vars(layer).items()):
            if _has_penalty(value):
                setattr(layer, name, _without_penalty(value))
                found = True
        for weight in own_weights(layer):
            if _has_penalty(weight.regularizer):
                weight.regularizer = _without_penalty(weight.regularizer)
                found = True
        names += [layer.name] * found
    _forget_traces(model)
    return names


def _has_penalty(regularizer):
    parts = regularizer.regularizers if isinstance(regularizer, SumRegularizer) else [regularizer]
    return any(isinstance(part, FrobeniusRegularizer) for part in parts)


def _without_penalty(regularizer):
    parts = regularizer.regularizers if isinstance(regularizer, SumRegularizer) else []
    rest = [part for part in parts if not isinstance(part, FrobeniusRegularizer)]
    return SumRegularizer(rest) if len(rest) > 1 else (rest or [None])[0]


def _overridden(values, overrides, kernels):
    """The arguments of each kernel's penalty."""
    candidates = [(kernel.name, kernel.layer) for kernel in kernels]
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(
            f"overrides must be a dict of dicts by name. Received: overrides={reprlib.repr(overrides)}"
        )
    for pattern, own in (overrides or {}).items():
        if not isinstance(pattern, str) or not isinstance(own, Mapping) or not own.keys() <= set(OVERRIDES):
            raise ValueError(
                f"overrides must map names to dicts of {', '.join(OVERRIDES)}. "
                f"Received: overrides[{pattern!r}]={reprlib.repr(own)}"
            )
        if not any(matches(pattern, *candidate) for candidate in candidates):
            raise ValueError(no_match("overrides", pattern, candidates))
    by_kernel = []
    for candidate in candidates:
        merged = dict(values)
        for pattern, own in (overrides or {}).items():
            if matches(pattern, *candidate):
                merged |= own
        by_kernel.append(merged)
    return by_kernel


def _penalty(kernel, values):
    geometry = dict(kernel.conv.geometry)
    if values["padding"] is not None:
        geometry["padding"] = values["padding"]
    rest = {name: value for name, value in values.items() if name != "padding"}
    try:
        return FrobeniusRegularizer(kernel.conv.input_size, **rest, **geometry)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}, for layer {kernel.name!r}") from None


def _reason_to_leave(kernel, before, existing):
    variable = getattr(kernel.layer, kernel.attribute)
    if getattr(kernel.layer, "lora_enabled", False):
        return "LoRA is enabled: its kernel is frozen"
    if variable.dtype not in ("float32", "float64"):
        return f"its kernel is {variable.dtype}"
    if before is not None and existing == "keep":
        return f"it has {_label(before)} already"
    if existing == "add" and _has_penalty(before):
        return "it has FrobeniusRegularizer already"
    return None


def _remarks(model, changes, existing):
    saved = _saved(model, [change.now for change in changes])
    remarks = {}
    for change in changes:
        kernel, before, in_layer, now = change
        sizes = " and ".join(map(_shape, kernel.other_sizes))
        told = {
            f"{'replaced' if existing == 'replace' else 'added to'} {_label(before)}": before is not None,
            f"{kernel.regularizer} was {_label(in_layer)}, without effect": in_layer is not before,
            f"applied to {sizes} too, penalised for {_shape(kernel.conv.input_size)}": sizes,
            "not in the model's configuration: attach again after loading": id(now) not in saved,
        }
        if any(told.values()):
            remarks[kernel.name] = "; ".join(remark for remark, holds in told.items() if holds)
    return remarks


def _saved(model, regularizers):
    """The ids of those that a saved model holds, found by asking it for its configuration."""
    seen = set()

    def noting(regularizer):
        def get_config():
            seen.add(id(regularizer))
            return type(regularizer).get_config(regularizer)

        return get_config

    for regularizer in regularizers:
        regularizer.get_config = noting(regularizer)  # hides the method of the class
    try:
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # classes that have none
            warnings.simplefilter("ignore")
            model.get_config()
    finally:
        for regularizer in regularizers:
            del regularizer.get_config
    return seen


def _standing(regularizer):
    """What came in its place where it was detached itself since then."""
    while regularizer in _undone:
        regularizer = _undone[regularizer]
    return regularizer


def _forget_traces(model):
    """Functions that Keras traced before would not know the new losses."""
    for name in ("train_function", "test_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def _told(penalty):
    """A geometry in words; what is 1 is left out."""
    geometry = penalty.geometry
    if not penalty.input_size:
        return "Dense"
    words = [f"input {_shape(penalty.input_size)}", geometry["padding"]]
    for name in ("strides", "dilation_rate"):
        if set(geometry[name]) != {1}:
            words.append(f"{name} {_shape(geometry[name])}")
    if geometry["groups"] != 1:
        words.append(f"{geometry['groups']} groups")
    if geometry["kind"] != "conv":
        words.append(geometry["kind"])
    return ", ".join(words)


def _shape(sizes):
    return "×".join(map(str, sizes))


def _label(regularizer):
    parts = regularizer.regularizers if isinstance(regularizer, SumRegularizer) else [regularizer]
    return " + ".join(
        "none" if part is None else getattr(part, "__name__", type(part).__name__) for part in parts
    )
