"""Write shards at the end of a datatrove pipeline, for corpora that take a cluster to prepare.

Each task writes shards of its own; one task then writes the manifest over all of them, without copying.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..cleaning import clean_document, is_heldout
from ..errors import DataConfigError, DataError
from ..index import ShardIndex
from ..shards import MANIFEST_NAME, ShardWriter, open_shard_set, write_manifest
from ..storage import rename_directory, storage_errors
from .document import NOT_TOKENISED, encode_document, load_tokenizer
from .place import HELDOUT_NAME, TRAIN_NAME
from .settings import DEFAULT_CHUNK_BYTES, DEFAULT_MIN_CHARS, DEFAULT_SHARD_BYTES, missing_package
from .writing import open_writer

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise DataConfigError(missing_package("writing shards from datatrove", "datatrove", "scale")) from error


class ShardWriterStep(PipelineStep):
    """Write the documents of each task into ``out/train/rank_NNNNN`` and ``out/heldout/rank_NNNNN``.

    Documents are cleaned as ``prepare`` does by default and held out by their content; what is too short or no
    text is counted and left out. With a tokenizer the shards hold token blocks. Documents are passed on.
    """

    name = "Basestone shards"
    type = "WRITER"

    def __init__(
        self,
        out: str | Path,
        *,
        heldout_fraction: float = 0.01,
        tokenizer: str | Path | None = None,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        """Name the directory to write, on a file system that all tasks see."""
        super().__init__()
        self.out = Path(out)
        self.heldout_fraction = heldout_fraction
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.shard_bytes, self.chunk_bytes = shard_bytes, chunk_bytes

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write one task's documents; the directories appear when they are finished.

        Raises DataStorageError where writing fails.
        """
        with storage_errors(f"writing {self.out}"):
            places = {name: self.out / name / rank_name(rank) for name in (TRAIN_NAME, HELDOUT_NAME)}
            unfinished = {name: place.with_name(f".{place.name}") for name, place in places.items()}
            for directory in unfinished.values():
                shutil.rmtree(directory, ignore_errors=True)  # of a task that was killed
            writers = {
                name: open_writer(
                    directory,
                    tokenizer=self.tokenizer,
                    shard_bytes=self.shard_bytes,
                    chunk_bytes=self.chunk_bytes,
                )
                for name, directory in unfinished.items()
            }
            for document in data:
                with self.track_time():
                    self._write(document.text, writers)
                yield document
            for name, place in places.items():
                writers[name].finish()
                shutil.rmtree(place, ignore_errors=True)  # of an earlier run of this task
                rename_directory(unfinished[name], place)

    def _write(self, text: str, writers: dict[str, ShardWriter]) -> None:
        cleaned = clean_document(text, DEFAULT_MIN_CHARS)
        if isinstance(cleaned, str):
            self.stat_update(f"dropped_{cleaned}")
            return
        tokens = None
        if self.tokenizer is not None:
            tokens = encode_document(load_tokenizer(self.tokenizer), cleaned.text)
            if tokens is None:
                self.stat_update(f"dropped_{NOT_TOKENISED}")
                return
        name = HELDOUT_NAME if is_heldout(cleaned.digest, self.heldout_fraction) else TRAIN_NAME
        self.stat_update(name)
        if tokens is None:
            writers[name].write_text(cleaned.text)
        else:
            writers[name].write_tokens(tokens, len(cleaned.text.encode()))


class ShardMergeStep(PipelineStep):
    """Write the manifests over the shards of ``num_ranks`` tasks; run it as one task when they are done."""

    name = "Basestone manifest"
    type = "WRITER"

    def __init__(self, out: str | Path, num_ranks: int) -> None:
        """Name the directory that ``ShardWriterStep`` wrote, and its number of tasks."""
        super().__init__()
        self.out, self.num_ranks = Path(out), num_ranks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Merge both parts; tasks other than the first have nothing to do."""
        if rank == 0:
            for name in (TRAIN_NAME, HELDOUT_NAME):
                merge_ranks(self.out / name, self.num_ranks)


def rank_name(rank: int) -> str:
    """Return the directory of a task's shards."""
    return f"rank_{rank:05d}"


def merge_ranks(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Write one manifest over the shards of all tasks where they lie, and return it.

    Raises DataError where a task's shards are missing or damaged, or made with different tokenizers.
    """
    missing = [
        rank_name(rank)
        for rank in range(num_ranks)
        if not (directory / rank_name(rank) / MANIFEST_NAME).is_file()
    ]
    if missing:
        raise DataError(
            f"{directory} lacks the shards of {len(missing)} of {num_ranks} tasks ({', '.join(missing[:5])}); start "
            "the writing job again, it runs the tasks that are not done"
        )
    indexes: list[ShardIndex] = []
    tokenizers = set()
    for rank in range(num_ranks):
        shard_set = open_shard_set(directory / rank_name(rank))
        tokenizers.add(shard_set.tokenizer_sha256)
        indexes += _rank_indexes(directory / rank_name(rank))
    if len(tokenizers) > 1:
        raise DataError(f"the tasks of {directory} used different tokenizers; write all of them with one")
    with storage_errors(f"writing {directory / MANIFEST_NAME}"):
        return write_manifest(directory, indexes, tokenizer_sha256=tokenizers.pop())


def _rank_indexes(directory: Path) -> list[ShardIndex]:
    """Describe a task's shards by its manifest; its totals stand in its first shard."""
    manifest = json.loads((directory / MANIFEST_NAME).read_bytes())
    indexes = [
        ShardIndex(
            file=f"{directory.name}/{shard['file']}",
            num_bytes=shard["bytes"],
            kind=manifest["kind"],
            sample_offsets=[],  # the sample index is there already, beside the shard
            chunks=[tuple(row) for row in shard["chunks"]],
        )
        for shard in manifest["shards"]
    ]
    if indexes:
        indexes[0].num_documents = manifest["documents"]
        indexes[0].text_bytes = manifest["bytes_text"]
        indexes[0].num_tokens = manifest.get("tokens", 0)
    return indexes
