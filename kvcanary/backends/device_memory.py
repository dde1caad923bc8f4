"""The guard's memory on a device, and the records that tell the kernels of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends.driver import Driver
from kvcanary.config import CanaryConfig
from kvcanary.layout import KvPool
from kvcanary.reserved import plane_table
from kvcanary.state import CanaryDeviceState, CounterLayout

MAX_UNEVEN = 1.125  # the largest part of a pool's digests, over an even one: its blocks set the time
DIGEST_WORDS = 32  # what a digest costs by itself, in words read

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class DeviceMemory:
    """Makes arrays by way of a `Driver`; the caller keeps them."""

    driver: Driver
    config: CanaryConfig
    n_pools: int
    max_requests: int

    def allocate(self, pool: KvPool) -> dict[str, Any]:
        """The arrays of a pool, by name, zeroed; what tells where its planes lie is filled in."""
        driver, n, halves = self.driver, pool.n_slots, range(len(pool.halves))
        digests = pool.digest_records(self.config.real_data)
        arrays = {f"{plane}{h}": driver.zeros(n, abi.STAMP) for plane in ("head", "tail") for h in halves}
        arrays |= {
            "claims": driver.zeros(n, np.uint64),
            "digests": driver.zeros((max(1, len(digests)), n if len(digests) else 1), np.uint64),
            "registers": driver.zeros(self.max_requests, abi.REGISTER),
            "register_claims": driver.zeros(self.max_requests, np.uint64),
            "rows": driver.zeros(self.max_requests, abi.ROW),
            "work": driver.zeros((abi.N_WORK, self.max_requests + 1), np.int64),
        }
        if self.config.lifecycle:
            arrays["blocks"] = driver.zeros(pool.n_blocks, abi.BLOCK_STATE)
        capacity = abi.due_capacity(n, len(digests), self.config.verify_data_every)
        if capacity:
            arrays["due"] = driver.zeros(capacity + 1, abi.DUE)
        for key, records in self.tables(pool).items():
            arrays[key] = driver.zeros(max(1, len(records)), records.dtype)
            if len(records):
                driver.upload(arrays[key], records, None)
        return arrays

    def tables(self, pool: KvPool) -> dict[str, Array]:
        """What the kernels know of where the pool's planes lie."""
        real_data = self.config.real_data
        tables = {"planes": pool.plane_records(real_data), "digest_units": pool.digest_records(real_data)}
        checked = plane_table(self.config, pool)
        return tables | ({"float_planes": checked} if len(checked) else {})

    def make_state(self, ring_capacity: int) -> tuple[CanaryDeviceState, Array, Any]:
        """Counters, taint and ring: as the user sees them, as the kernels do (GUARD), and the states of the pools."""
        driver, layout = self.driver, CounterLayout(self.n_pools)
        words = driver.zeros(layout.n_words, np.uint64)
        taint = driver.zeros(self.max_requests, np.uint32)
        pool_states = driver.zeros(self.n_pools, abi.POOL_STATE)
        ring, ring_address = driver.mapped(ring_capacity + 1, abi.VIOLATION)
        control, control_address = driver.mapped(abi.N_CONTROL_WORDS, np.uint64)
        state = CanaryDeviceState(layout, words, taint, ring, control)
        guard = abi.zeros_of(abi.GUARD)
        guard["state"], guard["taint"] = driver.pointer(words), driver.pointer(taint)
        for name, view in (
            ("kernel_runs", state.kernel_run_counters),
            ("slot_runs", state.slot_run_counters),
            ("data_runs", state.data_run_counters),
            ("scrub_runs", state.scrub_run_counters),
        ):
            guard[name] = driver.pointer(view)
        guard["control"], guard["ring"], guard["ring_capacity"] = control_address, ring_address, ring_capacity
        guard["pool_states"] = driver.pointer(pool_states)
        return state, guard, pool_states

    def pool_record(self, index: int, pool: KvPool, arrays: dict[str, Any], scrub_blocks: int) -> Array:
        """A pool as the kernels see it: a POOL."""
        record = abi.zeros_of(abi.POOL)
        for half in range(len(pool.halves)):
            record["head"][half] = self.driver.pointer(arrays[f"head{half}"])
            record["tail"][half] = self.driver.pointer(arrays[f"tail{half}"])
        names = ("claims", "digests", "planes", "digest_units", "registers", "register_claims", "rows", "work")
        for name in names:
            record[name] = self.driver.pointer(arrays[name])
        if "blocks" in arrays:
            record["blocks"] = self.driver.pointer(arrays["blocks"])
        if "due" in arrays:
            record["due"], record["due_capacity"] = self.driver.pointer(arrays["due"]), len(arrays["due"]) - 1
        if pool.lut_view is not None:
            record["slot_lut"], record["lut_length"] = pool.lut_view.pointer, pool.lut_view.shape[0]
        record["n_slots"], record["page_size"], record["n_blocks"] = pool.n_slots, pool.page_size, pool.n_blocks
        record["page_shift"] = abi.log2_or_negative(pool.page_size)
        record["window"], record["token_offset"] = pool.window or 0, pool.token_offset
        record["ring_length"], record["ring_bubble"], record["sink"] = pool.ring_length, pool.ring_bubble, pool.sink
        record["scrub_blocks"] = scrub_blocks
        record["kind"], record["index"], record["n_halves"] = int(pool.kind), index, len(pool.halves)
        digests = pool.digest_records(self.config.real_data)
        parts = digest_parts(digests["n_words"])
        record["n_digests"], record["n_digest_parts"] = len(digests), len(parts) - 1
        record["digest_parts"][: len(parts)] = parts
        record["n_reserved"], record["max_requests"] = len(pool.reserved_blocks), self.max_requests
        record["reserved"][: len(pool.reserved_blocks)] = [b * pool.page_size for b in pool.reserved_blocks]
        return record


def digest_parts(n_words: Array) -> Array:
    """Where the parts of a pool's digests begin, and at last where they end: as many parts as are of about one size.

    Args:
        n_words: i[n_digests] words of a slot that each digest is of.
    """
    n = len(n_words)
    ends = np.cumsum(n_words.astype(np.int64) + DIGEST_WORDS)
    for n_parts in range(min(n, abi.MAX_DIGEST_PARTS), 1, -1):
        even = ends[-1] / n_parts
        inner = 1 + np.abs(ends - even * np.arange(1, n_parts)[:, None]).argmin(axis=1)
        bounds = np.array([0, *inner, n])
        parts = np.diff(np.concatenate(([0], ends))[bounds])
        if parts.min() > 0 and parts.max() <= MAX_UNEVEN * even:
            return bounds
    return np.array([0, n])
