"""What a run of a T5 comes to: its targets, what stages pass on, and what `--dry-run` says of two trunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small import VOCAB
from small_t5 import t5

from basestone.model.families import layout_of
from basestone.trainer.config import ResolvedRun
from basestone.trainer.errors import ConfigError
from basestone.trainer.plan import describe, local_parameters, memory_bytes, total_flops


def resolved(world_size: int = 1, **changes: Any) -> ResolvedRun:
    return t5(**changes).resolve(world_size, VOCAB)


def test_targets_follow_from_the_inputs_and_the_rates():
    """Raffel et al. 2020: 512 inputs have 114 targets at 15 % in spans of 3."""
    found = resolved(data__sequence_length=512, model__max_sequence_length=512)
    assert found.target_length == 114
    assert found.parts == {"spans": "weights"}
    fewer = t5(data__sequence_length=512, model__max_sequence_length=512)
    fewer = fewer.model_copy(update={"task": fewer.task.model_copy(update={"noise": 0.5})})
    assert fewer.resolve(1, VOCAB).target_length > 300


def test_sequences_too_short_for_spans_are_refused():
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 2: inputs of 2 tokens hold no text"):
        resolved(data__sequence_length=2)


SEQUENCE = {"parallel__tensor": 4, "parallel__sequence": True, "model__max_sequence_length": 512}


def test_sequence_parallel_needs_targets_that_can_be_cut():
    with pytest.raises(ConfigError) as caught:
        resolved(4, **SEQUENCE, data__sequence_length=512)
    (problem,) = str(caught.value).splitlines()
    assert problem == (
        "parallel.sequence = true needs the 114 targets of data.sequence_length = 512 to be a multiple of "
        "parallel.tensor = 4; set data.sequence_length = 500, or parallel.sequence = false"
    )
    for length in (500, 504, 508):
        assert (
            resolved(4, model__max_sequence_length=512, data__sequence_length=length).target_length % 4 == 0
        ) == (length == 500)


def test_a_row_of_the_ramp_is_named():
    """Inputs of 44 tokens have 10 targets; the nearest length that may be cut into four is not over the run's own."""
    rows = [{"sequence_length": 44, "until_step": 3}]
    with pytest.raises(ConfigError) as caught:
        resolved(4, **SEQUENCE, data__sequence_length=48, train__ramp=rows)
    (problem,) = str(caught.value).splitlines()
    assert problem == (
        "parallel.sequence = true needs the 10 targets of train.ramp[0].sequence_length = 44 to be a multiple of "
        "parallel.tensor = 4; set train.ramp[0].sequence_length = 32 or 48, or parallel.sequence = false"
    )
    with pytest.raises(
        ConfigError, match=r"train\.ramp\[0\]\.sequence_length = 2: inputs of 2 tokens hold no text"
    ):
        resolved(data__sequence_length=48, train__ramp=[{"sequence_length": 2, "until_step": 3}])


def test_lengths_on_both_sides_are_named():
    with pytest.raises(ConfigError, match=r"set data.sequence_length = (\d+) or (\d+), or parallel") as caught:
        resolved(4, **SEQUENCE, data__sequence_length=256)
    text = str(caught.value)
    for word in text.split():
        if (number := word.rstrip(",;")).isdigit() and int(number) > 200 and number != "256":
            assert resolved(4, **SEQUENCE, data__sequence_length=int(number)).target_length % 4 == 0


def test_a_pipeline_of_more_stages_than_layers_names_both_trunks():
    with pytest.raises(ConfigError, match=r"model.num_layers \+ model.num_decoder_layers = 6"):
        resolved(8, parallel__pipeline=8)


def test_the_dry_run_names_both_trunks():
    lines = dict(describe(resolved(2, parallel__pipeline=2), Path("run")))
    assert "4 layers of the encoder and 2 of the decoder" in lines["model"]
    assert "32 = 256 tokens a step, each with 8 targets, 4 micro-batch(es) of 2" in lines["batch"]
    assert "1F1B over layers 3 | 3" in lines["layout"]


def test_stages_hold_what_their_layers_need():
    """Relative positions of a trunk that two stages share are counted on both."""
    whole = resolved(2, parallel__pipeline=2)
    table = layout_of(whole.run.model)
    shared = table["encoder.relative.weight"].numel
    assert sum(local_parameters(whole, rank) for rank in range(2)) == shared + sum(
        row.numel for row in table.values()
    )


# By hand: width 64, 8 heads of width 8, MLP 192, vocabulary padded to 256; 32 inputs and 8 targets.
ATTENTION, MLP = 4 * 64 * 64, 3 * 64 * 192
ENCODER = 4 * 32 * (ATTENTION + 2 * 64 * 32 + MLP)
CROSS = 8 * (2 * 64 * 64 + 2 * 64 * 32) + 32 * 2 * 64 * 64
DECODER = 2 * (8 * (ATTENTION + 2 * 64 * 8 + MLP) + CROSS)


def test_flops_of_a_run_by_hand():
    """The causal convention counts half of the scores among the targets."""
    samples, head, scores = 20 * 8, 8 * 64 * 256, 2 * 8 * 64 * 8
    assert total_flops(resolved()) == pytest.approx(6 * samples * (ENCODER + DECODER + head - scores))


def test_activations_by_hand():
    """fp32, 2 sequences: a layer keeps 4 h, 2 n d and 3 f a place; cross attention, the bias, the logits twice."""
    place = 4 * 64 + 2 * 2 * 64 + 3 * 192
    layers = 4 * 64 * place + 2 * (16 * (place + 2 * 64 + 2 * 64) + 64 * 2 * 64)
    bias = (2 * 32**2 + 8**2) * 8
    logits = 2 * 16 * 256
    assert memory_bytes(resolved(), 0)["activations"] == pytest.approx(4 * (layers + bias + logits))
