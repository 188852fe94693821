"""Every layout gives the serial run's losses and gradient norms."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from small import (
    NUM_LAYERS,
    curve_of,
    held_out_loss,
    make_engine,
    relative_difference,
    run_config,
    train,
)

from basestone.trainer.batch import share
from basestone.trainer.config import RunConfig
from basestone.trainer.errors import ConfigError
from basestone.trainer.forks import run_ranks
from basestone.trainer.layouts import all_layouts, parse_layout

pytestmark = pytest.mark.dist
STEPS = 10


@functools.cache
def serial(family: str, steps: int = STEPS) -> list[tuple[float, float]]:
    """One process, ZeRO-0: torch's own AdamW, no partition anywhere."""
    return run_ranks(curve_of, 1, run_config(family, parallel__zero=0), steps)[0]


CELLS = [
    ("llama", "tp2-z1"),
    ("llama", "tp2-sp-z2"),
    ("llama", "tp2-sp-z3"),
    ("llama", "tp2-sp-z0"),
    ("llama", "dp2-z1"),
    ("gpt2", "dp2-z2"),
    ("llama", "dp2-z3"),
    ("gpt2", "tp2-sp-z1"),
    ("gpt2", "tp2-z3"),
    ("llama", "dp1-z3"),
    ("llama", "tp2-sp-dp2-z1"),
    ("gpt2", "tp2-sp-dp2-z3"),
    ("llama", "tp4-sp-z2"),
    ("llama", "pp2-z0"),
    ("gpt2", "pp2-z1"),
    ("llama", "pp2-z2"),
    ("gpt2", "pp2-z3"),
    ("gpt2", "pp2-vp2-z1"),
    ("llama", "pp2-vp2-z3"),
    ("llama", "pp4-z1"),
    ("gpt2", "tp2-sp-pp2-z1"),
    ("llama", "tp2-sp-pp2-z3"),
    ("gpt2", "tp2-pp2-vp2-z2"),
    ("gpt2", "pp2-dp2-z1"),
    ("llama", "pp2-vp2-dp2-z2"),
    ("gpt2", "pp2-dp2-z0"),
]


def layout_of(name: str, family: str = "llama", **changes) -> tuple[int, RunConfig]:
    """Give the processes of a layout's name and a run laid out like it."""
    layout = parse_layout(name)
    return layout.processes, layout.of(run_config(family, **changes))


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_layout_equals_serial(family, name):
    size, run = layout_of(name, family)
    steps = STEPS if size < 4 else 5
    curve = run_ranks(curve_of, size, run, steps)[0]
    assert relative_difference(curve, serial(family)[:steps]) < 1e-5


SLOW_CELLS = [
    (family, str(layout))
    for family in ("llama", "gpt2")
    for processes in (2, 4)
    for layout in all_layouts(processes)
    if layout.virtual_pipeline * layout.pipeline <= NUM_LAYERS
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), SLOW_CELLS)
def test_every_layout_equals_serial(family, name):
    size, run = layout_of(name, family)
    assert relative_difference(run_ranks(curve_of, size, run, 5)[0], serial(family)[:5]) < 1e-5


UNEVEN = [
    ("gpt2", "pp2-z1", (4, 2)),
    ("llama", "pp2-vp2-z2", (1, 1, 3, 1)),
    ("gpt2", "pp2-z3", (1, 5)),
]


@pytest.mark.parametrize(("family", "name", "counts"), UNEVEN)
def test_uneven_stages_equal_serial(family, name, counts):
    changes = {"parallel__pipeline_layers": counts, "model__num_layers": sum(counts)}
    size, run = layout_of(name, family, **changes)
    whole = run_config(family, parallel__zero=0, model__num_layers=sum(counts))
    reference = run_ranks(curve_of, 1, whole, 5)[0]
    assert relative_difference(run_ranks(curve_of, size, run, 5)[0], reference) < 1e-5


# Fewer micro-batches than stages, as many, more, and a last one that is filled up.
MICRO_BATCHES = [
    ("pp2-z1", 8),
    ("pp2-z2", 3),
    ("pp4-z1", 4),
    ("pp4-z2", 1),
    ("pp2-vp2-z1", 4),
    ("pp2-dp2-z3", 3),
]


@pytest.mark.parametrize(("name", "micro_batch"), MICRO_BATCHES)
def test_any_number_of_micro_batches(name, micro_batch):
    size, run = layout_of(name, "gpt2", train__micro_batch=micro_batch)
    assert relative_difference(run_ranks(curve_of, size, run, 5)[0], serial("gpt2")[:5]) < 1e-5


def _evaluate_between(run):
    """Train, evaluate, train on: the forward-only schedule must leave no trace in what follows."""
    engine = make_engine(run)
    before = train(engine, run, range(3))
    loss = held_out_loss(engine, run)
    again = held_out_loss(engine, run)
    return before + train(engine, run, range(3, 5)), loss, again


EVALUATED = ["pp2-z1", "pp2-z3", "pp2-z0", "pp2-vp2-z1", "pp2-vp2-z3", "tp2-sp-pp2-z2", "pp2-dp2-z1", "dp2-z3"]


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_equals_serial_and_disturbs_nothing(name):
    size, run = layout_of(name, "gpt2", model__z_loss=1e-3)
    expected, loss, _ = run_ranks(
        _evaluate_between, 1, run_config("gpt2", parallel__zero=0, model__z_loss=1e-3)
    )[0]
    for curve, found, again in run_ranks(_evaluate_between, size, run):
        assert relative_difference(curve, expected) < 1e-5
        assert abs(found - loss) < 1e-5 * loss and again == found


# Larger than what ZeRO-3 leaves gathered: 4096 x 64 elements, and half of them with tensor parallel.
LARGE = {"model__vocab_multiple": 4096}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["dp2-z3", "pp2-z3", "pp2-vp2-z3", "tp2-sp-pp2-z3"])
def test_weights_that_do_not_stay_gathered(family, name):
    """A tied head's weight belongs to no module of the last stage that would gather it."""
    size, run = layout_of(name, family, **LARGE)
    expected, loss, _ = run_ranks(_evaluate_between, 1, run_config(family, parallel__zero=0, **LARGE))[0]
    for curve, found, again in run_ranks(_evaluate_between, size, run):
        assert relative_difference(curve, expected) < 1e-5
        assert abs(found - loss) < 1e-5 * loss and again == found


RECOMPUTED = ["pp2-z1", "pp2-vp2-z1", "tp2-sp-pp2-z3", "dp2-z3"]


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recompute_in_a_pipeline_equals_serial(name):
    size, run = layout_of(name, "llama", train__recompute=True)
    assert relative_difference(run_ranks(curve_of, size, run, 5)[0], serial("llama")[:5]) < 1e-5


def test_stages_draw_dropout_of_their_own():
    _, run = layout_of("pp2-z1", model__dropout=0.5)
    first, second = run_ranks(_dropout_masks, 2, run)
    assert not any(np.array_equal(one, other) for one in first for other in second)


def test_serial_learns():
    losses = [loss for loss, _ in serial("llama")]
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_accumulates_in_fp32(zero):
    """Eight micro-batches of one sequence: accumulation in bf16 would be several times further off."""
    run = run_config(train__dtype="bf16", train__micro_batch=1, parallel__zero=zero)
    curve = run_ranks(curve_of, 1, run, 5)[0]
    assert max(abs(a[0] - b[0]) for a, b in zip(curve, serial("llama"), strict=False)) < 2e-3
    assert relative_difference(curve, serial("llama")[:5]) < 1e-2


def test_recompute_changes_nothing():
    plain = run_ranks(curve_of, 2, run_config(parallel__tensor=2), 5)[0]
    recomputed = run_ranks(curve_of, 2, run_config(parallel__tensor=2, train__recompute=True), 5)[0]
    assert recomputed == plain


def test_recompute_draws_the_same_dropout():
    """Attention draws from Megatron's generator, which torch's checkpoint does not keep by itself."""
    changes = {"model__dropout": 0.1, "parallel__tensor": 2, "parallel__sequence": True}
    plain = run_ranks(curve_of, 2, run_config(**changes), 3)[0]
    assert run_ranks(curve_of, 2, run_config(**changes, train__recompute=True), 3)[0] == plain


def test_dropout_is_reproducible_and_differs_between_steps():
    run = run_config(model__dropout=0.1, parallel__tensor=2, parallel__sequence=True)
    first, second = (run_ranks(curve_of, 2, run, 4)[0] for _ in range(2))
    assert first == second
    assert relative_difference(first, serial("llama")[:4]) > 1e-4, "dropout must do something"


def _forget_sequence_parallel_sum(run):
    engine = make_engine(run)
    for hook in engine._hooks:
        hook.remove()
    return train(engine, run, range(3))


def test_a_forgotten_sequence_parallel_sum_is_caught():
    """The planted fault: norms' gradients stay partial sums on each rank."""
    run = run_config("gpt2", parallel__tensor=2, parallel__sequence=True)
    curve = run_ranks(_forget_sequence_parallel_sum, 2, run)[0]
    assert relative_difference(curve, serial("gpt2")[:3]) > 1e-5


def _count_replicated_twice(run):
    from basestone.trainer import engine as module

    original = module.prepare_parameters

    def planted(decoder, model, seed):
        original(decoder, model, seed)
        for parameter in decoder.parameters():
            parameter.tensor_model_parallel = True

    module.prepare_parameters = planted
    return train(make_engine(run), run, range(3))


def test_a_parameter_counted_twice_in_the_norm_is_caught():
    curve = run_ranks(_count_replicated_twice, 2, run_config("gpt2", parallel__tensor=2))[0]
    assert relative_difference(curve, serial("gpt2")[:3]) > 1e-5


def _share(run):
    runtime = make_engine(run).runtime
    generator = np.random.default_rng(runtime.dp_rank)
    fields = {"tokens": generator.integers(0, 100, (3, 5)), "marks": generator.integers(0, 4, (3, 2))}
    got = share(fields if runtime.reads_data else None, {"tokens": 5, "marks": 2}, 3, runtime)
    return runtime.dp_rank, all((got[name].numpy() == field).all() for name, field in fields.items())


def test_each_replica_gets_what_its_reader_read():
    answers = run_ranks(_share, 4, run_config(parallel__tensor=2))
    assert answers == [(0, True), (0, True), (1, True), (1, True)]


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="needs a GPU"):
        run_ranks(make_engine, 1, run_config(train__dtype="fp16"))


def _dropout_masks(run):
    """Give, for every dropout of a training forward in order, which elements this rank dropped."""
    import torch.nn.functional as F

    engine, original, masks = make_engine(run), F.dropout, []

    def seen(x, p=0.5, training=True, inplace=False):
        out = original(x, p, training, inplace)
        masks.append(((out == 0) & (x != 0)).numpy())
        return out

    F.dropout = seen
    train(engine, run, range(1))
    return masks


@pytest.mark.parametrize("recompute", [False, True])
def test_slices_of_the_tokens_have_masks_of_their_own(recompute):
    run = run_config(
        model__dropout=0.5, parallel__tensor=2, parallel__sequence=True, train__recompute=recompute
    )
    masks = list(zip(*run_ranks(_dropout_masks, 2, run), strict=True))
    assert len(masks) >= 7
    assert not any(np.array_equal(one, other) for one, other in masks)


def test_whole_tokens_have_the_same_masks_on_every_rank():
    masks = list(
        zip(*run_ranks(_dropout_masks, 2, run_config(model__dropout=0.5, parallel__tensor=2)), strict=True)
    )
    assert len(masks) >= 7
    assert all(np.array_equal(one, other) for one, other in masks)
