"""Describe and verify shard directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataConfigError, DataError
from .lanes import check_tokenizer
from .reading.reader import RangeReader
from .shards import ShardSet, open_filled_shard_set, open_shard_set
from .tokenizer import Tokenizer

EXCERPT_CHARS = 300
STATISTICS_CHUNKS = 64  # evenly spaced over the set
PERCENTILES = (10, 50, 90)


def inspect_directory(
    place: Path | str,
    tokenizer: Path | None = None,
    num_documents: int = 3,
    reader: RangeReader | None = None,
) -> dict[str, Any]:
    """Describe a shard directory, the lengths of its documents, and the beginning of the first ones.

    With a tokenizer, counts tokens too; token blocks cannot be shown without theirs. Lengths are those of the documents
    of some evenly spaced chunks.
    """
    shard_set = open_filled_shard_set(place, reader)
    encoder = None if tokenizer is None else Tokenizer(tokenizer)
    if encoder is not None and shard_set.holds_tokens:
        check_tokenizer(shard_set, encoder)
    return {
        "directory": shard_set.place_shown,
        "kind": shard_set.kind,
        "shards": len(shard_set.files),
        "chunks": shard_set.num_chunks,
        "documents": shard_set.num_documents,
        "bytes": shard_set.num_bytes,
        "bytes_text": shard_set.text_bytes,
        "tokens": shard_set.num_tokens,
        "tokenizer_sha256": shard_set.tokenizer_sha256,
        "fingerprint": shard_set.fingerprint,
        "lengths": _lengths(shard_set, encoder),
        "examples": _examples(shard_set, encoder, num_documents),
    }


def verify_directory(
    place: Path | str, reader: RangeReader | None = None, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Read every chunk and return those that are damaged: shard, offset, length and what is wrong.

    ``progress`` hears the chunks read and their number. Raises where the manifest itself is unusable.
    """
    shard_set = open_shard_set(place, reader, check_files=False)
    bad: list[dict[str, Any]] = []
    for chunk in range(shard_set.num_chunks):
        try:
            shard_set.read_documents(chunk)
        except DataConfigError:
            raise
        except DataError as error:
            shard, offset, length = (int(value) for value in shard_set.chunks[chunk, :3])
            where = {"shard": shard_set.files[shard], "offset": offset, "length": length}
            bad.append({**where, "problem": str(error)})
        if progress is not None:
            progress(chunk + 1, shard_set.num_chunks)
    return bad


def _lengths(shard_set: ShardSet, encoder: Tokenizer | None) -> dict[str, Any] | None:
    """Return statistics of the documents' lengths, in tokens where they are known, else in bytes of text."""
    if not shard_set.holds_text and not shard_set.holds_tokens:
        return None
    count = min(STATISTICS_CHUNKS, shard_set.num_chunks)
    chunks = np.unique(np.linspace(0, shard_set.num_chunks - 1, count).round().astype(int)).tolist()
    documents = [document for chunk in chunks for document in shard_set.read_documents(chunk)]
    in_tokens = shard_set.holds_tokens or encoder is not None
    sizes = [
        len(encoder.encode_document(document)) if encoder and isinstance(document, str) else _size(document)
        for document in documents
    ]
    found: dict[str, Any] = {
        "unit": "tokens" if in_tokens else "bytes of text",
        "documents": len(sizes),
        "mean": round(float(np.mean(sizes)), 1),
        **{f"p{rank}": int(np.percentile(sizes, rank)) for rank in PERCENTILES},
        "max": max(sizes),
    }
    if encoder is not None and shard_set.holds_text:
        text_bytes = sum(map(_size, documents))
        found["bytes_per_token"] = round(text_bytes / sum(sizes), 3)
        found["tokens_in_all"] = round(shard_set.text_bytes * sum(sizes) / text_bytes)
    return found


def _size(document: Any) -> int:
    return len(document.encode()) if isinstance(document, str) else len(document)


def _examples(shard_set: ShardSet, encoder: Tokenizer | None, num_documents: int) -> list[dict[str, Any]]:
    examples: list[dict[str, Any]] = []
    for chunk in range(shard_set.num_chunks):
        if len(examples) >= num_documents:
            break
        for document in shard_set.read_documents(chunk)[: num_documents - len(examples)]:
            tokens: int | None = None
            if isinstance(document, str):
                text: str | None = document
                tokens = None if encoder is None else len(encoder.encode_document(document))
            elif isinstance(document, dict):
                members = {
                    name: len(content) for name, content in document.items() if not name.startswith("__")
                }
                text = ", ".join(f".{name} ({size} bytes)" for name, size in members.items())
            else:
                text = None if encoder is None else encoder.decode(document)
                tokens = len(document)
            example = {"text": None if text is None else text[:EXCERPT_CHARS], "tokens": tokens}
            examples.append(example | {"bytes": None if text is None else len(text.encode())})
    return examples
