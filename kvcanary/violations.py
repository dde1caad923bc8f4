"""Violations: from the guard's fixed-size records to something that a person on call can read."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from kvcanary import abi, readings
from kvcanary.elements import Element
from kvcanary.hashing import mix64_int
from kvcanary.ledger import owner_name
from kvcanary.tags import CanaryLaunchTag, Detail, Reason, Stage

# What a reason says, and what is usually behind it; in the order of telling, since the first says most about the cause.
READINGS: dict[Reason, tuple[str, str]] = {
    Reason.OUT_OF_RANGE: (
        "it points outside the pool, so the guard touched nothing there",
        "a table row or slot mapping that was overwritten, is too short for the row, or belongs to another pool",
    ),
    Reason.FOREIGN_WRITE: (
        "the write went into a block that another request owns, or that is shared",
        "a write that came late, after its block was freed, or a stale slot mapping",
    ),
    Reason.STALE_EPOCH: (
        "the block was freed or handed to another request since this KV was written",
        "use after free: a table row that still names the block, or a late write into the reallocated block",
    ),
    Reason.UNWRITTEN: (
        "no KV was ever written here, but the request reads it",
        "a lost write (slot mapping -1 or wrong), a prefix hit before the prefix was computed, an unguarded transfer",
    ),
    Reason.DUPLICATE_WRITE: (
        "two tokens of one forward were written to this slot and this one lost",
        "an allocator that handed the slot out twice, or padding that is mapped to a live slot",
    ),
    Reason.WRITE_POSITION: (
        "slot_mapping sends this token to another slot than the block table gives for its position",
        "slot mapping and block table of different steps, or a wrong position offset",
    ),
    Reason.WRITE_TOKEN: (
        "the model was given another token id than the one that was expected",
        "input ids of another step or row (a buffer overwritten before the forward had read it)",
    ),
    Reason.TOKEN: (
        "the slot holds the KV of another token than the request has at this position",
        "another request's slot in the table row, or a wrong prefix hit",
    ),
    Reason.POSITION: (
        "the slot holds the KV of another position",
        "a table row that is shifted or stale, or a slot that another request has rewritten",
    ),
    Reason.CHAIN: (
        "the slot does not continue the text that this request has in front of it",
        "a stale or foreign block table row, a wrong prefix hit, or a slot that another request has rewritten",
    ),
    Reason.DATA: (
        "the bytes in the slot are no longer the bytes that were written there",
        "a kernel or copy that wrote outside its own slots, a late or partial transfer, or bits that flipped in memory",
    ),
    Reason.NONFINITE_RESERVED: (
        "whatever gathers it (padding, unused table entries) spreads it, as 0 * NaN is NaN",
        "padded or dummy rows that write there what they computed from uninitialised memory",
    ),
}
# What `slot` holds: its key, and its words when it is no slot of the pool.
_PLACES: dict[Detail, tuple[str, str]] = {
    Detail.SLOT: ("slot", "slot {}"),
    Detail.TABLE_ENTRY: ("table_entry", "the block table (or slot LUT) entry {}"),
    Detail.SLOT_MAPPING: ("slot_mapping", "the slot_mapping value {}"),
    Detail.SEQ_LEN: ("seq_len", "the row's seq_len {} (beyond its block table row)"),
    Detail.QUERY_START_LOC: ("query_end", "the end {} of the row's token range (outside the batch)"),
    Detail.KV_INDPTR: ("kv_indptr", "the row's kv_indptr end {} (its entries are not inside kv_indices)"),
    Detail.REQUEST_SLOT: ("bad_request_slot", "the request slot {} (at or above max_requests)"),
    Detail.UNFINISHED: ("slot", "slot {}"),
    Detail.SCRUB: ("slot", "slot {}"),
    Detail.RESERVED: ("slot", "slot {}"),
}


@dataclass(frozen=True)
class PoolNames:
    """What a pool's numbers mean to a reader: its name, its page size (slots), (name, layer) of each digest, and
    (name, layer, element type) of each of `KvPool.ordered_planes`."""

    name: str
    page_size: int
    digests: tuple[tuple[str, int | None], ...] = ()
    planes: tuple[tuple[str, int | None, Element | None], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One thing that is wrong in the cache, as one check saw it.

    Attributes:
        step: outer step, as the device counts them.
        forward: forward, from 1.
        tag: the check that saw it.
        reasons: why it was reported.
        pool: pool index; ``pool_name`` and ``page_size`` (slots) come with it.
        plane: index of the digest whose bytes differ (``plane_name``, ``layer``), or None when it is not about bytes;
            of a reserved block, index of the plane in `KvPool.ordered_planes`.
        slot: slot of the pool; unless ``is_in_pool``, the raw value that ``detail`` names.
        position: position in the request that was being checked.
        row: batch row; -1 outside a batch (sweep).
        request_id: the row's request, 0 unknown; ``request_slot`` its request slot, -1 unknown.
        stored_token: token id in the stamp, None when not known or withheld; ``expected_token`` likewise.
        stored_chain: chain in the stamp, None when not known; see `decode` for the mask; ``expected_chain`` likewise.
        stored_digest: digest at write time, ``found_digest`` now; None when not compared.
        stored_position: position in the stamp; ``prev_slot`` that of the stamp it continues, negative = none.
        stamp_owner: request that wrote the stamp, 0 unknown; in forward ``stamp_step``, 0 never; under ``stamp_epoch``,
            0 of a foreign write.
        block_owner: primary owner of the slot's block, 0 none, since the end of forward ``block_since``; in its
            ``block_epoch``-th allocation; with ``block_flags`` (``abi.BLOCK_*``). All 0 without lifecycle.
        detail: what ``slot`` holds, or which kind of UNWRITTEN it is.
        flags: ``abi.ROW_*`` bits of the row.
        is_redacted: whether token ids were withheld and chains masked.
        element_offset: of a reserved block: where in the slot its first element that is not finite begins (bytes),
            ``element_bits`` that element's bits, ``element`` its type; None of anything else.
    """

    step: int
    forward: int
    tag: CanaryLaunchTag
    reasons: Reason
    pool: int
    pool_name: str
    page_size: int
    plane: int | None
    plane_name: str | None
    layer: int | None
    slot: int
    position: int
    row: int
    request_id: int
    request_slot: int
    stored_token: int | None
    expected_token: int | None
    stored_chain: int | None
    expected_chain: int | None
    stored_digest: int | None
    found_digest: int | None
    stored_position: int
    prev_slot: int
    stamp_owner: int
    stamp_step: int
    stamp_epoch: int
    block_owner: int
    block_epoch: int
    block_since: int
    block_flags: int
    detail: Detail
    flags: int
    is_redacted: bool
    element_offset: int | None = None
    element_bits: int | None = None
    element: Element | None = None

    @property
    def is_in_pool(self) -> bool:
        """Whether ``slot`` is a slot of the pool (else it is a raw value that the engine handed in)."""
        return self.detail.is_slot and self.slot >= 0

    def summary(self) -> str:
        """One line: the facts as key=value, then what they mean."""
        return f"{self._facts()}: {self._words()}"

    def details(self) -> str:
        """A block of lines with everything that the record holds; ends without a newline."""
        tokens = _pair(self.expected_token, self.stored_token, str)
        chains = _pair(self.expected_chain, self.stored_chain, hex)
        request = f"{_request(self.request_id)}, request slot {self.request_slot}, batch row {self.row}"
        lines = [
            f"violation {self._names()} seen by {self.tag.name} at step {self.step}, forward {self.forward}",
            f"  request   {request} (flags 0x{self.flags:x}), position {self.position}",
            f"  place     pool {self.pool} '{self.pool_name}', {self._place()}{self._plane()}",
            f"  stamp     {self._stamp()}; epoch {self.stamp_epoch}, predecessor in slot {self.prev_slot}",
            *([f"  block     {self._block()}; epoch {self.block_epoch}"] if self._block() else []),
            f"  token     {'withheld (log_tokens=False)' if self.is_redacted else tokens}",
            f"  chain     {chains}{' (masked)' if self.is_redacted else ''}",
            f"  digest    {_pair(self.stored_digest, self.found_digest, hex, ('at write time', 'now'))}",
        ]
        if self.detail == Detail.RESERVED:
            lines.append(f"  element   {self._poison()}")
        for reason in self._in_order():
            what, likely = self._reading(reason)
            lines.append(f"  {reason.name}: {what}. Likely: {likely}.")
        return "\n".join(lines)

    def _facts(self) -> str:
        facts = [
            f"reasons={self._names()} tag={self.tag.name} step={self.step} forward={self.forward}",
            f"pool={self.pool_name} request={self.request_id} request_slot={self.request_slot} row={self.row}",
            f"position={self.position} {_PLACES[self.detail][0]}={self.slot}",
        ]
        if self.is_in_pool:
            facts.append(f"block={self.slot // self.page_size}:{self.slot % self.page_size}")
        if self.plane is not None:
            facts.append(f"plane={self.plane_name} layer={self.layer}")
        return " ".join(facts)

    def _words(self) -> str:
        """What happened, who is in the slot, and what is usually behind it."""
        reasons = self._in_order()
        what = " and ".join(self._reading(reason)[0] for reason in reasons) or "no reason is set in the record"
        is_patrol, is_sweep = self.detail == Detail.SCRUB, self.tag.stage == Stage.SWEEP
        who = "the patrol" if is_patrol else "the sweep" if is_sweep else _request(self.request_id)
        parts = [f"{who} at position {self.position}, {self._place()}{self._plane()}: {what}"]
        if self.detail == Detail.RESERVED:
            parts = [f"{self._poison()}: {what}"]
        elif self.is_in_pool:
            parts += [text for text in (self._stamp(), self._block()) if text]
        known = self.expected_token, self.stored_token
        if None not in known and (Reason.TOKEN | Reason.WRITE_TOKEN) & self.reasons:
            parts.append(f"expected token {known[0]}, found {known[1]}")
        if reasons:
            parts.append(f"likely {self._reading(reasons[0])[1]}")
        return "; ".join(parts)

    def _reading(self, reason: Reason) -> tuple[str, str]:
        what, usual = readings.reading(self, reason) or READINGS[reason]
        return what, readings.likely(self, reason, usual)

    def _names(self) -> str:
        return "|".join(self.reasons.names())

    def _in_order(self) -> list[Reason]:
        return [reason for reason in READINGS if reason in self.reasons]

    def _place(self) -> str:
        if self.detail == Detail.TABLE_ENTRY and Reason.OUT_OF_RANGE in self.reasons and self.slot == self.position:
            return f"the block table (entry {self.slot}, or there is none: the position lies beyond the row)"
        if self.is_in_pool:
            return f"slot {self.slot} (block {self.slot // self.page_size}, offset {self.slot % self.page_size})"
        return _PLACES[self.detail][1].format(self.slot)

    def _plane(self) -> str:
        if self.plane is None:
            return ""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f", {self.plane_name}{layer}"

    def _stamp(self) -> str:
        """Who the slot says is in it; of a write, where the block table says that it belongs."""
        if not self.is_in_pool:
            return "none was read: this is not about a slot of the pool"
        if self.reasons & (Reason.WRITE_POSITION | Reason.WRITE_TOKEN | Reason.FOREIGN_WRITE):
            block, offset = divmod(self.prev_slot, self.page_size)
            where = f"slot {self.prev_slot} (block {block}, offset {offset})" if self.prev_slot >= 0 else "none"
            return f"the slot of this position by the block table is {where}"
        if self.stamp_step == 0:
            return "the slot carries no stamp"
        if readings.is_loaded(self):
            came = f"its stamp came with a copy or load after forward {self.stamp_step}"
            return f"{came}, as position {self.stored_position}"
        whose = ""
        if self.stamp_owner and self.request_id:
            is_own, is_right = self.stamp_owner == self.request_id, self.reasons == Reason.DATA
            # A right stamp of another's is a shared prefix.
            whose = " (the same request)" if is_own else " (whose KV it shares)" if is_right else " (ANOTHER request)"
        who = f"its stamp says that {_request(self.stamp_owner)}{whose} wrote it in forward {self.stamp_step}"
        return f"{who} as position {self.stored_position}"

    def _poison(self) -> str:
        """Which element of a reserved block is not finite."""
        assert self.element_offset is not None and self.element_bits is not None
        layer = "" if self.layer is None else f" layer {self.layer}"
        place = f"reserved block {self.slot // self.page_size} of{layer} {self.plane_name}"
        if self.element is None:
            bits = f"NaN or Inf (bits {self.element_bits:#x})"
            return f"{place} holds {bits} at slot {self.slot}, byte {self.element_offset}"
        value = f"{self.element.word_for(self.element_bits)} ({self.element.name} {self.element_bits:#x})"
        return f"{place} holds {value} at slot {self.slot}, element {self.element_offset // self.element.n_bytes}"

    def _block(self) -> str:
        """Whose the slot's block is; "" where that is not known."""
        if not (self.block_epoch or self.block_flags):
            return ""
        block, since = self.slot // self.page_size, f"after forward {self.block_since}"
        if self.block_owner:
            is_write = self.reasons & (Reason.WRITE_POSITION | Reason.WRITE_TOKEN | Reason.FOREIGN_WRITE)
            reader = " (who writes there)" if is_write else " (who reads there)"
            same = reader if self.block_owner == self.request_id else ""
            shared = ", and is shared" if self.block_flags & abi.BLOCK_SHARED else ""
            return f"block {block} was given to {owner_name(self.block_owner)}{same} {since}{shared}"
        if self.block_flags & abi.BLOCK_SHARED:
            return f"block {block} is shared, and nobody's own since its owner let go {since}"
        return f"block {block} was freed {since}"


def fold_runs(violations: Sequence[Violation], shortest: int = 4) -> list[tuple[Violation, Violation]]:
    """Draw together what a substituted row or a lost block gives: (first, last) of each line that is worth writing.

    A run is the same finding (request, row, check, reasons, plane, owner of the stamps) at ``shortest`` or more
    consecutive positions; everything else stands alone, as (v, v). Longer runs do not hide what is different about one
    slot, and the order is by row and position, as records of many warps come in any order.
    """

    def kind(v: Violation) -> tuple[int, ...]:
        plane = -1 if v.plane is None else v.plane
        return (v.step, v.pool, v.row, v.request_id, v.tag, v.reasons, plane, v.stamp_owner, v.detail)

    lines: list[tuple[Violation, Violation]] = []
    run: list[Violation] = []

    def flush() -> None:
        lines.extend([(run[0], run[-1])] if len(run) >= shortest else [(v, v) for v in run])
        run.clear()

    for v in sorted(violations, key=lambda v: (*kind(v), v.position)):
        if run and (kind(run[-1]) != kind(v) or v.position != run[-1].position + 1):
            flush()
        run.append(v)
    if run:
        flush()
    return sorted(lines, key=lambda line: (line[0].step, line[0].pool, line[0].row, line[0].position, line[0].tag))


def line_of(first: Violation, last: Violation) -> str:
    """One readable line for a run of `fold_runs`."""
    if first is last:
        return first.summary()
    n = last.position - first.position + 1
    return f"{first.summary()}; THE SAME AT {n} POSITIONS, {first.position} to {last.position} (to slot {last.slot})"


def _request(request_id: int) -> str:
    return f"request {request_id}" if request_id else "an unnamed request"


def _pair(a: int | None, b: int | None, show: Any, names: tuple[str, str] = ("expected", "stored")) -> str:
    return ", ".join(f"{name} {'unknown' if x is None else show(x)}" for name, x in zip(names, (a, b), strict=True))


def new_secret() -> int:
    """A secret of 64 bits that masks the chains which one process shows."""
    return secrets.randbits(64)


def decode(
    records: npt.NDArray[Any], pools: Sequence[PoolNames], secret: int, log_tokens: bool
) -> tuple[Violation, ...]:
    """Decode committed records.

    Args:
        records: VIOLATION[n].
        pools: names by pool index.
        secret: from :func:`new_secret`. Chains are shown as ``mix64(chain ^ secret)``: equal chains stay equal, but
            two neighbours no longer give away the token between them.
        log_tokens: keep token ids (user content) and raw chains.
    """
    fields = records.dtype.names
    assert fields is not None
    assert fields == abi.VIOLATION.names
    return tuple(_decode(dict(zip(fields, row, strict=True)), pools, secret, log_tokens) for row in records.tolist())


def _decode(r: dict[str, int], pools: Sequence[PoolNames], secret: int, log_tokens: bool) -> Violation:
    pool = pools[r["pool"]] if 0 <= r["pool"] < len(pools) else PoolNames(f"unknown-{r['pool']}", 1)
    plane = r["plane"] if r["plane"] >= 0 else None
    name: str | None = None
    layer: int | None = None
    element: Element | None = None
    is_reserved = r["detail"] == Detail.RESERVED
    if plane is not None and is_reserved:
        name, layer, element = pool.planes[plane] if plane < len(pool.planes) else (f"plane-{plane}", None, None)
    elif plane is not None:
        name, layer = pool.digests[plane] if plane < len(pool.digests) else (f"plane-{plane}", None)

    def chain(value: int) -> int | None:
        return None if value == 0 else value if log_tokens else mix64_int(value ^ secret)

    def token(value: int) -> int | None:
        return value if log_tokens and value != abi.NO_TOKEN else None

    same = ("step", "forward", "pool", "slot", "position", "row", "request_id", "request_slot", "stored_position")
    stamp = ("prev_slot", "stamp_owner", "stamp_step", "stamp_epoch", "flags")
    block = ("block_owner", "block_epoch", "block_since", "block_flags")
    return Violation(
        **{field: r[field] for field in same + stamp + block},
        tag=CanaryLaunchTag(r["tag"]),
        reasons=Reason(r["reasons"]),
        detail=Detail(r["detail"]),
        pool_name=pool.name,
        page_size=pool.page_size,
        plane=plane,
        plane_name=name,
        layer=layer,
        stored_token=token(r["stored_token"]),
        expected_token=token(r["expected_token"]),
        stored_chain=chain(r["stored_chain"]),
        expected_chain=chain(r["expected_chain"]),
        stored_digest=None if is_reserved else r["stored_digest"] or None,
        found_digest=None if is_reserved else r["found_digest"] or None,
        is_redacted=not log_tokens,
        element_offset=r["found_digest"] if is_reserved else None,
        element_bits=r["stored_digest"] if is_reserved else None,
        element=element,
    )
