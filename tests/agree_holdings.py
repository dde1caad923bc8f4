"""Who holds which blocks of a random engine: its requests, and a cache of prefixes."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
from agree_batches import n_places, table_pool
from agree_state import Book, Habits, Load, Plan, Request
from numpy.typing import NDArray

from kvcanary import PREFIX_CACHE, KvPool, LifecycleEvent


class Holdings:
    """Gives out blocks, shares and takes them back, and keeps what the guard is to be told of that.

    Args:
        luts: the look-up table of each pool that has one (the engine writes into it), else None.
    """

    def __init__(
        self,
        pools: list[KvPool],
        luts: list[NDArray[np.int64] | None],
        habits: Habits,
        rng: random.Random,
        max_requests: int,
    ) -> None:
        self.pools, self.luts, self.habits, self.rng = pools, luts, habits, rng
        self.is_static = habits.table == "static"
        self.tables = [i for i, lut in enumerate(luts) if lut is None]  # pools with a table of their own
        self.draft_pools = [i for i, p in enumerate(pools) if p.token_offset == 1]
        sizes = [p.n_slots if lut is not None else p.n_blocks for p, lut in zip(pools, luts, strict=True)]
        reserved = [
            {b * p.page_size + i for b in p.reserved_blocks for i in range(p.page_size)}
            if lut is not None
            else set(p.reserved_blocks)
            for p, lut in zip(pools, luts, strict=True)
        ]
        self.books = [Book(n, r, self.rng) for n, r in zip(sizes, reserved, strict=True)]
        self.unit = math.lcm(*(pools[i].page_size for i in self.tables))
        self.cache: dict[tuple[Any, ...], list[list[int]]] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.loads: list[Load] = []  # not begun yet
        self.free_slots = list(range(max_requests))
        self.rng.shuffle(self.free_slots)
        self.did: Counter[str] = Counter()  # how often what was done, for tests that ask whether it was

    def _key(self, request: Request, end: int) -> tuple[Any, ...]:
        """A draft pool's slot holds the token behind its position, so there the next token belongs to the key."""
        return (end, request.salt, *[*request.tokens, 0][: end + bool(self.draft_pools)])

    def _first_needed(self, i: int, prefix: int) -> int:
        window = self.pools[i].window
        first = max(0, prefix - window + 1) if window else 0
        return 0 if self.pools[i].sink or self.pools[i].ring_length else first

    def _is_whole(self, units: list[list[list[int]]]) -> bool:
        prefix = len(units) * self.unit
        for i in range(len(self.pools)):
            table = table_pool(self.luts, i)
            page, blocks = self.pools[table].page_size, [b for unit in units for b in unit[table]]
            for p in range(self._first_needed(i, prefix), prefix):
                block = blocks[p // page]
                lut = self.luts[i]
                if block < 0 or (lut is not None and int(lut[block * page + p % page]) not in self.books[i].refs):
                    return False
        return True

    # ---- taking ------------------------------------------------------------------------------------------------------
    def _make_room(self, plan: Plan, request: Request, start: int, n: int) -> bool:
        """Blocks, and slots behind a LUT, for n new tokens; others may have to give theirs."""
        if self.is_static:
            return True
        end = start + n
        missing = self._missing(request, start, end)
        planned = {row.request for row in plan.rows} | {request}
        while any(n > len(self.books[i].free) for i, n in missing.items()):
            idle = [r for r in self.running if r not in planned]
            unused = [key for key, unit in self.cache.items() if self._is_unused(unit)]
            if unused:
                self._evict_unit(self.rng.choice(unused))
            elif idle:
                self.preempt(self.rng.choice(idle))
            elif self.cache:
                self._evict_unit(self.rng.choice(list(self.cache)))
            else:
                return False
        for i in self.tables:
            blocks = [self.books[i].take(request.id) for _ in range(missing[i])]
            request.blocks[i] += blocks
            request.shown[i] += blocks
        for i, lut in enumerate(self.luts):
            unmapped = [p for p in range(start, end) if lut is not None and self._lut_slot(i, request, p) < 0]
            for p in unmapped:
                self._map(i, request, p)
        return True

    def _is_unused(self, unit: list[list[int]]) -> bool:
        """Whether nobody but the cache holds some block of it."""
        return any(b >= 0 and self.books[i].refs[b] == 1 for i, blocks in enumerate(unit) for b in blocks)

    def _missing(self, request: Request, start: int, end: int) -> dict[int, int]:
        """What each pool has to find for positions start to end, at most."""
        missing = {
            i: max(0, -(-n_places(self.pools[i], end) // self.pools[i].page_size) - len(request.blocks[i]))
            for i in self.tables
        }
        fresh = [p for p in range(start, end) if p >= len(request.blocks[0]) * self.pools[0].page_size]
        page = self.pools[0].page_size
        for i, lut in enumerate(self.luts):
            if lut is not None:  # whole blocks of the first pool, besides what its blocks do not have yet
                old = [p for p in range(start, end) if p not in fresh and self._lut_slot(i, request, p) < 0]
                missing[i] = max(0, missing[0]) * page + len(old)
        return missing

    def _map(self, i: int, request: Request, p: int) -> None:
        page, lut = self.pools[0].page_size, self.luts[i]
        assert lut is not None
        lut[request.blocks[0][p // page] * page + p % page] = self.books[i].take(request.id)

    def _lut_slot(self, i: int, request: Request, p: int) -> int:
        page, lut = self.pools[0].page_size, self.luts[i]
        assert lut is not None
        slot = int(lut[request.blocks[0][p // page] * page + p % page])
        return slot if slot in self.books[i].refs else -1

    def _publish(self, plan: Plan, request: Request, end: int) -> None:
        for n in range(end // self.unit):
            key = self._key(request, (n + 1) * self.unit)
            if key in self.cache:
                continue
            unit: list[list[int]] = [[] for _ in self.pools]
            for i in self.tables:
                per = self.unit // self.pools[i].page_size
                unit[i] = request.blocks[i][n * per : (n + 1) * per]
                for b in unit[i]:
                    if b >= 0:
                        self.books[i].share(b, PREFIX_CACHE)
            self.cache[key] = unit
            plan.published.append(key)

    # ---- letting go --------------------------------------------------------------------------------------------------
    def preempt(self, request: Request) -> None:
        self.did["preemptions"] += 1
        self._release(request)
        request.computed = 0
        self.waiting.append(request)

    def _release(self, request: Request) -> None:
        for i in self.tables:
            for b in request.blocks[i]:
                if self.is_static:
                    self.books[i].calls.append(("free", b, request.id))
                else:
                    self._drop(i, b, request.id)
        request.blocks, request.shown = [], []
        self.running.remove(request)
        self.free_slots.append(request.slot)
        self.rng.shuffle(self.free_slots)
        request.slot = -1

    def _evict_unit(self, key: tuple[Any, ...]) -> None:
        for i, blocks in enumerate(self.cache.pop(key, [])):
            for b in blocks:
                self._drop(i, b, PREFIX_CACHE)

    def _drop(self, i: int, block: int, owner: int) -> None:
        if block < 0 or not self.books[i].drop(block, owner):
            return
        page = self.pools[i].page_size
        slots = range(block * page, (block + 1) * page)
        self._give_up_loads(i, slots)
        for j, lut in enumerate(self.luts if i == 0 else ()):  # whatever the tables of the first pool place
            for s in slots if lut is not None else ():
                self._unmap(j, s)

    def _give_up_loads(self, i: int, slots: range) -> None:
        """Nothing is loaded into a block that nobody holds: whoever is given it next may have other text there."""
        for load in self.loads:
            for slot in slots if load.pool == i else ():
                load.places.pop(slot, None)

    def _unmap(self, j: int, full_slot: int) -> None:
        lut = self.luts[j]
        assert lut is not None
        if int(lut[full_slot]) in self.books[j].refs:
            self.did["slots unmapped"] += 1
            self.books[j].drop(int(lut[full_slot]), 0)
        lut[full_slot] = self.rng.choice((-1, *(b * self.pools[j].page_size for b in self.pools[j].reserved_blocks)))

    def _evict_window(self, request: Request) -> None:
        if self.is_static:
            return
        for i, pool in enumerate(self.pools):
            first, page = self._first_needed(i, request.computed), self.pools[table_pool(self.luts, i)].page_size
            if not pool.window:
                continue
            if self.luts[i] is not None:
                self._evict_lut(i, request, first)
                continue
            for n in range(min(first // page, len(request.blocks[i]))):
                if request.blocks[i][n] >= 0:
                    self.did["blocks behind a window"] += 1
                    self._drop(i, request.blocks[i][n], request.id)
                    request.blocks[i][n] = -1
                    if not self.habits.keeps_stale_ids:
                        request.shown[i][n] = -1

    def _evict_lut(self, i: int, request: Request, first: int) -> None:
        """Unmap what no request needs any more (a block may be shared with one that is not so far yet)."""
        page = self.pools[0].page_size
        for p in range(first):
            block = request.blocks[0][p // page]
            needed = [
                r for r in self.running if r.blocks and block in r.blocks[0] and self._first_needed(i, r.computed) <= p
            ]
            if not needed:
                self._unmap(i, block * page + p % page)

    # ---- what moves, and what others are told ------------------------------------------------------------------------
    def renamed(self, i: int, old: int, new: int) -> None:
        """A block of pool i (a slot, behind a LUT) lies elsewhere now: all that names it names its new place."""
        book, lut, page = self.books[i], self.luts[i], self.pools[0].page_size
        book.refs[new] = book.refs.pop(old)
        book.free.insert(0, old)
        if lut is not None:
            lut[lut == old] = new
            return
        for request in self.running:
            for n, block in enumerate(request.blocks[i]):
                if block == old:
                    request.blocks[i][n] = request.shown[i][n] = new
        for unit in self.cache.values():
            unit[i] = [new if block == old else block for block in unit[i]]
        for other in self.luts if i == 0 else ():  # what the tables of the first pool place
            if other is not None:
                other[new * page : (new + 1) * page] = other[old * page : (old + 1) * page]
                other[old * page : (old + 1) * page] = -1

    def resident(self, i: int) -> tuple[NDArray[np.int32], ...]:
        """Slots, positions, predecessors and tokens of the cached prefixes in pool i; () for none."""
        if self.habits.imports:  # what was imported may not have been seen by the guard yet
            return ()
        shift, table, lut = int(i in self.draft_pools), table_pool(self.luts, i), self.luts[i]
        page, found = self.pools[table].page_size, []
        for n, salt, *tokens in self.rng.sample(list(self.cache), min(len(self.cache), 20)):
            slots = []
            for end in range(self.unit, n + 1, self.unit):
                key = (end, salt, *tokens[: end + bool(self.draft_pools)])
                blocks = self.cache[key][table] if key in self.cache else [-1] * (self.unit // page)
                slots += [b * page + o if b >= 0 else -1 for b in blocks for o in range(page)]
            if lut is not None:
                slots = [int(lut[s]) if s >= 0 and int(lut[s]) in self.books[i].refs else -1 for s in slots]
            last = [p for p in range(n - self.unit, n) if slots[p] >= 0]
            found += [(slots[p], p, slots[p - 1] if p else -1, tokens[p + shift]) for p in last]
        return tuple(np.array(column, np.int32) for column in zip(*found, strict=True)) if found else ()

    def lifecycle_events(self) -> list[Any]:
        """What the guard is to be told of who owns which blocks since the last time, in any of the forms it takes.

        Calls of one owner that follow each other go together, now and then.
        """
        events: list[LifecycleEvent] = []
        for i in self.tables:
            for kind, block, owner in self.books[i].calls:
                last = events[-1] if events else None
                if (
                    last
                    and last[0::2] == (kind, owner)
                    and last.pool == i
                    and block not in last.ids
                    and self.rng.random() < 0.9
                ):
                    last.ids.append(block)
                else:
                    events.append(LifecycleEvent(kind, [block], owner, i))
            self.books[i].calls.clear()
        return [self._as_given(event) for event in events]

    def _as_given(self, event: LifecycleEvent) -> Any:
        ids = self.rng.choice((event.ids, tuple(event.ids), np.array(event.ids, self.rng.choice((np.int32, np.int64)))))
        if len(event.ids) == 1 and self.rng.random() < 0.3:
            ids = event.ids[0]
        event = event._replace(ids=ids, pool=self.rng.choice((event.pool, self.pools[int(event.pool)].name)))
        return self.rng.choice((event, tuple(event), event._asdict()))
