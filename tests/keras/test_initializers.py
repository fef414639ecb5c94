"""FrobeniusInitializer in the layers of Keras users."""

import copy
import gc
import pickle
from weakref import WeakValueDictionary

import keras
import numpy as np
import pytest
from geometries import Case, label

from tf_frobreg import FrobeniusInitializer, extreme_singular_values, regularize_kernel, singular_values
from tf_frobreg.keras import initializers

LAYERS = keras.layers
SQUARE = (3, 3, 4, 4)

# Most of them have local minima, in which a plain descent ends.
CASES = [
    Case((3, 3, 8, 1), (16, 16), kind="depthwise"),
    Case((3, 3, 4, 2), (16, 16), kind="depthwise"),
    Case((5, 5, 4, 1), (12, 12), kind="depthwise"),
    Case((3, 3, 4, 1), (12, 12), kind="depthwise", strides=2),
    Case((5, 8, 8), (32,)),
    Case((4, 8, 8), (33,)),
    Case((3, 3, 1, 1), (20, 20)),
    Case((3, 3, 8, 4), (12, 12)),
    Case((3, 3, 4, 8), (12, 12)),
    Case((4, 4, 8, 8), (12, 12)),
    Case((1, 1, 8, 8), (6, 6)),
    Case((5, 5, 4, 4), (3, 3)),
    Case((3, 3, 4, 4), (12, 12), padding="circular"),
    Case((3, 3, 1, 1), (12, 12), padding="circular"),
    Case((3, 3, 8, 8), (12, 12), padding="valid"),
    Case((3, 3, 8, 4), (12, 12), padding="valid"),
    Case((3, 3, 4, 16), (12, 12), padding="valid", strides=2),
    Case((3, 3, 4, 16), (13, 13), padding="valid", strides=2),
    Case((3, 3, 4, 16), (12, 12), strides=2),
    Case((3, 3, 4, 16), (13, 13), strides=2),
    Case((3, 3, 4, 8), (12, 12), strides=2),
    Case((3, 3, 8, 8), (13, 13), strides=2),
    Case((3, 3, 2, 18), (13, 13), strides=3),
    Case((3, 3, 4, 8), (16, 16), strides=4),
    Case((1, 1, 8, 4), (12, 12), strides=2),
    Case((3, 3, 2, 8), (12, 12), groups=4),
    Case((3, 3, 2, 16), (12, 12), groups=2, strides=2),
    Case((3, 3, 4, 4), (8, 8), kind="transpose"),
    Case((3, 3, 4, 8), (8, 8), kind="transpose", strides=2),
    Case((4, 4, 4, 16), (8, 8), kind="transpose", strides=2),
    Case((3, 3, 4, 16), (8, 8), kind="transpose", strides=2, padding="valid"),
    Case((3, 3, 4, 4), (12, 12), dilation_rate=2),
    Case((3, 3, 4, 4), (12, 12), dilation_rate=2, padding="valid"),
    Case((3, 3, 3, 4, 4), (6, 6, 6)),
    Case((3, 3, 3, 2, 16), (6, 6, 6), strides=2),
    Case((12, 5), ()),
]
OUT_OF_REACH = [
    Case((3, 3, 4, 8), (12, 12), padding="valid"),
    Case((3, 3, 4, 8), (13, 13), strides=2),
    Case((1, 1, 4, 8), (12, 12), strides=2),
]


def distance(kernel, case, alpha):
    """max |σ − √α|."""
    return np.abs(singular_values(kernel, case.image, **case.geometry) - alpha**0.5).max()


@pytest.fixture
def descents(monkeypatch):
    """The kernel shapes of the descents since the last `clear()`. No kernel is known at first."""
    shapes = []

    def counting(kernel, *arguments, **options):
        if not hasattr(kernel, "reason"):  # a result that is measured again
            shapes.append(kernel.shape)
        return regularize_kernel(kernel, *arguments, **options)

    monkeypatch.setattr(initializers, "regularize_kernel", counting)
    monkeypatch.setattr(initializers, "COMPUTED", WeakValueDictionary())
    return shapes


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_geometry_keeps_the_tolerance_without_a_warning(case, alpha):
    kernel = FrobeniusInitializer(case.image, alpha, seed=4, **case.geometry)(case.kernel_shape, "float64")
    assert distance(kernel, case, alpha) <= 0.05
    assert distance(kernel, case, alpha) > 1e-6  # the noise is still there


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("seed", range(10))
def test_depthwise_kernels_keep_the_tolerance_from_every_seed(seed, alpha):
    case = CASES[0]
    kernel = FrobeniusInitializer(case.image, alpha, seed=seed, **case.geometry)(case.kernel_shape)
    assert distance(kernel, case, alpha) <= 0.0501


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("case", OUT_OF_REACH, ids=label)
def test_a_kernel_out_of_reach_warns_once_and_names_what_helps(case, alpha):
    initializer = FrobeniusInitializer(case.image, alpha, seed=1, **case.geometry)
    with pytest.warns(UserWarning, match="misses tolerance=0.05: not converged") as warned:
        kernel = initializer(case.kernel_shape)
    (warning,) = warned
    message = str(warning.message)
    assert message.startswith(f"the kernel of shape {case.kernel_shape} misses tolerance=0.05: not converged")
    assert "fewer filters, or no border if there is one, can help" in message
    assert np.isfinite(kernel).all()
    np.testing.assert_array_equal(initializer(case.kernel_shape), kernel)  # a second warning would fail
    fewer = min(case.kernel_shape[-2:])
    initializer((*case.kernel_shape[:-1], fewer))  # the remedies help: no warning
    if case.padding == "valid":
        circular = FrobeniusInitializer(case.image, alpha, seed=1, padding="circular")
        circular(case.kernel_shape)


def test_too_few_steps_warn_and_no_tolerance_does_not():
    with pytest.warns(
        UserWarning, match=r"misses tolerance=0.001: not converged: out of steps; .* more steps"
    ):
        FrobeniusInitializer(8, max_steps=1, tolerance=0.001, seed=1)(SQUARE)
    FrobeniusInitializer(8, max_steps=1, tolerance=0.0, seed=1)(SQUARE)


@pytest.mark.parametrize(
    ("layer", "shape", "geometry"),
    [
        (lambda k: LAYERS.Conv2D(8, 3, padding="same", kernel_initializer=k), (12, 12, 8), {}),
        (lambda k: LAYERS.Conv2D(4, 3, kernel_initializer=k), (12, 10, 4), {"padding": "valid"}),
        (
            lambda k: LAYERS.Conv2D(8, 3, strides=2, padding="same", kernel_initializer=k),
            (12, 12, 4),
            {"strides": 2},
        ),
        (
            lambda k: LAYERS.Conv2D(8, 3, groups=2, padding="same", kernel_initializer=k),
            (8, 8, 4),
            {"groups": 2},
        ),
        (
            lambda k: LAYERS.DepthwiseConv2D(3, padding="same", depthwise_initializer=k),
            (8, 8, 4),
            {"kind": "depthwise"},
        ),
        (
            lambda k: LAYERS.Conv2DTranspose(4, 3, padding="same", kernel_initializer=k),
            (8, 8, 6),
            {"kind": "transpose"},
        ),
        (lambda k: LAYERS.Conv1D(6, 4, padding="same", kernel_initializer=k), (20, 6), {}),
        (lambda k: LAYERS.Dense(5, kernel_initializer=k), (7,), {}),
    ],
)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_initializer(layer, shape, geometry, alpha):
    initializer = FrobeniusInitializer(shape[:-1], alpha, seed=3, **geometry)
    built = layer(initializer)
    built.build((None, *shape))
    kernel = np.asarray(built.kernel)
    sigma = singular_values(kernel, shape[:-1], **geometry)
    assert np.abs(sigma - alpha**0.5).max() <= 0.0501
    if kernel.ndim > 2:
        outside = kernel.copy()
        outside[tuple((k - 1) // 2 for k in kernel.shape[:-2])] = 0
        assert 0.005 < np.sum(outside**2) / np.sum(kernel**2) < 0.95  # not the centre tap alone
    again = FrobeniusInitializer.from_config(initializer.get_config())
    np.testing.assert_allclose(again(kernel.shape), kernel, atol=1e-5)


def test_initializer_draws_a_seed_that_keras_controls():
    kernels = []
    for _ in range(2):
        keras.utils.set_random_seed(7)
        kernels.append(np.asarray(FrobeniusInitializer(8)((3, 3, 2, 2))))
    np.testing.assert_allclose(*kernels, atol=1e-5)
    assert np.abs(kernels[0] - FrobeniusInitializer(8)((3, 3, 2, 2))).max() > 0.1


@pytest.mark.slow
def test_initializer_of_a_large_square_kernel_avoids_local_minima():
    kernel = np.asarray(FrobeniusInitializer(32, seed=1)((3, 3, 64, 64)))
    found = extreme_singular_values(kernel, 32)
    assert max(found.sigma_max - 1, 1 - found.sigma_min) <= 0.051


def test_initializer_refuses_what_is_no_float():
    with pytest.raises(TypeError, match="dtype must be one of floats. Received: dtype='int32'"):
        FrobeniusInitializer(8)((3, 3, 2, 2), dtype="int32")


def test_initializer_without_noise_is_delta_orthogonal():
    kernel = np.asarray(FrobeniusInitializer(8, noise=0.0, seed=1)((3, 3, 4, 4), dtype="float64"))
    assert kernel.dtype == np.float64
    assert np.count_nonzero(kernel) == 16
    np.testing.assert_allclose(kernel[1, 1] @ kernel[1, 1].T, np.eye(4), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 0}, "alpha must be"),
        ({"noise": -1}, "noise must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"padding": "full"}, "padding must be one of"),
    ],
)
def test_bad_arguments_of_the_initializer(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrobeniusInitializer(8, **arguments)


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(TypeError, match="shape must be the shape of a kernel. Received: shape=3"):
        FrobeniusInitializer(4)(3)


def test_a_layer_with_the_initializer_is_saved_and_loaded(tmp_path):
    start = FrobeniusInitializer((8, 7), 2.0, noise=0.5, max_steps=3, seed=5, padding="valid")
    with pytest.warns(UserWarning, match="misses tolerance"):
        model = keras.Sequential([keras.Input((8, 7, 2)), LAYERS.Conv2D(4, 3, kernel_initializer=start)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded.layers[0].kernel_initializer
    assert type(again) is FrobeniusInitializer
    assert again.get_config() == start.get_config()
    np.testing.assert_array_equal(loaded.layers[0].kernel, model.layers[0].kernel)


def conv_model(seed, dtype="float32"):
    """A convolution and its initializer, which has run once."""
    start = FrobeniusInitializer(8, seed=seed)
    layer = LAYERS.Conv2D(4, 3, padding="same", kernel_initializer=start, dtype=dtype)
    return keras.Sequential([keras.Input((8, 8, 4)), layer])


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize(
    "duplicate",
    [
        keras.models.clone_model,
        lambda model: type(model).from_config(model.get_config()),
        lambda model: keras.models.model_from_json(model.to_json()),
        lambda model: keras.Sequential(
            [keras.Input((8, 8, 4)), LAYERS.Conv2D.from_config(model.layers[0].get_config())]
        ),
    ],
    ids=["clone_model", "from_config", "model_from_json", "layer"],
)
def test_a_copy_of_a_model_has_its_kernel_without_a_second_descent(duplicate, seed, descents):
    model = conv_model(seed)
    assert descents == [SQUARE]
    copied = duplicate(model)
    assert descents == [SQUARE]
    assert copied.layers[0].kernel_initializer is not model.layers[0].kernel_initializer
    np.testing.assert_array_equal(copied.layers[0].kernel, model.layers[0].kernel)


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize(
    "duplicate",
    [
        lambda start: FrobeniusInitializer.from_config(start.get_config()),
        FrobeniusInitializer.clone,
        copy.copy,
        copy.deepcopy,
        lambda start: pickle.loads(pickle.dumps(start)),
    ],
    ids=["from_config", "clone", "copy", "deepcopy", "pickle"],
)
def test_a_copy_of_an_initializer_gives_its_kernel_without_a_second_descent(duplicate, seed, descents):
    start = FrobeniusInitializer(8, seed=seed)
    kernel = start(SQUARE)
    copied = duplicate(start)
    assert copied is not start
    np.testing.assert_array_equal(copied(SQUARE), kernel)
    assert descents == [SQUARE]
    assert copied.get_config() == start.get_config()


def test_an_initializer_that_was_pickled_brings_its_kernel_along(descents):
    start = FrobeniusInitializer(8)
    kernel, pickled = start(SQUARE), pickle.dumps(start)
    del start
    gc.collect()
    assert not initializers.COMPUTED
    loaded = pickle.loads(pickled)
    np.testing.assert_array_equal(loaded(SQUARE), kernel)
    np.testing.assert_array_equal(loaded.clone()(SQUARE), kernel)
    assert descents == [SQUARE]


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize("load_model", [keras.saving.load_model, keras.models.load_model])
def test_loading_a_model_takes_its_weights_and_makes_no_descent(load_model, ending, seed, descents, tmp_path):
    model = conv_model(seed)
    start = np.asarray(model.layers[0].kernel)
    model.layers[0].kernel.assign(2 * start)
    path = tmp_path / f"model{ending}"
    model.save(path)
    config = model.layers[0].kernel_initializer.get_config()
    del model
    gc.collect()
    assert not initializers.COMPUTED
    descents.clear()
    layer = load_model(path).layers[0]
    assert descents == []
    np.testing.assert_array_equal(layer.kernel, 2 * start)
    assert layer.kernel_initializer.get_config() == config
    np.testing.assert_allclose(layer.kernel_initializer(SQUARE), start, atol=1e-6)  # now there is one
    assert descents == [SQUARE]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2},
        {"alpha": 2.0},
        {"noise": 0.5},
        {"tolerance": 0.02},
        {"max_steps": 2, "tolerance": 0.0},
        {"input_size": 7},
        {"padding": "circular"},
    ],
    ids=str,
)
def test_initializers_that_differ_share_no_kernel(other, descents):
    arguments = {"input_size": 8, "seed": 1}
    first, second = FrobeniusInitializer(**arguments), FrobeniusInitializer(**arguments | other)
    assert np.abs(first(SQUARE) - second(SQUARE)).max() > 1e-3
    assert descents == [SQUARE, SQUARE]


def test_each_shape_has_its_own_kernel(descents):
    start = FrobeniusInitializer(8, seed=1)
    shapes = [(3, 3, 2, 4), (1, 1, 2, 4), (3, 3, 2, 4)]
    assert [tuple(start(shape).shape) for shape in shapes] == shapes
    assert descents == shapes[:2]


@pytest.mark.usefixtures("descents")
def test_kernels_are_forgotten_with_the_last_initializer_that_gave_them():
    start = FrobeniusInitializer(8, seed=1)
    start(SQUARE)
    second, model = start.clone(), conv_model(seed=1)
    assert len(initializers.COMPUTED) == 2  # the layer's is computed in float64
    del start
    gc.collect()
    assert len(initializers.COMPUTED) == 1  # the clone had not been called
    second(SQUARE)
    assert len(initializers.COMPUTED) == 2
    del second, model
    gc.collect()
    assert not initializers.COMPUTED


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_the_dtype_of_the_kernel(dtype):
    model = conv_model(1, dtype)
    kernel = model.layers[0].kernel
    assert kernel.dtype == dtype
    exact = keras.ops.convert_to_numpy(keras.ops.cast(kernel, "float64"))
    assert np.abs(singular_values(exact, 8) - 1).max() <= 0.055  # 8 bits of bfloat16
    assert (exact != exact.astype("float32")).any() == (dtype == "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_a_layer_does_not_change_what_its_initializer_gives(dtype):
    model = conv_model(1, dtype)
    start = np.array(model.layers[0].kernel)
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 8, 8, 4)), np.zeros((4, 8, 8, 4)), verbose=0)
    assert np.abs(model.layers[0].kernel - start).max() > 0
    np.testing.assert_array_equal(model.layers[0].kernel_initializer(SQUARE, dtype), start)


def test_one_initializer_gives_two_layers_the_same_kernel():
    start = FrobeniusInitializer(6)
    np.testing.assert_array_equal(start((3, 3, 2, 2)), start((3, 3, 2, 2)))


def test_kernels_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="input_size must be an int or 2 ints"):
        FrobeniusInitializer((8, 8, 8))((3, 3, 2, 2))
