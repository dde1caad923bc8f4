"""A random engine with plausible state: what it hands to the guard is what a healthy engine could.

It shares prefixes (also with rows of the same forward), prefills in chunks, drafts and rolls back, preempts, reuses
blocks and request slots, evicts what leaves a window, imports KV that was never stamped, moves blocks, pads, and
retries forwards that raised.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from agree import Side
from agree_batches import Batches, n_places
from agree_faults import Faults
from agree_moves import load, random_moves
from agree_pools import random_pools
from agree_state import Book, Forward, Habits, Load, Plan, Request, Row, random_habits
from agree_twins import Twins
from numpy.typing import NDArray

from kvcanary import PREFIX_CACHE, KvPool, LifecycleEvent

N_TOKENS = 50  # vocabulary: small, so that different texts have tokens in common
SALTS = (0, 1, (1 << 64) - 3)


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
        self.tells_owners = False  # the guard is told of blocks, so that KV may be loaded into used ones
        self.did: Counter[str] = Counter()  # how often what was done, for tests that ask whether it was
        history_shape = (max_requests + self.rng.choice((0, 2)), max_len)
        self.batches = Batches(pools, luts, habits, self.rng, history_shape, bool(self.draft_pools))

    # ---- planning ----------------------------------------------------------------------------------------------------
    def plan(self) -> Plan:
        """The next step; may have no rows at all."""
        plan, rng = Plan([], self.habits.raises), self.rng
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
        plan.forwards.append(self.batches.forward(plan.rows, main, 0, shift=0))
        if self.draft_pools:
            plan.forwards.append(self.batches.forward(plan.rows, self.draft_pools, 1, shift=1))
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
        known = [slot for slot in request.slots_before if slot in self.free_slots]
        request.slot = self.rng.choice(known if known and self.rng.random() < 0.5 else self.free_slots)
        self.free_slots.remove(request.slot)
        request.slots_before.append(request.slot)
        request.is_first, request.hit_early = True, False
        request.blocks = [[] for _ in self.pools]
        request.shown = [[] for _ in self.pools]
        self.running.append(request)
        if self.is_static:
            for i in self.tables:
                request.blocks[i], request.shown[i] = [request.slot], [request.slot]
                self.books[i].calls.append(("allocate", request.slot, request.id))
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
                    self.books[i].share(b, request.id)
            request.blocks[i], request.shown[i] = blocks, list(blocks)
        request.computed = len(units) * self.unit
        keys = {self._key(request, (n + 1) * self.unit) for n in range(len(units))}
        request.hit_early = bool(keys & set(plan.published))
        self.did["prefix hits"] += bool(units)
        self.did["prefix hits in the same forward"] += request.hit_early

    def _first_needed(self, i: int, prefix: int) -> int:
        window = self.pools[i].window
        first = max(0, prefix - window + 1) if window else 0
        return 0 if self.pools[i].sink or self.pools[i].ring_length else first

    def _is_whole(self, units: list[list[list[int]]]) -> bool:
        prefix = len(units) * self.unit
        for i in range(len(self.pools)):
            table = self.batches.table_pool(i)
            page, blocks = self.pools[table].page_size, [b for unit in units for b in unit[table]]
            for p in range(self._first_needed(i, prefix), prefix):
                block = blocks[p // page]
                lut = self.luts[i]
                if block < 0 or (lut is not None and int(lut[block * page + p % page]) not in self.books[i].refs):
                    return False
        return True

    def _import(self, plan: Plan, request: Request) -> None:
        """A prefix whose KV comes from elsewhere, into blocks not written, at least not since their allocation."""
        n = self.rng.randint(1, 3)
        if len(self.tables) < len(self.pools) or n * self.unit >= request.known:
            return
        found = {i: len(self.books[i].free) if self.tells_owners else self.books[i].n_virgin for i in self.tables}
        if any(found[i] < n * self.unit // self.pools[i].page_size for i in self.tables):
            return
        for i in self.tables:
            page, book = self.pools[i].page_size, self.books[i]
            take = book.take if self.tells_owners else book.take_virgin
            blocks = [take(request.id) for _ in range(n * self.unit // page)]
            request.blocks[i], request.shown[i] = blocks, list(blocks)
            slots = [b * page + o for b in blocks for o in range(page)]
            shift = int(i in self.draft_pools)
            plan.loads.append(Load(i, slots, request.tokens[shift : shift + len(slots)], request.salt))
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
        shift, table, lut = int(i in self.draft_pools), self.batches.table_pool(i), self.luts[i]
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
                        self.books[i].share(b, PREFIX_CACHE)
            self.cache[key] = unit
            plan.published.append(key)

    def _evict_unit(self, key: tuple[Any, ...]) -> None:
        for i, blocks in enumerate(self.cache.pop(key, [])):
            for b in blocks:
                self._drop(i, b, PREFIX_CACHE)

    def _drop(self, i: int, block: int, owner: int) -> None:
        if block < 0 or not self.books[i].drop(block, owner) or i:
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
            self.books[j].drop(int(lut[full_slot]), 0)
        lut[full_slot] = self.rng.choice((-1, *(b * self.pools[j].page_size for b in self.pools[j].reserved_blocks)))

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

    def _evict_window(self, request: Request) -> None:
        if self.is_static:
            return
        for i, pool in enumerate(self.pools):
            first, page = self._first_needed(i, request.computed), self.pools[self.batches.table_pool(i)].page_size
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


# ---- guards, and an engine to drive them -----------------------------------------------------------------------------
def random_scenario(
    rng: random.Random,
    sides: Sequence[Side],
    *,
    max_len: int = 0,
    is_odd: bool = False,
    make: Callable[..., Twins] = Twins,
    **config: Any,
) -> tuple[Twins, Engine]:
    """Guards on these sides, and an engine over their pools.

    Args:
        max_len: tokens of the longest request; 0 = any of the small ones.
        is_odd: pools may be such that an honest engine is reported.
        make: what makes the guards.
        config: fields of `CanaryConfig` that are not left to chance.
    """
    habits = random_habits(rng)
    max_requests, max_len = rng.choice((2, 4, 8)), max_len or rng.choice((32, 48))
    max_new_tokens = max_len + max_requests if max_len > 48 else rng.choice((24, 64))
    if max_len > 48:
        habits = replace(habits, max_chunk=rng.choice((max_len // 3, max_len)))
    ring_slack = None
    if rng.random() < 0.2:  # what lies in a ring is nobody else's, and is not found by the tables' length
        habits = replace(habits, shares=False, shares_early=False, imports=False)
        habits = replace(habits, table="csr" if habits.table == "csr_last_page" else habits.table)
        habits = replace(habits, max_chunk=rng.choice((1, 1, 9, habits.max_chunk)))
        ring_slack = habits.max_chunk + habits.max_drafts
        if rng.random() < 0.5:  # nothing is taken back: a forward may go round
            habits, ring_slack = replace(habits, max_drafts=0, raises=False), 0
    specs = random_pools(rng, max_requests, max_len, habits.table == "static", is_odd, ring_slack)
    chosen = {
        "real_data": rng.choice(("all", "all", "partial", "none")),
        "verify_data_every": rng.choice((1, 2, 5, 9, 13)),
        "full_verify_min_tokens": rng.choice((0, 4, 16)),
        "on_unwritten": "adopt" if habits.imports else "violation",
        "check_write_position": rng.random() < 0.8,
        # Behind a LUT, slots are placed one by one: blocks that many requests share without saying so.
        "lifecycle": rng.random() < 0.6 and not any("lut" in spec.buffers for spec in specs),
    }
    chosen |= config
    if chosen["lifecycle"]:
        chosen.setdefault("scrub_bytes_per_step", rng.choice((0, 1, 4096, 1 << 20)))
    twins = make(specs, sides, max_requests, max_new_tokens, **chosen)
    luts = [buffers.get("lut") for buffers in twins.buffers]
    engine = Engine(twins.pools, luts, habits, rng.getrandbits(32), max_requests, max_new_tokens, max_len)
    engine.tells_owners = twins.config.lifecycle
    return twins, engine


def drive(
    twins: Twins, engine: Engine, rng: random.Random, n_steps: int, after: Callable[[str], None], faults: Faults
) -> None:
    """Steps of the engine under the guards, now and then one that raises, a sweep, a pause or a reset."""
    bytes_of = np.random.default_rng(rng.getrandbits(32))
    for _ in range(n_steps):
        plan = engine.plan()
        tell_owners(twins, engine, faults)
        for loaded in plan.loads:
            twins.write_kv(loaded.pool, np.array(loaded.slots, np.int64), bytes_of)
        load(twins, engine, plan.loads, rng)
        while not run(twins, plan, bytes_of, rng, after, faults):
            if rng.random() < 0.5:
                engine.abort(plan)
                break
            engine.did["retried steps"] += 1
        else:
            engine.commit(plan)
        if rng.random() < 0.5:
            tell_owners(twins, engine, faults)
        host_driven(twins, engine, rng, after)
        faults.at_rest(twins)


def tell_owners(twins: Twins, engine: Engine, faults: Faults) -> None:
    """Tell the guards who owns which blocks now; a call that they refuse is not made, those behind it are."""
    events = faults.in_events(engine.lifecycle_events())
    while twins.config.lifecycle and events:
        engine.did["ownership calls"] += len(events)
        error = twins.lifecycle(events)
        assert error is None or faults.has_struck("ownership"), error
        events = [] if error is None or error.event_index is None else events[error.event_index + 1 :]


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
        raises = plan.may_raise and rng.random() < 0.1

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
    if engine.habits.moves and not engine.is_static and rng.random() < 0.4:
        random_moves(twins, engine, rng)
    if rng.random() < 0.05:
        engine.did["pauses"] += 1
        twins.set_paused(not twins.is_paused)
    if rng.random() < 0.03:
        engine.did["resets"] += 1
        engine.forget()
        twins.reset(rng.choice((None, *range(len(twins.pools)))))
