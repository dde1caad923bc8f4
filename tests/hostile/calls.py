"""Host-driven calls with noise in their lists: moves, bundles, sweeps, block ownership."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from agree_twins import Twins
from numpy.typing import NDArray

from kvcanary import KvCanaryError, SlotBundle
from kvcanary.backends.moves import Move, MoveOp
from kvcanary.bundle import _HEADER, Geometry, _checksum

from .values import EDGES, WIDE_EDGES, Noise

Array = NDArray[Any]
LENGTHS = (1, 2, 5, 31, 33, 70)


def attempt(twins: Twins, call: Callable[[Any], Any]) -> tuple[Any, str]:
    """A call on the manager of every side: one answer, or one error of kvcanary's; returns both."""
    answers, errors = [], []
    for side in twins.sides:
        try:
            answers.append(call(side.manager))
            errors.append("")
        except KvCanaryError as error:
            answers.append(None)
            errors.append(f"{type(error).__name__}: {error}")
    assert len(set(errors)) == 1, errors
    assert all(answer == answers[0] for answer in answers), "the sides answer differently"
    return answers[0], errors[0]


# ---- moves -----------------------------------------------------------------------------------------------------------
def move_on_device(twins: Twins, noise: Noise, pool: int) -> str:
    """A move whose lists only the device reads. Returns "racy" where any of several outcomes is right."""
    kv, op = twins.pools[pool], noise.rng.choice([op for op in MoveOp if op not in (MoveOp.IMPORT, MoveOp.EXPORT)])
    by_block = op in (MoveOp.COPY, MoveOp.REFRESH, MoveOp.LOCALIZE) and noise.maybe(0.3)
    per = kv.page_size if by_block else 1
    n = noise.rng.choice(LENGTHS)
    is_wide, is_racy = noise.maybe(0.5), noise.maybe(0.1)
    dtype = np.int64 if is_wide else np.int32
    high = kv.n_blocks if by_block else kv.n_slots
    slots = noise.fill((n,), dtype, noise.rng.integers(0, high, n).astype(dtype))
    if not is_racy:
        slots = _each_once(slots, high)
    lists: dict[str, Any] = {"slots": slots}
    if op in (MoveOp.COPY, MoveOp.COMMIT):
        lists["sources"] = noise.fill((n,), dtype, noise.rng.integers(0, high, n).astype(dtype))
    if op is MoveOp.ADOPT:
        lists["positions"] = noise.fill((n,), dtype, np.arange(n, dtype=dtype))
        if noise.maybe(0.7):
            lists["tokens"] = noise.fill((n,), dtype, noise.rng.integers(-1, 6, n).astype(dtype))
            lists["chains"] = noise.fill((n,), np.uint64)
    if op is MoveOp.COMMIT:
        lists |= _paths(noise, n, dtype, is_racy)
    options = {"drops_digests": noise.maybe(0.3)} if op is MoveOp.LOCALIZE else {}
    if is_racy:
        _race(twins, op, pool, is_wide, per, lists, options)
        return "racy"
    twins.move(op, pool, lists.pop("slots"), is_wide, per_entry=per, **lists, **options)
    return "move"


def _each_once(slots: Array, high: int) -> Array:
    """Entries that name a slot (or block) which one before names, made to name none."""
    found = slots.copy()
    _, first = np.unique(slots, return_index=True)
    again = np.ones(len(slots), bool)
    again[first] = False
    found[again & (slots >= 0) & (slots < high)] = -1
    return found


def _paths(noise: Noise, n: int, dtype: Any, is_racy: bool) -> dict[str, Any]:
    """Rows of a commit; without races they share neither entries nor registers."""
    rows = int(noise.rng.choice((1, 2, 5, 40)))
    starts = np.sort(noise.rng.integers(0, n + 1, rows + 1)).astype(dtype)
    prefixes = noise.fill((rows,), dtype, noise.rng.integers(0, 40, rows).astype(dtype))
    lists = {"row_starts": starts, "prefix_lens": prefixes}
    if is_racy:
        lists["row_starts"] = noise.fill((rows + 1,), dtype, starts)
    if noise.maybe(0.7):
        registers = noise.fill((rows,), dtype, noise.rng.permutation(rows).astype(dtype))
        lists["request_slots"] = registers if is_racy else _each_once(registers, 1 << 62)
    return lists


def _race(twins: Twins, op: MoveOp, pool: int, is_wide: bool, per: int, lists: dict[str, Any], options: Any) -> None:
    """On every side, without a comparison of anything but how many entries named no slot."""
    twins.publish()
    n = len(lists["slots"]) * per
    for side in twins.sides:
        given = {name: side.to_list(values) for name, values in lists.items()}
        side.manager.backend.move(Move(op=op, pool=pool, n=n, is_wide=is_wide, per_entry=per, **given, **options), None)
        side.manager.backend.synchronize()


CALLS = ("copy_slots", "export_slots", "refresh_digests", "adopt_slots", "localize_slots", "commit_slots")


def move_by_host(twins: Twins, noise: Noise, pool: int) -> str:
    """A call whose lists the host checks."""
    kv, n = twins.pools[pool], int(noise.rng.choice((0, 1, 2, 3)))
    name = str(noise.rng.choice(CALLS))

    def some(high: int, length: int = n) -> Any:
        low = noise.rng.permutation(max(high, length))[:length]
        return noise.fill((length,), np.int64, low) if noise.maybe(0.5) else low

    args: list[Any] = [some(kv.n_slots)]
    options: dict[str, Any] = {"pool": pool}
    if name in ("copy_slots", "commit_slots"):
        args.append(some(kv.n_slots))
    if name == "commit_slots":
        args += [some(n + 1, 2), some(9, 1)]
        options["request_slots"] = some(4, 1)
    if name == "adopt_slots":
        args.append(some(40))
        options["tokens"] = some(9)
    if name in ("copy_slots", "export_slots", "refresh_digests", "localize_slots"):
        options["blocks"] = noise.maybe(0.3)
    twins.publish()
    _, error = attempt(twins, lambda manager: getattr(manager, name)(*args, **options))
    twins._check_moved(name, is_stamping=name not in ("export_slots", "refresh_digests") and not error and n > 0)
    return "refused move" if error else "move"


def import_noise(twins: Twins, noise: Noise, pool: int) -> str:
    """A bundle whose bytes, or whose contents, are noise; its checksum may be right."""
    kv = twins.pools[pool]
    geometry = Geometry.of(kv, twins.config.real_data)
    n, planes = int(noise.rng.choice((1, 3, 9))), 2 * geometry.halves
    n_stamps = 16 * planes * n
    parts = [noise.rng.bytes(n_stamps)]
    parts.append(noise.rng.choice(np.array([0, -1, -2, -3], np.int8), planes * n).tobytes())
    parts.append(noise.rng.choice(np.array([0, 1, 2, 2, 2], np.uint8), n).tobytes())
    parts.append(noise.rng.bytes(8 * len(geometry.units) * n))
    described = geometry._to_bytes()
    n_bytes = _HEADER.size + len(described) + sum(map(len, parts)) + 32
    body = bytearray(_HEADER.pack(b"kvcslots", 1, len(described), n, n_bytes) + described + b"".join(parts))
    if noise.maybe(0.5):
        at = noise.below(len(body))
        body[at] = noise.below(256)
    data = bytes(body) + (_checksum(bytes(body)) if noise.maybe(0.9) else bytes(32))
    slots = noise.rng.permutation(max(n, kv.n_slots))[:n]
    _, error = attempt(twins, lambda manager: manager.import_slots(SlotBundle.from_bytes(data), slots, pool=pool))
    twins._check_moved("import_slots", is_stamping=not error)
    return "refused bundle" if error else "bundle"


# ---- the others ------------------------------------------------------------------------------------------------------
def sweep(twins: Twins, noise: Noise, pool: int) -> str:
    n, kv = int(noise.rng.choice(LENGTHS)), twins.pools[pool]
    slots = noise.rng.permutation(max(n, kv.n_slots))[:n].astype(np.int32)
    lists = [slots, np.arange(n, dtype=np.int32), np.concatenate([[-1], slots[:-1]]).astype(np.int32)]
    lists = [noise.fill((n,), np.int32, v) if noise.maybe(0.7) else v for v in lists]
    tokens = noise.fill((n,), np.int32, noise.rng.integers(-1, 6, n).astype(np.int32)) if noise.maybe(0.5) else None
    twins.sweep(pool, *lists, tokens)
    return "sweep"


_ODD_IDS: tuple[Any, ...] = (-1, 1.5, None, "1", [], [[1]], [None], {}, 1 << 70, b"\1", float("nan"), [2, 2], True)
_ODD_OWNERS: tuple[Any, ...] = (*EDGES, *WIDE_EDGES, 0xFFFFFFFF, 1 << 32, None, "1", 1.5, [1])
_ODD_POOLS: tuple[Any, ...] = (-1, 99, "nowhere", None, 1.0, True)
_ODD_KINDS: tuple[Any, ...] = ("lend", "", None, 1, ["free"])


def ownership(twins: Twins, noise: Noise, pool: int) -> str:
    """Events of a scheduler: what it may say, with some noise in it now and then."""
    events = [_event(twins, noise, pool) for _ in range(1 + noise.below(3))]
    if noise.maybe(0.5):
        at, part = noise.below(len(events)), noise.below(5)
        event = list(events[at])
        if part == 0:
            event[1] = noise.fill((1 + noise.below(4),), ("i8", "i4", "u8")[noise.below(3)])
        elif part == 4:
            event = event[: 1 + noise.below(3)]
        else:
            odd = (_ODD_KINDS, _ODD_IDS, _ODD_OWNERS, _ODD_POOLS)
            field = noise.below(4)
            event[field] = odd[field][noise.below(len(odd[field]))]
        events[at] = tuple(event)
    return "refused ownership" if twins.lifecycle(events) else "ownership"


def _event(twins: Twins, noise: Noise, pool: int) -> tuple[Any, ...]:
    """One that makes sense, unless it is of a reserved block."""
    block, owner = noise.below(twins.pools[pool].n_blocks), 1 + noise.below(5)
    holders = twins.sides[0].manager.lifecycle.owners(block, pool)
    if not holders:
        return (("allocate", "allocate", "share")[noise.below(3)], [block], owner, pool)
    return ("share", [block], owner, pool) if noise.maybe(0.4) else ("free", [block], holders[-1], pool)
