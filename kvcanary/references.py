"""Who shares which blocks of a pool: the references that owners took on top of a block's primary ownership.

Kept by owner, since a call is by one owner on many blocks. An owner's references are a list in order of arrival, which
a call searches as a whole: requests mostly give back all that they hold. An owner of many who gives them back a few at
a time (a prefix cache) gets a count per block instead. Memory is O(blocks + references); an owner without references
leaves nothing behind.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
N_TABLES = 2  # counts per block that a pool has at any rate; more only for owners of a good part of it
_PART_TO_GET, _PART_TO_KEEP = 8, 16  # 1 / the part of the pool that is a good one: at most 128 bytes for a reference
_MIN_SEARCHED = 1 << 15  # references searched in vain; from here on a table may pay
_CALL = (1 << 31) - 1
_COUNT = (1 << 32) - 1


class Found(NamedTuple):
    """Which blocks of a call its owner shares.

    Attributes:
        n: how many of them.
        is_there: bool[ids of the call], None: all of them, or none.
        where: int[n] places in the owner's list, of the latest reference to each block; None: all of the list.
            With a table: what it has for these blocks.
    """

    n: int
    is_there: Array | None
    where: Array | None


NOTHING = Found(0, None, None)


class References:
    """All owners' references to the blocks of one pool."""

    def __init__(self, n_blocks: int) -> None:
        self._n_blocks = n_blocks
        self._n_calls = 0  # tells the order of arrival; after 2^31 calls it begins anew, and names change their order
        self._of: dict[int, _List | _Table] = {}
        self._n_tables = 0
        self._max_searched = max(_MIN_SEARCHED, n_blocks >> 2)

    @property
    def n_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(held.n_bytes for held in self._of.values())

    @property
    def n_owners(self) -> int:
        """Owners that hold references."""
        return len(self._of)

    def take(self, owner: int, at: Array) -> None:
        """One more reference of an owner's to each block; some blocks, none twice. The array is kept."""
        self._n_calls += 1
        held = self._of.get(owner)
        if held is None:
            self._of[owner] = _List(at, self._n_calls & _CALL)
        else:
            held.add(at, self._n_calls & _CALL)

    def are_all_of(self, owner: int, at: Array) -> bool:
        """Whether these are all the blocks that an owner shares, as one call of its own named them."""
        held = self._of.get(owner)
        return isinstance(held, _List) and held.is_one_call(at)

    def end(self, owner: int) -> None:
        """Give back all that an owner shares, in a list."""
        del self._of[owner]

    def find(self, owner: int, at: Array, mark: Array) -> Found:
        """Which of these blocks (at least one) an owner shares; mark[at[i]] is i, other marks may be anything."""
        held = self._of.get(owner)
        if held is None:
            return NOTHING
        if isinstance(held, _List) and held.n_searched > self._max_searched:
            held = self._as_table(owner, held)
        return held.find(at, mark)

    def give(self, owner: int, at: Array, found: Found) -> None:
        """Give back what was found: one reference each."""
        held = self._of[owner]
        held.drop(at, found)
        if not held.n:
            self._n_tables -= isinstance(held, _Table)
            del self._of[owner]
        elif isinstance(held, _Table) and self._n_tables > N_TABLES and held.n * _PART_TO_KEEP < self._n_blocks:
            self._n_tables -= 1
            self._of[owner] = held.as_list()

    def _as_table(self, owner: int, held: _List) -> _List | _Table:
        held.n_searched = 0
        if self._n_tables >= N_TABLES and held.n * _PART_TO_GET < self._n_blocks:
            return held
        self._n_tables += 1
        self._of[owner] = table = _Table(self._n_blocks, *held.arrays())
        return table

    def sharers(self, block: int) -> list[tuple[int, int]]:
        """(owner, references) of a block, in order of arrival; looks through everything, for messages and tests."""
        known = [(*held.look_up(block), owner) for owner, held in self._of.items()]
        return [(owner, n) for _, n, owner in sorted(known, key=lambda k: k[0]) if n]


class _List:
    """Some references of an owner: blocks and numbers of calls, in order of arrival; a block may come repeatedly."""

    def __init__(self, blocks: Array, calls: Array | int) -> None:
        self.n = len(blocks)
        self.n_searched = 0  # references that calls looked at and left
        self._blocks = blocks
        self._calls = calls  # a number: of all of them

    @property
    def n_bytes(self) -> int:
        return self._blocks.nbytes + (0 if isinstance(self._calls, int) else self._calls.nbytes)

    def arrays(self) -> tuple[Array, Array]:
        calls = self._calls
        return self._blocks[: self.n], np.full(self.n, calls) if isinstance(calls, int) else calls[: self.n]

    def is_one_call(self, at: Array) -> bool:
        return len(at) == self.n and isinstance(self._calls, int) and self._blocks.tobytes() == at.tobytes()

    def add(self, at: Array, call: int) -> None:
        n = self.n + len(at)
        if n > len(self._blocks) or isinstance(self._calls, int):
            blocks, calls = self.arrays()
            self._blocks, self._calls = np.empty(n + n // 2, np.intp), np.empty(n + n // 2, np.int32)
            self._blocks[: self.n], self._calls[: self.n] = blocks, calls
        self._blocks[self.n : n] = at
        self._calls[self.n : n] = call
        self.n = n

    def find(self, at: Array, mark: Array) -> Found:
        n, blocks = len(at), self._blocks[: self.n]
        first = int(mark[blocks[0]])
        if at[first : first + self.n].tobytes() == blocks.tobytes():  # all of the list, as it is
            if n == self.n:
                return Found(n, None, None)
            is_there = np.zeros(n, np.bool_)
            is_there[first : first + self.n] = True
            return Found(self.n, is_there, None)
        places = mark.take(blocks)  # of a block that is not in the call: anything, so clip, and look what stands there
        is_hit = at.take(places, mode="clip") == blocks
        n_hits = int(np.count_nonzero(is_hit))
        if not n_hits:
            self.n_searched += self.n
            return NOTHING
        if n_hits == self.n:
            if n_hits == n and isinstance(self._calls, int):  # of one call: no block twice
                return Found(n, None, None)
            is_there = np.zeros(n, np.bool_)
            is_there[places] = True
            if np.count_nonzero(is_there) == n_hits:  # no block twice
                return Found(n_hits, None if n_hits == n else is_there, None)
        hits = is_hit.nonzero()[0]
        where = np.empty(n, np.intp)
        where.fill(-1)
        where[places.take(hits)] = hits  # of several references to one block the latest is left
        is_there = where >= 0
        n_there = int(np.count_nonzero(is_there))
        return Found(n_there, None, where) if n_there == n else Found(n_there, is_there, where[is_there])

    def drop(self, _at: Array, found: Found) -> None:
        self.n_searched += self.n - found.n
        if found.where is None:
            self.n = 0
            return
        is_kept = np.ones(self.n, np.bool_)
        is_kept[found.where] = False
        kept = is_kept.nonzero()[0]
        if not isinstance(self._calls, int):
            self._calls = self._calls.take(kept)
        self._blocks = self._blocks.take(kept)
        self.n = len(kept)

    def look_up(self, block: int) -> tuple[int, int]:
        blocks, calls = self.arrays()
        found = calls[blocks == block]
        return (int(found[0]), len(found)) if len(found) else (0, 0)


class _Table:
    """Many references of an owner: for each block, the call that was the first of them << 32 | how many; else 0."""

    def __init__(self, n_blocks: int, blocks: Array, calls: Array) -> None:
        self.n = len(blocks)
        self._table = np.zeros(n_blocks, np.int64)
        self._table[blocks[::-1]] = calls[::-1].astype(np.int64) << 32 | 1  # of several the first is left
        self._has_repeats = bool(np.count_nonzero(self._table) < len(blocks))  # there may be a count above 1
        if self._has_repeats:
            self._table &= ~_COUNT
            self._table += np.bincount(blocks, minlength=n_blocks)

    @property
    def n_bytes(self) -> int:
        return self._table.nbytes

    def add(self, at: Array, call: int) -> None:
        known, first = self._table.take(at), call << 32 | 1
        n_known = int(np.count_nonzero(known))
        if not n_known:
            self._table[at] = first
        else:
            self._has_repeats = True
            self._table[at] = known + 1 if n_known == len(at) else np.where(known > 0, known + 1, first)
        self.n += len(at)

    def find(self, at: Array, _mark: Array) -> Found:
        known = self._table.take(at)
        n = int(np.count_nonzero(known))
        return Found(n, None if n in (0, len(at)) else known > 0, known)

    def drop(self, at: Array, found: Found) -> None:
        known = found.where
        assert known is not None
        if found.is_there is not None:
            there = found.is_there.nonzero()[0]
            at, known = at.take(there), known.take(there)
        repeats = (known & _COUNT) > 1 if self._has_repeats else None
        self._table[at] = 0 if repeats is None else np.where(repeats, known - 1, 0)
        self.n -= found.n

    def as_list(self) -> _List:
        blocks = self._table.nonzero()[0]
        known = self._table.take(blocks)
        order = np.argsort(known >> 32, kind="stable")
        counts = (known & _COUNT).take(order)
        calls = (known >> 32).take(order).astype(np.int32)
        return _List(np.repeat(blocks.take(order), counts), np.repeat(calls, counts))

    def look_up(self, block: int) -> tuple[int, int]:
        known = int(self._table[block])
        return known >> 32, known & _COUNT
