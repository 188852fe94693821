"""Packing: every token once, documents whole where they fit, and places that name documents."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import open_stream

from basestone.data.errors import DataError
from basestone.data.lanes import USUAL_TOKEN_BYTES
from basestone.data.packing import (
    BestFitPacker,
    Cursor,
    SplitPacker,
    Windows,
    best_fit,
    window_chunks,
)
from basestone.data.position import merge_states
from basestone.data.shards import open_shard_set
from basestone.data.tokenizer import Tokenizer

LENGTH = 48


class Chunks:
    """Documents of numbers that tell where they come from, in chunks."""

    def __init__(self, chunks: list[list[int]]) -> None:
        self.chunks, self.num_chunks = chunks, len(chunks)

    def read(self, chunk: int) -> list[np.ndarray]:
        lengths = self.chunks[chunk % len(self.chunks)]
        first = 1000 * chunk
        return [
            np.arange(first + 100 * number, first + 100 * number + length)
            for number, length in enumerate(lengths)
        ]

    def expect(self, chunk: int) -> None:
        pass

    def cut(self, document: np.ndarray) -> list[np.ndarray]:
        return [document]

    def tokenize(self, document: np.ndarray) -> np.ndarray:
        return document


chunks_of_lengths = st.lists(
    st.lists(st.integers(1, 60), min_size=0, max_size=7), min_size=1, max_size=5
).filter(lambda chunks: any(length > 1 for lengths in chunks for length in lengths))


@settings(deadline=None)
@given(chunks=chunks_of_lengths, size=st.integers(2, 40))
def test_split_rows_are_the_documents_end_to_end(chunks: list[list[int]], size: int) -> None:
    source = Chunks(chunks)
    packer = SplitPacker(source, Cursor())
    flat = np.concatenate(
        [document for chunk in range(12) for document in [np.zeros(0, int), *source.read(chunk)]]
    )
    begins = set(
        np.cumsum([0, *(len(document) for chunk in range(12) for document in source.read(chunk))]).tolist()
    )
    row = np.empty(size, np.int64)
    for number in range((len(flat) - 1) // (size - 1)):
        place = number * (size - 1)
        length, starts = packer.fill(row)
        assert length == size and row.tolist() == flat[place : place + size].tolist()
        # a start at the shared last token is the next row's first
        assert starts == sorted(begin - place for begin in begins if place <= begin < place + size)


@settings(deadline=None)
@given(chunks=chunks_of_lengths, size=st.integers(2, 40), window=st.integers(1, 4), stop=st.integers(0, 20))
def test_best_fit_keeps_documents_whole_and_goes_on_anywhere(
    chunks: list[list[int]], size: int, window: int, stop: int
) -> None:
    source = Chunks(chunks)
    packer = BestFitPacker(Windows(source, Cursor(), lambda _: window, key=3))
    rows = []
    seen: Counter[int] = Counter()
    while packer.cursor.chunk < 3 * window and len(rows) < 200:
        row = np.full(size, -1, np.int64)
        length, starts = packer.fill(row)
        rows.append((row[:length].tolist(), starts, (packer.cursor.chunk, packer.cursor.part)))
        if packer.cursor.chunk < 2 * window:
            seen.update(row[:length].tolist())
        pieces = np.split(row[:length], starts[1:])
        assert starts[0] == 0 and (row[length:] == -1).all()
        for piece in pieces:
            assert (np.diff(piece) == 1).all(), "a piece is a run of one document"
            document = source.read(int(piece[0]) // 1000)[int(piece[0]) % 1000 // 100]
            assert len(piece) == len(document) or len(document) > size
    assert all(count == 1 for count in seen.values())
    if stop < len(rows):
        chunk, document = rows[stop][2]
        again = BestFitPacker(Windows(source, Cursor(chunk, document), lambda _: window, key=3))
        for want, starts, _ in rows[stop + 1 : stop + 5]:
            row = np.full(size, -1, np.int64)
            length, begins = again.fill(row)
            assert row[:length].tolist() == want and begins == starts


@settings(deadline=None)
@given(
    chunks=chunks_of_lengths,
    sizes=st.lists(st.tuples(st.integers(2, 40), st.integers(1, 25)), min_size=2, max_size=4).map(sorted),
)
def test_rows_that_get_longer_take_every_token_once_and_a_resume_finds_the_window(
    chunks: list[list[int]], sizes: list[tuple[int, int]]
) -> None:
    def packer_at(cursor: Cursor) -> BestFitPacker:
        return BestFitPacker(Windows(source, cursor, lambda length: 1 + length // 16, key=3, keep_size=True))

    source, seen = Chunks(chunks), Counter[int]()
    packer, first = packer_at(Cursor()), 0
    for size in (size for size, count in sizes for _ in range(count)):
        again = packer_at(replace(packer.cursor))
        row, other = np.full((2, size), -1, np.int64)
        length, starts = packer.fill(row)
        assert again.fill(other) == (length, starts) and other.tolist() == row.tolist()
        assert again.cursor == packer.cursor and length <= packer.cursor.token <= size
        seen.update(row[:length].tolist())
        if packer.cursor.part == 1:  # a window begins with rows of its time, and all before it is used up
            assert packer.cursor.token == size
            first = packer.cursor.chunk
    assert all(times == 1 for times in seen.values())
    longer = {
        int(token) for chunk in range(first) for text in source.read(chunk) if len(text) > 1 for token in text
    }
    # what is cut off a document may be one token, which predicts nothing
    assert all(token - 1 in seen and token + 1 not in longer for token in longer - set(seen))


@given(lengths=st.lists(st.integers(1, 30), max_size=40))
def test_best_fit_is_best_fit_decreasing(lengths: list[int]) -> None:
    """Against the plain definition, which looks at every sequence."""
    size = 30
    plain: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        rooms = [(size - sum(sequence), number) for number, sequence in enumerate(plain)]
        fitting = [(room, number) for room, number in rooms if room >= length]
        if fitting:
            plain[min(fitting)[1]].append(length)
        else:
            plain.append([length])
    got = best_fit([np.zeros(length) for length in lengths], size)
    assert [[len(piece) for piece in sequence] for sequence in got] == plain
    fills = [sum(map(len, sequence)) for sequence in got]
    assert sum(2 * fill <= size for fill in fills) <= 1, "two that are half empty would have been one"


@pytest.mark.parametrize("window", [1, 3])
def test_documents_that_give_nothing_are_an_error_not_an_endless_search(window: int) -> None:
    packer = BestFitPacker(Windows(Chunks([[1, 1], [], [1]]), Cursor(), lambda _: window, key=3))
    with pytest.raises(DataError, match=r"a whole pass over the data gave nothing to train on"):
        packer.fill(np.empty(8, np.int64))
    with pytest.raises(DataError, match=r"a whole pass over the data gave nothing to train on"):
        SplitPacker(Chunks([[], []]), Cursor()).fill(np.empty(8, np.int64))
    late = SplitPacker(Chunks([[], [], [9]]), Cursor())
    for _ in range(20):
        late.fill(np.empty(8, np.int64))


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("workers", [0, 2])
def test_starts_are_where_documents_begin(packing: str, workers: int, text_shards: Path, model: Path) -> None:
    """With our tokenizer every document begins with its own piece, so the text tells."""
    stream = open_stream(
        [text_shards / "train"],
        model,
        packing=packing,
        sequence_length=LENGTH,
        global_batch=8,
        seed=1,
        workers=workers,
    )
    bos, pieces = Tokenizer(model).bos, 0
    for _ in range(12):
        batch = stream.next_batch()
        assert batch.starts.shape == (8, LENGTH) and batch.starts.dtype == np.bool_
        inputs = batch.tokens[:, :-1]
        if packing == "split":
            assert (batch.starts == (inputs == bos)).all() and batch.weights.all()
        else:
            assert batch.starts[:, 0].all() and batch.starts[inputs == bos].all()
            full = batch.weights.sum(axis=1)
            padded = batch.tokens[:, 1:] == Tokenizer(model).pad
            assert (padded[batch.weights == 0]).all() and not padded[batch.weights == 1].any()
            pieces += int((full < LENGTH).sum())
    assert packing == "split" or pieces
    stream.close()


@pytest.mark.parametrize(("readers", "workers"), [(2, 0), (3, 1), (5, 0)])
def test_best_fit_resumes_for_any_readers(readers: int, workers: int, text_shards: Path, model: Path) -> None:
    arguments = {"packing": "best_fit", "sequence_length": LENGTH, "global_batch": 6, "seed": 1}
    whole = open_stream([text_shards / "train"], model, **arguments)
    expected = [whole.next_batch() for _ in range(14)]
    stream = open_stream([text_shards / "train"], model, workers=1, **arguments)
    for want in expected[:7]:
        assert (stream.next_batch().tokens == want.tokens).all()
    state = stream.state()
    stream.close()
    streams = [
        open_stream(
            [text_shards / "train"],
            model,
            reader=reader,
            num_readers=readers,
            workers=workers,
            state=state,
            **arguments,
        )
        for reader in range(readers)
    ]
    for want in expected[7:]:
        rows = {
            int(number): (batch.tokens[row].tolist(), batch.weights[row].tolist())
            for batch in [stream.next_batch() for stream in streams]
            for row, number in enumerate(batch.ids)
            if number >= 0
        }
        assert [rows[int(number)] for number in want.ids] == list(
            zip(want.tokens.tolist(), want.weights.tolist(), strict=True)
        )
    assert merge_states([stream.state() for stream in streams])["packing"] == "best_fit"
    for stream in streams:
        stream.close()


def test_best_fit_wastes_little_of_real_text(text_shards: Path, model: Path) -> None:
    stream = open_stream(
        [text_shards / "train"], model, packing="best_fit", sequence_length=LENGTH, global_batch=16, seed=1
    )
    weights = np.concatenate([stream.next_batch().weights for _ in range(100)])
    shards = open_shard_set(text_shards / "train")
    window = window_chunks(shards.text_bytes / USUAL_TOKEN_BYTES / shards.num_chunks, LENGTH)
    assert window > 1 and weights.mean() > 0.95
