"""The streaming safetensors writer against the safetensors package's reader."""

import json
import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from basestone.model.hf.safetensors_file import (
    SafetensorsError,
    SafetensorsReader,
    plan_shards,
    write_safetensors,
)


def plan_of(tensors):
    return [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


def some_tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3,), (1,), (4, 4), (2, 3, 4), (11,)]
    return {f"t.{i}": torch.randn(shape, generator=generator).to(dtype) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file_reads_back(tmp_path, dtype):
    tensors = some_tensors(dtype)
    write_safetensors(tmp_path, plan_shards(plan_of(tensors), 10**9), tensors.__getitem__)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    back = load_file(tmp_path / "model.safetensors")
    assert set(back) == set(tensors)
    assert all(
        torch.equal(back[name], tensor) and back[name].dtype == dtype for name, tensor in tensors.items()
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    max_shard_bytes=st.integers(1, 400),
)
@settings(max_examples=40, deadline=None)
def test_shards_hold_everything_once(tmp_path_factory, sizes, max_shard_bytes):
    path = tmp_path_factory.mktemp("shards")
    tensors = {f"w{i}": torch.arange(size, dtype=torch.float32) + i for i, size in enumerate(sizes)}
    produced = []

    def produce(name):
        produced.append(name)
        return tensors[name]

    write_safetensors(path, plan_shards(plan_of(tensors), max_shard_bytes), produce)
    assert produced == list(tensors)  # each one once, in order
    shards = sorted(path.glob("*.safetensors"))
    for shard in shards:
        held = load_file(shard)
        assert sum(t.numel() * 4 for t in held.values()) <= max_shard_bytes or len(held) == 1
    reader = SafetensorsReader(path)
    assert sorted(reader.names()) == sorted(tensors)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())
    if len(shards) > 1:
        assert [s.name for s in shards] == [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
        ]
        index = json.loads((path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)


def test_views_and_transposes_are_written_in_order(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": base.t(), "part": base[1:3], "column": base[:, 2]}
    write_safetensors(tmp_path, plan_shards(plan_of(tensors), 10**9), tensors.__getitem__)
    back = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_files_are_readable_by_others_and_data_is_aligned(tmp_path):
    old = os.umask(0o077)
    try:
        tensors = some_tensors()
        write_safetensors(tmp_path, plan_shards(plan_of(tensors), 10**9), tensors.__getitem__)
    finally:
        os.umask(old)
    path = tmp_path / "model.safetensors"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize("wrong", [torch.zeros(7, 4), torch.zeros(7, 5, dtype=torch.float16)])
def test_a_tensor_unlike_its_announcement_is_refused(tmp_path, wrong):
    tensors = some_tensors()
    with pytest.raises(SafetensorsError, match=r"t.0 was announced as torch.float32 \(7, 5\)") as caught:
        write_safetensors(tmp_path, plan_shards(plan_of(tensors), 10**9), lambda name: wrong)
    assert caught.value.exit_code == 76
    assert list(tmp_path.iterdir()) == []  # nothing half-written is left


def test_a_producer_that_fails_leaves_no_file(tmp_path):
    tensors = some_tensors()

    def produce(name):
        if name == "t.4":
            raise RuntimeError("storage went away")
        return tensors[name]

    with pytest.raises(RuntimeError):
        write_safetensors(tmp_path, plan_shards(plan_of(tensors), 10**9), produce)
    assert list(tmp_path.iterdir()) == []


def test_reader_says_what_is_missing(tmp_path):
    with pytest.raises(SafetensorsError, match=r"holds neither model\.safetensors nor"):
        SafetensorsReader(tmp_path)
    tensors = some_tensors()
    write_safetensors(tmp_path, plan_shards(plan_of(tensors), 100), tensors.__getitem__)
    with pytest.raises(SafetensorsError, match="holds no tensor nothing"):
        SafetensorsReader(tmp_path).read("nothing")
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(
        SafetensorsError, match=r"names the file 'model-00001-of-\d+.safetensors', which is not in"
    ):
        SafetensorsReader(tmp_path)


def test_reader_does_not_leave_its_directory(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    tensors = some_tensors()
    write_safetensors(outside, plan_shards(plan_of(tensors), 10**9), tensors.__getitem__)
    inside = tmp_path / "inside"
    inside.mkdir()
    index = {"weight_map": {"t.0": "../outside/model.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SafetensorsError, match="which is not in"):
        SafetensorsReader(inside)
