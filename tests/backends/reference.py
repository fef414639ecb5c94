"""What the tests compare between backends: run as a script, it trains a model and saves it.

    KERAS_BACKEND=jax python tests/backends/reference.py FOLDER

It writes `FOLDER/<backend>.keras` and `FOLDER/<backend>.json`, with the losses of each step. With
`DATA_PARALLEL=1` each step runs on all devices of JAX.
"""

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np

import tf_frobreg

STEPS = 10
PENALTIES = ("frobenius", "reshaped", "spectral")


def start(penalty="frobenius", factor=0.02, **options):
    """A small network whose weights do not depend on the backend, with penalties on all kernels."""
    model = keras.Sequential(
        [
            keras.Input((8, 9, 2)),
            keras.layers.Conv2D(4, 3, padding="same", activation="tanh", name="conv"),
            keras.layers.DepthwiseConv2D(3, strides=2, name="depthwise"),
            keras.layers.Conv2DTranspose(3, 3, name="transpose"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(2, name="top"),
        ]
    )
    random = np.random.RandomState(0)
    model.set_weights([0.4 * random.standard_normal(weight.shape) for weight in model.get_weights()])
    if penalty is not None:
        tf_frobreg.attach_regularizers(model, factor, penalty=penalty)
    model.compile(keras.optimizers.SGD(0.01), "mse", **options)
    return model


def data():
    """A batch of images and targets."""
    random = np.random.RandomState(1)
    return random.standard_normal((16, 8, 9, 2)).astype("float32"), random.rand(16, 2).astype("float32")


def train(model, callbacks=(), steps=STEPS):
    """The losses of steps on the whole batch."""
    x, y = data()
    history = model.fit(
        x, y, batch_size=len(x), epochs=steps, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    return history.history["loss"]


def penalties(model):
    """The penalties of a model as numbers."""
    return [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses]


def main(folder):
    """Trains one model with each penalty. Saves the first one, and says what the losses were."""
    if os.environ.get("DATA_PARALLEL"):
        devices = keras.distribution.list_devices()
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    found = {"scheduled": train(start(), [tf_frobreg.FactorSchedule(lambda step: step / 4, unit="step")])}
    for penalty in PENALTIES:
        model = start(penalty)
        found[penalty] = {"before": penalties(model), "losses": train(model)}
        if penalty == "frobenius":
            found["after"] = penalties(model)
            model.save(folder / f"{keras.config.backend()}.keras")
    others = [file for file in folder.glob("*.keras") if file.stem != keras.config.backend()]
    found["loaded"] = {file.stem: penalties(keras.saving.load_model(file)) for file in others}
    (folder / f"{keras.config.backend()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
