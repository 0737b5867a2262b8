"""Words that people gave, where they are shown: names, descriptions, paths; and the commands to type next."""

import re
import shlex
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from shutil import which

_BREAKS = re.compile("[\t-\r\x1c-\x1f\x85\u2028\u2029]")
# What a terminal may obey, what turns the direction of a line round, and what no encoding can hold: half of a surrogate
# pair, as which Python has each byte of an argument or a file's name that is not UTF-8.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    r"""`str(text)` as one line that goes through every output: a space for a tab or the end of a line, `\x1b` and the
    like for what else is unfit, the byte itself (`\xff`) for one that is not UTF-8. Of its own result it changes
    nothing."""
    text = str(text)
    return text if text.isprintable() else _UNFIT.sub(_escape, _BREAKS.sub(" ", text))


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_utf8(path: object) -> bool:
    """Whether it is for libraries that know no other names."""
    return not re.search("[\ud800-\udfff]", str(path))


def quoted(word: object) -> str:
    """One word for a shell. What is not printable is spelled in octal, as $'...', which bash, zsh and ksh know."""
    word = str(word)
    if printable(word) == word:
        return shlex.quote(word)
    spelled = (c if c not in "\\'" and printable(c) == c else _octal(c) for c in word)
    return f"$'{''.join(spelled)}'"


def _octal(char: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in char.encode("utf-8", "surrogateescape"))


def interpreter() -> str:
    """This Python, as a shell in the current folder finds it: `.venv/bin/python`, or its whole path."""
    path = sys.executable or "python3"
    try:
        below = Path(path).relative_to(Path.cwd())
    except (ValueError, OSError):  # elsewhere, or a current folder that has been removed
        return quoted(path)
    return quoted(below if len(below.parts) > 1 else f"./{below}")


def command_line(module: str, *arguments: object) -> str:
    """What to type to run one of our modules with this Python: what has packages, and which, depends on it."""
    return " ".join([interpreter(), "-m", module, *map(quoted, arguments)])


def install_line(*arguments: str) -> str:
    """What to type to install packages into this Python; a virtual environment of uv's has no pip of its own."""
    # Asked in the usual way, setuptools takes it that pip is about to run, and cannot be imported itself any more.
    pip = PathFinder.find_spec("pip")
    if pip is None and which("uv"):
        return " ".join(["uv pip install --python", interpreter(), *map(quoted, arguments)])
    first = "" if pip else f"{command_line('ensurepip')} && "
    return first + command_line("pip", "install", *arguments)


SAID: set[str] = set()


def say_once(what: str, line: str) -> None:
    """A note on standard error, the first of its kind alone."""
    if what not in SAID:
        SAID.add(what)
        print(f"note: {printable(line)}", file=sys.stderr, flush=True)
