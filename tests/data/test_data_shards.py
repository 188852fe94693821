"""Shard directories: what is written, and what is said of damaged ones."""

import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from basestone.data.errors import DataConfigError, DataError
from basestone.data.indexing import index_directory
from basestone.data.inspect import inspect_directory, verify_directory
from basestone.data.shards import ShardWriter, open_filled_shard_set, open_shard_set


@pytest.fixture
def shards(text_shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(text_shards / "train", tmp_path / "shards"))


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_indexes_say_where_samples_are(text_shards: Path) -> None:
    manifest = json.loads((text_shards / "train" / "manifest.json").read_text())
    assert len(manifest["shards"]) > 1
    for shard in manifest["shards"]:
        path = text_shards / "train" / shard["file"]
        with tarfile.open(path) as archive:
            offsets = [member.offset for member in archive]
        content = path.with_name(path.name + ".idx").read_bytes()
        found = struct.unpack(f"<{len(content) // 8}Q", content)
        assert list(found[:-1]) == offsets and len(offsets) == shard["samples"]
        assert path.read_bytes()[found[-1] :].strip(b"\0") == b"" and path.stat().st_size == shard["bytes"]
        ends = [row[0] + row[1] for row in shard["chunks"]]
        assert [row[0] for row in shard["chunks"]] == [0, *ends[:-1]] and ends[-1] == found[-1]
        assert sum(row[2] for row in shard["chunks"]) == shard["samples"]
        assert all(row[1] >= 4096 for row in shard["chunks"][:-1])


def test_manifest_counts(text_shards: Path, token_shards: Path) -> None:
    text = json.loads((text_shards / "train" / "manifest.json").read_text())
    tokens = json.loads((token_shards / "train" / "manifest.json").read_text())
    assert (text["kind"], tokens["kind"]) == ("text", "tokens")
    assert text["documents"] == tokens["documents"] > 90
    assert text["bytes_text"] == tokens["bytes_text"] > 100_000
    opened = open_shard_set(token_shards / "train")
    blocks = [document for chunk in range(opened.num_chunks) for document in opened.read_documents(chunk)]
    assert len(blocks) == tokens["documents"] and sum(map(len, blocks)) == tokens["tokens"]


def test_index_of_own_shards_gives_the_same_manifest(shards: Path) -> None:
    before = (shards / "manifest.json").read_bytes()
    for file in (*shards.glob("*.idx"), shards / "manifest.json"):
        file.unlink()
    summary = index_directory(shards, chunk_bytes=4096)
    assert (shards / "manifest.json").read_bytes() == before
    assert summary["fingerprint"] == open_shard_set(shards).fingerprint and summary["kind"] == "text"


def test_foreign_tars_are_indexed(tmp_path: Path) -> None:
    """Folders in the names, extra members, metadata and long names are all part of the format."""
    members = [("__meta__.json", b"{}")]
    for number in range(5):
        members += [
            (f"a/b/{number}{'x' * 120}.txt", f"text {number} ä".encode()),
            (f"a/b/{number}{'x' * 120}.json", b"1"),
        ]
    write_tar(tmp_path / "x.tar", members)
    assert index_directory(tmp_path, chunk_bytes=1024)["documents"] == 5
    opened = open_shard_set(tmp_path)
    found = [document for chunk in range(opened.num_chunks) for document in opened.read_documents(chunk)]
    assert found == [f"text {number} ä" for number in range(5)] and opened.num_chunks > 1
    assert opened.text_bytes == 5 * len("text 0 ä".encode())


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3")], "key 'a' comes twice"),
        (
            [("a.1.txt", b"1"), ("a.1.txt", b"2")],
            r"cannot be read as a tar stream: a.1.txt: duplicate file name",
        ),
        (
            [("a.txt", b"1"), ("b.jpg", b"2")],
            r"sample b has no .txt member but .jpg; a text shard holds one .txt",
        ),
        ([("a.txt", b"\xff\xfe")], r"sample a is not UTF-8 \(invalid start byte at byte 0\); pass the sources"),
        ([("noextension", b"1")], "member 'noextension' is not named KEY.EXTENSION"),
        ([("a.tok.u16", b"1")], "block a ends inside a number"),
        ([("a.txt", b"1"), ("b.json", b"{}")], "sample b has a .json member without a string `text`"),
        ([("a.tok.u16", b"12"), ("b.txt", b"1")], "sample b holds .txt; a token block holds"),
        ([("a.tok.u16", b"123"), ("a.len.u32", b"1234")], "block a ends inside a number"),
        ([("a.tok.u16", b"1234"), ("a.len.u32", b"\1\0\0\0")], "holds 2 tokens but its lengths add up to 1"),
    ],
)
def test_tars_outside_the_format_are_refused(members: list, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        index_directory(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("cut", [100, 512, 700, 5000])
def test_cut_shards_are_not_indexed(cut: int, shards: Path) -> None:
    """At a member's boundary and inside a header tar readers see nothing amiss."""
    offsets = np.frombuffer((shards / "00000.tar.idx").read_bytes(), "<u8")
    for place in (cut, int(offsets[5]), int(offsets[5]) + 100):
        copy = shards.parent / f"cut-{place}"
        copy.mkdir()
        (copy / "x.tar").write_bytes((shards / "00000.tar").read_bytes()[:place])
        with pytest.raises(DataError, match=r"is cut or damaged|is not a whole, uncompressed tar"):
            index_directory(copy)


def test_a_damaged_header_is_not_indexed(shards: Path) -> None:
    offsets = np.frombuffer((shards / "00000.tar.idx").read_bytes(), "<u8")
    content = bytearray((shards / "00000.tar").read_bytes())
    content[int(offsets[7]) + 150] ^= 1
    (shards / "00000.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"is cut or damaged at byte {offsets[7]} of"):
        index_directory(shards)


def test_compressed_and_foreign_files_are_not_indexed(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [("a.txt", b"1")], mode="w:gz")
    with pytest.raises(DataError, match="is not a whole, uncompressed tar"):
        index_directory(tmp_path)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DataConfigError, match=r"holds no \.tar files"):
        index_directory(tmp_path)
    with pytest.raises(DataConfigError, match="is no directory"):
        index_directory(tmp_path / "none")


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"1")])
    write_tar(tmp_path / "b.tar", [("a.tok.u16", b"1234"), ("a.len.u32", b"\2\0\0\0")])
    (tmp_path / "manifest.json").write_text('{"tokenizer_sha256": "abc"}')
    with pytest.raises(DataError, match="mixes shards of text and tokens"):
        index_directory(tmp_path)


def test_blocks_need_their_tokenizer(token_shards: Path, model: Path, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(token_shards / "train", tmp_path / "shards"))
    before = json.loads((shards / "manifest.json").read_text())
    assert index_directory(shards, chunk_bytes=4096)["fingerprint"] == before["fingerprint"]
    (shards / "manifest.json").unlink()
    with pytest.raises(DataConfigError, match="token blocks of an unknown tokenizer; say which"):
        index_directory(shards)
    assert index_directory(shards, chunk_bytes=4096, tokenizer=model)["fingerprint"] == before["fingerprint"]


def test_missing_cut_and_grown_shards_are_named(shards: Path) -> None:
    path = shards / "00001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512])
    with pytest.raises(
        DataError, match=rf"shard .*00001.tar has {len(content) - 512} bytes, expected {len(content)}"
    ):
        open_shard_set(shards)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes, expected"):
        open_shard_set(shards)
    path.unlink()
    with pytest.raises(DataError, match=r"00001.tar is missing .*expected \d+ bytes; copy it anew") as caught:
        open_shard_set(shards)
    assert caught.value.exit_code == 76


def test_directories_that_are_no_shards_are_the_users_mistake(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"has no manifest.json; make shards with `prepare`"):
        open_shard_set(tmp_path)
    with pytest.raises(DataConfigError, match="does not exist; make it with `prepare`") as caught:
        open_shard_set(tmp_path / "none")
    assert caught.value.exit_code == 64
    manifest = shards / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": "basestone-shards-9"}))
    with pytest.raises(DataConfigError, match="has format 'basestone-shards-9', expected 'basestone-shards-1'"):
        open_shard_set(shards)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no JSON"),
        (lambda text: text.replace('"documents":', '"dokuments":'), r"is damaged \(KeyError: 'documents'\)"),
        (lambda text: text.replace('"chunks":[[0,', '"chunks":[[512,', 1), "its content gives fingerprint"),
        (lambda text: text.replace('"chunks":[[0,', '"chunks":[["x",', 1), r"is damaged \(ValueError"),
        (lambda text: text.replace('"kind":"text"', '"kind":"images"'), "is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(edit, message: str, shards: Path) -> None:
    manifest = shards / "manifest.json"
    text = manifest.read_text()
    assert edit(text) != text
    manifest.write_text(edit(text))
    with pytest.raises(DataError, match=message) as caught:
        open_shard_set(shards)
    assert "run `data index" in str(caught.value)


def test_an_empty_set_is_refused_where_documents_are_needed(tmp_path: Path) -> None:
    ShardWriter(tmp_path / "empty", shard_bytes=1 << 20, chunk_bytes=1 << 12).finish()
    assert open_shard_set(tmp_path / "empty").num_chunks == 0
    with pytest.raises(DataConfigError, match="holds no documents; prepare it with more text"):
        open_filled_shard_set(tmp_path / "empty")


def test_verify_names_every_bad_chunk(shards: Path) -> None:
    assert verify_directory(shards) == []
    rows = json.loads((shards / "manifest.json").read_text())["shards"][0]["chunks"]
    content = bytearray((shards / "00000.tar").read_bytes())
    for row in (rows[0], rows[2]):
        content[row[0] + 600] ^= 4
    (shards / "00000.tar").write_bytes(content)
    bad = verify_directory(shards)
    assert [(place["shard"], place["offset"], place["length"]) for place in bad] == [
        ("00000.tar", rows[0][0], rows[0][1]),
        ("00000.tar", rows[2][0], rows[2][1]),
    ]
    assert all("checksum is" in place["problem"] for place in bad)


def test_inspection_shows_documents(
    text_shards: Path, token_shards: Path, model: Path, other_model: Path
) -> None:
    text = inspect_directory(text_shards / "train", model, num_documents=4)
    tokens = inspect_directory(token_shards / "train", model, num_documents=4)
    assert len(text["examples"]) == 4 and text["examples"] == tokens["examples"]
    assert text["documents"] == tokens["documents"] and (text["kind"], tokens["kind"]) == ("text", "tokens")
    without = inspect_directory(token_shards / "train")
    assert [example["text"] for example in without["examples"]] == [None] * 3
    assert without["examples"][0]["tokens"] == tokens["examples"][0]["tokens"] > 2
    assert inspect_directory(text_shards / "train")["examples"][0]["tokens"] is None
    with pytest.raises(DataConfigError, match="was tokenised with tokenizer"):
        inspect_directory(token_shards / "train", other_model)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = ShardWriter(
        tmp_path / "s", shard_bytes=1 << 20, chunk_bytes=1 << 12, vocab_size=70_000, tokenizer_sha256="x"
    )
    writer.write_tokens(np.array([1, 69_999, 2]), 5)
    writer.finish()
    (document,) = open_shard_set(tmp_path / "s").read_documents(0)
    assert document.tolist() == [1, 69_999, 2]
    with tarfile.open(tmp_path / "s" / "00000.tar") as archive:
        assert archive.getnames() == ["000000000.len.u32", "000000000.tok.u32"]
