"""Exports, imports and fine-tunings that are stopped, run out of space, or are given directories that lie."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_directories import bring_in, refused, write_model
from tiny_hub import make_directory, make_tokenizer, questions, write_lines

from basestone.data.errors import DataStorageError
from basestone.trainer.errors import ConfigError
from basestone.trainer.finetuning.run import prepare
from basestone.trainer.finetuning.settings import FinetuneSettings
from basestone.trainer.finetuning.training import load_model
from basestone.trainer.hub import export as export_module
from basestone.trainer.hub.config_file import name_of
from basestone.trainer.inference import OpenCheckpoint

pytestmark = pytest.mark.usefixtures("own_group")
ROOT = Path(export_module.__file__).resolve().parents[2]
DEADLINE_S = 120
FILLER_BYTES = 72 << 20  # of a disk with 80 MB: more than the spare room that an export asks for leaves


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder with a directory model/ of several MB, examples, and a checkpoint run/."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = make_tokenizer(folder / "tokenizer.model")
    make_directory(folder / "model", tokenizer, hidden_size=256, num_layers=4)
    write_lines(folder / "questions.jsonl", questions())
    return folder


@pytest.fixture(scope="module")
def run(hub: Path) -> Iterator[Path]:
    from basestone.trainer import runtime as processes

    yield bring_in(hub / "model", hub / "run")
    if torch.distributed.is_initialized():
        processes.stop()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a disk of so many bytes; called again it changes the size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(num_bytes: int) -> Path:
        options = f"size={num_bytes}" + (",remount" if place.is_mount() else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small disk needs root")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", place], check=True)


# ---- stopped ------------------------------------------------------------------------------------------------------


def command_of(kind: str, hub: Path, out: Path) -> list[str]:
    return {
        "import": ["import", f"{hub}/model", f"{out}"],
        "export": ["export", f"{hub}/run", f"{out}"],
        "export by two": ["export", f"{hub}/run", f"{out}", "--processes", "2", "--max-shard-gb", "0.001"],
        "finetune": [
            "finetune",
            f"{hub}/model",
            f"{hub}/questions.jsonl",
            "--out",
            f"{out}",
            "--steps",
            "999999",
        ],
        "finetune by two": [*command_of("finetune", hub, out), "--processes", "2"] if kind[-1] == "o" else [],
    }[kind]


def begin(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a command and wait until it writes beside its target."""
    process = subprocess.Popen(
        [sys.executable, "-m", "basestone.launch", *command],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    end_s = time.monotonic() + DEADLINE_S
    while not any(path.name.endswith(".partial") for path in folder.iterdir()):
        assert process.poll() is None and time.monotonic() < end_s, process.communicate()
        time.sleep(0.01)
    return process


STOPS = [
    ("import", signal.SIGINT),
    pytest.param("export", signal.SIGTERM, marks=pytest.mark.slow),
    ("export by two", signal.SIGINT),
    pytest.param("finetune", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param("finetune by two", signal.SIGTERM, marks=pytest.mark.slow),
]


@pytest.mark.faults
@pytest.mark.parametrize(("kind", "number"), STOPS)
def test_a_stop_in_the_middle_leaves_nothing(hub, run, tmp_path, kind, number):
    process = begin(command_of(kind, hub, tmp_path / "out"), tmp_path)
    os.killpg(process.pid, number)  # as a terminal does: to the whole group
    text, _ = process.communicate(timeout=DEADLINE_S)
    command = kind.partition(" ")[0]
    assert process.returncode == 75 and list(tmp_path.iterdir()) == [], text
    assert f"{command}: stopped on request; nothing was written" in text and "Traceback" not in text


@pytest.mark.faults
def test_a_stop_while_ranks_are_forked_is_not_lost(run, tmp_path):
    """What a signal's handler raises in the hooks of a fork reaches nobody."""
    script = f"""
import os, signal
asked = []
def ask():
    if not asked:
        asked.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
from basestone.trainer import worker
os.register_at_fork(before=ask)
worker.main(["export", {str(run)!r}, {str(tmp_path / "out")!r}, "--processes=2", "--max-shard-gb=0.001"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75 and "export: stopped on request" in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
@pytest.mark.slow
def test_what_a_kill_leaves_goes_with_the_next_export(hub, run, tmp_path):
    process = begin(command_of("export by two", hub, tmp_path / "out"), tmp_path)
    process.kill()
    process.communicate(timeout=DEADLINE_S)
    export(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.faults
@pytest.mark.slow
def test_a_second_export_to_the_same_place_is_refused(hub, run, tmp_path):
    process = begin(command_of("export", hub, tmp_path / "out"), tmp_path)
    process.send_signal(signal.SIGSTOP)
    worker = int(subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True))
    os.kill(worker, signal.SIGSTOP)
    with pytest.raises(ValueError, match="another process is writing it") as caught:
        export(run, tmp_path / "out")
    assert caught.value.exit_code == 64  # type: ignore[attr-defined]
    for pid in (worker, process.pid):
        os.kill(pid, signal.SIGCONT)
    text, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["out"], text


# ---- full disks ---------------------------------------------------------------------------------------------------


def export(run: Path, out: Path, num_processes: int = 1) -> None:
    OpenCheckpoint(run).export(
        out,
        dtype="bf16",
        verify=False,
        licence="",
        name="",
        max_shard_bytes=1_000_000,
        num_processes=num_processes,
    )


@pytest.mark.faults
@pytest.mark.parametrize("num_processes", [1, 2])
def test_space_that_goes_behind_an_exports_back(run, small_disk, monkeypatch, num_processes):
    disk = small_disk(FILLER_BYTES + (1 << 20))
    check = export_module._check_space

    def check_then_fill(*arguments: Any) -> None:
        check(*arguments)
        (disk / "filler").write_bytes(bytes(FILLER_BYTES))

    monkeypatch.setattr(export_module, "_check_space", check_then_fill)
    with pytest.raises(DataStorageError, match="out failed: No space left on device") as caught:
        export(run, disk / "out", num_processes)
    assert caught.value.exit_code == 74 and [path.name for path in disk.iterdir()] == ["filler"]
    monkeypatch.undo()
    (disk / "filler").unlink()
    export(run, disk / "out", num_processes)
    assert [path.name for path in disk.iterdir()] == ["out"]


@pytest.mark.faults
def test_a_disk_that_an_import_fills(hub, small_disk):
    disk = small_disk(2 << 20)
    with pytest.raises(DataStorageError, match=r"writing .*out failed: No space left on device") as caught:
        bring_in(hub / "model", disk / "out")
    assert caught.value.exit_code == 74 and list(disk.iterdir()) == []
    small_disk(100 << 20)
    bring_in(hub / "model", disk / "out")
    assert [path.name for path in disk.iterdir()] == ["out"]


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_disk_that_a_fine_tuning_fills(hub, small_disk, kind):
    disk = small_disk(256 << 10)
    values = {"source": f"{hub}/model", "data": f"{hub}/questions.jsonl", "out": f"{disk}/out", "steps": 1}
    values |= {"lora": 8, "keep_adapter": True} if kind == "adapter" else {}
    command = [sys.executable, "-m", "basestone.trainer.worker", "finetune", json.dumps(values)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 74 and list(disk.iterdir()) == [], done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    small_disk(100 << 20)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and [path.name for path in disk.iterdir()] == ["out"], done.stderr


# ---- directories of links, and such as lie -------------------------------------------------------------------------


def linked(directory: Path, cache: Path) -> Path:
    """Lay a directory out as the Hub's cache does: links to files that are named by their content."""
    snapshot = cache / "models--Some-Owner--tiny-llama" / "snapshots" / ("0123456789" * 4)
    blobs = snapshot.parents[1] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_snapshot_of_the_hubs_cache_is_imported(tmp_path, max_shard_size):
    write_model(tmp_path / "hub", "llama", torch.bfloat16, tied=False, max_shard_size=max_shard_size)
    snapshot = linked(tmp_path / "hub", tmp_path / "cache")
    (tmp_path / "link").symlink_to(snapshot)
    opened = OpenCheckpoint(bring_in(tmp_path / "link", tmp_path / "out"))
    assert opened.state["imported_from"] == "Some-Owner/tiny-llama"


def test_a_snapshot_of_the_hubs_cache_is_tuned(hub, tmp_path):
    snapshot = linked(hub / "model", tmp_path / "cache")
    prepared, figures = prepare(settings_of(hub, snapshot, tmp_path), 1, on_cpu=True)
    assert figures["source"] == "Some-Owner/tiny-llama"
    load_model(settings_of(hub, snapshot, tmp_path), prepared)


def test_other_directories_are_called_by_their_name(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert [name_of(Path(path)) for path in (".", "../mine", "../mine/")] == ["mine"] * 3


def settings_of(hub: Path, source: Path, folder: Path) -> FinetuneSettings:
    data = hub / "questions.jsonl"
    return FinetuneSettings(source=source, data=data, out=folder / "out", steps=1, batch=12)


def not_tuned(hub: Path, source: Path, folder: Path, *words: str) -> None:
    """Check that a fine-tuning is refused before it trains."""
    settings = settings_of(hub, source, folder)
    with pytest.raises(ConfigError) as caught:
        load_model(settings, prepare(settings, 1, on_cpu=True)[0])
    for word in words:
        assert word in str(caught.value)


LIES: list[tuple[dict[str, Any], str]] = [
    ({"data_offsets": [64, 20544]}, "invalid offset"),  # overlaps the next one
    ({"data_offsets": [0, 10**12]}, "invalid"),
    ({"dtype": "X7"}, "unknown variant `X7`"),
    ({"shape": [1 << 63, 2]}, "overflow"),
    ({"shape": [1 << 64, 2]}, "invalid"),
    ({"shape": [-4, 2]}, "invalid value"),
]


@pytest.mark.faults
@pytest.mark.parametrize(("lie", "words"), LIES)
def test_a_header_that_lies_is_refused(hub, copied, tmp_path, lie, words):
    file = copied / "model.safetensors"
    content = file.read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header[next(name for name in header if name != "__metadata__")].update(lie)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    refused(copied, f"{file} is damaged", words)
    not_tuned(hub, copied, tmp_path, f"{file} cannot be read as safetensors", words)


@pytest.mark.faults
@pytest.mark.parametrize("content", [b"", b"\xff" * 8, struct.pack("<Q", 1 << 63) + b"{}"])
def test_a_file_that_is_no_safetensors_is_refused(hub, copied, tmp_path, content):
    (copied / "model.safetensors").write_bytes(content)
    refused(copied, "model.safetensors is damaged: ")
    not_tuned(hub, copied, tmp_path, "model.safetensors cannot be read as safetensors: ")


def test_a_directory_in_place_of_the_weights(hub, copied, tmp_path):
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors").mkdir()
    refused(copied, "holds neither model.safetensors nor model.safetensors.index.json")
    not_tuned(hub, copied, tmp_path, "model.safetensors cannot be read as safetensors: ")


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NO_CONFIGS = [b"[]", b'"text"', b"null", DEEP, '{"a": 1}'.encode("utf-16"), b"\xef\xbb\xbf{}", b'{"a": "\xe9"}']


@pytest.mark.parametrize("content", NO_CONFIGS)
def test_a_config_that_is_no_object_in_utf_8_is_refused(hub, copied, tmp_path, content):
    (copied / "config.json").write_bytes(content)
    for text in (refused(copied), refused_by_finetune(hub, copied, tmp_path)):
        assert f"{copied}/config.json cannot be read as JSON" in text or "is no JSON object, but" in text


def refused_by_finetune(hub: Path, source: Path, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        prepare(settings_of(hub, source, folder), 1, on_cpu=True)
    return str(caught.value)


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers"])
def test_sizes_beyond_the_files_are_refused_at_once(copied, field):
    change_config(copied, **{field: 1 << 62})
    refused(copied, f"{copied / 'config.json'}: describes more than ", "and the weights have ")


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size"])
def test_sizes_that_overflow_are_not_tuned(hub, copied, tmp_path, field):
    change_config(copied, **{field: 1 << 63})
    not_tuned(hub, copied, tmp_path, f"finetune: transformers cannot load {copied} for sft: ")


@pytest.mark.parametrize(
    ("field", "name"), [("rms_norm_eps", "norm_epsilon"), ("initializer_range", "init_std")]
)
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_numbers_that_are_none_are_refused(copied, field, name, value):
    change_config(copied, **{field: value})
    refused(copied, f"{name}: Input should be a finite number")


def test_what_is_too_deep_for_transformers_alone(copied):
    nested: list[Any] = []
    for _ in range(800):
        nested = [nested]
    change_config(copied, more=nested)
    refused(copied, "config.json: is nested too deeply for transformers")


def change_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))
