"""The books of a run: what its meters read goes to the ledger, and a budget that is used up ends it."""

from __future__ import annotations

import time
from typing import Any

from .config import ResolvedRun
from .console import RunConsole
from .errors import ConfigError
from .meters.budget import used_up
from .meters.ledger import Ledger
from .meters.meters import Meters
from .meters.nvml import NvmlError
from .meters.power_limit import PowerLimit
from .rundir import RunDirectory
from .runtime import Runtime

BOOK_EVERY_S = 5.0  # between bookings where lines are rarer: what a kill may hide, and a budget overrun


class Accounts:
    """Every rank has one; rank 0's has the ledger."""

    def __init__(
        self, resolved: ResolvedRun, runtime: Runtime, directory: RunDirectory | None, console: RunConsole
    ) -> None:
        """Open the meters."""
        self._run, self._runtime = resolved.run, runtime
        self._directory, self._console = directory, console
        self.meters = Meters(resolved, runtime)
        self.used_up: str | None = None  # what of the budget; rank 0 knows
        self._booked_s = time.monotonic()
        self._limit: PowerLimit | None = None
        self._limit_waits = False

    @property
    def ledger(self) -> Ledger | None:
        """The totals, on rank 0."""
        return self._directory.ledger if self._directory is not None else None

    def check(self) -> None:
        """See before anything is written down that the run may go on; every rank calls this.

        Raises:
            ConfigError: the budget is used up already, or asks for energy that nothing here reads; or the GPUs do not
                take the power limit.
        """
        problems = self._runtime.gather_all((self._problem(), self._limit_problem()))
        if problem := next((one for pair in problems for one in pair if one), None):
            self.close()
            raise ConfigError(problem)

    def begin(self) -> None:
        """Say what is metered and how, and measure the idle devices where that is asked for; every rank calls this."""
        self._console.say(f"energy: {self.meters.energy_note}")
        self._console.say(f"FLOPs: {self.meters.flops_note}")
        if note := self.meters.dtype_note:
            self._console.say(f"warning: {note}")
        if (idle_s := self._run.meter.idle_s) > 0:
            self._console.say(f"measuring the idle devices for {idle_s:g} s")
            watts = self.meters.measure_idle(idle_s)
            if self.ledger is not None:
                self.ledger.idle_w = watts
            self._console.say("idle: n/a" if watts is None else f"idle: {watts:.0f} W")
        self._set_limit(0)
        self.meters.restart(self.ledger)
        self._booked_s = time.monotonic()

    def _limit_problem(self) -> str | None:
        """Prepare the power limit of this rank's GPUs; say why there can be none."""
        watts = self._run.meter.power_limit_w
        if watts is None:
            return None
        ranks: list[tuple[str, ...]] = self._runtime.gather_all(self.meters.gpus)
        if not any(ranks):
            return f"meter.power_limit_w = {watts:g}: there is no GPU; leave it out"
        try:
            self._limit = PowerLimit(self.meters.gpus, watts)
        except ConfigError as error:
            return str(error)
        self._limit_waits = True
        return None

    def _set_limit(self, step: int) -> None:
        """Set the power limit once its step has come."""
        if self._limit is None or not self._limit_waits or step < self._run.meter.power_limit_from_step:
            return
        self._limit_waits = False
        try:
            told = self._limit.set()
        except NvmlError as error:
            told = f"power limit not set: {error}"
        self._tell(step, "power", told)

    def _tell(self, step: int, event: str, message: str) -> None:
        if self._directory is not None:
            self._directory.event(step, event, message)
            self._console.say(message)

    def _problem(self) -> str | None:
        if self._directory is None:
            return None
        needs_energy = self._run.budget.kwh is not None or (
            self._run.budget.cost is not None and self._run.meter.price_per_kwh is not None
        )
        if needs_energy and self.meters.reads_nothing:
            return (
                f"[budget] needs joules, and nothing here reads any ({self.meters.energy_note}); set meter.watts to "
                "what a host draws, or leave budget.kwh and meter.price_per_kwh out"
            )
        costs_nothing = self._run.meter.price_per_kwh is None and not self.meters.gpus
        if self._run.budget.cost is not None and costs_nothing:
            return (
                f"budget.cost = {self._run.budget.cost:g}: there is no GPU whose hours would cost anything, and no "
                "meter.price_per_kwh; set it, or leave budget.cost out"
            )
        if reason := used_up(self._run.budget, self._directory.ledger, self.meters.tariff):
            return f"{reason} by {self._directory.path}; raise it to go on"
        return None

    def line(self, step: int) -> dict[str, Any]:
        """Give the figures since the last line, book them, and look at the budget; every rank calls this."""
        figures = self.meters.line(self.ledger)
        self._look(step)
        self._set_limit(step)
        return figures

    def flags(self) -> tuple[bool, bool]:
        """Tell whether the budget is used up, and whether it is time to book; rank 0 knows."""
        due = self._directory is not None and time.monotonic() - self._booked_s >= BOOK_EVERY_S
        return self.used_up is not None, due

    def book(self, step: int) -> None:
        """Bring the ledger up to date between lines, for whom a kill may leave no other chance; on every rank."""
        self.meters.book(self.ledger)
        self._look(step)
        if self._directory is not None:
            self._directory.save_ledger()

    def _look(self, step: int) -> None:
        """See what is left of the budget."""
        self._booked_s = time.monotonic()
        if self._directory is not None and self.used_up is None:
            self.used_up = used_up(self._run.budget, self._directory.ledger, self.meters.tariff)
            if self.used_up is not None:
                self._tell(step, "budget", f"{self.used_up}: stopping after the next step, saved")

    def finish(self) -> None:
        """Book what came after the last line; every rank calls this."""
        self.meters.restart(self.ledger)
        self.used_up = self._runtime.broadcast(self.used_up)

    def stop_message(self, step: int) -> str:
        """Say why the run stops before its end, and how it goes on."""
        if self.used_up is None:
            return f"stopped after step {step}, saved; the same command goes on"
        return f"stopped after step {step}, saved: {self.used_up}; raise it and the same command goes on"

    def close(self) -> None:
        """Stop sampling, and give the GPUs their own limits back."""
        if self._limit is not None:
            self._limit.close()
            self._limit = None
        self.meters.close()
