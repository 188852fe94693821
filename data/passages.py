"""Make sequences of parts of documents: sentence pairs, passages, and pairs of texts.

A row of these packings holds its parts one after another, with no specials; ``starts`` tells where each begins:

packing      pieces of a row
pairs        a token that is 0 where the second part follows the first in its document and 1 where it comes from
             another (the labels of Hugging Face's BertForPreTraining), the first part, the second
passages     a passage
neighbours   a passage, and the one that follows it in its document
given        the two texts of a document, which U+001F divides

One place of a row stays empty, so that the last piece begins before the row's last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .errors import DataConfigError
from .order import hash_integers
from .packing import BestFitPacker, WindowPacker, Windows
from .tasks.sample_random import SampleRandom
from .tasks.sentences import Document, sentence_pairs
from .tasks.vocabulary import sentence_ends, split_sentences, word_starts
from .tokenizer import Tokenizer

WINDOW_PACKINGS = ("best_fit", "pairs", "passages", "neighbours", "given")
TEXT_SEPARATOR = "\x1f"
IS_NEXT, IS_RANDOM = 0, 1
NUM_OTHERS = 16  # documents, the next ones in a shuffled order, from which a random second part comes
LOOK_AHEAD_CHUNKS = 64  # in which some document must have two sentences
EXCERPT_CHARS = 40


class SentenceCutter:
    """Cut documents into sentences by a tokenizer's pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Keep the tokenizer; its tables are made on first use."""
        self._tokenizer = tokenizer

    def text(self, tokens: np.ndarray) -> np.ndarray:
        """Return a document's tokens without its frame."""
        begin = int(len(tokens) > 0 and tokens[0] == self._tokenizer.bos)
        end = len(tokens) - int(len(tokens) > begin and tokens[-1] == self._tokenizer.eos)
        return tokens[begin:end]

    def cut(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Return the sentences of a framed document, none of them empty."""
        text = self.text(tokens)
        return split_sentences(text, *self._tables) if len(text) else []

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._tokenizer.pieces()
        return word_starts(pieces), sentence_ends(pieces)


class SentencePacker(WindowPacker):
    """A window packer that cuts documents into sentences."""

    def __init__(self, windows: Windows, sentences: SentenceCutter) -> None:
        """See WindowPacker."""
        super().__init__(windows)
        self._sentences = sentences


class PairPacker(SentencePacker):
    """Make the pairs of next-sentence prediction: see tasks.sentences.sentence_pairs."""

    nothing = "no document has a sentence"

    def __init__(self, windows: Windows, sentences: SentenceCutter, short_fraction: float) -> None:
        """See WindowPacker; ``short_fraction`` of the pairs aim at a shorter length."""
        super().__init__(windows, sentences)
        self._short_fraction = short_fraction

    def pack_window(self, size: int) -> list[list[np.ndarray]]:
        chunks = self._expect_window(size)
        rows = [
            (chunk, number, document)
            for chunk in chunks
            for number, document in enumerate(self._read(chunk))
            if document
        ]
        documents = [document for _, _, document in rows]
        room = size - 2  # but for the label, and the place that stays empty
        documents += self._look_ahead(documents, chunks.stop, room)
        # where a window holds several epochs of a chunk a document comes more than once: it is no other to itself
        contents = [np.concatenate(document).tobytes() for document in documents]
        sequences = []
        for place, (chunk, number, document) in enumerate(rows):
            others = _others(documents, contents, place)
            random = SampleRandom(hash_integers(self._windows.key, chunk), number)
            pairs = sentence_pairs(
                document, others, random, max_tokens=room, short_fraction=self._short_fraction
            )
            for pair in pairs:
                label = np.array([IS_NEXT if pair.is_next else IS_RANDOM], np.int32)
                sequences.append([label, pair.first, pair.second])
        return sequences

    def _read(self, chunk: int) -> list[Document]:
        return [self._sentences.cut(self._source.tokenize(text)) for text in self._source.read(chunk)]

    def _look_ahead(self, documents: Sequence[Document], chunk: int, room: int) -> list[Document]:
        """Return what follows the window, from ``chunk`` on, as far as it takes to have what pairs need.

        That is a second document, to draw from, and one that gives a second part which follows, as a sign that there
        are such at all: a sentence that fills the room of ``room`` tokens alone is a first part without one.
        """
        found: list[Document] = []
        end = chunk + min(self._source.num_chunks, LOOK_AHEAD_CHUNKS)
        while documents:
            have = [*documents, *found]
            several = any(not _same(document, have[0]) for document in have[1:])
            if several and any(len(sentence) < room for document in have for sentence in document[:-1]):
                break
            if chunk == end:
                following = f"a document of two sentences, the first of less than {room} tokens"
                what = following if several else "a second document"
                raise DataConfigError(
                    f"sentence pairs need {what}, and a whole pass over the data, or {LOOK_AHEAD_CHUNKS} chunks of it, "
                    "had none; sentences end at a full stop or a newline: give such text, longer sequences, or set "
                    "task.next_sentence = false"
                )
            found += [document for document in self._read(chunk) if document]
            chunk += 1
        return found


class PassagePacker(SentencePacker):
    """Cut documents into passages of whole sentences."""

    nothing = "no document has text"
    together = 1  # passages of a row

    def pack_window(self, size: int) -> list[list[np.ndarray]]:
        together, room = self.together, (size - 1) // self.together
        sequences = []
        for chunk in self._expect_window(size):
            for text in self._source.read(chunk):
                sentences = self._sentences.cut(self._source.tokenize(text))
                if len(sentences) < together:
                    continue
                passages = _passages(sentences, room)
                if len(passages) < together:
                    passages = _halves(sentences)
                sequences += [
                    passages[first : first + together]
                    for first in range(0, len(passages) - together + 1, together)
                ]
        return sequences


class NeighbourPacker(PassagePacker):
    """Put a passage and the next one of its document into a row.

    A document that is shorter than two passages is cut once, between the two sentences nearest to its middle. What is
    left over of an odd number of passages is not used, nor are documents of one sentence.
    """

    nothing = "no document has two sentences"
    together = 2


class GivenPacker(SentencePacker):
    """Take the two texts that U+001F divides a document into; what is too long of each is left out."""

    nothing = "it holds no documents"

    def pack_window(self, size: int) -> list[list[np.ndarray]]:
        room = (size - 1) // 2
        return [
            [text[:room] for text in self._texts(document)]
            for chunk in self._expect_window(size)
            for document in self._source.read(chunk)
        ]

    def _texts(self, document: str | np.ndarray) -> list[np.ndarray]:
        if not isinstance(document, str):
            raise DataConfigError(
                'task.pairs = "given" needs shards of text, and these hold tokens; prepare them without a tokenizer'
            )
        parts = document.split(TEXT_SEPARATOR)
        texts = [self._sentences.text(self._source.tokenize(part)) for part in parts]
        if len(texts) != 2 or not all(map(len, texts)):
            raise DataConfigError(
                f'task.pairs = "given" needs documents of two texts with U+001F between them; the one that begins with '
                f"{document[:EXCERPT_CHARS]!r} has {sum(len(text) > 0 for text in texts)} in {len(texts)} parts"
            )
        return texts


SENTENCE_PACKERS = {"passages": PassagePacker, "neighbours": NeighbourPacker, "given": GivenPacker}


def window_packer(
    packing: str, windows: Windows, *, sentences: SentenceCutter, short_fraction: float
) -> WindowPacker:
    """Return the packer that ``packing``, one of WINDOW_PACKINGS, names."""
    if packing == "best_fit":
        return BestFitPacker(windows)
    if packing == "pairs":
        return PairPacker(windows, sentences, short_fraction)
    return SENTENCE_PACKERS[packing](windows, sentences)


def _same(one: Document, other: Document) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


def _others(documents: Sequence[Document], contents: Sequence[bytes], place: int) -> list[Document]:
    """Return the next documents round the window that have another content."""
    found: list[Document] = []
    for step in range(1, len(documents)):
        other = (place + step) % len(documents)
        if contents[other] != contents[place]:
            found.append(documents[other])
            if len(found) == NUM_OTHERS:
                break
    return found


def _passages(sentences: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """Gather whole sentences into passages of at most ``room`` tokens; a longer sentence is cut."""
    passages: list[np.ndarray] = []
    gathered: list[np.ndarray] = []
    for sentence in sentences:
        for begin in range(0, len(sentence), room):
            part = sentence[begin : begin + room]
            if gathered and sum(map(len, gathered)) + len(part) > room:
                passages.append(np.concatenate(gathered))
                gathered = []
            gathered.append(part)
    return [*passages, np.concatenate(gathered)]


def _halves(sentences: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cut a document of two sentences or more once, as near to its middle as sentences allow."""
    ends = np.cumsum([len(sentence) for sentence in sentences])
    cut = 1 + int(np.argmin(np.abs(2 * ends[:-1] - ends[-1])))
    return [np.concatenate(sentences[:cut]), np.concatenate(sentences[cut:])]
