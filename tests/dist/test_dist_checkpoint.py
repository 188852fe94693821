"""A checkpoint has no layout: any layout resumes from any other, and the same one bit for bit."""

from __future__ import annotations

import functools
import itertools
import os

import numpy as np
import pytest
from small import VOCAB, curve_of, make_engine, relative_difference, restore, run_config, save, train

from basestone.model.families import layout_of
from basestone.model.initial import initial_piece
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.errors import CheckpointError
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import parse_layout

pytestmark = pytest.mark.dist
SAVED_AT, STEPS = 4, 9


def table_of(run):
    return layout_of(run.resolve(run.parallel.tensor * run.parallel.pipeline, VOCAB).run.model)


def _train_and_save(run, folder):
    engine = make_engine(run)
    curve = train(engine, run, range(SAVED_AT))
    save(engine, folder, SAVED_AT)
    return curve + train(engine, run, range(SAVED_AT, STEPS))


def _load_and_train(run, folder):
    engine = make_engine(run)
    state = restore(engine, folder)
    assert state is not None and state["step"] == SAVED_AT and engine.state.steps == SAVED_AT
    return train(engine, run, range(SAVED_AT, STEPS))


def layout(tensor, zero, sequence=False, family="llama", **changes):
    return run_config(
        family, parallel__tensor=tensor, parallel__zero=zero, parallel__sequence=sequence, **changes
    )


@functools.cache
def serial(family):
    return run_ranks(curve_of, 1, layout(1, 0, family=family), STEPS)[0]


SAVES = [
    ("llama", "tp2-sp-dp2-z1", ("dp1-z2", "pp4-z3")),
    ("llama", "dp2-z3", ("tp2-z1", "pp2-vp2-z0")),
    ("gpt2", "tp2-sp-z3", ("dp2-z3", "pp2-z1")),
    ("llama", "dp1-z0", ("tp2-sp-dp2-z3", "pp2-z1")),
    ("gpt2", "pp2-vp2-dp2-z1", ("dp1-z2", "tp2-sp-z0")),
    pytest.param("gpt2", "tp2-sp-pp2-z3", ("dp2-z3", "pp2-vp2-z0"), marks=pytest.mark.slow),
]
LOADS = ["dp1-z2", "tp2-z1", "dp2-z3", "tp2-sp-z0", "tp2-sp-dp2-z3", "pp2-z1", "pp4-z3", "pp2-vp2-z0"]


def run_of(family, name, **changes):
    found = parse_layout(name)
    return found.processes, found.of(run_config(family, **changes))


@pytest.mark.parametrize(("family", "name", "loads"), SAVES)
def test_saved_in_one_layout_goes_on_in_others(tmp_path, family, name, loads):
    _save_and_load(tmp_path, family, name, loads)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "loads"), SAVES)
def test_saved_in_one_layout_goes_on_in_any(tmp_path, family, name, loads):
    _save_and_load(tmp_path, family, name, [other for other in LOADS if other not in loads])


def _save_and_load(folder, family, name, loads):
    size, run = run_of(family, name)
    saved = run_ranks(_train_and_save, size, run, str(folder))[0]
    assert relative_difference(saved, serial(family)) < 1e-5
    same = run_ranks(_load_and_train, size, run, str(folder))[0]
    assert same == saved[SAVED_AT:], "the same layout must go on bit for bit"
    for other in loads:
        size, run = run_of(family, other)
        curve = run_ranks(_load_and_train, size, run, str(folder))[0]
        assert relative_difference(curve, serial(family)[SAVED_AT:]) < 1e-5, other


@pytest.mark.parametrize("name", ["pp2-z1", "pp2-vp2-z3"])
def test_a_pipeline_in_bf16_goes_on_bit_for_bit(tmp_path, name):
    size, run = run_of("gpt2", name, train__dtype="bf16")
    saved = run_ranks(_train_and_save, size, run, str(tmp_path))[0]
    assert run_ranks(_load_and_train, size, run, str(tmp_path))[0] == saved[SAVED_AT:]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_goes_on_bit_for_bit(tmp_path, zero):
    run = layout(2, zero, True, train__dtype="bf16")
    saved = run_ranks(_train_and_save, 2, run, str(tmp_path))[0]
    assert run_ranks(_load_and_train, 2, run, str(tmp_path))[0] == saved[SAVED_AT:]


def _load_into_a_trained_engine(run, folder):
    """Go back in the same process: what the engine worked with must not outlive the checkpoint that is loaded."""
    engine = make_engine(run)
    train(engine, run, range(SAVED_AT))
    save(engine, folder, SAVED_AT)
    first = train(engine, run, range(SAVED_AT, STEPS))
    restore(engine, folder)
    return first, train(engine, run, range(SAVED_AT, STEPS))


@pytest.mark.parametrize("name", ["dp2-z0", "dp2-z1", "dp2-z2", "dp2-z3", "pp2-z3"])
def test_an_engine_goes_back_to_a_checkpoint(tmp_path, name):
    size, run = run_of("gpt2", name)
    for first, second in run_ranks(_load_into_a_trained_engine, size, run, str(tmp_path)):
        assert first == second


def _save_initial(run, folder):
    engine = make_engine(run)
    save(engine, folder, 0)


@pytest.mark.parametrize("name", ["tp2-z1", "dp2-z3", "tp2-z3", "dp1-z0", "pp2-vp2-z1", "tp2-pp2-z3"])
def test_initial_weights_are_the_tables_in_every_layout(tmp_path, name):
    size, run = run_of("gpt2", name)
    run_ranks(_save_initial, size, run, str(tmp_path))
    table = table_of(run)
    tensors = CheckpointTensors(Reader(tmp_path / "checkpoints" / "step_00000000"), table)
    for name, row in table.items():
        np.testing.assert_array_equal(
            tensors.read(name).numpy(), initial_piece(row, run.run.seed, 0, 1).numpy()
        )


def _fragments_of_rank(run):
    """Contract of EngineState, whatever DeepSpeed class stands behind: all of each parameter, exactly once."""
    engine = make_engine(run)
    train(engine, run, range(1))
    return [
        (fragment.name, fragment.start, fragment.numel, sorted(fragment.tensors), engine.runtime.tp_rank)
        for fragment in engine.state.fragments()
    ]


@pytest.mark.parametrize(
    ("zero", "dtype"), [(0, "fp32"), *((zero, dtype) for zero in (1, 2, 3) for dtype in ("fp32", "bf16"))]
)
def test_fragments_cover_every_parameter_once(zero, dtype):
    run = layout(1, zero, train__dtype=dtype)
    answers = run_ranks(_fragments_of_rank, 2, run)
    if zero == 0:
        assert answers[0] == answers[1]
        answers = answers[:1]
    for name, row in table_of(run).items():
        spans = sorted((start, numel) for answer in answers for n, start, numel, _, _ in answer if n == name)
        assert spans[0][0] == 0 and sum(numel for _, numel in spans) == row.numel
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(spans))
    assert {tuple(keys) for answer in answers for _, _, _, keys, _ in answer} == {
        ("exp_avg", "exp_avg_sq", "master")
    }


def _restore_only(run, folder):
    engine = make_engine(run)
    try:
        state = restore(engine, folder)
    except CheckpointError as error:
        return str(error)
    return state["step"] if state else None


def _save_two(run, folder):
    engine = make_engine(run)
    for step in (1, 2):
        train(engine, run, range(step - 1, step))
        save(engine, folder, step)


@pytest.mark.faults
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    run = layout(2, 1)
    run_ranks(_save_two, 2, run, str(tmp_path))
    newest = tmp_path / "checkpoints" / "step_00000002" / "rank_00001.bin"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert run_ranks(_restore_only, 2, run, str(tmp_path)) == [1, 1]
    older = tmp_path / "checkpoints" / "step_00000001" / "rank_00000.bin"
    os.truncate(older, 100)
    answers = run_ranks(_restore_only, 2, run, str(tmp_path))
    assert all("no checkpoint is good" in text and "rank_00001.bin" in text for text in answers)
    assert all("does not start over" in text for text in answers)


def _full_disk(run, folder):
    import resource
    import signal

    engine = make_engine(run)
    train(engine, run, range(1))
    save(engine, folder, 1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if engine.runtime.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return save(engine, folder, 2).problem


@pytest.mark.faults
def test_a_full_disk_on_one_rank_is_named_on_every_rank(tmp_path):
    answers = run_ranks(_full_disk, 2, layout(2, 1), str(tmp_path))
    assert all("rank 1" in text for text in answers)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"


def _no_directory(run, folder):
    engine = make_engine(run)
    return save(engine, folder, 1).problem


@pytest.mark.faults
def test_a_directory_that_cannot_be_made_is_told_on_every_rank(tmp_path):
    (tmp_path / "checkpoints").touch()
    answers = run_ranks(_no_directory, 2, layout(2, 1), str(tmp_path))
    assert answers[0] == answers[1] and answers[0].startswith("rank 0: ")
