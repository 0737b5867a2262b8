"""The arrows of the layout: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"kernels", "model", "prepare", "train", "bench", "tests"}
ALLOWED = {
    "kernels": set(),
    "model": {"kernels"},
    "prepare": set(),
    "train": {"model", "kernels", "prepare"},
}
# Packages from outside; kernels rest on torch and Triton alone.
OUTSIDE = {"kernels": {"torch", "triton"}}


def imported(path: Path) -> set[str]:
    """First names of the modules a file imports; relative imports are its own package's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(path.relative_to(ROOT).parts[0] if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_no_import_runs_against_the_arrows(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        ours = imported(path) & OURS - {package}
        assert ours <= ALLOWED[package], f"{path} imports {ours - ALLOWED[package]}"


def test_kernels_rest_on_torch_and_triton_alone():
    for path in (ROOT / "kernels").rglob("*.py"):
        outside = imported(path) - OURS - set(sys.stdlib_module_names)
        assert outside <= OUTSIDE["kernels"], f"{path} imports {outside}"


def test_an_op_imports_no_other_op():
    """Inside kernels/, only the door (`__init__`), `muon` (which contains Polar Express) and the shared helpers."""
    files = [p for p in (ROOT / "kernels").glob("*.py") if p.stem not in ("__init__", "common", "gemm")]
    ops = {p.stem for p in files}
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        siblings = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level == 1}
        allowed = {"polar_express"} if path.stem == "muon" else set()
        assert siblings & ops <= allowed, f"{path} imports {siblings & ops}"
