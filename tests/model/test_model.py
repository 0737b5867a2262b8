"""The GPT on its references. Parameters are random in all of these but the first: at initialisation the output
projections are zero, and causality, windows and most gradients would be tested on nothing."""

import math
from dataclasses import replace

import pytest
import torch

import kernels
from kernels.common import EPS
from model import GPT, GPTConfig

SMALL = GPTConfig(vocab_size=300, seq_len=16, depth=3, d_model=64, head_dim=16, window_pattern="SSL")


def random_model(config: GPTConfig, dtype=torch.float64, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if parameter.dim() == 1 else 0.3))
    return model


def random_tokens(config: GPTConfig, rows: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(config.vocab_size, (rows, config.seq_len + 1), generator=torch.Generator().manual_seed(seed))


def test_loss_at_initialisation_is_that_of_a_uniform_guess():
    model = GPT(SMALL)
    model.init_weights(seed=0)
    tokens = random_tokens(SMALL, rows=8)
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(300), rel=0.01)


def test_initial_weights_depend_on_the_seed_alone():
    first, second, other = GPT(SMALL), GPT(SMALL), GPT(SMALL)
    first.init_weights(3)
    torch.rand(5)  # the global generator has no say
    second.init_weights(3)
    other.init_weights(4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.wte, other.wte)


def test_initial_distributions():
    model = GPT(GPTConfig(vocab_size=1024, seq_len=8, depth=2, d_model=256, head_dim=64))
    model.init_weights(0)
    bound = math.sqrt(3 / 256)
    assert model.wte.std().item() == pytest.approx(1, rel=0.02)
    assert model.lm_head.std().item() == pytest.approx(0.001, rel=0.02)
    for weight in (model.w_qkv, model.w_fc, model.value_embeddings):
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    for weight in (model.w_out, model.w_proj, model.w_gate):
        assert not weight.any()
    assert model.lambda_r.tolist() == [1, 1]
    assert model.lambda_0.tolist() == pytest.approx([0.1, 0.1])


def test_another_start_is_the_same_draw_scaled():
    """`init_scale` reaches what is drawn uniformly and nothing else; the scalars begin where they are told to."""
    usual, other = GPT(SMALL), GPT(replace(SMALL, init_scale=0.5, lambda_r_init=1.15, lambda_0_init=0.05))
    usual.init_weights(3)
    other.init_weights(3)
    scaled = {"w_qkv", "w_fc", "value_embeddings"}
    for (name, a), b in zip(usual.named_parameters(), other.parameters(), strict=True):
        if not name.startswith("lambda"):
            assert torch.equal(0.5 * a if name in scaled else a, b), name
    assert other.lambda_r.tolist() == pytest.approx([1.15] * 3)
    assert other.lambda_0.tolist() == pytest.approx([0.05] * 3)


LOOKING_BACK = [{}, {"key_offset": True}, {"smear": True}, {"bigram_rows": 3}]


@pytest.mark.parametrize("options", LOOKING_BACK)
def test_a_later_token_changes_no_earlier_loss(options):
    model, tokens = random_model(replace(SMALL, **options)), random_tokens(SMALL)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    before = model(inputs, targets, reduction="none")
    for t in range(1, SMALL.seq_len):
        changed = inputs.clone()
        changed[:, t] = (changed[:, t] + 7) % SMALL.vocab_size
        after = model(changed, targets, reduction="none")
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).all()  # and its own does change: the test is not vacuous


@pytest.mark.parametrize("window", [0, 1, 5, 8, 15, 16])
def test_attention_of_one_layer_sees_its_window_and_nothing_else(window):
    T, heads, head_dim = 16, 2, 8
    torch.manual_seed(0)
    cos, sin = kernels.rotary_tables(T, head_dim)
    qkv = torch.randn(1, T, 3 * heads * head_dim, dtype=torch.float64)
    before = kernels.rotary_attention(qkv, cos, sin, heads, window)
    for j in range(T):
        changed = qkv.clone()
        changed[:, j, heads * head_dim :] += 1  # key and value of position j
        moved = (kernels.rotary_attention(changed, cos, sin, heads, window) != before).any(-1)[0]
        assert moved.tolist() == [0 <= t - j <= window for t in range(T)]


def test_tables_of_pairs_are_in_the_layers_without_another():
    assert GPTConfig().bigram_layers == []
    assert GPTConfig().gated_layers == [1, 3, 5, 7]
    config = GPTConfig(bigram_rows=2, depth=3)
    assert (config.ve_layers, config.bigram_layers, config.gated_layers) == ([0, 2], [1], [0, 1, 2])
    assert GPTConfig(bigram_rows=2, depth=1).bigram_layers == []
    with torch.device("meta"):
        assert tuple(GPT(config).bigram_embeddings.shape) == (1, 2 * 8192, 512)


def test_a_smear_of_nothing_is_none_and_one_token_has_none_before_it():
    plain, smeared = GPT(SMALL), GPT(replace(SMALL, smear=True))
    for model in (plain, smeared):
        model.init_weights(1)
    assert smeared.lambda_s.tolist() == [0.0]
    tokens = random_tokens(SMALL)
    torch.testing.assert_close(smeared(tokens[:, :-1]), plain(tokens[:, :-1]), rtol=0, atol=0)
    with torch.no_grad():
        smeared.lambda_s.fill_(0.5)
    assert torch.equal(smeared(tokens[:, :1]), plain(tokens[:, :1]))
    assert not torch.equal(smeared(tokens[:, :2]), plain(tokens[:, :2]))


def test_layers_get_the_windows_of_the_pattern():
    assert GPTConfig().windows == [1024, 1024, 1024, 2048, 1024, 1024, 1024, 2048]
    assert GPTConfig(depth=6).windows == [1024, 1024, 1024, 2048, 1024, 2048]  # the last is L whatever the pattern
    assert GPTConfig(short_window=8).windows == [256, 256, 256, 2048, 256, 256, 256, 2048]
    assert GPTConfig(depth=3, seq_len=5, short_window=4).windows == [1, 1, 5]


def test_a_key_offset_is_on_the_layers_that_see_all():
    assert GPTConfig().offset_layers == []
    assert GPTConfig(key_offset=True).offset_layers == [3, 7]
    assert GPTConfig(key_offset=True, depth=3, window_pattern="LS").offset_layers == [0, 2]
    assert GPTConfig(key_offset=True, depth=2, window_pattern="S", seq_len=1).offset_layers == [1]


def test_value_embeddings_on_every_other_layer_the_last_included():
    assert GPTConfig().ve_layers == [1, 3, 5, 7]
    assert GPTConfig(depth=5).ve_layers == [0, 2, 4]


@pytest.mark.parametrize(
    ("base", "short_window", "options"), [(50.0, 4, {}), *((10_000, 2, options) for options in LOOKING_BACK)]
)
def test_loss_follows_the_written_equations(base, short_window, options):
    """Two layers of the design, spelled out for one row, without the ops."""
    config = GPTConfig(
        vocab_size=50, seq_len=6, depth=2, d_model=64, head_dim=16, num_kv_heads=2, window_pattern="S",
        rope_base=base, short_window=short_window, **options,
    )  # fmt: skip
    model, tokens = random_model(config), random_tokens(config, rows=1)
    hd, H, K, T = 16, 4, 2, 6

    def norm(v):
        return v / (v.pow(2).mean(-1, keepdim=True) + EPS).sqrt()

    def rotate(v, position):
        out = v.clone()
        for i in range(hd // 2):
            angle = position * base ** (-2 * i / hd)
            out[i] = v[i] * math.cos(angle) + v[i + hd // 2] * math.sin(angle)
            out[i + hd // 2] = -v[i] * math.sin(angle) + v[i + hd // 2] * math.cos(angle)
        return out

    inputs, targets = tokens[0, :-1], tokens[0, 1:]
    x = model.wte[inputs]
    if config.smear:
        x = torch.stack([x[t] + (model.lambda_s * x[t - 1] if t else 0) for t in range(T)])
    x0 = norm(x)
    x = x0
    for layer, window in enumerate([6 // short_window, 6]):
        x = model.lambda_r[layer] * x + model.lambda_0[layer] * x0
        y = norm(x)
        q, k, v = (y @ model.w_qkv[layer].T).split([H * hd, K * hd, K * hd], dim=-1)
        if layer == 1:
            value = model.value_embeddings[0][inputs]
        elif config.bigram_rows:
            before = [0, *inputs[:-1].tolist()]
            pairs = [(a * 36313 ^ b * 27191) % (3 * 50) for a, b in zip(before, inputs.tolist(), strict=True)]
            value = model.bigram_embeddings[0][pairs]
        if layer == 1 or config.bigram_rows:
            gate = 2 * torch.sigmoid(y[:, :32] @ model.w_gate[layer - (not config.bigram_rows)].T)
            v = v + gate.repeat_interleave(hd, dim=1) * value
        if config.key_offset and layer == 1:
            slow = torch.tensor([i % (hd // 2) >= hd // 4 for i in range(hd)]).repeat(K)
            k = torch.stack([torch.where(slow, k[max(t - 1, 0)], k[t]) for t in range(T)])
        heads = []
        for h in range(H):
            g = h // (H // K)
            qs = [norm(rotate(q[t, h * hd : (h + 1) * hd], t)) for t in range(T)]
            ks = [norm(rotate(k[t, g * hd : (g + 1) * hd], t)) for t in range(T)]
            rows = []
            for t in range(T):
                seen = range(max(0, t - window), t + 1)
                weights = torch.softmax(torch.stack([qs[t] @ ks[j] for j in seen]) / math.sqrt(hd), dim=0)
                rows.append(sum(w * v[j, g * hd : (g + 1) * hd] for w, j in zip(weights, seen, strict=True)))
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, dim=1) @ model.w_out[layer].T
        x = x + torch.relu(norm(x) @ model.w_fc[layer].T) ** 2 @ model.w_proj[layer].T
    logits = 15 * torch.tanh(norm(x) @ model.lm_head.T / 15)
    expected = torch.stack([logits[t].logsumexp(0) - logits[t, targets[t]] for t in range(T)])

    losses = model(tokens[:, :-1], tokens[:, 1:], reduction="none")[0]
    # The tables of cos and sin are fp32: angles of a few radians, so 1e-6 and not 1e-12.
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), expected.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens[:, :-1])[0], logits[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", LOOKING_BACK)
def test_gradients_against_finite_differences(options):
    config = GPTConfig(vocab_size=40, seq_len=8, depth=2, d_model=32, head_dim=16, num_kv_heads=1, window_pattern="S",
                       **options)  # fmt: skip
    model, tokens = random_model(config), random_tokens(config)

    def loss():
        return model(tokens[:, :-1], tokens[:, 1:])

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        # Along a random direction in all of the parameter, and along single coordinates.
        directions = [torch.randn(parameter.shape, generator=generator, dtype=torch.float64)]
        for flat in torch.randint(parameter.numel(), (3,), generator=generator):
            one_hot = torch.zeros(parameter.numel(), dtype=torch.float64).index_fill(0, flat, 1)
            directions.append(one_hot.view_as(parameter))
        for direction in directions:
            h = 1e-6
            with torch.no_grad():
                parameter += h * direction
                above = loss()
                parameter -= 2 * h * direction
                below = loss()
                parameter += h * direction
            numeric = ((above - below) / (2 * h)).item()
            analytic = (parameter.grad * direction).sum().item()
            assert analytic == pytest.approx(numeric, rel=1e-5, abs=1e-8), name
        assert parameter.grad.abs().max() > 1e-6, f"{name}: a gradient of zero tests nothing"


def test_gradients_add_up_in_main_grad():
    """Two backward passes into main_grad are the sum of two into .grad, and .grad stays empty."""
    model, other = random_model(SMALL), random_model(SMALL)
    for parameter in other.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    for seed in (1, 2):
        tokens = random_tokens(SMALL, seed=seed)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        other(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert q.grad is None
        torch.testing.assert_close(q.main_grad, p.grad, msg=name)


def test_a_shorter_row_is_a_prefix():
    model, tokens = random_model(SMALL), random_tokens(SMALL)
    whole = model(tokens[:, :-1], tokens[:, 1:], reduction="none")
    short = model(tokens[:, :5], tokens[:, 1:6], reduction="none")
    torch.testing.assert_close(short, whole[:, :5])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depth": 0}, "depth"), ({"d_model": 100}, "d_model"), ({"head_dim": 15, "d_model": 60}, "head_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"), ({"window_pattern": "SX"}, "window_pattern"),
        ({"short_window": 3}, "short_window"), ({"bigram_rows": -1}, "bigram_rows"),
        ({"d_model": 16, "head_dim": 16}, "d_model"), ({"head_dim": 18, "d_model": 54, "key_offset": True}, "head_dim"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(change, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**change)
