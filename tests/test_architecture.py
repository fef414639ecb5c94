"""The package's folders import each other in one direction, and share public names only."""

import ast
import importlib
from pathlib import Path

import pytest

import tf_frobreg
import tf_frobreg.api

PACKAGE = Path(tf_frobreg.__file__).parent
# Each part may import those before it, and itself.
ORDER = (
    "text",
    "backends",
    "checks",
    "tables",
    "convolution",
    "penalties",
    "spectrum",
    "descent",
    "plotting",
    "keras",
    "api",
    "cli",
    "__main__",
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = ("tf_frobreg", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(module, name) of each import of the package, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module.partition(".")[0] == "tf_frobreg":
                yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name, None) for alias in node.names if alias.name.partition(".")[0] == "tf_frobreg"
            )


def part(module):
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path):
    own = part(module_name(path))
    for module, name in imports(path):
        assert name is None or not name.startswith("_") or name.startswith("__"), (module, name)
        imported = part(module) or (name if name in ORDER else None)
        if own is None or imported is None:  # tf_frobreg/__init__.py, which loads the public names on demand
            assert own is None or own == "cli", f"{path} imports the whole package"
        else:
            assert ORDER.index(imported) <= ORDER.index(own), (module, name)


def test_every_part_has_its_place():
    assert {part(module_name(path)) for path in MODULES} == {None, *ORDER}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_public_names_are_exported(path):
    module = importlib.import_module(module_name(path)) if path.name != "__main__.py" else None
    assert set(getattr(module, "__all__", ())) <= set(tf_frobreg.api.__all__)


def test_public_names_are_exported_by_the_module_that_defines_them():
    defined = {name for path in MODULES for name in exported(path)}
    assert defined == set(tf_frobreg.api.__all__)


def exported(path):
    if path.name in ("__main__.py", "api.py") or path == PACKAGE / "__init__.py":
        return ()
    return getattr(importlib.import_module(module_name(path)), "__all__", ())
