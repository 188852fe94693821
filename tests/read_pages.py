"""Read a page as a test sees it: its tags, its headline figures, its tables and its findings."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Check that tags are balanced; collect tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def tiles(page_text: str) -> dict[str, str]:
    """Give the headline figures by name."""
    found = re.findall(r'<div class="tile"><b>(.*?)</b><span>(.*?)</span></div>', page_text)
    return {name: value for value, name in found}


def rows_of(page_text: str) -> list[list[str]]:
    """Give the cells of all table rows."""
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page_text)]


def notes(page_text: str) -> list[tuple[str, str, str]]:
    """Give (kind, title, evidence) of all findings."""
    return re.findall(r'<li class="(warning|note)"><b>(.*?)</b>(.*?) <span', page_text)
