"""`verify` finds layouts equal that are, and catches and names the classic faults of those that are not.

Ranks are forked from this process, so a fault is planted by patching what they will run. The reference is recorded
before: no fault ever reaches it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from basestone.data.prepare import prepare
from basestone.data.tokenizer import train_tokenizer
from basestone.model import stage
from basestone.trainer import engine, feed, gradients, verify
from basestone.trainer.batch import share
from basestone.trainer.engine_state import EngineState
from basestone.trainer.errors import NumericsError
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import SERIAL, Layout, all_layouts, parse_layout
from basestone.trainer.load import load_run
from basestone.trainer.places import locate
from basestone.trainer.verify import TOLERANCES, Verdict, Verification

pytestmark = pytest.mark.dist

STEPS = 2
RUN_TOML = """
[model]
family = "{family}"
num_layers = 4
hidden_size = 64
num_attention_heads = 8
{groups}
dropout = 0.1
max_sequence_length = 32
[data]
train = "shards/train"
tokenizer = "tokenizer.model"
sequence_length = 32
[train]
steps = 50
global_batch = 8
dtype = "bf16"
[optimizer]
lr = 1e-3
"""
GROUPS = {  # gpt2 ties its embeddings
    "llama": "num_query_groups = 4",
    "gpt2": "",
    "qwen2": "num_query_groups = 4\ntied = true",
    "qwen3": "num_query_groups = 2\nhead_dim = 12",
}


class Proof:
    """A verification whose reference is recorded once, and layouts that are put to it one by one."""

    def __init__(self, folder: Path, family: str, processes: int, dtype: str) -> None:
        run = load_run(folder / f"{family}.toml")
        self.processes = processes
        self.verification = Verification(
            run, locate(run.data, run.reading, folder), num_processes=processes, steps=STEPS, dtype=dtype
        )
        self._asked = [SERIAL]
        self._verdicts = self.verification.run(iter(self._queue, None))  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.verification, "_compare", lambda *arguments: None)
            next(self._verdicts)  # the reference is there before any fault is

    def _queue(self) -> Layout | None:
        return self._asked.pop() if self._asked else None

    def __call__(self, name: str) -> Verdict:
        """Give the verdict on a layout, under what is patched at this moment."""
        layout = parse_layout(name, self.processes)
        assert self.verification.problems(layout) == ""
        self._asked.append(layout)
        verdict = next(self._verdicts)
        assert verdict.layout == str(layout)
        return verdict

    def close(self) -> None:
        self._verdicts.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a tokenizer and a run file for each family."""
    out = tmp_path_factory.mktemp("verify")
    texts = [text for _, text in sorted(topics.items())][:40]
    (out / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(out / "all.jsonl")], out / "shards", heldout_fraction=0.1)
    train_tokenizer(iter(texts), out / "tokenizer.model", vocab_size=400)
    for family, groups in GROUPS.items():
        (out / f"{family}.toml").write_text(RUN_TOML.format(family=family, groups=groups))
    return out


@pytest.fixture(scope="module")
def proof(folder: Path) -> Iterator[Callable[..., Proof]]:
    """Verifications by (family, processes, dtype); a layout that hangs is over after a minute."""
    made: list[Proof] = []

    @functools.cache
    def make(family: str, processes: int, dtype: str = "fp32") -> Proof:
        made.append(Proof(folder, family, processes, dtype))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_ranks", functools.partial(run_ranks, timeout_s=60))
        yield make
        for one in made:
            one.close()


def assert_equal(verdict: Verdict, dtype: str = "fp32") -> None:
    assert verdict.equal and verdict.first == "", verify.row(verdict)
    limits = TOLERANCES[dtype]
    assert verdict.loss <= limits.loss and verdict.norm <= limits.norm
    assert max(verdict.gradient, verdict.update) <= limits.tensor
    assert verdict.seconds > 0


def named(verdict: Verdict, *words: str) -> None:
    """Check that a layout differs, and that what was seen first is said."""
    assert not verdict.equal, verify.row(verdict)
    for word in words:
        assert word in verdict.first, verdict.first


# ---- layouts as they are ------------------------------------------------------------------------------------------

EQUAL = [
    ("llama", 2, "tp2-sp-z1"),
    ("llama", 2, "z3"),
    ("llama", 2, "pp2-z0"),
    ("llama", 2, "pp2-vp2-z2"),
    ("llama", 4, "tp2-sp-pp2-z3"),
    ("llama", 4, "pp2-vp2-dp2-z1"),
    ("gpt2", 2, "tp2-z2"),
    ("gpt2", 2, "pp2-z1"),
    ("qwen2", 2, "tp2-sp-z3"),
    ("qwen2", 4, "tp2-pp2-z2"),
    ("qwen3", 2, "tp2-z0"),
    ("qwen3", 2, "tp2-z2"),
    ("qwen3", 2, "tp2-z3"),
    ("qwen3", 2, "tp2-sp-z1"),
    ("qwen3", 4, "tp2-sp-pp2-z3"),
    *(
        pytest.param(family, 2, f"tp2{sequence}-z{zero}", marks=pytest.mark.slow)
        for family in ("qwen2", "qwen3")
        for sequence in ("", "-sp")
        for zero in range(4)
    ),
]


@pytest.mark.parametrize(("family", "processes", "name"), EQUAL)
def test_layouts_equal_one_process(proof, family, processes, name):
    assert_equal(proof(family, processes)(name))


# Pipelines: see the gradients that are added up in bf16, below.
EQUAL_IN_BF16 = [("llama", 2, "tp2-sp-z1"), ("qwen3", 2, "tp2-z2"), ("gpt2", 2, "z2"), ("gpt2", 2, "pp2-z3")]


@pytest.mark.parametrize(("family", "processes", "name"), EQUAL_IN_BF16)
def test_layouts_equal_one_process_in_bf16(proof, family, processes, name):
    assert_equal(proof(family, processes, "bf16")(name), "bf16")


EVERYTHING = [(family, processes, dtype) for family in GROUPS for processes in (2, 4) for dtype in TOLERANCES]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "processes", "dtype"), EVERYTHING)
def test_every_layout_equals_one_process(proof, family, processes, dtype):
    one = proof(family, processes, dtype)
    legal = [layout for layout in all_layouts(processes) if not one.verification.problems(layout)]
    assert len(legal) >= (9 if dtype == "bf16" else 12)
    worst = [0.0] * 4
    for layout in legal:
        verdict = one(str(layout))
        assert_equal(verdict, dtype)
        figures = (verdict.loss, verdict.norm, verdict.gradient, verdict.update)
        worst = [max(pair) for pair in zip(worst, figures, strict=True)]
    print(family, processes, dtype, "loss, norm, gradient, update:", *(f"{value:.1e}" for value in worst))


# ---- planted faults -----------------------------------------------------------------------------------------------


def test_sequence_parallel_sums_that_no_hook_makes(proof, monkeypatch):
    one = proof("llama", 2)
    monkeypatch.setattr(engine.Engine, "_sum_as_they_come", lambda self: [])
    named(
        one("tp2-sp-z1"), "step 1: the gradient norm is off", "at worst the gradient of layers.", "norm.weight"
    )


def test_sequence_parallel_sums_that_are_not_made_once_a_step(proof, monkeypatch):
    one = proof("llama", 4)
    add_over = gradients.add_over

    def tied_only(values, group):
        if group is None or group.size() != 2 or len(values) == 1:
            add_over(values, group)

    monkeypatch.setattr(engine, "add_over", tied_only)
    named(
        one("tp2-sp-pp2-z1"),
        "step 1: the gradient norm is off",
        "at worst the gradient of layers.",
        "norm.weight",
    )


@pytest.mark.parametrize(
    ("processes", "name"), [(2, "tp2-z0"), (2, "tp2-sp-z2"), (2, "tp2-z3"), (4, "tp2-pp2-z1")]
)
def test_norms_of_heads_whose_gradients_stay_those_of_a_ranks_own_heads(proof, processes, name, monkeypatch):
    """Under sequence parallel, too, where every other norm is added up."""
    one, prepare_parameters = proof("qwen3", processes), stage.prepare_parameters

    def planted(module, model, seed):
        prepare_parameters(module, model, seed)
        for parameter_name, parameter in module.named_parameters():
            if "q_layernorm" in parameter_name or "k_layernorm" in parameter_name:
                parameter.partial = False

    monkeypatch.setattr(engine, "prepare_parameters", planted)
    verdict = one(name)
    named(verdict, "step 1: the gradient of layers.", "_layernorm.weight is off by ")
    assert ".q_layernorm" in verdict.first or ".k_layernorm" in verdict.first
    assert verdict.gradient > 0.01 and verdict.loss < 1e-4  # the loss alone would not have told


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_replicated_parameters_that_count_twice_in_the_norm(proof, zero, monkeypatch):
    """Only the norm is wrong, and by clipping every gradient as far: none of them is named."""
    one, prepare_parameters = proof("gpt2", 2), stage.prepare_parameters

    def planted(module, model, seed):
        prepare_parameters(module, model, seed)
        for name, parameter in module.named_parameters():
            if name.endswith("linear_proj.bias"):
                parameter.owned = parameter.tensor_model_parallel = parameter.model_parallel = True

    monkeypatch.setattr(engine, "prepare_parameters", planted)
    verdict = one(f"tp2-z{zero}")
    named(verdict, "step 1: the gradient norm is off")
    assert "the gradient of" not in verdict.first and verdict.loss < 1e-4


@pytest.mark.parametrize("name", ["pp2-z1", "pp2-vp2-z3"])
def test_tied_embeddings_that_are_not_added_up(proof, name, monkeypatch):
    one = proof("gpt2", 2)
    monkeypatch.setattr(stage.Stage, "tied_copies", property(lambda self: []))
    named(one(name), "step 1: the gradient norm is off", "at worst the gradient of embed.word.weight")


def test_gate_and_up_the_wrong_way_round_on_one_rank(proof, monkeypatch):
    one, initial_piece = proof("llama", 2), stage.initial_piece

    def planted(row, seed, tp_rank, tp_size):
        piece = initial_piece(row, seed, tp_rank, tp_size)
        return torch.cat(piece.chunk(2)[::-1]) if row.parts == 2 and tp_rank == 1 else piece

    monkeypatch.setattr(stage, "initial_piece", planted)
    named(one("tp2-z1"), "step 1: the loss is off", "at worst the gradient of layers.", "mlp.linear_fc1.weight")


def test_tensor_parallel_ranks_with_samples_in_another_order(proof, monkeypatch):
    one = proof("llama", 2)

    def planted(tokens, weights, num_samples, sequence_length, runtime):
        shared = share(tokens, weights, num_samples, sequence_length, runtime)
        return tuple(part.roll(runtime.tp_rank, 0) for part in shared)

    monkeypatch.setattr(feed, "share", planted)
    named(one("tp2-z1"), "step 1: the loss is off")


def test_batched_messages_of_two_interleaved_stages(proof, monkeypatch):
    """They get mixed up without an error."""
    one, schedule_config = proof("llama", 2), stage._schedule_config

    def planted(config, num_chunks):
        schedule = schedule_config(config, num_chunks)
        schedule.batch_p2p_comm, schedule.overlap_p2p_comm = True, False
        return schedule

    monkeypatch.setattr(stage, "_schedule_config", planted)
    verdict = one("pp2-vp2-z1")
    named(verdict, "step 1: the loss is off", "at worst the gradient of layers.")
    assert verdict.seconds < 60


def test_a_rank_that_trains_on_weights_of_the_step_before(proof, monkeypatch):
    """Its fp32 masters are right, so the step itself is: the next loss is not."""
    one, update = proof("llama", 2), engine.Engine.update

    def planted(self, lr):
        before = [parameter.detach().clone() for parameter in self.module.parameters()]
        norm = update(self, lr)
        if self.runtime.rank == 1:
            for parameter, value in zip(self.module.parameters(), before, strict=True):
                parameter.data.copy_(value)
        return norm

    monkeypatch.setattr(engine.Engine, "update", planted)
    for name in ("pp2-z2", "dp2-z1"):
        named(one(name), "step 2: the loss is off")


@pytest.mark.parametrize(("name", "parameter"), [("dp2-z1", "embed.word"), ("pp2-z0", "head")])
def test_a_rank_with_another_learning_rate(proof, name, parameter, monkeypatch):
    one, update = proof("llama", 2), engine.Engine.update
    monkeypatch.setattr(
        engine.Engine, "update", lambda self, lr: update(self, lr * (1.01 if self.runtime.rank else 1.0))
    )
    named(one(name), f"step 1: the update of {parameter}.weight is off by 1.0e-02 (limit 1e-05)")


class _NoAccumulation:
    def __init__(self, *arguments, **more) -> None:
        pass

    def hand_over(self) -> None:
        pass


@pytest.mark.parametrize(
    ("family", "name", "seen"), [("llama", "pp2-z1", "embed.word"), ("gpt2", "pp2-vp2-z2", "embed.position")]
)
def test_gradients_that_are_added_up_in_bf16(proof, family, name, seen, monkeypatch):
    """Within what a layout may differ by in bf16, but a pipeline sees the serial run's own numbers."""
    one = proof(family, 2, "bf16")
    assert_equal(one(name), "bf16")
    monkeypatch.setattr(engine, "Fp32Accumulation", _NoAccumulation)
    verdict = one(name)
    named(verdict, f"step 1: the gradient of {seen}.weight is off by ")
    assert 1e-3 < verdict.gradient < TOLERANCES["bf16"].tensor


@pytest.mark.parametrize(
    ("kind", "value"), [("gradient", math.nan), ("update", math.nan), ("gradient", math.inf)]
)
def test_one_value_that_is_no_number_on_one_rank(proof, kind, value, monkeypatch):
    """Neither the good values after it nor the good rank after it hide it."""
    one, pieces, rows = proof("llama", 2), verify.PieceWatch.pieces, "layers.2.mlp.linear_fc1.weight"

    def planted(self):
        for piece in pieces(self):
            if piece.name == rows and os.environ["RANK"] == "0":
                getattr(piece, kind)[0] = value
            yield piece

    monkeypatch.setattr(verify.PieceWatch, "pieces", planted)
    verdict = one("tp2-z1")
    named(verdict, f"step 1: the {kind} of {rows} is off by {value}")
    assert not math.isfinite(getattr(verdict, kind)) and verdict.loss < 1e-5
    assert verify.as_json(verdict)[kind] is None and str(value) in verify.row(verdict)


def test_a_parameter_that_no_rank_holds(proof, monkeypatch):
    one, pieces = proof("gpt2", 2), verify.PieceWatch.pieces
    monkeypatch.setattr(
        verify.PieceWatch, "pieces", lambda self: (x for x in pieces(self) if x.name != "norm.bias")
    )
    named(one("pp2-z1"), "step 1: 0 elements of norm.bias are there on all ranks, not 64")


def test_half_of_every_fragment(proof, monkeypatch):
    compared = proof("llama", 2)
    whole = EngineState.fragments

    def half(self):
        for fragment in whole(self):
            numel = fragment.numel // 2
            yield fragment._replace(
                numel=numel, tensors={key: values[:numel] for key, values in fragment.tensors.items()}
            )

    monkeypatch.setattr(EngineState, "fragments", half)
    named(compared("pp2-z1"), "step 1:", "elements of embed.word.weight are there on all ranks, not")


def test_a_run_of_fewer_steps_whose_rate_ends_at_nothing(folder):
    run = load_run(
        folder / "llama.toml", ["train.steps=1", "schedule.final_ratio=0.0", "schedule.warmup_steps=1"]
    )
    places = locate(run.data, run.reading, folder)
    short = Verification(run, places, num_processes=2, steps=3, dtype="fp32")
    (verdict,) = short.run([parse_layout("pp2-z1", 2)])
    assert_equal(verdict)


def test_a_run_with_lanes_of_its_own_documents_whole_and_apart(folder):
    """Lanes that divide the run's batch need not divide the small one here."""
    changes = ["train.global_batch=1024", "data.lanes=512", "data.packing=best_fit", "data.attention=document"]
    run = load_run(folder / "gpt2.toml", changes)
    proof = Verification(run, locate(run.data, run.reading, folder), num_processes=2, steps=2, dtype="fp32")
    for verdict in proof.run([parse_layout("tp2-sp-z1"), parse_layout("pp2-z2")]):
        assert_equal(verdict)


# ---- ranks that fail ----------------------------------------------------------------------------------------------


def _fail_in_step_2(monkeypatch: pytest.MonkeyPatch, fail: Callable[[], None]) -> None:
    run = verify.TrainingStep.run

    def planted(self, number, **more):
        if number == 1 and self._runtime.rank == 1:
            fail()
        return run(self, number, **more)

    monkeypatch.setattr(verify.TrainingStep, "run", planted)


def _refuse() -> None:
    raise NumericsError("step 2: the loss is not finite on rank(s) [1]")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "fail", "message"),
    [
        ("pp2-z1", _refuse, "failed: NumericsError: step 2: the loss is not finite on rank(s) [1]"),
        ("tp2-z1", _die, "failed: RankDied: rank 1 died without an answer (exit code -9)"),
    ],
)
def test_a_rank_that_fails_is_a_verdict_and_the_next_layout_runs(proof, name, fail, message, monkeypatch):
    one = proof("llama", 2)
    with monkeypatch.context() as patch:
        _fail_in_step_2(patch, fail)
        started_s = time.monotonic()
        verdict = one(name)
        assert time.monotonic() - started_s < 30
    assert not verdict.equal and verdict.first == message
    assert all(map(math.isnan, (verdict.loss, verdict.norm, verdict.gradient, verdict.update)))
    assert [verify.as_json(verdict)[key] for key in ("equal", "loss", "first")] == [False, None, message]
    assert "DIFFERS" in verify.row(verdict) and message in verify.row(verdict)
    assert_equal(one("pp2-z1"))


@pytest.mark.faults
def test_a_layout_that_hangs_is_a_verdict(proof, monkeypatch):
    one = proof("llama", 2)
    monkeypatch.setattr(verify, "run_ranks", functools.partial(run_ranks, timeout_s=2))
    _fail_in_step_2(monkeypatch, lambda: time.sleep(100))
    verdict = one("pp2-z1")
    named(verdict, "failed: RankDied: rank 0 gave no answer within 2 s")
    assert 2 <= verdict.seconds < 30
