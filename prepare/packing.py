"""Packs documents into rows of T + 1 tokens, best fit. Plain NumPy and bisection.

Every row starts with BOS, and so does every document in it. From a buffer of documents the largest that fits whole is
placed; where none fits, the shortest is cut to fill the row. What happens to a cut-off tail is the `packing`:

    lossless   it goes back into the buffer, with a BOS of its own; a document longer than a row enters in pieces
    published  it is thrown away, and counted (`cropped_share`): where nothing but a BOS fits, a whole document

From the same documents in the same order, `published` makes the rows of the published loader (prepare.py of
karpathy/autoresearch, nanochat/dataloader.py of karpathy/nanochat) for as long as a pass lasts: documents enter by
batches, which no shard or row group of its data leaves short, and of equal lengths the oldest is taken and cut.
Three things stay our own: training shuffles the documents (`seed`), a pass ends before the next one begins, where that
loader reads on, and evaluation takes evenly spaced rows (`pack_evaluation`). So no number is comparable with one that
was published.
"""

from bisect import bisect_right, insort

import numpy as np

from .dataset import Split
from .errors import InputError

PACKINGS = ("lossless", "published")
BUFFER_DOCUMENTS = 1_000
PUBLISHED_BATCH = 128  # documents that enter together while the buffer holds fewer than that: it then holds more
# Pieces are shuffled within so many documents: else the pieces of one long document would fill whole batches.
BLOCK_DOCUMENTS = 4_096
_COUNTERS = ("epoch", "block", "next_piece", "entered", "placed", "cropped")


class Packer:
    """Fills rows, one after another, from one pass over the split or from endless ones.

    The buffer is emptied at the end of a pass before the next one begins (in the same row): each document is placed
    exactly once an epoch, and an epoch's number means what it says.
    """

    def __init__(
        self,
        split: Split,
        seq_len: int,
        *,
        bos: int,
        packing: str = "lossless",
        seed: int | None = 0,
        epochs: int | None = None,
    ):
        """`seed` shuffles within blocks, anew in each epoch; None keeps the stored order. `epochs` None: endless."""
        if packing not in PACKINGS:
            raise InputError(f"there is no packing {packing!r}: it is {' or '.join(PACKINGS)}")
        if seq_len < 1:
            raise InputError(f"a sequence of {seq_len} tokens is not possible: it takes 1 or more")
        self.split = split
        self.seq_len = seq_len
        self.bos = bos
        self.lossless = packing == "lossless"
        self.seed = seed
        self.epochs = epochs
        self.epoch = 1  # of the token placed last
        self.block = 0  # blocks of BLOCK_DOCUMENTS documents, in stored order
        self.next_piece = 0  # of the block, not yet in the buffer
        self.entered = 0  # pieces of this epoch that have entered the buffer
        # Of each piece its length, the negated number of its entry, and its position in the split; sorted, so that of
        # equal lengths the oldest comes last. By position, pieces of one document would come out side by side again.
        self.buffer: list[tuple[int, int, int]] = []
        self.placed = 0  # tokens, since the start
        self.cropped = 0
        self._read_block()

    @property
    def cropped_share(self) -> float:
        """Share of the tokens met so far that were thrown away."""
        return self.cropped / max(1, self.cropped + self.placed)

    def fill(self, row: np.ndarray) -> bool:
        """Fills `row` (integers, [T + 1]). False where nothing is left; a last short row is padded with BOS."""
        end = len(row)
        filled = 0
        while filled < end:
            if len(self.buffer) < BUFFER_DOCUMENTS:
                self._refill()
            if not self.buffer:
                if not self._start_next_epoch():
                    row[filled:] = self.bos
                    return filled > 0
                continue
            row[filled] = self.bos
            filled += 1
            room = end - filled
            if room or not self.lossless:  # for no room too, the published loader takes a document and cuts it
                start, length = self._take(room)
                row[filled : filled + length] = self.split.tokens(start, start + length)
                filled += length
                self.placed += length
        return True

    def _take(self, room: int) -> tuple[int, int]:
        """Position and length of the tokens that come next; the length is at most `room`."""
        largest_that_fits = bisect_right(self.buffer, room, key=_length) - 1
        if largest_that_fits >= 0:
            length, _, start = self.buffer.pop(largest_that_fits)
            return start, length
        if self.lossless:
            length, entry, start = self.buffer.pop(0)
            insort(self.buffer, (length - room, entry, start + room))
        else:
            oldest_of_the_shortest = bisect_right(self.buffer, self.buffer[0][0], key=_length) - 1
            length, _, start = self.buffer.pop(oldest_of_the_shortest)
            self.cropped += length - room
        return start, room

    def _refill(self) -> None:
        at_once = 1 if self.lossless else PUBLISHED_BATCH
        missing = -(-(BUFFER_DOCUMENTS - len(self.buffer)) // at_once) * at_once
        while missing > 0:
            stop = self.next_piece + missing
            lengths = self._lengths[self.next_piece : stop].tolist()
            starts = self._starts[self.next_piece : stop].tolist()
            for length, start in zip(lengths, starts, strict=True):
                self.entered += 1
                insort(self.buffer, (length, -self.entered, start))
            self.next_piece += len(lengths)
            missing -= len(lengths)
            if missing > 0:
                if (self.block + 1) * BLOCK_DOCUMENTS >= self.split.num_documents:
                    return  # the epoch has been read
                self.block += 1
                self.next_piece = 0
                self._read_block()

    def _start_next_epoch(self) -> bool:
        if self.epochs is not None and self.epoch >= self.epochs:
            return False
        self.epoch += 1
        self.block = self.next_piece = self.entered = 0
        self._read_block()
        return True

    def _read_block(self) -> None:
        """Sets int64 `_starts` and `_lengths` of the block's pieces, in the order in which they enter the buffer."""
        first = self.block * BLOCK_DOCUMENTS
        starts, stops = self.split.document_bounds(first, first + BLOCK_DOCUMENTS)
        if self.lossless:
            starts, stops = _cut(starts, stops, self.seq_len)
        lengths = stops - starts
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch, self.block]).permutation(len(starts))
            starts, lengths = starts[order], lengths[order]
        self._starts, self._lengths = starts, lengths

    def state_dict(self) -> dict:
        """What the rows to come depend on, about 30 kB as JSON."""
        return {name: getattr(self, name) for name in _COUNTERS} | {"buffer": self.buffer.copy()}

    def load_state_dict(self, state: dict) -> None:
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self.buffer = [tuple(piece) for piece in state["buffer"]]
        self._read_block()


def pack_evaluation(
    split: Split, seq_len: int, *, bos: int, packing: str = "lossless", max_tokens: int | None = None
) -> tuple[np.ndarray, float]:
    """The evaluation rows, uint16 [R, T + 1], whatever batch size and seed; and the share of tokens that packing
    cropped on the way.

    `max_tokens` limits them to ceil(max_tokens / T) rows, evenly spaced over the pass; without it, every byte of the
    split is (lossless) the target of exactly one position. Only the pass's last row may be padded, with BOS.
    """
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"evaluation on {max_tokens} tokens is not possible: it takes 1 or more")
    packer = Packer(split, seq_len, bos=bos, packing=packing, seed=None, epochs=1)
    rows = []
    while packer.fill(row := np.empty(seq_len + 1, dtype=np.uint16)):
        rows.append(row)
    count = len(rows) if max_tokens is None else min(len(rows), -(-max_tokens // seq_len))
    # Best fit places long documents first: the first rows alone would be another kind of text than the split is.
    chosen = np.arange(count) * len(rows) // count
    return np.stack([rows[i] for i in chosen]), packer.cropped_share


def _length(piece: tuple[int, int, int]) -> int:
    return piece[0]


def _cut(starts: np.ndarray, stops: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each document [start, stop) into pieces of `length` tokens, the last one shorter."""
    pieces = -(-(stops - starts) // length)
    first_of_document = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = np.arange(len(first_of_document)) - first_of_document
    piece_starts = np.repeat(starts, pieces) + within * length
    return piece_starts, np.minimum(piece_starts + length, np.repeat(stops, pieces))
