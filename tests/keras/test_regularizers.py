"""FrobeniusRegularizer and SumRegularizer in the models of Keras users."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import KERAS_CASES, label
from oracles import dense_penalty, naive_matrix

from tf_frobreg import (
    FrobeniusRegularizer,
    FunctionRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    frobenius_penalty,
    penalty_excess,
    singular_values,
)
from tf_frobreg.keras.model_weight import ModelWeight
from tf_frobreg.keras.sum_regularizer import regularizer_parts


def small_model(**options):
    keras.utils.set_random_seed(1)
    regularizer = FrobeniusRegularizer(8, **{"factor": 1e-2, "reduction": "sum"} | options)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(
                4,
                3,
                padding="same",
                activation="relu",
                kernel_regularizer=regularizer,
            ),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


def data():
    random = np.random.RandomState(0)
    return random.standard_normal((32, 8, 8, 1)).astype("float32"), random.randint(3, size=32)


def test_is_a_keras_regularizer():
    assert isinstance(FrobeniusRegularizer(8), keras.regularizers.Regularizer)


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_value_is_factor_times_penalty(case):
    kernel = case.kernel()
    expected = frobenius_penalty(kernel, case.image, alpha=2.0, **case.geometry).numpy()
    total = FrobeniusRegularizer(case.image, 0.3, 2.0, reduction="sum", **case.geometry)
    assert total(kernel).numpy() == pytest.approx(0.3 * expected, rel=1e-14)
    mean = FrobeniusRegularizer(case.image, 0.3, 2.0, **case.geometry)
    columns = int(np.prod(case.image)) * case.channels
    assert mean(kernel).numpy() == pytest.approx(0.3 * expected / columns, rel=1e-14)


def test_penalty_reaches_the_loss():
    model = small_model()
    (penalty,) = model.losses
    assert penalty.numpy() == pytest.approx(
        1e-2 * frobenius_penalty(model.layers[0].kernel, 8).numpy(), rel=1e-6
    )
    x, y = data()
    with_penalty = model.evaluate(x, y, verbose=0)[0]
    plain = model.loss(y, model(x)).numpy()
    assert with_penalty == pytest.approx(plain + penalty.numpy(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("closed_form", {}),
        ("closed_form", {"jit_compile": True}),
        ("closed_form", {"run_eagerly": True}),
        ("sparse", {}),
        ("sparse", {"jit_compile": True}),
        ("sparse", {"run_eagerly": True}),
    ],
)
def test_training_draws_the_singular_values_to_one(method, options):
    model = small_model(method=method)
    model.compile(keras.optimizers.Adam(0.02), model.loss, **options)
    kernel = model.layers[0].kernel
    before = singular_values(kernel, 8)
    model.fit(*data(), epochs=30, verbose=0)
    after = singular_values(kernel, 8)
    assert np.ptp(after) < 0.5 * np.ptp(before)
    assert abs(after.mean() - 1) < 0.1


@pytest.mark.slow
def test_saved_model_has_the_same_loss_in_a_new_process(tmp_path):
    model = small_model(alpha=1.5, padding="same", reduction="mean")
    x, y = data()
    model.fit(x, y, epochs=1, verbose=0)
    path = str(tmp_path / "model.keras")
    model.save(path)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    script = (
        "import sys, json, numpy as np, tf_frobreg, keras\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "data = np.load(sys.argv[2])\n"
        "evaluated = model.evaluate(data['x'], data['y'], verbose=0)\n"
        "print(json.dumps([evaluated, model.layers[0].kernel_regularizer.get_config()]))\n"
    )
    command = [sys.executable, "-c", script, path, str(tmp_path / "data.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    evaluated, config = json.loads(done.stdout.splitlines()[-1])
    assert evaluated == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-6)
    assert config == model.layers[0].kernel_regularizer.get_config()


def test_config_is_plain_and_round_trips():
    regularizer = FrobeniusRegularizer(
        np.array([8, 9]),
        np.float32(0.5),
        2,
        strides=(1, 2),
        padding="valid",
        groups=np.int64(2),
        reduction="sum",
    )
    config = regularizer.get_config()
    assert config == {
        "input_size": [8, 9],
        "factor": 0.5,
        "alpha": 2.0,
        "strides": [1, 2],
        "padding": "valid",
        "dilation_rate": 1,
        "groups": 2,
        "kind": "conv",
        "reduction": "sum",
        "method": "closed_form",
    }
    assert json.loads(json.dumps(config)) == config
    again = keras.regularizers.deserialize(keras.regularizers.serialize(regularizer))
    assert again.get_config() == config


def test_the_defaults_are_the_advice():
    for penalty in (FrobeniusRegularizer(8), SpectralRegularizer(8), ReshapedRegularizer()):
        assert (penalty.factor, penalty.alpha) == (0.01, 1.0)
    assert FrobeniusRegularizer(8).reduction == "mean"
    kernel = np.random.RandomState(0).randn(3, 3, 2, 3)
    matrix = naive_matrix(kernel, 8)
    expected = 0.01 * dense_penalty(matrix) / matrix.shape[1]
    assert float(FrobeniusRegularizer(8)(kernel)) == pytest.approx(expected, rel=1e-12)


def test_every_configuration_says_factor_and_reduction():
    """A later default cannot change what a saved model means."""
    config = FrobeniusRegularizer(8).get_config()
    assert (config["factor"], config["reduction"]) == (0.01, "mean")
    for penalty in (SpectralRegularizer(8), ReshapedRegularizer()):
        assert penalty.get_config()["factor"] == 0.01


@pytest.mark.parametrize("kind", [keras.Variable, tf.Variable], ids=["keras", "tf"])
@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("factor", lambda value: FrobeniusRegularizer(8, value)),
        ("alpha", lambda value: FrobeniusRegularizer(8, alpha=value)),
        ("scale", lambda value: FrobeniusRegularizer(8, scale=value)),
        ("factor", lambda value: SpectralRegularizer(8, value)),
        ("alpha", lambda value: SpectralRegularizer(8, alpha=value)),
        ("factor", ReshapedRegularizer),
        ("alpha", lambda value: ReshapedRegularizer(alpha=value)),
        ("factor", lambda value: FunctionRegularizer(lambda kernel, convolution: 0.0, 8, value)),
    ],
)
def test_a_variable_would_be_frozen_and_is_refused(kind, name, build):
    # FactorSchedule changes the weight of a penalty, and not α.
    instead = (
        "Write float.alpha. for its present value. Received" if name == "alpha" else "FactorSchedule changes"
    )
    with pytest.raises(TypeError, match=f"{name} must be a number, not a variable.* frozen. {instead}"):
        build(kind(0.5))


def test_mixed_precision_penalises_the_float32_variable():
    layer = keras.layers.Conv2D(
        4, 3, padding="same", dtype="mixed_float16", kernel_regularizer=FrobeniusRegularizer(8)
    )
    layer.build((None, 8, 8, 2))
    assert layer.losses[0].dtype == "float32"
    assert np.isfinite(layer.losses[0])


def test_a_kernel_that_is_no_longer_finite_gives_a_loss_not_an_error():
    assert np.isnan(FrobeniusRegularizer(8)(np.full((3, 3, 1, 1), np.nan, "float32")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factor": -1}, "factor must be a finite number at least 0. Received: factor=-1"),
        ({"factor": float("nan")}, "factor must be"),
        ({"factor": float("inf")}, "factor must be"),
        ({"factor": 10**400}, "factor must be a finite number at least 0"),
        ({"padding": np.array(["same"])}, "padding must be one of"),
        ({"strides": 10**30}, "strides must be at most 2147483647"),
        ({"factor": True}, "factor must be a number"),
        ({"factor": None}, "factor must be a number"),
        ({"alpha": 0.0}, "alpha must be"),
        ({"input_size": 0}, "input_size must be at least 1"),
        ({"input_size": (8, 8, 8, 8)}, "input_size must have at most 3 entries, one per spatial axis"),
        ({"strides": (1, 1, 1, 1)}, "strides must have at most 3 entries"),
        ({"input_size": (8, 8), "strides": (1, 1, 1)}, "strides must be an int or 2 ints"),
        ({"padding": "causal"}, "padding must be one of"),
        ({"strides": 2, "dilation_rate": 2}, "strides above 1 cannot be combined"),
        ({"reduction": "max"}, "reduction must be one of .*Received: reduction='max'"),
        ({"method": "fft"}, "method must be one of"),
        ({"kind": "dense"}, "kind must be one of"),
        ({"groups": 0}, "groups must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FrobeniusRegularizer(**{"input_size": 8} | arguments)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (np.ones((2, 4)), "input_size must be .. for a Dense kernel; .* a LoRA"),
        (np.ones((3, 3, 3)), "input_size must be an int or 1 ints"),
        (np.ones((9, 9, 1, 1)), "input_size must be at least the .dilated. kernel size"),
        (np.ones((3, 3, 1, 1), "float16"), "kernel must be float32 or float64"),
    ],
)
def test_kernels_that_do_not_fit_are_refused_by_name(kernel, message):
    with pytest.raises((ValueError, TypeError), match=message):
        FrobeniusRegularizer((8, 8) if kernel.ndim == 3 else 8, padding="valid")(kernel)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (28, 28, 1),
            "an int or 2 ints, one per spatial axis.*=.28, 28, 1. .write .28, 28., without channels.",
        ),
        (
            (None, 28, 28, 1),
            "one integer per spatial axis, without batch and channels. Received: input_size=.None",
        ),
    ],
)
def test_the_shape_of_an_image_is_not_its_size(size, message):
    with pytest.raises((ValueError, TypeError), match=f"input_size must .*{message}"):
        FrobeniusRegularizer(size)(np.ones((3, 3, 1, 4)))


def total(kernel, convolution):
    return tf.reduce_sum(kernel)


class WithoutConfiguration(keras.regularizers.Regularizer):
    """A class of the user."""


class Own(SpectralRegularizer):
    """A class of the user with an argument of another type."""

    def __init__(self, input_size, weights):
        super().__init__(input_size)
        self.weights = weights


@pytest.mark.parametrize(
    ("regularizer", "text"),
    [
        (FrobeniusRegularizer(8), "FrobeniusRegularizer(input_size=8, factor=0.01, alpha=1.0)"),
        (
            FrobeniusRegularizer(
                (28, 28), 0.5, 2, strides=(1, 1), padding="valid", groups=2, reduction="sum"
            ),
            "FrobeniusRegularizer(input_size=(28, 28), factor=0.5, alpha=2.0, padding='valid', groups=2, "
            "reduction='sum')",
        ),
        (
            FrobeniusRegularizer((), scale=2),
            "FrobeniusRegularizer(input_size=(), factor=0.01, alpha=1.0, scale=2.0)",
        ),
        (
            SpectralRegularizer(8, dilation_rate=(2, 1), gram="smaller", kind="depthwise"),
            "SpectralRegularizer(input_size=8, factor=0.01, alpha=1.0, gram='smaller', dilation_rate=(2, 1), "
            "kind='depthwise')",
        ),
        (ReshapedRegularizer(0.5), "ReshapedRegularizer(factor=0.5, alpha=1.0)"),
        (
            FunctionRegularizer(total, 8, strides=2),
            "FunctionRegularizer(function=total, input_size=8, factor=0.01, strides=2)",
        ),
        (
            SumRegularizer(
                [keras.regularizers.L2(0.5), SumRegularizer([ReshapedRegularizer()]), tf.nn.l2_loss]
            ),
            "SumRegularizer([L2(l2=0.5), SumRegularizer([ReshapedRegularizer(factor=0.01, alpha=1.0)]), "
            "l2_loss])",
        ),
        (SumRegularizer([WithoutConfiguration()]), "SumRegularizer([WithoutConfiguration()])"),
        (Own(8, np.ones(2)), "Own(input_size=8, weights=array([1., 1.]))"),
    ],
)
def test_a_regularizer_shows_its_values(regularizer, text):
    assert repr(regularizer) == text


def test_a_regularizer_with_a_schedule_shows_its_scale_while_a_function_is_traced():
    regularizer, weight = ReshapedRegularizer(), ModelWeight()
    weight.make_variable()
    weight.set_scale(3.0)
    regularizer.take_scale(weight)
    found = []
    tf.function(lambda: found.append(repr(regularizer)))()
    assert found == ["ReshapedRegularizer(factor=0.01, alpha=1.0, scale=3.0)"]


@pytest.mark.parametrize(
    "kind", [FrobeniusRegularizer, SpectralRegularizer, FunctionRegularizer, SumRegularizer]
)
def test_the_names_under_which_keras_saves_the_regularizers(kind):
    assert keras.saving.get_registered_name(kind) == f"tf_frobreg>{kind.__name__}"


def test_sum_regularizer_takes_what_keras_takes():
    both = SumRegularizer(["l2", FrobeniusRegularizer(input_size=4)])
    again = keras.regularizers.deserialize(keras.regularizers.serialize(both))
    kernel = tf.ones((3, 3, 1, 2))
    assert float(again(kernel)) == pytest.approx(float(both(kernel)))
    for bad in ([], [None]):
        with pytest.raises(ValueError, match="regularizers must not be empty and must not contain None"):
            SumRegularizer(bad)


def test_a_sum_takes_any_iterable_and_keeps_the_order():
    parts = [keras.regularizers.L1(0.1), keras.regularizers.L2(0.2)]
    assert SumRegularizer(part for part in parts).regularizers == parts


def test_the_parts_of_a_sum_of_sums():
    l1, l2, penalty = keras.regularizers.L1(), keras.regularizers.L2(), FrobeniusRegularizer(8)
    inner = SumRegularizer([l2, SumRegularizer([penalty])])
    assert regularizer_parts(SumRegularizer([l1, inner])) == [l1, l2, penalty]
    assert regularizer_parts(penalty) == [penalty]
    assert regularizer_parts(tf.nn.l2_loss) == [tf.nn.l2_loss]
    assert regularizer_parts(None) == []


def test_what_a_regularizer_replaced_is_neither_saved_nor_shown():
    penalty = FrobeniusRegularizer(8)
    assert (penalty.replaced, penalty.detached) == (None, False)
    config = penalty.get_config()
    penalty.replaced, penalty.detached = keras.regularizers.L2(), True
    assert penalty.get_config() == config
    assert not FrobeniusRegularizer.from_config(config).detached


def excess(kernel, size, **geometry):
    return float(penalty_excess(kernel, size, **geometry))


def test_which_kernels_reach_the_smallest_penalty():
    """What the docstring says of borders: only with "same" and stride 1 it takes a single tap."""
    valid = np.zeros((2, 1, 2, 2))
    valid[0, 0], valid[1, 0] = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    assert excess(valid, (5, 4), padding="valid") == pytest.approx(0, abs=1e-25)
    assert excess(valid, (5, 4), padding="circular") == pytest.approx(0, abs=1e-25)
    assert excess(valid, (5, 4)) > 1
    strided = np.linalg.qr(np.random.RandomState(0).randn(4, 4))[0].reshape(2, 2, 1, 4)
    assert excess(strided, 8, strides=2) == pytest.approx(0, abs=1e-25)
    assert excess(strided, 8, strides=2, padding="valid") == pytest.approx(0, abs=1e-25)
