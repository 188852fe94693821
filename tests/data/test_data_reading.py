"""Reading from anywhere: what is tried again, what is not, and that nothing is lost or made up."""

import os
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from servers import FAULTS, FakeHub, s3_endpoint, serving, serving_s3
from streams import open_stream

from basestone.data.config import ReadingConfig
from basestone.data.errors import DataConfigError, DataError, DataStorageError
from basestone.data.indexing import Indexer
from basestone.data.lanes import Source
from basestone.data.position import merge_states
from basestone.data.quarantine import Quarantine
from basestone.data.reading.reader import FIRST_WAIT_S, RangeReader
from basestone.data.reading.transport import join, shown
from basestone.data.shards import open_shard_set
from basestone.data.tokenizer import Tokenizer

pytestmark = pytest.mark.faults


def impatient(**settings) -> RangeReader:
    """A reader that does not wait between its tries."""
    return RangeReader(ReadingConfig(**settings), sleep=lambda _: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    content = random.Random(1).randbytes(100_000)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a b.tar").write_bytes(content)
    return tmp_path / "files"


def test_ranges_over_http_are_those_of_the_file(folder: Path) -> None:
    content = (folder / "a b.tar").read_bytes()
    with serving(folder) as server:
        place, reader = f"{server.url}/a%20b.tar", impatient()
        assert reader.size(place)[0] == len(content) and reader.size(place)[1]
        assert reader.read_all(place) == content
        for offset, length in ((0, 1), (99_999, 1), (5, 7_000), (0, 100_000), (50, 0)):
            assert reader.read(place, offset, length) == content[offset : offset + length]
        assert reader.counters.take() == {"bytes_read": 207_002}


@pytest.mark.parametrize("fault", ["status 500", "status 503", "short", "reset", "flip", "hang"])
def test_what_passes_is_tried_again(fault: str, folder: Path) -> None:
    content = (folder / "a b.tar").read_bytes()
    with serving(folder, fault_rate=1.0, faults=(fault,), most_in_a_row=3, hang_s=0.3) as server:
        reader = impatient(attempts=4, timeout_s=0.2)
        crc32 = zlib.crc32(content[100:900])
        assert reader.read(f"{server.url}/a b.tar", 100, 800, crc32=crc32) == content[100:900]
        assert reader.counters.take()["retries"] == 3 == server.met[fault]
        with pytest.raises(DataError, match=r"a b.tar, bytes 0-800: ") as caught:
            impatient(attempts=2, timeout_s=0.2).read(f"{server.url}/a b.tar", 0, 800, crc32=crc32)
        assert caught.value.exit_code == (76 if fault == "flip" else 74)


def test_waits_grow_are_random_and_heed_the_server(folder: Path) -> None:
    waits: list[float] = []
    with serving(folder, fault_rate=1.0, faults=("status 500",), most_in_a_row=5) as server:
        reader = RangeReader(ReadingConfig(attempts=6), sleep=waits.append, chance=lambda: 0.5)
        reader.read(f"{server.url}/a b.tar", 0, 10)
    assert waits == [0.5 * FIRST_WAIT_S * 2**number for number in range(5)]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{url}/none.tar", r"/none.tar, bytes 0-10: status 404; check that it is there"),
        ("http://127.0.0.1:1/x.tar", r"refused.*\(tried 2 times\); check that it is there"),
        ("http://user:secret@127.0.0.1:1/x.tar?key=secret", r"shard http://127.0.0.1:1/x.tar: |x.tar, bytes"),
        ("http://user:secret@127.0.0.1:99999/x.tar", r"x.tar, bytes 0-10: this URL cannot be parsed; check"),
        ("http://[bad/secret", r"http://\.\.\., bytes 0-10: this URL cannot be parsed"),
        ("s4://bucket/x.tar", r"the scheme s4:// is not known; use a path, http\(s\)://, s3://"),
        ("gs://bucket/x.tar", r"the scheme gs:// needs a package .*; pip install 'basestone\[gcs\]'"),
        ("pipe:cat x.tar", r"'pipe:cat x.tar' would run a command; set reading.allow_pipe = true"),
        ("/none/x.tar", r"/none/x.tar, bytes 0-10: No such file or directory; check that it is there"),
    ],
)
def test_what_cannot_be_read_is_said_once_without_secrets(place: str, message: str, folder: Path) -> None:
    with serving(folder) as server:
        with pytest.raises(DataError, match=message) as caught:
            impatient(attempts=2).read(place.format(url=server.url), 0, 10)
        assert "secret" not in str(caught.value)
        assert len(server.requests) <= 1, "a 404 is not asked for again"


def test_a_server_without_ranges_is_refused(folder: Path) -> None:
    with (
        serving(folder, ranges=False) as server,
        pytest.raises(DataStorageError, match=r"gives no byte ranges \(status 200\); copy the shards"),
    ):
        impatient().read(f"{server.url}/a b.tar", 10, 10)


def test_pipes_give_what_the_command_writes(folder: Path) -> None:
    content = (folder / "a b.tar").read_bytes()
    reader, place = impatient(allow_pipe=True, attempts=2), f"pipe:cat '{folder}/a b.tar'"
    assert reader.size(place) == (len(content), "")
    assert reader.read(place, 70_000, 30_000) == content[70_000:]
    with pytest.raises(DataStorageError, match=r"ended with status 1 \(tried 2 times\)"):
        reader.read("pipe:cat /none", 0, 10)
    with pytest.raises(DataStorageError, match=r"cannot be started: .*No such file"):
        reader.read("pipe:/none/command", 0, 10)
    with pytest.raises(DataStorageError, match=r"cannot be started: "):
        reader.read("pipe:", 0, 10)
    with pytest.raises(DataStorageError, match=r"cannot be started: No closing quotation"):
        reader.read("pipe:cat 'x", 0, 10)
    marker = folder / "marker"
    with pytest.raises(DataError):
        reader.read(f"pipe:cat /none; touch {marker}", 0, 10)
    assert not marker.exists(), "no shell reads the command"


def test_places_are_joined_and_shown() -> None:
    assert join("/a/b", "c.tar") == "/a/b/c.tar" and join("/a", "/c.tar") == "/c.tar"
    assert join("s3://b/dir/", "c.tar") == "s3://b/dir/c.tar" and join("/a", "s3://b/c") == "s3://b/c"
    assert join("https://h/d?token=1", "c.tar") == "https://h/d/c.tar?token=1"
    assert shown("https://me:pw@host:80/d/c.tar?token=1#x") == "https://host:80/d/c.tar"


def chunks_over(server, shards: Path, tokenizer: Path, num_reads: int, **settings) -> tuple[Quarantine, int]:
    """Read chunks of a served directory until so many requests went wrong; compare each with the local file."""
    local = open_shard_set(shards)
    reading = ReadingConfig(**settings)
    reader = RangeReader(reading, sleep=lambda _: None)
    place = f"{server.url}/{shards.name}"
    shards = open_shard_set(place, reader)
    quarantine = Quarantine(reading, shards.num_bytes)
    source = Source([shards], Tokenizer(tokenizer), 3, quarantine=quarantine)
    expected = Source([local], Tokenizer(tokenizer), 3)
    ordinal = 0
    while sum(server.met.values()) < num_reads:
        assert source.read(ordinal) == expected.read(ordinal), f"chunk {ordinal} of the sequence"
        ordinal += 1
    return quarantine, ordinal


@pytest.mark.parametrize("num_reads", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_faults_that_pass_lose_nothing(num_reads: int, text_shards: Path, model: Path) -> None:
    # few of them hang, as each of these costs a timeout, which has to be long enough for a busy machine
    faults = (*FAULTS[:-1] * 10, "hang")
    settings = {"attempts": 8, "timeout_s": 0.5, "on_bad_chunk": "quarantine"}
    with serving(text_shards, fault_rate=0.6, faults=faults, most_in_a_row=4, hang_s=0.6) as server:
        quarantine, count = chunks_over(server, text_shards / "train", model, num_reads, **settings)
        assert quarantine.take_news() == () and count > num_reads / 4
        assert all(server.met[fault] > num_reads / 10 for fault in FAULTS[:-1]) and server.met["hang"] > 1


def test_damage_that_stays_loses_exactly_its_chunk(text_shards: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(text_shards / "train", tmp_path / "served" / "train")
    local = open_shard_set(text_shards / "train")
    bad = [3, 11, local.num_chunks - 1]
    for chunk in bad:
        shard, offset, length = (int(value) for value in local.chunks[chunk, :3])
        file = tmp_path / "served" / "train" / local.files[shard]
        content = bytearray(file.read_bytes())
        content[offset + length // 2] ^= 4
        file.write_bytes(content)
    reading = ReadingConfig(on_bad_chunk="quarantine", max_bad_fraction=0.5, attempts=8, timeout_s=0.5)
    with serving(tmp_path / "served", fault_rate=0.5, faults=FAULTS[:-1], most_in_a_row=2) as server:
        reader = RangeReader(reading, sleep=lambda _: None)
        quarantine = Quarantine(reading, local.num_bytes)
        remote = open_shard_set(f"{server.url}/train", reader)
        source = Source([remote], Tokenizer(model), 3, quarantine=quarantine)
        expected = Source([local], Tokenizer(model), 3)
        lost = 0
        for ordinal in range(2 * local.num_chunks):
            got, want = source.read(ordinal), expected.read(ordinal)
            assert got == want or got == []
            lost += not got
    news = quarantine.take_news()
    assert sorted(item["chunk"] for item in news) == bad and lost == 2 * len(bad)
    for item in news:
        shard, offset, length = (int(value) for value in local.chunks[item["chunk"], :3])
        assert f"{local.files[shard]}, bytes {offset}-{offset + length}: " in item["problem"]
        assert item["bytes"] == length


@pytest.mark.parametrize(("readers", "workers"), [(1, 0), (1, 2), (3, 1)])
def test_a_bad_chunk_is_told_once_by_a_reader_and_known_after_a_resume(
    readers: int, workers: int, text_shards: Path, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(text_shards / "heldout", tmp_path / "train")
    local = open_shard_set(tmp_path / "train")
    file, length = tmp_path / "train" / local.files[0], int(local.chunks[0, 2])
    content = bytearray(file.read_bytes())
    content[length // 2] ^= 4
    file.write_bytes(content)
    reading = ReadingConfig(on_bad_chunk="quarantine", max_bad_fraction=0.9).model_dump()
    arguments = {"sequence_length": 64, "global_batch": 6, "seed": 7, "reading": reading, "workers": workers}

    def run(state, batches: int) -> tuple[list, dict]:
        streams = [
            open_stream(
                [tmp_path / "train"], model, reader=reader, num_readers=readers, state=state, **arguments
            )
            for reader in range(readers)
        ]
        for _ in range(batches):
            for stream in streams:
                stream.next_batch()
        news = [stream.take_news() for stream in streams]
        merged = merge_states([stream.state() for stream in streams])
        for stream in streams:
            stream.close()
        return news, merged

    epochs = 3 * sum(len(text) for chunk in range(1, local.num_chunks) for text in local.read_documents(chunk))
    batches = epochs // (6 * 64)  # every worker passes the chunk at some time
    news, state = run(None, batches)
    assert all(len(items) <= 1 for items in news) and any(news)
    assert {(item["source"], item["chunk"], item["bytes"]) for items in news for item in items} == {
        (0, 0, length)
    }
    assert state["sources"][0]["bad_chunks"] == [[0, length]]
    again, state = run(state, batches)
    assert not any(again) and state["sources"][0]["bad_chunks"] == [[0, length]]
    # what is known counts toward the limit: the same chunk is one too many where more is known to be bad already
    state["sources"][0]["bad_chunks"] = [[1, int(local.chunks[:, 2].sum())]]
    with pytest.raises(DataError, match=r"bytes cannot be read, more than reading.max_bad_fraction = 0.9"):
        run(state, batches)


def test_the_limit_is_of_all_sources_together(text_shards: Path, model: Path) -> None:
    quarantine = Quarantine(ReadingConfig(on_bad_chunk="quarantine", max_bad_fraction=0.5), 1000)
    quarantine.know([(1, 5, 300)])
    quarantine.add(0, 5, 200, DataError("first"))
    quarantine.add(0, 5, 200, DataError("again"))
    assert quarantine.take_news() == ({"source": 0, "chunk": 5, "bytes": 200, "problem": "first"},)
    with pytest.raises(
        DataError, match=r"501 of 1000 bytes cannot be read, more than .* 0.5; .*; the last: second"
    ):
        quarantine.add(1, 6, 1, DataError("second"))
    with pytest.raises(DataStorageError, match="as it is"):
        Quarantine(ReadingConfig(), 1000).add(0, 1, 1, DataStorageError("as it is"))


def test_a_stream_over_http_is_the_local_one(text_shards: Path, model: Path) -> None:
    arguments = {"sequence_length": 48, "global_batch": 12, "seed": 7}
    with serving(text_shards, fault_rate=0.5, faults=("status 500", "flip"), most_in_a_row=2) as server:
        for workers in (0, 2):
            stream = open_stream([f"{server.url}/train"], model, workers=workers, **arguments)
            mine = open_stream([text_shards / "train"], model, **arguments)
            for _ in range(6):
                got, want = stream.next_batch(), mine.next_batch()
                assert (got.tokens == want.tokens).all() and (got.ids == want.ids).all()
            _, counts = stream.take_counts()
            assert counts["retries"] > 0 and counts["bytes_read"] > 0 and counts["bad_chunks"] == 0
            assert stream.state()["sources"] == mine.state()["sources"]
            stream.close()


@pytest.fixture(scope="module")
def s3():
    """A real S3 client's bucket, on moto's server."""
    with serving_s3() as port, s3_endpoint(f"http://127.0.0.1:{port}") as filesystem:
        filesystem.mkdir("corpus")
        yield filesystem


def test_a_stream_from_s3_is_the_local_one(s3, text_shards: Path, model: Path, tmp_path: Path) -> None:
    s3.put(str(text_shards / "train"), "corpus/train", recursive=True)
    arguments = {"sequence_length": 48, "global_batch": 12, "seed": 7, "workers": 1}
    stream = open_stream(["s3://corpus/train"], model, **arguments)
    mine = open_stream([text_shards / "train"], model, **arguments)
    for _ in range(4):
        assert (stream.next_batch().tokens == mine.next_batch().tokens).all()
    stream.close()
    mine.close()
    reader = impatient(attempts=2)
    for tar in sorted((text_shards / "train").glob("*.tar")):
        s3.put(str(tar), f"corpus/raw/{tar.name}")
    indexer = Indexer(tmp_path / "kept", reader, chunk_bytes=4096)
    indexed = indexer.indexed("s3://corpus/raw/")
    assert open_shard_set(indexed, reader).fingerprint == open_shard_set(text_shards / "train").fingerprint
    with pytest.raises(DataStorageError, match=r"s3://corpus/none.tar, bytes 0-10: .*check that it is there"):
        reader.read("s3://corpus/none.tar", 0, 10)
    with pytest.raises(
        DataConfigError,
        match=r"s3://corpus/empty/ holds no manifest.json that can be read .* and no .tar files",
    ):
        indexer.indexed("s3://corpus/empty/")


def test_a_stream_from_the_hub_is_the_local_one(text_shards: Path, model: Path, tmp_path: Path) -> None:
    hub = FakeHub(text_shards / "train", "us/corpus")
    code = """
import sys
from pathlib import Path
from streams import open_stream
place, local, model = sys.argv[1:]
streams = [open_stream([p], Path(model), sequence_length=48, global_batch=12, seed=7) for p in (place, local)]
for _ in range(3):
    a, b = (stream.next_batch() for stream in streams)
    assert (a.tokens == b.tokens).all()
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    tests = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [tests, environment.get("PYTHONPATH", "")]))
    words = ["hf://datasets/us/corpus", str(text_shards / "train"), str(model)]
    done = subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)
    hub.close()
    assert done.returncode == 0, done.stderr
    assert any("/resolve/" in request for request in hub.requests)
