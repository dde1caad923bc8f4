"""Records become violations that explain themselves, and token ids stay inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from base import POOL_NAMES, SECRET, make_record
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.tags import CanaryLaunchTag, Detail, Reason
from kvcanary.violations import READINGS, Violation, decode, new_secret

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
