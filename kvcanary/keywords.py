"""Keywords that a dataclass does not have are told with the nearest that it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import wraps
from typing import Any


def refuse_unknown_keywords(cls: type[Any], error: type[Exception]) -> None:
    """Let the dataclass raise ``error`` for a keyword that it does not have; Python's own TypeError names no other.

    Its signature, its fields and what type checkers see of it stay as they are, and a good call is only passed on.
    """
    init, names = cls.__init__, [f.name for f in fields(cls) if f.init]

    @wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        try:
            init(self, *args, **given)
        except TypeError:
            unknown = [name for name in given if name not in names]
            if not unknown:
                raise
            raise error(f"{cls.__name__}(): {unknown_words(unknown, names)}") from None

    cls.__init__ = checked


def unknown_words(unknown: Iterable[str], names: Iterable[str]) -> str:
    """What to say of keywords that are none of ``names``."""
    from difflib import get_close_matches  # nobody waits for it unless there is something to say

    known, told = sorted(names), []
    for name in unknown:
        near = get_close_matches(name, known, n=1)
        told.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return f"unknown keyword {', '.join(told)}; it takes {', '.join(known)}"
