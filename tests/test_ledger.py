"""The ledger against a model of plain sets, and every misuse: refused in words, with nothing changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import PREFIX_CACHE, KvCanaryError, LifecycleError, abi, references
from kvcanary.ledger import MAX_NAMED, BlockCall, BlockChanges, BlockLedger, owner_name

N, RESERVED = 8, (0, 5)
OWNERS = (1, 2, PREFIX_CACHE)


def ledger() -> BlockLedger:
    return BlockLedger(N, RESERVED, "full")


def parts(changes: BlockChanges) -> dict[int, list[int]]:
    """Operation -> sorted ids."""
    starts = (0, *changes.ends[:-1])
    found = {op: sorted(changes.ids[a:b].tolist()) for op, (a, b) in enumerate(zip(starts, changes.ends, strict=True))}
    assert changes.ends[-1] == len(changes.ids)
    return {op: ids for op, ids in found.items() if ids}


def state(of: BlockLedger) -> list[Any]:
    blocks = range(of.n_blocks)
    known = [(of.owners(b), of.n_references(b), of.last_call(b)) for b in blocks]
    return [known, of.n_live, of.n_shared, of.n_free]


# ---- a model: a block is a primary owner and a bag of sharers --------------------------------------------------------
class Model:
    def __init__(self, n: int = N) -> None:
        self.n = n
        self.primary: dict[int, int] = {}
        self.sharers: dict[int, Counter[int]] = {b: Counter() for b in range(n)}
        self.last: dict[int, BlockCall] = {}

    def holders(self, block: int) -> tuple[int, ...]:
        """Once for each reference: the primary owner, then the sharers in order of arrival."""
        return (*([self.primary[block]] if block in self.primary else []), *self.sharers[block].elements())

    def may(self, kind: str, ids: list[int], owner: int) -> bool:
        if not all(0 <= b < self.n and b not in RESERVED for b in ids) or len(set(ids)) < len(ids) or not owner:
            # The ledger refuses a reserved block in a free too: nobody holds it.
            return False
        if kind == "allocate":
            return not any(self.holders(b) for b in ids)
        if kind == "claim":
            return all(self.holders(b) == (owner,) for b in ids)
        return kind == "share" or all(owner in self.holders(b) for b in ids)

    def do(self, kind: str, ids: list[int], owner: int, step: int) -> dict[int, list[int]]:
        done: dict[int, list[int]] = {}
        for b in sorted(ids):
            op = getattr(self, f"_{kind}")(b, owner)
            if op is not None:
                done.setdefault(op, []).append(b)
        self.last |= dict.fromkeys(ids, BlockCall(kind, owner, step))
        return done

    def _allocate(self, block: int, owner: int) -> int:
        self.primary[block] = owner
        return abi.OP_ALLOCATE

    def _share(self, block: int, owner: int) -> int:
        self.sharers[block][owner] += 1
        return abi.OP_SHARE

    def _claim(self, block: int, owner: int) -> int | None:
        if self.primary.get(block) == owner:
            return None
        self.primary[block], self.sharers[block] = owner, Counter()
        return abi.OP_CLAIM

    def _free(self, block: int, owner: int) -> int | None:
        sharers, was_primary = self.sharers[block], False
        if sharers[owner]:
            sharers[owner] -= 1
        else:
            was_primary = True
            del self.primary[block]
        self.sharers[block] = +sharers
        if not self.holders(block):
            return abi.OP_FREE
        if not self.sharers[block]:
            return abi.OP_UNSHARE
        return abi.OP_LEAVE if was_primary else None


CALLS = st.tuples(
    st.sampled_from(("allocate", "share", "share", "free", "free", "claim")),
    st.lists(st.integers(-1, N), max_size=4) | st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True),
    st.sampled_from((*OWNERS, *OWNERS, 0)),
)


@given(st.lists(CALLS, max_size=40))
def test_it_knows_what_a_model_knows(calls: list[tuple[str, list[int], int]]) -> None:
    real, model = ledger(), Model()
    for step, (kind, ids, owner) in enumerate(calls):
        if model.may(kind, ids, owner):
            given_as = (ids, np.array(ids, np.int32), tuple(ids), np.array(ids, np.uint64))[step % 4]
            assert parts(getattr(real, kind)(given_as, owner, step)) == model.do(kind, ids, owner, step)
        else:
            before = state(real)
            with pytest.raises(LifecycleError):
                getattr(real, kind)(ids, owner, step)
            assert state(real) == before
        assert_same(real, model)


def assert_same(real: BlockLedger, model: Model) -> None:
    for block in range(model.n):
        holders = model.holders(block)
        assert real.holders(block) == holders
        assert real.owners(block) == tuple(dict.fromkeys(holders))
        assert real.n_references(block) == len(holders)
        assert real.last_call(block) == model.last.get(block)
    held = [b for b in range(model.n) if model.holders(b)]
    assert real.n_live == len(held)
    assert real.n_shared == sum(bool(model.sharers[b]) for b in held)
    assert real.n_free == model.n - len(RESERVED) - len(held)


@pytest.mark.parametrize(("n_searched", "n_tables"), [(1 << 15, 9), (0, 9), (0, 0)])
@given(seed=st.integers(0, 1 << 32), n_ids=st.sampled_from((2, 8, 40)))
def test_many_ids_of_all_kinds(n_searched: int, n_tables: int, seed: int, n_ids: int) -> None:
    """References as lists, soon as tables, and as tables that are given up again."""
    dice, n, owners = np.random.default_rng(seed), 48, (3, 4, 5, 6, PREFIX_CACHE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_MIN_SEARCHED", n_searched)
        patch.setattr(references, "N_TABLES", n_tables)
        real, model = BlockLedger(n, RESERVED), Model(n)
        for step in range(25):
            kind, owner = dice.choice(["allocate", "share", "free", "free", "claim"]), int(dice.choice(owners))
            able = [b for b in range(n) if model.may(kind, [b], owner)]
            if dice.random() < 0.5 and kind != "allocate":  # in order, as requests do
                able = [b for b in model.last if b in able]
            ids = np.array(able, np.int32) if dice.random() < 0.5 else dice.permutation(np.array(able, np.int32))
            ids = ids[: int(dice.integers(n_ids))]
            assert parts(getattr(real, kind)(ids, owner, step)) == model.do(kind, ids.tolist(), owner, step)
            wrong = dice.permutation(n)[: 1 + dice.integers(n_ids)].astype(np.int32)
            refused = tuple(b for b in wrong.tolist() if not model.may(kind, [b], owner))
            if refused:
                before = state(real)
                with pytest.raises(LifecycleError) as caught:
                    getattr(real, kind)(wrong, owner, step)
                assert caught.value.blocks == refused
                assert state(real) == before
        assert_same(real, model)


def test_calls_of_one_step_are_told_apart() -> None:
    of = ledger()
    of.allocate(1, 7)
    of.share(1, 8)
    of.free(1, 8)
    assert of.last_call(1) == BlockCall("free", 8, 0)
    of.free(1, 7)
    assert of.last_call(1) == BlockCall("free", 7, 0)
    of.allocate(1, 7)
    assert of.last_call(1) == BlockCall("allocate", 7, 0)


def test_the_primary_owner_comes_first() -> None:
    of = ledger()
    of.share([1], 9)
    of.share([1], 8)
    assert of.owners(1) == (9, 8), "of a block that nobody allocated: in order of arrival"
    of.allocate(2, 9)
    of.share(2, 8)
    of.share(2, 9)
    assert of.owners(2) == (9, 8)
    assert of.n_references(2) == 3


def test_a_revived_block_has_no_primary_owner() -> None:
    of = ledger()
    of.allocate(1, 7, 3)
    of.free(1, 7, 4)
    assert of.last_call(1) == BlockCall("free", 7, 4)
    assert parts(of.share(1, 7, 5)) == {abi.OP_SHARE: [1]}
    assert parts(of.free(1, 7, 6)) == {abi.OP_FREE: [1]}
    assert parts(of.allocate(1, 7, 7)) == {abi.OP_ALLOCATE: [1]}


def test_a_thousand_ids_in_any_order() -> None:
    of = BlockLedger(4000)
    ids = np.random.default_rng(0).permutation(4000)[:3000].astype(np.int32)
    assert parts(of.allocate(ids, 7)) == {abi.OP_ALLOCATE: sorted(ids.tolist())}
    of.share(ids[:10], 8)
    assert parts(of.free(ids, 7)) == {abi.OP_LEAVE: sorted(ids[:10].tolist()), abi.OP_FREE: sorted(ids[10:].tolist())}
    assert (of.n_live, of.n_shared) == (10, 10)


def test_claimed_blocks_are_their_holders_alone() -> None:
    of = ledger()
    of.allocate([1, 2, 3], 7)
    of.share([1, 2], 8)
    with pytest.raises(
        LifecycleError, match=r"block 1 is held by request 7 and request 8 .*, 2 references: only its one"
    ):
        of.claim([1, 2], 8)
    of.free([1, 2, 3], 7)
    with pytest.raises(LifecycleError, match=r"block 3 is freed twice|block 3 .*nobody holds it"):
        of.claim([1, 3], 8)
    assert parts(of.claim([2, 1], 8, 9)) == {abi.OP_CLAIM: [1, 2]}
    assert parts(of.claim([1], 8, 10)) == {}
    assert of.last_call(2) == BlockCall("claim", 8, 9)
    assert parts(of.free([1, 2], 8)) == {abi.OP_FREE: [1, 2]}


def test_the_ids_of_the_caller_are_neither_kept_nor_changed() -> None:
    of, ids = ledger(), np.array([1, 2], np.intp)
    changes = of.allocate(ids, 7)
    ids[:] = 3
    assert changes.ids.tolist() == [1, 2]


def test_no_ids_change_nothing() -> None:
    of = ledger()
    for ids in ([], (), np.zeros(0, np.int32), range(0)):
        assert parts(of.allocate(ids, 7)) == parts(of.share(ids, 7)) == parts(of.free(ids, 7)) == {}


# ---- misuse ----------------------------------------------------------------------------------------------------------
def held_by(*owners: int) -> Callable[[BlockLedger], None]:
    def setup(of: BlockLedger) -> None:
        for n, owner in enumerate(owners):
            (of.share if n else of.allocate)([3, 4], owner, 10 + n)

    return setup


def freed(of: BlockLedger) -> None:
    of.allocate([3, 4], 7, 10)
    of.free([3, 4], 7, 11)


def unshared(of: BlockLedger) -> None:
    held_by(7, 8)(of)
    of.free([3, 4], 8, 12)


MISUSES: dict[str, tuple[Callable[[BlockLedger], None], str, Any, int, tuple[int, ...], str]] = {
    "double free": (
        *(freed, "free", [2, 3], 7, (2, 3)),
        (
            "free by request 7 in pool 'full': block 2 was never allocated; block 3 is freed twice: nobody holds it "
            "(the call before: free by request 7 in step 11). Nothing was changed."
        ),
    ),
    "double free by another": (
        *(freed, "free", 3, 9, (3,)),
        (
            "free by request 9 in pool 'full': block 3 is freed twice: nobody holds it "
            "(the call before: free by request 7 in step 11). Nothing was changed."
        ),
    ),
    "free of another's": (
        *(held_by(7), "free", [3], 9, (3,)),
        (
            "block 3 is held by request 7 (the call before: allocate by request 7 in step 10), not by request 9: "
            "free only what you hold"
        ),
    ),
    "free of what others still share": (
        *(held_by(7, 8, PREFIX_CACHE), "free", [3], 9, (3,)),
        (
            "block 3 is held by request 7 and request 8 and the prefix cache "
            "(the call before: share by the prefix cache in step 12), not by request 9: free only what you hold"
        ),
    ),
    "free by a sharer, twice": (
        *(unshared, "free", [4], 8, (4,)),
        (
            "block 4 is held by request 7 (the call before: free by request 8 in step 12), not by request 8: "
            "free only what you hold"
        ),
    ),
    "two sole owners": (
        *(held_by(7), "allocate", [1, 4, 3], 8, (4, 3)),
        (
            "allocate by request 8 in pool 'full': block 4 is held by request 7 (the call before: allocate by "
            "request 7 in step 10): it would have two sole owners; free it first, or share it; block 3 is held"
        ),
    ),
    "allocation of a shared block": (
        *(held_by(7, 8), "allocate", [4], 9, (4,)),
        "block 4 is held by request 7 and request 8 (the call before: share by request 8 in step 11): it would have",
    ),
    "allocation of a reserved block": (
        *(freed, "allocate", [1, 0], 7, (0,)),
        "block 0 is reserved: no KV is expected there (see reserved_blocks of the pool). Nothing was changed.",
    ),
    "a share of a reserved block": (freed, "share", [5], 7, (5,), "block 5 is reserved: no KV"),
    "a free of a reserved block": (freed, "free", [5], 7, (5,), "block 5 is reserved: no KV"),
    "an id beyond the pool": (
        *(freed, "allocate", [1, 8], 7, (8,)),
        "block 8 is out of range: the pool has blocks 0 to 7",
    ),
    "a negative id": (freed, "share", np.array([1, -1, -2], np.int32), 7, (-1, -2), "block -1 is out of range"),
    "a negative id of 64 bits": (freed, "share", [1, -1], 7, (-1,), "block -1 is out of range"),
    "a huge id": (freed, "share", np.array([1 << 63], np.uint64), 7, (-(1 << 63),), "is out of range"),
    "an id named twice": (
        *(freed, "allocate", [1, 2, 1, 4, 2, 1], 7, (1, 2)),
        "block 1 is named twice in this call; block 2 is named twice in this call. Nothing was changed.",
    ),
    "owner 0": (freed, "share", [1], 0, (), "share: owner=0: 0 means nobody; give a request id from 1 to 2^32 - 2"),
    "a negative owner": (freed, "free", [1], -1, (), "free: owner=-1: it must fit 32 bits; give a request id"),
    "a long owner": (freed, "free", [1], 1 << 32, (), "free: owner=4294967296: it must fit 32 bits"),
    "no owner": (freed, "allocate", [1], None, (), "allocate: owner=None: give a request id, an integer from 1"),
    "ids that are none": (freed, "allocate", "ab", 7, (), "allocate: ids are <U1[2]: give one integer, or a list"),
    "ids that are fractions": (freed, "allocate", [1.0], 7, (), "allocate: ids are float64[1]: give one integer"),
    "ids that are truths": (freed, "allocate", [True], 7, (), "allocate: ids are bool[1]: give one integer"),
    "ids of two dimensions": (freed, "free", np.zeros((2, 2), int), 7, (), "free: ids are int64[2, 2]: give one"),
    "no ids": (freed, "free", None, 7, (), "free: ids=None: give one integer, or a list or 1-d array of them"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_in_words_and_changes_nothing(name: str) -> None:
    setup, kind, ids, owner, blocks, text = MISUSES[name]
    of = ledger()
    setup(of)
    before = state(of)
    with pytest.raises(LifecycleError, match=re.escape(text)) as caught:
        getattr(of, kind)(ids, owner, 20)
    assert caught.value.blocks == blocks
    assert caught.value.event_index is None
    assert isinstance(caught.value, KvCanaryError)
    assert state(of) == before


@pytest.mark.parametrize("ids", [[1, 1, 3], [2, 2, 3], [1, 3, 3]])
def test_ids_that_came_together_before_are_looked_at_again(ids: list[int]) -> None:
    of = ledger()
    of.allocate([1, 2, 3], 7)
    of.free([1, 2, 3], 7)
    with pytest.raises(LifecycleError, match="is named twice"):
        of.allocate(ids, 7)
    with pytest.raises(LifecycleError, match="block 8 is out of range"):
        of.allocate([1, 8, 3], 7)
    assert parts(of.allocate([1, 2, 3], 7)) == {abi.OP_ALLOCATE: [1, 2, 3]}


def test_an_id_named_twice_is_found_among_shares_of_two_calls() -> None:
    of = ledger()
    of.share([1, 2], 7)
    of.share([1], 7)
    with pytest.raises(LifecycleError, match="block 1 is named twice"):
        of.free([1, 2, 1], 7)
    assert parts(of.free([2, 1], 7)) == {abi.OP_FREE: [2]}


def test_a_refused_call_between_two_about_the_same_ids() -> None:
    of = ledger()
    of.share(1, 7)
    of.share(2, 7)
    of.share([2, 1], 8)
    with pytest.raises(LifecycleError, match="block 1 is named twice"):
        of.share([1, 2, 1], 8)
    assert parts(of.free([2, 1], 7)) == {}
    assert of.owners(1) == of.owners(2) == (8,)


def test_more_ids_than_16_bits_count() -> None:
    of, n = BlockLedger(70_000), 70_000
    ids = np.arange(n, dtype=np.int32)
    ids[n - 1] = ids[n - 1 - (1 << 16)]
    with pytest.raises(LifecycleError, match=f"block {n - 1 - (1 << 16)} is named twice in this call. Nothing"):
        of.allocate(ids, 7)
    ids[n - 1] = n - 1
    assert len(of.allocate(ids, 7).ids) == of.n_live == n


def test_an_error_names_a_few_blocks_and_counts_the_rest() -> None:
    of = BlockLedger(100)
    of.allocate(range(100), 7)
    with pytest.raises(LifecycleError) as caught:
        of.allocate(range(50), 8)
    assert str(caught.value).count("is held by") == MAX_NAMED
    assert f"and {50 - MAX_NAMED} more. Nothing was changed." in str(caught.value)
    assert caught.value.blocks == tuple(range(50))


def test_questions_about_blocks_that_are_none() -> None:
    for ask in (ledger().owners, ledger().holders, ledger().n_references, ledger().last_call):
        for block in (-1, N):
            with pytest.raises(LifecycleError, match="is out of range: the pool has blocks 0 to 7"):
                ask(block)


def test_owners_have_names() -> None:
    assert [owner_name(o) for o in (0, 7, PREFIX_CACHE)] == ["nobody", "request 7", "the prefix cache"]
