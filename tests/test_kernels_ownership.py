"""The recipes again, for a guard that is told who owns which block: what must be reported."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from agree import Sides
from agree_script import PAGE, A, B, Row, Script, kinds, owned_script

from kvcanary import PREFIX_CACHE, Reason, abi
from kvcanary.backends.moves import MoveOp
from kvcanary.violations import PoolNames, decode

SUBSTITUTED = Reason.CHAIN | Reason.TOKEN
STALE, FOREIGN, UNWRITTEN = Reason.STALE_EPOCH, Reason.FOREIGN_WRITE, Reason.UNWRITTEN


def told(s: Script) -> str:
    """What a person on call reads."""
    return "\n".join(v.summary() for v in decode(s.records, [PoolNames("full", PAGE)], 0, True))


def all_have(found: dict[int, Reason], slots: Sequence[int], reasons: Reason) -> bool:
    return all(reasons in found.get(slot, Reason(0)) for slot in slots)


def test_c01_write_of_a_dispatched_step_after_its_block_was_freed(sides: Sides) -> None:
    s = owned_script(sides)
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


@pytest.mark.parametrize("dtype", [np.uint32, np.int32])
def test_a_row_without_a_request_is_not_the_prefix_caches(sides: Sides, dtype: type) -> None:
    s = owned_script(sides)
    s.own("allocate", [3], PREFIX_CACHE)
    nobody = np.full(1, -1, np.int32).view(dtype)
    found = s.forward(Row(1, A, 0, 4, [3]), request_ids=nobody)
    assert kinds(found, request=0) == dict.fromkeys(range(12, 16), FOREIGN)
    found = s.forward(Row(1, A, 4, 5, [3, 4]), request_ids=nobody)
    assert all_have(kinds(found, "HEAD"), range(12, 16), STALE)


def test_c03_block_with_two_owners(sides: Sides) -> None:
    s = owned_script(sides)
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
    s = owned_script(sides)
    for owner, text in ((1, A), (2, B)):
        s.own("allocate", [3], owner)
        assert s.forward(Row(owner, text, 0, 4, [3])) == []
        s.own("free", [3], owner)
    s.own("share", [3], 3)
    s.own("allocate", [4], 3)
    found = s.forward(Row(3, A, 4, 6, [3, 4]))
    assert kinds(found) == {12: Reason.TOKEN, 13: Reason.TOKEN, 14: Reason.TOKEN, 15: SUBSTITUTED}


def test_c06_published_before_written(sides: Sides) -> None:
    s = owned_script(sides)
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
    s = owned_script(sides)
    s.own("allocate", [3, 4], 3)
    assert kinds(s.forward(Row(3, A, 4, 5, [3, 4])), "HEAD") == dict.fromkeys(range(12, 16), UNWRITTEN)


def test_c08_metadata_overwritten_in_flight(sides: Sides) -> None:
    s = owned_script(sides)
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
    s = owned_script(sides)
    s.own("allocate", [7, 6], 2)
    assert s.forward(Row(2, B, 0, 4, [7])) == []
    found = s.forward(Row(0, [0], 0, 1, [0], slots=[31]))
    assert kinds(found, "HEAD") == {31: FOREIGN | Reason.WRITE_POSITION}
    found = kinds(s.forward(Row(2, B, 4, 5, [7, 6])))
    assert found == {31: SUBSTITUTED | Reason.POSITION | STALE}


def test_c10_padding_mapped_to_a_block_that_is_only_shared(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [7], 2)
    s.own("share", [7], PREFIX_CACHE)
    s.own("free", [7], 2)
    assert kinds(s.forward(Row(0, [0], 0, 1, [0], slots=[31])), "HEAD") == {31: FOREIGN | Reason.WRITE_POSITION}


def test_c16_half_of_a_transfer_did_not_arrive(sides: Sides) -> None:
    s = owned_script(sides)
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
    s = owned_script(sides, window=5)
    s.own("allocate", [7], 6)
    assert s.forward(Row(6, B, 0, 4, [7])) == []
    s.own("free", [7], 6)
    s.own("allocate", [7, 6], 3)
    found = kinds(s.forward(Row(3, A, 8, 9, [0, 7, 6])))
    assert all_have(found, range(28, 32), UNWRITTEN | STALE)


def test_c21a_fork_without_copy(sides: Sides) -> None:
    s = owned_script(sides)
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
    s = owned_script(sides)
    s.own("allocate", [3], 1)
    found = s.forward(Row(2, B, 0, 1, [3]), Row(1, A, 0, 1, [3]))
    assert kinds(found, "HEAD") == {12: FOREIGN}
    assert kinds(found, "HEAD", 1) == {}
    assert s.twins.sides[0].read_guard(0, "head0")["epoch"][12] == 1, "the winner's stamp is of its block"


def test_read_of_a_freed_block(sides: Sides) -> None:
    s = owned_script(sides)
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
    s = owned_script(sides)
    s.own("allocate", [3], 1)
    s.own("share", [3], 2)
    s.own("allocate", [4], 2)
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    assert s.forward(Row(2, A, 4, 5, [3, 4])) == []
    s.own("free", [3], 2)
    assert kinds(s.forward(Row(2, A, 5, 6, [3, 4]))) == dict.fromkeys(range(12, 16), STALE)


def test_late_transfer_into_a_rewritten_block_is_a_matter_of_data(sides: Sides) -> None:
    s = owned_script(sides)
    for owner, text in ((1, A), (2, B)):
        s.own("allocate", [3], owner)
        assert s.forward(Row(owner, text, 0, 4, [3])) == []
        if owner == 1:
            s.own("free", [3], owner)
    s.damage(0, 13)
    s.own("allocate", [4], 2)
    assert kinds(s.forward(Row(2, B, 4, 5, [3, 4]))) == {13: Reason.DATA}


def test_bytes_under_a_foreign_stamp_are_somebodys(sides: Sides) -> None:
    s = owned_script(sides)
    s.own("allocate", [3, 4], 1)
    assert s.forward(Row(1, A, 0, 3, [3])) == []
    s.forward(Row(2, A, 3, 4, [3]))
    s.damage(0, 15)
    found = s.forward(Row(1, A, 4, 5, [3, 4]))
    assert kinds(found, "HEAD") == {15: STALE | Reason.DATA}


def test_who_may_read_is_also_asked_of_what_is_written_in_this_forward(sides: Sides) -> None:
    """A recycled block that its new owner fills in the very forward in which a row still reads it (vllm#42273)."""
    s = owned_script(sides)
    second = [*A[:4], 900, 901]
    s.own("allocate", [3], 1)
    s.own("allocate", [4], 2)
    found = s.forward(Row(1, A, 0, 4, [3]), Row(2, second, 4, 5, [3, 4]))
    assert kinds(found) == kinds(found, "HEAD", 2) == dict.fromkeys(range(12, 16), STALE)
    s.own("share", [3], 2)
    assert s.forward(Row(1, A, 0, 4, [3]), Row(2, second, 5, 6, [3, 4])) == [], "a hit on what is being written"


def test_adoption_is_for_those_who_may_read(sides: Sides) -> None:
    s = owned_script(sides, on_unwritten="adopt")
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
    s = owned_script(sides)
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


@pytest.mark.parametrize("on_unwritten", ["adopt", "violation"])
def test_what_was_moved_into_a_block_of_a_new_epoch_is_not_waited_for(sides: Sides, on_unwritten: str) -> None:
    """Moved slots are verified at the next read; of those in a block of a new epoch nobody says anything any more."""
    s = owned_script(sides, on_unwritten=on_unwritten, verify_data_every=5)
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
