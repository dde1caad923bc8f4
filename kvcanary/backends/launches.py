"""The kernels and how they are launched: their grids, chosen once, and their parameters, packed once."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends.driver import Driver, Packed
from kvcanary.batch import BoundBatch
from kvcanary.ledger import BlockChanges

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
MAX_GRID_Y = 1024  # the same for new tokens, whose slots are found at no cost
MAX_BEGIN_BLOCKS = 2048  # of kvc_begin: enough to claim the slots of a long prefill side by side

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BoundKernel:
    """A kernel with its packed parameters and its grid."""

    driver: Driver
    kernel: Any
    grid: tuple[int, int]
    params: Packed

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
    """kvc_blocks_update for one pool; what changes from call to call is put into the memory of its parameters."""

    _pack = struct.Struct(f"<I{abi.N_BLOCK_OPS}I").pack_into  # owner, ends: side by side

    def __init__(self, driver: Driver, kernel: Any, state: int, blocks: int, n_blocks: int) -> None:
        self._driver, self._kernel = driver, kernel
        record = abi.zeros_of(abi.PARAMS["LifecycleParams"])
        record["state"], record["blocks"], record["n_blocks"] = state, blocks, n_blocks
        fields = record.dtype.fields
        assert fields is not None and fields["ends"][1] == fields["owner"][1] + 4
        self._owner_at, ids_at = fields["owner"][1], fields["ids"][1]
        as_bytes = record.reshape(1).view(np.uint8)
        self._memory, self._ids = as_bytes.data, as_bytes[ids_at:].view(np.int32)
        self._params = Packed(record)

    def launch(self, changes: BlockChanges, stream: Any) -> None:
        """One launch for each ``abi.MAX_BLOCK_IDS`` ids."""
        ids = changes.ids
        n = len(ids)
        if n > abi.MAX_BLOCK_IDS:
            for first in range(0, n, abi.MAX_BLOCK_IDS):
                self.launch(_part(changes, first), stream)
            return
        self._ids[:n] = ids
        allocated, shared, left, unshared, freed, claimed = changes.ends
        self._pack(self._memory, self._owner_at, changes.owner, allocated, shared, left, unshared, freed, claimed)
        self._driver.launch(self._kernel, (-(-n // abi.THREADS), 1), self._params, stream)


def _part(changes: BlockChanges, first: int) -> BlockChanges:
    """The ``abi.MAX_BLOCK_IDS`` ids from ``first`` on."""
    ids = changes.ids[first : first + abi.MAX_BLOCK_IDS]
    return BlockChanges(changes.owner, ids, tuple(min(max(end - first, 0), len(ids)) for end in changes.ends))


def grids_of(
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
    split = int(pool["n_digest_parts"])
    scrub_slots = int(pool["scrub_blocks"]) * int(pool["page_size"])

    def blocks(kernel: str, units: int, n_y: int = 1) -> int:
        return max(1, min(units, n_multiprocessors * resident[kernel] // n_y))

    verify_units = -(-positions // abi.VERIFY_UNIT) + rows
    data_units, tail_chunks = rows + positions // abi.DATA_UNIT, rows + n_tokens // abi.TAIL_CHUNK
    write_blocks = -(-n_tokens // abi.WARPS)  # that find work: a token for each warp
    # Few tokens: a block for each digest, so that they are all under way at once.
    fits = n_multiprocessors * resident["kvc_digests_write"] // max(1, write_blocks)
    write_split = max(split, min(int(pool["n_digests"]), fits, MAX_GRID_Y))
    return {
        "kvc_begin": (rows + 1, max(1, min(n_tokens // abi.WRITE_TILE, MAX_BEGIN_BLOCKS // max(1, rows)))),
        "kvc_stamps_write": (
            blocks("kvc_stamps_write", max(-(-rows // abi.WARPS), min(rows, n_tokens // 32) + n_tokens // abi.THREADS))
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
