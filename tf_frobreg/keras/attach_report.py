"""The report of `attach_regularizers`: what was attached, as a table, and how to take it off again."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from tf_frobreg.keras.function_regularizer import FunctionRegularizer
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.keras.read_layers import LayerKernel
from tf_frobreg.keras.regularizer_base import Replacement, WeightedRegularizer, function_name
from tf_frobreg.keras.regularizers import FrobeniusRegularizer, ReshapedRegularizer, SpectralRegularizer
from tf_frobreg.keras.sum_regularizer import SumRegularizer, regularizer_parts
from tf_frobreg.tables import UNKNOWN, Report, Row, known_columns, names_by_reason

__all__ = ["AttachReport"]

# The built-in penalties by the names that `attach_regularizers` takes.
CLASSES: dict[str, type[WeightedRegularizer]] = {
    "frobenius": FrobeniusRegularizer,
    "spectral": SpectralRegularizer,
    "reshaped": ReshapedRegularizer,
}
LEFT_COLUMNS = ("kernel", "penalty", "reduction", "geometry", "remark")
# Columns that a narrow terminal lacks, the first one first.
OPTIONAL_COLUMNS = ("geometry", "reduction", "α", "image")
VALUES = ("factor", "scale", "alpha", "reduction", "input_size")
GEOMETRY = ("strides", "padding", "dilation_rate", "groups", "kind")


class Change(NamedTuple):
    """A kernel whose regularizer was changed.

    Attributes:
        kernel: The kernel.
        now: The regularizer that it got. `now.replaced` is the one before.
    """

    kernel: LayerKernel
    now: Replacement


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttachReport(Report):
    """What `attach_regularizers` did. `print(report)` shows a table with one row per kernel.

    A terminal that is too narrow lacks some columns.

    Attributes:
        attached: The new regularizer of each kernel, by the kernel's name.
        left_out: Why other kernels and layers have none, by their names.
        remarks: What else you should know, by the kernel's name: which regularizer the penalty was added to
            or replaced, other image sizes of a shared layer, whether the image size is that of an earlier
            call, whether a saved model lacks the penalty, what loading the penalty's function needs, and how
            an earlier penalty differs from the layer.
        kept: Why some kernels keep the regularizer that they had and got no other, by their names. With
            `existing="add"` the values of an earlier penalty that differ from the given ones are named.
        corrected: Penalties with the layer's geometry that took the place of others, by the kernel's name.
            See `existing="correct"`.
        mismatched: How the geometry of an earlier penalty differs from the layer's, by the kernel's name.
        notes: What concerns all kernels, for example where the image sizes come from.

    Example:
        >>> from tf_frobreg import attach_regularizers
        >>> model = keras.Sequential([
        ...     keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, kernel_regularizer="l2", name="conv"),
        ...     keras.layers.Dense(2, name="top")])
        >>> report = attach_regularizers(model, exclude="top")
        >>> print(report)
        attached 1, left out 1, kept 0
        <BLANKLINE>
        kernel  factor  α  reduction  image  geometry  remark
        ──────────────────────────────────────────────────────────
        conv      0.01  1  mean         8×8  valid     added to L2
        <BLANKLINE>
        Left out: top: excluded
        >>> report
        AttachReport: attached 1, left out 1, kept 0
        >>> report.attached["conv"].input_size, report.left_out, report.remarks
        ((8, 8), {'top': 'excluded'}, {'conv': 'added to L2'})
        >>> [(record["layer"], record["factor"], record["reason"]) for record in report.records()]
        [('conv', 0.01, None), ('top', None, 'excluded')]
        >>> report.detach()
    """

    _left_columns = LEFT_COLUMNS
    _optional_columns = OPTIONAL_COLUMNS

    attached: dict[str, Any]
    left_out: dict[str, str]
    remarks: dict[str, str]
    kept: dict[str, str]
    corrected: dict[str, list[Any]]
    mismatched: dict[str, str]
    notes: list[str]
    _model: keras.layers.Layer
    _changes: Sequence[Change]
    _kept: dict[str, Any]  # the regularizer of each kernel in `kept`

    def keep(self, name: str, regularizer: Any, reason: str) -> None:
        """Notes that a kernel keeps its regularizer, and why."""
        self.kept[name] = reason
        self._kept[name] = regularizer

    def detach(self) -> None:
        """Puts back the regularizers that were there before. What was set or added since then stays."""
        for kernel, now in self._changes:
            now.detached = True
            in_layer = getattr(kernel.layer, kernel.regularizer)
            setattr(kernel.layer, kernel.regularizer, _without(in_layer, now, "replaced_in_layer"))
            for weight in kernel.layer.weights:  # with LoRA the two factors have the kernel's regularizer
                weight.regularizer = _without(weight.regularizer, now, "replaced")
        forget_traces(self._model)

    def records(self) -> list[dict[str, Any]]:
        """Returns flat plain values: `pandas.DataFrame(report.records())` is a table.

        Returns:
            One dict per penalty: the new ones, then those that were kept. Then one for each kernel or layer
            that was left out. "status" is "attached", "corrected", "kept" or "left out". What does not apply
            is None.
        """
        records = [self._record(*row) for row in self._penalties()]
        for name, reason in self.kept.items():
            for part in regularizer_parts(self._kept[name]):
                records.append(self._record(name, "kept", part, reason))
        return records + [self._record(name, "left out", None, why) for name, why in self.left_out.items()]

    def _record(self, name: str, status: str, penalty: Any, reason: str | None = None) -> dict[str, Any]:
        """Returns the record of one penalty, or of a kernel without one."""
        return {
            "layer": name,
            "status": status,
            "penalty": None if penalty is None else penalty_name(penalty),
            **{key: getattr(penalty, key, None) for key in (*VALUES, *GEOMETRY)},
            "remark": self.remarks.get(name),
            "reason": reason,
        }

    def __repr__(self) -> str:
        return f"AttachReport: {self._summary()}"

    def _penalties(self) -> list[tuple[str, str, WeightedRegularizer]]:
        """Returns (kernel's name, status, penalty) of each row."""
        rows = [(name, "attached", penalty) for name, penalty in self.attached.items()]
        return rows + [(name, "corrected", new) for name, found in self.corrected.items() for new in found]

    def _summary(self) -> str:
        parts = [
            f"attached {len(self.attached)}",
            f"left out {len(self.left_out)}",
            f"kept {len(self.kept)}",
        ]
        if self.corrected:
            parts.append(f"corrected {len(self.corrected)}")
        if self.mismatched:
            parts.append(f"wrong geometry {len(self.mismatched)}")
        return ", ".join(parts)

    def _parts(self) -> tuple[str, list[Row], list[str]]:
        penalties = self._penalties()
        only_frobenius = all(penalty_name(penalty) == "frobenius" for _, _, penalty in penalties)
        rows = [
            {
                "kernel": name,
                "penalty": UNKNOWN if only_frobenius else penalty_name(penalty),
                "factor": _factor(penalty),
                "α": f"{penalty.alpha:g}" if hasattr(penalty, "alpha") else UNKNOWN,
                "reduction": getattr(penalty, "reduction", UNKNOWN),
                "image": times(getattr(penalty, "input_size", ())) or UNKNOWN,
                "geometry": _describe(penalty),
                "remark": self.remarks.get(name, UNKNOWN),
            }
            for name, _, penalty in penalties
        ]
        kept = {
            name: "; ".join(filter(None, (reason, self.remarks.get(name))))
            for name, reason in self.kept.items()
        }
        below = [f"Kept: {names}: {reason}" for reason, names in names_by_reason(kept).items()]
        below += [f"Left out: {names}: {reason}" for reason, names in names_by_reason(self.left_out).items()]
        return self._summary(), known_columns(rows), below + self.notes


def _without(regularizer: Any, now: Replacement, replaced: str) -> Any:
    """Returns a regularizer without one that was detached, also if others have been added to that one."""
    if isinstance(regularizer, SumRegularizer) and regularizer is not now:
        parts = [_without(part, now, replaced) for part in regularizer.regularizers]
        regularizer.regularizers = [part for part in parts if part is not None]
        if not regularizer.regularizers:
            return None
    return _in_use(now, replaced) if regularizer is now else regularizer


def _in_use(regularizer: Any, replaced: str) -> Any:
    """Follows detached regularizers to the one that is now in their place. `replaced` names the place."""
    while isinstance(regularizer, Replacement) and regularizer.detached:
        regularizer = getattr(regularizer, replaced)
    return regularizer


def forget_traces(model: keras.layers.Layer) -> None:
    """Discards the functions that Keras traced before, because they do not have the new losses."""
    for name in ("train_function", "test_function"):
        if getattr(model, name, None) is not None:
            setattr(model, name, None)


def penalty_name(penalty: Any) -> str:
    """Returns the name by which `attach_regularizers` takes a penalty, or the name of its function."""
    if isinstance(penalty, FunctionRegularizer):
        return function_name(penalty.function)
    names = (name for name, kind in CLASSES.items() if isinstance(penalty, kind))
    return next(names, type(penalty).__name__)


def label(regularizer: Any) -> str:
    """Returns the names of a regularizer's parts."""
    return " + ".join(map(_part_label, regularizer_parts(regularizer))) or "none"


def _part_label(part: Any) -> str:
    if isinstance(part, FunctionRegularizer):
        return f"{type(part).__name__}({function_name(part.function)})"
    return function_name(part)


def times(size: int | Sequence[int | None]) -> str:
    """Returns (3, 4) as 3×4."""
    return "×".join(map(str, (size,) if isinstance(size, int) else size))


def _factor(penalty: WeightedRegularizer) -> str:
    """Returns the factor, and what `FactorSchedule` has multiplied it by."""
    return f"{penalty.factor:g}" if penalty.scale == 1 else f"{penalty.factor:g} × {penalty.scale:g}"


def _describe(penalty: WeightedRegularizer) -> str:
    """Returns a layer's geometry in words, without what is 1."""
    if not isinstance(penalty, TakesGeometry):
        return UNKNOWN
    if penalty.input_size == ():
        return "Dense"
    words = [penalty.padding]
    for name, value in (("strides", penalty.strides), ("dilation_rate", penalty.dilation_rate)):
        if np.any(np.not_equal(value, 1)):
            words.append(f"{name} {times(value)}")
    if penalty.groups != 1:
        words.append(f"{penalty.groups} groups")
    if penalty.kind != "conv":
        words.append(penalty.kind)
    return ", ".join(words)
