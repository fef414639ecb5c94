"""FrobeniusInitializer in the layers of Keras users."""

import keras
import numpy as np
import pytest

from tf_frobreg import FrobeniusInitializer, extreme_singular_values, singular_values

LAYERS = keras.layers


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


def test_a_layer_with_the_initializer_is_saved_and_loaded(tmp_path):
    start = FrobeniusInitializer((8, 7), 2.0, noise=0.5, max_steps=3, seed=5, padding="valid")
    model = keras.Sequential([keras.Input((8, 7, 2)), LAYERS.Conv2D(4, 3, kernel_initializer=start)])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded.layers[0].kernel_initializer
    assert type(again) is FrobeniusInitializer
    assert again.get_config() == start.get_config()
    np.testing.assert_array_equal(loaded.layers[0].kernel, model.layers[0].kernel)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_descent_that_ends_in_a_local_minimum_gives_a_kernel_too(seed):
    initializer = FrobeniusInitializer(16, seed=seed, kind="depthwise")
    sigma = singular_values(np.asarray(initializer((3, 3, 8, 1))), 16, kind="depthwise")
    assert np.isfinite(sigma).all()
    assert sigma.max() <= 1.6


def test_one_initializer_gives_two_layers_the_same_kernel():
    start = FrobeniusInitializer(6)
    np.testing.assert_array_equal(start((3, 3, 2, 2)), start((3, 3, 2, 2)))


def test_kernels_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="input_size must be an int or 2 ints"):
        FrobeniusInitializer((8, 8, 8))((3, 3, 2, 2))
