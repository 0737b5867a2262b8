import math

import numpy as np
import pytest
import torch

from prepare import Dataset, InputError, evaluate_bpb, prepare
from tests.helpers.prepare_corpus import VOCAB_SIZE, write_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"), 60)
    (corpus / "val.txt").write_text(
        "validation: naïve text, <|bos|> spelled out, of some length\n" * 30, encoding="utf-8"
    )
    (corpus / "val2.txt").write_text("a second document")
    return Dataset.open(prepare(str(corpus), tmp_path_factory.mktemp("out") / "x", vocab_size=VOCAB_SIZE))


def some_losses(inputs, targets):
    """Differs with both tokens, as a model's does."""
    assert inputs.dtype == targets.dtype == torch.int64
    return 1 + (inputs * 7 + targets * 3).remainder(11).float() / 10


def constant(nats):
    return lambda inputs, targets: torch.full(targets.shape, nats)


def test_every_validation_byte_is_scored_once(data):
    result = evaluate_bpb(constant(2.0), data, seq_len=16, batch_size=4)
    val = data.split("val")
    assert result.bytes_scored == val.num_bytes
    assert result.bpb == pytest.approx(2.0 * val.num_tokens / (math.log(2) * val.num_bytes), rel=1e-12)
    assert result.cropped_share == 0


def test_the_batch_size_changes_nothing(data):
    shapes = set()

    def losses(inputs, targets):
        shapes.add(tuple(inputs.shape))
        return some_losses(inputs, targets)

    results = [evaluate_bpb(losses, data, seq_len=16, batch_size=size) for size in (1, 3, 8, 500)]
    assert shapes == {(1, 16), (3, 16), (8, 16), (500, 16)}  # also the last batch is whole
    assert len({result.rows for result in results}) == 1
    for result in results[1:]:
        assert result.bpb == pytest.approx(results[0].bpb, rel=1e-12)
        assert result.fingerprint == results[0].fingerprint


def test_special_tokens_count_in_neither_sum(data):
    bos = data.tokenizer.bos
    huge_at_bos = evaluate_bpb(lambda x, y: torch.where(y == bos, 1e6, 2.0), data, seq_len=16, batch_size=4)
    assert huge_at_bos.bpb == evaluate_bpb(constant(2.0), data, seq_len=16, batch_size=4).bpb


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_not_masked(data, bad):
    for token in (int(data.split("val").document(0)[0]), data.tokenizer.bos):
        result = evaluate_bpb(lambda x, y, t=token: torch.where(y == t, bad, 2.0), data, seq_len=16, batch_size=4)
        assert not math.isfinite(result.bpb)


def test_unigram(data):
    """Scoring the train frequencies by way of token_losses gives unigram_bpb."""
    counts = data.token_counts + 1
    nats = torch.from_numpy(-np.log(counts / counts.sum()))
    result = evaluate_bpb(lambda x, y: nats[y], data, seq_len=16, batch_size=4, max_tokens=100)
    assert result.bpb == pytest.approx(result.unigram_bpb, rel=1e-12)
    assert 1 < result.unigram_bpb < 8


def test_max_tokens(data):
    full = evaluate_bpb(some_losses, data, seq_len=16, batch_size=4)
    part = evaluate_bpb(some_losses, data, seq_len=16, batch_size=4, max_tokens=100)
    assert part.rows == 7  # ceil(100 / 16)
    assert part.bytes_scored < full.bytes_scored
    assert part.fingerprint != full.fingerprint
    with pytest.raises(InputError):
        evaluate_bpb(some_losses, data, seq_len=16, batch_size=4, max_tokens=0)


def test_fingerprint(data):
    result = evaluate_bpb(some_losses, data, seq_len=16, batch_size=4)
    assert result.fingerprint["split_sha256"] == data.split("val").sha256
    assert result.fingerprint["tokenizer_sha256"] == data.tokenizer.fingerprint
    published = evaluate_bpb(some_losses, data, seq_len=16, batch_size=4, packing="published")
    assert published.fingerprint["packing"] == "published"
    assert published.cropped_share > 0.5
    holdout = evaluate_bpb(some_losses, data, split="holdout", seq_len=16, batch_size=4)
    assert holdout.bytes_scored == data.split("holdout").num_bytes


def test_wrong_arguments(data):
    with pytest.raises(ValueError, match="token_losses gave"):
        evaluate_bpb(lambda x, y: torch.zeros(()), data, seq_len=16, batch_size=4)
    for bad in ({"packing": "tight"}, {"batch_size": 0}, {"seq_len": 0}, {"split": "test"}):
        with pytest.raises(InputError):
            evaluate_bpb(some_losses, data, **{"seq_len": 16, "batch_size": 4} | bad)
