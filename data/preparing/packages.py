"""Find out, before any work, which optional packages the sources need and which of them are missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

from ..sources import ARROW_SUFFIX, HTML_SUFFIXES, PARQUET_SUFFIX, WARC_SUFFIXES, content_suffix
from .settings import missing_package


def missing_packages(files: Iterable[Path], keep_html: bool) -> list[str]:
    """Say of each package that cannot be imported which file needs it, and how to install it."""
    needed: dict[str, tuple[Path, str]] = {}
    for file in files:
        for package, extra in _packages_for(file, keep_html):
            needed.setdefault(package, (file, extra))
    problems = []
    for package, (file, extra) in needed.items():
        try:
            import_module(package)
        except ImportError:
            problem = missing_package(str(file), package.partition(".")[0], extra)
            remedy = ", or keep the markup: --keep-html" if package == "trafilatura" else ""
            problems.append(problem + remedy)
    return problems


def _packages_for(file: Path, keep_html: bool) -> Iterator[tuple[str, str]]:
    suffix = content_suffix(file)
    if suffix in (PARQUET_SUFFIX, ARROW_SUFFIX):
        yield "pyarrow", "parquet"
    elif file.suffix.lower() == ".zst":
        yield "zstandard", "zst"
    if suffix in WARC_SUFFIXES:
        yield "warcio.archiveiterator", "web"
    if not keep_html and suffix in (*HTML_SUFFIXES, WARC_SUFFIXES[0]):
        yield "trafilatura", "web"
