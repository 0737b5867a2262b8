"""Validation bits per byte: how many bits the model needs for a byte of text it has not seen.

    bpb = Σ nats of the target tokens / (ln 2 · Σ bytes of the target tokens)

over a fixed set of rows. Special tokens have no bytes and count in neither sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from .dataset import Dataset
from .errors import InputError
from .packing import pack_evaluation

TokenLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    bpb: float
    unigram_bpb: float  # of the train split's token frequencies on the same targets: what no context achieves
    rows: int
    bytes_scored: int
    cropped_share: float  # of the tokens met while packing; 0 where packing is lossless
    fingerprint: dict  # two results with equal fingerprints were measured on the same bytes


def evaluate_bpb(
    token_losses: TokenLosses,
    dataset: Dataset,
    *,
    split: str = "val",
    seq_len: int,
    batch_size: int,
    max_tokens: int | None = None,
    packing: str = "lossless",
    device: str | torch.device | None = None,
    rank: int = 0,
    ranks: int = 1,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda terms: terms,
) -> Evaluation:
    """Scores `split` with `token_losses(inputs, targets)`, int64 [B, T] on `device` -> nats, float32 [B, T].

    The rows depend on neither `batch_size` nor a seed; `max_tokens` limits them to ceil(max_tokens / T), evenly spaced.
    Every call has the full batch: the last one is filled up with repeated rows that do not count. Sums are in float64.
    A non-finite loss on any counted row, also of a special token, makes `bpb` non-finite.

    Of several `ranks` each scores every `ranks`-th batch, and `add_up` sums a float64 vector over them, of which each
    term is zero on all but one: so `bpb` has the same bits on any number of them.

    Raises InputError (split, packing).
    """
    if batch_size < 1:
        raise InputError(f"an evaluation batch of {batch_size} rows is not possible: it takes 1 or more")
    data = dataset.split(split)
    rows, cropped_share = pack_evaluation(
        data, seq_len, bos=dataset.tokenizer.bos, packing=packing, max_tokens=max_tokens
    )
    device = torch.device(device or "cpu")
    token_bytes = torch.from_numpy(dataset.token_bytes).to(device)
    starts = range(0, len(rows), batch_size)
    nats = torch.zeros(len(starts), dtype=torch.float64, device=device)  # of each batch
    for start in tqdm(starts[rank::ranks], desc=f"evaluating on {split}", unit="batch", disable=None, leave=False):
        wanted = np.arange(start, start + batch_size)
        batch = torch.from_numpy(rows[wanted % len(rows)].astype(np.int64)).to(device)
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        losses = token_losses(inputs, targets)
        if losses.shape != targets.shape:
            raise ValueError(f"token_losses gave {tuple(losses.shape)} for targets {tuple(targets.shape)}")
        num_counted = min(batch_size, len(rows) - start)
        has_bytes = token_bytes[targets[:num_counted]] > 0
        # A product, not a selection: NaN · 0 is NaN, so that no non-finite loss is masked.
        nats[start // batch_size] = (losses[:num_counted].detach().double() * has_bytes).sum()

    counts = np.bincount(rows[:, 1:].reshape(-1), minlength=dataset.vocab_size) * (dataset.token_bytes > 0)
    bytes_scored = int(counts @ dataset.token_bytes.astype(np.int64))
    fingerprint = {
        "split": split,
        "split_sha256": data.sha256,
        "tokenizer_sha256": dataset.tokenizer.fingerprint,
        "seq_len": seq_len,
        "packing": packing,
        "rows": len(rows),
        "bytes_scored": bytes_scored,
        "cropped_share": cropped_share,
    }
    return Evaluation(
        bpb=_bits_per_byte(sum(add_up(nats).tolist()), bytes_scored),
        unigram_bpb=_bits_per_byte(_unigram_nats(dataset.token_counts, counts), bytes_scored),
        rows=len(rows),
        bytes_scored=bytes_scored,
        cropped_share=cropped_share,
        fingerprint=fingerprint,
    )


def _bits_per_byte(nats: float, num_bytes: int) -> float:
    return nats / (math.log(2) * num_bytes)


def _unigram_nats(train_counts: np.ndarray, counts: np.ndarray) -> float:
    """Nats of tokens that occur `counts` times, by their add-one smoothed frequency in the train split."""
    return float(counts @ (np.log(train_counts.sum() + len(train_counts)) - np.log(train_counts + 1)))
