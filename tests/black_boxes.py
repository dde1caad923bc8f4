"""A toy engine that writes a black box, and what is in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from engine import PAGE, ToyEngine


def flip(engine: ToyEngine, layer: int = 1, slot: int = 5) -> None:
    engine.k[layer][slot // PAGE, slot % PAGE, 0, 0] ^= np.uint8(1)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flushed(engine: ToyEngine) -> None:
    assert engine.manager._box is not None
    assert engine.manager._box.flush(10)


def damaged(path: Path, **config: Any) -> ToyEngine:
    """A run of three steps with a flipped bit; all is written."""
    engine = ToyEngine(**{"verify_data_every": 1, "black_box_path": str(path), **config})
    engine.step((0, 0, 6), (1, 0, 3))
    flip(engine)
    engine.step((0, 6, 1), (1, 3, 1))
    engine.step((0, 7, 1), (1, 4, 1))
    flushed(engine)
    return engine
