"""In what two sides differ, in words."""

from __future__ import annotations

import numpy as np
from agree import Array

from kvcanary import abi


def sorted_words(records: Array) -> Array:
    """The records as u64[n, 16], the commit word cleared, in an order of their contents alone."""
    words = np.ascontiguousarray(records).view("u8").reshape(-1, abi.VIOLATION.itemsize // 8).copy()
    words[:, 0] = 0
    return words[np.lexsort(words.T)]


def difference(side: str, name: str, found: Array, wanted: Array) -> str:
    if found.shape != wanted.shape:
        return f"{name} of {side} has shape {found.shape}, expected {wanted.shape}"
    at = np.flatnonzero(found != wanted)
    pairs = [(int(i), int(found[i]), int(wanted[i])) for i in at[:8]]
    return f"{name} of {side} differs at {len(at)} words, (index, found, expected): {pairs}"


def record_difference(side: str, wanted: Array, found: Array) -> str:
    mine, theirs = ({tuple(r.tolist()): r for r in words} for words in (wanted, found))

    def show(words: Array) -> dict[str, int]:
        record = words.view(abi.VIOLATION)[0]
        return {n: int(record[n]) for n in abi.VIOLATION.names or () if record[n]}

    missing = [show(r) for k, r in mine.items() if k not in theirs]
    extra = [show(r) for k, r in theirs.items() if k not in mine]
    return f"{side} reported {len(found)} records, expected {len(wanted)}; missing {missing[:3]}; extra {extra[:3]}"
