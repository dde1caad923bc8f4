"""Forks: a running request goes on in two ways, as for parallel samples and beams; the tail is copied on write.

A fork shares all blocks of its parent. The last one, if it is not full, is its parent's to write: the fork gives it
back for a copy before it writes for the first time itself, however many steps later that is. By the habit
`claims_tails` the last holder of a tail writes it where it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcanary.sim.requests import NO_SLOT, Move, Request, slots_of

if TYPE_CHECKING:
    from kvcanary.sim.scheduler import Scheduler


class Forks:
    """The scheduler's part for forks."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.n_forks = self.n_tail_copies = self.n_tails_claimed = 0

    def can_fork(self, parent: Request) -> bool:
        """Whether it decodes, has computed something, and a request slot is free."""
        is_decoding = parent.slot != NO_SLOT and parent.n_pending == 1 and parent.n_computed > 0
        return is_decoding and not parent.is_finished and self._scheduler.has_free_slot

    def fork(self, parent: Request, request_id: int, token: int) -> Request:
        """A request that goes on from `parent` with `token` in place of its last token, and shares its blocks."""
        scheduler = self._scheduler
        child = Request(request_id, parent.tokens.copy(), parent.n_prompt, parent.end_byte, parent.salt, parent.n_known)
        child.tokens[child.n_known - 1] = token
        child.n_computed = child.n_shared_tokens = parent.n_computed
        child.n_published, child.n_passed = parent.n_published, parent.n_passed
        child.blocks = parent.blocks[: -(-parent.n_computed // scheduler.allocator.page_size)]
        held = child.blocks[child.n_passed :]
        scheduler.allocator.share(held)
        scheduler.note("share", held, child.id)
        if child.n_computed % scheduler.allocator.page_size:
            child.tail_of_parent = len(child.blocks) - 1
        scheduler.start(child)
        self.n_forks += 1
        return child

    def claim_tail(self, request: Request) -> None:
        """The tail that the request shared is its own if nobody else holds it any more."""
        index = request.tail_of_parent
        if index is not None and self._scheduler.allocator.ref_counts[request.blocks[index]] == 1:
            self._scheduler.note("claim", [request.blocks[index]], request.id)
            request.tail_of_parent = None
            self.n_tails_claimed += 1

    def own_tail(self, request: Request, block: int) -> None:
        """Put a copy into the new `block`, which takes the place of the tail that the request shared."""
        scheduler, page = self._scheduler, self._scheduler.allocator.page_size
        index = request.tail_of_parent
        assert index is not None
        shared, request.blocks[index], request.tail_of_parent = request.blocks[index], block, None
        # Some engines copy whole blocks, with whatever the parent wrote behind the fork.
        end = (index + 1) * page if request.id % 2 else request.n_computed
        source, target = (slots_of([b], page, 0, end - index * page) for b in (shared, block))
        scheduler.note_move(Move("copy", source, target))
        scheduler.allocator.free([shared])
        scheduler.note("free", [shared], request.id)
        self.n_tail_copies += 1
