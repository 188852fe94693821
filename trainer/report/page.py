"""The page about one run or several: one file without network or script, drawn from the files of the run directories.

Reads nothing but those files, so it can be made while a run goes on, after it, and on another machine.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...data.storage import storage_errors, write_atomic
from ..errors import ConfigError
from .advice import advise
from .comparison import NamedRun, comparison, labels_of
from .costs import energy_section
from .elements import section, table
from .losses import loss_section
from .records import read_records, require_run
from .sections import (
    advice_list,
    config_section,
    data_section,
    events_section,
    headline,
    memory_section,
    optimisation_section,
    period,
    throughput_section,
)
from .style import style_sheet
from .summary import summarise

ONE, SEVERAL = "report.html", "comparison.html"
OWN_SIGNS = ("metrics.jsonl", "ledger.json", "run_id")  # a run.toml lies in directories of people, too


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of one or several run directories to `out`; gives the path.

    By default that is report.html in the run directory, of several comparison.html in the current one. What is
    missing in a run's files is missing in the report. Raises ConfigError where one is no run directory or is given
    twice, or `out` is no place for a page; DataStorageError where it cannot be written.
    """
    for i, run_dir in enumerate(run_dirs):
        require_run(run_dir)
        if run_dir.resolve() in [other.resolve() for other in run_dirs[:i]]:
            raise ConfigError(f"{run_dir}: is given twice; give each run directory once")
    if out is None:
        out = run_dirs[0] / ONE if len(run_dirs) == 1 else Path(SEVERAL)
    _check_place(out, run_dirs)
    runs = []
    for label, run_dir in zip(labels_of(run_dirs), run_dirs, strict=True):
        records = read_records(run_dir)
        runs.append(NamedRun(label, records, summarise(records)))
    page = render_report(runs)
    with storage_errors(f"writing the report {out}"):
        write_atomic(out, page.encode("utf-8", errors="replace"))
    return out


def _check_place(out: Path, run_dirs: Sequence[Path]) -> None:
    """Refuse what a page would destroy, and what can hold none."""
    if out == Path("-"):
        raise ConfigError(f"--out -: a page goes to a file; give its name, e.g. {ONE}")
    if out.is_dir():
        raise ConfigError(f"{out}: is a directory; give the file to write, e.g. {out / ONE}")
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out}: is a device or a pipe, which a page would replace; give a file, e.g. {ONE}")
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no directory {out.parent}; make it, or give another file")
    above = out.parent.resolve()
    given = [run_dir.resolve() for run_dir in run_dirs]
    for folder in (above, *above.parents):
        is_run = folder in given or any((folder / name).exists() for name in OWN_SIGNS)
        if is_run and out.suffix.lower() != ".html":
            raise ConfigError(
                f"{out}: the files of the run {folder} are its own; give a name that ends in .html"
            )


def render_report(runs: Sequence[NamedRun]) -> str:
    """Make the page: of one run its sections; of several the comparison, and the sections of each folded away."""
    if len(runs) == 1:
        title = f"{runs[0].label}: training report"
        body = [f"<h1>{escape(runs[0].label)}</h1>", _run(runs[0])]
    else:
        title = f"{len(runs)} runs: training report"
        body = [f"<h1>{len(runs)} runs</h1>", _findings(runs), comparison(runs)]
        body += [f"<details><summary>{escape(run.label)}</summary>{_run(run)}</details>" for run in runs]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}</style></head>\n"
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _run(run: NamedRun) -> str:
    records, summary = run.records, run.summary
    parts = [
        f'<p class="soft">{escape(period(records))}</p>',
        headline(records, summary),
        advice_list(advise(records, summary)),
    ]
    if records.steps or records.evals:
        parts += [
            loss_section(records),
            optimisation_section(records),
            throughput_section(records),
            memory_section(records),
            energy_section(records, summary),
            data_section(records),
        ]
    return "\n".join([*parts, events_section(records), config_section(records)])


def _findings(runs: Sequence[NamedRun]) -> str:
    """Give the serious findings of all runs; what to do stands with each run."""
    rows = [
        [run.label, one.title, one.evidence]
        for run in runs
        for one in advise(run.records, run.summary)
        if one.serious
    ]
    return section("Warnings", table(["run", "warning", "evidence"], rows)) if rows else ""
