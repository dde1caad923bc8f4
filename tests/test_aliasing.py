"""Two pools over one memory: blocks go to one of them at a time, and neither is reported for what the other wrote."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from base import full_config
from simt.driver import simt_backend

from kvcanary import CanaryManager, PoolKind, Reason, StepBatch, layouts

N_BLOCKS, PAGE, MAX_REQUESTS, MAX_LEN = 16, 4, 4, 16
POOLS = ("one", "two")
WINDOW = 3  # of the second group, where it has one


class Grouped:
    """An engine with two groups of layers, one memory, and one free list: block b of either group is the same bytes."""

    def __init__(self, backend: Any, window: int | None = None) -> None:
        self.rng, self.window = np.random.default_rng(0), window
        self.memory = [self.rng.integers(0, 256, (N_BLOCKS, PAGE, 2, 8), dtype=np.uint8) for _ in range(2)]
        kinds: list[dict[str, Any]] = [{}, {"kind": PoolKind.SWA, "window": window} if window else {}]
        shared: dict[str, Any] = {"k": self.memory, "page_size": PAGE, "may_alias": True}
        pools = [layouts.nhd(name=name, **kind, **shared) for name, kind in zip(POOLS, kinds, strict=True)]
        config = full_config(verify_data_every=1, lifecycle=True, scrub_bytes_per_step=1 << 20, ring_capacity=64)
        self.manager = CanaryManager(config, pools, MAX_REQUESTS, 64, backend)
        self.free = list(range(1, N_BLOCKS))
        self.history = np.full((MAX_REQUESTS, MAX_LEN), -1, np.int32)
        self.tables: dict[int, list[list[int]]] = {}  # request -> blocks of each group
        self.lengths: dict[int, int] = {}

    def admit(self, request: int) -> None:
        self.history[request % MAX_REQUESTS] = self.rng.integers(0, 1000, MAX_LEN)
        self.tables[request], self.lengths[request] = [[], []], 0

    def finish(self, request: int) -> None:
        for pool, table in enumerate(self.tables.pop(request)):
            blocks = [b for b in table if b]
            self.manager.free_blocks(blocks, request, pool=pool)
            self.free += blocks
        del self.lengths[request]
        self.rng.shuffle(self.free)

    def grow(self, request: int, n: int) -> None:
        for pool, table in enumerate(self.tables[request]):
            while len(table) * PAGE < self.lengths[request] + n:
                table.append(self.free.pop(0))
                self.manager.allocate_blocks(table[-1:], request, pool=pool)

    def step(self, n: int = 1) -> None:
        """Every request brings n tokens."""
        for request in self.lengths:
            self.grow(request, n)
        batch, targets = self.batch(n)
        with self.manager.step(), self.manager.forward(batch):
            for slots in targets:  # of one group, then of the other
                for array in self.memory:
                    fresh = self.rng.integers(0, 256, (len(slots), 2, 8), dtype=np.uint8)
                    array.reshape(-1, 2, 8)[slots] = fresh
        for request in self.lengths:
            self.lengths[request] += n
            self.slide(request)

    def slide(self, request: int) -> None:
        """Blocks that no query of the second group will see again go to whoever wants them, the first group too."""
        table = self.tables[request][1]
        n_out = max(0, self.lengths[request] + 1 - self.window) // PAGE if self.window else 0
        for i in range(n_out):
            if table[i]:
                self.manager.free_blocks(table[i], request, pool="two")
                self.free.insert(0, table[i])
                table[i] = 0

    def batch(self, n: int) -> tuple[StepBatch, list[Any]]:
        requests = sorted(self.lengths)
        tables = [np.zeros((len(requests), MAX_LEN // PAGE), np.int32) for _ in POOLS]
        slots: list[list[int]] = [[], []]
        ids: list[int] = []
        for row, request in enumerate(requests):
            positions = range(self.lengths[request], self.lengths[request] + n)
            ids += self.history[request % MAX_REQUESTS, list(positions)].tolist()
            for pool, table in enumerate(self.tables[request]):
                tables[pool][row, : len(table)] = table
                slots[pool] += [table[p // PAGE] * PAGE + p % PAGE for p in positions]
        targets = [np.array(s, np.int64) for s in slots]
        lengths = [self.lengths[r] + n for r in requests]
        return StepBatch(
            block_table=tables,
            slot_mapping=targets,
            seq_lens=np.array(lengths, np.int32),
            query_start_loc=np.arange(0, n * len(requests) + 1, n, dtype=np.int32),
            input_ids=np.array(ids, np.int32),
            request_slots=np.array(requests, np.int32) % MAX_REQUESTS,
            request_ids=np.array(requests, np.uint32),
            token_history=self.history,
        ), targets


@pytest.fixture(params=["host", "kernels"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "host":
        return "host"
    return functools.partial(simt_backend, library=request.getfixturevalue("library"))


@pytest.fixture
def engine(backend: Any) -> Grouped:
    return Grouped(backend)


@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "sliding window"])
def test_blocks_that_change_groups_are_silent(backend: Any, window: int | None) -> None:
    engine = Grouped(backend, window)
    owners: dict[int, set[int]] = {}
    for request in range(1, 21):
        engine.admit(request)
        engine.step(3)
        for _ in range(3):
            engine.step()
        for tables in engine.tables.values():
            for pool, table in enumerate(tables):
                for block in filter(None, table):
                    owners.setdefault(block, set()).add(pool)
        if len(engine.lengths) > 1:
            engine.finish(min(engine.lengths))
            engine.step()  # with freed blocks that still have stamps and digests
    engine.manager.synchronize()
    assert engine.manager.violations() == ()
    assert sum(len(pools) == 2 for pools in owners.values()) > 6, "most blocks were in both groups"
    assert engine.manager.stats().scrub_orphans > 0


def test_cached_blocks_of_one_group_that_the_other_has_overwritten(engine: Grouped) -> None:
    engine.admit(1)
    engine.step(4)
    (block,) = engine.tables[1][0]
    engine.finish(1)
    engine.free = [b for b in engine.free if b != block] + [block]
    engine.admit(2)
    engine.tables[2][1].append(block)  # the other group takes just that one
    engine.free.remove(block)
    engine.manager.allocate_blocks([block], 2, pool="two")
    engine.step(4)
    engine.step()  # the patrol has been everywhere
    assert engine.manager.violations() == ()
    # A prefix index that was not told gives it to a request all the same.
    engine.admit(3)
    engine.history[3] = engine.history[1]
    engine.manager.share_blocks([block], 3, pool="one")
    engine.manager.allocate_blocks([engine.free[0]], 3, pool="two")
    engine.tables[3] = [[block], [engine.free.pop(0)]]
    engine.lengths[3] = 4
    engine.lengths.pop(2)
    engine.grow(3, 1)
    batch, _ = engine.batch(1)
    with engine.manager.step(), engine.manager.forward(batch):
        pass
    engine.manager.synchronize()
    found = [v for v in engine.manager.violations() if v.pool_name == "one" and v.row == 0]
    assert {v.slot // PAGE for v in found if v.reasons == Reason.DATA} == {block}


def test_a_write_into_memory_that_the_other_group_holds_is_named_there(engine: Grouped) -> None:
    engine.admit(1)
    engine.step(4)
    victim = engine.tables[1][0][0]
    engine.memory[1].reshape(-1, 2, 8)[victim * PAGE + 2] ^= 1  # a write of group two through a stale slot mapping
    engine.step()
    engine.manager.synchronize()
    found = engine.manager.violations()
    assert {(v.pool_name, v.slot, v.layer, v.reasons) for v in found} == {("one", victim * PAGE + 2, 1, Reason.DATA)}
