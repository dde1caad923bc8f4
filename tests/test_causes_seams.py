"""Root causes that are told by what was written behind a substitution, and when."""

from __future__ import annotations

import numpy as np
import pytest
from engine import PAGE, ToyEngine
from test_causes_planted import causes, forward, ids, owned, sentences, toy

from kvcanary import CanaryManager, PoolKind, layouts
from kvcanary.manager import CanaryConfig


def windowed() -> ToyEngine:
    """An engine over one sliding-window pool."""
    engine = toy()
    engine.pool = layouts.nhd(k=engine.k, v=engine.v, page_size=PAGE, kind=PoolKind.SWA, window=6)
    engine.manager = CanaryManager(CanaryConfig(verify_data_every=1), [engine.pool], 4, 64)
    return engine


@pytest.mark.parametrize("lifecycle", [False, True])
def test_older_kv_in_front_of_what_was_written_later_is_another_table_entry(lifecycle: bool) -> None:
    """Request 2's block in the row of request 1, whose own first block still stands: no block has two owners."""
    engine = owned(0, 1) if lifecycle else toy()
    if lifecycle:
        engine.manager.share_blocks([4], 3)  # a prefix that others hold too: who may read it is not known
    forward(engine, (1, 0, 8))
    forward(engine, (0, 0, 10))
    forward(engine, (0, 10, 1), block_table=np.array([[4, 2, 3]], np.int32))
    found = causes(engine)
    assert found[0].class_id == "C07" and "the row did not name block 4 then" in found[0].evidence[0]
    assert not {"C01", "C03"} & set(ids(found)), sentences(found)


def test_younger_kv_in_front_of_what_was_written_before_is_no_table_entry() -> None:
    """Request 2 was given the first block of request 1, and wrote it while request 1 did not run."""
    engine = toy()
    forward(engine, (0, 0, 10))
    forward(engine, (1, 0, 4), block_table=np.array([[1, 5, 6]], np.int32), slot_mapping=np.arange(PAGE, 2 * PAGE))
    forward(engine, (0, 10, 1))
    found = causes(engine)
    assert found[0].class_id == "C03" and "C07" not in ids(found)
    assert "was running" not in sentences(found), "no record says since when"


@pytest.mark.parametrize("before", [0, 7], ids=["fresh block", "over older KV"])
def test_one_lost_write_in_a_window_is_also_named(before: int) -> None:
    engine = windowed()
    if before:
        forward(engine, (1, 0, before), block_table=np.array([[1, 2, 3]], np.int32), slot_mapping=4 + np.arange(before))
    forward(engine, (0, 0, 5))
    forward(engine, (0, 5, 1), slot_mapping=np.full(1, -1))
    forward(engine, (0, 6, 1))
    found = causes(engine)
    assert ids(found)[:2] == ["C19", "C09"]
    assert "a write that was lost leaves it" in sentences(found)
