"""The same model with penalties under each backend of Keras: the losses of ten steps.

    pip install ".[backends]"
    python examples/backends.py

Keras has one backend per process, so the script starts itself once for each. A backend that is not installed
is left out.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")
STEPS = 10


def train():
    """Trains under the backend of this process. Prints the penalties before and the losses as JSON."""
    import keras
    import numpy as np

    import tf_frobreg as fr

    random = np.random.RandomState(0)
    x, y = random.rand(64, 16, 16, 3).astype("float32"), random.randint(2, size=64)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(8, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    model.set_weights([0.3 * random.standard_normal(weight.shape) for weight in model.get_weights()])
    fr.attach_regularizers(model, factor=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.02), loss)
    before = sum(float(keras.ops.convert_to_numpy(penalty)) for penalty in model.losses)
    history = model.fit(x, y, batch_size=64, epochs=STEPS, shuffle=False, verbose=0).history["loss"]
    sigma = max(row.extremes.sigma_max for row in fr.model_spectrum(model))
    print(json.dumps({"before": before, "losses": history, "sigma": sigma}))


def main():
    """Runs one process per backend and prints a table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().child:
        train()
        return
    found = {}
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is not None:
            environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            command = [sys.executable, __file__, "--child"]
            printed = subprocess.run(
                command, env=environment, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            found[backend] = json.loads(printed.splitlines()[-1])
    table = Table(title="The same model, data and start under each backend")
    table.add_column("")
    for backend in found:
        table.add_column(backend, justify="right")
    table.add_row("penalties before training", *(f"{one['before']:.6f}" for one in found.values()))
    for step in range(STEPS):
        table.add_row(f"loss of step {step + 1}", *(f"{one['losses'][step]:.6f}" for one in found.values()))
    table.add_row("largest σmax afterwards", *(f"{one['sigma']:.5f}" for one in found.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
