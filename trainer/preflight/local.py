"""What a rank can see of its own node without any other: each check gives a problem with its fix, or None."""

from __future__ import annotations

import ipaddress
import os
import resource
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...data.errors import DataConfigError, DataError, DataStorageError
from ...data.reading.reader import RangeReader
from ...data.shards import open_filled_shard_set
from ...data.storage import write_atomic
from ...model.families import layout_of
from ..checkpoint.format import LEFTOVERS
from ..checkpoint.opening import CHECKPOINTS
from ..checkpoint.saver import checkpoint_bytes, space_problem
from ..config import ResolvedRun
from ..errors import message_of
from ..places import DataPlaces

STALE_S = 600.0  # no build takes so long
MIN_SHM_BYTES = 1 << 30
OWN_FILES, FILES_PER_PEER = (
    256,
    3,
)  # a rank's files and modules; the store, gloo and NCCL towards each other rank
WRITTEN_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its launch."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str

    @property
    def has_peers_elsewhere(self) -> bool:
        """Tell whether other nodes belong to the launch."""
        return self.world_size > self.local_world_size


def host_name_problem(place: Place, chosen: Mapping[str, str]) -> str | None:
    """See that other nodes can reach what this host's name stands for, where no interface was chosen: gloo takes it."""
    if not place.has_peers_elsewhere or "GLOO_SOCKET_IFNAME" in chosen:
        return None
    try:
        address = socket.getaddrinfo(place.host, None, type=socket.SOCK_STREAM)[0][4][0]
        told = f"resolves to {address}"
    except OSError:
        address, told = "127.0.0.1", "has no address"
    if not ipaddress.ip_address(str(address).partition("%")[0]).is_loopback:
        return None
    return (
        f"the host name {place.host} {told}, where other nodes cannot connect: set `interface` in the cluster file to "
        f"one of {_shown_interfaces()}, or mend /etc/hosts"
    )


def interface_problem(place: Place, chosen: Mapping[str, str]) -> str | None:
    """See that interfaces that were chosen by name are there, and lead to the other nodes."""
    there = psutil.net_if_addrs()
    for variable, value in chosen.items():
        if value.startswith("^"):  # NCCL: all but these
            continue
        names = value.lstrip("=").split(",")
        begins = variable.startswith("NCCL") and not value.startswith("=")  # NCCL: all that begin so
        found = [one for one in there for name in names if one == name or (begins and one.startswith(name))]
        if not found:
            return f"{variable}={value}: there is no such interface here; there are {_shown_interfaces()}"
        if place.has_peers_elsewhere and set(found) == {"lo"}:
            return f"{variable}={value}: no other node can connect there; choose one of {_shown_interfaces()}"
    return None


def _shown_interfaces() -> str:
    addresses = {
        name: [entry.address for entry in entries if entry.family == socket.AF_INET]
        for name, entries in psutil.net_if_addrs().items()
        if name != "lo"
    }
    return ", ".join(f"{name} ({' '.join(found)})" for name, found in addresses.items() if found) or "none"


def run_directory_problem(run_dir: Path, place: Place, resolved: ResolvedRun | None) -> str | None:
    """Write and sync a file in the run directory; where the run is known, see that a checkpoint fits, too."""
    path = run_dir / f".preflight-write-{place.rank}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, bytes(WRITTEN_BYTES))
        path.unlink()
    except (OSError, DataError) as error:
        return f"run directory {run_dir}: {message_of(error)}"
    # Before the run looks for room, it removes what a killed one left.
    if resolved is None or any((run_dir / CHECKPOINTS).glob(LEFTOVERS)):
        return None
    return space_problem(run_dir, checkpoint_bytes(layout_of(resolved.run.model)))


def shared_memory_problem(place: Place, uses_gpus: bool, folder: Path = Path("/dev/shm")) -> str | None:
    """See that NCCL has room for what GPUs of one node exchange."""
    if not uses_gpus or place.local_world_size == 1:
        return None
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if free >= MIN_SHM_BYTES:
        return None
    return (
        f"{folder} has {free / 1e9:.2f} GB free and NCCL needs {MIN_SHM_BYTES / 1e9:.2f} GB: give the container more "
        "(--shm-size, or an emptyDir of medium Memory)"
    )


def open_files_problem(place: Place) -> str | None:
    """See that a rank can hold a connection to every other."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OWN_FILES + FILES_PER_PEER * place.world_size
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return None
    return (
        f"ulimit -n is {limit}, and a rank of {place.world_size} needs {needed}: raise it in "
        "/etc/security/limits.conf, or LimitNOFILE of the service that starts jobs"
    )


def stale_lock_problem(folder: Path) -> str | None:
    """Find a lock that a killed build of a torch extension left: whoever needs the extension waits for it for ever."""
    for lock in sorted([*folder.glob("*/lock"), *folder.glob("*/*/lock")]):
        try:
            age_s = time.time() - lock.stat().st_mtime
        except OSError:  # the build has just ended
            continue
        if age_s > STALE_S:
            return (
                f"{lock} is {age_s / 60:.0f} minutes old: a killed build left it, and DeepSpeed would wait for it for "
                "ever; remove it"
            )
    return None


def data_problem(resolved: ResolvedRun, places: DataPlaces) -> str | None:
    """Read the first chunk of every place of the data, or the last one: single damage is for the run's quarantine."""
    reader = RangeReader(resolved.run.reading)
    for name, found in places.train.items():
        for shards in found:
            try:
                shard_set = open_filled_shard_set(shards, reader)
                try:
                    shard_set.read_chunk(0)
                except (DataConfigError, DataStorageError):
                    raise
                except DataError:
                    shard_set.read_chunk(shard_set.num_chunks - 1)
            except (DataError, OSError) as error:
                return f"data of source {name} cannot be read: {message_of(error)}"
    return None


def host_name() -> str:
    """Give the name of this host."""
    return os.uname().nodename
