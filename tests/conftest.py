"""Without a GPU the kernels run in Triton's interpreter: it has to be asked for before Triton is first imported."""

import os
import random
import string

import pytest
import torch

from prepare import prepare

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder prepared from a few hundred short documents: 512 tokens of vocabulary, some 40,000 of text."""
    source = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(400)]
    for i in range(300):
        text = " ".join(rng.choices(words, weights=range(400, 0, -1), k=rng.randint(20, 200)))
        (source / f"{i:03d}.txt").write_text(text + ".\n", encoding="utf-8")
    return prepare(str(source), out=tmp_path_factory.mktemp("prepared") / "corpus", vocab_size=512)
