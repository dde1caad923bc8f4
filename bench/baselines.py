"""What the guard's kernels are measured against, over the same pool: a per-thread scheme, array operations, copies.

Each baseline is compared too before it is timed; `bench/baselines.cu` has the kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.cases import STAMP_BYTES, Case, bytes_of
from bench.checks import CheckFailed
from bench.rig import Rig
from bench.timing import Launch, Timer, Timing
from kvcanary import abi, hashing

GRID, THREADS = 64, 512  # of the per-thread scheme
WRITE_THREADS = 128  # a thread per request
N_CHECKED = 64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ANCHOR = np.uint64(hashing.prefix_chain([]))


def fold(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The fold of the per-thread scheme in NumPy: u8[n, 16 k] to u64[n]."""
    words = np.ascontiguousarray(rows).view(np.uint64)
    h = np.zeros(len(rows), np.uint64)
    for column in words.T:
        h = hashing.mix64((h ^ column) + _GOLDEN)
    return h


class Baseline(ABC):
    """A baseline over a rig: make, check, time.

    Attributes:
        n_bytes: what the figure "TB/s" is computed from.
        note: what was timed, in words.
    """

    note = ""

    def __init__(self, rig: Rig, timer: Timer) -> None:
        self.rig, self.place, self.case, self.timer = rig, rig.place, rig.case, timer
        self.n_bytes = bytes_of(self.case, self.case.measures[0])

    @abstractmethod
    def run(self) -> Timing:
        """Check, then time.

        Raises:
            CheckFailed: its results are wrong.
        """

    def _launch(self, name: str, args: tuple[Any, ...], stream: Any = None, *, is_serial: bool = False) -> None:
        grid, threads = (-(-self.case.rows // WRITE_THREADS), WRITE_THREADS) if is_serial else (GRID, THREADS)
        self.place.launch(name, grid, threads, args, self.place.stream if stream is None else stream)

    def _counter(self) -> Any:
        return self.place.upload(np.zeros(1, np.uint64))

    def _expect_bad(self, counter: Any, wanted: int, run: Callable[[], None]) -> None:
        before = int(self.place.to_host(counter)[0])
        run()
        found = int(self.place.to_host(counter)[0]) - before
        if found != wanted:
            raise CheckFailed(f"{type(self).__name__} found {found} bad entries, not {wanted}")

    def _expect_to_find(self, counter: Any, address: int, launch: Launch) -> None:
        """Nothing is found, then one bad entry while a bit at ``address`` is flipped."""
        self._expect_bad(counter, 0, lambda: launch(self.place.stream))
        self.rig.flip(address, 1)
        try:
            self._expect_bad(counter, 1, lambda: launch(self.place.stream))
        finally:
            self.rig.flip(address, 1)

    def _verified_slots(self) -> npt.NDArray[np.int64]:
        return np.ascontiguousarray(self.rig.slots[:, : self.case.prefix]).ravel()


class PlanVerify(Baseline):
    """A plan by one thread per request, then one thread per entry, K and V in a launch each."""

    note = "per-thread scheme: plan, verify K, verify V"

    def run(self) -> Timing:
        case, upload, xp = self.case, self.place.upload, self.place.xp
        n = case.rows * case.prefix
        prefix = np.full(case.rows, case.prefix, np.int32)
        before = np.arange(case.rows, dtype=np.int64) * case.prefix
        table, tokens = upload(self.rig.host_table), upload(self.rig.tokens)
        slot, position = xp.empty(n, np.int64), xp.empty(n, np.int32)
        previous, expected = xp.empty(n, np.int64), xp.empty(n, np.int32)
        plan = (
            np.int32(case.rows), table, np.int64(table.shape[1]), np.int32(case.page_size), upload(prefix), tokens,
            np.int64(tokens.shape[1]), upload(before), slot, position, previous, expected,
        )  # fmt: skip
        bad = self._counter()
        self.place.synchronize()

        def launch(stream: Any) -> None:
            self._launch("base_plan", plan, stream, is_serial=True)
            for half in range(case.layout.n_halves):
                stamps = self.rig.stamp_array(half)
                args = (np.int64(n), slot, position, previous, expected, stamps, _ANCHOR, bad)
                self._launch("base_verify_stamps", args, stream)

        address = self.rig.stamp_address("head", 0, int(self.rig.slots[0, case.prefix - 1]))
        self._expect_to_find(bad, address, launch)
        return self.timer.time(launch)


class FoldVerify(Baseline):
    """One thread per slot folds its bytes 16 at a time."""

    note = "per-thread scheme: one thread a slot"

    def run(self) -> Timing:
        pool, slots = self.rig.pool, self._verified_slots()
        data, n_loads = self.rig.planes[0], self.case.layout.plane_bytes[0] // 16
        on_device, folds = self.place.upload(slots), self.place.upload(np.zeros(pool.n_slots, np.uint64))
        bad = self._counter()
        self.place.synchronize()
        common = (np.int64(len(slots)), on_device, data, np.int32(n_loads), folds)
        self._launch("base_fold_slots", common)
        _check_folds(self.rig, self.place.to_host(folds), self.rig.rng.choice(slots, min(N_CHECKED, len(slots)), False))

        def launch(stream: Any) -> None:
            self._launch("base_verify_folds", (*common, bad), stream)

        address, _n = self.rig.runs(0, int(slots[0]))[0]
        self._expect_to_find(bad, address, launch)
        return self.timer.time(launch)


class SerialWrite(Baseline):
    """One thread per request walks the chain of its new tokens; K and V in a launch each."""

    note = "per-thread scheme: one thread a request, K and V in a launch each"

    def __init__(self, rig: Rig, timer: Timer) -> None:
        super().__init__(rig, timer)
        self.n_bytes = self.case.rows * self.case.n_new * self.case.layout.n_halves * (STAMP_BYTES + 4 + 8)

    def run(self) -> Timing:
        rig, case = self.rig, self.case
        halves = [
            self.place.upload(np.zeros(rig.pool.n_slots * STAMP_BYTES, np.uint8)) for _ in range(case.layout.n_halves)
        ]
        query = np.arange(case.rows + 1, dtype=np.int32) * case.n_new
        args = (
            np.int32(case.rows), self.place.upload(query), self.place.upload(rig.tokens.ravel()),
            self.place.upload(rig.slots.ravel()), _ANCHOR, np.uint32(1),
        )  # fmt: skip
        self.place.synchronize()

        def launch(stream: Any = None) -> None:
            for stamps in halves:
                self._launch("base_write_stamps", (*args, stamps), stream, is_serial=True)

        launch()
        for stamps in halves:
            found = self.place.to_host(stamps).reshape(-1).view(abi.STAMP)[rig.slots[0]]
            if (found["chain"] != hashing.chain_scan(int(_ANCHOR), rig.tokens[0], 0)).any():
                raise CheckFailed("the serial chain differs from the reference")
        return self.timer.time(launch)


class SerialFold(Baseline):
    """One thread per request folds the bytes of its new tokens, one after the other."""

    note = "per-thread scheme: one thread a request"

    def run(self) -> Timing:
        rig, case, upload = self.rig, self.case, self.place.upload
        folds = upload(np.zeros(rig.pool.n_slots, np.uint64))
        query = np.arange(case.rows + 1, dtype=np.int32) * case.n_new
        n_loads = np.int32(case.layout.plane_bytes[0] // 16)
        args = (np.int32(case.rows), upload(query), upload(rig.slots.ravel()), rig.planes[0], n_loads, folds)
        self.place.synchronize()
        self._launch("base_write_folds", args, is_serial=True)
        _check_folds(rig, self.place.to_host(folds), rig.rng.choice(rig.slots[0], min(N_CHECKED, case.length), False))
        return self.timer.time(lambda stream: self._launch("base_write_folds", args, stream, is_serial=True))


class ArrayDigest(Baseline):
    """What array operations do: gather the rows, multiply by constants, sum each row."""

    note = "array operations: gather, multiply, sum"

    def run(self) -> Timing:
        rig, xp, slots = self.rig, self.place.xp, self._verified_slots()
        rows = rig.planes[0].reshape(rig.pool.n_slots, -1).view(np.uint64)
        constants = hashing.mix64(np.arange(rows.shape[1], dtype=np.uint64)) | np.uint64(1)
        on_device, weights = self.place.upload(slots), self.place.upload(constants)
        self.place.synchronize()

        def digests() -> Any:
            gathered = xp.take(rows, on_device, axis=0)
            gathered *= weights
            return gathered.sum(axis=1)

        found = self.place.to_host(digests())
        for i in rig.rng.integers(0, len(slots), N_CHECKED):
            if found[i] != (rig.slot_bytes(0, int(slots[i])).view(np.uint64) * constants).sum():
                raise CheckFailed(f"the array digest of slot {slots[i]} differs from NumPy's")
        return self.timer.eager(digests)


class Copy(Baseline):
    """A plain copy of the bytes that are verified, device to device; each byte is read and written."""

    note = "device-to-device copy of as many bytes, read + written"

    def run(self) -> Timing:
        n = self.n_bytes
        source = self.rig.planes[0].reshape(-1)[:n]
        to = self.place.xp.empty(n, np.uint8)
        self.place.copy(to, source, self.place.stream)
        ends = slice(None, 4096), slice(n - 4096, None)
        if any((self.place.to_host(to[e]) != self.place.to_host(source[e])).any() for e in ends):
            raise CheckFailed("the copy differs from its source")
        self.n_bytes = 2 * n
        return self.timer.time(lambda stream: self.place.copy(to, source, stream))


def _check_folds(rig: Rig, folds: npt.NDArray[Any], slots: npt.NDArray[Any]) -> None:
    wanted = fold(np.stack([rig.slot_bytes(0, int(s)) for s in slots]))
    if (folds[slots] != wanted).any():
        raise CheckFailed("the fold of a sampled slot differs from NumPy's")


BASELINES: dict[str, type[Baseline]] = {
    "plan_verify": PlanVerify,
    "fold_verify": FoldVerify,
    "serial_write": SerialWrite,
    "serial_fold": SerialFold,
    "array_digest": ArrayDigest,
    "copy": Copy,
}


def baseline_key(case: Case, name: str) -> str:
    """Name of a baseline's measurement."""
    return f"{case.name} {name}"
