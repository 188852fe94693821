"""Pieces of HTML that all sections are made of. Every text is escaped here. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .figures import NO_VALUE


def section(title: str, content: str, note: str = "") -> str:
    """Give a titled section; `note` stands under the title."""
    return f"<h2>{escape(title)}</h2>" + _note(note) + content


def part(title: str, content: str, note: str = "") -> str:
    """Give a titled part of a section."""
    return f"<h3>{escape(title)}</h3>" + _note(note) + content


def figures(*drawn: tuple[str, str]) -> str:
    """Lay charts side by side: (title, SVG); n/a stands where there was nothing to draw."""
    cells = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        + (chart or f'<p class="soft">{NO_VALUE}</p>')
        + "</figure>"
        for title, chart in drawn
    ]
    return f'<div class="charts">{"".join(cells)}</div>'


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, scrolls: bool = False) -> str:
    """Give a table, in a box of its own height where it `scrolls`; "" without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    style = "table scroll" if scrolls else "table"
    return f'<div class="{style}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(named: Sequence[tuple[str, str]]) -> str:
    """Give the headline figures: (what, figure); those that are n/a are left out."""
    cells = [
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in named
        if value != NO_VALUE
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def text(value: object) -> str:
    """Write a value of a record as it is; nothing for null."""
    return "" if value is None else str(value)


def _note(note: str) -> str:
    return f'<p class="soft">{escape(note)}</p>' if note else ""
