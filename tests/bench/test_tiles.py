"""Tiles in place of the kernels' own: every target in the interpreter, at small sizes; and compiling them all."""

import json
import subprocess
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE

pytest.importorskip("triton")
from bench.targets import polar_express
from bench.tiles import compile_all, launches_of, prepared, tiled
from bench.tune import difference, nan_filled

import kernels
from bench import tiles
from bench.offline import Usage
from model.config import GATE_CHANNELS
from tests.helpers.small_targets import DTYPE, SMALL, TOLERANCE, config_of, small_targets
from train.precompile import walk_step
from train.tune.ops import micro_step_ops

# What the kernels call a number of a tile, where it is not that number's own name.
PARAMETERS = {
    "block_m": ("BLOCK_M",), "block_n": ("BLOCK_N",), "rows": ("BLOCK_T",), "NUM_WARPS": ("num_warps",),
    "BLOCK": ("BLOCK", "BLOCK_R", "BLOCK_N"), "tma": ("TMA",),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels():
    kernels.set_ops("triton")
    yield
    kernels.set_ops(None)


def launched(launches, tile: dict) -> bool:
    """Whether every launch has the numbers of `tile`."""
    return all(
        any(launch.kwargs.get(name) == value for name in PARAMETERS.get(key, (key,)))
        for launch in launches.again for key, value in tile.items()
    )  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_a_tile_reaches_the_kernel_and_changes_no_result(name, monkeypatch):
    monkeypatch.setattr(polar_express, "COEFFICIENTS", polar_express.COEFFICIENTS[:2])  # iterations, for time's sake
    target = SMALL[name]
    call = prepared(target, DEVICE, DTYPE)
    with nan_filled():
        present, asked = launches_of(target, call, None)
        assert {launch.kernel.__name__ for launch in present.again} <= set(target.kernels)
        assert not any(x.isnan().any() for x in present.outputs)
        tile = next(iter(asked.values()))
        assert tile.keys() >= target.tiles[0].keys()
        # What is a constant of its module is read in several places: a smaller one and a larger one.
        for other in [*target.tiles[-1:], *(target.tiles[:1] if target.constants else [])]:
            launches, again = launches_of(target, call, other)
            assert again == asked, "the present tile is what the source says, whatever stands there meanwhile"
            assert len(launches.again) == len(present.again) > 0
            assert launched(launches, other)
            assert not launched(present, other)
            assert difference(launches.outputs, present.outputs) < TOLERANCE


def flags(kwargs: dict) -> tuple:
    return tuple((name, value) for name, value in kwargs.items() if name.startswith("HAS_"))


@pytest.fixture
def counted(monkeypatch):
    """Launches by kernel, and by its flags too; none of them runs."""
    met = Counter()

    def run(self, *args, grid, warmup, **kwargs):
        met[self.__name__] += 1
        met[self.__name__, flags(kwargs)] += 1

    for kind in _kinds():
        monkeypatch.setattr(kind, "run", run)
    return met


@pytest.mark.parametrize("fused_norms", [False, True])
def test_every_kernel_of_a_step_has_a_target_that_counts_its_launches(counted, fused_norms):
    """But for those that are too short to matter."""
    config = replace(config_of(rows=8), fused_norms=fused_norms)
    walk_step(config, 100)
    step = Counter({name: count for name, count in counted.items() if isinstance(name, str)})
    variants = counted.keys() - step.keys()
    kernels.set_ops("triton")  # which the walk took back
    expected, tried = Counter(), set()
    for target in small_targets(config).values():
        if target.fused_norms <= fused_norms:
            for launch in launches_of(target, prepared(target, "meta", torch.bfloat16), None)[0].again:
                expected[launch.kernel.__name__, target.fused_norms] += config.grad_accum_steps * target.calls
                tried.add((launch.kernel.__name__, flags(launch.kwargs)))
    short = {"_dlambda_kernel", "_norm_ratio_kernel", "_rstd_kernel", "_scale_kernel", "_sum_of_squares_kernel"}
    assert {name for name, _ in expected} == step.keys() - short
    if not fused_norms:  # a norm's backward without one of its gradients is as good as with all
        assert tried <= variants
        assert {name for name, _ in variants - tried} - short <= {"_rms_norm_bwd_kernel"}
    updates = [target for target in SMALL.values() if target.name.startswith(("polar", "muon", "adamw"))]
    of_an_update = {kernel for target in updates for kernel in target.kernels}
    for (name, fused), launches in expected.items():
        if name in of_an_update:  # whose small groups are left out
            assert 0 < launches <= step[name], name
        elif fused == fused_norms:  # what the default step launches is counted there
            assert launches == step[name], name


def test_rates_are_of_what_the_ops_cost():
    config = config_of()
    flops = Counter()
    for op in micro_step_ops(config, config.model_config(100)):
        flops[op.module] += op.count * op.cost()[1]
    ours = {name: target.calls * target.flops for name, target in small_targets(config).items()}
    assert ours["attention-forward"] == flops["rotary_attention"]
    assert ours["attention-dq"] + ours["attention-dkv"] == 14 / 4 * flops["rotary_attention"]  # as launched
    assert 2 * ours["mlp-fc-forward"] == flops["mlp"]  # the second product, as large, is the vendor's
    assert ours["mlp-proj-backward"] == ours["norm-mlp-fc-backward"] == ours["mlp-fc-forward"]
    gates = 2 * config.micro_batch_tokens * 2 * GATE_CHANNELS
    assert ours["norm-qkv-forward"] == flops["qkv_projection"] - gates


@pytest.mark.parametrize("name", SMALL)
def test_everything_is_put_back(name):
    target = SMALL[name]
    names = [*target.constants, *([target.config] if target.config else [])]
    before = {name: getattr(target.module, name) for name in names}
    runs = {kind: kind.run for kind in _kinds()}

    def failing():
        assert any(getattr(target.module, name) is not value for name, value in before.items())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launches_of(target, failing, target.tiles[0])
    assert all(getattr(target.module, name) is value for name, value in before.items())
    assert all(kind.run is run for kind, run in runs.items())
    with tiled(target, target.tiles[0]):
        pass
    assert all(getattr(target.module, name) is value for name, value in before.items())


def _kinds():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return InterpretedFunction, JITFunction


def test_of_a_tiles_variants_the_worst_counts(monkeypatch):
    light = Usage("_adamw_kernel", 1, warps=8, registers=40, stack=0, shared=0, is_matrix=False, wgmma=0)
    heavy = replace(light, registers=200, stack=16, shared=1024)
    other = replace(heavy, name="_another_kernel", stack=999)
    monkeypatch.setattr(tiles, "compiling_only", lambda arch: nullcontext(Counter([light, heavy, other])))
    monkeypatch.setattr(Usage, "metadata", property(lambda usage: usage), raising=False)  # each is its own kernel
    monkeypatch.setattr(tiles, "launches_of", lambda *_: (None, {}))
    monkeypatch.setattr(tiles, "usage", lambda kernel, launches: kernel)
    assert tiles.compile_one(SMALL["adamw"], None, None, 90) == {
        "registers": 200, "stack": 16, "shared": 1024, "ctas_per_sm": heavy.ctas_per_sm(90), "asked": {},
        "fault": "_adamw_kernel: 16 bytes of spills, 0 allowed",
    }  # fmt: skip
    assert heavy.ctas_per_sm(90) < light.ctas_per_sm(90)


def test_what_crashes_the_compiler_is_left_out(monkeypatch, tmp_path):
    """A process that dies loses the candidate it was at, and no other."""

    class Process:
        def __init__(self, command, **_):
            given = json.loads(command[-1])
            done = [tile for _, tile in given["jobs"]]
            crash = done.index("bad") if "bad" in done else len(done)
            lines = [json.dumps({"fault": None, "tile": tile}) + "\n" for tile in done[:crash]]
            (tmp_path / given["results"]).write_text("".join(lines))
            self.returncode = 0 if crash == len(done) else -11

        def poll(self):
            return self.returncode

    monkeypatch.setattr(tiles.subprocess, "Popen", Process)
    jobs = [("adamw", tile) for tile in ("a", "b", "bad", "c", "bad", "d", "bad")]
    found = compile_all(jobs, 90, 8192, tmp_path)
    assert [line.get("tile") for line in found] == ["a", "b", None, "c", None, "d", None]
    assert {line["fault"] for line in found if "tile" not in line} == {"the compiler crashes (-11)"}


@pytest.fixture
def compiler(monkeypatch):
    """A command in place of the process that compiles."""
    popen = subprocess.Popen

    def put(*command: str) -> None:
        monkeypatch.setattr(tiles.subprocess, "Popen", lambda _, **options: popen(command, **options))

    return put


def test_what_hangs_is_ended(compiler, monkeypatch, tmp_path):
    compiler("sleep", "60")
    monkeypatch.setattr(tiles, "STUCK", 1.0)
    assert compile_all([("adamw", None)], 90, 8192, tmp_path) == [{"fault": "the compiler hangs"}]


def test_what_fails_otherwise_is_no_fault_of_a_tile(compiler, tmp_path):
    compiler("sh", "-c", "echo no; exit 1")
    with pytest.raises(RuntimeError, match="compiling failed: no"):
        compile_all([("adamw", None)], 90, 8192, tmp_path)
