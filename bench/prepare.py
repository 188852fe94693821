"""Preparing a corpus: `prepare` beside datatrove's steps for the same work, on one core.

    python bench/prepare.py [--megabytes 40]

The corpus is the sources and notes of the installed Python packages. The work: read JSON lines, drop by Gopher's
rules, drop exact copies and near-duplicates (MinHash, 5 words, 14 bands of 8), write indexed shards.
datatrove gets a reader of JSON lines and words cut at blanks in place of its own, which need orjson and spaCy and take
longer; its shards are written by the step that is in this package. Seconds are CPU seconds without imports.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUFFIXES = (".py", ".md", ".rst", ".txt")
MAX_FILE_BYTES = 200_000
MEGABYTE = 1e6
NUM_BUCKETS = 14


def write_corpus(file: Path, megabytes: float) -> None:
    """Write one line for each text file of the installed packages, spread over all of them."""
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*"))
    files = [path for path in files if path.suffix in SUFFIXES and path.stat().st_size < MAX_FILE_BYTES]
    total = sum(path.stat().st_size for path in files)
    step = max(1, round(total / MEGABYTE / megabytes))
    with open(file, "w") as stream:
        for path in files[::step]:
            stream.write(json.dumps({"text": path.read_text(errors="replace")}) + "\n")


def run_ours(source: Path, folder: Path, **settings: Any) -> int:
    """Prepare in this process; return the documents kept."""
    from basestone.data.prepare import prepare

    report = prepare([str(source)], folder / "shards", workers=0, **settings)
    return report.documents_kept


def read_lines(data: Any, rank: int, world_size: int, *, file: Path) -> Iterator[Any]:
    """Read a datatrove document from each JSON line."""
    from datatrove.data import Document

    with open(file) as stream:
        for number, line in enumerate(stream):
            yield Document(text=json.loads(line)["text"], id=str(number))


def write_lines(data: Any, rank: int, world_size: int, *, file: Path) -> Iterator[Any]:
    """Write a JSON line for each document and pass it on."""
    with open(file, "w") as stream:
        for document in data:
            stream.write(json.dumps({"text": document.text}) + "\n")
            yield document


def run_datatrove(source: Path, folder: Path) -> int:
    """Run the same work as datatrove's steps in this process; return the documents kept."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import exact_dedup, minhash
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    from basestone.data.preparing.datatrove_writer import ShardMergeStep, ShardWriterStep
    from basestone.data.shards import open_shard_set

    class Blanks(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    def run(*steps: Any, tasks: int = 1) -> None:
        logs = tempfile.mkdtemp(dir=folder)
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=logs).run()

    at: Callable[[str], str] = lambda name: str(folder / name)  # noqa: E731
    lines, distinct = folder / "lines.jsonl", folder / "distinct.jsonl"
    words = Blanks()
    hashing = HashConfig(hash_fc="xxhash" if find_spec("xxhash") else "sha1")  # its default, where it is there
    exact = exact_dedup.ExactDedupConfig(lambda document: " ".join(document.text.split()), hash_config=hashing)
    near = minhash.MinhashConfig(n_grams=5, num_buckets=NUM_BUCKETS, hashes_per_bucket=8, hash_config=hashing)
    run(
        partial(read_lines, file=source),
        GopherQualityFilter(language=words),
        GopherRepetitionFilter(language=words),
        partial(write_lines, file=lines),
    )
    run(partial(read_lines, file=lines), exact_dedup.ExactDedupSignature(at("exact"), exact))
    run(exact_dedup.ExactFindDedups(at("exact"), at("copies"), exact))
    run(
        partial(read_lines, file=lines),
        exact_dedup.ExactDedupFilter(at("copies"), exact),
        partial(write_lines, file=distinct),
        minhash.MinhashDedupSignature(at("near"), near, language=words),
    )
    run(minhash.MinhashDedupBuckets(at("near"), at("buckets"), config=near), tasks=NUM_BUCKETS)
    run(minhash.MinhashDedupCluster(at("buckets"), at("clusters"), config=near))
    run(
        partial(read_lines, file=distinct),
        minhash.MinhashDedupFilter(at("clusters")),
        ShardWriterStep(folder / "shards"),
    )
    ShardMergeStep(folder / "shards", 1).run()
    return sum(open_shard_set(folder / "shards" / part).num_documents for part in ("train", "heldout"))


RUNS: dict[str, Callable[[Path, Path], int]] = {
    "prepare, no options": run_ours,
    "prepare --rules gopher": partial(run_ours, rules=("gopher",)),
    "prepare --near-duplicates": partial(run_ours, near_duplicates=True),
    "prepare --rules gopher --near-duplicates": partial(run_ours, rules=("gopher",), near_duplicates=True),
    "datatrove, the same": run_datatrove,
}


def run_one(name: str, source: Path) -> None:
    """Do one of the works and print its CPU seconds and the documents it kept."""
    small = source.with_name("small.jsonl")
    with open(source) as stream:
        small.write_text("".join(next(stream) for _ in range(300)))
    for file in (small, source):  # the first one for the imports
        with tempfile.TemporaryDirectory() as folder:
            begun = time.process_time()
            kept = RUNS[name](file, Path(folder))
            cpu_s = time.process_time() - begun
    print(json.dumps({"cpu_s": cpu_s, "kept": kept}))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=40, help="size of the corpus")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one[0], Path(arguments.one[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "corpus.jsonl"
        write_corpus(source, arguments.megabytes)
        with open(source) as stream:
            texts = [json.loads(line)["text"] for line in stream]
        size = sum(len(text.encode()) for text in texts)
        print(f"{len(texts):,} documents, {size / MEGABYTE:.1f} MB\n")
        print("| work | documents kept | CPU s | documents / CPU s | MB / CPU s |\n|---|---|---|---|---|")
        for name in RUNS:
            command = [sys.executable, __file__, "--one", name, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            cpu_s = result["cpu_s"]
            rates = f"{len(texts) / cpu_s:,.0f} | {size / MEGABYTE / cpu_s:.2f}"
            print(f"| {name} | {result['kept']:,} | {cpu_s:.1f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
