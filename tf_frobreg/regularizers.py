"""The Keras regularizers."""

import tensorflow as tf

from tf_frobreg.checks import as_kernel, check_number
from tf_frobreg.convolution import Convolution, check_geometry
from tf_frobreg.penalty import check_method, evaluate

__all__ = ["FrobeniusRegularizer"]

REDUCTIONS = ("sum", "mean")


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class FrobeniusRegularizer(tf.keras.regularizers.Regularizer):
    """Penalises a kernel by `factor`·R_α(K), R_α(K) = ‖MᵀM − αI‖²_F with M its transformation matrix.

    It draws the singular values of M, the linear map that the layer applies to an image, towards √α. Keras
    shows a regularizer nothing but the kernel: image size, strides, padding, dilation and groups of the
    layer have to be repeated here, and must be those of the layer. What does not fit the kernel is refused,
    but a wrong geometry that fits it is not noticed: mind that Keras' layers default to padding="valid", and
    that LoRA on a `Dense` layer passes its two factors off as kernels.

    Under zero padding ("same", "valid") R_α is smallest for kernels with one tap only, so a large `factor`
    turns a 3×3 convolution into a 1×1 one; padding="circular" penalises the border-free operator instead,
    whose minimisers use every tap.

    Args:
        input_size: Spatial size of the layer's input, an int or one int per axis; () for `Dense`.
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of σ²; positive.
        strides: As given to the layer.
        padding: As given to the layer, or "circular".
        dilation_rate: As given to the layer.
        groups: As given to the layer.
        kind: "conv", "depthwise" or "transpose", by the layer: kernels of the same rank differ in meaning.
        reduction: "sum" for R_α itself, or "mean" to divide it by the columns of M, so that one factor
            suits layers of any size.
        method: "closed_form" or "sparse", as for `frobenius_penalty`.

    Raises:
        ValueError, TypeError: Where an argument is invalid, at once; where it does not fit the kernel, when
            the penalty is first computed (`layer.losses`, or the first step of `fit`).

    Example:
        >>> layer = tf.keras.layers.Conv2D(
        ...     8, 3, padding="same", kernel_regularizer=FrobeniusRegularizer(input_size=28, factor=1e-4))
        >>> _ = layer(tf.zeros((1, 28, 28, 1)))
        >>> print(len(layer.losses), layer.losses[0] > 0)
        1 tf.Tensor(True, shape=(), dtype=bool)
    """

    def __init__(
        self,
        input_size,
        factor=1e-4,
        alpha=1.0,
        *,
        strides=1,
        padding="same",
        dilation_rate=1,
        groups=1,
        kind="conv",
        reduction="sum",
        method="closed_form",
    ):
        self.factor = check_number("factor", factor)
        self.alpha = check_number("alpha", alpha, exclusive=True)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}. Received: reduction={reduction!r}")
        self.reduction = reduction
        self.method = check_method(method)
        self.geometry = check_geometry(
            input_size=input_size,
            strides=strides,
            padding=padding,
            dilation_rate=dilation_rate,
            groups=groups,
            kind=kind,
        )

    def __call__(self, x):
        """Returns the penalty of the kernel `x`, a scalar of its dtype."""
        kernel = as_kernel(x, check_finite=False)  # a diverging training is to show a NaN loss, not stop
        conv = Convolution(tuple(kernel.shape), **self.geometry)
        penalty = evaluate(kernel, conv, self.alpha, self.method)
        scale = self.factor / (conv.shape[1] if self.reduction == "mean" else 1)
        return scale * penalty

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return {
            "factor": self.factor,
            "alpha": self.alpha,
            "reduction": self.reduction,
            "method": self.method,
            **self.geometry,
        }
