"""The geometry of one convolution: which output reads which input through which kernel entry.

Everything else in the package, explicit matrix and closed form alike, follows from the taps of each
spatial axis that are listed here.
"""

import dataclasses
import math
import reprlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self, TypedDict

import numpy as np

from tf_frobreg.checks import check_integer

__all__ = ["Axis", "Convolution", "Geometry", "Taps", "check_geometry"]

PADDINGS = ("same", "valid", "circular")
KINDS = ("conv", "depthwise", "transpose")
LAYERS = {2: "Dense", 3: "Conv1D", 4: "Conv2D", 5: "Conv3D"}  # by the rank of the kernel


class Geometry(TypedDict, total=False):
    """The keyword arguments that say how a kernel is applied; see `Convolution`."""

    strides: int | Sequence[int]
    padding: str
    dilation_rate: int | Sequence[int]
    groups: int
    kind: str


class Taps(NamedTuple):
    """Output `outputs[t]` reads input `inputs[t]` through kernel entry `entries[t]`, for every t."""

    outputs: np.ndarray
    inputs: np.ndarray
    entries: np.ndarray


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution."""

    input_size: int
    kernel_size: int
    stride: int
    dilation: int
    padding: str

    @property
    def span(self) -> int:
        """Inputs from the first to the last one that the dilated kernel covers."""
        return (self.kernel_size - 1) * self.dilation + 1

    @property
    def output_size(self) -> int:
        """Number of outputs."""
        if self.padding == "valid":
            return (self.input_size - self.span) // self.stride + 1
        return -(-self.input_size // self.stride)

    @property
    def pad(self) -> int:
        """Positions before input 0 that output 0 would read."""
        if self.padding == "valid":
            return 0
        if self.padding == "circular":
            return (self.span - 1) // 2
        # Keras' "same" centres what the strides leave over; an odd rest goes behind the image.
        total = max((self.output_size - 1) * self.stride + self.span - self.input_size, 0)
        return total // 2

    @property
    def num_taps(self) -> int:
        """Length of `taps`, without making them."""
        if self.padding == "circular":
            return self.output_size * self.kernel_size
        offsets = (p * self.dilation - self.pad for p in range(self.kernel_size))
        # Outputs o with 0 ≤ o·stride + offset < input_size, for each kernel entry.
        return sum(
            max(
                min(self.output_size, -((offset - self.input_size) // self.stride))
                - max(0, -(offset // self.stride)),
                0,
            )
            for offset in offsets
        )

    @cached_property
    def taps(self) -> Taps:
        """All (output, input, entry) triples with input = output·stride + entry·dilation − pad."""
        outputs, entries = np.indices((self.output_size, self.kernel_size)).reshape(2, -1)
        inputs = outputs * self.stride + entries * self.dilation - self.pad
        if self.padding == "circular":
            return Taps(outputs, inputs % self.input_size, entries)
        inside = (inputs >= 0) & (inputs < self.input_size)
        return Taps(outputs[inside], inputs[inside], entries[inside])


@dataclasses.dataclass(frozen=True)
class Convolution:
    """How a kernel of one shape acts on an image: all of M but the values of the kernel.

    Args:
        kernel_shape: `(*kernel_size, in_channels / groups, filters)` for `kind="conv"` (any number of
            spatial axes; none is a `Dense` layer), `(*kernel_size, channels, depth_multiplier)` for
            "depthwise", `(*kernel_size, filters, in_channels)` for "transpose": the shapes Keras uses.
        input_size: Spatial size of the layer's input, an int or one int per axis.
        strides: As in Keras, an int or one int per axis.
        padding: "same" (zeros, Keras' rule), "valid", or "circular" (the image repeats itself; output
            size as for "same").
        dilation_rate: As in Keras, an int or one int per axis; not together with strides above 1.
        groups: As in Keras' `Conv2D(groups=...)`; only for `kind="conv"`.
        kind: "conv", "depthwise" or "transpose" (the layers `Conv*D`, `DepthwiseConv*D`,
            `Conv*DTranspose`; kernels of the same rank mean different things in each).

    Raises:
        ValueError, TypeError: Where an argument is not as above. The message names the argument.
    """

    kernel_shape: tuple[int, ...]
    input_size: tuple[int, ...]
    strides: tuple[int, ...] = 1
    padding: str = "same"
    dilation_rate: tuple[int, ...] = 1
    groups: int = 1
    kind: str = "conv"

    def __post_init__(self):
        shape = _check_shape(self.kernel_shape)
        if not isinstance(self.padding, str) or self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {PADDINGS}. Received: padding={self.padding!r}")
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}. Received: kind={self.kind!r}")
        rank = len(shape) - 2
        if rank == 0 and self.kind != "conv":
            raise ValueError(f"kind={self.kind!r} needs a spatial axis. Received: kernel.shape={shape}")
        set_ = object.__setattr__  # the class is frozen to be hashable; this normalises once, at birth
        set_(self, "kernel_shape", shape)
        for name in ("input_size", "strides", "dilation_rate"):
            set_(self, name, _per_axis(name, getattr(self, name), rank))
        set_(self, "groups", check_integer("groups", self.groups))
        self._check_combinations()

    @classmethod
    def of(cls, kernel_shape, input_size, geometry: Geometry) -> Self:
        """The convolution of a caller's `**geometry`, whose names are checked."""
        _check_names(geometry)
        return cls(kernel_shape, input_size, **geometry)

    def _check_combinations(self):
        if max(self.strides, default=1) > 1 and max(self.dilation_rate, default=1) > 1:
            raise ValueError(
                "strides above 1 cannot be combined with dilation_rate above 1, as in Keras. "
                f"Received: strides={self.strides}, dilation_rate={self.dilation_rate}"
            )
        if self.groups > 1 and self.kind != "conv":
            raise ValueError(
                f'groups above 1 need kind="conv". Received: groups={self.groups}, kind={self.kind!r}'
            )
        if self.kind == "conv" and self.kernel_shape[-1] % self.groups:
            raise ValueError(
                "groups must divide the filters, the last axis of the kernel. "
                f"Received: groups={self.groups}, kernel.shape={self.kernel_shape}"
            )
        for n, axis in zip(self.input_size, self.axes, strict=True):
            if self.padding == "valid" and self.kind != "transpose" and n < axis.span:
                raise ValueError(
                    'input_size must be at least the (dilated) kernel size when padding="valid". Received: '
                    f"input_size={self.input_size}, kernel.shape={self.kernel_shape}, "
                    f"dilation_rate={self.dilation_rate}"
                )

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Spatial part of the kernel's shape."""
        return self.kernel_shape[:-2]

    @property
    def transposed(self) -> bool:
        """Whether the layer's M is the transpose of the convolution that `axes` describes."""
        return self.kind == "transpose"

    @property
    def geometry(self) -> Geometry:
        """The keyword arguments that made this geometry."""
        names = Geometry.__annotations__
        return Geometry(**{name: getattr(self, name) for name in names})

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """One `Axis` per spatial axis, of the underlying convolution where `transposed`."""
        parts = zip(self.input_size, self.kernel_size, self.strides, self.dilation_rate, strict=True)
        axes = (Axis(n, k, s, d, self.padding) for n, k, s, d in parts)
        if not self.transposed:
            return tuple(axes)
        # A transposed convolution reads n positions and writes what a convolution would have read.
        return tuple(
            dataclasses.replace(
                a,
                input_size=a.input_size * a.stride
                + (max(a.span - a.stride, 0) if self.padding == "valid" else 0),
            )
            for a in axes
        )

    @property
    def blocks(self) -> tuple[int, int, int]:
        """(groups, g, h): M is block diagonal, each block a convolution of g channels to h."""
        g, h = self.kernel_shape[-2:]
        return (g, 1, h) if self.kind == "depthwise" else (self.groups, g, h // self.groups)

    def by_group(self, kernel, xp):
        """The kernel as `(*kernel_size, groups, g, h)`; `xp` is the module of its arrays (tf or np)."""
        groups, g, h = self.blocks
        if groups == 1 or g == 1:
            return xp.reshape(kernel, (*self.kernel_size, groups, g, h))
        rank = len(self.kernel_size)
        split = xp.reshape(kernel, (*self.kernel_size, g, groups, h))
        return xp.transpose(split, (*range(rank), rank + 1, rank, rank + 2))

    def from_groups(self, blocks, xp):
        """Inverse of `by_group`, whatever the shape of the spatial axes."""
        groups, g, h = self.blocks
        blocks = xp.reshape(blocks, (-1, groups, g, h))
        if self.groups > 1:  # a depthwise kernel holds its groups in front of the filters already
            blocks = xp.transpose(blocks, (0, 2, 1, 3))
        return xp.reshape(blocks, self.kernel_shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of M."""
        groups, g, h = self.blocks
        ends = (
            math.prod(a.output_size for a in self.axes) * groups * h,
            math.prod(a.input_size for a in self.axes) * groups * g,
        )
        return ends[::-1] if self.transposed else ends


def check_geometry(input_size, geometry: Geometry) -> dict[str, Any]:
    """Returns `input_size` and all other arguments of `Convolution` as plain ints, lists and strings.

    Raises as far as can be told before the kernel is known.
    """
    _check_names(geometry)
    defaults = {field.name: field.default for field in dataclasses.fields(Convolution)[2:]}
    arguments = {"input_size": input_size, **defaults, **geometry}
    named = {name: len(value) for name, value in arguments.items() if _is_sequence(value)}
    name, rank = next(iter(named.items()), ("input_size", 2))
    if rank + 2 not in LAYERS:
        raise ValueError(
            f"{name} must have at most 3 entries, one per spatial axis. "
            f"Received: {name}={reprlib.repr(arguments[name])}"
        )
    groups = check_integer("groups", arguments["groups"])
    Convolution((1,) * (rank + 1) + (groups,), **arguments)

    def plain(value):
        if _is_sequence(value):
            return [int(n) for n in value]
        return value if isinstance(value, str) else int(value)

    return {name: plain(value) for name, value in arguments.items()}


def _check_names(geometry):
    for name in geometry.keys() - Geometry.__annotations__.keys():
        raise TypeError(
            f"unknown argument {name!r}. A convolution is given by {', '.join(Geometry.__annotations__)}."
        )


def _check_shape(kernel_shape: Any) -> tuple[int, ...]:
    """The shape as plain ints, if it is that of a kernel."""
    try:
        shape = tuple(n if n is None else check_integer("kernel_shape", n, minimum=0) for n in kernel_shape)
    except TypeError:
        raise TypeError(
            "kernel_shape must be a sequence of integers, such as kernel.shape. "
            f"Received: kernel_shape={reprlib.repr(kernel_shape)}"
        ) from None
    if len(shape) not in LAYERS:
        raise ValueError(
            "kernel must have rank 4, (kh, kw, in_channels, filters), or that of another layer: 3 for "
            f"Conv1D, 5 for Conv3D, 2 for Dense. Received: kernel.shape={shape}"
        )
    if None in shape or 0 in shape:
        raise ValueError(
            f"kernel must have a known shape and must not be empty. Received: kernel.shape={shape}"
        )
    return shape


def _per_axis(name: str, value: Any, rank: int) -> tuple[int, ...]:
    if not _is_sequence(value):
        number = check_integer(name, value)
        if rank == 0 and name == "input_size":
            raise ValueError(
                "a kernel of rank 2 has no spatial axis: input_size must be () for a Dense kernel; that of a "
                f"Conv2D has rank 4, and a LoRA factor is no kernel. Received: {name}={value!r}"
            )
        return (number,) * rank
    if len(value) != rank:
        wanted = (
            f"an int or {rank} ints, one per spatial axis of the kernel, without channels" if rank else "()"
        )
        lora = (
            ""
            if rank
            else ", for a kernel of rank 2, which a Dense layer has, or a factor of LoRA: detach before it"
        )
        raise ValueError(f"{name} must be {wanted}{lora}. Received: {name}={reprlib.repr(value)}")
    return tuple(check_integer(name, n) for n in value)


def _is_sequence(value: Any) -> bool:
    return np.ndim(value) > 0  # lists, tuples, arrays, tensors and TensorShapes alike
