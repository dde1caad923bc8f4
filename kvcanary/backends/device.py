"""The launches of a step on a device: parameters packed once, grids chosen once; a step only launches.

`DeviceBackend` knows the kernels and nothing of CuPy or cuda-python; a `Driver` gives it memory and launches. `cuda.py`
has the real one; a test has one that runs the same kernels on the CPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends import BoundCall, CapturedGraph, ProbeTarget, Resident
from kvcanary.backends.device_moves import DeviceMoves
from kvcanary.backends.moves import Move, SlotImage
from kvcanary.batch import BoundBatch
from kvcanary.config import CanaryConfig
from kvcanary.deferred import Staging
from kvcanary.layout import KvPool
from kvcanary.ledger import BlockChanges
from kvcanary.patrol import plan_patrol
from kvcanary.reserved import plane_table
from kvcanary.state import CanaryDeviceState, CounterLayout

KERNELS = {
    "lifecycle": ("kvc_blocks_update",),
    "begin": ("kvc_begin",),
    "stamps": ("kvc_stamps_write",),
    "verify": ("kvc_stamps_verify", "kvc_stamps_tail", "kvc_stamps_sweep"),
    "digests": (
        "kvc_digests_verify",
        "kvc_digests_layer",
        "kvc_digests_write",
        "kvc_digests_adopt",
        "kvc_digests_sweep",
    ),
    "scrub": ("kvc_scrub",),
    "reserved": ("kvc_reserved_check",),
    "renumber": ("kvc_renumber", "kvc_renumber_end"),
    "moves": (
        *("kvc_moves_gather", "kvc_moves_scatter", "kvc_moves_commit"),
        *("kvc_moves_localize", "kvc_moves_adopt", "kvc_moves_digest"),
    ),
}
MAX_DIGEST_SPLIT = 8  # parts that the digests of prefix slots are split into, for blocks to work on side by side
MAX_GRID_Y = 1024  # the same for new tokens, whose slots are found at no cost
MAX_BEGIN_BLOCKS = 2048  # of kvc_begin: enough to claim the slots of a long prefill side by side
SWEEP_SLOTS = 1 << 16  # resident slots that a sweep copies at once; longer lists go in parts

Array = npt.NDArray[Any]


class Driver(Protocol):
    """A device: memory, kernels, streams. ``stream`` is what the engine handed in (None = the default stream)."""

    n_multiprocessors: int

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """A zeroed device array (structured dtypes as u8 with the item size as last axis)."""

    def pointer(self, array: Any) -> int:
        """Device address of an array made by `zeros`."""

    def mapped(self, n: int, dtype: npt.DTypeLike) -> tuple[Array, int]:
        """Zeroed pinned host memory mapped into the device: its NumPy view and its device address."""

    def kernel(self, source: str, name: str) -> Any:
        """A loaded kernel of ``kernels/<source>.cu``."""

    def resident_blocks(self, kernel: Any) -> int:
        """Blocks of ``abi.THREADS`` threads of a kernel that a multiprocessor holds at once."""

    def launch(self, kernel: Any, grid: tuple[int, int], params: Any, stream: Any) -> None:
        """Launch with ``abi.THREADS`` threads a block and one by-value structure."""

    def capture(self, launch: Callable[[Any], None]) -> CapturedGraph:
        """The graph of what ``launch`` puts on the stream that it is given; touches no stream of the engine's."""

    def fill_zero(self, array: Any, stream: Any) -> None:
        """Zero an array, ordered on the stream."""

    def upload(self, array: Any, values: Array, stream: Any) -> None:
        """Copy host values into an array, ordered on the stream; may wait."""

    def write_table(self, array: Any, values: Array, stream: Any) -> None:
        """Copy host values into an array, ordered on the stream; waits only for buffers of its own, as `lend` does."""

    def set_word(self, array: Any, index: int, value: int, stream: Any) -> None:
        """Set one u64 word (value < 2^32), ordered on the stream, without waiting."""

    def download(self, array: Any) -> Array:
        """A host copy, after all that was launched."""

    def read_memory(self, pointer: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        """A host copy of engine memory, after all that was launched."""

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        """XOR one byte of engine memory; may wait."""

    def write_memory(self, pointer: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        """Put bytes into engine memory, after all that was launched; may wait."""

    def staging(self, n_words: int, depth: int) -> Staging:
        """Buffers for the deferred handler."""

    def upload_lists(self, lists: Sequence[Any], capacity: int, stream: Any) -> Sequence[int] | None:
        """Device addresses of i32 lists (0 for None); None if the buffers are still being read by the copies before.

        Host lists go through pinned buffers of ``capacity`` entries and are copied on the stream without waiting.
        """

    def lend(self, arrays: Sequence[Any], n_scratch: int, stream: Any) -> AbstractContextManager[tuple[list[int], int]]:
        """Device addresses of arrays (0 for None, `ArrayView`s where they lie) and of ``n_scratch`` bytes.

        They hold for what is launched on the stream until the with-block ends, and nothing is reused before that is
        done, on whichever stream. NumPy arrays are copied through pinned memory; waits only for its own buffers.
        """

    @property
    def lent_bytes(self) -> int:
        """Memory that is kept for `lend`, in bytes."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def close(self) -> None:
        """Free everything that this driver made."""


@dataclass(frozen=True)
class BoundKernel:
    """A kernel with its packed parameters and its grid."""

    driver: Driver
    kernel: Any
    grid: tuple[int, int]
    params: Any

    def launch(self, stream: Any) -> None:
        """May run inside a capture; neither allocates nor waits."""
        self.driver.launch(self.kernel, self.grid, self.params, stream)


@dataclass(frozen=True)
class BoundForward:
    """The launches of one forward over one pool; ``begin`` differs for the first pool of a forward."""

    begin_first: BoundKernel
    begin_other: BoundKernel
    head: tuple[BoundKernel, ...]
    tail: tuple[BoundKernel, ...]
    bound: BoundBatch
    layers: dict[int, list[BoundKernel]] = field(default_factory=dict)


class BlockUpdate:
    """The parameters of kvc_blocks_update for one pool; what changes from call to call is put into their memory."""

    _head = struct.Struct(f"<I{abi.N_BLOCK_OPS}I")  # owner, ends: side by side

    def __init__(self, state: int, blocks: int, n_blocks: int) -> None:
        record = abi.zeros_of(abi.PARAMS["LifecycleParams"])
        record["state"], record["blocks"], record["n_blocks"] = state, blocks, n_blocks
        fields = record.dtype.fields
        assert fields is not None and fields["ends"][1] == fields["owner"][1] + 4
        self._owner_at, ids_at = fields["owner"][1], fields["ids"][1]
        as_bytes = record.reshape(1).view(np.uint8)
        self._memory, self._ids = as_bytes.data, as_bytes[ids_at:].view(np.int32)
        self._params = record[()]  # of the same memory: a launch reads what is in it then

    def pack(self, changes: BlockChanges, first: int, n: int) -> Any:
        """By-value parameters for ``n`` ids from ``first`` on."""
        owner, ids, ends = changes
        if len(ids) > n:
            ids, ends = ids[first : first + n], tuple(min(max(end - first, 0), n) for end in ends)
        self._ids[:n] = ids
        self._head.pack_into(self._memory, self._owner_at, owner, *ends)
        return self._params


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
        self._arrays: list[dict[str, Any]] = [self._allocate(p) for p in pools]
        self.state, self._guard, self._pool_states = self._make_state(config.ring_capacity)
        patrols = plan_patrol(config, pools)
        self._pools = [self._pool_record(i, patrol.n_blocks) for i, patrol in enumerate(patrols)]
        self._updates = [
            BlockUpdate(int(self._guard["state"]), int(p["blocks"]), int(p["n_blocks"])) for p in self._pools
        ]
        self._moves = DeviceMoves(driver, self._kernels, self._resident, self._guard, self._pools)
        driver.synchronize()  # memory is zeroed on a stream of the driver's, and used on the engine's

    # ---- memory ------------------------------------------------------------------------------------------------------
    def _allocate(self, pool: KvPool) -> dict[str, Any]:
        driver, n, halves = self._driver, pool.n_slots, range(len(pool.halves))
        digests = pool.digest_records(self._config.real_data)
        arrays = {f"{plane}{h}": driver.zeros(n, abi.STAMP) for plane in ("head", "tail") for h in halves}
        arrays |= {
            "claims": driver.zeros(n, np.uint64),
            "digests": driver.zeros((max(1, len(digests)), n if len(digests) else 1), np.uint64),
            "registers": driver.zeros(self._max_requests, abi.REGISTER),
            "register_claims": driver.zeros(self._max_requests, np.uint64),
            "rows": driver.zeros(self._max_requests, abi.ROW),
            "work": driver.zeros((abi.N_WORK, self._max_requests + 1), np.int64),
        }
        if self._config.lifecycle:
            arrays["blocks"] = driver.zeros(pool.n_blocks, abi.BLOCK_STATE)
        capacity = abi.due_capacity(n, len(digests), self._config.verify_data_every)
        if capacity:
            arrays["due"] = driver.zeros(capacity + 1, abi.DUE)
        for key, records in self._tables(pool).items():
            arrays[key] = driver.zeros(max(1, len(records)), records.dtype)
            if len(records):
                driver.upload(arrays[key], records, None)
        return arrays

    def _tables(self, pool: KvPool) -> dict[str, Array]:
        """What the kernels know of where the pool's planes lie."""
        real_data = self._config.real_data
        tables = {"planes": pool.plane_records(real_data), "digest_units": pool.digest_records(real_data)}
        checked = plane_table(self._config, pool)
        return tables | ({"float_planes": checked} if len(checked) else {})

    def _make_state(self, ring_capacity: int) -> tuple[CanaryDeviceState, Array, Any]:
        driver, layout = self._driver, CounterLayout(len(self._kv_pools))
        words = driver.zeros(layout.n_words, np.uint64)
        taint = driver.zeros(self._max_requests, np.uint32)
        pool_states = driver.zeros(len(self._kv_pools), abi.POOL_STATE)
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

    def _pool_record(self, index: int, scrub_blocks: int) -> Array:
        pool, arrays = self._kv_pools[index], self._arrays[index]
        record = abi.zeros_of(abi.POOL)
        for half in range(len(pool.halves)):
            record["head"][half] = self._driver.pointer(arrays[f"head{half}"])
            record["tail"][half] = self._driver.pointer(arrays[f"tail{half}"])
        names = ("claims", "digests", "planes", "digest_units", "registers", "register_claims", "rows", "work")
        for name in names:
            record[name] = self._driver.pointer(arrays[name])
        if "blocks" in arrays:
            record["blocks"] = self._driver.pointer(arrays["blocks"])
        if "due" in arrays:
            record["due"], record["due_capacity"] = self._driver.pointer(arrays["due"]), len(arrays["due"]) - 1
        if pool.lut_view is not None:
            record["slot_lut"], record["lut_length"] = pool.lut_view.pointer, pool.lut_view.shape[0]
        record["n_slots"], record["page_size"], record["n_blocks"] = pool.n_slots, pool.page_size, pool.n_blocks
        record["page_shift"] = abi.log2_or_negative(pool.page_size)
        record["window"], record["token_offset"] = pool.window or 0, pool.token_offset
        record["ring_length"], record["ring_bubble"], record["sink"] = pool.ring_length, pool.ring_bubble, pool.sink
        record["scrub_blocks"] = scrub_blocks
        record["kind"], record["index"], record["n_halves"] = int(pool.kind), index, len(pool.halves)
        record["n_digests"] = len(pool.digest_units(self._config.real_data))
        record["n_reserved"], record["max_requests"] = len(pool.reserved_blocks), self._max_requests
        record["reserved"][: len(pool.reserved_blocks)] = [b * pool.page_size for b in pool.reserved_blocks]
        return record

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
        grids = _grids(self._driver.n_multiprocessors, self._resident, self._pools[pool], bound)
        head, tail = ["kvc_stamps_write", "kvc_stamps_verify"], ["kvc_stamps_tail"]
        if self._pools[pool]["n_digests"]:
            head.append("kvc_digests_verify")
            tail.append("kvc_digests_write")
        if config.on_unwritten == "adopt":
            head.append("kvc_digests_adopt")
        if self._pools[pool]["scrub_blocks"] and is_first_forward:
            head.append("kvc_scrub")

        def kernel(name: str, packed: Any) -> BoundKernel:
            return BoundKernel(self._driver, self._kernels[name], grids[name], packed)

        other, first = (kernel("kvc_begin", b[()]) for b in begin)
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
        return BoundKernel(self._driver, self._kernels[name], grid, params[()])

    @staticmethod
    def _step_params(guard: Array, pool: Array, batch: Array) -> Any:
        params = abi.zeros_of(abi.PARAMS["StepParams"])
        params["guard"], params["pool"], params["batch"] = guard, pool, batch
        return params[()]

    # ---- a forward ---------------------------------------------------------------------------------------------------
    def head(self, calls: Sequence[BoundCall], stream: Any) -> None:
        for i, call in enumerate(calls):
            (call.batch.begin_other if i else call.batch.begin_first).launch(stream)
        for call in calls:
            for bound in call.batch.head:
                bound.launch(stream)

    def tail(self, calls: Sequence[BoundCall], stream: Any) -> None:
        for call in calls:
            for bound in call.batch.tail:
                bound.launch(stream)

    def verify_layer(self, calls: Sequence[BoundCall], layer: int, stream: Any) -> None:
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
                    params[name] = verify.params[name]
                params["n_digests"], params["digests"][: len(chosen)] = len(chosen), chosen
                kernel = self._kernels["kvc_digests_layer"]
                known[layer].append(BoundKernel(self._driver, kernel, verify.grid, params[()]))
        return known[layer]

    def graphs(self, calls: Sequence[BoundCall]) -> tuple[CapturedGraph, CapturedGraph]:
        capture = self._driver.capture
        return capture(lambda stream: self.head(calls, stream)), capture(lambda stream: self.tail(calls, stream))

    # ---- host-driven -------------------------------------------------------------------------------------------------
    def sweep(self, pool_index: int, resident: Resident, stream: Any) -> bool:
        params, n = abi.zeros_of(abi.PARAMS["SweepParams"]), len(resident.slots)
        addresses = self._driver.upload_lists(tuple(resident), max(n, SWEEP_SLOTS), stream)
        if addresses is None:
            return False
        params["guard"], params["pool"], params["n"] = self._guard, self._pools[pool_index], n
        for name, address in zip(("slots", "positions", "predecessors", "tokens"), addresses, strict=True):
            params[name] = address
        n_digests = int(self._pools[pool_index]["n_digests"])
        wanted = {"kvc_stamps_sweep": (-(-n // abi.THREADS), 1)}
        if n_digests:
            wanted["kvc_digests_sweep"] = (-(-n // abi.THREADS), min(n_digests, MAX_DIGEST_SPLIT))
        grids = {
            name: (max(1, min(x, self._driver.n_multiprocessors * self._resident[name] // y)), y)
            for name, (x, y) in wanted.items()
        }
        for name, grid in grids.items():
            self._driver.launch(self._kernels[name], grid, params[()], stream)
        return True

    def update_blocks(self, pool: int, changes: BlockChanges, stream: Any) -> None:
        kernel, update, n_ids = self._kernels["kvc_blocks_update"], self._updates[pool], len(changes.ids)
        for first in range(0, n_ids, abi.MAX_BLOCK_IDS):
            n = min(n_ids - first, abi.MAX_BLOCK_IDS)
            grid = (-(-n // abi.THREADS), 1)
            self._driver.launch(kernel, grid, update.pack(changes, first, n), stream)

    def move(self, move: Move, stream: Any) -> SlotImage | None:
        return self._moves.run(move, stream)

    def shadow_arrays(self, pool: int) -> dict[str, Any]:
        arrays, kv = self._arrays[pool], self._kv_pools[pool]
        stages = [(half, stage) for half in kv.halves for stage in ("head", "tail")]
        shadow = {f"{stage.upper()}_{half.name}": _as_bytes(arrays[f"{stage}{int(half)}"]) for half, stage in stages}
        n_digests = int(self._pools[pool]["n_digests"])
        return shadow | {f"DIGEST_{d}": arrays["digests"][d] for d in range(n_digests)}

    def rebind(self, pool: int, kv: KvPool, stream: Any) -> None:
        before, after = self._tables(self._kv_pools[pool]), self._tables(kv)
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
            self._driver.launch(self._kernels["kvc_renumber"], grid, params[()].copy(), stream)
        self._driver.launch(self._kernels["kvc_renumber_end"], (1, 1), params[()], stream)

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
        state, guard, _pool_states = self._make_state(max(1, n_digests))
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
        verify = next(k for k in call.batch.head if k.kernel is self._kernels["kvc_digests_verify"])
        params = self._step_params(guard, pool, verify.params["batch"])
        driver.launch(verify.kernel, verify.grid, params, stream)
        driver.synchronize()
        n = int(driver.download(state.words)[abi.STATE_CLAIMED])
        assert bound.rows > target.row and state.words is not None
        records: Array = state.violation_log[:n].copy()
        return records


def _as_bytes(stamps: Any) -> Any:
    """Stamps as u8[n, 32] in place; a device array of them is so already."""
    return stamps.view(np.uint8).reshape(len(stamps), -1) if isinstance(stamps, np.ndarray) else stamps


def _grids(
    n_multiprocessors: int, resident: dict[str, int], pool: Array, bound: BoundBatch
) -> dict[str, tuple[int, int]]:
    """Grid of each kernel, from capacities alone: a captured graph must fit every batch in those arrays.

    Args:
        resident: blocks of each kernel that a multiprocessor holds at once.
    """
    rows, n_tokens, batch = bound.rows, bound.n_tokens, bound.record
    entries = int(batch["table_width"]) * (rows if batch["table_kind"] == abi.TABLE_DENSE else 1)
    if batch["table_kind"] == abi.TABLE_STATIC:
        entries = rows
    positions = entries * int(batch["table_page"])
    if pool["window"]:
        positions = min(positions, rows * int(pool["window"] + pool["sink"]))
    split = max(1, min(int(pool["n_digests"]), MAX_DIGEST_SPLIT))
    scrub_slots = int(pool["scrub_blocks"]) * int(pool["page_size"])

    def blocks(kernel: str, units: int, n_y: int = 1) -> int:
        return max(1, min(units, n_multiprocessors * resident[kernel] // n_y))

    verify_units = -(-positions // abi.VERIFY_UNIT) + rows
    data_units, tail_chunks = rows + positions // abi.DATA_UNIT, rows + n_tokens // abi.TAIL_CHUNK
    writers = max(rows, verify_units if pool["due"] else 0)  # warps: a row to stamp, or a unit to look through
    write_blocks = -(-n_tokens // abi.WARPS)  # that find work: a token for each warp
    # Few tokens: a block for each digest, so that they are all under way at once.
    fits = n_multiprocessors * resident["kvc_digests_write"] // max(1, write_blocks)
    write_split = max(split, min(int(pool["n_digests"]), fits, MAX_GRID_Y))
    return {
        "kvc_begin": (rows + 1, max(1, min(n_tokens // abi.WRITE_TILE, MAX_BEGIN_BLOCKS // max(1, rows)))),
        "kvc_stamps_write": (
            blocks(
                "kvc_stamps_write", max(-(-writers // abi.WARPS), min(rows, n_tokens // 32) + n_tokens // abi.THREADS)
            )
            + 1,
            1,
        ),
        "kvc_stamps_verify": (blocks("kvc_stamps_verify", verify_units), 1),
        "kvc_stamps_tail": (blocks("kvc_stamps_tail", verify_units + -(-tail_chunks // abi.WARPS)), 1),
        "kvc_digests_verify": (blocks("kvc_digests_verify", data_units, split), split),
        "kvc_digests_write": (blocks("kvc_digests_write", write_blocks, write_split), write_split),
        "kvc_digests_adopt": (blocks("kvc_digests_adopt", -(-verify_units // abi.WARPS)), 1),
        "kvc_scrub": (blocks("kvc_scrub", -(-scrub_slots // (8 * abi.WARPS)), split), split),
    }
