"""What `--dry-run` prints: figures worked out by hand, and every recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import run_of

from basestone.trainer.config import ResolvedRun
from basestone.trainer.load import load_run
from basestone.trainer.plan import (
    describe,
    host_memory_bytes,
    local_parameters,
    memory_bytes,
    staged_bytes,
    swapped_bytes,
    total_flops,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
VOCAB = 200


def resolved(world_size: int = 1, **changes: object) -> ResolvedRun:
    return run_of(**changes).resolve(world_size, VOCAB)


# The llama of run_files by hand: width 64, 8 heads in 4 groups of width 8, MLP 192, vocabulary padded to 256.
MATRICES = 3 * (64 * 128 + 64 * 64 + 3 * 64 * 192)  # qkv, projection, gate + up + down of three layers
EMBEDDING = 256 * 64
NORMS = (2 * 3 + 1) * 64
TOTAL = MATRICES + 2 * EMBEDDING + NORMS


def test_parameters_of_a_rank_by_hand():
    assert local_parameters(resolved(), 0) == TOTAL
    assert local_parameters(resolved(4, parallel__tensor=2), 0) == (TOTAL - NORMS) // 2 + NORMS


def test_flops_of_a_run_by_hand():
    tokens = 20 * 8 * 32
    scores = 3 * 2 * 64 * 32  # layers x (scores and values) x width x sequence
    assert total_flops(resolved(meter__attention_flops="full")) == 6 * (MATRICES + EMBEDDING + scores) * tokens
    assert total_flops(resolved()) == 6 * (MATRICES + EMBEDDING + scores / 2) * tokens


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"), [(1, 2, 4, 3), (2, 2, 1, 3), (3, 0.5, 1, 3)]
)
def test_memory_follows_the_stage(zero, weights, gradients, optimizer):
    """Bytes a parameter in bf16 on four data-parallel ranks: 2 + 4 + 12, each cut where the stage cuts it."""
    memory = memory_bytes(resolved(4, train__dtype="bf16", parallel__zero=zero), 0)
    assert memory["weights"] == TOTAL * weights
    assert memory["gradients"] == TOTAL * gradients
    assert memory["optimizer"] == TOTAL * optimizer


def test_memory_of_stage_0_is_whole_on_every_rank():
    memory = memory_bytes(resolved(4, parallel__zero=0), 0)
    assert [memory[name] / TOTAL for name in ("weights", "gradients", "optimizer")] == [4, 4, 8]


def offloaded(name: str, zero: int, **changes: object) -> ResolvedRun:
    path = "/disk" if name == "nvme" else None
    return resolved(
        4,
        train__dtype="bf16",
        parallel__zero=zero,
        parallel__offload=name,
        parallel__nvme_path=path,
        **changes,
    )


def test_memory_of_offload_to_the_host():
    """Four data-parallel ranks in bf16: a quarter each, of 2 + 4 + 12 bytes."""
    run = offloaded("cpu", 2)
    device = memory_bytes(run, 0)
    assert [device[name] / TOTAL for name in ("weights", "gradients", "optimizer")] == [2, 1, 0]
    assert host_memory_bytes(run) == {
        "weights": 0.5 * TOTAL,
        "gradients": 1 * TOTAL,
        "optimizer": 3 * TOTAL,
    }
    run = offloaded("cpu", 3)
    device = memory_bytes(run, 0)
    assert (device["optimizer"], device["weights"]) == (0, 2 * 2 * 192 * 64)  # the largest parameter, gathered
    assert host_memory_bytes(run) == {
        "weights": 0.5 * TOTAL,
        "gradients": 2 * TOTAL,
        "optimizer": 3 * TOTAL,
    }
    assert swapped_bytes(run) == 0


def test_memory_of_offload_to_files():
    run = offloaded("nvme", 3)
    largest = 2 * 192 * 64 // 4
    assert swapped_bytes(run) == (12 + 4 + 2) * TOTAL / 4
    # All of this model's weights may stay on the host, beside five buffers; four buffers are as large as the whole.
    assert host_memory_bytes(run) == {
        "weights": 2 * (TOTAL / 4 + 5 * largest),
        "gradients": 4 * TOTAL / 4,
        "optimizer": 4 * 4 * TOTAL / 4,
    }


def test_a_large_model_in_files_leaves_the_host():
    huge = {"model__hidden_size": 8192, "model__num_layers": 80, "model__num_attention_heads": 64}
    run = offloaded("nvme", 3, **huge, model__num_query_groups=8)
    host, total = host_memory_bytes(run), local_parameters(run, 0) / 4
    assert host["weights"] < 0.2 * 2 * total and host["optimizer"] < 0.05 * 12 * total
    assert swapped_bytes(run) == (12 + 4 + 2) * total


def test_the_plan_shows_where_memory_is():
    assert {"host memory a rank", "in files a rank"}.isdisjoint(lines(resolved()))
    got = lines(offloaded("cpu", 3))
    assert got["host memory a rank"].startswith("weights 0.00 GiB, gradients")
    assert "in files a rank" not in got
    assert lines(offloaded("nvme", 3))["in files a rank"] == "about 0.00 GiB"


def test_activations_shrink_with_tensor_and_sequence_parallel_and_recompute():
    def activations(world_size: int, **changes: object) -> float:
        return memory_bytes(resolved(world_size, **changes), 0)["activations"]

    plain = activations(1)
    assert activations(1, train__micro_batch=4) == 2 * plain
    assert plain / 2 < activations(2, parallel__tensor=2) < plain
    both = activations(2, parallel__tensor=2, parallel__sequence=True)
    assert both == pytest.approx(plain / 2)
    assert activations(1, train__recompute=True) < plain
    assert plain < activations(1, model__qk_norm=True) < 1.5 * plain  # a norm keeps its input


def lines(run: ResolvedRun) -> dict[str, str]:
    return dict(describe(run, Path("/runs/x")))


def test_the_plan_says_what_will_be():
    got = lines(
        resolved(4, parallel__tensor=2, parallel__sequence=True, train__recompute=True, train__dtype="bf16")
    )
    assert got["run directory"] == "/runs/x"
    assert "3 layers, hidden 64, 8 heads in 4 groups, vocabulary 200 (padded to 256)" in got["model"]
    assert got["parameters"] == f"{TOTAL:,}, {(TOTAL - NORMS) // 2 + NORMS:,} on a rank"
    assert got["layout"] == (
        "4 process(es) = tensor 2 x pipeline 1 x data 2; ZeRO-1, bf16, sequence parallel, activation checkpointing"
    )
    # 8 sequences over 2 readers, 2 in a forward
    assert got["batch"].startswith(
        "8 sequences of 32 = 256 tokens a step, 2 micro-batch(es) of 2 on a rank; 8 data"
    )
    assert got["length"].startswith("20 steps, 5,120 tokens (")
    assert (
        f"{MATRICES + EMBEDDING:,} of {TOTAL:,} parameters (not on norms, biases, embeddings)"
        in got["optimizer"]
    )
    assert got["checkpoints"].startswith("at the end; kept are the last 3, ")
    assert got["evaluation"] == "at the end on nothing" and "exports" not in got
    assert "memory a rank" in got and "schedule" in got


def test_the_plan_says_what_saves_need_and_keep():
    keys = {
        "checkpoint__every_steps": 50,
        "checkpoint__every_minutes": 2.5,
        "checkpoint__keep_every_steps": 1000,
        "checkpoint__keep_best": 2,
        "data__heldout": {"a": "/a"},
        "evaluate__every_steps": 25,
        "checkpoint__rollback_steps": 100,
        "checkpoint__remote": "s3://bucket/run",
    }
    text = lines(resolved(2, **keys))["checkpoints"]
    assert text.startswith(
        "every 50 steps, every 2.5 minutes, at the end; kept are the last 3, every 1000th step, the best 2, "
        "one 100 steps back, "
    )
    assert text.endswith("copied to s3://bucket/run")
    assert f"from a copy of {TOTAL * 12 / 2 / 2**30:.2f} GiB in host memory a rank" in text
    assert staged_bytes(resolved(2)) == TOTAL * 12 / 2
    assert staged_bytes(resolved(2, parallel__zero=0)) == TOTAL * 12
    waits = lines(resolved(1, parallel__zero=2, parallel__offload="cpu"))["checkpoints"]
    assert waits.endswith("each; training waits for them")


def test_the_plan_of_other_choices():
    got = lines(
        resolved(
            optimizer__decay_all=True,
            checkpoint__every_steps=5,
            evaluate__every_steps=7,
            data__heldout={"a": "/a", "b": "/b"},
            schedule__kind="wsd",
            schedule__warmup_steps=3,
        )
    )
    assert f"{TOTAL:,} of {TOTAL:,} parameters, clip 1" in got["optimizer"]
    assert got["checkpoints"].startswith("every 5 steps, at the end; kept")
    assert got["evaluation"] == "every 7 steps and at the end on a, b"
    assert got["schedule"] == "wsd, 3 warm-up steps, down to 0.0001"


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bf16", 2), ("fp32", 4)])
def test_the_plan_says_what_exports_take(dtype, num_bytes):
    got = lines(resolved(export__every_steps=40, export__dtype=dtype))["exports"]
    assert got == (
        f"every 40 steps and at the end, {dtype}, {TOTAL * num_bytes / 2**30:.2f} GiB each; all are kept"
    )


def test_fp32_under_zero_has_masters_of_its_own():
    memory = memory_bytes(resolved(1, parallel__zero=1, train__dtype="fp32"), 0)
    assert memory["optimizer"] == 12 * TOTAL


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_resolves_and_describes(recipe):
    run = load_run(recipe)
    num_processes = 2 * run.parallel.tensor * run.parallel.pipeline
    got = lines(run.resolve(num_processes, 4096))
    assert f"{num_processes} process(es)" in got["layout"]
    assert all(text for text in got.values())


def test_the_quickstart_can_be_cut_in_four():
    run = load_run(next(path for path in RECIPES if path.stem == "quickstart"))
    assert (run.model.num_layers % 4, run.model.layout_problems(4)) == (0, [])


def test_pairs_and_rows_of_a_ramp_that_are_never_reached_are_told():
    pairs = {"model__pooling": "mean", "task__pairs": "neighbours"}
    assert lines(resolved(1, **pairs))["batch"].startswith("8 pairs of 2 x 32 = 512 tokens a step, ")
    ramp = [{"sequence_length": 16, "until_step": 10}, {"sequence_length": 24, "until_step": 20}]
    batch = lines(resolved(1, train__ramp=ramp))["batch"]
    assert batch.startswith("8 sequences of 16 = ") and "; from step 10 8 sequences of 24 = " in batch
    assert " of 32 " not in batch and "; the run ends before train.ramp does, at step 20; 8 data lanes" in batch
    assert "the run ends" not in lines(resolved(1, train__ramp=ramp[:1]))["batch"]
