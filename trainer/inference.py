"""What is done with a finished checkpoint in one process: evaluate, generate, export."""

from __future__ import annotations

import functools
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.errors import DataConfigError
from ..data.heldout import HeldOutSet, load_heldout
from ..data.reading.reader import RangeReader
from ..data.reading.transport import is_local, join, shown
from ..data.storage import write_atomic
from ..data.tokenizer import Tokenizer
from ..model.config import ModelConfig
from ..model.families import layout_of
from . import runtime as processes
from .batch import cut, model_fields
from .checkpoint.opening import open_checkpoint
from .checkpoint.places import local_path
from .checkpoint.tensors import CheckpointTensors
from .config import RunConfig
from .console import tenths
from .errors import ConfigError
from .evaluate import held_out_loss
from .hub.card import CardFacts
from .hub.export import DTYPES, export_checkpoint
from .load import validate_run
from .meters.tariff import Tariff
from .places import locate_heldout, task_of
from .reference import generate, load_model, logits_of, sums_of, trace_of
from .report.records import RunRecords, number, read_records
from .report.summary import metered_share

VERIFY_SEQUENCES = 2
TOKENIZER = "tokenizer.model"  # of a run directory
NO_RECORDS = RunRecords("", [], {}, [], {}, "")  # of a copy elsewhere, whose model card goes without
CURVE_POINTS = 20


class OpenCheckpoint:
    """A step directory, or the newest good one of a run directory, with the run that wrote it."""

    def __init__(self, place: Path | str, tokenizer: Path | None = None) -> None:
        """Open the checkpoint at a path or a URL; no weights are read yet.

        Raises:
            CheckpointError: it is damaged or not there.
            ConfigError: its tokenizer cannot be found, or is another one.
        """
        reader = open_checkpoint(place)
        self.name, self.state = os.path.basename(reader.place), reader.state()
        self.run: RunConfig = validate_run(self.state["run"], reader.at())
        self.model: ModelConfig = self.run.model
        self.tensors = CheckpointTensors(reader, layout_of(self.model))
        self._run_place = os.path.dirname(os.path.dirname(reader.place))
        self.tokenizer = self._find_tokenizer(tokenizer)

    def _find_tokenizer(self, given: Path | None) -> Path:
        wanted = self.state["tokenizer_sha256"]
        place = str(given) if given else join(self._run_place, TOKENIZER)
        found = local_path(place) or _fetched(place, wanted)
        if found is not None and not found.exists():
            raise ConfigError(f"{found}: the checkpoint's tokenizer is not there; name it with --tokenizer")
        if found is None or not _is_tokenizer(found, wanted):
            raise ConfigError(
                f"{shown(place)}: is not the tokenizer that the checkpoint was trained with (sha256 {wanted})"
            )
        return found

    def _logits(self, dtype: torch.dtype) -> Any:
        runtime = processes.start()
        return logits_of(load_model(self.model, self.tensors, runtime, rounded_to=dtype), runtime)

    def _trace(
        self, dtype: torch.dtype, batch: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        runtime = processes.start()
        yield from trace_of(self.model, self.tensors, runtime, rounded_to=dtype)(batch)

    def _working_dtype(self) -> torch.dtype:
        return DTYPES[self.run.train.dtype]

    def evaluate(self, given: list[str], max_tokens: int | None = None) -> dict[str, dict[str, float]]:
        """Measure on shards at paths or URLs; without any, on the run's own held-out sets.

        Args:
            max_tokens: of each set; by default as many as the run itself took.
        """
        max_tokens = max_tokens or self.run.evaluate.max_tokens
        names = [os.path.basename(place.rstrip("/")) for place in given]
        places = {
            name if names.count(name) == 1 else shown(place): place
            for name, place in zip(names, given, strict=True)
        } or self._own_heldout()
        if not places:
            raise ConfigError("nothing to evaluate on: the run has no data.heldout; name shards with --data")
        runtime = processes.start()
        model = load_model(self.model, self.tensors, runtime, rounded_to=self._working_dtype())
        results = {}
        for name, path in places.items():
            data = self._heldout_set(path, max_tokens)
            fields = {key: torch.from_numpy(values) for key, values in data.arrays.items()}
            batches = cut(model_fields(fields, documents_apart=self.run.data.attention == "document"), 1)
            found = sums_of(model, batches, self.run.filled_task.parts, runtime)
            results[name] = held_out_loss(*found, data.num_bytes, self.run.filled_task).record()
        return results

    def _own_heldout(self) -> dict[str, str]:
        return locate_heldout(self.run.data, self.run.reading, processes.cache_dir(), self.tokenizer)

    def _heldout_set(self, place: str, max_tokens: int) -> HeldOutSet:
        return load_heldout(
            place,
            self.tokenizer,
            task_of(self.run, self.tokenizer),
            max_tokens=max_tokens,
            short_fraction=self.run.task.short_fraction,
            reader=RangeReader(self.run.reading),
        )

    def generate(self, prompt: str, *, max_new_tokens: int, temperature: float, top_k: int, seed: int) -> str:
        """Continue a prompt, as the beginning of a document."""
        if not (self.model.causal and self.model.predicts_tokens):
            what = f"{self.model.family} predicts no next token"
            if self.model.num_decoder_layers:
                what = f"{self.model.family} continues no prompt, for it reads a text first"
            elif not self.model.predicts_tokens:
                what = f"{self.model.family} with model.pooling makes vectors, and no tokens"
            raise ConfigError(f"generate: {what}; `basestone export` it, and use it from there")
        tokenizer = Tokenizer(self.tokenizer)
        ids = torch.tensor([[tokenizer.bos, *tokenizer.encode(prompt).tolist()]])
        out = generate(
            self._logits(self._working_dtype()),
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            eos=tokenizer.eos,
            max_sequence_length=self.model.max_sequence_length,
            seed=seed,
        )
        return tokenizer.decode(out[0].tolist())

    def export(
        self,
        out: Path,
        *,
        dtype: str,
        verify: bool,
        licence: str,
        name: str,
        max_shard_bytes: int,
        num_processes: int,
    ) -> str:
        """Write a Hugging Face directory; give a line that says what was checked."""
        if dtype not in DTYPES:
            raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
        report = export_checkpoint(
            self.tensors,
            self.model,
            self.tokenizer,
            out,
            dtype=dtype,  # type: ignore[arg-type]
            facts=self._facts(name or out.name, licence),
            sequence_length=self.model.max_sequence_length,
            trace=functools.partial(self._trace, DTYPES[dtype]) if verify else None,
            samples=self._samples() if verify else None,
            max_shard_bytes=max_shard_bytes,
            num_processes=num_processes,
            tell=tenths(f"writing {out.name}"),
        )
        checked, verified = "not verified", report.verification
        if verified is not None:
            checked = f"{verified.compared} equal the trainer's within {verified.relative_error:.1e} (relative)"
        return f"{out}: {self.name}, {dtype}, {checked}"

    def _samples(self) -> dict[str, torch.Tensor] | None:
        """Give some real held-out text as fields, where the run has any that is still there."""
        try:
            places = self._own_heldout()
        except ValueError:
            return None
        for path in places.values():
            data = self._heldout_set(path, self.run.evaluate.max_tokens)
            fields = {name: torch.from_numpy(values[:VERIFY_SEQUENCES]) for name, values in data.arrays.items()}
            return {name: field.long() for name, field in model_fields(fields, documents_apart=False).items()}
        return None

    def _facts(self, name: str, licence: str) -> CardFacts:
        step, run_dir = self.state["step"], local_path(self._run_place)
        imported_from = self.state.get("imported_from", "")
        records = read_records(run_dir) if run_dir is not None else NO_RECORDS
        heldout = {
            label: lines[-1]
            for label, lines in ((key, _until(values, step)) for key, values in records.evals.items())
            if lines
        }
        joules, tariff = number(records.ledger, "joules"), Tariff(self.run.meter)
        return CardFacts(
            name=name,
            step=step,
            tokens=self.state["tokens"],
            heldout=heldout,
            hardware=_hardware(),
            joules=joules,
            metered_share=metered_share(records.ledger),
            joules_source=str(records.ledger.get("joules_source", "none")),
            g_co2e=tariff.footprint(joules, 0.0).g_co2e,
            pue=tariff.rates.pue,
            grid=tariff.intensity,
            licence=licence,
            data="" if imported_from else ", ".join(map(_short_place, self.run.data.places)),
            origin=imported_from or _short_place(self.run.train.init_from or ""),
            loss_curve=_curve(records, step),
            versions=self.state["versions"],
        )


def _fetched(place: str, sha256: str) -> Path | None:
    """Bring a tokenizer of this fingerprint into the cache; None where it is another one."""
    try:
        content = RangeReader().read_all(place)
    except DataConfigError as error:
        raise ConfigError(f"{error}; or name the checkpoint's tokenizer with --tokenizer") from error
    kept = processes.cache_dir() / "tokenizers" / sha256
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=kept.parent) as folder:
        trial = Path(folder) / TOKENIZER
        trial.write_bytes(content)
        if not _is_tokenizer(trial, sha256):
            return None
    write_atomic(kept, content)
    return kept


def _is_tokenizer(path: Path, sha256: str) -> bool:
    try:
        return Tokenizer(path).sha256 == sha256
    except DataConfigError:
        return False


def _until(lines: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    return [line for line in lines if line["step"] <= step]


def _curve(records: RunRecords, step: int) -> list[tuple[int, float]]:
    points = [(int(at), value) for at, value in records.curve("loss") if at <= step]
    stride = max(1, len(points) // CURVE_POINTS)
    return points[::stride] + (points[-1:] if points and (len(points) - 1) % stride else [])


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU ({platform.machine()}, {json.dumps(platform.processor() or 'unknown')})"


def _short_place(place: str) -> str:
    """Give what a card may say of a place: its last part."""
    return Path(place).name if is_local(place) and "/" in place else shown(place)
