"""Spectral, reshaped and own penalties on every layer of a model, and what cannot get a penalty."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from geometries import KERAS_CASES, label
from ids import stable_id
from oracles import dense_penalty, impulse_matrix, true_matrix

from tf_frobreg import (
    FrobeniusRegularizer,
    FunctionRegularizer,
    ReshapedRegularizer,
    SpectralRegularizer,
    SumRegularizer,
    attach_regularizers,
    detach_regularizers,
    transformation_matrix,
)
from tf_frobreg.keras.regularizers import regularizer_parts

LAYERS = keras.layers


@keras.saving.register_keras_serializable(package="tests")
def nuclear(kernel, convolution):
    """The mean of σ, from M itself."""
    matrix = transformation_matrix(kernel, convolution.input_size, **convolution.geometry)
    return tf.reduce_sum(tf.linalg.svd(tf.sparse.to_dense(matrix), compute_uv=False)) / convolution.shape[1]


def nuclear_of(matrix):
    return np.linalg.svd(matrix, compute_uv=False).sum() / matrix.shape[1]


def small_model():
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((7, 6, 2)),
            LAYERS.Conv2D(4, 3, strides=2, groups=2, use_bias=False, name="conv"),
            LAYERS.DepthwiseConv2D(2, padding="same", use_bias=False, name="depthwise"),
            LAYERS.Conv2DTranspose(3, 2, strides=2, use_bias=False, name="up"),
            LAYERS.Flatten(),
            LAYERS.Dense(5, use_bias=False, name="top"),
        ]
    )


def matrices(model):
    """M of each layer, from its answers to unit impulses of the size that it sees."""
    layers = [layer for layer in model.layers if layer.weights]
    return [impulse_matrix(layer, layer.input.shape[1:-1], layer.input.shape[-1]) for layer in layers]


def losses(model):
    return [float(loss) for loss in model.losses]


@pytest.mark.parametrize("case", KERAS_CASES, ids=label)
def test_a_function_sees_each_layer_of_the_grid(case):
    kernel = case.kernel()
    layer = case.layer(kernel)
    inputs = keras.Input((*case.image, case.channels), dtype="float64")
    model = keras.Model(inputs, layer(inputs))
    attach_regularizers(model, factor=0.5, penalty=nuclear)
    assert losses(model) == pytest.approx([0.5 * nuclear_of(true_matrix(case, kernel))], rel=1e-10)


def test_a_spectral_penalty_on_every_layer():
    model = small_model()
    report = attach_regularizers(model, 0.5, 2.0, penalty="spectral")
    assert {type(penalty) for penalty in report.attached.values()} == {SpectralRegularizer}
    for _ in range(400):  # two power steps each
        found = losses(model)
    sigmas = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices(model)]
    expected = [
        0.5 * max(abs(sigma**2 - 2).max(), 2.0 * (m.shape[0] < m.shape[1]))
        for sigma, m in zip(sigmas, matrices(model), strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_reshaped_penalty_on_every_layer():
    model = small_model()
    report = attach_regularizers(model, 0.5, 2.0, penalty="reshaped")
    assert {type(penalty) for penalty in report.attached.values()} == {ReshapedRegularizer}
    kernels = [np.asarray(layer.kernel) for layer in model.layers if layer.weights]
    expected = [0.5 * dense_penalty(k.reshape(-1, k.shape[-1]).T, 2.0) for k in kernels]
    assert losses(model) == pytest.approx(expected, rel=1e-5)


def test_a_circular_border_for_any_penalty_with_a_geometry():
    for penalty in ("frobenius", "spectral", nuclear):
        model = small_model()
        report = attach_regularizers(model, penalty=penalty, padding="circular", include="conv")
        assert report.attached["conv"].padding == "circular"


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=stable_id)
@pytest.mark.parametrize("penalty", ["spectral", "reshaped", "function"])
def test_every_penalty_trains(penalty, options):
    def total(kernel, convolution):
        return tf.reduce_sum(kernel**4) * convolution.input_size[0]

    model = small_model()
    model.compile(keras.optimizers.SGD(0.0), "mse", **options)
    x, y = np.zeros((4, 7, 6, 2)), np.zeros((4, 5))
    assert model.fit(x, y, verbose=0).history["loss"] == [0.0]  # traced without a penalty
    report = attach_regularizers(
        model, 0.5, penalty=total if penalty == "function" else penalty, include="conv"
    )
    with_penalty = model.fit(x, y, verbose=0).history["loss"][0]
    assert with_penalty == pytest.approx(losses(model)[0], rel=0.2)  # a power step is taken in between
    report.detach()
    assert model.fit(x, y, verbose=0).history["loss"] == [0.0]


def test_a_penalty_of_another_class_is_added_and_one_of_the_same_class_is_not():
    def other(kernel, convolution):
        return tf.reduce_sum(kernel)

    model = small_model()
    for number, penalty in enumerate(["frobenius", "spectral", "reshaped", nuclear, other], start=1):
        assert len(attach_regularizers(model, penalty=penalty).attached) == 4
        again = attach_regularizers(model, penalty=penalty)
        assert (len(again.attached), len(again.kept)) == (0, 4)
        assert len(model.losses) == 4
        names = [type(part).__name__ for part in regularizer_parts(model.layers[0].kernel_regularizer)]
        assert len(names) == number
    assert again.kept["conv"] == "it has FunctionRegularizer(other) already"
    assert detach_regularizers(model) == ["conv", "depthwise", "up", "top"]
    assert model.losses == []


def test_the_same_text_run_twice_is_the_same_function():
    """In a notebook a cell that is run again defines its functions again."""

    def defined(text):
        space = {}
        exec(f"def own(kernel, convolution):\n    return {text}", space)
        return space["own"]

    def closure(power):
        return lambda kernel, convolution: tf.reduce_sum(kernel**power)

    model = small_model()
    assert len(attach_regularizers(model, penalty=defined("(kernel**2).sum()")).attached) == 4
    assert len(attach_regularizers(model, penalty=defined("(kernel**2).sum()")).kept) == 4
    assert len(attach_regularizers(model, penalty=defined("(kernel**3).sum()")).attached) == 4
    model = small_model()
    for power in (2, 4):
        assert len(attach_regularizers(model, penalty=closure(power)).attached) == 4
    kernel = np.asarray(model.layers[0].kernel)
    assert losses(model)[0] == pytest.approx(0.01 * np.sum(kernel**2 + kernel**4), rel=1e-5)


@pytest.mark.parametrize("penalty", ["spectral", "reshaped", "function"])
def test_overrides_of_any_penalty(penalty):
    chosen = nuclear if penalty == "function" else penalty
    report = attach_regularizers(small_model(), penalty=chosen, overrides={"c*": {"factor": 0.5}})
    assert {name: new.factor for name, new in report.attached.items()} == {
        "conv": 0.5,
        "depthwise": 0.01,
        "up": 0.01,
        "top": 0.01,
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"penalty": "frobenus"}, ValueError, "penalty must be one of .*did you mean 'frobenius'"),
        ({"penalty": None}, TypeError, "penalty must be one of .* or a function of .kernel, convolution."),
        ({"penalty": keras.regularizers.L2()}, TypeError, "penalty must be one of .* or a function of"),
        ({"penalty": FrobeniusRegularizer}, TypeError, "penalty must be one of .* or a function of"),
        (
            {"penalty": nuclear, "alpha": 2.0},
            ValueError,
            "alpha must not be given with a function as penalty",
        ),
        (
            {"penalty": "spectral", "reduction": "mean"},
            ValueError,
            "reduction must not be given with penalty='spectral', .* factor, alpha, padding. Received: red.*",
        ),
        ({"penalty": "reshaped", "padding": "same"}, ValueError, "padding must not be given with penalty='r"),
        (
            {"penalty": nuclear, "overrides": {"top": {"alpha": 2.0}}},
            ValueError,
            "dicts of factor, padding. Received: overrides.'top'.={'alpha': 2.0}",
        ),
        (
            {"penalty": "spectral", "overrides": {"top": {"alhpa": 2.0}}},
            ValueError,
            "dicts of factor, alpha, padding. .*did you mean 'alpha'",
        ),
        ({"penalty": "spectral", "factor": -1.0}, ValueError, "factor must be .*, for layer 'conv'"),
        ({"penalty": nuclear, "factor": "big"}, TypeError, "factor must be a number"),
        ({"factor": tf.Variable(1.0)}, TypeError, "factor must be a number, not a variable.*FactorSchedule"),
        ({"factor": keras.Variable(1.0)}, TypeError, "factor must be a number, not a variable"),
        ({"alpha": keras.Variable(1.0)}, TypeError, "alpha must be a number, not a variable"),
        ({"overrides": {"top": {"factor": tf.Variable(1.0)}}}, TypeError, "not a variable.*for layer 'top'"),
        ({"penalty": nuclear, "factor": tf.Variable(1.0)}, TypeError, "factor must be a number, not a var"),
    ],
    ids=stable_id,
)
def test_bad_arguments_are_refused_by_name(arguments, error, message):
    model = small_model()
    with pytest.raises(error, match=message):
        attach_regularizers(model, **arguments)
    assert model.losses == []


SCRIPT = """
import sys
import keras, tensorflow as tf, tf_frobreg
{registered}
def nuclear(kernel, convolution):
    matrix = tf_frobreg.transformation_matrix(kernel, convolution.input_size, **convolution.geometry)
    return tf.reduce_sum(tf.linalg.svd(tf.sparse.to_dense(matrix), compute_uv=False)) / convolution.shape[1]
model = keras.saving.load_model(sys.argv[1])
assert len(tf_frobreg.attach_regularizers(model, penalty=nuclear).kept) == 4
print("losses", *(repr(float(loss)) for loss in model.losses))
"""


@pytest.mark.slow
def test_own_penalties_are_loaded_in_a_new_process(tmp_path):
    model = small_model()
    attach_regularizers(model, 0.5, penalty=nuclear)
    expected = [0.5 * nuclear_of(matrix) for matrix in matrices(model)]
    assert losses(model) == pytest.approx(expected, rel=1e-5)
    model.save(tmp_path / "model.keras")
    for registered in ("@keras.saving.register_keras_serializable(package='tests')", ""):
        command = [sys.executable, "-c", SCRIPT.format(registered=registered), str(tmp_path / "model.keras")]
        done = subprocess.run(command, capture_output=True, text=True)
        if registered:
            found = [float(text) for text in done.stdout.split("losses")[1].split()]
            assert found == pytest.approx(expected, rel=1e-5)
        else:
            assert done.returncode
            assert "Could not locate function 'tests>nuclear'" in done.stderr


class BuiltFromOutside(keras.Model):
    """A model without a `build` of its own: Keras does not build its layers before the first call."""

    def __init__(self):
        super().__init__()
        self.conv = LAYERS.Conv2D(2, 3, name="conv")

    def call(self, x):
        return self.conv(x) if x.shape[1] else x


def test_attaching_nothing_is_an_error_with_the_reasons():
    with pytest.raises(
        ValueError, match="model must have a kernel that can get a penalty. Left out: nothing"
    ):
        attach_regularizers(keras.Sequential([keras.Input((3,)), LAYERS.ReLU()]))
    half = LAYERS.Conv2D(2, 3, dtype="float16", name="half")
    lora = LAYERS.Dense(2, name="lora")
    model = keras.Sequential([keras.Input((6, 6, 1)), half, lora])
    lora.enable_lora(1)
    reasons = "Left out: half: its kernel is float16; lora: LoRA is enabled: its kernel is frozen"
    with pytest.raises(ValueError, match=reasons):
        attach_regularizers(model)
    with pytest.raises(ValueError, match="Left out: conv, depthwise, up, top: not included"):
        attach_regularizers(small_model(), include=lambda layer: False)
    model = small_model()
    attach_regularizers(model)
    assert len(attach_regularizers(model).kept) == 4  # nothing new, but every kernel has a penalty


def test_a_model_that_was_built_without_its_layers():
    model = BuiltFromOutside()
    model.built = True
    with pytest.raises(ValueError, match="Left out: conv: it has not been built"):
        attach_regularizers(model)
    model(np.zeros((1, 5, 5, 1)))
    assert attach_regularizers(model, input_size={"conv": 5}).attached["conv"].input_size == (5, 5)


def two_layers_with_one_variable():
    keras.utils.set_random_seed(1)
    first = LAYERS.Conv2D(2, 3, padding="same", use_bias=False, name="first")
    second = LAYERS.Conv2D(2, 3, padding="same", strides=2, use_bias=False, name="second")
    model = keras.Sequential([keras.Input((6, 6, 2)), first, second])
    second._tracker.unlock()
    second._kernel = first._kernel
    return model, first, second


def test_two_layers_that_share_a_variable_get_one_penalty():
    model, first, second = two_layers_with_one_variable()
    report = attach_regularizers(model, 0.5)
    assert report.left_out == {"second": "it shares its kernel with 'first'"}
    matrix = impulse_matrix(first, (6, 6), 2)
    expected = 0.5 * dense_penalty(matrix) / matrix.shape[1]
    assert losses(model) == pytest.approx([expected], rel=1e-5)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x, y = np.zeros((2, 6, 6, 2)), np.zeros((2, 3, 3, 2))
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-5)
    report.detach()
    assert model.losses == []
    report = attach_regularizers(model, 0.5, exclude="first")
    matrix = impulse_matrix(second, (6, 6), 2)
    assert losses(model) == pytest.approx([0.5 * dense_penalty(matrix) / matrix.shape[1]], rel=1e-5)


class OwnKernel(LAYERS.Layer):
    """A layer of the user whose weights have penalties, one of them in a sum."""

    def build(self, shape):
        both = SumRegularizer([keras.regularizers.L2(0.1), FrobeniusRegularizer((), 0.5)])
        self.first = self.add_weight(shape=(shape[-1], 3), regularizer=both, name="first")
        self.second = self.add_weight(shape=(3, 3), regularizer=ReshapedRegularizer(0.5), name="second")

    def call(self, x):
        return x @ self.first @ self.second


def test_detaching_removes_every_penalty_of_the_package():
    own = OwnKernel(name="own")
    spectral = SumRegularizer([SumRegularizer([SpectralRegularizer(())]), keras.regularizers.L1(0.2)])
    function = LAYERS.Dense(3, kernel_regularizer=FunctionRegularizer(nuclear, ()), name="function")
    plain = LAYERS.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1), name="plain")
    layers = [own, LAYERS.Dense(4, kernel_regularizer=spectral, name="spectral"), function, plain]
    model = keras.Sequential([keras.Input((5,)), *layers])
    assert detach_regularizers(model) == ["own", "spectral", "function"]
    kernels = [np.asarray(weight) for weight in (own.first, layers[1].kernel, plain.kernel)]
    expected = [
        0.1 * np.sum(kernels[0] ** 2),
        0.2 * abs(kernels[1]).sum(),
        0.1 * np.sum(kernels[2] ** 2),
    ]
    assert losses(model) == pytest.approx(expected, rel=1e-5)
    assert (own.second.regularizer, function.kernel_regularizer) == (None, None)
    assert detach_regularizers(model) == []
