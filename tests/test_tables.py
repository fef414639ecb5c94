"""Tables of results as text and as HTML."""

import html.parser
import math
import subprocess
import sys

import pytest

import tf_frobreg.tables
from tf_frobreg.tables import (
    count,
    digits,
    html_report,
    html_table,
    known_columns,
    names_by_reason,
    percent,
    text_report,
    text_table,
)

ROWS = [
    {"layer": "conv", "kernel": "3×3×2×4", "σmax": "1.5", "R": "12"},
    {"layer": "block/dense", "kernel": "5×3", "σmax": "≥ 0.25", "R": "∞"},
]


class Cells(html.parser.HTMLParser):
    """The text of each cell of a table, and of what is around it, as a browser shows it."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.around, self.aligned = [], [], []
        self.tag = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")
            self.aligned.append(dict(attributes)["style"])

    def handle_endtag(self, tag):
        self.tag = None

    def handle_data(self, text):
        if self.tag in ("td", "th"):
            self.cells[-1][-1] += text
        elif self.tag in ("caption", "p"):
            self.around.append((self.tag, text))


def test_text_has_aligned_columns():
    assert text_table(ROWS, left=["layer"], title="Two layers").splitlines() == [
        "Two layers",
        "",
        "layer         kernel    σmax   R",
        "────────────────────────────────",
        "conv         3×3×2×4     1.5  12",
        "block/dense      5×3  ≥ 0.25   ∞",
    ]


def test_a_table_without_rows_is_its_title():
    assert text_table([], title="Nothing") == text_report("Nothing", []) == "Nothing"
    assert text_table([]) == ""


def test_text_is_plain_and_not_cut(monkeypatch):
    """Whatever the terminal and the names are. rich would take [red] for a colour and :smile: for a face."""
    for name, value in {"COLUMNS": "10", "FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    name = "[red]" + "block_" * 100 + ":smile:"
    header, rule, row = text_table([{"layer": name, "σ": "1"}], left=["layer"]).splitlines()
    assert header == f"layer{' ' * (len(name) - 5)}  σ"
    assert rule == "─" * len(row)
    assert row == f"{name}  1"


def test_columns_on_the_left_are_folded_in_a_narrow_terminal():
    assert text_table(ROWS, left=["layer"], width=28).splitlines() == [
        "layer     kernel    σmax   R",
        "────────────────────────────",
        "conv     3×3×2×4     1.5  12",
        "block/d      5×3  ≥ 0.25   ∞",
        "ense",
    ]


def test_no_number_is_broken_however_narrow_the_terminal_is():
    assert text_table(ROWS, left=["layer"], width=5).splitlines() == [
        "layer   kernel    σmax   R",
        "──────────────────────────",
        "conv   3×3×2×4     1.5  12",
        "block      5×3  ≥ 0.25   ∞",
        "/dens",
        "e",
    ]


def test_wide_characters_stay_aligned():
    rows = [{"layer": "層", "σ": "1"}, {"layer": "conv", "σ": "2"}]
    assert text_table(rows, left=["layer"]).splitlines()[2:] == ["層     1", "conv   2"]


def test_html_holds_every_cell_and_the_caption():
    page = Cells(html_table(ROWS, "Two layers", left=["layer"]))
    assert page.cells == [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    assert page.around == [("caption", "Two layers")]
    assert page.aligned == 3 * ["text-align:left", *3 * ["text-align:right"]]


def test_html_is_escaped():
    nasty = "<script>alert('a' & \"b\")</script>"
    text = html_report(nasty, [{nasty: nasty}], [nasty])
    assert "<script" not in text
    assert Cells(text).cells == [[nasty], [nasty]]
    assert Cells(text).around == [("caption", nasty), ("p", nasty)]


def test_html_without_rows_is_its_lines():
    assert html_report("none", [], ["why"]) == "<p>none</p>\n<p>why</p>"
    assert "<caption>" not in html_table(ROWS)


def test_a_report_has_a_first_line_a_table_and_remarks():
    lines = text_report("Two layers", ROWS, ["First.", "Second."], left=["layer"]).splitlines()
    assert lines[:6] == text_table(ROWS, left=["layer"], title="Two layers").splitlines()
    assert lines[6:] == ["", "First.", "Second."]
    assert text_report("None", [], ["First."]).splitlines() == ["None", "", "First."]


@pytest.mark.parametrize(
    ("width", "columns", "missing"),
    [
        (None, "layer kernel σmax R", None),
        (32, "layer kernel σmax R", None),
        (31, "layer kernel σmax", "R"),
        (28, "layer kernel σmax", "R"),
        (27, "layer σmax", "R, kernel"),
        (18, "layer σmax", "R, kernel"),
    ],
)
def test_a_narrow_terminal_lacks_columns_and_says_which(width, columns, missing, monkeypatch):
    monkeypatch.setattr(tf_frobreg.tables, "terminal_width", lambda: width)
    optional = ("no such column", "R", "kernel")
    text = text_report("Two", ROWS, ["Last."], left=["layer"], optional=optional, hint=" See records().")
    table, remarks = text.split("\n\n")[1:]
    assert table.splitlines()[0].split() == columns.split()
    remark = [f"The terminal is too narrow for: {missing}. See records()."] if missing else []
    assert remarks.splitlines() == [*remark, "Last."]


def test_a_pipe_is_no_terminal(capfd):
    assert tf_frobreg.tables.terminal_width() is None


def test_columns_that_are_unknown_everywhere_are_dropped():
    rows = [{"a": "1", "b": "-", "c": "-"}, {"a": "-", "b": "-", "c": "0"}]
    assert known_columns(rows) == [{"a": "1", "c": "-"}, {"a": "-", "c": "0"}]
    assert known_columns([]) == []


def test_names_are_grouped_by_their_reason():
    reasons = {"b": "excluded", "a": "no kernel", "c": "excluded"}
    assert names_by_reason(reasons) == {"excluded": "b, c", "no kernel": "a"}
    assert names_by_reason({}) == {}


@pytest.mark.parametrize(
    ("number", "text"),
    [(10, "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"), (11, "0, 1, 2, 3, 4, 5, 6, 7 and 3 others")],
)
def test_long_lists_of_names_are_shortened(number, text):
    assert names_by_reason({str(n): "excluded" for n in range(number)}) == {"excluded": text}


def test_numbers_as_text():
    values = [0.0, 1 / 3, 123456.0, math.inf, -math.inf, math.nan, None]
    assert [digits(value) for value in values] == ["0", "0.3333", "1.235e+05", "∞", "-∞", "-", "-"]
    assert digits(1.0, ".4f") == "1.0000"
    assert [percent(value) for value in (0.0, 0.123, 2.0, math.inf, None)] == ["0%", "12%", "200%", "∞", "-"]
    assert [count(number, "kernel") for number in (0, 1, 2)] == ["0 kernels", "1 kernel", "2 kernels"]


@pytest.mark.slow
def test_tables_do_not_load_tensorflow():
    code = "import sys, tf_frobreg.tables; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
