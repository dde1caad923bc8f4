"""What random engines seldom reach: the longest rows, the oldest length of a register, more failures than are kept."""

from __future__ import annotations

import random

import numpy as np
import pytest
from agree import Sides, Twins
from agree_pools import random_pool
from agree_script import A, Row, Script, kinds

from kvcanary import Reason, abi


@pytest.mark.parametrize("n", [abi.SHORT_ROW, abi.SHORT_ROW + 1, abi.SHORT_ROW + abi.WRITE_TILE + 300])
def test_prefill_around_the_length_from_which_on_tiles_are_long(sides: Sides, n: int) -> None:
    page, n_blocks = 64, 300
    spec = random_pool(random.Random(1), n_blocks=n_blocks, page_size=page, layout="token_major")
    twins = Twins([spec], sides(), 1, n, real_data="none")
    rng = np.random.default_rng(n)
    table = (1 + rng.permutation(n_blocks - 1)).astype(np.int32)[None]
    ids, positions = rng.integers(0, 1 << 30, n + 1).astype(np.int32), np.arange(n + 1)
    slots = table[0, positions // page].astype(np.int64) * page + positions % page
    for first, last in ((0, n), (n, n + 1)):
        arrays = {
            "block_table": table,
            "seq_lens": np.array([last], np.int32),
            "query_start_loc": np.array([0, last - first], np.int32),
            "input_ids": ids[first:last],
            "slot_mapping": slots[first:last],
            "request_slots": np.zeros(1, np.int32),
            "request_ids": np.ones(1, np.uint32),
        }
        assert len(twins.forward(arrays)) == 0


@pytest.mark.parametrize("n_back", [abi.N_REGISTER_LENGTHS - 1, abi.N_REGISTER_LENGTHS])
@pytest.mark.parametrize("chunk", [1, 20])
def test_drafts_taken_back_to_the_oldest_length_that_a_register_keeps_and_beyond(
    sides: Sides, n_back: int, chunk: int
) -> None:
    s = Script(sides(), leave_out=["token_history"])
    table, text = [1, 2, 3, 4, 5], A
    for start in range(0, 20, chunk):
        assert s.forward(Row(1, text, start, start + chunk, table)) == []
    assert s.forward(Row(1, text, 20 - n_back, 20 - n_back + 1, table)) == []
    assert s.forward(Row(1, text, 21 - n_back, 22 - n_back, table)) == []
    s.twins.edit_guard(0, "head0", lambda head: head["token"].__setitem__(4 + 21 - n_back, 999))
    assert kinds(s.forward(Row(1, text, 22 - n_back, 23 - n_back, table)))[4 + 21 - n_back] & Reason.CHAIN


def test_more_failed_forwards_than_a_pool_remembers(sides: Sides) -> None:
    """Of the oldest only the highest number is kept: they, and all before them, count as failed."""
    s = Script(sides())
    n = abi.N_ABORTED + 3
    assert s.forward(Row(1, A, 0, 1, [1])) == []
    for i in range(n):
        s.forward(Row(2, A, 0, 4, [2]) if i in (2, 3) else Row(3, A, 0, 1, [3]), has_tail=False)
    state = s.twins.sides[0].pool_state(0)[0]
    assert s.forward(Row(1, A, 1, 2, [1])) == []
    state = s.twins.sides[0].pool_state(0)[0]
    assert (state["n_aborted"], state["aborted_floor"]) == (n, 4)
    before = int(s.twins.words[abi.STATE_UNJUDGED_SLOTS])
    # Block 2 was written last in forward 5, which is in the list; then, behind the guard's back, in forward 4.
    assert s.forward(Row(2, A, 4, 5, [2, 4])) == []
    s.twins.edit_guard(0, "head0", lambda head: head["step"].__setitem__(slice(8, 12), 4))
    assert s.forward(Row(2, A, 5, 6, [2, 4])) == []
    assert s.twins.words[abi.STATE_UNJUDGED_SLOTS] == before + 8
