"""The symbol of a layer: bounds on σmax for large images, without a search.

A layer without a border maps a plane wave of frequency θ to a plane wave. The matrix of this map between the
channels is the symbol at θ. M is a part of that layer's matrix, so σmax is at most the peak of the symbol. An
image that holds a wave of the peak's frequency, and fades towards the border, comes close to it.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_frobreg.convolution.apply import apply, apply_adjoint
from tf_frobreg.convolution.axis import Axis
from tf_frobreg.convolution.geometry import Convolution

CHUNK = 2**21  # complex entries of the arrays that are computed at once
FREQUENCIES = 4000  # of a torus. The peak over all frequencies is as close for larger images, and quicker


class Peak(NamedTuple):
    """The largest σ of the symbol over all frequencies, between two bounds.

    Attributes:
        lower: σ of the symbol at `frequency`.
        upper: Not below any σ of the symbol, and so not below σmax of M, up to rounding.
        frequency: θ, in radians per output of the forward convolution, one angle per axis.
        channels: `(groups, h)`. The channels of the wave: a unit vector in one group, and 0 in the others.
    """

    lower: float
    upper: float
    frequency: np.ndarray
    channels: np.ndarray


def symbol_peak(kernel: np.ndarray, conv: Convolution, accuracy: float, work: float) -> Peak | None:
    """Returns bounds on the largest σ of the symbol, or None if that takes too long.

    For a fixed vector v, ‖B(θ)v‖² is a trigonometric polynomial of degree d in each angle. At a distance δ of
    its maximum P it is at least P·cos²(dδ/2) if δ ≤ π/d, because it is not negative. (This is M. Riesz's
    inequality for the polynomial minus P/2.) So σ at the centre of a cell of half width δ bounds the peak if
    the peak lies in the cell. Cells whose bound is below a known σ are dropped, and the others are divided.

    Args:
        kernel: The kernel, in float64.
        conv: The geometry.
        accuracy: Relative distance of the two bounds at which to stop.
        work: Approximate limit on multiplications.
    """
    symbol = _Symbol(kernel, conv)
    counts = [4 * degree if degree else 1 for degree in symbol.degrees]
    half = np.array([math.pi / count for count in counts])
    angles = [np.arange(1, 2 * count, 2) * (math.pi / count) for count in counts]
    if angles:  # B(−θ) is the conjugate of B(θ)
        angles[0] = angles[0][: max(counts[0] // 2, 1)]
    if math.prod(map(len, angles)) * symbol.work > work:
        return None
    cells = np.array(list(itertools.product(*angles)))
    parts = np.array(list(itertools.product(*([-0.5, 0.5] if d else [0.0] for d in symbol.degrees))))
    lower, best = -1.0, cells[0]
    while True:
        sigma = symbol.norms(cells)
        if sigma.max() > lower:
            lower, best = float(sigma.max()), cells[np.argmax(sigma)]
        bounds = sigma / math.prod(np.cos(symbol.degrees * half / 2))
        upper = max(float(bounds.max()), lower)
        cells = cells[bounds > lower]
        work -= sigma.size * symbol.work
        if upper <= lower * (1 + accuracy) or len(cells) * len(parts) * symbol.work > work:
            return Peak(lower, upper, best / symbol.spacing, symbol.channels(best))
        cells = (cells[:, None, :] + parts * half).reshape(-1, len(symbol.degrees))
        half = np.where(symbol.degrees > 0, half / 2, half)


def torus_peak(kernel: np.ndarray, conv: Convolution, work: float) -> float | None:
    """Returns the largest σ of the symbol on a torus of which M is a part, or None if that takes too long.

    If n outputs on an axis read d + 1 steps each, they read n + d steps together. On a torus of this size no
    tap reaches around, so M is a part of the matrix of the torus. The symbol at the frequencies of the torus
    has all singular values of that matrix. For "circular" layers it is M itself, if the strides divide the
    image.

    Args:
        kernel: The kernel, in float64.
        conv: The geometry.
        work: Approximate limit on multiplications.
    """
    symbol = _Symbol(kernel, conv)
    sizes = [_torus_size(axis, int(degree)) for axis, degree in zip(conv.axes, symbol.degrees, strict=True)]
    half = [range(n // 2 + 1 if place == 0 else n) for place, n in enumerate(sizes)]  # B(−θ) as above
    count = math.prod(map(len, half))
    if count > FREQUENCIES or count * symbol.work > work:
        return None
    steps = np.array(list(itertools.product(*half)), dtype=np.float64).reshape(count, len(sizes))
    return float(symbol.norms(steps * (2 * math.pi / np.array(sizes))).max())


def wave_vector(kernel: np.ndarray, conv: Convolution, peak: Peak) -> np.ndarray:
    """Returns the wave of the peak's frequency as a column of the smaller Gram matrix.

    The wave is made on the output side of the forward convolution, where strides need no care.
    """
    wave, window = np.ones((), complex), np.ones(())
    for axis, angle in zip(conv.axes, peak.frequency, strict=True):
        position = np.arange(1, axis.output_size + 1)
        centre = (axis.output_size + 1) / 2  # real and imaginary part are then symmetric
        wave = np.multiply.outer(wave, np.exp(1j * angle * (position - centre)))
        window = np.multiply.outer(window, np.sin(math.pi * position / (axis.output_size + 1)))
    wave = np.multiply.outer(window * wave, peak.channels.ravel())
    image = max(wave.real, wave.imag, key=np.linalg.norm)[None]
    if conv.wide == conv.transposed:  # the Gram matrix belongs to the other side
        across = apply if conv.transposed else apply_adjoint
        image = across(tf.constant(kernel), tf.constant(image), conv).numpy()
    return image.reshape(-1, 1)


class _Symbol:
    """The symbol B of one kernel, as a function of the frequency.

    Attributes:
        degrees: Degree of ‖B(θ)v‖², as a trigonometric polynomial, on each axis.
        spacing: Distance of neighbouring taps on each axis, in outputs. Frequencies are in radians per tap.
        work: Approximate number of multiplications per frequency.
    """

    def __init__(self, kernel: np.ndarray, conv: Convolution):
        strides = [axis.stride if _repeats(axis) else 1 for axis in conv.axes]
        taps = _with_phases(conv.by_group(kernel, np), strides)
        *sizes, self._groups, inputs, outputs = taps.shape
        self._places = np.indices(sizes).reshape(len(sizes), math.prod(sizes))  # (axes, taps)
        self._taps = taps.reshape(self._places.shape[1], -1)
        self._block = (inputs, outputs)
        self.degrees = np.array(sizes, dtype=np.int64) - 1
        steps = [axis.stride / stride for axis, stride in zip(conv.axes, strides, strict=True)]
        self.spacing = np.array([axis.dilation for axis in conv.axes]) / steps
        self.work = self._taps.size + self._groups * inputs * outputs * min(inputs, outputs)

    def norms(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the largest σ at each of the frequencies, `(frequencies, axes)`."""
        count = max(CHUNK // max(self._places.shape[1], self._taps[0].size), 1)
        chunks = np.array_split(frequencies, range(count, len(frequencies), count))
        return np.concatenate([self._norms(chunk).max(axis=1) for chunk in chunks])

    def channels(self, frequency: np.ndarray) -> np.ndarray:
        """Returns the unit vector on the output side of the largest σ, `(groups, outputs)`."""
        blocks = self._blocks(frequency[None])[0]
        group = self._norms(frequency[None])[0].argmax()
        found = np.zeros((self._groups, self._block[1]), dtype=np.complex128)
        found[group] = np.linalg.svd(blocks[group], full_matrices=False)[2][0].conj()
        return found

    def _norms(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the largest σ of each group, `(frequencies, groups)`."""
        blocks = self._blocks(frequencies)
        if 1 in self._block:
            return np.linalg.norm(blocks, axis=(2, 3))
        if self._block[0] < self._block[1]:
            blocks = np.swapaxes(blocks, 2, 3)
        # The threads of NumPy work on one block together: on a busy machine that takes 10 times as long.
        with tf.device("CPU"):
            squares = tf.linalg.eigvalsh(tf.matmul(blocks, blocks, adjoint_a=True)).numpy()[..., -1]
        return np.sqrt(np.maximum(squares.real, 0.0))

    def _blocks(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns B of each group, `(frequencies, groups, inputs, outputs)`."""
        phases = np.exp(-1j * (frequencies @ self._places))
        return (phases @ self._taps).reshape(len(frequencies), self._groups, *self._block)


def _torus_size(axis: Axis, degree: int) -> int:
    """Returns how many frequencies one axis of the torus of `torus_peak` has. The symbol has this degree."""
    if degree == 0:
        return 1  # the symbol is the same at all frequencies
    if axis.padding != "circular":  # pixels that a dilated kernel connects are one dilation apart
        return -(-axis.output_size // axis.dilation) + degree
    if not _repeats(axis):
        return axis.input_size
    return axis.output_size // math.gcd(axis.output_size, axis.dilation)


def _repeats(axis: Axis) -> bool:
    """Returns whether all outputs are one stride apart.

    On a circular image that the stride does not divide, the last output and the first are closer. M is then a
    part of the layer without strides only.
    """
    return axis.padding != "circular" or axis.input_size % axis.stride == 0


def _with_phases(taps: np.ndarray, strides: list[int]) -> np.ndarray:
    """Returns the taps `(*kernel_size, groups, g, h)` of a convolution without strides and with more inputs.

    The inputs between two steps of a stride, its phases, become channels.
    """
    rank = len(strides)
    added = [(0, -size % stride) for size, stride in zip(taps.shape, strides, strict=False)]
    taps = np.pad(taps, [*added, (0, 0), (0, 0), (0, 0)])
    sizes = [part for n, s in zip(taps.shape, strides, strict=False) for part in (n // s, s)]
    taps = taps.reshape(*sizes, *taps.shape[rank:])
    steps, phases = range(0, 2 * rank, 2), range(1, 2 * rank, 2)
    taps = taps.transpose(*steps, 2 * rank, *phases, 2 * rank + 1, 2 * rank + 2)
    return taps.reshape(*taps.shape[: rank + 1], -1, taps.shape[-1])
