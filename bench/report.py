"""The report of a long run: its size, and the seconds to make it and to open it in Chromium.

python bench/report.py [--steps 100000] [--events 2000]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser import find_browser, running_browser
from made_runs import made_run

from basestone.trainer.report.page import write_report


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--events", type=int, default=2_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run = made_run(Path(directory) / "run", given.steps, num_events=given.events, every=500)
        start_s = time.perf_counter()
        page = write_report([run])
        made_s = time.perf_counter() - start_s
        print(f"| {given.steps:,} steps, {given.events:,} events | |\n|---|---|")
        print(f"| metrics.jsonl | {(run / 'metrics.jsonl').stat().st_size / 1e6:.1f} MB |")
        print(f"| report.html | {page.stat().st_size / 1e6:.2f} MB |")
        print(f"| time to make it | {made_s:.1f} s |", flush=True)
        browser = find_browser()
        if browser is None:
            print("| time to open it | n/a: no Chromium here (make test-system installs Debian's) |")
            return
        with running_browser(browser, Path(directory) / "profile") as opened:
            seconds = [opened.open(page) for _ in range(5)]
        print(f"| time to open it, first of 5 | {seconds[0]:.2f} s |")
        print(f"| time to open it, median of 5 | {statistics.median(seconds):.2f} s |")


if __name__ == "__main__":
    main()
