"""The real kernels, run on the CPU, and the NumPy reference agree bit for bit: healthy, damaged, and fed with noise."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from agree import Arrays, LateSide, PoolSpec, Side, SimtSide
from agree_drive import drive, random_scenario
from agree_faults import KINDS, SEEN_BEFORE_THE_MODEL, Faults
from agree_pools import random_pool
from agree_script import A, B, Row, Script, batch_of, kinds, pool_spec
from agree_twins import Twins
from hypothesis import given
from hypothesis import strategies as st
from simt.build import sanitizer_environment
from simt.runner import SimtLibrary
from strategies import examples

from kvcanary import Reason, abi

HERE = Path(__file__).resolve().parent
SEEDS = st.integers(0, (1 << 32) - 1)


def run(
    seed: int, sides: list[Side], kinds: tuple[str, ...], n_steps: int, probability: float = 0.3, max_len: int = 0
) -> Twins:
    """A random engine whose memory and metadata go wrong; every call is compared."""
    rng = random.Random(seed)
    twins, engine = random_scenario(rng, sides, max_len=max_len, is_odd=True)
    drive(twins, engine, rng, n_steps, lambda call: None, Faults(rng, kinds, probability))
    return twins


# ---- random engines --------------------------------------------------------------------------------------------------
@examples(100)
@given(SEEDS, st.sets(st.sampled_from(KINDS)), st.integers(1, 10))
def test_with_some_faults(library: SimtLibrary, seed: int, kinds: set[str], n_steps: int) -> None:
    run(seed, [Side(), SimtSide(library, seed=seed % 99)], tuple(sorted(kinds)), n_steps, 0.2)


@examples(60)
@given(SEEDS, st.integers(1, 6))
def test_fed_with_noise(library: SimtLibrary, seed: int, n_steps: int) -> None:
    run(seed, [Side(), SimtSide(library)], KINDS, n_steps, 0.6)


@examples(15, is_variant=True)
@given(SEEDS, st.sets(st.sampled_from(SEEN_BEFORE_THE_MODEL), min_size=1))
def test_with_head_after_the_model(library: SimtLibrary, seed: int, kinds: set[str]) -> None:
    run(seed, [Side(), LateSide(library)], tuple(sorted(kinds)), 8)


@examples(20)
@given(SEEDS, st.integers(0, 1000), st.integers(0, 1000))
def test_neither_grid_nor_order_matter(library: SimtLibrary, seed: int, first: int, second: int) -> None:
    sides = [SimtSide(library, 1, first), SimtSide(library, 2, second), SimtSide(library, 3)]
    run(seed, [Side(), *sides], KINDS, 4)


@pytest.mark.parametrize("capacity", [0, 1, 7, 10**4])
def test_however_short_the_list_of_due_slots_is(
    library: SimtLibrary, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    """Where it has no room for all, kvc_digests_verify looks through the rows itself."""
    monkeypatch.setattr(abi, "due_capacity", lambda *_sizes: capacity)
    n_compared = 0
    for seed in range(4):
        rng = random.Random(seed)
        config = {"verify_data_every": rng.choice((8, 11)), "full_verify_min_tokens": 100, "real_data": "all"}
        twins, engine = random_scenario(rng, [Side(), SimtSide(library, 2)], max_len=200, **config)
        drive(twins, engine, rng, 8, lambda call: None, Faults(rng, ("bytes",), 0.3))
        n_compared += int(twins.words[abi.STATE_DATA_SLOTS])
    assert n_compared > 100


@examples(10, is_variant=True)
@given(SEEDS)
def test_more_positions_than_a_warp_takes_at_once(library: SimtLibrary, seed: int) -> None:
    run(seed, [Side(), SimtSide(library, 2)], ("bytes", "guard", "table", "lengths"), 6, max_len=400)


@examples(3, is_variant=True)
@given(SEEDS)
def test_long_requests(library: SimtLibrary, seed: int) -> None:
    twins = run(seed, [Side(), SimtSide(library, 3)], ("bytes", "guard", "table"), 3, max_len=4500)
    assert twins.words[abi.STATE_FORWARD]


def test_the_faults_are_met(library: SimtLibrary) -> None:
    """The runs above prove nothing about what never happens in them."""
    reasons = Reason(0)
    for seed in range(40):
        rng = random.Random(seed)
        twins, engine = random_scenario(rng, [Side()], is_odd=True)

        def after(call: str, twins: Twins = twins) -> None:
            nonlocal reasons
            reasons |= Reason(int(np.bitwise_or.reduce(twins.records["reasons"], initial=0)))

        drive(twins, engine, rng, 8, after, Faults(rng, KINDS))
    assert reasons == ~Reason.NONFINITE_RESERVED, "which is off here"


# ---- what random engines seldom do -----------------------------------------------------------------------------------
def small_pool(**fields: int) -> PoolSpec:
    return random_pool(random.Random(0), n_blocks=12, page_size=4, layout="nhd", has_v=True, **fields)


def both(library: SimtLibrary) -> list[Side]:
    return [Side(), SimtSide(library, 1), SimtSide(library, 3, seed=5)]


def prefill(n: int, prefix: int, table: np.ndarray, page: int, ids: np.ndarray) -> Arrays:
    """One row of n new tokens."""
    positions = np.arange(prefix, prefix + n)
    return {
        "block_table": table,
        "seq_lens": np.array([prefix + n], np.int32),
        "query_start_loc": np.array([0, n], np.int32),
        "input_ids": ids[positions],
        "slot_mapping": table[0, positions // page].astype(np.int64) * page + positions % page,
        "request_slots": np.array([2], np.int32),
        "request_ids": np.array([7], np.uint32),
    }


@pytest.mark.parametrize("has_history", [True, False])
def test_prefills_of_several_tiles(library: SimtLibrary, has_history: bool) -> None:
    """Chunks of 1, 2500 (3 tiles), 1024 and 16 tokens, 17 drafts that are all taken back, then noise in the KV."""
    page, n_blocks = 16, 300
    spec = random_pool(random.Random(1), n_blocks=n_blocks, page_size=page, layout="token_major")
    twins = Twins([spec], both(library), 4, 4096, verify_data_every=3)
    rng = np.random.default_rng(2)
    table = (1 + rng.permutation(n_blocks - 1)).astype(np.int32)[None]
    ids = rng.integers(0, 1 << 30, 4700).astype(np.int32)
    history = np.tile(ids, (4, 1))
    prefix = 0
    for n in (1, 2500, 1024, 16, 900, 17, -17, 1, 1):
        if n < 0:
            prefix += n
            continue
        arrays = prefill(n, prefix, table, page, ids)
        slots = arrays["slot_mapping"]
        given = {**arrays, **({"token_history": history} if has_history else {})}
        twins.forward(given, model=lambda slots=slots: twins.write_kv(0, slots, rng))
        assert len(twins.records) == 0
        prefix += n
    assert prefix > 4096
    damaged = rng.choice(prefix, 5, replace=False)
    slots = table[0, damaged // page].astype(np.int64) * page + damaged % page
    twins.write_kv(0, slots, rng)
    arrays = {**prefill(1, prefix, table, page, ids), "verify_all": np.ones(1, np.uint8)}
    assert set(twins.forward(arrays)["position"]) == set(damaged)


def test_more_rows_than_a_block_has_threads(library: SimtLibrary) -> None:
    """The units of work are found by a search of several rounds, the sums are carried over blocks of 256 rows."""
    n_rows, page = 600, 4
    spec = random_pool(random.Random(3), n_blocks=n_rows + 1, page_size=page, layout="token_major")
    twins = Twins([spec], both(library), n_rows, 3 * n_rows, verify_data_every=1)
    rng = np.random.default_rng(4)
    lengths = np.zeros(n_rows, np.int32)
    table = np.arange(1, n_rows + 1, dtype=np.int32)[:, None]
    for _ in range(2):
        n_new = rng.integers(0, 3, n_rows)
        starts = np.concatenate([[0], np.cumsum(n_new)])
        row = np.repeat(np.arange(n_rows), n_new)
        position = lengths[row] + np.arange(starts[-1]) - starts[row]
        lengths += n_new.astype(np.int32)
        slots = table[row, 0].astype(np.int64) * page + position
        arrays = {
            "block_table": table,
            "seq_lens": lengths.copy(),
            "query_start_loc": starts.astype(np.int32),
            "input_ids": rng.integers(0, 99, starts[-1]).astype(np.int32),
            "slot_mapping": slots,
            "request_slots": rng.permutation(n_rows).astype(np.int32),
            "request_ids": np.arange(1, n_rows + 1, dtype=np.uint32),
        }
        twins.forward(arrays, model=lambda slots=slots: twins.write_kv(0, slots, rng))
    assert len(twins.records) == 0
    twins.forward({**arrays, "block_table": table[::-1].copy()})
    assert len(twins.records) > n_rows


def test_a_full_ring_only_counts(library: SimtLibrary) -> None:
    """Nobody reads: the ring keeps what came first, of which only the number is certain."""
    twins = Twins([pool_spec()], both(library), 8, is_acknowledging=False, ring_capacity=3)
    for n in range(1, 5):
        twins.forward(batch_of([Row(1, A, 4 * n, 4 * n + 1, [1, 2, 3, 4, 5, 6])]))
    words = twins.words
    assert words[abi.STATE_CLAIMED] == 3
    assert words[abi.STATE_DROPPED] > 0
    assert words[abi.STATE_OBSERVATIONS] == words[abi.STATE_CLAIMED] + words[abi.STATE_DROPPED]


def test_a_batch_that_is_bound_once(library: SimtLibrary) -> None:
    """What a captured graph does: the same arrays, other contents, padding behind the rows that are there."""
    twins = Twins([pool_spec(has_v=True)], both(library), 8, verify_data_every=1)
    rng = np.random.default_rng(6)

    def padded(*rows: Row) -> Arrays:
        return batch_of([*rows, *[Row(0, [0], 0, 1, [0], slots=[-1])] * (4 - len(rows))])

    batches = twins.bind(padded())
    tables = {1: [1, 2], 2: [3, 4], 3: [5, 6]}
    for n in range(8):
        requests = [r for r in tables if (n + r) % 4]
        rows = [Row(r, A, n, n + 1, tables[r]) for r in tables]
        slots = np.array([s for row in rows for s in row.targets])
        found = twins.forward(padded(*rows), model=lambda slots=slots: twins.write_kv(0, slots, rng), batches=batches)
        assert len(found) == 0, requests


@pytest.mark.parametrize(
    "changes",
    [
        {"seq_lens": np.zeros(0, np.int32), "query_start_loc": np.zeros(1, np.int32)},
        {"block_table": np.zeros((1, 0), np.int32)},
        {"block_table": None, "kv_indptr": np.array([0, 0], np.int32), "kv_indices": np.zeros(0, np.int32)},
        {"input_ids": np.zeros(0, np.int32), "slot_mapping": np.zeros(0, np.int64)},
    ],
    ids=["no rows", "no table columns", "no table entries", "no tokens"],
)
def test_empty_arrays(library: SimtLibrary, changes: Arrays) -> None:
    arrays = {**batch_of([Row(1, A, 3, 5, [1, 2])], leave_out=["salts"]), **changes}
    if len(arrays["query_start_loc"]) == 1:
        names = ("block_table", "request_slots", "request_ids")
        arrays |= {name: arrays[name][:0] for name in names}
    twins = Twins([pool_spec(has_v=True)], both(library), 8)
    for _ in range(2):
        twins.forward(arrays)


def test_a_last_page_that_overflows(library: SimtLibrary) -> None:
    """A row longer than positions can count is cut to what they can, and reported."""
    arrays = batch_of([Row(1, A, 0, 2, [1])], leave_out=["block_table", "seq_lens", "salts"])
    last = np.array([(1 << 31) - 1], np.int32)
    csr = {"kv_indptr": np.array([0, 2], np.int32), "kv_indices": np.array([1, 2], np.int32), "kv_last_page_len": last}
    twins = Twins([pool_spec()], both(library), 8)
    found = twins.forward({**arrays, **csr})
    assert (1 << 31) - 1 in found["slot"]


def test_adoption_of_a_slot_that_many_rows_share(library: SimtLibrary) -> None:
    """Imported once, read by three rows, one of which names it at another position: the lowest position has it."""
    s = Script(both(library), on_unwritten="adopt")
    shared = [Row(r, A, 4, 5, [1, r + 1]) for r in (1, 2)]
    twisted = Row(3, [*B[:8], 1], 8, 9, [7, 1, 4])
    assert s.forward(twisted, *shared) == []
    words = s.twins.words
    assert words[abi.STATE_ADOPTED_SLOTS] == 8
    assert s.twins.sides[0].read_guard(0, "head0")["position"][4:8].tolist() == [0, 1, 2, 3]
    found = s.forward(*[Row(r, A, 5, 6, [1, r + 1]) for r in (1, 2)], Row(3, [*B[:8], 1, 2], 9, 10, [7, 1, 4]))
    assert kinds(found) == dict.fromkeys(range(4, 8), Reason.POSITION)


def test_proof(library: SimtLibrary) -> None:
    for layout in ("nhd", "hnd", "groups", "planes"):
        spec = random_pool(random.Random(7), n_blocks=8, page_size=4, layout=layout, reserved_blocks=(0,))
        twins = Twins([spec], both(library), 8, real_data="all")
        arrays = batch_of([Row(1, A, 0, 6, [1, 2])])
        twins.forward(arrays)
        assert twins.prove(arrays).ok


# ---- under the sanitizers --------------------------------------------------------------------------------------------
SANITIZED = """
import random, sys
from pathlib import Path
from agree import Side, SimtSide, simt_library
from test_kernels_agree import KINDS, run
from test_kernels_reserved import test_any_layout_with_random_bytes as check_reserved_blocks

library = simt_library(Path(sys.argv[1]), sanitize=True)
for seed in range(25):
    run(seed, [Side(), SimtSide(library, 1 + seed % 2)], KINDS, 4, 0.5)
    check_reserved_blocks(lambda: [Side(), SimtSide(library)], seed)
print("no finding")
"""


def test_noise_under_the_sanitizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No access outside an array, no undefined arithmetic, whatever the engine hands in."""
    environment = sanitizer_environment()
    if environment is None:
        pytest.skip("no address sanitizer: install libasan for the C++ compiler")
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(tmp_path_factory.getbasetemp())],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "no finding" in done.stdout
