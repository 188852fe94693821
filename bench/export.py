"""Export rate beside the disk's and beside what others' writers reach, and the memory that it takes.

    python bench/export.py [--parameters 600e6] [--rounds 3] [--dir DIR]

A Llama of random weights as a checkpoint, which lies in the page cache. What is timed is what `basestone export` does
with weights: read, check every sha256, round, write, fsync; verification is apart. Beside it stands the disk alone
(blocks of 8 MiB with one fsync: two at a time past the page cache, and one after another through it), and the writers
of safetensors and transformers with the whole model in memory, without reading anything; both are synced, too.
Everything takes turns, each in a process of its own; figures are medians. Memory is what is no mapped file (RssAnon).
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.hf.adapter import adapter_for
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.config import RunConfig
from basestone.trainer.forks import run_ranks
from basestone.trainer.hub.weights import write_weights
from basestone.trainer.importing import write_step

VOCAB, HIDDEN, HEADS = 32_000, 1536, 12
BLOCK_BYTES, MB = 8 << 20, 1e6
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def model_of(num_parameters: float) -> ModelConfig:
    """Give a Llama of about so many parameters."""

    def made(num_layers: int) -> ModelConfig:
        return ModelConfig(
            family="llama",
            num_layers=num_layers,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_query_groups=HEADS // 3,
            max_sequence_length=2048,
            vocab_size=VOCAB,
        )

    return next(
        model
        for model in map(made, range(1, 200))
        if sum(row.numel for row in layout_of(model).values()) >= num_parameters
    )


def write_checkpoint(place: Path, model: ModelConfig) -> None:
    """Write random masters as a step directory, and leave it in the page cache."""
    run = RunConfig(
        model=model.model_dump(),
        data={"train": "nowhere", "tokenizer": "nowhere", "sequence_length": 128},
        train={"steps": 1, "global_batch": 1},
        optimizer={"lr": 1e-4},
    )
    tensors = ((name, torch.randn(row.shape)) for name, row in layout_of(model).items())
    write_step(place, run, tensors, imported_from="random", tokenizer_sha256="", versions={})
    assert Reader(place).verify() == []


def tensors_of(place: Path, model: ModelConfig) -> CheckpointTensors:
    """Open the checkpoint."""
    return CheckpointTensors(Reader(place), layout_of(model))


def anonymous_bytes() -> int:
    """Give this process's memory that is no mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


@contextmanager
def growth(found: list[int]) -> Iterator[None]:
    """Note by how much memory grew at most inside."""
    before, over = anonymous_bytes(), threading.Event()
    peak = before

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        found.append(peak - before)


Work = Callable[[Path], None]


def measured(prepare: Callable[[], Work], out: Path) -> tuple[float, int]:
    """Give seconds and bytes of memory of a work whose preparation does not count."""
    work, found = prepare(), list[int]()
    with growth(found):
        started_s = time.perf_counter()
        work(out)
        seconds = time.perf_counter() - started_s
    return seconds, found[0]


def ours(place: Path, model: ModelConfig, dtype: torch.dtype, max_shard_bytes: int, num_processes: int) -> Work:
    """Export as the command does."""
    source, adapter = tensors_of(place, model), adapter_for(model)

    def work(out: Path) -> None:
        write_weights(
            source,
            adapter,
            model,
            out,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            num_processes=num_processes,
        )

    return work


def whole(place: Path, model: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Give the whole model in memory."""
    source, adapter = tensors_of(place, model), adapter_for(model)
    return {
        tensor.name: adapter.read(tensor, partial(source.read, dtype=dtype)).contiguous()
        for tensor in adapter.tensors(model)
    }


def safetensors_own(place: Path, model: ModelConfig, dtype: torch.dtype) -> Work:
    """Write with safetensors' save_file."""
    from safetensors.torch import save_file

    weights = whole(place, model, dtype)

    def work(out: Path) -> None:
        save_file(weights, out / "model.safetensors", {"format": "pt"})
        sync(out)

    return work


def transformers_own(place: Path, model: ModelConfig, dtype: torch.dtype) -> Work:
    """Write with transformers' save_pretrained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = adapter_for(model).hf_config(model, dtype=dtype, bos=1, eos=2, pad=0)
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype)
    loaded.load_state_dict(whole(place, model, dtype), assign=True)

    def work(out: Path) -> None:
        loaded.save_pretrained(out, max_shard_size="5GB")
        sync(out)

    return work


def sync(directory: Path) -> None:
    """See the directory's files onto the disk."""
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def disk(num_bytes: int, *, direct: bool) -> Work:
    """Write as many bytes, of nothing."""
    block = mmap.mmap(-1, BLOCK_BYTES)
    block.write(os.urandom(BLOCK_BYTES))

    def work(out: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0)
        file = os.open(out / "raw", flags)
        with ThreadPoolExecutor(2 if direct else 1) as pool:
            list(pool.map(lambda start: os.pwrite(file, block, start), range(0, num_bytes, BLOCK_BYTES)))
        os.fsync(file)
        os.close(file)

    return work


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=600e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    model = model_of(arguments.parameters)
    count = sum(row.numel for row in layout_of(model).values())
    largest = max(row.numel for row in layout_of(model).values())
    with tempfile.TemporaryDirectory(prefix="basestone-bench-", dir=arguments.dir) as folder:
        place = Path(folder) / "step_00000000"
        run_ranks(partial(write_checkpoint, place, model), 1, timeout_s=3600)
        print(f"{count / 1e6:.0f} M parameters; the largest has {largest * 2 / MB:.0f} MB in bf16\n")
        print("| weights | writer | seconds | MB/s | of the disk alone | memory, MB |")
        print("|---|---|---|---|---|---|")
        for name, dtype in DTYPES.items():
            num_bytes = count * dtype.itemsize
            works: dict[str, Callable[[], Work]] = {
                "the disk alone": partial(disk, num_bytes, direct=True),
                "the disk alone, through the page cache": partial(disk, num_bytes, direct=False),
                "ours": partial(ours, place, model, dtype, 5 * 10**9, 1),
                "ours, 2 files by 2 processes": partial(ours, place, model, dtype, num_bytes // 2 + 1, 2),
                "safetensors, from memory": partial(safetensors_own, place, model, dtype),
                "transformers, from memory": partial(transformers_own, place, model, dtype),
            }
            rows: dict[str, list[tuple[float, int]]] = {what: [] for what in works}
            for _ in range(arguments.rounds):
                for what, prepare in works.items():
                    out = Path(folder) / "out"
                    out.mkdir()
                    os.sync()
                    rows[what] += run_ranks(partial(measured, prepare, out), 1, timeout_s=3600)
                    shutil.rmtree(out)
            alone_s = statistics.median(seconds for seconds, _ in rows["the disk alone"])
            for what, found in rows.items():
                seconds = statistics.median(seconds for seconds, _ in found)
                memory = (
                    "each alike" if "processes" in what else f"{max(memory for _, memory in found) / MB:.0f}"
                )
                print(
                    f"| {name} | {what} | {seconds:.2f} | {num_bytes / MB / seconds:.0f} | {alone_s / seconds:.0%} | "
                    f"{memory} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
