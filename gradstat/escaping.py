"""Names and paths as a terminal or a figure may show them."""

from __future__ import annotations


def escaped(text: object) -> str:
    r"""Text in one line, with escapes in place of all that is acted on or not shown.

    Args:
        text: a name, a path or a sentence that contains one.

    Returns:
        The same if it is printable. Control characters, line breaks, marks of direction, other
        spaces and undecodable bytes are written as Python writes them, such as ``\x1b``.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )
