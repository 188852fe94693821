"""The global batch over the steps of a run: by hand, and against adding it up step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_files import run_of, run_values

from basestone.data.lengths import RowLengths
from basestone.trainer.config import RunConfig
from basestone.trainer.errors import ConfigError
from basestone.trainer.load import fixed_differences, load_run, run_to_toml, validate_run
from basestone.trainer.plan import describe, memory_bytes, token_flops, total_flops
from basestone.trainer.ramp import BatchSchedule, Phase
from basestone.trainer.sections import RampPhase

VOCAB = 200


def rows_of(*rows: tuple[int, int | None, int | None]) -> list[RampPhase]:
    return [RampPhase(global_batch=batch, until_step=step, until_tokens=tokens) for batch, step, tokens in rows]


# ---- by hand ------------------------------------------------------------------------------------------------------


def test_no_ramp_is_one_phase():
    schedule = BatchSchedule.of((), 8, 32)
    assert schedule.phases == (Phase(0, 8, 32),)
    assert [schedule.global_batch(step) for step in (0, 1, 10**9)] == [8, 8, 8]
    assert [schedule.tokens_before(step) for step in (0, 1, 3)] == [0, 256, 768]
    assert [schedule.steps_for(tokens) for tokens in (0, 1, 256, 257, 512)] == [0, 1, 1, 2, 2]


def test_phases_end_at_steps():
    schedule = BatchSchedule.of(rows_of((2, 3, None), (4, 5, None)), 8, 10)
    assert schedule.phases == (Phase(0, 2, 10), Phase(3, 4, 10), Phase(5, 8, 10))
    assert [schedule.global_batch(step) for step in range(8)] == [2, 2, 2, 4, 4, 8, 8, 8]
    assert [schedule.tokens_before(step) for step in range(8)] == [0, 20, 40, 60, 100, 140, 220, 300]
    assert [schedule.steps_for(tokens) for tokens in (20, 21, 60, 61, 100, 140, 141, 300)] == [
        *(1, 2, 3, 4, 4, 5, 6, 7)
    ]


@pytest.mark.parametrize(
    ("until_tokens", "first_step"), [(1, 1), (64, 1), (65, 2), (128, 2), (640, 10), (641, 11)]
)
def test_a_phase_that_ends_at_tokens_has_whole_steps(until_tokens, first_step):
    assert BatchSchedule.of(rows_of((2, None, until_tokens)), 8, 32).phases == (
        Phase(0, 2, 32),
        Phase(first_step, 8, 32),
    )


def test_tokens_count_from_the_beginning_of_the_run():
    rows = rows_of((2, 3, None), (4, None, 150), (8, 9, None))
    # 60 tokens after three steps; 90 more are three steps of 40: six steps, 180 tokens.
    assert BatchSchedule.of(rows, 16, 10).phases == (
        Phase(0, 2, 10),
        Phase(3, 4, 10),
        Phase(6, 8, 10),
        Phase(9, 16, 10),
    )


def test_batches_may_also_fall():
    schedule = BatchSchedule.of(rows_of((8, 2, None)), 2, 10)
    assert [schedule.global_batch(step) for step in range(4)] == [8, 8, 2, 2]
    assert schedule.steps_for(161) == 3 and schedule.steps_for(200) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((2, 5, None), (4, 5, None)), "train.ramp[1] ends at step 5, but begins at step 5"),
        (((2, 5, None), (4, 3, None)), "train.ramp[1] ends at step 3, but begins at step 5"),
        (((2, 5, None), (4, None, 100)), "train.ramp[1] ends at step 5, but begins at step 5"),
        (((2, 5, None), (4, None, 50)), "train.ramp[1] ends at step 4, but begins at step 5"),
        (((2, 5, None), (4, 9, None), (6, 9, None)), "train.ramp[2] ends at step 9, but begins at step 9"),
    ],
)
def test_a_phase_that_ends_before_it_begins(rows, message):
    with pytest.raises(ValueError) as caught:
        BatchSchedule.of(rows_of(*rows), 8, 10)
    assert str(caught.value) == f"{message}; order the phases by their ends"


# ---- against adding up --------------------------------------------------------------------------------------------


@st.composite
def schedules(draw: st.DrawFn) -> BatchSchedule:
    """Any order of batches, lengths and the two kinds of ends; what a row leaves out is the run's."""
    own = Phase(0, draw(st.integers(1, 20)), draw(st.integers(2, 50)))
    rows, step, tokens = [], 0, 0
    for _ in range(draw(st.integers(0, 4))):
        batch, length = draw(st.none() | st.integers(1, 20)), draw(st.none() | st.integers(2, 50))
        phase = Phase(step, batch or own.global_batch, length or own.sequence_length)
        steps = draw(st.integers(1, 7))
        step, tokens = step + steps, tokens + steps * phase.tokens
        missing = draw(st.integers(0, phase.tokens - 1))  # as much is rounded up
        end = {"until_step": step} if draw(st.booleans()) else {"until_tokens": tokens - missing}
        given = {} if batch or length else {"global_batch": own.global_batch}
        rows.append(RampPhase(**{"global_batch": batch, "sequence_length": length, **given, **end}))
    schedule = BatchSchedule.of(rows, own.global_batch, own.sequence_length)
    assert schedule.phases[-1] == own._replace(first_step=step)
    return schedule


@given(schedules(), st.integers(0, 60))
def test_tokens_are_those_of_all_steps_before(schedule, step):
    sizes = [(schedule.global_batch(number), schedule.sequence_length(number)) for number in range(step)]
    assert schedule.tokens_before(step) == sum(batch * length for batch, length in sizes)
    assert schedule.samples_before(step) == sum(batch for batch, _ in sizes)


@given(schedules())
def test_lengths_change_at_the_first_sample_of_a_step(schedule):
    last = schedule.phases[-1].first_step + 1
    lengths = RowLengths(schedule.length_ends, schedule.phases[-1].sequence_length)
    for step in range(last):
        first, after = schedule.samples_before(step), schedule.samples_before(step + 1)
        assert lengths.at(first) == lengths.at(after - 1) == schedule.sequence_length(step)


@given(schedules(), st.integers(0, 30_000))
def test_steps_are_the_fewest_that_take_so_many_tokens(schedule, tokens):
    steps = schedule.steps_for(tokens)
    assert isinstance(steps, int) and schedule.tokens_before(steps) >= tokens
    assert steps == 0 or schedule.tokens_before(steps - 1) < tokens


@given(schedules(), st.integers(0, 60))
def test_steps_and_tokens_are_each_others_way_back(schedule, step):
    assert schedule.steps_for(schedule.tokens_before(step)) == step


# ---- in a run file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [{}, {"until_step": 3, "until_tokens": 100}])
def test_a_row_has_one_end(row):
    with pytest.raises(ConfigError) as caught:
        validate_run(run_values(train__ramp=[{"global_batch": 4, **row}]), "run.toml")
    assert str(caught.value) == "run.toml: 1 error(s)\n  train.ramp.0: give either until_step or until_tokens"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"until_step": 3},
            "train.ramp.1: give global_batch, sequence_length or both; what is left out is the run's own",
        ),
        (
            {"sequence_length": 1, "until_step": 3},
            "train.ramp.1.sequence_length: Input should be greater than or equal to 2 (got 1)",
        ),
        (
            {"global_batch": 0, "until_step": 3},
            "train.ramp.1.global_batch: Input should be greater than 0 (got 0)",
        ),
        (
            {"global_batch": 4, "until_step": 0},
            "train.ramp.1.until_step: Input should be greater than 0 (got 0)",
        ),
        (
            {"global_batch": 4, "until_tokens": 1.5},
            "train.ramp.1.until_tokens: Input should be a valid integer (got 1.5)",
        ),
        (
            {"global_batch": True, "until_step": 3},
            "train.ramp.1.global_batch: Input should be a valid integer (got True)",
        ),
        (
            {"global_batch": 4, "until_stp": 3},
            "train.ramp.1.until_stp: unknown key; did you mean 'until_step'?",
        ),
    ],
)
def test_a_row_that_is_wrong_is_named(row, message):
    rows = [{"global_batch": 2, "until_step": 1}, row]
    with pytest.raises(ConfigError) as caught:
        validate_run(run_values(train__ramp=rows), "run.toml")
    assert str(caught.value).splitlines()[1] == f"  {message}"


def refusal(run: RunConfig, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        run.resolve(world_size, VOCAB)
    assert caught.value.exit_code == 64
    return str(caught.value).splitlines()


def ramp_run(*rows: tuple[int, int | None, int | None], **changes: object) -> RunConfig:
    return run_of(train__ramp=rows_of(*rows), **changes)


def test_phases_out_of_order_are_refused_with_all_else_that_is_wrong():
    assert refusal(ramp_run((2, 5, None), (4, 5, None), data__sequence_length=65)) == [
        "data.sequence_length = 65 exceeds model.max_sequence_length = 64; lower the first or raise the second",
        "train.ramp[1] ends at step 5, but begins at step 5; order the phases by their ends",
    ]


def test_the_smallest_batch_must_give_every_rank_something():
    (line,) = refusal(ramp_run((2, 5, None), (4, 9, None)), 4)
    assert "= 2 is smaller than the 4 data-parallel ranks; raise it or start fewer processes" in line


def test_every_phase_must_suit_the_interleaved_schedule():
    run = ramp_run(
        (3, 5, None),
        parallel__pipeline=2,
        parallel__virtual_pipeline=2,
        model__num_layers=4,
        train__micro_batch=1,
    )
    (line,) = refusal(run, 2)
    assert "= 3 in micro-batches of 1" in line and "a batch of 4 would do" in line


def test_lanes_divide_every_batch_and_most_micro_batches_are_those_of_the_largest():
    resolved = ramp_run((4, 5, None), (12, 9, None), train__global_batch=8).resolve(2, VOCAB)
    assert resolved.lanes == 4
    assert [resolved.samples_per_rank(batch) for batch in (4, 12, 8)] == [2, 6, 4]
    assert [resolved.num_micro_batches(batch) for batch in (4, 12, 8)] == [1, 3, 2]
    assert resolved.most_micro_batches == 3


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (128, 1), (129, 2), (640, 5), (641, 6), (896, 6), (897, 7)]
)
def test_tokens_of_a_run_with_a_ramp_are_rounded_up_to_steps(tokens, steps):
    """Five steps of 4 x 32 tokens, then steps of 8 x 32."""
    resolved = ramp_run((4, 5, None), train__steps=None, train__tokens=tokens).resolve(1, VOCAB)
    assert resolved.steps == steps
    assert resolved.tokens == 128 * min(steps, 5) + 256 * max(0, steps - 5)


def test_a_ramp_survives_the_way_to_a_file_and_back(tmp_path: Path):
    run = ramp_run((2, 5, None), (4, None, 10**6)).resolve(1, VOCAB).run
    path = tmp_path / "run.toml"
    path.write_text(run_to_toml(run.model_dump(mode="json")))
    assert load_run(path) == run
    assert load_run(path).train.ramp == tuple(rows_of((2, 5, None), (4, None, 10**6)))


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 2**40), st.integers(1, 2**62), st.booleans()), max_size=5).map(
        lambda rows: [(batch, end, None) if is_step else (batch, None, end) for batch, end, is_step in rows]
    )
)
def test_any_ramp_survives(tmp_path_factory, rows):
    run = ramp_run(*rows)
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(run_to_toml(run.model_dump(mode="json")))
    assert load_run(path) == run


def test_set_gives_a_ramp(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(run_to_toml(run_of().model_dump(mode="json")))
    run = load_run(path, ["train.ramp=[{global_batch = 2, until_step = 5}]"])
    assert run.train.ramp == tuple(rows_of((2, 5, None)))


def test_a_ramp_may_not_change_at_a_resume():
    old = ramp_run((2, 5, None)).model_dump(mode="json")
    assert fixed_differences(old, ramp_run((2, 5, None)).model_dump()) == []
    (line,) = fixed_differences(old, ramp_run((2, 6, None)).model_dump(mode="json"))
    assert line.startswith("train.ramp: ")
    (line,) = fixed_differences(old, run_of().model_dump(mode="json"))
    assert line.startswith("train.ramp: ")


def test_batches_that_leave_ranks_without_data_are_refused():
    run = run_of(train__ramp=({"global_batch": 3, "until_step": 4},))
    with pytest.raises(
        ConfigError, match=r"batch\(es\) 3, 8 have 1 as .* than the 2 data-parallel.*multiples of 2"
    ):
        run.resolve(2, 200)
    assert run.resolve(1, 200).lanes == 1


# ---- lanes and the mix --------------------------------------------------------------------------------------


def test_lanes_may_be_given_and_have_to_divide_and_to_feed():
    run = run_of(train__global_batch=1024, data__lanes=512)
    assert run.resolve(512, 200).lanes == 512
    with pytest.raises(
        ConfigError, match=r"data.lanes = 96 does not divide the global batch 1024; take a divisor"
    ):
        run_of(train__global_batch=1024, data__lanes=96).resolve(1, 200)
    with pytest.raises(
        ConfigError, match=r"dealt into 256 lanes, .* 300 data-parallel .*; set data.lanes = 512"
    ):
        run_of(train__global_batch=1024).resolve(300, 200)


def test_rows_of_the_mix_end_at_samples_of_the_ramp():
    """3 steps of 2 sequences of 32, then 8 a step: step 5 begins at sample 22; 1,000 tokens are through with step 7."""
    sources = {"web": {"path": "/a"}, "code": {"path": "/b"}}
    rows = [{"weights": {"web": 1.0}, "until_step": 5}, {"weights": {"code": 1.0}, "until_tokens": 1000}]
    changes = {
        "data__train": None,
        "data__sources": sources,
        "train__ramp": [{"global_batch": 2, "until_step": 3}],
    }
    resolved = run_of(**changes, data__mix=rows).resolve(1, 200)
    assert resolved.mix_ends == (6 + 2 * 8, 6 + 4 * 8)
    with pytest.raises(ConfigError, match=r"data.mix\[1\] ends at step 5, before it begins; order the rows"):
        run_of(**changes, data__mix=[rows[0], rows[0]]).resolve(1, 200)


# ---- lengths ------------------------------------------------------------------------------------------------------


def lengths_run(*rows: tuple[int | None, int | None, int], **changes: object) -> RunConfig:
    """A run of batches of 8 sequences of 32, with rows (global_batch, sequence_length, until_step)."""
    names = ("global_batch", "sequence_length", "until_step")
    return run_of(train__ramp=[dict(zip(names, row, strict=True)) for row in rows], **changes)


def test_a_row_takes_what_it_leaves_out_from_the_run():
    resolved = lengths_run((16, 8, 3), (None, 16, 5), (4, None, 6)).resolve(1, VOCAB)
    assert resolved.batches.phases == (Phase(0, 16, 8), Phase(3, 8, 16), Phase(5, 4, 32), Phase(6, 8, 32))
    assert resolved.tokens == 3 * 128 + 2 * 128 + 128 + 14 * 256
    assert resolved.batches.length_ends == ((48, 8), (64, 16)), (
        "in samples, and not where the batch alone changes"
    )


def test_tokens_end_a_phase_by_its_own_length():
    rows = [{"sequence_length": 8, "until_tokens": 129}, {"sequence_length": 16, "until_tokens": 500}]
    resolved = run_of(train__ramp=rows, train__steps=None, train__tokens=1000).resolve(1, VOCAB)
    # three steps of 64 tokens; 308 more are three of 128, which makes 576; two of 256 reach 1,000
    assert resolved.batches.phases == (Phase(0, 8, 8), Phase(3, 8, 16), Phase(6, 8, 32))
    assert (resolved.steps, resolved.tokens) == (8, 576 + 512)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [(None, 64, 3)],
            "train.ramp[0].sequence_length = 64 exceeds data.sequence_length = 32, the run's longest; lower the first "
            "or raise the second",
        ),
        (
            [(4, 16, 3), (8, 8, 5)],
            "train.ramp[1].sequence_length = 8 is less than the 16 before it; lengths may only grow",
        ),
        (
            [(4, None, 3), (8, 16, 5)],
            "train.ramp[1].sequence_length = 16 is less than the 32 before it; lengths may only grow",
        ),
    ],
)
def test_lengths_grow_up_to_the_runs(rows, message):
    assert refusal(lengths_run(*rows)) == [message]


def test_every_length_must_suit_sequence_parallel():
    layout = {"parallel__sequence": True, "parallel__tensor": 4}
    lengths_run((None, 8, 3), (None, 12, 5), **layout).resolve(4, VOCAB)
    (line,) = refusal(lengths_run((None, 8, 3), (None, 10, 5), **layout), 4)
    assert line == (
        "parallel.sequence = true needs train.ramp[1].sequence_length = 10 to be a multiple of parallel.tensor = 4"
    )


def test_lengths_may_not_change_at_a_resume():
    old = lengths_run((4, 16, 3)).model_dump(mode="json")
    assert fixed_differences(old, lengths_run((4, 16, 3)).model_dump(mode="json")) == []
    for other in (lengths_run((4, 8, 3)), lengths_run((4, None, 3)), lengths_run((None, 16, 3))):
        (line,) = fixed_differences(old, other.model_dump(mode="json"))
        assert line.startswith("train.ramp: ")


def test_a_ramp_of_batches_written_before_there_were_lengths_is_the_same():
    old = ramp_run((2, 5, None)).model_dump(mode="json")
    for row in old["train"]["ramp"]:
        del row["sequence_length"]
    assert fixed_differences(old, ramp_run((2, 5, None)).model_dump(mode="json")) == []


def test_lengths_survive_the_way_to_a_file_and_back(tmp_path: Path):
    run = lengths_run((4, 16, 3), (None, 24, 5)).resolve(1, VOCAB).run
    path = tmp_path / "run.toml"
    path.write_text(run_to_toml(run.model_dump(mode="json")))
    assert load_run(path) == run


def test_rows_of_the_mix_end_at_samples_where_lengths_grow():
    """3 steps of 16 sequences of 8, then 8 of 32: 1,000 tokens are through with step 6, sample 48 + 3 x 8."""
    changes = {
        "data__train": None,
        "data__sources": {"web": {"path": "/a"}, "code": {"path": "/b"}},
        "data__mix": [
            {"weights": {"web": 1.0}, "until_step": 2},
            {"weights": {"code": 1.0}, "until_tokens": 1000},
        ],
    }
    assert lengths_run((16, 8, 3), **changes).resolve(1, VOCAB).mix_ends == (32, 72)


def test_a_plan_counts_every_phase_by_its_length():
    resolved = lengths_run((16, 8, 5)).resolve(1, VOCAB)
    flops = [token_flops(resolved, length) for length in (8, 32)]
    assert flops[0] < flops[1], "attention looks less far back"
    assert total_flops(resolved) == flops[0] * 5 * 128 + flops[1] * 15 * 256
    found = dict(describe(resolved, Path("run")))
    assert found["batch"].startswith("16 sequences of 8 = 128 tokens a step, ")
    assert "; from step 5 8 sequences of 32 = 256 tokens a step, " in found["batch"]
    assert found["length"].startswith("20 steps, 4,480 tokens ")
    alone = lengths_run().resolve(1, VOCAB)
    assert memory_bytes(resolved, 0) == memory_bytes(alone, 0), "that of the longest"
