"""The image sizes are those of this model's own call, whatever its layers were built for."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_frobreg import attach_regularizers, model_spectrum, regularize_model
from tf_frobreg.keras.read_layers import read_kernels

LAYERS = keras.layers


def sizes(model, input_size=None):
    """Image size of each kernel, by name."""
    return {kernel.name: kernel.conv.input_size for kernel in read_kernels(model, input_size).kernels}


def impulse_sigma(function, image):
    """All σ of a linear function of one image, from its answers to unit impulses."""
    impulses = np.eye(int(np.prod(image)), dtype="float32").reshape(-1, *image)
    answers = np.asarray(function(impulses)) - np.asarray(function(np.zeros((1, *image), "float32")))
    return np.linalg.svd(answers.reshape(len(impulses), -1), compute_uv=False)


def check_sigma(model, function, image, name):
    """The reported σmax and σmin of a layer are those of this function on images of this size."""
    (row,) = (row for row in model_spectrum(model) if row.name == name)
    sigma = impulse_sigma(function, image)
    np.testing.assert_allclose(row.extremes[:2], (sigma[0], sigma[-1]), rtol=1e-4)


def conv(name="conv", **options):
    return LAYERS.Conv2D(3, 3, name=name, **{"padding": "same", **options})


def test_a_model_that_was_rebuilt_from_its_configuration_at_another_size():
    x = keras.Input((6, 6, 2))
    config = keras.Model(x, conv("down", strides=2)(x)).get_config()
    config["layers"][0]["config"]["batch_shape"] = (None, 9, 9, 2)
    big = keras.Model.from_config(config)
    assert sizes(big) == {"down": (9, 9)}
    check_sigma(big, big, (9, 9, 2), "down")


def test_a_layer_that_is_called_again_on_another_input():
    old = keras.Sequential([keras.Input((8, 8, 2)), conv()])
    inputs = keras.Input((5, 5, 2))
    new = keras.Model(inputs, old.layers[0](inputs))
    assert (sizes(old), sizes(new)) == ({"conv": (8, 8)}, {"conv": (5, 5)})
    check_sigma(new, new, (5, 5, 2), "conv")
    assert attach_regularizers(new).attached["conv"].input_size == (5, 5)


def test_a_backbone_that_outlives_its_first_model():
    backbone = keras.Sequential([keras.Input((None, None, 2)), conv("a", strides=2), conv("b")], name="back")
    for n in (6, 10):
        inputs = keras.Input((n, n, 2))
        model = keras.Model(inputs, backbone(inputs))
        assert sizes(model) == {"a": (n, n), "b": (n // 2, n // 2)}
        check_sigma(model, backbone.layers[0], (n, n, 2), "a")


def test_an_open_backbone_in_a_fixed_model_needs_no_size(recwarn):
    backbone = keras.Sequential([keras.Input((None, None, 2)), conv("a", strides=2)], name="back")
    inputs = keras.Input((7, 9, 2))
    model = keras.Model(inputs, LAYERS.Dense(2, name="top")(backbone(inputs)))
    assert sizes(model) == {"a": (7, 9), "top": ()}
    assert list(regularize_model(model, max_steps=1).results) == ["a", "top"]
    with pytest.warns(
        UserWarning, match="size of a is that of an earlier call, because the model leaves it open"
    ):
        assert sizes(backbone) == {"a": (7, 9)}  # the only use of it has a size
    assert sizes(backbone, 12) == {"a": (12, 12)}
    with pytest.raises(
        ValueError, match=r"leaves the size .* the input .* has the fixed shape \(None, 7, 9, 2\)"
    ):
        read_kernels(model, 7)
    assert not [str(w.message) for w in recwarn]


@pytest.fixture
def two_sizes():
    left, right = keras.Input((None, None, 2), name="left"), keras.Input((None, 2), name="right")
    a, b = conv("a")(left), LAYERS.Conv1D(3, 3, name="b")(right)
    return keras.Model({"left": left, "right": right}, [a, b])


def test_several_open_inputs_get_their_sizes_by_name(two_sizes):
    wanted = {"a": (6, 5), "b": (9,)}
    assert sizes(two_sizes, {"left": (6, 5), "right": 9}) == wanted
    assert sizes(two_sizes, {"a": (6, 5), "b": 9}) == wanted  # or by the names of the layers
    assert sizes(two_sizes, 9) == {"a": (9, 9), "b": (9,)}
    untreated = read_kernels(two_sizes, {"left": 6}).untreated
    assert [(layer.name, layer.of_unknown_size) for layer in untreated] == [("b", True)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lefd": 6}, r"inputs or layers.*'lefd' \(did you mean 'left'\?\).*\. Names: left, right, a, b$"),
        ({"left": (6, 5, 4)}, "must be an int or 2 ints for the input 'left' of shape"),
        ({"left": 0, "right": 3}, "input_size must be at least 1"),
        ({"left": 9, "right": 2}, "input_size must suit the model, which fails on such images"),
        (
            {"left": 6, "a": 7},
            r"must not be given for layer 'a': the model applies it to images of size \(6, 6\)",
        ),
        ({"b": (2, 3)}, None),
    ],
)
def test_wrong_sizes_by_name(two_sizes, given, message):
    if message is None:  # the layer is named with the reason
        reasons = {layer.name: layer.reason for layer in read_kernels(two_sizes, given).untreated}
        assert "input_size must be an int or 1 ints" in reasons["b"]
    else:
        with pytest.raises(ValueError, match=message):
            read_kernels(two_sizes, given)


@pytest.fixture
def fixed_sizes():
    """A model with two images and a vector, of which nothing is open."""
    left, right = keras.Input((8, 8, 2), name="left"), keras.Input((6, 7, 2), name="right")
    vector = keras.Input((3,), name="vector")
    outputs = [conv("a")(left), conv("b")(right), LAYERS.Dense(2, name="c")(vector)]
    return keras.Model([left, right, vector], outputs)


@pytest.mark.parametrize(
    "given", [{"left": 8, "right": (6, 7)}, {"left": (8, 8)}, {"a": 8}, {"b": [6, 7], "left": 8}, {}]
)
def test_the_size_that_the_model_has_may_be_given(given, fixed_sizes):
    assert sizes(fixed_sizes, given) == {"a": (8, 8), "b": (6, 7), "c": ()}


@pytest.mark.parametrize("given", [8, (8, 8), np.array([8, 8]), {"image": 8}, {"conv": (8, 8)}])
def test_one_size_may_be_that_of_the_only_image(given):
    image, vector = keras.Input((8, 8, 2), name="image"), keras.Input((3,), name="vector")
    model = keras.Model([image, vector], [conv()(image), LAYERS.Dense(2, name="top")(vector)])
    assert sizes(model, given) == {"conv": (8, 8), "top": ()}


def test_a_size_may_repeat_the_axes_that_are_not_open():
    model = keras.Sequential([keras.Input((None, 9, 2)), conv()])
    assert sizes(model, 8) == sizes(model, (8,)) == sizes(model, (8, 9)) == {"conv": (8, 9)}
    with pytest.raises(ValueError, match="must be an int or 1 ints for the input .* of shape"):
        sizes(model, (8, 10))


def test_one_size_fills_only_the_open_inputs():
    left, right = keras.Input((None, None, 2), name="left"), keras.Input((6, 7, 2), name="right")
    model = keras.Model([left, right], [conv("a")(left), conv("b")(right)])
    assert sizes(model, 9) == {"a": (9, 9), "b": (6, 7)}
    with pytest.raises(ValueError, match="the input 'right' has the fixed shape"):
        sizes(model, {"left": 9, "right": 9})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (8, r"the input 'right' has the fixed shape \(None, 6, 7, 2\). Received: input_size=8"),
        ({"left": 9}, r"the input 'left' has the fixed shape .* Received: input_size={'left': 9}"),
        ({"left": (8, 8, 2)}, "the input 'left' has the fixed shape"),
        ({"left": 0}, "input_size must be at least 1. Received: input_size=0"),
        ({"vector": 3}, r"the input 'vector' has the fixed shape \(None, 3\)"),
        ({"a": 9}, r"for layer 'a': the model applies it to images of size \(8, 8\). .*{'a': 9}"),
    ],
)
def test_another_size_than_the_model_has_is_refused(given, message, fixed_sizes):
    with pytest.raises(ValueError, match=message):
        sizes(fixed_sizes, given)


class Keywords(LAYERS.Layer):
    """Calls its layers by keyword, one of them only in training, and one on two sizes."""

    def __init__(self, **options):
        super().__init__(**options)
        self.conv, self.head, self.extra = conv("conv"), conv("head"), conv("extra")

    def call(self, x, training=False):
        x = self.conv(inputs=x)
        small = LAYERS.MaxPooling2D()(x)
        if training:
            small = self.extra(inputs=small)
        return keras.ops.concatenate([LAYERS.Flatten()(self.head(y)) for y in (x, small)], axis=1)


def keywords_model(n):
    layer = Keywords(name="block")
    for part in (layer.conv, layer.head, layer.extra):
        part.build((None, None, None, 3))  # sizes that are None
    inputs = keras.Input((n, n, 3))
    return keras.Model(inputs, layer(inputs))


def test_keyword_calls_layers_built_without_sizes_and_a_head_shared_between_sizes(recwarn):
    model = keywords_model(8)
    assert sizes(model) == {"conv": (8, 8), "head": (8, 8), "extra": (4, 4)}
    others = {kernel.name: kernel.other_sizes for kernel in read_kernels(model).kernels}
    assert others == {"conv": (), "head": ((4, 4),), "extra": ()}
    check_sigma(model, model.get_layer("block").conv, (8, 8, 3), "conv")
    assert "applied to 4×4 too" in attach_regularizers(model).remarks["head"]
    assert not [str(w.message) for w in recwarn]


class Net(keras.Model):
    """A subclass without `build`. `how` says what its call does beside the convolution."""

    def __init__(self, how="plainly"):
        super().__init__()
        self.conv, self.top, self.how = conv("conv"), LAYERS.Dense(2, name="top"), how
        self.spare = conv("spare") if how == "with a spare layer" else None

    def call(self, x):
        if self.how == "by shape" and int(x.shape[0]) < 1:  # fails without data
            raise ValueError("empty batch")
        return self.top(self.conv(x))


def test_a_subclassed_model_can_be_given_another_size():
    model = Net()
    model(np.zeros((1, 6, 6, 2)))
    assert sizes(model) == {"conv": (6, 6), "top": ()}
    assert sizes(model, (9, 7)) == {"conv": (9, 7), "top": ()}
    check_sigma(model, model.conv, (6, 6, 2), "conv")


def test_a_call_that_needs_data_is_followed_on_zeros(recwarn):
    model = Net("by shape")
    model(np.zeros((1, 6, 6, 2)))
    assert sizes(model) == {"conv": (6, 6), "top": ()}
    assert not [str(w.message) for w in recwarn]


def test_a_call_that_tensorflow_has_compiled_before_is_followed(recwarn):
    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv = conv("conv")

        @tf.function
        def call(self, x):
            return self.conv(x)

    model = Compiled()
    for n in (6, 9):
        model(np.zeros((1, n, n, 2)))
    assert sizes(model) == {"conv": (6, 6)}
    assert not [str(w.message) for w in recwarn if w.category is not DeprecationWarning]  # of AutoGraph


def test_a_resizing_function_between_layers():
    half = LAYERS.Lambda(lambda x: tf.image.resize(x, tf.shape(x)[1:3] // 2), output_shape=(None, None, 3))
    inputs = keras.Input((8, 8, 2))
    model = keras.Model(inputs, conv("after")(half(conv("before")(inputs))))
    assert sizes(model) == {"before": (8, 8), "after": (4, 4)}


def test_following_a_model_changes_nothing():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), conv("conv"), LAYERS.BatchNormalization(), LAYERS.Dropout(0.5)]
    )
    weights = [np.array(weight) for weight in model.variables]
    nodes = len(model.layers[0]._inbound_nodes)
    read_kernels(model)
    assert "call" not in vars(model.layers[0])
    assert len(model.layers[0]._inbound_nodes) == nodes
    for before, after in zip(weights, model.variables, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_recorded_size_is_remarked():
    model = Net("with a spare layer")
    model.spare(np.zeros((1, 7, 7, 2)))
    model(np.zeros((1, 6, 6, 2)))
    with pytest.warns(UserWarning, match="The image size of spare is that of an earlier call, because the"):
        kernels = read_kernels(model).kernels
    assert {kernel.name: kernel.is_recorded for kernel in kernels} == {
        "conv": False,
        "top": False,
        "spare": True,
    }
    model.conv = None  # the call fails now
    with pytest.warns(UserWarning, match=r"could not be followed \('?NoneType"):
        read_kernels(model)


def test_layers_of_one_variable_get_one_penalty():
    first, second = conv("first", strides=2), conv("second")
    inputs = keras.Input((8, 8, 3))
    hidden = first(inputs)
    second.build(hidden.shape)
    second._tracker.unlock()
    second._kernel = first._kernel
    model = keras.Model(inputs, second(hidden))
    report = attach_regularizers(model, factor=1.0, reduction="sum")
    assert list(report.attached) == ["first"]
    assert report.left_out == {
        "second": "it shares its kernel with 'first'; penalised only with the geometry of 'first'"
    }
    sigma = impulse_sigma(first, (8, 8, 3))
    assert len(model.losses) == 1
    zeros = 8 * 8 * 3 - len(sigma)  # M is wide: its other σ are 0
    np.testing.assert_allclose(model.losses[0], np.sum((sigma**2 - 1) ** 2) + zeros, rtol=1e-4)
    assert [row.input_size for row in model_spectrum(model)] == [(8, 8), (4, 4)]


class Standardised(LAYERS.Conv2D):
    """Weight standardization: the kernel is computed from `_kernel`."""

    @property
    def kernel(self):
        k = self._kernel
        return (k - keras.ops.mean(k)) / (keras.ops.std(k) + 1e-5)


def test_a_kernel_that_is_computed_is_measured_and_left_out():
    model = keras.Sequential([keras.Input((6, 6, 2)), Standardised(3, 3, name="own"), conv("conv")])
    reason = "its class, Standardised, computes the kernel from other weights"
    assert attach_regularizers(model).left_out == {"own": reason}
    assert len(model.losses) == 1
    check_sigma(model, model.get_layer("own"), (6, 6, 2), "own")
    assert regularize_model(model, max_steps=1).left_out == {"own": reason}
