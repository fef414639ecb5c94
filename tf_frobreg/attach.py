"""Puts the penalty on every layer of a model, and takes it off again."""

import dataclasses
import fnmatch
import reprlib
import weakref
from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from tf_frobreg.layers import LayerKernel, read_kernels
from tf_frobreg.regularizers import FrobeniusRegularizer, SumRegularizer

__all__ = ["AttachReport", "Selection", "attach_regularizers", "select_kernels"]

keras = tf.keras

EXISTING = ("add", "replace", "keep")
OVERRIDES = ("factor", "alpha", "reduction", "padding")

_undone = weakref.WeakKeyDictionary()  # regularizers that were detached, and what came in their place

Selection = str | type | Callable | Sequence


@dataclasses.dataclass(frozen=True, eq=False)
class AttachReport:
    """What `attach_regularizers` did; printed, it is a table.

    Attributes:
        attached: The new penalty of each kernel, by its name: a `FrobeniusRegularizer`.
        left_out: Why other kernels and layers have none, by their names.
    """

    attached: dict[str, FrobeniusRegularizer]
    left_out: dict[str, str]
    _model: keras.layers.Layer = dataclasses.field(repr=False)
    _kernels: list[tuple] = dataclasses.field(repr=False)  # (LayerKernel, regularizer before, now)

    def detach(self) -> None:
        """Puts back the regularizers that were there before; what was set since then stays."""
        for kernel, before, now in self._kernels:
            while before in _undone:  # what was there is detached itself by now
                before = _undone[before]
            _undone[now] = before
            _replace(kernel, now, before)
        _forget_traces(self._model)

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.attached, *self.left_out)), default=0)
        lines = [
            f"{name:{width}}  factor {penalty.factor:g}, α = {penalty.alpha:g}, input {_size(penalty)}, "
            f"{penalty.geometry['padding']}"
            for name, penalty in self.attached.items()
        ]
        return "\n".join(lines + [f"{name:{width}}  - {reason}" for name, reason in self.left_out.items()])


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
    compiled again. A layer that is shared between images of different sizes is penalised for the first.
    Frozen layers keep their penalty, which counts only while they are trainable, as with every Keras
    regularizer; detach before `enable_lora`, which puts it on the factors too.
    Layers that a class of your own makes in its code are made anew when it is loaded, without the penalty:
    attach it again then.

    Args:
        model: A built Keras model or layer: Sequential, Functional or subclassed, nested ones included.
        factor: Weight of each penalty, at least 0.
        alpha: α, the target of σ²; positive. 2 keeps the energy of a signal that goes through a ReLU.
        reduction: "sum", or "mean" for R_α by column, so that one factor suits layers of any size.
        padding: None for each layer's own; "circular" to penalise the border-free operators, whose
            minimisers use all taps.
        include: Which kernels: a name, which may hold wildcards (`"block*"`), a layer class, a function of
            the layer, or several of those in a list. All by default.
        exclude: Which of them not, likewise.
        overrides: By name, which may hold wildcards, a dict of other values of `factor`, `alpha`, `reduction`
            or `padding`; later ones win.
        existing: What becomes of a regularizer that is there already: "add" keeps it and adds the penalty,
            "replace" drops it, "keep" leaves the kernel as it is. A penalty of this package is never added a
            second time.
        input_size: The size of the input images, an int or one int per axis, where the model leaves it open.

    Returns:
        An `AttachReport`: what was attached, what was left out and why, and `.detach()`.

    Raises:
        ValueError, TypeError: Where an argument is invalid, a selected layer's image size is unknown, or a
            name matches nothing. Nothing has been attached then.

    Example:
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((28, 28, 1)),
        ...     tf.keras.layers.Conv2D(8, 3, strides=2, name="conv"),
        ...     tf.keras.layers.Flatten(),
        ...     tf.keras.layers.Dense(10, name="top")])
        >>> report = attach_regularizers(model, factor=0.01, reduction="mean", exclude="top")
        >>> print(report)
        conv  factor 0.01, α = 1, input 28×28, valid
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
    attached, kernels = {}, []
    for kernel, own in zip(chosen, by_kernel, strict=True):
        # With LoRA a layer's kernel is no variable.
        before = getattr(getattr(kernel.layer, kernel.attribute), "regularizer", None)
        penalty = _penalty(kernel, own)  # made even where it is not used: bad arguments are to be told
        if reason := _reason_to_leave(kernel, before, existing):
            left_out[kernel.name] = reason
            continue
        now = penalty if before is None or existing == "replace" else SumRegularizer([before, penalty])
        attached[kernel.name] = penalty
        kernels.append((kernel, before, now))
    for kernel, _, now in kernels:
        # The layer's attribute is what is saved, the variable's is what is computed.
        setattr(kernel.layer, kernel.regularizer, now)
        getattr(kernel.layer, kernel.attribute).regularizer = now
    _forget_traces(model)
    return AttachReport(attached, left_out, model, kernels)


def select_kernels(model, include, exclude, input_size) -> tuple[list[LayerKernel], dict[str, str]]:
    """(the chosen kernels of a model, why others were not chosen, by name)."""
    found = read_kernels(model, input_size)
    include, exclude = _patterns("include", include), _patterns("exclude", exclude)
    candidates = [(kernel.name, kernel.layer) for kernel in found.kernels]
    candidates += [(name, layer) for name, layer, *_ in found.untreated]
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if isinstance(pattern, str) and not any(_matches(pattern, *c) for c in candidates):
                raise ValueError(_no_match(argument, pattern, candidates))
    left_out = {}

    def chosen(name, layer):
        if include is not None and not any(_matches(pattern, name, layer) for pattern in include):
            left_out[name] = "not included"
        elif any(_matches(pattern, name, layer) for pattern in exclude or ()):
            left_out[name] = "excluded"
        return name not in left_out

    kernels = [kernel for kernel in found.kernels if chosen(kernel.name, kernel.layer)]
    for untreated in found.untreated:
        if chosen(untreated.name, untreated.layer):
            if untreated.of_unknown_size:
                raise ValueError(
                    f"layer {untreated.name!r} cannot be treated: {untreated.reason}. Or leave it out, "
                    f"exclude={untreated.name!r}. Received: input_size={input_size}"
                )
            left_out[untreated.name] = untreated.reason
    return kernels, left_out


def _patterns(argument, selection):
    if selection is None:
        return None
    single = isinstance(selection, (str, type)) or callable(selection)
    patterns = [selection] if single else selection
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(pattern, str) or callable(pattern) for pattern in patterns
    ):
        raise TypeError(
            f"{argument} must be a name, a layer class, a function of the layer, or a list of those. "
            f"Received: {argument}={reprlib.repr(selection)}"
        )
    return list(patterns)


def _matches(pattern, name, layer):
    if isinstance(pattern, str):
        return any(fnmatch.fnmatchcase(n, pattern) for n in (name, layer.name))
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    return bool(pattern(layer))


def _no_match(argument, pattern, candidates):
    names = ", ".join(name for name, _ in candidates) or "none"
    return f"{argument} must match a layer with a kernel ({names}). Received: {argument}={pattern!r}"


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
        if not any(_matches(pattern, *candidate) for candidate in candidates):
            raise ValueError(_no_match("overrides", pattern, candidates))
    by_kernel = []
    for candidate in candidates:
        merged = dict(values)
        for pattern, own in (overrides or {}).items():
            if _matches(pattern, *candidate):
                merged |= own
        by_kernel.append(merged)
    return by_kernel


def _penalty(kernel, values):
    geometry = dict(kernel.conv.geometry)
    if values["padding"] is not None:
        geometry["padding"] = values["padding"]
    rest = {name: value for name, value in values.items() if name != "padding"}
    return FrobeniusRegularizer(kernel.conv.input_size, **rest, **geometry)


def _reason_to_leave(kernel, before, existing):
    variable = getattr(kernel.layer, kernel.attribute)
    if getattr(kernel.layer, "lora_enabled", False):
        return "LoRA is enabled: its kernel is frozen"
    if variable.dtype not in ("float32", "float64"):
        return f"its kernel is {variable.dtype}"
    if before is not None and existing == "keep":
        return f"it has a {type(before).__name__} already"
    parts = before.regularizers if isinstance(before, SumRegularizer) else [before]
    if existing == "add" and any(isinstance(part, FrobeniusRegularizer) for part in parts):
        return "it has a FrobeniusRegularizer already"
    return None


def _replace(kernel, now, before):
    """Puts another regularizer where one is, on factors of LoRA too, which take over that of the kernel."""
    if getattr(kernel.layer, kernel.regularizer) is now:
        setattr(kernel.layer, kernel.regularizer, before)
    for weight in kernel.layer.weights:
        if weight.regularizer is now:
            weight.regularizer = before


def _forget_traces(model):
    """Functions that Keras traced before would not know the new losses."""
    for name in ("train_function", "test_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def _size(penalty):
    size = penalty.geometry["input_size"]
    return "×".join(map(str, size if isinstance(size, list) else [size])) or "-"
