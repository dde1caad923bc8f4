"""Decisions read from bytes: the same bytes, the same decisions; past their end, always the first choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """Reads decisions from fuzzed bytes, one byte for most."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def below(self, n: int) -> int:
        """0 to n - 1."""
        return self.byte() % n

    def choice(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def maybe(self) -> bool:
        return bool(self.byte() & 1)

    def some(self, n: int) -> bytes:
        """Up to n bytes."""
        found = self._data[self._at : self._at + n]
        self._at += n
        return found

    def text(self) -> str:
        return self.some(self.below(24)).decode("utf-8", "surrogateescape")

    def rest(self) -> bytes:
        return self.some(len(self._data))
