"""The GPUs of a node, as torch and the driver see them."""

from __future__ import annotations

import torch

from ..meters.nvml import Nvml, NvmlError
from .local import Place

MIN_FREE = 0.9  # of a GPU's memory


def gpu_problems(place: Place) -> list[str]:
    """See that this rank has a GPU, that nobody else holds it, and that its memory is sound."""
    if not torch.cuda.is_available():
        boards = _num_boards()
        if not boards:
            return []
        return [
            f"the driver has {boards} GPU(s) and torch sees none: look at CUDA_VISIBLE_DEVICES, and whether this torch "
            f"({torch.__version__}) is one for CUDA and for the driver"
        ]
    seen = torch.cuda.device_count()
    if seen < place.local_world_size:
        return [
            f"{place.local_world_size} processes a node, and torch sees {seen} GPU(s): ask the scheduler for more, "
            "look at CUDA_VISIBLE_DEVICES, or lower --processes-per-node"
        ]
    free, total = torch.cuda.mem_get_info(place.local_rank)
    problems = []
    if free < MIN_FREE * total:
        problems.append(
            f"GPU {place.local_rank} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free: another process holds the "
            "rest; nvidia-smi shows which"
        )
    return problems + _memory_errors(place.local_rank)


def _memory_errors(number: int) -> list[str]:
    try:
        nvml = Nvml()
    except NvmlError:
        return []
    try:
        gpu = nvml.gpu(f"GPU-{torch.cuda.get_device_properties(number).uuid}")
        return memory_problems(number, gpu.uncorrected_errors())
    except NvmlError:  # a board without ECC
        return []
    finally:
        nvml.close()


def memory_problems(number: int, num_errors: int) -> list[str]:
    """Say that the memory of a GPU cannot be trusted."""
    if not num_errors:
        return []
    return [
        f"GPU {number} has {num_errors} uncorrected memory error(s): take the node out, and reset the GPU (nvidia-smi "
        "--gpu-reset) or have it replaced"
    ]


def gpu_facts() -> dict[str, str]:
    """Give what must be the same on all nodes: the GPUs, CUDA, NCCL and the driver; "none" where there are none."""
    facts = {"CUDA": str(torch.version.cuda or "none"), "NCCL": "none", "driver": "none", "GPUs": "none"}
    if not torch.cuda.is_available():
        return facts
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    facts["GPUs"] = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    try:
        nvml = Nvml()
        facts["driver"] = nvml.driver()
        nvml.close()
    except NvmlError:
        facts["driver"] = "unknown"
    return facts


def _num_boards() -> int:
    try:
        nvml = Nvml()
    except NvmlError:
        return 0
    try:
        return nvml.num_gpus()
    except NvmlError:
        return 0
    finally:
        nvml.close()
