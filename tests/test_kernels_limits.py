"""What random engines seldom reach: the longest rows, the oldest length of a register, more failures than are kept."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Sides
from agree_pools import random_pool
from agree_script import A, Row, Script, kinds
from agree_twins import Twins

from kvcanary import CanaryLaunchTag, Half, PoolKind, Reason, Stage, abi, layouts
from kvcanary.backends.device_memory import digest_parts


class OneRow:
    """Batches over one request in shuffled blocks."""

    def __init__(self, n: int, page: int, n_blocks: int) -> None:
        rng = np.random.default_rng(n)
        self.table = (1 + rng.permutation(n_blocks - 1)).astype(np.int32)[None]
        self._ids, positions = rng.integers(0, 1 << 30, n + 1).astype(np.int32), np.arange(n + 1)
        self.slots = self.table[0, positions // page].astype(np.int64) * page + positions % page

    def arrays(self, first: int, last: int) -> dict[str, Any]:
        """The forward that brings positions [first, last)."""
        return {
            "block_table": self.table,
            "seq_lens": np.array([last], np.int32),
            "query_start_loc": np.array([0, last - first], np.int32),
            "input_ids": self._ids[first:last],
            "slot_mapping": self.slots[first:last],
            "request_slots": np.zeros(1, np.int32),
            "request_ids": np.ones(1, np.uint32),
        }


@pytest.mark.parametrize("n", [abi.SHORT_ROW, abi.SHORT_ROW + 1, abi.SHORT_ROW + abi.WRITE_TILE + 300])
def test_prefill_around_the_length_from_which_on_tiles_are_long(sides: Sides, n: int) -> None:
    page, n_blocks = 64, 300
    spec = random_pool(random.Random(1), n_blocks=n_blocks, page_size=page, layout="token_major")
    twins = Twins([spec], sides(), 1, n, real_data="none")
    row = OneRow(n, page, n_blocks)
    for first, last in ((0, n), (n, n + 1)):
        assert len(twins.forward(row.arrays(first, last))) == 0


@pytest.mark.parametrize("seam", [28, 32, 60, 64, 96, 124, 128, 192, 252, 256])
def test_a_block_of_another_text_anywhere_in_a_long_prefix(sides: Sides, seam: int) -> None:
    """Nobody knows the text: the links into the foreign block and out of it are broken, wherever lanes part."""
    n, page, n_blocks = 300, 4, 80
    pool = random_pool(random.Random(4), n_blocks=2 * n_blocks, page_size=page, layout="token_major")
    twins = Twins([pool], sides(), 1, n, real_data="none")
    own, other = OneRow(n, page, n_blocks), OneRow(n + 1, page, n_blocks)
    other.table += n_blocks
    other.slots += n_blocks * page
    unnamed = ("request_slots", "request_ids")
    for row, last in ((own, n), (other, n)):
        assert len(twins.forward({k: v for k, v in row.arrays(0, last).items() if k not in unnamed})) == 0
    own.table[0, seam // page] = other.table[0, seam // page]
    records = twins.forward({k: v for k, v in own.arrays(n, n + 1).items() if k not in unnamed})
    wanted = {(int(other.slots[seam]), seam), (int(own.slots[seam + page]), seam + page)}
    assert {Reason(int(v["reasons"])) for v in records} == {Reason.CHAIN}
    for stage in (Stage.HEAD, Stage.TAIL):
        found = [v for v in records if v["tag"] == CanaryLaunchTag.of(stage, Half.K, twins.pools[0].kind)]
        assert {(int(v["slot"]), int(v["position"])) for v in found} == wanted and len(found) == len(wanted)


def test_more_due_slots_than_a_block_takes_at_once(sides: Sides) -> None:
    """Lists of some 400 slots, several digests of each: all are compared once in `every` forwards, damage is found."""
    n, page, n_blocks, every, n_layers = 3200, 64, 80, abi.LIST_MIN_EVERY, 5
    layers = [f"{half}{i}" for half in "kv" for i in range(n_layers)]
    memory = np.random.default_rng(2).integers(0, 256, (len(layers), n_blocks, page, 1, 16), np.uint8)
    spec = PoolSpec(
        dict(zip(layers, memory, strict=True)),
        lambda b: layouts.nhd(k=[b[k] for k in layers[:n_layers]], v=[b[v] for v in layers[n_layers:]], page_size=page),
    )
    twins = Twins([spec], sides(), 1, n, real_data="all", verify_data_every=every)
    row, pool = OneRow(n, page, n_blocks), twins.pools[0]
    n_digests = len(pool.digest_units("all"))
    assert n_digests > abi.MAX_DIGEST_PARTS and n // every > abi.THREADS  # shares end anywhere
    assert len(twins.forward(row.arrays(0, n))) == 0
    before = int(twins.words[abi.STATE_DATA_SLOTS])
    for _ in range(every):
        assert len(twins.forward(row.arrays(n, n + 1))) == 0
    assert int(twins.words[abi.STATE_DATA_SLOTS]) - before == n * n_digests
    planted = {(int(row.slots[i]), k % len(pool.planes)) for k, i in enumerate(range(0, n, 97))}
    for slot, plane in planted:
        kv = pool.planes[plane]
        pool.host_bytes(kv)[pool.slot_index(kv, np.array([slot]))] ^= 1
    found = [twins.forward(row.arrays(n, n + 1)) for _ in range(every)]
    assert {(int(v["slot"]), int(v["plane"])) for records in found for v in records} == planted


def test_digests_of_many_sizes_are_shared_out_by_their_bytes_and_all_compared(sides: Sides) -> None:
    """Large planes and many small ones: parts of unlike numbers of digests, each compared and judged."""
    n, page, n_blocks, sizes = 70, 16, 8, [512] * 6 + [16] * 30
    rng, names = np.random.default_rng(3), [f"p{i}" for i in range(len(sizes))]
    memory = {k: rng.integers(0, 256, (n_blocks, page, 1, b), np.uint8) for k, b in zip(names, sizes, strict=True)}
    spec = PoolSpec(memory, lambda b: layouts.nhd(k=[b[k] for k in names], page_size=page))
    n_words = spec.build(memory).digest_records("all")["n_words"]
    lengths = np.diff(digest_parts(n_words))
    assert len(set(lengths.tolist())) > 2 and 2 < len(lengths) <= abi.MAX_DIGEST_PARTS
    twins = Twins([spec], sides(), 1, n, real_data="all", verify_data_every=1)
    row, pool = OneRow(n + 1, page, n_blocks), twins.pools[0]
    assert len(twins.forward(row.arrays(0, n))) == 0
    before = int(twins.words[abi.STATE_DATA_SLOTS])
    assert len(twins.forward(row.arrays(n, n + 1))) == 0
    assert int(twins.words[abi.STATE_DATA_SLOTS]) - before == n * len(sizes)
    planted = {(int(row.slots[k]), k) for k in range(len(sizes))}
    for slot, plane in planted:
        kv = pool.planes[plane]
        pool.host_bytes(kv)[pool.slot_index(kv, np.array([slot]))] ^= 1
    assert {(int(v["slot"]), int(v["plane"])) for v in twins.forward(row.arrays(n, n + 1))} == planted


@pytest.mark.parametrize(
    ("n", "n_bytes", "n_planes", "fields"),
    [
        (2500, 16, 1, {}),
        (1200, 2048, 1, {}),
        (1300, 64, 2, {"kind": PoolKind.SWA, "window": 1100, "sink": abi.MAX_SINK}),
    ],
)
def test_each_slot_of_a_long_prefix_is_verified_once(
    sides: Sides, n: int, n_bytes: int, n_planes: int, fields: dict[str, Any]
) -> None:
    """More units than warps, a sink of more than a unit: all is compared, all damage is found, once."""
    page, names = 16, [f"p{i}" for i in range(n_planes)]
    n_blocks = n // page + 2
    memory = {k: np.random.default_rng(7).integers(0, 256, (n_blocks, page, 1, n_bytes), np.uint8) for k in names}
    spec = PoolSpec(memory, lambda b: layouts.nhd(k=[b[k] for k in names], page_size=page, **fields))
    twins = Twins([spec], sides(), 1, n, real_data="all", verify_data_every=1)
    row, pool = OneRow(n + 3, page, n_blocks), twins.pools[0]
    first = n + 1 - fields["window"] if fields else 0  # of the window
    seen = [*range(fields.get("sink", 0)), *range(first, n)]
    assert len(twins.forward(row.arrays(0, n))) == 0
    before = int(twins.words[abi.STATE_DATA_SLOTS])
    assert len(twins.forward(row.arrays(n, n + 1))) == 0
    assert int(twins.words[abi.STATE_DATA_SLOTS]) - before == len(seen) * n_planes
    planted = {(int(row.slots[i]), k % n_planes) for k, i in enumerate(seen[:: 3 if n_bytes < 100 else 1])}
    for slot, plane in planted:
        kv = pool.planes[plane]
        pool.host_bytes(kv)[pool.slot_index(kv, np.array([slot]))] ^= 1
    records = twins.forward(row.arrays(n, n + 1))
    assert {(int(v["slot"]), int(v["plane"])) for v in records} == planted and len(records) == len(planted)


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


def test_taint_is_that_of_the_step_at_hand(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 4, [1]), Row(2, A, 0, 4, [2]))
    s.damage(0, 9)
    s.forward(Row(1, A, 4, 5, [1, 3]), Row(2, A, 4, 5, [2, 4]))
    taint = s.twins.sides[0].manager.taint
    assert taint.tolist()[:2] == [0, Reason.DATA]
    s.damage(0, 9)  # as it was
    s.forward(Row(1, A, 5, 6, [1, 3]), Row(2, A, 5, 6, [2, 4]))
    assert not taint.any()


def test_a_row_of_more_new_tokens_than_it_is_long_is_padding(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 4, [1]))
    lengths = np.array([5, 2], np.int32)
    assert s.forward(Row(1, A, 4, 5, [1, 3]), Row(2, A, 0, 3, [5]), seq_lens=lengths) == []
    head = s.twins.sides[0].read_guard(0, "head0")
    assert head["step"][12] == 2 and not head["step"][20:24].any(), "nor is it stamped"


def test_bytes_of_a_forward_that_failed_are_nobodys(sides: Sides) -> None:
    """A digest is there from the forward before it, and the bytes are new: neither vouches for the other."""
    s = Script(sides())
    s.forward(Row(1, A, 0, 6, [1, 2]))
    s.forward(Row(1, A, 4, 6, [1, 2]), has_tail=False)
    s.damage(1, 8)
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == []
    assert s.twins.words[abi.STATE_UNJUDGED_SLOTS] == 2
    s.damage(1, 5)
    assert kinds(s.forward(Row(1, A, 7, 8, [1, 2]))) == {5: Reason.DATA}


def test_what_was_written_before_its_block_was_allocated_is_not_carried_along(sides: Sides) -> None:
    s = Script(sides(), lifecycle=True)
    s.own("allocate", [1, 2], 1)
    s.own("allocate", [4, 5], 2)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [2], 1)
    s.own("allocate", [2], 2)
    s.twins.call("copy_slots", range(8, 12), range(16, 20))
    assert not s.twins.sides[0].read_guard(0, "head0")["step"][16:20].any()
    found = kinds(s.forward(Row(2, A, 4, 5, [4, 5])))
    assert {found[slot] & Reason.UNWRITTEN for slot in range(16, 20)} == {Reason.UNWRITTEN}
