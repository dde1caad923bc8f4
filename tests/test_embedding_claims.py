"""What the README says of rows that not every engine has: padding inside a row, beams, micro-batches, adoption."""

from __future__ import annotations

import numpy as np
from engine import PAGE, ToyEngine

from kvcanary import Reason, StepBatch


def toy(**config: object) -> ToyEngine:
    return ToyEngine(verify_data_every=1, **config)


def write(engine: ToyEngine, batch: StepBatch) -> None:
    with engine.manager.step(), engine.manager.forward(batch):
        engine.write(batch)


def test_padding_inside_a_row_is_taken_back_by_the_next_forward() -> None:
    engine = toy()
    engine.step((0, 0, 3))
    for n in range(3, 8):
        batch = engine.batch((0, n, 3))
        batch.slot_mapping[1:] = -1
        engine.history[0, n + 1 :] = -1
        write(engine, batch)
    assert engine.manager.violations() == ()


def test_a_row_whose_length_leaves_its_padding_out_is_judged_at_wrong_positions() -> None:
    engine = toy()
    engine.step((0, 0, 6))
    batch = engine.batch((0, 6, 3), seq_lens=np.array([7], np.int32))
    batch.slot_mapping[1:] = -1
    write(engine, batch)
    assert any(Reason.WRITE_POSITION in v.reasons for v in engine.manager.violations())


def fork(engine: ToyEngine, request_id: int) -> None:
    """The second row goes on from the text of the first: a block is shared, the tail is copied."""
    engine.step((0, 0, 6), (1, 0, 6))
    src, dst = np.arange(2 * PAGE, 2 * PAGE + 2), np.arange(10 * PAGE, 10 * PAGE + 2)
    engine.manager.copy_slots(src, dst)
    for layer in (*engine.k, *engine.v):
        flat = layer.reshape(-1, *layer.shape[2:])
        flat[dst] = flat[src]
    engine.history[1, :6] = engine.history[0, :6]
    for n in (6, 7):
        batch = engine.batch((1, n, 1), block_table=np.array([[1, 10, 11]], np.int32))
        batch.request_ids[:] = request_id
        batch.slot_mapping[:] = 10 * PAGE + n - PAGE
        write(engine, batch)


def test_a_beam_that_goes_on_from_another_under_a_new_id_is_legal() -> None:
    engine = toy()
    fork(engine, 7)
    assert engine.manager.violations() == ()


def test_a_beam_that_keeps_its_id_is_taken_for_its_old_text() -> None:
    engine = toy()
    fork(engine, 2)
    assert Reason.CHAIN in engine.manager.violations()[0].reasons


def test_an_index_of_0_clears_the_taint_of_rows_that_are_other_requests() -> None:
    taints = {}
    for index in (0, 1):
        engine = toy()
        engine.step((0, 0, 6), (1, 0, 6))
        engine.k[0][1, 2] ^= 1  # of the first request
        first, second = engine.batch((0, 6, 1)), engine.batch((1, 6, 1))
        with engine.manager.step():
            with engine.manager.forward(first):
                engine.write(first)
            assert engine.manager.taint[0] == Reason.DATA
            with engine.manager.forward(second, index=index):
                engine.write(second)
            taints[index] = int(engine.manager.taint[0])
    assert taints == {0: 0, 1: Reason.DATA}


def test_adoption_takes_a_lost_write_too() -> None:
    for mode, n in (("violation", 1), ("adopt", 0)):
        engine = toy(on_unwritten=mode)
        engine.step((0, 0, 5))
        batch = engine.batch((0, 5, 1))
        batch.slot_mapping[:] = -1
        write(engine, batch)
        engine.step((0, 6, 1))
        assert len(engine.manager.violations()) == n
