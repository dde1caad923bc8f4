"""Block allocator of the small engine: free list, reference counts, prefix index, eviction of cached blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free or evictable."""


def prefix_key(tokens: NDArray[np.int32], n_tokens: int, salt: int = 0) -> bytes:
    """Key of the block that ends after `n_tokens` of `tokens: i32[n]`: the exact prefix, so no two collide.

    Under a salt that is not 0, that of an adapter, it ends with eight bytes more: 2^63 + salt, which no token's are.
    """
    key = tokens[:n_tokens].astype("<i4", copy=False).tobytes()
    return key if not salt else key + (1 << 63 | salt).to_bytes(8, "little")


class BlockAllocator:
    """Owns the blocks 1..n_blocks-1 of a pool; block 0 is reserved for padding and never given out.

    A block is in one of three states: referenced (count > 0), cached (count 0, still in the prefix index, evicted in
    least-recently-freed order) or free. Freed blocks are reused last in, first out.

    `on_index` is told when a block enters the index (True) and when it leaves it (False); `on_evict` before a cached
    block leaves it for new content, with its key.
    """

    def __init__(self, n_blocks: int, page_size: int) -> None:
        if n_blocks < 2:
            raise ValueError(f"n_blocks is {n_blocks}, must be >= 2 (block 0 is reserved): give the pool more blocks")
        if page_size < 1:
            raise ValueError(f"page_size is {page_size}, must be >= 1 slots")
        self.n_blocks = n_blocks
        self.page_size = page_size
        self.ref_counts: NDArray[np.int32] = np.zeros(n_blocks, np.int32)
        self._free = list(range(n_blocks - 1, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self.n_evictions = 0
        self.on_index: Callable[[int, bool], None] = lambda block, is_in: None
        self.on_evict: Callable[[int, bytes], None] = lambda block, key: None

    @property
    def n_available(self) -> int:
        """Blocks that `allocate` can give out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def n_cached(self) -> int:
        """Blocks that nobody references but that the prefix index still knows."""
        return len(self._cached)

    def allocate(self, n: int) -> list[int]:
        """Take `n` blocks with count 1, evicting cached ones only when no free block is left.

        Raises OutOfBlocksError, and then takes nothing.
        """
        if n > self.n_available:
            raise OutOfBlocksError(f"{n} blocks asked for, {self.n_available} available: free a request first")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        self.ref_counts[blocks] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Take one more reference on referenced or cached `blocks`."""
        for block in blocks:
            if self.ref_counts[block] == 0 and block not in self._cached:
                raise ValueError(f"block {block} is free: only referenced or cached blocks can be shared")
            self._cached.pop(block, None)
            self.ref_counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop one reference on each of a request's `blocks`, the last first: tails are evicted before heads."""
        for block in reversed(blocks):
            if self.ref_counts[block] == 0:
                raise ValueError(f"block {block} is not referenced: it was freed twice or never allocated")
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def publish(self, tokens: NDArray[np.int32], index: int, block: int, salt: int = 0) -> None:
        """Enter the fully written `block`, the `index`-th of `tokens: i32[n]`, unless its prefix is already known."""
        if self.ref_counts[block] == 0:
            raise ValueError(f"block {block} is not referenced: only a live block can be published")
        key = prefix_key(tokens, (index + 1) * self.page_size, salt)
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self.on_index(block, True)

    def unpublish(self, block: int) -> None:
        """Take a block that was not written after all out of the index, if it is there; its owners keep it."""
        if self.ref_counts[block] == 0:
            raise ValueError(f"block {block} is not referenced: only a live block can be taken out of the index")
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            self.on_index(block, False)

    def forget_all(self) -> None:
        """Empty the index, as when new weights make all KV worthless: cached blocks are free, owners keep theirs."""
        for block in list(self._key_of):
            del self._block_of[self._key_of.pop(block)]
            self.on_index(block, False)
        self._free += self._cached
        self._cached.clear()

    def index(self) -> dict[int, bytes]:
        """The key of each block that the index knows."""
        return dict(self._key_of)

    def match(self, tokens: NDArray[np.int32], salt: int = 0) -> list[int]:
        """The longest chain of indexed blocks that holds a prefix of `tokens: i32[n]`; takes no reference."""
        found: list[int] = []
        for index in range(len(tokens) // self.page_size):
            block = self._block_of.get(prefix_key(tokens, (index + 1) * self.page_size, salt))
            if block is None:
                break
            found.append(block)
        return found

    def match_window(self, tokens: NDArray[np.int32], window: int, salt: int = 0) -> list[int]:
        """The longest prefix of whole blocks of which those that its next query sees (one at least) are indexed.

        Blocks before these are 0, the reserved block, indexed or not; takes no reference.
        """
        n_blocks = len(tokens) // self.page_size
        known = [self._block_of.get(prefix_key(tokens, (i + 1) * self.page_size, salt), 0) for i in range(n_blocks)]
        for n in range(n_blocks, 0, -1):
            first = min(max(n * self.page_size - window + 1, 0) // self.page_size, n - 1)
            if 0 not in known[first:n]:
                return [0] * first + known[first:n]
        return []

    def n_unreferenced(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are cached: sharing them lowers `n_available` by that many."""
        return sum(block in self._cached for block in blocks)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self.n_evictions += 1
        self.on_evict(block, self._key_of[block])
        del self._block_of[self._key_of.pop(block)]
        self.on_index(block, False)
        return block
