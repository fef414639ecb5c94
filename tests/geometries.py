"""Convolutions to test: a fixed grid and a hypothesis strategy, each with its real Keras layer."""

import dataclasses

import keras
import numpy as np
from hypothesis import strategies as st

from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import KINDS, PADDINGS


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel shape, an image and the geometry in the package's words."""

    kernel_shape: tuple
    image: tuple
    strides: int = 1
    padding: str = "same"
    dilation_rate: int = 1
    groups: int = 1
    kind: str = "conv"

    @property
    def geometry(self):
        names = ("strides", "padding", "dilation_rate", "groups", "kind")
        return {name: getattr(self, name) for name in names}

    @property
    def channels(self):
        """Channels of the layer's input."""
        first, last = self.kernel_shape[-2:]
        return {"conv": first * self.groups, "depthwise": first, "transpose": last}[self.kind]

    def kernel(self, seed=0, dtype="float64"):
        return np.random.RandomState(seed).standard_normal(self.kernel_shape).astype(dtype)

    def layer(self, kernel):
        """The real Keras layer, with this kernel and without bias."""
        rank = len(self.image)
        options = {"use_bias": False, "dtype": str(kernel.dtype)}
        if rank == 0:
            layer = keras.layers.Dense(self.kernel_shape[-1], **options)
        else:
            options |= {
                "kernel_size": self.kernel_shape[:-2],
                "strides": self.strides,
                "padding": self.padding,
                "dilation_rate": self.dilation_rate,
            }
            name = {"conv": "Conv", "depthwise": "DepthwiseConv", "transpose": "Conv"}[self.kind]
            name += f"{rank}D" + ("Transpose" if self.kind == "transpose" else "")
            if self.kind == "conv":
                options |= {"filters": self.kernel_shape[-1], "groups": self.groups}
            elif self.kind == "depthwise":
                options["depth_multiplier"] = self.kernel_shape[-1]
            else:
                options["filters"] = self.kernel_shape[-2]
            layer = getattr(keras.layers, name)(**options)
        layer.build((None, *self.image, self.channels))
        layer.set_weights([kernel])
        return layer


# What Keras itself can run: square, rectangular and even kernels, small images, every layer type.
KERAS_CASES = [
    Case((3, 3, 2, 3), (5, 6)),
    Case((3, 3, 3, 1), (5, 5), padding="valid"),
    Case((2, 4, 2, 2), (6, 5)),
    Case((4, 2, 1, 2), (5, 7), padding="valid"),
    Case((5, 3, 2, 2), (3, 2)),
    Case((7, 7, 1, 2), (2, 3)),
    Case((1, 1, 3, 2), (4, 4)),
    Case((3, 3, 2, 3), (7, 6), strides=2),
    Case((3, 3, 3, 2), (8, 8), strides=2, padding="valid"),
    Case((4, 5, 2, 2), (9, 8), strides=3),
    Case((1, 1, 2, 3), (5, 5), strides=2),
    Case((3, 3, 2, 2), (7, 6), dilation_rate=2),
    Case((3, 2, 2, 2), (7, 6), dilation_rate=3, padding="valid"),
    Case((3, 3, 2, 4), (5, 4), groups=2),
    Case((3, 3, 1, 6), (6, 4), groups=3, strides=2),
    Case((3, 2, 3), (7,)),
    Case((4, 3, 2), (9,), strides=2, padding="valid"),
    Case((3, 2, 2), (8,), dilation_rate=2),
    Case((2, 3, 2, 2, 2), (3, 4, 3)),
    Case((3, 2, 3, 1, 2), (4, 3, 5), strides=2),
    Case((5, 3), ()),
    Case((3, 6), ()),
    Case((3, 3, 3, 1), (5, 4), kind="depthwise"),
    Case((3, 3, 2, 3), (6, 5), kind="depthwise", padding="valid"),
    Case((3, 3, 3, 2), (6, 6), kind="depthwise", strides=2),
    Case((3, 2, 2), (7,), kind="depthwise"),
    Case((3, 3, 3, 2), (4, 5), kind="transpose"),
    Case((3, 3, 2, 3), (3, 4), kind="transpose", strides=2),
    Case((3, 4, 2, 2), (3, 4), kind="transpose", strides=2, padding="valid"),
    Case((2, 2, 3, 2), (3, 3), kind="transpose", strides=3, padding="valid"),
    Case((3, 2, 3), (5,), kind="transpose", strides=2),
    Case((4, 3, 2), (4,), kind="transpose", padding="valid"),
]

# Keras has no circular padding: these are checked against the slow twin only.
CIRCULAR_CASES = [
    Case((3, 3, 2, 3), (5, 6), padding="circular"),
    Case((3, 3, 3, 2), (2, 3), padding="circular"),
    Case((5, 4, 2, 2), (2, 2), padding="circular"),
    Case((3, 3, 2, 2), (7, 5), padding="circular", strides=2),
    Case((3, 3, 2, 2), (4, 5), padding="circular", dilation_rate=2),
    Case((3, 3, 2, 4), (4, 4), padding="circular", groups=2),
    Case((4, 2, 2), (3,), padding="circular"),
    Case((3, 3, 3, 1, 2), (4, 2, 3), padding="circular"),
    Case((1, 3, 2, 2), (4, 1), padding="circular"),
]


def normal(*shape, seed=1):
    """A random kernel without a geometry."""
    return np.random.RandomState(seed).randn(*shape)


def label(case):
    options = [case.kind, case.padding, f"s{case.strides}", f"d{case.dilation_rate}", f"g{case.groups}"]
    return f"{case.kernel_shape}@{case.image}-{'-'.join(options)}".replace(" ", "")


@st.composite
def cases(draw, paddings=PADDINGS, kinds=KINDS, ranks=(1, 2)):
    """Small convolutions of every kind."""
    rank = draw(st.sampled_from(ranks))
    kind = draw(st.sampled_from(kinds)) if rank else "conv"
    padding = draw(st.sampled_from(paddings))
    strides = draw(st.integers(1, 3))
    # TensorFlow has no dilated transposed convolution on CPUs to compare with.
    dilation = draw(st.integers(1, 3)) if strides == 1 and kind != "transpose" else 1
    groups = draw(st.integers(1, 2)) if kind == "conv" else 1
    size = tuple(draw(st.integers(1, 4)) for _ in range(rank))
    least = 1 if padding != "valid" or kind == "transpose" else (max(size, default=1) - 1) * dilation + 1
    image = tuple(draw(st.integers(least, max(least, 6))) for _ in range(rank))
    first, last = draw(st.integers(1, 3)), draw(st.integers(1, 3)) * groups
    return Case((*size, first, last), image, strides, padding, dilation, groups, kind)


@st.composite
def axes(draw, longest=40):
    """Axes with every stride, dilation and border, up to many times as long as the kernel."""
    stride = draw(st.integers(1, 4))
    dilation = draw(st.integers(1, 3)) if stride == 1 else 1
    kernel_size = draw(st.integers(1, 5))
    padding = draw(st.sampled_from(PADDINGS))
    shortest = (kernel_size - 1) * dilation + 1 if padding == "valid" else 1
    return Axis(draw(st.integers(shortest, longest)), kernel_size, stride, dilation, padding)
