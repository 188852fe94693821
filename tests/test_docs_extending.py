"""docs/extending.md runs as it stands, ends with equal logits, and would see a mistake in what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
PROGRAM = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M))


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "page.py").write_text(program)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "page.py"],
        cwd=folder,
        env=environment() | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_page_ends_with_equal_logits(tmp_path):
    done = run(PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "ours layers.1.mlp.linear_fc2.bias (48,)" in done.stdout
    assert "theirs model.layers.0.mlp.c_proj.bias (3072,)" in done.stdout
    assert float(re.search(r"relative error of the logits: (\S+)", done.stdout)[1]) < 1e-5


@pytest.mark.parametrize(
    ("shown", "mistake", "seen"),
    [
        ('in ("q", "k", "v"))', 'in ("q", "v", "k"))', "assert error < 1e-5"),
        pytest.param(
            '"norm_epsilon": config.norm_epsilon',
            '"norm_epsilon": 1e-5',
            "assert starcoder2.model_config(hf) == config",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            '("mlp.linear_fc1", "mlp.c_fc"),',
            "",
            "assert back.keys() == weights.keys()",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_in_the_page_is_seen(shown, mistake, seen, tmp_path):
    assert PROGRAM.count(shown) == 1
    done = run(PROGRAM.replace(shown, mistake), tmp_path)
    assert done.returncode == 1 and "AssertionError" in done.stderr
    assert seen in done.stderr, done.stderr[-2000:]
