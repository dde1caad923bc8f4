"""What ranks tell each other: a verdict in one word, of which the greatest wins."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary.tags import Reason

_STEP_BITS, _RANK_BITS, _REASON_BITS, _COUNT_BITS = 32, 16, 12, 47
_MAX_STEP, _MAX_REASONS, _MAX_COUNT = (1 << _STEP_BITS) - 1, (1 << _REASON_BITS) - 1, (1 << _COUNT_BITS) - 1
MAX_RANK = (1 << _RANK_BITS) - 1
TEST_FACTOR = 0x3A5C_96E1_B2D7  # odd, 46 bits: no sum, bitwise operation or cut to 32 bits hits a multiple by chance
VERDICT, MOST, FEWEST, N_WORDS = 0, 1, 2, 3  # places in the reduced array
_OF_WRITES = Reason.WRITE_TOKEN | Reason.WRITE_POSITION | Reason.FOREIGN_WRITE | Reason.DUPLICATE_WRITE


class Severity(IntEnum):
    """How bad what a rank has seen is: of several findings, and of several ranks, the worst one counts.

    Attributes:
        NONE: nothing new.
        RESERVED: a reserved block is not finite: rows whose kernel gathers it are spoiled, the KV is right.
        WRITE: a write went, or will go, where it should not.
        READ: what a request reads is not what was written for it.
    """

    NONE = 0
    RESERVED = 1
    WRITE = 2
    READ = 3

    @classmethod
    def of(cls, reasons: Reason) -> Severity:
        """The worst of some reasons; a reason that is of no other kind counts as READ."""
        if reasons & ~(_OF_WRITES | Reason.NONFINITE_RESERVED):
            return cls.READ
        return cls.WRITE if reasons & _OF_WRITES else cls.RESERVED if reasons else cls.NONE


class RankVerdict(NamedTuple):
    """The worst that any rank has newly seen; all zero when no rank has seen anything.

    Reasons of several ranks cannot be OR-ed by a maximum, so the word is ordered by who should be heard, and the
    reasons of that rank ride behind what decides:

    - bits 62 to 60, severity: the worse finding has the greater word;
    - bits 59 to 28, 2^32 - 1 - step: of these, the earlier first sighting;
    - bits 27 to 12, 2^16 - 1 - rank: of these, the lower rank;
    - bits 11 to 0, reasons: two ranks never come here with one word.

    Bit 63 stays 0, so that a maximum over i64 and one over u64 are the same; 0 is "nothing seen".

    Attributes:
        severity: of the finding that won.
        step: at which its rank first saw something as bad, since the agreement before; at most 2^32 - 1.
        rank: which one.
        reasons: of that sighting, on that rank.
    """

    severity: Severity = Severity.NONE
    step: int = 0
    rank: int = 0
    reasons: Reason = Reason(0)

    def as_word(self) -> int:
        """The word of this verdict."""
        if not self.severity:
            return 0
        fields = (
            (self.severity, _STEP_BITS + _RANK_BITS + _REASON_BITS),
            (_MAX_STEP - min(self.step, _MAX_STEP), _RANK_BITS + _REASON_BITS),
            (MAX_RANK - self.rank, _REASON_BITS),
            (self.reasons & _MAX_REASONS, 0),
        )
        return sum(int(value) << shift for value, shift in fields)

    @classmethod
    def of_word(cls, word: int) -> RankVerdict:
        """The verdict of a word."""
        if not word:
            return cls()
        reasons, rest = Reason(word & _MAX_REASONS), word >> _REASON_BITS
        rank, rest = MAX_RANK - (rest & MAX_RANK), rest >> _RANK_BITS
        return cls(Severity(rest >> _STEP_BITS), _MAX_STEP - (rest & _MAX_STEP), rank, reasons)


class StepCount(NamedTuple):
    """How many steps a rank has made."""

    n: int
    rank: int


def fill_words(words: npt.NDArray[np.int64], verdict_word: int, count: StepCount) -> None:
    """What one rank brings to a maximum: its verdict and its step count, once for the most and once for the fewest.

    Args:
        words: i64[N_WORDS], overwritten.
    """
    low = MAX_RANK - count.rank
    words[VERDICT] = verdict_word
    words[MOST] = count.n << _RANK_BITS | low
    words[FEWEST] = (_MAX_COUNT - count.n) << _RANK_BITS | low


def read_words(words: npt.NDArray[np.int64]) -> tuple[RankVerdict, StepCount, StepCount]:
    """The verdict that won, the rank with the most steps and the one with the fewest (of equal ones, the lowest)."""
    verdict, most, fewest = (int(word) for word in words)
    return (
        RankVerdict.of_word(verdict),
        StepCount(most >> _RANK_BITS, MAX_RANK - (most & MAX_RANK)),
        StepCount(_MAX_COUNT - (fewest >> _RANK_BITS), MAX_RANK - (fewest & MAX_RANK)),
    )


def fill_test_words(words: npt.NDArray[np.int64], count: StepCount) -> None:
    """What one rank brings to the first maximum, of which each rank knows the verdict word beforehand.

    Args:
        words: i64[N_WORDS], overwritten.
    """
    fill_words(words, (count.rank + 1) * TEST_FACTOR, count)


def is_test_maximum(given: npt.NDArray[np.int64], brought: npt.NDArray[np.int64], rank: int, n_ranks: int) -> bool:
    """Whether ``given`` can be the maximum of all ranks' test words; wrong ones are seen by every rank."""
    if int(given[VERDICT]) != n_ranks * TEST_FACTOR or not _are_counts(given, brought, rank, n_ranks):
        return False
    _verdict, most, fewest = read_words(np.array([0, given[MOST], given[FEWEST]], np.int64))
    return most.n > fewest.n or most.rank == fewest.rank == 0


def is_maximum(given: npt.NDArray[np.int64], brought: npt.NDArray[np.int64], rank: int, n_ranks: int) -> bool:
    """Whether ``given`` can be a maximum of words of `n_ranks` ranks to which `rank` has brought ``brought``.

    No word is below this rank's own, each is one that a rank can have brought, and one that names this rank is its own.
    A wrong one may pass on a rank that has brought the least.

    Args:
        given: i64[N_WORDS]; brought: likewise.
    """
    word = int(given[VERDICT])
    if word < int(brought[VERDICT]) or not _are_counts(given, brought, rank, n_ranks):
        return False
    if not word:
        return True
    if word >> (_STEP_BITS + _RANK_BITS + _REASON_BITS) > max(Severity):
        return False
    verdict = RankVerdict.of_word(word)
    if verdict.severity is not Severity.of(verdict.reasons) or not verdict.severity:
        return False
    return verdict.rank < n_ranks and (verdict.rank != rank or word == int(brought[VERDICT]))


def _are_counts(given: npt.NDArray[np.int64], brought: npt.NDArray[np.int64], rank: int, n_ranks: int) -> bool:
    """Whether the two words of the step counts can be."""
    for place in (MOST, FEWEST):
        word, own = int(given[place]), int(brought[place])
        whose = MAX_RANK - (word & MAX_RANK)
        if word < own or whose >= n_ranks or (whose == rank and word != own):
            return False
    return True
