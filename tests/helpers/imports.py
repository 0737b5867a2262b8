"""What a file imports."""

import ast
from pathlib import Path

from train.config import ROOT


def imported(path: Path) -> set[str]:
    """First names of the modules a file imports; relative imports are its own package's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names
