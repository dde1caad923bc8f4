"""How often each behaviour of an engine has happened: what a soak over it proves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.blocks import BlockAllocator
from kvcanary.sim.engine import SimEngine, StepInfo
from kvcanary.sim.requests import Request
from kvcanary.sim.step_arrays import StepArrays

BEHAVIOURS = (
    *("idle steps", "padded rows", "chunks inside a block", "preemptions", "tokens from shared prefixes"),
    *("hits in the forward that writes", "evictions", "evictions by a cache that owns", "blocks behind the window"),
    *("stale table entries", "prefix hits of the window alone", "accepted drafts", "rejected drafts"),
    *("committed tree paths", "forks", "copies of a shared tail", "claimed tails"),
    *(
        "aborted requests",
        "blocks offloaded",
        "blocks restored",
        "rows that load layer by layer",
        "handoffs",
        "placeholders",
        "late writes",
    ),
    *("fresh blocks zeroed", "refreshed requests", "reloads", "pauses", "failed forwards", "adapters"),
    *("adopted slots", "sweeps", "patrols", "lifecycle on", "lifecycle off"),
    *("real data all", "real data partial", "real data none", "HEAD before the model", "HEAD beside the model"),
)


class Watch:
    """Counts for one engine."""

    def __init__(self, engine: SimEngine) -> None:
        self.did: Counter[str] = Counter()
        self._engine = engine
        self._n_known: dict[int, int] = {}
        self._seen: set[int] = set()
        engine.before_forward.append(self._note_batch)

    def _note_batch(self, arrays: StepArrays) -> None:
        """Before the forward: who reads what is only written in it."""
        self.did["rows that load layer by layer"] += int(arrays.pending[: arrays.n_rows].sum())
        habits, page = self._engine.habits, self._engine.model.page_size
        if not (habits.shares_early or habits.keeps_stale_ids):
            return
        written = set((arrays.slot_mapping[: arrays.n_tokens] // page).tolist())
        by_id = {request.id: request for request in self._engine.scheduler.running}
        for row in range(arrays.n_rows):
            request = by_id[int(arrays.request_ids[row])]
            if habits.keeps_stale_ids and habits.frees_window:
                self.did["stale table entries"] += request.n_passed
            is_first = request.n_computed == request.n_shared_tokens and request.n_computed > 0
            if is_first and not written.isdisjoint(request.blocks[request.n_passed : request.n_computed // page]):
                self.did["hits in the forward that writes"] += 1

    def note(self, info: StepInfo) -> None:
        """After a step."""
        did, page = self.did, self._engine.model.page_size
        did["idle steps"] += not info.shares
        did["padded rows"] += info.arrays.max_rows - info.arrays.n_rows
        for request, n_new, drafts, _ in info.shares:
            known = self._n_known.get(request.id, request.n_prompt)
            self._n_known[request.id] = request.n_known
            if drafts:
                n_right = min(max(request.n_known - known - 1, 0), len(drafts))
                did["accepted drafts"] += n_right
                did["rejected drafts"] += len(drafts) - n_right
            did["chunks inside a block"] += n_new > 1 and request.n_pending > 1 and request.n_computed % page > 0
            if request.id not in self._seen:
                self._note_first(request)

    def _note_first(self, request: Request) -> None:
        self._seen.add(request.id)
        self.did["tokens from shared prefixes"] += request.n_shared_tokens
        if self._engine.habits.hits_window and request.n_shared_tokens and request.blocks:
            self.did["prefix hits of the window alone"] += request.n_passed > 0

    def counts(self) -> Counter[str]:
        """All counts until now, and those that the engine keeps itself."""
        engine, scheduler = self._engine, self._engine.scheduler
        moves, evictions = engine.mover.n_done, engine.allocator.n_evictions
        return self.did + Counter(
            {
                "preemptions": scheduler.n_preemptions,
                "evictions": evictions,
                "evictions by a cache that owns": evictions * engine.habits.cache_owns,
                "blocks behind the window": scheduler.n_passed,
                "committed tree paths": engine.mover.n_committed,
                "copies of a shared tail": scheduler.forks.n_tail_copies,
                "claimed tails": scheduler.forks.n_tails_claimed,
                "blocks offloaded": scheduler.store.n_stored,
                "blocks restored": scheduler.store.n_restored,
                "placeholders": engine.in_flight.n_placeholders,
                "late writes": engine.in_flight.n_late_writes,
                "fresh blocks zeroed": moves.get("zero", 0),
                "refreshed requests": moves.get("refresh", 0),
                "reloads": moves.get("reset", 0),
            }
        )


def resident_set(allocator: BlockAllocator) -> tuple[NDArray[Any], ...] | None:
    """Slots, positions, predecessors and tokens, i32[n] each, of all that the prefix index holds, for a sweep."""
    page, index = allocator.page_size, allocator.index()
    if not index:
        return None
    slots, positions, before, tokens = [], [], [], []
    for block, key in index.items():
        n_tokens = len(key) // 4 // page * page  # a salt is shorter than a page
        first = block * page + np.arange(page)
        slots.append(first)
        positions.append(np.arange(n_tokens - page, n_tokens))
        before.append(np.where(np.arange(page) > 0, first - 1, -1))
        tokens.append(np.frombuffer(key, "<i4", n_tokens)[-page:])
    return tuple(np.concatenate(values).astype(np.int32) for values in (slots, positions, before, tokens))
