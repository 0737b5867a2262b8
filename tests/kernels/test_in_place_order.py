"""Products that write over what they have read. A load that comes too late is a race, which no number shows here.

A load and a store by TMA run beside their program. In the interpreter they are over at once, so that what is checked is
the order in which a kernel asks for them, and that no load of what is stored is anywhere else.
"""

import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.helpers import kernel_memory
from tests.helpers.kernel_checks import mutant
from tests.helpers.persistent_tiles import PERSISTENT, PORTABLE_KERNELS, choose, forbid
from train.config import ROOT

pytestmark = pytest.mark.usefixtures("kernels_everywhere")
gemm, mlp, product = (importlib.import_module(f"kernels.{name}") for name in ("gemm", "mlp", "product"))


@pytest.fixture(autouse=True)
def persistent(kernels_everywhere, monkeypatch):
    choose(monkeypatch, PERSISTENT)
    monkeypatch.setattr(gemm, "_programs", lambda *_: 3)
    forbid(monkeypatch, PORTABLE_KERNELS)


def random(*shapes_and_scales):
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator)).half() for shape, scale in shapes_and_scales]


def accesses_of(monkeypatch, call, tensor):
    """The elements of `tensor` that each access of the one launch in `call` touched: (reads, writes), each in the order
    of time as (moment, program, elements)."""
    seen = []
    monkeypatch.setattr(kernel_memory.Accesses, "check", lambda self: seen.append(self))
    call()
    (accesses,) = seen
    start, itemsize = tensor.data_ptr(), tensor.itemsize

    def inside(found):
        elements = [(moment, program, (addresses - start) // itemsize) for addresses, program, moment in found]
        cut = [(moment, program, e[(e >= 0) & (e < tensor.numel())]) for moment, program, e in elements]
        return [access for access in cut if access[2].size]

    return inside(accesses.reads), inside(accesses.writes)


def assert_each_is_read_once_and_then_written(reads, writes, count):
    """By the program that writes it, and by no other; and nothing is written in between that was not read."""
    moments = []
    for found in (reads, writes):
        elements = np.concatenate([e for _, _, e in found])
        assert np.array_equal(np.sort(elements), np.arange(count)), "an element is touched never, or twice"
        when, who = np.zeros(count, dtype=int), np.zeros(count, dtype=int)
        for moment, program, e in found:
            when[e], who[e] = moment, program
        moments.append((when, who))
    (read, reader), (written, writer) = moments
    assert (reader == writer).all(), "a program writes what another one reads"
    assert (read < written).all(), "an element is read after it was written"


def in_place(op, post):
    dout, w_proj = random(((75, 40), 1.0), ((40, 88), 0.2))
    op._proj_bwd_(dout, w_proj, post)


def over_the_residual(op, stream):
    x, w = random(((75, 40), 1.0), ((88, 40), 0.2))
    op.product(x, w.mT, stream, overwrite=True)


IN_PLACE = {"mlp": (mlp, in_place), "product": (product, over_the_residual)}


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_each_element_is_read_once_by_the_program_that_then_writes_it(name, programs, monkeypatch):
    monkeypatch.setattr(gemm, "_programs", lambda *_: programs)
    op, call = IN_PLACE[name]
    tensor = torch.ones(75, 88, dtype=torch.float16)
    found = accesses_of(monkeypatch, lambda: call(op, tensor), tensor)
    assert_each_is_read_once_and_then_written(*found, tensor.numel())


# Right numbers, as long as loads and stores come one after the other, as in the interpreter: on a GPU they are races.
LOAD, STORE = "post_desc.load([first_m, first_n])", "post_desc.store([first_m, first_n], dz.to(post_desc.dtype))"
Y_LOAD, Y_STORE = "residual_desc.load([first_m, first_n])", "y_desc.store([first_m, first_n], acc.to(y_desc.dtype))"
RACES = {
    "the tile below too": ("mlp", (LOAD, f"({LOAD} + 0 * post_desc.load([first_m + 16, first_n]))")),
    "the right neighbour too": ("mlp", (LOAD, f"({LOAD} + 0 * post_desc.load([first_m, first_n + 16]))")),
    "again after the store": ("mlp", (STORE, f"{STORE}\n    c += 0 * tl.sum({LOAD}.to(tl.float32))")),
    "twice": ("mlp", (LOAD, f"(0 * {LOAD} + {LOAD})")),
    "the residual below too": ("product", (Y_LOAD, f"({Y_LOAD} + 0 * residual_desc.load([first_m + 16, first_n]))")),
    "the residual after the store": ("product", (Y_STORE, f"{Y_STORE}\n    acc += 0 * {Y_LOAD}.to(tl.float32)")),
}


@pytest.mark.parametrize("name", RACES)
def test_races_are_seen(name, tmp_path, monkeypatch):
    of, edit = RACES[name]
    op, call = IN_PLACE[of]
    wrong, tensor, right = mutant(op, edit, folder=tmp_path), *torch.ones(2, 75, 88, dtype=torch.float16)
    call(op, right)
    found = accesses_of(monkeypatch, lambda: call(wrong, tensor), tensor)
    assert torch.equal(tensor, right), "which no comparison of numbers would find"
    with pytest.raises(AssertionError):
        assert_each_is_read_once_and_then_written(*found, tensor.numel())


# What the compiler makes of it, a letter for each step: L for a load of what will be overwritten, W for waiting for a
# load, F for the fence before a store of what threads have written to shared memory, S for that store.
COMPILED = """
import importlib, re, sys
import torch
import kernels
from kernels.choice import Choice
from kernels.gemm import persistent_candidates
from train.precompile import compiling_only

mlp, product = (importlib.import_module(f"kernels.{name}") for name in ("mlp", "product"))
kernels.set_ops("triton")

def meta(*shape):
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)

with compiling_only(int(sys.argv[1])) as launches:
    tile, *_ = persistent_candidates(2048, 512, torch.bfloat16)
    Choice.__call__ = lambda self, *shape: {"way": "triton", **tile} if self.name == "product" else tile
    mlp._proj_bwd_(meta(4096, 512), meta(512, 2048), meta(4096, 2048))
    stream = meta(4096, 512)
    product.product(meta(4096, 512), meta(512, 512), stream, overwrite=True)
STEPS = {"tma_copy_global_to_local %(post|residual)_desc": "L", "wait_barrier": "W", "fence_async_shared": "F",
         "tma_copy_local_to_global": "S"}
for kernel in launches:
    lines = kernel.asm["ttgir"].splitlines()
    print("".join(letter for line in lines for step, letter in STEPS.items() if re.search(step, line)))
"""


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_compiled_the_load_is_waited_for_before_there_is_a_store(arch, tmp_path):
    """That the store is of what was computed from the load is in its operands, which keep the steps in this order."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = tmp_path / "program.py"
    script.write_text(COMPILED, encoding="utf-8")
    run = subprocess.run([sys.executable, script, str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    steps = run.stdout.split()
    assert len(steps) == 2
    for kernel in steps:
        assert re.fullmatch("(W*LWFS)+W*", kernel), kernel
