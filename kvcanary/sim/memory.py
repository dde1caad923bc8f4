"""The bytes of a model's cache as an engine moves them between forwards, and the guard's calls beside each move."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.offload import Stored
from kvcanary.sim.requests import Move, Rows

Slots = NDArray[np.int64]
COARSE = np.uint32(0xFFFF0000)  # a float32 in the precision of a bfloat16


class MovingGuard(Protocol):
    """What the mover asks of a guard; each call stands beside the move of the bytes."""

    def copied(self, src: Slots, dst: Slots) -> None:
        """The KV of slots was copied."""

    def exported(self, slots: Slots) -> bytes:
        """What is known of the KV that is sent away; empty = nothing."""

    def imported(self, stored: Stored, slots: Slots) -> None:
        """KV arrives in slots."""

    def refreshed(self, slots: Slots) -> None:
        """Bytes were changed on purpose."""

    def committed(self, src: Slots, dst: Slots, rows: Rows) -> None:
        """The accepted paths of draft trees were copied home."""

    def reset(self) -> None:
        """All KV is worthless."""


class CacheMemory:
    """Slots of all K and V arrays [n_blocks, page_size, n_heads, head_dim] of a model, NumPy's or CuPy's.

    On a GPU everything is ordered on the model's stream; only `read` waits for it.
    """

    def __init__(self, model: Any) -> None:
        self._page = model.page_size
        self.arrays = [
            a.reshape(-1, *a.shape[2:]) for pair in zip(model.k_cache, model.v_cache, strict=True) for a in pair
        ]
        self._stream = getattr(model, "stream", None)
        self._xp: Any = np
        if self._stream is not None:
            from kvcanary.sim.cuda_model import import_cupy

            self._xp = import_cupy()

    def _ordered(self) -> Any:
        return self._stream if self._stream is not None else nullcontext()

    def copy(self, src: Slots, dst: Slots) -> None:
        """Copy slots; all are read before any is written."""
        with self._ordered():
            at, to = self._xp.asarray(src), self._xp.asarray(dst)
            for array in self.arrays:
                array[to] = array[at]

    def read(self, slots: Slots) -> list[NDArray[Any]]:
        """The bytes of slots, per array."""
        with self._ordered():
            at = self._xp.asarray(slots)
            found = [array[at] for array in self.arrays]
            return found if self._xp is np else [self._xp.asnumpy(values) for values in found]

    def write(self, slots: Slots, kv: Sequence[NDArray[Any]], layers: Sequence[int] | None = None) -> None:
        """Bytes that arrive in slots, of some layers or of all."""
        with self._ordered():
            to = self._xp.asarray(slots)
            for i, array in enumerate(self.arrays):
                if layers is None or i // 2 in layers:
                    array[to] = self._xp.asarray(kv[i])

    def zero(self, slots: Slots) -> None:
        """Zero slots."""
        with self._ordered():
            to = self._xp.asarray(slots)
            for array in self.arrays:
                array[to] = 0

    def coarsen(self, slots: Slots) -> None:
        """Round slots in place to the precision of a bfloat16."""
        with self._ordered():
            to = self._xp.asarray(slots)
            for array in self.arrays:
                words = array.view(np.uint32)
                words[to] &= COARSE


class Mover:
    """Does the moves of a step, bytes and guard, and keeps what is loaded layer by layer for the forward."""

    def __init__(self, model: Any, by_layer: bool) -> None:
        self.memory = CacheMemory(model)
        self.n_done: dict[str, int] = {}
        self.n_committed = 0  # rows
        self._n_layers = len(model.k_cache)
        self._by_layer = by_layer
        self._late: list[tuple[Slots, Stored]] = []

    @property
    def is_loading(self) -> bool:
        """Whether layers are still to come in the forward at hand."""
        return bool(self._late)

    def do(self, move: Move, guard: MovingGuard) -> None:
        """One move, with the guard's call before or after that of the bytes."""
        self.n_done[move.kind] = self.n_done.get(move.kind, 0) + 1
        self._finish_touched(move)
        getattr(self, f"_{move.kind}")(move, guard)

    def load_layer(self, layer: int) -> None:
        """What is late of this layer arrives, right before it is read."""
        for slots, stored in self._late:
            if layer:
                self.memory.write(slots, stored.kv, [layer])
        if layer == self._n_layers - 1:
            self._late.clear()

    def finish_loading(self) -> None:
        """All that is late arrives: its forward has failed, the next one will find it there."""
        for slots, stored in self._late:
            self.memory.write(slots, stored.kv)
        self._late.clear()

    def _finish_touched(self, move: Move) -> None:
        """A move waits for what is late in its slots: a window may have freed them, and another request got them."""
        touched = move.slots if move.targets is None else np.concatenate((move.slots, move.targets))
        late, self._late = self._late, []
        for slots, stored in late:
            if np.isin(slots, touched).any():
                self.memory.write(slots, stored.kv)
            else:
                self._late.append((slots, stored))

    def _copy(self, move: Move, guard: MovingGuard) -> None:
        assert move.targets is not None
        guard.copied(move.slots, move.targets)
        self.memory.copy(move.slots, move.targets)

    def _commit(self, move: Move, guard: MovingGuard) -> None:
        assert move.targets is not None
        self.n_committed += len(move.detail.prefix_lens)
        self.memory.copy(move.slots, move.targets)
        guard.committed(move.slots, move.targets, move.detail)

    def _store(self, move: Move, guard: MovingGuard) -> None:
        stored: Stored = move.detail
        stored.bundle = guard.exported(move.slots)
        stored.kv = self.memory.read(move.slots)

    def _load(self, move: Move, guard: MovingGuard) -> None:
        stored: Stored = move.detail
        is_late = self._by_layer and stored.bundle != b""  # what has no bundle is adopted as it lies there
        self.memory.write(move.slots, stored.kv, [0] if is_late else None)
        guard.imported(stored, move.slots)
        if is_late:
            self._late.append((move.slots, stored))

    def _zero(self, move: Move, guard: MovingGuard) -> None:
        self.memory.zero(move.slots)

    def _refresh(self, move: Move, guard: MovingGuard) -> None:
        self.memory.coarsen(move.slots)
        guard.refreshed(move.slots)

    def _reset(self, move: Move, guard: MovingGuard) -> None:
        guard.reset()
