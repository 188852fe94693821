"""RoPE in config.json: transformers 4 says `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`."""

from __future__ import annotations

from typing import Any

from ..config import ModelConfig
from .rules import AdapterError, refuse_unless

LLAMA3 = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_max_sequence_length": "original_max_position_embeddings",
}
KNOWN = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *LLAMA3.values()}
DEFAULT_BASE = 10000.0


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Say base and scaling in both spellings."""
    scaling = None
    if config.rope_scaling is not None:
        numbers = {theirs: getattr(config.rope_scaling, ours) for ours, theirs in LLAMA3.items()}
        scaling = {"rope_type": "llama3", **numbers}
    return {
        "rope_theta": config.rope_base,
        "rope_scaling": scaling,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_base},
    }


def from_hf(hf: dict[str, Any], subject: str) -> dict[str, Any]:
    """Read base and scaling as fields of a model, in either spelling or both.

    Raises AdapterError, opened by `subject`, for another kind of RoPE and for spellings that say different things.
    """
    tables = {name: hf[name] or {} for name in ("rope_scaling", "rope_parameters") if name in hf}
    scalings = [_scaling(name, table, subject) for name, table in tables.items()]
    bases = [table["rope_theta"] for table in (hf, *tables.values()) if table.get("rope_theta") is not None]
    if len(set(bases)) > 1 or any(scaling != scalings[0] for scaling in scalings):
        found = {name: hf[name] for name in ("rope_theta", *tables) if name in hf}
        raise AdapterError(
            "config.json says two things about RoPE, and versions of transformers would read different ones: "
            + ", ".join(f"{name} = {value!r}" for name, value in found.items())
        )
    scaling, field = scalings[0] if scalings else None, LLAMA3["original_max_sequence_length"]
    if scaling is not None and field in hf:  # transformers 5 would take this one
        refuse_unless(subject, {field: hf[field]}, {field: scaling["original_max_sequence_length"]})
    return {"rope_base": bases[0] if bases else DEFAULT_BASE, "rope_scaling": scaling}


def _scaling(name: str, table: dict[str, Any], subject: str) -> dict[str, Any] | None:
    kind = table.get("rope_type", table.get("type", "default"))
    found = {
        f"{name}.rope_type": kind,
        f"{name}.partial_rotary_factor": table.get("partial_rotary_factor", 1.0),
    }
    needed: dict[str, object] = {
        f"{name}.rope_type": ("default", "llama3"),
        f"{name}.partial_rotary_factor": 1.0,
    }
    for key in table.keys() - KNOWN:
        found[f"{name}.{key}"] = table[key]
        needed[f"{name}.{key}"] = None
    refuse_unless(subject, found, needed)
    return {ours: table[theirs] for ours, theirs in LLAMA3.items()} if kind == "llama3" else None
