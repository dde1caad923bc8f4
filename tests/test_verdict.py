"""A verdict in one word: of several ranks' words the greatest is the one that should be heard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import RankVerdict, Reason, Severity
from kvcanary.verdict import FEWEST, MAX_RANK, MOST, N_WORDS, StepCount, fill_words, read_words

ALL_REASONS = sum(Reason)
REASONS = st.integers(1, ALL_REASONS).map(Reason)
VERDICTS = st.builds(
    lambda reasons, step, rank: RankVerdict(Severity.of(reasons), step, rank, reasons),
    REASONS,
    st.integers(0, (1 << 32) - 1),
    st.integers(0, MAX_RANK),
)


@given(VERDICTS)
def test_a_word_says_what_was_put_in_and_is_the_same_as_i64_and_u64(verdict: RankVerdict) -> None:
    word = verdict.as_word()
    assert 0 < word < 1 << 63
    assert RankVerdict.of_word(word) == verdict


@given(st.lists(VERDICTS, min_size=2, max_size=5, unique_by=lambda v: v.rank))
def test_the_greatest_word_is_the_worst_then_the_earliest_then_of_the_lowest_rank(verdicts: list[RankVerdict]) -> None:
    wanted = min(verdicts, key=lambda v: (-v.severity, v.step, v.rank))
    assert RankVerdict.of_word(max(v.as_word() for v in verdicts)) == wanted


def test_a_word_by_hand() -> None:
    verdict = RankVerdict(Severity.READ, 5, 1, Reason.DATA | Reason.TOKEN)
    assert verdict.as_word() == 0b011 << 60 | 0xFFFF_FFFA << 28 | 0xFFFE << 12 | 0b10_0100


def test_nothing_seen_is_zero_and_loses_against_everything() -> None:
    assert RankVerdict().as_word() == 0 and RankVerdict.of_word(0) == RankVerdict()
    latest = RankVerdict(Severity.RESERVED, (1 << 40), MAX_RANK, Reason.NONFINITE_RESERVED)
    assert latest.as_word() > 0 and RankVerdict.of_word(latest.as_word()).step == (1 << 32) - 1


def test_every_reason_has_its_bit_in_the_word_and_its_severity() -> None:
    assert ALL_REASONS < 1 << 12, "the word has 12 bits for reasons: widen the field"
    of = {reason.name: Severity.of(reason) for reason in Reason}
    assert {name for name, s in of.items() if s is Severity.RESERVED} == {"NONFINITE_RESERVED"}
    assert {name for name, s in of.items() if s is Severity.WRITE} == {
        "WRITE_TOKEN",
        "WRITE_POSITION",
        "FOREIGN_WRITE",
        "DUPLICATE_WRITE",
    }
    assert Severity.of(Reason(0)) is Severity.NONE
    assert Severity.of(Reason.WRITE_TOKEN | Reason.DATA) is Severity.READ


@pytest.mark.parametrize(("counts", "most", "fewest"), [((7, 7, 7), (7, 0), (7, 0)), ((7, 9, 8), (9, 1), (7, 0))])
def test_a_maximum_tells_who_has_the_most_steps_and_who_the_fewest(
    counts: tuple[int, ...], most: tuple[int, int], fewest: tuple[int, int]
) -> None:
    words = np.zeros((len(counts), N_WORDS), np.int64)
    for rank, n in enumerate(counts):
        fill_words(words[rank], 0, StepCount(n, rank))
    verdict, *told = read_words(words.max(axis=0))
    assert verdict == RankVerdict()
    assert [tuple(t) for t in told] == [most, fewest]
    assert (words[:, [MOST, FEWEST]] > 0).all()
