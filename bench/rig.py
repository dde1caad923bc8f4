"""A case made real: random bytes, a manager over them, a primed prefix, and the launches of a forward by name.

Nothing here knows the device: a `Place` gives memory and launches (`bench.gpu.GpuPlace`; a test has one on the CPU).
This is the only file that looks inside the manager and its backend.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench.cases import DATA, FORWARD, TAIL, Case, Layout, Measure, bytes_of
from kvcanary import CanaryConfig, CanaryManager, KvPool, StepBatch, abi, hashing, layouts
from kvcanary.layout import DigestUnit, Plane, plane_address
from kvcanary.tags import CanaryLaunchTag, Half, PoolKind, Stage
from kvcanary.violations import Violation

Array = npt.NDArray[Any]
N_TOKEN_IDS = 128_000
_OFF: dict[str, Any] = {"stats_print_every_n_steps": 0, "health_check_every_n_steps": 0}


class Place(Protocol):
    """Where the engine's arrays lie and the benches' own kernels run."""

    xp: Any  # numpy or cupy
    backend: Any  # what `CanaryManager` takes
    stream: Any  # on which everything is launched
    l2_bytes: int

    def upload(self, values: Array) -> Any:
        """A device copy of a host array."""

    def to_host(self, array: Any) -> Array:
        """A host copy, after all that was launched."""

    def random_bytes(self, n: int, seed: int) -> Any:
        """u8[n], never all zeros."""

    def launch(self, name: str, grid: int, threads: int, args: Sequence[Any], stream: Any) -> None:
        """Launch a kernel of ``baselines.cu``; args are arrays and NumPy scalars of the kernel's own types."""

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        """Copy all bytes of an array on the stream."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def release(self) -> None:
        """Give freed memory back to the device."""


class Rig:
    """A case on a place; `close` it before the next one is made.

    Attributes:
        slots: i64[rows, length]: the slot of every position.
        tokens: i32[rows, length].
        batch: of the measured forward.
    """

    def __init__(self, case: Case, place: Place) -> None:
        self.case, self.place = case, place
        self.rng = np.random.default_rng(zlib.crc32(case.name.encode()))
        self.pool, self.planes = build_pool(case, place, self.rng)
        config = CanaryConfig(real_data=case.real_data, **_OFF)
        n_tokens = case.rows * max(case.prefix, case.n_new)
        self.manager = CanaryManager(config, [self.pool], case.rows, n_tokens, backend=place.backend)
        self._backend: Any = self.manager.backend
        self._driver = self._backend._driver
        self.host_table, self.slots = tables(case, self.rng)
        self.tokens = self.rng.integers(0, N_TOKEN_IDS, (case.rows, case.length), dtype=np.int32)
        self._table = place.upload(self.host_table)
        self._history = place.upload(self.tokens) if case.has_history else None
        self.prefill_forward = 0  # number of the forward that wrote the prefix
        self._prime()
        self.batch = self._batch(case.prefix, case.n_new)
        self.kernels = self._named_kernels()
        self.run()

    def close(self) -> None:
        """Give the memory back; waits for the device."""
        self.manager.close()
        self.__dict__.clear()

    # ---- batches ---------------------------------------------------------------------------------------------------
    def _prime(self) -> None:
        if self.case.prefix == 0:
            return
        batch = self._batch(0, self.case.prefix)
        self._forward(batch, self.place.stream)
        self._backend.synchronize()  # before the arrays of that batch are freed
        self.prefill_forward = self.forward_number

    def _batch(self, first: int, n: int) -> StepBatch:
        """The batch that brings positions [first, first + n) of every row."""
        case, upload, rows = self.case, self.place.upload, self.case.rows
        arrays: dict[str, Any] = {}
        if first and n >= abi.N_REGISTER_LENGTHS:
            # The register holds only the newest lengths: a repeated forward of many tokens comes as a prefix hit does.
            chains = [hashing.prefix_chain(tokens[:first]) for tokens in self.tokens]
            arrays["prefix_chain"] = upload(np.array(chains, np.uint64))
        if case.verify_all:
            arrays["verify_all"] = upload(np.ones(rows, np.uint8))
        if self._history is not None:
            arrays["token_history"] = self._history
        batch = StepBatch(
            block_table=self._table,
            seq_lens=upload(np.full(rows, first + n, np.int32)),
            query_start_loc=upload(np.arange(rows + 1, dtype=np.int32) * n),
            input_ids=upload(np.ascontiguousarray(self.tokens[:, first : first + n]).ravel()),
            slot_mapping=upload(np.ascontiguousarray(self.slots[:, first : first + n]).ravel()),
            request_slots=upload(np.arange(rows, dtype=np.int32)),
            request_ids=upload(np.arange(1, rows + 1, dtype=np.uint32)),
            table_entries="slots" if case.entries == "slots" else "blocks",
            **arrays,
        )
        self.place.synchronize()  # uploaded on another stream than the guard's
        return batch

    # ---- launches --------------------------------------------------------------------------------------------------
    def _named_kernels(self) -> list[tuple[str, Any]]:
        """The launches of the forward in their order, with the names of their kernels."""
        forward = self.manager._bind(self.batch, True, None).calls[0].batch
        names = {id(kernel): name for name, kernel in self._backend._kernels.items()}
        return [(names[id(k.kernel)], k) for k in (forward.begin_first, *forward.head, *forward.tail)]

    def _forward(self, batch: StepBatch, stream: Any) -> None:
        with self.manager.forward(batch, stream):
            pass  # the model: it leaves the bytes as they are

    def run(self) -> None:
        """One whole forward; after it each launch but `kvc_begin` may be repeated alone.

        With real data `kvc_stamps_verify` would list the slots that fall due once more: such cases measure data alone.
        """
        self._forward(self.batch, self.place.stream)

    def launcher(self, measure: Measure) -> Callable[[Any], None]:
        """The launches of a measure as a function of the stream; may run inside a capture."""
        if measure == FORWARD:
            return lambda stream: self._forward(self.batch, stream)
        # By the beginning of the name: a kernel may have come to be several.
        kernels = [k for name in measure for n, k in self.kernels if n.startswith(name)]
        if missing := [name for name in measure if not any(n.startswith(name) for n, _k in self.kernels)]:
            raise LookupError(f"no launch of {missing} in this forward; there are {[n for n, _k in self.kernels]}")

        def launch(stream: Any) -> None:
            for kernel in kernels:
                kernel.launch(stream)

        return launch

    # ---- what the guard holds and says -----------------------------------------------------------------------------
    @property
    def forward_number(self) -> int:
        """Of the newest forward; waits."""
        return int(self._backend.snapshot_words()[abi.STATE_FORWARD])

    @property
    def n_observations(self) -> int:
        """Violations seen so far, repeated ones too; waits."""
        self.manager.synchronize()
        return self.manager.stats().observations_total

    def findings(self, name: str) -> tuple[tuple[Violation, ...], int]:
        """Launch one kernel: the violations that it reported, first sightings and all observations."""
        before = self.n_observations
        self.manager._violations.forget()  # so that a place reported once is reported again
        self.launcher((name,))(self.place.stream)
        self._backend.synchronize()
        found = self.manager.poll()
        return found, self.n_observations - before

    def work_of(self, name: str) -> int:
        """Launch one kernel: the digests that it compared (`kvc_digests_verify`), else the entries of half K; waits."""
        before = self._backend.snapshot_words()
        self.launcher((name,))(self.place.stream)
        words = self._backend.snapshot_words()
        if name == DATA:
            return int(words[abi.STATE_DATA_SLOTS] - before[abi.STATE_DATA_SLOTS])
        tag = CanaryLaunchTag.of(Stage.TAIL if name == TAIL else Stage.HEAD, Half.K, self.pool.kind)
        slot_runs = self.manager.state.layout.slot_runs
        return int(slot_runs(words)[0, tag] - slot_runs(before)[0, tag])

    def due(self) -> Array:
        """DUE[n]: the slots whose digests the newest forward listed as due; waits."""
        listed: Array = self._driver.download(self._backend._arrays[0]["due"]).reshape(-1).view(abi.DUE)
        return listed[1 : 1 + int(listed["slot"][0])]

    def bytes_of(self, measure: Measure) -> int:
        """Bytes that a measure must move at least; of data that falls due by shares, those of the newest forward's."""
        n, layout = bytes_of(self.case, measure), self.case.layout
        if measure != (DATA,) or self.case.is_all_due:
            return n
        return len(self.due()) * layout.digested_bytes(self.case.real_data)

    def stamps(self, stage: str, half: int, slots: Array) -> Array:
        """STAMP[n] of slots; stage is "head" or "tail"; waits."""
        raw = b"".join(
            self._driver.read_memory(self.stamp_address(stage, half, s), abi.STAMP.itemsize).tobytes() for s in slots
        )
        return np.frombuffer(raw, abi.STAMP)

    def stamp_address(self, stage: str, half: int, slot: int) -> int:
        array = self._backend._arrays[0][f"{stage}{half}"]
        return int(self._driver.pointer(array)) + abi.STAMP.itemsize * int(slot)

    def stamp_array(self, half: int) -> Any:
        """The HEAD stamps of a half, where the guard keeps them."""
        return self._backend._arrays[0][f"head{half}"]

    @property
    def units(self) -> list[DigestUnit]:
        return self.pool.digest_units(self.case.real_data)

    def digest(self, unit: int, slot: int) -> int:
        """The stored digest; waits."""
        return int(self._driver.read_memory(self.digest_address(unit, slot), 8).view(np.uint64)[0])

    def digest_address(self, unit: int, slot: int) -> int:
        first = int(self._driver.pointer(self._backend._arrays[0]["digests"]))
        return first + 8 * (unit * self.pool.n_slots + int(slot))

    def runs(self, unit: int, slot: int) -> list[tuple[int, int]]:
        """(address, bytes) of the runs that a digest covers, in its order."""
        records = self.pool.plane_records(self.case.real_data)
        first, n = self.units[unit][:2]
        return [
            (plane_address(r, int(slot), self.pool.page_size, c * int(r["chunk_bytes"])), int(r["chunk_bytes"]))
            for r in records[first : first + n]
            for c in range(int(r["n_chunks"]))
        ]

    def slot_bytes(self, unit: int, slot: int) -> npt.NDArray[np.uint8]:
        """The bytes that a digest covers, as they are on the device now: u8[bytes]; waits."""
        return np.concatenate([self._driver.read_memory(address, n) for address, n in self.runs(unit, slot)])

    def byte(self, address: int) -> int:
        """One byte of device memory; waits."""
        return int(self._driver.read_memory(address, 1)[0])

    def flip(self, address: int, mask: int) -> None:
        """XOR one byte of device memory; waits."""
        self._driver.flip_byte(address, mask, self.place.stream)


# ---- arrays of a case ------------------------------------------------------------------------------------------------
def tables(case: Case, rng: np.random.Generator) -> tuple[Array, Array]:
    """The block table i32[rows, width] and the slot of every position i64[rows, length]; block 0 is in no table."""
    page, rows, length = case.page_size, case.rows, case.length
    is_shuffled = case.order == "shuffled"
    if case.entries == "slots":
        free = np.arange(page, case.n_slots)
        slots = (rng.permutation(free) if is_shuffled else free)[: rows * length].reshape(rows, length)
        return slots.astype(np.int32), slots.astype(np.int64)
    n_blocks = case.n_slots // page - 1
    blocks = 1 + (rng.permutation(n_blocks) if is_shuffled else np.arange(n_blocks))
    table = blocks.reshape(rows, -1).astype(np.int32)
    position = np.arange(length)
    return table, table[:, position // page].astype(np.int64) * page + position % page


def build_pool(case: Case, place: Place, rng: np.random.Generator) -> tuple[KvPool, list[Any]]:
    """The pool over fresh random bytes, and its arrays."""
    layout, page = case.layout, case.page_size
    n_blocks = case.n_slots // page
    more: dict[str, Any] = {"kind": PoolKind.SWA, "window": case.window} if case.window else {}
    if layout.form == "split":
        return _split_pool(layout, page, n_blocks, place, rng, more)
    n = layout.plane_bytes[0]
    shape = {
        "nhd": (n_blocks, page, 1, n),
        "hnd": (n_blocks, layout.n_chunks, page, n // layout.n_chunks),
        "token_major": (n_blocks, page, n),
    }[layout.form]
    count = layout.n_layers * layout.n_halves
    arrays = [place.random_bytes(n_blocks * page * n, int(rng.integers(1 << 62))).reshape(shape) for _ in range(count)]
    k, v = arrays[: layout.n_layers], arrays[layout.n_layers :] or None
    if layout.form == "nhd":
        return layouts.nhd(k=k, v=v, page_size=page, **more), arrays
    if layout.form == "hnd":
        return layouts.hnd(k=k, v=v, **more), arrays
    return layouts.token_major(latent=k, page_size=page, **more), arrays


def _split_pool(
    layout: Layout, page: int, n_blocks: int, place: Place, rng: np.random.Generator, more: dict[str, Any]
) -> tuple[KvPool, list[Any]]:
    """Pages that hold the rows of each plane together; small rows too are a digest of their own here."""
    stride = layout.page_bytes(page)
    data = place.random_bytes(n_blocks * stride, int(rng.integers(1 << 62)))
    planes, offset = [], 0
    for i, n in enumerate(layout.plane_bytes):
        planes.append(
            Plane(data=data, offset=offset, page_stride=stride, token_stride=n, chunk_bytes=n, name=f"part{i}")
        )
        offset += page * n
    return KvPool(planes=tuple(planes), page_size=page, n_blocks=n_blocks, **more), [data]
