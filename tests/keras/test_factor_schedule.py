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
from tf_frobreg.keras import model_weight
from tf_frobreg.keras.model_weight import ModelWeight

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
    weight = ModelWeight()
    weight.make_variable()
    weight.set_scale(0.25)
    half.take_scale(weight)
    assert float(half(kernel)) == pytest.approx(0.25 * float(penalty(kernel)), rel=1e-4)
    assert half.get_config()["scale"] == 0.25
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


@pytest.mark.parametrize(
    ("place", "jit_compile"),
    [*((place, False) for place in PLACES), (OwnWeights, True), (on_a_variable_after_building, True)],
    ids=lambda value: getattr(value, "__name__", "jit" if value is True else "plain"),
)
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


def three_penalties(**options):
    """A model with three penalties, each with its own scale."""
    layers = [
        LAYERS.Conv2D(3, 3, kernel_regularizer=FrobeniusRegularizer(8, 0.5, padding="valid", scale=0.5)),
        LAYERS.Conv2D(2, 1, kernel_regularizer=SpectralRegularizer(6, 0.5, power_steps=60, scale=2.0)),
        LAYERS.Flatten(),
        LAYERS.Dense(1, kernel_regularizer=ReshapedRegularizer(0.5)),
    ]
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    return model


def test_one_variable_for_all_penalties_of_a_model(monkeypatch):
    """It is made once, and each step that changes the number assigns it once."""
    made, assigned = [], []
    new_variable = model_weight.new_variable

    def new(value, name):
        variable = new_variable(value, name)
        assign = variable.assign
        variable.assign = lambda value: assigned.append(value) or assign(value)
        made.append(name)
        return variable

    monkeypatch.setattr(model_weight, "new_variable", new)
    model = three_penalties()
    numbers = [1.0, 2.0, 2.0, 0.0, 0.0, 3.0, 1.0, 1.0]
    fit_epochs(model, FactorSchedule(lambda step: numbers[step], unit="step"), epochs=2)
    assert made == ["penalty_scale"]
    assert assigned == [2.0, 0.0, 3.0, 1.0]
    scales = [layer.kernel_regularizer.scale for layer in model.layers if hasattr(layer, "kernel")]
    assert scales == [1.0] * 3
    model.optimizer.iterations.assign(0)
    fit_epochs(model, FactorSchedule(lambda step: 4.0, unit="step"), epochs=2)
    assert (len(made), assigned[4:]) == (1, [4.0])


def test_a_scale_set_by_hand_after_a_schedule():
    """It holds for its penalty alone. The others keep what the schedule left."""
    model = three_penalties()
    layers = [layer for layer in model.layers if hasattr(layer, "kernel")]
    fit_epochs(model, FactorSchedule(lambda epoch: 2.0), epochs=1)
    before = [float(loss) for loss in model.losses]
    layers[0].kernel_regularizer.scale = 6.0
    expected = [3 * before[0], before[1], before[2]]
    assert [float(loss) for loss in model.losses] == pytest.approx(expected, rel=1e-4)
    assert [layer.kernel_regularizer.get_config().get("scale", 1.0) for layer in layers] == [6.0, 2.0, 2.0]
    fit_epochs(model, FactorSchedule(lambda epoch: 0.5), epochs=1)
    assert [float(loss) for loss in model.losses] == pytest.approx([0.25 * one for one in before], rel=1e-4)
    assert layers[0].kernel_regularizer.scale == 0.5


def shared_models():
    """Two models with one penalty, and a penalty of its own for the second one."""
    shared, models = FrobeniusRegularizer(8, 1.0, padding="valid"), []
    for own in (None, ReshapedRegularizer(1.0)):
        layers = [LAYERS.Conv2D(4, 3, kernel_regularizer=shared), LAYERS.Flatten()]
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((8, 8, 2)), *layers, LAYERS.Dense(1, kernel_regularizer=own)])
        model.compile(keras.optimizers.SGD(0.0), "mse")
        models.append(model)
    return models


@pytest.mark.parametrize("first", [0, 1])
def test_two_models_that_share_a_penalty(first):
    """Each training counts the penalties with its own schedule, whichever came before."""
    models = shared_models()
    penalties = [sum(map(float, model.losses)) for model in models]
    plain = [
        fit_epochs(model, epochs=1)["loss"][0] - penalty
        for model, penalty in zip(models, penalties, strict=True)
    ]
    for number, scale in ((first, 2.0), (1 - first, 3.0), (first, 0.0), (1 - first, 0.5)):
        losses = fit_epochs(models[number], FactorSchedule(lambda epoch, scale=scale: scale), epochs=2)[
            "loss"
        ]
        assert losses == pytest.approx([plain[number] + scale * penalties[number]] * 2, rel=1e-4)
        assert sum(map(float, models[number].losses)) == pytest.approx(scale * penalties[number], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=stable_id)
def test_a_scale_of_zero_hides_a_kernel_that_is_not_finite(options):
    """While the weight is 0, a penalty that would be infinite does not reach the loss."""
    model = penalised_model(**options)
    model.optimizer.learning_rate = 0.0
    huge = FrobeniusRegularizer(8, 1.0)
    model.get_layer("conv").kernel.regularizer = huge
    model.get_layer("conv").kernel.assign(1e12 * model.get_layer("conv").kernel)  # its 4th power is infinite
    loss = fit_epochs(model, FactorSchedule(lambda epoch: float(epoch)), epochs=2)["loss"]
    assert np.isfinite(loss[0])
    assert np.isinf(loss[1])
