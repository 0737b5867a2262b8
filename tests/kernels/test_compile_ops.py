"""`--ops compile` against `--ops reference`: the same numbers, from one graph without a break."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch._inductor.config

import kernels
from kernels.rotary_attention import compiled as compiled_attention
from kernels.rotary_attention import rotary_attention, rotary_attention_ref, rotary_tables, window_mask
from model import GPTConfig
from prepare import Batch
from tests.helpers.tiny_run import losses, run_main
from tests.helpers.whole_model import check_step
from tests.helpers.whole_model import random_step as random_step_of
from train.config import TrainConfig, resolve
from train.memory import count as counted
from train.schedule import StepValues
from train.step import TrainStep

VALUES = StepValues(step=3, lr_multiplier=0.7, momentum=0.9, weight_decay=0.15)
# Windows of both kinds, a value embedding, two heads a key-value head. One shape for all tests: what one of them has
# compiled the next finds in the compiler's cache.
KV_HEADS = ["--num-kv-heads", "2"]
SHAPE = GPTConfig(vocab_size=512, seq_len=32, depth=2, d_model=64, head_dim=16, num_kv_heads=2)


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing compiled yet, as in a new process; and scalar code, which g++ is done with in half the time."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.simdlen": 1}):
        yield
    kernels.set_ops(None)


def random_step(ops: str, shape: GPTConfig = SHAPE) -> TrainStep:
    kernels.set_ops(ops)
    return random_step_of(shape, torch.get_default_dtype(), "cpu")


def random_batches(count: int) -> list[Batch]:
    tokens = torch.randint(SHAPE.vocab_size, (count, 4, 33), generator=torch.Generator().manual_seed(1))
    return [Batch(t, epoch=1, index=i, state={}) for i, t in enumerate(tokens.int())]


def assert_gradients_close(step: TrainStep, reference: TrainStep) -> None:
    for (name, p), q in zip(step.model.named_parameters(), reference.model.parameters(), strict=True):
        assert p.grad is None, name
        assert q.main_grad.abs().max() > 1e-5, f"{name}: a gradient of zero tests nothing"
        error = (p.main_grad - q.main_grad).norm() / q.main_grad.norm()
        assert error < 1e-12, f"gradient of {name}: {error:.2e}"


def test_a_compiled_step_is_a_step_on_references(monkeypatch):
    """Two micro-steps and an update; the rehearsal has compiled all that they need."""
    check_step(monkeypatch, SHAPE, rows=4, ops="compile")
    step = random_step("compile")
    start = {name: p.detach().clone() for name, p in step.model.named_parameters()}
    step.rehearse((4, 33), micro_steps=2, values=VALUES, times=1)
    assert all(torch.equal(p, start[name]) for name, p in step.model.named_parameters())
    with torch.compiler.set_stance("fail_on_recompile"):
        _, good = step(random_batches(2), VALUES)
    assert good
    assert all(p.grad is None and not torch.equal(p, start[name]) for name, p in step.model.named_parameters())


@pytest.mark.parametrize(("kv_heads", "key_offset"), [(0, False), (1, False), (2, True)],
                         ids=["as many kv heads", "one kv head", "a key offset"])  # fmt: skip
def test_the_graph_itself_of_other_shapes(in_fp64, kv_heads, key_offset):
    """Traced and divided, without the C++ compiler: it is another shape of what the test above has compiled."""
    shape = replace(SHAPE, num_kv_heads=kv_heads, key_offset=key_offset)
    reference, step = random_step("reference", shape), random_step("compile", shape)
    step.forward = torch.compile(step.model, dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")
    for s in (reference, step):
        s.optimizer.grads.fill_(0.5)  # so that a gradient which is written and not added is found out
        for batch in random_batches(2):
            s.forward(batch.tokens[:, :-1], batch.tokens[:, 1:]).backward()
    assert_gradients_close(step, reference)


def test_a_compiled_run_prints_and_learns_what_a_reference_run_does(corpus, tmp_path, capsys):
    """With a small rate for Muon, whose bf16 iterates would otherwise drive the two apart within a few steps."""
    for ops in ("reference", "compile"):
        args = [*KV_HEADS, "--ops", ops, "--steps", "3", "--matrix-lr", "0.001"]
        assert run_main(corpus, tmp_path / ops, *args) == 0
    assert "compile ops (products)" in capsys.readouterr().out
    ours, theirs = losses(tmp_path / "compile"), losses(tmp_path / "reference")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-4)  # AdamW turns a gradient near zero into a step of either sign
    summaries = [json.loads((tmp_path / ops / "summary.json").read_text()) for ops in ("compile", "reference")]
    assert summaries[0]["val_bpb"] == pytest.approx(summaries[1]["val_bpb"], rel=1e-4)
    assert summaries[0]["fingerprint"] == summaries[1]["fingerprint"]


def test_a_compiled_step_holds_no_more_than_is_counted():
    """The references are counted. What the compiler keeps is decided where it divides the graph into forward and
    backward; each half is then run op by op, so that what it makes on the way is seen, and is more than when fused."""
    step = random_step("compile")
    forward = torch.compile(step.model, dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")
    tokens = torch.zeros(4, SHAPE.seq_len, dtype=torch.int32)
    forward(tokens, tokens).backward()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward(tokens, tokens)
    state = {t.untyped_storage().data_ptr() for p in step.model.parameters() for t in (p, p.main_grad)}
    total = sum(nbytes for address, (nbytes, _) in kept.items() if address not in state)
    assert loss.isfinite()
    config = resolve(TrainConfig(ops="compile", depth=SHAPE.depth, d_model=SHAPE.d_model, head_dim=SHAPE.head_dim,
                                 seq_len=SHAPE.seq_len), "cpu")  # fmt: skip
    residual = 4 * SHAPE.seq_len * SHAPE.d_model * 4
    assert 4 * SHAPE.depth * residual < total < counted(config, SHAPE, 4).step


def test_without_a_compiler_one_line(corpus, tmp_path, monkeypatch, capsys):
    def no_compiler(function):
        def call(*args):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert run_main(corpus, tmp_path / "run", "--ops", "compile") == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: --ops compile: .*No working C\+\+ compiler found.*install g\+\+.*\n", err)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def block_masks():
    """For CPU tensors, which `prepare_compiled_attention` makes none for."""
    masks = compiled_attention._block_masks
    yield lambda T, window: masks.update(
        {(T, window, torch.device("cpu")): compiled_attention.window_block_mask(T, window, torch.device("cpu"))}
    )
    masks.clear()


def flex_error(T: int, window: int, block_masks) -> float:
    """Largest difference of FlexAttention, run op by op, from attention written out pair by pair."""
    generator = torch.Generator().manual_seed(T + window)
    q = torch.randn(2, T, 4, 16, generator=generator)
    k, v = torch.randn(2, 2, T, 2, 16, generator=generator)
    block_masks(T, window)
    out = compiled_attention.flex_window_attention(q, k, v, window)
    error = 0.0
    for t in range(T):
        first = max(0, t - window)
        keys, values = (x[:, first : t + 1].repeat_interleave(2, dim=2) for x in (k, v))  # [B, keys, H, head_dim]
        weights = torch.einsum("bhd,bkhd->bhk", q[:, t], keys).div(4.0).softmax(-1)
        error = max(error, (out[:, t] - torch.einsum("bhk,bkhd->bhd", weights, values)).abs().max().item())
    return error


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("T", "window"), [(1, 0), (128, 128), (129, 1), (300, 0), (300, 150), (300, 300), (257, 128)])
def test_flex_attention_sees_the_window_and_no_more(T, window, block_masks):
    assert flex_error(T, window, block_masks) < 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_window_off_by_one_is_found(wrong, block_masks, monkeypatch):
    right = compiled_attention.window_block_mask
    monkeypatch.setattr(
        compiled_attention, "window_block_mask", lambda T, window, device: right(T, window + wrong, device)
    )
    assert flex_error(300, 150, block_masks) > 1e-3


@pytest.mark.parametrize("key_offset", [False, True])
def test_a_compiled_model_scores_rows_of_any_length(monkeypatch, block_masks, key_offset):
    """As on a GPU, where there are masks for the length trained on alone, and the audit scores rows of a few tokens."""
    monkeypatch.setattr(compiled_attention, "compiled_attention", lambda device: "FlexAttention")
    compile_for_real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_for_real(*args, **options, backend="eager"))
    step = random_step("compile", replace(SHAPE, key_offset=key_offset))
    for T in (32, 5):
        tokens = torch.randint(SHAPE.vocab_size, (3, T), generator=torch.Generator().manual_seed(T))
        losses = step.token_losses(tokens, tokens)
        kernels.set_ops("reference")
        with torch.no_grad():
            torch.testing.assert_close(losses, step.model(tokens, tokens, reduction="none"))
        kernels.set_ops("compile")


@pytest.mark.parametrize(("T", "window"), [(300, 128), (300, 127), (1024, 512), (1024, 1024)])
def test_block_masks_skip_what_the_window_does_not_reach(T, window):
    """The blocks that a kernel visits are those with a visible pair; those it does not mask have no other."""
    mask = compiled_attention.window_block_mask(T, window, torch.device("cpu"))
    blocks = -(-T // 128)
    pairs = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    pairs[:T, :T] = window_mask(T, window)
    pairs = pairs.view(blocks, 128, blocks, 128).transpose(1, 2).flatten(2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), pairs.any(-1))
    full = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(full, pairs.all(-1))


@pytest.mark.parametrize("returns_lse", [False, True])
def test_flash_attention_3_is_called_for_the_same_window(monkeypatch, returns_lse):
    """A stand-in with its documented signature: [B, T, H, head_dim], and window_size counts keys back and ahead."""

    def flash_attn_func(q, k, v, causal=False, window_size=(-1, -1)):
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
        mask = (distance <= window_size[0]) & (distance >= -window_size[1]) & ((distance >= 0) | (not causal))
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        out = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
        return (out, scores.logsumexp(-1)) if returns_lse else out

    monkeypatch.setattr(compiled_attention, "flash_attn_func", flash_attn_func)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernels.compiled_attention(torch.device("cuda")) == "FlashAttention-3"
    q, (k, v) = torch.randn(2, 40, 4, 16), torch.randn(2, 2, 40, 2, 16)
    for window in (0, 7, 40):
        out = compiled_attention.flash_window_attention(q, k, v, window)
        reference = compiled_attention.window_attention_ref(q, k, v, window)
        torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert kernels.compiled_attention(torch.device("cuda")) == "FlexAttention"


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["as many kv heads", "two kv heads"])
@pytest.mark.parametrize("window", [1024, 2048])
def test_compiled_attention_on_a_gpu(window, kv_heads):
    """bf16, forward and backward, at the default shape but 2 rows: at most twice the eager reference's own error."""
    device = torch.empty(0, device="cuda").device
    T, head_dim = 2048, 128
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(4 + 2 * kv_heads) * head_dim, kv_heads * head_dim, kv_heads]  # qkv, ve, gate
    inputs = [torch.randn(2, T, width, generator=generator, device=device).bfloat16() for width in shapes]
    cotangent = torch.randn(2, T, 4 * head_dim, generator=generator, device=device)
    cos, sin = rotary_tables(T, head_dim, device=device)
    kernels.set_ops("compile")
    kernels.prepare_compiled_attention(T, [window], device)

    def outputs(attend, dtype):
        qkv, ve, gate = leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(qkv, cos, sin, 4, window, ve, gate)
        return [out, *torch.autograd.grad(out, leaves, cotangent.to(dtype))]

    fullgraph = kernels.compiled_attention(device) == "FlexAttention"
    compiled = torch.compile(rotary_attention, dynamic=False, fullgraph=fullgraph)
    truth = outputs(rotary_attention_ref, torch.float32)
    errors, allowed = (
        [(x.float() - t).square().mean().sqrt() for x, t in zip(outputs(op, torch.bfloat16), truth, strict=True)]
        for op in (compiled, rotary_attention_ref)
    )
    for name, error, baseline, t in zip(("out", "dqkv", "dve", "dgate"), errors, allowed, truth, strict=True):
        assert error <= 2 * baseline + 2**-8 * t.square().mean().sqrt(), name
