"""The example and the benchmark that compare the backends."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parents[2]
# Both start a process for each backend, so one run of them suffices.
pytestmark = [
    pytest.mark.skipif(keras.config.backend() != "torch", reason="runs once, under PyTorch"),
    pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="needs JAX"),
]


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], check=True, capture_output=True, text=True
    ).stdout


def test_the_example_shows_equal_losses():
    printed = run(ROOT / "examples" / "backends.py")
    rows = [re.findall(r"\d+\.\d+", line) for line in printed.splitlines() if "loss of step" in line]
    assert len(rows) == 10
    for row in rows:
        first, *others = map(float, row)
        assert others == pytest.approx([first, first], rel=1e-4)


def test_the_benchmark_prints_its_table():
    printed = run(ROOT / "tests" / "benchmarks" / "backends.py", "--quick")
    for name in ("tensorflow", "jax", "torch"):
        (line,) = (line for line in printed.splitlines() if name in line)
        assert len(re.findall(r"\d+\.?\d*", line)) == 6
