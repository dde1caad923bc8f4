"""What `kvcanary explain` is given in its tests: a black box of three runs, and findings made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from base import POOL_NAMES, SECRET, make_record
from engine import ToyEngine

from kvcanary import Reason
from kvcanary.tags import Detail
from kvcanary.violations import Violation, decode


def violation(**fields: Any) -> Violation:
    return decode(make_record(**{"reasons": Reason.DATA, "detail": Detail.SLOT, **fields}), POOL_NAMES, SECRET, False)[
        0
    ]


@pytest.fixture(name="box")
def three_runs(tmp_path: Path) -> Path:
    """Three runs: an honest one, a flipped bit, and a request that read another one's row."""
    path = tmp_path / "box.jsonl"

    def engine(seed: int) -> ToyEngine:
        return ToyEngine(verify_data_every=1, black_box_path=str(path), ring_capacity=64, seed=seed)

    honest = engine(0)
    honest.step((0, 0, 6))
    honest.manager.close()
    flipped = engine(1)
    flipped.step((0, 0, 6), (1, 0, 3))
    flipped.k[1][1, 1, 0, 0] ^= np.uint8(1)
    for p in (6, 7):
        flipped.step((0, p, 1), (1, p - 3, 1))
    flipped.manager.close()
    crossed = engine(2)
    crossed.step((0, 0, 8), (1, 0, 8))
    batch = crossed.batch((0, 8, 1), (1, 8, 1))
    batch.block_table[0] = batch.block_table[1]
    with crossed.manager.step(), crossed.manager.forward(batch):
        crossed.write(batch)
    crossed.manager.close()
    return path
