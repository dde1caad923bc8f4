"""KV that has left the pool for host memory: what cached blocks held when they were evicted, by their prefix."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.blocks import prefix_key


@dataclass(eq=False)
class Stored:
    """KV of some neighbouring positions, and what a guard knows of it; filled when the move that stores it is done."""

    first: int  # position of the first slot
    tokens: NDArray[np.int32]  # those of the slots
    salt: int = 0
    kv: list[NDArray[Any]] = field(default_factory=list)  # per array of the cache: [slots, heads, head_dim]
    bundle: bytes = b""  # of `SlotBundle.to_bytes`; empty where no guard was there

    def part(self, first: int) -> Stored:
        """What is at position `first` and behind it; the bundle stays whole, an import takes its last entries."""
        n = first - self.first
        return Stored(first, self.tokens[n:], self.salt, [values[n:] for values in self.kv], self.bundle)


class HostStore:
    """Keeps the newest `capacity` blocks that were evicted from the prefix cache."""

    def __init__(self, capacity: int, page_size: int) -> None:
        self.capacity = capacity
        self.page_size = page_size
        self.n_stored = self.n_restored = 0  # blocks
        self._entries: OrderedDict[bytes, Stored] = OrderedDict()

    def put(self, key: bytes) -> Stored | None:
        """A place for the block of that key; None if it is stored already, or nothing is kept."""
        if key in self._entries or not self.capacity:
            return None
        n_tokens, salt = len(key) // 4, 0
        if n_tokens % self.page_size:  # it ends with a salt
            n_tokens, salt = n_tokens - 2, int.from_bytes(key[-8:], "little") & ~(1 << 63)
        tokens = np.frombuffer(key, "<i4", n_tokens).astype(np.int32)
        first = n_tokens - self.page_size
        stored = self._entries[key] = Stored(first, tokens[first:], salt)
        self.n_stored += 1
        if len(self._entries) > self.capacity:
            self._entries.popitem(last=False)
        return stored

    def match(self, tokens: NDArray[np.int32], n_found: int, salt: int) -> list[Stored]:
        """The blocks that continue the `n_found` blocks which the pool has of `tokens: i32[n]`."""
        found: list[Stored] = []
        for index in range(n_found, len(tokens) // self.page_size):
            stored = self._entries.get(prefix_key(tokens, (index + 1) * self.page_size, salt))
            if stored is None:
                break
            found.append(stored)
        return found

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
