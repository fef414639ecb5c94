"""Small changes of the sources, one at a time: how many of them do the tests notice?

    pip install ".[test]" cosmic-ray && python tests/mutants.py --sample 50

Cosmic Ray makes the changes: other operators, numbers, conditions. A random sample of each module is tested
in copies of the repository as it was committed, with the tests that belong to the module. What survives is
printed. A mutant in a union of types is left out, because it changes no result.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import use_db
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TESTS = {
    "convolution/geometry.py": "tests/convolution tests/penalties/test_frobenius.py",
    "penalties/closed_form.py": "tests/penalties/test_closed_form.py tests/penalties/test_frobenius.py "
    "tests/penalties/test_penalty_function.py tests/penalties/test_extreme_scales.py "
    "tests/penalties/test_deviation_bound.py",
    "penalties/frobenius.py": "tests/penalties/test_frobenius.py tests/penalties/test_extreme_scales.py",
    "descent/step_rules.py": "tests/descent",
    "descent/stopping.py": "tests/descent",
    "cli/files.py": "tests/cli",
}
SECONDS = 600  # tests that take longer hang, which is noticed too


def mutations(module):
    """All mutations of a module, except those of types."""
    with tempfile.TemporaryDirectory() as folder, use_db(Path(folder) / "session.sqlite") as session:
        init([module], session, {})
        items = [item.mutations for item in session.work_items]
    return [found for found in items if "BitOr" not in found[0].operator_name]


def enter_clone():
    """Puts this process into a copy of the repository of its own."""
    folder = tempfile.mkdtemp(dir=os.environ["MUTANTS"])
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder


def test(found, tests):
    """What the tests say of a mutation."""
    return mutate_and_test(
        found, f"{sys.executable} -m pytest -x -q -n0 -p no:cacheprovider {tests}", SECONDS
    )


def main():
    """Prints the survivors and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=50, help="mutants of each module (default: 50)")
    parser.add_argument("--modules", nargs="+", choices=list(TESTS), default=list(TESTS), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    options = parser.parse_args()
    os.chdir(ROOT)
    table = Table("module", "mutants", "tested", "noticed", "survived")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MUTANTS"] = folder
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), enter_clone) as pool:
            for module in options.modules:
                every = mutations(f"tf_frobreg/{module}")
                sample = random.Random(options.seed).sample(every, min(options.sample, len(every)))
                results = list(pool.map(test, sample, [TESTS[module]] * len(sample)))
                survivors = [result for result in results if not result.is_killed]
                for result in survivors:
                    print(result.diff, flush=True)
                counts = (len(every), len(sample), len(sample) - len(survivors), len(survivors))
                print(module, *counts, flush=True)
                table.add_row(module, *map(str, counts))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
