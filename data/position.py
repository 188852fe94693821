"""The place of a stream: a small table that knows nothing of readers or workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DataConfigError
from .lanes import SampleGroup
from .packing import CURSOR_COLUMNS
from .stream_settings import StreamSettings

STATE_VERSION = 2
# what has to be equal for a state to be taken up, and how a message calls it
STATE_IDENTITY = {
    "version": "state version",
    "tokenizer_sha256": "tokenizer",
    "seed": "seed",
    "sequence_length": "sequence length",
    "packing": "packing",
    "num_lanes": "lanes (from the global batch, or data.lanes)",
}


class StreamPosition:
    """Where one reader's lanes are in each source, and what is known of the sources."""

    def __init__(
        self,
        settings: StreamSettings,
        fingerprints: Sequence[str],
        tokenizer_sha256: str,
        own_lanes: np.ndarray,
        *,
        is_first: bool,
    ) -> None:
        """Begin at sample 0; the first reader keeps what is not by lane, so that merging counts it once."""
        self.sample = 0
        self.bad_chunks: dict[tuple[int, int], int] = {}  # (source, chunk) -> bytes
        self.changes: list[str] = []
        self._names = [source.name for source in settings.sources]
        self._fingerprints = list(fingerprints)
        self._own_lanes, self._is_first = own_lanes, is_first
        self._cursors = np.zeros((len(self._names), len(own_lanes), CURSOR_COLUMNS), np.int64)
        self.samples = np.zeros(len(self._names), np.int64)
        self._left_out: list[dict[str, Any]] = []
        self._identity = {
            "version": STATE_VERSION,
            "tokenizer_sha256": tokenizer_sha256,
            "seed": settings.seed,
            "sequence_length": settings.sequence_length,
            "packing": settings.packing,
            "num_lanes": settings.lanes,
        }

    def cursors_of(self, lanes: Sequence[int]) -> tuple[tuple[int, int, int, int, int], ...]:
        """Return rows (source, lane, chunk, part, token) of lanes that have begun a source."""
        return tuple(
            (source, int(self._own_lanes[row]), *map(int, self._cursors[source, row]))  # type: ignore[misc]
            for source, row in np.argwhere(self._cursors.any(axis=2)).tolist()
            if int(self._own_lanes[row]) in lanes
        )

    def advance(self, group: SampleGroup, global_batch: int) -> None:
        """Take the cursors of samples that are handed out; a lane's samples come in their order."""
        # numpy assigns in order where an index comes more than once, so the last one of a lane and source stays
        rows = np.searchsorted(self._own_lanes, group.ids % self._identity["num_lanes"])
        self._cursors[group.sources, rows] = group.cursors
        self.samples += np.bincount(group.sources, minlength=len(self._names))
        self.sample += global_batch

    def state(self) -> dict[str, Any]:
        """Return this reader's part as JSON-able values; cursors are rows (lane, chunk, part, token)."""
        sources = [
            {
                "name": name,
                "fingerprint": self._fingerprints[number],
                "samples": int(self.samples[number]),
                "bad_chunks": sorted(
                    [chunk, size] for (source, chunk), size in self.bad_chunks.items() if source == number
                ),
                "cursors": [
                    [int(lane), *map(int, cursor)]
                    for lane, cursor in zip(self._own_lanes, self._cursors[number], strict=True)
                    if cursor.any()
                ],
            }
            for number, name in enumerate(self._names)
        ]
        return {
            **self._identity,
            "position": self.sample,
            "lanes": [int(lane) for lane in self._own_lanes],
            "sources": [*sources, *(self._left_out if self._is_first else [])],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a state of all readers. Raises DataConfigError with every difference that forbids it."""
        differences = [
            f"{STATE_IDENTITY[key]}: the checkpoint has {_short(state.get(key))}, this run {_short(value)}"
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        differences += content_differences(self._names, self._fingerprints, state)
        before = _by_present_name(self._names, self._fingerprints, state.get("sources", ()))
        if differences:
            raise DataConfigError(
                f"the data position cannot be taken up: {'; '.join(differences)}; use the same values, or start "
                "a new run"
            )
        missing = sorted(set(map(int, self._own_lanes)) - set(state["lanes"]))
        if missing or state["position"] % self._identity["num_lanes"]:
            raise DataConfigError(
                f"the data position holds {len(state['lanes'])} of {self._identity['num_lanes']} lanes (missing: "
                f"{missing[:8]}); merge the states of all readers first"
            )
        self.sample = int(state["position"])
        for number, name in enumerate(self._names):
            self._restore_source(number, before.get(name))
        self._left_out = [source for name, source in before.items() if name not in self._names]
        added = [name for name in self._names if name not in before]
        self.changes = [f"source {name} is new" for name in added]
        self.changes += [f"source {source['name']} is left out" for source in self._left_out]

    def _restore_source(self, number: int, source: dict[str, Any] | None) -> None:
        if source is None:
            return
        cursors = {row[0]: row[1:] for row in source["cursors"]}
        for row, lane in enumerate(self._own_lanes):
            self._cursors[number, row] = cursors.get(int(lane), (0, 0, 0))
        self.bad_chunks |= {(number, int(chunk)): int(size) for chunk, size in source["bad_chunks"]}
        self.samples[number] = source["samples"] if self._is_first else 0


def content_differences(names: Sequence[str], fingerprints: Sequence[str], state: dict[str, Any]) -> list[str]:
    """List the sources of a run whose content is not the one that a state knows under their names."""
    before, differences = _by_present_name(names, fingerprints, state.get("sources", ())), []
    for name, fingerprint in zip(names, fingerprints, strict=True):
        found = before.get(name, {}).get("fingerprint", fingerprint)
        if found != fingerprint:
            differences.append(
                f"content of the source {name!r} (fingerprint): the checkpoint has {_short(found)}, this run "
                f"{_short(fingerprint)}; other data needs another name in data.sources"
            )
    return differences


def _by_present_name(
    names: Sequence[str], fingerprints: Sequence[str], sources: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Give a state's sources by name; one of the same content that has another name now is known again."""
    known = {source["name"] for source in sources}
    new = [row for row in zip(fingerprints, names, strict=True) if row[1] not in known]
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        name = source["name"]
        if name not in names:
            renamed = next((row for row in new if row[0] == source["fingerprint"]), None)
            if renamed is not None:
                new.remove(renamed)
                name = renamed[1]
        found[name] = source
    return found


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all readers into one that any number of readers can go on from.

    Raises DataConfigError where they are of different runs or positions, or lanes are missing.
    """
    if not states:
        raise DataConfigError("no data positions to merge; give the state of every reader")
    first = states[0]
    lanes: list[int] = []
    sources: dict[str, dict[str, Any]] = {}
    for state in states:
        differing = [key for key in (*STATE_IDENTITY, "position") if state.get(key) != first.get(key)]
        if differing:
            key = differing[0]
            raise DataConfigError(
                f"the readers' data positions differ in {', '.join(differing)} ({key}: {_short(first.get(key))} and "
                f"{_short(state.get(key))}); merge states that were taken together"
            )
        lanes += state["lanes"]
        for source in state["sources"]:
            _merge_source(sources, source)
    twice = sorted({lane for lane in lanes if lanes.count(lane) > 1}) if len(set(lanes)) < len(lanes) else []
    if twice:
        raise DataConfigError(f"two readers claim lane {twice[0]}; give each state once")
    missing = sorted(set(range(first["num_lanes"])) - set(lanes))
    if missing:
        raise DataConfigError(
            f"the data positions hold {len(lanes)} of {first['num_lanes']} lanes (missing: {missing[:8]}); "
            "merge the states of all readers"
        )
    return {**first, "lanes": sorted(lanes), "sources": list(sources.values())}


def _merge_source(merged: dict[str, dict[str, Any]], source: dict[str, Any]) -> None:
    have = merged.setdefault(source["name"], {**source, "samples": 0, "bad_chunks": [], "cursors": []})
    if have["fingerprint"] != source["fingerprint"]:
        raise DataConfigError(
            f"the readers' data positions differ in the content of {source['name']}; merge states that were taken "
            "together"
        )
    have["samples"] += source["samples"]
    have["bad_chunks"] = sorted(map(list, {*map(tuple, have["bad_chunks"]), *map(tuple, source["bad_chunks"])}))
    have["cursors"] = sorted([*have["cursors"], *source["cursors"]])


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else repr(value)
