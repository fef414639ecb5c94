"""What Algorithm 3.1 costs on whole networks, with random kernels and after a few steps of training.

    python tests/benchmarks/whole_models.py [--quick]

Each row is one network: its kernels, how many converged, the steps per kernel, the escapes from local minima,
and the seconds that `regularize_model` took.
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from rich.console import Console
from rich.table import Table

from tf_frobreg import regularize_model

NETWORKS = {
    "MobileNetV2": (keras.applications.MobileNetV2, 96),
    "ResNet50": (keras.applications.ResNet50, 224),
}
TRAINING_STEPS = 5


def trained(model: keras.Model) -> keras.Model:
    """Trains for a few steps on random images, so that the kernels are no longer random."""
    random = np.random.RandomState(0)
    images = random.random_sample((8, *model.input_shape[1:])).astype("float32")
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy")
    for _ in range(TRAINING_STEPS):
        model.train_on_batch(images, random.randint(10, size=8))
    return model


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only the first kernels of the smallest network")
    parser.add_argument("--network", choices=list(NETWORKS), help="only this network")
    options = parser.parse_args()
    names = [options.network] if options.network else list(NETWORKS)[: 1 if options.quick else None]
    table = Table(title="Algorithm 3.1 on every kernel, α = 1, tolerance 0.01, float32")
    columns = (
        "network",
        "image",
        "start",
        "kernels",
        "converged",
        "median steps",
        "most",
        "escapes",
        "seconds",
    )
    for name in columns:
        table.add_column(name, justify="right")
    console = Console(width=120)
    for name in names:
        make, size = NETWORKS[name]
        for state in ("random",) if options.quick else ("random", "trained"):
            keras.utils.set_random_seed(0)
            model = make(weights=None, input_shape=(size, size, 3), classes=10)
            if state == "trained":
                trained(model)
            include = "*expanded*" if options.quick else None
            start = time.perf_counter()
            descent = regularize_model(model, include=include)
            seconds = time.perf_counter() - start
            results = descent.results.values()
            steps = [result.num_steps for result in results]
            table.add_row(
                name,
                f"{size}×{size}",
                state,
                str(len(steps)),
                str(sum(result.converged for result in results)),
                f"{np.median(steps):.0f}",
                str(max(steps)),
                str(sum(len(result.escapes) for result in results)),
                f"{seconds:.0f}",
            )
            for kernel, result in descent.results.items():
                if not result.converged:
                    console.print(f"{name}, {state}: {kernel}: {result}")
    console.print(table)


if __name__ == "__main__":
    main()
