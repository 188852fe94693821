"""DeepSpeed: the only module that imports it.

An ordinary DeepSpeedEngine reduces, clips and steps; Megatron-core's schedule drives forward and backward. There are
three reduction paths, chosen once:

* one pipeline stage, ZeRO 1-3: every forward goes through the engine, whose accumulation boundary is false until the
  last micro-batch. ZeRO-2 and 3 reduce each micro-batch into their partition; ZeRO-3 needs the call for its prefetch
  trace.
* several stages, ZeRO 1-3: the chunks are called directly, gradients add up whole on the rank, and one reduction
  follows. DeepSpeed's stage 2 serves as stage 1, too: with one reduction they are the same, and stage 1 in bf16 would
  turn into an optimizer without this path.
* ZeRO 0 in fp32: forward and backward go around the engine, gradients are averaged once, and norm and clipping are
  ours, as DeepSpeed reports no norm there.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from ..model.draws import draws_again
from ..model.families import layout_of
from ..model.initial import initial_piece
from ..model.layers import megatron_config
from ..model.layout import has_weight_decay
from ..model.pipeline import chunks_of_ranks
from ..model.stage import Stage, prepare_parameters
from .batch import MicroBatch, passed_length
from .config import ResolvedRun
from .ds_config import deepspeed_config, nvme_sections
from .engine_chunk import EngineChunk
from .engine_state import MASTER, EngineState
from .errors import ConfigError
from .gradients import Fp32Accumulation, add_copies, add_over, gradient_of
from .meters.phases import Phases, ScheduleTimers
from .objective import LossOf, Reports, objective_of
from .plan import swapped_bytes
from .runtime import Mpu, Runtime, run_schedule
from .swap import SwapFolder, swap_folder_problem

MOST_BUILD_S = 600.0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def switch_off_shm_op() -> None:
    """Keep DeepSpeed from building its shared-memory collectives for CPUs when it starts communication.

    The build guards itself with a lock file: a process killed meanwhile hangs every later run for ever.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """A model under DeepSpeed: run a step, evaluate, and expose its state by global names."""

    def __init__(self, resolved: ResolvedRun, runtime: Runtime) -> None:
        """Build the model in this rank's pieces, with its initial weights."""
        run = resolved.run
        self.runtime, self.model = runtime, run.model
        self._clip, self._zero, self._dtype = run.train.clip, run.parallel.zero, run.train.dtype
        self._rows = run.train.micro_batch * run.model.texts_per_sample
        self.parts = resolved.parts
        self._objective = objective_of(run.model, self.parts, runtime.dp_group)
        if runtime.on_cpu and self._dtype == "fp16":
            raise ConfigError("train.dtype = 'fp16' needs a GPU, and there is none; set it to 'bf16'")
        if runtime.on_cpu:
            switch_off_shm_op()
        deepspeed_logger.setLevel(logging.ERROR)
        config = deepspeed_config(resolved, pin_memory=not runtime.on_cpu)
        self._swap_folders = _swap_folders(config)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(verbose=False)
        self.module = self._build(resolved, config)
        if run.model.compile:
            for layer in self.module.transformer_layers():
                layer.compile()
        self._through_engine = self._zero > 0 and runtime.pp_size == 1
        self._partial = [p for p in self.module.parameters() if p.partial]  # type: ignore[attr-defined]
        self._hooks = self._sum_as_they_come() if self._through_engine else []
        optimizer = self._optimizer(resolved)
        with _quiet():
            self._engine, self._deepspeed_optimizer, _, _ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=config, mpu=Mpu()
            )
        self.phases = Phases(on_cpu=runtime.on_cpu)
        for chunk in self.module.chunks:
            chunk.config.timers = ScheduleTimers(self.phases)
        self.state = EngineState(self.module, self._deepspeed_optimizer, runtime.dp_group)
        if self._zero == 3:
            self._initialise_stage3(run.run.seed)
        chunks = [EngineChunk(self._engine, self.module)] if self._through_engine else self.module.chunks
        self._chunks: list[Any] = chunks
        self._accumulation: Fp32Accumulation | None = None
        if runtime.pp_size > 1 and self._dtype != "fp32" and resolved.most_micro_batches > 1:
            self._accumulation = Fp32Accumulation(
                self.module, self._deepspeed_optimizer, stage3=self._zero == 3
            )
        self._chunks[0].config.grad_scale_func = self._engine.scale if run.train.dtype == "fp16" else None

    def _build(self, resolved: ResolvedRun, config: dict[str, Any]) -> Stage:
        run, runtime, parallel = resolved.run, self.runtime, resolved.run.parallel
        dtype = DTYPES[run.train.dtype]
        layer_config = megatron_config(
            run.model,
            dtype=dtype,
            sequence_parallel=parallel.sequence,
            on_cpu=runtime.on_cpu,
            deterministic=run.run.deterministic,
        )
        chunks = chunks_of_ranks(
            run.model.total_layers, parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layers
        )
        partition: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self._zero == 3:
            # With mpu= it would partition over all ranks and mix up tensor-parallel pieces without a word; with dtype=
            # it takes bfloat16 whatever is asked for, on a CPU whose oneDNN has no fp16. The configuration says it.
            partition = deepspeed.zero.Init(data_parallel_group=runtime.dp_group, config_dict_or_path=config)
        with partition:
            stage = Stage(run.model, layer_config, chunks[runtime.pp_rank], recompute=run.train.recompute)
        prepare_parameters(stage, run.model, None if self._zero == 3 else run.run.seed)
        if self._zero == 3 and stage.tied_copies:
            # The last stage's head multiplies with a weight that is in no module of its own, so nothing gathers it.
            for chunk in stage.chunks:
                if chunk.last:
                    deepspeed.zero.register_external_parameter(chunk.head, stage.embed.word.weight)
        return stage

    def _optimizer(self, resolved: ResolvedRun) -> torch.optim.Optimizer:
        section, table = resolved.run.optimizer, layout_of(self.model)
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.module.named_parameters():
            decay = section.decay_all or has_weight_decay(table[name])
            (decayed if decay else plain).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            fused=True,
        )

    def _initialise_stage3(self, seed: int) -> None:
        """Fill each rank's partitions, one parameter at a time, with what every other layout starts from."""
        table, runtime = layout_of(self.model), self.runtime
        for fragment in self.state.fragments():
            piece = initial_piece(table[fragment.name], seed, runtime.tp_rank, runtime.tp_size).view(-1)
            values = piece.narrow(0, fragment.start, fragment.numel)
            fragment.tensors[MASTER].copy_(values.to(DTYPES[self._dtype]))
        self.state.refresh()

    def _sum_as_they_come(self) -> list[Any]:
        """Sum, over tensor-parallel ranks, gradients that each rank has for its own tokens or heads only.

        DeepSpeed does not know of them. A hook on the gradient comes before any reduction of a micro-batch.
        """
        group = self.runtime.tp_group

        def add_up(gradient: Tensor) -> Tensor:
            total = gradient.contiguous().clone()
            dist.all_reduce(total, group=group)
            return total

        return [parameter.register_hook(add_up) for parameter in self._partial]

    @property
    def figures(self) -> tuple[str, ...]:
        """What `evaluate` gives of each part: the loss, and what counts predictions."""
        return self._objective.figures

    @property
    def micro_batch_multiple(self) -> int:
        """What the number of micro-batches must be a multiple of: the interleaved schedule has a say in it."""
        return self.runtime.pp_size if len(self.module.chunks) > 1 else 1

    def forward_backward(self, micro_batches: Sequence[MicroBatch], counts: Mapping[str, float]) -> Tensor:
        """Run forward and backward over this rank's micro-batches.

        Args:
            micro_batches: this rank's part of the global batch.
            counts: by part of the loss, the predictions that count in the whole global batch.

        Returns:
            This rank's share of each part's summed loss in nats, fp32 [parts]: over all ranks they add up to the
            global batch's.
        """
        self.module.train()
        # The schedule divides by the micro-batches and ZeRO averages over data-parallel ranks: take both back.
        scale = len(micro_batches) * self.runtime.dp_size
        scales = {name: scale / counts[name] for name in self.parts}
        if self._through_engine:
            self._chunks[0].begin_step(len(micro_batches))
            return self._run(micro_batches, scales)[:, 0].contiguous()
        with contextlib.ExitStack() as reduction:
            if self._zero > 0:
                reduction.enter_context(self._engine.coalesce_grad_reduction())
            sums = self._run(micro_batches, scales)
            with self.phases.device("gradient_sync"):
                self._finish_gradients()
                reduction.close()
        return sums[:, 0].contiguous()  # a collective on a view would add up something else

    def _run(
        self, micro_batches: Sequence[MicroBatch], scales: Mapping[str, float], *, forward_only: bool = False
    ) -> Tensor:
        """Run the schedule; give this rank's share of the sums by part: [parts, figures]."""

        def look(loss: LossOf) -> Reports:
            with torch.no_grad(), draws_again(self.runtime.device):
                return self._pass(micro_batches, loss, forward_only=True)

        self._objective.prepare(micro_batches, look)
        loss: LossOf = functools.partial(self._objective.loss, scales=scales)
        reports = self._pass(micro_batches, loss, forward_only=forward_only)
        sums = torch.zeros(len(self.parts), len(self.figures), device=self.runtime.device)
        if self.runtime.tp_rank == 0:  # its tensor-parallel neighbours have the same sums, earlier stages none
            for report in reports:
                sums += report["sums"]
        return sums

    def _finish_gradients(self) -> None:
        """Add up, once a step, the gradients that several ranks of a replica have parts of."""
        runtime = self.runtime
        if self._accumulation is not None:
            self._accumulation.hand_over()
        add_over([gradient_of(parameter) for parameter in self._partial], runtime.tp_group)
        for parameter in self.module.tied_copies:
            add_over([gradient_of(parameter)], runtime.embedding_group)
        table = layout_of(self.model)
        copies = [
            (table[name].local_shape(runtime.tp_size), copy) for name, copy in self.module.stage_copies.items()
        ]
        add_copies(copies, runtime.pp_group, runtime.device)

    def _pass(self, micro_batches: Sequence[MicroBatch], loss: LossOf, *, forward_only: bool) -> Reports:
        return run_schedule(
            self._forward_step(loss),
            self._chunks,
            micro_batches,
            sequence_length=passed_length(micro_batches[0]),
            micro_batch=self._rows,
            forward_only=forward_only,
        )

    def _forward_step(self, loss: LossOf) -> Callable[[Iterator[MicroBatch], nn.Module], Any]:
        def forward_step(batches: Iterator[MicroBatch], chunk: nn.Module) -> Any:
            batch = next(batches)
            return chunk(batch), lambda outputs: loss(outputs, batch)

        return forward_step

    def update(self, lr: float) -> float:
        """Clip, step and give the global gradient norm before clipping."""
        for group in self._deepspeed_optimizer.param_groups:
            group["lr"] = lr
        if self._zero == 0:
            with self.phases.device("gradient_sync"):
                self._engine.set_gradient_accumulation_boundary(True)
                self._engine.allreduce_gradients()
        with self.phases.device("optimizer"):
            norm = self._clip_plain() if self._zero == 0 else None
            self._engine.step()
            reported = norm if norm is not None else self._engine.get_global_grad_norm()
            return float(reported)

    def _clip_plain(self) -> float:
        """ZeRO-0: compute the gradients' norm over all ranks, clip."""
        runtime = self.runtime
        square = torch.zeros((), dtype=torch.float64, device=runtime.device)
        for parameter in self.module.parameters():
            if parameter.owned and parameter.grad is not None:  # type: ignore[attr-defined]
                square += parameter.grad.double().square().sum()
        dist.all_reduce(square, group=runtime.model_group)
        norm = float(square.sqrt())
        if self._clip and norm > self._clip:
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._clip / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Give this rank's share of the sums, fp32 [parts, figures], without dropout and z-loss."""
        self.module.eval()
        return self._run(micro_batches, dict.fromkeys(self.parts, 1.0), forward_only=True)

    def close(self) -> None:
        """Remove this rank's swap files; safe after an exception."""
        for folder in self._swap_folders:
            folder.close()


def check_deepspeed(resolved: ResolvedRun, num_local_ranks: int) -> None:
    """Refuse, before any process group is made, what DeepSpeed cannot do on this machine.

    Args:
        num_local_ranks: how many ranks of this host swap to the same disk.

    Raises:
        ConfigError: the DeepSpeed file is wrong, or there is swapping to files and it cannot be had.
    """
    if not (sections := nvme_sections(deepspeed_config(resolved))):
        return
    for path in sorted({section["nvme_path"] for section in sections}):
        if problem := swap_folder_problem(Path(path), num_local_ranks * swapped_bytes(resolved)):
            raise ConfigError(f"offload to NVMe: {path} {problem}; name another directory on a local disk")
    if problem := _async_io_problem():
        raise ConfigError(
            f'offload to NVMe: {problem}; or set parallel.offload = "cpu", which needs no compiler'
        )


def _async_io_problem() -> str | None:
    """Build and load DeepSpeed's file operations; give what is missing, or None."""
    builder = AsyncIOBuilder()
    if not installed_ops.get(builder.name) and (missing := _build_problem(builder)):
        return missing
    try:
        with _quiet():
            builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"DeepSpeed's file operations cannot be built: {reason[0]}"
    return None


def _build_problem(builder: AsyncIOBuilder) -> str | None:
    """Say what a build would lack or wait for; None where it can begin."""
    from torch.utils import cpp_extension  # not above: it takes seconds, and few runs compile

    if shutil.which(cpp_extension.get_cxx_compiler()) is None:
        return "DeepSpeed compiles its file operations, and there is no C++ compiler; install g++"
    if not builder.is_compatible(verbose=False):
        return "libaio and its headers are missing; install libaio-dev (libaio-devel)"
    for name in ("pin_memory", builder.name):
        lock = Path(cpp_extension._get_build_directory(name, verbose=False)) / "lock"
        with contextlib.suppress(FileNotFoundError):
            while time.time() - lock.stat().st_mtime < MOST_BUILD_S:
                time.sleep(1)
            # torch itself would wait for ever on what a killed build left
            return f"{lock} says that they are being built, for more than 10 minutes; remove it"
    return None


def _swap_folders(config: dict[str, Any]) -> list[SwapFolder]:
    """Give each section that swaps to files a directory that no other run writes to."""
    sections = nvme_sections(config)
    folders = {path: SwapFolder(Path(path)) for path in {section["nvme_path"] for section in sections}}
    for section in sections:
        section["nvme_path"] = str(folders[section["nvme_path"]].path)
    return list(folders.values())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's start-up chatter off the console."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(previous)
