"""Which program made a run: the commit of a checkout, and a hash that a copy shares and a change does not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from basestone.trainer.provenance import FOLDERS, git_commit, sources_sha256, versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_a_copy_has_the_same_hash_and_any_change_another(copy):
    same = sources_sha256(ROOT)
    assert sources_sha256(copy) == same and len(same) == 64
    (copy / "trainer" / "notes.txt").write_text("no source")
    assert sources_sha256(copy) == same
    path = copy / "ds_configs" / "zero1.json"
    path.write_text(path.read_text() + "\n")
    changed = sources_sha256(copy)
    assert changed != same
    path.rename(path.with_name("zero9.json"))
    assert sources_sha256(copy) not in (same, changed)


def test_the_commit_and_whether_files_differ_from_it(copy):
    assert git_commit(copy) is None

    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(
            ["git", "-C", str(copy), *name, *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert git_commit(copy) is None, "a repository without a commit"
    git("add", ".")
    git("commit", "-q", "-m", "all")
    assert git_commit(copy) == git("rev-parse", "HEAD")
    (copy / "model" / "more.py").touch()
    assert git_commit(copy) == git("rev-parse", "HEAD") + "+changes"


def test_versions_are_those_of_what_computes():
    import torch

    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert {"basestone", "python", "deepspeed", "megatron-core", "sources_sha256"} <= set(found)
