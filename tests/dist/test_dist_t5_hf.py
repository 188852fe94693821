"""T5, cut over ranks, against transformers' class loaded from the directory that we wrote."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hf_models import random_weights, relative_error, write_directory
from megatron.core import parallel_state
from test_dist_hf import piece_of
from transformers import T5ForConditionalGeneration

from basestone.model.config import ModelConfig
from basestone.model.families import layout_of
from basestone.model.hf.adapter import adapter_for, adapter_for_hf
from basestone.model.hf.rules import AdapterError
from basestone.model.hf.safetensors_file import SafetensorsReader
from basestone.model.layers import megatron_config
from basestone.model.pipeline import chunks_of_ranks
from basestone.model.stage import Stage
from basestone.trainer import runtime as processes
from basestone.trainer.forks import run_ranks
from basestone.trainer.hub.compare import verify
from basestone.trainer.hub.weights import ConversionError
from basestone.trainer.reference import trace_of

pytestmark = pytest.mark.dist
CONFIG = ModelConfig(
    family="t5",
    num_layers=3,
    num_decoder_layers=2,
    hidden_size=48,
    num_attention_heads=4,
    head_dim=10,  # not hidden / heads
    ffn_hidden_size=72,
    max_sequence_length=64,
    relative_buckets=16,
    relative_max_distance=20,  # within the inputs
    vocab_size=131,
    norm_epsilon=3e-5,
)
LIMIT, SEEN = 1e-5, 1e-4
GENERATOR = torch.Generator().manual_seed(2)
BATCH = {
    "tokens": torch.randint(131, (2, 32), generator=GENERATOR),
    "length": torch.tensor([[32], [21]]),
    "decoder_tokens": torch.randint(131, (2, 24), generator=GENERATOR),
}


@torch.no_grad()
def _logits_of_rank(
    directory: Path, tensor: int, pipeline: int, sequence: bool, spoilt: str
) -> np.ndarray | None:
    runtime = processes.start(tensor=tensor, pipeline=pipeline)
    hf = json.loads((directory / "config.json").read_text())
    adapter = adapter_for_hf(hf)
    model = adapter.model_config(hf)
    layer = megatron_config(model, dtype=torch.float32, sequence_parallel=sequence, on_cpu=True)
    stage = Stage(model, layer, chunks_of_ranks(model.total_layers, pipeline)[runtime.pp_rank]).eval()
    table, weights = layout_of(model), dict(adapter.to_global(model, SafetensorsReader(directory).read))
    for name, parameter in stage.named_parameters():
        rank = 0 if name == spoilt else runtime.tp_rank
        parameter.data.copy_(piece_of(table[name], weights[name], rank, runtime.tp_size))
    (chunk,) = stage.chunks
    if not chunk.first:
        length = (32 + 24) // (tensor if sequence else 1)
        received = torch.empty(length, 2, model.hidden_size)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        chunk.set_input_tensor(received)
    out = chunk(BATCH)
    if not chunk.last:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    parts = [torch.empty_like(out["spans"]) for _ in range(tensor)]
    dist.all_gather(parts, out["spans"].contiguous(), group=runtime.tp_group)
    return torch.cat(parts, -1)[..., : model.vocab_size].numpy()


def our_logits(
    directory: Path, tensor: int = 1, pipeline: int = 1, sequence: bool = False, spoilt: str = ""
) -> torch.Tensor:
    answers = run_ranks(_logits_of_rank, tensor * pipeline, directory, tensor, pipeline, sequence, spoilt)
    return torch.from_numpy(next(answer for answer in answers if answer is not None))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5")
    write_directory(CONFIG, random_weights(CONFIG), path)
    return path


def theirs_of(directory: Path) -> torch.Tensor:
    model, info = T5ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    seen = (torch.arange(32) < BATCH["length"]).long()
    with torch.no_grad():
        return (
            model.eval()(
                input_ids=BATCH["tokens"], attention_mask=seen, decoder_input_ids=BATCH["decoder_tokens"]
            )
        ).logits


@pytest.fixture(scope="module")
def theirs(directory: Path) -> torch.Tensor:
    return theirs_of(directory)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence"), [(1, 1, False), (2, 1, True), (2, 2, False), (1, 4, False)]
)
def test_logits_equal_those_of_transformers(directory, theirs, tensor, pipeline, sequence):
    assert relative_error(our_logits(directory, tensor, pipeline, sequence), theirs) < LIMIT


@pytest.mark.parametrize(
    "spoilt", ["encoder.relative.weight", "decoder.layers.1.cross_attention.linear_kv.weight"]
)
def test_a_wrong_piece_is_seen(directory, theirs, spoilt):
    assert relative_error(our_logits(directory, tensor=2, spoilt=spoilt), theirs) > SEEN


def test_head_and_embedding_stay_apart_when_transformers_saves_them(directory, theirs, tmp_path):
    model = T5ForConditionalGeneration.from_pretrained(directory)
    model.save_pretrained(tmp_path)
    assert relative_error(theirs_of(tmp_path), theirs) < LIMIT


def test_weights_come_back_as_they_were(directory):
    reader = SafetensorsReader(directory)
    hf = json.loads((directory / "config.json").read_text())
    adapter = adapter_for_hf(hf)
    model = adapter.model_config(hf)
    assert model.model_copy(update={"vocab_multiple": CONFIG.vocab_multiple}) == CONFIG
    assert hf["decoder_start_token_id"] == hf["pad_token_id"]
    weights, seen = random_weights(CONFIG), set()
    for name, tensor in adapter.to_global(CONFIG, reader.read):
        assert torch.equal(tensor, weights[name]), name
        seen.add(name)
    assert seen == set(weights)


@pytest.mark.parametrize(
    "changes", [{"feed_forward_proj": "relu"}, {"tie_word_embeddings": True}, {"is_encoder_decoder": False}]
)
def test_another_t5_is_refused_by_its_field(directory, changes):
    hf = json.loads((directory / "config.json").read_text()) | changes
    with pytest.raises(AdapterError, match=next(iter(changes))):
        adapter_for_hf(hf).model_config(hf)


def test_a_model_that_the_class_cannot_hold_is_refused():
    with pytest.raises(AdapterError, match="activation = 'swiglu'"):
        adapter_for(CONFIG.model_copy(update={"activation": "swiglu"}))


class _Weights:
    """Weights in memory, one of them spoilt."""

    def __init__(self, spoilt: str) -> None:
        self._weights = random_weights(CONFIG)
        if spoilt:
            self._weights[spoilt] = self._weights[spoilt] * 1.01

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self._weights[name].to(dtype)


def _verify(directory: Path, spoilt: str) -> tuple[float, str]:
    """Compare part by part, as an export does, a layer at a time."""
    trace = trace_of(CONFIG, _Weights(spoilt), processes.start(), rounded_to=torch.float32)
    batch = {name: BATCH[name] for name in ("tokens", "decoder_tokens")}
    try:
        found = verify(directory, adapter_for(CONFIG), CONFIG, trace, batch, LIMIT, command="export")
    except ConversionError as error:
        return math.inf, str(error)
    return found.relative_error, ""


def test_an_export_is_compared_layer_by_layer(directory):
    ((error, problem),) = run_ranks(_verify, 1, directory, "")
    assert error < LIMIT and not problem


@pytest.mark.parametrize(
    ("spoilt", "place"),
    [
        ("encoder.layers.1.mlp.linear_fc1.weight", "at encoder layer 1"),
        ("encoder.norm.weight", "at decoder layer 0"),
        ("decoder.layers.1.cross_attention.linear_kv.weight", "at decoder layer 1"),
        ("decoder.norm.weight", "at the logits after the final norm"),
    ],
)
def test_the_first_part_that_departs_is_named(directory, spoilt, place):
    ((_, problem),) = run_ranks(_verify, 1, directory, spoilt)
    assert f"they depart {place}" in problem
