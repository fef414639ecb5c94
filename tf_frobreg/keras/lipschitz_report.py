"""The result of `lipschitz_bound`, as numbers and as a table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_frobreg.tables import Report, Row, count, digits

__all__ = ["LipschitzBound"]


class LayerRow(NamedTuple):
    """One call of a layer in a model.

    Attributes:
        name: Name of the layer, after the names of the models that hold it: "block/conv".
        kind: Its class, and its activation if it has one.
        bound: How much the layer stretches at most. For a layer that merges several inputs, the norm of its
            output is at most a combination of theirs, and this is None.
        from_input: How much everything from the model's inputs to the layer's output stretches at most.
        method: How σmax of the kernel was bounded: "decomposition", "torus", "symbol" or "taps".
            "" for a layer without a kernel.
    """

    name: str
    kind: str
    bound: float | None
    from_input: float
    method: str


class Head(NamedTuple):
    """The last `Dense` layer of a model, if only a scale follows it.

    Attributes:
        bound: A Lipschitz constant of the map from the model's inputs to the layer's input.
        kernel: `(features, classes)`. Its kernel, times the scale.
    """

    bound: float
    kernel: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LipschitzBound(Report):
    """An upper bound of a model's Lipschitz constant, from `lipschitz_bound`. Prints as a table.

    `float(bound)` is the number: if x and y are inputs, ‖f(x) − f(y)‖₂ ≤ value·‖x − y‖₂.

    Attributes:
        value: The bound, in units of σ: output per input.
        layers: One row per call of a layer, in the order of the calls.
        input_shapes: The shapes of the model's inputs, with the batch. The bound holds for them alone.
        head: The last `Dense` layer, if the model ends in it. `certified_radius` uses it.

    Example:
        >>> import keras
        >>> from tf_frobreg import lipschitz_bound
        >>> model = keras.Sequential([
        ...     keras.Input((4, 4, 1)),
        ...     keras.layers.Conv2D(2, 1, kernel_initializer="ones", activation="relu", name="conv"),
        ...     keras.layers.GlobalAveragePooling2D(name="mean")])
        >>> bound = lipschitz_bound(model)
        >>> print(bound)
        Lipschitz constant at most 0.3536, 2 layers
        <BLANKLINE>
        layer  kind                    bound  from input  σmax by
        ───────────────────────────────────────────────────────────────
        conv   Conv2D, relu            1.415       1.415  decomposition
        mean   GlobalAveragePooling2D   0.25      0.3536
        >>> bound
        LipschitzBound: at most 0.3536, 2 layers
        >>> [round(record["bound"], 3) for record in bound.records()]
        [1.414, 0.25]
    """

    _left_columns = ("layer", "kind", "σmax by")
    _optional_columns = ("σmax by", "kind")

    value: float
    layers: list[LayerRow]
    input_shapes: Sequence[tuple[int | None, ...]]
    head: Head | None = None

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def records(self) -> list[dict[str, Any]]:
        """Returns flat dicts, one per call of a layer: `pandas.DataFrame(bound.records())` is a table.

        Returns:
            Dicts with "layer", "kind", "bound", "from_input" and "method". What does not exist is None.
        """
        return [
            {
                "layer": row.name,
                "kind": row.kind,
                "bound": row.bound,
                "from_input": row.from_input,
                "method": row.method or None,
            }
            for row in self.layers
        ]

    def __repr__(self) -> str:
        return f"LipschitzBound: at most {self._summary()}"

    def _summary(self) -> str:
        return f"{_rounded_up(self.value)}, {count(len(self.layers), 'layer')}"

    def _parts(self) -> tuple[str, list[Row], list[str]]:
        rows: list[Row] = [
            {
                "layer": row.name,
                "kind": row.kind,
                "bound": _rounded_up(row.bound),
                "from input": _rounded_up(row.from_input),
                "σmax by": row.method,
            }
            for row in self.layers
        ]
        return f"Lipschitz constant at most {self._summary()}", rows, []


def _rounded_up(value: float | None) -> str:
    """Returns four digits that are not below the value, except by less than 1e-9 of it."""
    if not value or not math.isfinite(value):
        return digits(value)
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    return digits(math.ceil(value / step * (1 - 1e-9)) * step)
