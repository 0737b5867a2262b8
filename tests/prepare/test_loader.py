import json
import random
import threading
import time
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare import InputError, Loader
from prepare import packing as module
from prepare.packing import Packer, pack_evaluation
from tests.helpers.prepare_corpus import BOS, make_split

LENGTHS = [[3, 1, 200, 17, 8, 7, 9, 64, 1, 1, 30], [5, 500, 2, 63, 65, 64, 12]]


def pieces_of(rows: np.ndarray) -> list[list[int]]:
    """What stands between BOS and BOS, or the row's end."""
    pieces = []
    for row in np.asarray(rows).tolist():
        assert row[0] == BOS
        for token in row:
            if token == BOS:
                pieces.append([])
            else:
                pieces[-1].append(token)
    return [piece for piece in pieces if piece]


def documents_of(split) -> list[list[int]]:
    return [split.document(i).tolist() for i in range(split.num_documents)]


def pack_rows(split, seq_len, packing="lossless", seed=0, epochs=None):
    packer = Packer(split, seq_len, bos=BOS, packing=packing, seed=seed, epochs=epochs)
    while packer.fill(row := np.empty(seq_len + 1, dtype=np.int32)):
        yield row


def one_epoch(split, seq_len, packing, seed=0) -> np.ndarray:
    return np.stack(list(pack_rows(split, seq_len, packing, seed, epochs=1)))


def test_split_reads_documents_across_shards(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    documents = documents_of(split)
    assert [len(document) for document in documents] == [*LENGTHS[0], *LENGTHS[1]]
    assert list(chain(*documents)) == list(range(split.num_tokens))
    starts, stops = split.document_bounds(9, 14)
    assert [split.tokens(a, b).tolist() for a, b in zip(starts, stops, strict=True)] == documents[9:14]
    assert len(split.document_bounds(15, 4000)[0]) == 3
    with pytest.raises(IndexError):
        split.document(18)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=40),
    seq_len=st.sampled_from([1, 2, 8, 33, 256]),
    seed=st.sampled_from([None, 0, 1]),
)
def test_lossless_rows_hold_every_document_exactly_once(tmp_path_factory, lengths, seq_len, seed):
    split = make_split(tmp_path_factory.mktemp("split"), [lengths])
    rows = one_epoch(split, seq_len, "lossless", seed)
    pieces = sorted(pieces_of(rows))  # tokens are positions: sorted pieces of a document are in its order
    assert list(chain(*pieces)) == list(range(split.num_tokens))
    bounds = set(np.cumsum([0, *lengths]).tolist())
    starts = {piece[0] for piece in pieces} | {split.num_tokens}
    assert bounds <= starts  # no piece runs over the end of its document
    assert max(map(len, pieces)) <= seq_len


@pytest.mark.parametrize("packing", ["lossless", "published"])
def test_best_fit(tmp_path, packing):
    """Room for 10: the largest that fits is 7, then of the remaining (2) nothing fits, the shortest (3) is cut to 1."""
    split = make_split(tmp_path, [[3, 4, 12, 7]])
    first = one_epoch(split, 10, packing, seed=None)[0].tolist()
    if packing == "published":
        assert first == [BOS, *range(19, 26), BOS, 0, 1]
    else:  # the 12 entered as 10 and 2
        assert first == [BOS, *range(7, 17)]
        assert one_epoch(split, 10, packing, seed=None)[1].tolist() == [BOS, *range(19, 26), BOS, 17, 18]


@pytest.mark.parametrize("packing", ["lossless", "published"])
def test_one_position_left_is_a_lone_bos(tmp_path, packing):
    """Nothing is cut for it; but published, the shortest document is cut to its BOS, and all else of it thrown away."""
    split = make_split(tmp_path, [[7, 7]])
    rows = one_epoch(split, 8, packing, seed=None)
    first, second = [BOS, *range(7), BOS], [BOS, *range(7, 14), BOS]
    assert rows.tolist() == ([first, second] if packing == "lossless" else [first])


def test_only_the_last_row_of_a_pass_is_padded(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    rows = one_epoch(split, 32, "lossless")
    tail = rows[-1].tolist()
    lone = [r for r in rows[:-1].tolist() if any(a == b == BOS for a, b in pairwise(r))]
    assert not lone
    assert tail[-2:] == [BOS, BOS]


@pytest.mark.parametrize("packing", ["lossless", "published"])
def test_endless_rows_have_no_padding_and_whole_epochs(tmp_path, packing):
    split = make_split(tmp_path, LENGTHS)
    packer = Packer(split, 16, bos=BOS, packing=packing)
    rows, epochs = [], []
    while packer.epoch < 5:
        rows.append(np.empty(17, dtype=np.int32))
        assert packer.fill(rows[-1])
        epochs.append(packer.epoch)
    assert sorted(epochs) == epochs
    assert set(epochs) == {1, 2, 3, 4, 5}
    counts = np.bincount(np.concatenate(rows), minlength=split.num_tokens)[: split.num_tokens]
    if packing == "lossless":
        assert counts.min() >= 4  # four whole epochs
        assert counts.max() <= 5  # and the beginning of the fifth
    assert not any(a == b == BOS for row in rows for a, b in pairwise(row))


def test_pieces_of_a_long_document_are_spread(tmp_path):
    split = make_split(tmp_path, [[16_000, 16_000, 16_000]])
    rows = one_epoch(split, 16, "lossless", seed=0)
    neighbours = np.abs(np.diff(rows[:, 1])) == 16
    assert neighbours.mean() < 0.01


def test_of_equal_lengths_the_oldest_comes_first(tmp_path):
    split = make_split(tmp_path, [[16] * 50])
    assert one_epoch(split, 16, "lossless", seed=None)[:, 1].tolist() == list(range(0, 800, 16))


def test_seed_and_epoch_change_the_order(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    aligned = make_split(tmp_path / "aligned", [[16] * 50])  # an epoch is 50 rows
    rows = list(pack_rows(aligned, 16, epochs=2))
    first, second = np.stack(rows[:50]), np.stack(rows[50:])
    assert not np.array_equal(first, second)
    assert np.array_equal(np.sort(first, axis=0), np.sort(second, axis=0))
    assert np.array_equal(one_epoch(split, 16, "lossless", 0), one_epoch(split, 16, "lossless", 0))
    assert not np.array_equal(one_epoch(split, 16, "lossless", 0), one_epoch(split, 16, "lossless", 1))


def test_many_blocks_and_more_documents_than_the_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 7)
    monkeypatch.setattr(module, "BUFFER_DOCUMENTS", 5)
    rng = random.Random(0)
    split = make_split(tmp_path, [[rng.randint(1, 60) for _ in range(n)] for n in (14, 1, 30)])
    pieces = sorted(pieces_of(one_epoch(split, 16, "lossless")))
    assert list(chain(*pieces)) == list(range(split.num_tokens))


def test_evaluation_rows_cover_the_split_once_or_up_to_a_limit(tmp_path):
    split = make_split(tmp_path, LENGTHS, "val")
    rows = pack_evaluation(split, 16, bos=BOS)[0]
    assert rows.dtype == np.uint16
    targets = rows[:, 1:]
    assert np.sort(targets[targets != BOS]).tolist() == list(range(split.num_tokens))
    limited = pack_evaluation(split, 16, bos=BOS, max_tokens=65)[0]
    # Evenly spaced: the first rows hold the long documents alone.
    spread = [int(i * len(rows) / 5) for i in range(5)]
    assert spread[-1] > len(rows) // 2
    assert np.array_equal(limited, rows[spread])
    assert np.array_equal(pack_evaluation(split, 16, bos=BOS, max_tokens=10**9)[0], rows)
    assert pack_evaluation(split, 16, bos=BOS)[1] == 0
    assert pack_evaluation(split, 16, bos=BOS, packing="published")[1] > 0.3


def test_batches(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    expected = pack_rows(split, 16, seed=3)
    with Loader(split, 4, 16, bos=BOS, seed=3) as loader:
        for index in range(30):
            batch = next(loader)
            assert (batch.tokens.dtype, tuple(batch.tokens.shape), batch.index) == (torch.int32, (4, 17), index)
            assert batch.tokens.tolist() == [next(expected).tolist() for _ in range(4)]
        assert batch.epoch == 2


@pytest.mark.parametrize("packing", ["lossless", "published"])
@pytest.mark.parametrize("handed_out", [0, 1, 13, 14, 29])
def test_resume_goes_on_right_after_the_last_batch(tmp_path, packing, handed_out, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_DOCUMENTS", 5)
    monkeypatch.setattr(module, "BUFFER_DOCUMENTS", 4)
    monkeypatch.setattr(module, "PUBLISHED_BATCH", 3)
    split = make_split(tmp_path, LENGTHS)
    with Loader(split, 3, 16, bos=BOS, packing=packing, prefetch=4) as loader:
        for _ in range(handed_out):
            last = next(loader)
            assert last.state == loader.state_dict()
        time.sleep(0.02)  # the thread reads ahead, which must not show
        state = json.loads(json.dumps(loader.state_dict()))
        share = loader.cropped_share
        expected = [next(loader) for _ in range(25)]
    with Loader(split, 3, 16, bos=BOS, packing=packing) as fresh:
        next(fresh)  # also a loader already under way takes a state
        fresh.load_state_dict(state)
        assert fresh.state_dict() == state
        assert fresh.cropped_share == share
        for batch in expected:
            again = next(fresh)
            assert torch.equal(again.tokens, batch.tokens)
            assert (again.index, again.epoch) == (batch.index, batch.epoch)
            assert json.dumps(again.state) == json.dumps(batch.state)


def test_started_it_has_its_first_batch_and_hands_out_the_same(tmp_path, monkeypatch):
    packed, pack = [], Loader._pack
    monkeypatch.setattr(Loader, "_pack", lambda self: packed.append(self) or pack(self))
    split = make_split(tmp_path, LENGTHS)
    with Loader(split, 3, 16, bos=BOS) as plain, Loader(split, 3, 16, bos=BOS) as started:
        expected = [next(plain) for _ in range(9)]
        state = started.state_dict()
        started.start()
        assert started in packed
        assert started.state_dict() == state  # what is ready is not handed out
        started.start()
        assert torch.equal(next(started).tokens, expected[0].tokens)
        started.load_state_dict(expected[5].state)
        started.start()
        started.load_state_dict(expected[6].state)  # what was ready before is not what comes
        started.start()
        assert [next(started).index for _ in range(2)] == [7, 8]


def test_a_batch_is_not_overwritten(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    with Loader(split, 4, 16, bos=BOS) as loader:
        kept = next(loader)
        before = kept.tokens.clone()
        state = json.dumps(kept.state)
        for _ in range(10):
            next(loader)
        assert torch.equal(kept.tokens, before)
        assert json.dumps(kept.state) == state


def test_the_state_is_small(tmp_path):
    split = make_split(tmp_path, [[50] * 5_000])
    with Loader(split, 4, 64, bos=BOS) as loader:
        assert len(json.dumps(next(loader).state)) < 40_000


@pytest.mark.parametrize(
    "other", [{"seq_len": 8}, {"packing": "published"}, {"seed": 1}, {"bos": 64_000}, {"lengths": [[900]]}]
)
def test_a_state_of_another_run_is_refused(tmp_path, other):
    split = make_split(tmp_path / "a", LENGTHS)
    if "lengths" in other:
        other = {"split": make_split(tmp_path / "b", other["lengths"])}
    settings = {"split": split, "batch_size": 2, "seq_len": 16, "bos": BOS}
    with Loader(**settings) as loader:
        state = next(loader).state
    with Loader(**settings | other) as another, pytest.raises(InputError, match="resume with the same"):
        another.load_state_dict(state)


def test_a_split_shorter_than_a_batch(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    with pytest.raises(InputError, match=r"1,052 tokens.*64 \* 64 = 4,096.*smaller batch"):
        Loader(split, 64, 64, bos=BOS)


@pytest.mark.parametrize("bad", [{"packing": "tight"}, {"seq_len": 0}, {"batch_size": 0}, {"prefetch": 0}])
def test_bad_arguments(tmp_path, bad):
    split = make_split(tmp_path, LENGTHS)
    with pytest.raises(InputError):
        Loader(**{"split": split, "batch_size": 2, "seq_len": 16, "bos": BOS} | bad)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_close_ends_the_thread(tmp_path):
    split = make_split(tmp_path, LENGTHS)
    with Loader(split, 4, 16, bos=BOS) as loader:
        assert not loader_threads()  # nothing runs before the first batch is asked for
        next(loader)
        assert len(loader_threads()) == 1
    assert not loader_threads()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_an_exception_in_the_thread_reaches_the_consumer_as_itself(tmp_path, monkeypatch):
    split = make_split(tmp_path, LENGTHS)
    failure = OSError("the disk is gone")
    loader = Loader(split, 4, 16, bos=BOS)
    fill = loader._packer.fill
    calls = iter(range(100))

    def failing(row):
        if next(calls) == 6:
            raise failure
        return fill(row)

    monkeypatch.setattr(loader._packer, "fill", failing)
    next(loader)  # what was packed before the failure still arrives
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(loader)
    assert caught.value is failure
    assert not loader_threads()


def test_batches_arrive_on_the_gpu(gpu, tmp_path):
    split = make_split(tmp_path, LENGTHS)
    with Loader(split, 4, 16, bos=BOS) as on_cpu, Loader(split, 4, 16, bos=BOS, device="cuda", prefetch=4) as on_gpu:
        for _ in range(200):
            batch = next(on_gpu)
            assert batch.tokens.is_cuda
            assert torch.equal(batch.tokens.cpu(), next(on_cpu).tokens)
