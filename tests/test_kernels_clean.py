"""An honest engine is never reported: prefix sharing, drafts, preemption, windows, imports, retries, sweeps, pauses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from agree import LateSide, Side, SimtSide
from agree_drive import drive, random_scenario
from agree_engine import Engine
from agree_faults import Faults
from agree_script import MAX_LEN, pool_spec
from agree_state import Habits, Load
from hypothesis import given
from hypothesis import strategies as st
from simt.runner import SimtLibrary
from strategies import examples

from kvcanary import abi
from kvcanary.violations import PoolNames, decode

N_STEPS = 12
SEEDS = st.integers(0, (1 << 32) - 1)


def run(seed: int, sides: Sequence[Side], max_len: int = 0, n_steps: int = N_STEPS) -> Counter[str]:
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, sides, max_len=max_len)

    def is_silent(call: str) -> None:
        names = [PoolNames(p.name, p.page_size) for p in twins.pools]
        found = "\n".join(v.summary() for v in decode(twins.records[:4], names, 0, True))
        assert not found, f"{len(twins.records)} records of a healthy {call} ({engine.habits}):\n{found}"

    drive(twins, engine, rng, n_steps, is_silent, Faults(rng))
    assert twins.words[abi.STATE_UNJUDGED_SLOTS] == 0, "nobody reads what a raised forward has left"
    return engine.did + Counter(forwards=int(twins.words[abi.STATE_FORWARD]), steps=int(twins.words[abi.STATE_STEP]))


@examples(100)
@given(SEEDS)
def test_reference_is_silent(seed: int) -> None:
    run(seed, [Side()])


@examples(15)
@given(SEEDS)
def test_kernels_are_silent(library: SimtLibrary, seed: int) -> None:
    run(seed, [Side(), SimtSide(library)], n_steps=8)


@examples(4, is_variant=True)
@given(SEEDS)
def test_kernels_are_silent_over_long_requests(library: SimtLibrary, seed: int) -> None:
    run(seed, [Side(), SimtSide(library, n_multiprocessors=2)], max_len=300, n_steps=6)


@examples(15, is_variant=True)
@given(SEEDS)
def test_kernels_are_silent_and_agree_when_head_comes_after_the_model(library: SimtLibrary, seed: int) -> None:
    run(seed, [Side(), LateSide(library)], n_steps=8)


def test_the_engine_does_all_that_it_claims() -> None:
    """The runs above prove nothing about what never happens in them."""
    did: Counter[str] = sum((run(seed, [Side()]) for seed in range(60)), Counter())
    assert did["forwards"] > did["steps"], "inner forwards"
    rare = {name: n for name, n in did.items() if n < 5}
    assert len(did) == 22
    assert not rare


def test_what_is_loaded_is_the_text_of_who_holds_the_block() -> None:
    """A request may lose its blocks to others in the step that admits it, before what it imports has come."""
    n_imports = n_loads = n_shared = 0
    spec = pool_spec()
    for seed in range(80):
        habits = Habits(imports=True, preempts=True, shares=seed % 2 > 0, shares_early=seed % 4 > 1)
        engine = Engine([spec.build(spec.buffers)], [None], habits, seed, 4, 24, MAX_LEN)
        engine.tells_owners = True
        for _ in range(N_STEPS):
            plan = engine.plan()
            places = [(slot, place) for load in plan.loads for slot, place in load.places.items()]
            assert len(places) == len(dict(places)), "loaded twice"
            for slot, (position, token) in places:
                block = slot // engine.pools[0].page_size
                assert block in engine.books[0].refs
                holders = [request for request in engine.running if block in request.blocks[0]]
                assert {request.tokens[position] for request in holders} <= {token}
                n_shared += len(holders) > 1
            n_loads += len(plan.loads)
            engine.commit(plan)
        n_imports += engine.did["imports"]
    assert 5 < n_loads < n_imports - 5, "some are given up, some are not"
    assert n_shared > 0


def test_a_load_is_given_up_block_by_block() -> None:
    spec = pool_spec()
    engine = Engine([spec.build(spec.buffers)], [None], Habits(), 0, 4, 24, MAX_LEN)
    page, book = engine.pools[0].page_size, engine.books[0]
    first, second = book.take(1), book.take(1)
    book.share(second, 2)
    slots = [block * page + offset for block in (first, second) for offset in range(page)]
    engine.loads = [Load(0, {slot: (p, 7 + p) for p, slot in enumerate(slots)}, 0)]
    engine._drop(0, first, 1)
    engine._drop(0, second, 1)
    assert engine.loads[0].places == {slot: (page + p, 7 + page + p) for p, slot in enumerate(slots[page:])}
    engine._drop(0, second, 2)
    assert not engine.loads[0].places
