"""What one pipeline rank holds: its chunks of the model, and the marks that Megatron-core and DeepSpeed read."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from .config import ModelConfig
from .families import family_of, layout_of
from .initial import initial_piece
from .layers import Embedding, StageChunk
from .pipeline import Chunk


class Stage(nn.Module):
    """A rank's chunks as one module, whose parameters carry their global names."""

    chunks: list[StageChunk]
    embed: Embedding

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, chunks: Sequence[Chunk], *, recompute: bool = False
    ) -> None:
        """Build the chunks of this rank; `config` is that of one layer."""
        super().__init__()
        make = chunk_class(model)
        built = [make(model, config, chunk, recompute=recompute) for chunk in chunks]
        schedule = _schedule_config(config, len(built))
        for number, chunk in enumerate(built):
            chunk.config = schedule
            chunk.vp_stage = number if len(built) > 1 else None
            chunk.share(built[:number])
            for name, part in chunk.parts():
                self._place(name, part)
        object.__setattr__(self, "chunks", built)  # not sub-modules: their names would depend on the layout

    def _place(self, name: str, part: nn.Module) -> None:
        """Make a part a sub-module by its global name."""
        *above, own = name.split(".")
        parent: nn.Module = self
        for step in above:
            if not hasattr(parent, step):
                parent.add_module(step, nn.ModuleDict())
            parent = getattr(parent, step)
        parent.add_module(own, part)

    @property
    def stage_copies(self) -> dict[str, nn.Parameter | None]:
        """What several stages have copies of, in one order on all of them; None for those that this one has not."""
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return {}
        held = dict(self.named_parameters())
        table = layout_of(self.chunks[0].model)
        return {name: held.get(name) for name, row in table.items() if row.per_stage}

    @property
    def tied_copies(self) -> list[nn.Parameter]:
        """The word embedding, where the first and the last stage each have a copy of it and this is one of them."""
        model = self.chunks[0].model
        apart = parallel_state.get_pipeline_model_parallel_world_size() > 1
        return [self.embed.word.weight] if model.tied_head and apart and hasattr(self, "embed") else []

    def transformer_layers(self) -> list[nn.Module]:
        """Give this rank's layers, of all trunks."""
        return [module for module in self.modules() if isinstance(module, TransformerLayer)]

    def begins(self, name: str) -> bool:
        """Tell whether this stage has the first layer of the trunk of a parameter that several stages have."""
        trunk = getattr(self, name.partition(".")[0])
        return "0" in trunk.layers

    def train(self, mode: bool = True) -> Stage:
        """Switch every chunk, too: they draw dropout and recompute by their own flag."""
        for chunk in self.chunks:
            chunk.training = mode
        return super().train(mode)

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Run a stage that is the whole model; Megatron-core's schedules call the chunks of others."""
        (chunk,) = self.chunks
        return chunk(batch)


def chunk_class(model: ModelConfig) -> type[StageChunk]:
    """Give the class of a family's chunks."""
    module, name = family_of(model).chunk
    made: type[StageChunk] = getattr(importlib.import_module(module, __package__), name)
    return made


def _schedule_config(config: TransformerConfig, num_chunks: int) -> TransformerConfig:
    """Give the schedule's view of a layer's configuration, which knows of no pipeline.

    A pipeline size in a layer's own would make Megatron add the stage's offset to numbers that are global here.
    """
    schedule = copy.copy(config)
    schedule.pipeline_model_parallel_size = parallel_state.get_pipeline_model_parallel_world_size()
    schedule.microbatch_group_size_per_vp_stage = schedule.pipeline_model_parallel_size
    if num_chunks > 1:
        schedule.virtual_pipeline_model_parallel_size = num_chunks
        schedule.overlap_p2p_comm = True
    return schedule


def prepare_parameters(stage: Stage, model: ModelConfig, seed: int | None) -> None:
    """Mark every parameter with its place in the layout and, with a seed, fill it with its initial values.

    Megatron-core and DeepSpeed read `tensor_model_parallel`, `partition_dim`, `partition_stride`. `owned` is ours: of
    several ranks with the same piece it is true on one, which counts it in the gradient norm and writes it to the
    checkpoint; the marks by which DeepSpeed's norm decides follow from it. `partial` is ours, too: the gradient of a
    tensor-parallel rank is a part of a sum, over the rank's slice of the tokens or over its heads. Works on parameters
    that ZeRO-3 has already partitioned only when `seed` is None.
    """
    table = layout_of(model)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    second_copies = {id(copy) for copy in stage.tied_copies if not stage.chunks[0].first}
    second_copies |= {
        id(copy) for name, copy in stage.stage_copies.items() if copy is not None and not stage.begins(name)
    }
    parameter: Any
    for name, parameter in stage.named_parameters():
        row, is_copy = table[name], id(parameter) in second_copies
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        cut = row.axis is not None and tp_size > 1
        if cut:
            parameter.tensor_model_parallel = True
            parameter.partition_dim = row.axis
            parameter.partition_stride = row.parts
        parameter.owned = (cut or tp_rank == 0) and not is_copy
        parameter.partial = tp_size > 1 and (row.per_head or getattr(parameter, "sequence_parallel", False))
        if is_copy:
            parameter.ds_pipe_replicated = True
            parameter.tensor_model_parallel = False
        if not parameter.tensor_model_parallel:
            parameter.model_parallel = parameter.owned
        if seed is not None:
            piece = initial_piece(row, seed, tp_rank, tp_size)
            assert piece.shape == parameter.shape, f"{name}: {tuple(piece.shape)} != {tuple(parameter.shape)}"
            parameter.data.copy_(piece)
