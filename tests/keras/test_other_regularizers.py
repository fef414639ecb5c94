"""SpectralRegularizer, ReshapedRegularizer and FunctionRegularizer in the models of Keras users."""

import copy
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import KERAS_CASES, label, normal
from ids import stable_id
from oracles import true_matrix
from small_models import fit, small_model

from tf_frobreg import (
    FactorSchedule,
    FunctionRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    reshaped_penalty,
    singular_values,
    transformation_matrix,
)

KERNEL = np.ones((3, 3, 1, 1))


@keras.saving.register_keras_serializable(package="tests")
def mean_square(kernel, convolution):
    """‖M‖²_F per column of M: the mean of σ² if M has no more columns than rows."""
    matrix = transformation_matrix(kernel, convolution.input_size, **convolution.geometry)
    return tf.reduce_sum(matrix.values**2) / convolution.shape[1]


def unregistered(kernel, convolution):
    return tf.reduce_sum(kernel**4) * convolution.input_size[0]


@pytest.mark.slow
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


@pytest.mark.slow
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


MODES = [{}, {"jit_compile": True}, {"run_eagerly": True}]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=stable_id)
def test_one_spectral_regularizer_serves_two_layers_in_training(mode):
    model = small_model(kernel_regularizer=SpectralRegularizer(8, factor=0.1))
    before = [singular_values(layer.kernel, 8) for layer in model.layers[:2]]
    fit(model, epochs=30, **mode)
    for layer, sigma in zip(model.layers, before, strict=False):
        after = singular_values(layer.kernel, 8)
        assert abs(after**2 - 1).max() < 0.8 * abs(sigma**2 - 1).max()


@pytest.mark.parametrize(
    "regularizer",
    [
        SpectralRegularizer([8, 8], 0.1, 2.0, gram="smaller", padding="same"),
        ReshapedRegularizer(0.1, 2.0),
        FunctionRegularizer(mean_square, [8, 8], 0.1, padding="valid"),
    ],
    ids=lambda regularizer: type(regularizer).__name__,
)
def test_saved_models_come_back(regularizer, tmp_path):
    path, config = tmp_path / "model.keras", regularizer.get_config()
    small_model(kernel_regularizer=regularizer).save(path)
    loaded = keras.models.load_model(path)
    again = loaded.layers[0].kernel_regularizer
    assert type(again) is type(regularizer)
    assert again.get_config() == config
    assert type(regularizer).from_config(config).get_config() == config
    fit(loaded)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e9), ("float32", 1e-30), ("float64", 1e100)])
def test_power_steps_recover_from_badly_scaled_kernels(dtype, scale):
    regularizer = SpectralRegularizer(8, factor=1.0)
    variable = tf.Variable(1e10 * (scale * normal(3, 3, 1, 2)).astype(dtype))
    regularizer(variable)
    variable.assign(normal(3, 3, 1, 2))
    values = [regularizer(variable).numpy() for _ in range(100)]
    expected = singular_values(variable, 8)[0] ** 2 - 1
    assert values[-1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (1, 1, 2, 5), (3, 2, 4), (4, 3), (2, 2, 2, 2, 40)])
def test_reshaped_regularizer_is_factor_times_penalty(shape):
    kernel = normal(*shape)
    expected = 0.1 * reshaped_penalty(kernel, alpha=1.5).numpy()
    assert ReshapedRegularizer(0.1, 1.5)(kernel).numpy() == pytest.approx(expected, rel=1e-12)


def test_a_nan_does_not_stay_in_the_power_steps():
    regularizer = SpectralRegularizer(6, factor=1.0)
    bad, good = np.full((3, 3, 1, 1), np.nan), normal(3, 3, 1, 1)
    assert np.isnan(regularizer(bad).numpy())
    assert np.isfinite(regularizer(good).numpy())


@pytest.mark.slow
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


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_a_function_gets_the_kernel_and_the_geometry(case):
    kernel = case.kernel()
    matrix = true_matrix(case, kernel)
    regularizer = FunctionRegularizer(mean_square, case.image, 0.5, scale=3.0, **case.geometry)
    expected = 1.5 * np.sum(matrix**2) / matrix.shape[1]
    assert float(regularizer(kernel)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", MODES, ids=stable_id)
def test_a_function_trains(mode):
    model = small_model(kernel_regularizer=FunctionRegularizer(mean_square, 8, factor=1.0))
    before = [float(loss) for loss in model.losses]
    fit(model, epochs=5, **mode)
    assert all(float(loss) < 0.8 * old for loss, old in zip(model.losses, before, strict=True))


@pytest.mark.parametrize(
    ("result", "found"),
    [
        (lambda kernel: kernel, "a float64 tensor of shape .3, 3, 1, 1."),
        (lambda kernel: [1.0], ".1.0."),
        (lambda kernel: True, "True"),
        (lambda kernel: 1j, "1j"),
        (lambda kernel: None, "None"),
        (lambda kernel: "large", "'large'"),
    ],
)
def test_a_result_that_is_no_scalar_is_refused(result, found):
    def own(kernel, convolution):
        return result(kernel)

    with pytest.raises(ValueError, match=f"function own must return a real scalar. Received: {found}"):
        FunctionRegularizer(own, 8)(KERNEL)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("result", [2, 2.0, np.float64(2), tf.constant(2.0), tf.constant(2.0, tf.float64)])
def test_a_scalar_of_any_type_has_the_dtype_of_the_kernel(result, dtype):
    value = FunctionRegularizer(lambda kernel, convolution: result, 8, 0.25)(KERNEL.astype(dtype))
    assert (value.dtype.name, float(value)) == (dtype, 0.5)


def test_a_schedule_reaches_a_function():
    model = small_model(kernel_regularizer=FunctionRegularizer(mean_square, 8, factor=0.5))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    losses = sum(map(float, model.losses))
    x, y = np.zeros((4, 8, 8, 3)), np.zeros((4, 3))
    options = {"epochs": 3, "verbose": 0, "callbacks": [FactorSchedule(lambda epoch: [1.0, 3.0, 0.0][epoch])]}
    found = model.fit(x, y, **options).history["loss"]
    np.testing.assert_allclose(np.diff(found), [2 * losses, -3 * losses], rtol=1e-5)
    assert model.layers[0].kernel_regularizer.get_config()["scale"] == 0.0


IN_A_NEW_PROCESS = """
import sys
import keras, tensorflow as tf, tf_frobreg

{definition}

model = keras.saving.load_model(sys.argv[1]{options})
print("losses", *(repr(float(loss)) for loss in model.losses))
"""
REGISTERED = """
@keras.saving.register_keras_serializable(package="tests")
def mean_square(kernel, convolution):
    matrix = tf_frobreg.transformation_matrix(kernel, convolution.input_size, **convolution.geometry)
    return tf.reduce_sum(matrix.values**2) / convolution.shape[1]
"""
UNREGISTERED = """
def own(kernel, convolution):
    return tf.reduce_sum(kernel**4) * convolution.input_size[0]
"""


def load_in_a_new_process(path, definition, options=""):
    script = IN_A_NEW_PROCESS.format(definition=definition, options=options)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    return (
        done.stderr if done.returncode else [float(text) for text in done.stdout.split("losses")[1].split()]
    )


@pytest.mark.slow
def test_a_function_is_found_again_if_it_is_registered(tmp_path):
    path = tmp_path / "model.keras"
    model = small_model(kernel_regularizer=FunctionRegularizer(mean_square, 8, factor=0.5, scale=0.5))
    model.save(path)
    expected = pytest.approx([float(loss) for loss in model.losses], rel=1e-6)
    assert load_in_a_new_process(path, REGISTERED) == expected
    assert "mean_square" in load_in_a_new_process(path, "")


@pytest.mark.slow
def test_an_unregistered_function_needs_custom_objects(tmp_path):
    path = tmp_path / "model.keras"
    model = small_model(kernel_regularizer=FunctionRegularizer(unregistered, 8, factor=0.5))
    model.save(path)
    expected = pytest.approx([float(loss) for loss in model.losses], rel=1e-6)
    options = ', custom_objects={"unregistered": own}'
    assert load_in_a_new_process(path, UNREGISTERED, options) == expected
    assert "unregistered" in load_in_a_new_process(path, UNREGISTERED)


def test_functions_in_copies_and_clones():
    regularizer = FunctionRegularizer(mean_square, (8, 8), 0.5, padding="circular")
    config = regularizer.get_config()
    assert config == json.loads(json.dumps(config))
    again = keras.regularizers.deserialize(keras.regularizers.serialize(regularizer))
    assert (again.function, again.get_config()) == (mean_square, config)
    assert FunctionRegularizer.from_config(config).get_config() == config
    assert copy.deepcopy(regularizer).get_config() == config
    model = small_model(kernel_regularizer=FunctionRegularizer(unregistered, 8))
    with keras.saving.custom_object_scope({"unregistered": unregistered}):
        clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert [float(loss) for loss in clone.losses] == [float(loss) for loss in model.losses]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralRegularizer(8, factor=-1), "factor must be"),
        (lambda: SpectralRegularizer(0), "input_size must be at least 1"),
        (lambda: SpectralRegularizer(8, stride=2), "unknown argument 'stride'"),
        (lambda: SpectralRegularizer(8, power_steps=1.5), "power_steps must be an integer"),
        (lambda: ReshapedRegularizer(factor="much"), "factor must be a number"),
        (
            lambda: FunctionRegularizer(3, 8),
            "function must be a function of .kernel, convolution.*: function=3",
        ),
        (lambda: FunctionRegularizer(ReshapedRegularizer(), 8), "function must be a function of"),
        (lambda: FunctionRegularizer(dict, 8), "function must be a function of"),
        (lambda: SumRegularizer(3), "regularizers must be a list. Received: regularizers=3"),
        (lambda: SumRegularizer([3]), "regularizers must hold regularizers. Received: .* Keras says: "),
        (lambda: SumRegularizer([None]), "regularizers must not be empty and must not contain None"),
        (lambda: SumRegularizer(keras.KerasTensor((3,))), "regularizers must be a list"),
        (lambda: FunctionRegularizer(mean_square, 0), "input_size must be at least 1"),
        (lambda: FunctionRegularizer(mean_square, 8, factor=-1), "factor must be"),
        (lambda: FunctionRegularizer(mean_square, 8, paddings="same"), "unknown argument 'paddings'"),
        (lambda: FunctionRegularizer(mean_square, (), 8)(KERNEL), "input_size must be an int or 2 ints"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
