"""A random engine with plausible state: what it hands to the guard is what a healthy engine could.

It shares prefixes (also with rows of the same forward), prefills in chunks, drafts and rolls back, preempts, reuses
blocks and request slots, evicts what leaves a window, imports KV that was never stamped, moves blocks, pads, and
retries forwards that raised.
"""

from __future__ import annotations

import random

import numpy as np
from agree_batches import Batches
from agree_holdings import Holdings
from agree_state import Habits, Load, Plan, Request, Row
from numpy.typing import NDArray

from kvcanary import KvPool

N_TOKENS = 50  # vocabulary: small, so that different texts have tokens in common
SALTS = (0, 1, (1 << 64) - 3)


class Engine(Holdings):
    """Plans steps; the caller runs their forwards, then says with `commit` or `abort` how they ended."""

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
        super().__init__(pools, luts, habits, random.Random(seed), max_requests)
        self.max_requests, self.max_new_tokens, self.max_len = max_requests, max_new_tokens, max_len
        text = self._text(max_len)
        self.documents = [text, text, text[: max_len // 2] + self._text(max_len - max_len // 2)]
        self.n_requests = 0
        self.tells_owners = False  # the guard is told of blocks, so that KV may be loaded into used ones
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
        plan.loads, self.loads = [load for load in self.loads if load.places], []
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
            tokens = request.tokens[int(i in self.draft_pools) :]
            places = {slot: (p, tokens[p]) for p, slot in enumerate(slots)}
            self.loads.append(Load(i, places, request.salt))
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

    def forget(self) -> None:
        """The guard was reset: nothing that was written counts."""
        for request in list(self.running):
            self.preempt(request)
        for key in list(self.cache):
            self._evict_unit(key)
