"""Bundles: through bytes and onto other pools unchanged, sliced and joined, and never believed when damaged."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Sides
from agree_pools import random_pool
from agree_script import A, B, Row, Script, kinds
from agree_twins import Twins
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcanary import BundleError, CanaryConfig, CanaryManager, Half, KvPool, Plane, Reason, SlotBundle, abi, layouts
from kvcanary.bundle import PORTABLE, Geometry, SlotState

LINKS = (abi.PREV_IN_LIST, abi.PREV_NONE, abi.PREV_RELATIVE, abi.PREV_RELATIVE_BASE)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    real_data = draw(st.sampled_from(["none", "all", "partial"]))
    planes = st.lists(st.tuples(st.integers(1, 1 << 16), st.integers(0, 99)), min_size=1, max_size=3).map(tuple)
    unit = st.tuples(st.integers(1, 1 << 14), st.integers(0, 1), planes)
    units = () if real_data == "none" else tuple(draw(st.lists(unit, min_size=1, max_size=4)))
    return Geometry(draw(st.integers(1, 2)), real_data, draw(st.integers(-(1 << 31), (1 << 31) - 1)), units)


@st.composite
def bundles(draw: st.DrawFn, of: st.SearchStrategy[Geometry] | None = None) -> SlotBundle:
    geometry = draw(geometries() if of is None else of)
    n, planes = draw(st.integers(0, 12)), 2 * geometry.halves
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    stamps = np.zeros((planes, n), PORTABLE)
    stamps["chain"] = rng.integers(0, 1 << 63, (planes, n))
    stamps["token"], stamps["position"] = rng.integers(-1, 1 << 31, (2, planes, n))
    links = rng.choice(LINKS, (planes, n)).astype(np.int8)
    states = rng.integers(0, 3, n).astype(np.uint8)
    return SlotBundle(geometry, stamps, links, states, rng.integers(0, 1 << 63, (len(geometry.units), n), np.uint64))


def small() -> SlotBundle:
    geometry = Geometry(2, "all", 1, ((4, 0, ((16, 0),)), (1, 1, ((3, 0), (1, 0)))))
    stamps = np.zeros((4, 2), PORTABLE)
    stamps["chain"], stamps["token"], stamps["position"] = [5, 6], [7, -1], [0, 1]
    links = np.array([[-1, 0]] * 4, np.int8)
    return SlotBundle(geometry, stamps, links, np.array([2, 2], np.uint8), np.array([[1, 2], [3, 4]], np.uint64))


# ---- bytes -----------------------------------------------------------------------------------------------------------
@given(bundles())
def test_through_bytes_and_back(bundle: SlotBundle) -> None:
    data = bundle.to_bytes()
    found = SlotBundle.from_bytes(data)
    assert found.geometry == bundle.geometry and len(found) == len(bundle)
    for name in ("stamps", "links", "states", "digests"):
        assert np.array_equal(getattr(found, name), getattr(bundle, name))
    assert found == bundle and found.to_bytes() == data
    assert SlotBundle.from_bytes(memoryview(bytearray(data))) == bundle


def test_the_bytes_are_what_they_always_were() -> None:
    """Version 1, little-endian, by hand: so that a bundle is read by another machine, and by a later release."""
    data = small().to_bytes()
    geometry = bytes.fromhex(
        "02000000 01000000 01000000 02000000"  # halves, "all", token_offset, digests
        "04000000 00000000 01000000 10000000 00000000"  # words, half, planes; bytes and chunks of each
        "01000000 01000000 02000000 03000000 00000000 01000000 00000000"
    )
    header = b"kvcslots" + bytes.fromhex(f"01000000 {len(geometry):02x}000000 0200000000000000")
    stamps = bytes.fromhex("0500000000000000 07000000 00000000 0600000000000000 ffffffff 01000000") * 4
    digests = bytes.fromhex("0100000000000000 0200000000000000 0300000000000000 0400000000000000")
    body = geometry + stamps + bytes.fromhex("ff00") * 4 + bytes.fromhex("0202") + digests
    assert data[:24] == header
    assert data[24:32] == len(data).to_bytes(8, "little")
    assert data[32:-32] == body


def test_any_flipped_bit_of_a_small_bundle_is_refused() -> None:
    data = small().to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BundleError):
            SlotBundle.from_bytes(damaged)


@given(st.data())
@settings(max_examples=60)
def test_flipped_bits_of_a_larger_bundle_are_refused(data: st.DataObject) -> None:
    raw = bytearray(SlotBundle.concatenate([small()] * 200).to_bytes())
    for bit in data.draw(st.lists(st.integers(0, 8 * len(raw) - 1), min_size=1, max_size=3, unique=True)):
        raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BundleError):
        SlotBundle.from_bytes(raw)


def test_every_cut_and_every_addition_is_refused() -> None:
    data = small().to_bytes()
    for n in range(len(data)):
        with pytest.raises(BundleError):
            SlotBundle.from_bytes(data[:n])
    for more in (b"\0", b"\0" * 32, data):
        with pytest.raises(BundleError, match="cut off, or more behind it"):
            SlotBundle.from_bytes(data + more)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: b"", "0 bytes that do not begin with"),
        (lambda d: b"K" + d[1:], "do not begin with"),
        (lambda d: d[:8] + b"\2" + d[9:], "bundle of version 2, this is for 1: export and import with one version"),
        (lambda d: d[:-40], "cut off"),
        (lambda d: d[:60] + bytes([d[60] ^ 1]) + d[61:], "checksum is not that of its bytes: it was damaged"),
    ],
)
def test_the_message_says_what_is_wrong(change: Any, text: str) -> None:
    with pytest.raises(BundleError, match=text):
        SlotBundle.from_bytes(change(small().to_bytes()))


@pytest.mark.parametrize(
    ("at", "value"),
    [(16, 3), (16, 1), (19, 1), (20, 255), (24, 1 << 40), (32, 3), (32, 0), (36, 7), (44, 1 << 30), (44, 0), (56, 255)],
)
def test_contents_that_do_not_fit_under_a_right_checksum(at: int, value: int) -> None:
    """Whoever made it knows how checksums are made: entries, halves, real data, digests and planes of other numbers."""
    body = bytearray(small().to_bytes()[:-32])
    width = 8 if at == 24 else 1 if value < 256 else 4
    body[at : at + width] = value.to_bytes(width, "little")
    with pytest.raises(BundleError, match=r"checksum is right, but not its contents|cut off|shape|unknown values"):
        SlotBundle.from_bytes(bytes(body) + hashlib.blake2b(body, digest_size=32).digest())


# ---- parts -----------------------------------------------------------------------------------------------------------
@given(bundles(), st.integers(0, 12), st.integers(0, 12))
def test_slices_join_to_what_they_were_but_for_the_seam(bundle: SlotBundle, i: int, j: int) -> None:
    i, j = sorted((min(i, len(bundle)), min(j, len(bundle))))
    parts = [bundle[:i], bundle[i:j], bundle[j:]]
    joined = SlotBundle.concatenate(parts)
    assert [len(p) for p in parts] == [i, j - i, len(bundle) - j]
    for name in ("stamps", "states", "digests"):
        assert np.array_equal(getattr(joined, name), getattr(bundle, name))
    inner = [k for k in range(len(bundle)) if k not in (0, i, j)]
    assert np.array_equal(joined.links[:, inner], bundle.links[:, inner])
    for part in parts:
        assert not np.isin(part.links[:, :1], (abi.PREV_IN_LIST, abi.PREV_RELATIVE_BASE)).any(), "nothing is before it"


def test_what_cannot_be_joined_or_sliced() -> None:
    bundle = small()
    other = SlotBundle(Geometry(2, "all", 0, bundle.geometry.units), *[getattr(bundle, n) for n in NAMES])
    with pytest.raises(BundleError, match="it has token_offset=0, the first 1"):
        SlotBundle.concatenate([bundle, other])
    with pytest.raises(BundleError, match="at least one"):
        SlotBundle.concatenate([])
    for part in (0, slice(0, 2, -1)):
        with pytest.raises(BundleError, match="a range of neighbours"):
            bundle[part]  # type: ignore[index]


NAMES = ("stamps", "links", "states", "digests")


def test_arrays_of_other_shapes_or_unknown_values_are_no_bundle() -> None:
    bundle = small()
    with pytest.raises(BundleError, match=r"digests of a bundle has shape \(1, 2\): give \(2, 2\)"):
        SlotBundle(bundle.geometry, bundle.stamps, bundle.links, bundle.states, bundle.digests[:1])
    with pytest.raises(BundleError, match="unknown values"):
        SlotBundle(bundle.geometry, bundle.stamps, bundle.links + np.int8(1), bundle.states, bundle.digests)


def test_states_tell_what_was_exported(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 6, [1, 2]))
    s.twins.edit_guard(0, "tail1", lambda array: array["step"].__setitem__(5, 9))
    bundle = s.twins.call("export_slots", [4, 5, 6, 20])
    assert bundle.states.tolist() == [SlotState.WHOLE, SlotState.UNFINISHED, SlotState.WHOLE, SlotState.NEVER]
    assert bundle.stamps["token"][0].tolist() == [*A[:3], 0]
    s.twins.call("import_slots", bundle, [12, 13, 14, 15])
    s.copy([4, 5, 6], [12, 13, 14], stamps_too=False)
    assert kinds(s.forward(Row(2, A, 3, 4, [3]))) == {13: Reason.UNWRITTEN}


# ---- other pools -----------------------------------------------------------------------------------------------------
@given(st.integers(0, (1 << 32) - 1))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_onto_a_pool_of_another_shape(sides: Sides, seed: int) -> None:
    """Another page size, number of slots and layout of the same planes: what was written there is known here."""
    rng, bytes_of = random.Random(seed), np.random.default_rng(seed)
    heads, dim, has_v = rng.choice((1, 2, 3)), rng.choice((4, 8)), rng.random() < 0.5
    real_data = rng.choice(("all", "all", "none"))
    pools: list[tuple[Twins, int, int]] = []
    for _ in range(2):
        page, n_blocks = rng.choice((1, 2, 4, 5, 16)), rng.randint(20, 40)
        shape = {"nhd": (n_blocks, page, heads, dim), "hnd": (n_blocks, heads, page, dim)}
        layout = rng.choice(("nhd", "hnd"))
        names = [f"{half}{i}" for half in ("kv" if has_v else "k") for i in range(2)]

        def build(given: Any, layout: str = layout) -> KvPool:
            halves = {half: [given[f"{half}{i}"] for i in range(2)] for half in ("kv" if has_v else "k")}
            return getattr(layouts, layout)(**halves)

        spec = PoolSpec({name: np.zeros(shape[layout], np.uint16) for name in names}, build)
        pools.append((Twins([spec], sides(), 4, 64, verify_data_every=1, real_data=real_data), page, n_blocks))
    n = rng.randint(1, 14)
    tokens = bytes_of.integers(0, 1000, 20).astype(np.int32)

    def batch(table: list[int], page: int, start: int, end: int) -> dict[str, Any]:
        positions = np.arange(start, end)
        slots = np.array(table)[positions // page] * page + positions % page
        return {
            "block_table": np.array([table], np.int32), "seq_lens": np.array([end], np.int32),
            "query_start_loc": np.array([0, end - start], np.int32), "input_ids": tokens[start:end],
            "slot_mapping": slots, "request_slots": np.array([1], np.int32),
            "request_ids": np.array([5], np.uint32), "token_history": np.tile(tokens, (4, 1)),
        }  # fmt: skip

    (source, page, n_blocks), (target, page_there, n_blocks_there) = pools
    table = [1 + int(b) for b in bytes_of.permutation(n_blocks - 1)]
    written = batch(table, page, 0, n)
    slots = written["slot_mapping"]
    source.forward(written, model=lambda: source.write_kv(0, slots, bytes_of))
    bundle = SlotBundle.from_bytes(source.call("export_slots", slots).to_bytes())
    table_there = [1 + int(b) for b in bytes_of.permutation(n_blocks_there - 1)]
    slots_there = batch(table_there, page_there, 0, n)["slot_mapping"]
    for mine, theirs in zip(source.pools[0].planes, target.pools[0].planes, strict=True):
        data = source.pools[0].gather(mine, slots).reshape(n, heads, -1)
        at = target.pools[0].host_bytes(theirs)
        at[slots_there // page_there, slots_there % page_there] = data.reshape(n, *at.shape[2:])
    target.call("import_slots", bundle, slots_there)
    target.forward(batch(table_there, page_there, n, n + 1))
    assert len(target.records) == 0
    assert target.call("export_slots", slots_there) == bundle
    compared = int(target.words[abi.STATE_DATA_SLOTS])
    assert compared == n * len(bundle.digests)


def manager_of(planes: list[Plane], real_data: str = "all", **fields: Any) -> CanaryManager:
    pool = KvPool(planes=tuple(planes), page_size=4, n_blocks=8, **fields)
    return CanaryManager(CanaryConfig(real_data=real_data), [pool], 4, 64)


def plane(n_chunks: int, chunk_bytes: int, half: Half = Half.K) -> Plane:
    """Chunks apart from each other, so that they stay chunks."""
    token_stride = 4 * n_chunks * chunk_bytes
    return Plane(
        data=np.zeros(32 * token_stride, np.uint8), page_stride=4 * token_stride, token_stride=token_stride,
        chunk_stride=2 * chunk_bytes, n_chunks=n_chunks, chunk_bytes=chunk_bytes, half=half,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (([plane(1, 32)],), ([plane(1, 64)],), r"its digest 0 is of \(words, half, planes\) \(8, 0, .* of \(16, 0"),
        (([plane(1, 32)],), ([plane(1, 32), plane(1, 32)],), "it has 1 digests a slot, the pool 2"),
        (([plane(1, 32)],), ([plane(1, 32), plane(1, 32, Half.V)],), "it has halves=1, the pool 2"),
        (([plane(2, 32)], "partial"), ([plane(2, 32)],), "it has real_data='partial', the pool 'all'"),
    ],
)
def test_a_bundle_of_another_kind_of_cache_is_refused(source: Any, target: Any, text: str) -> None:
    bundle = manager_of(*source).export_slots([4, 5])
    with pytest.raises(BundleError, match=text):
        manager_of(*target).import_slots(bundle, [8, 9])


def test_a_bundle_of_another_token_offset_is_refused() -> None:
    bundle = manager_of([plane(1, 32)], token_offset=1).export_slots([4])
    with pytest.raises(BundleError, match="it has token_offset=1, the pool 0"):
        manager_of([plane(1, 32)]).import_slots(bundle, [8])


def test_chunks_count_only_where_a_part_of_each_is_digested() -> None:
    whole = manager_of([plane(4, 8)]).export_slots([4])
    manager_of([plane(2, 16)]).import_slots(whole, [8])
    part = manager_of([plane(2, 16)], "partial").export_slots([4])
    with pytest.raises(BundleError, match="digest 0"):
        manager_of([plane(1, 32)], "partial").import_slots(part, [8])


def test_pools_of_groups_and_scales_keep_their_bundles(sides: Sides) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        spec = random_pool(rng, n_blocks=12, page_size=4, layout=rng.choice(("groups", "planes", "token_major")))
        twins = Twins([spec], sides(), 4, 64)
        slots = np.arange(8, 20)
        twins.call("adopt_slots", slots, range(12), tokens=B[:12])
        bundle = twins.call("export_slots", slots)
        assert SlotBundle.from_bytes(bundle.to_bytes()) == bundle and bundle.states.tolist() == [2] * 12
        twins.call("import_slots", bundle, slots + 12)
        assert twins.call("export_slots", slots + 12) == bundle
