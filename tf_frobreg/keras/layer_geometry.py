"""The geometry of a layer. The user repeats it, because Keras passes only the kernel."""

import functools
from collections.abc import Sequence
from typing import Any

from tf_frobreg.convolution.geometry import Convolution, Geometry, Size, check_layer_geometry

# Eager training asks for the same convolution at every step.
_convolution = functools.lru_cache(maxsize=1024)(Convolution)


class TakesGeometry:
    """Holds the geometry of a layer, one attribute per constructor argument.

    Attributes:
        input_size: Spatial size of the layer's input, an int or a tuple of one int per axis.
        strides: As given to the layer, an int or a tuple.
        padding: "same", "valid" or "circular".
        dilation_rate: As given to the layer, an int or a tuple.
        groups: As given to the layer.
        kind: "conv", "depthwise" or "transpose".
    """

    input_size: int | tuple[int, ...]
    strides: int | tuple[int, ...]
    padding: str
    dilation_rate: int | tuple[int, ...]
    groups: int
    kind: str

    def take_geometry(self, input_size: Size, geometry: Geometry) -> None:
        """Sets the attributes, or raises an error if an argument is invalid for every kernel."""
        self.input_size, checked = check_layer_geometry(input_size, geometry)
        for name, value in checked.items():
            setattr(self, name, value)

    @property
    def geometry(self) -> Geometry:
        """The keyword arguments other than `input_size`."""
        return Geometry(
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            groups=self.groups,
            kind=self.kind,
        )

    def convolution(self, kernel_shape: Sequence[int]) -> Convolution:
        """Returns the convolution with a kernel of that shape, or raises an error if they do not fit."""
        return _convolution(tuple(kernel_shape), self.input_size, **self.geometry)

    def geometry_config(self) -> dict[str, Any]:
        """Returns `input_size` and the geometry as plain values, with lists in place of tuples."""
        values = {"input_size": self.input_size, **self.geometry}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
