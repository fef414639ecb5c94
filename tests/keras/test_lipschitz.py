"""Lipschitz bounds against exact Jacobians, and against the largest ratio that gradient ascent finds."""

import math
from collections import OrderedDict

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

import tf_frobreg
import tf_frobreg.spectrum.upper_bound
from tf_frobreg import lipschitz_bound
from tf_frobreg.keras.layer_bounds import SAME_IN_INFERENCE, SLOPES

L = keras.layers
EXACT = 1e-9  # relative


@pytest.fixture(autouse=True)
def double_precision():
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(1)
    yield
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)


def sequential(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


def functional(shape, graph):
    image = keras.Input(shape)
    return keras.Model(image, graph(image))


def randomize(model, seed=0):
    """Gives every weight random values, also those that usually start at 0 or 1. Variances stay positive."""
    random = np.random.RandomState(seed)
    for weight in model.weights:
        value = random.standard_normal(weight.shape)
        if "kernel" not in weight.path:
            value = 0.5 * value + 1 if "gamma" in weight.path else 0.5 * value
        weight.assign(np.abs(value) + 0.2 if "variance" in weight.path else value)
    return model


def shapes_of(model):
    return [tuple(n or 3 for n in tensor.shape[1:]) for tensor in model.inputs]


def call(model, flat):
    """Applies a model to the rows of a matrix: all its inputs, one after the other. Returns a matrix."""
    shapes = shapes_of(model)
    parts = tf.split(flat, [math.prod(shape) for shape in shapes], axis=1)
    images = [tf.reshape(part, (-1, *shape)) for part, shape in zip(parts, shapes, strict=True)]
    outputs = model(images[0] if len(images) == 1 else images, training=False)
    flat_outputs = [tf.reshape(output, (len(flat), -1)) for output in keras.tree.flatten(outputs)]
    return tf.concat(flat_outputs, axis=1)


def points(model, count, seed=0):
    size = sum(math.prod(shape) for shape in shapes_of(model))
    return tf.constant(np.random.RandomState(seed).standard_normal((count, size)))


def jacobian_norm(model, point):
    """The exact norm at one point. A copy of the point for each output has the gradient of that output."""
    outputs = call(model, point[None]).shape[1]
    copies = tf.repeat(point[None], outputs, axis=0)
    with tf.GradientTape() as tape:
        tape.watch(copies)
        own = tf.linalg.trace(call(model, copies))
    return np.linalg.norm(tape.gradient(own, copies), 2)


def largest_ratio(model, steps=25):
    """Of ‖f(x) − f(y)‖ / ‖x − y‖, by gradient ascent from several pairs, near and far."""
    x = points(model, 8, seed=1)
    y = x + points(model, 8, seed=2) * np.geomspace(1e-3, 1, 8)[:, None]
    best = 0.0
    for _ in range(steps):
        with tf.GradientTape() as tape:
            tape.watch([x, y])
            distance = tf.norm(x - y, axis=1)
            ratio = tf.norm(call(model, x) - call(model, y), axis=1) / distance
        best = max(best, float(tf.reduce_max(ratio)))
        gradients = [g / (tf.norm(g, axis=1, keepdims=True) + 1e-30) for g in tape.gradient(ratio, [x, y])]
        x, y = (
            z + 0.2 * tf.minimum(distance, 1.0)[:, None] * g for z, g in zip((x, y), gradients, strict=True)
        )
    return best


def residual(image):
    x = L.Conv2D(2, 3, padding="same", use_bias=False)(image)
    x = L.ReLU()(L.BatchNormalization()(x))
    x = L.Conv2D(2, 3, padding="same")(x)
    x = L.Add()([L.BatchNormalization()(x), image])
    return L.Dense(3)(L.GlobalAveragePooling2D()(L.ReLU()(x)))


def inception(image):
    branches = [
        L.Conv2D(2, 1, activation="gelu")(image),
        L.Conv2D(3, 3, padding="same", activation="elu")(image),
        L.MaxPooling2D(3, strides=1, padding="same")(image),
    ]
    return L.AveragePooling2D(2, strides=1)(L.Concatenate()(branches))


def operators(image):
    x = L.Conv2D(2, 1)(image)
    return keras.ops.relu(2.0 * x - image / 4.0 + 1.0) - (-x)


def shared(image):
    layer = L.Conv2D(2, 3, padding="same", activation="tanh")
    return layer(layer(L.MaxPooling2D(2)(layer(image))))


def nested(image):
    block = sequential((5, 4, 2), L.Conv2D(2, 3, activation="silu"), L.BatchNormalization())
    inner = functional((3, 2, 2), lambda x: L.Add()([x, L.DepthwiseConv2D(3, padding="same")(x)]))
    return L.Dense(3)(L.Flatten()(inner(block(image))))


def extremes_of(image):
    x, y = L.Conv2D(2, 1)(image), L.Conv2D(2, 3, padding="same")(image)
    return L.Minimum()([L.Maximum()([x, y]), L.Average()([x, y, image])])


def two_inputs():
    left, right = keras.Input((4, 4, 1)), keras.Input((6,))
    x = L.Flatten()(L.Conv2D(2, 3, activation="relu")(left))
    y = L.Dense(8, activation="softplus")(right)
    return keras.Model([left, right], [L.Subtract()([x, y]), L.Concatenate()([x, y])])


def broadcasting(image):
    weights = L.GlobalAveragePooling2D(keepdims=True)(L.Conv2D(2, 1)(image))
    return L.Add()([image, weights])


def activations(image):
    x = keras.activations.relu(L.Conv2D(2, 1)(image), negative_slope=1.5)
    x = keras.activations.elu(L.Conv2D(2, 1)(x), alpha=3.0)
    x = keras.activations.gelu(x) + keras.activations.leaky_relu(x)
    x = keras.activations.hard_sigmoid(x) - keras.ops.selu(x)
    x = keras.ops.reshape(
        keras.ops.concatenate([x, L.Conv2D(1, 1, activation=keras.ops.silu)(x)], -1), (-1, 60)
    )
    return L.Dense(3)(x / np.array([1.0, -0.5] * 30))


def ordered_inputs(image):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    inner = keras.Model(OrderedDict(b=b, a=a), L.Add()([L.Rescaling(1.0)(a), L.Rescaling(100.0)(b)]))
    return inner(OrderedDict(b=L.Rescaling(1.0)(image), a=L.Rescaling(0.01)(image)))


def two_outputs(image):
    split = functional((3,), lambda x: [L.Rescaling(2.0)(x), L.Rescaling(5.0)(x)])
    return keras.Sequential([keras.Input((3,)), split, L.Add()])(image)


S = (5, 4, 2)
MODELS = {
    "dense": lambda: sequential((6,), L.Dense(5, activation="relu"), L.Dense(3)),
    "deep": lambda: sequential((6,), *(L.Dense(6, activation="leaky_relu") for _ in range(6))),
    "conv": lambda: sequential(S, L.Conv2D(3, 3, padding="same", activation="relu"), L.Conv2D(2, 2)),
    "strided": lambda: sequential(S, L.Conv2D(3, 3, strides=2, padding="same"), L.PReLU(), L.Conv2D(2, 1)),
    "dilated": lambda: sequential(S, L.Conv2D(3, 2, dilation_rate=2, activation="mish"), L.Flatten()),
    "grouped": lambda: sequential(S, L.Conv2D(4, 3, groups=2, activation="relu6"), L.LeakyReLU(1.5)),
    "depthwise": lambda: sequential(S, L.DepthwiseConv2D(3, padding="same", activation="selu")),
    "separable": lambda: sequential(S, L.SeparableConv2D(3, 3, padding="same", depth_multiplier=2)),
    "transpose": lambda: sequential(S, L.Conv2DTranspose(2, 3, strides=2, activation="hard_silu")),
    "one axis": lambda: sequential((9, 2), L.Conv1D(3, 3, activation="sigmoid"), L.AveragePooling1D(3, 2)),
    "three axes": lambda: sequential(
        (3, 4, 3, 1), L.Conv3D(2, 2, activation="softsign"), L.GlobalAveragePooling3D()
    ),
    "pooling": lambda: sequential(S, L.AveragePooling2D(3, 1, "same"), L.MaxPooling2D(3, 2, "same")),
    "plain cnn": lambda: sequential(
        (8, 8, 1),
        L.Rescaling(2.0, offset=-1),
        L.ZeroPadding2D(1),
        L.Conv2D(3, 3),
        L.BatchNormalization(),
        L.ReLU(),
        L.MaxPooling2D(2),
        L.Dropout(0.5),
        L.UpSampling2D(2),
        L.Cropping2D(1),
        L.Conv2D(3, 3, strides=2),
        L.Activation("gelu"),
        L.GlobalMaxPooling2D(),
        L.Dense(3),
    ),
    "residual": lambda: functional(S, residual),
    "inception": lambda: functional(S, inception),
    "operators": lambda: functional(S, operators),
    "shared": lambda: functional((6, 6, 2), shared),
    "nested": lambda: functional(S, nested),
    "extremes": lambda: functional(S, extremes_of),
    "two inputs": two_inputs,
    "broadcasting": lambda: functional(S, broadcasting),
    "activations": lambda: functional(S, activations),
    "ordered inputs": lambda: functional((3,), ordered_inputs),
    "two outputs": lambda: functional((3,), two_outputs),
    "normalization": lambda: sequential((3,), L.Normalization(mean=[1, 2, 3], variance=[4, 0.25, 9])),
    "spectral normalization": lambda: sequential(S, L.SpectralNormalization(L.Conv2D(2, 3))),
}


@pytest.mark.parametrize("kind", MODELS)
def test_no_jacobian_and_no_ratio_is_above_the_bound(kind):
    model = randomize(MODELS[kind]())
    bound = float(lipschitz_bound(model))
    norms = [jacobian_norm(model, point) for point in points(model, 4)]
    assert 0 < max(norms) <= bound * (1 + 1e-12)
    assert largest_ratio(model) <= bound * (1 + 1e-9)


LINEAR = {
    "same": ((5, 4, 2), L.Conv2D, {"filters": 3, "kernel_size": 3, "padding": "same"}),
    "valid": ((5, 4, 2), L.Conv2D, {"filters": 3, "kernel_size": (2, 3)}),
    "strides": ((5, 4, 2), L.Conv2D, {"filters": 3, "kernel_size": 3, "strides": 2}),
    "dilation": ((6, 5, 2), L.Conv2D, {"filters": 3, "kernel_size": 2, "dilation_rate": 3}),
    "groups": ((5, 4, 4), L.Conv2D, {"filters": 6, "kernel_size": 3, "groups": 2}),
    "transpose": ((4, 3, 2), L.Conv2DTranspose, {"filters": 3, "kernel_size": 3, "strides": 2}),
    "depthwise": ((5, 4, 2), L.DepthwiseConv2D, {"kernel_size": 3, "depth_multiplier": 2}),
    "one axis": ((7, 2), L.Conv1D, {"filters": 3, "kernel_size": 3}),
    "three axes": ((3, 3, 4, 1), L.Conv3D, {"filters": 2, "kernel_size": 2}),
    "dense": ((5,), L.Dense, {"units": 7}),
    "dense on images": ((3, 4, 5), L.Dense, {"units": 2}),
    "batch normalization": ((3, 4, 5), L.BatchNormalization, {}),
    "no scale": ((3, 4, 5), L.BatchNormalization, {"scale": False, "epsilon": 0.1}),
    "average": ((6, 6, 1), L.AveragePooling2D, {"pool_size": 2}),
    "average, overlapping": ((7, 6, 1), L.AveragePooling2D, {"pool_size": 3, "strides": 2}),
    "average, border": (
        (5, 6, 1),
        L.AveragePooling2D,
        {"pool_size": (3, 2), "strides": 1, "padding": "same"},
    ),
    "average, all": ((2, 3, 1), L.AveragePooling2D, {"pool_size": 7, "strides": 1, "padding": "same"}),
    "average, one axis": ((9, 2), L.AveragePooling1D, {"pool_size": 4, "strides": 3, "padding": "same"}),
    "global average": ((3, 5, 2), L.GlobalAveragePooling2D, {}),
    "rescaling": ((3, 3, 2), L.Rescaling, {"scale": [0.5, -3.0]}),
    "one scale for all": ((3, 3, 2), L.Rescaling, {"scale": -2.0, "offset": [1.0, 2.0]}),
    "normalization": ((3,), L.Normalization, {"mean": [0, 1, 2], "variance": [0.5, 2, 3]}),
    "inverse": ((3,), L.Normalization, {"mean": [0, 1, 2], "variance": [0.5, 2, 3], "invert": True}),
    "up": ((3, 2, 2), L.UpSampling2D, {"size": (2, 3)}),
    "up, one axis": ((3, 2), L.UpSampling1D, {"size": 3}),
    "repeat": ((3,), L.RepeatVector, {"n": 5}),
    "reshape": ((3, 4), L.Reshape, {"target_shape": (6, 2)}),
    "permute": ((3, 4), L.Permute, {"dims": (2, 1)}),
    "padding": ((3, 4, 1), L.ZeroPadding2D, {"padding": 2}),
    "cropping": ((5, 4, 1), L.Cropping2D, {"cropping": 1}),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_linear_layers_have_their_exact_norm(kind):
    shape, layer, options = LINEAR[kind]
    model = randomize(sequential(shape, layer(**options)))
    norm = jacobian_norm(model, points(model, 1)[0])
    assert norm * (1 - 1e-12) <= float(lipschitz_bound(model)) <= norm * (1 + EXACT)


def test_channels_first():
    options = {"padding": "same", "data_format": "channels_first"}
    model = sequential((2, 5, 4), L.Conv2D(3, 3, **options), L.GlobalAveragePooling2D("channels_first"))
    kernel = model.layers[0].kernel
    expected = tf_frobreg.singular_values(kernel, (5, 4))[0] / math.sqrt(20)
    assert float(lipschitz_bound(model)) == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(("pool", "strides", "windows"), [(2, 2, 1), (3, 2, 2), (3, 1, 3), (5, 2, 3)])
def test_max_pooling_counts_the_windows_of_an_input(pool, strides, windows):
    model = sequential((12, 12, 1), L.MaxPooling2D(pool, strides))
    assert float(lipschitz_bound(model)) == pytest.approx(windows, rel=EXACT)
    # An input that is the maximum of all its windows moves all of them.
    peak = np.zeros((1, 12, 12, 1))
    peak[0, 4, 4] = 1.0
    assert np.linalg.norm(model(peak)) == pytest.approx(windows)


@pytest.mark.parametrize("merge", [L.Concatenate, L.Maximum, L.Minimum])
def test_merges_that_reach_the_root_of_the_sum_of_squares(merge):
    image = keras.Input((1,))
    branches = [L.Dense(2, name="left"), L.Dense(2, name="right")]
    model = keras.Model(image, merge()([branch(image) for branch in branches]))
    other = 10.0 if merge is L.Minimum else -10.0
    for place, branch in enumerate(branches):  # each branch decides one entry of the maximum
        branch.kernel.assign(np.eye(2)[[place]])
        branch.bias.assign(np.where(np.arange(2) == place, 0.0, other))
    bound = float(lipschitz_bound(model))
    assert bound == pytest.approx(math.sqrt(2), rel=EXACT)
    assert jacobian_norm(model, points(model, 1)[0]) == pytest.approx(bound)


ORTHOGONAL = {
    "dense": lambda: sequential((8,), *(L.Dense(8, kernel_initializer="orthogonal") for _ in range(4))),
    "conv": lambda: sequential(
        (6, 5, 4),
        L.Conv2D(8, 1, kernel_initializer="orthogonal"),
        L.ReLU(),
        L.Conv2D(4, 1, kernel_initializer="orthogonal", activation="relu"),
        L.Flatten(),
        L.Dense(10, kernel_initializer="orthogonal"),
    ),
    "identity": lambda: sequential((3, 3, 2), L.Identity(), L.Dropout(0.3), L.Activation("linear")),
    "two residuals": lambda: functional(
        (4,), lambda x: L.Average()([x, L.Dense(4, "linear", True, "identity")(x)])
    ),
}


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_orthogonal_networks_have_the_bound_1(kind):
    model = ORTHOGONAL[kind]()
    assert float(lipschitz_bound(model)) == pytest.approx(1, abs=1e-9)
    positive = tf.abs(points(model, 1))[0]
    assert jacobian_norm(model, positive) <= 1 + 1e-9


@pytest.mark.parametrize("module", [keras.activations, keras.ops], ids=["activations", "ops"])
@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_those_of_the_functions(name, module):
    function = getattr(module, name, None)
    if function is None:
        pytest.skip("Keras has no such operation")
    # 0 is not among the points: TensorFlow adds up both slopes of CELU there.
    x = tf.constant(np.linspace(-40, 40, 800_000))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    steepest = float(tf.reduce_max(tf.abs(tape.gradient(y, x))))
    assert steepest <= SLOPES[name] * (1 + 1e-12)
    assert steepest >= SLOPES[name] * (1 - 1e-3)
    ratios = np.abs(np.diff(y)) / np.diff(x)  # no jump
    assert ratios.max() <= SLOPES[name] * (1 + 1e-9)


def test_the_slope_of_gelu_has_a_formula():
    root = math.sqrt(2)
    slope = scipy.special.ndtr(root) + root * math.exp(-1) / math.sqrt(2 * math.pi)
    assert slope == pytest.approx(SLOPES["gelu"], rel=1e-4)


@pytest.mark.parametrize(
    ("layer", "slope"),
    [(L.ReLU(negative_slope=1.5), 1.5), (L.LeakyReLU(2.0), 2), (L.ELU(3.0), 3), (L.ELU(0.5), 1)],
)
def test_slopes_of_layers(layer, slope):
    assert float(lipschitz_bound(sequential((3,), layer))) == slope
    as_activation = sequential((3,), L.Dense(3, activation=layer, kernel_initializer="identity"))
    assert float(lipschitz_bound(as_activation)) == pytest.approx(slope, rel=EXACT)


@pytest.mark.parametrize("layer", [cls for cls in SAME_IN_INFERENCE if cls is not L.InputLayer])
def test_what_is_the_identity_in_inference(layer):
    arguments = {
        L.Identity: (),
        L.ActivityRegularization: (),
        L.RandomFlip: (),
        L.RandomTranslation: (0.3, 0.3),
    }
    made = layer(*arguments.get(layer, (0.3,)))
    rank = {L.SpatialDropout1D: 2, L.SpatialDropout3D: 4}.get(layer, 3)
    x = np.random.rand(2, *[4] * (rank - 1), 3)
    np.testing.assert_array_equal(made(x, training=False), x)


def convolutions(*shape):
    layers = [L.Conv2D(4, 3, padding="same"), L.Conv2D(6, 3, strides=2), L.DepthwiseConv2D(3)]
    return randomize(
        sequential(shape, *layers, L.Conv2DTranspose(3, 3, strides=2), L.Conv2D(2, 2, dilation_rate=2))
    )


@pytest.mark.parametrize("method", ["torus", "symbol", "taps"])
def test_every_method_is_above_the_exact_bound(method, monkeypatch):
    exact = lipschitz_bound(convolutions(20, 18, 2))
    module = tf_frobreg.spectrum.upper_bound
    monkeypatch.setattr(module, "DECOMPOSED", 1)
    if method != "torus":
        monkeypatch.setattr(module, "TORUS_WORK", 0)
    if method == "taps":
        monkeypatch.setattr(module, "LARGEST_WORK", 0)
    found = lipschitz_bound(convolutions(20, 18, 2))
    assert {row.method for row in exact.layers} == {"decomposition"}
    assert {row.method for row in found.layers} == {method}
    for row, reference in zip(found.layers, exact.layers, strict=True):
        assert reference.bound <= row.bound * (1 + 1e-12)
        assert row.bound <= reference.bound * (4 if method == "taps" else 1.1)


def test_a_model_of_open_size():
    model = randomize(sequential((None, None, 2), L.Conv2D(3, 3, padding="same"), L.GlobalAveragePooling2D()))
    with pytest.raises(ValueError, match=r"input_size must be given .* Received: input_size=None"):
        lipschitz_bound(model)
    expected = tf_frobreg.singular_values(model.layers[0].kernel, (6, 7))[0] / math.sqrt(42)
    name = model.inputs[0].name
    for size in ((6, 7), {name: (6, 7)}):
        assert float(lipschitz_bound(model, size)) == pytest.approx(expected, rel=EXACT)
    with pytest.raises(ValueError, match="input_size must have names of inputs"):
        lipschitz_bound(model, {"nonsense": 6})


def test_shared_layers_and_nested_models_have_a_row_for_each_call():
    rows = lipschitz_bound(functional((6, 6, 2), shared)).layers
    assert [row.kind for row in rows] == ["Conv2D, tanh", "MaxPooling2D", "Conv2D, tanh", "Conv2D, tanh"]
    assert len({row.name for row in rows}) == 2
    names = [row.name for row in lipschitz_bound(functional(S, nested)).layers]
    assert [name.count("/") for name in names] == [1, 1, 1, 1, 0, 0]


def test_the_report():
    bound = lipschitz_bound(randomize(functional(S, residual)))
    text = str(bound)
    assert text.startswith("Lipschitz constant at most ")
    assert float(text.split()[4].strip(",")) >= bound.value * (1 - 1e-9)  # never rounded down
    records = bound.records()
    assert [record["from_input"] for record in records][-1] == bound.value == float(bound)
    (merge,) = [record for record in records if record["kind"] == "Add"]
    assert merge["bound"] is None
    assert "<table>" in bound._repr_html_()


class Doubling(L.Layer):
    def call(self, x):
        return 2 * x


class OwnReLU(L.ReLU):
    def call(self, x):
        return 3 * x


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.top = L.Dense(2)

    def call(self, x):
        return self.top(x)


def of_training(image):
    return L.BatchNormalization(name="norm")(image, training=True)


class OwnMerge(L.Add):
    def _merge_function(self, inputs):
        return 10 * super()._merge_function(inputs)


class OwnFlip(L.RandomFlip):
    def transform_images(self, images, transformation, training=True):
        return 10 * images


class OwnCall(L.Dense):
    def __call__(self, *args, **kwargs):
        return 10 * super().__call__(*args, **kwargs)


class Masking(L.Dropout):
    def compute_mask(self, inputs, previous_mask):
        return keras.ops.convert_to_tensor([[True, False, False]])


class OwnModel(keras.Model):
    def __init__(self):
        image = keras.Input((3,))
        super().__init__(image, L.Dense(2)(image))

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class OnlyInPython(L.Dense):
    def __init__(self, units, **options):
        super().__init__(units, **options)

    def get_config(self):
        return super().get_config()

    def own_helper(self):
        return 3


def test_images_are_not_changed_at_random_in_inference():
    layers = [L.RandomFlip(), L.RandomRotation(0.5), L.RandomContrast(0.5)]
    for model in (
        sequential(S, *layers),
        functional(S, lambda x: layers[2](layers[1](layers[0](x)))),
    ):
        assert float(lipschitz_bound(model)) == 1


def with_own_attribute():
    layer = L.Dropout(0.5, name="top")
    layer.call = lambda x: 10 * x
    return sequential((3,), layer)


def of_mask(image):
    return L.GlobalAveragePooling1D(name="top")(image, mask=np.array([[True, False, False]]))


def of_mask_on_a_tensor(image):
    image = L.Identity()(image)
    image._keras_mask = np.array([[True, False, False]])  # as set_keras_mask of Keras does
    return L.GlobalAveragePooling1D(name="top")(image)


def of_mask_on_a_model(image):
    inner = sequential((3, 2), L.GlobalAveragePooling1D())
    inner.name = "top"
    return inner(image, mask=np.array([[True, False, False]]))


def of_another_rank(image):
    inner = functional((4, 3), L.GlobalAveragePooling1D())
    inner.name = "top"
    return inner(image)


def of_another_order(image):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    inner = keras.Model(OrderedDict(b=b, a=a), L.Add()([a, b]), name="top")
    return inner(OrderedDict(a=image, b=L.Rescaling(0.01)(image)))


def integers(graph):
    image = keras.Input((3,), dtype="uint8")
    return keras.Model(image, graph(image))


def over_the_batch():
    image = keras.Input(batch_shape=(1, 3))
    return keras.Model(image, image * np.ones((5, 3)))


REFUSED = {
    "its constants broadcast the shape (1, 4, 4, 1) to (1, 4, 4, 3)": lambda: sequential(
        (4, 4, 1), L.Rescaling([1 / 0.229, 1 / 0.224, 1 / 0.225], name="top")
    ),
    "its constants broadcast the shape (1, 1) to (1, 3)": lambda: sequential(
        (1,), L.Rescaling(1.0, offset=[0.0, 1.0, 2.0], name="top")
    ),
    "its constants broadcast the shape (1, 3) to (5, 3)": lambda: sequential(
        (3,), L.Rescaling(np.ones((5, 3)), name="top")
    ),
    "could not convert string to float": lambda: sequential((3,), L.Rescaling(1.0, offset="a", name="top")),
    "it is called with a mask": lambda: functional((3, 2), of_mask),
    "called with a mask, on a tensor": lambda: functional((3, 2), of_mask_on_a_tensor),
    "called with a mask, of a model": lambda: functional((3, 2), of_mask_on_a_model),
    "its class, Masking, overrides compute_mask": lambda: sequential((3, 2), Masking(0.5, name="top")),
    "its class, OwnMerge, overrides _merge_function": lambda: functional(
        (3,), lambda x: OwnMerge(name="top")([x, x])
    ),
    "its class, OwnFlip, overrides transform_images": lambda: sequential(S, OwnFlip(name="top")),
    "its class, OwnCall, overrides __call__": lambda: sequential((3,), OwnCall(2, name="top")),
    "its class, OwnModel, overrides __call__": OwnModel,
    "its class, Dropout, overrides call": with_own_attribute,
    "its input has the shape (None, 4, 3)": lambda: functional((4, 3, 1), of_another_rank),
    "another order of them": lambda: functional((3,), of_another_order),
    "its input is uint8; bounds hold for floating point": lambda: integers(lambda x: x + x),
    "its input is uint8": lambda: integers(lambda x: L.Average(name="top")([x, x])),
    "it computes in int32; bounds hold for floating point": lambda: sequential(
        (3,), L.Rescaling(1.5, dtype="int32", name="top")
    ),
    "its activation is a layer, Dense": lambda: sequential(
        (3,), L.Dense(3, activation=L.Dense(3), name="top")
    ),
    "its activation is a layer, GlobalAveragePooling2D": lambda: sequential(
        (4, 4, 1), L.Conv2D(2, 3, strides=2, activation=L.GlobalAveragePooling2D(), name="top")
    ),
    "its activation is a layer, PReLU": lambda: sequential(
        (3,), L.Dense(3, activation=L.PReLU(), name="top")
    ),
    "its output is complex64": lambda: functional((3,), lambda x: x * (3 + 4j)),
    "its weights or constants are complex": lambda: sequential((3,), L.Rescaling(3 + 4j, name="top")),
    "it changes the number of examples in a batch": over_the_batch,
    "its input has no entries: shape (None, 0, 4, 1)": lambda: sequential(
        (0, 4, 1), L.GlobalAveragePooling2D(name="top")
    ),
    "its activation, relu, is not of keras.activations": lambda: sequential(
        (3,), L.Dense(2, activation=tf.nn.relu, name="top")
    ),
    "alpha=2.0 is not the default": lambda: functional((3,), lambda x: keras.activations.celu(x, alpha=2.0)),
    "threshold=0.5 makes it jump, as an operation": lambda: functional(
        (3,), lambda x: keras.activations.relu(x, threshold=0.5)
    ),
    "it mixes the examples of a batch": lambda: functional((4,), lambda x: keras.ops.reshape(x, (-1, 2))),
    "it divides by 0": lambda: functional((3,), lambda x: x / np.array([0.0, 1.0, 2.0])),
    "no bound is known for the operation TrueDivide": lambda: functional((3,), lambda x: 1 / x),
    "its weights or constants hold NaN": lambda: functional((3,), lambda x: x + np.nan),
    "it is a softmax; a certificate needs logits, as an operation": lambda: functional(
        (3,), keras.ops.softmax
    ),
    "its activation is softmax; a certificate needs logits": lambda: sequential(
        (3,), L.Dense(2, activation="softmax", name="top")
    ),
    "it is a softmax; a certificate needs logits": lambda: sequential((3,), L.Softmax(name="top")),
    "its activation is log_softmax": lambda: sequential((3,), L.Activation("log_softmax", name="top")),
    "no bound is known for its activation, exponential": lambda: sequential(
        (3,), L.Dense(2, activation="exponential", name="top")
    ),
    "no bound is known for its activation, square": lambda: sequential(
        (3,), L.Dense(2, activation=keras.ops.square, name="top")
    ),
    "no bound is known for Lambda": lambda: sequential((3,), L.Lambda(lambda x: x, name="top")),
    "no bound is known for Doubling": lambda: sequential((3,), Doubling(name="top")),
    "its class, OwnReLU, overrides call": lambda: sequential((3,), OwnReLU(name="top")),
    "no bound is known for LSTM": lambda: sequential((3, 2), L.LSTM(2, name="top")),
    "no bound is known for Embedding": lambda: sequential((3,), L.Embedding(5, 2, name="top")),
    "no bound is known for LayerNormalization": lambda: sequential((3,), L.LayerNormalization(name="top")),
    "no bound is known for GroupNormalization": lambda: sequential((4,), L.GroupNormalization(2, name="top")),
    "no bound is known for Multiply": lambda: functional((3,), lambda x: L.Multiply(name="top")([x, x])),
    "no bound is known for Dot": lambda: functional((3,), lambda x: L.Dot(1, name="top")([x, x])),
    "no bound is known for the operation Multiply": lambda: functional((3,), lambda x: x * x),
    "no bound is known for the operation Exp": lambda: functional((3,), keras.ops.exp),
    "no bound is known for MultiHeadAttention": lambda: functional(
        (3, 2), lambda x: L.MultiHeadAttention(1, 2, name="top")(x, x)
    ),
    "it is called with training=True": lambda: functional((3,), of_training),
    "threshold=0.5 makes it jump": lambda: sequential((3,), L.ReLU(threshold=0.5, name="top")),
    "interpolation='bilinear' has no known bound": lambda: sequential(
        S, L.UpSampling2D(2, interpolation="bilinear", name="top")
    ),
    "it joins batches": lambda: functional((3,), lambda x: L.Concatenate(0, name="top")([x, x])),
    "padding='causal' is not supported": lambda: sequential(
        (5, 2), L.Conv1D(2, 2, padding="causal", name="top")
    ),
}


@pytest.mark.filterwarnings("ignore:.*this layer does not support masking")
@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_bounded_is_refused_by_name(reason):
    model = REFUSED[reason]()
    with pytest.raises(ValueError) as error:
        lipschitz_bound(model)
    message = str(error.value)
    assert reason.partition(", as an")[0].partition(", on a")[0].partition(", of a")[0] in message
    last = model.outputs[0]._keras_history.operation
    assert any(f"layer {layer.name!r} (" in message for layer in (*model.layers, last, model))
    assert "\n" not in message


class OwnTraining(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


def test_a_subclass_that_computes_what_its_class_does_has_a_bound():
    image = keras.Input((3,))
    model = OwnTraining(image, OnlyInPython(2, kernel_initializer="orthogonal")(image))
    assert float(lipschitz_bound(model)) == pytest.approx(1, rel=EXACT)


def test_the_bound_knows_the_shapes_of_its_inputs_and_its_number():
    bound = lipschitz_bound(two_inputs())
    assert bound.input_shapes == [(None, 4, 4, 1), (None, 6)]
    assert f"{bound:.3f}" == f"{bound.value:.3f}"
    assert f"{bound}" == str(bound)


def test_weights_that_are_not_finite_are_refused():
    model = sequential((3,), L.Dense(2, name="top"))
    model.layers[0].kernel.assign(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="layer 'top' .* NaN"):
        lipschitz_bound(model)


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match="model must have layers"):
        lipschitz_bound(keras.Sequential([keras.Input((4,))]))


def test_models_without_a_graph_are_refused():
    model = Subclassed()
    with pytest.raises(ValueError, match="must be built"):
        lipschitz_bound(model)
    model(np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"Sequential or Functional .* Subclassed"):
        lipschitz_bound(model)
    with pytest.raises(TypeError, match="must be a Keras model"):
        lipschitz_bound(3)
    outer = functional((3,), lambda x: model(x))
    with pytest.raises(ValueError, match="no bound is known for Subclassed"):
        lipschitz_bound(outer)
