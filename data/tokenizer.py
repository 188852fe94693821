"""Tokenise text, and train a SentencePiece tokenizer.

The settings of training are those that convert exactly to Hugging Face's `tokenizers`
(see hf_tokenizer.py): BPE with byte fallback, no normalisation, no blank put before the text. Newlines and
tabs are user-defined symbols, because SentencePiece takes its training text line by line and would
spend a byte-fallback piece on each of them.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from .cleaning import decode_text
from .errors import DataConfigError
from .storage import storage_errors, write_atomic
from .tokenizer_engines import open_engine
from .tokenizer_files import SENTENCEPIECE, read_tokenizer_file

DEFAULT_SYMBOLS = ("\n", "\n\n", "\n\n\n", "\t", "\t\t", "\t\t\t", "\t\t\t\t")
LINE_BYTES = 4096  # SentencePiece skips training lines longer than this
PRINTABLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))
BUILT_IN_PIECES = frozenset([*PRINTABLE_ASCII, *(f"<0x{byte:02X}>" for byte in range(256))])


class Tokenizer:
    """Tokenise with a SentencePiece model, a Hugging Face tokenizer.json or a tiktoken file (tokenizer_files.py).

    ``sha256`` covers everything that decides ids; it goes into fingerprints. It is that of a SentencePiece model's
    file. ``content`` is all of it as one file, which ``Tokenizer`` reads again. ``unk`` is -1 where there is none.
    """

    def __init__(self, path: Path) -> None:
        """Load a tokenizer. Raises DataConfigError where it is missing, damaged, or lacks bos or eos."""
        file = read_tokenizer_file(path)
        self._engine = open_engine(file)
        self.path = path
        self.kind = file.kind
        self.content = file.whole()
        self.sha256 = hashlib.sha256(file.deciding()).hexdigest()
        self.vocab_size: int = self._engine.vocab_size
        self.bos: int = self._engine.bos
        self.eos: int = self._engine.eos
        self.unk: int = self._engine.unk
        if self.bos < 0 or self.eos < 0:
            name, end = ("bos", "beginning") if self.bos < 0 else ("eos", "end")
            remedy = (
                "train it with bos and eos pieces"
                if file.kind == SENTENCEPIECE
                else f'name a special token, {name} = "...", in {file.path.name}.toml beside it; one may serve as both'
            )
            raise DataConfigError(f"tokenizer {path} has no piece for the {end} of a document; {remedy}")
        # models of other origins often have no pad piece; weights of 0 make the filler's value immaterial
        self.pad: int = self._engine.pad if self._engine.pad >= 0 else self.eos

    def encode(self, text: str) -> np.ndarray:
        """Return a text's tokens, int32 [num_tokens], with no specials."""
        return np.array(self._engine.encode(text), np.int32)

    def encode_document(self, text: str) -> np.ndarray:
        """Return a document's tokens framed as in training: bos, text, eos; int32 [num_tokens + 2]."""
        return np.array([self.bos, *self._engine.encode(text), self.eos], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens; bos, eos and pad give nothing."""
        return self._engine.decode([int(token) for token in ids])

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token stands for, the blank before a word included; specials have none."""
        return self._engine.pieces()

    def token_id(self, piece: str) -> int:
        """Return the id of a piece as the vocabulary spells it. Raises DataConfigError where there is none."""
        found = self._engine.token_id(piece)
        if found < 0:
            raise DataConfigError(
                f"tokenizer {self.path} has no piece {piece!r}; train one with `tokenizer train --special '{piece}'`"
            )
        return found


@dataclass(frozen=True)
class TokenizerReport:
    """Tell what a tokenizer was trained on."""

    path: Path
    sha256: str
    vocab_size: int
    num_documents: int
    sample_bytes: int


def train_tokenizer(
    texts: Iterator[str],
    out: Path,
    *,
    vocab_size: int,
    seed_sentences_bytes: int = 32 << 20,
    user_symbols: tuple[str, ...] = (),
    specials: tuple[str, ...] = (),
    split_digits: bool = True,
) -> TokenizerReport:
    """Train a BPE model and write it to ``out``.

    Where the texts are larger than ``seed_sentences_bytes``, trains on a sample of whole documents chosen by
    their hash, so that it depends on neither chance nor order. ``user_symbols`` are added to the runs of
    newlines and tabs: each is one token wherever it stands in a text. ``specials`` are tokens that no text gives,
    as masks and sentinels are; their ids begin at 4, in this order. Neither may hold a blank. The ids of unk, bos,
    eos and pad are 0, 1, 2 and 3. ``split_digits`` makes every digit a token.

    Raises DataConfigError for an unusable vocabulary size or symbol and for texts that hold nothing.
    """
    _check_symbols(user_symbols, specials)
    sample = _sample_texts(texts, seed_sentences_bytes)
    if not sample:
        raise DataConfigError("no text to train a tokenizer on; check that the sources hold documents")
    symbols = list(dict.fromkeys(DEFAULT_SYMBOLS + user_symbols))
    content = _train_bpe(
        sample,
        vocab_size,
        user_defined_symbols=symbols,
        control_symbols=list(specials),
        split_digits=split_digits,
    )
    with storage_errors(f"writing the tokenizer {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, content)
    trained = Tokenizer(out)
    return TokenizerReport(
        path=out,
        sha256=trained.sha256,
        vocab_size=trained.vocab_size,
        num_documents=len(sample),
        sample_bytes=sum(len(text.encode()) for text in sample),
    )


def _check_symbols(user_symbols: tuple[str, ...], specials: tuple[str, ...]) -> None:
    for symbol in (*user_symbols, *specials):
        if not symbol or " " in symbol or "\u2581" in symbol:
            raise DataConfigError(
                f"user symbol {symbol!r} is empty or holds a blank; such symbols have no exact Hugging Face form"
            )
        if decode_text(symbol) is None or "\0" in symbol:
            raise DataConfigError(f"symbol {symbol!r} is not UTF-8 or holds a NUL; give it as text of letters")
        if symbol in BUILT_IN_PIECES:
            raise DataConfigError(
                f"symbol {symbol!r} is a piece of every tokenizer already, as all bytes and ASCII characters are; "
                "leave it out"
            )
    standard = ("<unk>", "<s>", "</s>", "<pad>")
    taken = [piece for piece in (*user_symbols, *specials) if piece in standard]
    taken += [
        piece
        for place, piece in enumerate(specials)
        if piece in (*DEFAULT_SYMBOLS, *user_symbols, *specials[:place])
    ]
    if taken:
        raise DataConfigError(
            f"symbols {', '.join(map(repr, taken))} are taken; give each once, as ordinary or as special, and none of "
            f"{' '.join(standard)}"
        )


def _train_bpe(sample: list[str], vocab_size: int, **settings: Any) -> bytes:
    """Return the bytes of a trained model file."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=False,
            byte_fallback=True,
            character_coverage=0.9999,
            required_chars=PRINTABLE_ASCII,
            max_sentence_length=4 * LINE_BYTES,
            num_threads=1,  # the number is written into the model file
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip() or str(error)
        raise DataConfigError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on {sum(map(len, sample))} characters: {reason}"
        ) from error
    return model.getvalue()


def _sample_texts(texts: Iterator[str], limit_bytes: int) -> list[str]:
    """Keep the documents with the smallest hashes, up to a number of bytes, in the order of their hashes."""
    kept: list[tuple[int, str]] = []
    kept_bytes, bound = 0, 1 << 64
    for text in texts:
        content = text.encode()
        digest = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
        if digest >= bound:
            continue
        heapq.heappush(kept, (-digest, text))
        kept_bytes += len(content)
        while kept_bytes > limit_bytes and len(kept) > 1:
            largest, dropped = heapq.heappop(kept)
            kept_bytes -= len(dropped.encode())
            bound = -largest  # what hashes higher must not take its room, or the order of reading would count
    return [text for _, text in sorted(kept, key=lambda item: (-item[0], item[1]))]


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into lines short enough for the trainer."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LINE_BYTES):
                yield line[start : start + LINE_BYTES]
