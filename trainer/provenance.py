"""Which program a run was made by: versions, the git commit, a hash of the sources. Imports no torch."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "sentencepiece", "numpy")
FOLDERS = ("launch", "trainer", "model", "data", "ds_configs")
GIT_LIMIT_S = 10.0


def versions() -> dict[str, str]:
    """Give what decides what a run computes; `commit` only where the program runs from a git checkout."""
    import basestone

    found = {"basestone": basestone.__version__, "python": platform.python_version()}
    found |= {name: version(name) for name in PACKAGES}
    root = Path(__file__).resolve().parents[1]
    found["sources_sha256"] = sources_sha256(root)
    if commit := git_commit(root):
        found["commit"] = commit
    return found


def sources_sha256(root: Path) -> str:
    """Hash the program's own files, names and contents, the same for a checkout and an installed copy."""
    digest = hashlib.sha256()
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()


def git_commit(root: Path) -> str | None:
    """Give the commit of a checkout, with "+changes" where files differ from it; None where there is none."""
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_LIMIT_S
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of someone else
        return None
