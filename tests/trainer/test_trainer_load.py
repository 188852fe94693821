"""From a file and `--set` to a run: every message, and the way back to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import run_values

from basestone.trainer.config import RunConfig
from basestone.trainer.errors import ConfigError
from basestone.trainer.load import fixed_differences, load_run, parse_overrides, run_to_toml, validate_run

RUN_FILE = """
[model]
num_layers = 3
hidden_size = 64
num_attention_heads = 8
num_query_groups = 4
max_sequence_length = 64

[data]
train = "shards/train"
tokenizer = "shards/t.model"
sequence_length = 32

[data.heldout]
notes = "shards/heldout"

[train]
steps = 20
global_batch = 8

[optimizer]
lr = 1e-3
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    path = folder / "run.toml"
    path.write_text(RUN_FILE)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    assert caught.value.exit_code == 64
    return str(caught.value)


def lines(path: Path, *overrides: str) -> list[str]:
    """Give the errors without the head line, which is checked here."""
    head, *rest = refusal(path, *overrides).splitlines()
    assert head == f"{path}: {len(rest)} error(s)"
    return [line.removeprefix("  ") for line in rest]


# ---- reading ------------------------------------------------------------------------------------------------


def test_a_file_is_read_and_the_family_fills_the_style(run_file):
    run = load_run(run_file)
    assert (run.train.steps, run.optimizer.lr, run.model.normalization, run.model.head_dim) == (
        20,
        1e-3,
        "rmsnorm",
        8,
    )


def test_paths_are_relative_to_the_file(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load_run(Path("project/run.toml"))
    assert run.data.train == (str(run_file.parent / "shards/train"),)
    assert run.data.tokenizer == str(run_file.parent / "shards/t.model")
    assert run.data.heldout == {"notes": str(run_file.parent / "shards/heldout")}


def test_paths_given_with_set_are_relative_to_the_working_directory(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load_run(
        run_file, ["data.train=['a', 'builtin:python']", "data.tokenizer=b.model", "parallel.ds_config=c"]
    )
    assert run.data.train == (str(tmp_path / "a"), "builtin:python")
    assert run.data.tokenizer == str(tmp_path / "b.model")
    assert run.parallel.ds_config == str(tmp_path / "c")
    assert run.data.heldout == {"notes": str(run_file.parent / "shards/heldout")}  # the file's stay the file's


def test_sources_are_paths_too_and_stand_in_place_of_train(run_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = load_run(
        run_file,
        [
            'data.sources.web={path = ["a", "s3://bucket/b"]}',
            "data.sources.code.path=c",
            "reading.cache=kept",
            "data.sources.web.weight=0.5",
            "data.sources.code.weight=1",
        ],
    )
    assert run.data.train is None
    assert run.data.sources["web"].path == (str(tmp_path / "a"), "s3://bucket/b")
    assert run.data.sources["code"].path == (str(tmp_path / "c"),) and run.data.sources["code"].weight == 1.0
    assert run.reading.cache == str(tmp_path / "kept")
    again = tmp_path / "again.toml"
    again.write_text(run_to_toml(run.model_dump(mode="json")))
    assert load_run(again) == run
    back = load_run(again, ["data.train=d"])
    assert back.data.train == (str(tmp_path / "d"),) and back.data.sources == {}


def test_a_missing_file(tmp_path):
    assert refusal(tmp_path / "no.toml") == f"{tmp_path / 'no.toml'}: there is no such run file"


@pytest.mark.parametrize("content", [b"[train\nsteps = 1", b"\xff\xfe", b"a = 1\na = 2"])
def test_what_is_no_toml(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: cannot be read as TOML: ")


def test_a_directory_is_no_run_file(tmp_path):
    assert "cannot be read as TOML" in refusal(tmp_path)


# ---- what is wrong in it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optimiser.lr=1", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("train.step=1", "train.step: unknown key; did you mean 'steps'?"),
        ("model.num_layer=1", "model.num_layer: unknown key; did you mean 'num_layers'?"),
        ("data.tokeniser=1", "data.tokeniser: unknown key; did you mean 'tokenizer'?"),
        ("run.sead=1", "run.sead: unknown key; did you mean 'seed'?"),
        ("parallel.tensr=1", "parallel.tensr: unknown key; did you mean 'tensor'?"),
        ("schedule.warmup_step=1", "schedule.warmup_step: unknown key; did you mean 'warmup_steps'?"),
        ("evaluate.every=1", "evaluate.every: unknown key; did you mean 'every_steps'?"),
        ("checkpoint.keep=1", "checkpoint.keep: unknown key; did you mean 'keep_last'?"),
        ("meter.wats=1", "meter.wats: unknown key; did you mean 'watts'?"),
        ("evaluate.zzz=1", "evaluate.zzz: unknown key; known keys: every_steps, max_tokens"),
        ("train.steps.x=1", "train.steps: Input should be a valid integer"),
    ],
)
def test_an_unknown_key_at_every_level(run_file, override, hint):
    assert lines(run_file, override) == [hint]


def test_all_errors_come_at_once(run_file):
    got = lines(run_file, "model.hiden_size=1", "train.global_batch=0", "optimizer.lr=fast", "nothing.x=1")
    assert len(got) == 4
    assert got[0] == "model.hiden_size: unknown key; did you mean 'hidden_size'?"
    assert got[1] == "train.global_batch: Input should be greater than 0 (got 0)"
    assert got[2].startswith("optimizer.lr: Input should be a valid number") and got[2].endswith("(got 'fast')")
    assert got[3].startswith("nothing: unknown key; known keys: run, model, data, task, reading")


def test_missing_sections_and_keys(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[data]\n[train]\nsteps = 1\n[optimizer]\n")
    assert lines(path) == [
        "model: is missing",
        "data.sources: is missing, and so is train; give train, a list of shards, or sources, by name",
        "data.tokenizer: is missing",
        "data.sequence_length: is missing",
        "train.global_batch: is missing",
        "optimizer.lr: is missing",
    ]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.steps=abc", ("train.steps: Input should be a valid integer", "(got 'abc')")),
        ("train.steps=0.5", ("train.steps: Input should be a valid integer", "(got 0.5)")),
        ("train.dtype=int8", ("train.dtype: Input should be 'fp32', 'bf16' or 'fp16'", "(got 'int8')")),
        ("parallel.zero=4", ("parallel.zero: Input should be 0, 1, 2 or 3", "(got 4)")),
        ("run.seed=-1", ("run.seed: Input should be greater than or equal to 0", "(got -1)")),
        ("optimizer.betas=[0.9]", ("optimizer.betas.1: is missing",)),
        ("optimizer.lr=nan", ("optimizer.lr: ", "(got nan)")),
        (
            "schedule.final_ratio=2",
            ("schedule.final_ratio: Input should be less than or equal to 1", "(got 2)"),
        ),
        ("model.dropout=1.0", ("model.dropout: Input should be less than 1", "(got 1.0)")),
        ("data.train=[1]", ("data.train.0: Input should be a valid string", "(got 1)")),
        ("data.heldout=x", ("data.heldout: Input should be a valid dictionary", "(got 'x')")),
        ("meter.watts=0", ("meter.watts: Input should be greater than 0", "(got 0)")),
        ("data.train=[]", ("data.train: got an empty list; give at least one shard directory",)),
        (
            "data.train=builtin:perl",
            ("data.train: got 'builtin:perl'; the embedded corpora are: builtin:python",),
        ),
        ("data.sequence_length=1", ("data.sequence_length: got 1; a sequence needs at least 2 tokens",)),
    ],
)
def test_wrong_types_and_values_say_what_was_got(run_file, override, parts):
    (line,) = lines(run_file, override)
    for part in parts:
        assert part in line


def test_a_section_that_is_no_table(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("train = 3\n")
    assert any(line.startswith("train: Input should be a valid dictionary") for line in lines(path))


def test_an_unknown_preset_lists_the_known_ones(run_file):
    (line,) = lines(run_file, "model.preset=gpt2-1t")
    assert "no preset is called 'gpt2-1t'; there are bert-base, bert-large" in line and "llama-70b" in line


def test_heads_that_do_not_divide_the_width(run_file):
    (line,) = lines(run_file, "model.num_attention_heads=7")
    assert "num_attention_heads = 7 does not divide hidden_size = 64" in line and "give head_dim" in line


@pytest.mark.parametrize("overrides", [("model.preset=['x']",), ("model.family=['x']",)])
def test_a_list_where_a_name_belongs(run_file, overrides):
    assert lines(run_file, *overrides)


def test_moment_decays_are_below_one(run_file):
    assert "optimizer.betas" in refusal(run_file, "optimizer.betas=[0.9, 1.5]")


def test_an_infinite_learning_rate(run_file):
    assert "optimizer.lr" in refusal(run_file, "optimizer.lr=inf")


def test_an_empty_path(run_file):
    assert "data.tokenizer: got an empty path" in refusal(run_file, "data.tokenizer=")


def test_a_wrong_family_is_one_error(run_file):
    assert len(lines(run_file, "model.family=lama")) == 1


def test_a_missing_width_is_one_error(run_file):
    run_file.write_text(RUN_FILE.replace("hidden_size = 64\n", ""))
    assert lines(run_file) == ["model.hidden_size: is missing"]


# ---- --set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["train.steps", "=3", "steps=3", "train.=3", ".steps=3", "train..steps=3", ""]
)
def test_set_needs_a_section_a_key_and_a_value(override):
    with pytest.raises(ConfigError) as caught:
        parse_overrides([override])
    assert str(caught.value) == f"--set {override}: expected section.key=value, e.g. --set train.steps=100"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("3e-4", 3e-4),
        ("true", True),
        ('"a b"', "a b"),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("bf16", "bf16"),
        ("a=b", "a=b"),
        ("some/path with blanks", "some/path with blanks"),
    ],
)
def test_set_takes_a_toml_value_or_a_plain_word(text, value):
    assert parse_overrides([f"a.b={text}"]) == {"a": {"b": value}}


def test_set_reaches_into_tables_and_the_last_one_wins():
    got = parse_overrides(["a.b.c=1", "a.b.d=2", "a.e=3", "a.e=4"])
    assert got == {"a": {"b": {"c": 1, "d": 2}, "e": 4}}


def test_set_a_value_and_then_a_table():
    with pytest.raises(ConfigError):
        parse_overrides(["train.steps=1", "train.steps.x=2"])


def test_set_wins_over_the_file_and_leaves_the_rest(run_file):
    run = load_run(run_file, ["train.global_batch=4", "schedule.kind=wsd"])
    assert (run.train.global_batch, run.train.steps, run.schedule.kind) == (4, 20, "wsd")


def test_set_of_one_length_replaces_the_other(run_file):
    run = load_run(run_file, ["train.tokens=1000"])
    assert (run.train.steps, run.train.tokens) == (None, 1000)
    run_file.write_text(RUN_FILE.replace("steps = 20", "tokens = 5"))
    assert load_run(run_file, ["train.steps=3"]).train.steps == 3


def test_both_lengths_or_none_are_refused(run_file):
    message = "train: give either steps or tokens, not both and not neither"
    assert lines(run_file, "train.steps=1", "train.tokens=1") == [message]
    run_file.write_text(RUN_FILE.replace("steps = 20\n", ""))
    assert lines(run_file) == [message]


def test_set_adds_a_held_out_set(run_file):
    assert set(load_run(run_file, ["data.heldout.more=elsewhere"]).data.heldout) == {"notes", "more"}


# ---- the way back -------------------------------------------------------------------------------------------


def test_a_table_within_a_section_comes_back_and_is_fixed(run_file):
    scaling = {
        "factor": 8.0,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
        "original_max_sequence_length": 32,
    }
    run_file.write_text(
        RUN_FILE + "\n[model.rope_scaling]\n" + "".join(f"{k} = {v}\n" for k, v in scaling.items())
    )
    run = load_run(run_file)
    dumped = run.model_dump(mode="json")
    assert dumped["model"]["rope_scaling"] == scaling
    assert load_run_text(run_to_toml(dumped), run_file) == run
    other = load_run(run_file, ["model.rope_scaling.factor=4.0"]).model_dump(mode="json")
    (line,) = lines(run_file, "model.rope_scaling.factr=1")
    assert line == "model.rope_scaling.factr: unknown key; did you mean 'factor'?"
    (line,) = fixed_differences(dumped, other)
    assert line.startswith("model.rope_scaling: {'factor': 8.0,")


def load_run_text(text: str, beside: Path) -> RunConfig:
    path = beside.with_name("resolved.toml")
    path.write_text(text)
    return load_run(path)


def test_the_origin_stands_before_the_errors():
    with pytest.raises(ConfigError, match=r"^checkpoint 7: 1 error\(s\)\n  train.x: unknown key"):
        validate_run(run_values(train__x=1), "checkpoint 7")
