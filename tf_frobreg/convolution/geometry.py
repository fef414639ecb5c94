"""The geometry of one convolution: its shapes, its axes and its groups, checked once."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, Self, TypedDict

import numpy as np

from tf_frobreg.checks import check_choice, check_integer, did_you_mean, entries_of, received
from tf_frobreg.convolution.axis import Axis

__all__ = ["Convolution", "Geometry"]

PADDINGS = ("same", "valid", "circular")
KINDS = ("conv", "depthwise", "transpose")
LAYERS = {2: "Dense", 3: "Conv1D", 4: "Conv2D", 5: "Conv3D"}  # by the rank of the kernel
NO_SPATIAL_AXIS = (
    "for a Dense kernel; this kernel has rank 2, and a Conv2D kernel has rank 4. If it is a LoRA factor, "
    "detach before enable_lora"
)

Size = int | Sequence[int]  # one int for all spatial axes, or one per axis
Side = Literal["input", "output"]


class Geometry(TypedDict, total=False):
    """The keyword arguments that say how a layer applies its kernel.

    Every function that takes a kernel and an `input_size` takes these too. `Convolution` explains them.
    `clip_singular_values` refuses strides above 1.

    Example:
        >>> strided = Geometry(strides=2, padding="valid")
        >>> print(Convolution((3, 3, 1, 1), 7, **strided).shape)
        (9, 49)
    """

    strides: Size
    padding: str
    dilation_rate: Size
    groups: int
    kind: str


@dataclasses.dataclass(frozen=True, init=False)
class Convolution:
    """The linear map M of one layer, except for the values of its kernel.

    Args:
        kernel_shape: The kernel's shape as Keras stores it, with one to three spatial axes, or none for
            `Dense`. `(*kernel_size, in_channels / groups, filters)` for `kind="conv"`;
            `(*kernel_size, channels, depth_multiplier)` for "depthwise";
            `(*kernel_size, filters, in_channels)` for "transpose".
        input_size: Spatial size of the layer's input, an int or one int per axis.
        strides: As in Keras, an int or one int per axis.
        padding: "same" (zeros, by Keras' rule), "valid", or "circular". With "circular" the image wraps
            around, and the output is as large as with "same".
        dilation_rate: As in Keras, an int or one int per axis. Cannot be combined with
            strides above 1.
        groups: As in Keras' `Conv2D(groups=...)`. Only for `kind="conv"`.
        kind: "conv", "depthwise" or "transpose", for the layers `Conv*D`, `DepthwiseConv*D` and
            `Conv*DTranspose`. Their kernels have the same rank and different meanings.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
        TypeError: If an argument has the wrong type.

    Example:
        >>> conv = Convolution((3, 3, 2, 4), input_size=10, strides=2, padding="valid")
        >>> conv.input_shape, conv.output_shape, conv.shape
        ((10, 10, 2), (4, 4, 4), (64, 200))
    """

    kernel_shape: tuple[int, ...]
    input_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str
    dilation_rate: tuple[int, ...]
    groups: int
    kind: str

    def __init__(
        self,
        kernel_shape: Sequence[int],
        input_size: Size,
        strides: Size = 1,
        padding: str = "same",
        dilation_rate: Size = 1,
        groups: int = 1,
        kind: str = "conv",
    ) -> None:
        geometry = check_geometry(
            Geometry(strides=strides, padding=padding, dilation_rate=dilation_rate, groups=groups, kind=kind)
        )
        shape = _check_shape(kernel_shape)
        rank = len(shape) - 2
        if rank == 0 and kind != "conv":
            raise ValueError(f"kind={kind!r} needs a spatial axis. Received: kernel.shape={shape}")
        values = {"kernel_shape": shape, "input_size": check_size("input_size", input_size), **geometry}
        for name in ("input_size", "strides", "dilation_rate"):
            values[name] = _per_axis(name, values[name], rank)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen
        self._check_fit()

    @classmethod
    def of(cls, kernel_shape: Sequence[int], input_size: Size, geometry: Geometry) -> Self:
        """Returns the convolution that a caller's `**geometry` describes, or raises an error."""
        _check_names(geometry)
        return cls(kernel_shape, input_size, **geometry)

    @classmethod
    def from_layer(cls, layer: Any, input_size: Size | None = None, part: str | None = None) -> "Convolution":
        """Returns how a built Keras layer applies its kernel.

        Args:
            layer: A convolution of any kind, or `Dense`.
            input_size: Spatial size of the layer's input, an int or one int per axis. None takes the size
                that Keras recorded, if the layer has been applied to images of one size. `model_spectrum` and
                `attach_regularizers` read the sizes in a whole model.
            part: "depthwise" or "pointwise", for the two kernels of a separable convolution.

        Returns:
            The convolution.

        Raises:
            TypeError: If `layer` is not such a layer.
            ValueError: If the package cannot treat the layer, or if its image size is not known.

        Example:
            >>> import keras
            >>> layer = keras.layers.Conv2D(4, 3, strides=2)
            >>> _ = keras.Sequential([keras.Input((10, 10, 1)), layer])
            >>> Convolution.from_layer(layer).shape
            (64, 100)
        """
        from tf_frobreg.convolution.layer import read_layer  # that module imports this one

        return read_layer(layer, input_size, part).conv

    def _check_fit(self) -> None:
        """Checks what depends on the kernel's shape."""
        if self.kind == "conv" and self.kernel_shape[-1] % self.groups:
            raise ValueError(
                "groups must divide the filters, the last axis of the kernel. "
                f"Received: groups={self.groups}, kernel.shape={self.kernel_shape}"
            )
        for n, axis in zip(self.input_size, self.axes, strict=True):
            if self.padding == "valid" and self.kind != "transpose" and n < axis.span:
                raise ValueError(
                    'input_size must be at least the (dilated) kernel size if padding="valid". Received: '
                    f"input_size={self.input_size}, kernel.shape={self.kernel_shape}, "
                    f"dilation_rate={self.dilation_rate}"
                )

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Spatial part of the kernel's shape."""
        return self.kernel_shape[:-2]

    @property
    def transposed(self) -> bool:
        """Whether M is the transpose of the convolution that `axes` describe."""
        return self.kind == "transpose"

    @property
    def geometry(self) -> Geometry:
        """The keyword arguments other than `kernel_shape` and `input_size`."""
        return Geometry(
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            groups=self.groups,
            kind=self.kind,
        )

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The spatial axes. If `transposed`, they belong to the convolution whose transpose is M."""
        parts = zip(self.input_size, self.kernel_size, self.strides, self.dilation_rate, strict=True)
        axes = tuple(Axis(n, k, s, d, self.padding) for n, k, s, d in parts)
        if not self.transposed:
            return axes
        # A transposed convolution reads n positions and writes those that a convolution would have read.
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
        """(groups, g, h): M is block diagonal, and each block is a convolution of g channels to h."""
        g, h = self.kernel_shape[-2:]
        return (g, 1, h) if self.kind == "depthwise" else (self.groups, g, h // self.groups)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image that M is applied to, `(*size, channels)`."""
        return self._ends()[1 if self.transposed else 0]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one image that comes out of M, `(*size, channels)`."""
        return self._ends()[0 if self.transposed else 1]

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of M."""
        return math.prod(self.output_shape), math.prod(self.input_shape)

    @property
    def wide(self) -> bool:
        """Whether M has fewer rows than columns. MMᵀ is then its smaller Gram matrix, otherwise MᵀM is."""
        rows, columns = self.shape
        return rows < columns

    @property
    def gram_side(self) -> Side:
        """Whether rows of the smaller Gram matrix are inputs or outputs of the convolution in `axes`."""
        return "output" if self.wide != self.transposed else "input"

    def _ends(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns (input shape, output shape) of the convolution that `axes` describe."""
        groups, g, h = self.blocks
        return (
            (*(a.input_size for a in self.axes), groups * g),
            (*(a.output_size for a in self.axes), groups * h),
        )

    def by_group(self, kernel: Any, xp: Any) -> Any:
        """Returns the kernel as `(*kernel_size, groups, g, h)`. `xp` has `reshape` and `transpose`."""
        groups, g, h = self.blocks
        if groups == 1 or g == 1:
            return xp.reshape(kernel, (*self.kernel_size, groups, g, h))
        rank = len(self.kernel_size)
        split = xp.reshape(kernel, (*self.kernel_size, g, groups, h))
        return xp.transpose(split, (*range(rank), rank + 1, rank, rank + 2))

    def from_groups(self, blocks: Any, xp: Any) -> Any:
        """Inverts `by_group`, for any shape of the spatial axes."""
        groups, g, h = self.blocks
        if self.groups > 1:  # a depthwise kernel already has its groups in front of the filters
            blocks = xp.transpose(xp.reshape(blocks, (-1, groups, g, h)), (0, 2, 1, 3))
        return xp.reshape(blocks, self.kernel_shape)


def check_geometry(geometry: Geometry) -> dict[str, Any]:
    """Returns all keyword arguments of a `Geometry`, defaults included, as plain ints, tuples and strings.

    Checks everything that does not depend on the kernel's shape and the image.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.
    """
    _check_names(geometry)
    padding = geometry.get("padding", "same")
    padding = check_choice("padding", padding.lower() if isinstance(padding, str) else padding, PADDINGS)
    kind = check_choice("kind", geometry.get("kind", "conv"), KINDS)
    strides = check_size("strides", geometry.get("strides", 1))
    dilation_rate = check_size("dilation_rate", geometry.get("dilation_rate", 1))
    groups = check_integer("groups", geometry.get("groups", 1))
    if np.max(strides, initial=1) > 1 and np.max(dilation_rate, initial=1) > 1:
        raise ValueError(
            "strides above 1 cannot be combined with dilation_rate above 1, as in Keras. "
            f"Received: strides={strides}, dilation_rate={dilation_rate}"
        )
    if groups > 1 and kind != "conv":
        raise ValueError(f'groups above 1 need kind="conv". Received: groups={groups}, kind={kind!r}')
    return {
        "strides": strides,
        "padding": padding,
        "dilation_rate": dilation_rate,
        "groups": groups,
        "kind": kind,
    }


def check_layer_geometry(
    input_size: Size, geometry: Geometry
) -> tuple[int | tuple[int, ...], dict[str, Any]]:
    """Returns (input_size, `check_geometry(geometry)`) of a layer whose kernel is not known yet.

    Raises:
        ValueError: If an argument is invalid for every kernel. The message names the argument.
    """
    checked = check_geometry(geometry)
    size = check_size("input_size", input_size)
    per_axis = {"input_size": size} | {name: checked[name] for name in ("strides", "dilation_rate")}
    sequences = [(name, value) for name, value in per_axis.items() if isinstance(value, tuple)]
    for name, value in sequences:
        if len(value) > max(LAYERS) - 2:
            raise ValueError(
                f"{name} must have at most 3 entries, one per spatial axis, without batch and channels. "
                f"Received: {received(name, value)}"
            )
        first, reference = sequences[0]
        if len(value) != len(reference):
            raise ValueError(
                f"{name} must be an int or {len(reference)} ints, one per entry of {first}. "
                f"Received: {name}={value}, {first}={reference}"
            )
    if size == () and checked["kind"] != "conv":
        raise ValueError(f"kind={checked['kind']!r} needs a spatial axis. Received: input_size=()")
    return size, checked


def _check_names(geometry: Geometry) -> None:
    """Raises an error if `geometry` has a key that `Geometry` does not have."""
    for name in geometry.keys() - Geometry.__annotations__.keys():
        raise TypeError(
            f"unknown argument {name!r}{did_you_mean(name, Geometry.__annotations__)}. A convolution is "
            f"given by {', '.join(Geometry.__annotations__)}."
        )


def _check_shape(kernel_shape: Any) -> tuple[int, ...]:
    """Returns the shape as plain ints, or raises an error if no kernel has it."""
    try:
        entries = entries_of(kernel_shape)
        if entries is None:
            raise TypeError
        shape = tuple(n if n is None else check_integer("kernel_shape", n, minimum=0) for n in entries)
    except TypeError:
        raise TypeError(
            "kernel_shape must be a sequence of integers, such as kernel.shape. "
            f"Received: {received('kernel_shape', kernel_shape)}"
        ) from None
    if len(shape) not in LAYERS:
        raise ValueError(
            "kernel must have rank 4, (kh, kw, in_channels, filters), or the rank of another layer's kernel: "
            f"3 for Conv1D, 5 for Conv3D, 2 for Dense. Received: kernel.shape={shape}"
        )
    known = tuple(n for n in shape if n)  # without None and 0
    if len(known) < len(shape):
        raise ValueError(
            f"kernel must have a known shape and must not be empty. Received: kernel.shape={shape}"
        )
    return known


def check_size(name: str, value: Any) -> int | tuple[int, ...]:
    """Returns an int or a tuple of ints, or raises an error that names the argument."""
    sizes = entries_of(value)
    if sizes is None:
        return check_integer(name, value)
    if any(n is None for n in sizes):  # as in the shape of a batch, (None, 28, 28, 1)
        raise TypeError(
            f"{name} must hold one integer per spatial axis, without batch and channels. "
            f"Received: {received(name, sizes)}"
        )
    return tuple(check_integer(name, n) for n in sizes)


def _per_axis(name: str, size: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Returns one int per spatial axis of a size that `check_size` has checked."""
    if isinstance(size, int):
        if rank == 0 and name == "input_size":
            raise ValueError(f"input_size must be () {NO_SPATIAL_AXIS}. Received: {name}={size}")
        return (size,) * rank
    if len(size) != rank:
        wanted = (
            f"an int or {rank} ints, one per spatial axis of the kernel" if rank else f"() {NO_SPATIAL_AXIS}"
        )
        hint = ""
        if 0 < rank == len(size) - 1:
            hint = f" (write {size[:-1]}, without channels)"
        elif 0 < rank == len(size) - 2:
            hint = f" (write {size[1:-1]}, without batch and channels)"
        raise ValueError(f"{name} must be {wanted}. Received: {received(name, size)}{hint}")
    return size
