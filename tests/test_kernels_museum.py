"""Real corruption, abstracted: recipes that must be reported, and legal twins that must not, on reference and kernels.

Each recipe stands for a class of bugs in engines. Slots, requests and reasons are those that the recipe foretells; the
guard is told nothing of who owns a block.
"""

from __future__ import annotations

import numpy as np
import pytest
from agree import Sides
from agree_script import N_LAYERS, A, B, C, Row, Script, batch_of, kinds

from kvcanary import Reason

SUBSTITUTED = Reason.CHAIN | Reason.TOKEN


# ---- positives -------------------------------------------------------------------------------------------------------
def test_c01_write_of_a_dispatched_step_after_its_block_was_freed(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    assert s.forward(Row(2, B, 0, 7, [1, 2])) == []
    late = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert kinds(late, "HEAD", 1)[9] == SUBSTITUTED, "the late step reads what is B's by now"
    found = s.forward(Row(2, B, 7, 8, [1, 2]))
    assert kinds(found, request=2) == {10: SUBSTITUTED}
    assert set(s.records["stamp_owner"]) == {1}, "the stamp names the late writer"


def test_c02a_transfer_of_bytes_onto_another_request(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(3, A, 0, 8, [5, 6])) == []
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    s.copy(range(20, 28), range(4, 12), stamps_too=False)
    found = s.forward(Row(2, B, 8, 9, [1, 2, 3]))
    assert kinds(found) == dict.fromkeys(range(4, 12), Reason.DATA)
    assert len(found) == 8 * N_LAYERS


def test_c02b_transfer_of_bytes_and_stamps_onto_another_request(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(3, A, 0, 8, [5, 6])) == []
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    s.copy(range(20, 28), range(4, 12))
    found = kinds(s.forward(Row(2, B, 8, 9, [1, 2, 3])))
    assert found == {**dict.fromkeys(range(4, 11), Reason.TOKEN), 11: SUBSTITUTED}


def test_c03_block_with_two_owners(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    assert s.forward(Row(2, B, 0, 4, [3])) == []
    found = s.forward(Row(1, A, 4, 5, [3, 4]), Row(2, B, 4, 5, [3, 5]))
    assert kinds(found, request=1) == {12: Reason.TOKEN, 13: Reason.TOKEN, 14: Reason.TOKEN, 15: SUBSTITUTED}
    assert kinds(found, request=2) == {}


def test_c04_prefix_index_points_at_a_block_that_changed(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    assert s.forward(Row(2, B, 0, 4, [3])) == []
    found = s.forward(Row(3, A, 4, 6, [3, 4]))
    assert kinds(found) == {12: Reason.TOKEN, 13: Reason.TOKEN, 14: Reason.TOKEN, 15: SUBSTITUTED}


def test_c05a_hit_across_adapters(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [3], salt=7)) == []
    found = kinds(s.forward(Row(2, A, 4, 5, [3, 4], salt=8)))
    assert found == {12: Reason.CHAIN, 15: Reason.CHAIN}


def test_c05b_hit_by_a_hash_collision(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    found = kinds(s.forward(Row(2, [*A[:3], 999, 5, 6], 4, 5, [3, 4])))
    assert found == {15: SUBSTITUTED}


@pytest.mark.parametrize("has_history", [True, False])
def test_c08_metadata_overwritten_in_flight(sides: Sides, has_history: bool) -> None:
    s = Script(sides(), leave_out=[] if has_history else ["token_history"])
    assert s.forward(Row(1, A, 0, 6, [1, 2]), Row(2, B, 0, 6, [3, 4])) == []
    assert s.forward(Row(2, B, 6, 7, [3, 4])) == []
    found = s.forward(Row(1, A, 6, 7, [3, 4]))
    each = dict.fromkeys(range(12, 17), Reason.TOKEN) if has_history else {}
    assert kinds(found, request=1) == {**each, 17: SUBSTITUTED if has_history else Reason.CHAIN}
    found = s.forward(Row(2, B, 7, 8, [3, 4]))
    assert kinds(found) == {18: SUBSTITUTED if has_history else Reason.CHAIN}, "A wrote where B's row said"


def test_c09_graph_replay_with_a_stale_slot(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 8, [1, 2, 3])) == []
    found = s.forward(Row(1, A, 8, 9, [1, 2, 3], slots=[8]))
    assert kinds(found, "TAIL")[12] == Reason.UNWRITTEN
    assert kinds(found, "HEAD")[8] & Reason.WRITE_POSITION
    found = s.forward(Row(1, A, 9, 10, [1, 2, 3]))
    assert kinds(found)[8] == SUBSTITUTED | Reason.POSITION
    assert kinds(found)[12] == Reason.UNWRITTEN


def test_c10_padding_writes_real_memory(sides: Sides) -> None:
    """A padded row with slot -1, taken for the last slot of the pool: the kernel writes bytes, the guard no stamp."""
    s = Script(sides())
    assert s.forward(Row(2, B, 0, 4, [7])) == []
    assert s.forward(Row(0, [0], 0, 1, [0], slots=[-1], kv_slots=[31])) == []
    found = s.forward(Row(2, B, 4, 5, [7, 6]))
    assert kinds(found) == {31: Reason.DATA}
    assert sorted(v.plane for v in found) == list(range(N_LAYERS))


def test_c10_padding_mapped_to_real_memory(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(2, B, 0, 4, [7])) == []
    found = s.forward(Row(0, [0], 0, 1, [0], slots=[31]))
    assert kinds(found, "HEAD") == {31: Reason.WRITE_POSITION}
    found = kinds(s.forward(Row(2, B, 4, 5, [7, 6])))
    assert found == {31: SUBSTITUTED | Reason.POSITION}


def test_c13_restore_with_permuted_bytes(sides: Sides) -> None:
    """Stamps and digests come from before the store, so the wrong layout of the restore shows in every plane."""
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.copy(range(4, 12), range(12, 20))
    for layer in range(N_LAYERS):
        s.kv(layer)[12:20] = s.kv(layer)[12:20][:, ::-1]
    found = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(found) == dict.fromkeys(range(12, 20), Reason.DATA)
    assert len(found) == 8 * N_LAYERS


def test_c20a_rejected_drafts_kept(sides: Sides) -> None:
    s = Script(sides())
    drafted = [*A[:6], 106, 777, 778]
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    assert s.forward(Row(1, drafted, 6, 9, [1, 2, 3])) == []
    assert kinds(s.forward(Row(1, A, 9, 10, [1, 2, 3]))) == {11: Reason.TOKEN, 12: Reason.TOKEN}


def test_c21_fork_without_copy(sides: Sides) -> None:
    s = Script(sides())
    first, second = [*A[:6], 111, 112], [*A[:6], 222, 223]
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    found = s.forward(Row(1, first, 6, 7, [1, 3]), Row(2, second, 6, 7, [1, 3]))
    assert kinds(found) == {14: Reason.DUPLICATE_WRITE}
    assert {v.request for v in found} == {1}
    found = s.forward(Row(1, first, 7, 8, [1, 3]), Row(2, second, 7, 8, [1, 4], slots=[-1]))
    assert kinds(found, request=1) == {14: SUBSTITUTED}
    found = s.forward(Row(6, [*A[:6], 333], 6, 7, [1, 5]))
    assert kinds(found) == {20: Reason.UNWRITTEN, 21: Reason.UNWRITTEN}


def test_c24_bit_flip_at_rest(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    s.damage(1, 6)
    found = s.forward(Row(1, A, 4, 5, [1, 2]))
    assert kinds(found) == {6: Reason.DATA}
    assert [v.plane for v in found] == [1]


# ---- negative twins --------------------------------------------------------------------------------------------------
def test_n01_prefix_sharing(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [3])) == []
    assert s.forward(Row(2, [*A[:4], 900], 4, 5, [3, 4])) == []


def test_n02_copy_on_write_with_stamps_and_digests(sides: Sides) -> None:
    s = Script(sides())
    first, second = [*A[:6], 111, 5], [*A[:6], 222, 6]
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.copy([12, 13], [20, 21])
    for n in (6, 7):
        assert s.forward(Row(1, first, n, n + 1, [1, 3]), Row(2, second, n, n + 1, [1, 5])) == []


def test_n03_preemption_and_recompute_elsewhere(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    assert s.forward(Row(2, B, 0, 8, [1, 2])) == []
    assert s.forward(Row(1, A, 0, 6, [5, 6])) == []
    assert s.forward(Row(1, A, 6, 7, [5, 6]), Row(2, B, 8, 9, [1, 2, 3])) == []


def test_n04_block_reuse_in_another_order(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    assert s.forward(Row(2, B, 0, 8, [2, 1])) == []
    assert s.forward(Row(2, B, 8, 9, [2, 1, 3])) == []


@pytest.mark.parametrize("has_history", [True, False])
def test_n06_rejected_drafts_are_rewritten(sides: Sides, has_history: bool) -> None:
    s = Script(sides(), leave_out=[] if has_history else ["token_history"])
    drafted = [*A[:6], 106, 777, 778]
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    assert s.forward(Row(1, drafted, 6, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 7, 9, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 9, 10, [1, 2, 3])) == []


def test_n07_blocks_behind_the_window_belong_to_others(sides: Sides) -> None:
    s = Script(sides(), window=5)
    assert s.forward(Row(1, A, 0, 12, [1, 2, 3, 4])) == []
    assert s.forward(Row(2, B, 0, 4, [1])) == []
    assert s.forward(Row(1, A, 12, 13, [1, 2, 3, 4])) == []
    assert s.forward(Row(3, C, 0, 8, [1, 2])) == []
    assert s.forward(Row(1, A, 13, 14, [1, 2, 3, 4])) == []


def test_n08_padding_writes_the_reserved_block_or_nothing(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 4, [1])) == []
    assert s.forward(Row(0, [0], 0, 1, [0], slots=[0]), Row(0, [0], 0, 1, [0], slots=[-1])) == []
    assert s.forward(Row(1, A, 4, 5, [1, 2]), Row(0, [0], 0, 1, [0], slots=[2])) == []


def test_n09_chunked_prefill(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 5, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 5, 10, [1, 2, 3])) == []
    assert s.forward(Row(1, A, 10, 11, [1, 2, 3])) == []


def test_n17_one_text_under_two_adapters(sides: Sides) -> None:
    s = Script(sides())
    for n in range(4):
        rows = (Row(1, A, n, n + 1, [1], salt=1), Row(2, A, n, n + 1, [2], salt=2))
        assert s.forward(*rows) == []


@pytest.mark.parametrize("leave_out", [[], ["token_history"], ["token_history", "request_ids"]], ids=str)
def test_n24_prefix_written_in_the_same_forward(sides: Sides, leave_out: list[str]) -> None:
    s = Script(sides(), leave_out=leave_out)
    assert s.forward(Row(5, C, 0, 8, [3, 4])) == [], "what was there before"
    second = [*A[:4], 900, 901]
    for order in (1, -1):
        rows = [Row(1, A, 0, 5, [3, 5]), Row(2, second, 4, 5, [3, 4])]
        assert s.forward(*rows[::order]) == []
        rows = [Row(1, A, 5, 6, [3, 5]), Row(2, second, 5, 6, [3, 4])]
        assert s.forward(*rows[::order]) == []


@pytest.mark.parametrize("advanced", ["input_ids", "seq_lens"])
def test_an_engine_may_advance_these_before_tail(sides: Sides, advanced: str) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    for n in range(6, 10):
        late = {"input_ids": np.array([A[n + 1]], np.int32), "seq_lens": np.array([n + 2], np.int32)}
        assert s.forward(Row(1, A, n, n + 1, [1, 2, 3]), late={advanced: late[advanced]}) == []


def test_slots_that_are_advanced_before_tail_are_reported(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 2, 3])) == []
    found = s.forward(Row(1, A, 6, 7, [1, 2, 3]), late={"slot_mapping": np.array([11], np.int64)})
    assert kinds(found) == {11: Reason.DUPLICATE_WRITE}, "nobody claimed it at HEAD"
    assert kinds(s.forward(Row(1, A, 7, 8, [1, 2, 3])))[10] == Reason.UNWRITTEN


def test_a_table_or_salts_that_are_advanced_before_tail_are_reported(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 2])) == []
    table = batch_of([Row(1, A, 6, 7, [5, 6])])["block_table"]
    found = s.forward(Row(1, A, 6, 7, [1, 2]), late={"block_table": table})
    assert Reason.UNWRITTEN in kinds(found, "TAIL")[26] and kinds(found, "HEAD") == {}
    found = s.forward(Row(1, A, 7, 8, [1, 2]), late={"salts": np.array([5], np.uint64)})
    assert kinds(found) == {4: Reason.CHAIN}


@pytest.mark.parametrize("nobody", [0, -1])
def test_requests_of_unknown_ids_follow_each_other_in_a_slot(sides: Sides, nobody: int) -> None:
    s, ids = Script(sides(), leave_out=["token_history"]), np.full(1, nobody, np.int32)
    assert s.forward(Row(3, C, 0, 4, [5])) == []
    assert s.forward(Row(1, A, 0, 5, [1, 2]), request_ids=ids) == []
    assert s.forward(Row(1, C, 4, 5, [5, 6]), request_ids=ids) == [], "a prefix hit, not A that went on elsewhere"
    found = s.forward(Row(1, C, 4, 5, [5, 6]), request_ids=np.ones(1, np.int32))
    assert found == [], "whoever it is, this is its first forward"


@pytest.mark.parametrize("raises", [True, False])
def test_n24_taken_up_again_at_the_same_length(sides: Sides, raises: bool) -> None:
    """Without a history the hit starts from the stale stamp it finds, and nobody may hold that against a retry."""
    s = Script(sides(), leave_out=["token_history"])
    second = [*A[:4], 900, 901]
    assert s.forward(Row(5, C, 0, 4, [3])) == []
    assert s.forward(Row(1, A, 0, 4, [3]), Row(2, second, 4, 5, [3, 4]), has_tail=not raises) == []
    assert s.forward(Row(1, A, 0, 4, [3]), Row(2, second, 4, 5, [3, 6])) == []
    assert s.forward(Row(2, second, 5, 6, [3, 6])) == []


def test_n28_placeholders_in_the_history(sides: Sides) -> None:
    s = Script(sides())
    history = np.full((8, 32), -1, np.int32)
    history[1, :6] = A[:6]
    assert s.forward(Row(1, A, 0, 6, [1, 2]), token_history=history) == []
    assert s.forward(Row(1, A, 6, 7, [1, 2]), token_history=history) == []
    assert s.forward(Row(1, A, 7, 8, [1, 2]), token_history=history) == []
