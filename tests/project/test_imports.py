"""The arrows of the layout: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

from tests.helpers.imports import imported
from train.config import ROOT

OURS = {"kernels", "model", "prepare", "train", "bench", "tests"}
ALLOWED = {
    "kernels": set(),
    "model": {"kernels"},
    "prepare": set(),
    "train": {"model", "kernels", "prepare"},
}
# Packages from outside; kernels rest on torch and Triton alone. FlashAttention-3 serves a baseline, where it is there.
OUTSIDE = {"kernels": {"torch", "triton", "flash_attn_interface"}}


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


@pytest.mark.parametrize("package", ["model", "train"])
def test_kernels_have_one_door(package):
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "from kernels." not in text, path
        assert "import kernels." not in text, path


def test_an_op_imports_no_other_op():
    """Inside kernels/: the door imports the ops, an op the shared helpers, its form for a CPU and the files of its own
    folder; `muon`, which contains Polar Express, that one too, in `cpu` as well."""
    package = ROOT / "kernels"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        if parts == ("__init__.py",):
            continue
        op = Path(parts[0]).stem
        shared = {"common", "choice", "gemm", "weight_grad", "product"}
        allowed = {"cpu", "common"} if op == "cpu" else {op, "cpu", *shared}
        allowed |= {"polar_express"} if op == "muon" or parts == ("cpu", "updates.py") else set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):  # relative to kernels/ itself
                names = {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
                assert names <= allowed, f"{path} imports {names - allowed}"


# From the bottom to the top: a floor imports those below it. What is on no floor is a command, and on top.
FLOORS = (
    ("recipes", "every", "config", "place", "ranks", "schedule", "budget", "clock", "optimizer", "compiled", "step",
     "live_bytes", "memory", "launching", "device", "precompile"),
    ("resilience", "leases"),
    ("results",),
    ("tune",),
    ("curves", "modeling", "plain", "generate", "evaluating", "loop", "init_from"),
    ("trainer", "at_once"),
    ("experiment",),
)  # fmt: skip


def test_no_room_of_train_imports_upwards():
    package = ROOT / "train"
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    there = {path.stem if path.is_file() else path.name for path in package.glob("[!_]*")}
    assert floor_of.keys() <= there, "a floor has a name that is no file or room"
    imports = 0
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        here = floor_of.get(parts[0], len(FLOORS))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.level != len(parts):  # relative to train/ itself
                continue
            for name in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                imports += 1
                assert floor_of.get(name, len(FLOORS)) <= here, f"{path} imports {name}, which is above it"
    assert imports > 100
