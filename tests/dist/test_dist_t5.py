"""T5 in every layout: losses and gradient norms equal one process's, and what padding holds is never seen."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from small import GLOBAL_BATCH, SEQUENCE, VOCAB, make_engine, relative_difference, restore, save
from small_t5 import TARGETS, Curve, batches_of, curve_of, fields_of, t5, train
from torch.utils.flop_counter import FlopCounterMode

from basestone.model.families import layout_of as layout_table
from basestone.model.flops import flops_per_token, recomputed_flops_per_token
from basestone.trainer import runtime as processes
from basestone.trainer.batch import cut
from basestone.trainer.config import RunConfig
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import parse_layout

pytestmark = pytest.mark.dist
STEPS, SAVED_AT = 5, 2
CELLS = ["tp2-sp-z1", "tp2-z3", "dp2-z2", "dp2-z3", "pp2-z1", "pp2-vp2-z2", "tp2-sp-pp2-z3"]
SLOW_CELLS = [
    *("tp2-z1", "tp2-sp-z2", "tp2-sp-z3", "dp2-z1", "tp2-dp2-z2", "pp2-z0", "pp2-z2", "pp2-z3", "pp2-vp2-z1"),
    *("pp2-vp2-z3", "pp4-z1", "pp4-z3", "pp2-dp2-z2", "tp2-sp-pp2-z1", "tp2-pp2-vp2-z2", "pp2-vp2-dp2-z1"),
]


@functools.cache
def serial() -> Curve:
    return run_ranks(curve_of, 1, t5(parallel__zero=0), STEPS)[0]


def layout_of(name: str, **changes) -> tuple[int, RunConfig]:
    layout = parse_layout(name)
    return layout.processes, layout.of(t5(**changes))


@pytest.mark.parametrize("name", CELLS)
def test_a_layout_equals_one_process(name):
    size, run = layout_of(name)
    assert relative_difference(run_ranks(curve_of, size, run, STEPS)[0], serial()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CELLS)
def test_every_other_layout_equals_one_process(name):
    test_a_layout_equals_one_process(name)


def test_it_learns():
    assert serial()[STEPS - 1][0] < serial()[0][0] - 0.2


@pytest.mark.parametrize("name", ["tp2-sp-z1", "pp2-z2"])
def test_recomputing_changes_nothing(name):
    size, run = layout_of(name, train__recompute=True)
    assert relative_difference(run_ranks(curve_of, size, run, STEPS)[0], serial()) < 1e-5


@pytest.mark.parametrize("counts", [(4, 2), (5, 1)])
def test_stages_cut_where_they_are_told(counts):
    """At the border between the trunks, and within the decoder."""
    size, run = layout_of("pp2-z1", parallel__pipeline_layers=counts)
    assert relative_difference(run_ranks(curve_of, size, run, STEPS)[0], serial()) < 1e-5


@pytest.mark.parametrize("name", ["pp2-vp2-z2", "pp2-z3"])
def test_a_pipeline_in_bf16_adds_copies_up_in_fp32(name):
    size, run = layout_of(name, train__dtype="bf16", train__micro_batch=1)
    curve = run_ranks(curve_of, size, run, STEPS)[0]
    assert max(abs(a[0] - b[0]) for a, b in zip(curve[:STEPS], serial(), strict=False)) < 3e-2


def test_dropout_is_drawn_again_when_recomputing():
    """In every place: embedding, attention, layers and behind both trunks."""
    size, run = layout_of("tp2-sp-z1", model__dropout=0.1)
    plain = run_ranks(curve_of, size, run, 3)[0]
    _, again = layout_of("tp2-sp-z1", model__dropout=0.1, train__recompute=True)
    assert run_ranks(curve_of, size, again, 3)[0] == plain
    assert relative_difference(plain[:3], serial()[:3]) > 1e-3


def _seen(run: RunConfig) -> tuple[float, float]:
    """Give how far the loss moves when what no prediction may see is something else, and when an input is."""
    engine = make_engine(run)
    fields = fields_of(0)

    def loss_of(**changes: torch.Tensor) -> torch.Tensor:
        return engine.evaluate(cut({**fields, **changes}, 2))

    def other(name: str, where: torch.Tensor) -> torch.Tensor:
        return torch.where(where, 7, fields[name]).to(torch.int32)

    padding = torch.arange(SEQUENCE) >= fields["length"]
    # Places of the decoder behind the last prediction that counts.
    later = torch.arange(TARGETS) >= fields["weights"].sum(1, keepdim=True)
    hidden = loss_of(tokens=other("tokens", padding), decoder_tokens=other("decoder_tokens", later))
    seen = loss_of(tokens=other("tokens", torch.arange(SEQUENCE) == 3))
    return float((hidden - loss_of())[0, 0].abs()), float((seen - loss_of())[0, 0].abs())


def test_padding_and_later_targets_are_not_seen():
    hidden, seen = run_ranks(_seen, 1, t5())[0]
    assert hidden == 0.0 and seen > 1e-3


def _train_and_save(run: RunConfig, folder: str) -> Curve:
    engine = make_engine(run)
    curve = train(engine, run, range(SAVED_AT))
    save(engine, folder, SAVED_AT)
    return curve + train(engine, run, range(SAVED_AT, STEPS))


def _load_and_train(run: RunConfig, folder: str) -> Curve:
    engine = make_engine(run)
    state = restore(engine, folder)
    assert state is not None and state["step"] == SAVED_AT
    return train(engine, run, range(SAVED_AT, STEPS))


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("pp2-vp2-z1", ("tp2-sp-z3", "dp1-z0")),
        pytest.param("tp2-sp-dp2-z1", ("pp2-z3", "dp2-z3"), marks=pytest.mark.slow),
        pytest.param("tp2-pp2-z3", ("pp2-vp2-z0", "dp1-z2"), marks=pytest.mark.slow),
    ],
)
def test_saved_in_one_layout_it_goes_on_in_others(tmp_path, name, loads):
    size, run = layout_of(name)
    saved = run_ranks(_train_and_save, size, run, str(tmp_path))[0]
    assert run_ranks(_load_and_train, size, run, str(tmp_path))[0] == saved[SAVED_AT:], "bit for bit"
    for other in loads:
        size, run = layout_of(other)
        curve = run_ranks(_load_and_train, size, run, str(tmp_path))[0]
        assert relative_difference(curve, serial()[SAVED_AT:STEPS]) < 1e-5, other


def _fragments(run: RunConfig) -> list[tuple[str, int, int, int]]:
    engine = make_engine(run)
    fragments = engine.state.fragments()
    return [(part.name, engine.runtime.tp_rank, part.start, part.numel) for part in fragments if part.owned]


@pytest.mark.parametrize("name", ["pp2-vp2-z3", "tp2-pp2-z2"])
def test_every_element_has_one_owner(name):
    size, run = layout_of(name)
    table = layout_table(run.resolve(size, VOCAB).run.model)
    owned = [fragment for rank in run_ranks(_fragments, size, run) for fragment in rank]
    for row in table.values():
        pieces = {tp: sorted(f[2:] for f in owned if f[:2] == (row.name, tp)) for tp in range(2)}
        assert sum(count for spans in pieces.values() for _, count in spans) == row.numel, row.name
        for spans in pieces.values():
            assert all(start + count == after for (start, count), (after, _) in itertools.pairwise(spans))


def _flops_per_token(run: RunConfig) -> tuple[float, float, float]:
    """Count a step's forward and backward by torch, for one token of the inputs, beside the closed forms."""
    engine = make_engine(run)
    processes.seed_step(run.run.seed, 0, engine.runtime)
    batches, counts = batches_of(engine, run, 0)
    with FlopCounterMode(display=False) as counter:
        engine.forward_backward(batches, counts)
    shape, lengths = (engine.model, SEQUENCE, "full"), {"target_length": TARGETS}
    return (
        counter.get_total_flops() / (GLOBAL_BATCH * SEQUENCE),
        flops_per_token(*shape, **lengths),
        recomputed_flops_per_token(*shape, **lengths),
    )


def test_what_the_layers_do_is_what_the_forms_say():
    """With dropout, where attention is no fused kernel that torch's counter does not see."""
    ((plain, form, _),) = run_ranks(_flops_per_token, 1, t5(model__dropout=0.1))
    assert plain / form == pytest.approx(1, abs=1e-6)
    ((again, _, more),) = run_ranks(_flops_per_token, 1, t5(model__dropout=0.1, train__recompute=True))
    assert (again - plain) / more == pytest.approx(1, abs=1e-6)
