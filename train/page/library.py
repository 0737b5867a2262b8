"""The plotting library that the page carries: BokehJS, two files of the package `bokeh`, whose Python is not imported.

BokehJS draws on a canvas, needs neither a server nor `eval`, and has a third of the size of its nearest rival.
"""

from importlib.util import find_spec
from pathlib import Path

from prepare import InputError
from prepare.words import install_line

FILES = ("bokeh.min.js", "bokeh-api.min.js")


def library() -> list[str]:
    """The text of its scripts, in the order in which they are loaded. Raises InputError where it is missing."""
    spec = find_spec("bokeh")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"report.html needs the package bokeh, which is not installed: {install_line('-e', '.[report]')},"
            " or leave the page out with --no-page"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "server" / "static" / "js"
    try:
        return [(folder / name).read_text(encoding="utf-8") for name in FILES]
    except (OSError, ValueError) as error:
        raise InputError(
            f"report.html: the package bokeh is damaged ({folder}: {type(error).__name__}):"
            f" {install_line('--force-reinstall', '-e', '.[report]')}, or leave the page out with --no-page"
        ) from None
