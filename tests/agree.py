"""The sides that must agree: a guard, and where the arrays lie that it reads.

`agree_twins.Twins` drives several of them alike over equal bytes. The first side is the one that the others are
compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from simt.build import build
from simt.driver import simt_backend
from simt.exact import exact_copy, exact_rows
from simt.runner import SimtLibrary

from kvcanary import CanaryConfig, CanaryManager, KvPool, abi
from kvcanary.arrays import view_of

KERNELS_DIR = Path(__file__).resolve().parents[1] / "kernels"
_DTYPES = {"head": abi.STAMP, "tail": abi.STAMP, "registers": abi.REGISTER, "blocks": abi.BLOCK_STATE}
Arrays = dict[str, Any]  # keywords of a StepBatch: NumPy arrays, lists of them (one per pool), plain values
Array = NDArray[Any]


@dataclass(frozen=True)
class PoolSpec:
    """The arrays of one pool with their first contents, and how a `KvPool` is described over a copy of them."""

    buffers: Mapping[str, Array]
    build: Callable[[Mapping[str, Any]], KvPool]


class Side:
    """One guard and the memory it reads; this class itself is the host backend.

    A side on another device is a `DeviceSide` with a ``backend`` and three methods of its own: `to_device`, `to_host`
    and `write` (with CuPy: ``cupy.array``, ``cupy.asnumpy``, ``array.set(values)``).
    """

    name = "host"
    backend: Any = "host"
    is_late = False  # HEAD may run beside the model

    def to_device(self, array: Array) -> Any:
        """A copy in the memory of this side's engine."""
        return np.array(array, order="C")

    def to_device_rows(self, array: Array, row_bytes: int) -> Any:
        """A copy whose rows lie ``row_bytes`` apart, with something between them."""
        wide = np.full((array.shape[0], row_bytes // array.itemsize), 7, array.dtype)
        wide[:, : array.shape[1]] = array
        return self.to_device(wide)[:, : array.shape[1]]

    def to_host(self, array: Any) -> Array:
        """A copy in host memory."""
        return np.array(array)

    def write(self, array: Any, values: Array) -> None:
        """Change the contents in place."""
        array[...] = values

    # Set by `start`.
    manager: CanaryManager
    buffers: list[dict[str, Any]]

    def start(self, config: CanaryConfig, specs: Sequence[PoolSpec], max_requests: int, max_new_tokens: int) -> None:
        self.buffers = [{name: self.to_device(a) for name, a in s.buffers.items()} for s in specs]
        pools = [s.build(b) for s, b in zip(specs, self.buffers, strict=True)]
        self.manager = CanaryManager(config, pools, max_requests, max_new_tokens, backend=self.backend)
        self.n_read = 0

    # ---- the guard's own arrays ----
    def guard_array(self, pool: int, name: str) -> Any:
        """head0, head1, tail0, tail1, claims, digests, registers, register_claims or blocks, where it lies."""
        arrays: Any = self.manager.backend._pools[pool]  # type: ignore[attr-defined]
        if name[:4] in ("head", "tail"):
            return getattr(arrays, name[:4])[int(name[4])]
        return getattr(arrays, name)

    def pool_state(self, pool: int) -> Array:
        return np.array(self.manager.backend._pools[pool].state).reshape(1)  # type: ignore[attr-defined]

    def rows(self, pool: int, n: int) -> Array:
        rows: Array = self.manager.backend._rows[pool][:n].copy()  # type: ignore[attr-defined]
        return rows

    def read_guard(self, pool: int, name: str) -> Array:
        """A host copy of a guard array: STAMP[n_slots], REGISTER[max_requests], BLOCK_STATE[n_blocks], u64[...]."""
        found = np.ascontiguousarray(self.to_host(self.guard_array(pool, name)))
        dtype = _DTYPES.get(name.rstrip("01"))
        return found if dtype is None else found.reshape(-1).view(np.uint8).view(dtype)

    def edit_guard(self, pool: int, name: str, change: Callable[[Array], None]) -> None:
        """Change a guard array behind the guard's back."""
        array, values = self.guard_array(pool, name), self.read_guard(pool, name)
        change(values)
        shape = self.to_host(array)
        self.write(array, values.view(shape.dtype).reshape(shape.shape))

    def to_list(self, array: Array) -> Any:
        """A list on the device, as a `Move` takes it."""
        return array

    def new_records(self, is_acknowledged: bool) -> Array:
        """The violation records since the last call, in no order of meaning: VIOLATION[n]."""
        state = self.manager.state
        words = self.manager.backend.snapshot_words()
        claims = np.arange(self.n_read, int(words[abi.STATE_CLAIMED]))
        capacity = len(state.violation_log) - 1
        records = state.violation_log[np.where(claims == 0, 0, 1 + (claims - 1) % capacity)].copy()
        assert (records["commit"] == claims + 1).all(), "a claimed record was not committed"
        if is_acknowledged:
            self.n_read = int(words[abi.STATE_CLAIMED])
            state.control[abi.CONTROL_READ] = self.n_read
        return records


class DeviceSide(Side):
    """A side over `kvcanary.backends.device.DeviceBackend`."""

    def to_list(self, array: Array) -> Any:
        return view_of(self.to_device(array))

    def guard_array(self, pool: int, name: str) -> Any:
        return self.manager.backend._arrays[pool][name]  # type: ignore[attr-defined]

    def pool_state(self, pool: int) -> Array:
        states = self.to_host(self.manager.backend._pool_states)  # type: ignore[attr-defined]
        return states.reshape(-1).view(abi.POOL_STATE)[pool : pool + 1]

    def rows(self, pool: int, n: int) -> Array:
        return self.to_host(self.guard_array(pool, "rows")).reshape(-1).view(abi.ROW)[:n]


class SimtSide(DeviceSide):
    """The real kernels on the CPU; neither the seed (order of blocks and lanes) nor the grid may matter."""

    name = "simt"

    def __init__(self, library: SimtLibrary, n_multiprocessors: int = 1, seed: int = 0) -> None:
        self.name = f"simt(n_multiprocessors={n_multiprocessors}, seed={seed})"
        self.backend = functools.partial(
            simt_backend, library=library, n_multiprocessors=n_multiprocessors, seed=seed << 32
        )

    def to_device(self, array: Array) -> Any:
        return exact_copy(array)

    def to_device_rows(self, array: Array, row_bytes: int) -> Any:
        return exact_rows(array, row_bytes)


class BesideTheModel(Side):
    """What a side is, with HEAD beside the model."""

    is_late = True

    def start(self, config: CanaryConfig, specs: Sequence[PoolSpec], max_requests: int, max_new_tokens: int) -> None:
        super().start(replace(config, overlap_head=True), specs, max_requests, max_new_tokens)


class LateSide(BesideTheModel, SimtSide):
    """The kernels on the CPU with HEAD as late as it may be: once TAIL waits for it."""


def simt_library(base: Path, sanitize: bool = False) -> SimtLibrary:
    """The kernels built for the CPU, once for all that name the same directory."""
    return SimtLibrary(build(KERNELS_DIR, base / "kvcanary-kernels", sanitize=sanitize))


Sides = Callable[[], list[Side]]  # the reference, and the kernels where they can be built
