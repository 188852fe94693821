"""Hostfiles: `name slots=N`, one host a line, as DeepSpeed and MPI have them. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...trainer.errors import ConfigError

HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?")
EXAMPLE = "e.g. `worker-1 slots=8`"


@dataclass(frozen=True)
class Host:
    """A node, and how many processes it takes."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Read a hostfile; `#` begins a comment.

    Raises:
        ConfigError: it is not there or empty, or lines are malformed: all of them, each with its number and reason.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such hostfile") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a hostfile: {error}") from error
    hosts: dict[str, Host] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        problem = _problem(words, hosts)
        if problem:
            problems.append(f"  line {number}: {line.strip()!r}: {problem}")
        else:
            hosts[words[0]] = Host(words[0], int(words[1].removeprefix("slots=")))
    if problems:
        raise ConfigError(f"{path}: {len(problems)} bad line(s)\n" + "\n".join(problems))
    if not hosts:
        raise ConfigError(f"{path}: names no host; one a line, {EXAMPLE}")
    slots = {host.slots for host in hosts.values()}
    if len(slots) > 1:
        named = ", ".join(f"{host.name} {host.slots}" for host in list(hosts.values())[:8])
        raise ConfigError(
            f"{path}: every host needs as many slots as the others (got {named}); ranks are numbered by it"
        )
    return list(hosts.values())


def _problem(words: list[str], hosts: dict[str, Host]) -> str | None:
    name = words[0]
    if not HOST.fullmatch(name):
        return f"{name!r} is no host name or address; ports and lists belong elsewhere, {EXAMPLE}"
    if len(words) != 2 or not re.fullmatch(r"slots=[1-9]\d{0,3}", words[1]):
        return f"after the name comes slots=N, N from 1 to 9999, without blanks, {EXAMPLE}"
    if name in hosts:
        return "the host was named before"
    return None
