"""References by owner: lists and tables say the same, and memory follows what is held."""

from __future__ import annotations

import numpy as np
import pytest

from kvcanary import references
from kvcanary.references import N_TABLES, References

N = 4096


class Pool:
    """References, with the marks that a ledger's check of ids leaves behind."""

    def __init__(self, n: int = N) -> None:
        self.references, self._mark = References(n), np.zeros(n, np.int32)

    def take(self, owner: int, *blocks: int) -> None:
        self.references.take(owner, np.array(blocks, np.intp))

    def give(self, owner: int, *blocks: int) -> int:
        """Gives back what the owner has of these blocks, and says how many that are."""
        at = np.array(blocks, np.intp)
        self._mark[at] = np.arange(len(at))
        found = self.references.find(owner, at, self._mark)
        if found.n:
            self.references.give(owner, at, found)
        return found.n


@pytest.fixture(params=["lists", "tables"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pool:
    if request.param == "tables":
        monkeypatch.setattr(references, "_MIN_SEARCHED", -1)
    return Pool(3)


def test_an_owner_holds_a_block_repeatedly(pool: Pool) -> None:
    pool.take(7, 0, 1)
    assert pool.give(7, 2) == 0
    pool.take(7, 1, 2)
    assert pool.references.sharers(1) == [(7, 2)]
    assert pool.give(7, 1, 0) == 2
    assert pool.give(7, 0) == 0
    assert [pool.references.sharers(b) for b in range(3)] == [[], [(7, 1)], [(7, 1)]]
    assert pool.give(7, 0, 2, 1) == 2
    assert (pool.references.n_owners, pool.references.n_bytes) == (0, 0)


def test_all_that_one_call_took_is_known_again(pool: Pool) -> None:
    of = pool.references
    pool.take(7, 2, 0, 1)
    assert of.are_all_of(7, np.array([2, 0, 1]))
    others = ([2, 0], [2, 1, 0], [2, 0, 1, 1], [])
    assert not any(of.are_all_of(7, np.array(blocks, np.intp)) for blocks in others)
    assert not of.are_all_of(8, np.array([2, 0, 1]))
    of.end(7)
    assert not of.are_all_of(7, np.array([2, 0, 1]))
    pool.take(7, 1, 2)
    pool.take(7, 1)
    assert pool.give(7, 2) == 1
    assert not of.are_all_of(7, np.array([1, 1])), "of two calls, which may name a block twice"


def test_owners_stay_where_they_arrived(pool: Pool) -> None:
    pool.take(9, 1, 2)
    pool.take(8, 1)
    pool.give(9, 0)
    pool.take(9, 1)
    assert pool.references.sharers(1) == [(9, 2), (8, 1)]
    pool.give(9, 1)
    assert pool.references.sharers(1) == [(9, 1), (8, 1)], "the latest goes first"
    pool.give(9, 1)
    pool.take(9, 1)
    assert pool.references.sharers(1) == [(8, 1), (9, 1)]


def test_an_owner_of_many_who_gives_back_few_at_a_time_gets_a_table_and_loses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(references, "_MIN_SEARCHED", 1000)
    pool, owners = Pool(), range(1, N_TABLES + 4)
    for owner in owners:
        pool.take(owner, *np.random.default_rng(owner).permutation(N).tolist()[:2000])
        pool.take(owner, *range(10))
    before = [pool.references.sharers(b) for b in range(N)]
    for owner in owners:
        for block in range(6):
            assert pool.give(owner, N - 1 - block) in (0, 1)
            pool.give(owner, block)
            pool.take(owner, block)
    assert pool.references.n_bytes == len(owners) * N * 8, "tables"
    for b in range(10, N - 6):
        assert pool.references.sharers(b) == before[b]
    for owner in owners:
        pool.give(owner, *range(10, N))
    assert pool.references.n_bytes < (N_TABLES + 1) * N * 8
    for b in range(6, 10):
        assert pool.references.sharers(b) == before[b]


def test_memory_follows_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "_MIN_SEARCHED", 1000)
    pool, dice, n_owners = Pool(), np.random.default_rng(0), 32
    held: dict[int, list[int]] = {owner: [] for owner in range(1, n_owners + 1)}
    for step in range(1500):
        owner, n = int(dice.integers(1, n_owners + 1)), int(dice.choice((1, 16, 600)))
        is_filling = step % 500 < 250
        if is_filling:
            blocks = dice.permutation(N)[:n].tolist()
            pool.take(owner, *blocks)
            held[owner] += blocks
        elif held[owner]:
            blocks = list(dict.fromkeys(held[owner]))[-n:]
            assert pool.give(owner, *blocks) == len(blocks)
            for block in blocks:
                held[owner].remove(block)
        n_references = sum(map(len, held.values()))
        assert pool.references.n_bytes <= N_TABLES * N * 8 + 128 * n_references + 128
    for owner, blocks in held.items():
        while blocks:
            given = list(dict.fromkeys(blocks))
            assert pool.give(owner, *given) == len(given)
            for block in given:
                blocks.remove(block)
    assert (pool.references.n_owners, pool.references.n_bytes) == (0, 0)
