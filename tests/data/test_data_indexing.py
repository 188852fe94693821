"""Shards that come without a manifest: found, indexed on first use, kept; and Megatron's files."""

import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import serving
from streams import open_stream

from basestone.data.config import ReadingConfig
from basestone.data.errors import DataConfigError, DataError
from basestone.data.index import index_shard
from basestone.data.indexing import Indexer, find_shards, index_places
from basestone.data.inspect import inspect_directory, verify_directory
from basestone.data.reading.reader import RangeReader
from basestone.data.shards import open_shard_set
from basestone.data.tokenizer import Tokenizer


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def bare(text_shards: Path, tmp_path: Path) -> Path:
    """The tar files of a shard directory without manifest and indexes."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for tar in (text_shards / "train").glob("*.tar"):
        shutil.copy(tar, folder)
    return folder


def indexer(tmp_path: Path, model: Path | None = None, **reading) -> Indexer:
    loaded = Tokenizer(model) if model else None
    return Indexer(
        tmp_path / "kept", RangeReader(ReadingConfig(attempts=1, **reading)), loaded, chunk_bytes=4096
    )


def test_bare_tars_are_indexed_once_and_found_again(bare: Path, text_shards: Path, tmp_path: Path) -> None:
    wanted = open_shard_set(text_shards / "train").fingerprint
    names = sorted(path.name for path in bare.iterdir())
    found = {
        indexer(tmp_path).indexed(place)
        for place in (str(bare), f"{bare}/*.tar", f"{bare}/{{00000..00001}}.tar")
    }
    assert len(names) == 2 and len(found) == 1, "however they are named"
    (place,) = found
    assert open_shard_set(place).fingerprint == wanted
    assert sorted(path.name for path in bare.iterdir()) == names, "nothing is written beside what is not ours"
    for kept in (tmp_path / "kept").glob("tar-*.json"):
        kept.write_text('{"not": "read"}')
    assert indexer(tmp_path).indexed(str(bare)) == place
    with open(bare / names[0], "ab") as stream:
        stream.write(bytes(512))
    other = indexer(tmp_path).indexed(str(bare))
    assert other != place, "a shard that changed is read anew"
    assert open_shard_set(other).num_documents == open_shard_set(text_shards / "train").num_documents


def test_an_interrupted_indexing_goes_on(bare: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def log(text: str) -> None:
        said.append(text)
        if len(said) == 2:
            raise KeyboardInterrupt

    first = indexer(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        Indexer(first.keep, first.reader, chunk_bytes=4096, log=log).indexed(str(bare))
    assert len(list(first.keep.glob("tar-*.json"))) == 1
    assert not list(first.keep.glob("set-*/manifest.json"))
    for kept in first.keep.glob("tar-*.json"):
        values = json.loads(kept.read_text())
        kept.write_text(json.dumps({**values, "num_documents": 1000}))
    place = first.indexed(str(bare))
    assert open_shard_set(place).num_documents > 1000, "what was found before was taken"


def test_tars_over_http_are_indexed_by_name(bare: Path, text_shards: Path, model: Path, tmp_path: Path) -> None:
    with serving(bare) as server:
        place = indexer(tmp_path).indexed(f"{server.url}/{{00000..00001}}.tar")
        assert open_shard_set(place).fingerprint == open_shard_set(text_shards / "train").fingerprint
        stream = open_stream([place], model, sequence_length=32, global_batch=4, seed=1, workers=1)
        mine = open_stream([text_shards / "train"], model, sequence_length=32, global_batch=4, seed=1)
        assert (stream.next_batch().tokens == mine.next_batch().tokens).all()
        stream.close()
        with pytest.raises(
            DataConfigError, match=r"http servers do not list files; name the shards, for example .*\.\.127"
        ):
            indexer(tmp_path).indexed(server.url)


def test_pipes_are_indexed_whole(bare: Path, model: Path, tmp_path: Path) -> None:
    import gzip

    packed = tmp_path / "a b.tar.gz"
    packed.write_bytes(gzip.compress((bare / "00000.tar").read_bytes()))
    ours = indexer(tmp_path, allow_pipe=True)
    place = ours.indexed(f"pipe:gzip -dc '{packed}'")
    shards = open_shard_set(place, ours.reader)
    assert shards.num_chunks == 1
    documents = open_shard_set(ours.indexed(str(bare / "00000.tar")))
    assert shards.read_documents(0) == [
        text for chunk in range(documents.num_chunks) for text in documents.read_documents(chunk)
    ]
    with pytest.raises(DataConfigError, match=r"set reading.allow_pipe = true"):
        indexer(tmp_path).indexed(f"pipe:cat '{packed}'")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{bare}/none", r"/none holds no manifest.json and no .tar files; make shards"),
        ("{bare}/x*.tar", r"/x\*.tar holds no manifest.json and no .tar files"),
        ("{bare}/{{00000,00000}}.tar", r"names .*00000.tar more than once"),
    ],
)
def test_places_that_name_nothing_are_refused(place: str, message: str, bare: Path, tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=message):
        indexer(tmp_path).indexed(place.format(bare=bare))


def test_what_a_directory_or_url_lacks_is_said_in_the_users_words(
    bare: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataConfigError, match=r"/x\{0\.\.3\.tar: a brace is left open; write \{000\.\.127\}"):
        indexer(tmp_path).indexed(f"{bare}/x{{0..3.tar")
    empty = tmp_path / "empty"
    empty.mkdir()
    write_tar(empty / "a.tar", [])
    with pytest.raises(DataConfigError, match=rf"^{empty} holds no documents"):
        open_stream([indexer(tmp_path).indexed(str(empty))], model, sequence_length=8, global_batch=2, seed=1)
    with serving(bare) as server:
        with pytest.raises(
            DataConfigError, match=r"holds no manifest.json that can be read \(status 404\), and http"
        ):
            indexer(tmp_path).indexed(f"{server.url}/dir")
        signed = indexer(tmp_path).indexed(f"{server.url}/00000.tar?sig=secret")
        assert open_shard_set(signed, RangeReader()).place_shown == f"{server.url}/00000.tar"
        assert verify_directory(signed) == []


def test_files_of_just_that_name_come_before_patterns(bare: Path, tmp_path: Path) -> None:
    for name in ("x[1].tar", "y{1,2}.tar", "z*.tar"):
        shutil.copy(bare / "00000.tar", tmp_path / name)
        assert find_shards(str(tmp_path / name), RangeReader()) == [str(tmp_path / name)]


def test_an_empty_tar_among_others_says_nothing_of_their_kind(
    token_shards: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for tar in (token_shards / "train").glob("*.tar"):
        shutil.copy(tar, folder)
    write_tar(folder / "empty.tar", [])
    shards = open_shard_set(indexer(tmp_path, model).indexed(str(folder)))
    assert (
        shards.kind == "tokens" and shards.num_documents == open_shard_set(token_shards / "train").num_documents
    )


def test_an_index_of_shards_elsewhere_is_a_directory_of_its_own(
    bare: Path, text_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "index"
    result = index_places([str(bare)], out, chunk_bytes=4096, reader=RangeReader())
    assert result["shards"] == 2 and [path.name for path in out.iterdir()] == ["manifest.json"]
    assert open_shard_set(out).fingerprint == open_shard_set(text_shards / "train").fingerprint
    assert verify_directory(out) == []
    with pytest.raises(DataConfigError, match="exists and is not empty"):
        index_places([str(bare)], out, reader=RangeReader())
    assert find_shards(str(bare), RangeReader()) == sorted(str(path) for path in bare.glob("*.tar"))


def test_samples_of_other_members_are_indexed_shown_and_not_trained_on(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    write_tar(
        folder / "a.tar",
        [("1.jpg", b"x" * 900), ("1.txt", b"a cat"), ("2.jpg", b"y" * 700), ("2.txt", b"a dog")],
    )
    place = indexer(tmp_path).indexed(str(folder))
    shards = open_shard_set(place)
    assert (shards.kind, shards.num_documents) == ("samples", 2)
    assert [sample["txt"] for sample in shards.read_documents(0)] == [b"a cat", b"a dog"]
    assert inspect_directory(place)["examples"][0]["text"] == ".jpg (900 bytes), .txt (5 bytes)"
    with pytest.raises(DataConfigError, match=r"holds samples without text \(samples\)"):
        open_stream([place], model, sequence_length=8, global_batch=2, seed=1)


def test_text_in_json_members_and_one_document_of_tokens_a_member(model: Path, tmp_path: Path) -> None:
    words = Tokenizer(model)
    for name in ("json", "tokens", "text"):
        (tmp_path / name).mkdir()
    texts = ["first document, ähnlich", "second\n\tone", "x" * 300]
    write_tar(
        tmp_path / "json" / "a.tar",
        [
            (f"{number}.json", json.dumps({"text": text, "url": "u"}).encode())
            for number, text in enumerate(texts)
        ],
    )
    write_tar(
        tmp_path / "tokens" / "a.tar",
        [
            (f"{number}.tok.u16", words.encode_document(text).astype("<u2").tobytes())
            for number, text in enumerate(texts)
        ],
    )
    write_tar(
        tmp_path / "text" / "a.tar", [(f"{number}.txt", text.encode()) for number, text in enumerate(texts)]
    )
    ours = indexer(tmp_path, model)
    batches = [
        open_stream(
            [ours.indexed(str(tmp_path / name))], model, sequence_length=16, global_batch=2, seed=1
        ).next_batch()
        for name in ("json", "tokens", "text")
    ]
    assert (batches[0].tokens == batches[2].tokens).all() and (batches[1].tokens == batches[2].tokens).all()
    with pytest.raises(DataConfigError, match="token blocks of an unknown tokenizer; say which: --tokenizer"):
        Indexer(tmp_path / "other", RangeReader()).indexed(str(tmp_path / "tokens"))


# ---- Megatron's files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory, documents: list[str], model: Path) -> Path:
    """A dataset written by Megatron-core's own builder, in a process of its own: it imports torch."""
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("megatron")
    words = Tokenizer(model)
    rows = [words.encode_document(text).tolist() for text in documents]
    (out / "rows.json").write_text(json.dumps(rows))
    code = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
builder = IndexedDatasetBuilder(sys.argv[1] + "/corpus.bin", dtype=numpy.uint16)
for row in json.load(open(sys.argv[1] + "/rows.json")):
    half = len(row) // 2  # documents of two sequences
    builder.add_document(torch.tensor(row), [half, len(row) - half])
builder.finalize(sys.argv[1] + "/corpus.idx")
"""
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, capture_output=True)
    return out / "corpus.bin"


def test_megatrons_files_hold_the_same_documents(
    megatron: Path, documents: list[str], model: Path, tmp_path: Path
) -> None:
    ours = indexer(tmp_path, model)
    place = ours.indexed(str(megatron))
    shards = open_shard_set(place)
    words = Tokenizer(model)
    assert shards.kind == "megatron" and shards.num_chunks > 5
    got = [document for chunk in range(shards.num_chunks) for document in shards.read_documents(chunk)]
    assert len(got) == len(documents)
    for tokens, text in zip(got, documents, strict=True):
        assert tokens.tolist() == words.encode_document(text).tolist()
    assert inspect_directory(place, model)["examples"][0]["text"] == documents[0][:300]
    stream = open_stream([place], model, sequence_length=32, global_batch=4, seed=1, workers=1)
    again = open_stream([place], model, sequence_length=32, global_batch=4, seed=1)
    assert (stream.next_batch().tokens == again.next_batch().tokens).all()
    stream.close()
    with serving(megatron.parent) as server:
        remote = ours.indexed(f"{server.url}/corpus.bin")
        assert open_shard_set(remote, ours.reader).fingerprint == shards.fingerprint
        assert verify_directory(remote, ours.reader) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:-8]),
            r"the .idx of .*corpus.bin has \d+ bytes, expected",
        ),
        (lambda bin_, idx: idx.write_bytes(b"PK" + idx.read_bytes()[2:]), "is no Megatron index of version 1"),
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:20]), "is cut; copy it anew"),
        (
            lambda bin_, idx: bin_.write_bytes(bin_.read_bytes()[:-2]),
            r"its .idx says \d+ tokens of 2; copy both",
        ),
        (
            lambda bin_, idx: bin_.write_bytes(b"\xff\xff" + bin_.read_bytes()[2:]),
            "holds the token 65535, and the tokenizer",
        ),
        (
            lambda bin_, idx: idx.write_bytes(
                idx.read_bytes()[:34] + struct.pack("<i", 3) + idx.read_bytes()[38:]
            ),
            "does not lay its sequences end to end",
        ),
    ],
)
def test_damaged_megatron_files_are_refused(
    damage, message: str, megatron: Path, model: Path, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(megatron.with_suffix(suffix), tmp_path)
    damage(tmp_path / "corpus.bin", tmp_path / "corpus.idx")
    with pytest.raises(DataError, match=message):
        indexer(tmp_path, model).indexed(str(tmp_path / "corpus.bin"))


def test_lengths_of_documents_are_checked_and_belong_to_the_data(
    megatron: Path, model: Path, tmp_path: Path
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(megatron.with_suffix(suffix), tmp_path)
    place = Path(indexer(tmp_path, model).indexed(str(tmp_path / "corpus.bin")))
    lengths = place / "documents.len.u32"
    content = lengths.read_bytes()
    swapped = np.frombuffer(content, "<u4").copy()
    swapped[0] += 1
    swapped[1] -= 1
    lengths.write_bytes(swapped.tobytes())
    (bad,) = verify_directory(place)
    assert "documents.len.u32, bytes 0-" in bad["problem"] and "checksum is" in bad["problem"]
    lengths.unlink()
    assert len(verify_directory(place)) == open_shard_set(place).num_chunks
    with pytest.raises(DataConfigError, match=r"corpus.bin is no shard directory; index it with `data index"):
        open_shard_set(tmp_path / "corpus.bin")
    before = open_shard_set(place, check_files=False).fingerprint
    idx = tmp_path / "corpus.idx"
    header = bytearray(idx.read_bytes())
    bounds = np.frombuffer(bytes(header[-8 * 40 :]), "<i8").copy()  # another document ends elsewhere
    bounds[10] += 1
    header[-8 * 40 :] = bounds.tobytes()
    idx.write_bytes(bytes(header))
    other = Path(indexer(tmp_path, model).indexed(str(tmp_path / "corpus.bin")))
    assert other != place and open_shard_set(other).fingerprint != before


# ---- damage of any kind -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_garbled_tar_is_refused_or_gives_whole_samples(
    data, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes overwritten, cut out, doubled or cut off anywhere: an error, or samples each from one place of the file."""
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    members = [(f"{number:03d}.txt", f"<{number}>".encode() * (30 + 11 * number)) for number in range(12)]
    write_tar(path, members)
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "drop", "double", "zero"]))
    size = data.draw(st.sampled_from([1, 100, 512, 1024, 3000]))
    if how == "flip":
        content[where] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del content[where:]
    elif how == "drop":
        del content[where : where + size]
    elif how == "double":
        content[where:where] = content[where : where + size]
    else:
        content[where : where + size] = bytes(len(content[where : where + size]))
    path.write_bytes(content)
    try:
        index = index_shard(path, 1 << 20)
    except DataError as error:
        assert str(path) in str(error)
        return
    shards = open_shard_set(indexer(path.parent).indexed(str(path)))
    texts = [text for chunk in range(shards.num_chunks) for text in shards.read_documents(chunk)]
    assert len(texts) == index.num_documents
    for text in texts:
        # its bytes lie in the file as they stand: nothing was stitched together
        assert text.encode() in bytes(content)


def test_a_manifest_may_name_its_tokens_as_numpy_does(megatron: Path, model: Path, tmp_path: Path) -> None:
    place = Path(indexer(tmp_path, model).indexed(str(megatron)))
    manifest = json.loads((place / "manifest.json").read_text())
    assert (
        np.dtype(manifest["token_dtype"]).itemsize == 2
        and manifest["tokenizer_sha256"] == Tokenizer(model).sha256
    )
