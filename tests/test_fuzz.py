"""A few hundred of the cases of `fuzz.py`, and its command line."""

import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import KINDS, WEIGHTS, run_case


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input(kind):
    failed = {seed: wrong for seed in range(15 * WEIGHTS[kind]) if (wrong := run_case(kind, seed))}
    assert not failed, "\n".join(
        f"python tests/fuzz.py --kind {kind} --seed {seed}\n{wrong}" for seed, wrong in failed.items()
    )


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        ("model", 308538),  # HDF5 reads for ever
        ("api", 202587),  # an array of 96 GiB
        ("api", 203133),  # TensorFlow ends the process
    ],
)
def test_what_failed_once(kind, seed, monkeypatch):
    monkeypatch.setattr("tf_frobreg.cli.hdf5.SECONDS", 5)
    assert run_case(kind, seed) is None


def test_a_failure_is_noticed(monkeypatch):
    def fail(rng, folder):
        assert rng.random() < 0, "seen"

    monkeypatch.setitem(KINDS, "npy", fail)
    assert "AssertionError: seen" in run_case("npy", 1)


@pytest.mark.slow
def test_the_long_run_counts_its_cases():
    script = Path(__file__).parent / "fuzz.py"
    done = subprocess.run([sys.executable, script, "--cases", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "20 cases from seed 0, 0 failed"
