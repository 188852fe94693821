"""A launch's job, written as `basestone launch` does, with no process behind it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from basestone.launch.cluster.config import ClusterConfig
from basestone.launch.cluster.job import Job
from basestone.launch.cluster.slurm import options_of


def job_in(run_dir: Path, backend: str = "local", **changes: Any) -> Job:
    values = {
        "name": "gpt-1123-120000",
        "backend": backend,
        "run_file": "/shared/gpt.toml",
        "run_dir": str(run_dir),
        "min_nodes": 1,
        "max_nodes": 1,
        "processes_per_node": 1,
        "options": {"python": sys.executable, **options_of(ClusterConfig().slurm)},
    }
    job = Job(**(values | changes))
    job.write({})
    return job
