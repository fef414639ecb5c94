"""Which kernels a model has, and the geometry that is read from its layers."""

import keras
import numpy as np
import pytest
from geometries import KERAS_CASES, label

from tf_frobreg import Convolution, model_spectrum
from tf_frobreg.keras.read_layers import flat_layers, read_kernels

LAYERS = keras.layers


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_the_geometry_of_every_layer_of_the_grid_is_read(case):
    layer = case.layer(case.kernel())
    inputs = keras.Input((*case.image, case.channels), dtype="float64")
    (kernel,) = read_kernels(keras.Model(inputs, layer(inputs))).kernels
    assert kernel.conv == Convolution(case.kernel_shape, case.image, **case.geometry)
    assert kernel.layer is layer
    assert kernel.variable is layer.kernel
    np.testing.assert_array_equal(kernel.value, layer.kernel)
    assert hasattr(layer, kernel.regularizer)


def test_the_kernels_of_a_separable_convolution_have_their_own_sizes_and_attributes():
    layer = LAYERS.SeparableConv2D(5, 3, strides=2, padding="same", name="sep")
    kernels = read_kernels(keras.Sequential([keras.Input((9, 8, 3)), layer])).kernels
    assert [kernel.name for kernel in kernels] == ["sep/depthwise", "sep/pointwise"]
    assert [kernel.variable for kernel in kernels] == [layer.depthwise_kernel, layer.pointwise_kernel]
    regularizers = [kernel.regularizer for kernel in kernels]
    assert regularizers == ["depthwise_regularizer", "pointwise_regularizer"]
    depthwise = Convolution((3, 3, 3, 1), (9, 8), strides=2, kind="depthwise")
    assert [kernel.conv for kernel in kernels] == [depthwise, Convolution((1, 1, 3, 5), (5, 4))]


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
    assert not any("--" in row.reason for row in model_spectrum(model))  # these are words of the command
    assert all("give input_size" in row.reason for row in model_spectrum(model))
    rows = model_spectrum(model, input_size=(10, 12))
    assert [row.input_size for row in rows] == [(10, 12), (8, 10)]
    assert "call" not in layers[0].__dict__  # nothing is left behind
    fixed = keras.Sequential([keras.Input((10, 10, 2)), *layers])
    with pytest.raises(ValueError, match="input_size goes with a model that leaves the size of its images"):
        model_spectrum(fixed, input_size=7)
    with pytest.raises(ValueError, match="input_size must suit the model, which fails on such images"):
        model_spectrum(model, input_size=1)
    with pytest.raises(ValueError, match="input_size must be an int or 2 ints for the input .* of shape"):
        model_spectrum(model, input_size=(10, 12, 14))
    with pytest.raises(TypeError, match="input_size must be an integer"):
        model_spectrum(model, input_size="big")


def test_several_inputs_of_unknown_size():
    left, right = keras.Input((None, 3), name="left"), keras.Input((None, 3), name="right")
    both = keras.layers.Concatenate(axis=1)([left, right])
    model = keras.Model({"left": left, "right": right}, keras.layers.Conv1D(2, 3, name="conv")(both))
    (row,) = model_spectrum(model, input_size=5)
    assert row.input_size == (10,)


class Standardised(keras.layers.Conv2D):
    """Applies another kernel than it holds."""

    def call(self, x):
        return keras.ops.conv(x, self.kernel - keras.ops.mean(self.kernel), 1, "valid")


def test_a_layer_with_a_call_of_its_own_is_not_taken_for_its_base():
    model = keras.Sequential([keras.Input((6, 6, 1)), Standardised(2, 3, name="own")])
    (row,) = model_spectrum(model)
    assert row.reason == "its class, Standardised, overrides call"


def test_quantized_layers_are_named():
    dense = keras.layers.Dense(4, name="dense")
    model = keras.Sequential([keras.Input((6,)), dense])
    dense.quantize("int8")
    (row,) = model_spectrum(model)
    assert row.reason == "it is quantized (int8)"


@pytest.mark.filterwarnings("ignore:.build...* was called on layer")
def test_a_layer_that_the_model_never_called_is_named():
    class Unused(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = LAYERS.Dense(2, name="used"), LAYERS.Dense(2, name="unused")

        def call(self, x):
            return self.used(x)

    model = Unused()
    model(np.zeros((1, 3)))
    found = read_kernels(model)
    assert [kernel.name for kernel in found.kernels] == ["used"]
    assert [(layer.name, layer.reason) for layer in found.untreated] == [
        ("unused", "it has not been built: call the model on a batch that reaches it")
    ]


def test_only_the_last_axis_counts_for_a_dense_layer_on_images():
    model = keras.Sequential([keras.Input((6, 5, 3)), LAYERS.Dense(2)])
    (kernel,) = read_kernels(model).kernels
    assert kernel.conv == Convolution((3, 2), ())
    assert kernel.other_sizes == ()


def test_the_sizes_of_a_shared_layer_are_listed():
    shared = LAYERS.Conv2D(2, 3, padding="same", name="shared")
    inputs = keras.Input((8, 8, 2))
    model = keras.Model(inputs, shared(LAYERS.MaxPooling2D()(shared(inputs))))
    (kernel,) = read_kernels(model).kernels
    assert (kernel.conv.input_size, kernel.other_sizes) == ((8, 8), ((4, 4),))


class Failing(LAYERS.Layer):
    def call(self, x):
        raise ValueError("no image of this size")


def test_the_layers_are_as_before_if_the_call_on_zeros_fails():
    conv = LAYERS.Conv2D(4, 3, name="conv")
    inputs = keras.Input((None, None, 2))
    model = keras.Model(inputs, conv(inputs))
    model.call = lambda *arguments, **options: Failing()(conv(*arguments))
    with pytest.raises(ValueError, match="input_size must suit the model, which fails .*no image of this"):
        read_kernels(model, 9)
    assert "call" not in vars(conv)


def test_a_model_that_is_called_on_a_dict_takes_one_size_or_several():
    class Several(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = LAYERS.Conv2D(2, 3, name="conv")

        def call(self, images):
            return [self.conv(images["left"]), self.conv(images["right"])]

    model = Several()
    model({name: np.zeros((1, 6, 6, 1)) for name in ("left", "right")})
    (kernel,) = read_kernels(model).kernels
    assert kernel.conv.input_size == (6, 6)
    assert read_kernels(model, 9).kernels[0].conv.input_size == (9, 9)
    (kernel,) = read_kernels(model, {"left": 9, "right": (5, 4)}).kernels
    assert (kernel.conv.input_size, kernel.other_sizes) == ((9, 9), ((5, 4),))


def test_a_model_without_a_recorded_shape_takes_a_size_per_layer():
    class Unrecorded(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = LAYERS.Conv2D(2, 3, name="conv")

        def get_build_config(self):
            return None

        def call(self, images):
            return self.conv(images)

    model = Unrecorded()
    model(np.zeros((1, 6, 6, 1)))
    with pytest.warns(UserWarning, match="The image size of conv is that of an earlier call"):
        assert read_kernels(model).kernels[0].conv.input_size == (6, 6)
    with pytest.raises(ValueError, match="input_size needs a model whose inputs are known"):
        read_kernels(model, 9)
    assert read_kernels(model, {"conv": 9}).kernels[0].conv.input_size == (9, 9)


def test_another_border():
    model = keras.Sequential([keras.Input((6, 6, 1)), LAYERS.Conv2D(2, 3, strides=2, name="conv")])
    (kernel,) = read_kernels(model).kernels
    circular = kernel.with_padding("circular")
    assert circular.conv == Convolution((3, 3, 1, 2), (6, 6), strides=2, padding="circular")
    assert circular._replace(conv=kernel.conv) == kernel
    assert kernel.with_padding(None) is kernel
    with pytest.raises(ValueError, match="padding must be one of .*'full', for layer 'conv'"):
        kernel.with_padding("full")


def test_reasons_to_skip_a_kernel():
    half, dense = LAYERS.Conv2D(3, 3, name="half", dtype="float16"), LAYERS.Dense(4, name="dense")
    model = keras.Sequential([keras.Input((6, 6, 3)), half, dense])
    dtypes = ("float32", "float64")
    first, second = read_kernels(model).kernels
    assert [first.reason_to_skip(dtypes=dtypes), first.reason_to_skip()] == ["its kernel is float16", None]
    assert second.reason_to_skip(dtypes=dtypes) is None
    dense.enable_lora(2)
    (second,) = (kernel for kernel in read_kernels(model).kernels if kernel.name == "dense")
    assert second.variable is None
    assert second.reason_to_skip() == "LoRA is enabled: its kernel is frozen"
    assert second.value.dtype == np.float32


def test_layers_are_listed_once_and_nested_ones_after_their_parent():
    block = Block(name="block")
    inputs = keras.Input((8, 8, 4))
    model = keras.Model(inputs, block(inputs))
    layers = flat_layers(model)
    assert [layer.name for layer in layers[:3]] == [model.name, inputs._keras_history.operation.name, "block"]
    assert len({id(layer) for layer in layers}) == len(layers)
    assert layers.index(block.steps[0]) == 3
    shared = LAYERS.Dense(4)
    assert len(flat_layers(keras.Sequential([keras.Input((4,)), shared, shared]))) == 3
