"""The Frobenius penalty on every layer of a model: how it trains, is saved and taken off."""

import itertools
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import KERAS_CASES, label
from ids import stable_id

from tf_frobreg import (
    FrobeniusRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    attach_regularizers,
    detach_regularizers,
    frobenius_penalty,
)

LAYERS = keras.layers


def small_model(**options):
    """Convolutions of several kinds, one with a regularizer of its own."""
    keras.utils.set_random_seed(1)
    first = {"padding": "same", "name": "first", "kernel_regularizer": keras.regularizers.L2(0.1)}
    return keras.Sequential(
        [
            keras.Input((10, 9, 2)),
            LAYERS.Conv2D(4, 3, **first, **options),
            LAYERS.ReLU(),
            LAYERS.SeparableConv2D(4, 3, strides=2, name="separable"),
            LAYERS.Conv2DTranspose(3, 2, strides=2, name="up"),
            LAYERS.Flatten(),
            LAYERS.Dense(5, name="top"),
        ]
    )


def data():
    random = np.random.RandomState(0)
    return random.rand(32, 10, 9, 2).astype("float32"), random.randint(5, size=32)


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss, **options)
    return model


def losses_of_a_training(model, epochs=2):
    history = model.fit(*data(), batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    return history.history["loss"]


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_the_loss_is_the_penalty_of_each_layer_of_the_grid(case):
    kernel = case.kernel()
    layer = case.layer(kernel)
    inputs = keras.Input((*case.image, case.channels), dtype="float64")
    model = keras.Model(inputs, layer(inputs))
    report = attach_regularizers(model, factor=0.5, alpha=2.0, reduction="sum")
    assert len(report.attached) == 1
    expected = 0.5 * float(frobenius_penalty(kernel, case.image, alpha=2.0, **case.geometry))
    assert float(model.losses[0]) == pytest.approx(expected, rel=1e-12)


def test_channels_first_layers_are_read_too():
    """TensorFlow on CPUs cannot run them, but the geometry and the loss are those of the layer."""
    layer = LAYERS.Conv2D(4, 3, strides=2, padding="same", data_format="channels_first")
    layer.build((None, 2, 9, 7))
    attach_regularizers(layer, factor=1.0, reduction="sum")
    expected = frobenius_penalty(layer.kernel, (9, 7), strides=2)
    assert float(layer.losses[0]) == pytest.approx(float(expected), rel=1e-6)


def test_report_and_detach():
    model = small_model()
    before = [float(loss) for loss in model.losses]
    report = attach_regularizers(model, factor=0.01, exclude="top")
    assert list(report.attached) == ["first", "separable/depthwise", "separable/pointwise", "up"]
    assert report.left_out == {"top": "excluded"}
    row = r"separable/depthwise +0.01 +1 +mean +10×9 +valid, strides 2×2, depthwise"
    assert re.search(row, str(report))
    assert len(model.losses) == 4
    assert isinstance(model.get_layer("first").kernel_regularizer, SumRegularizer)
    report.detach()
    assert [float(loss) for loss in model.losses] == before
    assert isinstance(model.get_layer("first").kernel_regularizer, keras.regularizers.L2)
    assert model.get_layer("separable").depthwise_regularizer is None


def test_remarks_tell_what_became_of_a_regularizer():
    report = attach_regularizers(small_model(), include="first")
    assert report.remarks == {"first": "added to L2"}
    assert re.search(r"first +0.01 +1 +mean +10×9 +same +added to L2", str(report))
    assert attach_regularizers(small_model(), existing="replace").remarks == {"first": "replaced L2"}


def test_an_attribute_that_was_set_without_effect_comes_back():
    """In Keras 3 a layer's kernel_regularizer has no effect once the layer is built, until it is loaded."""
    model = small_model()
    late = keras.regularizers.L1(0.3)
    model.get_layer("up").kernel_regularizer = late
    report = attach_regularizers(model, include="up")
    assert report.remarks == {"up": "kernel_regularizer was L1, without effect"}
    assert model.get_layer("up").kernel_regularizer is report.attached["up"]
    report.detach()
    assert model.get_layer("up").kernel_regularizer is late
    assert model.get_layer("up").kernel.regularizer is None


def test_remarks_tell_the_other_images_of_a_shared_layer():
    shared = LAYERS.Conv2D(2, 3, padding="same", name="shared")
    inputs = keras.Input((8, 8, 2))
    half = shared(LAYERS.MaxPooling2D()(shared(inputs)))
    report = attach_regularizers(keras.Model(inputs, half))
    assert report.remarks == {"shared": "applied to 4×4 too, penalised for 8×8"}
    open_inputs = keras.Input((None, None, 2))
    half = shared(LAYERS.MaxPooling2D()(shared(open_inputs)))
    report = attach_regularizers(keras.Model(open_inputs, half), input_size=12, existing="replace")
    assert "applied to 6×6 too, penalised for 12×12" in report.remarks["shared"]


@keras.saving.register_keras_serializable(package="tests")
class MadeInCode(keras.Model):
    """Keras re-creates the first layer by this code on loading. The second one is in the configuration."""

    name_in_code = "own"

    def __init__(self, second, **options):
        super().__init__(**options)
        self.first = LAYERS.Conv2D(2, 3, padding="same", name=self.name_in_code)
        self.second = second

    def call(self, x):
        return self.second(self.first(x))

    def get_config(self):
        return super().get_config() | {"second": keras.saving.serialize_keras_object(self.second)}

    @classmethod
    def from_config(cls, config):
        second = keras.saving.deserialize_keras_object(config.pop("second"))
        return cls(second, **config)


def test_remarks_tell_which_penalties_are_not_saved(tmp_path):
    model = MadeInCode(LAYERS.Conv2D(2, 3, padding="same", name="in_config"))
    model(np.zeros((1, 6, 6, 1), np.float32))
    report = attach_regularizers(model, factor=0.1)
    lost = "not in the model's configuration: attach again after loading"
    assert report.remarks == {"own": lost}
    expected = [float(loss) for loss in model.losses]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(loaded.losses) == 1
    again = attach_regularizers(loaded, factor=0.1)
    assert list(again.attached) == ["own"]
    assert [float(loss) for loss in loaded.losses] == pytest.approx(expected, rel=1e-6)


@keras.saving.register_keras_serializable(package="tests")
class SameNames(MadeInCode):
    """Its two layers have the same name, and one of them comes in the configuration."""

    name_in_code = "conv"


def test_of_two_layers_with_one_name_both_are_remarked_if_one_is_not_saved():
    model = SameNames(LAYERS.Conv2D(2, 3, padding="same", name="conv"))
    model(np.zeros((1, 6, 6, 2), np.float32))
    report = attach_regularizers(model)
    assert len(report.attached) == 2
    lost = "not in the model's configuration: attach again after loading"
    assert report.remarks == dict.fromkeys(report.attached, lost)


class OldArguments(LAYERS.Conv2D):
    """Its configuration keeps the regularizer that it was made with."""

    def get_config(self):
        return super().get_config() | {"kernel_regularizer": None}


def test_a_layer_that_saves_another_regularizer_is_remarked():
    inputs = keras.Input((6, 6, 1))
    kept, lost = LAYERS.Conv2D(2, 3, name="kept"), OldArguments(2, 3, name="lost")
    report = attach_regularizers(keras.Model(inputs, lost(kept(inputs))))
    assert list(report.remarks) == ["lost"]


def own_penalty(kernel):
    return tf.reduce_sum(kernel**4)


@pytest.mark.parametrize("function", [own_penalty, lambda kernel: own_penalty(kernel)], ids=["def", "lambda"])
def test_functions_as_regularizers_stay(function):
    conv = LAYERS.Conv2D(2, 3, kernel_regularizer=function, name="conv")
    try:
        model = keras.Sequential([keras.Input((6, 6, 1)), conv])
    except ValueError as error:
        if "Expected an instance of `keras.regularizers.Regularizer`" not in str(error):
            raise
        pytest.skip("this Keras takes no functions")
    report = attach_regularizers(model, factor=0.0)
    assert report.remarks["conv"].startswith(f"added to {function.__name__}")
    assert float(model.losses[0]) == pytest.approx(float(function(conv.kernel)))
    report.detach()
    assert conv.kernel_regularizer is function


@keras.saving.register_keras_serializable(package="tests")
class AttachesItself(keras.Model):
    """A subclassed model whose layers are made in its code, penalties included."""

    def __init__(self, **options):
        super().__init__(**options)
        self.first = LAYERS.Conv2D(2, 3, padding="same", name="first")
        self.second = LAYERS.Conv2D(3, 3, strides=2, name="second")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build(self.first.compute_output_shape(input_shape))
        super().build(input_shape)
        attach_regularizers(self, factor=0.1)

    def call(self, x):
        return self.second(self.first(x))


def test_a_class_that_attaches_in_its_build_saves_loads_and_clones_the_penalties(tmp_path):
    model = AttachesItself()
    compiled(model).fit(np.ones((2, 6, 6, 1)), np.zeros((2, 2, 2)), verbose=0)
    expected = [float(loss) for loss in model.losses]
    assert len(expected) == 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [float(loss) for loss in loaded.losses] == pytest.approx(expected, rel=1e-6)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert [float(loss) for loss in clone.losses] == pytest.approx(expected, rel=1e-6)


def test_detach_regularizers_from_a_loaded_model(tmp_path):
    model = small_model()
    before = [float(loss) for loss in model.losses]
    attach_regularizers(model, factor=0.1)
    model.save(tmp_path / "model.keras")
    loaded = compiled(keras.saving.load_model(tmp_path / "model.keras"))
    losses_of_a_training(loaded, epochs=1)
    loaded.set_weights(model.get_weights())
    assert detach_regularizers(loaded) == ["first", "separable", "up", "top"]
    assert [float(loss) for loss in loaded.losses] == pytest.approx(before)
    assert loaded.train_function is None
    again = keras.models.clone_model(loaded)
    assert len(again.losses) == 1
    assert detach_regularizers(loaded) == []
    with pytest.raises(TypeError, match="model must be a Keras model or layer. Received: model=3"):
        detach_regularizers(3)


def test_detach_leaves_what_was_set_since():
    model = small_model()
    report = attach_regularizers(model)
    other = keras.regularizers.L1(0.1)
    model.get_layer("up").kernel.regularizer = model.get_layer("up").kernel_regularizer = other
    report.detach()
    assert model.get_layer("up").kernel_regularizer is other


def test_an_existing_regularizer_is_added_to_replaced_or_kept():
    penalty = {"factor": 1.0, "include": "first", "reduction": "sum"}
    model = small_model()
    (l2,) = (float(loss) for loss in model.losses)
    attach_regularizers(model, **penalty)
    (both,) = (float(loss) for loss in model.losses)
    model = small_model()
    attach_regularizers(model, **penalty, existing="replace")
    (replaced,) = (float(loss) for loss in model.losses)
    assert both == pytest.approx(l2 + replaced)
    assert replaced == pytest.approx(float(frobenius_penalty(model.get_layer("first").kernel, (10, 9))))
    model = small_model()
    report = attach_regularizers(model, **penalty, existing="keep")
    assert report.attached == {}
    assert report.kept == {"first": "it has L2 already"}


def test_a_penalty_is_not_attached_twice():
    model = small_model()
    attach_regularizers(model)
    losses = [float(loss) for loss in model.losses]
    report = attach_regularizers(model)
    assert (report.attached, report.left_out) == ({}, {})
    assert set(report.kept.values()) == {"it has FrobeniusRegularizer already"}
    assert [float(loss) for loss in model.losses] == losses
    again = attach_regularizers(model, factor=2e-4, existing="replace")
    assert len(again.attached) == 5


def test_overrides():
    overrides = {"*": {"reduction": "sum"}, "separable": {"factor": 0.5, "alpha": 2.0}}
    overrides["first"] = {"padding": "circular"}
    report = attach_regularizers(small_model(), factor=0.1, overrides=overrides)
    assert {penalty.reduction for penalty in report.attached.values()} == {"sum"}
    depthwise = report.attached["separable/depthwise"]
    assert (depthwise.factor, depthwise.alpha) == (0.5, 2.0)
    assert report.attached["first"].padding == "circular"
    assert (report.attached["up"].factor, report.attached["up"].alpha) == (0.1, 1.0)


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=stable_id)
def test_it_trains_before_and_after_compile(options):
    plain = losses_of_a_training(compiled(small_model(), **options))
    attached_first = small_model()
    attach_regularizers(attached_first, factor=1.0, reduction="mean")
    first = losses_of_a_training(compiled(attached_first, **options))
    attached_last = compiled(small_model(), **options)
    attach_regularizers(attached_last, factor=1.0, reduction="mean")
    last = losses_of_a_training(attached_last)
    np.testing.assert_allclose(last, first, rtol=1e-5)
    assert first[0] > plain[0] + 0.5
    assert first[1] < first[0]


def test_it_reaches_a_model_that_was_trained_before():
    model = compiled(small_model())
    losses_of_a_training(model, epochs=1)
    report = attach_regularizers(model, factor=10.0, reduction="mean")
    with_penalty = losses_of_a_training(model, epochs=1)[0]
    report.detach()
    assert losses_of_a_training(model, epochs=1)[0] < with_penalty - 1


def test_training_presses_the_penalty_down():
    model = small_model()
    report = attach_regularizers(model, factor=1.0, reduction="mean", include="up")
    before = float(report.attached["up"](model.get_layer("up").kernel))
    losses_of_a_training(compiled(model), epochs=10)
    assert float(report.attached["up"](model.get_layer("up").kernel)) < 0.3 * before


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    model = small_model()
    attach_regularizers(model, factor=0.1)
    expected = [float(loss) for loss in model.losses]
    keras.config.set_dtype_policy(policy)
    try:
        mixed = small_model()
        attach_regularizers(mixed, factor=0.1)
        assert [float(loss) for loss in mixed.losses] == pytest.approx(expected, rel=1e-5)
        assert np.isfinite(losses_of_a_training(compiled(mixed))).all()
    finally:
        keras.config.set_dtype_policy("float32")


def test_float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        model = small_model()
        attach_regularizers(model, factor=0.1)
        assert {loss.dtype for loss in model.losses} == {tf.float64}
        assert np.isfinite(losses_of_a_training(compiled(model))).all()
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def test_kernels_in_half_precision_are_left_out():
    half = LAYERS.Conv2D(2, 3, dtype="float16", name="half")
    model = keras.Sequential([keras.Input((6, 6, 1)), half, LAYERS.Dense(2)])
    assert attach_regularizers(model).left_out == {"half": "its kernel is float16"}


def test_lora_and_frozen_layers():
    model = small_model()
    model.get_layer("up").trainable = False
    model.get_layer("top").enable_lora(2)
    report = attach_regularizers(model, factor=1.0)
    assert report.left_out == {"top": "LoRA is enabled: its kernel is frozen"}
    assert "up" in report.attached
    assert len(model.losses) == 3  # the frozen layer's does not count
    model.get_layer("up").trainable = True
    assert len(model.losses) == 4


def lora_convolution():
    layer = LAYERS.Conv2D(2, 3, kernel_regularizer=FrobeniusRegularizer((4, 4), padding="valid"))
    layer.build((None, 4, 4, 1))
    layer.enable_lora(1)
    return layer


def test_detaching_after_lora_leaves_nothing_behind():
    model = small_model()
    report = attach_regularizers(model, factor=1.0, exclude="first")
    model.get_layer("top").enable_lora(2)
    model.get_layer("first").enable_lora(2)
    message = "input_size must be .. for a Dense kernel.* LoRA factor, detach before enable_lora"
    with pytest.raises(ValueError, match=message):
        _ = keras.Sequential([keras.Input((4, 4, 1)), lora_convolution()]).losses
    report.detach()
    assert len(model.losses) == 2  # of the first layer's own L2, on its two factors
    assert model.get_layer("top").kernel_regularizer is None


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_of_detaching_does_not_matter(order):
    model = small_model()
    before = [float(loss) for loss in model.losses]
    reports = [attach_regularizers(model), attach_regularizers(model, factor=1.0, existing="replace")]
    for number in order:
        reports[number].detach()
    assert [float(loss) for loss in model.losses] == before
    assert isinstance(model.get_layer("first").kernel_regularizer, keras.regularizers.L2)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("existing", ["add", "replace"])
def test_three_reports_are_detached_in_any_order(order, existing):
    model = small_model()
    up = model.get_layer("up")
    late = up.kernel_regularizer = keras.regularizers.L1(0.3)  # without effect, but it comes back
    before = [float(loss) for loss in model.losses]
    reports = [
        attach_regularizers(model, existing=existing),
        attach_regularizers(model, factor=1.0, existing="replace"),
        attach_regularizers(model, factor=2.0, existing="replace"),
    ]
    for count, number in enumerate(order):
        reports[number].detach()
        reports[number].detach()  # a second time changes nothing
        left = set(range(3)) - set(order[: count + 1])
        if left:
            assert up.kernel.regularizer is reports[max(left)].attached["up"]
    assert [float(loss) for loss in model.losses] == before
    assert isinstance(model.get_layer("first").kernel_regularizer, keras.regularizers.L2)
    assert (up.kernel_regularizer, up.kernel.regularizer) == (late, None)


def test_a_penalty_inside_a_sum_of_sums_is_found():
    inner = SumRegularizer([keras.regularizers.L2(0.1), FrobeniusRegularizer((6, 6), padding="valid")])
    outer = SumRegularizer([inner, keras.regularizers.L1(0.1)])
    conv = LAYERS.Conv2D(2, 3, kernel_regularizer=outer, name="conv")
    model = keras.Sequential([keras.Input((6, 6, 1)), conv])
    report = attach_regularizers(model)
    assert report.kept == {"conv": "it has FrobeniusRegularizer already"}
    kept = attach_regularizers(model, existing="keep")
    assert kept.kept == {"conv": "it has L2 + FrobeniusRegularizer + L1 already"}
    assert detach_regularizers(model) == ["conv"]
    assert [type(part).__name__ for part in conv.kernel_regularizer.regularizers] == ["L2", "L1"]
    assert float(model.losses[0]) == pytest.approx(float(keras.regularizers.L1L2(0.1, 0.1)(conv.kernel)))


def test_a_spectral_penalty_gets_the_penalty_too():
    spectral = SpectralRegularizer((6, 6), 0.1, padding="valid")
    conv = LAYERS.Conv2D(2, 3, kernel_regularizer=spectral, name="conv")
    model = keras.Sequential([keras.Input((6, 6, 1)), conv])
    report = attach_regularizers(model)
    assert report.remarks == {"conv": "added to SpectralRegularizer"}
    report.detach()
    assert conv.kernel_regularizer is spectral


def test_a_border_that_does_not_suit_a_layer_is_refused_before_anything_is_attached():
    model = keras.Sequential(
        [keras.Input((2, 2, 1)), LAYERS.Dense(2), LAYERS.Conv2D(2, 3, padding="same", name="conv")]
    )
    with pytest.raises(ValueError, match="input_size must be at least the .*, for layer 'conv'"):
        attach_regularizers(model, padding="valid")
    assert model.losses == []


def test_saved_loaded_and_cloned_models_have_the_same_losses(tmp_path):
    model = small_model()
    attach_regularizers(model, factor=0.1, alpha=2.0, overrides={"up": {"padding": "circular"}})
    expected = [float(loss) for loss in model.losses]
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert [float(loss) for loss in clone.losses] == pytest.approx(expected, rel=1e-6)
    path = tmp_path / "model.keras"
    compiled(model).save(path)
    code = (
        "import keras, tf_frobreg\n"
        f"model = keras.saving.load_model({str(path)!r})\n"
        "print('losses', *(repr(float(loss)) for loss in model.losses))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = [float(text) for text in done.stdout.split("losses")[1].split()]
    assert found == pytest.approx(expected, rel=1e-6)


def test_nothing_is_attached_where_something_is_wrong():
    model = keras.Sequential(
        [keras.Input((None, None, 2)), LAYERS.Conv2D(2, 3, name="conv"), LAYERS.Dense(2, name="top")]
    )
    with pytest.raises(
        ValueError, match="layer 'conv' cannot be treated: its image size is unknown.*exclude"
    ):
        attach_regularizers(model)
    assert model.losses == []
    assert list(attach_regularizers(model, exclude="conv").attached) == ["top"]
    assert attach_regularizers(model, input_size=12).attached["conv"].input_size == (12, 12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"factor": -1}, ValueError, "factor must be a finite number at least 0"),
        ({"alpha": 0}, ValueError, "alpha must be a finite number above 0"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"padding": "full"}, ValueError, "padding must be one of"),
        ({"existing": "drop"}, ValueError, "existing must be one of .* Received: existing='drop'"),
        (
            {"include": "frist"},
            ValueError,
            "include must match a layer with a kernel.*'frist' .did you mean 'first'... Names: first, ",
        ),
        ({"exclude": ["top", "x"]}, ValueError, "exclude must match a layer .*Received: exclude='x'"),
        ({"include": LAYERS.LSTM}, ValueError, "include must match a layer .*LSTM"),
        ({"include": LAYERS.Dense(3)}, ValueError, "include must match a layer .*Dense"),
        ({"include": 3}, TypeError, "include must be a name, a layer, a layer class, a function"),
        ({"overrides": [1]}, TypeError, "overrides must be a dict of dicts by name. Received: overrides=.1."),
        ({"overrides": {0: {}}}, ValueError, "overrides must map names to dicts"),
        ({"overrides": {"x": {}}}, ValueError, "overrides must match a layer"),
        ({"overrides": {"top": {"size": 3}}}, ValueError, "overrides must map names to dicts of factor"),
        (
            {"overrides": {"top": {"faktor": 3}}},
            ValueError,
            "dicts of factor, alpha, reduction, padding. .*did you mean 'factor'",
        ),
        (
            {"overrides": {"top": {"factor": "big"}}},
            TypeError,
            "factor must be a number .*'big', for layer 'top'",
        ),
        ({"input_size": 8}, ValueError, "input_size goes with a model that leaves the size"),
    ],
    ids=stable_id,
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    model = small_model()
    before = model.get_layer("first").kernel_regularizer
    with pytest.raises(error, match=message):
        attach_regularizers(model, **arguments)
    assert model.get_layer("first").kernel_regularizer is before
    assert len(model.losses) == 1


def test_unbuilt_models_are_refused():
    with pytest.raises(ValueError, match="model must be built"):
        attach_regularizers(keras.Sequential([LAYERS.Dense(2)]))
    with pytest.raises(TypeError, match="model must be a Keras model or layer"):
        attach_regularizers("model")


@pytest.mark.slow
def test_a_real_architecture(tmp_path):
    """Attached, trained for a step, saved, loaded. test_applications reads one network of each family."""
    keras.utils.set_random_seed(1)
    model = keras.applications.MobileNetV2(weights=None, classes=4)  # at its usual 224×224
    report = attach_regularizers(model, reduction="mean")
    kinds = (LAYERS.Conv2D, LAYERS.DepthwiseConv2D, LAYERS.Dense)
    expected = sum(isinstance(layer, kinds) for layer in model.layers)
    assert (len(report.attached), report.left_out) == (expected, {})
    assert len(str(report).splitlines()) == expected + 4  # the first line, an empty one and the head
    assert repr(report) == f"AttachReport: attached {expected}, left out 0, kept 0"
    assert len(model.losses) == expected > 50
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy())
    x, y = np.random.RandomState(0).rand(1, 224, 224, 3).astype("float32"), np.array([0])
    assert np.isfinite(model.train_on_batch(x, y))
    losses = np.array([float(loss) for loss in model.losses])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose([float(loss) for loss in loaded.losses], losses, rtol=1e-6)
