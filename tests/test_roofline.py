"""The roofline against figures that were worked out apart from it."""

import pytest

from bench import roofline
from model import GPTConfig
from train.config import TrainConfig, resolve

CONFIG = resolve(TrainConfig(), "cuda")


def test_mfu_is_the_convention_over_the_time(capsys):
    total, mfu = roofline.report(CONFIG, GPTConfig(), roofline.GPUS["h200"])
    # 239.0784 MFLOP x 262,144 tokens / 989.5 TFLOP/s = 63.34 ms at 100 %.
    assert total * mfu == pytest.approx(6334, abs=1)
    out = capsys.readouterr().out
    assert "not a measurement" in out
    assert f"{total:.1f} ms" in out


def test_products_of_a_micro_step_add_up_to_six_flops_a_parameter():
    """All but attention, norms and embeddings: 6 x tokens x matrix parameters, less what the loss adds."""
    lines = list(roofline.micro_step(CONFIG, GPTConfig()))
    products = sum(line.count * line.flops for line in lines if line.name.split()[0] in ("qkv", "value", "relu²"))
    products += sum(line.count * line.flops for line in lines if line.name.startswith("attention output"))
    parameters = 8 * 12 * 512 * 512 + 4 * 4 * 32
    assert products == pytest.approx(6 * 262_144 * parameters)


def test_attention_counts_only_pairs_of_the_window():
    lines = [line for line in roofline.micro_step(CONFIG, GPTConfig()) if line.name.startswith("attention, ")]
    forward = sum(line.count * line.flops for line in lines if line.name.endswith("forward"))
    pairs = sum(sum(min(t, w) + 1 for t in range(2048)) for w in GPTConfig().windows)
    assert forward == 2 * 2 * 128 * 4 * 128 * pairs  # 2 products, a multiply-add is 2, head_dim, heads, rows


def test_bytes_bind_where_bandwidth_is_low():
    slow = roofline.Gpu(flops=1e18, bandwidth=1e9)
    fast = roofline.Gpu(flops=1e9, bandwidth=1e18)
    line = roofline.Line("x", 2, bytes=1e9, flops=1e9)
    assert (line.bound(slow), line.bound(fast)) == ("bytes", "FLOPs")
    assert line.milliseconds(slow) == line.milliseconds(fast) == 2000


def test_bad_input_is_one_line(capsys, tmp_path):
    assert roofline.main(["--config", str(tmp_path / "none.json")]) == 2
    assert roofline.main(["--depth", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
