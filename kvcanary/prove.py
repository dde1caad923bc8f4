"""prove(): flip one bit in each plane of a live slot and see that exactly that plane, slot and request are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary.backends import Backend, BoundCall, ProbeTarget
from kvcanary.backends.reference_arrays import BatchArrays, PoolArrays
from kvcanary.backends.reference_rows import row_length
from kvcanary.backends.reference_slots import OK, table_entries, table_slots
from kvcanary.batch import BoundBatch
from kvcanary.config import CanaryConfig
from kvcanary.errors import BatchError
from kvcanary.layout import KvPool, plane_address


@dataclass(frozen=True)
class PlaneProof:
    """One flipped bit: which plane, and whether the guard named just its digest, slot and request."""

    pool: str
    plane: str
    layer: int
    slot: int
    position: int
    request_id: int
    is_named: bool
    found: str  #: what was reported instead, empty when is_named


@dataclass(frozen=True)
class Proof:
    """Outcome of `CanaryManager.prove`; `str` says it in words.

    Attributes:
        planes: one for each digested plane of each pool.
        is_off: mode "off": there is no guard to prove anything of.
    """

    planes: tuple[PlaneProof, ...]
    is_off: bool = False

    @property
    def ok(self) -> bool:
        """Whether every plane was named, and there was one; with the guard off there is nothing to doubt."""
        return self.is_off or (bool(self.planes) and all(p.is_named for p in self.planes))

    def __str__(self) -> str:
        if not self.planes:
            return "kvcanary is off" if self.is_off else "no plane is digested (real_data='none')"
        lines = [f"{sum(p.is_named for p in self.planes)} of {len(self.planes)} planes named"]
        lines += [
            f"  pool {p.pool!r}, layer {p.layer}, plane {p.plane!r}, slot {p.slot}: {p.found}"
            for p in self.planes
            if not p.is_named
        ]
        return "\n".join(lines)


def prove_batch(
    backend: Backend,
    pools: Sequence[KvPool],
    config: CanaryConfig,
    bound: Sequence[tuple[BoundCall, BoundBatch]],
    stream: Any,
) -> Proof:
    """Flip, look and restore, plane after plane, in every pool that digests anything; waits for the device."""
    frozen = next((p.label for call, _ in bound for p in pools[call.pool].planes if p.view.readonly), None)
    if frozen is not None:
        raise BatchError(f"prove(): {frozen} is read-only, no bit of it can be flipped: prove with writable arrays")
    backend.synchronize()
    proofs: list[PlaneProof] = []
    for call, batch in bound:
        pool = pools[call.pool]
        units = pool.digest_units(config.real_data)
        if not units:
            continue
        target, slot = _live_slot(backend, pool, call, batch)
        clean = backend.probe(call, target, stream)
        records = pool.plane_records(config.real_data)
        for d, unit in enumerate(units):
            for i in range(unit.first_plane, unit.first_plane + unit.n_planes):
                plane = pool.ordered_planes[i]
                n_bytes = int(records[i]["n_chunks"]) * int(records[i]["chunk_bytes"])
                byte = (7 * d + 3) % n_bytes
                address = plane_address(records[i], slot, pool.page_size, byte)
                backend.flip_byte(address, 1 << d % 8, stream)
                try:
                    found = backend.probe(call, target, stream)
                finally:
                    backend.flip_byte(address, 1 << d % 8, stream)
                text = _difference(found, clean, d, slot, target)
                proofs.append(
                    PlaneProof(
                        pool.name, plane.name, plane.layer, slot, target.position, target.request_id, not text, text
                    )
                )
    return Proof(tuple(proofs))


def _difference(found: npt.NDArray[Any], clean: npt.NDArray[Any], d: int, slot: int, target: ProbeTarget) -> str:
    """Empty if ``found`` names just digest ``d`` of the slot for the request."""
    if len(clean):
        return "the slot was reported before any bit was flipped: it is damaged, or its digest is not of these bytes"
    named = [(int(v["plane"]), int(v["slot"]), int(v["request_id"]), int(v["row"])) for v in found]
    if named == [(d, slot, target.request_id, target.row)]:
        return ""
    wanted = (d, slot, target.request_id, target.row)
    return f"named {named or 'nothing'} as (digest, slot, request, row), expected {wanted}"


def _live_slot(backend: Backend, pool: KvPool, call: BoundCall, bound: BoundBatch) -> tuple[ProbeTarget, int]:
    """The latest position of the first row that has one whose HEAD and TAIL stamps are of one forward."""
    batch, facts = host_copy(backend, bound), pool_facts(backend, pool, call.pool)
    for r in range(batch.rows):
        length, capacity = row_length(batch, r), int(table_entries(batch, np.array([r]))[0]) * batch.table_page
        positions = np.arange(max(0, length if pool.ring_length else min(length, capacity)))
        at = table_slots(facts, batch, np.full(len(positions), r), positions)
        inside = np.flatnonzero(at.status == OK)
        stamps = backend.read_stamps(call.pool, at.slot[inside])
        good = np.ones(len(inside), bool)
        for head, tail in stamps:
            good &= (head["step"] != 0) & (head["step"] == tail["step"]) & (head["position"] == positions[inside])
        if good.any():
            p = int(inside[good][-1])
            rs = int(batch.request_slots[r]) if batch.request_slots is not None else -1
            return ProbeTarget(r, p, batch.request_id(r), rs), int(at.slot[p])
    raise BatchError(
        f"prove(): no row of the batch has a position in pool {pool.name!r} that was written under the guard: "
        "run a guarded forward first, and give a batch whose tables and lengths still hold"
    )


def pool_facts(backend: Backend, pool: KvPool, index: int) -> PoolArrays:
    """What `table_slots` asks of a pool, without the guard's arrays."""
    return PoolArrays(
        index=index, kind=int(pool.kind), n_slots=pool.n_slots, page_size=pool.page_size, window=pool.window or 0,
        ring_length=pool.ring_length, ring_bubble=pool.ring_bubble, sink=pool.sink,
        token_offset=pool.token_offset, reserved=np.array(pool.reserved_blocks, np.int64),
        slot_lut=None if pool.lut_view is None else backend.read_array(pool.lut_view),
        head=[], tail=[], claims=np.zeros(0, np.uint64), digests=np.zeros((0, 0), np.uint64), registers=np.zeros(0),
        register_claims=np.zeros(0, np.uint64), state=np.zeros(0), max_requests=0,
    )  # fmt: skip


def host_copy(backend: Backend, bound: BoundBatch) -> BatchArrays:
    """The arrays of a batch that locate its slots, copied to the host; waits for the device."""

    def read(name: str) -> npt.NDArray[Any] | None:
        view = bound.views.get(name)
        return None if view is None else backend.read_array(view)

    table = read("block_table")
    ids = read("request_ids")
    empty = np.zeros(0, np.int32)
    return BatchArrays(
        rows=bound.rows, n_tokens=bound.n_tokens, table_kind=int(bound.record["table_kind"]),
        table_page=int(bound.record["table_page"]), table_width=int(bound.record["table_width"]),
        block_table=read("kv_indices") if table is None else table, kv_indptr=read("kv_indptr"),
        kv_last_page_len=read("kv_last_page_len"), seq_lens=read("seq_lens"), query_start_loc=empty, input_ids=empty,
        slot_mapping=empty, request_slots=read("request_slots"),
        request_ids=None if ids is None else ids.view(np.uint32), salts=None, prefix_chain=None, token_history=None,
        expected_tokens=None, pending=None, verify_all=None, check_write_position=False, adopt=False,
        verify_data_every=1, full_verify_min_tokens=0, is_first_forward=True,
    )  # fmt: skip
