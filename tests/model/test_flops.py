"""Parameter and FLOP counts: the published configuration, and brute force."""

import math

import pytest
import torch

import kernels
from model import GPT, GPTConfig, flops_per_token, flops_per_token_causal, gpt, visited_pairs
from model.flops import device_peak
from model.gpt import count_parameters, matrix_parameters


def test_parameters_by_kind_of_the_default():
    counts = count_parameters(GPTConfig())
    in_millions = {kind: round(n / 1e6, 1) for kind, n in counts.items()}
    assert in_millions == {
        "wte": 4.2, "value_embeddings": 16.8, "lm_head": 4.2, "blocks": 25.2, "scalars": 0.0, "total": 50.3,
    }  # fmt: skip


def test_count_is_what_the_module_holds():
    config = GPTConfig(vocab_size=300, seq_len=16, depth=3, d_model=192, head_dim=32, num_kv_heads=2)
    assert count_parameters(config)["total"] == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize("shape", [(1000, 512), (8, 125, 512)])
def test_a_new_parameter_is_counted_and_charged_unless_it_is_looked_up(monkeypatch, shape):
    """What no list names is a matrix: it never goes uncounted without a word."""
    config = GPTConfig()
    shapes = gpt.parameter_shapes(config)
    without = count_parameters(config), flops_per_token(config)
    monkeypatch.setattr(gpt, "parameter_shapes", lambda config: shapes | {"new": shape})
    counts = count_parameters(config)
    assert counts.get("new", counts["blocks"] - without[0]["blocks"]) == math.prod(shape)
    assert counts["total"] == without[0]["total"] + math.prod(shape)
    assert flops_per_token(config) == without[1] + 6 * math.prod(shape)
    monkeypatch.setattr(gpt, "LOOKED_UP", (*gpt.LOOKED_UP, "new"))
    assert count_parameters(config)["new"] == math.prod(shape)
    assert flops_per_token(config) == without[1]


def test_who_updates_a_matrix_does_not_change_what_it_costs(monkeypatch):
    config = GPTConfig()
    before = count_parameters(config), flops_per_token(config), flops_per_token_causal(config)
    monkeypatch.setattr(gpt, "BLOCK_WEIGHTS", tuple(name for name in gpt.BLOCK_WEIGHTS if name != "w_out"))
    assert (count_parameters(config), flops_per_token(config), flops_per_token_causal(config)) == before


def test_what_is_looked_up_is_what_the_model_looks_up():
    config = GPTConfig(vocab_size=300, seq_len=16, depth=3, d_model=64, head_dim=32, bigram_rows=2)
    model, read = GPT(config), set()
    model.init_weights(0)

    def call(name, op, args, kwargs):
        if name == "embedding":
            read.update(table.untyped_storage().data_ptr() for table in args[1])
        return op(*args, **kwargs)

    with kernels.watched(call):
        model(torch.zeros(1, 16, dtype=torch.int32))
    names = {name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() in read}
    assert names == {*gpt.LOOKED_UP}


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16])
@pytest.mark.parametrize("window", [0, 1, 3, 8, 15, 16, 40])
def test_visited_pairs_by_brute_force(seq_len, window):
    pairs = sum(1 for t in range(seq_len) for j in range(seq_len) if t - window <= j <= t)
    assert visited_pairs(seq_len, window) == pairs


def test_flops_of_the_default_by_hand():
    # 6 x (lm_head 4,194,304 + blocks 8 x 12 x 512^2 + gates 4 x 4 x 32), 12 x 512 x (6 x 1,024 + 2 x 2,048)
    config = GPTConfig()
    assert matrix_parameters(config) == 8192 * 512 + 8 * 12 * 512 * 512 + 4 * 4 * 32
    assert flops_per_token(config) == 6 * matrix_parameters(config) + 12 * 512 * 10240


def test_causal_flops_count_pairs_that_exist():
    config = GPTConfig(vocab_size=300, seq_len=12, depth=4, d_model=64, head_dim=32)
    assert config.windows == [6, 6, 6, 12]
    pairs = sum(1 for w in config.windows for t in range(12) for j in range(t + 1) if t - j <= w)
    # per pair: q·k and weight·v, 2 x d_model multiply-adds forward, three times that with the backward
    attention = 3 * 2 * 2 * config.d_model * pairs / 12
    assert flops_per_token_causal(config) == 6 * matrix_parameters(config) + attention


def test_peaks_by_name():
    assert device_peak("NVIDIA H200") == device_peak("NVIDIA H100 80GB HBM3") == 989.5e12
    assert device_peak("NVIDIA H100 PCIe") == device_peak("NVIDIA H800 PCIe") == 756e12
    assert device_peak("NVIDIA H100 NVL") == device_peak("NVIDIA H200 NVL") == 835e12
    assert device_peak("NVIDIA H100 80GB HBM3 MIG 3g.40gb") is None  # a part of one
    assert device_peak("Quadro of tomorrow") is None
    assert device_peak("NVIDIA L40") is None  # not an L4
