"""The DeepSpeed files: ours are whole, and a user's may not contradict the run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from run_files import run_of

from basestone.trainer.config import ResolvedRun
from basestone.trainer.engine import DERIVED_KEYS, deepspeed_config
from basestone.trainer.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "ds_configs"
# Written out, not taken from the engine: a key that is dropped there must be missed here.
DECIDED_ELSEWHERE = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "optimizer",
    "scheduler",
    "steps_per_print",
    "zero_allow_untested_optimizer",
]
FILES = sorted(FOLDER.glob("*.json"))


def resolved(**changes: Any) -> ResolvedRun:
    return run_of(**changes).resolve(1, 200)


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(resolved(parallel__ds_config=str(path), **changes))
    assert caught.value.exit_code == 64
    return str(caught.value)


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    return tmp_path / "mine.json"


def test_there_is_a_file_for_every_stage():
    assert [path.name for path in FILES] == [f"zero{stage}.json" for stage in range(4)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_its_stage_and_no_derived_key(path):
    content = json.loads(path.read_text())
    assert f"zero{content['zero_optimization']['stage']}" == path.stem
    assert not set(content) & {*DECIDED_ELSEWHERE, *DERIVED_KEYS}


PRECISIONS = [(0, "fp32"), *((stage, dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16", "fp16"))]


@pytest.mark.parametrize(("stage", "dtype"), PRECISIONS)
def test_every_file_resolves_and_deepspeed_takes_it(stage, dtype):
    path = FOLDER / f"zero{stage}.json"
    config = deepspeed_config(resolved(parallel__zero=stage, train__dtype=dtype))
    for key, value in json.loads(path.read_text()).items():
        assert config[key] == value
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_config.stage == stage
    # A misspelt key would be kept as an extra one or refused: every key must be a field, or another name of one.
    fields = type(parsed.zero_config).model_fields
    known = set(fields) | {field.alias for field in fields.values()}
    assert set(config["zero_optimization"]) <= known
    assert (parsed.train_batch_size, parsed.gradient_accumulation_steps) == (1, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_is_deepspeeds_from_stage_1_on(stage):
    config = deepspeed_config(resolved(parallel__zero=stage, train__clip=0.7))
    assert config["gradient_clipping"] == (0.0 if stage == 0 else 0.7)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_accumulates_in_fp32(dtype):
    config = deepspeed_config(resolved(train__dtype=dtype))
    assert config[dtype]["enabled"] is True
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert not {"fp16", "bf16"} - {dtype} & set(config)


def test_fp32_switches_nothing_on():
    assert not {"bf16", "fp16", "data_types"} & set(deepspeed_config(resolved()))


def test_a_users_file_is_taken(user_file):
    user_file.write_text(
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "wall_clock_breakdown": true}'
    )
    config = deepspeed_config(resolved(parallel__zero=2, parallel__ds_config=str(user_file)))
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["wall_clock_breakdown"] is True


def test_all_derived_keys_are_listed_at_once(user_file):
    keys = ["zero_optimization", *DECIDED_ELSEWHERE, "comms_logger"]
    user_file.write_text(json.dumps({key: {} for key in keys}))
    text = refusal(user_file)
    head, tail = f"{user_file}: take out ", ": the run file decides them"
    assert text.startswith(head) and text.endswith(tail)
    listed = text.removeprefix(head).removesuffix(tail).split(", ")
    assert set(DECIDED_ELSEWHERE) <= set(listed) <= set(DERIVED_KEYS)


@pytest.mark.parametrize("key", DECIDED_ELSEWHERE)
def test_one_derived_key_is_enough(user_file, key):
    user_file.write_text(json.dumps({key: 1, "zero_optimization": {"stage": 1}}))
    assert refusal(user_file) == f"{user_file}: take out {key}: the run file decides them"


@pytest.mark.parametrize(("content", "found"), [('{"zero_optimization": {"stage": 3}}', 3), ("{}", 0)])
def test_another_stage_is_refused(user_file, content, found):
    user_file.write_text(content)
    expected = f"{user_file}: its zero_optimization.stage is {found}, but parallel.zero = 1"
    assert refusal(user_file) == expected


def test_a_file_that_is_not_there(user_file):
    text = refusal(user_file)
    assert (
        text.startswith(f"parallel.ds_config: {user_file} cannot be read as JSON: ") and "No such file" in text
    )


def test_a_file_that_is_no_json(user_file):
    user_file.write_text("{'stage': 1}")
    assert refusal(user_file).startswith(f"parallel.ds_config: {user_file} cannot be read as JSON: ")


@pytest.mark.parametrize("content", ["[1]", '"text"', '{"zero_optimization": 1}'])
def test_json_that_is_no_table(user_file, content):
    user_file.write_text(content)
    assert str(user_file) in refusal(user_file)


@pytest.mark.parametrize("key", ["bfloat16", "amp"])
def test_the_precision_under_another_name(user_file, key):
    user_file.write_text(json.dumps({key: {"enabled": True}, "zero_optimization": {"stage": 1}}))
    assert key in refusal(user_file)


def test_the_table_of_files_names_every_file_and_key():
    text = (FOLDER / "README.md").read_text()
    keys = {key for path in FILES for key in json.loads(path.read_text())["zero_optimization"]}
    missing = [
        name for name in (*[path.name for path in FILES], *keys, *DERIVED_KEYS) if f"`{name}`" not in text
    ]
    assert missing == []
