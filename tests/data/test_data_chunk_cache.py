"""The chunk cache: what it gives is right, what it holds has a limit, whatever several processes or a crash do."""

import contextlib
import fcntl
import multiprocessing
import os
import random
import signal
import time
import zlib
from pathlib import Path

import pytest
from servers import serving
from streams import open_stream

from basestone.data.config import ReadingConfig
from basestone.data.errors import DataConfigError
from basestone.data.reading.chunk_cache import ChunkCache
from basestone.data.reading.reader import RangeReader

pytestmark = pytest.mark.faults


def size_of(directory: Path) -> int:
    """Count the bytes of everything kept, among it what is being written, while nobody adds to it."""
    with open(directory / ".total", "ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        sizes = {}
        for entry in (entry for folder in directory.glob("??") for entry in os.scandir(folder)):
            with contextlib.suppress(FileNotFoundError):  # a file that gets its final name is counted once
                sizes[entry.inode()] = entry.stat().st_size
        return sum(sizes.values())


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 1000)
    for number in range(9):
        cache.put(str(number), bytes([number]) * 100)
        os.utime(cache._path(str(number)), (number, number))
    assert cache.get("0") == bytes(100), "and reading counts as use"
    for number in (9, 10):
        cache.put(str(number), bytes([number]) * 100)
    assert cache.get("1") is None and cache.get("2") is None
    assert cache.get("0") == bytes(100) and cache.get("10") == b"\n" * 100
    assert size_of(tmp_path) <= 900
    cache.put("large", bytes(901))
    assert cache.get("large") is None
    cache.discard("0")
    assert cache.get("0") is None


def hammer(directory: Path, limit: int, seed: int, stop_after_s: float) -> None:
    """Put and get at random; every content tells its key."""
    choose = random.Random(seed)
    cache = ChunkCache(directory, limit)
    end = time.monotonic() + stop_after_s
    while time.monotonic() < end:
        key = str(choose.randrange(400))
        content = random.Random(key).randbytes(200 + int(key))
        found = cache.get(key)
        assert found in (None, content)
        if found is None:
            cache.put(key, content)
    os._exit(0)


def test_several_processes_and_kills_keep_it_right_and_under_its_limit(tmp_path: Path) -> None:
    limit = 30_000
    context = multiprocessing.get_context("fork")
    largest = kills = 0
    workers = [context.Process(target=hammer, args=(tmp_path, limit, seed, 60.0)) for seed in range(4)]
    for worker in workers:
        worker.start()
    end = time.monotonic() + 6
    while time.monotonic() < end:
        largest = max(largest, size_of(tmp_path))
        time.sleep(0.02)
        if random.random() < 0.1:
            place = random.randrange(4)
            os.kill(workers[place].pid, signal.SIGKILL)
            workers[place].join()
            assert workers[place].exitcode == -signal.SIGKILL, "no process had found a wrong content"
            workers[place] = context.Process(target=hammer, args=(tmp_path, limit, 100 + kills, 60.0))
            workers[place].start()
            kills += 1
    alive = [worker.is_alive() for worker in workers]
    for worker in workers:
        worker.kill()
        worker.join()
    assert all(alive) and kills > 5
    assert limit / 2 < largest <= limit
    # wrecks of killed writers are not chunks, and go once they are old
    for wreck in tmp_path.glob("*/.partial-*"):
        os.utime(wreck, (1, 1))
    cache = ChunkCache(tmp_path, limit)
    assert not list(tmp_path.glob("*/.partial-*"))
    assert int((tmp_path / ".total").read_text()) == size_of(tmp_path)
    assert any(cache.get(str(number)) for number in range(400))


def test_the_second_pass_reads_the_disk_and_damage_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    content = random.Random(1).randbytes(50_000)
    (tmp_path / "served" / "a.tar").write_bytes(content)
    reading = ReadingConfig(cache=str(tmp_path / "cache"), cache_gib=1e-3)
    with serving(tmp_path / "served") as server:
        place = f"{server.url}/a.tar"
        for number in range(3):
            reader = RangeReader(reading)
            for offset in range(0, 50_000, 5_000):
                part = content[offset : offset + 5_000]
                assert reader.read(place, offset, 5_000, crc32=zlib.crc32(part)) == part
            assert reader.counters.take() == ({"cache_hits": 10} if number else {"bytes_read": 50_000})
        for file in (tmp_path / "cache").glob("??/*"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        reader = RangeReader(reading)
        part = content[:5_000]
        assert reader.read(place, 0, 5_000, crc32=zlib.crc32(part)) == part
        assert reader.counters.take() == {"bytes_read": 5_000}
        assert RangeReader(reading).read(place, 0, 5_000, crc32=zlib.crc32(part)) == part
        assert len(server.requests) == 11


def test_workers_share_it_and_train_on_the_same(text_shards: Path, model: Path, tmp_path: Path) -> None:
    arguments = {"sequence_length": 48, "global_batch": 8, "seed": 7}
    reading = ReadingConfig(cache=str(tmp_path / "cache"), cache_gib=1.0).model_dump()
    with serving(text_shards) as server:
        counts = []
        for workers in (2, 1):
            stream = open_stream([f"{server.url}/train"], model, workers=workers, reading=reading, **arguments)
            local = open_stream([text_shards / "train"], model, **arguments)
            for _ in range(8):
                assert (stream.next_batch().tokens == local.next_batch().tokens).all()
            counts.append(stream.take_counts()[1])
            stream.close()
        assert counts[0]["bytes_read"] > counts[1]["bytes_read"] and counts[1]["cache_hits"] > 0


def test_a_disk_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataConfigError, match=r"reading.cache = .*/file/x: Not a directory; give a directory"):
        reading = ReadingConfig(cache=str(tmp_path / "file" / "x"))
        RangeReader(reading).read("http://127.0.0.1:1/x", 0, 1, crc32=0)
    cache = ChunkCache(tmp_path / "cache", 1000)
    for folder in range(256):
        (tmp_path / "cache" / f"{folder:02x}").touch()  # every folder's name is taken by a file
    cache.put("a", b"content")
    assert cache.get("a") is None
