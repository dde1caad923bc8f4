"""The log as JSON objects, and violations as JSON: nothing is lost on the way, and tokens stay withheld."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import numpy as np
import pytest
from base import POOL_NAMES, SECRET, make_record
from engine import PAGE, ToyEngine
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import BlackBoxError, Reason, abi
from kvcanary.log_lines import ErrorLog
from kvcanary.observers.stats import STATS_LINE
from kvcanary.records import as_dict, from_dict
from kvcanary.tags import CanaryLaunchTag, Detail
from kvcanary.violations import Violation, decode

CHAIN = st.integers(0, (1 << 64) - 1)
ID = st.integers(0, (1 << 32) - 1)
INT = st.integers(-(1 << 31), (1 << 31) - 1)


@st.composite
def violations(draw: st.DrawFn) -> Violation:
    """Any violation that a record of the device may decode to."""
    detail = draw(st.sampled_from(Detail))
    fields: dict[str, Any] = {
        "tag": draw(st.sampled_from(CanaryLaunchTag)),
        "reasons": draw(st.integers(1, (1 << len(Reason)) - 1)),
        "detail": detail,
        "pool": draw(st.integers(0, 2)),
        "plane": draw(st.integers(0, 3) if detail == Detail.RESERVED else st.integers(-1, 5)),
        **{name: draw(CHAIN) for name in ("stored_chain", "expected_chain", "stored_digest", "found_digest")},
        **{name: draw(INT) for name in ("slot", "position", "row", "stored_token", "expected_token", "prev_slot")},
        **{name: draw(ID) for name in ("step", "forward", "request_id", "stamp_owner", "stamp_step", "block_owner")},
    }
    (violation,) = decode(make_record(**fields), POOL_NAMES, SECRET, draw(st.booleans()))
    return violation


@given(violations())
def test_a_violation_comes_back_as_it_was(violation: Violation) -> None:
    assert from_dict(json.loads(json.dumps(as_dict(violation)))) == violation


def test_numbers_of_64_bits_are_text() -> None:
    record = make_record(reasons=Reason.DATA, stored_digest=(1 << 64) - 1, found_digest=1, detail=Detail.SLOT)
    (violation,) = decode(record, POOL_NAMES, SECRET, True)
    found = as_dict(violation)
    assert (found["stored_digest"], found["found_digest"], found["reasons"]) == ("0xffffffffffffffff", "0x1", ["DATA"])
    assert max(v for v in found.values() if type(v) is int) < 1 << 53


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": None}, "without 'slot'"),
        ({"slot": "many"}, "slot='many': not a number"),
        ({"slot": float("inf")}, "slot=inf: not a number"),
        ({"step": 1 << 70}, "not a number of 64 bits"),
        ({"tag": "HEAD_Q"}, "HEAD_Q"),
        ({"reasons": ["BAD_LUCK"]}, "BAD_LUCK"),
        ({"reasons": 4}, "no valid"),
        ({"stored_digest": "0xzz"}, "stored_digest='0xzz'"),
    ],
)
def test_what_is_no_violation_is_refused(change: dict[str, Any], message: str) -> None:
    (violation,) = decode(make_record(reasons=4, stored_digest=5), POOL_NAMES, SECRET, False)
    with pytest.raises(BlackBoxError, match=message):
        from_dict({**as_dict(violation), **change})


class TestLog:
    def run(self, caplog: pytest.LogCaptureFixture, **config: Any) -> tuple[ToyEngine, list[dict[str, Any]]]:
        """A run with a flipped bit and a substituted table row; its log lines of one logger, each parsed."""
        caplog.set_level(logging.DEBUG, "kvcanary")
        settings = {"verify_data_every": 1, "stats_print_every_n_steps": 2, "log_format": "json", **config}
        engine = ToyEngine(**settings)
        engine.step((0, 0, 6), (1, 0, 6))
        engine.k[1][1, 1, 0, 0] ^= 1
        engine.step((0, 6, 1), (1, 6, 1))
        batch = engine.batch((0, 7, 1), (1, 7, 1))
        batch.block_table[0] = batch.block_table[1]
        with engine.manager.step(), engine.manager.forward(batch):
            engine.write(batch)
        records = [r for r in caplog.records if r.name == "kvcanary"]
        lines = [json.loads(record.getMessage()) for record in records]
        assert [line["level"] for line in lines] == [record.levelname for record in records]
        return engine, lines

    def test_every_line_is_an_object_and_violations_are_whole(self, caplog: pytest.LogCaptureFixture) -> None:
        start = time.time()
        engine, lines = self.run(caplog)
        assert {line["event"] for line in lines} == {"violation", "stats"}
        assert all(start - 1 <= line["time"] <= time.time() + 1 for line in lines)
        found = engine.manager.violations()
        first = next(line for line in lines if line["event"] == "violation")
        assert from_dict(first) == found[0] and first["message"] == f"[canary] violation {found[0].summary()}"
        assert "last_position" not in first
        assert (first["slot"], first["layer"], first["reasons"], first["request_id"]) == (5, 1, ["DATA"], 1)

    def test_a_run_of_equal_findings_is_one_object_that_says_how_far_it_goes(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, lines = self.run(caplog)
        runs = [line for line in lines if "last_position" in line]
        assert runs and all(line["last_position"] - line["position"] >= 3 for line in runs)
        assert all("THE SAME AT" in line["message"] and line["last_slot"] > line["slot"] for line in runs)

    def test_tokens_and_chains_are_withheld_unless_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        engine, lines = self.run(caplog)
        assert not any("stored_token" in line or "expected_token" in line for line in lines)
        caplog.clear()
        engine, lines = self.run(caplog, log_tokens=True)
        tokens = {line["stored_token"] for line in lines if line["event"] == "violation" and "TOKEN" in line["reasons"]}
        assert tokens and tokens <= set(engine.history[1].tolist())

    def test_the_stats_line_has_its_numbers_and_its_text(self, caplog: pytest.LogCaptureFixture) -> None:
        engine, lines = self.run(caplog)
        (stats,) = [line for line in lines if line["event"] == "stats"]
        names = ("step", "protected_tokens", "sweep_passes", "violations", "launch_tags_active", "launch_tags")
        assert stats["message"] == STATS_LINE % tuple(stats[name] for name in names)
        assert (stats["step"], stats["launch_tags_active"], stats["launch_tags"]) == (2, 4, 4)
        assert stats["protected_tokens"] == engine.manager.stats().protected_tokens

    def test_a_stall_names_its_tags(self, caplog: pytest.LogCaptureFixture) -> None:
        engine, _ = self.run(caplog, health_check_every_n_steps=2, health_check_warmup_steps=2, health_policy="log")
        caplog.clear()
        for _ in range(6):
            with engine.manager.step():
                pass
        lines = [json.loads(record.getMessage()) for record in caplog.records]
        stall = next(line for line in lines if line["event"] == "stall")
        assert stall["state"] == "stalled" and ["full", "HEAD_K_FULL"] in stall["tags"] and stall["level"] == "ERROR"
        assert "no launch of" in stall["message"]

    def test_dropped_records_and_a_flood_are_objects_too(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "kvcanary")
        engine = ToyEngine(verify_data_every=1, log_format="json", ring_capacity=30)
        engine.step((0, 0, 8), (1, 0, 8))
        for layer in (*engine.k, *engine.v):
            layer[:, ::2, 0, 0] ^= 1  # every other slot: nothing to fold
        engine.step((0, 8, 1), (1, 8, 1))
        engine.manager.synchronize()
        lines = {line["event"]: line for line in (json.loads(r.getMessage()) for r in caplog.records)}
        assert lines["more_violations"]["more"] > 0
        assert lines["dropped"]["dropped_total"] == int(engine.manager.backend.snapshot_words()[abi.STATE_DROPPED]) > 0

    def test_text_is_the_default_and_as_it_was(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "kvcanary")
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        engine.k[1][1, 1, 0, 0] ^= np.uint8(1)
        assert 1 * PAGE + 1 == 5
        engine.step((0, 6, 1))
        (record,) = caplog.records
        assert record.getMessage() == f"[canary] violation {engine.manager.violations()[0].summary()}"


def test_errors_of_a_kind_are_counted_and_logged_ever_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    log = ErrorLog()

    def note(error: Exception, *args: object) -> None:
        def fail() -> None:
            raise error

        try:
            fail()
        except Exception:  # noqa: BLE001  both kinds
            log.note("%s raised", *args)

    for _ in range(9):
        note(ValueError("v"), "a")
    note(KeyError("k"), "a")
    note(ValueError("v"), "b")
    again = "; the 1st, 2nd, 4th, 8th, ... are logged)"
    assert [r.getMessage() for r in caplog.records] == [
        "a raised", f"a raised (2 times so far{again}", f"a raised (4 times so far{again}",
        f"a raised (8 times so far{again}", "a raised", "b raised",
    ]  # fmt: skip
    assert log.n == 11 and all(r.exc_info for r in caplog.records)


def test_what_has_no_hash_may_raise_too(caplog: pytest.LogCaptureFixture) -> None:
    class Callback:
        __hash__ = None  # type: ignore[assignment]

        def __repr__(self) -> str:
            raise OSError("not even that")

    log, callback = ErrorLog(), Callback()
    for _ in range(2):
        try:
            {}["x"]
        except KeyError:
            log.note("%r raised", callback)
    assert log.n >= 2
