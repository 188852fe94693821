"""A Hugging Face directory as a checkpoint to go on from, in any layout. No code of the directory is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.storage import new_directory, storage_errors, write_atomic
from ...data.tokenizer import Tokenizer
from ...model.config import ModelConfig
from ...model.embedding.hf import POOLING_FILE, pooling_of
from ...model.families import layout_of
from ...model.hf.adapter import Adapter, adapter_for_hf
from ...model.hf.safetensors_file import SafetensorsReader
from .. import runtime as processes
from ..checkpoint.format import PICKLE_SUFFIXES, step_name
from ..checkpoint.opening import CHECKPOINTS
from ..checkpoint.reader import Reader
from ..checkpoint.tensors import CheckpointTensors
from ..config import RunConfig
from ..errors import ConfigError
from ..importing import global_tensors, write_step
from ..load import run_to_toml, validate_run
from ..reference import trace_of
from .card import Verification
from .compare import verify
from .config_file import name_of, read_config, read_object
from .export import batch_to_compare, check_transformers

TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # the first is what transformers takes
PICKLES = (".bin", *PICKLE_SUFFIXES)
RUN_FILE = "continue.toml"
COMMENTS = (
    "Goes on with the weights beside it: name your shards in data.train, choose steps, batch and learning rate, then",
    "basestone train continue.toml",
)
MOST_PARAMETERS_PER_BYTE = 1000  # fewer are compared, and told by their names
LONGEST_SEQUENCE = 4096  # that the run file begins with


def import_directory(
    directory: Path,
    out: Path,
    *,
    tokenizer: Path | None,
    versions: dict[str, str],
    compare: bool = True,
    tolerance: float = 1e-4,
) -> tuple[ModelConfig, Verification | None]:
    """Write weights, tokenizer and a run file into `out`, which stands where a run directory may.

    Memory holds the largest parameter twice, plus the whole model in fp32 while it is compared, where the host has
    room for it.

    Args:
        tokenizer: in place of the directory's own.
        out: the directory to make; it appears whole or not at all.
        compare: what transformers and the trainer make of random ids. It finds what config.json says and we do not
            read.

    Raises:
        ConfigError: the directory is not whole, holds another model than its config.json says (every difference in one
            message), weights that are not finite or are pickles, or a tokenizer that does not belong to it.
        AdapterError: its config.json describes a model that ours cannot be.
        ConversionError: the logits of the two differ by more than `tolerance` of the largest.
    """
    if compare:
        check_transformers("import")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: exists already; remove it or name another")
    adapter, model = _model_of(directory)
    tokens = Tokenizer(tokenizer or _tokenizer_of(directory))
    assert model.vocab_size is not None  # `_model_of` has seen to it
    if tokens.vocab_size > model.vocab_size:
        raise ConfigError(
            f"{tokens.path}: has {tokens.vocab_size} pieces and the model of {directory} a vocabulary of "
            f"{model.vocab_size}; name the tokenizer that it was trained with by --tokenizer"
        )
    run = _run_of(model, directory)
    mapped = _mapped(directory, adapter, model)
    tensors = global_tensors(directory, mapped, model, f"{directory / 'config.json'}")
    verification = None
    with new_directory(out) as partial, storage_errors(f"writing {out}"):
        (partial / CHECKPOINTS).mkdir()
        step = partial / CHECKPOINTS / step_name(0)
        write_step(
            step,
            run,
            tensors,
            imported_from=name_of(directory),
            tokenizer_sha256=tokens.sha256,
            versions=versions,
        )
        if compare:
            verification = _compared(directory, step, adapter, model, tolerance)
        write_atomic(partial / run.data.tokenizer, tokens.content)
        write_atomic(partial / RUN_FILE, run_to_toml(_sections(run), COMMENTS).encode())
    return model, verification


def _compared(
    directory: Path, step: Path, adapter: Adapter, model: ModelConfig, tolerance: float
) -> Verification:
    tensors = CheckpointTensors(Reader(step), layout_of(model))
    trace = trace_of(model, tensors, processes.start(), rounded_to=torch.float32)
    batch = batch_to_compare(adapter, model, None, model.max_sequence_length)
    try:
        return verify(directory, adapter, model, trace, batch, tolerance, command="import")
    except RecursionError as error:
        raise ConfigError(f"{directory / 'config.json'}: is nested too deeply for transformers") from error


def _model_of(directory: Path) -> tuple[Adapter, ModelConfig]:
    path = directory / "config.json"
    if (directory / CHECKPOINTS).is_dir():
        raise ConfigError(
            f"{directory}: is a run directory, and needs no import; name it where a CKPT is wanted"
        )
    if not path.exists():
        raise ConfigError(
            f"{directory}: holds no config.json; name the directory of a model as the Hugging Face hub has it"
        )
    config = read_config(directory)
    if (pooling := directory / POOLING_FILE).exists():
        config["pooling"] = pooling_of(read_object(pooling))
    try:
        adapter = adapter_for_hf(config)
        model = adapter.model_config(config)
        if model.vocab_size is None:
            raise ValueError("config.json has no field 'vocab_size'")
        return adapter, model
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: has a value of another kind than its field: {error}") from error


def _tokenizer_of(directory: Path) -> Path:
    for name in TOKENIZERS:
        if (directory / name).is_file():
            return directory / name
    raise ConfigError(f"{directory}: holds neither {' nor '.join(TOKENIZERS)}; name one by --tokenizer")


def _mapped(directory: Path, adapter: Adapter, model: ModelConfig) -> dict[str, Tensor]:
    """Give the directory's tensors, mapped and not yet read, under the names of the family's class.

    Files may leave the name of the class's trunk away, as those of its base class do.
    """
    try:
        reader = SafetensorsReader(directory)
    except ValueError as error:
        pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
        if not pickles:
            raise ConfigError(str(error)) from error
        raise ConfigError(
            f"{directory}: its weights are pickles ({', '.join(pickles[:3])}), which may run code and are not opened; "
            "take the model's safetensors files, or `basestone checkpoint import`, which goes by torch's allow-list"
        ) from error
    _check_size(directory, model)
    known = {tensor.name for tensor in adapter.tensors(model)}
    trunks = {name.partition(".")[0] for name in known}
    names: dict[str, str] = {}
    for name in reader.names():
        wholes = [f"{trunk}.{name}" for trunk in trunks if f"{trunk}.{name}" in known]
        whole = wholes[0] if name not in known and wholes else name
        if whole in names:
            raise ConfigError(f"{directory}: holds {whole} twice, as {names[whole]} and as {name}; remove one")
        names[whole] = name
    return {whole: reader.read(name) for whole, name in names.items()}


def _check_size(directory: Path, model: ModelConfig) -> None:
    """Refuse a model beyond all that could be in the files, before its parameters are listed one by one."""
    there = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert model.vocab_size is not None  # `_model_of` has seen to it
    rows = model.vocab_size + (model.max_sequence_length if model.position == "learned" else 0)
    of_layer = model.num_attention_heads * model.head_dim + model.ffn_hidden_size
    wanted = model.hidden_size * (rows + model.num_layers * of_layer)  # there are more: it bounds them
    if wanted > MOST_PARAMETERS_PER_BYTE * there:
        raise ConfigError(
            f"{directory / 'config.json'}: describes more than {wanted:.1e} parameters, and the weights have "
            f"{there:,} bytes; take the config.json that belongs to them"
        )


def _run_of(model: ModelConfig, directory: Path) -> RunConfig:
    values: dict[str, Any] = {
        "model": model.model_dump(),
        "data": {
            "train": "shards",
            "tokenizer": "tokenizer.model",
            "sequence_length": min(model.max_sequence_length, LONGEST_SEQUENCE),
        },
        "train": {"steps": 1000, "global_batch": 32},
        "optimizer": {"lr": 1e-5},
        "schedule": {"warmup_steps": 100},
        "checkpoint": {"every_steps": 100},
    }
    return validate_run(values, str(directory))


def _sections(run: RunConfig) -> dict[str, Any]:
    """Give what the run file says; the rest are defaults."""
    dumped = run.model_dump(mode="json", exclude_defaults=True)
    dumped["train"]["init_from"] = "."
    dumped["model"] = run.model.model_dump(mode="json", exclude={"preset"})
    return dumped
