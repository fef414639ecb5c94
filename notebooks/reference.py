"""Writes 00_reference.ipynb, the reference of all public names, from their docstrings.

    python notebooks/reference.py            # writes the notebook
    python notebooks/reference.py --check    # exits with status 1 if the notebook is not up to date

Every name of `tf_frobreg.api` must be in exactly one group of `GROUPS`.
"""

import argparse
import ast
import enum
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any, is_typeddict

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import nbformat

from tf_frobreg import api

NOTEBOOK = Path(__file__).with_name("00_reference.ipynb")
PACKAGE = Path(api.__file__).parent
COMMAND = "python notebooks/reference.py"

# title: (introduction, names)
GROUPS = {
    "Penalty, gradient and floor": (
        "The paper's penalty R_α(K) = ‖MᵀM − αI‖²_F of one kernel. Notebook 01 shows them at work.",
        ("frobenius_penalty", "frobenius_gradient", "penalty_floor", "penalty_excess"),
    ),
    "The matrix M": (
        "The transformation matrix M of a layer, as a sparse tensor. Notebook 05 builds a penalty on it.",
        ("transformation_matrix", "toeplitz_indices", "index_set"),
    ),
    "Singular values": (
        "The singular values σ of M: all of them, or only the largest and the smallest.",
        ("singular_values", "extreme_singular_values", "spectral_norm", "condition_number"),
    ),
    "Descent on one kernel": (
        "Algorithm 3.1, with the paper's step sizes or with exact steps. See notebook 01.",
        ("regularize_kernel", "paper_schedule"),
    ),
    "Keras regularizers": (
        "Regularizers and an initializer for one layer. See notebook 02.",
        ("FrobeniusRegularizer", "FunctionRegularizer", "SumRegularizer", "FrobeniusInitializer"),
    ),
    "Whole models": (
        "The same for every layer of a model. See notebooks 02 and 04.",
        ("attach_regularizers", "detach_regularizers", "regularize_model", "model_spectrum"),
    ),
    "Certificates": (
        "What σ bounds: how far an output can move, and how far an input must move to change its class.",
        ("lipschitz_bound", "certified_radius"),
    ),
    "Callbacks": (
        "Callbacks for `fit`. See notebook 02.",
        ("SingularValueMonitor", "FactorSchedule", "LazyPenalty"),
    ),
    "Figures": (
        "Figures of singular values, descents and trainings.",
        ("plot_convergence", "plot_spectrum", "plot_training", "plot_gradient_norms"),
    ),
    "Other methods": (
        "The methods with which the paper compares its penalty. See notebook 01.",
        (
            "spectral_penalty",
            "SpectralRegularizer",
            "reshaped_penalty",
            "ReshapedRegularizer",
            "clip_singular_values",
            "SingularValueClip",
        ),
    ),
    "Types": (
        "The geometry of a layer, and the results that the functions return.",
        (
            "Convolution",
            "Geometry",
            "ToeplitzIndices",
            "ExtremeSingularValues",
            "KernelSpectrum",
            "ModelSpectrum",
            "DescentResult",
            "Escape",
            "StopReason",
            "ModelDescent",
            "AttachReport",
            "LipschitzBound",
        ),
    ),
}

# Members that only the package itself uses.
INTERNAL = {"take_geometry", "geometry_config", "weight"}
PROPERTIES = (property, cached_property)
# Google-style sections whose entries have the form "name: text".
LISTS = ("Args", "Attributes", "Raises")
SECTIONS = (*LISTS, "Returns", "Yields", "Example", "Examples", "Note", "References")


# Formula of the paper: file in the package, and the name in it.
FORMULAS = {
    "(1.1), the stopping criterion": ("descent/stopping.py", "ConvergenceCheck"),
    "(2.1), (3.1), the matrix M": ("convolution/matrix.py", "transformation_matrix"),
    "Ω, the index set": ("convolution/matrix.py", "index_set"),
    "R_α = ‖MᵀM − αI‖²_F": ("penalties/frobenius.py", "FrobeniusPenalty"),
    "(3.2), Theorems 2.1 and 3.1, as written": ("penalties/explicit_form.py", "penalty_and_gradient"),
    "R_α and (3.2) without M": ("penalties/closed_form.py", "ClosedForm"),
    "Algorithm 3.1": ("descent/algorithm_3_1.py", "regularize_kernel"),
    "section 4, the step sizes λ": ("descent/step_rules.py", "paper_schedule"),
    "the best λ along a direction": ("descent/step_rules.py", "quartic_minimizer"),
    "Figure 4.1": ("cli/descent.py", "reproduce"),
}


def main() -> int:
    """Writes or checks the notebook and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="do not write, only compare")
    check = parser.parse_args().check
    text = nbformat.writes(notebook()) + "\n"
    current = NOTEBOOK.read_text(encoding="utf-8") if NOTEBOOK.exists() else None
    if text == current:
        return 0
    if check:
        print(f"{NOTEBOOK.name} is not up to date. Run: {COMMAND}", file=sys.stderr)
        return 1
    NOTEBOOK.write_text(text, encoding="utf-8")
    return 0


def notebook() -> nbformat.NotebookNode:
    """Returns the notebook: one Markdown cell for the contents, for each group and for each name."""
    check_groups()
    cells = [("contents", contents())]
    for number, (title, (introduction, names)) in enumerate(GROUPS.items(), 1):
        cells.append((f"group-{number}", f"## {title}\n\n{prose(introduction)}"))
        cells += [(name, entry(name)) for name in names]
    cells.append(("formulas", formulas()))
    result = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(source, id=identifier) for identifier, source in cells],
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.validate(result)
    return result


def formulas() -> str:
    """Returns the table that leads from the paper to the code, and checks that it leads somewhere."""
    rows = ["| paper | file | name |", "| --- | --- | --- |"]
    for where, (file, name) in FORMULAS.items():
        if name not in (PACKAGE / file).read_text(encoding="utf-8"):
            raise SystemExit(f"FORMULAS in notebooks/reference.py names {name}, which is not in {file}")
        rows.append(f"| {where} | `{file}` | `{name}` |")
    return "\n".join(["## Where the paper's formulas are", "", *rows])


def check_groups() -> None:
    """Raises an error unless each public name is in exactly one group."""
    names = [name for _, group in GROUPS.values() for name in group]
    wrong = {
        "not in a group": set(api.__all__) - set(names),
        "not public": set(names) - set(api.__all__),
        "in several groups": {name for name in names if names.count(name) > 1},
    }
    problems = [f"{problem}: {', '.join(sorted(found))}" for problem, found in wrong.items() if found]
    if problems:
        raise SystemExit(f"GROUPS in notebooks/reference.py must match tf_frobreg.api. {'; '.join(problems)}")


def contents() -> str:
    """Returns the title and a table of contents with the first sentence of each docstring."""
    lines = [
        "# Reference",
        "",
        "All public names of `tf_frobreg`, by task. K is a kernel, M the transformation matrix of its layer,",
        "σ a singular value of M and α the target of σ². Numbers of equations, such as (3.2), are those of",
        "[P.-C. Guo's paper](https://arxiv.org/abs/1907.11235).",
        "",
        "In the signatures, `Size` is an int or one int per spatial axis. `Any` for a kernel is an array, a",
        "tensor or a variable. `Selection` is what the argument `include` of",
        f"{link('attach_regularizers')} accepts.",
        "",
        f"The text comes from the docstrings of the package (`{COMMAND}`).",
    ]
    for title, (_, names) in GROUPS.items():
        lines += ["", f"**[{title}](#{title.replace(' ', '-')})**", ""]
        lines += [f"- {link(name)}: {prose(summary(getattr(api, name)))}" for name in names]
    return "\n".join(lines)


def entry(name: str) -> str:
    """Returns the section of one public name."""
    thing = getattr(api, name)
    if inspect.isclass(thing):
        parts = class_parts(name, thing)
    else:
        parts = [fenced(signature(name, syntax_tree(thing))), markdown(thing)]
    return "\n\n".join([f"### {name}", *parts])


def class_parts(name: str, thing: type) -> list[str]:
    """Returns signature, docstring, properties and methods of a class."""
    described = dict(sections(inspect.getdoc(thing) or ""))
    fields, members = field_types(thing), dict(public_members(thing))
    types = fields | property_types(members)
    parts = []
    if "Args" in described:  # otherwise only the package makes objects of this class
        parts.append(fenced(signature(name, constructor(thing))))
    parts.append(markdown(thing, types))
    if fields and not {"Args", "Attributes"} & described.keys():
        parts.append("**Keys**" if is_typeddict(thing) else "**Attributes**")
        parts.append("\n".join(f"- `{field}` (`{kind}`)" for field, kind in fields.items()))
    documented = re.findall(r"^\w+", described.get("Attributes", ""), re.MULTILINE)
    properties = [
        list_item(name, markdown(one), types)
        for name, one in members.items()
        if isinstance(one, PROPERTIES) and name not in documented
    ]
    methods = [method(name, one) for name, one in members.items() if not isinstance(one, PROPERTIES)]
    if properties:
        parts += ["**Properties**", "\n".join(properties)]
    if methods:
        parts += ["**Methods**", *methods]
    return parts


def property_types(members: dict[str, Any]) -> dict[str, str]:
    """Returns the types of the properties among the members of a class."""
    types = {}
    for name, one in members.items():
        if isinstance(one, PROPERTIES):
            function = syntax_tree(one.fget if isinstance(one, property) else one.func)
            types |= {name: source(function.returns)} if function.returns else {}
    return types


def method(name: str, thing: Any) -> str:
    """Returns signature and docstring of one method."""
    function = getattr(thing, "__func__", thing)
    prefix = f"@{type(thing).__name__}\n" if function is not thing else ""
    return f"{fenced(prefix + signature(name, syntax_tree(function)))}\n\n{markdown(thing)}"


def public_members(thing: type) -> Iterator[tuple[str, Any]]:
    """Yields (name, method or property) of those that the package itself adds to a class.

    Methods that override those of Keras or Python, such as `get_config`, are left out, except `__call__`.
    """
    package = package_classes(thing)
    foreign = {name for cls in thing.__mro__ if cls not in package for name in vars(cls)}
    members = {name: one for cls in reversed(package) for name, one in vars(cls).items()}
    kinds = (FunctionType, classmethod, staticmethod, *PROPERTIES)
    for name, one in members.items():
        public = not name.startswith("_") and name not in foreign | INTERNAL
        if (public or name == "__call__") and isinstance(one, kinds) and inspect.getdoc(one):
            yield name, one


def field_types(thing: type) -> dict[str, str]:
    """Returns the types of a class's fields as they stand in its source, and the values of an enum."""
    if issubclass(thing, enum.Enum):
        return {one.name: f'"{one.value}"' for one in thing}
    types = {}
    for cls in reversed(package_classes(thing)):
        for node in syntax_tree(cls).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                types[node.target.id] = source(node.annotation)
    return {name: text for name, text in types.items() if not name.startswith("_")}


def package_classes(thing: type) -> list[type]:
    """Returns a class and its bases, as far as the package defines them."""
    return [cls for cls in thing.__mro__ if cls.__module__.startswith("tf_frobreg")]


def constructor(thing: type) -> ast.FunctionDef:
    """Returns the source of a class's constructor."""
    for cls in thing.__mro__:
        if "__init__" in vars(cls):
            return syntax_tree(cls.__init__)
    raise TypeError(f"{thing} has no constructor")


def syntax_tree(thing: Any) -> Any:
    """Returns the syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]


def signature(name: str, function: ast.FunctionDef) -> str:
    """Returns the signature as it stands in the source, one argument per line if it is long."""
    arguments = function.args
    ordinary = [*arguments.posonlyargs, *arguments.args]
    texts = [argument(one) for one in ordinary]
    for number, default in enumerate(reversed(arguments.defaults), 1):
        texts[-number] += with_default(ordinary[-number], default)
    if texts and texts[0] in ("self", "cls"):
        texts.pop(0)
    if arguments.vararg:
        texts.append("*" + argument(arguments.vararg))
    elif arguments.kwonlyargs:
        texts.append("*")
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        texts.append(argument(one) + (with_default(one, default) if default else ""))
    if arguments.kwarg:
        texts.append("**" + argument(arguments.kwarg))
    result = f" -> {source(function.returns)}" if function.returns and function.name != "__init__" else ""
    line = f"{name}({', '.join(texts)}){result}"
    if len(line) <= 88:
        return line
    return "\n".join([f"{name}(", *(f"    {text}," for text in texts), f"){result}"])


def argument(one: ast.arg) -> str:
    """Returns an argument with its type."""
    return f"{one.arg}: {source(one.annotation)}" if one.annotation else one.arg


def with_default(one: ast.arg, default: ast.expr) -> str:
    """Returns the default value with its equals sign."""
    equals = " = " if one.annotation else "="
    return equals + source(default)


def source(node: ast.expr) -> str:
    """Returns the source of an annotation or a default value."""
    return ast.unparse(node).replace("'", '"')


def summary(thing: Any) -> str:
    """Returns the first sentence of a docstring."""
    first = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=[.!?])\s", first, maxsplit=1)[0]


def markdown(thing: Any, types: dict[str, str] | None = None) -> str:
    """Returns a Google-style docstring as Markdown. `types` are those of the attributes."""
    parts = []
    for title, body in sections(inspect.getdoc(thing) or ""):
        if title in LISTS:
            parts.append(f"**{title}**")
            parts.append(list_of(body, types or {} if title == "Attributes" else {}))
        else:
            parts += [f"**{title}**"] if title else []
            parts.append(blocks(body))
    return "\n\n".join(parts)


def sections(text: str) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of each section of a docstring. The title of the text before them is empty."""
    headers = re.compile(rf"^({'|'.join(SECTIONS)}):$", re.MULTILINE)
    before, *rest = headers.split(text)
    if before.strip():
        yield "", before.strip("\n")
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        yield title, textwrap.dedent(body.strip("\n"))


def list_of(body: str, types: dict[str, str]) -> str:
    """Returns entries of the form "name: text", with continuation lines indented, as a Markdown list."""
    items = []
    for item in re.split(r"\n(?=\S)", body):
        name, _, text = item.partition(":")
        first, _, others = text.partition("\n")
        items.append(list_item(name, blocks(f"{first.strip()}\n{textwrap.dedent(others)}"), types))
    return "\n".join(items)


def list_item(name: str, meaning: str, types: dict[str, str]) -> str:
    """Returns an item of a Markdown list."""
    kind = f" (`{types[name]}`)" if name in types else ""
    return f"- `{name}`{kind}: {textwrap.indent(meaning, '  ').lstrip()}"


def blocks(text: str) -> str:
    """Returns paragraphs, doctests, lists and indented blocks as Markdown."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if lines[0].startswith("    "):  # a formula
            parts.append(fenced(textwrap.dedent(block), ""))
        elif lines[0].startswith("- "):
            parts.append("\n".join(line if line.startswith("  ") else prose(line) for line in lines))
        else:
            start = next((number for number, line in enumerate(lines) if line.startswith(">>>")), len(lines))
            if start:
                parts.append(prose(" ".join(lines[:start])))
            if start < len(lines):
                parts.append(fenced("\n".join(lines[start:])))
    return "\n\n".join(parts)


def prose(text: str) -> str:
    """Returns a paragraph with links to public names, and with Markdown's own characters escaped."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(link(piece.strip("`")) if piece.startswith("`") else escape(piece) for piece in pieces)


def escape(text: str) -> str:
    """Escapes Markdown's own characters, except those of *emphasis*."""
    text = re.sub(r"([\\$]|<(?=[\w/!])|(?<!\w)_|_(?!\w))", r"\\\1", text)
    emphasis = re.split(r"((?<!\w)\*\w[^*]*\*(?!\w))", text)
    return "".join(
        piece if number % 2 else piece.replace("*", r"\*") for number, piece in enumerate(emphasis)
    )


def link(code: str) -> str:
    """Returns code as Markdown, with a link if it is a public name."""
    name = code.removeprefix("tf_frobreg.")
    return f"[`{code}`](#{name})" if name in api.__all__ else f"`{code}`"


def fenced(code: str, language: str = "python") -> str:
    """Returns a code block."""
    return f"```{language}\n{code}\n```"


if __name__ == "__main__":
    sys.exit(main())
