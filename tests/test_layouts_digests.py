"""The layouts of the engines through the digests: a byte of the engine's view of a slot is in that slot's digest alone.

With the reference and the kernels side by side; `tests/gpu` runs the same with the kernels on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from agree import Side, Twins
from layout_catalogue import ENGINES
from numpy.typing import NDArray

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
