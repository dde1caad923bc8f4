"""No agreement is made of this: arguments that do not go together, functions that do not do what they should."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import why_no_gpu
from rank_group import EVERY, WITHIN, Group, Rank, run

from kvcanary import BackendError, ConfigError, KvCanaryViolation, RankAgreement, RankStalledError
from kvcanary import agreement as agreement_module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every=0: give an integer from 1"),
        ({"every": True}, "every=True"),
        ({"within": 65}, "within=65: give an integer from 1 to 64"),
        ({"backend": "gloo"}, "choose one of auto, callable, nccl4py, cupy, mpi4py"),
        ({"backend": "callable"}, "these go together"),
        ({"allreduce_max": max, "backend": "cupy"}, "these go together"),
        ({"allreduce_max": max}, "without rank= and n_ranks="),
        ({"allreduce_max": max, "rank": 2, "n_ranks": 2}, "rank=2: give an integer from 0 to 1"),
        ({"allreduce_max": max, "rank": 0, "n_ranks": 0}, "n_ranks=0: give an integer from 1 to 65536"),
        ({"unique_id": bytes(128), "backend": "mpi4py"}, "the id is NCCL's"),
        ({"unique_id": bytes(128), "backend": "cupy"}, "unique_id without rank= and n_ranks="),
    ],
)
def test_arguments_that_do_not_go_together(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankAgreement(**given)


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU, and NCCL may be there too")
@pytest.mark.parametrize("backend", ["nccl4py", "cupy"])
def test_nccl_that_is_not_there_says_what_to_install(backend: str) -> None:
    with pytest.raises(BackendError, match=r"pip install|driver"):
        RankAgreement(unique_id=bytes(128), rank=0, n_ranks=1, backend=backend)
    with pytest.raises(BackendError, match="pip install"):
        RankAgreement.new_unique_id(backend)


# ---- functions that do not do what they should -----------------------------------------------------------------------
def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigError, match="allreduce_max=5: give a function"):
        RankAgreement(5, rank=0, n_ranks=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("returned", [None, True, 0, np.True_])
def test_a_function_that_does_not_say_whether_the_maximum_is_there_is_refused(returned: Any) -> None:
    with pytest.raises(ConfigError, match=r"allreduce_max returned .*: return a function without arguments"):
        RankAgreement(lambda _words, _stream: returned, rank=0, n_ranks=2)


@pytest.mark.parametrize("mode", ["raise", "log"])
def test_one_that_stops_saying_it_later_has_failed_when_it_is_due_and_no_step_before(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Any] = [lambda: True, None]  # of the settings, then of the first agreement
    agreement = RankAgreement(lambda _words, _stream: answers.pop(0), rank=0, n_ranks=1, every=EVERY, within=WITHIN)
    rank = Rank(agreement, mode=mode)
    run([rank], 3 * EVERY)
    assert not answers and agreement.is_broken and agreement.n_agreements == 0
    said = {step: str(error) for step, error in rank.raised.items()}
    assert list(said) == ([EVERY + WITHIN] if mode == "raise" else [])
    (text,) = said.values() or [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert f"step {EVERY + WITHIN}" in text and "failed on this rank (ConfigError: allreduce_max returned None" in text


def test_a_rank_that_waits_for_the_others_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement_module, "TELL_AFTER_S", 0.01)
    monkeypatch.setattr(agreement_module, "MAKE_TIMEOUT_S", 0.05)
    with pytest.raises(BackendError, match="not all of the 2 ranks made a RankAgreement"):
        RankAgreement(lambda words, stream: lambda: False, rank=0, n_ranks=2)
    assert "rank 0: waiting for all of the 2 ranks to make their RankAgreement" in caplog.text


NO_MAXIMUM = {
    "min": np.min,
    "sum": np.sum,
    "rank 1's": lambda brought, axis: brought[1],
    "rank 0's": lambda brought, axis: brought[0],
    "mean": lambda brought, axis: np.mean(brought, axis=axis).astype(np.int64),
    "or": lambda brought, axis: np.bitwise_or.reduce(brought, axis=axis),
    "zeros": lambda brought, axis: brought[0] * 0,
    "largest": lambda brought, axis: np.full_like(brought[0], np.iinfo(np.int64).max),
    "32 bits": lambda brought, axis: np.max(brought & 0xFFFF_FFFF, axis=axis),
    "random": lambda brought, axis: np.random.default_rng(brought).integers(0, 1 << 62, brought.shape[1]),
}


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("name", NO_MAXIMUM)
def test_what_is_no_maximum_is_refused_on_every_rank_when_it_is_made(name: str, n_ranks: int) -> None:
    group = Group(n_ranks)
    group.operation = NO_MAXIMUM[name]
    refused = []

    def one(rank: int) -> None:
        with pytest.raises(ConfigError, match=rf"rank {rank}: what allreduce_max does is no maximum .* gave back \["):
            RankAgreement(group.of(rank), rank=rank, n_ranks=n_ranks, every=EVERY, within=WITHIN)
        refused.append(rank)

    with ThreadPoolExecutor(n_ranks) as pool:
        list(pool.map(one, range(n_ranks)))
    assert sorted(refused) == list(range(n_ranks))


@pytest.mark.parametrize("mode", ["raise", "log"])
@pytest.mark.parametrize("name", [name for name in NO_MAXIMUM if name not in ("rank 0's", "or")])
def test_what_becomes_no_maximum_is_told_and_the_rank_that_saw_something_reports_it(
    name: str, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    group = Group()
    faulty, _healthy = ranks = [Rank(agreement, mode=mode) for agreement in group.make()]
    run(ranks, EVERY - 2)
    group.operation = NO_MAXIMUM[name]
    faulty.flip()
    run(ranks, WITHIN + 3)
    assert faulty.agreement.is_broken and len(faulty.manager.violations()) == 1
    assert "ranks count other steps" not in caplog.text and "worst and first" not in caplog.text
    if mode == "log":
        (text,) = {r.message for r in caplog.records if r.levelno == logging.ERROR and "rank 0" in r.message[:20]}
        assert "reasons=DATA" in caplog.text
    else:
        stalled, own = faulty.raised[EVERY + WITHIN], faulty.raised[EVERY + WITHIN + 1]
        assert isinstance(stalled, RankStalledError) and isinstance(own, KvCanaryViolation)
        text = str(stalled)
        assert own.violations == faulty.manager.violations()
    assert "no maximum over the ranks: it gave back [" in text and f"step {EVERY + WITHIN}" in text


def test_a_broadcast_of_another_rank_swallows_nothing() -> None:
    group = Group()
    healthy, faulty = ranks = [Rank(agreement) for agreement in group.make()]
    group.operation = NO_MAXIMUM["rank 0's"]
    run(ranks, 2)
    faulty.flip()
    run(ranks, EVERY + WITHIN - 1)
    assert [type(e) for e in faulty.raised.values()] == [RankStalledError, KvCanaryViolation]
    assert not healthy.raised  # it cannot tell: what it got is what it brought
    run([healthy], EVERY)
    assert [type(e) for e in healthy.raised.values()] == [RankStalledError]


def test_words_that_are_no_maximum_of_a_single_rank() -> None:
    def wrong(words: np.ndarray[Any, Any], stream: Any) -> Callable[[], bool]:
        words[:] = 1 << 62
        return lambda: True

    with pytest.raises(ConfigError, match="is no maximum over the ranks"):
        RankAgreement(wrong, rank=0, n_ranks=1)
