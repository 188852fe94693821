"""The Hugging Face directory that fine-tuning starts from: what it must be, what goes over. Imports no torch."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..hub.config_file import read_config

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OWN_FILES = ("run.toml", "checkpoints", "MANIFEST.json", "index.json")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors' names and config.json's
POSITION_FIELDS = ("max_position_embeddings", "n_positions")
ENCODERS = ("bert-generation",)  # that have a class for the next token and none for masked ones


def directory_problems(path: Path) -> list[str]:
    """Say all that keeps a directory from being fine-tuned; nothing in it is executed or unpickled."""
    if not path.is_dir():
        return [f"{path} is no directory; give what `basestone export` wrote, or a downloaded model"]
    if not (path / "config.json").is_file():
        if any((path / name).exists() for name in OWN_FILES):
            return [f"{path} is a run or a checkpoint; export it first: basestone export {path} OUT"]
        return [f"{path} has no config.json: it is no Hugging Face model directory"]
    found = []
    try:
        config = read_config(path)
    except ConfigError as error:
        return [str(error)]
    if "auto_map" in config:
        found.append(
            f"{path}/config.json names code of its own (auto_map), which is never run; take a model whose class "
            "transformers has"
        )
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
        found.append(
            f"{path} has its weights as a pickle alone ({pickled[0]}), which would run code; convert it to safetensors"
            if pickled
            else f"{path} has no weights (*.safetensors)"
        )
    found += _damaged_files(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        found.append(f"{path} has no tokenizer (tokenizer.json); copy the model's own into it")
    return found


def next_token_problems(path: Path) -> list[str]:
    """Say why a model that config.json describes cannot be tuned as one that predicts the next token.

    transformers has such a class for many encoders, too, and loads it without a word: unless config.json says
    `is_decoder`, it sees the token that it predicts. Types that transformers does not know are left to its own message.
    """
    from transformers.models.auto import configuration_auto, modeling_auto

    config = read_config(path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in configuration_auto.CONFIG_MAPPING_NAMES:
        return []
    has_encoder = config.get(
        "is_encoder_decoder", kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )
    is_encoder = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind in ENCODERS
    is_turned = config.get("is_causal") is False or config.get("use_bidirectional_attention") is True
    if (path / "modules.json").is_file():
        why = "makes vectors of texts (modules.json) and predicts no next token"
    elif has_encoder:
        why = f"is of type {kind}, which has an encoder before its decoder"
    elif is_encoder and not (config.get("is_decoder") or config.get("causal")):
        why = f"is of type {kind}, which predicts no next token"
    elif is_turned:
        why = f"is of type {kind}, but attends to both sides by its config.json"
    elif kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        why = f"is of type {kind}, for which transformers has no class that predicts the next token"
    else:
        return []
    can_classify = kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    advice = "use --task classify, or take" if can_classify else "take"
    return [f"{path} {why}, so --task sft cannot tune it; {advice} a decoder such as llama"]


def _damaged_files(path: Path) -> list[str]:
    """Say which files' headers are wrong; transformers would fail at the first, behind all other checks."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            found.append(f"{file} cannot be read as safetensors: {error}; copy it again")
    return found


def stored_dtype(path: Path) -> str:
    """Give the dtype that the weights are stored in, as config.json spells it.

    Where config.json says none, it is the one that most weights have.

    Raises:
        ConfigError: it is none that tuned weights are written in, or a file is no safetensors.
    """
    config = read_config(path)
    if name := config.get("dtype") or config.get("torch_dtype"):
        place = f"{path}/config.json has"
    else:
        name, place = _most_common_dtype(path), f"most weights of {path} have"
    if name not in DTYPES.values():
        raise ConfigError(f"{place} dtype {name!r}; it may be {', '.join(DTYPES.values())}")
    return str(name)


def _most_common_dtype(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    counts: Counter[str] = Counter()
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as tensors:
                for key in tensors.keys():  # noqa: SIM118  it is no mapping
                    tensor = tensors.get_slice(key)
                    counts[tensor.get_dtype()] += prod(tensor.get_shape())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
    floats = [(count, dtype) for dtype, count in counts.items() if dtype.startswith(("F", "BF"))]
    dtype = max(floats)[1] if floats else "none of floating point"
    return DTYPES.get(dtype, dtype)


def num_positions(config: dict[str, Any]) -> int | None:
    """Give the longest sequence that the model takes; None where config.json does not say."""
    return next((int(config[field]) for field in POSITION_FIELDS if config.get(field)), None)


def tuned_config(
    config: dict[str, Any], *, architecture: str, pad_id: int, labels: list[str] | None
) -> dict[str, Any]:
    """Change in config.json what fine-tuning changed, and no more: both spellings of transformers 4 and 5 stay."""
    tuned = {**config, "architectures": [architecture], "pad_token_id": pad_id}
    if labels is not None:
        tuned["id2label"] = {str(index): label for index, label in enumerate(labels)}
        tuned["label2id"] = {label: index for index, label in enumerate(labels)}
        tuned["problem_type"] = "single_label_classification"
    return tuned


def licence_lines(path: Path) -> list[str]:
    """Give what the model card's front matter says about the licence, as it stands there."""
    card = path / "README.md"
    lines = card.read_text(errors="replace").splitlines() if card.is_file() else []
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return []
    front = lines[1 : lines.index("---", 1)]
    return [line for line in front if line.startswith(("license:", "license_name:", "license_link:"))]
