"""What the processes of a launch read: `RUN/launch/job.json`. Imports no torch.

Every launcher starts the same command with the place of that file and nothing else: no value of a user passes through
a shell, ssh or a scheduler. The place itself goes as base64, which no shell reads as anything else.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ...data.storage import write_atomic
from ...trainer.errors import ConfigError

FOLDER, CHECK, SECRETS = "launch", "check", "secrets.json"
PRIVATE = 0o600


@dataclass(frozen=True)
class Job:
    """A run, and how it lies over nodes; between `min_nodes` and `max_nodes` it goes on with what there is.

    `endpoint` is the host:port that nodes meet at, where it is known before they start. `environment` are the variables
    that every rank gets, `secrets` the names of those that `secrets.json` beside the file holds. `preflight` are the
    limits of the checks before training; with `check`, there is nothing but them.
    """

    name: str
    backend: str
    run_file: str
    run_dir: str
    min_nodes: int
    max_nodes: int
    processes_per_node: int
    overrides: list[str] = field(default_factory=list)
    resume: str | None = None
    check: bool = False
    debug: bool = False
    endpoint: str | None = None
    interface: str | None = None
    max_restarts: int = 3
    environment: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    preflight: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of the backend

    @property
    def folder(self) -> Path:
        """Where the launch keeps its files; one that only checks touches nothing of a run's."""
        return Path(self.run_dir) / (CHECK if self.check else FOLDER)

    @property
    def logs(self) -> Path:
        """Where ranks write what they say."""
        return (self.folder if self.check else Path(self.run_dir)) / "logs"

    @property
    def path(self) -> Path:
        """Where this is written."""
        return self.folder / "job.json"

    @property
    def token(self) -> str:
        """The path as an argument that is the same under every shell."""
        return encode(self.path)

    def as_json(self) -> str:
        """Give the file's text."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def write(self, secrets: dict[str, str]) -> None:
        """Write the file, and the secrets into one that only this user can read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if secrets:
            _write_private(self.folder / SECRETS, json.dumps(secrets).encode())
        write_atomic(self.path, self.as_json().encode())

    def read_secrets(self) -> dict[str, str]:
        """Read the secrets; none where the pods of a cluster bring them along."""
        path = self.folder / SECRETS
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def forget_secrets(self) -> None:
        """Remove the secrets, once no start can need them."""
        (self.folder / SECRETS).unlink(missing_ok=True)


def read_job(path: Path) -> Job:
    """Read the file.

    Raises:
        ConfigError: it is not there, or no launch wrote it.
    """
    try:
        return Job(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: not there on {os.uname().nodename}; the run directory must be on a disk that all nodes share"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: is no launch's file: {error}") from error


def encode(path: PurePath) -> str:
    """Write a path in letters, digits, - and _ alone."""
    return base64.urlsafe_b64encode(os.fsencode(path)).decode().rstrip("=")


def decode(token: str) -> Path:
    """Read what `encode` wrote."""
    return Path(os.fsdecode(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))))


def new_name(stem: str, shared: str | None = None) -> str:
    """Name a launch as DNS labels, Slurm and files take it: by the run, and the time or what its nodes share."""
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stem.lower()).strip(
        "-"
    )
    if not kept[:1].isalpha():  # a Service of Kubernetes begins with a letter
        kept = f"run-{kept}"
    mark = time.strftime("%m%d-%H%M%S") if shared is None else hashlib.sha256(shared.encode()).hexdigest()[:11]
    return f"{kept[:32].strip('-')}-{mark}"


def _write_private(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # whoever may read an older one
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
