"""Rings and attention sinks: where a position lies is counted by hand here, not by the guard's own rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Side
from agree_script import Seen, kinds, seen
from agree_twins import Twins

from kvcanary import KvPool, PoolKind, Reason, layouts

Sides = Callable[[], Sequence[Side]]
PAGE, N_BLOCKS, WINDOW, RING = 4, 10, 5, 8
LAYERS = 2


def spec(**fields: Any) -> PoolSpec:
    names = [f"{half}{i}" for half in "kv" for i in range(LAYERS)]

    def build(given: Mapping[str, Any]) -> KvPool:
        arrays = {half: [given[f"{half}{i}"] for i in range(LAYERS)] for half in "kv"}
        return layouts.nhd(**arrays, kind=PoolKind.SWA, **{"window": WINDOW, "ring_length": RING, **fields})

    return PoolSpec({name: np.zeros((N_BLOCKS, PAGE, 1, 2), np.uint16) for name in names}, build)


class Ring:
    """One request in a pool with a ring.

    Args:
        slots: of the places of a request, in order: the sinks', the bubble's, the ring's.
    """

    def __init__(
        self, sides: Sequence[Side], blocks: Sequence[int], sink: int = 0, bubble: int = 0, **config: Any
    ) -> None:
        fields = {name: config.pop(name) for name in ("window", "ring_length") if name in config}
        pool = spec(sink=sink, ring_bubble=bubble, **fields)
        self.twins = Twins([pool], sides, 2, 64, **{"verify_data_every": 1, **config})
        self.blocks, self.sink, self.bubble = list(blocks), sink, bubble
        self.ring = fields.get("ring_length", RING)
        self._bytes_of = np.random.default_rng(0)

    def slot(self, position: int) -> int:
        place = position
        if self.ring:
            rounds = 0
            while place >= self.sink + self.ring:  # by hand: back by whole rounds
                place -= self.ring
                rounds += 1
            place += self.bubble if position >= self.sink else 0
        return self.blocks[place // PAGE] * PAGE + place % PAGE

    def forward(self, first: int, n: int, slots: Iterable[int] | None = None, seq_len: int = 0) -> list[Seen]:
        """New tokens [first, first + n); their token at position p is 100 + p."""
        targets = [self.slot(p) for p in range(first, first + n)] if slots is None else list(slots)
        arrays = {
            "block_table": np.array([self.blocks], np.int32),
            "seq_lens": np.array([seq_len or first + n], np.int32),
            "query_start_loc": np.array([0, n], np.int32),
            "input_ids": np.arange(100 + first, 100 + first + n, dtype=np.int32),
            "slot_mapping": np.array(targets, np.int64),
            "request_slots": np.zeros(1, np.int32),
            "request_ids": np.full(1, 7, np.uint32),
            "token_history": np.arange(100, 300, dtype=np.int32)[None].repeat(2, 0),
        }

        def model() -> None:
            self.twins.write_kv(0, np.array(targets, np.int64), self._bytes_of)

        return seen(self.twins.forward(arrays, model=model))

    def damage(self, slot: int, layer: int = 1) -> None:
        self.twins.buffers[0][f"k{layer}"].reshape(N_BLOCKS * PAGE, -1).view(np.uint8)[slot, 1] ^= 4


PLACES = {"a ring alone": (0, 0), "sinks": (2, 0), "sinks, and the ring in blocks of its own": (3, 1)}


@pytest.mark.parametrize(("sink", "bubble"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("first", [1, 5, 8, 11, 30])
def test_going_round_is_silent(sides: Sides, sink: int, bubble: int, first: int) -> None:
    ring = Ring(sides(), [3, 1, 6, 4], sink, bubble)
    assert ring.forward(0, first) == []
    for position in range(first, first + 20):
        assert ring.forward(position, 1) == []
    assert ring.forward(first + 20, 7) == []
    assert ring.forward(first + 27, 2) == []


@pytest.mark.parametrize(("sink", "bubble"), PLACES.values(), ids=PLACES)
def test_each_slot_that_is_read_is_verified_and_no_other(sides: Sides, sink: int, bubble: int) -> None:
    """With a flip in one slot at a time: those of the sinks and of the window are named, the others are not."""
    length = 23
    for position in (*range(sink), *range(length - RING, length)):
        ring = Ring(sides(), [3, 1, 6, 4], sink, bubble)
        assert ring.forward(0, length) == []
        ring.damage(ring.slot(position))
        is_read = position < sink or position >= length - WINDOW + 1
        expected = {ring.slot(position): Reason.DATA} if is_read else {}
        assert kinds(ring.forward(length, 1)) == expected, position


def test_what_the_new_tokens_overwrite_is_not_judged(sides: Sides) -> None:
    """A chunk as long as the ring leaves nothing of the prefix; one token less leaves one position."""
    for n_new, left in ((RING, []), (RING - 1, [11])):
        ring = Ring(sides(), [3, 1], window=RING)
        assert ring.forward(0, 12) == []
        for position in range(12 - RING, 12):
            ring.damage(ring.slot(position))
        assert kinds(ring.forward(12, n_new)) == {ring.slot(p): Reason.DATA for p in left}


def test_two_tokens_in_one_place_are_a_clash_if_the_ring_did_not_go_round(sides: Sides) -> None:
    ring = Ring(sides(), [3, 1])
    at = [ring.slot(p) for p in range(6)]
    found = ring.forward(0, 6, [*at[:4], at[5], at[5]])
    assert Reason.DUPLICATE_WRITE in kinds(found)[at[5]]
    assert Reason.UNWRITTEN in kinds(found)[at[4]]


def test_a_place_beside_the_oldest(sides: Sides) -> None:
    ring = Ring(sides(), [3, 1])
    ring.forward(0, 8)
    found = ring.forward(8, 1, [ring.slot(9)])
    assert kinds(found)[ring.slot(9)] == Reason.WRITE_POSITION
    assert kinds(found)[ring.slot(8)] == Reason.UNWRITTEN
    later = kinds(ring.forward(9, 1))
    assert later[ring.slot(8)] == Reason.CHAIN | Reason.POSITION | Reason.TOKEN, "position 0 is still there"


def test_drafts_that_took_the_place_of_what_the_window_still_holds(sides: Sides) -> None:
    """A ring just as long as the window, four drafts, all rejected: three tokens of the window are gone."""
    ring = Ring(sides(), [3, 1], window=RING)
    ring.forward(0, 12)
    assert ring.forward(12, 5) == []
    found = kinds(ring.forward(13, 1))
    gone = [ring.slot(p) for p in (6, 7, 8)]
    assert all(Reason.POSITION in found[s] for s in gone)
    assert set(found) <= {*gone, ring.slot(9)}


def test_a_table_that_is_too_short_for_the_ring(sides: Sides) -> None:
    ring = Ring(sides(), [3, 1])
    assert ring.forward(0, 8) == []
    ring.blocks = [3]
    ring.slot = lambda position: 12  # type: ignore[method-assign, assignment]
    found = ring.forward(8, 1)
    assert Reason.OUT_OF_RANGE in [v.reasons for v in found]


def test_the_patrol_goes_over_a_ring(sides: Sides) -> None:
    """The predecessor of the oldest token is gone: that is no broken chain."""
    ring = Ring(sides(), [3, 1, 6], sink=2, bubble=2, lifecycle=True, scrub_bytes_per_step=1 << 20)
    assert ring.twins.lifecycle([("allocate", [3, 1, 6], 7)]) is None
    assert ring.forward(0, 21) == []
    for position in range(21, 40):
        assert ring.forward(position, 1) == []
    ring.damage(ring.slot(33))  # in the ring, behind the window
    assert kinds(ring.forward(40, 1)) == {ring.slot(33): Reason.DATA}


def test_sinks_beside_a_window_without_a_ring(sides: Sides) -> None:
    ring = Ring(sides(), [3, 1, 6, 4, 7, 2], sink=3, ring_length=0)
    assert ring.forward(0, 18) == []
    for position, reason in ((2, Reason.DATA), (3, None), (13, None), (14, Reason.DATA), (17, Reason.DATA)):
        ring.damage(ring.slot(position))
        assert kinds(ring.forward(18, 1)) == ({ring.slot(position): reason} if reason else {}), position
        ring.damage(ring.slot(position))
        assert kinds(ring.forward(18, 1)) == {}


def test_a_chunk_longer_than_the_ring_leaves_the_sink_where_it_was(sides: Sides) -> None:
    """The whole prefix is the sink's, and all behind it is overwritten in this forward."""
    r = Ring(sides(), [1, 2, 3, 4], sink=4)
    assert r.forward(0, 4) == []
    r.twins.buffers[0]["v1"].reshape(N_BLOCKS * PAGE, -1).view(np.uint8)[r.slot(2), 0] ^= 1
    assert kinds(r.forward(4, 3 * RING), "HEAD") == {r.slot(2): Reason.DATA}
