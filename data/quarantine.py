"""Remember what was passed over, and stop once it is too much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .config import ReadingConfig
from .errors import DataError


class Quarantine:
    """Hold the chunks of all sources that one process could not read.

    ``num_bytes`` are those of all sources together.
    """

    def __init__(self, reading: ReadingConfig, num_bytes: int) -> None:
        """Begin with none."""
        self._reading, self._num_bytes = reading, num_bytes
        self._bad: dict[tuple[int, int], int] = {}
        self._news: list[dict[str, Any]] = []

    def know(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Take up chunks that were found before: rows (source, chunk, bytes)."""
        self._bad.update({(source, chunk): num_bytes for source, chunk, num_bytes in rows})

    def add(self, source: int, chunk: int, num_bytes: int, error: DataError) -> None:
        """Take a chunk up; raises ``error`` itself where the run is to stop, DataError where it is one too many."""
        if self._reading.on_bad_chunk == "raise":
            raise error
        if (source, chunk) not in self._bad:
            self._bad[source, chunk] = num_bytes
            self._news.append({"source": source, "chunk": chunk, "bytes": num_bytes, "problem": str(error)})
        check_bad_bytes(sum(self._bad.values()), self._num_bytes, self._reading.max_bad_fraction, str(error))

    def take_news(self) -> tuple[dict[str, Any], ...]:
        """Return what was added since the last call: source, chunk, bytes, what is wrong."""
        news, self._news = self._news, []
        return tuple(news)


def check_bad_bytes(bad: int, total: int, max_bad_fraction: float, last: str) -> None:
    """Raise DataError where more than ``max_bad_fraction`` of the bytes is bad; ``last`` is the newest problem."""
    if bad > max_bad_fraction * total:
        raise DataError(
            f"{bad} of {total} bytes cannot be read, more than reading.max_bad_fraction = {max_bad_fraction}; mend the "
            f"shards (`basestone data verify` names what is damaged) or raise it; the last: {last}"
        )
