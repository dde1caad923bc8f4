"""The code blocks of the README and of docs/, and what each page needs to run."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FRAGMENT = "fragment of an engine"
_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """One fenced block: ``line`` is that of its first line of code."""

    page: Path
    line: int
    language: str
    title: str
    code: str


def pages() -> list[Path]:
    """All pages of docs/; none where the tests were copied without it."""
    return sorted(DOCS.rglob("*.md"))


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 2, found[1], found[2] or "", found[3])
        for found in _FENCE.finditer(text)
    ]


def needs_of(page: Path) -> list[str]:
    """What ``<!-- needs: gpu cupy -->`` says: modules, and "gpu"."""
    found = re.search(r"<!-- needs: (.*?) -->", page.read_text(encoding="utf-8"))
    return found[1].split() if found else []


def missing(modules: list[str]) -> list[str]:
    """Those that are not installed; none is imported."""

    def is_there(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of its parent package
            return False

    return [name for name in modules if not is_there(name)]
