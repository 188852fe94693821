"""Weights & Biases, online where there is a key and a network, else in files that `wandb sync` uploads later."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from .sink import evaluation_scalars, load_extra, step_scalars

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 300.0  # what was not uploaded by then lies in the run directory


class WandbSink:
    """A run there has the run's own id, so that a resumed run goes on in the same one."""

    name = "Weights & Biases"

    def __init__(self, project: str, run_dir: Path, config: dict[str, Any], last_step: int) -> None:
        """Take what describes the run; nothing is opened.

        Raises:
            ConfigError: wandb is not installed.
        """
        self._wandb: Any = load_extra("wandb", extra="wandb", key="meter.wandb_project")
        self._project, self._run_dir, self._config, self._last_step = project, run_dir, config, last_step
        self._run: Any = None
        self._step = 0
        self._excepthook: Any = None

    def begin(self, run_id: str, step: int) -> str:
        """Open the run: WANDB_MODE decides, else whether there is a key and an answer."""
        wandb = self._wandb
        self._excepthook = sys.excepthook
        try:
            mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
        except ValidationError as error:  # of its variables; wandb's own text has many lines
            raise ConfigError(
                "; ".join(f"WANDB_{_name(one)}: {one['msg']}" for one in error.errors())
            ) from error
        if mode == "disabled":
            return f"{self.name}: off, by WANDB_MODE={mode}"
        why = f"mode {mode}"
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            mode, why = self._go_offline(), "offline, as there is no key"
        try:
            self._run = self._init(run_id, mode)
        except wandb.errors.CommError as error:
            mode, why = self._go_offline(), f"offline, as the server gives no access ({_brief(error)})"
            self._run = self._init(run_id, mode)
        if not self._run.offline:
            return f"{self.name}: {self._run.url}"
        return f"{self.name}: {why}; to upload: wandb sync {Path(self._run.dir).parent}"

    def _go_offline(self) -> str:
        """Begin anew: what was set up online holds the run's id, and would report on itself over the network."""
        self._wandb.teardown()
        return self._wandb.setup(self._wandb.Settings(silent=True, mode="offline")).settings.mode

    def _init(self, run_id: str, mode: str) -> Any:
        wandb = self._wandb
        return wandb.init(
            project=self._project,
            id=run_id,
            name=self._run_dir.resolve().name,
            resume="allow",
            mode=mode,
            dir=str(self._run_dir),
            config=self._config,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,  # the address of a repository may hold a password
                disable_code=True,
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
            ),
        )

    def step(self, record: dict[str, Any]) -> None:
        """Log a step."""
        self._log(step_scalars(record), record["step"])

    def evaluation(self, record: dict[str, Any]) -> None:
        """Log a held-out set."""
        self._log(evaluation_scalars(record), record["step"])

    def _log(self, scalars: dict[str, float], step: int) -> None:
        self._step = step
        if self._run is not None:
            self._run.log(scalars, step=step)

    def close(self) -> None:
        """End the run, as finished only after its last step, and the process that wandb started."""
        if self._excepthook is None:
            return
        try:
            if self._run is not None:
                self._run.finish(exit_code=0 if self._step == self._last_step else 1)
        finally:
            self._wandb.teardown()
            sys.excepthook, self._excepthook, self._run = self._excepthook, None, None


def _name(error: Any) -> str:
    return ".".join(map(str, error["loc"])).upper()


def _brief(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
