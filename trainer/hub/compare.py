"""Compare an exported directory with the trainer, part by part: the embedding, every layer, the logits or last states.

Both sides compute in fp32 on the weights as they were exported. Relative error decides: a wrong epsilon of the norms
leaves the cosine of the logits at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...model.config import ModelConfig
from ...model.families import layout_of
from ...model.hf.adapter import Adapter
from ...model.hf.safetensors_file import SafetensorsReader
from ..reference import Trace
from .card import Verification
from .weights import ConversionError

CGROUP = Path("/sys/fs/cgroup")
FP32_BYTES = 4
HEADROOM = 1.5  # of memory over the weights, for what is loaded beside them


def verify(
    directory: Path,
    adapter: Adapter,
    config: ModelConfig,
    trace: Trace,
    batch: Mapping[str, Tensor],
    tolerance: float,
    *,
    command: str,
) -> Verification:
    """Load a directory as any client would, and compare what it computes with the trainer's.

    A model that does not fit into this host's memory is loaded a module at a time.

    Args:
        trace: gives what the trainer makes of a batch.
        batch: fields, int64 [batch, sequence].
        command: "export" or "import", for messages.

    Raises:
        ConversionError: the logits, of sentence embeddings the last states, differ by more than `tolerance` of their
            largest value, naming the first part that departs; or transformers would complete or ignore some of the
            weights.
    """
    num_bytes = sum(row.numel for row in layout_of(config).values()) * FP32_BYTES
    whole = num_bytes * HEADROOM < _available_bytes()
    parts = Comparison(trace(batch), command)
    model = (load_whole if whole else load_lazily)(directory, adapter, command)
    model.config.use_cache = False
    with torch.no_grad():
        parts.watch(model, config.num_layers, adapter.trunks)
        found = model(**{theirs: batch[ours] for ours, theirs in adapter.inputs.items()})
    for name in adapter.outputs:
        parts.take(found[name])
    _, error, difference = max(parts.rows[-len(adapter.outputs) :], key=lambda row: _worse(row[1]))
    compared = "logits" if config.pooling is None else "last states"
    if not error <= tolerance:
        raise ConversionError(
            f"{command}: the Hugging Face model's {compared} differ from the trainer's by {error:.3e} relative "
            f"({difference:.3e} at most), more than {tolerance:.1e}; {parts.first_beyond(tolerance)}; "
            f"nothing was {command}ed"
        )
    return Verification(
        error, difference, batch["tokens"].numel(), tolerance, loaded_whole=whole, compared=compared
    )


def _worse(error: float) -> float:
    return math.inf if math.isnan(error) else error


class Comparison:
    """Takes what the Hugging Face model computes, and asks the trainer for the same as it comes."""

    def __init__(self, expected: Iterator[tuple[str, Tensor]], command: str) -> None:
        """Begin with the first part of the trainer's trace."""
        self._expected, self._command = expected, command
        self.rows: list[tuple[str, float, float]] = []  # name, relative error, largest absolute difference

    def watch(self, model: Any, num_layers: int, trunks: Sequence[str]) -> None:
        """Be called with the input of the model's first layer and the output of each; of two trunks, the outputs."""
        if trunks:
            layers: Any = [layer for name in trunks for layer in model.get_submodule(name)]
        else:
            layers = next(
                module
                for module in model.modules()
                if isinstance(module, nn.ModuleList) and len(module) == num_layers
            )
            layers[0].register_forward_pre_hook(
                lambda _, args, kwargs: self.take(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        for layer in layers:
            layer.register_forward_hook(lambda _, __, out: self.take(out[0] if isinstance(out, tuple) else out))

    def take(self, got: Tensor) -> None:
        """Compare the next part.

        Raises:
            ConversionError: its shape is another one.
        """
        name, expected = next(self._expected)
        if got.shape != expected.shape:
            raise ConversionError(
                f"{self._command}: {name} of the Hugging Face model has shape {tuple(got.shape)} and the trainer's "
                f"{tuple(expected.shape)}; nothing was {self._command}ed"
            )
        difference = (got.float() - expected).abs().max().item()
        largest = expected.abs().max().item()
        error = difference / largest if largest > 0 else (0.0 if difference == 0 else math.inf)
        self.rows.append((name, error, difference))

    def first_beyond(self, tolerance: float) -> str:
        """Say where the two part."""
        number = next(number for number, (_, error, _) in enumerate(self.rows) if not error <= tolerance)
        name, error, _ = self.rows[number]
        if number == 0:
            return f"they depart at {name} already ({error:.1e})"
        before, its_error, _ = self.rows[number - 1]
        after = " after the final norm and the head" if name.startswith("the logits") else ""
        return f"they depart at {name}{after} ({error:.1e}), behind {before} ({its_error:.1e})"


def load_whole(directory: Path, adapter: Adapter, command: str) -> Any:
    """Load a directory with the class of transformers, fp32; refuse one that it would complete with random weights."""
    import transformers
    from transformers.utils import logging

    show_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    # Its T5 takes every config.json for one with tied embeddings, and warns where two different ones are there. What
    # warnings would tell is refused below, or makes other logits.
    logging.set_verbosity_error()
    try:
        loaded: Any = getattr(transformers, adapter.architecture).from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **adapter.options,
        )
    finally:
        logging.set_verbosity(verbosity)
        if show_bars:
            logging.enable_progress_bar()
    model, info = loaded
    _refuse({kind: sorted(map(str, names)) for kind, names in info.items() if names}, command)
    return model.eval()


def load_lazily(directory: Path, adapter: Adapter, command: str) -> Any:
    """Build the same model without weights; every module reads its own from the directory as it is called."""
    import transformers
    from accelerate import init_empty_weights
    from accelerate.hooks import attach_align_device_hook

    made: Any = getattr(transformers, adapter.architecture)
    config = made.config_class.from_pretrained(directory, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model: Any = made._from_config(config, dtype=torch.float32, **adapter.options)
    reader = SafetensorsReader(directory)
    names, there = set(model.state_dict()), set(reader.names())
    tied: dict[str, str] = {}
    model.tie_weights()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    held = {id(value): name for name, value in parameters.items() if name in there}
    for name, value in parameters.items():
        if name not in there and id(value) in held:
            tied[name] = held[id(value)]
    missing, unexpected = sorted(names - there - tied.keys()), sorted(there - names)
    _refuse({"missing_keys": missing, "unexpected_keys": unexpected} if missing or unexpected else {}, command)
    attach_align_device_hook(
        model.eval(), execution_device=torch.device("cpu"), offload=True, weights_map=_OnDisk(reader, tied)
    )
    return model


class _OnDisk(Mapping[str, Tensor]):
    """A directory's tensors in fp32, read whenever they are asked for."""

    def __init__(self, reader: SafetensorsReader, tied: dict[str, str]) -> None:
        self._reader, self._tied = reader, tied

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.read(self._tied.get(name, name)).float()

    def __iter__(self) -> Iterator[str]:
        return iter((*self._reader.names(), *self._tied))

    def __len__(self) -> int:
        return len(self._reader.names()) + len(self._tied)


def _refuse(wrong: dict[str, list[str]], command: str) -> None:
    if wrong:
        raise ConversionError(f"{command}: transformers does not take the weights as they are: {wrong}")


def _available_bytes() -> int:
    """Give the memory that is left on this host, or to the container that this runs in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    host = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or one without a limit
        return host
    return min(host, limit - used)
