"""The Keras regularizers."""

import weakref
from typing import Unpack

import tensorflow as tf

from tf_frobreg.checks import check_choice, check_integer, check_number
from tf_frobreg.convolution.geometry import Geometry
from tf_frobreg.convolution.kernel import as_kernel
from tf_frobreg.keras.layer_geometry import TakesGeometry
from tf_frobreg.penalties.frobenius import METHODS, FrobeniusPenalty
from tf_frobreg.penalties.reshaped import evaluate_reshaped
from tf_frobreg.penalties.two_norm import check_gram, power_iteration, start_vector

__all__ = [
    "FrobeniusRegularizer",
    "ReshapedRegularizer",
    "SpectralRegularizer",
    "SumRegularizer",
]

REDUCTIONS = ("sum", "mean")


class WeightedRegularizer(tf.keras.regularizers.Regularizer):
    """A penalty times `factor` times `scale`, a number that `FactorSchedule` changes during training."""

    def __init__(self, factor, scale):
        self.factor = check_number("factor", factor)
        self._scale = check_number("scale", scale)

    @property
    def scale(self) -> float:
        """What `factor` is multiplied by; traced functions see a change only after `make_adjustable`."""
        return float(self._scale)

    @scale.setter
    def scale(self, value):
        value = check_number("scale", value)
        if isinstance(self._scale, tf.Variable):
            self._scale.assign(value)
        else:
            self._scale = value

    def make_adjustable(self) -> bool:
        """Keeps `scale` in a variable from now on, which traced functions read; False if it did before."""
        if isinstance(self._scale, tf.Variable):
            return False
        with tf.init_scope():
            self._scale = tf.Variable(
                self._scale,
                trainable=False,
                dtype=tf.float64,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
        return True

    def weight(self, dtype: tf.DType):
        """factor·scale: a plain number, or a tensor of `dtype` where the regularizer is adjustable."""
        if isinstance(self._scale, tf.Variable):
            return tf.cast(self.factor * self._scale, dtype)
        return self.factor * self._scale

    def get_config(self):
        """Returns the constructor's arguments as plain values; `scale` only where it is not 1."""
        return {"factor": self.factor} | ({} if self.scale == 1.0 else {"scale": self.scale})

    def __getstate__(self):
        return self.__dict__ | {"_scale": self.scale}  # a copy is adjusted on its own


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class FrobeniusRegularizer(TakesGeometry, WeightedRegularizer):
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
        scale: What `FactorSchedule` multiplies `factor` by at the moment; saved with the model.

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
        scale=1.0,
    ):
        super().__init__(factor, scale)
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.method = check_choice("method", method, METHODS)
        geometry = Geometry(
            strides=strides, padding=padding, dilation_rate=dilation_rate, groups=groups, kind=kind
        )
        self.take_geometry(input_size, geometry)

    def __call__(self, x):
        """Returns the penalty of the kernel `x`, a scalar of its dtype."""
        kernel = as_kernel(x, check_finite=False)  # a diverging training is to show a NaN loss, not stop
        conv = self.convolution(kernel.shape)
        penalty = FrobeniusPenalty(conv, self.alpha, self.method).value(kernel)
        return self.weight(penalty.dtype) / (conv.shape[1] if self.reduction == "mean" else 1) * penalty

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "reduction": self.reduction,
            "method": self.method,
            **self.geometry_config(),
        }


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class SpectralRegularizer(TakesGeometry, WeightedRegularizer):
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
        scale: As for `FrobeniusRegularizer`.
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
        scale=1.0,
        **geometry: Unpack[Geometry],
    ):
        super().__init__(factor, scale)
        self.alpha = check_number("alpha", alpha, exclusive=True)
        self.gram = check_gram(gram)
        self.power_steps = check_integer("power_steps", power_steps)
        self.take_geometry(input_size, geometry)
        self._vectors = {}

    def __call__(self, x):
        """Returns the penalty of the kernel `x`, a scalar of its dtype."""
        kernel = as_kernel(x, check_finite=False)
        conv = self.convolution(kernel.shape)
        vector = self._vector(x, kernel.dtype, conv)
        value, new = power_iteration(kernel, vector, conv, self.alpha, self.gram, self.power_steps)
        # A diverging training is to show a NaN loss, and no more than that.
        vector.assign(tf.where(tf.math.is_finite(value), new, vector))
        return self.weight(value.dtype) * value

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return {
            **super().get_config(),
            "alpha": self.alpha,
            "gram": self.gram,
            "power_steps": self.power_steps,
            **self.geometry_config(),
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
        return super().__getstate__() | {"_vectors": {}}  # a copy has kernels of its own


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class ReshapedRegularizer(WeightedRegularizer):
    """Penalises a kernel by `factor`·‖WᵀW − αI‖²_F, W being the kernel reshaped to filters × the rest.

    W is not the layer's matrix: see `reshaped_penalty`. It is here for comparison, and needs no geometry.

    Args:
        factor: Weight of the penalty, at least 0.
        alpha: α, the target of W's squared singular values; positive.
        scale: As for `FrobeniusRegularizer`.

    Raises:
        ValueError, TypeError: Where an argument is invalid; the message names it.

    Example:
        >>> layer = tf.keras.layers.Conv2D(9, 3, kernel_regularizer=ReshapedRegularizer(factor=0.1))
        >>> _ = layer(tf.zeros((1, 8, 8, 1)))
        >>> print(layer.losses[0] > 0)
        tf.Tensor(True, shape=(), dtype=bool)
    """

    def __init__(self, factor=1e-4, alpha=1.0, *, scale=1.0):
        super().__init__(factor, scale)
        self.alpha = check_number("alpha", alpha, exclusive=True)

    def __call__(self, x):
        """Returns the penalty of the kernel `x`, a scalar of its dtype."""
        penalty = evaluate_reshaped(as_kernel(x, check_finite=False), self.alpha)
        return self.weight(penalty.dtype) * penalty

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        return super().get_config() | {"alpha": self.alpha}


@tf.keras.utils.register_keras_serializable(package="tf_frobreg")
class SumRegularizer(tf.keras.regularizers.Regularizer):
    """Adds up the values of several regularizers, as where a penalty joins one that is there already.

    Args:
        regularizers: Keras regularizers, or functions of the kernel.

    Raises:
        ValueError: Where there is none.

    Example:
        >>> both = SumRegularizer([tf.keras.regularizers.L2(0.5), ReshapedRegularizer(factor=1.0)])
        >>> print(both(tf.ones((1, 1, 1, 1))).numpy())
        0.5
    """

    def __init__(self, regularizers):
        self.regularizers = [tf.keras.regularizers.get(regularizer) for regularizer in regularizers]
        if not self.regularizers or None in self.regularizers:
            raise ValueError(f"regularizers must be some. Received: regularizers={regularizers!r}")

    def __call__(self, x):
        """Returns the sum, a scalar."""
        return tf.add_n([regularizer(x) for regularizer in self.regularizers])

    def get_config(self):
        """Returns the constructor's arguments as plain values."""
        serialize = tf.keras.regularizers.serialize
        return {"regularizers": [serialize(regularizer) for regularizer in self.regularizers]}
