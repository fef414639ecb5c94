"""The Keras regularizers."""

import weakref
from typing import Unpack

import tensorflow as tf

from tf_frobreg.checks import as_kernel, check_integer, check_number
from tf_frobreg.convolution import Convolution, Geometry, check_geometry
from tf_frobreg.penalty import check_method, evaluate
from tf_frobreg.reshaped import evaluate_reshaped
from tf_frobreg.spectral import check_gram, power_iteration, start_vector

__all__ = ["FrobeniusRegularizer", "ReshapedRegularizer", "SpectralRegularizer"]

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
        geometry = Geometry(
            strides=strides, padding=padding, dilation_rate=dilation_rate, groups=groups, kind=kind
        )
        self.geometry = check_geometry(input_size, geometry)

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


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class SpectralRegularizer(tf.keras.regularizers.Regularizer):
    """Penalises a kernel by `factor`·‖MᵀM − αI‖₂, Guo's earlier penalty, reference [7] of the paper.

    Each time it is evaluated it takes a few power steps from the vector that the last evaluation of the same
    kernel led to: while training moves the kernel slowly, two of them follow the σ that is farthest from √α.
    The value is too small until the steps have converged. The vectors are not saved with a model: a loaded
    one starts from a random vector again.

    Args:
        input_size: As for `FrobeniusRegularizer`.
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of σ²; positive.
        gram: "columns" or "smaller", as for `spectral_penalty`; the former ends with zero gradient where M
            has more columns than rows.
        power_steps: Power steps at each evaluation.
        **geometry: As for `FrobeniusRegularizer`: of the layer, to which Keras gives no access.

    Raises:
        ValueError, TypeError: As `FrobeniusRegularizer`.

    Example:
        >>> regularizer = SpectralRegularizer(input_size=8, factor=0.1, gram="smaller")
        >>> layer = tf.keras.layers.Conv2D(4, 3, padding="same", kernel_regularizer=regularizer)
        >>> _ = layer(tf.zeros((1, 8, 8, 3)))
        >>> values = [layer.losses[0].numpy() for _ in range(200)]  # the power steps go on
        >>> from tf_frobreg import singular_values
        >>> sigma = singular_values(layer.kernel, 8)
        >>> print(abs(values[-1] - 0.1 * abs(sigma**2 - 1).max()) < 1e-3)
        True
    """

    def __init__(
        self,
        input_size,
        factor=1e-4,
        alpha=1.0,
        *,
        gram="columns",
        power_steps=2,
        **geometry: Unpack[Geometry],
    ):
        self.factor = check_number("factor", factor)
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.gram = check_gram(gram)
        self.power_steps = check_integer("power_steps", power_steps)
        self.geometry = check_geometry(input_size, geometry)
        self._vectors = {}

    def __call__(self, x):
        """Returns the penalty of the kernel `x`, a scalar of its dtype."""
        kernel = as_kernel(x, check_finite=False)
        conv = Convolution(tuple(kernel.shape), **self.geometry)
        vector = self._vector(x, kernel.dtype, conv)
        value, new = power_iteration(kernel, vector, conv, self.alpha, self.gram, self.power_steps)
        # A diverging training is to show a NaN loss, and no more than that.
        vector.assign(tf.where(tf.math.is_finite(value), new, vector))
        return self.factor * value

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return {
            "factor": self.factor,
            "alpha": self.alpha,
            "gram": self.gram,
            "power_steps": self.power_steps,
            **self.geometry,
        }

    def _vector(self, x, dtype, conv):
        """The variable with the vector of this kernel: one regularizer may serve several layers."""
        owned = hasattr(x, "assign")
        key = id(x) if owned else (conv.kernel_shape, dtype)
        owner, vector = self._vectors.get(key, (None, None))
        if vector is None or (owned and owner() is not x):
            # Vectors of kernels that are gone go too: another kernel may come to have the same id.
            self._vectors = {k: (o, v) for k, (o, v) in self._vectors.items() if o is None or o() is not None}
            with tf.init_scope():  # outlives the function that is being traced
                vector = tf.Variable(
                    start_vector(conv, self.gram, dtype),
                    trainable=False,
                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                )
            self._vectors[key] = (weakref.ref(x) if owned else None, vector)
        return vector

    def __getstate__(self):
        return self.__dict__ | {"_vectors": {}}  # a copy has kernels of its own


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class ReshapedRegularizer(tf.keras.regularizers.Regularizer):
    """Penalises a kernel by `factor`·‖WᵀW − αI‖²_F, W being the kernel reshaped to filters × the rest.

    W is not the layer's matrix: see `reshaped_penalty`. It is here for comparison, and needs no geometry.

    Args:
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of W's squared singular values; positive.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        >>> layer = tf.keras.layers.Conv2D(9, 3, kernel_regularizer=ReshapedRegularizer(factor=0.1))
        >>> _ = layer(tf.zeros((1, 8, 8, 1)))
        >>> print(layer.losses[0] > 0)
        tf.Tensor(True, shape=(), dtype=bool)
    """

    def __init__(self, factor=1e-4, alpha=1.0):
        self.factor = check_number("factor", factor)
        self.alpha = check_number("alpha", alpha, exclusive=True)

    def __call__(self, x):
        """Returns the penalty of the kernel `x`, a scalar of its dtype."""
        return self.factor * evaluate_reshaped(as_kernel(x, check_finite=False), self.alpha)

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return {"factor": self.factor, "alpha": self.alpha}
