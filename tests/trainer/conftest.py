"""A run directory with a checkpoint and places for its copies; what exports and imports are made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import Import, resolved_run
from hub_directories import write_model
from servers import s3_endpoint, serving_s3
from small_export import FACTS, TEXT, Weights
from step_files import save, use_small_blocks
from tiny_hub import make_directory, make_tokenizer

from basestone.data.tokenizer import train_tokenizer
from basestone.model.config import ModelConfig
from basestone.trainer import runtime as processes
from basestone.trainer.config import ResolvedRun
from basestone.trainer.foreign import import_weights
from basestone.trainer.hub.export import ExportReport, export_checkpoint


@pytest.fixture
def own_group() -> Iterator[None]:
    """Leave no process group behind: ranks that later tests fork would take it for theirs."""
    yield
    if torch.distributed.is_initialized():
        processes.stop()


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Make blocks small, so that small files have several."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_blocks(patch)
        yield


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 400 pieces."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(iter([TEXT]), path, vocab_size=400)
    return path


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        max_sequence_length=64,
        vocab_size=400,
    )


@pytest.fixture(scope="module")
def weights(config: ModelConfig) -> Weights:
    return Weights(config)


@pytest.fixture
def export(
    config: ModelConfig, tokenizer: Path, weights: Weights, tmp_path: Path
) -> Callable[..., ExportReport]:
    """Export with what a test changes; gives the report."""

    def run(**changes: Any) -> ExportReport:
        arguments: dict[str, Any] = {
            "source": weights,
            "config": config,
            "tokenizer": tokenizer,
            "out": tmp_path / "out",
            "facts": FACTS,
            "sequence_length": 48,
            "trace": None,
            "samples": None,
            **changes,
        }
        return export_checkpoint(**arguments)

    return run


@pytest.fixture
def bring_in(tmp_path: Path) -> Import:
    """Save an object, or take a file, and import it."""

    def run(saved: Any, resolved: ResolvedRun | None = None) -> Path:
        file, out = tmp_path / "weights.pt", tmp_path / "out"
        if isinstance(saved, Path):
            file = saved
        else:
            torch.save(saved, file)
        import_weights(
            file, out, resolved or resolved_run(), tokenizer_sha256="abc", versions={"basestone": "1"}
        )
        return out

    return run


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a small llama, as transformers saves it."""
    directory = tmp_path_factory.mktemp("hub") / "tiny-llama"
    write_model(directory, "llama", torch.bfloat16, tied=False)
    return directory


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "tiny-llama"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a small decoder."""
    folder = tmp_path_factory.mktemp("hub")
    return make_directory(folder / "model", make_tokenizer(folder / "tokenizer.model"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of `model` to spoil."""
    return Path(shutil.copytree(model, tmp_path / "copy"))
