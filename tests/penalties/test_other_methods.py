"""What the paper compares itself with: the 2-norm penalty, the projection, the reshaped matrix."""

import copy
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import CIRCULAR_CASES, KERAS_CASES, Case, label
from ids import stable_id
from oracles import naive_matrix

from tf_frobreg import (
    ReshapedRegularizer,
    SingularValueClip,
    SpectralRegularizer,
    clip_singular_values,
    reshaped_penalty,
    singular_values,
    spectral_penalty,
    transformation_matrix,
)
from tf_frobreg.convolution.apply import apply, apply_adjoint
from tf_frobreg.convolution.geometry import Convolution

ALL_CASES = KERAS_CASES + CIRCULAR_CASES


def normal(*shape, seed=1):
    return np.random.RandomState(seed).randn(*shape)


def dense(kernel, case):
    return tf.sparse.to_dense(transformation_matrix(kernel, case.image, **case.geometry))


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_the_map_and_its_adjoint_are_m(case):
    kernel = case.kernel()
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    matrix = dense(kernel, case).numpy()
    ends = [normal(2, *shape) for shape in (conv.input_shape, conv.output_shape)]
    for function, images, expected in [(apply, ends[0], matrix.T), (apply_adjoint, ends[1], matrix)]:
        found = function(tf.constant(kernel), tf.constant(images), conv).numpy()
        assert found.shape[0] == 2
        np.testing.assert_allclose(found.reshape(2, -1), images.reshape(2, -1) @ expected, atol=1e-12)


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_the_map_is_m_in_a_float32_graph_too(case):
    """TensorFlow rewrites graphs, and not always rightly: a padded Conv3D lost its padding."""
    kernel = case.kernel(dtype="float32")
    conv = Convolution.of(kernel.shape, case.image, case.geometry)
    matrix = dense(kernel, case).numpy()
    ends = [normal(2, *shape).astype("float32") for shape in (conv.input_shape, conv.output_shape)]
    for function, images, expected in [(apply, ends[0], matrix.T), (apply_adjoint, ends[1], matrix)]:
        traced = tf.function(lambda k, x, f=function: f(k, x, conv), autograph=False)
        found = traced(tf.constant(kernel), tf.constant(images)).numpy()
        np.testing.assert_allclose(found.reshape(2, -1), images.reshape(2, -1) @ expected, atol=1e-4)


@pytest.mark.parametrize("gram", ["columns", "smaller"])
@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_spectral_penalty_and_its_gradient_are_those_of_an_svd(case, gram):
    kernel, alpha = tf.constant(case.kernel()), 1.3
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernel)
        found = spectral_penalty(
            kernel, case.image, alpha=alpha, gram=gram, power_steps=2000, **case.geometry
        )
        matrix = dense(kernel, case)
        if gram == "smaller" and matrix.shape[0] < matrix.shape[1]:
            matrix = tf.transpose(matrix)
        residual = tf.matmul(matrix, matrix, transpose_a=True) - alpha * tf.eye(
            matrix.shape[1], dtype=matrix.dtype
        )
        expected = tf.linalg.svd(residual, compute_uv=False)
        largest = expected[0]
    assert found.numpy() == pytest.approx(largest.numpy(), rel=1e-5)
    if expected[1] < 0.99 * largest:  # else the penalty has no gradient
        np.testing.assert_allclose(
            tape.gradient(found, kernel), tape.gradient(largest, kernel), atol=1e-4 * largest
        )


def test_spectral_penalty_where_both_ends_are_equally_far():
    kernel = np.zeros((1, 1, 2, 2))
    kernel[0, 0] = np.diag([1.5**0.5, 0.5**0.5])  # σ² − 1 = ±0.5
    assert spectral_penalty(kernel, 4).numpy() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1.0, 1e6])
def test_spectral_penalty_of_multiples_of_the_identity(scale):
    kernel = np.zeros((3, 3, 2, 2))
    kernel[1, 1] = scale * np.eye(2)
    assert spectral_penalty(kernel, 5).numpy() == pytest.approx(abs(scale**2 - 1), rel=1e-12)


def test_spectral_regularizer_follows_the_kernel_with_two_steps_at_a_time():
    kernel = tf.Variable(normal(3, 3, 2, 3))
    regularizer = SpectralRegularizer(6, factor=0.5, alpha=2.0)
    values = [regularizer(kernel).numpy() for _ in range(300)]
    assert values[0] < values[-1] * (1 - 1e-3)
    with tf.GradientTape(persistent=True) as tape:
        last = regularizer(kernel)
        matrix = tf.sparse.to_dense(transformation_matrix(kernel, 6))
        residual = tf.matmul(matrix, matrix, transpose_a=True) - 2.0 * tf.eye(72, dtype=tf.float64)
        expected = 0.5 * tf.linalg.svd(residual, compute_uv=False)[0]
    assert last.numpy() == pytest.approx(expected.numpy(), rel=1e-6)
    np.testing.assert_allclose(
        tape.gradient(last, kernel), tape.gradient(expected, kernel), atol=1e-4 * expected.numpy()
    )
    sigma = singular_values(kernel, 6)
    kernel.assign(1.01 * kernel)
    assert regularizer(kernel).numpy() == pytest.approx(0.5 * (1.01**2 * sigma[0] ** 2 - 2.0), rel=1e-3)


def test_kernels_that_are_gone_leave_nothing_to_others():
    regularizer = SpectralRegularizer(5)
    for number in range(60):
        shape = (3, 3, 1 + number % 3, 2)
        regularizer(tf.Variable(normal(*shape)))
        layer = keras.layers.Conv2D(2, 3)
        layer.build((None, 5, 5, shape[2]))
        regularizer(layer.kernel)
    assert len(regularizer._vectors) < 20
    assert copy.deepcopy(regularizer).get_config() == regularizer.get_config()


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e9), ("float32", 1e-30), ("float64", 1e100)])
def test_spectral_penalty_of_badly_scaled_kernels(dtype, scale):
    kernel = (scale * normal(3, 3, 1, 2)).astype(dtype)
    sigma = singular_values(kernel, 8)
    expected = max(abs(sigma[0] ** 2 - 1), abs(sigma[-1] ** 2 - 1))
    assert spectral_penalty(kernel, 8, power_steps=500).numpy() == pytest.approx(expected, rel=1e-4)
    regularizer = SpectralRegularizer(8, factor=1.0)
    variable = tf.Variable(1e10 * kernel)
    regularizer(variable)
    variable.assign(normal(3, 3, 1, 2))
    values = [regularizer(variable).numpy() for _ in range(100)]
    expected = singular_values(variable, 8)[0] ** 2 - 1
    assert values[-1] == pytest.approx(expected, rel=1e-4)


def small_model(**options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for _ in range(2):
        model.add(keras.layers.Conv2D(3, 3, padding="same", use_bias=False, **options))
    model.add(keras.layers.GlobalAveragePooling2D())
    return model


def fit(model, epochs=1, **options):
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    random = np.random.RandomState(0)
    model.fit(random.randn(16, 8, 8, 3), random.randn(16, 3), batch_size=4, epochs=epochs, verbose=0)


MODES = [{}, {"jit_compile": True}, {"run_eagerly": True}]


@pytest.mark.parametrize("mode", MODES, ids=stable_id)
def test_one_spectral_regularizer_serves_two_layers_in_training(mode):
    model = small_model(kernel_regularizer=SpectralRegularizer(8, factor=0.1))
    before = [singular_values(layer.kernel, 8) for layer in model.layers[:2]]
    fit(model, epochs=30, **mode)
    for layer, sigma in zip(model.layers, before, strict=False):
        after = singular_values(layer.kernel, 8)
        assert abs(after**2 - 1).max() < 0.8 * abs(sigma**2 - 1).max()


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=stable_id)
def test_the_projection_as_a_constraint(mode):
    model = small_model(kernel_constraint=SingularValueClip(8, high=0.5))
    before = [singular_values(layer.kernel, 8, padding="circular")[0] for layer in model.layers[:2]]
    fit(model, epochs=20, **mode)
    for layer, start in zip(model.layers, before, strict=False):
        assert singular_values(layer.kernel, 8, padding="circular")[0] < 0.6 < start


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_regularizer": SpectralRegularizer([8, 8], 0.1, 2.0, gram="smaller", padding="same")},
        {"kernel_regularizer": ReshapedRegularizer(0.1, 2.0)},
        {"kernel_constraint": SingularValueClip(8, 0.1, 0.9)},
    ],
    ids=lambda options: type(next(iter(options.values()))).__name__,
)
def test_saved_models_come_back(options, tmp_path):
    (name, value), path = next(iter(options.items())), tmp_path / "model.keras"
    model = small_model(**options)
    model.save(path)
    loaded = keras.models.load_model(path)
    again = getattr(loaded.layers[0], name)
    assert type(again) is type(value)
    assert again.get_config() == value.get_config()
    assert type(value).from_config(value.get_config()).get_config() == value.get_config()
    fit(loaded)


def test_a_nan_does_not_stay_in_the_power_steps():
    regularizer = SpectralRegularizer(6, factor=1.0)
    bad, good = np.full((3, 3, 1, 1), np.nan), normal(3, 3, 1, 1)
    assert np.isnan(regularizer(bad).numpy())
    assert np.isfinite(regularizer(good).numpy())


def test_spectral_regularizer_on_two_devices():
    script = """
import tensorflow as tf
devices = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(devices[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np
from tf_frobreg import SpectralRegularizer, singular_values
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
keras.utils.set_random_seed(1)
with strategy.scope():
    conv = keras.layers.Conv2D(3, 3, padding="same", kernel_regularizer=SpectralRegularizer(8, 0.1))
    model = keras.Sequential([keras.Input((8, 8, 3)), conv])
    model.compile(keras.optimizers.SGD(0.05), "mse")
x = np.zeros((16, 8, 8, 3), "float32")
before = abs(singular_values(conv.kernel, 8) ** 2 - 1).max()
model.fit(x, x, batch_size=4, epochs=30, verbose=0)
print(before, abs(singular_values(conv.kernel, 8) ** 2 - 1).max())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, done.stdout.split())
    assert after < 0.8 * before


CLIP_CASES = [
    Case((3, 3, 2, 3), (5, 6), padding="circular"),
    Case((3, 3, 3, 2), (4, 4), padding="circular"),
    Case((2, 4, 2, 2), (6, 5), padding="circular"),
    Case((3, 2, 2, 2), (7, 6), padding="circular", dilation_rate=2),
    Case((3, 3, 2, 4), (5, 4), padding="circular", groups=2),
    Case((3, 2, 3), (7,), padding="circular"),
    Case((2, 3, 2, 2, 2), (3, 4, 3), padding="circular"),
    Case((5, 3), ()),
    Case((3, 3, 3, 2), (5, 4), padding="circular", kind="depthwise"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CLIP_CASES, ids=label)
def test_the_projection_is_the_clipped_dense_operator_cut_to_the_kernel(case, dtype):
    kernel, low, high = case.kernel(dtype=dtype), 0.7, 2.0
    found = clip_singular_values(kernel, case.image, low=low, high=high, **case.geometry)
    assert found.dtype == dtype
    # The clipped matrix is again that of a convolution: its entries are those of the new kernel.
    geometry = {"padding": case.padding, "dilation_rate": case.dilation_rate}
    if case.kind == "depthwise":
        channels, multiplier = kernel.shape[-2:]
        kernel = kernel.reshape(*kernel.shape[:-2], 1, channels * multiplier)
        geometry["groups"] = channels
    else:
        geometry["groups"] = case.groups
    left, sigma, right = np.linalg.svd(
        naive_matrix(kernel.astype("float64"), case.image, **geometry), full_matrices=False
    )
    clipped = left * np.clip(sigma, low, high) @ right
    for entry in np.ndindex(kernel.shape):
        one = np.zeros(kernel.shape)
        one[entry] = 1.0
        places = naive_matrix(one, case.image, **geometry) > 0
        np.testing.assert_allclose(
            found.numpy().reshape(kernel.shape)[entry],
            clipped[places],
            atol=1e-11 if dtype == "float64" else 1e-5,
        )


def test_the_projection_leaves_alone_what_lies_inside():
    kernel = normal(3, 3, 2, 3)
    sigma = singular_values(kernel, 8, padding="circular")
    np.testing.assert_allclose(clip_singular_values(kernel, 8, high=sigma[0] + 1e-9), kernel, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (1, 1, 2, 5), (3, 2, 4), (4, 3), (2, 2, 2, 2, 40)])
def test_reshaped_penalty(shape):
    kernel, alpha = normal(*shape), 1.5
    matrix = kernel.reshape(-1, shape[-1]).T
    expected = np.sum((matrix.T @ matrix - alpha * np.eye(matrix.shape[1])) ** 2)
    assert reshaped_penalty(kernel, alpha=alpha).numpy() == pytest.approx(expected, rel=1e-12)
    assert ReshapedRegularizer(0.1, alpha)(kernel).numpy() == pytest.approx(0.1 * expected, rel=1e-12)


KERNEL = np.ones((3, 3, 1, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spectral_penalty(KERNEL, 8, gram="rows"), "gram must be one of .*Received: gram='rows'"),
        (lambda: spectral_penalty(KERNEL, 8, power_steps=0), "power_steps must be at least 1"),
        (lambda: spectral_penalty(KERNEL, 8, alpha=0), "alpha must be"),
        (lambda: spectral_penalty(KERNEL, 8, stride=2), "unknown argument 'stride'"),
        (lambda: SpectralRegularizer(8, factor=-1), "factor must be"),
        (lambda: SpectralRegularizer(0), "input_size must be at least 1"),
        (lambda: SpectralRegularizer(8, stride=2), "unknown argument 'stride'"),
        (lambda: SpectralRegularizer(8, power_steps=1.5), "power_steps must be an integer"),
        (
            lambda: clip_singular_values(KERNEL, 8, low=2, high=1),
            "low must be at most high. Received: low=2.0",
        ),
        (lambda: clip_singular_values(KERNEL, 8, high=0), "high must be a finite number above 0"),
        (lambda: clip_singular_values(KERNEL, 8, strides=2), "strides must be 1 for the projection"),
        (lambda: clip_singular_values(KERNEL, 2), "input_size must be at least the .* for the projection"),
        (lambda: SingularValueClip(8, low=-1), "low must be a finite number at least 0"),
        (lambda: SingularValueClip(8, strides=(1, 2)), "strides must be 1 for the projection"),
        (lambda: reshaped_penalty(np.nan * KERNEL), "kernel must be finite"),
        (lambda: SingularValueClip(2)(KERNEL), "input_size must be at least"),
        (lambda: reshaped_penalty(np.ones(3)), "kernel must have"),
        (lambda: reshaped_penalty(KERNEL, alpha=-1), "alpha must be"),
        (lambda: ReshapedRegularizer(factor="much"), "factor must be a number"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
