"""Turn the bytes of a chunk into documents.

A chunk is a byte range of a tar file, cut at member headers: a valid tar stream of its own. webdataset
expands and groups it, in memory and after its checksum was compared, because tar readers end silently at a
damaged header.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from .errors import DataError

TEXT_KIND = "text"
TOKENS_KIND = "tokens"
TEXT_EXTENSION = "txt"
LENGTHS_EXTENSION = "len.u32"
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"tok.u16": np.dtype("<u2"), "tok.u32": np.dtype("<u4")}
LENGTHS_DTYPE = np.dtype("<u4")


def expand_samples(chunk: bytes, where: str) -> list[dict[str, Any]]:
    """Return the samples of a chunk: one dict for each, ``__key__`` and the members' bytes by extension.

    ``where`` names the place in error messages. Raises DataError for what is no tar, and for a member that
    occurs twice in its sample.
    """
    # Imported on use: webdataset imports torch where it finds it, which neither commands nor processes that
    # only clean and tokenise have a use for.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    try:
        return list(group_by_keys(tar_file_expander([{"url": where, "stream": io.BytesIO(chunk)}])))
    except Exception as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise DataError(f"{where} cannot be read as a tar stream: {reason}; write the shard anew") from error


def text_of_sample(sample: dict[str, Any], where: str) -> str:
    """Return the text of a ``.txt`` member. Raises DataError where it is missing or not UTF-8."""
    content = sample.get(TEXT_EXTENSION)
    if content is None:
        raise DataError(
            f"{where}: sample {sample['__key__']} has no .{TEXT_EXTENSION} member but "
            f"{_extensions(sample)}; a text shard holds one .{TEXT_EXTENSION} for each document"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: sample {sample['__key__']} is not UTF-8 ({error.reason} at byte {error.start}); "
            "pass the sources through `prepare`, which drops such documents"
        ) from error


def tokens_of_sample(sample: dict[str, Any], where: str) -> list[np.ndarray]:
    """Return the documents of a block member pair as token arrays, each framed by its specials."""
    extension = next((name for name in TOKEN_DTYPES if name in sample), None)
    if extension is None or LENGTHS_EXTENSION not in sample:
        raise DataError(
            f"{where}: sample {sample['__key__']} holds {_extensions(sample)}; a token block holds "
            f"tok.u16 or tok.u32, and {LENGTHS_EXTENSION}"
        )
    dtype = TOKEN_DTYPES[extension]
    content, lengths_content = sample[extension], sample[LENGTHS_EXTENSION]
    if len(content) % dtype.itemsize or len(lengths_content) % LENGTHS_DTYPE.itemsize:
        raise DataError(f"{where}: block {sample['__key__']} ends inside a number; write the shard anew")
    tokens = np.frombuffer(content, dtype)
    lengths = np.frombuffer(lengths_content, LENGTHS_DTYPE).astype(np.int64)
    if int(lengths.sum()) != len(tokens) or (lengths < 1).any():
        raise DataError(
            f"{where}: block {sample['__key__']} holds {len(tokens)} tokens but its lengths add up to "
            f"{int(lengths.sum())}; write the shard anew"
        )
    return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


def read_texts(chunk: bytes, where: str) -> list[str]:
    """Return the documents of a chunk of text, in file order."""
    return [text_of_sample(sample, where) for sample in expand_samples(chunk, where)]


def read_token_documents(chunk: bytes, where: str) -> list[np.ndarray]:
    """Return the documents of a chunk of token blocks, in file order."""
    samples = expand_samples(chunk, where)
    return [tokens for sample in samples for tokens in tokens_of_sample(sample, where)]


def kind_of_sample(sample: dict[str, Any], where: str) -> str:
    """Tell from a sample's members whether a shard holds text or token blocks."""
    if TEXT_EXTENSION in sample:
        return TEXT_KIND
    if any(name in sample for name in TOKEN_DTYPES):
        return TOKENS_KIND
    raise DataError(
        f"{where}: sample {sample['__key__']} holds {_extensions(sample)}; expected a .txt member (text) or "
        "tok.u16|tok.u32 with len.u32 (token blocks)"
    )


def _extensions(sample: dict[str, Any]) -> str:
    return ", ".join(f".{name}" for name in sorted(sample) if not name.startswith("__")) or "nothing"
