"""Encode and decode with SentencePiece, Hugging Face's `tokenizers` or tiktoken, all in one form.

Special tokens that stand in a text are text: they are never taken for the special itself. No code that comes with a
tokenizer is run, and nothing is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import sentencepiece

from .byte_level import read_spelling
from .errors import DataConfigError, DataError
from .tiktoken_ranks import MAX_VOCABULARY, parse_ranks
from .tokenizer_files import HUGGINGFACE, SENTENCEPIECE, TokenizerFile

META_SPACE = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
EXCERPT_CHARS = 40


class Engine(Protocol):
    """Encode and decode; ids that a tokenizer does not have are -1."""

    vocab_size: int
    bos: int
    eos: int
    unk: int
    pad: int

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, with no specials. Raises DataError where the tokenizer fails on it."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens; specials give nothing."""

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token stands for; specials and ids that are not used have none."""

    def token_id(self, piece: str) -> int:
        """Return the id of a piece as the vocabulary spells it, or -1."""


def open_engine(file: TokenizerFile) -> Engine:
    """Load a tokenizer. Raises DataConfigError where it is damaged, or its package is missing."""
    if file.kind == SENTENCEPIECE:
        return SentencePieceEngine(file)
    return HuggingFaceEngine(file) if file.kind == HUGGINGFACE else TiktokenEngine(file)


class SentencePieceEngine:
    """Encode with a SentencePiece model."""

    def __init__(self, file: TokenizerFile) -> None:
        """Load the model."""
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(file.content)
            self._model.id_to_piece(list(range(self._model.vocab_size())))  # all must be UTF-8
        except (RuntimeError, UnicodeDecodeError) as error:  # the second where a message quotes what is none
            raise DataConfigError(
                f"tokenizer {file.path} is no SentencePiece model; give a .model file, a tokenizer.json or a "
                ".tiktoken file"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        self.unk: int = self._model.unk_id()
        self.pad: int = self._model.pad_id()

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, with no specials."""
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens; specials give nothing."""
        return self._model.decode(ids)

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token stands for."""
        return [self._piece(token) for token in range(self.vocab_size)]

    def token_id(self, piece: str) -> int:
        """Return the id of a piece, or -1."""
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else -1

    def _piece(self, token: int) -> bytes:
        model = self._model
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return b""
        piece = model.id_to_piece(token)
        return bytes.fromhex(piece[3:5]) if model.is_byte(token) else piece.replace(META_SPACE, " ").encode()


class HuggingFaceEngine:
    """Encode with a tokenizer.json."""

    def __init__(self, file: TokenizerFile) -> None:
        """Load the definition."""
        try:
            import tokenizers
        except ImportError as error:
            raise DataConfigError(
                f"tokenizer {file.path} needs the package tokenizers; pip install 'basestone[hf]'"
            ) from error
        try:
            self._fast = tokenizers.Tokenizer.from_str(file.content.decode())
        except BaseException as error:  # the library raises bare Exceptions, and panics
            if not _is_failure(error):
                raise
            raise DataConfigError(
                f"tokenizer {file.path} is no tokenizer.json that this version of tokenizers reads: {error}"
            ) from error
        self._fast.no_truncation()  # a file may ask for it
        self._fast.no_padding()
        self._fast.encode_special_tokens = True  # in a text they are text
        self._definition = json.loads(file.content)
        self._vocabulary: dict[str, int] = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MAX_VOCABULARY:
            raise DataConfigError(
                f"tokenizer {file.path} has ids up to {self.vocab_size - 1}; a vocabulary has 1 to "
                f"{MAX_VOCABULARY:,}; the file is damaged or no tokenizer"
            )
        added = self._fast.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._special = {token for token, entry in added.items() if entry.special}
        self.bos, self.eos, self.pad = (
            _special_id(file, name, self._vocabulary, self._special) for name in ("bos", "eos", "pad")
        )
        model = self._definition["model"]
        unknown = file.settings.get("unk", model.get("unk_token"))
        self.unk = self._vocabulary.get(unknown, -1) if unknown else _or_none(model.get("unk_id"))
        self._silent = self._special | {self.bos, self.eos, self.pad}

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, with no specials."""
        with _tokenising(text, "tokenizers"):
            return self._fast.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens; specials give nothing."""
        return self._fast.decode([token for token in ids if token not in self._silent])

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token stands for."""
        parts = (self._definition.get(name) for name in ("pre_tokenizer", "decoder"))
        kinds = {node["type"]: node for part in parts for node in _components(part)}
        spelled = [b""] * self.vocab_size
        for piece, token in self._vocabulary.items():
            if token in self._special:
                continue
            spelled[token] = piece.encode() if token in self._added else self._piece(piece, kinds)
        return spelled

    def token_id(self, piece: str) -> int:
        """Return the id of a piece, or -1."""
        return self._vocabulary.get(piece, -1)

    def _piece(self, piece: str, kinds: dict[str, Any]) -> bytes:
        if "ByteLevel" in kinds:
            try:
                return read_spelling(piece)
            except KeyError:  # the decoder takes a piece that spells no bytes as it is
                return piece.encode()
        if "WordPiece" in kinds:
            prefix = kinds["WordPiece"]["prefix"]
            return piece.removeprefix(prefix).encode() if piece.startswith(prefix) else f" {piece}".encode()
        if "ByteFallback" in kinds and (byte := BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return piece.replace(META_SPACE, " ").encode()


class TiktokenEngine:
    """Encode with a file of ranks."""

    def __init__(self, file: TokenizerFile) -> None:
        """Load the ranks."""
        try:
            import tiktoken
        except ImportError as error:
            raise DataConfigError(
                f"tokenizer {file.path} needs the package tiktoken; pip install 'basestone[tiktoken]'"
            ) from error
        self._ranks = parse_ranks(file.content, file.path)
        self._specials: dict[str, int] = file.settings["specials"]
        try:
            self._encoding = tiktoken.Encoding(
                file.path.stem,
                pat_str=file.settings["pattern"],
                mergeable_ranks=self._ranks,
                special_tokens=self._specials,
            )
        except ValueError as error:
            raise DataConfigError(f"tokenizer {file.path}: its pattern is none: {error}") from error
        self.vocab_size = max([*self._ranks.values(), *self._specials.values()]) + 1
        special = set(self._specials.values())
        self.bos, self.eos, self.pad = (
            _special_id(file, name, self._specials, special) for name in ("bos", "eos", "pad")
        )
        self.unk = -1  # every byte has a token
        self._silent = special

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, with no specials."""
        with _tokenising(text, "tiktoken"):
            return self._encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens; specials give nothing."""
        return self._encoding.decode([token for token in ids if token not in self._silent])

    def pieces(self) -> list[bytes]:
        """Return the bytes that each token stands for."""
        spelled = [b""] * self.vocab_size
        for token, rank in self._ranks.items():
            spelled[rank] = token
        return spelled

    def token_id(self, piece: str) -> int:
        """Return the id of a special or of a text that is one token, or -1."""
        return self._specials.get(piece, self._ranks.get(piece.encode(), -1))


def _special_id(file: TokenizerFile, name: str, ids: dict[str, int], special: set[int]) -> int:
    """Return the id of bos, eos or pad, or -1 where none is named."""
    piece = file.settings.get(name)
    if piece is None:
        return -1
    if ids.get(piece) not in special:
        known = [text for text, number in ids.items() if number in special]
        raise DataConfigError(
            f"tokenizer {file.path}: {name} is {piece!r}, which is none of its special tokens "
            f"({', '.join(sorted(known)[:12]) or 'it has none'}); name one in {file.path.name}.toml beside it"
        )
    return ids[piece]


def _or_none(token: int | None) -> int:
    return -1 if token is None else token


@contextmanager
def _tokenising(text: str, package: str) -> Iterator[None]:
    """Turn what a package fails with on a text into a DataError."""
    try:
        yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise DataError(
            f"a text of {len(text):,} characters that begins with {text[:EXCERPT_CHARS]!r} cannot be tokenised by "
            f"{package}: {str(error)[:200]}; drop the document or shorten its longest run of blanks or of one letter"
        ) from error


def _is_failure(error: BaseException) -> bool:
    """Tell a library's error from a request to end; Rust's panics are no Exceptions, and have no public class."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _components(node: Any) -> Iterator[dict[str, Any]]:
    """Give a component and all its parts, each with its type."""
    if isinstance(node, dict):
        if isinstance(node.get("type"), str):
            yield node
        parts: Sequence[Any] = list(node.values())
    else:
        parts = node if isinstance(node, list) else []
    for part in parts:
        yield from _components(part)
