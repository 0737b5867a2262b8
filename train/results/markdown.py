"""Words that people gave, in Markdown."""

import re

# What Markdown would take for markup, in a table too; an underscore inside a word is none.
_MARKUP = re.compile(r"[\\`*\[\]<|~&$]|(?<![^\W_])_|_(?![^\W_])")


def markdown(words: str) -> str:
    """One line that shows `words` as they are."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(words.split())) or "-"
