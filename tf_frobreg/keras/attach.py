"""Puts a penalty on every layer of a model, and takes it off again."""

import copy
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import keras

from tf_frobreg.checks import check_choice, did_you_mean, received
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.keras.attach_report import (
    CLASSES,
    AttachReport,
    Change,
    forget_traces,
    label,
    times,
)
from tf_frobreg.keras.function_regularizer import (
    CANNOT_BE_SAVED,
    FunctionRegularizer,
    check_function,
    remark_on_loading,
    try_function,
)
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.keras.own_penalty import differences, penalised_convolution
from tf_frobreg.keras.read_layers import LayerKernel, check_model, flat_layers, own_weights
from tf_frobreg.keras.regularizer_base import Replacement, WeightedRegularizer
from tf_frobreg.keras.select_kernels import Candidate, Selection, check_matches, matches, select_kernels
from tf_frobreg.keras.sum_regularizer import SumRegularizer, regularizer_parts
from tf_frobreg.keras.trace import InputSize
from tf_frobreg.keras.unsaved import unsaved_kernels
from tf_frobreg.tables import names_by_reason

__all__ = ["attach_regularizers", "detach_regularizers"]

OF_BUILDING = (
    "The image sizes are those for which the model was built, because it has no inputs of its own. "
    "input_size= sets others."
)
EXISTING = ("add", "replace", "keep", "correct")
DEFAULT_ALPHA = 1.0
DTYPES = ("float32", "float64")
# What each penalty takes, and so what `overrides` can change.
ARGUMENTS = {
    "frobenius": ("factor", "alpha", "reduction", "padding"),
    "spectral": ("factor", "alpha", "padding"),
    "reshaped": ("factor", "alpha"),
}
ARGUMENTS_OF_A_FUNCTION = ("factor", "padding")

Penalty = str | Callable[[Any, Convolution], Any]


def attach_regularizers(
    model: keras.layers.Layer,
    factor: float = 0.01,
    alpha: float = DEFAULT_ALPHA,
    *,
    penalty: Penalty = "frobenius",
    reduction: str | None = None,
    padding: str | None = None,
    include: Selection | None = None,
    exclude: Selection | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    existing: str = "add",
    input_size: InputSize | None = None,
) -> AttachReport:
    """Puts a penalty on every convolution and `Dense` layer of a built model.

    The penalty is `FrobeniusRegularizer`, unless you choose another one. The image size, strides, padding,
    dilation, groups, data format and kind are read from each layer. From then on the penalties are among
    `model.losses`, before and after `compile`. They are saved, loaded and cloned with the model.

    - A clone at another image size keeps the penalties of the old size. `existing="correct"` corrects them.
    - Compile a model again if it contains this one and has been trained already.
    - A layer that is shared between images of different sizes is penalised for one of them. The report says
      for which one, and lists the others. Two layers that share one variable get one penalty.
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
            Not for a function.
        penalty: "frobenius" for `FrobeniusRegularizer`, "spectral" for `SpectralRegularizer`, "reshaped" for
            `ReshapedRegularizer`, or a function of (kernel, convolution) that returns a scalar. The function
            gets the layer's `Convolution`, see `FunctionRegularizer`. It is tried once for each geometry.
        reduction: Only for "frobenius". None or "mean" for R_α divided by the number of columns of M, so that
            one factor suits layers of any size. "sum" for R_α.
        padding: None for the padding of each layer. "circular" penalises the operators without border, whose
            minimisers use all taps. Not for "reshaped".
        include: Which kernels get a penalty: a name, a layer, a layer class, a function of the layer, or a
            list of these. Names may contain wildcards (`"block*"`). The default is all kernels.
        exclude: Which of these get none, in the same form.
        overrides: Maps names, which may contain wildcards, to dicts of other values of `factor`, `alpha`,
            `reduction` or `padding`. If several names match a kernel, the last one wins.
        existing: What happens to a regularizer that a kernel already has. "add" keeps it and adds the
            penalty, but never a second one of the same class or function: the old one stays with its values.
            "replace" removes it. "keep" leaves the kernel as it is. "correct" adds nothing: penalties of this
            package get the layer's geometry if theirs differs, and keep their factor, α and other values.
        input_size: Size of the input images, an int or one int per axis, if the model leaves it open. A dict
            maps names of inputs or layers to sizes.

    Returns:
        An `AttachReport`: what was attached, left out, kept and corrected, remarks, and `.detach()`.

    Raises:
        ValueError: If an argument is invalid, the image size of a selected layer is unknown, or a name or
            class matches nothing. Also if no kernel can get or has a penalty, or if the function given as
            `penalty` fails, returns no scalar, or has no gradient. Nothing is attached then.
        TypeError: If an argument has the wrong type.

    Example:
        >>> model = keras.Sequential([
        ...     keras.Input((28, 28, 1)),
        ...     keras.layers.Conv2D(8, 3, strides=2, name="conv"),
        ...     keras.layers.Flatten(),
        ...     keras.layers.Dense(10, name="top")])
        >>> report = attach_regularizers(model, exclude="top")
        >>> print(report)
        attached 1, left out 1, kept 0
        <BLANKLINE>
        kernel  factor  α  reduction  image  geometry
        ───────────────────────────────────────────────────────
        conv      0.01  1  mean       28×28  valid, strides 2×2
        <BLANKLINE>
        Left out: top: excluded
        >>> len(model.losses)
        1
        >>> report.detach()
        >>> model.losses
        []
        >>> def entries(kernel, convolution):  # the mean of |entry| of M, except at the border
        ...     return keras.ops.sum(keras.ops.abs(kernel)) / convolution.shape[1]
        >>> report = attach_regularizers(model, penalty=entries, include="conv")
        >>> print(report.attached["conv"].geometry["strides"])
        (2, 2)
    """
    check_choice("existing", existing, EXISTING)
    given = {"factor": factor, "alpha": alpha, "reduction": reduction, "padding": padding}
    values = _check_penalty(penalty, given)
    kernels, left_out = select_kernels(model, include, exclude, input_size)
    changes: list[Change] = []
    report = AttachReport({}, left_out, {}, {}, {}, {}, [], model, changes, {})
    for kernel, own in zip(kernels, _overridden(values, overrides, kernels), strict=True):
        new = _build(penalty, kernel, own)  # also for kernels that are left out, to refuse invalid arguments
        if (reason := kernel.reason_to_skip(dtypes=DTYPES)) is not None:
            left_out[kernel.name] = reason
        elif (now := _plan(report, kernel, new, existing)) is not None:
            changes.append(Change(kernel, now))
    if not (report.attached or report.kept or report.corrected):
        reasons = [f"{names}: {reason}" for reason, names in names_by_reason(left_out).items()]
        raise ValueError(
            "model must have a kernel that can get a penalty. Left out: "
            f"{'; '.join(reasons) or 'nothing, it has no convolution and no Dense layer'}"
        )
    _try_functions(report, changes)
    for kernel, now in changes:  # nothing has been changed before this point
        now.replaced, now.replaced_in_layer = (
            kernel.variable.regularizer,
            getattr(kernel.layer, kernel.regularizer),
        )
        setattr(kernel.layer, kernel.regularizer, now)
        kernel.variable.regularizer = now
    forget_traces(model)
    if any(kernel.of_building for kernel in kernels):
        report.notes.append(OF_BUILDING)
    _add_remarks(report, changes, unsaved_kernels(model, changes), existing)
    return report


def detach_regularizers(model: keras.layers.Layer) -> list[str]:
    """Takes every penalty of this package off a model, also those from a file or a layer's arguments.

    The penalties are all regularizers of the package, also those in a `SumRegularizer`, and those on weights
    that your own layers make with `add_weight(regularizer=...)`. Other regularizers stay.
    `AttachReport.detach` undoes only one call of `attach_regularizers`.

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
    forget_traces(model)
    return names


def _has_penalty(regularizer: Any) -> bool:
    """Returns whether the regularizer is or contains a penalty of this package."""
    return any(isinstance(part, WeightedRegularizer) for part in regularizer_parts(regularizer))


def _without_penalty(regularizer: Any) -> Any:
    """Returns the regularizer without the penalties, or None if nothing else is in it."""
    rest = [part for part in regularizer_parts(regularizer) if not isinstance(part, WeightedRegularizer)]
    return SumRegularizer(rest) if len(rest) > 1 else next(iter(rest), None)


def _check_penalty(penalty: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the given values that the penalty takes, or raises an error if another one was given."""
    if isinstance(penalty, str):
        names = ARGUMENTS[check_choice("penalty", penalty, tuple(ARGUMENTS))]
    else:
        check_function("penalty", penalty, f"one of {tuple(ARGUMENTS)} or ", _hint_at_name(penalty))
        names = ARGUMENTS_OF_A_FUNCTION
    for name, value in given.items():
        default = DEFAULT_ALPHA if name == "alpha" else None
        if name not in names and value is not default and value != default:
            kind = f"penalty={penalty!r}" if isinstance(penalty, str) else "a function as penalty"
            raise ValueError(
                f"{name} must not be given with {kind}, which takes {', '.join(names)}. "
                f"Received: {received(name, value)}"
            )
    values = {name: given[name] for name in names}
    if values.get("reduction", "") is None:
        values["reduction"] = "mean"
    return values


def _hint_at_name(penalty: Any) -> str:
    """Returns what to write in place of a regularizer or its class."""
    kind = penalty if isinstance(penalty, type) else type(penalty)
    if name := next((name for name, own in CLASSES.items() if issubclass(kind, own)), ""):
        return f'. Write penalty="{name}"'
    if isinstance(penalty, FunctionRegularizer):
        return ". Write penalty=regularizer.function"
    if issubclass(kind, keras.regularizers.Regularizer):
        return ". Other regularizers are set as kernel_regularizer of the layers"
    return ""


def _overridden(
    values: dict[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None, kernels: Sequence[LayerKernel]
) -> list[dict[str, Any]]:
    """Returns the arguments of each kernel's penalty, or raises an error if `overrides` is invalid."""
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, Mapping):
        raise TypeError(
            f"overrides must be a dict of dicts by name. Received: {received('overrides', overrides)}"
        )
    candidates = [Candidate(kernel.name, kernel.layer) for kernel in kernels]
    for pattern, own in overrides.items():
        unknown = [key for key in own if key not in values] if isinstance(own, Mapping) else []
        if not isinstance(pattern, str) or not isinstance(own, Mapping) or unknown:
            raise ValueError(
                f"overrides must map names to dicts of {', '.join(values)}. "
                f"Received: overrides[{pattern!r}]={reprlib.repr(own)}"
                f"{did_you_mean(unknown[0], values) if unknown else ''}"
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


def _build(penalty: Penalty, kernel: LayerKernel, values: Mapping[str, Any]) -> WeightedRegularizer:
    """Returns the penalty of a kernel, or raises an error that names the layer."""
    conv = kernel.with_padding(values.get("padding")).conv
    weights = {name: value for name, value in values.items() if name != "padding"}
    with kernel.naming_errors():
        if not isinstance(penalty, str):
            return FunctionRegularizer(penalty, conv.input_size, **weights, **conv.geometry)
        kind: Any = CLASSES[penalty]
        if not issubclass(kind, TakesGeometry):
            return kind(**weights)
        return kind(conv.input_size, **weights, **conv.geometry)


def _try_functions(report: AttachReport, changes: Sequence[Change]) -> None:
    """Tries each new function once per geometry, or raises an error that names the layer."""
    tried = set()
    for kernel, _ in changes:
        new = report.attached.get(kernel.name)
        if not isinstance(new, FunctionRegularizer):
            continue
        shape, dtype = kernel.conv.kernel_shape, kernel.variable.dtype
        case = new.convolution(shape), dtype
        if case not in tried:
            tried.add(case)
            with kernel.naming_errors():
                try_function(new, shape, dtype)


def _plan(
    report: AttachReport, kernel: LayerKernel, new: WeightedRegularizer, existing: str
) -> Replacement | None:
    """Writes into the report what becomes of a kernel's regularizer, and returns the new one if any."""
    name = kernel.name
    before = rest = kernel.variable.regularizer
    stays = before is not None and (existing == "keep" or (existing == "add" and _has_same(before, new)))
    wrong = [] if existing == "replace" else _mismatches(before, kernel)
    words = " and ".join(f"{label(part)} for {differences(part, kernel.conv)}" for part in wrong)
    if wrong and existing == "correct":
        right = {id(part): _with_geometry(part, kernel.conv) for part in wrong}
        rest = _exchanged(before, right)
        report.corrected[name] = list(right.values())
        report.remarks[name] = f"corrected {words}"
    elif wrong:
        report.mismatched[name] = words
        # The reason why a kernel keeps its penalty names the penalty already.
        only = stays and regularizer_parts(before) == wrong
        what = differences(wrong[0], kernel.conv) if only else words
        report.remarks[name] = f'wrong geometry, {what}: existing="correct" corrects it'
    if stays and existing == "keep":
        report.keep(name, before, f"it has {label(before)} already")
        return None
    if stays:
        report.keep(name, before, f"it has {label(new)} already{_other_values(before, new)}")
        return None
    if existing == "correct":
        if rest is before and _has_penalty(before):
            report.keep(name, before, f"it has {label(before)} already")
        elif rest is before:
            report.left_out[name] = "it has no penalty to correct"
        return rest if rest is not before else None
    report.attached[name] = new
    return new if rest is None or existing == "replace" else SumRegularizer([rest, new])


def _other_values(regularizer: Any, new: WeightedRegularizer) -> str:
    """Returns which values of a kernel's earlier penalty differ from those of the new one."""
    old = next(part for part in regularizer_parts(regularizer) if _is_same_penalty(part, new))
    found = []
    for name in ("factor", "alpha", "reduction", "padding"):
        own, given = getattr(old, name, None), getattr(new, name, None)
        is_chosen = name != "padding" or "circular" in (own, given)  # any other padding is the layer's
        if own != given and is_chosen:
            found.append(f"{'α' if name == 'alpha' else name} {_text(own)} instead of {_text(given)}")
    return f', with {", ".join(found)}: existing="replace" takes the new one' if found else ""


def _text(value: Any) -> str:
    """Returns a number or a name as text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _mismatches(regularizer: Any, kernel: LayerKernel) -> list[Any]:
    """Returns the penalties in a regularizer whose geometry is not the one that the layer has."""
    return [
        part
        for part in regularizer_parts(regularizer)
        if isinstance(part, WeightedRegularizer)
        and isinstance(part, TakesGeometry)
        and penalised_convolution(part, kernel) is None
    ]


def _with_geometry(penalty: Any, conv: Convolution) -> Any:
    """Returns a copy of a penalty with another geometry. A penalty without border remains one."""
    corrected = copy.copy(
        penalty
    )  # its configuration would not do, which needs the function to be registered
    corrected.replaced = corrected.replaced_in_layer = None
    corrected.detached = False
    geometry = conv.geometry
    if penalty.padding == "circular":
        geometry["padding"] = "circular"
    corrected.take_geometry(conv.input_size, geometry)
    return corrected


def _exchanged(regularizer: Any, new: Mapping[int, Any]) -> Any:
    """Returns a regularizer with other parts. `new` maps the id of a part to what takes its place."""
    if isinstance(regularizer, SumRegularizer):
        return SumRegularizer([_exchanged(part, new) for part in regularizer.regularizers])
    return new.get(id(regularizer), regularizer)


def _has_same(regularizer: Any, new: WeightedRegularizer) -> bool:
    """Returns whether a penalty of the same class is in the regularizer, with the same function if any."""
    return any(_is_same_penalty(part, new) for part in regularizer_parts(regularizer))


def _is_same_penalty(part: Any, new: WeightedRegularizer) -> bool:
    """Returns whether a regularizer has the class of the new penalty, and its function if any."""
    return isinstance(part, type(new)) and (
        not isinstance(new, FunctionRegularizer) or _is_same(part.function, new.function)
    )


def _is_same(function: Any, other: Any) -> bool:
    """Returns whether two functions are equal, or the same text that was run twice in a notebook."""
    codes = [getattr(f, "__code__", None) for f in (function, other)]
    is_closure = any(getattr(f, "__closure__", None) for f in (function, other))
    return function == other or (codes[0] is not None and codes[0] == codes[1] and not is_closure)


def _add_remarks(
    report: AttachReport, changes: Sequence[Change], unsaved: Collection[str], existing: str
) -> None:
    """Writes into the report what else the user should know about the changed kernels."""
    for kernel, now in changes:
        name, remarks = kernel.name, []
        if name in report.remarks:
            remarks.append(report.remarks[name])
        if name in report.attached and now.replaced is not None:
            remarks.append(f"{'replaced' if existing == 'replace' else 'added to'} {label(now.replaced)}")
        if now.replaced_in_layer is not now.replaced:
            remarks.append(f"{kernel.regularizer} was {label(now.replaced_in_layer)}, without effect")
        if isinstance(report.attached.get(name), TakesGeometry) or name in report.corrected:
            remarks += _remarks_on_size(kernel)
        new = report.attached.get(name)
        to_load = remark_on_loading(new.function) if isinstance(new, FunctionRegularizer) else ""
        if name in unsaved and to_load != CANNOT_BE_SAVED:
            remarks.append("not in the model's configuration: attach again after loading")
        elif to_load:
            remarks.append(to_load)
        if remarks:
            report.remarks[name] = "; ".join(remarks)


def _remarks_on_size(kernel: LayerKernel) -> list[str]:
    """Returns remarks on the image sizes that a kernel is applied to."""
    remarks = ["size of an earlier call"] if kernel.is_recorded else []
    if kernel.other_sizes:
        sizes = " and ".join(map(times, kernel.other_sizes))
        remarks.append(f"applied to {sizes} too, penalised for {times(kernel.conv.input_size)}")
    return remarks
