"""BPE training and tokenising, on every core: `pytest bench/test_tokenizer.py --benchmark-only`.

The text is the standard library's, or that of the folder which TIMEBOX_BENCH_TEXT names.
"""

import os
from itertools import islice

import pytest

from prepare import Tokenizer
from prepare.limits import num_cores
from prepare.sources import folder_source, stdlib_source

SAMPLE_BYTES = 8_000_000
VOCAB_SIZE = 8_192


@pytest.fixture(scope="module")
def texts():
    folder = os.environ.get("TIMEBOX_BENCH_TEXT")
    documents = (folder_source(folder) if folder else stdlib_source()).documents()
    taken, size = [], 0
    for _, text in documents:
        taken.append(text)
        size += len(text.encode())
        if size >= SAMPLE_BYTES:
            break
    return taken


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, VOCAB_SIZE)


def report(benchmark, texts):
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    benchmark.extra_info |= {
        "MB": round(megabytes, 2),
        "MB/s": round(megabytes / benchmark.stats.stats.median, 2),
        "cores": num_cores(),
    }


def test_bpe_training(benchmark, texts):
    benchmark.pedantic(Tokenizer.train, args=(texts, VOCAB_SIZE), rounds=1)
    report(benchmark, texts)


def test_tokenising(benchmark, tokenizer, texts):
    benchmark.pedantic(tokenizer.encode_batch, args=(texts,), rounds=3, warmup_rounds=1)
    report(benchmark, texts)


def test_tokenising_on_one_core(benchmark, tokenizer, texts):
    some = list(islice(texts, len(texts) // 4))
    benchmark.pedantic(lambda: [tokenizer.encode(text) for text in some], rounds=3, warmup_rounds=1)
    report(benchmark, some)
    benchmark.extra_info["cores"] = 1
