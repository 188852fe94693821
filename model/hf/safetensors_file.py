"""Write and read safetensors directories tensor by tensor, so that memory holds one tensor and not a shard.

A file is the header's length (uint64, little endian), the header (JSON: name -> dtype, shape and the range of
bytes), and the tensors' bytes one after another (the safetensors format). All names, shapes and dtypes are
known before any data, so the header is written first.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX_NAME = "model.safetensors.index.json"
ALIGNMENT_BYTES = 8


class SafetensorsError(ValueError):
    """Report tensors that are not what was announced, or a directory that is not whole."""

    exit_code = 76


@dataclass(frozen=True)
class WrittenFiles:
    """What `write_safetensors` wrote: file names in order, and the bytes of all tensors."""

    names: tuple[str, ...]
    total_bytes: int


@dataclass(frozen=True)
class _Planned:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    out_dir: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]],
    produce: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
) -> WrittenFiles:
    """Write (name, shape, dtype) tensors into `out_dir`, asking `produce` for each one in order, once.

    One file is `model.safetensors`; several are `model-0000i-of-0000N.safetensors` with an index. A tensor
    larger than `max_shard_bytes` gets a file of its own. Each file is synced and takes its name only when
    whole. Raises SafetensorsError where a produced tensor has another shape or dtype than announced.
    """
    shards = _cut_into_shards([_Planned(*tensor) for tensor in tensors], max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard)
    for name, shard in zip(names, shards, strict=True):
        _write_atomically(out_dir / name, partial(_write_shard, shard=shard, produce=produce))
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        _write_atomically(out_dir / INDEX_NAME, lambda file: file.write(text.encode()))
        names.append(INDEX_NAME)
    return WrittenFiles(tuple(names), total_bytes)


def _cut_into_shards(tensors: list[_Planned], max_shard_bytes: int) -> list[list[_Planned]]:
    shards: list[list[_Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def _write_shard(file: BinaryIO, shard: list[_Planned], produce: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older transformers refuse a file without it
    offset = 0
    for tensor in shard:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for tensor in shard:
        produced = produce(tensor.name)
        if tuple(produced.shape) != tensor.shape or produced.dtype != tensor.dtype:
            raise SafetensorsError(
                f"{tensor.name} was announced as {tensor.dtype} {tensor.shape} "
                f"and came as {produced.dtype} {tuple(produced.shape)}"
            )
        flat = produced.detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # readable on shared disks, whatever the umask
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class SafetensorsReader:
    """Read the weights of a Hugging Face directory by name, one tensor at a time."""

    def __init__(self, directory: Path) -> None:
        """Find the directory's files; raises SafetensorsError where there are none or one is missing."""
        from safetensors import safe_open

        index = directory / INDEX_NAME
        single = directory / "model.safetensors"
        if index.exists():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.exists():
            with safe_open(single, framework="pt") as file:
                weight_map = dict.fromkeys(file.keys(), single.name)
        else:
            raise SafetensorsError(f"{directory} holds neither {single.name} nor {INDEX_NAME}")
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not (directory / name).is_file():
                raise SafetensorsError(f"{index} names the file {name!r}, which is not in {directory}")
        self._directory = directory
        self._weight_map = weight_map

    def names(self) -> tuple[str, ...]:
        """List the tensors in the directory's own spelling."""
        return tuple(self._weight_map)

    def read(self, name: str) -> torch.Tensor:
        """Give a tensor by its full name; a file may leave the leading `model.` or `transformer.` away.

        Raises SafetensorsError where the directory has no such tensor.
        """
        from safetensors import safe_open

        for candidate in (name, name.partition(".")[2]):
            if candidate in self._weight_map:
                path = self._directory / self._weight_map[candidate]
                with safe_open(path, framework="pt") as file:
                    return file.get_tensor(candidate)
        raise SafetensorsError(f"{self._directory} holds no tensor {name}; is it another architecture's?")
