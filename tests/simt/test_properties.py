"""Laws that the real kernels keep, whatever the pools, layouts, tables, lengths, windows and faults of an engine are.

That they agree with the reference bit for bit, and with themselves on other grids and in other orders, is in
tests/test_kernels_agree.py; that they are silent about an honest engine, in tests/test_kernels_clean.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from agree import Array, Arrays, SimtSide
from agree_changed import (
    N_SPARE_ROWS,
    N_SPARE_TOKENS,
    Change,
    ChangedSide,
    ChangedTwins,
    RowParts,
    put_together,
    take_apart,
)
from agree_drive import drive, random_scenario
from agree_faults import Faults
from agree_twins import Twins
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from kvcanary import KvPool, abi
from kvcanary.tags import CanaryLaunchTag, Stage

from .runner import SimtLibrary

SEEDS = st.integers(0, (1 << 32) - 1)
SHARE = 12  # of the default profile's examples, in percent
N_STEPS = 6


def run(
    seed: int,
    sides: Sequence[Any],
    kinds: tuple[str, ...],
    make: Callable[..., Twins],
    n_steps: int = N_STEPS,
    **config: Any,
) -> tuple[Twins, Any]:
    """A random engine whose memory and tables go wrong in some of these ways."""
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, sides, is_odd=True, make=make, **config)
    chosen = tuple(kind for kind in kinds if rng.random() < 0.5)
    drive(twins, engine, rng, N_STEPS, lambda call: None, Faults(rng, chosen, 0.2))
    return twins, engine


# ---- padding and order -----------------------------------------------------------------------------------------------
class PaddedTwins(ChangedTwins):
    """The second side gets rows of padding between and behind the others."""

    def changed(self, arrays: Arrays, row_of: Array) -> Change:
        rows = take_apart(arrays)
        if not rows:
            return Change(arrays, np.zeros(0, np.int64))
        is_static = "block_table" not in arrays and "kv_indices" not in arrays
        places = row_of.tolist() if self.is_inner else self._places(len(rows), is_static)
        n_each = N_SPARE_TOKENS // N_SPARE_ROWS
        told = [rows[r] if r >= 0 else padding(self.rng, rows[0], self.rng.randint(0, n_each)) for r in places]
        return Change(put_together(told, arrays), np.array(places, np.int64))

    def _places(self, n_rows: int, is_static: bool) -> list[int]:
        """The rows in their order, and -1 for padding."""
        places, room = list(range(n_rows)), min(self._max_requests - n_rows, N_SPARE_ROWS)
        if is_static:  # row r is block r
            room = min(room, min(pool.n_blocks for pool in self.pools) - n_rows)
        for _ in range(self.rng.randint(0, room)):
            places.insert(n_rows if is_static else self.rng.randint(0, n_rows), -1)
        return places


def padding(rng: random.Random, like: RowParts, n: int) -> RowParts:
    """A row of padding with n new tokens: without a slot, or of a length that cannot be."""
    has_slots = "seq_lens" in like.values and n > 0 and rng.random() < 0.3
    tokens = {}
    for name, olds in like.tokens.items():
        value = 3 if name != "slot_mapping" or has_slots else -1
        tokens[name] = [np.full(n, value, old.dtype) for old in olds]
    tables = {name: [np.full(len(old), 1, np.int32) for old in olds] for name, olds in like.tables.items()}
    if "kv_last_page_len" in like.values:  # the length is that of the table
        tables = {name: [old[:0] for old in olds] for name, olds in tables.items()}
    values: dict[str, list[Any]] = {name: list(olds) for name, olds in like.values.items()}
    if "seq_lens" in values:
        values["seq_lens"] = [rng.randint(0, n - 1) if has_slots else rng.choice((0, n, 40))]
    return RowParts(tokens, tables, values)


class PermutedTwins(ChangedTwins):
    """The second side gets the requests in another order."""

    def changed(self, arrays: Arrays, row_of: Array) -> Change:
        rows = take_apart(arrays)
        if not rows:
            return Change(arrays, np.zeros(0, np.int64))
        order = row_of.tolist() if self.is_inner else list(range(len(rows)))
        if not self.is_inner and ("block_table" in arrays or "kv_indices" in arrays):  # else row r is block r
            self.rng.shuffle(order)
        return Change(put_together([rows[r] for r in order], arrays), np.array(order, np.int64))


@examples(SHARE)
@given(SEEDS)
def test_padding_changes_nothing(library: SimtLibrary, seed: int) -> None:
    run(seed, [SimtSide(library), ChangedSide(library, 2, 7)], ("bytes", "lut", "table", "ownership"), PaddedTwins)


@examples(SHARE)
@given(SEEDS)
def test_the_order_of_requests_changes_nothing(library: SimtLibrary, seed: int) -> None:
    run(seed, [SimtSide(library), ChangedSide(library, 2, 7)], ("bytes", "table", "ownership"), PermutedTwins)


# ---- counters --------------------------------------------------------------------------------------------------------
def real_slots(pool: KvPool, named: Array) -> Array:
    """The slots of the pool that the engine's mapping names."""
    slots = named[named >= 0].astype(np.int64)
    if pool.lut_view is not None:
        lut = pool.lut_view.host
        assert lut is not None
        slots = lut[slots]
    return slots[(slots >= 0) & ~np.isin(slots // pool.page_size, pool.reserved_blocks)]


def is_verified(pool: KvPool, p: int, prefix: int, length: int) -> bool:
    """Whether position p of a prefix is: one of the sink's, or in the window and not overwritten in a ring."""
    is_in_window = pool.window is None or p > prefix - pool.window
    return p < pool.sink or (is_in_window and (not pool.ring_length or p >= length - pool.ring_length))


def entries_of(pool: KvPool, arrays: Arrays, i: int) -> tuple[int, int]:
    """Stamps that a forward writes and prefix positions that it verifies in a pool, counted row by row from the arrays.

    Args:
        i: number of the pool among those of the forward.
    """

    def of_pool(name: str) -> Array:
        value: Any = arrays[name]
        found: Array = value[i] if isinstance(value, list) else value
        return found

    n_written = n_verified = 0
    starts = arrays["query_start_loc"]
    for r in range(len(starts) - 1):
        n_new = int(starts[r + 1] - starts[r])
        slots = real_slots(pool, of_pool("slot_mapping")[starts[r] : starts[r + 1]])
        if not len(slots):
            continue
        n_written += len(set(slots.tolist()))
        if "seq_lens" in arrays:
            length = int(arrays["seq_lens"][r])
        else:
            pages = int(np.diff(of_pool("kv_indptr"))[r])
            length = (pages - 1) * pool.page_size + int(of_pool("kv_last_page_len")[r])
        prefix = length - n_new
        n_verified += sum(is_verified(pool, p, prefix, length) for p in range(prefix))
    return n_written, n_verified


class CountedTwins(Twins):
    """Counts by hand what each forward must count."""

    n_counted = 0

    def forward(self, arrays: Arrays, **options: Any) -> Array:
        layout = self.sides[0].manager.state.layout
        before = layout.slot_runs(self.words).astype(np.int64)
        records = super().forward(arrays, **options)
        found = layout.slot_runs(self.words).astype(np.int64) - before
        wanted = np.zeros_like(found)
        chosen = options.get("pools") or range(len(self.pools))
        for i, p in enumerate(chosen):
            pool = self.pools[p]
            n_written, n_verified = entries_of(pool, arrays, i)
            self.n_counted += n_verified
            for half in pool.halves:
                for stage in (Stage.HEAD, Stage.TAIL) if options["has_tail"] else (Stage.HEAD,):
                    n = n_written + n_verified * (not self.is_paused)
                    wanted[p, CanaryLaunchTag.of(stage, half, pool.kind)] = n
        assert np.array_equal(found, wanted), (found, wanted)
        return records


@examples(SHARE)
@given(SEEDS)
def test_each_launch_and_each_entry_is_counted_once(library: SimtLibrary, seed: int) -> None:
    """By what the arrays say, not by what another guard counts; launches are counted so in every run of these tests."""
    run(seed, [SimtSide(library, 1 + seed % 2, seed % 99)], ("bytes", "ownership"), CountedTwins)


# ---- the same again --------------------------------------------------------------------------------------------------
class RememberingTwins(Twins):
    """Remembers the last forward of which all pools took part."""

    last: Arrays | None = None

    def forward(self, arrays: Arrays, **options: Any) -> Array:
        if options.get("pools") is None:
            self.last = arrays
        return super().forward(arrays, **options)


def told(records: Array, knows_chains: bool) -> list[tuple[Any, ...]]:
    """The records without the numbers of the forward that reported, and of the one that wrote."""
    left_out = {"commit", "step", "forward", "stamp_step"}
    left_out |= set() if knows_chains else {"stored_chain", "expected_chain", "reasons"}
    names = [n for n in abi.VIOLATION.names or () if n not in left_out]
    return sorted(tuple(v[n].item() for n in names) for v in records)


def kept(twins: Twins) -> dict[str, Array]:
    """What the guard keeps, without the numbers of forwards."""
    facts = {}
    for i, pool in enumerate(twins.pools):
        for name in [f"{plane}{h}" for plane in ("head", "tail") for h in range(len(pool.halves))]:
            stamps = twins.sides[0].read_guard(i, name).copy()
            stamps["step"] = stamps["step"] != 0
            facts[f"{name} of {i}"] = stamps
        registers = twins.sides[0].read_guard(i, "registers").copy()
        registers["forwards"] = 0
        facts[f"registers of {i}"] = registers
        if twins._has_digests(i):
            facts[f"digests of {i}"] = twins.sides[0].read_guard(i, "digests")
    return facts


def check_again(twins: Twins, call: Callable[[], Array], n_rows: int = 0) -> None:
    """Once for what the call changes; then it reports, counts and leaves the same, however often.

    But a row that takes its chain out of the cache may take it from where it, or another, writes: with a broken table,
    each time another one.
    """
    call()
    flags = np.concatenate([twins.sides[0].rows(i, n_rows)["flags"] for i in range(len(twins.pools))])
    knows_chains = not ((flags & abi.ROW_LIVE != 0) & (flags & abi.ROW_ANCHORED == 0)).any()
    outcomes = []
    for _ in range(2):
        before = twins.words.astype(np.int64)
        records = told(call(), knows_chains)
        outcomes.append((records, twins.words.astype(np.int64) - before, kept(twins) if knows_chains else {}))
    (first, counted, left), (second, counted_again, left_again) = outcomes
    assert first == second
    assert np.array_equal(counted, counted_again)
    for name, value in left.items():
        assert np.array_equal(value, left_again[name]), name


@examples(SHARE)
@given(SEEDS)
def test_the_same_again_says_the_same_again(library: SimtLibrary, seed: int) -> None:
    kinds = ("bytes", "guard", "lut", "table", "rows", "slots", "lengths", "noise", "ownership")
    config = {"verify_data_every": 1, "scrub_bytes_per_step": 0}
    twins, _ = run(seed, [SimtSide(library)], kinds, RememberingTwins, **config)
    rng = random.Random(seed)
    pool = rng.randrange(len(twins.pools))
    slots = np.array(rng.sample(range(twins.pools[pool].n_slots), 5), np.int32)
    before, places = np.roll(slots, 1), np.arange(5, dtype=np.int32)
    check_again(twins, lambda: twins.sweep(pool, slots, places, before, None))
    arrays = twins.last
    if arrays is not None:
        check_again(twins, lambda: twins.forward(arrays), len(arrays["query_start_loc"]) - 1)


def test_the_laws_are_about_something(library: SimtLibrary) -> None:
    """The runs above prove nothing about what never happens in them."""
    sides, seeds = [SimtSide(library), ChangedSide(library)], range(5)
    changed = [run(seed, sides, (), make)[0].n_changed for seed in seeds for make in (PaddedTwins, PermutedTwins)]
    counted = [run(seed, sides[:1], (), CountedTwins)[0].n_counted for seed in seeds]
    again = [run(seed, sides[:1], (), RememberingTwins)[0].last for seed in seeds]
    assert sum(changed) > 10
    assert sum(counted) > 100
    assert any(arrays is not None for arrays in again)
