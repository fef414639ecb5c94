"""One spatial axis of a convolution, and its taps: which output reads which input through which kernel entry.

Everything else in the package follows from the taps.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import numpy as np


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
        """Number of inputs that the dilated kernel covers."""
        return (self.kernel_size - 1) * self.dilation + 1

    @property
    def output_size(self) -> int:
        """Number of outputs."""
        if self.padding == "valid":
            return (self.input_size - self.span) // self.stride + 1
        return -(-self.input_size // self.stride)

    @property
    def pad(self) -> int:
        """Number of positions before input 0 that output 0 reads."""
        if self.padding == "valid":
            return 0
        if self.padding == "circular":
            return (self.span - 1) // 2
        # Keras' "same" splits the padding evenly. If it is odd, the extra position comes after the image.
        total = max((self.output_size - 1) * self.stride + self.span - self.input_size, 0)
        return total // 2

    @property
    def num_taps(self) -> int:
        """Length of `taps`, computed without listing them."""
        if self.padding == "circular":
            return self.output_size * self.kernel_size
        offsets = (p * self.dilation - self.pad for p in range(self.kernel_size))
        # For each kernel entry, count the outputs o with 0 ≤ o·stride + offset < input_size.
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
        """All (output, input, entry) with input = output·stride + entry·dilation − pad inside the image.

        With "circular" padding the input is taken modulo the image size.
        """
        outputs, entries = np.indices((self.output_size, self.kernel_size)).reshape(2, -1)
        inputs = outputs * self.stride + entries * self.dilation - self.pad
        if self.padding == "circular":
            return Taps(outputs, inputs % self.input_size, entries)
        inside = (inputs >= 0) & (inputs < self.input_size)
        return Taps(outputs[inside], inputs[inside], entries[inside])

    def shortened(self, spans: int = 2) -> "Axis":
        """Returns an axis with the same border, and an interior of a few periods of the stride.

        An axis longer than a few kernel widths only repeats its interior. With `spans=2` the result has all
        sets of taps that a pixel, or a pair of pixels, can have. With `spans=4` it also has a pixel at which
        none of the pairs is near the border.
        """
        short = spans * self.span + 2 * self.stride
        repeats = (self.input_size - short) // self.stride
        if repeats <= 1:
            return self
        return dataclasses.replace(self, input_size=self.input_size - repeats * self.stride)
