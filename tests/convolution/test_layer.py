"""Functions of a built Keras layer: its kernel and geometry are read."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import KERAS_CASES, Case, label, normal
from oracles import impulse_matrix

import tf_frobreg as fr

FUNCTIONS = {
    "transformation_matrix": fr.transformation_matrix,
    "singular_values": fr.singular_values,
    "extreme_singular_values": lambda *a, **kw: fr.extreme_singular_values(*a, **kw)[:2],
    "spectral_norm": fr.spectral_norm,
    "condition_number": fr.condition_number,
    "frobenius_penalty": lambda *a, **kw: fr.frobenius_penalty(*a, alpha=2, **kw),
    "frobenius_gradient": fr.frobenius_gradient,
    "penalty_excess": fr.penalty_excess,
    "spectral_penalty": lambda *a, **kw: fr.spectral_penalty(*a, power_steps=3, **kw),
    "clip_singular_values": fr.clip_singular_values,
    "regularize_kernel": lambda *a, **kw: fr.regularize_kernel(*a, max_steps=2, **kw).kernel,
}
SHAPE_FUNCTIONS = {
    "penalty_floor": fr.penalty_floor,
    "toeplitz_indices": lambda *a, **kw: fr.toeplitz_indices(*a, **kw).positions,
}
# Each kind of layer, each argument of the geometry.
CASES = [
    Case((3, 2, 2, 3), (5, 6), padding="valid"),
    Case((3, 3, 2, 3), (7, 6), strides=2),
    Case((3, 3, 2, 2), (7, 6), dilation_rate=2),
    Case((3, 3, 2, 4), (5, 4), groups=2),
    Case((3, 3, 3, 2), (4, 5), kind="depthwise"),
    Case((3, 3, 2, 3), (3, 4), kind="transpose", strides=2),
    Case((3, 2, 3), (7,)),
    Case((2, 3, 2, 2, 2), (3, 4, 3)),
    Case((5, 3), ()),
]


def outcome(function, *arguments, **options):
    """What a function returns as an array, or the text of its error."""
    try:
        found = function(*arguments, **options)
    except ValueError as error:
        return str(error)
    return np.asarray(tf.sparse.to_dense(found) if isinstance(found, tf.SparseTensor) else found)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_layer_stands_for_its_kernel_and_geometry(case, name):
    layer = case.layer(case.kernel())
    found = outcome(FUNCTIONS[name], layer)
    expected = outcome(FUNCTIONS[name], case.kernel(), case.image, **case.geometry)
    assert found.shape == expected.shape if isinstance(found, np.ndarray) else "strides" in found
    assert np.array_equal(found, expected)
    assert np.array_equal(layer.kernel, case.kernel())  # regularize_kernel changes nothing


@pytest.mark.parametrize("name", SHAPE_FUNCTIONS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_layer_stands_for_the_shape_of_its_kernel(case, name):
    found = SHAPE_FUNCTIONS[name](case.layer(case.kernel()))
    assert np.array_equal(found, SHAPE_FUNCTIONS[name](case.kernel_shape, case.image, **case.geometry))


def test_index_set_takes_a_layer():
    case = Case((3, 3, 2, 3), (7, 6), strides=2)
    found = fr.index_set(case.layer(case.kernel()), None, (0, 1, 1, 2))
    assert np.array_equal(found, fr.index_set((3, 3, 2, 3), (7, 6), (0, 1, 1, 2), strides=2))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_reshaped_penalty_takes_a_layer_of_any_image_size(case):
    layer = case.layer(case.kernel())
    assert fr.reshaped_penalty(layer) == fr.reshaped_penalty(case.kernel())


def test_the_reshaped_penalty_needs_no_image_size():
    layer = keras.layers.Conv2D(4, 3)
    layer.build((None, None, None, 2))
    assert fr.reshaped_penalty(layer) == fr.reshaped_penalty(layer.kernel)


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_from_layer_describes_the_matrix_of_the_layer(case):
    kernel = case.kernel()
    layer = case.layer(kernel)
    conv = fr.Convolution.from_layer(layer)
    assert conv == fr.Convolution.of(case.kernel_shape, case.image, case.geometry)
    truth = impulse_matrix(layer, case.image, case.channels)
    found = fr.transformation_matrix(kernel, conv.input_size, **conv.geometry)
    np.testing.assert_allclose(tf.sparse.to_dense(found), truth, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(tf.sparse.to_dense(fr.transformation_matrix(layer)), truth, atol=1e-12)


def test_the_parts_of_a_separable_layer_make_up_the_layer():
    layer = keras.layers.SeparableConv2D(5, 3, strides=2, depth_multiplier=2, use_bias=False, dtype="float64")
    keras.Sequential([keras.Input((7, 6, 3)), layer])
    matrices = []
    for part in ("pointwise", "depthwise"):
        conv = fr.Convolution.from_layer(layer, part=part)
        kernel = getattr(layer, f"{part}_kernel")
        matrix = fr.transformation_matrix(kernel, conv.input_size, **conv.geometry)
        matrices.append(tf.sparse.to_dense(matrix).numpy())
    truth = impulse_matrix(layer, (7, 6), 3)
    np.testing.assert_allclose(matrices[0] @ matrices[1], truth, atol=1e-12)
    with pytest.raises(ValueError, match=r"part must be one of \('depthwise', 'pointwise'\)"):
        fr.Convolution.from_layer(layer)
    for function in (fr.singular_values, fr.reshaped_penalty):
        with pytest.raises(TypeError, match="has two kernels: give layer.depthwise_kernel or"):
            function(layer)


def test_a_wrong_part_gets_a_hint():
    layer = keras.layers.SeparableConv2D(5, 3, name="sep")
    keras.Sequential([keras.Input((7, 6, 3)), layer])
    with pytest.raises(ValueError, match=r"for layer 'sep'.*'pointwse' \(did you mean 'pointwise'\?\)"):
        fr.Convolution.from_layer(layer, part="pointwse")


def test_part_is_for_separable_layers():
    with pytest.raises(ValueError, match="part must be None for layer .*Received: part='depthwise'"):
        fr.Convolution.from_layer(CASES[0].layer(CASES[0].kernel()), part="depthwise")


def test_the_size_is_that_of_the_calls():
    layer = keras.layers.Conv2D(2, 3)
    keras.Model(first := keras.Input((8, 9, 1)), layer(first))
    assert fr.Convolution.from_layer(layer).input_size == (8, 9)
    assert fr.Convolution.from_layer(layer, 5).input_size == (5, 5)
    keras.Model(second := keras.Input((12, 9, 1)), layer(second))
    with pytest.raises(
        ValueError, match=r"called at the sizes \(8, 9\), \(12, 9\)\. .*model_spectrum\(model\)"
    ):
        fr.singular_values(layer)
    assert np.array_equal(fr.singular_values(layer, 6), fr.singular_values(layer.kernel, 6, padding="valid"))


def test_an_open_size_must_be_given():
    layer = keras.layers.Conv2D(2, 3)
    keras.Sequential([keras.Input((None, 9, 1)), layer])
    with pytest.raises(
        ValueError, match=r"input_size must be given for layer .*leaves its size open, \(None, 9\)"
    ):
        fr.frobenius_penalty(layer)
    assert fr.Convolution.from_layer(layer, (8, 9)).input_size == (8, 9)


def test_channels_may_come_first():
    layer = keras.layers.Conv2D(2, 3, data_format="channels_first")
    layer.build((None, 1, 8, 9))
    assert fr.Convolution.from_layer(layer).input_size == (8, 9)


def test_padding_may_be_circular_for_a_layer():
    case = CASES[0]
    found = fr.singular_values(case.layer(case.kernel()), padding="circular")
    assert np.array_equal(found, fr.singular_values(case.kernel(), case.image, padding="circular"))


class Overriding(keras.layers.Conv2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


class Standardized(keras.layers.Conv2D):
    @property
    def kernel(self):
        return self._kernel - tf.reduce_mean(self._kernel, (0, 1, 2))


def test_a_computed_kernel_is_the_one_that_is_measured():
    layer = Standardized(2, 3, use_bias=False, dtype="float64")
    keras.Sequential([keras.Input((5, 6, 2)), layer])
    truth = np.linalg.svd(impulse_matrix(layer, (5, 6), 2), compute_uv=False)
    np.testing.assert_allclose(fr.singular_values(layer), truth, atol=1e-12)
    with tf.GradientTape() as tape:
        penalty = fr.frobenius_penalty(layer)
    assert np.abs(tape.gradient(penalty, layer._kernel)).max() > 0


def test_lora_counts_in_the_kernel_of_a_layer():
    layer = keras.layers.Conv2D(2, 3, use_bias=False, dtype="float64")
    keras.Sequential([keras.Input((5, 6, 2)), layer])
    layer.enable_lora(1)
    layer.lora_kernel_b.assign(normal(*layer.lora_kernel_b.shape))
    truth = np.linalg.svd(impulse_matrix(layer, (5, 6), 2), compute_uv=False)
    np.testing.assert_allclose(fr.singular_values(layer), truth, atol=1e-12)


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (
            keras.layers.Conv2D(2, 3),
            {},
            "layer .conv2d.* has not been built: build it, or call it once on a batch",
        ),
        (built(Overriding(2, 3), 8, 8, 1), {}, "its class, Overriding, overrides call"),
        (built(keras.layers.Conv1D(2, 3, padding="causal"), 8, 1), {}, "padding='causal' is not supported"),
        (keras.layers.Flatten(), {}, "layer must be a Keras convolution or Dense layer. Received: layer=<Fl"),
        (keras.Sequential(), {}, "layer must be a Keras convolution or Dense layer. Received: layer=<Seq"),
        (built(keras.layers.Dense(2), 3), {"input_size": 8}, "input_size must be .. for a Dense kernel"),
        (built(keras.layers.Conv2D(2, 3), 8, 8, 1), {"strides": 2}, "strides cannot be given for a layer"),
        (built(keras.layers.Conv2D(2, 3), 8, 8, 1), {"pading": "same"}, "unknown .*did you mean 'padding'"),
        (built(keras.layers.Conv2D(2, 3), 8, 8, 1), {"input_size": (8, 8, 1)}, r"write \(8, 8\), without"),
    ],
)
def test_layers_that_are_refused(layer, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fr.frobenius_penalty(layer, **options)
    if not options:
        with pytest.raises((TypeError, ValueError), match=message):
            fr.reshaped_penalty(layer)
        with pytest.raises((TypeError, ValueError), match=message):
            fr.penalty_floor(layer)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients_reach_the_variable_of_the_layer(case):
    layer = case.layer(case.kernel())

    def gradient():
        with tf.GradientTape() as tape:
            penalty = fr.frobenius_penalty(layer)
        return tape.gradient(penalty, layer.kernel)

    expected = fr.frobenius_gradient(case.kernel(), case.image, **case.geometry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = tf.function(gradient)()
    for found in (gradient(), traced):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_traced_function_sees_new_values_of_the_layer():
    layer = CASES[0].layer(CASES[0].kernel())
    penalty = tf.function(lambda: fr.frobenius_penalty(layer))
    before = penalty().numpy()
    layer.kernel.assign(2 * layer.kernel)
    assert penalty().numpy() == pytest.approx(fr.frobenius_penalty(layer).numpy())
    assert penalty().numpy() > 2 * before


def test_a_descent_that_began_with_a_layer_goes_on_with_its_result():
    layer = CASES[0].layer(CASES[0].kernel())
    first = fr.regularize_kernel(layer, max_steps=3)
    again = fr.regularize_kernel(first, CASES[0].image, padding="valid", max_steps=3)
    assert again.num_steps == 6
