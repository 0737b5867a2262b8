"""A command line whose errors are one line."""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from .errors import lost_output
from .words import printable


class Parser(argparse.ArgumentParser):
    """argparse with exit code 2 and one line for an error, which names the nearest known option. Options are spelled
    out, and the description keeps its lines.

    Args:
        module: what follows `python -m`.
        description: the first lines of the help.
        meant: options of ours, by what people who know other programs call them.
        usage: the first line of the help, where the list of all options would fill a screen.
    """

    def __init__(
        self, module: str, description: str, meant: Mapping[str, Sequence[str]] | None = None, usage: str | None = None
    ):
        super().__init__(prog=f"python -m {module}", description=description, allow_abbrev=False, usage=usage,
                         formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        self.meant = meant or {}

    def error(self, message: str):
        self.exit(2, f"error: {printable(message)}\n")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = " or ".join(self.near(name))
            self.error(f"unknown argument {name}" + (f": did you mean {near}?" if near else ": --help lists all"))
        return parsed

    def near(self, name: str) -> list[str]:
        """At most three options that somebody may have meant by `name`: what it is called elsewhere, what it begins,
        what has all its words (`--budget`), what it misspells. A guess that is often wrong is worse than none."""
        known = [option for action in self._actions for option in action.option_strings]
        if name in self.meant:
            return list(self.meant[name])
        words = set(name.split("-")) - {""}
        if not words:
            return []
        found = [k for k in known if k.startswith(name)] or [k for k in known if words <= set(k.split("-"))]
        return found[:3] or difflib.get_close_matches(name, known, n=1, cutoff=0.8)


def begin() -> None:
    """Called where our packages are imported, which for `python -m` comes before all that takes seconds.

    Until `hear_interrupts`, Ctrl-C ends the command as it ends any program: the import of PyTorch leaves no traceback.
    What was closed before the start (`>&-`) is /dev/null: nothing fails for want of it, and no file that is opened
    later gets its number, to be written to by whatever prints. What a terminal's encoding lacks is spelled out (`\\xb1`
    for ± in ASCII): no word ends a run.
    """
    if sys.argv[:1] != ["-m"]:  # as long as Python looks for the module; imported otherwise, this is no command
        return
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 -- the lowest number that is free
            os.set_inheritable(stream.fileno(), True)  # to the processes that a command starts
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if stream.errors in ("strict", "surrogateescape"):  # and not what PYTHONIOENCODING asks for
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def hear_interrupts() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def command(main: Callable[[], int]) -> NoReturn:
    """Ends the process with `main`'s exit code: without a traceback also after Ctrl-C (130), where nobody reads the
    output any more, as in `| head -n 1` (141), and where it cannot be written, as on a full disk (2)."""
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        hear_interrupts()
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        line = lost_output(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
