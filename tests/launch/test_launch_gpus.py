"""As many workers as GPUs, and no more. The GPUs are those that CUDA_VISIBLE_DEVICES names; none has to be there."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from in_process import refused
from run_files import run_of, run_values
from small_corpus import RUN_TOML

from basestone.launch.gpus import check_gpus, check_ranks, fitting_keys, quickstart_keys
from basestone.trainer.errors import ConfigError
from basestone.trainer.load import load_run, parse_overrides, validate_run

RECIPE = Path(str(resources.files("basestone.recipes").joinpath("quickstart.toml")))


def see_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number))))


def test_more_workers_than_gpus_are_refused_with_the_keys_to_change(
    basestone, asked, tokenizer, tmp_path, monkeypatch
):
    (tmp_path / "run.toml").write_text(RUN_TOML.replace("tokenizer.model", "texts.model"))
    words = ("train", tmp_path / "run.toml", "--run-dir", tmp_path / "run")
    see_gpus(monkeypatch, 1)
    done = basestone(*words)
    assert (done.code, done.out, asked) == (64, "", []) and not (tmp_path / "run").exists()
    error = done.err.splitlines()[-1]
    assert error == (
        "error: run.processes = 2, but this machine has 1 GPU(s) and every process needs its own; "
        "give --set run.processes=1 --set parallel.tensor=1, or CUDA_VISIBLE_DEVICES= to train on the CPU"
    )
    assert basestone(*words, "--dry-run").code == 0, "a plan may be for another machine"
    assert basestone(*words, "--set", "run.processes=1", "--set", "parallel.tensor=1").code == 7
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert basestone(*words).code == 7
    see_gpus(monkeypatch, 2)
    assert basestone(*words).code == 7
    assert [call[1] for call in asked] == [1, 2, 2]
    see_gpus(monkeypatch, 1)
    refused(basestone(*words, "--set", "run.processes=3"), 64, "multiple of 2")


@pytest.mark.parametrize(
    ("processes", "tensor", "sequence", "num_workers", "keys"),
    [
        (4, 1, False, 2, ["run.processes=2"]),
        (4, 2, False, 2, ["run.processes=2"]),
        (4, 2, False, 3, ["run.processes=3", "parallel.tensor=1"]),
        (2, 2, True, 1, ["run.processes=1", "parallel.tensor=1", "parallel.sequence=false"]),
        (2, 2, True, 2, []),
    ],
)
def test_the_tensor_size_that_fits(processes, tensor, sequence, num_workers, keys):
    run = run_of(run__processes=processes, parallel__tensor=tensor, parallel__sequence=sequence)
    assert fitting_keys(run, num_workers) == keys


@pytest.mark.parametrize(
    ("num_workers", "keys"),
    [
        (6, ["run.processes=6"]),
        (3, ["run.processes=3", "parallel.tensor=1"]),
        (4, ["run.processes=4", "parallel.pipeline=1", "parallel.pipeline_layers=[3]"]),
        (1, ["run.processes=1", "parallel.pipeline=1", "parallel.pipeline_layers=[3]", "parallel.tensor=1"]),
    ],
)
def test_the_stages_that_fit(num_workers, keys):
    run = run_of(
        run__processes=12, parallel__tensor=2, parallel__pipeline=3, parallel__pipeline_layers=[1, 1, 1]
    )
    assert fitting_keys(run, num_workers) == keys
    values = parse_overrides(keys).get("parallel", {})
    changed = run_values(
        **{f"parallel__{key}": value for key, value in (run.parallel.model_dump() | values).items()}
    )
    assert validate_run(changed, "run.toml").resolve(num_workers, 200).world_size == num_workers


def test_interleaved_stages_go_with_the_pipeline():
    run = run_of(run__processes=2, parallel__pipeline=2, parallel__virtual_pipeline=2)
    assert fitting_keys(run, 1) == ["run.processes=1", "parallel.pipeline=1", "parallel.virtual_pipeline=1"]


@pytest.mark.parametrize(
    ("gpus", "workers", "tensor"),
    [(0, 2, 2), (1, 1, 1), (2, 2, 2), (3, 3, 1), (4, 4, 2), (8, 8, 2), (9, 8, 2)],
)
def test_the_quickstart_takes_every_gpu_or_two_processes_on_a_cpu(monkeypatch, gpus, workers, tensor):
    see_gpus(monkeypatch, gpus)
    run = load_run(RECIPE, quickstart_keys(load_run(RECIPE)))
    assert (run.run.processes, run.parallel.tensor) == (workers, tensor)
    check_gpus(run, workers)
    assert run.resolve(workers, 4096).data_parallel == workers // tensor


def test_without_a_gpu_any_number_is_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_gpus(run_of(), 64)
    see_gpus(monkeypatch, 3)
    check_gpus(run_of(), 3)
    with pytest.raises(ConfigError, match="has 3 GPU"):
        check_gpus(run_of(), 4)


def test_verify_takes_no_more_ranks_than_gpus(monkeypatch):
    see_gpus(monkeypatch, 2)
    with pytest.raises(
        ConfigError, match=r"--processes 4, but this machine has 2 GPU\(s\).*give --processes 2, or"
    ):
        check_ranks(4)
    check_ranks(2)
    see_gpus(monkeypatch, 0)
    check_ranks(4)
