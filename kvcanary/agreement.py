"""Several ranks, one verdict: all of them log, or raise, at the same step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcanary.config import CanaryConfig
from kvcanary.errors import (
    BackendError,
    CanaryStalledError,
    ConfigError,
    KvCanaryError,
    PhaseError,
    RankStalledError,
)
from kvcanary.log_lines import line
from kvcanary.observers.facts import StepFacts
from kvcanary.observers.violations import ViolationObserver
from kvcanary.reducers import AllreduceMax, make_reducer, wait_for
from kvcanary.tags import Reason
from kvcanary.verdict import (
    N_WORDS,
    RankVerdict,
    Severity,
    StepCount,
    fill_test_words,
    fill_words,
    is_maximum,
    is_test_maximum,
    read_words,
)
from kvcanary.violations import Violation

logger = logging.getLogger("kvcanary")

MAKE_TIMEOUT_S = 300.0
TELL_AFTER_S = 5.0  # that a rank waits for the others
_MEANING = {
    Severity.RESERVED: "a reserved block is not finite",
    Severity.WRITE: "a write went where it should not",
    Severity.READ: "a request reads what was not written for it",
}


class RankAgreement:
    """Tells all ranks of a lockstep group (tensor, pipeline, expert parallel) what any of them has seen.

    Every ``every`` steps each rank brings the worst that it has newly seen, as one word, to a maximum over all ranks
    (`kvcanary.verdict.RankVerdict`). It runs beside the engine: outside its graphs, on a stream and a communicator of
    our own, and nobody waits for it. What was begun at step T is *required* at step T + ``within``, and delivered
    there, not before, on every rank: so all of them log the same line, or raise `KvCanaryViolation` in mode "raise", at
    the same step. What a rank sees itself it logs at once, and raises no earlier. ``every + within`` steps after a
    sighting, at most, all ranks know.

    A rank that died, hangs or has fallen behind does not come. What is not complete at step T + ``within`` counts as
    stalled: `RankStalledError`, raised or logged like a stall of the guard itself (``health_policy``), on all ranks
    that are there, and from then on each rank is on its own (`is_broken`). A rank that comes with another number of
    steps is reported, by an ERROR line on all ranks: they would not raise at the same step of the engine.

    Steps that count here are those with a forward: not the ones marked idle, but also those that the engine's exception
    ended, as the other ranks have ended them. An error that falls due in such a step is raised by the next one.

    All ranks make this object, attach it (`CanaryManager.attach_agreement`) and close it at the same points of the
    program and in the same order, with the same ``every`` and ``within``; making it waits for all of them. The first of
    these that has what it needs carries out the maximum, unless ``backend`` names one:

    - "callable": ``allreduce_max(words, stream)`` of the engine. With ``device``: i64[3] on that GPU (CuPy), to be
      replaced by its maximum on ``stream`` (ours, of cuda.core), without waiting. Without: a NumPy i64[3]; it returns
      what says, when called, whether the maximum is there. What it returns else is refused when this object is made,
      and so is another operation than the maximum (MIN, SUM, a broadcast), on every rank. When it does so or raises
      later on, or gives back what can be no maximum, the agreement has failed on this rank: `RankStalledError` when it
      is due, and this rank reports what it sees itself.
    - "nccl4py": NCCL through its own Python package; needs ``unique_id``, or ``comm`` to send it round.
    - "cupy": NCCL through ``cupy.cuda.nccl``; likewise.
    - "mpi4py": ``MPI_Iallreduce`` on a duplicate of ``comm``, in host memory.

    NCCL and a function over GPU memory hold one multiprocessor while ranks wait for each other, and whoever waits for
    the whole device waits for them too. With ``CUDA_DEVICE_MAX_CONNECTIONS=1``, kernels that need every multiprocessor
    at once, or an engine that synchronizes its device, take a backend on the host.

    Args:
        allreduce_max: see above; with ``rank`` and ``n_ranks``.
        rank: of this process, 0 to ``n_ranks`` - 1; MPI knows them itself.
        unique_id: what `new_unique_id` gave to one rank, and the engine took to all.
        comm: an ``mpi4py`` communicator; None = ``COMM_WORLD``.
        backend: one of the list, the same on all ranks; "auto" takes NCCL only with a ``unique_id``.
        device: CUDA device; None = the current one for NCCL, host memory for ``allreduce_max``.
        every: steps from one agreement to the next.
        within: steps that an agreement may take, at most ``every``: how far one rank's host may be ahead of another's.

    Making it is collective: each rank waits here for all others (and says so), five minutes at most.

    Raises:
        ConfigError: arguments that do not go together. BackendError: MPI, NCCL or a GPU is missing, or a rank did not
            come.
    """

    def __init__(
        self,
        allreduce_max: AllreduceMax | None = None,
        *,
        rank: int | None = None,
        n_ranks: int | None = None,
        unique_id: bytes | None = None,
        comm: Any = None,
        backend: str = "auto",
        device: int | None = None,
        every: int = 64,
        within: int = 32,
    ) -> None:
        for name, value, high in (
            ("every", every, 1 << 30),
            ("within", within, min(every, 0xFFFF) if isinstance(every, int) else 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise ConfigError(f"{name}={value!r}: give an integer from 1 to {high}")
        if allreduce_max is not None and not callable(allreduce_max):
            raise ConfigError(f"allreduce_max={allreduce_max!r}: give a function (words, stream), or None")
        self.every, self.within = every, within
        self._reducer = make_reducer(allreduce_max, rank, n_ranks, unique_id, comm, backend, device)
        self.rank, self.n_ranks = self._reducer.rank, self._reducer.n_ranks
        self.latest = RankVerdict()  #: what the last agreement that was delivered says
        self.n_agreements = 0  #: agreements delivered
        self.is_broken = False  #: a rank did not come: there are no more agreements, each rank is on its own
        self._violations: ViolationObserver | None = None
        self._raises = self._raises_stalls = self._is_closed = False
        self._log_format = "text"
        self._on_stall: Callable[[CanaryStalledError], None] | None = None
        self._lock = threading.Lock()  # violations are read by any thread
        self._news = 0  # the verdict word of what was seen since the last agreement was begun
        self._words = np.zeros(N_WORDS, np.int64)
        self._clock = self._base = 0  # steps that count: since it was attached, and of the manager before
        self._begun_at: int | None = None  # clock at which the agreement under way was begun
        self._last_begun = 0  # likewise, of the last one: an idle step does not move the clock on
        self._held: KvCanaryError | None = None
        self._failure = ""
        self._mismatch = (0, 0, 0)
        self._check_settings()

    @staticmethod
    def new_unique_id(backend: str = "cupy") -> bytes:
        """128 bytes for one rank to make and the engine to take to all, over whatever it has ("nccl4py" or "cupy")."""
        from kvcanary.backends.nccl import new_unique_id

        return new_unique_id(backend)

    # ---- what the manager calls --------------------------------------------------------------------------------------
    def attach(
        self,
        violations: ViolationObserver,
        config: CanaryConfig,
        n_steps: int,
        on_stall: Callable[[CanaryStalledError], None] | None = None,
    ) -> None:
        """Begin, after so many steps with a forward; `CanaryManager.attach_agreement` calls it.

        Args:
            on_stall: told of a rank that did not come, before it is raised or logged.

        Raises:
            PhaseError: it is attached, or closed.
        """
        if self._violations is not None or self._is_closed:
            raise PhaseError("this RankAgreement is attached already, or closed: make one per manager, on all ranks")
        self._violations, self._base = violations, n_steps
        self._raises, self._raises_stalls = config.mode == "raise", config.health_raises
        self._log_format, self._on_stall = config.log_format, on_stall
        violations.raises_when_agreed = True
        violations.on_violation(self._note)

    def tick(self, *, is_idle: bool) -> None:
        """A step has ended, or was abandoned; before `is_due`."""
        self._clock += not is_idle

    def is_due(self, step: int) -> bool:
        """Whether `step` has anything to do: an agreement to begin, or one under way to look after."""
        is_busy = self._begun_at is not None or self._held is not None or self._begins_now
        return is_busy and not self._is_closed

    def step(self, facts: StepFacts) -> None:
        """Deliver the agreement that is required now, begin the one that is due; never waits, touches no engine stream.

        Raises:
            KvCanaryViolation: mode "raise", and a rank has seen something; at the same step on all ranks.
            RankStalledError: a rank did not come, and the health policy is to raise.
        """
        error, self._held = self._held, None
        if self._begun_at is not None:
            is_done = self._look()
            if self._clock >= self._begun_at + self.within:
                found = self._deliver(facts.step) if is_done else self._stalled(facts.step)
                if error is not None and found is not None:
                    logger.error("%s", found)
                error = error or found
        if self._begins_now:
            self._begin()
        if error is not None:
            raise error

    def abandon(self, facts: StepFacts, *, is_idle: bool) -> None:
        """The engine raised inside this step, which counts all the same; an error that is due waits for the next."""
        assert self._violations is not None
        self.tick(is_idle=is_idle)
        try:
            self._violations.poll()
            if self.is_due(facts.step):
                self.step(facts)
        except KvCanaryError as error:
            self._held = error
        except Exception:  # a log handler's: the engine's own exception is on its way and must not be masked
            with suppress(Exception):
                logger.exception("[canary] the agreement of the ranks raised; the step goes on")

    def close(self, timeout_s: float = 10.0) -> None:
        """Give the communicator back; all ranks do, at the same point. May be called twice.

        An agreement that is still under way is waited for so long, as all ranks have begun it; then it is left behind.
        After a stall nothing is waited for.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self._violations is not None:
            self._violations.raises_when_agreed = False
        if not self.is_broken and self._begun_at is not None:
            self.is_broken = bool(self._failure) or not wait_for(self._reducer, timeout_s)
            if self.is_broken:
                logger.error("[canary] rank %d: the last agreement did not end, and is left behind", self.rank)
                with suppress(Exception):
                    self._reducer.abort()
        if not self.is_broken:
            self._reducer.close()

    def _check_settings(self) -> None:
        """Compare what must be the same on all ranks, by the maximum that all else will go through."""
        ours = StepCount(self.every << 16 | self.within, self.rank)
        fill_test_words(self._words, ours)
        self._reducer.start(self._words)
        is_there = wait_for(self._reducer, min(TELL_AFTER_S, MAKE_TIMEOUT_S))
        if not is_there:
            logger.warning(
                "[canary] rank %d: waiting for all of the %d ranks to make their RankAgreement, which each does at the "
                "same point of the program, for %.0f s at most",
                self.rank,
                self.n_ranks,
                MAKE_TIMEOUT_S,
            )
        if not is_there and not wait_for(self._reducer, MAKE_TIMEOUT_S - TELL_AFTER_S):
            with suppress(Exception):
                self._reducer.abort()
            raise BackendError(
                f"rank {self.rank}: not all of the {self.n_ranks} ranks made a RankAgreement within "
                f"{MAKE_TIMEOUT_S:.0f} s; make it on all ranks, at the same point of the program"
            )
        given = self._reducer.result()
        if not is_test_maximum(given, self._words, self.rank, self.n_ranks):
            raise ConfigError(f"rank {self.rank}: {self._no_maximum(given)}")
        _verdict, most, fewest = read_words(np.array([0, *given[1:]], np.int64))
        if most.n != fewest.n:
            told = [f"rank {rank} has every={n >> 16}, within={n & 0xFFFF}" for n, rank in (most, fewest)]
            raise ConfigError(f"{' and '.join(told)}: give all ranks the same")

    def _no_maximum(self, given: npt.NDArray[np.int64]) -> str:
        what = "allreduce_max" if self._reducer.name == "callable" else self._reducer.name
        return (
            f"what {what} does is no maximum over the ranks: it gave back {given.tolist()} for {self._words.tolist()} "
            f"of rank {self.rank} of {self.n_ranks}; it replaces i64[{N_WORDS}] by the maximum of each word over all "
            "ranks, on every rank (MAX: not MIN, SUM or a broadcast)"
        )

    # ---- one agreement -----------------------------------------------------------------------------------------------
    @property
    def _begins_now(self) -> bool:
        is_free = self._begun_at is None and not self.is_broken and self._violations is not None
        return is_free and self._clock % self.every == 0 and self._clock > self._last_begun

    def _note(self, violation: Violation) -> None:
        reasons = Reason(violation.reasons)
        word = RankVerdict(Severity.of(reasons), violation.step, self.rank, reasons).as_word()
        with self._lock:
            self._news = max(self._news, word)

    def _begin(self) -> None:
        with self._lock:
            news, self._news = self._news, 0
        fill_words(self._words, news, StepCount(self._base + self._clock, self.rank))
        self._begun_at = self._last_begun = self._clock
        self._guarded(lambda: self._reducer.start(self._words))

    def _look(self) -> bool:
        return bool(self._guarded(self._reducer.is_done)) and not self._failure

    def _guarded(self, call: Any) -> Any:
        """A communicator that fails is a rank that does not come: told when it is due, on all ranks at one step."""
        if self._failure:
            return None
        try:
            return call()
        except Exception as error:  # noqa: BLE001  MPI, NCCL and the engine's function raise what they like
            self._failure = f"{type(error).__name__}: {error}"
            return None

    def _deliver(self, step: int) -> KvCanaryError | None:
        assert self._violations is not None
        self._begun_at = None
        given = self._reducer.result()
        if not is_maximum(given, self._words, self.rank, self.n_ranks):
            self._failure = self._no_maximum(given)
            return self._stalled(step)
        verdict, most, fewest = read_words(given)
        self.latest = verdict
        self.n_agreements += 1
        self._compare(most, fewest)
        if not verdict.severity:
            return None
        text = (
            f"{self.n_ranks} ranks agree at step {step}: {_MEANING[verdict.severity]}; worst and first is rank "
            f"{verdict.rank}: {', '.join(verdict.reasons.names())} at step {verdict.step} of those with a forward"
        )
        if self._raises:
            return self._violations.take_agreed(text, step)
        fields = {"step": step, "severity": verdict.severity.name, "rank": verdict.rank, "first_step": verdict.step}
        fields |= {"reasons": verdict.reasons.names(), "n_ranks": self.n_ranks}
        logger.warning("%s", line(self._log_format, logging.WARNING, "agreement", f"[canary] {text}", fields))
        return None

    def _compare(self, most: StepCount, fewest: StepCount) -> None:
        """Ranks with other numbers of steps are told once, and again when the difference changes."""
        mismatch = (most.n - fewest.n, most.rank, fewest.rank) if most.n != fewest.n else (0, 0, 0)
        if mismatch[0] and mismatch != self._mismatch:
            text = (
                f"[canary] the ranks count other steps: rank {most.rank} is at {most.n} with a forward, rank "
                f"{fewest.rank} at {fewest.n}. They would not raise at the same step of the engine: end every step on "
                "all ranks, mark steps without a forward idle, and attach the agreement at the same point"
            )
            fields = {"most": most.n, "most_rank": most.rank, "fewest": fewest.n, "fewest_rank": fewest.rank}
            logger.error("%s", line(self._log_format, logging.ERROR, "rank_steps", text, fields))
        self._mismatch = mismatch

    def _stalled(self, step: int) -> KvCanaryError | None:
        assert self._violations is not None
        self._begun_at = None
        self.is_broken, self._violations.raises_when_agreed = True, False
        who = f"rank {1 - self.rank}" if self.n_ranks == 2 else f"at least one of the {self.n_ranks - 1} other ranks"
        begun = f"the agreement that was begun {self.within} steps before, number {self.n_agreements + 1}"
        if self._failure:
            text = f"{begun}, failed on this rank ({self._failure})"
            advice = "Mend that. The others miss this rank: end this process"
        else:
            text = f"{who} did not come to {begun}: it died, hangs or is behind"
            advice = "Look at the logs of the others; raise within= if one is only slow, else end this process"
        error = RankStalledError(
            f"[canary] rank {self.rank}, step {step}: {text}. There are no more agreements, each rank reports for "
            f"itself. {advice} without waiting for them (comm.Abort() under MPI)",
            step=step,
        )
        with suppress(Exception):
            self._reducer.abort()
        if self._on_stall is not None:
            self._on_stall(error)
        if self._raises_stalls:
            return error
        fields = {"step": step, "rank": self.rank, "n_ranks": self.n_ranks}
        logger.error("%s", line(self._log_format, logging.ERROR, "rank_stall", str(error), fields))
        return None
