"""What penalties on every kernel cost under each backend of Keras, per training step and for the first.

    pip install ".[backends]" && python tests/benchmarks/backends.py

Keras has one backend per process, so the script starts itself once for each, and leaves out what is not
installed. Each is compiled as Keras does by default. The steps with and without penalties are measured in
turn, and their medians are shown. `--quick` takes one round on 32×32 images.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time

BACKENDS = ("tensorflow", "jax", "torch")


def measure(size, batch, rounds):
    """Prints the seconds of one backend as JSON."""
    import keras
    import numpy as np

    import tf_frobreg as fr

    x = np.random.RandomState(0).rand(batch, size, size, 3).astype("float32")
    y = np.zeros(batch, int)
    models = []
    for penalised in (False, True):
        keras.utils.set_random_seed(0)
        model = keras.applications.MobileNetV2(
            weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
        )
        if penalised:
            fr.attach_regularizers(model, 0.001)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01), loss)
        models.append(model)

    def seconds(model):
        start = time.perf_counter()
        keras.ops.convert_to_numpy(model.train_on_batch(x, y))
        return time.perf_counter() - start

    first = [seconds(model) for model in models]
    steps = [[seconds(model) for model in models] for _ in range(rounds)]
    print(json.dumps({"first": first, "step": np.median(steps, axis=0).tolist()}))


def main():
    """Runs one process per backend and prints a table."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one round on 32×32 images")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size, batch, rounds = (32, 8, 1) if options.quick else (96, 32, 15)
    if options.child:
        measure(size, batch, rounds)
        return
    table = Table(title=f"MobileNetV2 at {size}×{size}, batch {batch}, {os.cpu_count()} cores: seconds")
    for name in ("backend", "step", "regularized", "ratio", "first step", "regularized", "ratio"):
        table.add_column(name, justify="right")
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is None:
            continue
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, "--child", *(["--quick"] if options.quick else [])]
        printed = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        cells = []
        for plain, regularized in json.loads(printed.splitlines()[-1]).values():
            cells = [f"{plain:.3g}", f"{regularized:.3g}", f"{regularized / plain:.2f}", *cells]
        table.add_row(backend, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
