"""The engine's side of the guard: batches around its persistent buffers, and the pool over the model's cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from kvcanary import layouts
from kvcanary.batch import StepBatch
from kvcanary.bundle import SlotBundle
from kvcanary.layout import KvPool
from kvcanary.manager import CanaryManager
from kvcanary.sim.memory import Slots
from kvcanary.sim.offload import Stored
from kvcanary.sim.requests import Rows
from kvcanary.tags import PoolKind

_OPTIONAL = ("request_slots", "request_ids", "token_history", "salts", "pending")


def pool_of(model: Any) -> KvPool:
    """The pool of a model that keeps k_cache and v_cache [n_blocks, page_size, n_heads, head_dim] per layer."""
    window = getattr(model.config, "window", None)
    kind = PoolKind.FULL if window is None else PoolKind.SWA
    return layouts.nhd(k=model.k_cache, v=model.v_cache, page_size=model.page_size, kind=kind, window=window)


class CanaryGuard:
    """Adapts `CanaryManager` to the engine's guard protocol: one StepBatch per bucket of arrays.

    Args:
        leave_out: optional inputs that this engine does not hand in.
            By default what an engine without adapters and loads has no use for.
    """

    def __init__(
        self, manager: CanaryManager, stream: Any = None, leave_out: Collection[str] = ("salts", "pending")
    ) -> None:
        self.manager = manager
        self._stream = stream
        self._given = [name for name in _OPTIONAL if name not in leave_out]
        self._batches: dict[int, StepBatch] = {}

    def batch_of(self, arrays: Any) -> StepBatch:
        """The batch over these buffers, made once."""
        if id(arrays) not in self._batches:
            self._batches[id(arrays)] = StepBatch(
                block_table=arrays.block_table,
                seq_lens=arrays.seq_lens,
                query_start_loc=arrays.query_start_loc,
                input_ids=arrays.input_ids,
                slot_mapping=arrays.slot_mapping,
                **{name: getattr(arrays, name) for name in self._given},
            )
        return self._batches[id(arrays)]

    def step(self) -> AbstractContextManager[None]:
        """The host phases of one outer step."""
        return self.manager.step(self._stream)

    def blocks(self, calls: Sequence[tuple[str, Sequence[int], int]]) -> None:
        """Say who took and who gave back which blocks, if the manager wants to know."""
        if self.manager.config.lifecycle:
            self.manager.lifecycle.apply(calls, self._stream)

    def forward(self, arrays: Any) -> AbstractContextManager[None]:
        """HEAD on entry, TAIL on exit."""
        return self.manager.forward(self.batch_of(arrays), self._stream)

    def verify_layer(self, arrays: Any, layer: int) -> None:
        """The KV of this layer has arrived."""
        if self.manager.config.real_data != "none":
            self.manager.verify_layer(self.batch_of(arrays), layer, self._stream)

    # ---- moves -------------------------------------------------------------------------------------------------------
    def copied(self, src: Slots, dst: Slots) -> None:
        """Stamps and digests go with the bytes."""
        self.manager.copy_slots(src, dst, stream=self._stream)

    def exported(self, slots: Slots) -> bytes:
        """What goes with KV that leaves the pool."""
        return self.manager.export_slots(slots, stream=self._stream).to_bytes()

    def imported(self, stored: Stored, slots: Slots) -> None:
        """Take over what the exporter knew; KV that came without is adopted."""
        if stored.bundle:
            bundle = SlotBundle.from_bytes(stored.bundle)
            self.manager.import_slots(bundle[len(bundle) - len(slots) :], slots, stream=self._stream)
        else:
            positions = range(stored.first, stored.first + len(slots))
            tokens, salt = stored.tokens.tolist(), stored.salt
            self.manager.adopt_slots(slots, positions, tokens=tokens, salt=salt, stream=self._stream)

    def refreshed(self, slots: Slots) -> None:
        """Digest what was changed on purpose."""
        self.manager.refresh_digests(slots, stream=self._stream)

    def committed(self, src: Slots, dst: Slots, rows: Rows) -> None:
        """Re-stamp the accepted paths."""
        registers = rows.request_slots if "request_slots" in self._given else None
        starts, lengths = rows.starts, rows.prefix_lens
        self.manager.commit_slots(src, dst, starts, lengths, request_slots=registers, stream=self._stream)

    def reset(self) -> None:
        """Forget all KV."""
        self.manager.reset()
