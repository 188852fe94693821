"""Index, describe and verify shard directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .documents import TOKENS_KIND
from .errors import DataConfigError, DataError
from .index import index_shard
from .lanes import check_tokenizer
from .prepare import DEFAULT_CHUNK_BYTES
from .shards import MANIFEST_NAME, open_filled_shard_set, open_shard_set, write_manifest
from .storage import storage_errors
from .tokenizer import Tokenizer

EXCERPT_CHARS = 300


def index_directory(
    path: Path, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Index the tar files of a directory, in the order of their names, and write its manifest.

    Token blocks do not tell their tokenizer: it is taken from ``tokenizer`` or from the manifest that is there.
    Returns a summary. Raises DataConfigError where there is nothing to index or the tokenizer is unknown,
    DataError for a shard that is damaged or not in the format.
    """
    if not path.is_dir():
        raise DataConfigError(f"{path} is no directory; give a directory of .tar files")
    shards = sorted(path.glob("*.tar"))
    if not shards:
        raise DataConfigError(f"{path} holds no .tar files; make shards with `prepare`")
    with storage_errors(f"indexing {path}"):
        indexes = [index_shard(shard, chunk_bytes) for shard in shards]
        sha256 = None
        if any(index.kind == TOKENS_KIND for index in indexes):
            sha256 = Tokenizer(tokenizer).sha256 if tokenizer else _known_tokenizer(path)
        manifest = write_manifest(path, indexes, tokenizer_sha256=sha256)
    return {
        "directory": str(path),
        "kind": manifest["kind"],
        "shards": len(shards),
        "chunks": sum(len(index.chunks) for index in indexes),
        "documents": manifest["documents"],
        "fingerprint": manifest["fingerprint"],
    }


def inspect_directory(path: Path, tokenizer: Path | None = None, num_documents: int = 3) -> dict[str, Any]:
    """Describe a shard directory and show the beginning of its first documents.

    With a tokenizer, counts these documents' tokens too; token blocks cannot be shown without theirs.
    """
    shard_set = open_filled_shard_set(path)
    encoder = None if tokenizer is None else Tokenizer(tokenizer)
    if encoder is not None:
        check_tokenizer(shard_set, encoder)
    examples: list[dict[str, Any]] = []
    for chunk in range(shard_set.num_chunks):
        for document in shard_set.read_documents(chunk)[: num_documents - len(examples)]:
            if isinstance(document, str):
                text: str | None = document
                tokens = None if encoder is None else len(encoder.encode_document(document))
            else:
                text = None if encoder is None else encoder.decode(document)
                tokens = len(document)
            example = {"text": None if text is None else text[:EXCERPT_CHARS], "tokens": tokens}
            examples.append(example | {"bytes": None if text is None else len(text.encode())})
        if len(examples) >= num_documents:
            break
    return {
        "directory": str(path),
        "kind": shard_set.kind,
        "shards": len(shard_set.files),
        "chunks": shard_set.num_chunks,
        "documents": shard_set.num_documents,
        "bytes_text": shard_set.text_bytes,
        "tokens": shard_set.num_tokens,
        "tokenizer_sha256": shard_set.tokenizer_sha256,
        "fingerprint": shard_set.fingerprint,
        "examples": examples,
    }


def verify_directory(path: Path) -> list[dict[str, Any]]:
    """Read every chunk and return those that are damaged: shard, offset, length and what is wrong.

    Raises where the manifest itself is unusable or a shard is missing or cut; see ``open_shard_set``.
    """
    shard_set = open_shard_set(path)
    bad: list[dict[str, Any]] = []
    for chunk in range(shard_set.num_chunks):
        try:
            shard_set.read_documents(chunk)
        except DataError as error:
            shard, offset, length = (int(value) for value in shard_set.chunks[chunk, :3])
            place = {"shard": shard_set.files[shard], "offset": offset, "length": length}
            bad.append({**place, "problem": str(error)})
    return bad


def _known_tokenizer(path: Path) -> str:
    try:
        sha256 = json.loads((path / MANIFEST_NAME).read_bytes())["tokenizer_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        sha256 = None
    if not isinstance(sha256, str):
        raise DataConfigError(
            f"{path} holds token blocks of an unknown tokenizer; say which: --tokenizer MODEL"
        )
    return sha256
