"""How far a kernel travels: calls of the package's functions, and moves from one of its files to another.

    pip install . && python tests/benchmarks/calls.py

Each row runs a second time, when caches are filled and functions are traced. A call counts if the called
function is defined in a file of the package. A switch is a call or a return that leads from one file of the
package to another. Calls of other libraries do not count, even if they lie in between.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import tf_frobreg

PACKAGE = str(Path(tf_frobreg.__file__).parent)


def count(function):
    """(calls, switches) of the package while a function runs."""
    calls, switches, files = 0, 0, [""]  # the files of the package's functions that are running

    def profile(frame, event, _):
        nonlocal calls, switches
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(PACKAGE + os.sep):
            return
        if event == "call":
            calls += 1
            files.append(file)
        else:
            files.pop()
        # From the first file to the caller outside, and back, is no switch.
        before, after = (files[-2], file) if event == "call" else (file, files[-1])
        switches += "" not in (before, after) and before != after

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls, switches


def value_and_gradient():
    """The regularizer and its gradient, eager."""
    regularizer = tf_frobreg.FrobeniusRegularizer(input_size=20)
    kernel = tf.Variable(np.random.RandomState(1).randn(3, 3, 3, 6))

    def run():
        with tf.GradientTape() as tape:
            loss = regularizer(kernel)
        tape.gradient(loss, kernel)

    return run


def attach():
    """`attach_regularizers` on three layers."""

    def model():
        layers = [keras.layers.Conv2D(4, 3, padding="same") for _ in range(3)]
        return keras.Sequential([keras.Input((16, 16, 3)), *layers])

    models = [model(), model()]  # one for the warm-up
    return lambda: tf_frobreg.attach_regularizers(models.pop())


def descent():
    """`regularize_kernel` for 37 steps, without a look at σ."""
    kernel = np.random.RandomState(1).randn(3, 3, 3, 6)
    return lambda: tf_frobreg.regularize_kernel(kernel, 20, max_steps=37, tolerance=0.0)


def main():
    """Prints the table."""
    table = Table()
    for name in ("", "calls", "switches"):
        table.add_column(name, justify="right" if name else "left")
    for prepare in (value_and_gradient, attach, descent):
        run = prepare()
        run()
        table.add_row(prepare.__doc__, *map(str, count(run)))
    Console().print(table)


if __name__ == "__main__":
    main()
