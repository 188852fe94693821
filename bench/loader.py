"""Tokens per CPU-second of data loaders that end in the same array, int64 [64, 2049], on this machine.

    python bench/loader.py [--cpu-seconds 5] [--only ours,webdataset] [--source FILES... --tokenizer MODEL]

CPU-seconds are user and system time of the process and its workers, after two batches of warming up; so what else the
machine does matters little. Three forms of the same documents: `blocks` (tokens, many documents to a member),
`documents` (tokens, a member each) and `text`. Every variant runs in a process of its own. Loaders that are not
installed are left out, and said to be. The embedded corpus is small and lies in the page cache: this measures loaders,
not disks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

SEQUENCE, BATCH, SEED = 2048, 64, 7
FORMS = ("blocks", "documents", "text")
WARM_UP_BATCHES = 2
SHARD_BYTES, CHUNK_BYTES = 4 << 20, 128 << 10
SHUFFLE_SAMPLES = 1000
# what is run: name, the package that it needs, forms, numbers of workers
VARIANTS = (
    ("memmap", "numpy", ("blocks",), (0,)),
    ("tokenizer", "sentencepiece", ("text",), (0,)),
    ("ours", "basestone", FORMS, (0, 1)),
    ("webdataset", "webdataset", FORMS, (0, 1)),
    ("mosaicml-streaming", "streaming", FORMS, (0, 1)),
    ("megatron-core", "megatron.core", ("documents",), (0, 1)),
)
NOTES = {
    "memmap": "rows at random from one array: the limit",
    "tokenizer": "encoding alone: the limit of text",
    "ours": "TokenStream",
    "webdataset": "WebDataset, shuffle(1000), packed, batched in the worker, WebLoader",
    "mosaicml-streaming": "StreamingDataset, py1e shuffle, DataLoader; blocks are rows cut beforehand",
    "megatron-core": "GPTDataset over .bin/.idx, no attention mask, DataLoader",
}


def prepare_data(work: Path, sources: list[str], tokenizer: Path | None) -> None:
    """Write the corpus in every form below ``work``; formats of packages that are not here are left out."""
    from basestone.data.builtin import prepare_builtin
    from basestone.data.indexing import index_directory
    from basestone.data.prepare import prepare
    from basestone.data.shards import ShardWriter, open_shard_set
    from basestone.data.tokenizer import Tokenizer

    if not sources:
        corpus = prepare_builtin("builtin:python", work / "cache", print)
        shards = open_shard_set(corpus.train)
        texts = [text for chunk in range(shards.num_chunks) for text in shards.read_documents(chunk)]
        (work / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources, tokenizer = [str(work / "corpus.jsonl")], corpus.tokenizer
    assert tokenizer is not None, "--source needs --tokenizer"
    (work / "tokenizer").write_bytes(Tokenizer(tokenizer).content)
    sizes: dict[str, Any] = {"heldout_fraction": 0.0, "shard_bytes": SHARD_BYTES}
    prepare(sources, work / "text", chunk_bytes=CHUNK_BYTES, **sizes)
    prepare(sources, work / "blocks", chunk_bytes=CHUNK_BYTES, tokenizer=tokenizer, **sizes)
    texts = _texts(work)
    encoder = Tokenizer(tokenizer)
    documents = [encoder.encode_document(text).astype(_token_type(encoder.vocab_size)) for text in texts]
    members = ShardWriter(
        work / "documents" / "train",
        shard_bytes=SHARD_BYTES,
        chunk_bytes=1,  # a block of each document, gathered into chunks below
        vocab_size=encoder.vocab_size,
        tokenizer_sha256=encoder.sha256,
    )
    for tokens in documents:
        members.write_tokens(tokens, 1)
    members.finish()
    index_directory(work / "documents" / "train", chunk_bytes=CHUNK_BYTES, tokenizer=tokenizer)
    np.save(work / "flat.npy", np.concatenate(documents))
    if _installed("streaming"):
        _write_mds(work, texts, documents)
    if _installed("megatron.core"):
        _write_megatron(work, documents)


def _write_mds(work: Path, texts: list[str], documents: list[np.ndarray]) -> None:
    from streaming import MDSWriter

    forms: dict[str, tuple[str, Iterable[Any]]] = {
        "blocks": ("bytes", (row.tobytes() for row in pack(documents))),
        "documents": ("bytes", (tokens.tobytes() for tokens in documents)),
        "text": ("str", texts),
    }
    for form, (encoding, samples) in forms.items():
        with MDSWriter(
            out=str(work / f"mds-{form}"), columns={"sample": encoding}, size_limit=SHARD_BYTES
        ) as out:
            for sample in samples:
                out.write({"sample": sample})


def _write_megatron(work: Path, documents: list[np.ndarray]) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(work / "megatron.bin"), dtype=documents[0].dtype.type)
    for tokens in documents:
        builder.add_document(torch.from_numpy(tokens.astype(np.int64)), [len(tokens)])
    builder.finalize(str(work / "megatron.idx"))


def pack(documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Join documents and cut them into rows [SEQUENCE + 1], each beginning with the last token of the one before."""
    rest: list[np.ndarray] = []
    size = 0
    for tokens in documents:
        rest.append(tokens)
        size += len(tokens)
        if size > SEQUENCE:
            joined = np.concatenate(rest)
            start = 0
            while start + SEQUENCE < len(joined):
                yield joined[start : start + SEQUENCE + 1]
                start += SEQUENCE
            rest, size = [joined[start:]], len(joined) - start


# --- the loaders: each gives int64 [BATCH, SEQUENCE + 1] for ever


def open_ours(work: Path, form: str, workers: int) -> Any:
    """Open our stream over shards of a form."""
    from basestone.data.mixing import SourceSettings
    from basestone.data.stream import TokenStream
    from basestone.data.stream_settings import StreamSettings

    source = SourceSettings("train", (str(work / form / "train"),))
    settings = StreamSettings((source,), str(work / "tokenizer"), SEQUENCE, lanes=BATCH, seed=SEED)
    return TokenStream(settings, global_batch=BATCH, reader=0, num_readers=1, workers=workers)


def ours(work: Path, form: str, workers: int) -> Iterator[np.ndarray]:
    stream = open_ours(work, form, workers)
    while True:
        yield stream.next_batch().tokens.astype(np.int64)


def memmap(work: Path, form: str, workers: int) -> Iterator[np.ndarray]:
    flat = np.load(work / "flat.npy", mmap_mode="r")
    generator = np.random.default_rng(SEED)
    while True:
        starts = generator.integers(len(flat) - SEQUENCE, size=BATCH)
        yield np.stack([flat[start : start + SEQUENCE + 1] for start in starts]).astype(np.int64)


def tokenizer(work: Path, form: str, workers: int) -> Iterator[np.ndarray]:
    """Give the tokens of one document after the other, not batches."""
    from basestone.data.tokenizer import Tokenizer

    encoder, texts = Tokenizer(work / "tokenizer"), _texts(work)
    while True:
        for text in texts:
            yield encoder.encode_document(text)


def webdataset(work: Path, form: str, workers: int) -> Iterator[np.ndarray]:
    import torch
    import webdataset as wds

    read = _sample_reader(work, form)

    def rows(samples: Iterable[dict[str, bytes]]) -> Iterator[np.ndarray]:
        return pack(tokens for sample in samples for tokens in read(sample))

    def collate(batch: list[np.ndarray]) -> Any:
        return torch.from_numpy(np.stack(batch).astype(np.int64))

    shards = sorted(str(path) for path in (work / form / "train").glob("*.tar"))
    dataset = wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(SHUFFLE_SAMPLES)
    dataset = dataset.compose(rows).batched(BATCH, collation_fn=collate, partial=False)
    for batch in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield batch.numpy()


def _sample_reader(work: Path, form: str) -> Callable[[dict[str, bytes]], list[np.ndarray]]:
    """Return what turns a sample of a tar into its documents' tokens."""
    from basestone.data.tokenizer import Tokenizer

    encoder = Tokenizer(work / "tokenizer")
    if form == "text":
        return lambda sample: [encoder.encode_document(sample["txt"].decode())]
    dtype = _token_type(encoder.vocab_size)
    extension = f"tok.u{8 * dtype.itemsize}"

    def read(sample: dict[str, bytes]) -> list[np.ndarray]:
        ends = np.cumsum(np.frombuffer(sample["len.u32"], "<u4"))
        return np.split(np.frombuffer(sample[extension], dtype), ends[:-1])

    return read


def mosaicml_streaming(work: Path, form: str, workers: int) -> Iterator[np.ndarray]:
    import torch
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    from basestone.data.tokenizer import Tokenizer

    encoder = Tokenizer(work / "tokenizer")
    dtype = _token_type(encoder.vocab_size)

    class Rows(StreamingDataset):
        def __iter__(self) -> Iterator[np.ndarray]:
            samples = (sample["sample"] for sample in super().__iter__())
            if form == "text":
                return pack(encoder.encode_document(text) for text in samples)
            tokens = (np.frombuffer(sample, dtype) for sample in samples)
            return tokens if form == "blocks" else pack(tokens)

    def collate(batch: list[np.ndarray]) -> Any:
        return torch.from_numpy(np.stack(batch).astype(np.int64))

    dataset = Rows(local=str(work / f"mds-{form}"), shuffle=True, shuffle_seed=SEED, batch_size=BATCH)
    loader = DataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    while True:
        for batch in loader:
            yield batch.numpy()


def megatron_core(work: Path, form: str, workers: int) -> Iterator[np.ndarray]:
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from torch.utils.data import DataLoader

    from basestone.data.tokenizer import Tokenizer

    encoder = Tokenizer(work / "tokenizer")

    class Specials:
        eod, pad, vocab_size = encoder.eos, encoder.pad, encoder.vocab_size
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQUENCE,
        blend=([str(work / "megatron")], None),
        split="1,0,0",
        path_to_cache=str(work / "megatron-cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Specials(),  # type: ignore[arg-type]
    )
    num_samples = 100_000
    dataset, *_ = BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, 0, 0], lambda: True, config).build()

    def collate(batch: list[dict[str, Any]]) -> Any:
        rows = [torch.cat([sample["tokens"], sample["labels"][-1:]]) for sample in batch]
        return torch.stack(rows)

    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=collate):
        yield batch.numpy()


# --- measuring


def measure(name: str, work: Path, form: str, workers: int, cpu_seconds: float) -> dict[str, float]:
    """Read until so many CPU-seconds are spent, in doubling steps; give tokens, CPU-seconds and seconds."""
    import psutil
    import torch

    torch.set_num_threads(1)
    loader = globals()[name.replace("-", "_")](work, form, workers)

    def read(batches: int) -> int:
        found = 0
        while found < batches * BATCH * SEQUENCE:
            array = next(loader)
            if array.ndim == 1:
                found += len(array)
                continue
            assert array.shape == (BATCH, SEQUENCE + 1) and array.dtype == np.int64
            found += BATCH * SEQUENCE
        return found

    def cpu_s() -> float:
        main = psutil.Process()
        times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
        return sum(time.user + time.system for time in times)

    read(WARM_UP_BATCHES)
    started_cpu_s, started_s = cpu_s(), time.perf_counter()
    found, batches, spent_cpu_s = 0, 4, 0.0
    while spent_cpu_s < cpu_seconds:
        found += read(batches)
        batches *= 2
        spent_cpu_s = cpu_s() - started_cpu_s
    return {"tokens": found, "cpu_s": spent_cpu_s, "wall_s": time.perf_counter() - started_s}


def run_one(work: Path, name: str, form: str, workers: int, cpu_seconds: float) -> dict[str, float] | str:
    """Measure in a process of its own; give the figures or the last line of what went wrong."""
    one = json.dumps([name, str(work), form, workers, cpu_seconds])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, __file__, "--one", one], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return json.loads(done.stdout.strip().splitlines()[-1])


def _texts(work: Path) -> list[str]:
    from basestone.data.shards import open_shard_set

    shards = open_shard_set(work / "text" / "train")
    return [text for chunk in range(shards.num_chunks) for text in shards.read_documents(chunk)]  # type: ignore[misc]


def _token_type(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=5.0, help="of each variant, at least")
    parser.add_argument("--only", default="", help="names of loaders, with commas")
    parser.add_argument("--source", nargs="*", default=[], help="text to load in place of builtin:python")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, work, form, workers, cpu_seconds = json.loads(arguments.one)
        figures = measure(name, Path(work), form, workers, cpu_seconds)
        print(json.dumps(figures), flush=True)
        os._exit(0)  # workers that wait for ever end with us
    chosen = [variant for variant in VARIANTS if not arguments.only or variant[0] in arguments.only.split(",")]
    with tempfile.TemporaryDirectory(prefix="basestone-loader-") as folder:
        work = Path(folder)
        prepare_data(work, arguments.source, arguments.tokenizer)
        print(
            "| loader | form | workers | M tokens per CPU-second | sequences per second |\n|---|---|---|---|---|"
        )
        measured = partial(run_one, work, cpu_seconds=arguments.cpu_seconds)
        for name, package, forms, numbers in chosen:
            if not _installed(package):
                print(f"| {name} | not installed: left out | | | |", flush=True)
                continue
            for form in forms:
                for workers in numbers:
                    found = measured(name=name, form=form, workers=workers)
                    figures = (
                        f"{found} | "
                        if isinstance(found, str)
                        else f"{found['tokens'] / found['cpu_s'] / 1e6:,.2f} | "
                        f"{found['tokens'] / SEQUENCE / found['wall_s']:,.0f}"
                    )
                    print(f"| {name} | {form} | {workers} | {figures} |", flush=True)
    print("\n" + "\n".join(f"{name}: {note}" for name, note in NOTES.items()))


if __name__ == "__main__":
    main()
