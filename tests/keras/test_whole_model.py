"""Whole models: the geometry that is read from the layers, against the layers themselves."""

import keras
import numpy as np
import pytest
from geometries import KERAS_CASES, label
from oracles import impulse_matrix

from tf_frobreg import frobenius_penalty, model_spectrum, penalty_floor, singular_values
from tf_frobreg.keras.read_layers import read_kernels


def sigma_by_impulses(layer, image, channels):
    """Ends of the SVD of what the layer does to unit impulses, without bias and activation."""
    shape = (*image, channels)
    matrix = impulse_matrix(layer, image, channels) - np.asarray(layer(np.zeros((1, *shape)))).reshape(-1, 1)
    return np.linalg.svd(matrix, compute_uv=False)


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_every_layer_of_the_grid_is_measured(case):
    kernel = case.kernel()
    layer = case.layer(kernel)
    inputs = keras.Input((*case.image, case.channels), dtype="float64")
    (row,) = model_spectrum(keras.Model(inputs, layer(inputs)))
    sigma = sigma_by_impulses(layer, case.image, case.channels)
    assert row.reason is None
    assert row.input_size == case.image
    assert row.extremes.sigma_max == pytest.approx(sigma[0], rel=1e-4)
    assert row.extremes.sigma_min == pytest.approx(sigma[-1], abs=1e-2 * sigma[0])
    assert row.penalty == pytest.approx(float(frobenius_penalty(kernel, case.image, **case.geometry)))
    columns = row.convolution.shape[1]
    assert row.penalty_per_column == pytest.approx(row.penalty / columns)
    assert row.penalty_floor == penalty_floor(kernel.shape, case.image, **case.geometry)
    high, low = row.extremes[:2]
    assert row.condition_number == (high / low if low else np.inf)


def test_bias_and_activation_do_not_enter():
    layer = keras.layers.Conv2D(4, 3, padding="same", activation="relu", bias_initializer="ones")
    model = keras.Sequential([keras.Input((7, 8, 2)), layer])
    (row,) = model_spectrum(model)
    sigma = singular_values(layer.kernel, (7, 8))
    assert row.extremes[:2] == pytest.approx((sigma[0], sigma[-1]), rel=1e-6)


def test_separable_convolutions_have_two_kernels():
    layer = keras.layers.SeparableConv2D(5, 3, strides=2, padding="same", use_bias=False, name="sep")
    model = keras.Sequential([keras.Input((9, 8, 3)), layer])
    rows = {row.name: row for row in model_spectrum(model)}
    assert list(rows) == ["sep/depthwise", "sep/pointwise"]
    assert rows["sep/depthwise"].input_size == (9, 8)
    assert rows["sep/pointwise"].input_size == (5, 4)
    depthwise = singular_values(layer.depthwise_kernel, (9, 8), kind="depthwise", strides=2)
    assert rows["sep/depthwise"].extremes.sigma_max == pytest.approx(depthwise[0], rel=1e-6)
    pointwise = np.linalg.svd(np.asarray(layer.pointwise_kernel)[0, 0], compute_uv=False)
    assert rows["sep/pointwise"].extremes.sigma_max == pytest.approx(pointwise[0], rel=1e-6)


@keras.saving.register_keras_serializable(package="test_models")
class Block(keras.layers.Layer):
    """Layers in a layer, in a list, and in another model."""

    def __init__(self, **options):
        super().__init__(**options)
        inner = keras.Sequential([keras.Input((8, 8, 4)), keras.layers.Conv2D(3, 3, name="conv")])
        self.steps = [keras.layers.Conv2D(4, 3, padding="same", name="conv"), inner]

    def call(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block(name="block")
        self.top = keras.layers.Dense(2, name="top")

    def call(self, x):
        return self.top(keras.ops.mean(self.block(x), axis=(1, 2)))


def test_nested_layers_are_found_and_told_apart():
    model = Subclassed()
    model(np.zeros((1, 8, 8, 1)))
    rows = model_spectrum(model)
    assert [row.name for row in rows][-1] == "top"
    assert [row.kernel_shape for row in rows] == [(3, 3, 1, 4), (3, 3, 4, 3), (3, 2)]
    assert len({row.name for row in rows}) == 3
    assert all("conv" in row.name for row in rows[:2])
    assert [row.input_size for row in rows] == [(8, 8), (8, 8), ()]


def test_what_cannot_be_measured_is_listed_with_the_reason():
    inputs = keras.Input((12, 4))
    x = keras.layers.Conv1D(4, 3, padding="causal", name="causal")(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.Reshape((4, 4, 3))(x)
    x = keras.layers.Conv2DTranspose(3, 3, strides=2, output_padding=1, name="up")(x)
    x = keras.layers.Conv2D(3, 3, name="broken")(x)
    x = keras.layers.LSTM(3)(keras.layers.Reshape((-1, 3))(x))
    model = keras.Model(inputs, keras.layers.Dense(2, name="top")(keras.layers.BatchNormalization()(x)))
    model.get_layer("broken").kernel.assign(np.full((3, 3, 3, 3), np.nan))
    rows = model_spectrum(model)
    reasons = {row.name: row.reason for row in rows}
    assert reasons.pop("top") is None
    assert "padding='causal'" in reasons["causal"]
    assert "output_padding=(1, 1)" in reasons["up"]
    assert "NaN" in reasons["broken"]
    assert reasons["lstm_cell"] == "LSTMCell is neither a convolution nor Dense"
    assert sum("EinsumDense" in reason for reason in reasons.values()) == 4
    assert read_kernels(model).others == {
        "InputLayer": 1,
        "Reshape": 2,
        "BatchNormalization": 1,
        "Softmax": 1,
        "Dropout": 1,
    }
    assert all(row.condition_number is None for row in rows if row.reason)


def test_an_unknown_image_size_is_a_reason_and_can_be_given():
    layers = [keras.layers.Conv2D(4, 3, name="a"), keras.layers.Conv2D(4, 3, strides=2, name="b")]
    model = keras.Sequential([keras.Input((None, None, 2)), *layers])
    assert all("image size is unknown" in row.reason for row in model_spectrum(model))
    assert all("give input_size" in row.reason for row in model_spectrum(model))
    rows = model_spectrum(model, input_size=(10, 12))
    assert [row.input_size for row in rows] == [(10, 12), (8, 10)]
    assert "call" not in layers[0].__dict__  # nothing is left behind
    fixed = keras.Sequential([keras.Input((10, 10, 2)), *layers])
    with pytest.raises(ValueError, match="input_size goes with a model that leaves the size of its images"):
        model_spectrum(fixed, input_size=7)
    with pytest.raises(ValueError, match="input_size must suit the model, which fails on such images"):
        model_spectrum(model, input_size=1)
    with pytest.raises(ValueError, match="input_size must be an int or 2 ints for an input of shape"):
        model_spectrum(model, input_size=(10, 12, 14))
    with pytest.raises(TypeError, match="input_size must be an integer"):
        model_spectrum(model, input_size="big")


def test_several_inputs_of_unknown_size():
    left, right = keras.Input((None, 3), name="left"), keras.Input((None, 3), name="right")
    both = keras.layers.Concatenate(axis=1)([left, right])
    model = keras.Model({"left": left, "right": right}, keras.layers.Conv1D(2, 3, name="conv")(both))
    (row,) = model_spectrum(model, input_size=5)
    assert row.input_size == (10,)


def test_lora_and_float16_kernels_are_measured_as_applied():
    dense = keras.layers.Dense(4, name="dense")
    half = keras.layers.Conv2D(3, 3, name="half", dtype="float16")
    model = keras.Sequential([keras.Input((6, 6, 3)), half, dense])
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(np.ones((2, 4)))
    rows = {row.name: row for row in model_spectrum(model)}
    sigma = np.linalg.svd(np.asarray(dense.kernel), compute_uv=False)
    assert rows["dense"].extremes.sigma_max == pytest.approx(sigma[0], rel=1e-5)
    sigma = singular_values(np.asarray(half.kernel).astype("float32"), 6, padding="valid")
    assert rows["half"].extremes.sigma_max == pytest.approx(sigma[0], rel=1e-4)


class Standardised(keras.layers.Conv2D):
    """Applies another kernel than it holds."""

    def call(self, x):
        return keras.ops.conv(x, self.kernel - keras.ops.mean(self.kernel), 1, "valid")


def test_a_layer_with_a_call_of_its_own_is_not_taken_for_its_base():
    model = keras.Sequential([keras.Input((6, 6, 1)), Standardised(2, 3, name="own")])
    (row,) = model_spectrum(model)
    assert row.reason == "its class, Standardised, has a call of its own"


@pytest.mark.skipif(not hasattr(keras.layers.Dense, "quantize"), reason="this Keras cannot quantize")
def test_quantized_layers_are_named():
    dense = keras.layers.Dense(4, name="dense")
    model = keras.Sequential([keras.Input((6,)), dense])
    dense.quantize("int8")
    (row,) = model_spectrum(model)
    assert row.reason == "it is quantized (int8)"


def test_a_start_follows_a_training():
    model = keras.Sequential([keras.Input((16, 16, 8)), keras.layers.Conv2D(8, 3, padding="same")])
    before = model_spectrum(model)
    assert before[0].extremes.vectors is not None
    kernel = model.layers[0].kernel
    kernel.assign(kernel * 1.01)
    (row,) = model_spectrum(model, start=before)
    assert row.extremes.sigma_max == pytest.approx(1.01 * before[0].extremes.sigma_max, rel=2e-4)
    (high,) = model_spectrum(model, start=before, sigma_min=False)
    assert np.isnan(high.extremes.sigma_min)
    other = keras.Sequential([keras.Input((12, 12, 8)), model.layers[0]])
    model_spectrum(other, start=before)  # of another geometry: not used


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a Keras model or layer. Received: model=3"),
        ({"model": keras.Sequential([keras.layers.Dense(3)])}, ValueError, "model must be built"),
        ({"alpha": 0}, ValueError, "alpha must be a finite number above 0"),
        ({"accuracy": -1}, ValueError, "accuracy must be a finite number above 0"),
        ({"start": 3}, TypeError, "start must be what model_spectrum returned. Received: start=3"),
        ({"start": "abc"}, TypeError, "start must be what model_spectrum returned"),
        ({"sigma_min": "no"}, TypeError, "sigma_min must be True or False"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(error, match=message):
        model_spectrum(**{"model": model, **arguments})
