"""How the results on whole models are printed: one line per kernel."""

from collections.abc import Mapping


def aligned_lines(done: Mapping[str, str], left_out: Mapping[str, str]) -> str:
    """Returns one line per name: what was done, then why the others were left out."""
    lines = {**done, **{name: f"- {reason}" for name, reason in left_out.items()}}
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines.items())
