"""Text from a model, token by token."""

import codecs
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from model import GPT
from prepare import InputError, Tokenizer

from .modeling import Cache
from .plain import plain

Reader = Callable[[list[int]], Tensor]  # what a model says comes after these tokens, at most seq_len: logits [V]


def next_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One draw from logits [V]; the likeliest where temperature is 0. Raises InputError where no logit is a number."""
    logits = logits.float().cpu()
    if not logits.max().isfinite():
        raise InputError("the model's logits are not finite: it has learned nothing; name another RUN")
    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        least = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # Of differences from the largest, and in fp64: no temperature above 0 makes a NaN of them, however large or small.
    probabilities = torch.softmax((logits - logits.max()).double() / temperature, dim=-1).float()
    return int(torch.multinomial(probabilities, 1, generator=generator))


def caching(model: GPT) -> Reader:
    """Computes the tokens that it has not read yet. Raises InputError as `plain`."""
    copy, device = plain(model), model.wte.device
    cache, read = Cache(), []

    def reader(tokens: list[int]) -> Tensor:
        nonlocal cache, read
        if not read or tokens[: len(read)] != read or len(tokens) == len(read):  # another text
            cache, read = Cache(), []
        new = torch.tensor([tokens[len(read) :]], device=device)
        read = []  # should this be interrupted, the cache has half of it
        logits = copy.logits(copy.features(new, cache)[0, -1])
        read = list(tokens)
        return logits

    return reader


def recomputing(model: GPT) -> Reader:
    """Computes every token again for each: what a model takes that only model/gpt.py knows."""
    return lambda tokens: model(torch.tensor([tokens], device=model.wte.device))[0]


def reader_of(model: GPT, note: Callable[[str], None] = lambda reason: None) -> Reader:
    """The quickest there is. `note` is told why it is not the quick one."""
    try:
        return caching(model)
    except InputError as error:
        note(str(error))
        return recomputing(model)


def fitting(tokens: list[int], seq_len: int) -> list[int]:
    """What the model reads of them: all, or where they are more than a row, the first, which is `bos`, and the newest
    half of a row. So a row that is full leaves room for half a row before it is read anew, and never has a position
    that training had not."""
    return tokens if len(tokens) <= seq_len else [tokens[0], *tokens[len(tokens) - seq_len // 2 :]]


@torch.no_grad()
def generate(
    model: GPT, tokens: Sequence[int], count: int, *, banned: list[int], temperature: float, top_k: int, seed: int,
    reader: Reader | None = None,
) -> Iterator[int]:  # fmt: skip
    """`count` tokens after `tokens`, none of them from `banned`, each as soon as it is drawn."""
    generator = torch.Generator().manual_seed(seed)
    reader = reader or reader_of(model)
    tokens = list(tokens)
    for _ in range(count):
        tokens = fitting(tokens, model.config.seq_len)
        logits = reader(tokens)
        logits[banned] = float("-inf")
        tokens.append(next_token(logits, temperature, top_k, generator))
        yield tokens[-1]


def text_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """What `tokenizer.decode` makes of all of them, in pieces as they come: a character that several tokens share comes
    with the last of these."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def until(stops: Sequence[str], pieces: Iterable[str]) -> Iterator[str]:
    """The text of `pieces` before the first place where one of `stops` stands. What may be the beginning of one waits
    for what comes after it."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        sure = len(held) - max((_beginning(stop, held) for stop in stops), default=0)
        yield held[:sure]
        held = held[sure:]
    yield held


def _beginning(stop: str, text: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
