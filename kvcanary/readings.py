"""What a reason means in one record: the words of `Violation.summary` where the record says more than its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcanary import abi
from kvcanary.ledger import owner_name
from kvcanary.tags import Detail, PoolKind, Reason, Stage

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
_OTHER_TARGET = (
    "no token of this forward was to go here when it began, but slot_mapping names the slot at its end",
    "a slot_mapping that was overwritten while the forward ran, or advanced to the next step before TAIL",
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
_OTHER_ROOT = (
    "the slot was written under another root (salt) than this request's, with the token that it should hold",
    "salts of another row or step, or a prefix key without the adapter, tenant or image",
)
_SHIFTED = "a table row that is shifted, in another order, or names one block twice: it is whole blocks away"
_OR_MAPPING = "; or this forward's slot_mapping, which sent it here"
_OTHER_PLACE = "its own doing: it was written to another place of the ring or window than it is read from"
_REPEATED = "a padding row that repeats a live row: two rows of the batch brought the same position of the same request"
_WRITTEN_OVER = "a block that two were given, a late write, or that request's table row or slot mapping"
_OR_OLDER = "; or a write of its own that was lost, over older KV"
_BY_LOAD = "a copy or load that brought other KV, or brought it to another place"
_BY_NOBODY = f"{_PADDING}, or {_BY_LOAD}"
_LOADED = "a copy or load that came late, in part, or in another layout; or a kernel or bit that changed it since"
_BEFORE_ITS_TIME = "a block that was given back before the window, or the sink, had left it"
_USE_AFTER_FREE = "use after free: a table row that still names the block, or a step dispatched before it was freed"


def reading(v: Violation, reason: Reason) -> Reading | None:
    """What one of a record's reasons means there; None: what it always means."""
    if reason == Reason.UNWRITTEN:
        return _of_a_hole(v)
    if reason == Reason.OUT_OF_RANGE:
        return _BAD_ROWS.get(v.detail)
    if reason == Reason.DUPLICATE_WRITE and is_other_target(v):
        return _OTHER_TARGET
    if reason == Reason.STALE_EPOCH and v.is_in_pool:
        return _of_a_stranger(v) if is_strangers(v) else _of_the_stamp(v)
    if reason == Reason.FOREIGN_WRITE and v.is_in_pool:
        return _of_a_foreign_write(v)
    if reason == Reason.CHAIN and v.reasons == Reason.CHAIN and v.position == 0 and v.is_in_pool and v.stamp_step:
        return _OTHER_ROOT
    return None


def likely(v: Violation, reason: Reason, usual: str) -> str:
    """What is behind a reason, given who wrote the stamp, or that no request did the write."""
    is_write = reason == Reason.WRITE_POSITION or (reason == Reason.UNWRITTEN and v.tag.stage == Stage.TAIL)
    if is_write and not v.request_id and v.request_slot < 0 and v.row >= 0:
        return f"{_PADDING}, or {usual}"
    if reason == Reason.DUPLICATE_WRITE and is_repeated(v):
        return _REPEATED
    if reason == Reason.STALE_EPOCH and v.tag.pool_kind == PoolKind.SWA and v.stamp_epoch and is_own(v):
        return f"{_BEFORE_ITS_TIME}, or {usual}"
    if reason == Reason.DATA and v.reasons == Reason.DATA and is_nobodys(v):
        return _LOADED
    if reason not in _BY_ITSELF or not (v.is_in_pool and v.request_id and v.stamp_step) or usual == _OTHER_ROOT[1]:
        return usual
    if v.stamp_owner == v.request_id:
        return _of_itself(v, reason)
    if v.stamp_owner and is_written_over(v):
        return f"request {v.stamp_owner} wrote over it, in a block that is not its own: {_WRITTEN_OVER}"
    if not v.stamp_owner:
        return _BY_LOAD if is_loaded(v) else _BY_NOBODY
    may_be_older = not (v.block_epoch or v.block_flags) and v.stamp_step < v.forward
    return f"{usual}{_OR_OLDER}" if may_be_older and reason == Reason.TOKEN else usual


def _of_itself(v: Violation, reason: Reason) -> str:
    """What is behind a wrong stamp of the request's own."""
    if v.page_size > 1 and is_whole_blocks_away(v):
        return f"{_SHIFTED}{_OR_MAPPING}" if v.stamp_step == v.forward else _SHIFTED
    if Reason.POSITION not in v.reasons:
        return _BY_ITSELF[reason]
    return _OTHER_PLACE if v.tag.pool_kind == PoolKind.SWA else _BY_ITSELF[Reason.POSITION]


def is_loaded(v: Violation) -> bool:
    """Whether the stamp came by a copy, load or adoption: it is nobody's, and of the block's epoch.

    What a row without an id writes into a block of somebody's is a foreign write, of epoch 0.
    """
    return is_nobodys(v) and is_of_this_allocation(v)


def is_own(v: Violation) -> bool:
    """Whether the request wrote the stamp itself."""
    return v.stamp_owner == v.request_id != 0


def is_nobodys(v: Violation) -> bool:
    """Whether a request with an id finds a stamp of nobody's: of a move, or of a row without an id."""
    return v.is_in_pool and v.request_id != 0 and v.stamp_step != 0 and not v.stamp_owner


def is_whole_blocks_away(v: Violation) -> bool:
    """Whether the slot holds the request's own KV of the same place in another block: that is a table's doing.

    In a ring or behind a window it need not be.
    """
    is_own = v.stamp_owner == v.request_id != 0 and v.tag.pool_kind != PoolKind.SWA
    shift = v.stored_position - v.position
    return is_own and Reason.POSITION in v.reasons and shift != 0 and shift % v.page_size == 0


def is_repeated(v: Violation) -> bool:
    """Whether both tokens of a slot are the same position of the same request: a row has each position once."""
    is_own = v.stamp_owner == v.request_id != 0
    return is_own and Reason.DUPLICATE_WRITE in v.reasons and v.stored_position == v.position


def is_other_target(v: Violation) -> bool:
    """Whether nobody has won the slot that a token lost: HEAD was told another one, and left no stamp here."""
    return Reason.DUPLICATE_WRITE in v.reasons and v.stamp_step != v.forward


def is_written_over(v: Violation) -> bool:
    """Whether the block is the reader's own, and the writer of what is in the slot did not own it."""
    is_readers = v.block_owner == v.request_id != 0 and not v.block_flags & abi.BLOCK_SHARED
    return is_readers and not v.stamp_epoch and v.stamp_owner not in (0, v.request_id)


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
