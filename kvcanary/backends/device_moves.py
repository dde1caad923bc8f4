"""The launches of a move: lists and images are lent to the device for as long as its kernels need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends.driver import Driver, Packed
from kvcanary.backends.moves import Move, MoveOp, SlotImage

_LISTS = ("slots", "positions", "tokens", "chains", "row_starts", "request_slots", "prefix_lens")
_MAX_SPLIT = 64  # parts that the planes of an entry are split into
_NEEDS_SCRATCH = (MoveOp.COPY, MoveOp.COMMIT, MoveOp.EXPORT)

Array = npt.NDArray[Any]


class DeviceMoves:
    """`Backend.move` over a `Driver`.

    Args:
        kernels: loaded kernels by name.
        resident: blocks of each that a multiprocessor holds at once.
        guard, pools: the packed GUARD and POOL records.
    """

    def __init__(
        self,
        driver: Driver,
        kernels: Mapping[str, Any],
        resident: Mapping[str, int],
        guard: Array,
        pools: Sequence[Array],
    ) -> None:
        self._driver, self._kernels, self._resident = driver, kernels, resident
        self._guard, self._pools = guard, pools

    def run(self, move: Move, stream: Any) -> SlotImage | None:
        """See `kvcanary.backends.Backend.move`."""
        pool = self._pools[move.pool]
        n_planes, n_digests = 2 * int(pool["n_halves"]), int(pool["n_digests"])
        n_stamp_bytes = n_planes * move.n * abi.STAMP.itemsize
        n_scratch = n_stamp_bytes + 8 * n_digests * move.n if move.op in _NEEDS_SCRATCH else 0
        image: tuple[Any, Any] = (None, None) if move.image is None else (move.image.stamps, move.image.digests)
        lists = [getattr(move, name) for name in _LISTS]
        with self._driver.lend([*lists, move.sources, *image], n_scratch, stream) as (addresses, scratch):
            *listed, sources, stamps, digests = addresses
            params = abi.zeros_of(abi.PARAMS["MoveParams"])
            params["guard"], params["pool"] = self._guard, pool
            for name, address in zip(_LISTS, listed, strict=True):
                params[name] = address
            params["stamps"], params["digests"] = (scratch, scratch + n_stamp_bytes) if n_scratch else (stamps, digests)
            params["n"], params["per_entry"], params["wide"] = move.n, move.per_entry, move.is_wide
            params["drops_digests"] = move.drops_digests
            params["n_rows"] = 0 if move.prefix_lens is None else move.prefix_lens.shape[0]
            from_sources = params.copy()
            from_sources["slots"] = sources
            self._launch_all(move, params, from_sources, stream)
            if move.op is not MoveOp.EXPORT:
                return None
            data = self._driver.read_memory(scratch, n_scratch)
        return SlotImage(
            data[:n_stamp_bytes].view(abi.STAMP).reshape(n_planes, move.n),
            data[n_stamp_bytes:].view(np.uint64).reshape(n_digests, move.n),
        )

    def _launch_all(self, move: Move, params: Array, from_sources: Array, stream: Any) -> None:
        pool = self._pools[move.pool]
        n_planes, n_digests = 2 * int(pool["n_halves"]), int(pool["n_digests"])
        by_thread = -(-move.n // abi.THREADS)
        if move.op in _NEEDS_SCRATCH:
            source = params if move.op is MoveOp.EXPORT else from_sources
            self._launch("kvc_moves_gather", by_thread, n_planes + n_digests, source, stream)
        if move.op is MoveOp.COMMIT:
            self._launch("kvc_moves_commit", -(-int(params["n_rows"]) // abi.WARPS), 1, params, stream)
        if move.op in (MoveOp.COPY, MoveOp.COMMIT, MoveOp.IMPORT):
            self._launch("kvc_moves_scatter", by_thread, 1 + n_digests, params, stream)
        elif move.op is MoveOp.LOCALIZE:
            self._launch("kvc_moves_localize", by_thread, 1, params, stream)
        elif move.op is MoveOp.ADOPT:
            self._launch("kvc_moves_adopt", by_thread, 1, params, stream)
        if move.op in (MoveOp.ADOPT, MoveOp.REFRESH):
            self._launch("kvc_moves_digest", by_thread, n_digests, params, stream)

    def _launch(self, name: str, n_blocks: int, n_parts: int, params: Array, stream: Any) -> None:
        room = self._driver.n_multiprocessors * self._resident[name]
        x = max(1, min(n_blocks, room))
        grid = x, max(1, min(n_parts, _MAX_SPLIT, room // x))
        self._driver.launch(self._kernels[name], grid, Packed(params), stream)
