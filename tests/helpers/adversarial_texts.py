"""Texts on which two tokenizers that are not the same would differ."""

import random
from collections.abc import Iterator


def adversarial_texts() -> Iterator[str]:
    rng = random.Random(0)
    yield from ["", "<|bos|>", "x<|reserved_1|> <|bos|>\n", "naïve été 日本語 😀", "\u200b\x00\ud7ff", "a" * 3000]
    for char in [" ", "\n", "-", "=", "e", "aa b", "0", "\t", "'", "é", "😀"]:
        yield from (char * count for count in range(1, 40))
    pieces = ["<|bos|>", "<|", "|>", " ", "  ", "\n", "\r\n", "'s", "'LL", "123", "é", "日", "😀", "\x00", "a", "=="]
    for _ in range(3000):
        yield "".join(rng.choices(pieces, k=rng.randint(1, 20)))
    for _ in range(3000):
        yield "".join(rng.choices("abcdefghi -=", k=rng.randint(1, 40)))
