"""Root causes of planted faults of which another cause is plausible, too: which comes first, and what the line says."""

from __future__ import annotations

import numpy as np
import pytest
from engine import PAGE, ToyEngine
from test_causes_planted import causes, forward, ids, likely, owned, sentences, toy

from kvcanary import CanaryConfig, CanaryManager, PoolKind, Reason, StepBatch, Violation, layouts
from kvcanary.causes import classify

HERE = np.arange(PAGE, 4 * PAGE)  # the slots of request 1


def found_by(engine: ToyEngine, request: int, reason: Reason) -> Violation:
    return next(v for v in engine.manager.violations() if v.request_id == request and reason in v.reasons)


def flat(layer: np.ndarray) -> np.ndarray:
    return layer.reshape(-1, *layer.shape[2:])


# ---- rows ------------------------------------------------------------------------------------------------------------
def test_a_hole_in_a_block_that_was_given_to_another_is_no_wrong_count() -> None:
    """A prefix hit without a reference: the other has the blocks by now, and has filled them up to one slot."""
    engine = owned(0)
    manager = engine.manager
    forward(engine, (0, 0, 9))
    manager.free_blocks([1, 2, 3], 1)
    manager.allocate_blocks([1, 2], 2)
    manager.allocate_blocks([10], 3)
    tables = np.array([[1, 2, 0], [1, 2, 10]], np.int32)
    engine.history[2, :8] = engine.history[0, :8]
    forward(engine, (1, 0, 7), (2, 8, 1), block_table=tables, slot_mapping=np.r_[PAGE : PAGE + 7, 10 * PAGE])
    found = causes(engine)
    assert found[0].class_id == "C04" and not {"C20", "C09"} & set(ids(found)), sentences(found)


@pytest.mark.parametrize("lifecycle", [False, True])
def test_rows_that_read_each_others_blocks_were_exchanged(lifecycle: bool) -> None:
    engine = owned(0, 1) if lifecycle else toy()
    forward(engine, (0, 0, 6), (1, 0, 6))
    tables = np.array([[4, 5, 6], [1, 2, 3]], np.int32)
    slots = np.array([5 * PAGE + 2, 2 * PAGE + 2])
    forward(engine, (0, 6, 1), (1, 6, 1), block_table=tables, slot_mapping=slots)
    found = causes(engine)
    assert found[0].class_id == "C08" and "exchanged" in found[0].evidence[0], sentences(found)


def test_a_block_that_two_write_is_no_exchange_of_rows() -> None:
    engine = toy()
    tables = np.array([[1, 2, 3], [1, 5, 6]], np.int32)
    forward(engine, (0, 0, 3))
    forward(engine, (1, 0, 2), block_table=tables[1:], slot_mapping=PAGE + np.arange(2))
    forward(engine, (0, 3, 1), (1, 2, 1), block_table=tables, slot_mapping=PAGE + np.array([3, 2]))
    found = causes(engine)
    assert found[0].class_id != "C08" and "exchanged" not in sentences(found)


@pytest.mark.parametrize("lifecycle", [False, True])
def test_a_row_with_anothers_table_has_written_over_the_other_not_over_itself(lifecycle: bool) -> None:
    """A padded row of a graph still has an id, a length and a table; its mapping names a live slot."""
    engine = owned(0) if lifecycle else toy()
    forward(engine, (0, 0, 9))
    tables = np.array([[1, 2, 3], [1, 2, 3]], np.int32)
    stale = {"block_table": tables, "request_ids": np.array([1, 4], np.uint32), "token_history": None}
    forward(engine, (0, 9, 1), (3, 8, 1), slot_mapping=np.array([3 * PAGE + 1, PAGE + 2]), **stale)
    found = causes(engine)
    assert found[0].class_id == "C07" and "C10" in ids(found), sentences(found)
    assert not {"C09", "C20"} & set(ids(found)), sentences(found)


# ---- where a row writes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lifecycle", [False, True])
def test_a_whole_mapping_of_another_step_is_no_fork(lifecycle: bool) -> None:
    """Preempted, computed anew in other blocks, but written where it was; who has those blocks writes there, too."""
    engine = owned(0) if lifecycle else toy()
    forward(engine, (0, 0, 6))
    if lifecycle:
        engine.manager.free_blocks([1, 2, 3], 1)
        engine.manager.allocate_blocks([7, 8, 9], 1)
        engine.manager.allocate_blocks([1, 2, 3], 2)
    theirs = {"block_table": np.array([[1, 2, 3]], np.int32)}
    forward(engine, (1, 0, 5), slot_mapping=HERE[:5], **theirs)
    tables = np.array([[7, 8, 9], [1, 2, 3]], np.int32)
    slots = np.r_[HERE[:6], HERE[5]]
    forward(engine, (0, 0, 6), (1, 5, 1), block_table=tables, slot_mapping=slots)
    found = causes(engine)
    assert found[0].class_id == "C08" and not {"C21", "C20"} & set(ids(found)), sentences(found)


def test_a_place_that_is_one_block_off_at_every_page_is_no_replay() -> None:
    engine = toy()
    forward(engine, (0, 0, 4), (1, 0, 3))
    forward(engine, (0, 4, 1), (1, 3, 1), slot_mapping=np.array([PAGE, 4 * PAGE + 3]))
    forward(engine, (0, 5, 1), (1, 4, 1), slot_mapping=np.array([2 * PAGE + 1, 4 * PAGE]))
    found = causes(engine)
    assert found[0].class_id == "C12" and "at the beginning of a page" in found[0].evidence[0], sentences(found)
    seen = found_by(engine, 1, Reason.POSITION)
    assert "this forward's slot_mapping" in likely(seen)


def test_a_length_that_is_one_too_long_is_no_replay() -> None:
    engine = toy()
    forward(engine, (0, 0, 6))
    forward(engine, (0, 6, 1), seq_lens=np.array([8], np.int32))
    found = causes(engine)
    assert found[0].class_id == "C20" and "1 too long" in found[0].evidence[0], sentences(found)


def test_where_writes_are_not_checked_a_lost_token_is_no_table_that_changed() -> None:
    engine = toy(check_write_position=False)
    forward(engine, (0, 0, 8))
    forward(engine, (0, 8, 1), slot_mapping=HERE[7:8])
    forward(engine, (0, 9, 1))
    found = causes(engine)
    assert found[0].class_id == "C12" and "written over its position 7" in found[0].evidence[0], sentences(found)
    assert "the table named another slot" not in sentences(found)
    assert "drafts" not in likely(found_by(engine, 1, Reason.POSITION))


# ---- what is missing -------------------------------------------------------------------------------------------------
def test_a_tail_that_a_running_request_misses_is_no_fork() -> None:
    """Swapped out and in again, one block short."""
    engine = toy()
    forward(engine, (0, 0, 10))
    stored = engine.manager.export_slots(HERE[:8])
    there = np.r_[7 * PAGE : 9 * PAGE]
    for layer in (*engine.k, *engine.v):
        flat(layer)[there] = flat(layer)[HERE[:8]]
    engine.manager.import_slots(stored, there)
    table = {"block_table": np.array([[7, 8, 9]], np.int32)}
    forward(engine, (0, 10, 1), slot_mapping=np.array([9 * PAGE + 2]), **table)
    found = causes(engine)
    assert found[0].class_id == "C16", sentences(found)


def test_a_first_slot_of_a_page_that_a_running_request_misses_is_a_lost_write() -> None:
    engine = toy()
    forward(engine, (0, 0, 7))
    forward(engine, (0, 7, 2), slot_mapping=np.array([HERE[7], -1]))
    forward(engine, (0, 9, 1))
    found = causes(engine)
    assert found[0].class_id == "C09", sentences(found)


def test_all_that_a_request_misses_since_it_came_back_may_be_its_count() -> None:
    engine = owned(0)
    forward(engine, (0, 0, 6))
    engine.manager.free_blocks([1, 2, 3], 1)
    engine.manager.allocate_blocks([7, 8, 9], 1)
    table = {"block_table": np.array([[7, 8, 9]], np.int32)}
    forward(engine, (0, 6, 1), slot_mapping=np.array([8 * PAGE + 2]), **table)
    found = causes(engine)
    assert {"C16", "C20"} <= set(ids(found)), sentences(found)


def test_a_shared_block_whose_writer_let_go_was_published_too_early() -> None:
    engine = owned(0)
    forward(engine, (0, 0, 5))
    engine.manager.free_blocks([1, 2, 3], 1)
    engine.manager.share_blocks([1, 2], 2)
    engine.manager.allocate_blocks([5], 2)
    engine.history[1, :8] = engine.history[0, :8]
    forward(engine, (1, 8, 1), block_table=np.array([[1, 2, 5]], np.int32), slot_mapping=np.array([5 * PAGE]))
    found = causes(engine)
    assert found[0].class_id == "C06", sentences(found)


# ---- tokens ----------------------------------------------------------------------------------------------------------
def test_a_chunk_that_begins_too_early_is_told_by_its_tokens() -> None:
    engine = toy(log_tokens=True)
    forward(engine, (0, 0, 4))
    engine.history[0, 4:10] = np.arange(100, 106)
    forward(engine, (0, 4, 6), input_ids=engine.history[0, 2:8].copy())
    forward(engine, (0, 10, 1))
    found = causes(engine)
    assert found[0].class_id == "C20" and "2 tokens were brought twice" in found[0].evidence[0], sentences(found)


def test_input_ids_of_two_rows_exchanged_are_told_by_their_tokens() -> None:
    engine = toy(log_tokens=True)
    forward(engine, (0, 0, 6), (1, 0, 6))
    batch = engine.batch((0, 6, 1), (1, 6, 1))
    batch.input_ids[:] = batch.input_ids[::-1].copy()
    with engine.manager.step(), engine.manager.forward(batch):
        engine.write(batch)
    forward(engine, (0, 7, 1), (1, 7, 1))
    found = causes(engine)
    assert found[0].class_id == "C08" and "request 2 should have had" in found[0].evidence[0], sentences(found)


# ---- windows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given_to", [0, 1, 2])
def test_a_block_given_back_before_the_window_has_left_it(given_to: int) -> None:
    """It is free by then, or its old request's again, or another's."""
    k = [np.ones((16, PAGE, 1, 4), np.float32)]
    pool = layouts.nhd(k=k, kind=PoolKind.SWA, window=6, name="swa")
    config = CanaryConfig(lifecycle=True, verify_data_every=1)
    manager = CanaryManager(config, [pool], max_requests=2, max_new_tokens=16, backend="host")
    manager.allocate_blocks([1, 2, 3], 1)

    def step(prefix: int, n: int) -> None:
        batch = StepBatch(
            block_table=np.array([[1, 2, 3]], np.int32),
            seq_lens=np.array([prefix + n], np.int32),
            query_start_loc=np.array([0, n], np.int32),
            input_ids=np.arange(prefix, prefix + n, dtype=np.int32),
            slot_mapping=PAGE + np.arange(prefix, prefix + n),
            request_slots=np.zeros(1, np.int32),
            request_ids=np.ones(1, np.uint32),
        )
        with manager.step(), manager.forward(batch):
            pass

    step(0, 8)
    manager.free_blocks([1], 1)
    if given_to:
        manager.allocate_blocks([1], given_to)
    step(8, 1)
    found = classify(manager.violations())
    assert found[0].class_id == "C19", sentences(found)


# ---- what is not known -----------------------------------------------------------------------------------------------
def test_a_chain_that_differs_behind_the_first_position_may_be_another_text() -> None:
    """Where no token is judged, nobody knows that they are the request's own."""
    engine = toy()
    forward(engine, (0, 0, 9))
    chain = np.full(1, engine.manager.chain([1, 2, 3, 4]), np.uint64)
    hit = {"token_history": None, "prefix_chain": chain, "request_slots": np.ones(1, np.int32)}
    table = {"block_table": np.array([[1, 5, 6]], np.int32), "request_ids": np.full(1, 2, np.uint32)}
    forward(engine, (1, 4, 1), slot_mapping=np.array([5 * PAGE]), **hit, **table)
    found = causes(engine)
    assert {"C05", "C04"} <= set(ids(found)) and "its own tokens" not in sentences(found), sentences(found)


def test_kv_of_the_right_tokens_at_another_position_may_be_the_key() -> None:
    engine = toy()
    forward(engine, (0, 0, 9))
    engine.history[1, :4] = engine.history[0, 4:8]
    forward(engine, (1, 4, 1), block_table=np.array([[2, 5, 6]], np.int32), slot_mapping=np.array([5 * PAGE]))
    assert "C05" in ids(causes(engine))


def test_a_block_that_was_copied_before_its_last_write_is_thought_of() -> None:
    engine = owned(0)
    manager = engine.manager
    forward(engine, (0, 0, 6))
    manager.share_blocks([1], 2)
    manager.allocate_blocks([4], 2)
    manager.copy_slots([2], [4], blocks=True)
    for layer in (*engine.k, *engine.v):
        layer[4] = layer[2]
    forward(engine, (0, 6, 1))
    engine.history[1, :7] = engine.history[0, :7]
    table = {"block_table": np.array([[1, 4, 6]], np.int32)}
    forward(engine, (1, 7, 1), slot_mapping=np.array([4 * PAGE + 3]), **table)
    assert "C21" in ids(causes(engine))


def test_the_tail_that_a_request_misses_at_first_may_be_a_load_that_was_cut_short() -> None:
    engine = toy()
    forward(engine, (0, 0, 7))
    stored = engine.manager.export_slots(HERE[:4])
    there = 7 * PAGE + np.arange(4)
    for layer in (*engine.k, *engine.v):
        flat(layer)[there] = flat(layer)[HERE[:4]]
    engine.manager.import_slots(stored, there)
    engine.history[1, :7] = engine.history[0, :7]
    table = {"block_table": np.array([[7, 8, 9]], np.int32)}
    forward(engine, (1, 7, 1), slot_mapping=np.array([8 * PAGE + 3]), **table)
    assert ids(causes(engine))[:2] == ["C21", "C16"]


def test_a_length_that_was_short_for_a_step_may_have_been_counted_wrongly() -> None:
    engine = toy()
    forward(engine, (0, 0, 7))
    engine.history[0, 7] = 4711
    forward(engine, (0, 6, 1), input_ids=engine.history[0, 7:8].copy())
    forward(engine, (0, 8, 1))
    found = causes(engine)
    assert {"C14", "C20"} <= set(ids(found)), sentences(found)
