"""Tokenise text with SentencePiece, and train such a tokenizer.

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

from .errors import DataConfigError
from .storage import storage_errors, write_atomic

DEFAULT_SYMBOLS = ("\n", "\n\n", "\n\n\n", "\t", "\t\t", "\t\t\t", "\t\t\t\t")
LINE_BYTES = 4096  # SentencePiece skips training lines longer than this
PRINTABLE_ASCII = "".join(map(chr, range(0x21, 0x7F)))


class Tokenizer:
    """Tokenise with a SentencePiece model that has pieces for the beginning and the end of a document.

    ``sha256`` is that of the model file; it goes into fingerprints.
    """

    def __init__(self, path: Path) -> None:
        """Load a model. Raises DataConfigError where the file is missing, no model, or lacks bos or eos."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataConfigError(
                f"tokenizer {path} cannot be read ({error.strerror}); train one with `tokenizer train`"
            ) from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise DataConfigError(f"tokenizer {path} is no SentencePiece model; give a .model file") from error
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.unk: int = self._processor.unk_id()
        if self.bos < 0 or self.eos < 0:
            raise DataConfigError(
                f"tokenizer {path} has no piece for the {'beginning' if self.bos < 0 else 'end'} of a document; "
                "train it with bos and eos pieces"
            )
        # models of other origins often have no pad piece; weights of 0 make the filler's value immaterial
        self.pad: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos

    def encode(self, text: str) -> np.ndarray:
        """Return a text's tokens, int32 [num_tokens], with no specials."""
        return np.array(self._processor.encode(text), np.int32)

    def encode_document(self, text: str) -> np.ndarray:
        """Return a document's tokens framed as in training: bos, text, eos; int32 [num_tokens + 2]."""
        return np.array([self.bos, *self._processor.encode(text), self.eos], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens; bos, eos and pad give nothing."""
        return self._processor.decode([int(token) for token in ids])

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token stands for, the blank before a word included; specials have none."""
        return [self._piece(token) for token in range(self.vocab_size)]

    def _piece(self, token: int) -> bytes:
        model = self._processor
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return b""
        piece = model.id_to_piece(token)
        return bytes([int(piece[3:5], 16)]) if model.is_byte(token) else piece.replace("\u2581", " ").encode()


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
) -> TokenizerReport:
    """Train a BPE model and write it to ``out``.

    Where the texts are larger than ``seed_sentences_bytes``, trains on a sample of whole documents chosen by
    their hash, so that it depends on neither chance nor order. ``user_symbols`` are added to the runs of
    newlines and tabs; they may hold no blank. The ids of unk, bos, eos and pad are 0, 1, 2 and 3.

    Raises DataConfigError for an unusable vocabulary size or symbol and for texts that hold nothing.
    """
    for symbol in user_symbols:
        if not symbol or " " in symbol or "\u2581" in symbol:
            raise DataConfigError(
                f"user symbol {symbol!r} is empty or holds a blank; such symbols have no exact Hugging Face form"
            )
    sample = _sample_texts(texts, seed_sentences_bytes)
    if not sample:
        raise DataConfigError("no text to train a tokenizer on; check that the sources hold documents")
    content = _train_bpe(sample, vocab_size, tuple(dict.fromkeys(DEFAULT_SYMBOLS + user_symbols)))
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


def inspect_tokenizer(path: Path, texts: Iterable[str]) -> dict[str, Any]:
    """Measure a tokenizer on texts: size, specials, bytes per token, and texts that do not come back.

    SentencePiece stands a blank for the character U+2581, so a text that holds one does not come back.
    """
    tokenizer = Tokenizer(path)
    num_texts = num_bytes = num_tokens = num_unknown = 0
    failures: list[str] = []
    num_failures = 0
    for text in texts:
        ids = tokenizer.encode(text)
        num_texts += 1
        num_bytes += len(text.encode())
        num_tokens += len(ids)
        num_unknown += int((ids == tokenizer.unk).sum())
        if tokenizer.decode(ids) != text:
            num_failures += 1
            if len(failures) < 5:
                failures.append(text[:80])
    return {
        "path": str(path),
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "specials": {"unk": tokenizer.unk, "bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad},
        "texts": num_texts,
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": num_bytes / num_tokens if num_tokens else None,
        "unknown_tokens": num_unknown,
        "round_trip_failures": num_failures,
        "round_trip_examples": failures,
    }


def _train_bpe(sample: list[str], vocab_size: int, symbols: tuple[str, ...]) -> bytes:
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
            split_digits=True,
            character_coverage=0.9999,
            required_chars=PRINTABLE_ASCII,
            user_defined_symbols=list(symbols),
            max_sentence_length=4 * LINE_BYTES,
            num_threads=1,  # the number is written into the model file
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
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
