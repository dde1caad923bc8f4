"""The manager's calls about block ownership: what they ask for, when they may come, and what is known afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine

from kvcanary import (
    PREFIX_CACHE,
    CanaryConfig,
    CanaryManager,
    ConfigError,
    KvCanaryViolation,
    KvPool,
    LifecycleError,
    LifecycleEvent,
    PhaseError,
    Reason,
    Violation,
    abi,
)

OWNED = {0: [1, 2, 3], 1: [4, 5, 6]}  # request slot -> its blocks, see `ToyEngine.batch`


def toy(**config: Any) -> ToyEngine:
    """A toy engine whose requests 1 and 2 own their blocks."""
    engine = ToyEngine(**{"lifecycle": True, "verify_data_every": 1, **config})
    for slot, blocks in OWNED.items():
        engine.manager.allocate_blocks(blocks, slot + 1)
    return engine


def state(manager: CanaryManager) -> list[Any]:
    blocks = range(manager.pools[0].n_blocks)
    return [(manager.lifecycle.owners(b), manager.lifecycle.epoch(b)) for b in blocks]


def foreign_write(error: KvCanaryViolation) -> Violation:
    """The one foreign write."""
    (found,) = (v for v in error.violations if v.reasons & Reason.FOREIGN_WRITE)
    return found


class TestCalls:
    def test_an_honest_run_is_silent(self) -> None:
        engine = toy(mode="raise")
        manager = engine.manager
        engine.step((0, 0, 6), (1, 0, 3))
        manager.share_blocks(1, PREFIX_CACHE)
        engine.step((0, 6, 1), (1, 3, 1))
        manager.free_blocks(OWNED[0], 1)
        engine.step((1, 4, 1))
        manager.allocate_blocks([2, 3], 1)
        manager.share_blocks([1], 1)
        engine.step((0, 4, 4), (1, 5, 1))
        manager.synchronize()
        stats = manager.stats()
        assert stats.observations_total == 0
        assert (stats.live_blocks, stats.shared_blocks, stats.free_blocks) == (6, 1, 9)
        assert manager.lifecycle.owners(1) == (PREFIX_CACHE, 1)
        assert [manager.lifecycle.epoch(b) for b in (1, 2, 3, 4, 7)] == [1, 2, 2, 1, 0]

    def test_a_write_into_a_block_of_anothers_is_raised_and_explained(self) -> None:
        engine = toy(mode="raise")
        engine.step((0, 0, 6))
        engine.manager.free_blocks(OWNED[0], 1)
        engine.manager.allocate_blocks(OWNED[0], 9)
        with pytest.raises(KvCanaryViolation) as caught:
            engine.step((0, 6, 1))
        v = foreign_write(caught.value)
        assert (v.slot, v.request_id, v.stamp_epoch) == (2 * PAGE + 2, 1, 0)
        assert (v.block_owner, v.block_epoch, v.block_since, v.block_flags) == (9, 2, 1, abi.BLOCK_LIVE)
        assert "block 2 was given to request 9 after forward 1" in v.summary()
        assert "  block     block 2 was given to request 9 after forward 1; epoch 2" in v.details()
        others = {v.reasons for v in caught.value.violations if v is not foreign_write(caught.value)}
        assert others == {Reason.STALE_EPOCH | Reason.UNWRITTEN}, "what it reads is of an epoch that is over"

    def test_writes_to_blocks_that_nobody_owns_are_counted(self) -> None:
        engine = ToyEngine(lifecycle=True, stats_print_every_n_steps=1)
        engine.step((0, 0, 6))
        engine.manager.synchronize()
        assert engine.manager.stats().unowned_writes == 6
        assert engine.manager.stats().observations_total == 0

    def test_misuse_is_refused_in_every_mode_with_the_step_of_the_call_before(self) -> None:
        engine = toy(mode="log")
        engine.step((0, 0, 6))
        engine.step((0, 6, 1))
        with engine.manager.step():
            engine.manager.free_blocks([1], 1)
        before = state(engine.manager)
        with pytest.raises(LifecycleError, match=r"block 1 is freed twice.*free by request 1 in step 3"):
            engine.manager.free_blocks([1, 2], 1)
        with pytest.raises(LifecycleError, match=r"block 2 is held by request 1 .*allocate by request 1 in step 0"):
            engine.manager.allocate_blocks([2], 9)
        with pytest.raises(LifecycleError, match="block 0 is reserved"):
            engine.manager.share_blocks(0, 9)
        assert state(engine.manager) == before

    def test_pools_are_named_or_numbered(self) -> None:
        pools = [KvPool(planes=(), page_size=1, n_blocks=n, name=name) for n, name in ((4, "a"), (6, "b"))]
        manager = CanaryManager(CanaryConfig(lifecycle=True, real_data="none"), pools, 2, 8, backend="host")
        manager.allocate_blocks(5, 7, pool="b")
        manager.allocate_blocks([1], 8, pool=0)
        manager.free_blocks([5], 7, pool=1)
        assert manager.lifecycle.owners(1, "a") == (8,)
        assert manager.lifecycle.owners(1, 1) == manager.lifecycle.owners(5, "b") == ()
        assert [manager.lifecycle.epoch(b, "b") for b in (1, 5)] == [0, 1]
        for pool in (2, -1, "c", None):
            with pytest.raises(ConfigError, match="give one of 'a', 'b', or 0 to 1"):
                manager.allocate_blocks([1], 7, pool=pool)  # type: ignore[arg-type]
        with pytest.raises(LifecycleError, match="block 4 in pool 'a' is out of range: the pool has blocks 0 to 3"):
            manager.lifecycle.epoch(4)
        stats = manager.stats()
        assert (stats.live_blocks, stats.free_blocks) == (1, 7), "block 0 of each is reserved"


class TestApply:
    def test_events_come_as_objects_tuples_and_mappings(self) -> None:
        engine = toy()
        engine.manager.lifecycle.apply(
            iter(
                [
                    LifecycleEvent("free", np.array([1, 2], np.int32), 1),
                    ("allocate", (2, 7), 9),
                    {"kind": "share", "ids": 2, "owner": PREFIX_CACHE, "pool": "full"},
                    ["free", [2], 9, 0],
                ]
            )
        )
        assert [engine.manager.lifecycle.owners(b) for b in (1, 2, 7)] == [(), (PREFIX_CACHE,), (9,)]
        assert engine.manager.lifecycle.epoch(2) == 2

    @pytest.mark.parametrize(
        ("event", "text"),
        [
            (("free", [4], 1), "block 4 is held by request 2"),
            (("lend", [4], 1), "kind='lend': choose one of allocate, share, free"),
            (("free", [3], 1, "nowhere"), "no pool 'nowhere': give one of 'full'"),
            (("free", [3]), r"\('free', \[3\]\) is no event: give kind, ids, owner and, if not 0, pool"),
            (7, "7 is no event"),
            ({"kind": "free", "ids": [3], "who": 1}, "is no event"),
        ],
        ids=str,
    )
    def test_a_bad_event_stops_it_behind_those_that_were_good(self, event: Any, text: str) -> None:
        engine = toy()
        text = f"event 2 of lifecycle.apply.*{text}.*The 2 events before it were applied"
        with pytest.raises(LifecycleError, match=text) as caught:
            engine.manager.lifecycle.apply([("free", 1, 1), ("allocate", 1, 9), event, ("allocate", 7, 9)])
        assert caught.value.event_index == 2
        assert [engine.manager.lifecycle.owners(b) for b in (1, 3, 4, 7)] == [(9,), (1,), (2,), ()]
        assert engine.manager.lifecycle.epoch(1) == 2, "on the device too"

    def test_bad_blocks_are_named(self) -> None:
        with pytest.raises(LifecycleError) as caught:
            toy().manager.lifecycle.apply([("allocate", [7, 4, 1], 9)])
        assert (caught.value.blocks, caught.value.event_index) == ((4, 1), 0)


class TestWhen:
    def test_between_head_and_tail_it_is_too_late(self) -> None:
        engine = toy()
        before = state(engine.manager)
        batch = engine.batch((0, 0, 6))
        with engine.manager.step(), engine.manager.forward(batch):
            with pytest.raises(PhaseError, match=r"free_blocks\(\) came in phase FORWARD_IN_STEP"):
                engine.manager.free_blocks([1], 1)
            with pytest.raises(PhaseError, match=r"lifecycle.apply\(\)"):
                engine.manager.lifecycle.apply([("free", [1], 1)])
            engine.write(batch)
        assert state(engine.manager) == before

    def test_after_close_it_is_refused(self) -> None:
        engine = toy()
        engine.manager.close()
        with pytest.raises(PhaseError):
            engine.manager.free_blocks([1], 1)

    def test_with_lifecycle_off_it_is_refused(self) -> None:
        manager = ToyEngine().manager
        for call in (manager.allocate_blocks, manager.share_blocks, manager.free_blocks):
            with pytest.raises(ConfigError, match="make the CanaryConfig with lifecycle=True"):
                call([1], 1)
        with pytest.raises(ConfigError, match="lifecycle=False"):
            manager.lifecycle.apply([])
        assert manager.stats().free_blocks == 0

    def test_with_the_guard_off_nothing_happens(self) -> None:
        manager = ToyEngine(mode="off").manager
        manager.allocate_blocks([0, 0, 99], 0, pool="nowhere")
        manager.share_blocks(None, -1)
        manager.free_blocks("junk", 1)
        manager.lifecycle.apply([("lend",), 7])
        assert (manager.lifecycle.owners(1), manager.lifecycle.epoch(99)) == ((), 0)


class TestDescription:
    def test_it_says_which_reasons_are_on(self) -> None:
        engine = toy()
        engine.step((0, 0, 2))
        text = engine.manager.describe()
        assert ", STALE_EPOCH, FOREIGN_WRITE" in text.split("on: ")[1]
        assert "blocks: 6 held, 0 of them shared, 9 free or cached" in text
        assert "lifecycle=False" not in text

    def test_it_says_what_is_off_without_request_ids(self) -> None:
        engine = toy()
        engine.step((0, 0, 2), request_ids=None)
        text = engine.manager.describe()
        assert "STALE_EPOCH by the stamps' epochs alone" in text
        assert "off: FOREIGN_WRITE, and STALE_EPOCH by who reads (no request_ids)" in text

    def test_it_says_what_is_off_without_lifecycle(self) -> None:
        assert "off: STALE_EPOCH, FOREIGN_WRITE (lifecycle=False)" in ToyEngine().manager.describe()

    def test_memory_is_what_was_estimated(self) -> None:
        sizes = []
        for lifecycle in (False, True):
            engine = ToyEngine(lifecycle=lifecycle)
            assert engine.manager.memory_bytes > 0
            sizes.append(CanaryManager.estimate_bytes(engine.config, [engine.pool], 4))
        assert sizes[1] - sizes[0] == 16 * engine.pool.n_blocks
