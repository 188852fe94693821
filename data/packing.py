"""Pack documents into sequences: end to end and cut anywhere, or whole where they fit best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .errors import DataError
from .order import hash_integers, permute_all
from .parts import DocumentPart

CURSOR_COLUMNS = 3
WINDOW_SEQUENCES = 64  # fewer leave more filler at a window's end, more take longer to resume


@dataclass
class Cursor:
    """Hold the place of a lane in a source: chunks finished, and the place within the present ones.

    Where documents are laid end to end that is the part (see parts.py) in the chunk's order, and the token within
    it; in other packings the sequence of the window, and 0, or, where rows may get longer, the tokens that the window's
    sequences are made for.
    """

    chunk: int = 0
    part: int = 0
    token: int = 0


class Documents(Protocol):
    """The documents of one lane of one source, which has ``num_chunks`` chunks for all lanes."""

    num_chunks: int

    def read(self, chunk: int) -> Sequence[str] | Sequence[np.ndarray]:
        """Return the documents of the lane's chunk with this number, in training order."""
        ...

    def expect(self, chunk: int) -> None:
        """Begin to read a chunk that will be asked for."""
        ...

    def cut(self, document: str | np.ndarray) -> Sequence[DocumentPart | np.ndarray]:
        """Return the parts of a document that are tokenised one by one."""
        ...

    def tokenize(self, part: DocumentPart | str | np.ndarray) -> np.ndarray:
        """Return the tokens of a part, or the framed tokens of a whole document."""
        ...


class Packer(Protocol):
    """Make one sequence after another out of a lane's documents."""

    cursor: Cursor

    def fill(self, row: np.ndarray) -> tuple[int, list[int]]:
        """Write the next sequence into ``row`` (integers [sequence_length + 1]) and move the cursor.

        Returns how many tokens it holds, the rest of the row being left as it is, and where in it documents begin.
        """
        ...


class SplitPacker:
    """Lay documents end to end and cut; each sequence shares one token with the next."""

    def __init__(self, documents: Documents, cursor: Cursor) -> None:
        """Start at a cursor; nothing is read before the first sequence is asked for."""
        self._source = documents
        self.cursor = cursor
        self._open_chunk: int | None = None
        self._parts: list[DocumentPart | np.ndarray] = []
        self._open_part: tuple[int, int] | None = None
        self._tokens: np.ndarray = np.zeros(0, np.int32)

    def fill(self, row: np.ndarray) -> tuple[int, list[int]]:
        """See Packer; the row is always full."""
        filled, cursor = 0, self.cursor
        starts: list[int] = []
        size = len(row)
        while True:
            tokens = self._current_part()
            if cursor.token == 0 and self._begins_document():
                starts.append(filled)
            count = min(size - filled, len(tokens) - cursor.token)
            row[filled : filled + count] = tokens[cursor.token : cursor.token + count]
            filled += count
            cursor.token += count
            if filled == size:
                cursor.token -= 1  # the last token is only a target here, and the next sequence's first input
                return filled, starts

    def _begins_document(self) -> bool:
        part = self._parts[self.cursor.part]
        return part.first if isinstance(part, DocumentPart) else True

    def _current_part(self) -> np.ndarray:
        """Return the tokens of the part under the cursor, moving past what is used up."""
        cursor, first_chunk = self.cursor, self.cursor.chunk
        while True:
            if self._open_chunk != cursor.chunk:
                _check_progress(cursor.chunk - first_chunk, self._source)
                documents = self._source.read(cursor.chunk)
                self._parts = [part for document in documents for part in self._source.cut(document)]
                self._open_chunk = cursor.chunk
                self._source.expect(cursor.chunk + 1)
            if cursor.part >= len(self._parts):
                cursor.chunk, cursor.part, cursor.token = cursor.chunk + 1, 0, 0
                continue
            if self._open_part != (cursor.chunk, cursor.part):
                self._tokens = self._source.tokenize(self._parts[cursor.part])
                self._open_part = (cursor.chunk, cursor.part)
            if cursor.token < len(self._tokens):
                return self._tokens
            cursor.part, cursor.token = cursor.part + 1, 0


@dataclass(frozen=True)
class Windows:
    """What a packer of windows makes sequences of, from a cursor on, whose chunk is the first of a window.

    ``chunks_for`` gives how many chunks a window has by the sequence length; ``key`` decides the order of a window's
    sequences, and what is drawn in making them. With ``keep_size`` rows may get longer: a window that was begun with
    shorter ones is handed out as it is, so that nothing of it is lost or comes twice.
    """

    documents: Documents
    cursor: Cursor
    chunks_for: Callable[[int], int]
    key: int
    keep_size: bool = False


class WindowPacker(ABC):
    """Make the sequences of a window of chunks at once, and hand them out in a shuffled order."""

    nothing = "no document of two tokens or more could be read"  # what a whole pass in vain means

    def __init__(self, windows: Windows) -> None:
        """Start at the cursor."""
        self._windows, self._source, self.cursor = windows, windows.documents, windows.cursor
        self._open_window: int | None = None
        self._sequences: list[list[np.ndarray]] = []

    def fill(self, row: np.ndarray) -> tuple[int, list[int]]:
        """See Packer; a sequence is written piece by piece, and each piece begins where ``starts`` says."""
        cursor, first_chunk = self.cursor, self.cursor.chunk
        while True:
            size = cursor.token or len(row)
            num_chunks = self._windows.chunks_for(size - 1)
            if self._open_window != cursor.chunk:
                _check_progress(cursor.chunk - first_chunk - num_chunks, self._source, self.nothing)
                sequences = self.pack_window(size)
                order = permute_all(len(sequences), hash_integers(self._windows.key, cursor.chunk))
                self._sequences = [sequences[number] for number in order]
                self._open_window = cursor.chunk
            if cursor.part < len(self._sequences):
                break
            cursor.chunk, cursor.part, cursor.token = cursor.chunk + num_chunks, 0, 0
        pieces = self._sequences[cursor.part]
        cursor.part, cursor.token = cursor.part + 1, size if self._windows.keep_size else 0
        filled, starts = 0, []
        for piece in pieces:
            starts.append(filled)
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled, starts

    @abstractmethod
    def pack_window(self, size: int) -> list[list[np.ndarray]]:
        """Return the sequences of the window that begins at the cursor, each in pieces of ``size`` tokens together."""

    def _expect_window(self, size: int) -> range:
        """Begin to read the chunks of a window of sequences of ``size`` tokens, and return their numbers."""
        chunks = range(self.cursor.chunk, self.cursor.chunk + self._windows.chunks_for(size - 1))
        for chunk in chunks:
            self._source.expect(chunk)
        return chunks


class BestFitPacker(WindowPacker):
    """Keep documents whole: put each into the sequence with the least room that still takes it.

    Best-fit decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling") over a window of chunks;
    only documents longer than a sequence are cut, and what is left of a sequence stays empty.
    """

    def pack_window(self, size: int) -> list[list[np.ndarray]]:
        pieces = [
            tokens[start : start + size]
            for chunk in self._expect_window(size)
            for tokens in map(self._source.tokenize, self._source.read(chunk))
            for start in range(0, len(tokens), size)
        ]
        # a piece of one token predicts nothing
        return best_fit([piece for piece in pieces if len(piece) > 1], size)


def _check_progress(num_chunks: int, source: Documents, nothing: str = WindowPacker.nothing) -> None:
    """Refuse to look for ever: after so many chunks of a lane it has seen each of them, and none gave a sequence."""
    if num_chunks > source.num_chunks:
        raise DataError(
            f"a whole pass over the data gave nothing to train on: {nothing}; look at the shards with "
            "`basestone data inspect`"
        )


def best_fit(pieces: Sequence[np.ndarray], size: int) -> list[list[np.ndarray]]:
    """Put pieces (each at most ``size`` long) into sequences of ``size``, in the order in which these are opened.

    The longest piece comes first, and equal ones in the order given: the result depends on the pieces alone.
    """
    sequences: list[list[np.ndarray]] = []
    rooms: list[tuple[int, int]] = []  # (tokens of room, sequence), sorted
    for piece in sorted(pieces, key=len, reverse=True):
        place = bisect_left(rooms, (len(piece), 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = size, len(sequences)
            sequences.append([])
        sequences[number].append(piece)
        if room > len(piece):
            left = (room - len(piece), number)
            rooms.insert(bisect_left(rooms, left), left)
    return sequences


def window_chunks(tokens_per_chunk: float, sequence_length: int) -> int:
    """Return how many chunks make a window of some ``WINDOW_SEQUENCES`` sequences."""
    return max(1, round(WINDOW_SEQUENCES * sequence_length / max(1.0, tokens_per_chunk)))
