"""Arguments that several calls take: what they may be."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcanary import abi
from kvcanary.errors import BatchError, ConfigError

MAX_FORWARDS = abi.LAST_FORWARD - abi.RENUMBER_AT  # between two end_step(): there their numbers are moved down
MAX_SALT = (1 << 64) - 1


def is_first_forward(call: str, index: Any) -> bool:
    """Whether ``index``, the number of a forward within its step, is that of the first; may run inside a capture.

    Raises:
        BatchError: no number that a forward can have.
    """
    if type(index) is not int and not _is_integer(index):  # the first is the case of every step
        raise BatchError(_index_words(call, index))
    if not 0 <= index < MAX_FORWARDS:
        raise BatchError(_index_words(call, index))
    return bool(index == 0)


def check_salt(call: str, salt: Any) -> int:
    """A request's salt.

    Raises:
        BatchError: anything but an integer of 64 bits.
    """
    if not _is_integer(salt) or not 0 <= salt <= MAX_SALT:
        raise BatchError(f"{call}: salt={salt!r}: give an integer from 0 to 2^64 - 1")
    return int(salt)


def check_observer(observer: Any) -> None:
    """Of `CanaryManager.add_observer`.

    Raises:
        ConfigError: what cannot be asked at the end of a step; a class instead of one of its objects.
    """
    methods = ("is_due", "step")
    if isinstance(observer, type) or not all(callable(getattr(observer, name, None)) for name in methods):
        raise ConfigError(
            f"add_observer({observer!r}): give an object with is_due(step) and step(facts), see "
            "kvcanary.observers.Observer"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _index_words(call: str, index: Any) -> str:
    return (
        f"{call}: index={index!r}: give the number of the forward within its step, an integer from 0 (the first, which "
        f"clears the taint) to {MAX_FORWARDS - 1}"
    )
