"""Files of torch.save: real models of transformers come in whole, and what is planted in a file is never executed."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import environment
from run_files import run_of

from basestone.model.hf.adapter import adapter_for
from basestone.model.layout import decoder_layout
from basestone.trainer import foreign, runtime
from basestone.trainer.checkpoint.inspection import problems_of
from basestone.trainer.checkpoint.reader import Reader
from basestone.trainer.checkpoint.tensors import CheckpointTensors
from basestone.trainer.config import ResolvedRun
from basestone.trainer.errors import ConfigError
from basestone.trainer.foreign import import_weights

VOCAB = 300  # padded to a multiple, in our own shapes
ROOT = Path(foreign.__file__).resolve().parents[1]
Import = Callable[..., Path]


def resolved_run(family: str = "llama", **changes: Any) -> ResolvedRun:
    if family == "gpt2":
        changes = {"model__family": "gpt2", "model__num_query_groups": None, **changes}
    return run_of(**changes).resolve(1, VOCAB)


def transformers_model(resolved: ResolvedRun) -> torch.nn.Module:
    """The family's class with random weights, biases and norms."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    model = resolved.run.model
    classes = {"llama": (LlamaConfig, LlamaForCausalLM), "gpt2": (GPT2Config, GPT2LMHeadModel)}
    config, kind = classes[model.family]
    fields = adapter_for(model).hf_config(model, dtype=torch.float32, bos=1, eos=2, pad=3)
    out = kind(config(**fields)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in out.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return out


def states(resolved: ResolvedRun) -> dict[str, torch.Tensor]:
    return dict(transformers_model(resolved).state_dict())


def own_states(resolved: ResolvedRun) -> dict[str, torch.Tensor]:
    return {name: torch.randn(row.shape) for name, row in decoder_layout(resolved.run.model).items()}


@pytest.fixture
def bring_in(tmp_path: Path) -> Import:
    """Save an object, or take a file, and import it."""

    def run(saved: Any, resolved: ResolvedRun | None = None) -> Path:
        file, out = tmp_path / "weights.pt", tmp_path / "out"
        if isinstance(saved, Path):
            file = saved
        else:
            torch.save(saved, file)
        import_weights(
            file, out, resolved or resolved_run(), tokenizer_sha256="abc", versions={"basestone": "1"}
        )
        return out

    return run


def tensors_of(out: Path, resolved: ResolvedRun) -> CheckpointTensors:
    return CheckpointTensors(Reader(out), decoder_layout(resolved.run.model))


def refused(bring_in: Import, saved: Any, *words: str, resolved: ResolvedRun | None = None) -> str:
    """Check that nothing is left of a refused import, and give the message."""
    with pytest.raises(ConfigError) as caught:
        bring_in(saved, resolved)
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert caught.value.exit_code == 64
    return text


# ---- what comes in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "module"])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("gpt2", True)], ids=["llama", "tied", "gpt2"]
)
def test_a_model_of_transformers_comes_in_whole(tmp_path, bring_in, family, tied, wrapper):
    resolved = resolved_run(family, model__tied=tied)
    model = transformers_model(resolved)
    saved = model.state_dict()
    assert ("lm_head.weight" in saved) is True, "transformers saves the tied head, too"
    out = bring_in({wrapper: saved, "epoch": 3} if wrapper else saved, resolved)
    assert problems_of(out) == [] and sorted(path.name for path in tmp_path.iterdir()) == ["out", "weights.pt"]
    tensors = tensors_of(out, resolved)
    adapter = adapter_for(resolved.run.model)
    for tensor in adapter.tensors(resolved.run.model):
        assert torch.equal(adapter.read(tensor, tensors.read), saved[tensor.name]), tensor.name
    padding = tensors.read("embed.word.weight")[VOCAB:]
    assert len(padding) and not padding.any()


def test_the_state_is_of_a_run_that_has_not_begun(bring_in):
    resolved = resolved_run()
    reader = Reader(bring_in(own_states(resolved), resolved))
    state = reader.state()
    assert reader.index.tensors == ["master"]
    assert (state["step"], state["tokens"], state["optimizer_steps"]) == (
        0,
        0,
        0,
    ) and "weights_only" not in state
    assert state["tokenizer_sha256"] == "abc" and state["imported_from"] == "weights.pt"
    assert state["run"] == resolved.run.model_dump(mode="json") and state["run"]["model"]["vocab_size"] == VOCAB


def test_our_own_names_come_in(bring_in):
    resolved = resolved_run()
    saved = own_states(resolved)
    tensors = tensors_of(bring_in(saved, resolved), resolved)
    assert all(torch.equal(tensors.read(name), value) for name, value in saved.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_become_fp32(bring_in, dtype):
    resolved = resolved_run()
    saved = {name: value.to(dtype) for name, value in own_states(resolved).items()}
    tensors = tensors_of(bring_in(saved, resolved), resolved)
    assert all(torch.equal(tensors.read(name), value.float()) for name, value in saved.items())


def test_views_and_parameters_come_in(bring_in):
    resolved = resolved_run()
    saved = own_states(resolved)
    name = "layers.0.mlp.linear_fc2.weight"
    turned = saved[name].t().contiguous()
    tensors = tensors_of(
        bring_in(
            {**saved, name: turned.t(), "norm.weight": torch.nn.Parameter(saved["norm.weight"])}, resolved
        ),
        resolved,
    )
    assert torch.equal(tensors.read(name), saved[name])
    assert torch.equal(tensors.read("norm.weight"), saved["norm.weight"])


def test_constants_of_old_versions_are_left_out(bring_in):
    for family, name in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        resolved = resolved_run(family)
        saved = {**states(resolved), name: torch.ones(1, 1, 64, 64)}
        out = bring_in(saved, resolved)
        assert problems_of(out) == []
        out.rename(out.with_name(family))


# ---- another model ------------------------------------------------------------------------------------------------


def test_every_difference_is_in_one_message(tmp_path, bring_in):
    saved = states(resolved_run())
    saved["model.norm.weight"] = torch.ones(65)
    saved["model.layers.7.mlp.up_proj.weight"] = torch.ones(2)
    saved["model.layers.0.mlp.up_proj.weight"] = torch.ones(256, 64, dtype=torch.int8)
    saved["model.layers.1.mlp.up_proj.weight"] = 3.5
    del saved["lm_head.weight"]
    text = refused(
        bring_in,
        saved,
        *("weights.pt: holds another model than the run file's [model]: lm_head.weight is missing; ",),
        "model.norm.weight has shape (65,) there and (64,) here",
        "model.layers.7.mlp.up_proj.weight is not in this model",
        "model.layers.0.mlp.up_proj.weight has dtype int8",
        "model.layers.1.mlp.up_proj.weight is a float",
    )
    assert len(text.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_whole_other_model_is_said_in_short(bring_in):
    text = refused(
        bring_in,
        {f"x.{number}": torch.ones(1) for number in range(500)},
        "model.embed_tokens.weight is missing",
    )
    assert re.search(r"; and \d{3} more$", text) and len(text) < 2000


def test_a_tied_head_that_differs_is_refused(bring_in):
    resolved = resolved_run(model__tied=True)
    saved = states(resolved)
    head = saved["lm_head.weight"].clone()
    head[7, 7] += 1
    refused(
        bring_in,
        {**saved, "lm_head.weight": head},
        "lm_head.weight differs from model.embed_tokens.weight, and model.tied = true",
        resolved=resolved,
    )
    refused(bring_in, {**saved, "lm_head.weight": head[:-1]}, "lm_head.weight has shape", resolved=resolved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("names", [states, own_states], ids=["transformers", "own"])
def test_what_is_not_finite_is_refused_and_leaves_nothing(tmp_path, bring_in, names, value):
    saved = names(resolved_run())
    name = list(saved)[-2]
    saved[name] = saved[name].double()
    saved[name].view(-1)[-1] = value
    refused(bring_in, saved, f"{name} holds values that are not finite in fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(1).expand(300, 64), "repeats 4 stored bytes"),
        (torch.ones(1).expand(10**6, 10**6), "has shape (1000000, 1000000) there and (300, 64) here"),
        (torch.eye(300, 64).to_sparse(), "is no dense tensor in memory (torch.sparse_coo, cpu)"),
        (torch.empty(300, 64, device="meta"), "is no dense tensor in memory (torch.strided, meta)"),
        (torch.ones(300, 64, dtype=torch.complex64), "has dtype complex64"),
        (torch.ones(300, 64).to(torch.float8_e4m3fn), "has dtype float8_e4m3fn"),
        ({"a": torch.ones(1)}, "is a dict"),
        (None, "is a NoneType"),
    ],
    ids=["stride 0", "10^12 elements", "sparse", "meta", "complex", "float8", "dict", "None"],
)
def test_what_is_no_dense_tensor_is_refused_before_it_is_copied(tmp_path, bring_in, value, words):
    saved = {**states(resolved_run()), "model.embed_tokens.weight": value}
    refused(bring_in, saved, f"model.embed_tokens.weight {words}")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    assert (tmp_path / "weights.pt").stat().st_size < 10**7


@pytest.mark.parametrize(
    "saved", [torch.ones(3), [torch.ones(3)], 7, "text"], ids=["tensor", "list", "int", "str"]
)
def test_what_is_no_state_dict_is_refused(bring_in, saved):
    refused(bring_in, saved, "where a state dict belongs")


def test_an_existing_target_is_refused(tmp_path, bring_in):
    (tmp_path / "out").mkdir()
    refused(bring_in, own_states(resolved_run()), "out: exists already; remove it or name another")
    (tmp_path / "out").rmdir()
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    refused(bring_in, own_states(resolved_run()), "exists already")


# ---- what others may have planted ---------------------------------------------------------------------------------


class Canary:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def plant(kind: str, file: Path, canary: Canary) -> None:
    """Write a file that sings when it is loaded as any program may load it."""
    saved: dict[str, Any] = own_states(resolved_run())
    if kind == "pickle":
        file.write_bytes(pickle.dumps({**saved, "x": canary}))
    elif kind == "old format":
        torch.save({**saved, "x": canary}, file, _use_new_zipfile_serialization=False)
    elif kind == "protocol 5":
        torch.save({**saved, "x": canary}, file, pickle_protocol=5)
    else:
        torch.save(
            {"state_dict": saved, "optimizer": canary} if kind == "beside" else {**saved, "x": canary}, file
        )


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["inside", "beside", "pickle", "old format", "protocol 5"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_planted_pickle(tmp_path, bring_in, kind, suffix):
    file, nest = tmp_path / f"weights{suffix}", tmp_path / "canary"
    plant(kind, file, Canary(nest))
    text = refused(bring_in, file)
    if kind in ("inside", "beside"):
        assert "wants posix.mkdir, which is outside torch's allow-list and may run code; save the plain" in text
    assert not nest.exists() and not (tmp_path / "out").exists()
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert nest.exists(), "the canary must be able to sing"


@pytest.mark.faults
def test_what_libraries_added_to_the_allow_list_does_not_count(bring_in):
    assert argparse.Namespace in torch.serialization.get_safe_globals(), "Megatron-core has added it"
    before = set(torch.serialization.get_safe_globals())
    saved = {"model": own_states(resolved_run()), "args": argparse.Namespace(a=1)}
    refused(bring_in, saved, "wants argparse.Namespace, which is outside torch's allow-list")
    assert set(torch.serialization.get_safe_globals()) == before
    assert runtime.Runtime  # whose import has brought Megatron-core in


@pytest.mark.parametrize("value", ["1", "true", "yes", "x"])
def test_env_reopening_pickle_refused(bring_in, monkeypatch, value):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    refused(
        bring_in, own_states(resolved_run()), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets files run"
    )
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert bring_in(own_states(resolved_run())).is_dir()


@pytest.mark.faults
def test_damaged_files_are_refused_or_come_in_as_numbers(tmp_path, bring_in):
    """A flipped byte leads the unpickler anywhere; nothing but our error comes out."""
    file = tmp_path / "good.pt"
    torch.save(own_states(resolved_run()), file)
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        info = next(member for member in archive.infolist() if member.filename.endswith("data.pkl"))
    generator = torch.Generator().manual_seed(3)
    outcomes = set()
    for _ in range(150):
        at = info.header_offset + int(torch.randint(info.file_size, (1,), generator=generator))
        (tmp_path / "bad.pt").write_bytes(good[:at] + bytes([good[at] ^ 0x15]) + good[at + 1 :])
        try:
            out = bring_in(tmp_path / "bad.pt")
        except ConfigError as error:
            outcomes.add("refused")
            assert len(str(error)) < 4000
        else:
            outcomes.add("came in")
            assert problems_of(out) == []
            out.rename(tmp_path / f"out{at}")
    assert "refused" in outcomes
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize("keep", [0, 1, 3, 1000, -1, -30])
def test_a_truncated_file_is_refused(tmp_path, bring_in, keep):
    file = tmp_path / "good.pt"
    torch.save(own_states(resolved_run()), file)
    (tmp_path / "bad.pt").write_bytes(file.read_bytes()[:keep])
    refused(bring_in, tmp_path / "bad.pt", "bad.pt: is no whole file of torch.save since version 1.6; load it")
    refused(bring_in, tmp_path / "no.pt", "no.pt: there is no such file")
    (tmp_path / "dir.pt").mkdir()
    refused(bring_in, tmp_path / "dir.pt", "dir.pt: is a directory; name the file in it")


def test_an_archive_that_grows_as_it_is_read_is_refused(tmp_path, bring_in):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**8))
    refused(bring_in, tmp_path / "bomb.pt", "bomb/data.pkl is compressed, as torch.save never does; ")


def test_a_pickle_that_is_too_large_is_refused(tmp_path, bring_in, monkeypatch):
    monkeypatch.setattr(foreign, "MOST_PICKLE_BYTES", 1 << 10)
    refused(bring_in, own_states(resolved_run()), "its pickle has more than 0 MiB")


def test_a_torchscript_file_is_refused(tmp_path, bring_in):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refused(bring_in, tmp_path / "script.pt", "TorchScript files are not taken")


def test_only_one_module_opens_files_of_torch():
    """Beside ruff's list: in the files where that list does not count, too."""
    found: dict[str, set[str]] = {"load": set(), "pickle": set()}
    for folder in ("launch", "trainer", "model", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            text, name = path.read_text(), str(path.relative_to(ROOT))
            if re.search(r"\b(torch|jit|serialization)\.load\(|weights_only=False", text):
                found["load"].add(name)
            if re.search(
                r"^\s*(import|from) (pickle|cPickle|dill|cloudpickle|joblib|shelve)\b", text, re.MULTILINE
            ):
                found["pickle"].add(name)
    assert found == {"load": {"trainer/foreign.py"}, "pickle": {"trainer/forks.py"}}


@pytest.mark.faults
def test_a_killed_import_leaves_no_target(tmp_path):
    torch.save(own_states(resolved_run()), tmp_path / "weights.pt")
    script = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "tests" / "trainer")!r}, {str(ROOT / "tests")!r}]
from test_trainer_foreign import resolved_run
from basestone.trainer import foreign, importing
write, count = importing.RankWriter.write, 0
def die(self, data):
    global count
    count += 1
    if count == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, data)
importing.RankWriter.write = die
foreign.import_weights(Path(sys.argv[1]), Path(sys.argv[2]), resolved_run(), tokenizer_sha256="", versions={{}})
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "weights.pt", tmp_path / "out"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and names[0].startswith(".tmp-out-") and names[1] == "weights.pt"
