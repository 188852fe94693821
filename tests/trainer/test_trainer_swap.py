"""Directories of swap files: one for each rank, none left behind, none taken from the living."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder, OpBuilder
from run_files import run_of

from basestone.trainer import engine
from basestone.trainer.config import ResolvedRun
from basestone.trainer.engine import check_deepspeed
from basestone.trainer.errors import ConfigError
from basestone.trainer.swap import SwapFolder, swap_folder_problem


def visible(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if not path.name.startswith(".")]


def test_a_folder_is_made_and_removed_with_what_is_in_it(tmp_path):
    parent = tmp_path / "a" / "b"
    folder = SwapFolder(parent)
    (folder.path / "zero_stage_3").mkdir()
    (folder.path / "zero_stage_3" / "x.swp").write_bytes(b"x")
    assert visible(parent) == [folder.path]
    folder.close()
    assert visible(parent) == []
    folder.close()  # twice does no harm


def test_every_rank_has_its_own_and_leaves_those_of_the_living_alone(tmp_path):
    first, second = SwapFolder(tmp_path), SwapFolder(tmp_path)
    assert sorted(visible(tmp_path)) == sorted([first.path, second.path])
    second.close()
    assert visible(tmp_path) == [first.path]
    first.close()


@pytest.mark.faults
def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from basestone.trainer.swap import SwapFolder\n"
        "folder = SwapFolder(Path(sys.argv[1])); (folder.path / 'x.swp').touch()\n"
        "print(folder.path, flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    path = Path(other.stdout.readline().strip())
    (tmp_path / "theirs").mkdir()
    assert swap_folder_problem(tmp_path, 0) is None
    assert path.exists(), "its process lives"
    other.kill()
    other.wait()
    other.stdout.close()
    assert swap_folder_problem(tmp_path, 0) is None
    assert visible(tmp_path) == [tmp_path / "theirs"]


def test_a_directory_that_cannot_be():
    assert swap_folder_problem(Path("/proc/nowhere"), 0) == "cannot be written: No such file or directory"


def test_a_disk_that_is_too_small(tmp_path):
    problem = swap_folder_problem(tmp_path, 1 << 60)
    assert problem is not None and problem.endswith(
        "GiB free, and this host's ranks swap about 1073741824.0 GiB"
    )


def test_a_file_system_without_direct_io(tmp_path, monkeypatch):
    def refuse(path: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    real = os.open
    monkeypatch.setattr(os, "open", refuse)
    assert swap_folder_problem(tmp_path, 0) == "lies on a file system without direct I/O"


# ---- what a machine lacks -----------------------------------------------------------------------------------


def nvme_run(path: Path) -> ResolvedRun:
    run = run_of(parallel__zero=3, parallel__offload="nvme", parallel__nvme_path=str(path))
    return run.resolve(2, 200)


def refusal(run: ResolvedRun) -> str:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(run, 2)
    assert caught.value.exit_code == 64 and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_no_offload_needs_nothing(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    check_deepspeed(run_of().resolve(1, 200), 1)
    check_deepspeed(run_of(parallel__zero=3, parallel__offload="cpu").resolve(1, 200), 1)


def test_nvme_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert refusal(nvme_run(tmp_path)) == (
        "offload to NVMe: DeepSpeed compiles its file operations, and there is no C++ compiler; install g++; or set "
        'parallel.offload = "cpu", which needs no compiler'
    )


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@needs_compiler
def test_nvme_without_libaio(tmp_path, monkeypatch):
    monkeypatch.setenv("CFLAGS", "--no-such-flag")  # no program compiles, so none that calls libaio
    assert refusal(nvme_run(tmp_path)) == (
        "offload to NVMe: libaio and its headers are missing; install libaio-dev (libaio-devel); or set "
        'parallel.offload = "cpu", which needs no compiler'
    )


@needs_compiler
def test_nvme_behind_a_killed_build(tmp_path, monkeypatch):
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)  # libaio or not
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    folder = tmp_path / "builds" / "async_io"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    long_ago = time.time() - 2 * engine.MOST_BUILD_S
    os.utime(folder / "lock", (long_ago, long_ago))
    text = refusal(nvme_run(tmp_path / "swap"))
    assert f"{folder / 'lock'} says that they are being built, for more than 10 minutes; remove it; or" in text


@needs_compiler
def test_nvme_whose_build_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})  # by another test of this process
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setenv("CXX", "/bin/false")
    assert "offload to NVMe: DeepSpeed's file operations cannot be built: " in refusal(
        nvme_run(tmp_path / "swap")
    )


def test_nvme_in_a_directory_that_cannot_be_written():
    assert refusal(nvme_run(Path("/proc/nowhere"))) == (
        "offload to NVMe: /proc/nowhere cannot be written: No such file or directory; name another directory on a "
        "local disk"
    )
