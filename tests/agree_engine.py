"""A random engine with plausible state: what it hands to the guard is what a healthy engine could.

It shares prefixes (also with rows of the same forward), prefills in chunks, drafts and rolls back, preempts, reuses
blocks and request slots, evicts what leaves a window, imports KV that was never stamped, pads, and retries forwards
that raised.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from agree import Arrays, Side, Twins
from agree_faults import Faults
from agree_pools import random_pools
from numpy.typing import NDArray

from kvcanary import KvPool
from kvcanary.hashing import prefix_chain

N_TOKENS = 50  # vocabulary: small, so that different texts have tokens in common
SALTS = (0, 1, (1 << 64) - 3)
BIG = 1 << 20  # junk that no row reads


@dataclass(frozen=True)
class Habits:
    """What the engine does, and what it tells the guard."""

    table: str = "blocks"  # blocks, slots, csr, csr_last_page, static
    wide_ids: bool = False
    wide_slots: bool = False
    has_ids: bool = True
    has_history: bool = True
    chains: str = "none"  # prefix_chain: none, some (0 = unknown), all
    has_salts: bool = False
    has_expected: bool = False
    has_pending: bool = False
    has_verify_all: bool = False
    shares: bool = True  # prefixes
    shares_early: bool = False  # with rows of the same forward
    max_drafts: int = 0
    preempts: bool = False
    pads: bool = False
    keeps_stale_ids: bool = False  # of blocks that have left the window
    imports: bool = False
    max_chunk: int = 40

    @property
    def knows_chains(self) -> bool:
        """Whether the chain of any prefix can be told from outside the cache."""
        return self.has_history or self.chains == "all"


def random_habits(rng: random.Random) -> Habits:
    def maybe(p: float = 0.5) -> bool:
        return rng.random() < p

    return Habits(
        table=rng.choice(("blocks", "blocks", "slots", "csr", "csr_last_page", "static")),
        wide_ids=maybe(),
        wide_slots=maybe(),
        has_ids=maybe(0.8),
        has_history=maybe(),
        chains=rng.choice(("none", "some", "all")),
        has_salts=maybe(),
        has_expected=maybe(0.3),
        has_pending=maybe(0.2),
        has_verify_all=maybe(0.2),
        shares=maybe(0.8),
        shares_early=maybe(),
        max_drafts=rng.choice((0, 0, 1, 4)),
        preempts=maybe(),
        pads=maybe(),
        keeps_stale_ids=maybe(),
        imports=maybe(0.3),
        max_chunk=rng.choice((1, 9, 40, 40)),
    )


@dataclass(eq=False)
class Request:
    id: int
    salt: int
    tokens: list[int]  # all it will ever have
    known: int  # tokens of them that the engine knows
    slot: int = -1
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)  # per pool with a table; -1 = evicted
    shown: list[list[int]] = field(default_factory=list)  # the same as the table shows them: perhaps stale
    is_first: bool = True
    hit_early: bool = False  # its prefix is written by another row of this forward


class Row(NamedTuple):
    """New tokens of a request, or of nobody (padding)."""

    request: Request | None
    start: int
    ids: list[int]
    n_true: int  # of ids; the rest are drafts that will be rejected


@dataclass
class Forward:
    arrays: Arrays
    index: int
    pools: list[int] | None
    written: dict[int, NDArray[np.int64]]  # slots by pool


@dataclass
class Plan:
    """One step: its rows, its forwards, and the slots that are loaded from elsewhere before it."""

    rows: list[Row]
    forwards: list[Forward] = field(default_factory=list)
    imported: dict[int, list[int]] = field(default_factory=dict)
    published: list[tuple[Any, ...]] = field(default_factory=list)


class Book:
    """The free list of a pool's blocks (of its slots, where a LUT places them one by one)."""

    def __init__(self, n: int, reserved: set[int], rng: random.Random) -> None:
        self.free = [b for b in range(n) if b not in reserved]
        rng.shuffle(self.free)
        self.refs: dict[int, int] = {}
        self.virgin = set(self.free)

    def take(self) -> int:
        block = self.free.pop()
        self.refs[block] = 1
        self.virgin.discard(block)
        return block

    def take_virgin(self) -> int:
        block = next(b for b in self.free if b in self.virgin)
        self.free.remove(block)
        self.free.append(block)
        return self.take()

    @property
    def n_virgin(self) -> int:
        return sum(b in self.virgin for b in self.free)

    def share(self, block: int) -> None:
        self.refs[block] += 1

    def drop(self, block: int) -> bool:
        """Whether that was the last owner."""
        self.refs[block] -= 1
        if self.refs[block]:
            return False
        del self.refs[block]
        self.free.insert(0, block)
        return True


class Engine:
    """Plans steps; the caller runs their forwards, then says with `commit` or `abort` how they ended.

    Args:
        luts: the look-up table of each pool that has one (the engine writes into it), else None.
    """

    def __init__(
        self,
        pools: list[KvPool],
        luts: list[NDArray[np.int64] | None],
        habits: Habits,
        seed: int,
        max_requests: int,
        max_new_tokens: int,
        max_len: int,
    ) -> None:
        self.pools, self.luts, self.habits = pools, luts, habits
        self.max_requests, self.max_new_tokens, self.max_len = max_requests, max_new_tokens, max_len
        self.rng = random.Random(seed)
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
        self.free_slots = list(range(max_requests))
        self.rng.shuffle(self.free_slots)
        text = self._text(max_len)
        self.documents = [text, text, text[: max_len // 2] + self._text(max_len - max_len // 2)]
        self.n_requests = 0
        self.did: Counter[str] = Counter()  # how often what was done, for tests that ask whether it was
        self.history = np.full((max_requests + self.rng.choice((0, 2)), max_len), -1, np.int32)

    # ---- planning ----------------------------------------------------------------------------------------------------
    def plan(self) -> Plan:
        """The next step; may have no rows at all."""
        plan, rng = Plan([]), self.rng
        if self.habits.preempts and self.running and rng.random() < 0.15:
            self.preempt(rng.choice(self.running))
        if len(self.waiting) < 3:
            self.waiting += [self._new_request() for _ in range(rng.choice((0, 1, 3)))]
        budget = self.max_new_tokens - self.max_requests  # the rest is for padded rows
        for request in rng.sample(self.running, len(self.running)):
            if budget and request in self.running and rng.random() < 0.85:
                budget -= self._add_row(plan, request, budget)
        while self.waiting and self.free_slots and budget and rng.random() < 0.8:
            request = self.waiting.pop(0)
            self._admit(plan, request)
            budget -= self._add_row(plan, request, budget)
        self._place_rows(plan)
        main = [i for i in range(len(self.pools)) if i not in self.draft_pools]
        plan.forwards.append(self._forward(plan.rows, main, 0, shift=0))
        if self.draft_pools:
            plan.forwards.append(self._forward(plan.rows, self.draft_pools, 1, shift=1))
        return plan

    def _text(self, n: int) -> list[int]:
        return [self.rng.randrange(N_TOKENS) for _ in range(n)]

    def _new_request(self) -> Request:
        rng = self.rng
        self.n_requests += 1
        shared = rng.choice((0, rng.randrange(self.max_len), self.max_len, self.max_len))
        n_prompt = rng.choice((rng.randint(1, self.max_len - 8), rng.randint(self.max_len // 2, self.max_len - 8)))
        tokens = (rng.choice(self.documents)[: min(shared, n_prompt)] + self._text(self.max_len))[:n_prompt]
        salt = rng.choice(SALTS) if self.habits.has_salts and rng.random() < 0.3 else 0
        return Request(self.n_requests, salt, tokens + self._text(rng.randint(1, 4)), n_prompt)

    def _admit(self, plan: Plan, request: Request) -> None:
        request.slot = self.free_slots.pop()
        request.is_first, request.hit_early = True, False
        request.blocks = [[] for _ in self.pools]
        request.shown = [[] for _ in self.pools]
        self.running.append(request)
        if self.is_static:
            for i in self.tables:
                request.blocks[i], request.shown[i] = [request.slot], [request.slot]
            return
        if self.habits.shares:
            self._hit(plan, request)
        if self.habits.imports and not request.computed and self.rng.random() < 0.5:
            self._import(plan, request)

    def _key(self, request: Request, end: int) -> tuple[Any, ...]:
        """A draft pool's slot holds the token behind its position, so there the next token belongs to the key."""
        return (end, request.salt, *[*request.tokens, 0][: end + bool(self.draft_pools)])

    def _hit(self, plan: Plan, request: Request) -> None:
        """Take over the cached units of the longest prefix that still has all that its windows need."""
        units: list[list[list[int]]] = []
        while (len(units) + 1) * self.unit < request.known:
            found = self.cache.get(self._key(request, (len(units) + 1) * self.unit))
            if found is None:
                break
            units.append(found)
        while units and not self._is_whole(units):
            units.pop()
        for i in self.tables:
            blocks = [b for unit in units for b in unit[i]]
            first = self._first_needed(i, len(units) * self.unit) // self.pools[i].page_size
            blocks = [b if n >= first else -1 for n, b in enumerate(blocks)]
            for b in blocks:
                if b >= 0:
                    self.books[i].share(b)
            request.blocks[i], request.shown[i] = blocks, list(blocks)
        request.computed = len(units) * self.unit
        keys = {self._key(request, (n + 1) * self.unit) for n in range(len(units))}
        request.hit_early = bool(keys & set(plan.published))
        self.did["prefix hits"] += bool(units)
        self.did["prefix hits in the same forward"] += request.hit_early

    def _first_needed(self, i: int, prefix: int) -> int:
        window = self.pools[i].window
        return max(0, prefix - window + 1) if window else 0

    def _is_whole(self, units: list[list[list[int]]]) -> bool:
        prefix = len(units) * self.unit
        for i in range(len(self.pools)):
            table = self._table_pool(i)
            page, blocks = self.pools[table].page_size, [b for unit in units for b in unit[table]]
            for p in range(self._first_needed(i, prefix), prefix):
                block = blocks[p // page]
                lut = self.luts[i]
                if block < 0 or (lut is not None and int(lut[block * page + p % page]) not in self.books[i].refs):
                    return False
        return True

    def _import(self, plan: Plan, request: Request) -> None:
        """A prefix whose KV comes from elsewhere, into blocks that were never written."""
        n = self.rng.randint(1, 3)
        if len(self.tables) < len(self.pools) or n * self.unit >= request.known:
            return
        if any(self.books[i].n_virgin < n * self.unit // self.pools[i].page_size for i in self.tables):
            return
        for i in self.tables:
            page = self.pools[i].page_size
            blocks = [self.books[i].take_virgin() for _ in range(n * self.unit // page)]
            request.blocks[i], request.shown[i] = blocks, list(blocks)
            plan.imported.setdefault(i, []).extend(b * page + o for b in blocks for o in range(page))
        request.computed = n * self.unit
        self.did["imports"] += 1
        if self.habits.shares_early:
            self._publish(plan, request, request.computed)

    def _add_row(self, plan: Plan, request: Request, budget: int) -> int:
        """Tokens that the row takes of the budget; 0 if there is no room for it."""
        rng, start = self.rng, request.computed
        n = min(request.known - start, budget, rng.randint(1, self.habits.max_chunk))
        ids = request.tokens[start : start + n]
        n_true = n
        if start + n == request.known and not self.draft_pools:
            for _ in range(min(rng.randint(0, self.habits.max_drafts), budget - n, self.max_len - start - n)):
                is_right = n_true == len(ids) and start + n_true < len(request.tokens) and rng.random() < 0.6
                n_true += is_right
                ids.append(request.tokens[start + len(ids)] if is_right else rng.randrange(N_TOKENS))
        if len(plan.rows) == self.max_requests or not self._make_room(plan, request, start, len(ids)):
            return 0
        plan.rows.append(Row(request, start, ids, n_true))
        self.did["chunked prefills"] += start + n < request.known
        self.did["rejected drafts"] += n_true < len(ids)
        self.did["accepted drafts"] += n_true > n
        if self.habits.shares_early:
            self._publish(plan, request, min(start + n_true, request.known))
        return len(ids)

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
            blocks = [self.books[i].take() for _ in range(missing[i])]
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
        missing = {i: -(-end // self.pools[i].page_size) - len(request.blocks[i]) for i in self.tables}
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
        lut[request.blocks[0][p // page] * page + p % page] = self.books[i].take()

    def _lut_slot(self, i: int, request: Request, p: int) -> int:
        page, lut = self.pools[0].page_size, self.luts[i]
        assert lut is not None
        slot = int(lut[request.blocks[0][p // page] * page + p % page])
        return slot if slot in self.books[i].refs else -1

    def _place_rows(self, plan: Plan) -> None:
        """Order the rows, and pad."""
        rng = self.rng
        if self.is_static:  # row r has block r
            by_slot = {row.request.slot: row for row in plan.rows if row.request}
            plan.rows = [by_slot.get(r) or self._padding() for r in range(self.max_requests)]
            return
        rng.shuffle(plan.rows)
        if self.habits.pads:
            for _ in range(rng.randint(0, self.max_requests - len(plan.rows))):
                plan.rows.insert(rng.choice((len(plan.rows), rng.randint(0, len(plan.rows)))), self._padding())

    def _padding(self) -> Row:
        self.did["padded rows"] += 1
        return Row(None, 0, [0] * self.rng.choice((0, 1) if self.habits.pads else (0,)), 0)

    # ---- the arrays --------------------------------------------------------------------------------------------------
    def _table_pool(self, i: int) -> int:
        return i if self.luts[i] is None else 0

    def _slots(self, i: int, request: Request, positions: range) -> list[int]:
        """Slots as the engine names them in the tables of pool i."""
        table = self._table_pool(i)
        page, blocks = self.pools[table].page_size, request.blocks[table]
        return [blocks[p // page] * page + p % page for p in positions]

    def _forward(self, rows: list[Row], chosen: list[int], index: int, shift: int) -> Forward:
        habits, rng = self.habits, self.rng
        ids = [t for row in rows for t in self._ids(row, shift)]
        mappings: list[Any] = []
        written = {}
        for i in chosen:
            named = []
            for row in rows:
                positions = range(row.start, row.start + len(row.ids))
                named += self._slots(i, row.request, positions) if row.request else [self._pad_slot(i)] * len(row.ids)
            mappings.append(np.array(named, np.int64 if habits.wide_slots else np.int32))
            lut = self.luts[i]
            slots = mappings[-1][mappings[-1] >= 0].astype(np.int64)
            written[i] = slots if lut is None else lut[slots][lut[slots] >= 0]
        dtype = np.int64 if habits.wide_ids else np.int32
        arrays: Arrays = {
            "query_start_loc": np.cumsum([0, *(len(row.ids) for row in rows)]).astype(np.int32),
            "input_ids": np.array(ids, dtype),
            "slot_mapping": mappings if len(chosen) > 1 else mappings[0],
            **self._table_arrays(rows, chosen),
        }
        if habits.table != "csr_last_page" or rng.random() < 0.3:
            arrays["seq_lens"] = np.array([row.start + len(row.ids) for row in rows], np.int32)
        if habits.has_expected:
            arrays["expected_tokens"] = np.array([t if rng.random() < 0.8 else -1 for t in ids], dtype)
        arrays |= self._request_arrays(rows, shift)
        return Forward(arrays, index, chosen if len(chosen) < len(self.pools) else None, written)

    def _ids(self, row: Row, shift: int) -> list[int]:
        if not row.request or not shift:
            return row.ids
        text = [*row.request.tokens, 0]
        return text[row.start + shift : row.start + shift + len(row.ids)]

    def _pad_slot(self, i: int) -> int:
        reserved = self.pools[i].reserved_blocks if self.luts[i] is None else ()
        return self.rng.choice([-1, *(b * self.pools[i].page_size for b in reserved)])

    def _entries(self, row: Row, i: int, is_slots: bool) -> list[int]:
        """The row's table for pool i: as long as the row, with what it shows of evicted blocks."""
        pool = self.pools[self._table_pool(i)]
        null = self.rng.choice((-1, *pool.reserved_blocks))
        length = row.start + len(row.ids)
        shown = row.request.shown[self._table_pool(i)][: -(-length // pool.page_size)] if row.request else []
        blocks = [null if b < 0 else b for b in shown] or [null] * -(-length // pool.page_size)
        if not is_slots:
            return blocks
        return [b * pool.page_size + p if b >= 0 else -1 for b in blocks for p in range(pool.page_size)][:length]

    def _table_arrays(self, rows: list[Row], chosen: list[int]) -> Arrays:
        kind, rng = self.habits.table, self.rng
        if self.is_static:
            return {}
        tables: dict[str, list[Any]] = {}
        for i in chosen:
            entries = [self._entries(row, i, kind == "slots") for row in rows]
            if kind.startswith("csr"):
                lists = [e + ([] if kind == "csr_last_page" else self._junk(rng.randint(0, 2))) for e in entries]
                tables.setdefault("kv_indptr", []).append(np.cumsum([0, *map(len, lists)]).astype(np.int32))
                flat = [b for e in lists for b in e] + self._junk(rng.randint(0, 3))
                tables.setdefault("kv_indices", []).append(np.array(flat, np.int32))
                page = self.pools[self._table_pool(i)].page_size
                last = [
                    row.start + len(row.ids) - max(0, len(e) - 1) * page for row, e in zip(rows, entries, strict=True)
                ]
                if kind == "csr_last_page":
                    tables.setdefault("kv_last_page_len", []).append(np.array(last, np.int32))
                continue
            width, apart = max([1, *map(len, entries)]) + rng.randint(0, 2), rng.randint(0, 2)
            table = np.array(self._junk(len(rows) * (width + apart)), np.int32).reshape(len(rows), width + apart)
            for row, e in zip(table, entries, strict=True):
                row[: len(e)] = e
            tables.setdefault("block_table", []).append(table[:, :width])
        arrays: Arrays = {name: a if len(chosen) > 1 else a[0] for name, a in tables.items()}
        return arrays if kind != "slots" else {**arrays, "table_entries": "slots"}

    def _junk(self, n: int) -> list[int]:
        return [self.rng.choice((-1, 0, 1, 2, BIG)) for _ in range(n)]

    def _request_arrays(self, rows: list[Row], shift: int) -> Arrays:
        habits, rng, arrays = self.habits, self.rng, Arrays()
        requests = [row.request for row in rows]
        if habits.has_ids or habits.has_history:
            arrays["request_slots"] = np.array([r.slot if r else rng.choice((-1, 0)) for r in requests], np.int32)
        if habits.has_ids:
            arrays["request_ids"] = np.array([r.id if r else 0 for r in requests], np.uint32)
        if habits.has_salts:
            arrays["salts"] = np.array([r.salt if r else 9 for r in requests], np.uint64)
        if habits.chains != "none":
            chains = [
                prefix_chain(row.request.tokens[shift : row.start + shift], row.request.salt) if row.request else 0
                for row in rows
            ]
            hidden = [habits.chains == "some" and not (r and r.hit_early) and rng.random() < 0.5 for r in requests]
            arrays["prefix_chain"] = np.array([0 if h else c for h, c in zip(hidden, chains, strict=True)], np.uint64)
        if habits.has_history:
            for row in rows:
                if row.request:
                    self._write_history(row.request, row.start)
            arrays["token_history"] = self.history.copy()
        for name, is_given in (("pending", habits.has_pending), ("verify_all", habits.has_verify_all)):
            if is_given:
                arrays[name] = np.array([rng.random() < 0.3 for _ in rows], np.uint8)
        return arrays

    def _write_history(self, request: Request, start: int) -> None:
        """The tokens of the request; generated ones may still be on their way, what lies behind is left over."""
        row = self.history[request.slot]
        n = min(request.known + bool(self.draft_pools), len(request.tokens))
        row[:n] = request.tokens[:n]
        if not request.is_first and self.habits.has_ids and self.rng.random() < 0.3:
            row[max(1, start - 1) : n] = -1

    # ---- the outcome -------------------------------------------------------------------------------------------------
    def commit(self, plan: Plan) -> None:
        """The forwards ran to their end."""
        for request in self.running:
            request.hit_early = False
        for row in plan.rows:
            request = row.request
            if request is None:
                continue
            request.is_first = False
            request.computed = row.start + row.n_true
            request.known = min(max(request.known, request.computed + 1), len(request.tokens))
            if self.habits.shares and not self.is_static:
                self._publish(plan, request, request.computed)
            self._evict_window(request)
            if request.computed >= len(request.tokens):
                self.did["finished requests"] += 1
                self._release(request)

    def abort(self, plan: Plan) -> None:
        """The model raised: what this plan has published was never written."""
        self.did["aborted steps"] += 1
        for key in plan.published:
            self._evict_unit(key)
        for request in list(self.running):
            if request.hit_early or self.rng.random() < 0.2:
                self.preempt(request)

    def preempt(self, request: Request) -> None:
        self.did["preemptions"] += 1
        self._release(request)
        request.computed = 0
        self.waiting.append(request)

    def forget(self) -> None:
        """The guard was reset: nothing that was written counts."""
        for request in list(self.running):
            self.preempt(request)
        for key in list(self.cache):
            self._evict_unit(key)

    def resident(self, i: int) -> tuple[NDArray[np.int32], ...]:
        """Slots, positions, predecessors and tokens of the cached prefixes in pool i; () for none."""
        if self.habits.imports:  # what was imported may not have been seen by the guard yet
            return ()
        shift, table, lut = int(i in self.draft_pools), self._table_pool(i), self.luts[i]
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
                        self.books[i].share(b)
            self.cache[key] = unit
            plan.published.append(key)

    def _evict_unit(self, key: tuple[Any, ...]) -> None:
        for i, blocks in enumerate(self.cache.pop(key, [])):
            for b in blocks:
                self._drop(i, b)

    def _drop(self, i: int, block: int) -> None:
        if block < 0 or not self.books[i].drop(block) or i:
            return
        page = self.pools[0].page_size
        for j, lut in enumerate(self.luts):  # whatever the tables of the first pool place
            for s in range(block * page, (block + 1) * page) if lut is not None else ():
                self._unmap(j, s)

    def _unmap(self, j: int, full_slot: int) -> None:
        lut = self.luts[j]
        assert lut is not None
        if int(lut[full_slot]) in self.books[j].refs:
            self.did["slots unmapped"] += 1
            self.books[j].drop(int(lut[full_slot]))
        lut[full_slot] = self.rng.choice((-1, *(b * self.pools[j].page_size for b in self.pools[j].reserved_blocks)))

    def _release(self, request: Request) -> None:
        for i in self.tables if not self.is_static else ():
            for b in request.blocks[i]:
                self._drop(i, b)
        request.blocks, request.shown = [], []
        self.running.remove(request)
        self.free_slots.append(request.slot)
        self.rng.shuffle(self.free_slots)
        request.slot = -1

    def _evict_window(self, request: Request) -> None:
        if self.is_static:
            return
        for i, pool in enumerate(self.pools):
            first, page = self._first_needed(i, request.computed), self.pools[self._table_pool(i)].page_size
            if not pool.window:
                continue
            if self.luts[i] is not None:
                self._evict_lut(i, request, first)
                continue
            for n in range(min(first // page, len(request.blocks[i]))):
                if request.blocks[i][n] >= 0:
                    self.did["blocks behind a window"] += 1
                    self._drop(i, request.blocks[i][n])
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


def _honest(habits: Habits) -> Habits:
    """What an engine may do in silence.

    A row that has neither the guard's register nor a history nor a prefix_chain to start from continues the chain that
    it finds in the cache. Where there is none to be found (a hit on what is being written, or on imported KV, or a
    window of one slot), its chain is its own, and disagrees with that of the same text in other blocks.
    """
    if habits.knows_chains:
        return habits
    return replace(habits, imports=False, shares_early=habits.shares_early and habits.chains == "some")


# ---- guards, and an engine to drive them -----------------------------------------------------------------------------
def random_scenario(
    rng: random.Random, sides: Sequence[Side], *, max_len: int = 0, is_odd: bool = False, **config: Any
) -> tuple[Twins, Engine]:
    """Guards on these sides, and an engine over their pools.

    Args:
        max_len: tokens of the longest request; 0 = any of the small ones.
        is_odd: pools may be such that an honest engine is reported.
        config: fields of `CanaryConfig` that are not left to chance.
    """
    habits = random_habits(rng)
    if not is_odd:
        habits = _honest(habits)
    max_requests, max_len = rng.choice((2, 4, 8)), max_len or rng.choice((32, 48))
    max_new_tokens = max_len + max_requests if max_len > 48 else rng.choice((24, 64))
    if max_len > 48:
        habits = replace(habits, max_chunk=rng.choice((max_len // 3, max_len)))
    least_window = 1 if is_odd or habits.knows_chains else 2
    specs = random_pools(rng, max_requests, max_len, habits.table == "static", least_window, is_odd)
    chosen = {
        "real_data": rng.choice(("all", "all", "partial", "none")),
        "verify_data_every": rng.choice((1, 2, 5)),
        "full_verify_min_tokens": rng.choice((0, 4, 16)),
        "on_unwritten": "adopt" if habits.imports else "violation",
        "check_write_position": rng.random() < 0.8,
    }
    twins = Twins(specs, sides, max_requests, max_new_tokens, **{**chosen, **config})
    luts = [buffers.get("lut") for buffers in twins.buffers]
    engine = Engine(twins.pools, luts, habits, rng.getrandbits(32), max_requests, max_new_tokens, max_len)
    return twins, engine


def drive(
    twins: Twins, engine: Engine, rng: random.Random, n_steps: int, after: Callable[[str], None], faults: Faults
) -> None:
    """Steps of the engine under the guards, now and then one that raises, a sweep, a pause or a reset."""
    bytes_of = np.random.default_rng(rng.getrandbits(32))
    for _ in range(n_steps):
        plan = engine.plan()
        for i, slots in plan.imported.items():
            twins.write_kv(i, np.array(slots, np.int64), bytes_of)
        while not run(twins, plan, bytes_of, rng, after, faults):
            if rng.random() < 0.5:
                engine.abort(plan)
                break
            engine.did["retried steps"] += 1
        else:
            engine.commit(plan)
        host_driven(twins, engine, rng, after)
        faults.at_rest(twins)


def run(
    twins: Twins,
    plan: Plan,
    bytes_of: np.random.Generator,
    rng: random.Random,
    after: Callable[[str], None],
    faults: Faults,
) -> bool:
    """The forwards of a step; False if one raised."""
    for forward in plan.forwards:
        raises = rng.random() < 0.1

        def model(forward: Forward = forward, raises: bool = raises) -> None:
            for i, slots in forward.written.items():
                done = slots[: rng.randint(0, len(slots))] if raises else slots
                twins.write_kv(i, done, bytes_of)

        arrays = faults.in_arrays(forward.arrays)
        twins.forward(
            arrays,
            model=model,
            between=faults.late(arrays),
            index=forward.index,
            pools=forward.pools,
            has_tail=not raises,
        )
        after("forward")
        if raises:
            return False
    return True


def host_driven(twins: Twins, engine: Engine, rng: random.Random, after: Callable[[str], None]) -> None:
    """What an engine may do between two steps."""
    if rng.random() < 0.2:
        for i in range(len(twins.pools)):
            resident = engine.resident(i)
            if resident:
                *lists, tokens = resident
                twins.sweep(i, *lists, rng.choice((None, tokens)))
                engine.did["sweeps"] += 1
                after("sweep")
    if rng.random() < 0.05:
        engine.did["pauses"] += 1
        twins.set_paused(not twins.is_paused)
    if rng.random() < 0.03:
        engine.did["resets"] += 1
        engine.forget()
        twins.reset(rng.choice((None, *range(len(twins.pools)))))
