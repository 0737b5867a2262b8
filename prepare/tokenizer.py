"""Byte-level BPE: trained by `tokenizers`, encoded by `tiktoken`, stored as JSON.

Ids 0..255 are the bytes, 256..V-5 the merges in the order they were learned, and the last four the special tokens,
`<|bos|>` first. The vocabulary size V counts all of them.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from .errors import InputError
from .files import parse_json, read_bytes
from .limits import num_cores
from .words import command_line

# How text is cut into pieces before any merge; a merge never crosses a piece. The possessive quantifiers mean the
# same to `tokenizers` (training) and to `tiktoken` (encoding); tests/prepare/test_tokenizer.py compares the two.
PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 16  # token shards are uint16
FORMAT_VERSION = 1

TRAIN_BYTES = 48_000_000  # text the merges are learned from: more changes them little and takes longer
MAX_TRAIN_CHARS = 100_000  # of one document, so that one huge file does not choose the vocabulary
# tiktoken's regex engine overflows its stack on a run of a million spaces: longer texts are encoded in parts.
MAX_ENCODE_CHARS = 100_000


def check_vocab_size(vocab_size: int) -> None:
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"a vocabulary of {vocab_size:,} tokens is not possible: --vocab-size takes {MIN_VOCAB_SIZE} (256 bytes "
            f"and {len(SPECIAL_TOKENS)} special tokens) to {MAX_VOCAB_SIZE:,} (token ids are stored in 16 bits)"
        )


class Tokenizer:
    """Text to token ids and back; every valid Unicode string round-trips.

    Text that spells a special token is encoded as text.
    """

    def __init__(self, merges: list[bytes], pattern: str = PATTERN, special_tokens: Iterable[str] = SPECIAL_TOKENS):
        """`merges` are the raw bytes of the tokens 256, 257, ... in the order they were learned."""
        self.merges = merges
        self.pattern = pattern
        self.special_tokens = tuple(special_tokens)
        self.tokens = [bytes([b]) for b in range(NUM_BYTES)] + merges
        self.vocab_size = len(self.tokens) + len(self.special_tokens)
        self.bos = len(self.tokens)
        self._encoding = tiktoken.Encoding(
            "timebox",
            pat_str=pattern,
            mergeable_ranks={token: i for i, token in enumerate(self.tokens)},
            special_tokens={name: self.bos + i for i, name in enumerate(self.special_tokens)},
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, max_bytes: int = TRAIN_BYTES) -> "Tokenizer":
        """Learns the merges from the first `max_bytes` of `texts`, at most MAX_TRAIN_CHARS of each.

        Raises InputError where `vocab_size` is out of range, or larger than what the text supports.
        """
        check_vocab_size(vocab_size)
        num_merges = vocab_size - MIN_VOCAB_SIZE
        merges = _learn_merges(_first_bytes(texts, max_bytes), num_merges)
        if len(merges) < num_merges:
            supported = len(merges) + MIN_VOCAB_SIZE
            raise InputError(
                f"the text is too small for a vocabulary of {vocab_size:,} tokens, it supports {supported:,}: "
                f"pass --vocab-size {supported}, or more text"
            )
        return cls(merges)

    @classmethod
    def load(cls, path: str | Path, mend: str = f"run `{command_line('prepare')}` again") -> "Tokenizer":
        """Raises InputError, which advises `mend`, where `path` is missing or no tokenizer of ours."""
        return cls.parse(read_bytes(Path(path), mend), Path(path), mend)

    @classmethod
    def parse(cls, file: bytes, path: Path, mend: str) -> "Tokenizer":
        """Of what was read from `path`. Raises InputError as `load`."""
        content = parse_json(file, path, mend)
        if content.get("version", FORMAT_VERSION) != FORMAT_VERSION:
            raise InputError(f"{path} has format {content['version']!r}, not {FORMAT_VERSION}: {mend}")
        try:
            merges = [base64.b64decode(token, validate=True) for token in content["merges"]]
            names, pattern = content["special_tokens"], content["pattern"]
            if len(merges) + NUM_BYTES + len(names) > MAX_VOCAB_SIZE:
                raise ValueError("it has more tokens than 16 bits can tell apart")
            if len({*merges, *names}) < len(merges) + len(names) or any(len(merge) < 2 for merge in merges):
                raise ValueError("a token is empty or appears twice")
            if not names or not all(type(text) is str for text in (pattern, *names)):
                raise ValueError("pattern and special tokens are to be texts")
            return cls(merges, pattern, names)
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} is not a tokenizer ({type(e).__name__}: {e}): {mend}") from e

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self._json(), encoding="utf-8")

    def _json(self) -> str:
        content = {
            "version": FORMAT_VERSION,
            "pattern": self.pattern,
            "special_tokens": list(self.special_tokens),
            "merges": [base64.b64encode(token).decode("ascii") for token in self.merges],
        }
        return json.dumps(content, indent=0, ensure_ascii=True) + "\n"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the file that `save` writes."""
        return hashlib.sha256(self._json().encode("utf-8")).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int32 [V]: length of each token in raw bytes, 0 for the special tokens.

        Not the length of the decoded text: a token that is no whole UTF-8 character decodes to U+FFFD, three bytes,
        and would flatter bits per byte.
        """
        lengths = [len(token) for token in self.tokens] + [0] * len(self.special_tokens)
        return np.array(lengths, dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        if len(text) <= MAX_ENCODE_CHARS:
            return self._encoding.encode_ordinary(text)
        return [token for part in _parts(text, MAX_ENCODE_CHARS) for token in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Encodes on every core (tiktoken releases the interpreter's lock); one uint16 array a text."""
        with ThreadPoolExecutor(num_cores()) as pool:
            return list(pool.map(self._encode_array, texts))

    def _encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.uint16)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return self._encoding.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """What is no valid UTF-8 becomes U+FFFD; special tokens become their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    for text in texts:
        text = text[:MAX_TRAIN_CHARS]
        yield text
        max_bytes -= len(text.encode("utf-8"))
        if max_bytes <= 0:
            return


def _parts(text: str, max_chars: int) -> Iterator[str]:
    """Cuts `text` into parts of at most `max_chars`, where it can after a newline that a non-space follows.

    PATTERN ends a piece there whatever surrounds it, so the tokens are those of the whole text. Where there is no such
    place the cut falls anywhere: the bytes round-trip all the same.
    """
    start = 0
    while len(text) - start > max_chars:
        end = cut = start + max_chars
        while (end := text.rfind("\n", start, end)) >= 0:
            if not text[end + 1].isspace():
                cut = end + 1
                break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _learn_merges(texts: Iterator[str], num_merges: int) -> list[bytes]:
    """The raw bytes of at most `num_merges` merged tokens, in the order they were learned."""
    # Only training needs it: loading a tokenizer does not wait for the import.
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainee

    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BYTES + num_merges,
        min_frequency=2,  # a pair seen once is a memory, not a pattern
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    to_byte = byte_of_char()
    by_rank = sorted(trainee.get_vocab().items(), key=lambda item: item[1])
    return [bytes(to_byte[char] for char in token) for token, _ in by_rank if len(token) > 1]


def byte_of_char() -> dict[str, int]:
    """The inverse of the printable alphabet that `ByteLevel` writes bytes in (the one GPT-2 introduced).

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(NUM_BYTES) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
