"""Offload from the command line: a run goes on with it, and leaves no files behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import losses_of, steps_of

pytestmark = pytest.mark.dist


def sets(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def test_a_run_goes_on_offloaded_to_the_host(tmp_path, corpus, trained, forked):
    resume = ("--resume", trained / "checkpoints" / "step_00000008")
    layout = sets("parallel.tensor=1", "parallel.zero=3", "parallel.offload=cpu")
    done = forked("train", corpus / "run.toml", "--run-dir", tmp_path / "run", *resume, *layout)
    assert done.returncode == 0, done.stderr
    assert sorted(steps_of(tmp_path / "run")) == list(range(9, 17))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(trained)[8:], rel=1e-5)


def test_the_plan_says_where_memory_is(tmp_path, corpus, basestone):
    layout = sets("parallel.zero=3", "parallel.offload=nvme", f"parallel.nvme_path={tmp_path / 'swap'}")
    done = basestone("train", corpus / "run.toml", "--dry-run", *layout)
    assert done.returncode == 0, done.stderr
    assert "host memory a rank" in done.stdout and "in files a rank" in done.stdout
    assert not (tmp_path / "swap").exists()


@pytest.mark.system
@pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="libaio-dev is not installed")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_run_in_files_equals_one_in_memory_and_leaves_none(tmp_path, corpus, basestone):
    model = sets("model.hidden_size=512", "model.ffn_hidden_size=1024", "train.steps=6", "parallel.tensor=1")
    run = ("train", corpus / "run.toml", *model, "--set", "parallel.zero=3")
    plain, swapped, swap = tmp_path / "plain", tmp_path / "swapped", tmp_path / "swap"
    assert basestone(*run, "--run-dir", plain).returncode == 0
    layout = sets("parallel.offload=nvme", f"parallel.nvme_path={swap}")
    for steps in (3, 6):
        done = basestone(*run, "--run-dir", swapped, *layout, "--set", f"train.steps={steps}")
        assert done.returncode == 0, done.stderr
        assert [path.name for path in swap.iterdir()] == [".basestone-lock"]
    assert losses_of(swapped) == pytest.approx(losses_of(plain), rel=1e-5)
