"""Read the index of a Megatron dataset (``PREFIX.bin`` and ``PREFIX.idx``), and cut it into chunks.

The layout is that of megatron.core.datasets.indexed_dataset, version 1: the magic, the version, the code of the
token type, the numbers of sequences and of document bounds, then sequence lengths (int32), byte offsets (int64)
and the bounds of documents in sequences (int64).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from .documents import LENGTHS_DTYPE, MEGATRON_KIND
from .errors import DataConfigError, DataError
from .index import ShardIndex
from .reading.reader import RangeReader
from .reading.transport import shown

BIN_SUFFIX, IDX_SUFFIX = ".bin", ".idx"
HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
TOKEN_TYPES = {1: "<u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def index_megatron(
    bin_place: str, reader: RangeReader, *, chunk_bytes: int, vocab_size: int | None
) -> tuple[ShardIndex, np.ndarray, str]:
    """Read a dataset once; return its chunks, the tokens of every document, and the token type.

    Raises DataConfigError where it is none that can be read, or holds tokens outside ``vocab_size``; DataError where
    the two files do not agree.
    """
    name = shown(bin_place)
    lengths, dtype = _document_lengths(reader.read_all(bin_place.removesuffix(BIN_SUFFIX) + IDX_SUFFIX), name)
    num_bytes, _ = reader.size(bin_place)
    itemsize = np.dtype(dtype).itemsize
    if int(lengths.sum()) * itemsize != num_bytes:
        raise DataError(
            f"{name} has {num_bytes} bytes, and its .idx says {int(lengths.sum())} tokens of {itemsize}; copy both anew"
        )
    index = ShardIndex(bin_place, num_bytes, MEGATRON_KIND, [])
    ends = np.cumsum(lengths) * itemsize
    first = offset = 0
    while first < len(lengths):
        last = min(int(np.searchsorted(ends, offset + chunk_bytes)), len(lengths) - 1)
        length = int(ends[last]) - offset
        content = reader.read(bin_place, offset, length)
        tokens = np.frombuffer(content, dtype)
        if vocab_size is not None and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
            raise DataConfigError(
                f"{name} holds the token {int(tokens.max())}, and the tokenizer has {vocab_size}; give the tokenizer "
                "that made it"
            )
        index.chunks.append((offset, length, last + 1 - first, zlib.crc32(content)))
        index.lengths_crc32.append(zlib.crc32(lengths[first : last + 1].astype(LENGTHS_DTYPE).tobytes()))
        first, offset = last + 1, offset + length
    index.num_documents, index.num_tokens = len(lengths), int(lengths.sum())
    return index, lengths.astype(LENGTHS_DTYPE), dtype


def _document_lengths(content: bytes, name: str) -> tuple[np.ndarray, str]:
    """Return the tokens of each document that has any, int64, and the token type."""
    if len(content) < HEADER.size:
        raise DataError(f"the .idx of {name} is cut; copy it anew")
    magic, version, code, num_sequences, num_bounds = HEADER.unpack_from(content)
    if magic != MAGIC or version != 1 or code not in TOKEN_TYPES:
        raise DataConfigError(
            f"the .idx of {name} is no Megatron index of version 1 with integer tokens (got {magic!r}, version "
            f"{version}, type {code}); make it with Megatron's preprocess_data.py"
        )
    sizes = [num_sequences * 4, num_sequences * 8, num_bounds * 8]
    starts = np.cumsum([HEADER.size, *sizes])
    if len(content) != starts[-1]:
        raise DataError(
            f"the .idx of {name} has {len(content)} bytes, expected {starts[-1]}: it is cut, or multimodal, which is "
            "not read here"
        )
    sequences = np.frombuffer(content, "<i4", num_sequences, starts[0]).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", num_sequences, starts[1])
    bounds = np.frombuffer(content, "<i8", num_bounds, starts[2])
    dtype = TOKEN_TYPES[code]
    ends = np.concatenate(([0], np.cumsum(sequences)))
    if not np.array_equal(offsets, ends[:-1] * np.dtype(dtype).itemsize) or (sequences < 0).any():
        raise DataError(f"the .idx of {name} does not lay its sequences end to end; build it anew")
    if num_bounds < 1 or (np.diff(bounds) < 0).any() or bounds[0] != 0 or bounds[-1] != num_sequences:
        raise DataError(f"the .idx of {name} has document bounds that do not fit its sequences; build it anew")
    lengths = np.diff(ends[bounds])
    return lengths[lengths > 0], dtype
