"""The block allocator: single cases by hand, then a state machine against a naive model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from kvcanary.sim.blocks import BlockAllocator, OutOfBlocksError, prefix_key

PAGE = 2


def tokens(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def test_block_zero_is_never_given_out() -> None:
    allocator = BlockAllocator(5, PAGE)
    assert sorted(allocator.allocate(4)) == [1, 2, 3, 4]
    with pytest.raises(OutOfBlocksError, match="1 blocks asked for, 0 available"):
        allocator.allocate(1)


def test_failed_allocation_takes_nothing() -> None:
    allocator = BlockAllocator(4, PAGE)
    with pytest.raises(OutOfBlocksError):
        allocator.allocate(4)
    assert allocator.n_available == 3


def test_match_finds_the_longest_published_chain() -> None:
    allocator = BlockAllocator(8, PAGE)
    a, b, c = allocator.allocate(3)
    text = tokens(1, 2, 3, 4, 5, 6)
    for index, block in enumerate((a, b, c)):
        allocator.publish(text, index, block)
    assert allocator.match(text) == [a, b, c]
    assert allocator.match(text[:5]) == [a, b]
    assert allocator.match(tokens(1, 2, 3, 9)) == [a]
    assert allocator.match(tokens(3, 4)) == [], "the same tokens after another prefix are another block"


def test_published_twice_keeps_the_first_block() -> None:
    allocator = BlockAllocator(8, PAGE)
    first, second = allocator.allocate(2)
    allocator.publish(tokens(1, 2), 0, first)
    allocator.publish(tokens(1, 2), 0, second)
    assert allocator.match(tokens(1, 2)) == [first]
    allocator.free([second])
    assert allocator.n_cached == 0


def test_cached_blocks_are_evicted_least_recently_freed_first() -> None:
    allocator = BlockAllocator(5, PAGE)
    blocks = allocator.allocate(4)
    for block in blocks:
        allocator.publish(tokens(block, block), 0, block)
    for block in (blocks[2], blocks[0], blocks[3], blocks[1]):
        allocator.free([block])
    allocator.share([blocks[0]])  # a hit takes it off the queue
    allocator.free([blocks[0]])
    assert allocator.allocate(4) == [blocks[2], blocks[3], blocks[1], blocks[0]]
    assert allocator.match(tokens(blocks[2], blocks[2])) == []


def test_tail_of_a_request_is_evicted_before_its_head() -> None:
    allocator = BlockAllocator(3, PAGE)
    head, tail = allocator.allocate(2)
    allocator.publish(tokens(1, 2, 3, 4), 0, head)
    allocator.publish(tokens(1, 2, 3, 4), 1, tail)
    allocator.free([head, tail])
    assert allocator.allocate(1) == [tail]
    assert allocator.match(tokens(1, 2, 3, 4)) == [head]


def test_match_of_a_window_needs_only_the_blocks_that_the_next_query_sees() -> None:
    allocator = BlockAllocator(8, PAGE)
    a, b, c = allocator.allocate(3)
    text = tokens(1, 2, 3, 4, 5, 6, 7)
    for index, block in enumerate((a, b, c)):
        allocator.publish(text, index, block)
    matches = {window: allocator.match_window(text, window) for window in (1, 2, 3, 4, 5, 6, 7, 99)}
    assert matches[1] == matches[2] == matches[3] == [0, 0, c]  # the query at 6 sees 4, 5, 6 at most
    assert matches[4] == matches[5] == [0, b, c]
    assert matches[6] == matches[7] == matches[99] == [a, b, c]
    allocator.unpublish(b)
    assert allocator.match_window(text, 3) == [0, 0, c]
    assert allocator.match_window(text, 4) == [a]
    assert allocator.match_window(tokens(9, 9), 3) == []


def test_unpublished_block_is_not_found_and_not_cached() -> None:
    allocator = BlockAllocator(4, PAGE)
    (block,) = allocator.allocate(1)
    allocator.publish(tokens(1, 2), 0, block)
    allocator.unpublish(block)
    allocator.unpublish(block)  # nothing more to do
    assert allocator.match(tokens(1, 2)) == []
    allocator.free([block])
    assert (allocator.n_cached, allocator.n_available) == (0, 3)
    with pytest.raises(ValueError, match="taken out of the index"):
        allocator.unpublish(block)


def test_misuse_is_refused() -> None:
    allocator = BlockAllocator(4, PAGE)
    (block,) = allocator.allocate(1)
    allocator.free([block])
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free([block])
    with pytest.raises(ValueError, match="can be shared"):
        allocator.share([block])
    with pytest.raises(ValueError, match="can be published"):
        allocator.publish(tokens(1, 2), 0, block)
    with pytest.raises(ValueError, match="block 0 is reserved"):
        BlockAllocator(1, PAGE)
    with pytest.raises(ValueError, match="page_size is 0"):
        BlockAllocator(4, 0)


def test_key_is_the_exact_prefix() -> None:
    assert prefix_key(tokens(1, 256, 7), 2) == bytes([1, 0, 0, 0, 0, 1, 0, 0])


class AllocatorMachine(RuleBasedStateMachine):
    """Requests that allocate, hit, publish and free; `self.owned` is the naive truth about who holds what."""

    N_BLOCKS = 7

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(self.N_BLOCKS, PAGE)
        self.owned: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # published block -> the prefix it was published for

    @rule(n=st.integers(0, 4))
    def allocate(self, n: int) -> None:
        free_before = self.N_BLOCKS - 1 - len({block for blocks in self.owned for block in blocks})
        if n > free_before:
            with pytest.raises(OutOfBlocksError):
                self.allocator.allocate(n)
            return
        blocks = self.allocator.allocate(n)
        held = {block for other in self.owned for block in other}
        assert len(set(blocks)) == n
        assert not (held | {0}) & set(blocks)
        for block in blocks:
            self.content.pop(block, None)
        self.owned.append(blocks)

    @rule(text=st.lists(st.integers(0, 1), min_size=0, max_size=8))
    def share(self, text: list[int]) -> None:
        hits = self.allocator.match(tokens(*text))
        for index, block in enumerate(hits):
            assert self.content[block] == prefix_key(tokens(*text), (index + 1) * PAGE)
        n_idle = self.allocator.n_unreferenced(hits)
        before = self.allocator.n_available
        self.allocator.share(hits)
        assert self.allocator.n_available == before - n_idle
        self.owned.append(hits)

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data(), text=st.lists(st.integers(0, 1), min_size=8, max_size=8))
    def publish(self, data: st.DataObject, text: list[int]) -> None:
        blocks = data.draw(st.sampled_from([blocks for blocks in self.owned if blocks]))
        for index, block in enumerate(blocks[:4]):
            key = prefix_key(tokens(*text), (index + 1) * PAGE)
            if block not in self.content and key not in self.content.values():
                self.content[block] = key
            self.allocator.publish(tokens(*text), index, block)

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({block for blocks in self.owned for block in blocks})))
        self.allocator.unpublish(block)
        self.content.pop(block, None)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1))))

    @invariant()
    def counts_are_those_of_the_owners(self) -> None:
        counts = np.bincount([b for blocks in self.owned for b in blocks], minlength=self.N_BLOCKS)
        assert self.allocator.ref_counts.tolist() == counts.tolist()
        assert counts[0] == 0
        assert self.allocator.n_available == self.N_BLOCKS - 1 - np.count_nonzero(counts)
        assert self.allocator.n_cached == sum(counts[block] == 0 for block in self.content)


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
