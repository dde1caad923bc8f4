"""A group of ranks in one process: its collectives, and a toy engine for each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from engine import PAGE, ToyEngine

from kvcanary import KvCanaryError, RankAgreement

EVERY, WITHIN = 8, 3


class Group:
    """The collectives of a group of ranks in one process: a maximum is there when every rank has come to it."""

    def __init__(self, n_ranks: int = 2) -> None:
        self.n_ranks = n_ranks
        self.brought: list[dict[int, np.ndarray[Any, Any]]] = []
        self.n_begun = [0] * n_ranks
        self.failing: set[int] = set()
        self.operation: Callable[..., Any] = np.max

    def of(self, rank: int) -> Callable[[Any, Any], Callable[[], bool]]:
        def allreduce_max(words: Any, stream: Any) -> Callable[[], bool]:
            assert stream is None and words.dtype == np.int64
            if rank in self.failing:
                raise ConnectionResetError("peer is gone")
            number, self.n_begun[rank] = self.n_begun[rank], self.n_begun[rank] + 1
            while len(self.brought) <= number:
                self.brought.append({})
            here = self.brought[number]
            here[rank] = words.copy()
            operation = self.operation

            def is_done() -> bool:
                if len(here) == self.n_ranks:
                    words[:] = operation(np.array([here[r] for r in range(self.n_ranks)]), axis=0)
                return len(here) == self.n_ranks

            return is_done

        return allreduce_max

    def make(self, settings: Sequence[dict[str, Any]] | None = None) -> list[RankAgreement]:
        """An agreement per rank, made at once, as separate processes would."""
        settings = settings or [{}] * self.n_ranks

        def one(rank: int) -> RankAgreement:
            given = {"every": EVERY, "within": WITHIN, **settings[rank]}
            return RankAgreement(self.of(rank), rank=rank, n_ranks=self.n_ranks, **given)

        with ThreadPoolExecutor(self.n_ranks) as pool:
            return list(pool.map(one, range(self.n_ranks)))


class Rank:
    """A toy engine that decodes one request, and what its steps have raised: step number -> error."""

    def __init__(self, agreement: RankAgreement | None = None, n_before: int = 0, **config: Any) -> None:
        self.engine = ToyEngine(**{"mode": "raise", "verify_data_every": 1, **config})
        self.manager = self.engine.manager
        self.position, self.raised = 0, dict[int, Exception]()
        for _ in range(n_before):
            self.step()
        if agreement is not None:
            self.agreement = agreement
            self.manager.attach_agreement(agreement)

    def step(self, *, fails: bool = False) -> None:
        batch = self.engine.batch((0, self.position % (3 * PAGE), 1))
        with self.manager.step(), self.manager.forward(batch):
            self.engine.write(batch)
            if fails:
                raise OSError("the engine's own")
        self.position += 1

    def try_step(self, **how: Any) -> None:
        try:
            self.step(**how)
        except KvCanaryError as error:
            self.position += 1
            self.raised[self.manager.step_number] = error

    def flip(self) -> None:
        self.engine.k[1][1, 0, 0, 0] ^= 4


def pair(**config: Any) -> tuple[Rank, Rank]:
    first, second = (Rank(agreement, **config) for agreement in Group().make())
    return first, second


def run(ranks: Sequence[Rank], n_steps: int) -> None:
    for _ in range(n_steps):
        for rank in ranks:
            rank.try_step()
