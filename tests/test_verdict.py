"""A verdict in one word: of several ranks' words the greatest is the one that should be heard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import RankVerdict, Reason, Severity
from kvcanary.verdict import (
    FEWEST,
    MAX_RANK,
    MOST,
    N_WORDS,
    VERDICT,
    StepCount,
    fill_test_words,
    fill_words,
    is_maximum,
    is_test_maximum,
    read_words,
)

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


COUNTS = st.integers(0, (1 << 47) - 1)


@given(st.lists(st.tuples(st.none() | VERDICTS, COUNTS), min_size=1, max_size=5))
def test_every_rank_takes_the_maximum_of_what_all_brought_for_one(seen: list[tuple[RankVerdict | None, int]]) -> None:
    n_ranks = len(seen)
    brought, tests = np.zeros((n_ranks, N_WORDS), np.int64), np.zeros((n_ranks, N_WORDS), np.int64)
    for rank, (verdict, n) in enumerate(seen):
        word = verdict._replace(rank=rank).as_word() if verdict else 0
        fill_words(brought[rank], word, StepCount(n, rank))
        fill_test_words(tests[rank], StepCount(n, rank))
    for rank in range(n_ranks):
        assert is_maximum(brought.max(axis=0), brought[rank], rank, n_ranks)
        assert is_test_maximum(tests.max(axis=0), tests[rank], rank, n_ranks)
        for place in range(N_WORDS):  # below this rank's own
            less = brought.max(axis=0)
            less[place] = brought[rank, place] - 1
            assert not is_maximum(less, brought[rank], rank, n_ranks)


@pytest.mark.parametrize(
    ("place", "word"),
    [
        (VERDICT, RankVerdict(Severity.READ, 5, 2, Reason.DATA).as_word()),  # there is no rank 2
        (VERDICT, RankVerdict(Severity.READ, 5, 0, Reason.DATA).as_word()),  # this rank did not bring it
        (VERDICT, RankVerdict(Severity.WRITE, 5, 1, Reason.DATA).as_word()),  # reasons of another severity
        (VERDICT, RankVerdict(Severity.READ, 5, 1, Reason(0)).as_word()),
        (VERDICT, 0b111 << 60 | 0xFFFE << 12 | 1),
        (VERDICT, 1),
        (MOST, 9 << 16 | 0xFFFD),
        (MOST, 9 << 16 | 0xFFFF),
        (FEWEST, ((1 << 47) - 1) << 16 | 0xFFFD),
    ],
)
def test_a_word_that_no_rank_can_have_brought_is_no_maximum(place: int, word: int) -> None:
    brought = np.zeros(N_WORDS, np.int64)
    fill_words(brought, 0, StepCount(7, 0))
    given = brought.copy()
    assert is_maximum(given, brought, 0, 2)
    given[place] = word
    assert not is_maximum(given, brought, 0, 2)
