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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INDEX_NAME = "model.safetensors.index.json"
ALIGNMENT_BYTES = 8


class SafetensorsError(ValueError):
    """Report tensors that are not what was announced, or a directory that is not whole."""

    exit_code = 76


Planned = tuple[str, tuple[int, ...], torch.dtype]  # name, shape and dtype of a tensor


class File(Protocol):
    """What a file's bytes go to."""

    def write(self, data: memoryview, /) -> object:
        """Append bytes, which may change afterwards."""


Opener = Callable[[Path], AbstractContextManager[File]]  # of a new file, which is on the disk when it is left


@dataclass(frozen=True)
class Shard:
    """One file of a directory and its tensors, in order."""

    file_name: str
    tensors: tuple[Planned, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(map(_num_bytes, self.tensors))


def plan_shards(tensors: Iterable[Planned], max_shard_bytes: int) -> list[Shard]:
    """Spread tensors over files, in order; one that is larger than `max_shard_bytes` gets a file of its own.

    One file is `model.safetensors`, several are `model-0000i-of-0000N.safetensors`.
    """
    groups: list[list[Planned]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + _num_bytes(tensor) > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += _num_bytes(tensor)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that is on the disk when it is left."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(
    out_dir: Path,
    shards: Sequence[Shard],
    produce: Callable[[str], torch.Tensor],
    *,
    open_file: Opener = synced,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Write files, asking `produce` for each tensor in order, once. A file takes its name only when whole.

    Args:
        part: where `num_parts` processes share the work, each takes every `num_parts`-th file from `part` on, and the
            first one writes the index.

    Raises:
        SafetensorsError: a tensor has another shape or dtype than announced.
    """
    for shard in shards[part::num_parts]:
        with _named_when_whole(out_dir / shard.file_name) as temporary, open_file(temporary) as file:
            _write_tensors(file, shard, produce)
    if part == 0 and len(shards) > 1:
        _write_index(out_dir, shards)


def _write_index(out_dir: Path, shards: Sequence[Shard]) -> None:
    weight_map = {tensor[0]: shard.file_name for shard in shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": sum(shard.num_bytes for shard in shards)}, "weight_map": weight_map}
    with _named_when_whole(out_dir / INDEX_NAME) as temporary, synced(temporary) as file:
        file.write((json.dumps(index, indent=2) + "\n").encode())


def _num_bytes(tensor: Planned) -> int:
    _, shape, dtype = tensor
    return math.prod(shape) * dtype.itemsize


def _write_tensors(file: File, shard: Shard, produce: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # older transformers refuse a file without it
    offset = 0
    for name, shape, dtype in shard.tensors:
        end = offset + _num_bytes((name, shape, dtype))
        header[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    file.write(memoryview(struct.pack("<Q", len(text)) + text))
    for name, shape, dtype in shard.tensors:
        produced = produce(name)
        if tuple(produced.shape) != shape or produced.dtype != dtype:
            raise SafetensorsError(
                f"{name} was announced as {dtype} {shape} and came as {produced.dtype} {tuple(produced.shape)}"
            )
        flat = produced.detach().cpu().contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data)


@contextmanager
def _named_when_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name; the file takes its own at the end, and leaves nothing where something fails."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)  # of a killed attempt
    try:
        yield temporary
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
        """Find the directory's files.

        Raises:
            SafetensorsError: there are none, one is missing, or names or headers are damaged.
        """
        index = directory / INDEX_NAME
        single = directory / "model.safetensors"
        if single.is_file():  # beside an index, too: transformers takes this one
            with _opened(single) as file:
                self._weight_map = dict.fromkeys(file.keys(), single.name)
        elif index.is_file():
            self._weight_map = _weight_map(index)
        else:
            raise SafetensorsError(f"{directory} holds neither {single.name} nor {INDEX_NAME}")
        for name in sorted(set(self._weight_map.values())):
            if Path(name).name != name or not (directory / name).is_file():
                raise SafetensorsError(f"{index} names the file {name!r}, which is not in {directory}")
        self._directory = directory

    def names(self) -> tuple[str, ...]:
        """List the tensors in the directory's own spelling."""
        return tuple(self._weight_map)

    def read(self, name: str) -> torch.Tensor:
        """Give a tensor by its full name; a file may leave the leading `model.` or `transformer.` away.

        Raises SafetensorsError where the directory has no such tensor.
        """
        for candidate in (name, name.partition(".")[2]):
            if candidate in self._weight_map:
                with _opened(self._directory / self._weight_map[candidate]) as file:
                    return file.get_tensor(candidate)
        raise SafetensorsError(f"{self._directory} holds no tensor {name}; is it another architecture's?")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise SafetensorsError(f"{index} is damaged: it does not say which file holds which tensor")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise SafetensorsError(f"{path} is damaged: {error}") from error
