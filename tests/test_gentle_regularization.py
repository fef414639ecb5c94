"""examples/gentle_regularization.py, run as a reader would run it."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "gentle_regularization.py"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
pytestmark = pytest.mark.slow


def run(*arguments, status=0):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done


@pytest.mark.skipif(
    not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_repairs_do_what_they_say(tmp_path):
    command = ["--quick", "--data-dir", FASHION_MNIST, "--output-dir", tmp_path]
    printed = run(*command).stdout
    with open(tmp_path / "gentle_regularization.csv", newline="", encoding="utf-8") as file:
        rows = {(row.pop("group"), row.pop("repair")): row for row in csv.DictReader(file)}
    numbers = {key: {name: float(value) for name, value in row.items()} for key, row in rows.items()}
    assert len(numbers) == 17
    for group, name in numbers:
        assert group in printed
        assert name in printed

    trained = numbers["trained", "as it is"]
    assert trained["moved"] == 0
    assert trained["accuracy"] > 0.4
    for name, row in numbers.items():
        assert (row["moved"] > 0) == (name != ("trained", "as it is")) or name[0] == "σmax bounded"

    descent = {name: row for (group, name), row in numbers.items() if group == "Algorithm 3.1"}
    for name, tolerance in [
        ("all kernels", 0.01),
        ("without the head", 0.01),
        ("without the head, tolerance 0.3", 0.3),
        ("without the head, tolerance 0.5", 0.5),
    ]:
        assert max(descent[name]["sigma_max"] - 1, 1 - descent[name]["sigma_min"]) <= 1.02 * tolerance
    assert descent["all kernels"]["product"] == pytest.approx(1, abs=0.05)
    assert descent["without the head"]["product"] > 1.1
    assert descent["without the head, α = 2"]["sigma_max"] == pytest.approx(2**0.5, abs=0.011)
    assert descent["without the head, α = mean σ²"]["moved"] < descent["without the head"]["moved"]
    whole = descent["without the head"]["moved"]
    assert numbers["part of the way", "1/4, without the head"]["moved"] == pytest.approx(whole / 4, rel=1e-4)
    assert numbers["part of the way", "1/2, without the head"]["moved"] == pytest.approx(whole / 2, rel=1e-4)

    scaled = numbers["σmax bounded", "scaled to 1, all kernels"]
    assert scaled["product"] == pytest.approx(1, abs=0.01)
    assert scaled["condition"] == pytest.approx(trained["condition"], rel=0.01)
    assert scaled["accuracy"] == pytest.approx(trained["accuracy"], abs=0.002)
    clipped = [numbers["σmax bounded", f"clipped to {high}, strides 1 only"] for high in (2, 1)]
    assert trained["product"] >= clipped[0]["product"] > 1.2 * clipped[1]["product"]

    factors = ("no penalty", "penalty 0.01", "penalty 0.1", "penalty 1")
    lasts = [numbers["training", name]["later_sigma_max"] for name in factors]
    assert lasts == sorted(lasts, reverse=True)
    assert (tmp_path / "gentle_regularization.png").read_bytes().startswith(b"\x89PNG")
    assert "exists. --force overwrites it" in run(*command, status=2).stderr


def test_a_directory_without_data_is_named(tmp_path):
    done = run("--data-dir", tmp_path, "--output-dir", tmp_path / "out", status=1)
    assert "--data-dir must hold the four .gz files" in done.stderr
