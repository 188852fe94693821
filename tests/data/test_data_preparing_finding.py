"""What folders and patterns name: links, loops of them, and what an earlier preparation wrote."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from basestone.data.errors import DataConfigError
from basestone.data.prepare import prepare
from basestone.data.sources import find_source_files

TEXTS = [text[:3000] for text in sorted(topics.values())[:40]]
SENTENCE = "The lighthouse keeper wrote down every ship that passed the cape, and the hour at which it did. "


def test_links_that_lead_nowhere_are_counted_in_a_folder_and_refused_where_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(SENTENCE)
    (folder / "b.txt").symlink_to("none.txt")
    (folder / "c.parquet").symlink_to("c.parquet")
    (folder / "d.txt").symlink_to("a.txt")
    (folder / "e").symlink_to("none")  # no text by its name
    for number, source in enumerate((folder, folder / "*.*")):
        report = prepare([str(source)], tmp_path / f"out{number}", heldout_fraction=0)
        assert report.dropped == {"broken_link": 2, "duplicate": 1} and report.train_documents == 1
        assert report.dropped_examples["broken_link"] == [str(folder / "b.txt"), str(folder / "c.parquet")]
    for name in ("b.txt", "e"):
        with pytest.raises(
            DataConfigError, match=rf"source '.*{name}' is a link that leads nowhere; mend it"
        ) as caught:
            prepare([str(folder / name)], tmp_path / "out")
        assert caught.value.exit_code == 64


def test_links_to_folders_are_not_followed_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two loops in it, glob itself would go on for ever."""
    for name in ("a/1.txt", "a/b/2.txt", "a/b/c/3.md", "a/.hidden/4.txt", "other/5.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name, target in {"a/up": "..", "a/b/self": ".", "a/b/other": "../../other"}.items():
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    for sources, expected in {
        ("a",): ["a/1.txt", "a/b/2.txt", "a/b/c/3.md"],
        ("a/**",): ["a/1.txt", "a/b/2.txt", "a/b/c/3.md"],
        ("a/**/*.txt",): ["a/1.txt", "a/b/2.txt"],
        ("**/*.txt",): ["a/1.txt", "a/b/2.txt", "other/5.txt"],
        ("**/b/**/*.md",): ["a/b/c/3.md"],
        ("./[a]/**/c/*",): ["a/b/c/3.md"],
        ("a/b/other/*.txt",): ["a/b/other/5.txt"],
    }.items():
        assert [str(file) for file in find_source_files(sources)] == expected


def test_what_prepare_wrote_is_no_source(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(folder)], folder / "shards", heldout_fraction=0.3)
    (folder / "shards" / "notes.md").write_text("notes of one's own beside it")
    (folder / ".other.unfinished").mkdir()
    (folder / ".other.unfinished" / "b.txt").write_text("left by a kill")
    own = folder / "own"
    own.mkdir()
    for name in ("manifest.json", "report.json"):
        (own / name).write_text('{"format": "of another program"}')
    expected = [folder / "a.jsonl", own / "manifest.json", own / "report.json", folder / "shards" / "notes.md"]
    assert find_source_files([str(folder)]) == expected
    assert find_source_files([f"{folder}/**/*.json"]) == expected[1:3]
    with pytest.raises(DataConfigError, match="holds no text files"):
        find_source_files([str(folder / "shards" / "train")])
