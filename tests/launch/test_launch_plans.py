"""What a launch would run, by every backend: whatever stands in paths and values, no shell reads any of it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_process import Command

from basestone.launch.cluster import slurm
from basestone.launch.cluster.config import ClusterConfig, SlurmSection, load_cluster, seconds_of
from basestone.launch.cluster.hostfile import Host
from basestone.launch.cluster.job import Job, decode, encode, new_name, read_job
from basestone.launch.cluster.plan import make_plan
from basestone.launch.cluster.slurm import options_of
from basestone.trainer.errors import ConfigError

HOSTS = [Host("n0", 2), Host("n1", 2)]
BACKENDS = ("local", "hosts", "torchrun", "slurm", "kubernetes", "mpi")
ODD = "a&b $(touch planted) `id` {0..9} '\"* \\ ;|\n\t\u00e9"


def job_of(backend: str, run_dir: str = "/shared/runs/gpt", **changes: object) -> Job:
    values = {
        "name": "gpt-1123-120000",
        "backend": backend,
        "run_file": "/shared/gpt.toml",
        "run_dir": run_dir,
        "min_nodes": 2,
        "max_nodes": 2,
        "processes_per_node": 2,
        "endpoint": "n0:29400",
        "options": {"python": "/venv/bin/python", **options_of(ClusterConfig().slurm)},
    }
    return Job(**(values | changes))


def words_of(plan) -> list[str]:
    """Every word of every command, as the program that is started gets it."""
    return [word for command in plan.commands for word in command]


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    value=st.text(min_size=1),
    name=st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=60),
)
def test_odd_values_stand_in_the_jobs_file_alone(backend, value, name):
    job = job_of(backend, f"/shared/{name}", overrides=[f"data.train={value}"], environment={"NAME": value})
    plan = make_plan(job, ClusterConfig(env={"NAME": "x"}), HOSTS, Path("/launch"), "")
    entry = [word for word in words_of(plan) if word == job.token]
    assert entry or backend in ("slurm", "kubernetes")
    assert decode(job.token) == job.path and set(job.token) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    )
    assert Job(**json.loads(job.as_json())) == job
    if backend == "slurm":
        last = plan.files[Path("/launch/job.sbatch")].splitlines()[-1]
        assert last == f"exec /venv/bin/python -m basestone.launch.cluster.supervise {job.token}"


@given(st.binary(min_size=1).map(lambda raw: raw.replace(b"\0", b"x")))
def test_any_path_survives_as_an_argument(raw):
    path = Path("/") / raw.decode("utf-8", "surrogateescape")
    assert decode(encode(path)) == path
    assert shlex.quote(encode(path)) == encode(path)


def test_a_job_is_read_back_and_its_secrets_lie_apart(tmp_path):
    job = job_of("hosts", str(tmp_path), secrets=["TOKEN"], overrides=[ODD], environment={"A": ODD})
    job.write({"TOKEN": "canary"})
    assert read_job(job.path) == job and job.read_secrets() == {"TOKEN": "canary"}
    assert "canary" not in job.path.read_text()
    assert (job.folder / "secrets.json").stat().st_mode & 0o777 == 0o600
    job.forget_secrets()
    assert job.read_secrets() == {}


def test_a_job_that_a_node_cannot_see_names_the_node(tmp_path):
    with pytest.raises(ConfigError, match=r"job\.json: not there on \S+; the run directory must be on a disk"):
        read_job(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ConfigError, match="is no launch's file"):
        read_job(tmp_path / "job.json")


@pytest.mark.parametrize("stem", ["GPT 3 \u00e9", "-", "a" * 80, "..", "x_y.z", "7b", "7" * 80, "-7b"])
def test_names_are_dns_labels(stem):
    for name in (new_name(stem), new_name(stem, "shared")):
        assert len(name) <= 44 and name[0].isalpha() and name.strip("-") == name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert new_name(stem, "one place") == new_name(stem, "one place") != new_name(stem, "another")


# ---- Slurm ----------------------------------------------------------------------------------------------------------


def test_the_batch_script_is_read_by_bash_as_it_is_meant(tmp_path):
    """Bash itself reads it, with `module` and the interpreter replaced by what prints its arguments."""
    python = tmp_path / "odd 'path' $(touch planted)" / "python"
    python.parent.mkdir()
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    section = {"modules": ["cuda/12.4", "gcc"], "constraint": "a b|c", "time": "1-00:00:00", "partition": "gpu"}
    job, cluster = job_of("slurm"), ClusterConfig(slurm=section)
    script = tmp_path / "job.sbatch"
    script.write_text(slurm.script(job, cluster, str(python)))
    done = subprocess.run(
        ["bash", "-c", 'module() { printf "%s\\n" "$*"; }; export -f module; exec bash "$0"', script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    *modules, words = done.stdout.splitlines()
    assert modules == ["load cuda/12.4", "load gcc"]
    assert json.loads(words) == ["-m", "basestone.launch.cluster.supervise", job.token]
    assert not list(tmp_path.rglob("planted"))
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert '#SBATCH --constraint="a b|c"' in directives and "#SBATCH --requeue" in directives
    assert "#SBATCH --signal=B:USR2@120" in directives and "#SBATCH --nodes=2" in directives


def test_an_array_takes_the_place_of_requeues():
    script = slurm.script(job_of("slurm"), ClusterConfig(slurm={"array": 5}), "python")
    assert "#SBATCH --array=1-5%1" in script and "--requeue" not in script


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (
            "pyxis",
            [
                "--container-image=img:1",
                "--container-mounts=/shared/runs/gpt:/shared/runs/gpt,/shared:/shared,/data:/data",
            ],
        ),
        (
            "apptainer",
            [
                "apptainer",
                "exec",
                "--nv",
                "--bind",
                "/shared/runs/gpt",
                "--bind",
                "/shared",
                "--bind",
                "/data:/data",
                "img:1",
            ],
        ),
    ],
)
def test_a_container_runs_the_node(container, words):
    section = ClusterConfig(
        slurm={"container": container, "container_image": "img:1", "container_mounts": ["/data:/data"]}
    ).slurm
    job = job_of("slurm", options={"python": "/venv/bin/python", **options_of(section)})
    command = slurm.step_command(job, {"SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "16"})
    assert command[:4] == ["srun", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1"]
    assert "--cpus-per-task=16" in command
    assert command[-len(words) - 4 :] == [*words, "python3", "-m", "basestone.launch.cluster.node", job.token]


# ---- cluster.toml ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[slurm]\npartition = 'gpu; id'", "slurm.partition: "),
        ("[slurm]\npartition = 'gpu\\n#SBATCH --uid=0'", "slurm.partition: "),
        ('[slurm]\nconstraint = "a\\nid"', "slurm.constraint: "),
        ("[slurm]\nmodules = ['$(id)']", "slurm.modules.0: "),
        ("[slurm]\noptions = ['id']", "slurm.options.0: "),
        ("[slurm]\ntime = 'soon'", "slurm.time: "),
        ("[slurm]\npartitoin = 'gpu'", "slurm.partitoin: unknown key; did you mean 'partition'?"),
        ("[kubernetes]\nnamespace = 'Big'", "kubernetes.namespace: "),
        ("[kubernetes]\nkind = 'Pod'", "kubernetes.kind: "),
        ("secrets = ['A B']", "secrets.0: "),
        ("[env]\n'A=B' = 'c'", "env.A=B"),
        ("max_restarts = -1", "max_restarts: "),
        ("[slurm]\ntime = '2'\nsignal_s = 120", "signal_s = 120 is not below time = '2', 120 s"),
        ("[slurm]\ntime = '1:2:3:4'", "slurm.time: "),
        ("[slurm]\noptions = ['--output=x']", "--output is set by Basestone itself"),
        ("[slurm]\noptions = ['--sig=B:TERM@1']", "--sig is set by Basestone itself"),
        ("[slurm]\noptions = ['--ntasks-per-gpu=1']", "--ntasks-per-gpu is set by Basestone itself"),
        ("[slurm]\noptions = ['-o x']", "slurm.options.0: "),
        ("[slurm]\noptions = ['--mail-type END']", "write --mail-type=END"),
        ("[slurm]\ncontainer_mounts = ['/a,b:/c']", "container_mounts: '/a,b:/c': pyxis reads , and :"),
        ("[env]\nMASTER_PORT = '1'", "MASTER_PORT is set by Basestone for each rank"),
        ("[env]\nPET_NNODES = '1'", "PET_NNODES is set by Basestone for each rank"),
    ],
)
def test_a_cluster_file_that_could_mean_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("2:30", 150),
        ("24:00:00", 86400),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("2-00:00:05", 172805),
        ("0", 0),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text, seconds):
    assert seconds_of(text) == seconds
    assert SlurmSection(time=text, options=("--mail-type=END", "--nodelist=n[1-2]", "--comment=a b"))


def test_variables_and_paths_that_only_look_like_basestones_are_taken():
    assert ClusterConfig(env={"LOCAL_SCRATCH": "/x", "MASTER": "1", "NCCL_DEBUG": "INFO"})
    assert SlurmSection(container_mounts=("/data:/data:ro", "/scratch"))


@pytest.mark.parametrize("run_dir", ["/shared/a,b", "/shared/a:b"])
def test_a_container_that_would_see_another_path_is_refused(run_dir):
    job, section = job_of("slurm", run_dir), {"container_image": "img"}
    with pytest.raises(ConfigError, match=r"a container would see another path, as pyxis reads , and :"):
        slurm.script(job, ClusterConfig(slurm=section), "python")
    assert slurm.script(job, ClusterConfig(), "python")


def test_a_quote_that_sbatch_cannot_read_is_refused():
    with pytest.raises(ConfigError, match=r"slurm: --comment: sbatch cannot read a value with a double quote"):
        slurm.script(job_of("slurm"), ClusterConfig(slurm={"options": ['--comment=a "b"']}), "python")


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_manifests_are_what_the_published_schemas_know(kind):
    """By the models that are generated from the APIs' own OpenAPI; what a model does not know does not come back."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    section = {
        "kind": kind,
        "namespace": "research",
        "claim": "runs",
        "secret": "tokens",
        "queue": "gpus",
        "service_account": "trainer",
        "node_selector": {"gpu": "h100"},
    }
    job = job_of("kubernetes", environment={"ODD": ODD}, secrets=["WANDB_API_KEY"])
    plan = make_plan(job, ClusterConfig(kubernetes=section), [], Path("/launch"), f"# {ODD}\n")
    ((_, text),) = plan.files.items()
    config, pods = json.loads(text)["items"]
    assert json.loads(config["data"]["job.json"])["environment"] == {"ODD": ODD}
    assert config["data"]["run.toml"] == f"# {ODD}\n"
    known = {"JobSet": models.JobsetV1alpha2JobSet, "TrainJob": models.TrainerV1alpha1TrainJob}[kind]
    assert _lost(pods, known.from_dict(pods).to_dict()) == []
    assert "WANDB_API_KEY" in text and '"secretKeyRef"' in text
    pods["metadata"]["unheardOf"] = pods["spec"]["backofLimit"] = 1
    assert _lost(pods, known.from_dict(pods).to_dict()) == ["metadata.unheardOf", "spec.backofLimit"]


def test_pods_need_a_secret_for_secrets_and_the_refusal_says_how_to_make_one():
    job = job_of("kubernetes", secrets=["TOKEN", "KEY"])
    with pytest.raises(ConfigError) as caught:
        make_plan(job, ClusterConfig(), [], Path("/launch"), "")
    assert (
        "`kubectl create secret generic basestone-secrets --from-literal=TOKEN=... --from-literal=KEY=...`, then "
        'secret = "basestone-secrets" in [kubernetes]'
    ) in str(caught.value)


def _lost(given, known, place: str = "") -> list[str]:
    """Name what a schema's model did not take; it may add defaults of its own."""
    if isinstance(given, dict):
        return [
            line
            for name, value in given.items()
            for line in (_lost(value, known[name], f"{place}{name}.") if name in known else [f"{place}{name}"])
        ]
    if isinstance(given, list):
        assert len(given) == len(known)
        return [line for i, value in enumerate(given) for line in _lost(value, known[i], f"{place}{i}.")]
    return [] if given == known else [f"{place}: {given!r} became {known!r}"]


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "hosts"], "--on hosts needs --hostfile FILE"),
        (["--on", "mpi"], "--on mpi needs --hostfile FILE"),
        (["--nodes", "2"], "--on local is one machine (got --nodes 2)"),
        (["--on", "slurm", "--nodes", "4:2"], "--nodes 4:2: expected a number, or MIN:MAX"),
        (["--on", "slurm", "--nodes", "x"], "--nodes x: expected a number, or MIN:MAX"),
        (["--on", "kubernetes", "--nodes", "1:2"], "needs one number of nodes"),
        (["--on", "slurm", "--nodes", "3", "--set", "parallel.tensor=2"], "3 processes cannot"),
        (["--on", "slurm", "--nodes", "2:4", "--set", "parallel.tensor=2"], "  3 node(s): "),
        (["--on", "torchrun", "--nodes", "2"], "--on torchrun needs --endpoint HOST:PORT"),
        (["--on", "torchrun", "--nodes", "2", "--endpoint", "garbage"], "endpoint garbage: expected HOST:PORT"),
        (["--on", "slurm", "--endpoint", "n0:1"], "--endpoint is for --on torchrun (got --on slurm)"),
        (["--on", "slurm", "--cluster", "none.toml"], "there is no such cluster file"),
        (
            ["--on", "slurm", "--hostfile", "hosts"],
            "--hostfile is for --on hosts and --on mpi (got --on slurm)",
        ),
        (["--set", "model.family=bert"], "[MASK]"),
        (["--resume", "nope"], "--resume nope: there is no such directory; give a step directory"),
        (["--on", "hosts", "--hostfile", "hosts", "--nodes", "3"], "names 2 host(s)"),
        (["--on", "hosts", "--hostfile", "hosts", "--processes-per-node", "2"], "slots=1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    basestone: Command, run_file, monkeypatch, arguments, message
):
    monkeypatch.chdir(run_file.parent)
    (run_file.parent / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    done = basestone("launch", run_file, *arguments, "--dry-run")
    assert done.code == 64 and message in done.err and done.out == ""
    assert not (run_file.parent / "runs").exists()


@pytest.mark.parametrize(
    ("backend", "tool"), [("slurm", "sbatch"), ("kubernetes", "kubectl"), ("mpi", "mpirun"), ("hosts", "pdsh")]
)
def test_a_scheduler_that_is_not_there_is_named(basestone: Command, run_file, monkeypatch, backend, tool):
    monkeypatch.chdir(run_file.parent)
    monkeypatch.setenv("PATH", "/nowhere")
    (run_file.parent / "hosts").write_text("n0 slots=1\n")
    hosts = ["--hostfile", "hosts"] if backend in ("hosts", "mpi") else []
    done = basestone("launch", run_file, "--on", backend, *hosts)
    assert done.code == 64 and tool in done.err
    assert not (run_file.parent / "runs" / "run").exists()


def test_a_secret_that_is_not_set_is_refused(basestone: Command, run_file, monkeypatch):
    monkeypatch.chdir(run_file.parent)
    (run_file.parent / "cluster.toml").write_text('secrets = ["NOT_SET_HERE"]\n')
    done = basestone("launch", run_file, "--cluster", "cluster.toml")
    assert done.code == 64 and "secrets: NOT_SET_HERE not set here" in done.err


def test_a_path_to_resume_from_is_the_same_on_every_node(basestone: Command, run_file, monkeypatch):
    monkeypatch.chdir(run_file.parent)
    (run_file.parent / "step").mkdir()
    shown = basestone("launch", run_file, "--resume", "step", "--dry-run").out
    assert f'"resume": "{run_file.parent}/step"' in shown
    assert (
        '"resume": "s3://b/step"' in basestone("launch", run_file, "--resume", "s3://b/step", "--dry-run").out
    )


def test_a_host_that_is_down_is_named_before_mpirun_starts(basestone: Command, run_file, monkeypatch):
    monkeypatch.chdir(run_file.parent)
    tools = run_file.parent / "tools"
    tools.mkdir()
    (tools / "mpirun").write_text(f"#!/bin/sh\ntouch {run_file.parent}/started\n")
    (tools / "ssh").write_text("#!/bin/sh\necho ssh: connect to host n9: no route >&2; exit 255\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    (run_file.parent / "hosts").write_text("localhost slots=1\nn9 slots=1\n")
    done = basestone("launch", run_file, "--on", "mpi", "--hostfile", "hosts")
    assert done.code == 64 and "1 of 1 host(s) cannot be reached by ssh" in done.err
    assert "n9: ssh: connect to host n9: no route" in done.err and not (run_file.parent / "started").exists()
