"""Words in a page: nothing that people wrote is markup there."""

import html

from prepare.words import printable

SHORT = 200  # characters of a description in the table and in the picture; the whole is one click away


def text(words: object) -> str:
    """For an element's content and for a quoted attribute: nothing in it is markup. What is no text is spelled out."""
    return html.escape(printable(words))


def shorten(words: str, most: int = SHORT) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"
