"""Every recipe that is shipped: it loads, its launch can be planned as its first lines say, and its memory fits."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import Command

from basestone.trainer.load import load_run
from basestone.trainer.plan import GIB, memory_bytes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
BUILT_IN_VOCABULARY = 4096
WITH_SYMBOLS = BUILT_IN_VOCABULARY + 103
ON_A_LAPTOP = ("bert-cpu", "code-search-cpu", "t5-cpu")
# GPUs, and what a rank's estimate must stay under: a tenth of the device is left for what is not counted.
DEVICES = {
    "gpt2-124m-1gpu": (1, 21),
    "bert-base-8gpu": (8, 72),
    "llama3-1b-8gpu": (8, 72),
    "llama2-7b-64gpu": (64, 72),
    "llama3-70b-512gpu": (512, 72),
}


def test_there_is_a_recipe_for_each_size():
    assert {path.stem for path in RECIPES} == {"quickstart", *ON_A_LAPTOP, *DEVICES}


@pytest.mark.parametrize("name", ON_A_LAPTOP)
def test_the_command_in_a_laptops_recipe_is_that_of_the_file(name):
    path = ROOT / "recipes" / f"{name}.toml"
    (line,) = re.findall(r"^#\s+basestone (.*)$", path.read_text(), re.MULTILINE)
    assert line == f"train recipes/{name}.toml"
    run = load_run(path)
    assert run.run.processes and run.resolve(run.run.processes, WITH_SYMBOLS).steps


@pytest.mark.parametrize("name", DEVICES)
def test_the_memory_of_every_rank_fits_its_device(name):
    num_gpus, limit_gib = DEVICES[name]
    resolved = load_run(ROOT / "recipes" / f"{name}.toml").resolve(num_gpus, BUILT_IN_VOCABULARY)
    for rank in range(resolved.run.parallel.pipeline):
        assert sum(memory_bytes(resolved, rank).values()) / GIB < limit_gib


@pytest.mark.parametrize("name", DEVICES)
def test_the_command_in_a_recipe_plans_its_launch(basestone: Command, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cluster.toml").write_text("[slurm]\npartition = 'gpu'\n")
    text = (ROOT / "recipes" / f"{name}.toml").read_text()
    (line,) = re.findall(r"^#\s+basestone (launch .*)$", text, re.MULTILINE)
    words = [word.replace("recipes/", f"{ROOT}/recipes/") for word in shlex.split(line)]
    words = [
        word
        for i, word in enumerate(words)
        if "shards" not in word and "tokenizer.model" not in word and word != "--set"
    ]
    if "--on" not in words:
        words += ["--processes-per-node", str(DEVICES[name][0])]
    done = basestone(*words, "--dry-run")
    assert done.code == 0, done.err
    assert f"{DEVICES[name][0]} process(es) = tensor" in done.out and "memory a rank" in done.out


def test_the_dockerfile_is_clean():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter is not None, "the test extra brings it"
    done = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE) and "constraints.txt" in text
