"""The guard's state in host memory, and how findings and counts get into it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcanary import abi
from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.state import CanaryDeviceState, CounterLayout
from kvcanary.tags import Detail, Stage
from kvcanary.violation_ring import places_of


def make_state(layout: CounterLayout, max_requests: int, ring_capacity: int) -> CanaryDeviceState:
    """A fresh guard state in host memory."""
    return CanaryDeviceState(
        layout,
        np.zeros(layout.n_words, np.uint64),
        np.zeros(max_requests, np.uint32),
        np.zeros(ring_capacity + 1, abi.VIOLATION),
        np.zeros(abi.N_CONTROL_WORDS, np.uint64),
    )


class Recorder:
    """Counts and reports into one guard state, as kernels/report.cuh does."""

    def __init__(self, state: CanaryDeviceState, pools: Sequence[PoolArrays]) -> None:
        self.state = state
        self.words = state.words
        self._pools = pools

    def count_launch(self, pool: PoolArrays, stage: Stage) -> None:
        for half in range(len(pool.head)):
            self.state.kernel_run_counters[pool.index, pool.tag(stage, half)] += np.uint64(1)

    def count_entries(self, pool: PoolArrays, stage: Stage, n: int) -> None:
        for half in range(len(pool.head)):
            self.state.slot_run_counters[pool.index, pool.tag(stage, half)] += np.uint64(n)

    def count_data_launch(self, pool: PoolArrays, stage: Stage) -> None:
        self.state.data_run_counters[pool.index, stage] += np.uint64(1)

    def add(self, word: int, n: int) -> None:
        self.words[word] += np.uint64(n)

    def report(self, records: Array) -> None:
        """Put records into the ring as far as there is room; the rest is counted as dropped."""
        if not len(records):
            return
        words, ring, control = self.words, self.state.violation_log, self.state.control
        records["step"], records["forward"] = words[abi.STATE_STEP], words[abi.STATE_FORWARD]
        self._put_blocks(records)
        in_batch = (records["row"] >= 0) & (records["row"] < len(self.state.taint))
        np.bitwise_or.at(self.state.taint, records["row"][in_batch], records["reasons"][in_batch])
        capacity, claimed = len(ring) - 1, int(words[abi.STATE_CLAIMED])
        n = min(len(records), capacity - (claimed - int(control[abi.CONTROL_READ])))
        records["commit"][:n] = np.arange(n, dtype=np.uint64) + np.uint64(claimed + 1)
        ring[places_of(claimed, n, capacity)] = records[:n]
        words[abi.STATE_CLAIMED] = claimed + n
        self.add(abi.STATE_OBSERVATIONS, len(records))
        self.add(abi.STATE_DROPPED, len(records) - n)
        if n:
            control[abi.CONTROL_ALARM] = claimed + n

    def _put_blocks(self, records: Array) -> None:
        """Whose the slots' blocks are, in records of one pool that are about slots of it."""
        pool = self._pools[int(records["pool"][0])]
        if pool.blocks is None:
            return
        is_slot = np.isin(records["detail"], [d for d in Detail if d.is_slot])
        is_slot &= (records["slot"] >= 0) & (records["slot"] < pool.n_slots)
        states = pool.block_states(np.where(is_slot, records["slot"], 0))
        for name in ("owner", "epoch", "since", "flags"):
            records[f"block_{name}"] = np.where(is_slot, states[name], 0)
