"""Our decoder, cut over ranks in every way, against transformers' class loaded from the directory that we wrote.

The weights go both ways: drawn at random under our names, written as an export writes them, and read back from there
by every rank.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hf_models import (
    BATCH,
    CONFIGS,
    ENCODERS,
    IDS,
    all_logits_from_disk,
    logits_from_disk,
    random_weights,
    relative_error,
    write_directory,
)
from megatron.core import parallel_state

from basestone.model.families import layout_of
from basestone.model.hf.adapter import adapter_for_hf
from basestone.model.hf.rules import Halves, QueryGroups, Rule
from basestone.model.hf.safetensors_file import SafetensorsReader
from basestone.model.layers import megatron_config
from basestone.model.layout import Parameter
from basestone.model.pipeline import chunks_of_ranks
from basestone.model.stage import Stage
from basestone.trainer import runtime as processes
from basestone.trainer.forks import run_ranks

pytestmark = pytest.mark.dist

LIMIT, SEEN = 1e-5, 1e-4


def piece_of(row: Parameter, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Cut a rank's piece out of a global tensor: part after part along the axis."""
    if row.axis is None:
        return whole
    parts = whole.chunk(row.parts, row.axis)
    return torch.cat([part.chunk(size, row.axis)[rank] for part in parts], row.axis)


@torch.no_grad()
def _logits_of_rank(
    directory: Path,
    tensor: int,
    pipeline: int,
    sequence: bool,
    spoilt: Callable[[str, torch.Tensor, int], torch.Tensor],
) -> list[np.ndarray] | None:
    """Read a directory into this rank's stage; give all logits of `BATCH` on the last one."""
    runtime = processes.start(tensor=tensor, pipeline=pipeline)
    hf = json.loads((directory / "config.json").read_text())
    adapter = adapter_for_hf(hf)
    model = adapter.model_config(hf)
    layer = megatron_config(model, dtype=torch.float32, sequence_parallel=sequence, on_cpu=True)
    chunks = chunks_of_ranks(model.num_layers, pipeline)[runtime.pp_rank]
    stage = Stage(model, layer, chunks).eval()
    table = layout_of(model)
    weights = dict(adapter.to_global(model, SafetensorsReader(directory).read))
    for name, parameter in stage.named_parameters():
        piece = piece_of(table[name], weights[name], runtime.tp_rank, runtime.tp_size)
        parameter.data.copy_(spoilt(name, piece, runtime.tp_rank))
    (chunk,) = stage.chunks
    if not chunk.first:
        length = IDS.shape[1] // (tensor if sequence else 1)
        received = torch.empty(length, IDS.shape[0], model.hidden_size)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        chunk.set_input_tensor(received)
    out = chunk(BATCH)
    if not chunk.last:
        dist.send(out.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    first, *others = out.values()
    parts = [torch.empty_like(first) for _ in range(tensor)]
    dist.all_gather(parts, first.contiguous(), group=runtime.tp_group)
    logits = [torch.cat(parts, -1)[..., : model.vocab_size], *others]
    return [found.numpy() for found in logits]  # a tensor's memory would end with the rank


def _as_it_is(name: str, piece: torch.Tensor, rank: int) -> torch.Tensor:
    return piece


def decoder_logits(
    directory: Path, tensor: int = 1, pipeline: int = 1, sequence: bool = False, spoilt: Any = _as_it_is
) -> torch.Tensor:
    """Give our logits of a directory, computed by `tensor` x `pipeline` ranks."""
    return all_logits(directory, tensor, pipeline, sequence, spoilt)[0]


def all_logits(
    directory: Path, tensor: int = 1, pipeline: int = 1, sequence: bool = False, spoilt: Any = _as_it_is
) -> list[torch.Tensor]:
    """Give them of every head."""
    answers = run_ranks(_logits_of_rank, tensor * pipeline, directory, tensor, pipeline, sequence, spoilt)
    return [torch.from_numpy(one) for one in next(answer for answer in answers if answer is not None)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """Directories by the model's name, with the logits of the class that was loaded from there."""

    @functools.cache
    def write(name: str) -> tuple[Path, torch.Tensor]:
        directory = tmp_path_factory.mktemp(name)
        write_directory(CONFIGS[name], random_weights(CONFIGS[name]), directory)
        return directory, logits_from_disk(directory, IDS)

    return write


FAMILIES = ["llama-untied", "llama-scaled", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-scaled", "gpt2"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence"),
    [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)],
)
def test_logits_equal_transformers(written, name, tensor, pipeline, sequence):
    directory, expected = written(name)
    assert relative_error(decoder_logits(directory, tensor, pipeline, sequence), expected) < LIMIT


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize(
    ("tensor", "pipeline", "sequence"),
    [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False), (2, 2, True)],
)
def test_all_logits_equal_transformers(tmp_path, name, tensor, pipeline, sequence):
    write_directory(ENCODERS[name], random_weights(ENCODERS[name]), tmp_path)
    for got, expected in zip(
        all_logits(tmp_path, tensor, pipeline, sequence), all_logits_from_disk(tmp_path), strict=True
    ):
        assert relative_error(got, expected) < LIMIT


@pytest.mark.parametrize(
    ("parameter", "head"),
    [
        ("embed.segment.weight", 0),
        ("embed.norm.bias", 0),
        ("layers.1.self_attn_bda.norm.weight", 0),
        ("transform.bias", 0),
        ("head.bias", 0),
        ("pooler.bias", 1),
        ("next_sentence.weight", 1),
    ],
)
def test_a_parameter_that_is_lost_is_seen(tmp_path, parameter, head):
    """Which part each head's logits depend on: none of them is left out of the comparison."""
    write_directory(ENCODERS["bert"], random_weights(ENCODERS["bert"]), tmp_path)

    def spoilt(name: str, piece: torch.Tensor, rank: int) -> torch.Tensor:
        return torch.zeros_like(piece) if name == parameter else piece

    got, expected = all_logits(tmp_path, spoilt=spoilt), all_logits_from_disk(tmp_path)
    assert relative_error(got[head], expected[head]) > SEEN


def test_biases_in_another_order_than_their_rows_are_seen(written):
    directory, expected = written("qwen2")

    def spoilt(name: str, piece: torch.Tensor, rank: int) -> torch.Tensor:
        return piece.roll(CONFIGS["qwen2"].head_dim) if name.endswith("linear_qkv.bias") and rank else piece

    assert relative_error(decoder_logits(directory, 2, spoilt=spoilt), expected) > SEEN


# ---- faults of an export: the directory says or holds something else than the trainer had ----------------------------


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(hf: dict[str, Any]) -> None:
        for name in names:
            del hf[name]

    return change


def change_scaling(factor: str, value: float | None) -> Callable[[dict[str, Any]], None]:
    def change(hf: dict[str, Any]) -> None:
        for table in ("rope_scaling", "rope_parameters"):
            hf[table][factor] = value

    return change


SAYINGS = {
    "the norm's epsilon left to the class": ("llama-untied", without("rms_norm_eps")),
    "the epsilon of gpt2": ("gpt2", lambda hf: hf.update(layer_norm_epsilon=1e-3)),
    "RoPE's base left to the class": ("qwen3", without("rope_theta", "rope_parameters")),
    "no scaling": ("llama-scaled", without("rope_scaling", "rope_parameters")),
    "another factor": ("llama-scaled", change_scaling("factor", 8.0)),
    "another low factor": ("llama-scaled", change_scaling("low_freq_factor", 0.1)),
    "another high factor": ("llama-scaled", change_scaling("high_freq_factor", 4.0)),
    "another first length": ("qwen3-scaled", change_scaling("original_max_position_embeddings", 32)),
}


@functools.cache
def trained_logits(name: str) -> torch.Tensor:
    """Give our logits in one process, from weights that went through no file that a fault touches."""
    with tempfile.TemporaryDirectory() as folder:
        write_directory(CONFIGS[name], random_weights(CONFIGS[name]), Path(folder))
        return decoder_logits(Path(folder))


@pytest.mark.parametrize("fault", SAYINGS)
def test_a_config_that_says_something_else_is_seen(fault, tmp_path):
    name, change = SAYINGS[fault]
    hf = write_directory(CONFIGS[name], random_weights(CONFIGS[name]), tmp_path)
    change(hf)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert relative_error(logits_from_disk(tmp_path, IDS), trained_logits(name)) > SEEN


def _reordered(weights: dict[str, torch.Tensor], ending: str, rule: Rule, *order: int) -> None:
    """Join the parts of each parameter with this ending in another order."""
    for name in weights:
        if name.endswith(ending):
            parts = rule.split(weights[name])
            weights[name] = rule.join([parts[place] for place in order])


HEADS, MANY = QueryGroups(6, 2, 10), QueryGroups(6, 6, 10)
TABLES = {
    "keys for queries": ("llama-many-groups", "linear_qkv.weight", MANY, (1, 0, 2)),
    "values for keys": ("qwen3", "linear_qkv.weight", HEADS, (0, 2, 1)),
    "values for keys, of the biases alone": ("qwen2", "linear_qkv.bias", HEADS, (0, 2, 1)),
    "up for gate": ("mistral", "linear_fc1.weight", Halves(), (1, 0)),
}


@pytest.mark.parametrize("fault", TABLES)
def test_parts_in_another_order_are_seen(fault, tmp_path):
    name, ending, rule, order = TABLES[fault]
    weights = random_weights(CONFIGS[name])
    _reordered(weights, ending, rule, *order)
    write_directory(CONFIGS[name], weights, tmp_path)
    assert relative_error(logits_from_disk(tmp_path, IDS), trained_logits(name)) > SEEN


def test_the_keys_norm_for_the_queries_is_seen(tmp_path):
    weights = random_weights(CONFIGS["qwen3"])
    for name in [name for name in weights if "q_layernorm" in name]:
        key = name.replace("q_layernorm", "k_layernorm")
        weights[name], weights[key] = weights[key], weights[name]
    write_directory(CONFIGS["qwen3"], weights, tmp_path)
    # q.k sees the product of both norms and, through RoPE, little else: the smallest of these faults
    assert relative_error(logits_from_disk(tmp_path, IDS), trained_logits("qwen3")) > SEEN
