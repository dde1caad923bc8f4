"""Records become violations that explain themselves, token ids stay inside, and the ring is read in order."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from base import POOL_NAMES, SECRET, RingWriter, make_record, make_state
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import abi
from kvcanary.tags import CanaryLaunchTag, Detail, Reason
from kvcanary.violations import READINGS, RingReader, Violation, decode, in_order, new_secret

CHAINS = {"stored_chain": 0x1111, "expected_chain": 0x2222}
STALE_TABLE: dict[str, Any] = {
    "step": 12,
    "forward": 14,
    "tag": CanaryLaunchTag.HEAD_K_FULL,
    "reasons": Reason.CHAIN | Reason.TOKEN,
    "pool": 0,
    "slot": 530,
    "position": 33,
    "row": 2,
    "request_id": 7,
    "request_slot": 3,
    "stored_token": 90210,
    "expected_token": 60606,
    "stored_position": 33,
    "prev_slot": 529,
    "stamp_owner": 9,
    "stamp_step": 11,
    **CHAINS,
}
BIT_FLIP: dict[str, Any] = {
    "step": 5,
    "forward": 5,
    "tag": CanaryLaunchTag.HEAD_V_FULL,
    "reasons": Reason.DATA,
    "slot": 18,
    "plane": 3,
    "position": 2,
    "row": 0,
    "request_id": 7,
    "request_slot": 3,
    "stored_digest": 0xAA,
    "found_digest": 0xBB,
    "stored_position": 2,
    "stamp_owner": 7,
    "stamp_step": 1,
}


def decode_one(log_tokens: bool = False, **fields: Any) -> Violation:
    (violation,) = decode(make_record(**fields), POOL_NAMES, SECRET, log_tokens)
    return violation


class TestDecode:
    def test_fields_arrive(self) -> None:
        violation = decode_one(log_tokens=True, **STALE_TABLE, flags=5, stamp_epoch=4)
        for name, value in STALE_TABLE.items():
            assert getattr(violation, name) == value, name
        assert (violation.flags, violation.stamp_epoch, violation.pool_name, violation.page_size) == (5, 4, "full", 16)
        assert isinstance(violation.tag, CanaryLaunchTag)
        assert isinstance(violation.reasons, Reason)
        assert violation.detail is Detail.SLOT

    def test_unknown_values_are_none(self) -> None:
        violation = decode_one(log_tokens=True, reasons=Reason.UNWRITTEN)
        assert (violation.plane, violation.plane_name, violation.layer) == (None, None, None)
        assert violation.stored_token is violation.expected_token is None
        assert violation.stored_chain is violation.expected_chain is None
        assert violation.stored_digest is violation.found_digest is None

    def test_plane_is_named(self) -> None:
        violation = decode_one(**BIT_FLIP)
        assert (violation.plane, violation.plane_name, violation.layer) == (3, "v.1", 1)

    def test_numbers_that_nobody_named_do_not_stop_the_report(self) -> None:
        violation = decode_one(reasons=Reason.DATA, pool=5, plane=9)
        assert "unknown-5" in violation.summary()
        assert "plane-9" in violation.summary()

    def test_order_is_kept(self) -> None:
        records = np.concatenate([make_record(slot=slot, reasons=1) for slot in (3, 1, 2)])
        assert [v.slot for v in decode(records, POOL_NAMES, SECRET, False)] == [3, 1, 2]


class TestRedaction:
    def test_token_ids_and_raw_chains_are_in_no_text(self) -> None:
        violation = decode_one(**STALE_TABLE)
        text = "\n".join([violation.summary(), violation.details(), repr(violation)])
        for secret_text in ("90210", "60606", "0x1111", "0x2222", str(0x1111), str(0x2222)):
            assert secret_text not in text
        assert violation.is_redacted
        assert violation.stored_token is violation.expected_token is None

    def test_chains_are_masked_but_comparable(self) -> None:
        violation = decode_one(**STALE_TABLE)
        twin = decode_one(**{**STALE_TABLE, "stored_chain": 0x2222})
        assert violation.stored_chain not in (0x1111, violation.expected_chain)
        assert twin.stored_chain == twin.expected_chain == violation.expected_chain
        # mix64(0x1111 ^ 0x0123456789ABCDEF), computed by hand in plain integers
        x = 0x1111 ^ SECRET
        for shift, factor in ((30, 13787848793156543929), (27, 10723151780598845931), (31, 1)):
            x = (x ^ x >> shift) * factor % 2**64
        assert violation.stored_chain == x

    def test_log_tokens_keeps_both(self) -> None:
        violation = decode_one(log_tokens=True, **STALE_TABLE)
        assert (violation.stored_chain, violation.stored_token) == (0x1111, 90210)
        assert "expected token 60606, found 90210" in violation.summary()
        assert "expected 60606, stored 90210" in violation.details()

    def test_secrets_differ(self) -> None:
        assert new_secret() != new_secret()


class TestText:
    def test_stale_table_reads_like_this(self) -> None:
        assert decode_one(**STALE_TABLE).summary() == (
            "reasons=CHAIN|TOKEN tag=HEAD_K_FULL step=12 forward=14 pool=full request=7 request_slot=3 row=2 "
            "position=33 slot=530 block=33:2: request 7 at position 33, slot 530 (block 33, offset 2): "
            "the slot holds the KV of another token than the request has at this position and "
            "the slot does not continue the text that this request has in front of it; "
            "its stamp says that request 9 (ANOTHER request) wrote it in forward 11 as position 33; "
            "likely another request's slot in the table row, or a wrong prefix hit; "
            "or a write of its own that was lost, over older KV"
        )

    def test_bit_flip_names_the_plane(self) -> None:
        summary = decode_one(**BIT_FLIP).summary()
        assert " slot=18 block=1:2 plane=v.1 layer=1: request 7 at position 2, " in summary
        assert "request 7 (the same request) wrote it in forward 1 as position 2" in summary

    def test_a_sweep_is_no_unnamed_request(self) -> None:
        summary = decode_one(**{**BIT_FLIP, "request_id": 0, "row": -1, "tag": CanaryLaunchTag.SWEEP_V_FULL}).summary()
        assert ": the sweep at position 2, slot 18 " in summary and "unnamed" not in summary

    def test_damage_in_shared_kv_names_who_wrote_it_and_accuses_nobody(self) -> None:
        shared = decode_one(**{**BIT_FLIP, "stamp_owner": 9}).summary()
        assert "its stamp says that request 9 (whose KV it shares) wrote it in forward 1 as position 2" in shared

    def test_details_hold_every_number(self) -> None:
        details = decode_one(log_tokens=True, **{**STALE_TABLE, **BIT_FLIP, "reasons": 4, "stamp_epoch": 77}).details()
        for text in (
            "step 5",
            "request slot 3",
            "pool 0 'full'",
            "layer 1",
            "epoch 77",
            "0x2222",
            "at write time 0xaa",
            "now 0xbb",
        ):
            assert text in details
        assert len(details.splitlines()) == 8

    def test_unwritten_slot_has_no_stamp(self) -> None:
        assert "the slot carries no stamp" in decode_one(reasons=Reason.UNWRITTEN, slot=40).summary()

    @pytest.mark.parametrize(
        ("detail", "key", "words"),
        [
            (Detail.TABLE_ENTRY, "table_entry=9999", "entry 9999"),
            (Detail.SLOT_MAPPING, "slot_mapping=9999", "slot_mapping value 9999"),
            (Detail.SEQ_LEN, "seq_len=9999", "seq_len 9999"),
            (Detail.QUERY_START_LOC, "query_end=9999", "end 9999"),
            (Detail.REQUEST_SLOT, "bad_request_slot=9999", "request slot 9999"),
        ],
    )
    def test_raw_values_are_not_called_slots(self, detail: Detail, key: str, words: str) -> None:
        violation = decode_one(reasons=Reason.OUT_OF_RANGE, detail=detail, slot=9999, stamp_step=3)
        summary = violation.summary()
        assert not violation.is_in_pool
        assert key in summary
        assert words in summary
        assert "block=" not in summary
        assert "stamp" not in summary

    def test_half_finished_write_is_explained(self) -> None:
        summary = decode_one(reasons=Reason.UNWRITTEN, detail=Detail.UNFINISHED, slot=3, stamp_step=2).summary()
        assert "HEAD and TAIL stamps come from different forwards" in summary
        assert "no KV was ever written" not in summary

    def test_every_reason_has_a_reading(self) -> None:
        assert set(READINGS) == set(Reason)

    @given(
        st.integers(0, 2 * max(Reason) - 1),
        st.sampled_from(Detail),
        st.sampled_from(CanaryLaunchTag),
        st.integers(-(2**63), 2**63 - 1),
        st.integers(-1, 5),
        st.booleans(),
    )
    def test_any_record_gives_one_line_that_names_its_reasons(
        self, reasons: int, detail: Detail, tag: CanaryLaunchTag, slot: int, plane: int, log_tokens: bool
    ) -> None:
        fields = {"reasons": reasons, "detail": detail, "tag": tag, "slot": slot, "plane": plane}
        violation = decode_one(log_tokens, **fields)
        assert "\n" not in violation.summary()
        for reason in Reason:
            is_named = reason.name in violation.summary().split(" ")[0].removeprefix("reasons=").split("|")
            assert is_named == bool(reasons & reason)
            is_told = violation._reading(reason)[0] in violation.summary()
            assert is_told or not reasons & reason


class TestRingReader:
    def test_quiet_ring_gives_nothing_and_stores_nothing(self) -> None:
        state = make_state()
        state.control.setflags(write=False)
        reader = RingReader(state.violation_log, state.control, 8)
        assert not reader.has_new
        assert len(reader.read()) == 0

    def test_order_holds_over_many_laps_and_record_0_stays(self) -> None:
        state = make_state(ring_capacity=3)
        reader, writer = RingReader(state.violation_log, state.control, 3), RingWriter(state)
        seen: list[int] = []
        for slot in range(20):
            writer.put(slot=slot)
            if slot % 3 == 2:
                seen += reader.read()["slot"].tolist()
        seen += reader.read()["slot"].tolist()
        assert seen == list(range(20))
        assert state.violation_log[0]["slot"] == 0
        assert state.words[abi.STATE_DROPPED] == 0

    def test_read_publishes_room_only_after_the_copy(self) -> None:
        state = make_state(ring_capacity=2)
        reader, writer = RingReader(state.violation_log, state.control, 2), RingWriter(state)
        for slot in range(5):
            writer.put(slot=slot)
        assert state.words[abi.STATE_DROPPED] == 3
        records = reader.read()
        assert state.control[abi.CONTROL_READ] == reader.n_read == 2
        writer.put(slot=7)
        assert records["slot"].tolist() == [0, 1]
        assert reader.read()["slot"].tolist() == [7]

    def test_claimed_but_incomplete_record_stops_the_reader(self) -> None:
        state = make_state()
        reader, writer = RingReader(state.violation_log, state.control, 8), RingWriter(state)
        first, second = writer.claim(), writer.claim()
        assert first is not None
        assert second is not None
        writer.commit(second, make_record(slot=2))
        assert len(reader.read()) == 0
        writer.commit(first, make_record(slot=1))
        assert reader.read()["slot"].tolist() == [1, 2]

    def test_alarm_is_only_a_hint(self) -> None:
        state = make_state()
        reader, writer = RingReader(state.violation_log, state.control, 8), RingWriter(state)
        writer.put(slot=1)
        state.control[abi.CONTROL_ALARM] = 0
        assert reader.read()["slot"].tolist() == [1]
        state.control[abi.CONTROL_ALARM] = 99
        assert len(reader.read()) == 0

    def test_limit(self) -> None:
        state = make_state()
        reader, writer = RingReader(state.violation_log, state.control, 8), RingWriter(state)
        for slot in range(5):
            writer.put(slot=slot)
        assert reader.read(limit=2)["slot"].tolist() == [0, 1]
        assert reader.read(limit=0)["slot"].tolist() == []
        assert reader.read()["slot"].tolist() == [2, 3, 4]

    def test_second_reader_continues(self) -> None:
        state = make_state()
        writer = RingWriter(state)
        writer.put(slot=1)
        RingReader(state.violation_log, state.control, 8).read()
        writer.put(slot=2)
        assert RingReader(state.violation_log, state.control, 8).read()["slot"].tolist() == [2]

    @given(
        st.integers(1, 5),
        st.lists(st.sampled_from(["claim", "commit first", "commit last", "read", "read 1"]), max_size=80),
    )
    def test_each_complete_record_once_and_in_order(self, capacity: int, actions: list[str]) -> None:
        state = make_state(ring_capacity=capacity)
        reader, writer = RingReader(state.violation_log, state.control, capacity), RingWriter(state)
        open_claims: deque[int] = deque()
        n_claimed = n_read = 0
        for action in actions:
            if action == "claim":
                claim = writer.claim()
                assert (claim is None) == (n_claimed - n_read >= capacity)
                if claim is not None:
                    open_claims.append(claim)
                    n_claimed += 1
            elif action.startswith("commit") and open_claims:
                claim = open_claims.popleft() if action == "commit first" else open_claims.pop()
                writer.commit(claim, make_record(slot=claim))
            elif action.startswith("read"):
                complete = min(open_claims, default=n_claimed)
                expected = list(range(n_read, complete))[: 1 if action == "read 1" else None]
                assert reader.read(1 if action == "read 1" else None)["slot"].tolist() == expected
                n_read += len(expected)
                assert state.control[abi.CONTROL_READ] == n_read


def test_the_records_of_a_forward_have_an_order_of_their_own() -> None:
    """On a GPU they stand in the ring as its threads came."""
    rng = np.random.default_rng(0)
    records = np.zeros(60, abi.VIOLATION)
    for name, high in (("tag", 20), ("row", 4), ("position", 9), ("slot", 40), ("reasons", 3), ("plane", 2)):
        records[name] = rng.integers(0, high, 60)
    records["forward"] = records["step"] = np.repeat([1, 2], 30)
    wanted = in_order(records)
    assert wanted["forward"].tolist() == [1] * 30 + [2] * 30
    stages = wanted["tag"][:30] // 4
    assert stages.tolist() == sorted(stages)
    for _ in range(20):
        assert in_order(rng.permutation(records)).tobytes() == wanted.tobytes()
