"""The launches of a step on a device: parameters packed once, grids chosen once; a step only launches.

`DeviceBackend` knows the kernels and nothing of CuPy or cuda-python; a `Driver` gives it memory and launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends import BoundCall, CapturedGraph, ProbeTarget, Resident
from kvcanary.backends.device_memory import DeviceMemory
from kvcanary.backends.device_moves import DeviceMoves
from kvcanary.backends.driver import Driver, Packed, SideStream
from kvcanary.backends.launches import KERNELS, BlockUpdate, BoundForward, BoundKernel, grids_of
from kvcanary.backends.moves import Move, SlotImage
from kvcanary.backends.side_stream import SameStream
from kvcanary.batch import BoundBatch
from kvcanary.config import CanaryConfig
from kvcanary.deferred import Staging
from kvcanary.layout import KvPool
from kvcanary.ledger import BlockChanges
from kvcanary.patrol import plan_patrol

SWEEP_SLOTS = 1 << 16  # resident slots that a sweep copies at once; longer lists go in parts

Array = npt.NDArray[Any]


class DeviceBackend:
    """`kvcanary.backends.Backend` over a `Driver`."""

    def __init__(
        self,
        name: str,
        driver: Driver,
        config: CanaryConfig,
        pools: Sequence[KvPool],
        max_requests: int,
        max_new_tokens: int,
    ) -> None:
        self.name = name
        self._driver = driver
        self._config = config
        self._kv_pools = tuple(pools)
        self._max_requests = max_requests
        self._kernels = {n: driver.kernel(source, n) for source, names in KERNELS.items() for n in names}
        self._resident = {name: driver.resident_blocks(kernel) for name, kernel in self._kernels.items()}
        self._memory = memory = DeviceMemory(driver, config, len(pools), max_requests)
        self._arrays: list[dict[str, Any]] = [memory.allocate(p) for p in pools]
        self.state, self._guard, self._pool_states = memory.make_state(config.ring_capacity)
        scrub_blocks = [patrol.n_blocks for patrol in plan_patrol(config, pools)]
        self._pools = [memory.pool_record(i, p, self._arrays[i], scrub_blocks[i]) for i, p in enumerate(pools)]
        update, state = self._kernels["kvc_blocks_update"], int(self._guard["state"])
        self._updates = [BlockUpdate(driver, update, state, int(p["blocks"]), int(p["n_blocks"])) for p in self._pools]
        self._moves = DeviceMoves(driver, self._kernels, self._resident, self._guard, self._pools)
        self._side: SideStream = driver.side_stream() if config.overlap_head else SameStream()
        driver.synchronize()  # memory is zeroed on a stream of the driver's, and used on the engine's

    @property
    def memory_bytes(self) -> int:
        arrays = [a for pool in self._arrays for a in pool.values()]
        state = (self.state.words, self.state.taint, self._pool_states, self.state.violation_log, self.state.control)
        return sum(int(a.nbytes) for a in (*arrays, *state)) + self._driver.lent_bytes

    # ---- binding -----------------------------------------------------------------------------------------------------
    def bind(self, pool: int, bound: BoundBatch, is_first_forward: bool) -> BoundCall:
        config, record = self._config, bound.record.copy()
        record["check_write_position"] = config.check_write_position
        record["adopt"] = config.on_unwritten == "adopt"
        record["verify_data_every"] = config.verify_data_every
        record["full_verify_min_tokens"] = config.full_verify_min_tokens
        record["is_first_forward"] = is_first_forward
        params = self._step_params(self._guard, self._pools[pool], record)
        begin = [abi.zeros_of(abi.PARAMS["BeginParams"]) for _ in range(2)]
        for is_first, b in enumerate(begin):
            b["guard"], b["pool"], b["batch"], b["is_first_pool"] = self._guard, self._pools[pool], record, is_first
        grids = grids_of(self._driver.n_multiprocessors, self._resident, self._pools[pool], bound)
        head, tail = ["kvc_stamps_write", "kvc_stamps_verify"], ["kvc_stamps_tail"]
        if self._pools[pool]["n_digests"]:
            head.append("kvc_digests_verify")
            tail.append("kvc_digests_write")
        if config.on_unwritten == "adopt":
            head.append("kvc_digests_adopt")
        if self._pools[pool]["scrub_blocks"] and is_first_forward:
            head.append("kvc_scrub")

        def kernel(name: str, packed: Packed) -> BoundKernel:
            return BoundKernel(self._driver, self._kernels[name], grids[name], packed)

        other, first = (kernel("kvc_begin", Packed(b)) for b in begin)
        launches = [kernel(n, params) for n in head]
        if is_first_forward and "float_planes" in self._arrays[pool]:
            launches.append(self._reserved_check(pool))
        forward = BoundForward(first, other, tuple(launches), tuple(kernel(n, params) for n in tail), bound)
        return BoundCall(pool, forward)

    def _reserved_check(self, pool: int) -> BoundKernel:
        params, planes = abi.zeros_of(abi.PARAMS["ReservedParams"]), self._arrays[pool]["float_planes"]
        params["guard"], params["pool"] = self._guard, self._pools[pool]
        params["planes"], params["n_planes"] = self._driver.pointer(planes), len(planes)
        params["every"] = self._config.check_reserved_every
        name = "kvc_reserved_check"
        most = self._driver.n_multiprocessors * self._resident[name]
        grid = (min(len(planes) * int(self._pools[pool]["n_reserved"]), most), 1)
        return BoundKernel(self._driver, self._kernels[name], grid, Packed(params))

    @staticmethod
    def _step_params(guard: Array, pool: Array, batch: Array) -> Packed:
        params = abi.zeros_of(abi.PARAMS["StepParams"])
        params["guard"], params["pool"], params["batch"] = guard, pool, batch
        return Packed(params)

    # ---- a forward ---------------------------------------------------------------------------------------------------
    def head(self, calls: Sequence[BoundCall], stream: Any) -> None:
        self._launch_head(calls, self._side.leave(stream))

    def tail(self, calls: Sequence[BoundCall], stream: Any) -> None:
        self._side.join(stream)
        self._launch_tail(calls, stream)

    def abandon(self) -> None:
        self._side.abandon()

    def _launch_head(self, calls: Sequence[BoundCall], stream: Any) -> None:
        for i, call in enumerate(calls):
            (call.batch.begin_other if i else call.batch.begin_first).launch(stream)
        for call in calls:
            for bound in call.batch.head:
                bound.launch(stream)

    def _launch_tail(self, calls: Sequence[BoundCall], stream: Any) -> None:
        for call in calls:
            for bound in call.batch.tail:
                bound.launch(stream)

    def verify_layer(self, calls: Sequence[BoundCall], layer: int, stream: Any) -> None:
        self._side.let_wait(stream)
        for call in calls:
            for bound in self._layer_kernels(call, layer):
                bound.launch(stream)

    def _layer_kernels(self, call: BoundCall, layer: int) -> list[BoundKernel]:
        """The launches of a layer, packed at its first use: mostly one."""
        known: dict[int, list[BoundKernel]] = call.batch.layers
        if layer not in known:
            units = self._kv_pools[call.pool].digest_units(self._config.real_data)
            digests = [d for d, unit in enumerate(units) if unit.layer == layer]
            verify = call.batch.head[1]  # kvc_stamps_verify: its grid fits the same units
            known[layer] = []
            for first in range(0, len(digests), abi.MAX_LAYER_DIGESTS):
                chosen = digests[first : first + abi.MAX_LAYER_DIGESTS]
                params = abi.zeros_of(abi.PARAMS["LayerParams"])
                for name in ("guard", "pool", "batch"):
                    params[name] = verify.params.record[name]
                params["n_digests"], params["digests"][: len(chosen)] = len(chosen), chosen
                kernel = self._kernels["kvc_digests_layer"]
                known[layer].append(BoundKernel(self._driver, kernel, verify.grid, Packed(params)))
        return known[layer]

    def graphs(self, calls: Sequence[BoundCall]) -> tuple[CapturedGraph, CapturedGraph]:
        capture = self._driver.capture
        head, tail = self._launch_head, self._launch_tail
        return capture(lambda stream: head(calls, stream)), capture(lambda stream: tail(calls, stream))

    # ---- host-driven -------------------------------------------------------------------------------------------------
    def sweep(self, pool_index: int, resident: Resident, stream: Any) -> bool:
        params, n = abi.zeros_of(abi.PARAMS["SweepParams"]), len(resident.slots)
        addresses = self._driver.upload_lists(tuple(resident), max(n, SWEEP_SLOTS), stream)
        if addresses is None:
            return False
        params["guard"], params["pool"], params["n"] = self._guard, self._pools[pool_index], n
        for name, address in zip(("slots", "positions", "predecessors", "tokens"), addresses, strict=True):
            params[name] = address
        wanted = {"kvc_stamps_sweep": (-(-n // abi.THREADS), 1)}
        if self._pools[pool_index]["n_digests"]:
            wanted["kvc_digests_sweep"] = (-(-n // abi.THREADS), int(self._pools[pool_index]["n_digest_parts"]))
        grids = {
            name: (max(1, min(x, self._driver.n_multiprocessors * self._resident[name] // y)), y)
            for name, (x, y) in wanted.items()
        }
        for name, grid in grids.items():
            self._driver.launch(self._kernels[name], grid, Packed(params), stream)
        return True

    def update_blocks(self, pool: int, changes: BlockChanges, stream: Any) -> None:
        self._updates[pool].launch(changes, stream)

    def move(self, move: Move, stream: Any) -> SlotImage | None:
        return self._moves.run(move, stream)

    def shadow_arrays(self, pool: int) -> dict[str, Any]:
        arrays, kv = self._arrays[pool], self._kv_pools[pool]
        stages = [(half, stage) for half in kv.halves for stage in ("head", "tail")]
        shadow = {f"{stage.upper()}_{half.name}": _as_bytes(arrays[f"{stage}{int(half)}"]) for half, stage in stages}
        n_digests = int(self._pools[pool]["n_digests"])
        return shadow | {f"DIGEST_{d}": arrays["digests"][d] for d in range(n_digests)}

    def rebind(self, pool: int, kv: KvPool, stream: Any) -> None:
        self._side.let_wait(stream)  # HEAD still reads the tables
        before, after = self._memory.tables(self._kv_pools[pool]), self._memory.tables(kv)
        self._kv_pools = (*self._kv_pools[:pool], kv, *self._kv_pools[pool + 1 :])
        for name, records in after.items():
            if len(records) and records.tobytes() != before[name].tobytes():
                self._driver.write_table(self._arrays[pool][name], records, stream)

    def set_paused(self, is_paused: bool, stream: Any) -> None:
        self._driver.set_word(self.state.words, abi.STATE_PAUSE, int(is_paused), stream)

    def renumber(self, stream: Any) -> None:
        params = abi.zeros_of(abi.PARAMS["RenumberParams"])
        params["guard"], params["n_pools"] = self._guard, len(self._pools)
        most = self._driver.n_multiprocessors * self._resident["kvc_renumber"]
        for pool in self._pools:
            params["pool"] = pool
            blocks = -(-max(int(pool["n_slots"]), self._max_requests) // abi.THREADS)
            grid = (max(1, min(blocks, most)), 1)
            self._driver.launch(self._kernels["kvc_renumber"], grid, Packed(params.copy()), stream)
        self._driver.launch(self._kernels["kvc_renumber_end"], (1, 1), Packed(params), stream)

    def reset(self, pool: int | None, stream: Any) -> None:
        for arrays in self._arrays if pool is None else [self._arrays[pool]]:
            for name, array in arrays.items():
                if name.startswith(("head", "tail")) or name in ("digests", "registers"):
                    self._driver.fill_zero(array, stream)

    def staging(self, depth: int) -> Staging:
        return self._driver.staging(self.state.layout.n_words, depth)

    def snapshot_words(self) -> npt.NDArray[np.uint64]:
        words: npt.NDArray[np.uint64] = self._driver.download(self.state.words)
        return words

    def synchronize(self) -> None:
        self._driver.synchronize()

    def close(self) -> None:
        self._driver.synchronize()
        self._side.close()
        self._arrays.clear()
        self._driver.close()

    def read_blocks(self, pool: int) -> Array:
        blocks: Array = self._driver.download(self._arrays[pool]["blocks"]).reshape(-1).view(abi.BLOCK_STATE)
        return blocks

    # ---- prove -------------------------------------------------------------------------------------------------------
    def read_stamps(self, pool: int, slots: Array) -> list[tuple[Array, Array]]:
        arrays = self._arrays[pool]

        def read(name: str) -> Array:
            stamps: Array = self._driver.download(arrays[name]).reshape(-1).view(abi.STAMP)[slots]
            return stamps

        return [(read(f"head{h}"), read(f"tail{h}")) for h in range(len(self._kv_pools[pool].halves))]

    def read_array(self, view: Any) -> Array:
        n_bytes = view.byte_range[1] - view.pointer
        dtype = {1: np.uint8, 4: np.int32, 8: np.int64}[view.itemsize]
        data = self._driver.read_memory(view.pointer, n_bytes)
        return np.lib.stride_tricks.as_strided(data.view(dtype), view.shape, view.strides).copy()

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        self._driver.flip_byte(address, mask, stream)

    def write_memory(self, address: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        self._driver.write_memory(address, data, stream)

    def probe(self, call: BoundCall, target: ProbeTarget, stream: Any) -> Array:
        driver, bound = self._driver, call.batch.bound
        n_digests = int(self._pools[call.pool]["n_digests"])
        state, guard, _pool_states = self._memory.make_state(max(1, n_digests))
        words = np.zeros(state.layout.n_words, np.uint64)
        words[abi.STATE_JUDGING] = 1
        rows = np.zeros(self._max_requests, abi.ROW)
        rows[target.row] = target.as_row()
        work = np.zeros((abi.N_WORK, self._max_requests + 1), np.int64)
        work[:, target.row + 1 :] = 1
        pool = self._pools[call.pool].copy()
        pool["due"] = 0
        on_device = {"rows": driver.zeros(rows.shape, rows.dtype), "work": driver.zeros(work.shape, work.dtype)}
        driver.synchronize()  # memory is zeroed on a stream of the driver's
        for name, values in (("rows", rows), ("work", work)):
            driver.upload(on_device[name], values, stream)
            pool[name] = driver.pointer(on_device[name])
        driver.upload(state.words, words, stream)
        verify = next(k for k in call.batch.head if k.kernel == self._kernels["kvc_digests_verify"])
        params = self._step_params(guard, pool, verify.params.record["batch"])
        driver.launch(verify.kernel, verify.grid, params, stream)
        driver.synchronize()
        n = int(driver.download(state.words)[abi.STATE_CLAIMED])
        assert bound.rows > target.row and state.words is not None
        records: Array = state.violation_log[:n].copy()
        return records


def _as_bytes(stamps: Any) -> Any:
    """Stamps as u8[n, 32] in place; a device array of them is so already."""
    return stamps.view(np.uint8).reshape(len(stamps), -1) if isinstance(stamps, np.ndarray) else stamps
