"""Spectral, reshaped and own penalties on every layer of a model, and what cannot get a penalty."""

import inspect
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
from tf_frobreg.keras.sum_regularizer import regularizer_parts

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
    evaluate = tf.function(lambda: model.losses)
    for _ in range(400):  # two power steps each
        found = [float(loss) for loss in evaluate()]
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
        space = {"tf": tf}
        exec(f"def own(kernel, convolution):\n    return tf.reduce_sum({text})", space)
        return space["own"]

    def closure(power):
        return lambda kernel, convolution: tf.reduce_sum(kernel**power)

    model = small_model()
    assert len(attach_regularizers(model, penalty=defined("kernel**2")).attached) == 4
    assert len(attach_regularizers(model, penalty=defined("kernel**2")).kept) == 4
    assert len(attach_regularizers(model, penalty=defined("kernel**3")).attached) == 4
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
        (
            {"penalty": keras.regularizers.L2()},
            TypeError,
            "penalty must be one of .* or a function of .* Other regularizers are set as kernel_regularizer",
        ),
        ({"penalty": keras.regularizers.L2}, TypeError, "Other regularizers are set as kernel_regularizer"),
        ({"penalty": FrobeniusRegularizer}, TypeError, 'or a function of .* Write penalty="frobenius"$'),
        ({"penalty": SpectralRegularizer(8)}, TypeError, 'or a function of .* Write penalty="spectral"$'),
        ({"penalty": ReshapedRegularizer}, TypeError, 'or a function of .* Write penalty="reshaped"$'),
        (
            {"penalty": FunctionRegularizer(nuclear, 8)},
            TypeError,
            "or a function of .* Write penalty=regularizer.function$",
        ),
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
        (
            {"alpha": keras.Variable(1.0)},
            TypeError,
            "alpha must be a number, not a variable, because its value would be frozen. Write float.alpha.",
        ),
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


def vector(kernel, convolution):
    return tf.reduce_sum(kernel, axis=0)


def too_few(kernel):
    return tf.reduce_sum(kernel)


def misspelt(kernel, convolution):
    return tf.reduce_sum(kernel) / convolution.shap[1]


def nothing(kernel, convolution):
    pass


def constant(kernel, convolution):
    return tf.constant(1.0)


def through_numpy(kernel, convolution):
    return float(np.sum(np.asarray(kernel) ** 2))


def through_a_call_of_numpy(kernel, convolution):
    return tf.reduce_sum(tf.numpy_function(np.square, [kernel], kernel.dtype))


def only_images(kernel, convolution):
    if convolution.input_size == ():
        raise RuntimeError("no image " + "x" * 400)
    return tf.reduce_sum(kernel**2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            vector,
            "the function vector, .* must return a real scalar. Received: a float32 tensor .* layer 'conv'",
        ),
        (too_few, "too_few, which fails with TypeError: .*takes 1 positional argument but 2 .* layer 'conv'"),
        (misspelt, "misspelt, which fails with AttributeError: .* no attribute 'shap', for layer 'conv'"),
        (nothing, "nothing, which fails .* must return a real scalar. Received: None, for layer 'conv'"),
        (constant, "constant, whose result has no gradient. It is a constant, or .* for layer 'conv'"),
        (through_numpy, "through_numpy, which fails with NotImplementedError: Cannot convert .* numpy"),
        (through_a_call_of_numpy, "through_a_call_of_numpy, whose result has no gradient. .* or NumPy"),
        (only_images, "only_images, which fails with RuntimeError: no image x{291} …, for layer 'top'"),
    ],
    ids=stable_id,
)
def test_a_function_that_could_not_train_is_refused_before_anything_is_changed(function, message):
    model = small_model()
    model.layers[0].kernel_regularizer = model.layers[0].kernel.regularizer = l2 = keras.regularizers.L2(0.1)
    wanted = "penalty must be a function of .kernel, convolution. that returns a scalar, which can be .*"
    with pytest.raises(ValueError, match=wanted + message):
        attach_regularizers(model, penalty=function)
    assert len(model.losses) == 1
    assert model.layers[0].kernel_regularizer is model.layers[0].kernel.regularizer is l2


def test_a_function_is_tried_once_for_each_geometry_that_gets_it():
    seen = []

    def counted(kernel, convolution):
        seen.append((convolution.kernel_shape, convolution.input_size, kernel.dtype.name))
        return tf.reduce_sum(kernel**2)

    layers = [LAYERS.Conv2D(2, 3, padding="same", name=name) for name in ("one", "two", "three")]
    wide = LAYERS.Conv2D(2, 3, padding="same", dtype="float64", name="wide")
    last = LAYERS.Conv2D(2, 2, name="last")
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers, wide, last])
    attach_regularizers(model, penalty=counted, exclude="last")
    assert seen == [((3, 3, 2, 2), (6, 6), "float32"), ((3, 3, 2, 2), (6, 6), "float64")]
    again = attach_regularizers(model, penalty=counted, include="one")
    assert (len(seen), list(again.kept)) == (2, ["one"])  # nothing is attached, so nothing is tried
    overrides = {"two": {"padding": "circular"}, "three": {"factor": 1.0}}
    selection = {"include": ["one", "two", "three"], "existing": "replace"}
    attach_regularizers(model, penalty=counted, overrides=overrides, **selection)
    assert len(seen) == 4  # the border is part of the geometry, the factor is not


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({"factor": 3.0}, {"factor": 3.0}, ""),
        ({"factor": 3.0}, {"factor": 5}, "factor 3 instead of 5"),
        ({"alpha": 2.0}, {}, "α 2 instead of 1"),
        ({"factor": 3.0, "alpha": 2.0}, {"factor": 0.5}, "factor 3 instead of 0.5, α 2 instead of 1"),
        ({"reduction": "sum"}, {}, "reduction sum instead of mean"),
        ({}, {"padding": "circular"}, "padding valid instead of circular"),
        ({"padding": "circular"}, {}, "padding circular instead of valid"),
        ({"penalty": "spectral", "alpha": 2.0}, {"penalty": "spectral"}, "α 2 instead of 1"),
        ({"penalty": "reshaped"}, {"penalty": "reshaped", "factor": 1.0}, "factor 0.01 instead of 1"),
        ({"penalty": nuclear}, {"penalty": nuclear, "factor": 1.0}, "factor 0.01 instead of 1"),
    ],
    ids=stable_id,
)
def test_a_kept_penalty_stays_with_its_values_and_the_report_says_so(first, second, reason):
    model = small_model()
    attach_regularizers(model, include="conv", **first)
    before = losses(model)
    report = attach_regularizers(model, include="conv", **second)
    found = report.kept["conv"].partition(" already")[2]
    assert found == (f', with {reason}: existing="replace" takes the new one' if reason else "")
    if first.get("penalty") != "spectral":  # whose value changes with each evaluation
        assert losses(model) == before
    replaced = attach_regularizers(model, include="conv", existing="replace", **second)
    assert replaced.attached["conv"].factor == second.get("factor", 0.01)


class HasACall:
    def __call__(self, kernel, convolution):
        return tf.reduce_sum(kernel**2)


@keras.saving.register_keras_serializable(package="tests")
class CanBeSaved(HasACall):
    def get_config(self):
        return {}

    @classmethod
    def from_config(cls, config):
        return cls()


class NotRegistered(CanBeSaved):
    pass


def unregistered(kernel, convolution):
    return tf.reduce_sum(kernel**2)


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        (nuclear, None),
        (CanBeSaved(), None),
        (unregistered, 'loading needs custom_objects={"unregistered": unregistered}'),
        (NotRegistered(), 'loading needs custom_objects={"NotRegistered": NotRegistered}'),
        (lambda kernel, convolution: tf.reduce_sum(kernel), "loading needs safe_mode=False, because of the "),
        (HasACall(), "Keras cannot save the function: write one with def"),
    ],
    ids=["registered", "registered class", "function", "class", "lambda", "not saved"],
)
def test_the_report_says_what_loading_a_function_needs(function, remark, tmp_path):
    model = small_model()
    report = attach_regularizers(model, 0.5, penalty=function, include="conv", existing="replace")
    if remark is None:
        assert report.remarks == {}
    else:
        assert report.remarks["conv"].startswith(remark)
    path = tmp_path / "model.keras"
    if "safe_mode" in (remark or ""):
        with pytest.warns(UserWarning, match="includes a `lambda`"):
            model.save(path)
        with pytest.raises((TypeError, ValueError), match="safe_mode=False"):
            keras.saving.load_model(path)
    elif "cannot save" in (remark or ""):
        with pytest.raises(TypeError, match="Cannot serialize"):
            model.save(path)
    else:
        model.save(path)
        options = {}
        if remark is not None:
            name = remark.split('"')[1]
            options = {"custom_objects": {name: globals()[name]}}
            if inspect.isfunction(function):  # Keras looks for a class also in its module
                with pytest.raises((TypeError, ValueError), match=f"Could not locate .*{name}"):
                    keras.saving.load_model(path)
        assert losses(keras.saving.load_model(path, **options)) == pytest.approx(losses(model))


def test_a_lone_layer_without_a_size_asks_for_it():
    layer = LAYERS.Conv2D(4, 3, name="lone")
    layer.build((None, None, None, 3))
    with pytest.raises(ValueError, match="layer 'lone' .*size is unknown.*: give input_size") as error:
        attach_regularizers(layer)
    assert "exclude" not in str(error.value)
    assert attach_regularizers(layer, input_size=9).attached["lone"].input_size == (9, 9)


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
    assert report.left_out == {
        "second": "it shares its kernel with 'first'; penalised only with the geometry of 'first'"
    }
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
