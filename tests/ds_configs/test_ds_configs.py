"""The DeepSpeed files: ours are whole, and a user's may not contradict the run file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from run_files import run_of

from basestone.trainer.config import ResolvedRun
from basestone.trainer.ds_config import DERIVED_KEYS, deepspeed_config, largest_partition, nvme_sections
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


OFFLOAD = {"zero2_offload": "cpu", "zero3_offload": "cpu", "zero3_nvme": "nvme"}


def test_there_is_a_file_for_every_stage_and_offload():
    stages = [f"zero{stage}" for stage in range(4)]
    assert {path.stem for path in FILES} == {*stages, *OFFLOAD}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_holds_its_stage_and_no_derived_key(path):
    content = json.loads(path.read_text())
    assert f"zero{content['zero_optimization']['stage']}" == path.stem.split("_")[0]
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


def of_file(name: str, dtype: str = "fp32", **changes: Any) -> ResolvedRun:
    path = "/disk" if OFFLOAD[name] == "nvme" else None
    changes |= {"parallel__offload": OFFLOAD[name], "parallel__nvme_path": path}
    return run_of(parallel__zero=int(name[4]), train__dtype=dtype, **changes).resolve(2, 200)


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", OFFLOAD)
def test_offload_chooses_its_file_and_deepspeed_takes_it(name, dtype, pin_memory):
    config = deepspeed_config(of_file(name, dtype), pin_memory=pin_memory)
    given = json.loads((FOLDER / f"{name}.json").read_text())["zero_optimization"]
    for key, value in given.items():
        if key not in ("offload_optimizer", "offload_param"):
            assert config["zero_optimization"][key] == value
    parsed = DeepSpeedConfig(config).zero_config
    assert parsed.stage == int(name[4])
    assert parsed.offload_optimizer.device == OFFLOAD[name]
    assert parsed.offload_optimizer.pin_memory is pin_memory
    assert (parsed.offload_param is None) is (parsed.stage == 2)
    if parsed.stage == 3:
        assert parsed.offload_param.device == OFFLOAD[name]
        assert parsed.offload_param.pin_memory is pin_memory
    known = set(type(parsed).model_fields) | {field.alias for field in type(parsed).model_fields.values()}
    assert set(config["zero_optimization"]) <= known
    for key in ("offload_optimizer", "offload_param"):
        section = getattr(parsed, key)
        if section is not None:
            assert set(config["zero_optimization"][key]) <= set(type(section).model_fields)


def test_the_path_of_swap_files_and_the_size_of_buffers_are_derived():
    resolved = of_file("zero3_nvme")
    config = deepspeed_config(resolved)
    sections = nvme_sections(config)
    assert [section["nvme_path"] for section in sections] == ["/disk", "/disk"]
    assert config["zero_optimization"]["offload_param"]["buffer_size"] == largest_partition(resolved)
    assert largest_partition(resolved) == 2 * 192 * 64 // 2  # gate and up, over two ranks
    sections[0]["nvme_path"] = "/elsewhere"
    assert config["zero_optimization"]["offload_optimizer"]["nvme_path"] == "/elsewhere"
    assert nvme_sections(deepspeed_config(of_file("zero3_offload"))) == []


def user_offload(path: Path, stage: int, **section: Any) -> Path:
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, **section}}))
    return path


CPU, NVME = {"device": "cpu"}, {"device": "nvme", "nvme_path": "/disk"}
NO_READ_AHEAD = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


def test_a_users_file_may_offload(user_file):
    user_offload(user_file, 1, offload_optimizer={**CPU, "pin_memory": True})
    section = deepspeed_config(resolved(parallel__ds_config=str(user_file)))["zero_optimization"]
    assert section == {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    user_offload(
        user_file,
        3,
        offload_optimizer={**NVME, "buffer_count": 9},
        offload_param={**NVME, "nvme_path": "/other", "buffer_size": 1 << 20},
        **NO_READ_AHEAD,
    )
    config = deepspeed_config(resolved(parallel__ds_config=str(user_file), parallel__zero=3))
    optimizer, weights = nvme_sections(config)
    assert (optimizer["nvme_path"], optimizer["buffer_count"]) == ("/disk", 9)
    assert (weights["nvme_path"], weights["buffer_size"]) == ("/other", 1 << 20)
    user_offload(user_file, 3, offload_optimizer={**NVME, "pipeline_read": True})
    config = deepspeed_config(resolved(parallel__ds_config=str(user_file), parallel__zero=3))
    assert nvme_sections(config)[0]["buffer_count"] == 12


@pytest.mark.parametrize(
    ("stage", "section", "message"),
    [
        (
            0,
            {"offload_optimizer": CPU},
            'offload_optimizer to "cpu" needs ZeRO stage 1 or higher, got 0; raise stage and parallel.zero, or take '
            "the section out",
        ),
        (2, {"offload_param": CPU}, 'offload_param to "cpu" needs ZeRO stage 3 or higher, got 2; raise stage'),
        (
            2,
            {"offload_optimizer": NVME},
            'offload_optimizer to "nvme" needs ZeRO stage 3 or higher, got 2; raise',
        ),
        (
            3,
            {"offload_optimizer": {"device": "nvme"}},
            'offload_optimizer to "nvme" needs an nvme_path, a directory on a local disk; name one',
        ),
        (
            3,
            {"offload_param": {"device": "tape"}},
            'offload_param.device is "tape"; choose "none", "cpu" or "nvme"',
        ),
        (
            3,
            {"offload_param": NVME, "stage3_prefetch_bucket_size": 0},
            'offload_param to "nvme" needs stage3_prefetch_bucket_size = 0 and stage3_max_reuse_distance = 0; set both',
        ),
        *(
            (
                3,
                {"offload_optimizer": {**CPU, **extra}},
                "offload_optimizer: ratio and super_offload need DeepSpeed's own Adam, and fast_init weights that are "
                "there at the start; take them out",
            )
            for extra in ({"ratio": 0.5}, {"super_offload": True}, {"fast_init": True})
        ),
    ],
)
def test_what_a_users_file_may_not_offload(user_file, stage, section, message):
    user_offload(user_file, stage, **section)
    text = refusal(user_file, parallel__zero=stage)
    assert text.startswith(f"{user_file}: {message}") and len(text.splitlines()) == 1


def test_a_users_file_does_not_offload_a_pipeline(user_file):
    user_offload(user_file, 2, offload_optimizer=CPU)
    run = run_of(parallel__zero=2, parallel__pipeline=3, parallel__ds_config=str(user_file)).resolve(3, 200)
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(run)
    assert str(caught.value) == (
        f"{user_file}: offload needs parallel.pipeline = 1, got 3; set it, or take the offload sections out"
    )


def test_a_section_that_is_no_table(user_file):
    user_offload(user_file, 3, offload_param="cpu")
    assert refusal(user_file, parallel__zero=3).endswith(
        "is no DeepSpeed configuration: offload_param is a table"
    )


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
    sections = [json.loads(path.read_text())["zero_optimization"] for path in FILES]
    keys = {key for section in sections for key in section}
    keys |= {
        key for section in sections for value in section.values() if isinstance(value, dict) for key in value
    }
    missing = [
        name for name in (*[path.name for path in FILES], *keys, *DERIVED_KEYS) if f"`{name}`" not in text
    ]
    assert missing == []


@pytest.mark.parametrize("key", ["round_robin_gradients", "zero_hpz_partition_size", "zero_quantized_weights"])
def test_keys_that_move_what_a_checkpoint_reads(user_file, key):
    user_file.write_text(json.dumps({"zero_optimization": {"stage": 2, key: True}}))
    text = refusal(user_file, parallel__zero=2)
    assert f"zero_optimization: take out {key}:" in text and "it may hold stage, overlap_comm" in text
