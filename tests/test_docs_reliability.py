"""docs/reliability.md promises a test for every fault: it is there, and belongs to the faults."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_fault_has_its_test():
    page = (ROOT / "docs" / "reliability.md").read_text()
    promised = re.findall(r"`(test_\w+)` \|$", page, re.MULTILINE)
    assert len(promised) == len(set(promised)) == page.count("\n| ") - 1
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "faults and not slow", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    found = set(re.findall(r"::(test_\w+)", done.stdout))
    assert sorted(set(promised) - found) == []
