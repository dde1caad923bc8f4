"""Black boxes of which bytes, lines or values are not what a guarded process wrote."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager, StepBatch, layouts
from kvcanary.box_reader import read_box
from kvcanary.cli.explain import tell
from kvcanary.cli.explain_plot import map_pool
from kvcanary.story import as_json

from .source import Source

_ODD: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 2, 1 << 31, 1 << 40, 1 << 70, -(1 << 70), 0.5, -1.5, 1e300, float("nan"), float("inf")),
    *("", "x", "9" * 50, "\ud800", "a\nb", [], [1], [None], [[]], ["x"], {}, {"a": 1}, {"": None}, [{}], [1 << 70]),
)


def _batch(length: int) -> StepBatch:
    """A row's new token, its last, at slot 3 + length."""
    return StepBatch(
        block_table=np.array([[1, 2]], np.int32),
        seq_lens=np.array([length], np.int32),
        query_start_loc=np.array([0, 1], np.int32),
        input_ids=np.array([length], np.int32),
        slot_mapping=np.array([3 + length], np.int64),
        request_slots=np.zeros(1, np.int32),
        request_ids=np.ones(1, np.uint32),
    )


@cache
def written() -> tuple[bytes, ...]:
    """The lines of a box: a start, a finding of a flipped byte, a stall, counters, the end."""
    k = np.zeros((4, 4, 1, 8), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "box.jsonl"
        often = {"health_check_every_n_steps": 2, "health_check_warmup_steps": 2}
        config = CanaryConfig(black_box_path=str(path), verify_data_every=1, lifecycle=True, **often)
        with CanaryManager(config, [layouts.nhd(k=[k], page_size=4)], 1, 4) as manager:
            manager.allocate_blocks([1, 2], 1)
            for length in (1, 2, 3):
                with manager.step(), manager.forward(_batch(length)):
                    k[1, length - 1] = length
                k[1, 0] ^= length == 2
            for _ in range(3):  # no forward comes any more
                with manager.step():
                    pass
            manager.synchronize()
            assert manager.violations() and manager.stats().stalls_total
        return tuple(path.read_bytes().splitlines())


def _spoil_value(source: Source, line: bytes) -> bytes:
    """Somewhere in the line's JSON another value stands, or a name is gone."""
    found = json.loads(line)
    place: Any = found
    for _ in range(1 + source.below(7)):
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = source.choice(keys)
        if isinstance(place[key], (dict, list)) and source.below(4):
            place = place[key]
            continue
        if source.below(8) == 1:
            del place[key]
        else:
            place[key] = source.choice(_ODD)
        break
    return json.dumps(found).encode("utf-8", "surrogatepass")


def _spoiled(source: Source, lines: list[bytes]) -> list[bytes]:
    i, what = source.below(len(lines)), source.below(8)
    if what == 0:
        lines[i] = lines[i][: source.byte() * len(lines[i]) // 255]
    elif what == 1:
        lines.insert(i, source.some(source.below(40)))
    elif what == 2 and len(lines) > 1:
        del lines[i]
    elif what == 3:
        lines.insert(i, lines[source.below(len(lines))])
    elif what == 4 and lines[i]:
        line = bytearray(lines[i])
        line[source.byte() * len(line) // 256] = source.byte()
        lines[i] = bytes(line)
    else:
        try:
            lines[i] = _spoil_value(source, lines[i])
        except (ValueError, TypeError):  # spoiled before: no JSON any more, or of something else
            lines.reverse()
    return lines


def black_box(source: Source) -> None:
    """`kvcanary explain` over a file that is nearly a black box, or none at all."""
    n, whole = source.below(6), source.below(8) == 1
    lines = [source.rest()] if whole else list(written())
    for _ in range(0 if whole else n):
        lines = _spoiled(source, lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "box.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n" * source.below(2))
        box = read_box(path, skip_damaged=source.maybe())
        assert "\n".join(tell(box, box.runs))
        assert json.dumps([as_json(run) for run in box.runs])
        for run in box.runs:
            for pool in run.pools:
                map_pool(pool, [v for _, v in run.violations if v.pool_name == pool["name"]])
