"""The model in plain PyTorch gives the trained model's logits: at once, token by token from a cache, behind padding."""

import pytest
import torch

from model import GPT
from prepare import InputError
from tests.helpers.small_shapes import SHAPES, logits_of, random_model, random_tokens
from train.modeling import SPARE, Cache
from train.plain import plain

WITHIN = {"rtol": 0, "atol": 2e-5}  # fp32 on a CPU, logits up to ±15: only the order of sums differs


@pytest.fixture(params=SHAPES, scope="module")
def pair(request):
    """A trained model, tokens, and its logits for them."""
    config = SHAPES[request.param]
    model, tokens = random_model(config), random_tokens(config)
    logits = logits_of(model, tokens)
    assert logits.abs().max() > 1
    return model, tokens, logits


@torch.no_grad()
def read(copy, tokens, lengths, starts=None) -> torch.Tensor:
    """Logits of all tokens, read from one cache in pieces of these lengths; the last is repeated to the end."""
    cache, found = Cache(), []
    while cache.length < tokens.shape[1]:
        length = lengths.pop(0) if len(lengths) > 1 else lengths[0]
        found.append(copy(tokens[:, cache.length : cache.length + length], cache, starts))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("lengths", [[24], [1], [5, 1], [1, 7, 2, 9, 1]], ids=str)
def test_equal_logits_from_a_cache(pair, lengths):
    model, tokens, logits = pair
    torch.testing.assert_close(read(plain(model), tokens, [*lengths]), logits, **WITHIN)


@pytest.mark.parametrize("lengths", [[24 + 9], [1], [11, 1], [4, 9, 3, 1]], ids=str)
def test_equal_logits_behind_padding(pair, lengths):
    """A row's padding is in the first piece, ends in it, or goes on into the next; what stands in it does not count."""
    model, tokens, logits = pair
    starts = torch.tensor([9, 0, 4])
    for filler in (0, 7):
        rows = torch.full((3, 24 + 9), filler)
        for row, start, text in zip(rows, starts, tokens, strict=True):
            row[start : start + 24] = text
        found = read(plain(model), rows, [*lengths], starts)
        for b, start in enumerate(starts):
            torch.testing.assert_close(found[b, start : start + 24], logits[b], **WITHIN)
        assert found.isfinite().all()


def test_rows_that_change_places(pair):
    """As those of a beam search."""
    model, tokens, logits = pair
    cache, rows = Cache(), torch.tensor([2, 0, 0])
    copy = plain(model)
    with torch.no_grad():
        copy(tokens[:, :10], cache)
        cache.reorder(rows)
        torch.testing.assert_close(copy(tokens[rows, 10:12], cache), logits[rows, 10:12], **WITHIN)


@torch.no_grad()
def test_a_layer_keeps_what_its_window_reaches(pair):
    """However long the text; and what it gives is what reading all of it at once gives."""
    model, _, _ = pair
    copy, cache = plain(model), Cache()
    tokens = torch.randint(300, (1, 200), generator=torch.Generator().manual_seed(2))
    found = []
    while cache.length < 200:
        found.append(copy(tokens[:, cache.length : cache.length + (1 if cache.length else 90)], cache))
        for i, window in enumerate(model.config.windows):
            kept = cache.layers[i]
            assert kept.end - kept.begin <= window + 1
            assert kept.keys.shape[2] == kept.values.shape[2] <= window + 1 + SPARE
    torch.testing.assert_close(torch.cat(found, dim=1), copy(tokens), **WITHIN)


def test_the_parameters_are_those_of_the_model(pair):
    model, _, _ = pair
    assert plain(model).w_qkv.data_ptr() == model.w_qkv.data_ptr()


def test_rounded_weights_agree_too(pair):
    """As on a GPU."""
    model = GPT(pair[0].config)
    model.load_state_dict(pair[0].state_dict())
    model.to_forward_dtype(torch.bfloat16)
    assert plain(model).w_qkv.dtype == torch.bfloat16


def test_another_model_is_refused(pair, monkeypatch):
    model, _, _ = pair
    honest = GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, tokens: 1.01 * honest(self, tokens))
    with pytest.raises(InputError, match="other logits"):
        plain(model)
    monkeypatch.undo()
    model = GPT(model.config)
    model.out_scale = torch.nn.Parameter(torch.ones(3, 64))
    with pytest.raises(InputError, match="not the parameters"):
        plain(model)
