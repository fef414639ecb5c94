"""What the project says about itself is true, and its sources are in order."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tf_frobreg

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Results and types. The functions that return or take them show how they are used.
WITHOUT_OWN_EXAMPLE = {"ExtremeSingularValues", "KernelSpectrum", "StopReason", "ToeplitzIndices"}
NOT_IN_README = {
    *WITHOUT_OWN_EXAMPLE,
    "AttachReport",
    "DescentResult",
    "Escape",
    "Geometry",
    "LipschitzBound",
    "ModelDescent",
    "ModelSpectrum",
}


def run(*command):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_readme_example_prints_what_the_readme_says():
    example, whole_model = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    output = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    assert len(example.splitlines()) <= 12
    assert len(whole_model.splitlines()) == 3
    done = run(sys.executable, "-c", example + whole_model)
    assert done.returncode == 0, done.stderr
    printed = "".join(done.stdout.splitlines(keepends=True)[: len(output.splitlines())])
    found, said = ([float(n) for n in re.findall(r"\d+\.\d+", text)] for text in (printed, output))
    assert found == pytest.approx(said, abs=0.03)  # rounding differs by machine, and training adds it up
    assert re.sub(r"[\d. ]", "", printed) == re.sub(r"[\d. ]", "", output)
    assert re.search(r"^conv2d +10 +1 +mean +16×16 +same +replaced FrobeniusReg", done.stdout, re.MULTILINE)
    assert "sigma_max: " in done.stdout  # logged by the monitor
    assert re.search(r"^conv2d +3×3×3×8 +16×16 +\d", done.stdout, re.MULTILINE)  # model_spectrum


def test_readme_is_short():
    assert len(README.splitlines()) <= 110
    assert len(README.split()) <= 900


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_ci_runs_the_commands_of_the_readme():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    assert len(commands) == 2
    done = run("bash", ".ci/run", "--list")
    assert done.stdout.splitlines() == commands, done.stderr


@pytest.mark.parametrize("name", sorted(tf_frobreg.__all__))
def test_public_names_are_documented(name):
    document = inspect.getdoc(getattr(tf_frobreg, name))
    if name not in WITHOUT_OWN_EXAMPLE:
        assert ">>>" in document
    if name not in NOT_IN_README:
        assert f"`{name}`" in README or f"fr.{name}" in README


def test_reference_is_current():
    done = run(sys.executable, "notebooks/reference.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_in_one_place():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tf_frobreg.__version__"}
    changes = README.partition("## Changes")[2]
    assert re.search(r"^- (\S+):", changes, re.MULTILINE).group(1) == tf_frobreg.__version__


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_sources_are_in_order(command):
    done = run(sys.executable, "-m", *command)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["tf_frobreg", "examples", "notebooks"])
def test_language_is_plain(folder):
    # Habits of earlier versions. One of these words makes a reader stop and decode.
    words = r"\b(anew|reckon\w*|told|tells|but for|of one's own|at the most|As for `\w+`)"
    paths = [path for ending in ("*.py", "*.ipynb") for path in (ROOT / folder).rglob(ending)]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = [f"{path}: {m.group()}" for path, text in texts.items() for m in re.finditer(words, text)]
    assert texts
    assert not found
