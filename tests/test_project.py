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
    example, output = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", README, re.DOTALL).groups()
    assert len(example.splitlines()) <= 12
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    found, said = ([float(n) for n in re.findall(r"\d+\.\d+", text)] for text in (done.stdout, output))
    assert found == pytest.approx(said, abs=0.03)  # another machine rounds otherwise, and training adds up
    assert re.sub(r"[\d. ]", "", done.stdout) == re.sub(r"[\d. ]", "", output)


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
