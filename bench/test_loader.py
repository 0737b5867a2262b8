"""Packed tokens a second from the loader's one thread: `pytest bench/test_loader.py --benchmark-only`.

The text is the standard library's, or that of the folder which TIMEBOX_BENCH_TEXT names. A token is a position of
the inputs, as in training: B * T a batch.
"""

import json
import os
import threading

import pytest
import torch

from prepare import Dataset, Loader, prepare
from prepare.sources import folder_source, stdlib_source

NUM_BATCHES = 20
SAMPLE_BYTES = 8_000_000
SHAPES = {2048: 128, 256: 64}  # T: B


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = os.environ.get("TIMEBOX_BENCH_TEXT")
    corpus = tmp_path_factory.mktemp("corpus")
    size = 0
    with (corpus / "sample.jsonl").open("w", encoding="utf-8") as file:
        for _, text in (folder_source(folder) if folder else stdlib_source()).documents():
            size += file.write(json.dumps({"text": text}) + "\n")
            if size >= SAMPLE_BYTES:
                break
    return Dataset.open(prepare(str(corpus), tmp_path_factory.mktemp("data") / "out", vocab_size=8_192))


@pytest.fixture(autouse=True)
def _one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def busy_with_matmuls(stop: threading.Event) -> None:
    """What a training loop does to the loader on a CPU: arithmetic without the interpreter's lock, and short calls."""
    a = torch.randn(256, 256)
    while not stop.is_set():
        a @ a


def busy_with_python(stop: threading.Event) -> None:
    """The worst neighbour: never lets go of the interpreter's lock by itself."""
    while not stop.is_set():
        pass


@pytest.mark.parametrize("beside", [None, busy_with_matmuls, busy_with_python], ids=["alone", "matmuls", "python"])
@pytest.mark.parametrize("packing", ["lossless", "published"])
@pytest.mark.parametrize("seq_len", SHAPES)
def test_loader(benchmark, data, seq_len, packing, beside):
    batch_size = SHAPES[seq_len]
    stop = threading.Event()
    neighbour = threading.Thread(target=beside, args=(stop,)) if beside else None
    with Loader(data.split("train"), batch_size, seq_len, bos=data.tokenizer.bos, packing=packing) as loader:
        if neighbour:
            neighbour.start()
        try:
            benchmark.pedantic(lambda: [next(loader) for _ in range(NUM_BATCHES)], rounds=3, warmup_rounds=1)
        finally:
            stop.set()
            if neighbour:
                neighbour.join()
        benchmark.extra_info["cropped_share"] = round(loader.cropped_share, 3)
    tokens = NUM_BATCHES * batch_size * seq_len
    benchmark.extra_info["Mtok/s"] = round(tokens / benchmark.stats.stats.median / 1e6, 1)
