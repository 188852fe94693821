"""What others may have planted in a file of torch.save is refused, and never executed."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import killed_before
from foreign_files import own_states, refused, resolved_run

from basestone.trainer import foreign, importing, runtime
from basestone.trainer.checkpoint.inspection import problems_of
from basestone.trainer.errors import ConfigError

ROOT = Path(foreign.__file__).resolve().parents[1]


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def plant(kind: str, file: Path, canary: Canary) -> None:
    """Write a file that sings when it is loaded as any program may load it."""
    saved: dict[str, Any] = own_states(resolved_run())
    if kind == "pickle":
        file.write_bytes(pickle.dumps({**saved, "x": canary}))
    elif kind == "old format":
        torch.save({**saved, "x": canary}, file, _use_new_zipfile_serialization=False)
    elif kind == "protocol 5":
        torch.save({**saved, "x": canary}, file, pickle_protocol=5)
    else:
        torch.save(
            {"state_dict": saved, "optimizer": canary} if kind == "beside" else {**saved, "x": canary}, file
        )


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["inside", "beside", "pickle", "old format", "protocol 5"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_planted_pickle(tmp_path, bring_in, kind, suffix):
    file, nest = tmp_path / f"weights{suffix}", tmp_path / "canary"
    plant(kind, file, Canary(nest))
    text = refused(bring_in, file)
    if kind in ("inside", "beside"):
        assert "wants posix.mkdir, which is outside torch's allow-list and may run code; save the plain" in text
    assert not nest.exists() and not (tmp_path / "out").exists()
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert nest.exists(), "the canary must be able to sing"


@pytest.mark.faults
def test_what_libraries_added_to_the_allow_list_does_not_count(bring_in):
    assert argparse.Namespace in torch.serialization.get_safe_globals(), "Megatron-core has added it"
    before = set(torch.serialization.get_safe_globals())
    saved = {"model": own_states(resolved_run()), "args": argparse.Namespace(a=1)}
    refused(bring_in, saved, "wants argparse.Namespace, which is outside torch's allow-list")
    assert set(torch.serialization.get_safe_globals()) == before
    assert runtime.Runtime  # whose import has brought Megatron-core in


@pytest.mark.parametrize("value", ["1", "true", "yes", "x"])
def test_env_reopening_pickle_refused(bring_in, monkeypatch, value):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    refused(
        bring_in, own_states(resolved_run()), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets files run"
    )
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert bring_in(own_states(resolved_run())).is_dir()


@pytest.mark.faults
def test_damaged_files_are_refused_or_come_in_as_numbers(tmp_path, bring_in):
    """A flipped byte leads the unpickler anywhere; nothing but our error comes out."""
    file = tmp_path / "good.pt"
    torch.save(own_states(resolved_run()), file)
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        info = next(member for member in archive.infolist() if member.filename.endswith("data.pkl"))
    generator = torch.Generator().manual_seed(3)
    outcomes = set()
    for _ in range(150):
        at = info.header_offset + int(torch.randint(info.file_size, (1,), generator=generator))
        (tmp_path / "bad.pt").write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        try:
            out = bring_in(tmp_path / "bad.pt")
        except ConfigError as error:
            outcomes.add("refused")
            assert len(str(error)) < 4000
        else:
            outcomes.add("came in")
            assert problems_of(out) == []
            out.rename(tmp_path / f"out{at}")
    assert "refused" in outcomes
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize("keep", [0, 1, 3, 1000, -1, -30])
def test_a_truncated_file_is_refused(tmp_path, bring_in, keep):
    file = tmp_path / "good.pt"
    torch.save(own_states(resolved_run()), file)
    (tmp_path / "bad.pt").write_bytes(file.read_bytes()[:keep])
    refused(bring_in, tmp_path / "bad.pt", "bad.pt: is no whole file of torch.save since version 1.6; load it")
    refused(bring_in, tmp_path / "no.pt", "no.pt: there is no such file")
    (tmp_path / "dir.pt").mkdir()
    refused(bring_in, tmp_path / "dir.pt", "dir.pt: is a directory; name the file in it")


def test_an_archive_that_grows_as_it_is_read_is_refused(tmp_path, bring_in):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**8))
    refused(bring_in, tmp_path / "bomb.pt", "bomb/data.pkl is compressed, as torch.save never does; ")


def test_a_pickle_that_is_too_large_is_refused(tmp_path, bring_in, monkeypatch):
    monkeypatch.setattr(foreign, "MOST_PICKLE_BYTES", 1 << 10)
    refused(bring_in, own_states(resolved_run()), "its pickle has more than 0 MiB")


def test_a_torchscript_file_is_refused(tmp_path, bring_in):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(bring_in, tmp_path / "script.pt", "TorchScript files are not taken")


def test_only_one_module_opens_files_of_torch():
    """Beside ruff's list: in the files where that list does not count, too."""
    found: dict[str, set[str]] = {"load": set(), "pickle": set()}
    for folder in ("launch", "trainer", "model", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            text, name = path.read_text(), str(path.relative_to(ROOT))
            if re.search(r"\b(torch|jit|serialization)\.load\(|weights_only=False", text):
                found["load"].add(name)
            if re.search(
                r"^\s*(import|from) (pickle|cPickle|dill|cloudpickle|joblib|shelve)\b", text, re.MULTILINE
            ):
                found["pickle"].add(name)
    assert found == {"load": {"trainer/foreign.py"}, "pickle": {"trainer/forks.py"}}


@pytest.mark.faults
def test_a_killed_import_leaves_no_target(tmp_path):
    torch.save(own_states(resolved_run()), tmp_path / "weights.pt")

    def work() -> None:
        foreign.import_weights(
            tmp_path / "weights.pt", tmp_path / "out", resolved_run(), tokenizer_sha256="", versions={}
        )

    assert killed_before(importing.RankWriter, "write", 7, work)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0].startswith(".tmp-out-") and names[1] == "weights.pt"
