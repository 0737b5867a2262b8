"""The offline report: compiled in a process of its own, since the tests' own Triton interprets."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from bench import offline
from train.config import ROOT, TrainConfig, resolve
from train.tune.usage import ALLOWED_SPILLS, Usage

PROGRAM = """
import torch, triton
import triton.language as tl
from train.tune.usage import usage
from train.precompile import compiling_only

@triton.jit
def _center_kernel(x_ptr, N: tl.constexpr):
    # Every element is needed again once the sum is known, and one warp has not the registers for them.
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x - tl.sum(x))

@triton.jit
def _dot_kernel(x_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs[:, None] * N + offs[None, :])
    tl.store(x_ptr + offs[:, None] * N + offs[None, :], tl.dot(x, x).to(x.dtype))

x = torch.empty(2**16, device="meta", dtype=torch.{dtype})
with compiling_only(90) as launches:
    {launch}
    {launch}
for kernel, count in launches.items():
    u = usage(kernel, count)
    print(u.launches, u.is_matrix, u.wgmma > 0, u.stack > 0, u.ctas_per_sm(90) > 0, *u.faults(90), sep="|")
"""


# With three stages and loads by pointers, ptxas lets no product of attention begin before the last has ended. Its own
# tiles have descriptors; heads are a power of two or not, and a tile has one edge of the window or both.
STAGES = """
import torch
import kernels
from kernels.rotary_attention import tiles
from kernels.rotary_attention.forward import attention_fwd
from train.precompile import compiling_only
from train.tune.usage import usage

kernels.set_ops("triton")
with compiling_only(90) as launches:
    for heads, window in ((1, 512), (3, 100)):
        qkv = torch.empty(1, 1024, 3 * heads * 128, device="meta", dtype=torch.bfloat16, requires_grad=True)
        out = kernels.rotary_attention(qkv, *kernels.rotary_tables(1024, 128, device="meta"), heads, window)
        out.backward(torch.empty_like(out))
    own = tiles.config(128, qkv.dtype, 1)
    tiles.config = lambda *_: own._replace(forward=tiles.Tiles(128, 64, 8, 3))
    attention_fwd(*qkv.split(3 * 128, dim=-1), 128, 256)
print(*[fault for kernel, count in launches.items() for fault in usage(kernel, count, warnings=True).faults(90)])
"""


# One kernel of each op on an architecture, with the tiles that it has there, at widths of 512 to 1,280.
TILES = """
import importlib, sys
import torch
import kernels
from train.tune.usage import usage
from train.precompile import compiling_only

mlp = importlib.import_module("kernels.mlp")
kernels.set_ops("triton")

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)

arch = int(sys.argv[1])
with compiling_only(arch) as launches:
    for heads in (4, 6):
        qkv = meta(2, 2048, 3 * heads * 128).requires_grad_()
        value = [meta(2, 2048, heads * 128).requires_grad_(), meta(2, 2048, heads).requires_grad_()]
        out = kernels.rotary_attention(qkv, *kernels.rotary_tables(2048, 128, device="meta"), heads, 1024, *value)
        out.backward(meta(*out.shape))
    for width in (640, 768):  # a row in parts, and a row in one
        shapes = ((2048, width), (2048, width), (), ())
        stream = [meta(*shape, dtype=torch.bfloat16 if shape else torch.float32).requires_grad_() for shape in shapes]
        torch.autograd.backward(kernels.rms_norm(*stream)[:2], [meta(2048, width), meta(2048, width)])
    mlp._proj_bwd_(meta(2048, 1280), meta(1280, 5120), meta(2048, 5120), meta(2048, dtype=torch.float32))
print(len(launches), *[fault for kernel, count in launches.items() for fault in usage(kernel, count).faults(arch)])
"""

# Every way of its own that the gradient of a head may take, in one slice and in several, and a gate's.
WEIGHT_GRADS = """
import sys
import torch
from train.tune.usage import usage
from kernels import weight_grad
from train.precompile import compiling_only

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, device="meta", dtype=dtype)

arch = int(sys.argv[1])
with compiling_only(arch) as launches:
    for N, K in ((8192, 512), (4, 32)):
        for tile in weight_grad._candidates(N, K, torch.bfloat16):
            out, x = meta(N, K, dtype=torch.float32), meta(32768, 512)[:, :K]
            weight_grad._by_kernels(meta(32768, N), x, out, True, tile)
found = [usage(kernel, count, warnings=True) for kernel, count in launches.items()]
print(sum(u.is_matrix for u in found) > 4, *[fault for u in found for fault in u.faults(arch)])
"""


def compiled(folder: Path, dtype: str, launch: str) -> list[str]:
    return run(folder, PROGRAM.replace("{dtype}", dtype).replace("{launch}", launch)).split("|")


def run(folder: Path, program: str, *args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = folder / "program.py"  # Triton reads a kernel's source from its file: no `python -c`
    script.write_text(program, encoding="utf-8")
    out = subprocess.run([sys.executable, script, *args], env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


def test_a_spill_is_a_fault(tmp_path):
    launches, is_matrix, _, spills, _, *faults = compiled(
        tmp_path, "float32", "_center_kernel[(1,)](x, N=16384, num_warps=1)"
    )
    assert (launches, is_matrix, spills) == ("2", "False", "True")
    assert len(faults) == 1
    assert "bytes of spills, 0 allowed" in faults[0]


def test_a_matrix_kernel_needs_wgmma(tmp_path):
    assert compiled(tmp_path, "bfloat16", "_dot_kernel[(1,)](x, N=64)") == ["2", "True", "True", "False", "True"]
    *seen, fault = compiled(tmp_path, "bfloat16", "_dot_kernel[(1,)](x, N=16)")  # too small for a warp group
    assert seen == ["2", "True", "False", "False", "True"]
    assert "without wgmma" in fault


def test_products_that_wait_for_each_other_are_a_fault(tmp_path):
    assert run(tmp_path, STAGES) == "_attention_fwd_kernel: its products run one after the other, as ptxas warns"


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_tiles_of_other_widths_and_gpus_fit(arch, tmp_path):
    """Heads whose number is no power of two; products longer than 1,024 with a norm in their epilogue; sm_120."""
    assert run(tmp_path, TILES, str(arch)) == "14"  # of attention 4 for 4 heads and for 6, of norms 5, the product


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_gradients_of_weights_fit_in_every_way(arch, tmp_path):
    assert run(tmp_path, WEIGHT_GRADS, str(arch)) == "True"


def test_what_does_not_fit():
    kernel = Usage("k", launches=1, warps=4, registers=64, stack=0, shared=166_000, is_matrix=False, wgmma=0)
    assert (kernel.ctas_per_sm(80), kernel.ctas_per_sm(90)) == (1, 1)
    assert kernel.faults(90) == []
    assert kernel.faults(89) == ["k: 166000 bytes of shared memory, 101376 there"]
    light = Usage("k", launches=1, warps=4, registers=33, stack=0, shared=0, is_matrix=False, wgmma=0)
    assert light.ctas_per_sm(90) == 65536 // (40 * 32 * 4)


@pytest.mark.parametrize(("arch", "ctas"), [(86, 16), (89, 24), (120, 24)])
def test_the_limits_of_gpus_for_desktops(arch, ctas):
    """99 KB of shared memory for a CTA of the 100 KB there are, of which 1 KB is the driver's; 48 warps."""
    light = Usage("k", launches=1, warps=1, registers=16, stack=0, shared=0, is_matrix=False, wgmma=0)
    assert light.ctas_per_sm(arch) == ctas
    kernel = Usage("k", launches=1, warps=8, registers=64, stack=0, shared=99 * 1024, is_matrix=True, wgmma=0)
    assert kernel.faults(arch) == []
    assert kernel.ctas_per_sm(arch) == 1
    assert len(dataclasses.replace(kernel, shared=99 * 1024 + 1).faults(arch)) == 1
    assert dataclasses.replace(kernel, shared=0, registers=16).ctas_per_sm(arch) == 48 // 8
    assert len(kernel.faults(90)) == 1  # no wgmma


def test_architectures_are_reported_in_their_order_and_the_worst_code_counts(monkeypatch, capsys):
    def run(arch, vocab_sizes, given):
        time.sleep(0.2 if arch == 90 else 0)  # the first is the last to finish
        line = " ".join([f"{arch} {{}}", *given]) + "\n"
        return [SimpleNamespace(stdout=line.format(v), returncode=int((arch, v) == (80, 2))) for v in vocab_sizes]

    monkeypatch.setattr(offline, "compile_apart", run)
    assert offline.main(["--arch", "90", "80", "--vocab-size", "1", "2"]) == 1
    assert capsys.readouterr().out.split("\n")[:-1] == ["90 1", "90 2", "80 1", "80 2"]
    assert offline.main(["--arch", "90", "89", "--loops", "--fused-norms"]) == 0
    assert capsys.readouterr().out == "90 8192 --fused-norms --loops\n89 8192 --fused-norms --loops\n"
    assert offline.main(["--depth", "20", "--arch", "80", "86", "89", "90", "100", "103", "120"]) == 0
    assert capsys.readouterr().out == "".join(f"{arch} 8192 --depth 20\n" for arch in (80, 86, 89, 90, 100, 103, 120))


def test_options_of_train_make_the_step(monkeypatch):
    steps = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(offline, "compile_step", lambda config, *args: steps.append((config, *args)) or 0)
    assert offline.main(["--arch", "120", "--depth", "20", "--fused-norms", "--no-recompute", "--loops"]) == 0
    assert steps == [(resolve(TrainConfig(depth=20, fused_norms=True), "cuda"), 120, 8192, True)]


@pytest.mark.parametrize(("args", "words"), [
    (["--depth", "0"], "--depth 0 must be at least 1"),
    (["--head-dim", "48"], "--head-dim 48: the kernels take "),
    (["--total-batch-size", "3"], "--total-batch-size 3"),
    (["--arc", "90"], "unknown argument --arc"),
    (["--arch", "75"], "invalid choice: 75"),
])  # fmt: skip
def test_bad_arguments_are_one_line(args, words, capsys):
    with pytest.raises(SystemExit) as ended:
        offline.main(args)
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert words in line
    assert line.count("\n") == 1


def test_an_allowed_spill_is_no_fault(monkeypatch):
    kernel = Usage("k", launches=1, warps=4, registers=255, stack=16, shared=0, is_matrix=False, wgmma=0)
    assert len(kernel.faults(90)) == 1
    monkeypatch.setitem(ALLOWED_SPILLS, ("k", 90), (16, "known"))
    assert kernel.faults(90) == []
    assert len(kernel.faults(80)) == 1
