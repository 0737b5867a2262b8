"""What a step has to choose: found by running its ops, and every tile reaches the kernel that it is for."""

from collections import Counter

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE, SMALL_GEMM, exact_bfloat16

pytest.importorskip("triton")
import importlib

import kernels
from kernels.choice import asked, key_of
from tests.helpers.small_targets import config_of, small_targets
from train.config import TrainConfig, resolve
from train.memory import count
from train.precompile import walk_step
from train.tune.measuring import TOLERANCE, difference, nan_filled
from train.tune.problems import is_update
from train.tune.targets import Launch, call_of, launches_of, recorded_launches, targets

# What the kernels call a number of a tile, where it is not that number's own name.
PARAMETERS = {
    "block_m": ("BLOCK_M",), "block_n": ("BLOCK_N",), "rows": ("BLOCK_T",), "BLOCK": ("BLOCK", "BLOCK_R", "BLOCK_N"),
    "tma": ("TMA",), "runs": ("RUNS",), "ahead": ("AHEAD",),
}  # fmt: skip
WIDE = [target for target in small_targets(config_of(depth=1, d_model=128)) if target.name.startswith("embedding")]
WIDE += [target for target in small_targets(config_of(depth=1, d_model=160)) if "norm-" in target.name and "mlp" not in
         target.name and "qkv" not in target.name]  # rows in parts
OFFSET = [t for t in small_targets(config_of(depth=1, key_offset=True), False) if t.name == "attention-key-offset"]
SMALL = {(target.name, target.key): target for target in small_targets(config_of(depth=1)) + WIDE + OFFSET}
# Those with a tile of their own and another beside it, at this size.
WITH_ANOTHER = [
    of for of, target in SMALL.items()
    if target.choice.kernels and len(target.tiles) > 1 and target.tiles[0].get("way") != "vendor"
]  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    exact_bfloat16(monkeypatch)  # which the tiles of a step are for
    kernels.set_ops("triton")
    yield
    kernels.set_ops(None)


def launched(launches, tile: dict) -> bool:
    """Whether every launch has the numbers of `tile`."""

    def has(given: dict, key: str, value) -> bool:
        given = {**given, "AHEAD": given.get("AHEAD") is not None}  # the stages, or None
        return any(given.get(name) == value for name in PARAMETERS.get(key, (key,)))

    return all(
        has(launch.kwargs, key, value)
        for launch in launches.again for key, value in tile.items() if key != "tma" or "TMA" in launch.kwargs
    )  # fmt: skip


def test_every_kernel_is_among_those_whose_tiles_are_followed():
    """The vendor's are the default of two, which tests of their own follow: test_persistent_products and
    test_weight_grad_kernel."""
    with_kernels = {name for (name, _), target in SMALL.items() if target.choice.kernels}
    assert with_kernels - {name for name, _ in WITH_ANOTHER} == {"product", "weight-gradient"}


@pytest.mark.parametrize("of", WITH_ANOTHER, ids=" ".join)
def test_a_tile_reaches_the_kernel_and_changes_no_result(of, monkeypatch):
    polar_express = importlib.import_module("kernels.polar_express")
    monkeypatch.setattr(polar_express, "COEFFICIENTS", polar_express.COEFFICIENTS[:2])  # iterations, for time's sake
    target = SMALL[of]
    default, *others = target.tiles
    call = call_of(target.op, DEVICE)
    with nan_filled():
        present = launches_of(target, call, default)
        assert launched(present, default)
        portable = [tile for tile in reversed(others) if "persistent" not in tile]
        other = min(portable, key=lambda tile: tile.get("tma", False))
        launches = launches_of(target, call, other)
    assert len(launches.again) == len(present.again) > 0
    assert launched(launches, other)
    assert not launched(present, other)
    assert not any(x.isnan().any() for x in present.outputs)
    assert difference(launches.outputs, present.outputs) < TOLERANCE


# (N, K, by_k, with_residual) of the default step's: qkv, attention's output, the second of the MLP, the head; their dx.
PRODUCTS = [(1536, 512, False, False), (512, 512, False, True), (512, 2048, False, True), (8192, 512, False, False),
            (512, 1536, True, False), (512, 512, True, False), (512, 2048, True, False), (512, 8192, True, False)]


def test_every_product_of_the_default_step_is_a_target_of_its_own():
    config = resolve(TrainConfig(), "cuda")
    with kernels.ops_in_force("triton"):
        found = [t for t in targets(config, config.model_config(8192), False) if t.name == "product"]
    assert {t.key for t in found} == {key_of((N, K, torch.bfloat16, *flags)) for N, K, *flags in PRODUCTS}
    assert sorted(t.calls for t in found) == [1, 1, *[config.depth] * 6]
    assert all(t.tiles[0] == {"way": "vendor"} and len(t.tiles) > 3 for t in found)


def test_a_width_between_two_powers_of_two_has_no_more_to_try():
    """What is tried is compiled first, about one a second and core."""
    counts = []
    for shape in ({"depth": 8, "d_model": 512}, {"depth": 9, "d_model": 640}):
        config = resolve(TrainConfig(**shape, total_batch_size=262_144), "cuda")
        counts.append(sum(len(target.tiles) for target in targets(config, config.model_config(8192))))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("of", [of for of in SMALL if of[0] == "product"], ids=" ".join)
def test_a_product_is_of_our_own_kernels_and_no_other_of_its_op_is(of):
    """By default the vendor multiplies, and the whole op is to be repeated."""
    target, of_the_head = SMALL[of], SMALL[of].op.module == "linear_cross_entropy"
    vendor, *own = target.tiles
    tile = next((tile for tile in reversed(own) if "persistent" not in tile), {"way": "triton", **SMALL_GEMM})
    call = call_of(target.op, DEVICE)
    with nan_filled():
        present = launches_of(target, call, vendor)
        assert not isinstance(present.again[0], Launch)
        found = launches_of(target, call, tile)
    assert [launch.kernel.__name__ for launch in found.again] == ["_product_kernel"] * len(found.again)
    assert len(found.again) == 1 or of_the_head  # by chunks
    assert launched(found, {key: value for key, value in tile.items() if key != "way"})
    assert difference(found.outputs, present.outputs) < TOLERANCE


def test_a_product_that_several_ops_share_counts_in_each():
    """The head's dx and the MLP's, of a vocabulary of as many tokens as there are hidden channels."""
    config = config_of()
    with kernels.ops_in_force("triton"):
        found = targets(config, config.model_config(256), False)
    (shared,) = [t for t in found if t.key == "64 256 bfloat16 True False"]
    assert shared.calls == config.depth + 1


@pytest.mark.parametrize("key_offset", [False, True])
@pytest.mark.parametrize("fused_norms", [False, True])
def test_every_choice_of_a_step_is_a_target(fused_norms, key_offset):
    """As the memory check walks through a step, and so does a run that asks which tiles it takes."""
    config = config_of(rows=8, fused_norms=fused_norms, key_offset=key_offset)
    shape = config.model_config(100)
    with asked() as calls:
        count(config, shape, 1)
    found = small_targets(config, fused_norms)
    assert {(target.name, target.key) for target in found} == calls.keys()
    assert ("attention-key-offset" in {target.name for target in found}) == key_offset
    both = small_targets(config)
    assert {(t.name, t.key) for t in both if not t.fused_norms} == {
        (t.name, t.key) for t in small_targets(config_of(rows=8, key_offset=key_offset), False)
    }
    assert calls.keys() <= {(t.name, t.key) for t in both}


def test_the_launches_of_a_step_are_counted():
    """Of the kernels that a step launches often: as often as the targets' calls say."""
    config = config_of(rows=8)
    with recorded_launches(run=False) as of_a_step:
        walk_step(config, 100)
    kernels.set_ops("triton")  # which the walk took back
    step = Counter(kernel.__name__ for kernel, *_ in of_a_step)
    expected = Counter()
    for target in small_targets(config, False):
        if target.choice.kernels and not is_update(target.op):
            with recorded_launches(run=False):
                call = call_of(target.op, "meta")  # whose gradients take a forward of their own
            with recorded_launches(run=False) as launches:
                call()
            names = {kernel.__name__ for kernel in target.choice.kernels}
            for kernel, *_ in launches:
                if kernel.__name__ in names:
                    expected[kernel.__name__] += config.grad_accum_steps * target.calls
    assert expected
    for name in expected - Counter({"_cross_entropy_kernel": 99}):
        assert expected[name] == step[name], name
    short = {"_dlambda_kernel", "_norm_ratio_kernel", "_rstd_kernel", "_scale_kernel", "_sum_of_squares_kernel"}
    tuned = {kernel.__name__ for target in small_targets(config, False) for kernel in target.choice.kernels}
    assert step.keys() - short <= tuned


def test_an_op_that_contains_another_does_not_count_it_twice():
    found = {(t.name, t.key): t for t in small_targets(config_of(), False)}
    polar = [t for t in found.values() if t.name == "polar-symmetric"]
    assert {t.op.module for t in polar} == {"polar_express"}


def test_calls_start_from_the_same_state():
    """A gradient's buffer is added to, and an update changes its own inputs: by no call of the tuner's."""
    for name in ("muon", "softmax"):
        target = next(target for of, target in SMALL.items() if of[0] == name)
        call = call_of(target.op, DEVICE)
        once, again = (launches_of(target, call, None).outputs for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        assert any(x.any() for x in once)


def test_launches_may_be_left_out_and_are_given_back():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    before = JITFunction.run, InterpretedFunction.run
    with pytest.raises(ZeroDivisionError), recorded_launches(run=False):
        raise ZeroDivisionError
    assert (JITFunction.run, InterpretedFunction.run) == before


def test_a_choice_without_kernels_repeats_the_whole_op():
    target = next(target for of, target in SMALL.items() if of[0] == "loss-chunk")
    launches = launches_of(target, call_of(target.op, DEVICE), {"logits": 6400})
    (again,) = launches.again
    with recorded_launches() as found:
        again()
    assert found
    assert not isinstance(again, Launch)
