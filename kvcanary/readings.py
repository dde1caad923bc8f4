"""What a reason means in one record: the words of `Violation.summary` where the record says more than its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcanary import abi
from kvcanary.ledger import owner_name
from kvcanary.tags import Detail, Reason, Stage

if TYPE_CHECKING:
    from kvcanary.violations import Violation

Reading = tuple[str, str]  # what it says; what is usually behind it

_HALF_WRITTEN = (
    "its HEAD and TAIL stamps come from different forwards, both of which completed",
    "a copy or transfer that moved only some of the layers, or a write that reached only one of the two stamps",
)
_NO_BLOCK = (
    "the entry names no block that can hold KV: it is negative, evicted, or a reserved block",
    "a table row cleared or cut too early; reserved_blocks=() if your engine hands out block 0",
)
_NOT_ARRIVED = (
    "this forward's write did not arrive in the slot that the block table gives for it",
    "a slot mapping of another step or graph, or a table that changed while the forward ran",
)
_OUTLIVED = (
    "no KV was written here since the block was allocated anew; what is in it is older",
    "a prefix hit before the prefix was computed, a transfer that did not arrive, or a write that was lost",
)
_BAD_ROWS: dict[Detail, Reading] = {
    Detail.SEQ_LEN: (
        "the row is longer than its table row",
        "seq_lens or block table of another step, or a table that is too narrow",
    ),
    Detail.QUERY_START_LOC: (
        "the row's token range is not ascending inside the batch, so the row was not judged",
        "query_start_loc of another step, overwritten, or not padded behind the last row",
    ),
    Detail.KV_INDPTR: (
        "the row's entries in the CSR table are not ascending inside kv_indices, so the row was not judged",
        "kv_indptr of another step, overwritten, or not padded behind the last row",
    ),
    Detail.REQUEST_SLOT: (
        "the request slot is at or above max_requests, so the row has neither register nor history",
        "request_slots overwritten, or max_requests smaller than the engine's",
    ),
}
_PADDING = "a padding or dummy row whose slot_mapping names a live slot"
_NO_IDS = "or request_ids that were not filled in"
_BY_ITSELF: dict[Reason, str] = {  # under a stamp that the request wrote itself
    Reason.TOKEN: "its own doing, not the allocator's: drafts that were kept, a counter, or input ids of another step",
    Reason.POSITION: "its own doing: a slot mapping or position counter of another step, or a table that names one "
    "block twice",
    Reason.CHAIN: "a slot in front of it that was rewritten since, or another root (salt) than it was written under",
}
_OR_OLDER = "; or a write of its own that was lost, over older KV"
_BY_NOBODY = f"{_PADDING}, or a copy or load that brought other KV"
_USE_AFTER_FREE = "use after free: a table row that still names the block, or a step dispatched before it was freed"


def reading(v: Violation, reason: Reason) -> Reading | None:
    """What one of a record's reasons means there; None: what it always means."""
    if reason == Reason.UNWRITTEN:
        return _of_a_hole(v)
    if reason == Reason.OUT_OF_RANGE:
        return _BAD_ROWS.get(v.detail)
    if reason == Reason.STALE_EPOCH and v.is_in_pool:
        return _of_a_stranger(v) if is_strangers(v) else _of_the_stamp(v)
    if reason == Reason.FOREIGN_WRITE and v.is_in_pool:
        return _of_a_foreign_write(v)
    return None


def likely(v: Violation, reason: Reason, usual: str) -> str:
    """What is behind a reason, given who wrote the stamp, or that no request did the write."""
    is_write = reason == Reason.WRITE_POSITION or (reason == Reason.UNWRITTEN and v.tag.stage == Stage.TAIL)
    if is_write and not v.request_id and v.request_slot < 0 and v.row >= 0:
        return f"{_PADDING}, or {usual}"
    if reason not in _BY_ITSELF or not (v.is_in_pool and v.request_id and v.stamp_step):
        return usual
    if v.stamp_owner == v.request_id:
        return _BY_ITSELF[reason]
    if not v.stamp_owner:
        return _BY_NOBODY
    may_be_older = not (v.block_epoch or v.block_flags) and v.stamp_step < v.forward
    return f"{usual}{_OR_OLDER}" if may_be_older and reason == Reason.TOKEN else usual


def was_handed_on(v: Violation) -> bool:
    """Whether the block has had another owner before the one that it has (or had last)."""
    return v.block_epoch > 1


def is_of_this_allocation(v: Violation) -> bool:
    """Whether the KV was written by whoever the block was given to last."""
    return bool(v.stamp_step and v.stamp_epoch) and v.stamp_epoch == v.block_epoch


def is_never_allocated(v: Violation) -> bool:
    """Whether the guard knows of owners, and of none that this block ever had."""
    return Reason.STALE_EPOCH in v.reasons and v.is_in_pool and not (v.block_epoch or v.block_flags)


def is_strangers(v: Violation) -> bool:
    """Whether the reader does not hold the block.

    A sweep has no reader; and of a row without an id, a stamp of another epoch says nothing of who reads.
    """
    if Reason.STALE_EPOCH not in v.reasons or v.tag.stage == Stage.SWEEP or v.detail == Detail.SCRUB or may_read(v):
        return False
    return bool(v.request_id) or v.stamp_epoch == v.block_epoch


def may_read(v: Violation) -> bool:
    """Whether the block is the row's own, or shared: with whom, the record does not say."""
    return bool(v.block_flags & abi.BLOCK_SHARED) or v.block_owner == v.request_id != 0


def _of_a_hole(v: Violation) -> Reading | None:
    if v.detail == Detail.UNFINISHED:
        return _HALF_WRITTEN
    if v.detail == Detail.TABLE_ENTRY:
        return _NO_BLOCK
    if v.tag.stage == Stage.TAIL and not v.reasons & Reason.STALE_EPOCH:
        return _NOT_ARRIVED
    if v.reasons & Reason.STALE_EPOCH and v.stamp_step:
        return _OUTLIVED
    return None


# ---- whose the block is ----------------------------------------------------------------------------------------------
def _of_the_stamp(v: Violation) -> Reading:
    """STALE_EPOCH where nothing is wrong with who reads, but with when, or by whom, it was written."""
    if not v.stamp_epoch:
        who = f"request {v.stamp_owner}" if v.stamp_owner else "a row that is no request's"
        wrote = f"{who} did not own the block when it wrote this KV"
        if not v.stamp_owner:
            return wrote, _PADDING
        return wrote, "a late write into the reallocated block, a block that two were given, or a wrong slot mapping"
    return "the block was handed on since this KV was written", _OUTLIVED[1]


def _of_a_stranger(v: Violation) -> Reading:
    """STALE_EPOCH of a reader who does not hold the block."""
    block, reader = v.slot // v.page_size, _reader(v)
    if not v.block_epoch:
        told = f"block {block} was never allocated: allocate_blocks() was not told of it"
        return told, "a missing call, or a table row that names a block which nobody was given"
    if not v.block_owner:
        freed = f"{reader} does not hold block {block}, which was freed"
        if v.stamp_owner == v.request_id != 0:
            return freed, _USE_AFTER_FREE
        return freed, f"{_USE_AFTER_FREE}; or a prefix hit that share_blocks() was not told of"
    owner = owner_name(v.block_owner)
    if is_of_this_allocation(v):
        whose = "whose KV is" if v.stamp_owner in (0, v.block_owner) else f"with request {v.stamp_owner}'s KV, which is"
        what = f"{reader} does not hold block {block}, {whose} {owner}'s"
        why = "another request's table row, a wrong prefix hit, or a share_blocks() that was not told"
        if not v.request_id:
            return what, f"a padding row that is live, {_NO_IDS}"
        return what, f"{why}; if the block was its own before, use after free" if was_handed_on(v) else why
    what = f"{reader} does not hold block {block}, which is {owner}'s"
    if not v.stamp_step:
        return what, "another request's table row, or a prefix hit before the prefix was computed"
    if not v.stamp_epoch:
        whom = "it" if v.stamp_owner == v.request_id != 0 else _name(v.stamp_owner)
        return f"{what}, and {whom} wrote this KV without owning it", "a block that two were given, or a late step"
    return f"{what} since after this KV was written", _USE_AFTER_FREE


def _of_a_foreign_write(v: Violation) -> Reading | None:
    if not (v.block_epoch or v.block_flags):
        return None
    block, owner = v.slot // v.page_size, owner_name(v.block_owner)
    is_shared = v.block_flags & abi.BLOCK_SHARED
    if is_shared and not v.block_owner:
        what = f"the write went into block {block}, which is shared and nobody's own"
        why = "a missed copy-on-write: copy the block before it is written, or claim_blocks() for its last holder"
    elif is_shared:
        what = f"the write went into block {block}, which is {owner}'s and shared"
        why = "a fork that writes without a copy of its own, a late write, or a stale slot mapping"
    else:
        what = f"the write went into block {block}, which is {owner}'s"
        why = "another request's table row or slot mapping"
        if was_handed_on(v):
            why = f"a write that came late, after its block was freed and given away, or {why}"
    return what, why if v.request_id else f"{_PADDING}, {_NO_IDS}"


def _reader(v: Violation) -> str:
    return _name(v.request_id)


def _name(request_id: int) -> str:
    return f"request {request_id}" if request_id else "an unnamed request"
