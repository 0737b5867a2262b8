"""Rows token by token: by hand, and against loaders that search a plain list."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import packing as module
from prepare.packing import Packer, pack_evaluation
from tests.helpers.prepare_corpus import BOS, make_split


def packed(split, seq_len: int, packing: str) -> tuple[list[list[int]], Packer]:
    """The rows of one pass in stored order, and who filled them."""
    packer = Packer(split, seq_len, bos=BOS, packing=packing, seed=None, epochs=1)
    rows = []
    while packer.fill(row := np.empty(seq_len + 1, dtype=np.int32)):
        rows.append(row.tolist())
    return rows, packer


def documents_of(split) -> list[list[int]]:
    return [split.document(i).tolist() for i in range(split.num_documents)]


def published_rows(documents: list[list[int]], seq_len: int, buffer_size=1_000, batch_size=128) -> list[list[int]]:
    """What the published loader does, over one pass: a document is its BOS and its tokens, in a list by age."""
    waiting = [[BOS, *document] for document in documents]
    buffer, rows = [], []
    while waiting or buffer:
        row = []
        while (waiting or buffer) and (room := seq_len + 1 - len(row)):
            while waiting and len(buffer) < buffer_size:
                buffer += waiting[:batch_size]
                del waiting[:batch_size]
            sizes = [len(document) for document in buffer]
            largest = max((size for size in sizes if size <= room), default=None)
            chosen = sizes.index(min(sizes) if largest is None else largest)  # index finds the oldest
            row += buffer.pop(chosen)[:room]
        rows.append(row + [BOS] * (seq_len + 1 - len(row)))
    return rows


def lossless_rows(documents: list[list[int]], seq_len: int, buffer_size=1_000) -> list[list[int]]:
    """Pieces enter one by one; of equal lengths the oldest is taken and the newest cut, whose rest keeps its place."""
    waiting = [document[i : i + seq_len] for document in documents for i in range(0, len(document), seq_len)]
    buffer, rows = [], []
    while waiting or buffer:
        row = []
        while (waiting or buffer) and len(row) <= seq_len:
            while waiting and len(buffer) < buffer_size:
                buffer.append(waiting.pop(0))
            row.append(BOS)
            room = seq_len + 1 - len(row)
            if room == 0:
                break
            sizes = [len(piece) for piece in buffer]
            largest = max((size for size in sizes if size <= room), default=None)
            if largest is not None:
                row += buffer.pop(sizes.index(largest))
            else:
                newest = max(i for i, size in enumerate(sizes) if size == min(sizes))
                row += buffer[newest][:room]
                buffer[newest] = buffer[newest][room:]
        rows.append(row + [BOS] * (seq_len + 1 - len(row)))
    return rows


LENGTHS = [2, 4, 1, 3, 5, 2, 2, 2]  # A 0-1, B 2-5, C 6, D 7-9, E 10-14, F 15-16, G 17-18, H 19-20


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(module, "BUFFER_DOCUMENTS", 2)
    monkeypatch.setattr(module, "PUBLISHED_BATCH", 3)


def test_published_rows_by_hand(tmp_path, small_buffer):
    """Rows of 6, and sizes with BOS: A 3, B 5, C 2, D 4, E 6, F 3, G 3, H 3."""
    rows, packer = packed(make_split(tmp_path, [LENGTHS]), 5, "published")
    assert rows == [
        # A B C enter. B; for the 1 that is left the shortest, C, is cut to its BOS.
        [BOS, 2, 3, 4, 5, BOS],
        # A alone is fewer than 2: D E F enter. E fits; one by one D alone would have come to A, and been taken.
        [BOS, 10, 11, 12, 13, 14],
        # A D F: D, and for the 2 that are left A and F are equally short: the older is cut, and its 1 thrown away.
        [BOS, 7, 8, 9, BOS, 0],
        # F alone: G H, the last batch, enter. Of the three equal ones the oldest, and the one after it.
        [BOS, 15, 16, BOS, 17, 18],
        [BOS, 19, 20, BOS, BOS, BOS],
    ]
    assert (packer.placed, packer.cropped) == (19, 2)  # C, and the second token of A


def test_lossless_rows_by_hand(tmp_path, small_buffer):
    """Rows of a BOS and 5 tokens: A 2, B 4, C 1, D 3, E 5, F 2, G 2, H 2."""
    rows, packer = packed(make_split(tmp_path, [LENGTHS]), 5, "lossless")
    assert rows == [
        [BOS, 2, 3, 4, 5, BOS],  # of A B: B. C enters; nothing is cut for the one position left
        [BOS, 0, 1, BOS, 6, BOS],  # of A C: A. D enters; of C D, for 2: C. E enters
        [BOS, 10, 11, 12, 13, 14],  # of D E: E
        [BOS, 7, 8, 9, BOS, 17],  # of D F: D. G enters; for 1 the newer of F G is cut, and its 18 goes back
        [BOS, 15, 16, BOS, 19, 20],  # of F 18: F. H enters; for 2: H
        [BOS, 18, BOS, BOS, BOS, BOS],
    ]
    assert (packer.placed, packer.cropped) == (21, 0)


def corpus(seed: int) -> list[int]:
    """Lengths of documents as texts have them, most of them short and some longer than many rows."""
    rng = random.Random(seed)
    return [1 + int(rng.lognormvariate(3.5, 1)) for _ in range(4_000)]


def test_512_of_512_rows_are_the_published_loaders(tmp_path):
    split = make_split(tmp_path, [corpus(0)[:2_500], corpus(0)[2_500:]], "val")
    ours, _ = pack_evaluation(split, 128, bos=BOS, packing="published")
    theirs = published_rows(documents_of(split), 128)
    assert sum(a == b for a, b in zip(ours[:512].tolist(), theirs[:512], strict=True)) == 512
    assert ours.tolist() == theirs  # and to the end of the pass


def test_lossless_rows_are_those_of_a_plain_list(tmp_path):
    split = make_split(tmp_path, [corpus(1)])
    rows, _ = packed(split, 128, "lossless")
    assert len(rows) > 1_000
    assert rows == lossless_rows(documents_of(split), 128)


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 12) | st.integers(1, 70), min_size=1, max_size=40),
    seq_len=st.sampled_from([1, 2, 8, 33, 256]),
    buffer_size=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    block_size=st.integers(1, 50),
)
def test_any_rows(tmp_path_factory, lengths, seq_len, buffer_size, batch_size, block_size):
    """Wherever buffer, batches and blocks end; a batch that goes over the end of a block is one batch."""
    split = make_split(tmp_path_factory.mktemp("split"), [lengths])
    documents = documents_of(split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BUFFER_DOCUMENTS", buffer_size)
        patch.setattr(module, "PUBLISHED_BATCH", batch_size)
        patch.setattr(module, "BLOCK_DOCUMENTS", block_size)
        lossless, _ = packed(split, seq_len, "lossless")
        published, packer = packed(split, seq_len, "published")
    assert lossless == lossless_rows(documents, seq_len, buffer_size)
    assert published == published_rows(documents, seq_len, buffer_size, batch_size)
    placed = sum(token != BOS for row in published for token in row)
    assert (packer.placed, packer.cropped) == (placed, split.num_tokens - placed)
    assert packer.cropped_share == pytest.approx(1 - placed / split.num_tokens)
