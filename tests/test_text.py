"""Messages stay on one line, whatever a file or an argument is called."""

import pytest

from tf_frobreg.text import LONGEST, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("σ = 1", "σ = 1"),
        ("two\n lines\t", "two lines"),
        ("\x1b[1mbold\x1b[0m", "bold"),
        ("\x1b]0;title\x07\0", r"\x1b]0;title\x07\x00"),
        ("\udcff.npy", r"\udcff.npy"),
        (ValueError("a\nb"), "a b"),
    ],
)
def test_one_line(text, line):
    assert one_line(text) == line


def test_a_long_text_lacks_its_middle():
    assert one_line("x" * LONGEST) == "x" * LONGEST
    line = one_line(f"start {'x' * 100_000} end")
    assert len(line) == LONGEST + 3
    assert line.startswith("start ")
    assert line.endswith("x end")
