"""`verify` catches and names the classic faults of layouts.

Ranks are forked from this process, so a fault is planted by patching what they will run. The reference is recorded
before: no fault ever reaches it.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
from proofs import assert_equal, named

from basestone.model import stage
from basestone.trainer import engine, feed, gradients, verify
from basestone.trainer.batch import share
from basestone.trainer.engine_state import EngineState
from basestone.trainer.verify import TOLERANCES

pytestmark = pytest.mark.dist


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

    def planted(fields, widths, num_samples, runtime):
        shared = share(fields, widths, num_samples, runtime)
        return {name: field.roll(runtime.tp_rank, 0) for name, field in shared.items()}

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
