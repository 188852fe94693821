"""Turn the bytes of a chunk into documents.

A chunk is a byte range of a tar file, cut at member headers: a valid tar stream of its own. webdataset
expands and groups it, in memory and after its checksum was compared, because tar readers end silently at a
damaged header.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np

from .cleaning import decode_text
from .errors import DataError

TEXT_KIND = "text"
TOKENS_KIND = "tokens"
MEGATRON_KIND = (
    "megatron"  # a Megatron .bin file: tokens alone, cut into documents by lengths kept beside the index
)
SAMPLES_KIND = "samples"  # samples of other members, such as images
TEXT_EXTENSION = "txt"
TEXT_EXTENSIONS = (TEXT_EXTENSION, "json")
MEDIA_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "png", "webp", "gif", "bmp", "ppm", "npy", "flac", "wav", "mp3", "mp4"}
)
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
    """Return the text of a ``.txt`` member, or the ``text`` of a ``.json`` member.

    Raises DataError where there is neither, or it is not UTF-8.
    """
    extension = next((name for name in TEXT_EXTENSIONS if name in sample), None)
    if extension is None:
        raise DataError(
            f"{where}: sample {sample['__key__']} has no .{TEXT_EXTENSION} member but "
            f"{_extensions(sample)}; a text shard holds one .{TEXT_EXTENSION} for each document"
        )
    try:
        content = sample[extension].decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: sample {sample['__key__']} is not UTF-8 ({error.reason} at byte {error.start}); "
            "pass the sources through `prepare`, which drops such documents"
        ) from error
    if extension == TEXT_EXTENSION:
        return content  # type: ignore[no-any-return]
    try:
        text = json.loads(content)["text"]
    except (ValueError, RecursionError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or decode_text(text) is None:
        raise DataError(
            f"{where}: sample {sample['__key__']} has a .json member without a string `text`; "
            "pass the sources through `prepare`, which drops such documents"
        )
    return text


def tokens_of_sample(sample: dict[str, Any], where: str) -> list[np.ndarray]:
    """Return the documents of a block member pair as token arrays, each framed by its specials.

    Without lengths the member is one document.
    """
    extension = next((name for name in TOKEN_DTYPES if name in sample), None)
    if extension is None:
        raise DataError(
            f"{where}: sample {sample['__key__']} holds {_extensions(sample)}; a token block holds "
            f"tok.u16 or tok.u32, and {LENGTHS_EXTENSION}"
        )
    dtype = TOKEN_DTYPES[extension]
    content = sample[extension]
    lengths_content = sample.get(
        LENGTHS_EXTENSION, np.array([len(content) // dtype.itemsize], LENGTHS_DTYPE).tobytes()
    )
    if len(content) % dtype.itemsize or len(lengths_content) % LENGTHS_DTYPE.itemsize:
        raise DataError(f"{where}: block {sample['__key__']} ends inside a number; write the shard anew")
    tokens = np.frombuffer(content, dtype)
    lengths = np.frombuffer(lengths_content, LENGTHS_DTYPE).astype(np.int64)
    if int(lengths.sum()) != len(tokens) or (lengths < 1).any():
        raise DataError(
            f"{where}: block {sample['__key__']} holds {len(tokens)} tokens but its lengths add up to "
            f"{int(lengths.sum())}; write the shard anew"
        )
    return split_documents(tokens, lengths)


def split_documents(tokens: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Cut tokens into documents of these lengths, which add up to them; the parts share the memory."""
    ends = np.cumsum(lengths).tolist()
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def documents_of_samples(kind: str, samples: list[dict[str, Any]], where: str) -> list[Any]:
    """Return the documents of a chunk's samples in file order: texts, token arrays, or the samples themselves."""
    if kind == TEXT_KIND:
        return [text_of_sample(sample, where) for sample in samples]
    if kind == TOKENS_KIND:
        return [tokens for sample in samples for tokens in tokens_of_sample(sample, where)]
    return samples


def kind_of_sample(sample: dict[str, Any]) -> str:
    """Tell from a sample's members whether a shard holds text, token blocks or something else."""
    if any(name in sample for name in TOKEN_DTYPES):
        return TOKENS_KIND
    others = {name for name in sample if not name.startswith("__")} - set(TEXT_EXTENSIONS)
    if TEXT_EXTENSION in sample or ("json" in sample and _holds_text(sample["json"])):
        return TEXT_KIND if not others & MEDIA_EXTENSIONS else SAMPLES_KIND
    return SAMPLES_KIND


def _holds_text(content: bytes) -> bool:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and isinstance(record.get("text"), str)


def _extensions(sample: dict[str, Any]) -> str:
    return ", ".join(f".{name}" for name in sorted(sample) if not name.startswith("__")) or "nothing"
