"""What a backend is: memory for the guard, and the launches of a step.

`host.py` is the reference in NumPy, `cuda.py` launches the kernels; everything above them is the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends.moves import Move, SlotImage
from kvcanary.batch import BoundBatch
from kvcanary.deferred import Staging
from kvcanary.layout import KvPool
from kvcanary.ledger import BlockChanges
from kvcanary.state import CanaryDeviceState


@dataclass(frozen=True)
class BoundCall:
    """A batch bound to one pool: ``batch`` is the backend's own form of it, packed once."""

    pool: int
    batch: Any


class Resident(NamedTuple):
    """Resident slots of a pool, each array i32[n]; predecessor -1 = none; ``tokens`` may be None, or -1 = unknown."""

    slots: Any
    positions: Any
    predecessors: Any
    tokens: Any = None


@dataclass(frozen=True)
class ProbeTarget:
    """One position of one row of a batch, whose data are to be compared."""

    row: int
    position: int
    request_id: int
    request_slot: int

    def as_row(self) -> npt.NDArray[Any]:
        """A ROW that verifies just this position."""
        row = abi.zeros_of(abi.ROW)
        row["verify_start"], row["verify_end"], row["prefix"] = self.position, self.position + 1, self.position + 1
        row["flags"] = abi.ROW_LIVE | abi.ROW_FULL_DATA
        row["request_id"], row["request_slot"] = self.request_id, self.request_slot
        return row


class CapturedGraph(Protocol):
    """A CUDA graph that was captured; destroyed with `close`, or when nobody holds it any more."""

    handle: int  #: CUgraph

    def close(self) -> None:
        """Destroy it; a second time does nothing."""


class Backend(Protocol):
    """Everything the manager asks of a device. ``stream`` is whatever the engine handed in.

    `head` and `tail` may run inside a capture and neither allocate nor wait; the rest is host-driven, never captured.
    """

    name: str
    state: CanaryDeviceState

    def bind(self, pool: int, bound: BoundBatch, is_first_forward: bool) -> BoundCall:
        """Pack a validated batch for one pool; allocates nothing on the device."""

    def head(self, calls: Sequence[BoundCall], stream: Any) -> None:
        """Begin a forward over the pools of ``calls``; write and verify HEAD stamps, verify data that is due."""

    def tail(self, calls: Sequence[BoundCall], stream: Any) -> None:
        """Verify TAIL stamps of the prefix, write those of the new tokens, digest the new tokens' bytes."""

    def abandon(self) -> None:
        """The forward that `head` began has no `tail`; raises nothing."""

    def verify_layer(self, calls: Sequence[BoundCall], layer: int, stream: Any) -> None:
        """Between `head` and `tail`: verify the data of one layer of the prefixes of pending rows; may be captured."""

    def graphs(self, calls: Sequence[BoundCall]) -> tuple[CapturedGraph, CapturedGraph]:
        """`head` and `tail` of a forward, captured on a stream of the backend's own; CaptureError without graphs."""

    def sweep(self, pool_index: int, resident: Resident, stream: Any) -> bool:
        """Check resident slots; False if the last sweep's lists are still being copied, so that nothing was done."""

    def update_blocks(self, pool: int, changes: BlockChanges, stream: Any) -> None:
        """Change who owns some blocks, from here on ``stream`` on; neither allocates nor waits."""

    def move(self, move: Move, stream: Any) -> SlotImage | None:
        """Carry, make or take stamps and digests, see `MoveOp`; never skipped, so it may wait for its own buffers.

        Returns the image of an EXPORT, for which it waits for the device.
        """

    def shadow_arrays(self, pool: int) -> dict[str, Any]:
        """The guard's own arrays of a pool, in place: u8[n_slots, 32] per stamp plane, u64[n_slots] per digest."""

    def rebind(self, pool: int, kv: KvPool, stream: Any) -> None:
        """Look for a pool's planes in the arrays of ``kv`` (the same geometry), from here on ``stream`` on."""

    def set_paused(self, is_paused: bool, stream: Any) -> None:
        """Stop or resume judging, from the next forward on ``stream`` on."""

    def renumber(self, stream: Any) -> None:
        """Move the numbers of forwards down, ordered on the stream (``abi.CONTROL_RENUMBER``), without waiting."""

    def reset(self, pool: int | None, stream: Any) -> None:
        """Forget all stamps, digests and registers of a pool, or of all, ordered on ``stream``."""

    def staging(self, depth: int) -> Staging:
        """Buffers for snapshots of ``state.words``."""

    def snapshot_words(self) -> npt.NDArray[np.uint64]:
        """A copy of ``state.words`` as they are now; waits for the device."""

    def synchronize(self) -> None:
        """Wait for all that the guard has launched."""

    def close(self) -> None:
        """Give all memory back; waits for the device."""

    @property
    def memory_bytes(self) -> int:
        """Device and pinned memory that the guard holds, in bytes."""

    def read_blocks(self, pool: int) -> npt.NDArray[Any]:
        """A copy of the words of all blocks of a pool: BLOCK_STATE[n_blocks]; waits for the device."""

    # Primitives of `prove` and of the fault drill; they may wait and allocate.
    def read_stamps(self, pool: int, slots: npt.NDArray[Any]) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """HEAD and TAIL stamps of each half of some slots: (STAMP[n], STAMP[n]) per half."""

    def read_array(self, view: Any) -> npt.NDArray[Any]:
        """A host copy of an engine array, which must be contiguous in its last dimension."""

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        """XOR one byte of the engine's memory with ``mask``."""

    def write_memory(self, address: int, data: npt.NDArray[np.uint8], stream: Any) -> None:
        """Put bytes into the engine's memory, after all that was launched (`kvcanary.perturb`)."""

    def probe(self, call: BoundCall, target: ProbeTarget, stream: Any) -> npt.NDArray[Any]:
        """Compare all digests of one (row, position), apart from the guard's state; VIOLATION[n] of what differs."""
