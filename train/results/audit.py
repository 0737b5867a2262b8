"""Whether a val_bpb is what it says: an independent look at how a model is scored.

What is scored is a function of inputs and targets, one loss a token. The audit knows nothing of what is inside. It asks
the model, as `train.sample` does, for the logits after a prefix, which cannot know what comes later, and takes
log-softmax of them itself; and it tries the function on other inputs and other targets. So an experiment may change the
model as it likes, and only a number that is not a probability of the text is found out.

Each check is made on the function as the run scored with it, in the run's precision, and on the same in fp32 without
any kernel, where the tolerance is tight.
"""

import base64
import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

import kernels
from model import GPT
from prepare import Dataset, InputError, evaluate_bpb
from prepare.packing import pack_evaluation

from ..step import TrainStep

Score = Callable[[Tensor, Tensor], Tensor]

ROWS = 2  # of the validation split that a run is audited on at its end; `train.evaluate --audit` takes more
PREFIXES = 8  # positions of a row at which the logits are asked for
SUM_TOKENS = 2**15  # tokens scored to see probabilities sum to one: every token of the vocabulary at so many positions
DOCUMENTS = 32  # encoded again

# Nats. fp32 differs from itself by how the sums of a product are ordered; measured 1e-6 (bench/LOG.md, 2026-11-24).
EXACT = 1e-3
# bf16 moves single losses by hundredths and hardly their mean: so the mean is compared, as a share of itself.
ROUNDED_MEAN = 5e-3
ROUNDED = 1e-2  # where both sides are computed alike, in bf16; a token that leaks changes losses by whole nats


def audit(
    score: Score,
    model: GPT,
    data: Dataset,
    ops: str,
    seq_len: int,
    packing: str,
    *,
    batch_size: int,
    rows: int = ROWS,
    recorded: dict | None = None,
) -> list[str]:
    """What is wrong with `score(inputs, targets)`, int64 [B, T] → nats [B, T], as the loss of `model`; empty: nothing.

    Args:
        model: on the device and in the dtype it is scored in.
        data: its validation split is what was scored.
        ops: the setting of `kernels` to go back to.
        batch_size: rows of `seq_len` tokens that `score` may be given at once.
        rows: of the validation split.
        recorded: the fingerprint that the run's evaluation had, where it is known.
    """
    rows = min(rows, batch_size)
    try:
        found = [*check_data(data, recorded), *check_bytes(data)]
        taken, _ = pack_evaluation(
            data.split("val"), seq_len, bos=data.tokenizer.bos, packing=packing, max_tokens=rows * seq_len
        )
    except InputError as error:  # no text, no audit of a loss on it
        return [f"data: {error}"]
    tokens = torch.from_numpy(taken.astype(np.int64)).to(model.wte.device)
    inputs, targets, V = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), data.vocab_size
    with torch.no_grad(), in_fp32(model, ops) as (exact, exact_score):
        exact_losses = exact_score(inputs, targets)
        found += check_logits(exact, exact_losses, inputs, targets)
        found += check_causal(exact_score, inputs, targets, V, EXACT, "in fp32")
        found += check_sum(exact_score, inputs, V, EXACT, "in fp32", batch_size)
    with torch.no_grad():
        found += check_mean(score(inputs, targets), exact_losses)
        found += check_causal(score, inputs, targets, V, ROUNDED, "as scored")
        found += check_sum(score, inputs, V, ROUNDED, "as scored", batch_size)
        found += check_bpb(score, exact_losses, targets, data, seq_len, packing)
    return found


@contextmanager
def in_fp32(model: GPT, ops: str) -> Iterator[tuple[GPT, Score]]:
    """A copy of `model` in fp32 and its scoring, all in plain PyTorch."""
    exact = copy.deepcopy(model).float()
    kernels.set_ops("reference")
    try:
        yield exact, TrainStep(exact, None).token_losses
    finally:
        kernels.set_ops(ops)


def check_data(data: Dataset, recorded: dict | None) -> list[str]:
    """Whether the files that were read are still what was prepared, and the split the one that the run was scored on.
    Where the folder holds other files by now, those that were read are still open."""
    data.check_unchanged()  # raises InputError
    found = {"split_sha256": data.split("val").sha256, "tokenizer_sha256": data.tokenizer.fingerprint}
    return [
        f"data: {key} is {value[:16]} and was {str(recorded[key])[:16]} when the run was scored"
        for key, value in found.items()
        if recorded and recorded[key] != value
    ]


def check_bytes(data: Dataset) -> list[str]:
    """Whether the bytes that tokens count for are the bytes of the text they stand for."""
    lengths = raw_lengths(data.tokenizer_file)
    wrong = np.flatnonzero(lengths != data.token_bytes)
    if len(wrong):
        first = int(wrong[0])
        return [
            f"bytes: {len(wrong)} tokens count other bytes than they have; token {first} counts"
            f" {data.token_bytes[first]} and has {lengths[first]}"
        ]
    split, found = data.split("val"), []
    counts = np.zeros(len(lengths), dtype=np.int64)
    for i in range(split.num_documents):
        np.add.at(counts, split.document(i), 1)
    if (total := int(counts @ lengths)) != split.num_bytes:
        found.append(f"bytes: the validation tokens spell {total} bytes, the text had {split.num_bytes}")
    step = max(1, split.num_documents // DOCUMENTS)
    for i in range(0, split.num_documents, step):
        ids = split.document(i)
        try:
            text = b"".join(data.tokenizer.tokens[token] for token in ids).decode("utf-8")
        except (UnicodeDecodeError, IndexError):
            found.append(f"bytes: validation document {i} is no text")
        else:
            if not np.array_equal(data.tokenizer.encode(text), ids):
                found.append(f"bytes: validation document {i} has other tokens when it is encoded again")
    return found


def raw_lengths(tokenizer_file: bytes) -> np.ndarray:
    """int64 [V]: the bytes of each token, from the tokenizer's file alone; special tokens have none."""
    content = json.loads(tokenizer_file)
    merged = [len(base64.b64decode(token)) for token in content["merges"]]
    return np.array([1] * 256 + merged + [0] * len(content["special_tokens"]))


def check_logits(model: GPT, losses: Tensor, inputs: Tensor, targets: Tensor) -> list[str]:
    """Whether the losses are −log softmax of the logits that the model gives after the prefix alone."""
    worst = 0.0
    for t in sample_positions(inputs.shape[1]):
        logits = model(inputs[:, : t + 1]).float()
        own = logits.logsumexp(-1) - logits.gather(1, targets[:, t, None])[:, 0]
        worst = max(worst, _worst(own, losses[:, t]))
    if worst <= EXACT:
        return []
    return [f"losses: they differ by {worst:.3g} nats from -log softmax of the logits after the same prefix"]


def check_causal(
    score: Score, inputs: Tensor, targets: Tensor, vocab_size: int, tolerance: float, how: str
) -> list[str]:
    """Whether losses stay as they are when inputs and targets after them change."""
    T, found = inputs.shape[1], []
    if T < 2:
        return found
    losses = score(inputs, targets)
    for name in ("inputs", "targets"):
        worst = 0.0
        for cut in sorted({1, T // 3, T // 2, T - 1} - {0}):
            changed = {"inputs": inputs.clone(), "targets": targets.clone()}
            later = changed[name][:, cut:]
            later.copy_((later + 1) % vocab_size)
            worst = max(worst, _worst(score(changed["inputs"], changed["targets"])[:, :cut], losses[:, :cut]))
        if worst > tolerance:
            found.append(f"causality ({how}): losses change by {worst:.3g} nats when later {name} do")
    return found


def check_sum(
    score: Score, inputs: Tensor, vocab_size: int, tolerance: float, how: str, batch_size: int
) -> list[str]:
    """Whether the probabilities of all tokens, exp(−loss), sum to one at the first positions of a row."""
    positions = min(inputs.shape[1], max(2, SUM_TOKENS // vocab_size))
    total = torch.zeros(positions, dtype=torch.float64, device=inputs.device)
    for candidates in torch.arange(vocab_size, device=inputs.device).split(batch_size * inputs.shape[1] // positions):
        shape = (len(candidates), positions)
        same, each = inputs[:1, :positions].expand(shape), candidates[:, None].expand(shape)
        losses = score(same.contiguous(), each.contiguous())
        total += losses.double().neg().exp().sum(0)
    farthest = float(total[(total - 1).abs().argmax()])  # argmax takes NaN for the largest
    if abs(farthest - 1) <= tolerance:
        return []
    return [f"probabilities ({how}): those of all tokens sum to {farthest:.6g}, not 1"]


def check_mean(losses: Tensor, exact: Tensor) -> list[str]:
    """Whether the run's own precision gives the mean loss that fp32 gives."""
    ours, truth = float(losses.double().mean()), float(exact.double().mean())
    if abs(ours - truth) <= ROUNDED_MEAN * truth:
        return []
    return [f"losses: their mean is {ours:.5f} as scored and {truth:.5f} in fp32"]


def check_bpb(
    score: Score, exact: Tensor, targets: Tensor, data: Dataset, seq_len: int, packing: str
) -> list[str]:
    """Whether `evaluate_bpb` of the same rows is Σ nats / (ln 2 · Σ bytes) of what they spell."""
    rows = len(targets)
    given = evaluate_bpb(
        score, data, seq_len=seq_len, batch_size=rows, max_tokens=rows * seq_len, packing=packing, device=targets.device
    )
    text = targets < data.tokenizer.bos
    spelt = b"".join(data.tokenizer.tokens[token] for token in targets[text].tolist())
    own = float(exact[text].double().sum()) / (math.log(2) * len(spelt))
    found = []
    if given.bytes_scored != len(spelt):
        found.append(f"bytes: {given.bytes_scored} were scored in {rows} rows, their text has {len(spelt)}")
    if not abs(given.bpb - own) <= ROUNDED_MEAN * own:
        found.append(f"bpb: {given.bpb:.6f} by evaluate_bpb, {own:.6f} from the losses in fp32")
    return found


def sample_positions(length: int) -> list[int]:
    """Evenly spaced, the first and the last among them."""
    return sorted({round(i * (length - 1) / max(1, PREFIXES - 1)) for i in range(PREFIXES)})


def _worst(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite where any is not a number."""
    difference = (a.float() - b.float()).abs()
    return float(difference.nan_to_num(nan=math.inf).max()) if difference.numel() else 0.0
