"""Preparation: what is kept, what is dropped and why, and the same bytes each time."""

import base64
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from basestone.data.cleaning import CleanDocument, clean_document, document_digest, is_heldout
from basestone.data.errors import DataConfigError, DataError, DataStorageError
from basestone.data.prepare import PrepareProgress, prepare
from basestone.data.shards import open_shard_set
from basestone.data.sources import find_source_files
from basestone.data.storage import storage_errors, write_atomic

LONG = "words enough to be kept, as this line is longer than the least number of letters\n"


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def texts(directory: Path) -> list[str]:
    opened = open_shard_set(directory)
    return [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]


def test_equal_input_gives_equal_bytes_with_any_workers(sources: Path, model: Path, tmp_path: Path) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": f"{LONG} {number}"}) + "\n" for number in range(2500)))
    for tokenizer in (None, model):
        options = {"tokenizer": tokenizer, "heldout_fraction": 0.1, "shard_bytes": 100_000, "chunk_bytes": 4096}
        outs = [tmp_path / f"{tokenizer is None}-{workers}" for workers in (0, 2)]
        for workers, out in zip((0, 2), outs, strict=True):
            prepare([str(sources), str(many)], out, workers=workers, **options)
        first, second = map(tree, outs)
        assert first == second and {"report.json", "train/manifest.json", "heldout/00000.tar"} <= set(first)


def test_every_document_is_kept_once_and_held_out_by_its_content(
    documents: list[str], sources: Path, text_shards: Path, tmp_path: Path
) -> None:
    train, heldout = texts(text_shards / "train"), texts(text_shards / "heldout")
    assert sorted(train + heldout) == sorted(set(documents)) and len(heldout) > 5
    lines = (sources / "all.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "back.jsonl").write_text("".join(lines[::-1]))
    prepare([str(tmp_path / "back.jsonl")], tmp_path / "out", heldout_fraction=0.15)
    assert sorted(texts(tmp_path / "out" / "heldout")) == sorted(heldout)
    assert sorted(texts(tmp_path / "out" / "train")) == sorted(train)


def test_the_choice_of_heldout_documents_is_golden() -> None:
    """Another choice would put documents that one run trained on into the next one's held-out set."""
    assert document_digest(["a", "b"]).hex() == "acc9227cc02e5f5c13e74125bce89499"
    assert is_heldout(bytes.fromhex("3fffffffffffffff" + "00" * 8), 0.25)
    assert not is_heldout(bytes.fromhex("4000000000000000" + "00" * 8), 0.25)


@pytest.mark.parametrize("workers", [0, 1])
def test_drops_are_counted_with_their_reasons(workers: int, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    files = {
        "a.txt": LONG.encode(),
        "b.txt": LONG.replace(" ", "  ").replace("\n", "\r\n").encode(),
        "c.md": b"\xff\xfe" + LONG.encode(),
        "d.txt": b" \n\t ",
        "e.py": b"x = 1\n",
        "f.txt": LONG.encode() + b"\0\0",
        ".hidden.txt": LONG.encode(),
        "picture.png": LONG.encode(),
        "g.jsonl": b'{"text": 3}\n\n{"text": \n["text"]\n' + json.dumps({"text": LONG + "two"}).encode(),
        "h.jsonl": b'{"text": "' + LONG.strip().encode() + b'\\ud800"}\n',
        "i.txt.gz": gzip.compress(LONG.encode() * 50)[:-12],
        "j.jsonl.zst": zstandard.compress(json.dumps({"text": LONG + "zstd"}).encode() * 9)[:-6],
        "k.txt.gz": b"no archive",
    }
    for name, content in files.items():
        (source / name).write_bytes(content)
    seen: list[PrepareProgress] = []
    report = prepare([str(source)], tmp_path / "out", heldout_fraction=0, workers=workers, progress=seen.append)
    expected = {
        "duplicate": 1,
        "not_utf8": 2,
        "empty": 1,
        "too_short": 1,
        "binary": 1,
        "bad_json": 1,
        "no_text_field": 2,
        "damaged_archive": 3,
    }
    assert report.dropped == expected
    assert texts(tmp_path / "out" / "train") == [LONG, LONG + "two"]
    assert (report.documents_read, report.documents_kept, report.train_documents) == (14, 2, 2)
    assert seen[0] == PrepareProgress(
        "cleaning", 14, 3, report.train_bytes + len(LONG.replace(" ", "  ")), 10, 11
    )
    assert seen[-1] == PrepareProgress("writing", 14, 2, report.train_bytes, 14, 14)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["dropped"] == expected and str(tmp_path / "out") not in json.dumps(written)
    assert written["dropped_examples"]["bad_json"] == [f"{source}/g.jsonl:3"]
    assert open_shard_set(tmp_path / "out" / "heldout").num_documents == 0


def test_compressed_and_plain_sources_are_one(sources: Path, tmp_path: Path) -> None:
    content = (sources / "all.jsonl").read_bytes()
    frames = zstandard.compress(content[:5000]) + zstandard.compress(content[5000:])
    places = {"plain.jsonl": content, "x.jsonl.gz": gzip.compress(content), "y.ndjson.zst": frames}
    trees = []
    for name, packed in places.items():
        (tmp_path / name).write_bytes(packed)
        prepare([str(tmp_path / name)], tmp_path / f"out-{name}")
        trees.append({file: data for file, data in tree(tmp_path / f"out-{name}").items() if "/" in file})
    assert trees[0] == trees[1] == trees[2]


def test_sources_may_be_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/sub/2.txt", "b/3.txt", "b/4.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LONG + name)
    given = [str(tmp_path / "b/4.log"), str(tmp_path / "a"), str(tmp_path / "*/[13].txt")]
    prepare(given, tmp_path / "out", heldout_fraction=0)
    assert [text.removeprefix(LONG) for text in texts(tmp_path / "out" / "train")] == [
        "b/4.log",
        "a/1.txt",
        "a/sub/2.txt",
        "b/3.txt",
    ]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\ufeffa\r\nb\rc\n" + LONG, "a\nb\nc\n" + LONG),
        ("a\x07\x1b[0m\x7f\x85\tb\x0c" + LONG, "a[0m\tb" + LONG),
        ("e\u0301 ﬁ " + LONG, "e\u0301 ﬁ " + LONG),
        ("\ufffe\ufdd0x" + LONG, "x" + LONG),
    ],
)
def test_cleaning_changes_only_what_is_no_text(raw: str, clean: str) -> None:
    found = clean_document(raw.encode(), 32)
    assert isinstance(found, CleanDocument) and found.text == clean
    assert clean_document(raw, 32) == found


def test_a_full_place_is_refused(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare([str(sources)], tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(DataConfigError, match="exists and is not empty; give another place") as caught:
        prepare([str(sources)], tmp_path / "out")
    assert caught.value.exit_code == 64 and tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0"),
        ({"chunk_bytes": 10}, "chunk_bytes is 10"),
        ({"shard_bytes": 2000}, "shard_bytes 2000"),
        ({"min_chars": -1}, "min_chars is -1"),
        ({"workers": -1}, "workers -1"),
        (
            {"min_chars": 10**6},
            r"no document is left to train on: \d+ read, 0 held out, dropped too_short: \d+",
        ),
        ({"tokenizer": Path("/nonexistent.model")}, "tokenizer /nonexistent.model cannot be read"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    options: dict, message: str, sources: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataConfigError, match=message):
        prepare([str(sources)], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_document_that_breaks_the_tokenizer_is_dropped(tmp_path: Path, workers: int) -> None:
    """The pattern of cl100k gives up on very long runs of blanks, with a panic."""
    ranks = tmp_path / "cl100k_base.tiktoken"
    ranks.write_text("".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256)))
    ranks.with_name(f"{ranks.name}.toml").write_text(
        'preset = "cl100k_base"\n[specials]\n"<|endoftext|>" = 256\n'
    )
    documents = [f"one {LONG}", "x" + " " * 1_000_000 + "y", f"two {LONG}"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    report = prepare(
        [str(tmp_path / "in.jsonl")], tmp_path / "out", tokenizer=ranks, heldout_fraction=0, workers=workers
    )
    assert report.dropped == {"not_tokenised": 1} and report.train_documents == 2
    assert report.dropped_examples == {"not_tokenised": [f"{tmp_path}/in.jsonl:2"]}


def test_sources_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataConfigError, match=r"source '.*none' names no file; give a file, a folder"):
        prepare([str(tmp_path / "none")], tmp_path / "out")
    with pytest.raises(DataConfigError, match="holds no text files"):
        prepare([str(tmp_path / "folder")], tmp_path / "out")
    with pytest.raises(DataConfigError, match="no sources; give at least one"):
        prepare([], tmp_path / "out")
    for source in ("", " "):  # an empty path would be the working directory
        with pytest.raises(DataConfigError, match=f"source '{source}' is empty; give a file, a folder"):
            prepare([source], tmp_path / "out")


def test_pipes_and_devices_are_refused_and_passed_over_in_folders(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for source in (str(tmp_path / "pipe.txt"), "/dev/zero"):
        with pytest.raises(
            DataConfigError, match="is neither a regular file nor a folder; write what it gives"
        ):
            find_source_files([source])
    (tmp_path / "a.txt").write_text(LONG)
    assert find_source_files([str(tmp_path)]) == [tmp_path / "a.txt"]
    assert find_source_files([f"{tmp_path}/*.txt"]) == [tmp_path / "a.txt"]


def test_a_place_that_leads_through_a_file_is_the_users(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "below" / "out"):
        with pytest.raises(
            DataConfigError, match=r"writing .* failed: .*file.*; choose another path"
        ) as caught:
            prepare([str(sources)], out)
        assert caught.value.exit_code == 64


@pytest.mark.parametrize("out", [".", "/", "", ".."])
def test_a_place_without_a_name_is_refused(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataConfigError, match=r"out '.*' has no name of its own; name a directory") as caught:
        prepare([str(sources)], Path(out))
    assert caught.value.exit_code == 64 and list(tmp_path.iterdir()) == []


def test_zst_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(LONG.encode()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataConfigError, match=r"needs the package zstandard.*pip install 'basestone\[zst\]'"):
        prepare([str(tmp_path / "a.txt.zst")], tmp_path / "out")


@pytest.mark.faults
def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"{LONG} {number}"}) + "\n" for number in range(3000)))
    code = f"""
import resource, sys
from pathlib import Path
from basestone.data.errors import DataStorageError
from basestone.data.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    prepare([{str(source)!r}], Path({str(tmp_path / "out")!r}))
except DataStorageError as error:
    print(error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("74 writing ") and "failed: File too large" in done.stdout
    prepare([str(source)], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


@pytest.mark.faults
def test_a_dead_preparing_process_is_an_error(sources: Path, tmp_path: Path) -> None:
    """The first report of progress kills the workers, as the system does when memory runs out."""
    import multiprocessing

    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": f"{LONG} {number}"}) + "\n" for number in range(5000))
    )

    def kill(_: PrepareProgress) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(DataError, match=r"a preparing process died.*use fewer workers"):
        prepare([str(tmp_path / "in.jsonl")], tmp_path / "out", workers=1, progress=kill)
    assert not (tmp_path / "out").exists()


def test_files_are_replaced_as_a_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    os.link(tmp_path / "a", tmp_path / "old")
    write_atomic(tmp_path / "a", b"two")
    assert tree(tmp_path) == {"a": b"two", "old": b"one"}  # what was open for reading stays as it was
    expected = r"saving failed: No such file.*: .*missing.*; check free space"
    with pytest.raises(DataStorageError, match=expected), storage_errors("saving"):
        write_atomic(tmp_path / "missing" / "a", b"x")
