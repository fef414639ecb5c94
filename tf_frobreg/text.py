"""Text for a terminal: on one line, and without characters that move its cursor."""

import re

LONGEST = 1000  # characters
END = 100  # of the characters, how many show the end of a longer text


def printable(text: str) -> str:
    """Returns a text whose control characters are spelled out."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def one_line(text: object, longest: int = LONGEST) -> str:
    """Returns a text on one line. A long one lacks its middle, and control characters are spelled out."""
    # Keras prints names in bold.
    line = printable(" ".join(re.sub(r"\x1b\[\d*m", "", str(text)).split()))
    return line if len(line) <= longest else f"{line[: longest - END]} … {line[-END:]}"
