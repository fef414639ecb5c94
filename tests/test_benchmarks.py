"""The benchmarks, run in their quick mode."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "script", ["closed_form.py", "descent.py", "spectrum.py", "overhead.py", "calls.py", "whole_models.py"]
)
def test_benchmark_prints_its_tables(script):
    options = {
        "closed_form.py": ["--quick", "--largest", "64"],
        "calls.py": [],
        "overhead.py": ["--quick", "--fit"],
    }.get(script, ["--quick"])
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / script), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    titles = {
        "calls.py": ("calls", "attach_regularizers", "regularize_kernel"),
        "closed_form.py": ("3×3×16×16", "512×512"),
        "descent.py": ("3×3×6×3", "3×3×64×64"),
        "overhead.py": ("A training step", "First step", "model.fit", "MobileNetV2"),
        "whole_models.py": ("MobileNetV2", "96×96"),
        "spectrum.py": ("16×16", "regularized", "large images", "MB the whole process"),
    }
    for title in titles[script]:
        assert title in printed
