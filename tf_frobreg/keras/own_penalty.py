"""The penalty that a kernel has already: whether it suits the layer, and how to measure the kernel."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from tf_frobreg.checks import enumeration
from tf_frobreg.convolution.geometry import Convolution
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.keras.read_layers import LayerKernel
from tf_frobreg.keras.regularizers import FrobeniusRegularizer, ReshapedRegularizer, SpectralRegularizer
from tf_frobreg.keras.sum_regularizer import regularizer_parts

WITH_ALPHA = (FrobeniusRegularizer, SpectralRegularizer, ReshapedRegularizer)


def own_penalty(
    kernel: LayerKernel,
) -> FrobeniusRegularizer | SpectralRegularizer | ReshapedRegularizer | None:
    """Returns the penalty that gives a kernel its α, also one in a sum. None if it has none.

    It is the first `FrobeniusRegularizer`, or else the first other penalty of this package with an α. The
    regularizer of the kernel's variable is the one that counts. If the layer computes its kernel, for example
    with LoRA, the layer's regularizer is taken.
    """
    variable = kernel.variable
    if variable is not None:
        regularizer = variable.regularizer
    else:
        regularizer = getattr(kernel.layer, kernel.regularizer, None)
    penalties = [part for part in regularizer_parts(regularizer) if isinstance(part, WITH_ALPHA)]
    frobenius = (part for part in penalties if isinstance(part, FrobeniusRegularizer))
    return next(frobenius, penalties[0] if penalties else None)


def penalised_convolution(penalty: TakesGeometry, kernel: LayerKernel) -> Convolution | None:
    """Returns the layer's geometry at the image size that a penalty is for.

    Returns None if the penalty is for none of the sizes that the layer sees, or for another geometry.
    """
    sizes: Any = (kernel.conv.input_size, *kernel.other_sizes)
    convs = (dataclasses.replace(kernel.conv, input_size=size) for size in sizes)
    return next((conv for conv in convs if is_for(penalty, conv)), None)


def is_for(penalty: TakesGeometry, conv: Convolution) -> bool:
    """Returns whether a penalty is that of a layer's own M, or of its operator without border.

    Arguments that differ without an effect on M do not count: the padding of a 1×1 kernel, for example.
    """
    try:
        own = penalty.convolution(conv.kernel_shape)
        if own.padding == "circular":
            own = dataclasses.replace(own, padding=conv.padding)
    except ValueError:  # they do not fit the kernel's shape
        return False
    return _matrix(own) == _matrix(conv)


def _matrix(conv: Convolution) -> Any:
    """Returns what M depends on, in a form that can be compared."""
    axes = [(axis.input_size, axis.output_size, axis.stride, axis.pad, axis.span) for axis in conv.axes]
    return conv.blocks, conv.transposed, conv.padding == "circular", axes


def differences(penalty: TakesGeometry, conv: Convolution) -> str:
    """Returns which arguments of a penalty differ from the layer's, for a message."""
    found = []
    for name, right in {"input_size": conv.input_size, **conv.geometry}.items():
        own = getattr(penalty, name)
        if isinstance(right, tuple) and isinstance(own, int) and (right or name != "input_size"):
            own = (own,) * len(right)
        if own != right and own != "circular":
            found.append(f"{name}={own} instead of {right}")
    return ", ".join(found)


class Target(NamedTuple):
    """A kernel, and how its own penalty says to measure it.

    Attributes:
        kernel: The kernel, with the padding of the penalty if that is "circular".
        alpha: α of R_α.
        mismatch: How the geometry of the penalty differs from the layer's, or "".
    """

    kernel: LayerKernel
    alpha: float
    mismatch: str = ""


def target_of(kernel: LayerKernel, alpha: float | None) -> Target:
    """Returns how to measure a kernel. None takes α of its own penalty, or 1 if it has none."""
    penalty = own_penalty(kernel)
    if penalty is None:
        return Target(kernel, 1.0 if alpha is None else alpha)
    alpha = penalty.alpha if alpha is None else alpha
    if not isinstance(penalty, TakesGeometry):
        return Target(kernel, alpha)
    penalised = penalised_convolution(penalty, kernel)
    mismatch = "" if penalised else differences(penalty, kernel.conv)
    kernel = kernel._replace(conv=penalised or kernel.conv)
    if penalty.padding == "circular":
        kernel = kernel.with_padding("circular")
    return Target(kernel, alpha, mismatch)


def remark_on(kernel: LayerKernel) -> str | None:
    """Returns what a measurement of the layer's own M at its first size leaves out, or None."""
    remarks = []
    penalty = own_penalty(kernel)
    circular = isinstance(penalty, TakesGeometry) and penalty.padding == "circular"
    if circular and any(axis.span > 1 for axis in kernel.conv.axes):
        remarks.append("penalised without border (circular), measured with the layer's padding")
    if mismatch := target_of(kernel, None).mismatch:
        remarks.append(f"its penalty is for {mismatch}")
    if kernel.other_sizes:
        sizes = ["×".join(map(str, size)) for size in kernel.other_sizes]
        remarks.append(f"also applied to {enumeration(sizes)}")
    return "; ".join(remarks) or None


def warn_of_geometry(targets: Sequence[Target]) -> bool:
    """Warns of penalties whose geometry is not that of their layers. Returns whether there are any."""
    found = [f"{target.kernel.name!r} has {target.mismatch}" for target in targets if target.mismatch]
    if found:
        warnings.warn(
            f"Penalties are not for the geometry that the layers have in this model: {'; '.join(found)}. "
            'SingularValueMonitor measures the layers. attach_regularizers(model, existing="correct") '
            "corrects the penalties.",
            stacklevel=3,
        )
    return bool(found)
