"""Messages of one line."""

import re

LONGEST = 1000  # characters
END = 100  # of the characters, how many show the end of a longer text


def one_line(text: object, longest: int = LONGEST) -> str:
    """Returns a text on one line. A long one lacks its middle, and control characters are spelled out."""
    line = " ".join(re.sub(r"\x1b\[\d*m", "", str(text)).split())  # Keras prints names in bold
    line = "".join(character if character.isprintable() else repr(character)[1:-1] for character in line)
    return line if len(line) <= longest else f"{line[: longest - END]} … {line[-END:]}"
