"""Planning a launch over many nodes: seconds from the command to its last word, by backend.

python bench/launch.py [--nodes 1000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    recipe = str(resources.files("basestone.recipes").joinpath("llama2-7b-64gpu.toml"))
    ranks = given.nodes * 8
    sizes = ["--set", f"train.global_batch={2 * ranks}", "--set", f"data.lanes={2 * ranks}"]
    print(
        f"| {given.nodes:,} nodes, {ranks:,} processes | seconds, median of {given.rounds} |\n|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as directory:
        hosts = Path(directory) / "hosts"
        hosts.write_text("".join(f"node-{number} slots=8\n" for number in range(given.nodes)))
        counted = ["--nodes", str(given.nodes), "--processes-per-node", "8"]
        for backend, more in (
            ("hosts", ["--hostfile", str(hosts)]),
            ("slurm", counted),
            ("kubernetes", counted),
            ("torchrun", [*counted, "--endpoint", "node-0:29400"]),
        ):
            line = [sys.executable, "-m", "basestone.launch", "launch", recipe, "--on", backend, *more, *sizes]
            seconds = []
            for _ in range(given.rounds):
                start_s = time.perf_counter()
                subprocess.run([*line, "--dry-run"], check=True, cwd=directory, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - start_s)
            print(f"| launch --on {backend} --dry-run | {statistics.median(seconds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
