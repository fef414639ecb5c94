"""How results on whole models are printed."""

from tf_frobreg.keras.reports import aligned_lines


def test_names_are_aligned_and_reasons_come_last():
    text = aligned_lines({"a": "done", "longer": "done too"}, {"out": "excluded"})
    assert text.splitlines() == ["a       done", "longer  done too", "out     - excluded"]


def test_nothing_is_an_empty_text():
    assert aligned_lines({}, {}) == ""
