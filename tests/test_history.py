"""A token history that ends before the table: TOKEN is off behind it, which is said once and in `describe`."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from engine import MAX_LEN, PAGE, ToyEngine

from kvcanary import KvPool, Reason, StepBatch
from kvcanary.history import HistoryWatch, narrow_history
from kvcanary.tags import PoolKind

TABLE = 3 * PAGE  # what the toy's tables reach


def narrow(engine: ToyEngine, width: int) -> dict[str, Any]:
    return {"token_history": np.ascontiguousarray(engine.history[:, :width])}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "token_history" in r.getMessage()]


def run(engine: ToyEngine, width: int, wrong_at: int) -> set[Reason]:
    """Decode to the end of the table; the model gets another token than the history has at one position."""
    engine.batch((0, 0, TABLE))  # fills the history
    history = narrow(engine, width)["token_history"]
    for p in range(TABLE):
        token = engine.history[0, p] + (p == wrong_at)
        engine.step((0, p, 1), token_history=history, input_ids=np.array([token], np.int32))
    return {reason for v in engine.manager.violations() for reason in Reason if reason in v.reasons}


def test_behind_its_end_a_wrong_token_is_not_seen_and_both_log_and_describe_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert Reason.TOKEN in run(ToyEngine(), MAX_LEN, 6)
    assert not told(caplog)
    engine = ToyEngine()
    assert "token_history" not in engine.manager.describe()
    assert run(engine, PAGE, 6) == set()
    (line,) = told(caplog)
    assert "token_history is 4 wide" in line and "pool 'full' reaches 12 positions" in line
    assert "from position 4 on TOKEN is not judged" in line and "give i32[max_requests, tokens of the longest" in line
    text = engine.manager.describe()
    assert "weaker: token_history is 4 wide" in text and "TOKEN below position 4" in text.split("\non: ")[1]


def test_up_to_its_end_it_is_judged() -> None:
    assert Reason.TOKEN in run(ToyEngine(), PAGE, PAGE - 1)


@pytest.mark.parametrize(
    ("width", "is_told"), [(MAX_LEN, False), (TABLE, False), (TABLE - PAGE + 1, False), (TABLE - PAGE, True), (1, True)]
)
def test_a_table_in_whole_pages_may_end_behind_the_longest_request(
    width: int, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ToyEngine()
    engine.step((0, 0, 1), **narrow(engine, width))
    assert bool(told(caplog)) is is_told
    assert ("weaker: token_history" in engine.manager.describe()) is is_told


def test_a_table_of_slots_has_a_position_per_entry(caplog: pytest.LogCaptureFixture) -> None:
    engine = ToyEngine()
    slots = (4 + np.arange(10, dtype=np.int32))[None]
    engine.step((0, 0, 1), block_table=slots, table_entries="slots", **narrow(engine, 7))
    assert not told(caplog)
    engine.step((0, 1, 1), block_table=slots, table_entries="slots", **narrow(engine, 6))
    (line,) = told(caplog)
    assert "reaches 10 positions" in line


def test_what_a_row_reaches_is_not_known_of_a_csr_table(caplog: pytest.LogCaptureFixture) -> None:
    engine = ToyEngine()
    table = {
        "block_table": None,
        "kv_indptr": np.array([0, 3], np.int32),
        "kv_indices": np.arange(1, 4, dtype=np.int32),
    }
    engine.step((0, 0, 1), **table, **narrow(engine, 1))
    assert not told(caplog)


def test_each_shape_is_told_once_and_describe_has_the_narrowest(caplog: pytest.LogCaptureFixture) -> None:
    engine = ToyEngine()
    for p, width in enumerate((8, 5, 8, 5, 8)):
        engine.step((0, p, 1), **narrow(engine, width))
    assert [line.partition(" wide")[0][-1] for line in told(caplog)] == ["8", "5"]
    assert "TOKEN below position 5" in engine.manager.describe()


def test_nothing_is_looked_at_in_a_step_with_a_known_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ToyEngine()
    batch = engine.step((0, 0, 1), **narrow(engine, 1))
    monkeypatch.setattr(HistoryWatch, "note", lambda *_: pytest.fail("asked again"))
    with engine.manager.step(), engine.manager.forward(batch):
        engine.write(batch)


def test_a_log_handler_that_raises_does_not_stop_the_forward() -> None:
    class Failing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("no disk")

    handler, logger = Failing(), logging.getLogger("kvcanary")
    logger.addHandler(handler)
    try:
        engine = ToyEngine(stats_print_every_n_steps=0)
        engine.step((0, 0, 1), **narrow(engine, 1))
    finally:
        logger.removeHandler(handler)
    assert engine.manager.stats().step == 1


@pytest.mark.parametrize(
    ("pool", "width", "end"),
    [
        ({}, 3, 3),  # a row's block is all that it has
        ({}, 4, None),
        ({"token_offset": 1}, 4, None),  # no draft is made for the last token
        ({"token_offset": 1}, 3, 2),
        ({"token_offset": -1}, 3, None),
        ({"token_offset": -1}, 2, 3),
        ({"token_offset": 9}, 3, 0),
        ({"kind": PoolKind.SWA, "window": 2, "ring_length": 4}, 1, None),  # positions go round
    ],
)
def test_where_a_static_cache_ends_and_which_token_a_position_holds(
    pool: dict[str, Any], width: int, end: int | None
) -> None:
    static = KvPool(planes=(), page_size=4, n_blocks=2, reserved_blocks=(), **pool)
    row = np.zeros(1, np.int32)
    batch = StepBatch(
        seq_lens=row, query_start_loc=np.zeros(2, np.int32), input_ids=row, slot_mapping=row, request_slots=row,
        token_history=np.zeros((1, width), np.int32),
    )  # fmt: skip
    (bound,) = batch.validate([static], 1, 1, "cpu")
    found = narrow_history(static, bound)
    assert (found and found.end) == end
