"""The preflight of one rank: its node, then what all ranks report, then what connects them."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch.distributed as dist

from ...data.errors import DataError
from ...data.storage import write_atomic
from .. import runtime as processes
from ..config import ResolvedRun
from ..errors import BasestoneError, message_of
from ..places import DataPlaces
from ..provenance import sources_sha256
from . import local
from .collectives import Collectives
from .gpus import gpu_facts, gpu_problems
from .judge import RUN, SOURCES, Report, SilentRanks
from .limits import CHECKED, PreflightSection
from .local import Place
from .meeting import Meeting

Opened = tuple[ResolvedRun, DataPlaces]
PACKAGES = ("torch", "deepspeed", "megatron-core")
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Passed:
    """A launch that may train: its store, its run, and what the checks found in one line."""

    store: dist.Store
    resolved: ResolvedRun
    places: DataPlaces
    summary: str


def check(
    open_run: Callable[[Callable[[str], None]], Opened], run_dir: Path, limits: PreflightSection
) -> Passed:
    """Check the ranks of this start.

    Args:
        open_run: opens the run; it is given a function to call whenever it comes forward, and what it raises is a
            problem of this rank.

    Raises:
        ConfigError: the same on every rank, with all that is wrong.
        SilentRanks: nothing is wrong but that ranks say nothing.
    """
    begun_s = time.perf_counter()
    place = Place(
        processes.rank(),
        processes.world_size(),
        processes.local_rank(),
        processes.local_world_size(),
        local.host_name(),
    )
    store = _open_store(place, limits)
    meeting = Meeting(dist.PrefixStore("preflight", store), place.rank, place.world_size, place.host, limits)
    opened, problems = _open(open_run, meeting)
    problems += _own_problems(place, run_dir, opened)
    report = Report(place.rank, place.host, place.local_rank, problems, _facts(opened))
    agreement = meeting.agree(report, run_dir)
    assert opened is not None
    told = [f"{len(agreement.nodes)} node(s), {place.world_size} rank(s)"]
    if len(agreement.nodes) > 1:
        told.append(f"clocks within {agreement.skew_s * 1e3:.1f} ms")
    if place.world_size > 1:
        group = Collectives(
            dist.PrefixStore("preflight", store),
            meeting,
            processes.own_device(),
            *(place.rank, place.world_size, place.host, limits),
        )
        rate = group.check(agreement.nodes)
        group.close()
        told.append(f"all-reduce {rate / 1e9:.3g} GB/s at {group.sizes[-1] >> 20} MiB")
    told.append(f"{time.perf_counter() - begun_s:.1f} s")
    meeting.end()
    store.set_timeout(processes.TIMEOUT)
    return Passed(store, *opened, ", ".join(told))


def leave_passed(run_dir: Path, summary: str) -> None:
    """Leave the mark of a launch that was only checked."""
    write_atomic(run_dir / CHECKED, f"{summary}\n".encode())


def _open_store(place: Place, limits: PreflightSection) -> dist.Store:
    try:
        return processes.open_store(timedelta(seconds=2 * limits.report_s))
    except dist.DistError as error:
        raise SilentRanks(
            f"preflight: {place.host}, rank {place.rank}: no contact with rank 0: {str(error).splitlines()[0]}; look "
            "whether its node is up, and at the firewall between the nodes"
        ) from error


def _open(
    open_run: Callable[[Callable[[str], None]], Opened], meeting: Meeting
) -> tuple[Opened | None, list[str]]:
    try:
        return open_run(lambda _: meeting.sign()), []
    except (BasestoneError, DataError, OSError) as error:
        return None, [message_of(error)]


def _own_problems(place: Place, run_dir: Path, opened: Opened | None) -> list[str]:
    """List what is wrong here; what is the node's and not the rank's, one rank of the node looks for."""
    problems: list[str | None] = [*gpu_problems(place), local.open_files_problem(place)]
    if place.local_rank == 0:
        chosen = processes.socket_interfaces()
        uses_gpus = processes.own_device().type == "cuda"
        problems += [
            local.host_name_problem(place, chosen),
            local.interface_problem(place, chosen),
            local.shared_memory_problem(place, uses_gpus),
            local.stale_lock_problem(processes.extensions_dir()),
        ]
        problems.append(local.run_directory_problem(run_dir, place, opened[0] if opened is not None else None))
        problems.append(local.data_problem(*opened) if opened is not None else None)
    return [problem for problem in problems if problem is not None]


def _facts(opened: Opened | None) -> dict[str, str]:
    facts = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES} | gpu_facts()
    facts[SOURCES] = sources_sha256(ROOT)[:12]
    if opened is not None:
        sections = opened[0].run.model_dump(mode="json")
        facts |= {f"{RUN} [{name}]": _hash(section) for name, section in sections.items()}
    return facts


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
