"""The words of a violation say what its record says: who holds the block, who wrote the KV, and no more."""

from __future__ import annotations

from typing import Any

import pytest
from base import POOL_NAMES, SECRET, make_record

from kvcanary import abi
from kvcanary.tags import CanaryLaunchTag, Detail, Reason
from kvcanary.violations import decode

READER, OTHER = 7, 8
LIVE, SHARED = abi.BLOCK_LIVE, abi.BLOCK_LIVE | abi.BLOCK_SHARED
OTHERS_BLOCK: dict[str, Any] = {"block_owner": OTHER, "block_epoch": 1, "block_flags": LIVE}
OWN_BLOCK: dict[str, Any] = {"block_owner": READER, "block_epoch": 2, "block_since": 3, "block_flags": LIVE}
FREED: dict[str, Any] = {"block_owner": 0, "block_epoch": 1, "block_since": 6, "block_flags": 0}


def words(**fields: Any) -> str:
    """What is said of request 7, which reads slot 80 (block 5) in forward 7, with request 8's stamp of epoch 1."""
    given: dict[str, Any] = {
        "step": 7,
        "forward": 7,
        "tag": CanaryLaunchTag.HEAD_K_FULL,
        "slot": 80,
        "position": 3,
        "row": 0,
        "request_id": READER,
        "request_slot": 0,
        "stored_position": 3,
        "prev_slot": -1,
        "stamp_owner": OTHER,
        "stamp_step": 4,
        "stamp_epoch": 1,
        **fields,
    }
    (violation,) = decode(make_record(**given), POOL_NAMES, SECRET, False)
    return violation.summary().split(": ", 1)[1]


# ---- STALE_EPOCH -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [Reason(0), Reason.TOKEN, Reason.TOKEN | Reason.CHAIN])
def test_a_reader_that_does_not_hold_the_block_is_no_use_after_free(more: Reason) -> None:
    text = words(reasons=Reason.STALE_EPOCH | more, **OTHERS_BLOCK)
    assert "request 7 does not hold block 5, whose KV is request 8's" in text
    assert text.endswith(
        "likely another request's table row, a wrong prefix hit, or a share_blocks() that was not told"
    )
    assert "free" not in text
    assert "since this KV was written" not in text


def test_a_block_that_was_anothers_before_may_have_been_the_readers() -> None:
    text = words(reasons=Reason.STALE_EPOCH, **{**OTHERS_BLOCK, "block_epoch": 2}, stamp_epoch=2)
    assert "request 7 does not hold block 5, whose KV is request 8's" in text
    assert text.endswith("; if the block was its own before, use after free")


def test_kv_of_a_block_that_was_claimed_is_still_its_writers() -> None:
    text = words(reasons=Reason.STALE_EPOCH, **OTHERS_BLOCK, stamp_owner=9)
    assert "request 7 does not hold block 5, with request 9's KV, which is request 8's" in text


def test_a_block_that_was_never_allocated() -> None:
    text = words(reasons=Reason.STALE_EPOCH, stamp_owner=READER, stamp_epoch=0)
    assert "block 5 was never allocated: allocate_blocks() was not told of it" in text
    assert "free" not in text


def test_a_block_that_was_freed() -> None:
    own = words(reasons=Reason.STALE_EPOCH, **FREED, stamp_owner=READER)
    assert "request 7 does not hold block 5, which was freed" in own
    assert "likely use after free" in own
    assert "share_blocks()" not in own
    assert "share_blocks() was not told" in words(reasons=Reason.STALE_EPOCH, **FREED)


def test_a_block_that_was_given_away_since() -> None:
    handed_on = {**OTHERS_BLOCK, "block_epoch": 2, "block_since": 5}
    text = words(reasons=Reason.STALE_EPOCH | Reason.UNWRITTEN, **handed_on, stamp_owner=READER)
    assert "request 7 does not hold block 5, which is request 8's since after this KV was written" in text
    assert "likely use after free" in text


def test_older_kv_in_the_readers_own_block_is_no_use_after_free() -> None:
    text = words(reasons=Reason.STALE_EPOCH | Reason.UNWRITTEN, **OWN_BLOCK)
    assert "the block was handed on since this KV was written" in text
    assert "use after free" not in text
    assert text.endswith("or a write that was lost")


@pytest.mark.parametrize(
    ("owner", "who", "likely"),
    [(OTHER, "request 8", "a late write into the reallocated block"), (0, "a row that is no request's", "a padding")],
)
def test_kv_that_was_written_into_anothers_block(owner: int, who: str, likely: str) -> None:
    text = words(reasons=Reason.STALE_EPOCH, **OWN_BLOCK, stamp_owner=owner, stamp_epoch=0)
    assert f"{who} did not own the block when it wrote this KV" in text
    assert f"likely {likely}" in text


def test_without_ids_and_in_a_sweep_nothing_is_said_of_the_reader() -> None:
    old = {"reasons": Reason.STALE_EPOCH, **OTHERS_BLOCK, "block_epoch": 2, "request_id": 0}
    for fields in (old, {**old, "tag": CanaryLaunchTag.SWEEP_K_FULL}, {**old, "detail": Detail.SCRUB}):
        text = words(**fields)
        assert "the block was handed on since this KV was written" in text
        assert "does not hold" not in text


# ---- who wrote it ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [Reason(0), Reason.CHAIN, Reason.POSITION])
def test_a_wrong_token_by_the_request_itself_is_its_own_doing(more: Reason) -> None:
    text = words(reasons=Reason.TOKEN | more, **OWN_BLOCK, stamp_owner=READER)
    assert "request 7 (the same request) wrote it" in text
    assert "likely its own doing" in text
    assert "another request's slot" not in text


def test_a_wrong_token_by_an_unnamed_writer_is_padding() -> None:
    text = words(reasons=Reason.TOKEN | Reason.POSITION | Reason.CHAIN, stamp_owner=0)
    assert "likely a padding or dummy row whose slot_mapping names a live slot" in text
    assert "wrong prefix hit" not in text


def test_a_wrong_token_by_another_may_be_older_kv_where_owners_are_not_told() -> None:
    assert words(reasons=Reason.TOKEN).endswith("or a write of its own that was lost, over older KV")
    assert "older" not in words(reasons=Reason.TOKEN, stamp_step=7), "it was written in this very forward"
    assert words(reasons=Reason.TOKEN, **OWN_BLOCK).endswith("or a wrong prefix hit")


def test_a_writer_is_not_judged_where_the_reader_has_no_name() -> None:
    assert words(reasons=Reason.TOKEN, request_id=0, stamp_owner=0, **OWN_BLOCK).endswith("or a wrong prefix hit")


# ---- writes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reasons", [Reason.FOREIGN_WRITE, Reason.WRITE_POSITION, Reason.UNWRITTEN])
def test_a_write_of_no_request_is_padding(reasons: Reason) -> None:
    tag = CanaryLaunchTag.TAIL_K_FULL if reasons == Reason.UNWRITTEN else CanaryLaunchTag.HEAD_K_FULL
    text = words(reasons=reasons, tag=tag, request_id=0, request_slot=-1, **OTHERS_BLOCK)
    assert "likely a padding or dummy row whose slot_mapping names a live slot" in text


def test_a_write_into_a_shared_block_of_nobodys_is_a_missed_copy() -> None:
    text = words(reasons=Reason.FOREIGN_WRITE, **{**FREED, "block_flags": SHARED})
    assert "the write went into block 5, which is shared and nobody's own" in text
    assert "copy-on-write" in text
    assert "claim_blocks()" in text
    assert "after its block was freed" not in text


def test_a_write_into_anothers_block_is_late_only_if_the_block_was_handed_on() -> None:
    first = words(reasons=Reason.FOREIGN_WRITE, **OTHERS_BLOCK)
    assert "the write went into block 5, which is request 8's" in first
    assert "came late" not in first
    assert "came late" in words(reasons=Reason.FOREIGN_WRITE, **{**OTHERS_BLOCK, "block_epoch": 2})


def test_kv_that_was_loaded_is_not_told_as_padding() -> None:
    """What a row without an id writes into a block of somebody's has epoch 0; what has this epoch was moved."""
    moved = words(reasons=Reason.TOKEN, **OWN_BLOCK, stamp_owner=0, stamp_epoch=OWN_BLOCK["block_epoch"])
    assert "its stamp came with a copy or load after forward 4, as position 3" in moved
    assert "padding" not in moved
    assert "padding" in words(reasons=Reason.TOKEN, **OWN_BLOCK, stamp_owner=0, stamp_epoch=0)
    assert "padding" in words(reasons=Reason.TOKEN, stamp_owner=0, stamp_epoch=0), "without owners it may be both"


def test_bytes_of_kv_that_was_loaded_are_told_as_a_load_first() -> None:
    assert "likely a copy or load" in words(reasons=Reason.DATA, plane=0, stamp_owner=0, stamp_epoch=0)
    assert "likely a kernel" in words(reasons=Reason.DATA, plane=0, stamp_owner=READER, stamp_epoch=0)


def test_a_ring_that_wraps_elsewhere_is_told_as_such() -> None:
    wrong = {"reasons": Reason.TOKEN | Reason.POSITION, "stamp_owner": READER, "stored_position": 16}
    assert "another place of the ring" in words(**wrong, tag=CanaryLaunchTag.HEAD_K_SWA)


@pytest.mark.parametrize("block", [FREED, OWN_BLOCK, {**OTHERS_BLOCK, "block_epoch": 2}], ids=["free", "own", "others"])
def test_a_block_of_a_window_may_have_been_given_back_too_early(block: dict[str, Any]) -> None:
    stale = {"reasons": Reason.STALE_EPOCH, **block, "stamp_owner": READER, "stamp_epoch": 1}
    assert "before the window" in words(**stale, tag=CanaryLaunchTag.HEAD_K_SWA)
    assert "before the window" not in words(**stale)
