"""Near-duplicates against brute-force Jaccard, and documents that share words with test files."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import sysconfig
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basestone.data.errors import DataConfigError
from basestone.data.prepare import prepare
from basestone.data.preparing.near_duplicates import first_alike, first_equals, hash_bands
from basestone.data.preparing.ngrams import find_words, hash_ngrams
from basestone.data.shards import open_shard_set

LIBRARY = Path(sysconfig.get_path("stdlib"))
NO_DIGEST = bytes(16)


def texts(directory: Path) -> list[str]:
    opened = open_shard_set(directory)
    return [text for chunk in range(opened.num_chunks) for text in opened.read_documents(chunk)]


def write_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def dropped(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress((out / "dropped.jsonl.gz").read_bytes()).splitlines()]


def originals() -> list[str]:
    files = sorted(LIBRARY.glob("*.py"))[:110]
    found = [*topics.values(), *(file.read_text(errors="replace")[:6000] for file in files)]
    distinct = {" ".join(text.split()): text for text in found if len(find_words(text)) >= 100}
    return list(distinct.values())


def changed(text: str, share: float, seed: int) -> str:
    """Replace a share of the words by others, in random places."""
    generator = random.Random(seed)
    words = text.split(" ")
    for place in generator.sample(range(len(words)), int(share * len(words))):
        words[place] = f"other{generator.randrange(1000)}"
    return " ".join(words)


def planted() -> list[str]:
    """Real texts, and of each a copy with some words changed: up to a tenth of them, most often few."""
    found = originals()
    copies = [changed(text, 0.1 * (number % 60 / 60) ** 2, number) for number, text in enumerate(found)]
    return [*found, *copies]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = find_words(text)
    return {tuple(words[place : place + 5]) for place in range(max(1, len(words) - 4))}


def test_recall_and_precision_against_brute_force() -> None:
    """The share of pairs found at each similarity is what the theory of banding says."""
    documents = planted()
    sets = [shingles(text) for text in documents]
    bands = np.array([hash_bands(find_words(text), NO_DIGEST) for text in documents])
    found = {
        pair
        for band in range(bands.shape[1])
        for value in np.unique(bands[:, band])
        for pair in itertools.combinations(np.flatnonzero(bands[:, band] == value).tolist(), 2)
    }
    similarity = {}
    for left, right in itertools.combinations(range(len(documents)), 2):
        shared = len(sets[left] & sets[right])
        similarity[left, right] = shared / (len(sets[left]) + len(sets[right]) - shared)
    near = {pair for pair, value in similarity.items() if value >= 0.8}
    assert len(near) > 60 and len(found & near) / len(near) > 0.95  # recall
    assert len({pair for pair in found if similarity[pair] >= 0.6}) / len(found) > 0.95  # precision
    assert not {pair for pair in found if similarity[pair] < 0.3}
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        pairs = [pair for pair, value in similarity.items() if low <= value < low + 0.1]
        expected = np.array([1 - (1 - similarity[pair] ** 8) ** 14 for pair in pairs])
        spread = np.sqrt((expected * (1 - expected)).sum())
        assert len(pairs) > 10 and abs(len(found.intersection(pairs)) - expected.sum()) <= 4 * spread + 0.5


def test_hashes_are_golden() -> None:
    """Pieces and results of other machines are compared by them."""
    words = find_words("The same words in the same order give the same hashes 敏捷 for ever.")
    assert words[-4:] == ["敏", "捷", "for", "ever"]
    assert [f"{value:016x}" for value in hash_ngrams(words, 13)[:2]] == GOLDEN_NGRAMS
    assert [f"{value:016x}" for value in hash_bands(words, NO_DIGEST)[:2]] == GOLDEN_BANDS


GOLDEN_NGRAMS = ["6649b440f879e454", "3eef30c98c1b03fc"]
GOLDEN_BANDS = ["295c756fbeb426f9", "1bb0106315ca4c03"]


def test_marks_are_parts_of_words() -> None:
    hindi = "भारत की राजधानी नई दिल्ली है और"
    assert find_words(f"«{hindi}», 2024!") == [*hindi.split(), "2024"]
    assert find_words("ภาษาไทย ที่นี่") == ["ภาษาไทย", "ที่นี่"]
    assert find_words("q\u0301u\u0301 \u0301 x") == [
        "q\u0301\u00fa",
        "x",
    ]  # the first letter has no single form
    assert find_words("敏\ufe00か\u3099ab") == ["敏", "が", "ab"]
    french = "L'été dernier, à Orléans : le garçon naïf"
    decomposed = unicodedata.normalize("NFD", french)
    assert decomposed != french and find_words(decomposed) == find_words(french) == re.findall(
        r"\w+", french.lower()
    )


@given(
    st.text(
        st.characters(max_codepoint=0x1FFFF, exclude_categories=("Cs",)) | st.sampled_from("ae \u0301\u093f")
    )
)
def test_words_of_any_text(text: str) -> None:
    words = find_words(text)
    assert (
        find_words(unicodedata.normalize("NFD", text))
        == find_words(unicodedata.normalize("NFC", text))
        == words
    )

    def kinds(of: str) -> list[str]:
        return ["L" if letter == "_" else unicodedata.category(letter)[0] for letter in of]

    for word in words:
        assert kinds(word[0])[0] in "LN" and set(kinds(word)) <= set("LNM")
    normal = unicodedata.normalize("NFC", text.lower())
    wanted = [letter for letter, kind in zip(normal, kinds(normal), strict=True) if kind in "LN"]
    found = "".join(words)
    assert [letter for letter, kind in zip(found, kinds(found), strict=True) if kind in "LN"] == wanted


def test_short_documents() -> None:
    assert (hash_bands(["one", "two"], NO_DIGEST) == hash_bands(["one", "two"], b"x" * 16)).all()
    assert (hash_bands(["one", "two"], NO_DIGEST) != hash_bands(["two", "one"], NO_DIGEST)).all()
    # without a word only exact copies are alike
    assert (hash_bands([], NO_DIGEST) == hash_bands([], NO_DIGEST)).all()
    assert (hash_bands([], NO_DIGEST) != hash_bands([], b"x" * 16)).all()
    assert find_words("!!! --- ...") == [] and len(hash_ngrams(["a"] * 12, 13)) == 0


@given(st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=30))
def test_the_first_equal_one(keys: list[bytes]) -> None:
    digests = np.frombuffer(b"".join(key * 16 for key in keys), "<u8").reshape(-1, 2)
    assert first_equals(digests).tolist() == [keys.index(key) for key in keys]


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=25))
def test_clusters_are_the_connected_ones_and_led_by_their_first(rows: list[tuple[int, int, int]]) -> None:
    """Against a search through the graph; copies that were found before follow the one they copy."""
    first = [rows.index(row) for row in rows]
    bands = np.split(np.array(rows, np.uint64), [len(rows) // 2])
    expected = list(range(len(rows)))
    for start in range(len(rows)):
        reached, waiting = {start}, [start]
        while waiting:
            here = waiting.pop()
            for other in range(len(rows)):
                alike = any(left == right for left, right in zip(rows[here], rows[other], strict=True))
                if alike and other not in reached:
                    reached.add(other)
                    waiting.append(other)
        expected[start] = min(reached)
    assert first_alike(bands, np.array(first)).tolist() == expected


def test_near_copies_are_dropped_and_the_first_stays(tmp_path: Path) -> None:
    """With any number of workers, to the byte; without the option they stay."""
    found = originals()[:60]
    copies = [changed(text, 0.01, number) for number, text in enumerate(found)]
    copies = [text for number, text in enumerate(copies) if text != found[number]]
    source = str(write_lines(tmp_path / "in.jsonl", [*found, *copies, found[3], *copies[:2]]))
    outs = [tmp_path / "one", tmp_path / "two"]
    for workers, out in zip((0, 2), outs, strict=True):
        report = prepare([source], out, near_duplicates=True, workers=workers, heldout_fraction=0.2)
    trees = [
        {file.relative_to(out): file.read_bytes() for file in out.rglob("*") if file.is_file()} for out in outs
    ]
    assert trees[0] == trees[1]
    kept = set(texts(outs[0] / "train")) | set(texts(outs[0] / "heldout"))
    assert kept <= {*found, *copies} and len(kept & set(found)) >= 59 and report.heldout_documents > 3
    assert report.dropped["near_duplicate"] >= 0.9 * len(copies)
    for entry in dropped(outs[0]):  # the one kept stands before it, and is near it
        own, first = (int(entry[name].rpartition(":")[2]) for name in ("origin", "kept"))
        lines = [*found, *copies, found[3], *copies[:2]]
        left, right = shingles(lines[own - 1]), shingles(lines[first - 1])
        assert first < own and lines[first - 1] in kept and len(left & right) / len(left | right) > 0.4
    assert {entry["reason"] for entry in dropped(outs[0])} == {"duplicate", "near_duplicate"}
    assert prepare([source], tmp_path / "all").dropped == {"duplicate": 3}


def test_documents_that_share_words_with_a_test_are_dropped_from_training(tmp_path: Path) -> None:
    documents = originals()[:80]
    question = " ".join(documents[7].split()[20:90])
    near_miss = " ".join(find_words(documents[9])[20:31])  # not 13 words
    test = write_lines(
        tmp_path / "test.jsonl", [f"Q: {question.upper().replace(',', ' ;')}?", near_miss, "2 + 2"]
    )
    (tmp_path / "test.txt").write_text("intro " + " ".join(documents[11].split()[:30]))
    source = str(write_lines(tmp_path / "in.jsonl", documents))
    files = (test, tmp_path / "test.txt")
    outs = [tmp_path / "one", tmp_path / "two"]
    for workers, out in zip((0, 2), outs, strict=True):
        report = prepare([source], out, decontaminate=files, workers=workers, heldout_fraction=0)
    gone = [int(entry["origin"].rpartition(":")[2]) - 1 for entry in dropped(outs[0])]
    assert {7, 11} <= set(gone) and 9 not in gone and report.dropped == {"contaminated": len(gone)}
    runs = [" ".join(find_words(text)) for text in documents]
    tested = [" ".join(find_words(text)) for text in (question, (tmp_path / "test.txt").read_text())]
    for number, run in enumerate(runs):  # by searching for every run of 13 words
        shared = any(
            f" {' '.join(words[place : place + 13])} " in f" {run} "
            for words in (text.split() for text in tested)
            for place in range(len(words) - 12)
        )
        assert shared == (number in gone)
    counts = {"test_documents": 4, "test_documents_too_short": 2}
    assert {name: report.decontamination[name] for name in counts} == counts
    assert report.train_fingerprint == json.loads((outs[0] / "report.json").read_text())["train_fingerprint"]
    more = prepare([source], tmp_path / "more", decontaminate=files, ngram=8, heldout_fraction=0)
    assert more.dropped["contaminated"] > len(gone)


HARBOUR = "Every ship that comes in at night has to write to {} before it may leave the harbour in the morning."


@pytest.mark.parametrize(
    ("option", "document", "test"),
    [
        (
            {"scrub": True},
            HARBOUR.format("master@harbour.example.org"),
            HARBOUR.format("master@harbour.example.org"),
        ),
        ({"fix_text": True}, HARBOUR.format("FlÃ¼sse"), HARBOUR.format("FlÃ¼sse")),
        ({"fix_text": True}, HARBOUR.format("FlÃ¼sse"), HARBOUR.format("Flüsse")),
        ({"rules": ("c4",)}, HARBOUR.format("the [3] master"), HARBOUR.format("the [3] master")),
        ({"rules": ("c4",)}, HARBOUR.format("the\nMenu\nmaster"), HARBOUR.format("the\nMenu\nmaster")),
    ],
)
def test_what_is_rewritten_is_compared_before_and_after(
    tmp_path: Path, option: dict[str, Any], document: str, test: str
) -> None:
    """Each option would tear the shared run of words, which is not 13 on either side of the change."""
    more = " Here stand enough sentences for all. They go on and on. And this is the last one of them."
    write_lines(tmp_path / "in.jsonl", [f"{document}{more}", f"Nothing of it is shared with a test.{more}"])
    (tmp_path / "test.txt").write_text(test)
    report = prepare(
        [str(tmp_path / "in.jsonl")],
        tmp_path / "out",
        decontaminate=(tmp_path / "test.txt",),
        heldout_fraction=0,
        **option,
    )
    assert report.dropped == {"contaminated": 1} and report.train_documents == 1


def test_heldout_documents_may_share_words_with_a_test(tmp_path: Path) -> None:
    documents = originals()[:60]
    source = str(write_lines(tmp_path / "in.jsonl", documents))
    report = prepare([source], tmp_path / "plain", heldout_fraction=0.3)
    tests = (write_lines(tmp_path / "test.jsonl", documents),)
    with pytest.raises(
        DataConfigError, match=rf"no document is left to train on.*contaminated: {report.train_documents}"
    ):
        prepare([source], tmp_path / "none", heldout_fraction=0.3, decontaminate=tests)
    (tmp_path / "half.jsonl").write_text("".join((tmp_path / "in.jsonl").read_text().splitlines(True)[:20]))
    half = prepare([source], tmp_path / "out", heldout_fraction=0.3, decontaminate=(tmp_path / "half.jsonl",))
    assert half.heldout_fingerprint == report.heldout_fingerprint and half.dropped["contaminated"] > 10


def test_test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Their questions would stay in the training part unnoticed."""
    (tmp_path / "a.txt").write_text("words enough to be kept, " * 4)
    (tmp_path / "test.jsonl").write_text('{"question": "why?"}\n{"text": ""}\n{"text": "because"}\n')
    with pytest.raises(
        DataConfigError,
        match=r"1 documents of the test files cannot be read, the first is .*:1 \(no_text_field\)",
    ):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", decontaminate=(tmp_path / "test.jsonl",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "test.jsonl"]


@pytest.mark.parametrize(
    ("name", "content"), [("test.jsonl", ""), ("test.txt", ""), ("test.jsonl", '{"text": " "}\n')]
)
def test_empty_test_files_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "a.txt").write_text("words enough to be kept, " * 4)
    (tmp_path / name).write_text(content)
    (tmp_path / "other.txt").write_text("not an empty one")
    files = (tmp_path / "other.txt", tmp_path / name)
    with pytest.raises(DataConfigError, match=rf"test files without any text: \S*{name}; nothing") as caught:
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", decontaminate=files)
    assert caught.value.exit_code == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "other.txt", name]
