"""Which requests run, how many tokens each brings to the next step, and which blocks they hold."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from kvcanary.ledger import PREFIX_CACHE
from kvcanary.sim.blocks import BlockAllocator
from kvcanary.sim.forks import Forks
from kvcanary.sim.habits import Habits
from kvcanary.sim.offload import HostStore, Stored
from kvcanary.sim.requests import NO_SLOT, BlockCall, Call, Move, Request, Share, slots_of
from kvcanary.sim.trees import draft_tree

__all__ = ["NO_SLOT", "BlockCall", "Request", "Scheduler", "Share"]


class Scheduler:
    """Continuous batching: decodes first, then running prefills, then admissions in order of arrival.

    By default a request is admitted only when all blocks it can ever need are there, and takes them as it grows. With
    `Habits.overcommit` the blocks of its first share are enough; when they run out, the youngest request loses all of
    its blocks and waits, before all others, to be computed anew.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        max_requests: int,
        max_new_tokens: int,
        chunk: int,
        prefix_sharing: bool,
        habits: Habits | None = None,
        window: int | None = None,
    ) -> None:
        self.allocator = allocator
        self.max_new_tokens = max_new_tokens
        self.chunk = chunk
        self.prefix_sharing = prefix_sharing
        self.habits = habits or Habits()
        self.window = window
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the youngest, the one admitted last, at the end
        self._free_slots = list(range(max_requests))  # a heap: the lowest goes first
        self._planned: list[Share] = []  # not completed yet
        self._admitted: list[Request] = []  # by that plan
        self._block_calls: list[Call] = []  # since they were last taken
        self.n_preemptions = self.n_passed = 0  # blocks that have left a window
        self.forks = Forks(self)
        self.store = HostStore(self.habits.n_offload, allocator.page_size)
        allocator.on_index, allocator.on_evict = self._index_changed, self._evicted

    # ---- a step ------------------------------------------------------------------------------------------------------
    def n_blocks_needed(self, request: Request) -> int:
        """Blocks of the request at its longest; the token sampled last is never fed, so it needs no slot."""
        return -(-(len(request.tokens) - 1) // self.allocator.page_size)

    def plan(self) -> list[Share]:
        """Choose the next step's shares and give each request the blocks for them."""
        if self.habits.shares_early:
            self._retract_plan()  # its forward raised: what it published was not written
        shares = self._planned = []
        n_waiting = len(self.waiting)
        for request in sorted(self.running, key=lambda request: request.n_pending > 1):
            if request.slot != NO_SLOT:  # not preempted for one before it
                self._take(request, shares, self._drafts(request))
        self._publish_early(shares)
        while len(self.waiting) <= n_waiting and self.waiting and self._admit(self.waiting[0], self._budget(shares)):
            self._admitted.append(self.waiting.popleft())
            n_waiting -= 1
            self._take(self._admitted[-1], shares)
            self._publish_early(shares[-1:])
        return shares

    def complete(self, share: Share, sampled: Sequence[int]) -> int:
        """Book a share whose forward has run; returns how many tokens the request gained.

        Drafts are accepted up to the first that the model would not have sampled. The request's length ends behind the
        accepted ones; the slots of the others hold leftovers until they are written anew.

        Args:
            sampled: the model's choice after the last known token, then after each draft; it counts only if the share
                reaches that token.
        """
        request, n_new, drafts, _ = share
        self._planned, self._admitted = [], []
        request.n_computed += n_new - len(drafts)
        n_known = request.n_known
        if request.n_pending == 0:  # all known tokens are computed: the next one was sampled
            n_right = next((i for i, draft in enumerate(drafts) if draft != sampled[i]), len(drafts))
            for token in sampled[: n_right + 1]:
                if not request.is_finished:
                    request.append(token)
            request.n_computed += max(request.n_known - n_known - 1, 0)
        if self.prefix_sharing:
            self._publish(request, request.n_computed)
        if request.is_finished:
            self._release(request)
        return request.n_known - n_known

    # ---- calls -------------------------------------------------------------------------------------------------------
    def take_block_calls(self) -> list[Call]:
        """Who took and gave back which blocks since the last time, and the moves between, in order."""
        calls, self._block_calls = self._block_calls, []
        return calls

    def blocks_to_load(self) -> set[int]:
        """Blocks into which KV will be loaded before the next forward."""
        page = self.allocator.page_size
        moves = [call for call in self._block_calls if isinstance(call, Move) and call.kind == "load"]
        return {int(slot) // page for move in moves for slot in move.slots}

    def note(self, kind: str, blocks: Sequence[int], owner: int) -> None:
        """Somebody takes or gives back blocks."""
        if blocks:
            self._block_calls.append(BlockCall(kind, list(blocks), owner))

    def note_move(self, move: Move) -> None:
        """KV is moved before the next forward."""
        self._block_calls.append(move)

    def _allocate(self, n: int, request: Request) -> list[int]:
        blocks = self.allocator.allocate(n)
        self.note("allocate", blocks, request.id)
        if blocks and self.habits.zeroes:
            page = self.allocator.page_size
            self.note_move(Move("zero", slots_of(blocks, page, 0, page * len(blocks))))
        return blocks

    def _index_changed(self, block: int, is_in: bool) -> None:
        if self.habits.cache_owns:
            self.note("share" if is_in else "free", [block], PREFIX_CACHE)

    def _evicted(self, block: int, key: bytes) -> None:
        stored = self.store.put(key)
        if stored is not None:
            page = self.allocator.page_size
            self.note_move(Move("store", slots_of([block], page, 0, page), detail=stored))

    # ---- shares ------------------------------------------------------------------------------------------------------

    def _budget(self, shares: Sequence[Share]) -> int:
        return self.max_new_tokens - sum(share.n_new for share in shares)

    def _drafts(self, request: Request) -> tuple[int, ...]:
        """Proposals for a decode row, never more than the request has room for behind the token they are fed with."""
        n = min(self.habits.n_draft, len(request.tokens) - request.n_known - 1)
        if self.habits.draft_trees:
            n //= 2  # each has a rival
        return tuple(self.habits.draft_rule(request.known, n))[:n] if n > 0 and request.n_pending == 1 else ()

    def _take(self, request: Request, shares: list[Share], drafts: tuple[int, ...] = ()) -> None:
        n_new = min(request.n_pending, self.chunk, self._budget(shares))
        if n_new:
            self._free_passed(request)
            parents: tuple[int, ...] = ()
            if self.habits.draft_trees:
                drafts, parents = draft_tree(drafts)
            n_new += len(drafts)
            if self._grow(request, request.n_computed + n_new, shares):
                shares.append(Share(request, n_new, drafts, parents))

    # ---- blocks ------------------------------------------------------------------------------------------------------
    def _grow(self, request: Request, n_tokens: int, shares: list[Share]) -> bool:
        """Give the request blocks for `n_tokens`, at the cost of younger ones; False: it was itself the youngest."""
        if self.habits.claims_tails:
            self.forks.claim_tail(request)
        n_tail = request.tail_of_parent is not None
        n_missing = self._n_blocks(n_tokens) - len(request.blocks) + n_tail
        while self.habits.overcommit and n_missing > self.allocator.n_available:
            victim = self.running[-1]
            self._preempt(victim)
            shares[:] = [share for share in shares if share.request is not victim]
            if victim is request:
                return False
        blocks = self._allocate(max(n_missing, 0), request)
        if n_tail:
            self.forks.own_tail(request, blocks.pop())
        request.blocks += blocks
        return True

    def _n_blocks(self, n_tokens: int) -> int:
        return -(-n_tokens // self.allocator.page_size)

    def _free_passed(self, request: Request) -> None:
        if self.habits.frees_window:
            passed = slice(request.n_passed, max(request.n_passed, self._n_outside(request)))
            self.allocator.free(request.blocks[passed])
            self.note("free", request.blocks[passed], request.id)
            self.n_passed += passed.stop - passed.start
            request.n_passed = passed.stop
            if not self.habits.keeps_stale_ids:
                request.blocks[passed] = [0] * (passed.stop - passed.start)

    def _n_outside(self, request: Request) -> int:
        """Leading blocks of which the next query, at position `n_computed`, and all later ones see nothing."""
        assert self.window is not None
        return max(request.n_computed - self.window + 1, 0) // self.allocator.page_size

    # ---- requests ----------------------------------------------------------------------------------------------------
    def _admit(self, request: Request, budget: int) -> bool:
        hits = self._prefix_hits(request)
        found = [block for block in hits if block]  # 0 = behind the window, needed by nobody
        available = self.allocator.n_available - self.allocator.n_unreferenced(found)
        loads = self._loads(request, len(hits))
        n_shared = max([len(hits) * self.allocator.page_size, *(stored.first + len(stored.tokens) for stored in loads)])
        if self.habits.overcommit:
            n_needed = self._n_blocks(n_shared + min(request.n_known - n_shared, self.chunk, budget))
        else:
            n_needed = self.n_blocks_needed(request)
            available -= sum(self.n_blocks_needed(other) - len(other.blocks) for other in self.running)
        if not budget or not self._free_slots or n_needed - len(hits) > available:
            return False
        request.n_passed = len(hits) - len(found)
        self.allocator.share(found)
        self.note("share", found, request.id)
        request.blocks = hits
        request.n_published = len(hits)
        request.blocks += self._allocate(self._n_blocks(n_shared) - len(hits), request)
        for stored in loads:
            end = stored.first + len(stored.tokens)
            slots = slots_of(request.blocks, self.allocator.page_size, stored.first, end)
            self.note_move(Move("load", slots, detail=stored))
        self.store.n_restored += len(loads) if request.arrival is None else 0
        request.arrival = None
        request.n_computed = request.n_shared_tokens = n_shared
        self.start(request)
        return True

    def _loads(self, request: Request, n_found: int) -> list[Stored]:
        """KV that the pool lacks and that is known elsewhere, behind `n_found` blocks: it has to be loaded."""
        first = n_found * self.allocator.page_size
        if request.arrival is not None:
            return [request.arrival.part(first)] if first < request.n_known - 1 else []
        if self.habits.hits_window or not self.prefix_sharing:
            return []
        return self.store.match(request.known[:-1], n_found, request.salt)

    @property
    def has_free_slot(self) -> bool:
        """Whether another request may run."""
        return bool(self._free_slots)

    def start(self, request: Request) -> None:
        """Give a request that has its blocks a request slot."""
        request.slot = heapq.heappop(self._free_slots)
        self.running.append(request)

    def abort(self, request: Request) -> None:
        """End a request wherever it is; a forward that is under way may still write to its blocks."""
        request.is_finished = True
        if request in self.running:
            self._retract(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def preempt_all(self) -> None:
        """Have everything computed anew."""
        while self.running:
            self._preempt(self.running[-1])

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue, with nothing computed; its full blocks stay in the prefix index."""
        self._retract(request)
        self._release(request)
        request.n_computed = request.n_published = request.n_shared_tokens = 0
        request.slot = NO_SLOT
        request.n_preemptions += 1
        self.n_preemptions += 1
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.allocator.free(request.blocks[request.n_passed :])
        self.note("free", request.blocks[request.n_passed :], request.id)
        request.blocks = []
        request.tail_of_parent = None
        request.n_passed = 0
        heapq.heappush(self._free_slots, request.slot)

    # ---- shared prefixes ---------------------------------------------------------------------------------------------
    def _prefix_hits(self, request: Request) -> list[int]:
        """Shared blocks, never all of the request: its last token must be computed to sample the next one."""
        if not self.prefix_sharing:
            return []
        if self.habits.hits_window:
            assert self.window is not None
            return self.allocator.match_window(request.known[:-1], self.window, request.salt)
        return self.allocator.match(request.known[:-1], request.salt)

    def _publish(self, request: Request, n_tokens: int) -> None:
        """Offer the blocks that `n_tokens` tokens fill, but for what has left the window since it was loaded."""
        request.n_published = max(request.n_published, request.n_passed)
        while (request.n_published + 1) * self.allocator.page_size <= n_tokens:
            block = request.blocks[request.n_published]
            self.allocator.publish(request.tokens, request.n_published, block, request.salt)
            request.n_published += 1

    def _publish_early(self, shares: Sequence[Share]) -> None:
        """Offer what the forward to come will write, drafts excluded; from here on nobody is preempted in this plan."""
        if self.prefix_sharing and self.habits.shares_early:
            for request, n_new, drafts, _ in shares:
                self._publish(request, request.n_computed + n_new - len(drafts))

    def _retract(self, request: Request) -> None:
        """Take back what was offered early and never written."""
        n_written = request.n_computed // self.allocator.page_size
        for block in request.blocks[n_written : request.n_published]:
            self.allocator.unpublish(block)
        request.n_published = min(request.n_published, n_written)

    def _retract_plan(self) -> None:
        """Undo a plan that was not completed: those it admitted, perhaps on blocks never written, wait again."""
        for request in reversed(self._admitted):
            if request in self.running:  # not aborted since
                self._preempt(request)
        for share in self._planned:
            self._retract(share.request)
        self._planned, self._admitted = [], []
