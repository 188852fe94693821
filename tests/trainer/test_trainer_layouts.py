"""Names of layouts: there and back, what is no name, and all that there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_files import run_of

from basestone.trainer.errors import ConfigError
from basestone.trainer.layouts import GRAMMAR, SERIAL, ZERO_STAGES, Layout, all_layouts, parse_layout

VOCAB = 200
SIZES = st.integers(1, 64)
LAYOUTS = st.builds(Layout, SIZES, st.booleans(), SIZES, st.integers(1, 8), SIZES, st.sampled_from(ZERO_STAGES))


@given(LAYOUTS)
def test_a_name_says_all_of_a_layout(layout):
    assert parse_layout(str(layout), layout.processes) == layout


@given(LAYOUTS)
def test_what_a_name_leaves_out_is_one_and_data_parallel_is_what_is_left(layout):
    given_parts = [f"tp{layout.tensor}", f"pp{layout.pipeline}", f"z{layout.zero}"]
    expected = Layout(layout.tensor, False, layout.pipeline, 1, layout.data, layout.zero)
    assert parse_layout("-".join(reversed(given_parts)), layout.processes) == expected


@pytest.mark.parametrize(
    ("name", "processes", "layout", "whole"),
    [
        ("tp2-sp-pp2-vp2-dp1-z1", 4, Layout(2, True, 2, 2, 1, 1), "tp2-sp-pp2-vp2-dp1-z1"),
        ("z3", 4, Layout(1, False, 1, 1, 4, 3), "tp1-pp1-dp4-z3"),
        ("pp2", 4, Layout(1, False, 2, 1, 2, 1), "tp1-pp2-dp2-z1"),
        (" sp-tp4 ", 4, Layout(4, True, 1, 1, 1, 1), "tp4-sp-pp1-dp1-z1"),
        ("dp1-z0", 1, SERIAL, "tp1-pp1-dp1-z0"),
    ],
)
def test_names_as_people_type_them(name, processes, layout, whole):
    got = parse_layout(name, processes)
    assert (got, str(got), got.processes) == (layout, whole, processes)


def refusal(name: str, processes: int = 4) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_layout(name, processes)
    assert caught.value.exit_code == 64
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("tp2-ep2", "ep2"),
        ("tp", "tp"),
        ("tp-2", "tp"),
        ("tp2 sp", "tp2 sp"),
        ("TP2", "TP2"),
        ("sp2", "sp2"),
        ("2tp", "2tp"),
        ("z1.5", "z1.5"),
        ("tp2--z1", ""),
        ("", ""),
        ("tp2-tp2", "tp2"),
        ("sp-sp", "sp"),
        ("tp2-z1-z1", "z1"),
    ],
)
def test_what_is_no_name_or_names_a_part_twice(name, part):
    assert refusal(name) == f"--layouts {name}: cannot read {part!r}; a layout is {GRAMMAR}"
    assert "tp2-sp-pp2-z1" in GRAMMAR, "the message shows one that is right"


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("tp3", 3),
        ("tp8", 0),
        ("tp2-pp2-dp2", 8),
        ("dp2", 2),
        ("tp0", 0),
        ("pp0-dp4", 0),
        ("dp0", 0),
        ("tp3-pp2", 0),
    ],
)
def test_another_number_of_processes(name, takes):
    assert refusal(name) == f"--layouts {name}: takes {takes} processes, and --processes is 4; change either"


def test_no_virtual_stage_at_all():
    assert refusal("pp4-vp0").startswith("--layouts pp4-vp0: ")


@pytest.mark.parametrize("stage", [4, 10])
def test_a_zero_stage_that_there_is_not(stage):
    assert refusal(f"z{stage}") == f"--layouts z{stage}: ZeRO stage {stage}; there are 0, 1, 2 and 3"


@given(st.text(max_size=12), st.integers(1, 8))
def test_any_text_is_a_layout_or_refused(text, processes):
    try:
        assert parse_layout(text, processes).processes == processes
    except ConfigError as error:
        assert str(error).startswith(f"--layouts {text}: ")


# ---- all of them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "factorisations", "pipelines"), [(1, 1, 0), (2, 3, 1), (3, 3, 1), (4, 6, 3), (8, 10, 6)]
)
def test_every_factorisation_comes_with_every_stage_and_every_pipeline_interleaved(
    processes, factorisations, pipelines
):
    layouts = list(all_layouts(processes))
    assert len(set(layouts)) == len(layouts) == 4 * factorisations + pipelines
    assert len({str(layout) for layout in layouts}) == len(layouts)
    assert {layout.processes for layout in layouts} == {processes}
    plain = {(x.tensor, x.pipeline, x.data, x.zero) for x in layouts if x.virtual_pipeline == 1}
    every = range(1, processes + 1)
    assert plain == {
        (tp, pp, dp, zero)
        for tp in every
        for pp in every
        for dp in every
        for zero in ZERO_STAGES
        if tp * pp * dp == processes
    }
    interleaved = {(x.tensor, x.pipeline) for x in layouts if x.virtual_pipeline == 2}
    assert interleaved == {(tp, pp) for tp, pp, _, _ in plain if pp > 1}
    with_tensor = [layout for layout in layouts if layout.tensor > 1]
    assert not with_tensor or {layout.sequence for layout in with_tensor} == {True, False}
    assert all(layout.tensor > 1 for layout in layouts if layout.sequence)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_one_is_legal_for_a_model_that_can_be_cut(processes):
    run = run_of(
        model__num_layers=16,
        model__num_query_groups=8,
        train__global_batch=16,
        train__micro_batch=1,
    )
    for layout in all_layouts(processes):
        resolved = layout.of(run).resolve(processes, VOCAB)
        assert resolved.data_parallel == layout.data
        parallel = resolved.run.parallel
        assert (
            parallel.tensor,
            parallel.sequence,
            parallel.pipeline,
            parallel.virtual_pipeline,
            parallel.zero,
        ) == (
            layout.tensor,
            layout.sequence,
            layout.pipeline,
            layout.virtual_pipeline,
            layout.zero,
        )


# ---- laying a run out ---------------------------------------------------------------------------------------------


def test_the_rest_of_a_run_stays_and_the_run_given_does_not_change():
    run = run_of(parallel__tensor=4, parallel__sequence=True)
    laid = Layout(pipeline=2, zero=3).of(run)
    assert (laid.parallel.tensor, laid.parallel.sequence, laid.parallel.pipeline) == (1, False, 2)
    assert (run.parallel.tensor, run.parallel.sequence, run.parallel.pipeline) == (4, True, 1)
    assert laid.model_copy(update={"parallel": run.parallel}) == run


@pytest.mark.parametrize(
    ("layout", "kept"),
    [
        (Layout(pipeline=3), True),
        (Layout(tensor=2, pipeline=3, zero=2), True),
        (Layout(pipeline=2), False),
        (Layout(pipeline=3, virtual_pipeline=2), False),
        (SERIAL, False),
    ],
)
def test_layers_of_stages_are_kept_where_there_are_as_many_stages(layout, kept):
    run = run_of(model__num_layers=7, parallel__pipeline=3, parallel__pipeline_layers=(3, 3, 1))
    assert layout.of(run).parallel.pipeline_layers == ((3, 3, 1) if kept else None)


def test_layers_of_as_many_virtual_stages_are_kept():
    run = run_of(model__num_layers=7, parallel__pipeline=4, parallel__pipeline_layers=(1, 2, 2, 2))
    laid = Layout(pipeline=2, virtual_pipeline=2).of(run)
    assert laid.parallel.pipeline_layers == (1, 2, 2, 2)


@pytest.mark.parametrize("zero", ZERO_STAGES)
def test_a_deepspeed_file_is_kept_for_its_own_stage_alone(zero):
    run = run_of(parallel__zero=2, parallel__ds_config="/stage2.json")
    assert Layout(zero=zero).of(run).parallel.ds_config == ("/stage2.json" if zero == 2 else None)
