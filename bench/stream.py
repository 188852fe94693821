"""What a stream's place costs and how well its order mixes: `python bench/stream.py`.

Prints the size of a state at 2,048 lanes and 10 sources; the seconds from opening to the first batch at the beginning
and far into the corpus, in turns, with a worker (wall) and without (CPU); and from how many of a corpus's hundredths a
batch of 64 documents comes, beside documents drawn at random (100 * (1 - 0.99 ** 64) = 47.4 in the mean).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from basestone.data.builtin import prepare_builtin
from basestone.data.lanes import SampleGroup, Source
from basestone.data.mixing import SourceSettings
from basestone.data.position import StreamPosition, merge_states
from basestone.data.shards import ShardWriter, open_shard_set
from basestone.data.stream import TokenStream
from basestone.data.stream_settings import StreamSettings
from basestone.data.tokenizer import Tokenizer

LANES, SOURCES, READERS = 2048, 10, 64
SEQUENCE, BATCH, FAR_BATCHES, ROUNDS = 512, 64, 300, 9
DOCUMENTS, CHUNK_BYTES, SHARD_BYTES = 20_000, 128 << 10, 64 << 20


def state_bytes() -> int:
    """Give the size of a merged state whose lanes are all far along."""
    names = [f"source-{number}" for number in range(SOURCES)]
    settings = StreamSettings(tuple(SourceSettings(name, ("x",)) for name in names), "t", SEQUENCE, LANES, 1)
    parts = []
    for reader in range(READERS):
        lanes = np.arange(reader, LANES, READERS)
        position = StreamPosition(settings, names, "0" * 64, lanes, is_first=reader == 0)
        for source in range(SOURCES):
            one = np.ones(len(lanes), np.int64)
            cursors = np.tile([123_456, 789, 12_345], (len(lanes), 1))
            position.advance(SampleGroup(lanes, source * one, cursors, one, one, one, lanes), LANES)
        parts.append(position.state())
    return len(json.dumps(merge_states(parts)))


def first_batch_s(settings: StreamSettings, state: dict | None, workers: int) -> float:
    """Give the seconds from nothing to the first batch: of the wall with workers, of the CPU without."""
    clock = time.perf_counter if workers else time.process_time
    begun_s = clock()
    stream = TokenStream(settings, global_batch=BATCH, reader=0, num_readers=1, workers=workers, state=state)
    stream.next_batch()
    taken_s = clock() - begun_s
    stream.close()
    return taken_s


def hundredths(folder: Path, tokenizer: Path) -> float:
    """Give the mean number of distinct hundredths of the corpus among the documents of a batch."""
    sizes = np.random.default_rng(1).lognormal(7.3, 1.0, DOCUMENTS).astype(int) + 20
    writer = ShardWriter(folder, shard_bytes=SHARD_BYTES, chunk_bytes=CHUNK_BYTES)
    for number, size in enumerate(sizes):
        writer.write_text(f"{number:06d}".ljust(size, "x"))
    writer.finish()
    source = Source([open_shard_set(folder)], Tokenizer(tokenizer), 1)
    lanes = [
        [int(text[:6]) for ordinal in range(lane, source.num_chunks, BATCH) for text in source.read(ordinal)]
        for lane in range(BATCH)
    ]
    rows = zip(*lanes, strict=False)
    return statistics.mean(len({number * 100 // DOCUMENTS for number in row}) for row in rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        corpus = prepare_builtin("builtin:python", Path.home() / ".cache" / "basestone")
        settings = StreamSettings(
            (SourceSettings("train", (str(corpus.train),)),), str(corpus.tokenizer), SEQUENCE, BATCH, 1
        )
        stream = TokenStream(settings, global_batch=BATCH, reader=0, num_readers=1, workers=0)
        for _ in range(FAR_BATCHES):
            stream.next_batch()
        state = stream.state()
        print(f"state, {LANES:,} lanes x {SOURCES} sources: {state_bytes() / 1e6:.2f} MB")
        for workers, unit in ((1, "with a worker, s"), (0, "without, CPU s")):
            pairs = [[first_batch_s(settings, at, workers) for at in (None, state)] for _ in range(ROUNDS)]
            cold, far = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"first batch {unit}: {cold:.3f} at the beginning, {far:.3f} after {stream.position:,} samples, "
                f"ratio {far / cold:.2f}"
            )
        print(
            f"hundredths of the corpus in {BATCH} documents: {hundredths(Path(name) / 's', corpus.tokenizer):.1f}"
        )
        print(f"drawn at random: {100 * (1 - 0.99**BATCH):.1f}")


if __name__ == "__main__":
    main()
