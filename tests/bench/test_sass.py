"""Loops read from machine code: from lines in the assembler's form, and from a kernel compiled here."""

import os
import subprocess
import sys

import pytest

from bench.offline import sass
from train.config import ROOT

# An outer loop (0010 to 0140) around one with two products, a loop without any, and the end's branch to itself.
LISTING = """
        Function : _kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;                                   /* 0x00000a0000017a02 */
                                                                                            /* 0x000fe40000000f00 */
        /*0010*/                   LDC R0, c[0x0][0x238] ;                                  /* 0x00008e00ff007b82 */
        /*0020*/                   DEPBAR.LE SB0, 0x0 ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   UIADD3 UR4, UR4, 0x1, URZ ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ, !UPT ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR12].tnspB, R24, gsb0 ;
        /*0070*/                   MUFU.EX2 R88, R88 ;
        /*0080*/                   F2F.BF16.F32 R205, R88 ;
        /*0090*/                   F2FP.BF16.F32.PACK_AB R12, R89, R88 ;
        /*00a0*/                   LDSM.16.M88.4 R4, [R3] ;
        /*00b0*/               @P2 LDGSTS.E.BYPASS.128 [R109+0x8000], desc[UR16][R88.64], !P0 ;
        /*00c0*/                   LDG.E.64 R8, desc[UR16][R2.64] ;
        /*00d0*/                   STL [R1+0x4], R7 ;
        /*00e0*/                   SHFL.BFLY PT, R99, R96, 0x2, 0x1f ;
        /*00f0*/                   ISETP.GE.AND P0, PT, R185, R188, PT ;
        /*0100*/              @!P0 BRA 0x20 ;                                               /* 0xfffffff80028e947 */
        /*0110*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0120*/               @P1 BRA 0x110 ;
        /*0130*/               @P3 BRA 0x150 ;
        /*0140*/              @!P6 BRA 0x10 ;
        /*0150*/                   EXIT ;
        /*0160*/                   BRA 0x160;
"""


def test_the_innermost_loop_around_products_is_counted():
    (loop,) = sass.loops(sass.instructions(LISTING))
    assert [loop.body[0].address, loop.body[-1].address] == [0x20, 0x100]
    assert dict(loop.counts()) == {
        "wait": 2, "uniform": 1, "product": 2, "xu": 2, "fp": 1, "shared": 1, "global": 2, "spill": 1, "shuffle": 1,
        "int": 2,
    }  # fmt: skip
    assert loop.flops() == 2 * 64 * 16 * (64 + 128)


def test_the_way_back_from_code_moved_out_of_a_loop_is_none():
    moved = LISTING.replace("BRA 0x160;", "BRA 0x60;")  # as after a wait that spins, between the products
    assert sass.loops(sass.instructions(moved)) == sass.loops(sass.instructions(LISTING))


def test_cycles_are_those_of_the_model():
    (loop,) = sass.loops(sass.instructions(LISTING))
    # By shared memory: A [64, 16] and B [64, 16] of the first product, B alone of the second, in 2 bytes; ldmatrix and
    # the copy 16 bytes for each of 128 threads; a load that never happens moves nothing.
    shared = (2 * 16 * (64 + 64) + 2 * 16 * 128 + 2 * 128 * 16) / 128
    assert loop.cycles(1) == {"tensor": 32 + 64, "shared": shared, "xu": 16, "issue": 15}
    assert loop.cycles(2.5) == {key: 2.5 * value for key, value in loop.cycles(1).items()}


def test_code_without_products_has_no_loops_here(capsys):
    code = [i for i in sass.instructions(LISTING) if i.kind != "product"]
    assert sass.loops(code) == []
    sass.print_loops([("_kernel", 2.0, [])])
    assert capsys.readouterr().out == "no loop with a product of warp groups\n"


def test_a_row_says_what_bounds_the_loop(capsys):
    sass.print_loops([("_kernel", 2.0, sass.loops(sass.instructions(LISTING)))])
    row = capsys.readouterr().out.split("\n")[1].split()
    assert row[:5] == ["_kernel", "2", "15", "2", "0.79"]
    assert row[-7:] == ["192", "192", "32", "30", "tensor", "100%", "86%"]
    plain = LISTING.replace("MUFU.EX2", "FADD").replace("F2F.BF16.F32", "FADD")
    sass.print_loops([("_kernel", 2.0, sass.loops(sass.instructions(plain)))])
    assert capsys.readouterr().out.split("\n")[1].split()[-5:] == ["0", "30", "tensor", "100%", "86%"]


PROGRAM = """
import torch, triton
import triton.language as tl
from bench import offline
from bench.offline import sass
from train.precompile import compiling_only

@triton.jit
def _product_kernel(x_ptr, out_ptr, K, N: tl.constexpr):
    offs = tl.arange(0, N)
    ptrs = offs[:, None] * N + offs[None, :]
    acc = tl.zeros([N, N], tl.float32)
    for k in range(K):
        x = tl.load(x_ptr + k * N * N + ptrs)
        acc = tl.dot(x, x, acc)
    tl.store(out_ptr + ptrs, acc)

x, out = (torch.empty(2**20, device="meta", dtype=d) for d in (torch.bfloat16, torch.float32))
with compiling_only(90) as launches:
    _product_kernel[(1,)](x, out, 32, N=64)
(kernel,) = launches
usage = offline.usage(kernel, 1)
print(usage.ctas_per_sm(90) * usage.warps)
offline.report_loops([(usage, kernel)], 90)
"""


def test_a_compiled_loop_is_found(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    resident, _, row = run.stdout.strip().split("\n")
    name, warps, instructions, products, mflop, *_ = row.split()
    assert 4 * float(warps) == int(resident) > 4  # on four sub-partitions; more than one CTA fits
    assert name == "_product_kernel"
    assert int(products) == 4  # 64 x 64 x 64 by one warp group, 16 of K at a time
    assert float(mflop) == pytest.approx(float(warps) * 2 * 64**3 / 1e6, abs=0.01)
    assert int(instructions) > 4
