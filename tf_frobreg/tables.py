"""Tables of results: text for `print` and the command line, HTML for notebooks."""

import html
import io
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tf_frobreg.checks import enumeration
from tf_frobreg.text import printable

UNKNOWN = "-"  # a cell without a value
WIDER_THAN_ANY_TABLE = 100_000

Row = Mapping[str, str]  # cells by column; all rows of a table have the same columns


def text_table(
    rows: Sequence[Row], *, left: Collection[str] = (), title: str | None = None, width: int | None = None
) -> str:
    """Returns a table as plain text.

    Args:
        rows: Cells by column.
        left: Columns that are aligned to the left. The others are aligned to the right.
        title: A line above the table, with an empty line between them. It is never folded.
        width: Columns of the terminal. The columns in `left` are folded if the table is wider, but no number
            is. None never folds.

    Returns:
        Lines without trailing spaces, and without a newline at the end.
    """
    lines = []
    if rows:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for name in rows[0]:
            is_text = name in left
            table.add_column(
                Text(name), justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
            )
        for row in rows:
            table.add_row(*(Text(printable(row[name])) for name in rows[0]))
        output = io.StringIO()
        console = Console(
            file=output,
            width=WIDER_THAN_ANY_TABLE if width is None else max(width, _narrowest(rows, left)),
            color_system=None,
            force_terminal=False,
            force_jupyter=False,
        )
        console.print(table)
        lines = [line.rstrip() for line in output.getvalue().splitlines()]
    return "\n\n".join(part for part in (title, "\n".join(lines)) if part)


def html_table(rows: Sequence[Row], caption: str | None = None, *, left: Collection[str] = ()) -> str:
    """Returns a table as HTML. Everything in it is escaped.

    Args:
        rows: Cells by column.
        caption: A line above the table.
        left: Columns that are aligned to the left. The others are aligned to the right.

    Returns:
        A `<table>` element.
    """
    columns = list(rows[0]) if rows else []
    style = {name: f"text-align:{'left' if name in left else 'right'}" for name in columns}

    def line(tag: str, cells: Row) -> str:
        inner = (f'<{tag} style="{style[name]}">{html.escape(cells[name])}</{tag}>' for name in columns)
        return f"<tr>{''.join(inner)}</tr>"

    above = "" if caption is None else f"<caption>{html.escape(caption)}</caption>"
    head = line("th", {name: name for name in columns})
    body = "\n".join(line("td", row) for row in rows)
    return f"<table>{above}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def text_report(
    summary: str,
    rows: Sequence[Row],
    remarks: Sequence[str] = (),
    *,
    left: Collection[str] = (),
    optional: Sequence[str] = (),
    hint: str = "",
) -> str:
    """Returns a first line, a table, and remarks below it.

    Args:
        summary: The first line.
        rows: Cells of the table by column.
        remarks: Lines below the table.
        left: Columns that are aligned to the left, and folded if the terminal is still too narrow.
        optional: Columns that are left out if standard output is a terminal that is too narrow, the first
            one first. A remark names them.
        hint: Appended to that remark.

    Returns:
        Lines without a newline at the end.
    """
    width, too_wide = terminal_width(), []
    for name in optional:
        if width is None or not rows or _width(rows) <= width:
            break
        if name in rows[0]:
            too_wide.append(name)
            rows = [{column: row[column] for column in row if column != name} for row in rows]
    if too_wide:
        remarks = [f"The terminal is too narrow for: {', '.join(too_wide)}.{hint}", *remarks]
    table = text_table(rows, left=left, title=summary, width=width)
    return "\n\n".join([table, "\n".join(remarks)]) if remarks else table


def terminal_width() -> int | None:
    """Returns the columns of standard output, or None if it is a file, a pipe or a notebook."""
    return Console().width if sys.stdout.isatty() else None


def _narrowest(rows: Sequence[Row], left: Collection[str]) -> int:
    """Returns the columns of a terminal in which no number is broken, and no head of a column."""
    return _width([{name: name if name in left else row[name] for name in row} for row in rows])


def _width(rows: Sequence[Row]) -> int:
    return max(cell_len(line) for line in text_table(rows).splitlines())


def html_report(
    summary: str, rows: Sequence[Row], remarks: Sequence[str] = (), *, left: Collection[str] = ()
) -> str:
    """Returns the same as HTML. Everything in it is escaped."""
    table = html_table(rows, summary, left=left) if rows else f"<p>{html.escape(summary)}</p>"
    return "\n".join([table, *(f"<p>{html.escape(remark)}</p>" for remark in remarks)])


class Report:
    """A result that prints as a first line, a table and remarks, and shows the same in a notebook."""

    _left_columns: ClassVar[Collection[str]] = ()
    _optional_columns: ClassVar[Sequence[str]] = ()  # a narrow terminal lacks them, the first one first

    def _parts(self) -> tuple[str, Sequence[Row], Sequence[str]]:
        """Returns the first line, the rows of the table, and the remarks."""
        raise NotImplementedError

    def __str__(self) -> str:
        hint = " records() holds all columns."
        return text_report(
            *self._parts(), left=self._left_columns, optional=self._optional_columns, hint=hint
        )

    def _repr_html_(self) -> str:
        return html_report(*self._parts(), left=self._left_columns)


def known_columns(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows without the columns that are unknown in every row."""
    return [
        {name: row[name] for name in row if any(other[name] != UNKNOWN for other in rows)} for row in rows
    ]


def names_by_reason(reasons: Mapping[str, str]) -> dict[str, str]:
    """Returns the names that share a reason as text, by the reason.

    Args:
        reasons: Reasons by name.

    Returns:
        For example {"excluded": "conv, top"}, in the order in which the reasons appear first. Long lists are
        shortened: "a, b, c, d, e, f, g, h and 92 others".
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return {reason: enumeration(found) for reason, found in names.items()}


def count(number: int, noun: str) -> str:
    """Returns a number and a noun: "1 kernel", "2 kernels"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def digits(value: float | None, form: str = ".4g") -> str:
    """Returns a number as text: four significant digits, "∞", or `UNKNOWN` for None and NaN."""
    if value is None or math.isnan(value):
        return UNKNOWN
    return format(value, form) if math.isfinite(value) else "∞" if value > 0 else "-∞"


def percent(share: float | None) -> str:
    """Returns a share in percent, "∞", or `UNKNOWN` for None and NaN."""
    return digits(share, ".0%")
