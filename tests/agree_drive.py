"""A random engine under the guards of all sides: steps, and what comes between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from agree import Side
from agree_engine import Engine
from agree_faults import Faults
from agree_moves import load, random_moves
from agree_pools import random_pools
from agree_state import Forward, Plan, random_habits
from agree_twins import Twins


def random_scenario(
    rng: random.Random,
    sides: Sequence[Side],
    *,
    max_len: int = 0,
    is_odd: bool = False,
    make: Callable[..., Twins] = Twins,
    **config: Any,
) -> tuple[Twins, Engine]:
    """Guards on these sides, and an engine over their pools.

    Args:
        max_len: tokens of the longest request; 0 = any of the small ones.
        is_odd: pools may be such that an honest engine is reported.
        make: what makes the guards.
        config: fields of `CanaryConfig` that are not left to chance.
    """
    habits = random_habits(rng)
    max_requests, max_len = rng.choice((2, 4, 8)), max_len or rng.choice((32, 48))
    max_new_tokens = max_len + max_requests if max_len > 48 else rng.choice((24, 64))
    if max_len > 48:
        habits = replace(habits, max_chunk=rng.choice((max_len // 3, max_len)))
    ring_slack = None
    if rng.random() < 0.2:  # what lies in a ring is nobody else's, and is not found by the tables' length
        habits = replace(habits, shares=False, shares_early=False, imports=False)
        habits = replace(habits, table="csr" if habits.table == "csr_last_page" else habits.table)
        habits = replace(habits, max_chunk=rng.choice((1, 1, 9, habits.max_chunk)))
        ring_slack = habits.max_chunk + habits.max_drafts
        if rng.random() < 0.5:  # nothing is taken back: a forward may go round
            habits, ring_slack = replace(habits, max_drafts=0, raises=False), 0
    specs = random_pools(rng, max_requests, max_len, habits.table == "static", is_odd, ring_slack)
    chosen = {
        "real_data": rng.choice(("all", "all", "partial", "none")),
        "verify_data_every": rng.choice((1, 2, 5, 9, 13)),
        "full_verify_min_tokens": rng.choice((0, 4, 16)),
        "on_unwritten": "adopt" if habits.imports else "violation",
        "check_write_position": rng.random() < 0.8,
        # Behind a LUT, slots are placed one by one: blocks that many requests share without saying so.
        "lifecycle": rng.random() < 0.6 and not any("lut" in spec.buffers for spec in specs),
    }
    chosen |= config
    if chosen["lifecycle"]:
        chosen.setdefault("scrub_bytes_per_step", rng.choice((0, 1, 4096, 1 << 20)))
    twins = make(specs, sides, max_requests, max_new_tokens, **chosen)
    luts = [buffers.get("lut") for buffers in twins.buffers]
    engine = Engine(twins.pools, luts, habits, rng.getrandbits(32), max_requests, max_new_tokens, max_len)
    engine.tells_owners = twins.config.lifecycle
    return twins, engine


def drive(
    twins: Twins, engine: Engine, rng: random.Random, n_steps: int, after: Callable[[str], None], faults: Faults
) -> None:
    """Steps of the engine under the guards, now and then one that raises, a sweep, a pause or a reset."""
    bytes_of = np.random.default_rng(rng.getrandbits(32))
    for _ in range(n_steps):
        plan = engine.plan()
        tell_owners(twins, engine, faults)
        for loaded in plan.loads:
            twins.write_kv(loaded.pool, np.array(list(loaded.places), np.int64), bytes_of)
        load(twins, engine, plan.loads, rng)
        while not run(twins, plan, bytes_of, rng, after, faults):
            if rng.random() < 0.5:
                engine.abort(plan)
                break
            engine.did["retried steps"] += 1
        else:
            engine.commit(plan)
        if rng.random() < 0.5:
            tell_owners(twins, engine, faults)
        host_driven(twins, engine, rng, after)
        faults.at_rest(twins)


def tell_owners(twins: Twins, engine: Engine, faults: Faults) -> None:
    """Tell the guards who owns which blocks now; a call that they refuse is not made, those behind it are."""
    events = faults.in_events(engine.lifecycle_events())
    while twins.config.lifecycle and events:
        engine.did["ownership calls"] += len(events)
        error = twins.lifecycle(events)
        assert error is None or faults.has_struck("ownership"), error
        events = [] if error is None or error.event_index is None else events[error.event_index + 1 :]


def run(
    twins: Twins,
    plan: Plan,
    bytes_of: np.random.Generator,
    rng: random.Random,
    after: Callable[[str], None],
    faults: Faults,
) -> bool:
    """The forwards of a step; False if one raised."""
    for forward in plan.forwards:
        raises = plan.may_raise and rng.random() < 0.1

        def model(forward: Forward = forward, raises: bool = raises) -> None:
            for i, slots in forward.written.items():
                done = slots[: rng.randint(0, len(slots))] if raises else slots
                twins.write_kv(i, done, bytes_of)

        arrays = faults.in_arrays(forward.arrays)
        twins.forward(
            arrays,
            model=model,
            between=faults.late(arrays),
            index=forward.index,
            pools=forward.pools,
            has_tail=not raises,
        )
        after("forward")
        if raises:
            return False
    return True


def host_driven(twins: Twins, engine: Engine, rng: random.Random, after: Callable[[str], None]) -> None:
    """What an engine may do between two steps."""
    if rng.random() < 0.2:
        for i in range(len(twins.pools)):
            resident = engine.resident(i)
            if resident:
                *lists, tokens = resident
                twins.sweep(i, *lists, rng.choice((None, tokens)))
                engine.did["sweeps"] += 1
                after("sweep")
    if engine.habits.moves and not engine.is_static and rng.random() < 0.4:
        random_moves(twins, engine, rng)
    if rng.random() < 0.05:
        engine.did["pauses"] += 1
        twins.set_paused(not twins.is_paused)
    if rng.random() < 0.03:
        engine.did["resets"] += 1
        engine.forget()
        twins.reset(rng.choice((None, *range(len(twins.pools)))))
