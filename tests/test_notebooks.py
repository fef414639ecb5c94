"""The notebooks run, and print what they hold: the same words, and numbers within a tolerance.

Stored and new outputs are compared line by line. Tags of a code cell say how its numbers are compared:

- No tag: deterministic sums and descents. Rounding differs between processors, so 1 % is allowed, and 10 %
  of a number of steps.
- "trained": numbers that a training ended in. `TRAINED` is their tolerance.
- "timing": seconds and their ratios. Neither numbers nor words are compared.

A notebook that has a quick mode (`TF_FROBREG_QUICK`) prints other numbers in it. Only its words are compared.
"""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|\bnan\b")
# The trained layer of notebook 05, over five seeds: σmax 4.1 to 4.6, σmin 1.1 to 1.8. One and two threads
# gave the same first digit. Another processor changes less than another seed does.
TRAINED = {"rel": 0.1, "abs": 0.3}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_and_prints_what_it_holds(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    source = "".join(cell.source for cell in notebook.cells)
    if "fashion_mnist" in source and not FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    held = [printed_by(cell) for cell in notebook.cells]
    monkeypatch.setenv("TF_FROBREG_QUICK", "1")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "tests" / "benchmarks", tmp_path / "tests" / "benchmarks")
    (tmp_path / "notebooks").mkdir()
    folder = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=900, resources=folder).execute()
    quick = "TF_FROBREG_QUICK" in source
    assert any(held) or not any(cell.cell_type == "code" for cell in notebook.cells)
    for cell, before in zip(notebook.cells, held, strict=True):
        tags = cell.metadata.get("tags", [])
        if "timing" not in tags:
            compare(before, printed_by(cell), words_only=quick, trained="trained" in tags)


def compare(stored, new, *, words_only, trained):
    for old, line in zip(stored.splitlines(), new.splitlines(), strict=True):
        assert words(line) == words(old)
        # A rounding error is another one on another processor.
        if words_only or "difference" in old:
            continue
        for said, found in zip(numbers(old), numbers(line), strict=True):
            if trained:
                assert found == pytest.approx(said, **TRAINED), (old, line)
            else:
                share = 0.1 if "steps" in old else 0.01
                assert found == pytest.approx(said, rel=share, abs=0.011, nan_ok=True), (old, line)


def words(line):
    """The line without its numbers, and with single spaces, as numbers change in width."""
    return " ".join(NUMBER.sub("#", line).split())


def numbers(line):
    return [float(n.replace(",", "").replace("−", "-")) for n in NUMBER.findall(line)]


def printed_by(cell):
    outputs = cell.get("outputs", [])
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def test_the_comparison_finds_other_words_and_numbers():
    compare("σmax 1.00 after 100 steps", "σmax 1.01 after  92 steps", words_only=False, trained=False)
    compare("none σmax 4.3, σmin 1.2", "none σmax 4.3, σmin 1.3", words_only=False, trained=True)
    with pytest.raises(AssertionError):
        compare("none σmax 4.3, σmin 1.2", "none σmax 4.3, σmin 1.7", words_only=False, trained=True)
    for line in ("σmin 1.00 after 100 steps", "σmax 1.20 after 100 steps", "σmax 1.00 after 80 steps"):
        with pytest.raises(AssertionError):
            compare("σmax 1.00 after 100 steps", line, words_only=False, trained=False)
