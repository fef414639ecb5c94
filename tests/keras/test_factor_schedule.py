"""Factors that change while a model trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from ids import stable_id
from small_models import fit_epochs, penalised_model

from tf_frobreg import (
    FactorSchedule,
    FrobeniusRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    attach_regularizers,
)

LAYERS = keras.layers


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=stable_id)
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_schedule_takes_effect(options, unit):
    """The loss of a model whose optimizer does nothing shows the factor alone."""
    model = penalised_model(factor=1.0, **options)
    model.optimizer.learning_rate = 0.0
    penalty = model.get_layer("conv").kernel_regularizer
    base = float(model.losses[0])
    plain = fit_epochs(model, epochs=1)["loss"][0] - base
    steps = 4 if unit == "step" else 1
    schedule = FactorSchedule(lambda n: [1.0, 3.0, 0.5, 0.0][min(n // steps, 3)], unit=unit)
    model.optimizer.iterations.assign(0)
    losses = fit_epochs(model, schedule, epochs=4)["loss"]
    np.testing.assert_allclose(losses, plain + base * np.array([1.0, 3.0, 0.5, 0.0]), rtol=1e-5)
    assert (penalty.factor, penalty.scale) == (1.0, 0.0)


def test_a_schedule_of_keras():
    warm_up = keras.optimizers.schedules.PolynomialDecay(0.0, 4, 1.0)
    model = penalised_model()
    fit_epochs(model, FactorSchedule(warm_up), epochs=3)
    assert model.get_layer("conv").kernel_regularizer.scale == 0.5


def test_the_scale_is_saved_and_a_plain_number_stays_plain(tmp_path):
    model = penalised_model()
    penalty = model.get_layer("conv").kernel_regularizer
    assert "scale" not in penalty.get_config()
    fit_epochs(model, FactorSchedule(lambda epoch: 0.25), epochs=1)
    assert penalty.get_config()["scale"] == 0.25
    assert type(penalty.factor) is float
    expected = float(model.losses[0])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert float(loaded.losses[0]) == pytest.approx(expected, rel=1e-6)
    assert loaded.get_layer("conv").kernel_regularizer.scale == 0.25
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert float(clone.losses[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "penalty",
    [FrobeniusRegularizer(8, 0.5), SpectralRegularizer(8, 0.5), ReshapedRegularizer(0.5)],
    ids=lambda penalty: type(penalty).__name__,
)
def test_every_penalty_has_a_scale(penalty):
    kernel = tf.constant(np.random.RandomState(0).randn(3, 3, 2, 4), tf.float32)
    half = type(penalty).from_config(penalty.get_config() | {"scale": 0.5})
    assert float(half(kernel)) == pytest.approx(0.5 * float(penalty(kernel)), rel=1e-4)
    assert penalty.make_adjustable()
    assert not penalty.make_adjustable()
    penalty.scale = 0.25
    assert penalty.get_config()["scale"] == 0.25
    with pytest.raises(ValueError, match="scale must be a finite number at least 0"):
        penalty.scale = -1


def test_bad_arguments_of_the_schedule():
    with pytest.raises(TypeError, match="schedule must be a function"):
        FactorSchedule(0.5)
    with pytest.raises(ValueError, match="unit must be one of"):
        FactorSchedule(lambda n: n, unit="batch")
    with pytest.raises(ValueError, match="FactorSchedule needs a model with a penalty of this package"):
        fit_epochs(penalised_model(factor=0), FactorSchedule(lambda n: 1.0))
    with pytest.raises(ValueError, match="schedule\\(0\\) must be a finite number at least 0"):
        fit_epochs(penalised_model(), FactorSchedule(lambda n: -1.0))


@keras.saving.register_keras_serializable(package="tests")
class OwnWeights(LAYERS.Layer):
    """A layer whose only mark of a penalty is on its variables."""

    def build(self, shape):
        nested = SumRegularizer([SumRegularizer([keras.regularizers.L2(0.1), ReshapedRegularizer(0.5)])])
        self.matrix = self.add_weight(shape=(shape[-1], 3), regularizer=nested, name="matrix")
        self.kernel = self.add_weight(
            shape=(3, 3, 3, 4), regularizer=FrobeniusRegularizer(8, 0.1), name="kernel"
        )

    def call(self, x):
        return tf.nn.conv2d(x @ self.matrix, self.kernel, 1, "SAME")


@keras.saving.register_keras_serializable(package="tests")
class Halved(keras.regularizers.Regularizer):
    """A regularizer of the user that holds one of the package."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, kernel):
        return 0.5 * self.inner(kernel)


class AddsItsLoss(LAYERS.Layer):
    """A layer that calls penalties that it holds in a dict."""

    def __init__(self):
        super().__init__()
        self.penalties = {"kernel": [FrobeniusRegularizer((), 0.5)]}

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 3), name="kernel")

    def call(self, x):
        self.add_loss(self.penalties["kernel"][0](self.kernel))
        return x @ self.kernel


def in_layer_arguments():
    return LAYERS.Conv2D(4, 3, kernel_regularizer=FrobeniusRegularizer(8, 0.1, padding="valid"))


def on_a_variable_after_building():
    layer = LAYERS.Conv2D(4, 3, padding="same")
    layer.build((None, 8, 8, 2))
    inner = SumRegularizer([keras.regularizers.L1(0.1), SpectralRegularizer(8, 0.1, power_steps=50)])
    layer.kernel.regularizer = SumRegularizer([keras.regularizers.L2(0.1), inner])
    return layer


def in_wrappers():
    dense = LAYERS.Dense(3, kernel_regularizer=ReshapedRegularizer(0.5))
    model = keras.Sequential([keras.Input((8, 2)), LAYERS.TimeDistributed(dense)])
    return LAYERS.TimeDistributed(model)


def in_a_cell():
    return keras.Sequential(
        [
            LAYERS.Reshape((64, 2)),
            LAYERS.Bidirectional(LAYERS.GRU(3, kernel_regularizer=ReshapedRegularizer(0.5))),
        ]
    )


def in_a_regularizer_of_the_user():
    inner = Halved(SumRegularizer([FrobeniusRegularizer(8, 0.1, padding="valid")]))
    return LAYERS.Conv2D(4, 3, kernel_regularizer=inner)


PLACES = [
    in_layer_arguments,
    OwnWeights,
    on_a_variable_after_building,
    in_wrappers,
    in_a_cell,
    in_a_regularizer_of_the_user,
    AddsItsLoss,
]


def model_with(layer, **options):
    """A model with one such layer, and an optimizer that does nothing."""
    keras.utils.set_random_seed(1)
    x = keras.Input((8, 8, 2))
    model = keras.Model(x, LAYERS.Dense(1)(LAYERS.Flatten()(layer(x))))
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model


@pytest.mark.parametrize("jit_compile", [False, True], ids=["plain", "jit"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_schedule_reaches_every_place_of_a_penalty(place, jit_compile):
    """Without the penalty the layer has the loss of the same model with factors of zero."""
    model = model_with(place(), jit_compile=jit_compile)
    before = fit_epochs(model, epochs=1)["loss"][0]  # traces the functions with plain numbers
    losses = fit_epochs(model, FactorSchedule(lambda epoch: [1.0, 0.0, 3.0][epoch]), epochs=3)["loss"]
    whole = sum(map(float, model.losses)) if place is not AddsItsLoss else None
    penalty = before - losses[1]
    assert penalty > 1e-3
    assert losses[0] == pytest.approx(before, rel=1e-5)
    assert losses[2] == pytest.approx(before + 2 * penalty, rel=1e-5)
    if whole is not None:  # the scale is still 3, also for a caller of model.losses
        rest = fit_epochs(model, FactorSchedule(lambda epoch: 0.0), epochs=1)["loss"][0]
        assert whole - sum(map(float, model.losses)) == pytest.approx(3 * penalty, rel=1e-4)
        assert rest == pytest.approx(losses[1], rel=1e-5)


def test_a_penalty_that_was_replaced_is_left_alone():
    old = FrobeniusRegularizer(8, 0.1, padding="valid")
    model = model_with(LAYERS.Conv2D(4, 3, kernel_regularizer=old, name="conv"))
    report = attach_regularizers(model, 0.1, include="conv", existing="replace")
    fit_epochs(model, FactorSchedule(lambda epoch: 0.25), epochs=1)
    assert (report.attached["conv"].scale, old.scale) == (0.25, 1.0)
