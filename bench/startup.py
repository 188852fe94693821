"""CPU seconds from a fresh process to the first step of a small model, and where they go.

python bench/startup.py
"""

from __future__ import annotations

import os
import subprocess
import sys

STAGES = """
import time, os, sys, warnings
warnings.filterwarnings("ignore")
marks = [("python", time.process_time())]
def mark(name): marks.append((name, time.process_time()))
import torch; torch.set_num_threads(1); mark("import torch")
import basestone.trainer.runtime as processes; mark("import megatron-core")
import basestone.trainer.engine as engine_module; mark("import deepspeed")
import basestone.trainer.loop; mark("import the rest of the trainer")
from pathlib import Path
from basestone.trainer.load import load_run
from basestone.trainer.places import locate, vocab_size
import basestone
recipe = Path(sys.argv[1])
run = load_run(recipe, ["parallel.tensor=1", "run.processes=1"])
places = locate(run.data, run.reading, processes.cache_dir()); mark("run file and data places")
runtime = processes.start(); mark("process groups")
engine = engine_module.Engine(run.resolve(1, vocab_size(places)), runtime); mark("model and DeepSpeed engine")
from basestone.trainer.batch import causal_fields, cut
tokens = torch.randint(0, 4096, (16, run.data.sequence_length + 1))
weights = torch.ones(16, run.data.sequence_length, dtype=torch.int32)
engine.forward_backward(cut(causal_fields(tokens, weights), 8), {"next_token": 1.0})
engine.update(1e-3); mark("first step")
for (_, before), (name, after) in zip(marks, marks[1:]): print(f"| {name} | {after - before:.2f} |")
print(f"| all, from the start of python | {marks[-1][1]:.2f} |", flush=True)
os._exit(0)
"""


def main() -> None:
    """Print the table."""
    from importlib import resources

    recipe = str(resources.files("basestone.recipes").joinpath("quickstart.toml"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    print("| stage | CPU seconds |\n|---|---|", flush=True)
    line = [sys.executable, "-W", "ignore", "-c", STAGES, recipe]
    subprocess.run(line, env=environment, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
