"""A run directory with a checkpoint, and places for its copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import s3_endpoint, serving_s3
from step_files import save


@pytest.fixture(scope="module")
def moto() -> Iterator[int]:
    with serving_s3() as port:
        yield port


@pytest.fixture(scope="module")
def bucket(moto) -> Iterator[Any]:
    """A filesystem with an empty bucket `runs`."""
    with s3_endpoint(f"http://127.0.0.1:{moto}") as files:
        files.mkdir("runs")
        yield files


@pytest.fixture(params=["disk", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where copies go: a directory, a bucket, and what fsspec has beside them."""
    if request.param == "s3":
        request.getfixturevalue("bucket")
    name = tmp_path.name.strip("_")
    return {"disk": str(tmp_path / "copies"), "s3": f"s3://runs/{name}", "memory": f"memory://{name}"}[
        request.param
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with one checkpoint."""
    run = tmp_path / "run"
    save(run / "checkpoints", 4)
    (run / "tokenizer.model").write_bytes(b"pieces")
    (run / "run.toml").write_text("[run]\n")
    return run
