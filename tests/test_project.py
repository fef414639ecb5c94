"""What the project says of itself is true, and its sources are in order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tf_frobreg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# what functions return: documented there
RESULTS = {
    "AttachReport",
    "DescentResult",
    "ExtremeSingularValues",
    "KernelSpectrum",
    "ModelDescent",
    "StopReason",
}


def test_readme_example_prints_what_the_readme_says():
    example, whole_model = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    output = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    assert len(example.splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", example + whole_model], capture_output=True, text=True, check=True
    )
    printed = "".join(done.stdout.splitlines(keepends=True)[: len(output.splitlines())])
    found, said = ([float(n) for n in re.findall(r"\d+\.\d+", text)] for text in (printed, output))
    assert found == pytest.approx(said, abs=0.03)  # another machine rounds otherwise, and training adds up
    assert re.sub(r"[\d. ]", "", printed) == re.sub(r"[\d. ]", "", output)
    assert "conv2d/sigma_max" in done.stdout  # of the monitor


def test_readme_fits():
    assert len(README.splitlines()) <= 150


def test_ci_runs_the_commands_of_the_readme():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    assert len(commands) == 2
    done = subprocess.run(
        ["bash", ROOT / ".ci" / "run", "--list"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == commands


def test_public_names_are_documented_with_an_example():
    for name in set(tf_frobreg.__all__) - RESULTS:
        assert ">>>" in getattr(tf_frobreg, name).__doc__, name
        assert name in README, name


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(arguments):
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
