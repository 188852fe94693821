"""Tables, saved datasets, web archives and HTML pages as sources of a preparation."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from basestone.data.errors import DataConfigError
from basestone.data.prepare import prepare
from basestone.data.preparing.web import extract_text
from basestone.data.shards import open_shard_set
from basestone.data.sources import RawDocument, find_named_files, find_source_files, read_documents

TEXTS = [text[:3000] for text in sorted(topics.values())[:40]]
SENTENCE = "The lighthouse keeper wrote down every ship that passed the cape, and the hour at which it did. "
BODY = "".join(f"<p>{number}. {SENTENCE}{SENTENCE}</p>" for number in range(6))
PAGE = (
    "<html><head><title>Ships</title></head><body><nav><a href='/'>Home</a> <a href='/shop'>Shop now</a></nav>"
    f"<article><h1>Ships</h1>{BODY}</article><footer>Imprint and newsletter</footer></body></html>"
)


def texts(directory: Path) -> list[str]:
    opened = open_shard_set(directory)
    return [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]


def write_dataset(folder: Path, shards: list[list[str | None]], extra: str | None = None) -> None:
    """Write what `save_to_disk` of Hugging Face's datasets writes: Arrow streams, and notes about them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.table({"text": pa.array(rows, pa.string()), "id": list(range(len(rows)))})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "e3", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    if extra:
        (folder / "cache-1b2c.arrow").write_bytes((folder / extra).read_bytes())


def records(file: Path, text_field: str = "text") -> list[tuple[str, str | None]]:
    """Give what a source says, as (place in the file, reason or text)."""
    return [
        (document.origin.removeprefix(str(file)), document.reason or str(document.content))
        for document in read_documents(file, text_field)
    ]


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS, "url": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert list(read_documents(tmp_path / "a.parquet"))[7] == RawDocument(f"{tmp_path}/a.parquet:8", TEXTS[7])
    fingerprints = set()
    for name in ("a.parquet", "a.jsonl"):
        report = prepare([str(tmp_path / name)], tmp_path / f"out-{name}")
        fingerprints.add((report.train_fingerprint, report.heldout_fingerprint))
    assert len(fingerprints) == 1 and report.documents_kept == 40


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
)
def test_a_column_of_another_name_and_any_kind_of_string(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"content": pa.array(["one", None, "three"], kind), "text": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet", "content") == [
        (":1", "one"),
        (":2", "no_text_field"),
        (":3", "three"),
    ]
    every_row = [(f":{number}", "no_text_field") for number in (1, 2, 3)]
    assert records(tmp_path / "a.parquet", "text") == every_row  # numbers
    assert records(tmp_path / "a.parquet", "body") == every_row  # no such column
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert records(tmp_path / "a.arrow", "content")[::2] == [(":1", "one"), (":3", "three")]
    assert records(tmp_path / "a.arrow", "text") == records(tmp_path / "a.arrow", "body") == every_row
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n{"text": "two"}\n')
    assert records(tmp_path / "a.jsonl", "content") == [(":1", "one"), (":2", "no_text_field")]


def test_a_saved_dataset_is_read_shard_by_shard(tmp_path: Path) -> None:
    """The shards that its state lists, in that order: neither its notes nor cache files beside them."""
    write_dataset(
        tmp_path / "set" / "train", [TEXTS[:20], TEXTS[20:39], [TEXTS[39], None]], "data-00001-of-00003.arrow"
    )
    write_dataset(tmp_path / "set" / "test", [["a test document that is long enough to be kept"]])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    files = find_source_files([str(tmp_path / "set" / "train")])
    assert [file.name for file in files] == [f"data-0000{number}-of-00003.arrow" for number in range(3)]
    report = prepare([str(tmp_path / "set" / "train")], tmp_path / "out", heldout_fraction=0)
    assert texts(tmp_path / "out" / "train") == TEXTS and report.dropped == {"no_text_field": 1}
    assert prepare([str(tmp_path / "set")], tmp_path / "both").documents_kept == 41
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "state.json").write_text('{"running": true}')  # another program's file is text
    assert find_source_files([str(tmp_path / "own")]) == [tmp_path / "own" / "state.json"]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_cut_table_is_a_reason(tmp_path: Path, name: str, share: float) -> None:
    """What stands before the cut is read, where the format allows it."""
    if name == "a.parquet":
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / name, row_group_size=7)
    else:
        write_dataset(tmp_path / "set", [TEXTS])
        (tmp_path / "set" / "data-00000-of-00001.arrow").rename(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    found = records(tmp_path / name)
    assert found[-1] == ("", "damaged_file") and [text for _, text in found[:-1]] == TEXTS[: len(found) - 1]
    assert name == "a.parquet" or share < 0.3 or len(found) > 7


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_flipped_bytes_give_reasons_never_a_traceback(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / name, row_group_size=7)
    else:
        write_dataset(tmp_path / "set", [TEXTS])
        (tmp_path / "set" / "data-00000-of-00001.arrow").rename(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    reasons = set()
    for place in range(3, len(content), len(content) // 60):
        damaged = bytearray(content)
        damaged[place : place + 4] = bytes(byte ^ 0xFF for byte in damaged[place : place + 4])
        (tmp_path / name).write_bytes(damaged)
        reasons |= {document.reason for document in read_documents(tmp_path / name)}
    assert "damaged_file" in reasons and reasons <= {None, "damaged_file", "no_text_field"}


def warc(path: Path, *pages: tuple[str, str, bytes], compressed: bool = True, kind: str = "response") -> None:
    """Write a WARC file of (status, content type, body) and a request before each, as crawlers do."""
    with open(path, "wb") as stream:
        writer = WARCWriter(stream, gzip=compressed)
        for number, (status, content_type, body) in enumerate(pages):
            url = f"http://example.org/{number}"
            request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "example.org")], is_http_request=True)
            writer.write_record(writer.create_warc_record(url, "request", http_headers=request))
            headers = None
            if kind == "response":
                headers = StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.1")
            record = writer.create_warc_record(
                url, kind, payload=io.BytesIO(body), http_headers=headers, warc_content_type=content_type
            )
            writer.write_record(record)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_web_archive_gives_the_text_of_its_pages(tmp_path: Path, compressed: bool) -> None:
    file = tmp_path / ("crawl.warc.gz" if compressed else "crawl.warc")
    umlauts = PAGE.replace("lighthouse", "Leuchtturmwärter für Übersee")
    warc(
        file,
        ("200 OK", "text/html; charset=utf-8", PAGE.encode()),
        ("404 Not Found", "text/html", PAGE.encode()),
        ("200 OK", "image/png", b"\x89PNG\r\n\x1a\n" * 9),
        ("200 OK", "text/html; charset=ISO-8859-1", umlauts.encode("latin-1")),
        ("200 OK", "text/html", b"<html><body></body></html>"),
        ("200 OK", "text/plain", SENTENCE.encode()),
        compressed=compressed,
    )
    report = prepare([str(tmp_path)], tmp_path / "out", heldout_fraction=0)
    first, second, third = texts(tmp_path / "out" / "train")
    assert SENTENCE.strip() in first and "Shop now" not in first and "<" not in first and "Imprint" not in first
    assert "Leuchtturmwärter für Übersee" in second and third == SENTENCE
    assert report.dropped == {"http_status": 1, "no_main_text": 1, "not_html": 1}
    assert report.dropped_examples["http_status"] == [f"{file}:4"]  # the second response, after its request


def test_extracted_texts_of_common_crawl_are_taken_as_they_are(tmp_path: Path) -> None:
    pages = [("", "text/plain", f"{SENTENCE} {number}".encode()) for number in range(3)]
    warc(tmp_path / "crawl.warc.wet.gz", *pages, kind="conversion")
    prepare([str(tmp_path)], tmp_path / "out", heldout_fraction=0)
    assert texts(tmp_path / "out" / "train") == [f"{SENTENCE} {number}" for number in range(3)]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.55, 0.9])
@pytest.mark.parametrize("compressed", [True, False])
def test_a_cut_web_archive_is_a_reason(tmp_path: Path, share: float, compressed: bool) -> None:
    file = tmp_path / ("crawl.warc.gz" if compressed else "crawl.warc")
    pages = [("200 OK", "text/html", PAGE.replace("Ships", f"Ships {number}").encode()) for number in range(6)]
    warc(file, *pages, compressed=compressed)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    found = records(file)
    assert len(found) <= 6 and all("lighthouse" in text for _, text in found[:-1])
    assert found[-1][1] in ("damaged_file", "damaged_archive")
    file.write_bytes(b"no web archive at all\n" * 50)
    assert records(file) == [("", "damaged_archive" if compressed else "damaged_file")]


@pytest.mark.parametrize("compressed", [True, False])
def test_flipped_bytes_of_a_web_archive_give_reasons(tmp_path: Path, compressed: bool) -> None:
    file = tmp_path / ("crawl.warc.gz" if compressed else "crawl.warc")
    warc(file, *[("200 OK", "text/html; charset=utf-8", PAGE[:600].encode())] * 4, compressed=compressed)
    content = file.read_bytes()
    reasons = set()
    for place in range(0, len(content) - 4, max(1, len(content) // 150)):
        for mask in (0xFF, 0x01, 0x20):
            damaged = bytearray(content)
            damaged[place : place + 3] = bytes(byte ^ mask for byte in damaged[place : place + 3])
            file.write_bytes(damaged)
            reasons |= {document.reason for document in read_documents(file)}
    assert reasons & {"damaged_file", "damaged_archive"}
    known = {None, "damaged_file", "damaged_archive", "damaged_record", "http_status", "not_html"}
    assert reasons <= known


@given(st.binary(max_size=300) | st.text(max_size=300))
@example(b"<" * 5000)
@example("<div>" * 3000)
@example(b"\xff\xfe<\x00p\x00>\x00")
def test_no_page_breaks_the_extraction(content: bytes | str) -> None:
    page = extract_text(RawDocument("page", content, html=True))
    assert page.reason in ("no_main_text", "bad_html") or isinstance(page.content, str)


def test_a_damaged_body_costs_its_record_alone(tmp_path: Path) -> None:
    with open(tmp_path / "a.warc", "wb") as stream:
        writer = WARCWriter(stream, gzip=False)
        for body in (b"no gzip at all" * 9, gzip.compress(PAGE.encode())[:200], gzip.compress(PAGE.encode())):
            headers = [("Content-Type", "text/html"), ("Content-Encoding", "gzip")]
            http = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
            writer.write_record(
                writer.create_warc_record(
                    "http://a.org", "response", payload=io.BytesIO(body), http_headers=http
                )
            )
    found = records(tmp_path / "a.warc")
    assert found[-1][0] == ":3" and "lighthouse" in found[-1][1] and len(found) == 3


def test_html_files_are_extracted_or_kept(tmp_path: Path) -> None:
    for name in ("a.html", "b.htm"):
        (tmp_path / name).write_text(PAGE.replace("Ships", name))
    (tmp_path / "empty.html").write_text("<html><body></body></html>")
    (tmp_path / "c.html.gz").write_bytes(gzip.compress(PAGE.encode()))
    report = prepare([str(tmp_path)], tmp_path / "out", heldout_fraction=0)
    assert all(SENTENCE.strip() in text and "<" not in text for text in texts(tmp_path / "out" / "train"))
    assert (report.documents_kept, report.dropped) == (3, {"no_main_text": 1})
    (tmp_path / "out").rename(tmp_path.with_name("other"))
    report = prepare([str(tmp_path)], tmp_path / "kept", heldout_fraction=0, keep_html=True, min_chars=40)
    assert texts(tmp_path / "kept" / "train")[0] == PAGE.replace("Ships", "a.html")
    assert (report.documents_kept, report.dropped) == (3, {"too_short": 1})


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("a.parquet", "pyarrow", r"needs the package pyarrow.*pip install 'basestone\[parquet\]'"),
        ("a.warc", "warcio.archiveiterator", r"needs the package warcio.*pip install 'basestone\[web\]'"),
        ("a.html", "trafilatura", r"needs the package trafilatura.*'basestone\[web\]', or keep the markup"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, message: str
) -> None:
    (tmp_path / name).write_text(PAGE)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataConfigError, match=message) as caught:
        prepare([str(tmp_path / name)], tmp_path / "out")
    assert caught.value.exit_code == 64 and [path.name for path in tmp_path.iterdir()] == [name]


def test_missing_packages_are_named_before_any_work_with_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a.txt", "b.parquet", "c.warc.gz", "d.html", "e.jsonl.zst", "f.htm")
    for name in names:
        (tmp_path / name).write_text(PAGE)
    for module in ("pyarrow", "warcio.archiveiterator", "trafilatura", "zstandard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataConfigError) as caught:
        prepare([str(tmp_path)], tmp_path / "out", ngram=2)
    lines = str(caught.value).splitlines()
    packages = [line.partition("needs the package ")[2].partition(",")[0] for line in lines[1:]]
    assert lines[0].startswith("ngram is 2") and sorted(packages) == [
        "pyarrow",
        "trafilatura",
        "warcio",
        "zstandard",
    ]
    with pytest.raises(DataConfigError) as caught:
        prepare(
            [str(tmp_path / "a.txt")], tmp_path / "out", decontaminate=(tmp_path / "d.html",), keep_html=True
        )
    assert "d.html needs the package trafilatura" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    prepare(
        [str(tmp_path / "a.txt"), str(tmp_path / "d.html")],
        tmp_path / "out",
        keep_html=True,
        heldout_fraction=0,
    )


def test_counts_are_kept_for_each_source_as_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number, text in enumerate(TEXTS[:3]):
        (tmp_path / "a" / f"{number}.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[2:5]))
    given = [str(tmp_path / "a"), str(tmp_path / "b.jsonl"), f"{tmp_path}/a/*.txt"]
    assert [file.source for file in find_named_files(given)] == [given[0]] * 3 + [given[1]]
    report = prepare(given, tmp_path / "out", heldout_fraction=0)
    sizes = [len(text.encode()) for text in TEXTS]
    assert report.sources == {
        given[0]: {"documents_read": 3, "documents_kept": 3, "bytes_kept": sum(sizes[:3])},
        given[1]: {"documents_read": 3, "documents_kept": 2, "bytes_kept": sum(sizes[3:5])},
    }
    assert json.loads((tmp_path / "out" / "report.json").read_bytes())["sources"] == report.sources


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    settings = {
        "rules": ("gofer",),
        "ngram": 2,
        "decontaminate": (tmp_path / "none.jsonl",),
        "filters": ("no_module_of_this_name:f", "nocolon"),
        "text_field": "",
        "tokenizer": tmp_path / "none.model",
    }
    with pytest.raises(DataConfigError) as caught:
        prepare([str(tmp_path / "nothing"), ""], tmp_path / "out", **settings)
    message = str(caught.value)
    for part in (
        "rules 'gofer' are not known; there are: gopher, c4",
        "ngram is 2; it must be 4 to 100 words",
        "none.jsonl to decontaminate from is no file",
        "filter 'no_module_of_this_name:f': importing no_module_of_this_name failed",
        "filter 'nocolon' is not of the form MODULE:FUNCTION",
        "text_field is empty",
        "none.model cannot be read",
        "nothing' names no file",
        "source '' is empty",
    ):
        assert part in message
    assert len(message.splitlines()) == 9 and list(tmp_path.iterdir()) == []
