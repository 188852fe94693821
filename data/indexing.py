"""Find shards wherever they lie, index them, and keep what was found."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .documents import LENGTHS_DTYPE, TOKENS_KIND
from .errors import DataConfigError
from .index import ShardIndex, index_shard
from .megatron import BIN_SUFFIX, IDX_SUFFIX, index_megatron
from .prepare import DEFAULT_CHUNK_BYTES
from .reading.reader import RangeReader
from .reading.transport import PIPE_PREFIX, is_local, join, open_filesystem, shown
from .shards import LENGTHS_NAME, MANIFEST_NAME, write_manifest, write_sample_indexes
from .storage import storage_errors, write_atomic
from .tokenizer import Tokenizer

TAR_SUFFIX = ".tar"
INDEX_VERSION = 1
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Indexer:
    """Index shards that have no manifest, and keep the result in a directory.

    ``tokenizer`` is that of the token blocks among them. ``log`` hears what takes long.
    """

    keep: Path
    reader: RangeReader
    tokenizer: Tokenizer | None = None
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    log: Callable[[str], None] = lambda _: None

    def indexed(self, place: str) -> str:
        """Return a place that has a manifest: this one, or a directory that refers to its shards.

        Each shard is read whole once, and again only where its size or its time or tag has changed.
        """
        missing = manifest_problem(place, self.reader)
        if missing is None:
            return place
        shards = find_shards(place, self.reader, missing)
        files = [file for shard in shards for file in (shard, index_of(shard)) if file]
        marks = [[file, *self.reader.size(file)] for file in files]
        sha256 = self.tokenizer.sha256 if self.tokenizer else None
        out = self.keep / f"set-{_digest([INDEX_VERSION, marks, sha256, self.chunk_bytes])}"
        if not (out / MANIFEST_NAME).is_file():
            with storage_errors(f"indexing into {out}"), _locked(self.keep):
                self.write(out, shards, name=shown(place))
        return str(out)

    def write(self, out: Path, shards: Sequence[str], *, name: str | None = None) -> dict[str, Any]:
        """Write a manifest of shards that lie elsewhere into a directory, and return it."""
        out.mkdir(parents=True, exist_ok=True)
        self.keep.mkdir(parents=True, exist_ok=True)
        if any(map(index_of, shards)):
            return self._write_megatron(out, shards, name)
        indexes = []
        for number, shard in enumerate(shards, 1):
            self.log(f"indexing {shown(shard)} ({number} of {len(shards)})")
            indexes.append(self._index_tar(shard))
        sha256 = None
        if any(index.kind == TOKENS_KIND for index in indexes):
            if self.tokenizer is None:
                raise DataConfigError(
                    f"{shown(shards[0])} holds token blocks of an unknown tokenizer; say which: --tokenizer MODEL"
                )
            sha256 = self.tokenizer.sha256
        return write_manifest(out, indexes, tokenizer_sha256=sha256, name=name)

    def _write_megatron(self, out: Path, shards: Sequence[str], name: str | None) -> dict[str, Any]:
        if len(shards) > 1 or self.tokenizer is None:
            raise DataConfigError(
                "a Megatron dataset is indexed by itself, with its tokenizer; give one .bin at a time, and --tokenizer"
            )
        self.log(f"indexing {shown(shards[0])}")
        index, lengths, dtype = index_megatron(
            shards[0], self.reader, chunk_bytes=self.chunk_bytes, vocab_size=self.tokenizer.vocab_size
        )
        write_atomic(out / LENGTHS_NAME, lengths.astype(LENGTHS_DTYPE).tobytes())
        return write_manifest(
            out, [index], tokenizer_sha256=self.tokenizer.sha256, token_dtype=dtype, name=name
        )

    def _index_tar(self, shard: str) -> ShardIndex:
        """Index a tar, or take what was found before; a file of its own for each, so that a killed run goes on."""
        size, mark = self.reader.size(shard)
        kept = self.keep / f"tar-{_digest([INDEX_VERSION, shard, size, mark, self.chunk_bytes])}.json"
        if kept.is_file():
            with suppress(ValueError, TypeError, KeyError):  # a file that someone edited is made anew
                values = json.loads(kept.read_bytes())
                return ShardIndex(**{**values, "chunks": [tuple(row) for row in values["chunks"]]})
        # a command gives no ranges, only everything from its beginning
        chunk_bytes = size + 1 if shard.startswith(PIPE_PREFIX) else self.chunk_bytes
        with self._local_copy(shard, size) as path:
            index = index_shard(path, chunk_bytes, name=shown(shard))
        index.file, index.sample_offsets = shard, []
        write_atomic(kept, json.dumps(asdict(index)).encode())
        return index

    @contextmanager
    def _local_copy(self, shard: str, size: int) -> Iterator[Path]:
        if is_local(shard):
            yield Path(shard)
            return
        with tempfile.NamedTemporaryFile(dir=self.keep, suffix=TAR_SUFFIX) as stream:
            piece_bytes = max(1, size) if shard.startswith(PIPE_PREFIX) else COPY_BYTES
            for offset in range(0, size, piece_bytes):
                stream.write(self.reader.read(shard, offset, min(piece_bytes, size - offset)))
            stream.flush()
            yield Path(stream.name)


def manifest_problem(place: str, reader: RangeReader) -> str | None:
    """Say why a place is no shard directory with a manifest that can be read; None where it is one."""
    if place.startswith(PIPE_PREFIX) or _names_shards(place):
        return f"no {MANIFEST_NAME}"
    if is_local(place):
        return None if os.path.isfile(join(place, MANIFEST_NAME)) else f"no {MANIFEST_NAME}"
    try:
        reader.size(join(place, MANIFEST_NAME))
    except DataConfigError as error:
        return f"no {MANIFEST_NAME} that can be read ({str(error).partition(': ')[2].partition(';')[0]})"
    return None


def index_of(shard: str) -> str | None:
    """Return the place of the index of a Megatron .bin file, None for other shards."""
    return shard.removesuffix(BIN_SUFFIX) + IDX_SUFFIX if shard.endswith(BIN_SUFFIX) else None


def find_shards(place: str, reader: RangeReader, missing: str = f"no {MANIFEST_NAME}") -> list[str]:
    """Return the shards that a place names, in the order of their names.

    A place is a .tar or .bin file, a directory of .tar files, or either with ``{000..127}`` or (where the storage can
    list) ``*`` in it; a local file of just that name comes first. ``missing`` is what messages say of its manifest.
    Raises DataConfigError where it names nothing.
    """
    from braceexpand import braceexpand

    if place.startswith(PIPE_PREFIX):
        return [place]
    if is_local(place) and os.path.exists(place):
        return _matches(place, missing)
    try:
        found = [shard for name in braceexpand(place) for shard in _matches(name, missing)]
    except ValueError as error:
        if isinstance(error, DataConfigError):
            raise
        raise DataConfigError(f"{shown(place)}: a brace is left open; write {{000..127}}") from error
    if not found:
        raise DataConfigError(_nothing(place, missing))
    repeated = (
        sorted({shard for shard in found if found.count(shard) > 1}) if len(set(found)) < len(found) else []
    )
    if repeated:
        raise DataConfigError(f"{shown(place)} names {shown(repeated[0])} more than once; name each shard once")
    return found


def _nothing(place: str, missing: str) -> str:
    return (
        f"{shown(place)} holds {missing} and no {TAR_SUFFIX} files; make shards with `basestone prepare`, "
        f"or give {TAR_SUFFIX} or Megatron {BIN_SUFFIX} files"
    )


def _names_shards(name: str) -> bool:
    path = name if is_local(name) else name.partition("?")[0]
    return path.endswith((TAR_SUFFIX, BIN_SUFFIX))


def _matches(name: str, missing: str) -> list[str]:
    if is_local(name):
        name = os.path.abspath(name)
        if os.path.isfile(name):
            return [name]
        if os.path.isdir(name):
            tars = sorted(str(path) for path in Path(name).glob(f"*{TAR_SUFFIX}"))
            if not tars:
                raise DataConfigError(_nothing(name, missing))
            return tars
        return sorted(path for path in glob.glob(name) if os.path.isfile(path))
    if _names_shards(name) and "*" not in name:
        return [name]
    if name.startswith(("http://", "https://")):
        raise DataConfigError(
            f"{shown(name)} holds {missing}, and http servers do not list files; name the shards, for example "
            f"{shown(name).rstrip('/')}/{{000..127}}{TAR_SUFFIX}, or run `basestone data index` on them"
        )
    filesystem, path = open_filesystem(name)
    pattern = path if "*" in path else f"{path.rstrip('/')}/*{TAR_SUFFIX}"
    try:
        return sorted(filesystem.unstrip_protocol(match) for match in filesystem.glob(pattern))
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataConfigError(
            f"{shown(name)} cannot be listed: {reason}; check the place and your credentials"
        ) from error


def index_directory(
    path: Path, *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Index the tar files of a directory in place, in the order of their names; return a summary.

    Token blocks do not tell their tokenizer: it is taken from ``tokenizer`` or from the manifest that is there.
    Raises DataConfigError where there is nothing to index or the tokenizer is unknown, DataError for a shard that is
    damaged or not in the format.
    """
    if not path.is_dir():
        raise DataConfigError(f"{path} is no directory; give a directory of .tar files")
    shards = sorted(path.glob(f"*{TAR_SUFFIX}"))
    if not shards:
        raise DataConfigError(f"{path} holds no {TAR_SUFFIX} files; make shards with `prepare`")
    with storage_errors(f"indexing {path}"):
        indexes = [index_shard(shard, chunk_bytes) for shard in shards]
        sha256 = None
        if any(index.kind == TOKENS_KIND for index in indexes):
            sha256 = Tokenizer(tokenizer).sha256 if tokenizer else _known_tokenizer(path)
        write_sample_indexes(path, indexes)
        manifest = write_manifest(path, indexes, tokenizer_sha256=sha256)
    return summary(path, manifest)


def index_places(
    places: Sequence[str],
    out: Path,
    *,
    tokenizer: Path | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    reader: RangeReader,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a directory whose manifest refers to shards elsewhere, each by its place; return a summary."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataConfigError(f"{out} exists and is not empty; give another place, or remove it first")
    shards = [shard for place in places for shard in find_shards(place, reader)]
    shards = [os.path.abspath(shard) if is_local(shard) else shard for shard in shards]
    with storage_errors(f"indexing into {out}"):
        kept = out.with_name(f".{out.name}.unfinished")
        indexer = Indexer(kept, reader, Tokenizer(tokenizer) if tokenizer else None, chunk_bytes, log)
        manifest = indexer.write(out, shards)
        shutil.rmtree(kept, ignore_errors=True)
    return summary(out, manifest)


def summary(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what a manifest says in short."""
    return {
        "directory": str(path),
        "kind": manifest["kind"],
        "shards": len(manifest["shards"]),
        "chunks": sum(len(shard["chunks"]) for shard in manifest["shards"]),
        "documents": manifest["documents"],
        "fingerprint": manifest["fingerprint"],
    }


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Let one process of a host index at a time; the kernel gives the lock back however it ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
