"""The layouts of the engines through the digests: a byte of the engine's view of a slot is in that slot's digest alone.

With the reference and the kernels side by side; `tests/gpu` runs the same with the kernels on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Side
from agree_twins import Twins
from layout_catalogue import ENGINES
from numpy.typing import NDArray

from kvcanary import KvPool, Reason, layouts

Sides = Callable[[], list[Side]]


def digests_of(twins: Twins) -> NDArray[np.uint64]:
    """u64[n_digests, n_slots] of the first side; `Twins` has compared them with the others'."""
    return twins.sides[0].read_guard(0, "digests").reshape(-1, twins.pools[0].n_slots).copy()


@pytest.mark.parametrize("name", ENGINES)
def test_flipped_bytes_change_just_their_digests(sides: Sides, name: str) -> None:
    engine, rng = ENGINES[name], np.random.default_rng(3)
    twins = Twins([engine.spec()], sides(), max_requests=2, max_new_tokens=8)
    pool, touched, memory = twins.pools[0], engine.indexing(), twins.buffers[0]["kv"]
    free = ~np.isin(np.arange(pool.n_slots) // pool.page_size, pool.reserved_blocks)
    slots = np.flatnonzero(free)
    twins.call("adopt_slots", slots, np.arange(len(slots)))
    before = digests_of(twins)
    assert ((before != 0) == free).all(), "every slot has a digest of every plane, but for reserved ones"
    units = pool.digest_units()
    unit_of = {
        (p.layer, p.name): d
        for d, unit in enumerate(units)
        for p in pool.ordered_planes[unit.first_plane : unit.first_plane + unit.n_planes]
    }
    alone = int(rng.choice(slots)), list(unit_of)[int(rng.integers(len(unit_of)))]
    for share in (0.0, 0.5, 0.5):  # one flip in all, then one in half of the planes' slots
        struck = np.zeros(before.shape, bool)
        for slot in slots.tolist():
            for key, places in touched(slot).items():
                if rng.random() < share or (share == 0.0 and (slot, key) == alone):
                    memory[rng.choice(places)] ^= 1 << int(rng.integers(8))
                    struck[unit_of[key], slot] = True
        twins.call("refresh_digests", slots)
        after = digests_of(twins)
        assert struck.any()
        np.testing.assert_array_equal(after != before, struck)
        before = after


@pytest.mark.parametrize("name", ENGINES)
def test_what_the_engine_does_not_index_is_in_no_digest(sides: Sides, name: str) -> None:
    """Padding of pages, reserved blocks and rows behind the last page may change at will."""
    engine = ENGINES[name]
    twins = Twins([engine.spec()], sides(), max_requests=2, max_new_tokens=8)
    pool, touched, memory = twins.pools[0], engine.indexing(), twins.buffers[0]["kv"]
    slots = np.flatnonzero(~np.isin(np.arange(pool.n_slots) // pool.page_size, pool.reserved_blocks))
    twins.call("adopt_slots", slots, np.arange(len(slots)))
    before = digests_of(twins)
    is_indexed = np.zeros(len(memory), bool)
    for slot in slots.tolist():
        for places in touched(slot).values():
            is_indexed[places] = True
    memory[~is_indexed] ^= 0xFF
    twins.call("refresh_digests", slots)
    np.testing.assert_array_equal(digests_of(twins), before)


def test_the_swa_pair_behind_one_table(sides: Sides) -> None:
    """SGLang: a request decodes past its window; slots of the window pool are evicted (0) and handed out again."""
    window, n_prompt, n_steps = 8, 12, 20
    rng = np.random.default_rng(5)

    def pair(given: Mapping[str, Any]) -> tuple[KvPool, KvPool]:
        full = layouts.sglang.mha([given["k0"]], [given["v0"]], layers=[0])
        swa = layouts.sglang.mha([given["k1"]], [given["v1"]], layers=[1])
        return layouts.sglang.swa(full, swa, full_to_swa_index_mapping=given["lut"], window=window)

    def spec(of: int) -> PoolSpec:
        buffers = {f"{half}{i}": np.zeros((n, 2, 8), np.uint16) for i, n in enumerate((48, 17)) for half in "kv"}
        return PoolSpec({**buffers, "lut": np.append(np.zeros(48, np.int64), -1)}, lambda given: pair(given)[of])

    twins = Twins([spec(0), spec(1)], sides(), max_requests=2, max_new_tokens=16, verify_data_every=1)
    lut = twins.buffers[1]["lut"]
    slots, free = 1 + rng.permutation(47), list(range(1, 17))

    def forward(length: int, n_new: int) -> None:
        for position in range(length):
            if position < length - n_new - window + 1 and lut[slots[position]]:
                free.append(int(lut[slots[position]]))
                lut[slots[position]] = 0
        for position in range(length - n_new, length):
            lut[slots[position]] = free.pop(0)
        new = slots[length - n_new : length]

        def model() -> None:
            twins.write_kv(0, new, rng)
            twins.write_kv(1, lut[new], rng)

        arrays = {
            "block_table": slots[None].astype(np.int32), "table_entries": "slots",
            "seq_lens": np.array([length], np.int32), "query_start_loc": np.array([0, n_new], np.int32),
            "input_ids": np.arange(n_new, dtype=np.int32), "slot_mapping": new.astype(np.int64),
            "request_slots": np.zeros(1, np.int32), "request_ids": np.ones(1, np.uint32),
        }  # fmt: skip
        twins.forward(arrays, model=model)

    forward(n_prompt, n_prompt)
    for length in range(n_prompt + 1, n_prompt + n_steps):
        forward(length, 1)
        assert len(twins.records) == 0
    assert len(free) + window >= 16 - 1, "slots of the window pool were handed out again"
    struck = int(lut[slots[n_prompt + n_steps - 3]])
    twins.buffers[1]["v1"].reshape(17, -1).view(np.uint8)[struck, 5] ^= 1
    forward(n_prompt + n_steps, 1)
    assert [(r["pool"], r["slot"], r["reasons"]) for r in twins.records] == [(1, struck, Reason.DATA)]
