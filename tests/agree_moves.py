"""Moves of a random engine between two steps: it defragments, offloads, restores, rewrites, loads what others wrote."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from agree_state import Load
from agree_twins import Twins
from numpy.typing import NDArray

from kvcanary import SlotBundle
from kvcanary.backends.moves import MoveOp

Array = NDArray[Any]
WAYS = ("copy", "copy", "copy on the device", "bundle", "shadow planes")


def random_moves(twins: Twins, engine: Any, rng: random.Random) -> None:
    """Some blocks (slots, behind a LUT) of some pool go elsewhere, with all that names them; or are rewritten."""
    i = rng.randrange(len(engine.pools))
    book, kv = engine.books[i], engine.pools[i]
    per = 1 if engine.luts[i] is not None else kv.page_size
    used = rng.sample(sorted(book.refs), min(len(book.refs), rng.randint(1, 3)))
    if rng.random() < 0.3:
        slots = slots_of(used, per)
        twins.write_kv(i, slots, np.random.default_rng(rng.getrandbits(32)))
        twins.call("refresh_digests", slots.tolist(), pool=i)
        engine.did["refreshed digests"] += len(slots)
        return
    old = used[: len(book.free)]
    if twins.config.lifecycle and not are_held(twins, engine, i, old, book.free[len(book.free) - len(old) :]):
        return
    new = [book.take_untold() for _ in old]
    if twins.config.lifecycle:
        hand_over(twins, i, old, new)
    carry(twins, i, slots_of(old, per), slots_of(new, per), rng)
    for before, after in zip(old, new, strict=True):
        engine.renamed(i, before, after)
    engine.did["moved blocks"] += len(old)


def are_held(twins: Twins, engine: Any, pool: int, blocks: Sequence[int], free: Sequence[int]) -> bool:
    """Whether the guards know who holds these blocks, and nobody the free ones: they do, unless they were told lies."""
    error, owners = twins.lifecycle(engine.lifecycle_events()), twins.sides[0].manager.lifecycle.owners
    return error is None and all(owners(b, pool) for b in blocks) and not any(owners(b, pool) for b in free)


def hand_over(twins: Twins, pool: int, old: Sequence[int], new: Sequence[int]) -> None:
    """Whoever holds a block holds its new place, from before anything is there, and lets go of the old one."""
    ledger, events = twins.sides[0].manager.lifecycle._ledger(pool), []
    for before, after in zip(old, new, strict=True):
        holders = ledger.holders(before)
        events += [("share" if n else "allocate", [after], owner, pool) for n, owner in enumerate(holders)]
        events += [("free", [before], owner, pool) for owner in holders]
    error = twins.lifecycle(events)
    assert error is None, error


def slots_of(blocks: Sequence[int], page: int) -> Array:
    return (np.array(blocks, np.int64)[:, None] * page + np.arange(page)).reshape(-1)


def carry(twins: Twins, pool: int, source: Array, target: Array, rng: random.Random) -> None:
    """The bytes, and what the guard knows of them, in one of the ways there are; in some order."""
    way, is_late = rng.choice(WAYS), rng.random() < 0.3
    if not is_late:
        carry_bytes(twins, pool, source, target)
    if way == "copy":
        twins.call("copy_slots", source, target, pool=pool)
    elif way == "copy on the device":
        twins.move(MoveOp.COPY, pool, target, rng.random() < 0.5, sources=source)
    elif way == "bundle":
        bundle = twins.call("export_slots", source, pool=pool)
        at = rng.randint(0, len(bundle))
        for part, slots in ((bundle[:at], target[:at]), (bundle[at:], target[at:])):
            twins.call("import_slots", SlotBundle.from_bytes(part.to_bytes()), slots, pool=pool)
    else:
        for side in twins.sides:
            for array in side.manager.shadow_arrays(pool).values():
                values = side.to_host(array)
                values[target] = values[source]
                side.write(array, values)
        twins.call("localize_slots", target, pool=pool)
    if is_late:
        carry_bytes(twins, pool, source, target)


def carry_bytes(twins: Twins, pool: int, source: Array, target: Array) -> None:
    kv = twins.pools[pool]
    for plane in kv.planes:
        at = kv.host_bytes(plane)
        at[kv.slot_index(plane, target)] = at[kv.slot_index(plane, source)]


def load(twins: Twins, engine: Any, loads: Sequence[Load], rng: random.Random) -> None:
    """What was loaded from elsewhere is adopted at once, or found unstamped by the next forward."""
    for pool, places, salt in loads:
        if rng.random() < 0.5:
            engine.did["adopted loads"] += 1
            positions, tokens = map(list, zip(*places.values(), strict=True))
            known = rng.choice((None, tokens, [t if rng.random() < 0.9 else -1 for t in tokens]))
            twins.call("adopt_slots", list(places), positions, tokens=known, salt=salt, pool=pool)
