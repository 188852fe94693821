"""Processes and groups: what a worker is, whom it talks to, and Megatron-core's schedules.

The only module outside model/ that speaks to Megatron-core, and the only one in trainer/ that reads the environment.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from ..model import cpu

TIMEOUT = timedelta(minutes=30)  # of every group: subgroups do not inherit it
RENDEZVOUS = "BASESTONE_RENDEZVOUS"  # a file that local workers meet at: no port, hence no race for one


@dataclass(frozen=True)
class Runtime:
    """Who this worker is and the groups it belongs to.

    `embedding_group` joins the ranks of the first and the last stage with the same piece, and is None on others;
    `pp_group` joins the ranks of all stages with the same piece;
    `model_group` joins the ranks of a model replica; `control` is a CPU group over all ranks for small objects.
    """

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    embedding_group: dist.ProcessGroup | None
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def reads_data(self) -> bool:
        """Tell whether this rank reads for its model replica; the others get a broadcast."""
        return dist.get_rank(self.model_group) == 0

    @property
    def on_cpu(self) -> bool:
        """Tell whether training runs on the CPU."""
        return self.device.type == "cpu"

    def gather(self, value: Any) -> list[Any] | None:
        """Collect one small object per rank on rank 0, in rank order; None elsewhere."""
        out: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, out, dst=0, group=self.control)
        return out

    def gather_all(self, value: Any) -> list[Any]:
        """Collect one small object per rank on every rank."""
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value, group=self.control)
        return out

    def broadcast(self, value: Any) -> Any:
        """Give every rank the object of rank 0."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


class Mpu:
    """What DeepSpeed asks of a model-parallel unit, answered by Megatron-core.

    Megatron's module itself lacks half of these names.
    """

    @staticmethod
    def get_data_parallel_group() -> dist.ProcessGroup:
        """Ranks that hold the same piece of the model."""
        return parallel_state.get_data_parallel_group()

    @staticmethod
    def get_data_parallel_rank() -> int:
        """This rank's place among them."""
        return parallel_state.get_data_parallel_rank()

    @staticmethod
    def get_data_parallel_world_size() -> int:
        """How many they are."""
        return parallel_state.get_data_parallel_world_size()

    @staticmethod
    def get_data_parallel_group_ranks() -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())

    @staticmethod
    def get_model_parallel_group() -> dist.ProcessGroup:
        """Ranks that hold one replica of the model together: tensor x pipeline."""
        return parallel_state.get_model_parallel_group()

    @staticmethod
    def get_model_parallel_rank() -> int:
        """This rank's place in its replica."""
        return dist.get_rank(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_model_parallel_world_size() -> int:
        """Ranks of one replica."""
        return dist.get_world_size(parallel_state.get_model_parallel_group())

    @staticmethod
    def get_tensor_model_parallel_group() -> dist.ProcessGroup:
        """Ranks that cut the same layers."""
        return parallel_state.get_tensor_model_parallel_group()

    @staticmethod
    def get_tensor_model_parallel_rank() -> int:
        """This rank's place among them."""
        return parallel_state.get_tensor_model_parallel_rank()

    @staticmethod
    def get_tensor_model_parallel_world_size() -> int:
        """How many they are."""
        return parallel_state.get_tensor_model_parallel_world_size()

    get_slice_parallel_world_size = get_tensor_model_parallel_world_size

    @staticmethod
    def get_pipeline_model_parallel_group() -> dist.ProcessGroup:
        """Ranks of one pipeline."""
        return parallel_state.get_pipeline_model_parallel_group()

    @staticmethod
    def get_pipeline_model_parallel_rank() -> int:
        """This rank's stage."""
        return parallel_state.get_pipeline_model_parallel_rank()

    @staticmethod
    def get_pipeline_model_parallel_world_size() -> int:
        """Stages."""
        return parallel_state.get_pipeline_model_parallel_world_size()


def start(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int = 1,
    deterministic: bool = False,
    store: dist.Store | None = None,
    timeout: timedelta = TIMEOUT,
) -> Runtime:
    """Join the processes that a launcher started (or be the only one) and make Megatron's groups.

    A rank that waits for the others for longer than `timeout` gives up; Megatron's groups count whole minutes.
    A launcher is seen by RANK and WORLD_SIZE in the environment: our own, torchrun, deepspeed and srun set them.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        cpu.install_shims()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    device = meet(store, timeout)
    join_groups(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual_pipeline, timeout=timeout)
    return _runtime(device, timeout)


def meet(store: dist.Store | None = None, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the processes that a launcher started, or be the only one; give this one's device.

    The ranks meet at `store` where one was opened before. After it torch.distributed is there, and nobody who starts it
    themselves (accelerate, DeepSpeed) starts it anew.
    """
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _join(backend_of(device), device, store or open_store(), timeout)
    return device


def own_device() -> torch.device:
    """Give the device of this worker: the GPU of its number on the host, or the CPU where there is none."""
    number = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on it
    return torch.device("cuda", number) if torch.cuda.is_available() else torch.device("cpu")


def backend_of(device: torch.device) -> str:
    """Give what connects ranks on such devices."""
    return "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"


def _join(backend: str, device: torch.device, store: dist.Store, timeout: timedelta) -> None:
    device_id = None if device.type == "cpu" else device
    dist.init_process_group(
        backend, store=store, rank=rank(), world_size=world_size(), timeout=timeout, device_id=device_id
    )


def open_store(timeout: timedelta = TIMEOUT) -> dist.Store:
    """Open the store that the ranks of this start meet at, waiting no longer than `timeout` for rank 0's."""
    if path := os.environ.get(RENDEZVOUS):
        return dist.FileStore(path, world_size())
    if "RANK" not in os.environ:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own, with its keys for each start
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        return store
    # That of env:// would not open before all ranks are there, and nobody could say who is missing.
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(host, port, world_size(), rank() == 0, timeout, wait_for_workers=False)


def become_rank(rank: int, size: int, rendezvous: Path) -> None:
    """Make this process, forked from one that belongs to no group, rank `rank` of `size` local ones."""
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size)})
    os.environ.update({"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)})
    os.environ[RENDEZVOUS] = str(rendezvous)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def join_groups(
    *, tensor: int, pipeline: int = 1, virtual_pipeline: int = 1, timeout: timedelta = TIMEOUT
) -> None:
    """Make Megatron's groups for a layout, replacing those of an earlier one."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, math.ceil(timeout.total_seconds() / 60)),
    )


def _runtime(device: torch.device, timeout: timedelta) -> Runtime:
    return Runtime(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        model_group=parallel_state.get_model_parallel_group(),
        control=dist.new_group(backend="gloo", timeout=timeout),
    )


def stop() -> None:
    """Leave all groups; call it at an orderly end only, never after an exception."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed_step(seed: int, step: int, runtime: Runtime) -> None:
    """Seed every generator for one step: dropout depends on (seed, step, place in the layout) and on no history.

    So nothing random has to be saved, and a resumed run draws what an uninterrupted one would.
    """
    place = (runtime.dp_rank, runtime.pp_rank)
    shared = _hash(seed, step, *place)  # the same on the ranks that cut the same layers
    random.seed(shared)
    torch.manual_seed(shared)
    tracker = tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    names = tensor_parallel.random
    if not runtime.on_cpu:
        torch.cuda.manual_seed(shared)
    tracker.add(names._DATA_PARALLEL_RNG_TRACKER_NAME, shared)
    tracker.add(names._MODEL_PARALLEL_RNG_TRACKER_NAME, _hash(seed, step, *place, runtime.tp_rank))


def _hash(*values: int) -> int:
    digest = hashlib.sha256(repr(values).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def run_schedule(
    forward_step: Callable[[Iterator[Any], nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict]]]],
    chunks: Sequence[nn.Module],
    micro_batches: Sequence[Any],
    *,
    sequence_length: int,
    micro_batch: int,
    forward_only: bool = False,
) -> list[dict[str, Tensor]]:
    """Run Megatron-core's schedule over the micro-batches: none, 1F1B or interleaved, as the groups are.

    Returns:
        What the loss function reported for each; nothing on ranks without the last stage.
    """
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch,
        forward_only=forward_only,
    )


def cache_dir() -> Path:
    """Give the directory for what can be made again: $XDG_CACHE_HOME/basestone, else ~/.cache/basestone."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "basestone"


def pickles_are_opened() -> bool:
    """Tell whether the environment lets torch.load run what a file says."""
    return os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0") not in ("", "0")


def find_own_programs() -> None:
    """Let programs that were installed beside this Python be found (ninja), where its environment is not activated."""
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def announce_deepspeed() -> None:
    """Tell accelerate that ranks without a GPU are DeepSpeed's, too: it asks the environment and no argument."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


def leave_launcher() -> None:
    """Make the only process of a launcher a plain one, for libraries that would wrap its model for many."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", RENDEZVOUS):
        os.environ.pop(name, None)


def visible_gpus() -> list[str]:
    """Give the GPU of this worker as NVML knows it; empty on a CPU."""
    if not torch.cuda.is_available():
        return []
    return [f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"]


def environment_on_cpu() -> dict[str, str]:
    """Give the environment for a process beside this one that is no rank and leaves the GPUs alone."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", RENDEZVOUS)
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def rank() -> int:
    """Give which of the launcher's workers this is; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Give how many workers the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Give which of the host's workers this is; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Give how many workers the launcher started on this host, as far as it says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def socket_interfaces() -> dict[str, str]:
    """Give the variables that say which network interfaces gloo and NCCL use, where they are set."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def extensions_dir() -> Path:
    """Give where torch builds extensions, DeepSpeed's among them."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
