"""The recipes again, for a guard that is told who owns which block: what must be reported, and the legal twins."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from agree import Sides, SimtSide
from agree_pools import random_pool
from agree_script import PAGE, A, B, C, Row, Script, kinds
from agree_twins import Twins
from simt.runner import SimtLibrary

from kvcanary import PREFIX_CACHE, LifecycleEvent, Reason, abi
from kvcanary.backends.moves import MoveOp
from kvcanary.violations import PoolNames, decode

SUBSTITUTED = Reason.CHAIN | Reason.TOKEN
STALE, FOREIGN, UNWRITTEN = Reason.STALE_EPOCH, Reason.FOREIGN_WRITE, Reason.UNWRITTEN


def script(sides: Sides, **config: object) -> Script:
    return Script(sides(), **{"lifecycle": True, **config})  # type: ignore[arg-type]


def told(s: Script) -> str:
    """What a person on call reads."""
    return "\n".join(v.summary() for v in decode(s.records, [PoolNames("full", PAGE)], 0, True))


def blocks_of(s: Script, *ids: int) -> list[tuple[int, ...]]:
    """(epoch, owner, flags, since) of some blocks."""
    words = s.twins.sides[0].read_guard(0, "blocks")
    return [tuple(word) for word in words[list(ids)].tolist()]


def all_have(found: dict[int, Reason], slots: Sequence[int], reasons: Reason) -> bool:
    return all(reasons in found.get(slot, Reason(0)) for slot in slots)


# ---- positives -------------------------------------------------------------------------------------------------------
def test_c01_write_of_a_dispatched_step_after_its_block_was_freed(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [1, 2], 2)
    assert s.forward(Row(2, B, 0, 7, [1, 2])) == []
    late = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert kinds(late, "HEAD", 1)[10] == FOREIGN
    assert all_have(kinds(late, "HEAD", 1), range(4, 10), STALE), "the late step also reads what is B's by now"
    written = s.records[s.records["reasons"] == FOREIGN]
    facts = ("request_id", "block_owner", "block_epoch", "block_since", "block_flags", "stamp_epoch")
    assert written[list(facts)].tolist() == [(1, 2, 2, 1, abi.BLOCK_LIVE, 0)]
    assert "block 2 was given to request 2 after forward 1" in told(s)
    found = s.forward(Row(2, B, 7, 8, [1, 2]))
    assert kinds(found, request=2) == {10: SUBSTITUTED | STALE}
    assert set(s.records["stamp_owner"]) == {1}, "the stamp names the late writer"
    assert set(s.records["stamp_epoch"]) == {0}


def test_c03_block_with_two_owners(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3, 4, 5], 1)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    error = s.twins.lifecycle([("allocate", [3, 5], 2)])
    assert error is not None and error.blocks == (3, 5), "before any byte is lost"
    found = s.forward(Row(2, B, 0, 4, [3]))
    assert kinds(found) == dict.fromkeys(range(12, 16), FOREIGN)
    found = s.forward(Row(1, A, 4, 5, [3, 4]), Row(2, B, 4, 5, [3, 5]))
    lost = dict.fromkeys(range(12, 15), Reason.TOKEN | STALE)
    assert kinds(found, request=1) == {**lost, 15: SUBSTITUTED | STALE}
    assert kinds(found, request=2) == {**dict.fromkeys(range(12, 16), STALE), 20: FOREIGN}


def test_c04_prefix_index_points_at_a_block_that_changed(sides: Sides) -> None:
    s = script(sides)
    for owner, text in ((1, A), (2, B)):
        s.own("allocate", [3], owner)
        assert s.forward(Row(owner, text, 0, 4, [3])) == []
        s.own("free", [3], owner)
    s.own("share", [3], 3)
    s.own("allocate", [4], 3)
    found = s.forward(Row(3, A, 4, 6, [3, 4]))
    assert kinds(found) == {12: Reason.TOKEN, 13: Reason.TOKEN, 14: Reason.TOKEN, 15: SUBSTITUTED}


def test_c06_published_before_written(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3], 5)
    assert s.forward(Row(5, B, 0, 4, [3])) == []
    s.own("free", [3], 5)
    s.own("allocate", [3], 1)
    s.own("share", [3], 3)
    s.own("allocate", [4], 3)
    found = s.forward(Row(3, A, 4, 5, [3, 4]))
    assert all_have(kinds(found, "HEAD"), range(12, 16), UNWRITTEN | STALE | Reason.TOKEN)
    assert not Reason.DATA & kinds(found)[12]
    assert {tuple(r) for r in s.records[["stamp_epoch", "block_epoch", "block_owner"]].tolist()} == {(1, 2, 1)}
    assert "no KV was written here since the block was allocated anew" in told(s)
    assert "block 3 was given to request 1 after forward 1, and is shared" in told(s)


def test_c06_of_a_block_that_was_never_written(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3, 4], 3)
    assert kinds(s.forward(Row(3, A, 4, 5, [3, 4])), "HEAD") == dict.fromkeys(range(12, 16), UNWRITTEN)


def test_c08_metadata_overwritten_in_flight(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    s.own("allocate", [3, 4], 2)
    assert s.forward(Row(1, A, 0, 6, [1, 2]), Row(2, B, 0, 6, [3, 4])) == []
    assert s.forward(Row(2, B, 6, 7, [3, 4])) == []
    found = s.forward(Row(1, A, 6, 7, [3, 4]))
    each = dict.fromkeys(range(12, 17), Reason.TOKEN | STALE)
    assert kinds(found, "HEAD", 1) == {**each, 17: SUBSTITUTED | STALE, 18: FOREIGN}
    assert kinds(s.forward(Row(2, B, 7, 8, [3, 4]))) == {18: SUBSTITUTED | STALE}, "A wrote where B's row said"


def test_c10_padding_mapped_to_real_memory(sides: Sides) -> None:
    """A row of nobody's is somebody else."""
    s = script(sides)
    s.own("allocate", [7, 6], 2)
    assert s.forward(Row(2, B, 0, 4, [7])) == []
    found = s.forward(Row(0, [0], 0, 1, [0], slots=[31]))
    assert kinds(found, "HEAD") == {31: FOREIGN | Reason.WRITE_POSITION}
    found = kinds(s.forward(Row(2, B, 4, 5, [7, 6])))
    assert found == {31: SUBSTITUTED | Reason.POSITION | STALE}


def test_c10_padding_mapped_to_a_block_that_is_only_shared(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [7], 2)
    s.own("share", [7], PREFIX_CACHE)
    s.own("free", [7], 2)
    assert kinds(s.forward(Row(0, [0], 0, 1, [0], slots=[31])), "HEAD") == {31: FOREIGN | Reason.WRITE_POSITION}


def test_c16_half_of_a_transfer_did_not_arrive(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [3, 4], 6)
    assert s.forward(Row(6, B, 0, 8, [3, 4])) == []
    s.own("free", [3, 4], 6)
    s.own("allocate", [3, 4, 5], 4)
    s.copy(range(4, 8), range(12, 16))
    found = kinds(s.forward(Row(4, A, 8, 9, [3, 4, 5])))
    assert all_have(found, range(16, 20), UNWRITTEN | STALE)
    assert not any(Reason.TOKEN in found.get(slot, Reason(0)) for slot in range(12, 16))


def test_c19a_ring_that_was_not_filled_anew(sides: Sides) -> None:
    s = script(sides, window=5)
    s.own("allocate", [7], 6)
    assert s.forward(Row(6, B, 0, 4, [7])) == []
    s.own("free", [7], 6)
    s.own("allocate", [7, 6], 3)
    found = kinds(s.forward(Row(3, A, 8, 9, [0, 7, 6])))
    assert all_have(found, range(28, 32), UNWRITTEN | STALE)


def test_c21a_fork_without_copy(sides: Sides) -> None:
    s = script(sides)
    first, second = [*A[:6], 111, 112], [*A[:6], 222, 223]
    s.own("allocate", [1, 3], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.own("share", [1, 3], 2)
    found = s.forward(Row(1, first, 6, 7, [1, 3]), Row(2, second, 6, 7, [1, 3]))
    assert kinds(found, "HEAD") == {14: FOREIGN}
    assert kinds(found, "HEAD", request=2) == {14: FOREIGN}, "the primary may write on"
    assert kinds(found, "TAIL", request=1) == {14: Reason.DUPLICATE_WRITE}
    found = s.forward(Row(1, first, 7, 8, [1, 3]), Row(2, second, 7, 8, [1, 4], slots=[-1]))
    assert kinds(found, request=1) == {14: SUBSTITUTED | STALE}


def test_a_loser_of_a_claim_is_judged_too(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3], 1)
    found = s.forward(Row(2, B, 0, 1, [3]), Row(1, A, 0, 1, [3]))
    assert kinds(found, "HEAD") == {12: FOREIGN}
    assert kinds(found, "HEAD", 1) == {}
    assert s.twins.sides[0].read_guard(0, "head0")["epoch"][12] == 1, "the winner's stamp is of its block"


def test_read_of_a_freed_block(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    s.own("free", [1], 1)
    found = s.forward(Row(1, A, 4, 5, [1, 2]))
    assert kinds(found) == dict.fromkeys(range(4, 8), STALE)
    assert "block 1 was freed after forward 1" in told(s)
    found = s.forward(Row(0, A, 4, 5, [1, 2], slots=[-1]), Row(1, A, 5, 6, [1, 2]))
    assert kinds(found, request=0) == {}, "padding is not judged"
    found = s.forward(Row(0, A, 4, 5, [1, 6]))
    assert all_have(kinds(found, request=0), range(4, 8), STALE), "a free block is nobody's, whoever reads"


def test_use_by_one_who_was_left_out_when_the_sharing_ended(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3], 1)
    s.own("share", [3], 2)
    s.own("allocate", [4], 2)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    assert s.forward(Row(2, A, 4, 5, [3, 4])) == []
    s.own("free", [3], 2)
    assert kinds(s.forward(Row(2, A, 5, 6, [3, 4]))) == dict.fromkeys(range(12, 16), STALE)


def test_late_transfer_into_a_rewritten_block_is_a_matter_of_data(sides: Sides) -> None:
    s = script(sides)
    for owner, text in ((1, A), (2, B)):
        s.own("allocate", [3], owner)
        assert s.forward(Row(owner, text, 0, 4, [3])) == []
        if owner == 1:
            s.own("free", [3], owner)
    s.damage(0, 13)
    s.own("allocate", [4], 2)
    assert kinds(s.forward(Row(2, B, 4, 5, [3, 4]))) == {13: Reason.DATA}


def test_bytes_under_a_foreign_stamp_are_somebodys(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3, 4], 1)
    assert s.forward(Row(1, A, 0, 3, [3])) == []
    s.forward(Row(2, A, 3, 4, [3]))
    s.damage(0, 15)
    found = s.forward(Row(1, A, 4, 5, [3, 4]))
    assert kinds(found, "HEAD") == {15: STALE | Reason.DATA}


def test_who_may_read_is_also_asked_of_what_is_written_in_this_forward(sides: Sides) -> None:
    """A recycled block that its new owner fills in the very forward in which a row still reads it (vllm#42273)."""
    s = script(sides)
    second = [*A[:4], 900, 901]
    s.own("allocate", [3], 1)
    s.own("allocate", [4], 2)
    found = s.forward(Row(1, A, 0, 4, [3]), Row(2, second, 4, 5, [3, 4]))
    assert kinds(found) == kinds(found, "HEAD", 2) == dict.fromkeys(range(12, 16), STALE)
    s.own("share", [3], 2)
    assert s.forward(Row(1, A, 0, 4, [3]), Row(2, second, 5, 6, [3, 4])) == [], "a hit on what is being written"


def test_adoption_is_for_those_who_may_read(sides: Sides) -> None:
    s = script(sides, on_unwritten="adopt")
    s.own("allocate", [1, 2], 1)
    found = s.forward(Row(2, A, 4, 5, [1, 2]))
    assert kinds(found, "HEAD") == {**dict.fromkeys(range(4, 8), UNWRITTEN | STALE), 8: FOREIGN}
    assert s.twins.words[abi.STATE_ADOPTED_SLOTS] == 0


def test_epochs_are_judged_without_request_ids_and_readers_are_not(sides: Sides) -> None:
    s = Script(sides(), lifecycle=True, leave_out=["request_ids"])
    s.own("allocate", [3], 1)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    assert s.forward(Row(2, A, 4, 5, [3, 4])) == [], "who knows whose that row is"
    s.own("free", [3], 1)
    s.own("allocate", [3], 1)
    s.damage(0, 13)
    found = kinds(s.forward(Row(2, A, 4, 5, [3, 4])), "HEAD")
    assert found == dict.fromkeys(range(12, 16), UNWRITTEN | STALE), (
        "and nobody cares for bytes of an epoch that is over"
    )


def test_sweep_judges_epochs(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [3], 1)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    s.own("free", [3], 1)
    slots, positions = np.arange(12, 16, dtype=np.int32), np.arange(4, dtype=np.int32)
    before = np.concatenate([[-1], slots[:-1]]).astype(np.int32)
    assert len(s.twins.sweep(0, slots, positions, before, None)) == 0, "freed, and still cached"
    s.own("allocate", [3], 2)
    found = s.twins.sweep(0, slots, positions, before, None)
    assert found["slot"].tolist() == slots.tolist()
    assert set(found["reasons"]) == {UNWRITTEN | STALE}
    assert set(found["block_owner"]) == {2}


# ---- negative twins --------------------------------------------------------------------------------------------------
def test_n01_prefix_sharing_until_nobody_is_left(sides: Sides) -> None:
    s = script(sides)
    second = [*A[:4], 900, 901, 902, 903]
    s.own("allocate", [3], 1)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    s.own("share", [3], 2)
    s.own("allocate", [4], 2)
    assert s.forward(Row(2, second, 4, 5, [3, 4])) == []
    assert blocks_of(s, 3) == [(1, 1, abi.BLOCK_LIVE | abi.BLOCK_SHARED, 0)]
    s.own("free", [3], 1)
    assert blocks_of(s, 3) == [(1, 0, abi.BLOCK_LIVE | abi.BLOCK_SHARED, 2)]
    assert s.forward(Row(2, second, 5, 6, [3, 4])) == []
    s.own("free", [3, 4], 2)
    assert blocks_of(s, 3, 4) == [(1, 0, 0, 3), (1, 0, 0, 3)]
    s.own("share", [3], 5)
    assert blocks_of(s, 3) == [(1, 0, abi.BLOCK_LIVE | abi.BLOCK_SHARED, 3)]
    s.own("allocate", [5], 5)
    assert s.forward(Row(5, second, 4, 5, [3, 5])) == [], "revived from the cache"


def test_n02_copy_on_write_with_stamps_and_digests(sides: Sides) -> None:
    s = script(sides)
    first, second = [*A[:6], 111, 5], [*A[:6], 222, 6]
    s.own("allocate", [1, 3], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.own("share", [1], 2)
    s.own("allocate", [5], 6)
    s.own("free", [5], 6)
    s.own("allocate", [5], 2)
    s.copy([12, 13], [20, 21])
    for n in (6, 7):
        assert s.forward(Row(1, first, n, n + 1, [1, 3]), Row(2, second, n, n + 1, [1, 5])) == []


def test_n03_preemption_and_recompute_elsewhere(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [1, 2, 3], 2)
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    s.own("allocate", [5, 6], 1)
    assert s.forward(Row(1, A, 0, 6, [5, 6])) == []
    assert s.forward(Row(1, A, 6, 7, [5, 6]), Row(2, B, 8, 9, [1, 2, 3])) == []


def test_n04_block_reuse_in_another_order(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [2, 1], 1)
    s.own("allocate", [2, 1, 3], 2)
    assert s.forward(Row(2, B, 0, 8, [2, 1])) == []
    assert s.forward(Row(2, B, 8, 9, [2, 1, 3])) == []
    assert blocks_of(s, 1, 2, 3) == [(2, 2, abi.BLOCK_LIVE, 1), (2, 2, abi.BLOCK_LIVE, 1), (1, 2, abi.BLOCK_LIVE, 1)]


def test_n06_rejected_drafts_are_rewritten(sides: Sides) -> None:
    s = script(sides)
    drafted = [*A[:6], 106, 777, 778]
    s.own("allocate", [1, 2, 3], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    assert s.forward(Row(1, drafted, 6, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 7, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []


def test_n07_blocks_behind_the_window_belong_to_others(sides: Sides) -> None:
    s = script(sides, window=5)
    s.own("allocate", [1, 2, 3, 4], 1)
    assert s.forward(Row(1, A, 0, 12, [1, 2, 3, 4])) == []
    s.own("free", [1], 1)
    s.own("allocate", [1], 2)
    assert s.forward(Row(2, B, 0, 4, [1])) == []
    assert s.forward(Row(1, A, 12, 13, [1, 2, 3, 4])) == []
    s.own("free", [2], 1)
    s.own("free", [1], 2)
    s.own("allocate", [1, 2], 3)
    assert s.forward(Row(3, C, 0, 8, [1, 2])) == []
    assert s.forward(Row(1, A, 13, 14, [1, 2, 3, 4])) == []


def test_n08_padding_writes_the_reserved_block_or_nothing(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    assert s.forward(Row(0, [0], 0, 1, [0], slots=[0]), Row(0, [0], 0, 1, [0], slots=[-1])) == []
    assert s.forward(Row(1, A, 4, 5, [1, 2]), Row(0, [0], 0, 1, [0], slots=[2])) == []
    assert s.twins.words[abi.STATE_UNOWNED_WRITES] == 0


def test_n12_zeroing_of_fresh_blocks(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [1, 2], 2)
    for layer in range(3):
        s.kv(layer)[4:12] = 0
    for n in range(8):
        assert s.forward(Row(2, B, n, n + 1, [1, 2])) == []


def test_n13_restore_into_other_blocks(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [5, 6], 6)
    s.own("free", [5, 6], 6)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 1)
    s.own("allocate", [5, 6, 7], 4)
    s.copy(range(4, 12), range(20, 28))
    assert s.forward(Row(4, A, 8, 9, [5, 6, 7])) == []


def test_n15_late_write_into_a_block_that_nobody_owns(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    s.own("free", [1, 2], 1)
    late = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert kinds(late) == dict.fromkeys(range(4, 10), STALE), "what it reads is freed; what it writes hurts nobody"
    assert s.twins.words[abi.STATE_UNOWNED_WRITES] == 1
    s.own("allocate", [2, 1], 2)
    assert s.forward(Row(2, B, 0, 8, [2, 1])) == []
    assert s.forward(Row(2, B, 7, 8, [2, 1])) == []


def test_n24_prefix_written_in_the_same_forward(sides: Sides) -> None:
    s = script(sides)
    second = [*A[:4], 900, 901]
    s.own("allocate", [3, 4], 5)
    assert s.forward(Row(5, C, 0, 8, [3, 4])) == [], "what was there before"
    s.own("free", [3, 4], 5)
    s.own("allocate", [3, 5], 1)
    s.own("share", [3], 2)
    s.own("allocate", [4], 2)
    assert s.forward(Row(2, second, 4, 5, [3, 4]), Row(1, A, 0, 5, [3, 5])) == []
    assert s.forward(Row(1, A, 5, 6, [3, 5]), Row(2, second, 5, 6, [3, 4])) == []


def test_n25_write_that_was_launched_before_the_free(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    assert s.forward(Row(1, A, 6, 7, [1, 2])) == []
    error = s.twins.lifecycle(
        [
            LifecycleEvent("free", [1, 2], 1),
            {"kind": "allocate", "ids": np.array([1, 2, 3]), "owner": 2},
            ("share", 3, PREFIX_CACHE, "full"),
        ]
    )
    assert error is None
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    assert s.forward(Row(2, B, 8, 9, [1, 2, 3])) == []


def test_the_last_holder_claims_the_tail_and_writes_it(sides: Sides) -> None:
    """Copy-on-write by reference counts: the fork's tail is B's alone once A has let go."""
    second = [*A[:6], 900, 901]
    for claims in (True, False):
        s = script(sides)
        s.own("allocate", [1, 2], 1)
        assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
        s.own("share", [1, 2], 2)
        s.own("free", [1, 2], 1)
        if claims:
            s.own("claim", [2], 2)
        written = s.forward(Row(2, second, 6, 7, [1, 2]))
        later = s.forward(Row(2, second, 7, 8, [1, 2]))
        assert kinds(written) == ({} if claims else {10: Reason.FOREIGN_WRITE})
        assert (kinds(later) == {}) == claims
        if claims:
            s.own("allocate", [3], 3)
            seen_by_others = s.forward(Row(3, [*second, *C], 8, 9, [1, 2, 3]))
            assert kinds(seen_by_others, request=3)[8] == Reason.STALE_EPOCH, "it is nobody else's to read any more"


def test_adopted_slots_are_of_their_block(sides: Sides) -> None:
    s = script(sides, on_unwritten="adopt")
    s.own("allocate", [1, 2], 6)
    s.own("free", [1, 2], 6)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 4, 5, [1, 2])) == []
    assert s.twins.sides[0].read_guard(0, "head0")["epoch"][4:9].tolist() == [2] * 5
    assert s.forward(Row(1, A, 5, 6, [1, 2])) == []


@pytest.mark.parametrize("leave_out", [[], ["token_history"], ["token_history", "request_ids"]], ids=str)
def test_kv_loaded_into_a_used_block_is_adopted(sides: Sides, leave_out: list[str]) -> None:
    """The stamps that it finds are of an epoch that is over: they are no anchor, no link and no evidence."""
    s = script(sides, on_unwritten="adopt", leave_out=leave_out)
    s.own("allocate", [1, 2], 6)
    assert s.forward(Row(6, B, 0, 8, [1, 2])) == []
    s.own("free", [1, 2], 6)
    s.own("allocate", [2, 1], 1)
    for layer in range(3):
        s.kv(layer)[4:12] = 7
    assert s.forward(Row(1, A, 4, 5, [2, 1]), pending=np.ones(1, np.uint8)) == [], "not there yet"
    for n in range(5, 8):
        assert s.forward(Row(1, A, n, n + 1, [2, 1])) == []
    assert s.twins.words[abi.STATE_ADOPTED_SLOTS] == 4
    s.own("share", [2, 1], 3)
    s.own("allocate", [3], 3)
    assert s.forward(Row(3, A, 8, 9, [2, 1, 3])) == []
    s.damage(1, 9)
    assert kinds(s.forward(Row(3, A, 9, 10, [2, 1, 3]))) == {9: Reason.DATA}


def test_a_reset_leaves_ownership_alone(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1], 1)
    assert s.forward(Row(1, A, 0, 2, [1])) == []
    before = blocks_of(s, 1)
    s.twins.reset()
    assert blocks_of(s, 1) == before == [(1, 1, abi.BLOCK_LIVE, 0)]
    assert s.forward(Row(1, A, 0, 2, [1])) == []


def test_stamps_get_their_epoch_while_the_guard_is_paused(sides: Sides) -> None:
    s = script(sides)
    s.own("allocate", [1], 1)
    s.twins.set_paused(True)
    assert s.forward(Row(1, A, 0, 2, [1])) == []
    assert s.forward(Row(2, B, 3, 4, [1])) == []
    s.twins.set_paused(False)
    assert s.twins.sides[0].read_guard(0, "head0")["epoch"][4:8].tolist() == [1, 1, 0, 0]
    assert s.forward(Row(1, A, 2, 3, [1])) == []


# ---- kvc_blocks_update -----------------------------------------------------------------------------------------------
@pytest.fixture
def large(sides: Sides) -> Twins:
    """2,600 blocks of one slot, of which the first and the last are reserved."""
    spec = random_pool(random.Random(0), n_blocks=2600, page_size=1, layout="nhd", reserved_blocks=(0, 2599))
    return Twins([spec], sides(), lifecycle=True)


def test_one_call_of_all_kinds_is_one_launch(large: Twins) -> None:
    """A request that ends lets go of blocks of its own, of shared ones, and of other requests'."""
    ids = np.random.default_rng(1).permutation(np.arange(1, 1001))
    own, published, hit, held = np.split(ids, 4)
    assert (
        large.lifecycle([("allocate", np.concatenate([own, published]), 7), ("share", published, PREFIX_CACHE)]) is None
    )
    assert large.lifecycle([("allocate", np.concatenate([hit, held]), 8), ("share", [*hit, *held], 7)]) is None
    assert large.lifecycle([("share", held, 9)]) is None
    device = large.sides[-1]
    n_before = len(device.manager.backend._driver.launches) if isinstance(device, SimtSide) else 0
    assert large.lifecycle([("free", ids, 7)]) is None
    words = large.sides[0].read_guard(0, "blocks")
    live, shared = abi.BLOCK_LIVE, abi.BLOCK_LIVE | abi.BLOCK_SHARED
    for part, owner, flags in ((own, 0, 0), (published, 0, shared), (hit, 8, live), (held, 8, shared)):
        assert set(zip(words["owner"][part].tolist(), words["flags"][part].tolist(), strict=True)) == {(owner, flags)}
    if isinstance(device, SimtSide):
        assert device.manager.backend._driver.launches[n_before:] == [("kvc_blocks_update", (3, 1))]


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 1000, 1001, 2598])
def test_any_number_of_ids(large: Twins, n: int) -> None:
    ids = np.arange(1, n + 1)[::-1]
    assert large.lifecycle([("allocate", ids, 7), ("free", ids, 7), ("allocate", ids, 8)]) is None
    words = large.sides[0].read_guard(0, "blocks")
    assert words["epoch"].tolist() == [0, *[2] * n, *[0] * (2599 - n)]
    assert [side.manager.stats().live_blocks for side in large.sides] == [n] * len(large.sides)


def test_an_epoch_never_is_zero_again(large: Twins) -> None:
    def wrap(words: np.ndarray) -> None:
        words["epoch"][5] = (1 << 32) - 1

    large.edit_guard(0, "blocks", wrap)
    assert large.lifecycle([("allocate", 5, 7)]) is None
    assert large.sides[0].read_guard(0, "blocks")["epoch"][5] == 1


def test_a_kernel_never_leaves_the_array(library: SimtLibrary) -> None:
    """Whatever is in its parameters: the words before and behind are not touched."""
    words = np.zeros(12, abi.BLOCK_STATE)
    state = np.zeros(abi.N_STATE_WORDS, np.uint64)
    params = abi.zeros_of(abi.PARAMS["LifecycleParams"])
    params["state"], params["blocks"], params["n_blocks"] = state.ctypes.data, words[4:].ctypes.data, 4
    params["owner"], params["ends"] = 7, 2000
    params["ids"][:] = -1
    params["ids"][:8] = [-4, 4, 1 << 30, 3, 1000, -(1 << 31), 2, 5]
    library.launch("kvc_blocks_update", 1, abi.THREADS, params[()])
    assert np.flatnonzero(words["owner"]).tolist() == [6, 7]


@pytest.mark.parametrize("on_unwritten", ["adopt", "violation"])
def test_what_was_moved_into_a_block_of_a_new_epoch_is_not_waited_for(sides: Sides, on_unwritten: str) -> None:
    """Moved slots are verified at the next read; of those in a block of a new epoch nobody says anything any more."""
    s = script(sides, on_unwritten=on_unwritten, verify_data_every=5)
    s.own("allocate", [1, 3], 1)
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    s.twins.move(MoveOp.COPY, 0, np.arange(12, 16), sources=np.arange(4, 8))
    fresh = [side.pool_state(0)["n_fresh"].tolist() for side in s.twins.sides]
    assert fresh == [[4]] * len(fresh)
    s.own("free", [3], 1)
    s.own("allocate", [3, 2], 2)
    found = kinds(s.forward(Row(2, B, 4, 5, [3, 2])))
    assert all(STALE in reasons for reasons in found.values()) and bool(found) == (on_unwritten == "violation")
    if on_unwritten == "adopt":
        assert [side.pool_state(0)["n_fresh"].tolist() for side in s.twins.sides] == [[0]] * len(fresh)
