"""Offload changes where tensors lie, not what is computed: to host memory, and to files."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small import VOCAB, held_out_loss, make_engine, relative_difference, restore, run_config, save, train

from basestone.model.families import layout_of
from basestone.trainer.config import RunConfig
from basestone.trainer.engine import check_deepspeed
from basestone.trainer.engine_state import MASTER
from basestone.trainer.errors import ConfigError
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import parse_layout

pytestmark = pytest.mark.dist
SAVED_AT, STEPS = 3, 5
# DeepSpeed leaves what is under 1 MiB in memory: a matrix of this model is larger, and so is its half.
WIDE = {"model__hidden_size": 512, "model__num_layers": 2}


def plain(dtype: str = "fp32", zero: int = 0, **changes: Any) -> RunConfig:
    """Give a run without offload; fp32 in ZeRO-0 is torch alone."""
    return run_config("gpt2", parallel__zero=zero, train__dtype=dtype, **changes)


def offloaded(zero: int, dtype: str = "fp32", to: str = "cpu", **changes: Any) -> RunConfig:
    return plain(dtype, zero, parallel__offload=to, **changes)


def in_files(folder: Path, dtype: str = "fp32", **section: Any) -> RunConfig:
    """Give a run whose optimizer and weights are all swapped, in many sub-groups."""
    device = {"device": "nvme", "nvme_path": str(folder / "swap")}
    config = {
        "stage": 3,
        "sub_group_size": 1_000_000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "offload_optimizer": device,
        "offload_param": {**device, "max_in_cpu": 0, "buffer_count": 3},
        **section,
    }
    path = folder / "mine.json"
    path.write_text(json.dumps({"zero_optimization": config}))
    return plain(dtype, 3, parallel__ds_config=str(path), **WIDE)


def _curve(run: RunConfig, swap: str | None = None) -> tuple[list[tuple[float, float]], float, list[str]]:
    engine = make_engine(run)
    curve = train(engine, run, range(SAVED_AT))
    files = sorted(path.name for path in Path(swap).rglob("*.swp")) if swap else []
    heldout = held_out_loss(engine, run)
    curve += train(engine, run, range(SAVED_AT, STEPS))
    engine.close()
    return curve, heldout, files


@functools.cache
def reference(dtype: str, wide: bool) -> tuple[list[tuple[float, float]], float, list[str]]:
    """Give torch alone in fp32; in bf16 the same layout without offload."""
    run = plain(dtype, 0 if dtype == "fp32" else 3, **(WIDE if wide else {}))
    return run_ranks(_curve, 1 if dtype == "fp32" else 2, run)[0]


def close(found: tuple[Any, float, Any], dtype: str = "fp32", *, wide: bool = False) -> bool:
    """In bf16 a norm that is off by an ulp rounds some weights the other way, and steps magnify that."""
    curve, heldout, _ = reference(dtype, wide)
    pairs = [*found[0], (found[1], 1.0)], [*curve, (heldout, 1.0)]
    exact = relative_difference(found[0][:2], curve[:2])
    return bool(exact < 1e-6 and relative_difference(*pairs) < (1e-5 if dtype == "fp32" else 1e-3))


@pytest.mark.parametrize("zero", [2, 3])
def test_in_host_memory_fp32_equals_serial(zero):
    assert close(run_ranks(_curve, 2, offloaded(zero))[0])


def test_in_host_memory_with_tensor_parallel_equals_serial():
    run = offloaded(3, parallel__tensor=2, parallel__sequence=True)
    assert close(run_ranks(_curve, 2, run)[0])


def test_in_host_memory_bf16_equals_no_offload():
    """Bit for bit; the norm is summed in another order, and where it clips, its last bit rounds weights another way."""
    found, plainly = (
        run_ranks(_curve, 2, run)[0]
        for run in (offloaded(3, "bf16", train__clip=0), plain("bf16", 3, train__clip=0))
    )
    assert [loss for loss, _ in found[0]] == [loss for loss, _ in plainly[0]] and found[1] == plainly[1]
    assert relative_difference(found[0], plainly[0]) < 1e-6
    assert run_ranks(_curve, 2, offloaded(2, "bf16"))[0] == run_ranks(_curve, 2, plain("bf16", 2))[0]


@pytest.mark.parametrize(
    ("name", "offload"),
    [("dp2-z3", "nvme"), ("tp2-z3", "nvme"), ("dp2-z2", "none"), ("dp1-z0", "none"), ("pp2-z3", "none")],
)
def test_a_layout_keeps_offload_where_it_goes_with_it(name, offload):
    layout = parse_layout(name)
    run = layout.of(offloaded(3, to="nvme", parallel__nvme_path="/disk"))
    assert run.parallel.offload == offload
    run.resolve(layout.processes, VOCAB)
    assert layout.of(offloaded(2)).parallel.offload == (
        "cpu" if layout.zero > 1 and layout.pipeline == 1 else "none"
    )


def _train_and_save(run: RunConfig, folder: str) -> list[tuple[float, float]]:
    engine = make_engine(run)
    train(engine, run, range(SAVED_AT))
    save(engine, folder, SAVED_AT)
    curve = train(engine, run, range(SAVED_AT, STEPS))
    engine.close()
    return curve


def _load_and_train(run: RunConfig, folder: str) -> list[tuple[float, float]]:
    engine = make_engine(run)
    state = restore(engine, folder)
    assert state is not None and engine.state.steps == SAVED_AT
    curve = train(engine, run, range(SAVED_AT, STEPS))
    engine.close()
    return curve


def _goes_on(folder: Path, saved: RunConfig, others: list[tuple[int, RunConfig]]) -> None:
    curve = run_ranks(_train_and_save, 2, saved, str(folder))[0]
    assert run_ranks(_load_and_train, 2, saved, str(folder))[0] == curve, "the same layout goes on bit for bit"
    for size, other in others:
        found = run_ranks(_load_and_train, size, other, str(folder))[0]
        assert relative_difference(found, curve) < 1e-5, other.parallel


@pytest.mark.parametrize("zero", [2, 3])
def test_a_checkpoint_of_an_offloaded_run_goes_on_anywhere(tmp_path, zero):
    others = [(1, plain()), (2, offloaded(5 - zero)), (2, plain(zero=1, parallel__tensor=2))]
    _goes_on(tmp_path, offloaded(zero), others)


def test_a_plain_checkpoint_goes_on_offloaded(tmp_path):
    _goes_on(tmp_path, plain(zero=1), [(2, offloaded(2)), (2, offloaded(3))])


def _contract(run: RunConfig) -> list[tuple[str, int, int]]:
    """Writes to fragments last, reach the weights, and are stepped from; give what this rank owns."""
    engine = make_engine(run)
    train(engine, run, range(1))
    state = engine.state
    found = {
        f.name: (f.start, f.numel, {k: t.clone() for k, t in f.tensors.items()}) for f in state.fragments()
    }
    assert state.steps == 1
    for name, (_, numel, tensors) in found.items():
        assert all(t.shape == (numel,) and t.dtype == torch.float32 for t in tensors.values()), name
    assert any(bool(tensors["exp_avg_sq"].any()) for _, _, tensors in found.values())
    before = held_out_loss(engine, run)
    for fragment in state.fragments():
        fragment.tensors[MASTER].mul_(0.5)
        fragment.tensors["exp_avg"].zero_()
        fragment.tensors["exp_avg_sq"].fill_(1e6)
    state.refresh()
    halved = held_out_loss(engine, run)
    assert halved != before
    train(engine, run, range(1, 2))
    for fragment in state.fragments():  # roots of 1000: a step moves nothing that one can see, but for decay
        expected = found[fragment.name][2][MASTER] * 0.5
        torch.testing.assert_close(fragment.tensors[MASTER], expected, rtol=1e-3, atol=1e-5)
        assert bool((fragment.tensors["exp_avg_sq"] > 9e5).all()), fragment.name
    for fragment in state.fragments():
        fragment.tensors[MASTER].mul_(2.0)
    state.refresh()
    assert abs(held_out_loss(engine, run) - before) < 1e-2 * before
    engine.close()
    return [(name, start, numel) for name, (start, numel, _) in found.items()]


def _fulfils_contract(run: RunConfig) -> None:
    answers = run_ranks(_contract, 2, run)
    table = layout_of(run.resolve(2, VOCAB).run.model)
    for name, row in table.items():
        spans = sorted((start, numel) for answer in answers for found, start, numel in answer if found == name)
        assert spans[0][0] == 0 and sum(numel for _, numel in spans) == row.numel
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(spans))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [2, 3])
def test_fragments_of_an_offloaded_optimizer_cover_everything_and_keep_what_is_written(zero, dtype):
    _fulfils_contract(offloaded(zero, dtype))


# ---- in files -----------------------------------------------------------------------------------------------


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    """A directory to swap to, where this machine can."""
    run = in_files(tmp_path)
    try:
        check_deepspeed(run.resolve(2, VOCAB), 2)
    except ConfigError as error:
        pytest.skip(str(error))
    return tmp_path


def swap_of(folder: Path) -> Path:
    return folder / "swap"


def left(folder: Path) -> list[str]:
    return [path.name for path in swap_of(folder).iterdir() if not path.name.startswith(".")]


def ours(folder: Path, dtype: str = "fp32") -> RunConfig:
    return offloaded(3, dtype, "nvme", parallel__nvme_path=str(swap_of(folder)), **WIDE)


@pytest.mark.system
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [ours, in_files], ids=["ours", "all-in-files"])
def test_in_files_equals_no_offload(nvme, make, dtype):
    found = run_ranks(_curve, 2, make(nvme, dtype), str(swap_of(nvme)))[0]
    assert close(found, dtype, wide=True)
    states = {name.split("-")[0] for name in found[2] if "exp_avg" in name}
    assert states == {"exp_avg", "exp_avg_sq"} and any("param" in name for name in found[2])
    assert left(nvme) == []


@pytest.mark.system
def test_read_ahead_and_write_behind_of_the_optimizer_equal_serial(nvme):
    device = {"device": "nvme", "nvme_path": str(swap_of(nvme)), "pipeline_read": True, "pipeline_write": True}
    run = in_files(nvme, offload_optimizer=device, offload_param={"device": "cpu"})
    assert close(run_ranks(_curve, 2, run, str(swap_of(nvme)))[0], wide=True)


@pytest.mark.system
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [ours, in_files], ids=["ours", "all-in-files"])
def test_fragments_in_files_cover_everything_and_keep_what_is_written(nvme, make, dtype):
    _fulfils_contract(make(nvme, dtype))


@pytest.mark.system
def test_a_checkpoint_of_a_run_in_files_goes_on_anywhere(nvme):
    _goes_on(nvme, in_files(nvme), [(1, plain(**WIDE)), (2, offloaded(2, **WIDE)), (2, ours(nvme))])


@pytest.mark.system
def test_a_plain_checkpoint_goes_on_in_files(nvme):
    _goes_on(nvme, plain(zero=1, **WIDE), [(2, in_files(nvme)), (2, ours(nvme))])


@pytest.mark.system
def test_bf16_in_files_goes_on_bit_for_bit(nvme):
    _goes_on(nvme, in_files(nvme, "bf16"), [])


def _die(run: RunConfig) -> None:
    engine = make_engine(run)
    train(engine, run, range(1))  # and leave without a word


@pytest.mark.system
def test_what_a_killed_run_left_is_removed_by_the_next(nvme):
    run_ranks(_die, 2, ours(nvme))
    assert len(left(nvme)) == 2 and list(swap_of(nvme).rglob("*.swp"))
    shutil.copytree(swap_of(nvme) / left(nvme)[0], swap_of(nvme) / "another")
    run_ranks(_curve, 2, ours(nvme))
    assert left(nvme) == ["another"]
