"""Small models that several tests use."""

import keras
import numpy as np

from tf_frobreg import attach_regularizers


def small_model(**options):
    """Two convolutions with these options, each with 3 filters on images of 8×8×3."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8, 8, 3))])
    for _ in range(2):
        model.add(keras.layers.Conv2D(3, 3, padding="same", use_bias=False, **options))
    model.add(keras.layers.GlobalAveragePooling2D())
    return model


def fit(model, epochs=1, **options):
    """Trains the model on random data."""
    model.compile(keras.optimizers.SGD(0.05), "mse", **options)
    random = np.random.RandomState(0)
    model.fit(random.randn(16, 8, 8, 3), random.randn(16, 3), batch_size=4, epochs=epochs, verbose=0)


def named_model(dtype=None):
    """Two convolutions and a Dense layer, with names. `dtype` is that of the first."""
    keras.utils.set_random_seed(1)
    return keras.Sequential(
        [
            keras.Input((9, 8, 2)),
            keras.layers.Conv2D(4, 3, padding="same", name="conv", dtype=dtype),
            keras.layers.Conv2D(8, 3, strides=2, name="strided"),
            keras.layers.Flatten(),
            keras.layers.Dense(4, name="top"),
        ]
    )


def penalised_model(factor=0.01, **options):
    """A convolution with a penalty of that factor and a Dense layer, on images of 8×8×2, compiled."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(1, name="top"),
        ]
    )
    if factor:
        attach_regularizers(model, factor, reduction="mean", include="conv")
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)
    return model


def fit_epochs(model, *callbacks, batch_size=8, epochs=3, initial_epoch=0):
    """Trains a `penalised_model` on random data. Returns the logs of the epochs."""
    random = np.random.RandomState(0)
    x, y = random.rand(32, 8, 8, 2).astype("float32"), random.rand(32, 1).astype("float32")
    options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, "initial_epoch": initial_epoch}
    return model.fit(x, y, epochs=epochs, callbacks=list(callbacks), **options).history
