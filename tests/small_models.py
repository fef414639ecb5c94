"""Small models that several tests use."""

import keras
import numpy as np


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
