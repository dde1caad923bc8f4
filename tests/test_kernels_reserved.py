"""NaN and Inf in reserved blocks, on reference and kernels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Sides, SimtSide
from agree_pools import LAYOUTS, random_pool
from agree_script import A, Row, Script, batch_of
from fake_toy import fake_world, prefilled  # noqa: F401  a fixture
from numpy.typing import NDArray
from simt.fake_cuda import FakeCuda

from kvcanary import CanaryConfig, CanaryManager, KvPool, Plane, Reason, StepBatch, abi, layouts
from kvcanary.construct import pool_names
from kvcanary.elements import ELEMENTS
from kvcanary.tags import Detail, Half
from kvcanary.violations import decode

N_BLOCKS, PAGE = 8, 4  # the script's
# Some of what is not finite, and the finite patterns next to it.
SPECIAL: dict[str, tuple[int, ...]] = {
    "float32": (0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF),
    "float16": (0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF),
    "bfloat16": (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF),
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e4m3fnuz": (0x80,),
    "float8_e5m2": (*range(0x7C, 0x80), *range(0xFC, 0x100)),
}
FINITE: dict[str, tuple[int, ...]] = {
    "float32": (0x7F7FFFFF, 0xFF7FFFFF, 0x80000000, 0x00FF7F80),
    "float16": (0x7BFF, 0xFBFF, 0x8000, 0x03FF),
    "bfloat16": (0x7F7F, 0xFF7F, 0x8000, 0x007F),
    "float8_e4m3fn": tuple(set(range(256)) - {0x7F, 0xFF}),
    "float8_e4m3fnuz": tuple(set(range(256)) - {0x80}),
    "float8_e5m2": tuple(set(range(256)) - {*range(0x7C, 0x80), *range(0xFC, 0x100)}),
}
NAMES = tuple(SPECIAL)


def spec_of(dtype: str = "float16", n: int = 24, reserved: Sequence[int] = (0,), n_layers: int = 3) -> PoolSpec:
    """Arrays of integers, `n` elements a slot in two heads, whose type the engine tells."""
    size = ELEMENTS[dtype].n_bytes
    arrays = {f"k{i}": np.zeros((N_BLOCKS, PAGE, 2, n // 2), f"u{size}") for i in range(n_layers)}

    def build(given: Mapping[str, Any]) -> KvPool:
        k = [given[f"k{i}"] for i in range(n_layers)]
        return layouts.nhd(k=k, dtype=dtype, reserved_blocks=tuple(reserved))

    return PoolSpec(arrays, build)


def script(sides: Sides, spec: PoolSpec | None = None, every: int = 1, **config: Any) -> Script:
    return Script(sides(), spec=spec or spec_of(), check_reserved_every=every, **config)


def elements(s: Script, layer: int = 0) -> NDArray[Any]:
    """[slots, elements of a slot] of a layer, to be written."""
    return s.twins.buffers[0][f"k{layer}"].reshape(N_BLOCKS * PAGE, -1)


NOBODY = Row(0, [0], 0, 1, [0], slots=[-1])


def step(s: Script) -> list[tuple[int, int, int, int]]:
    """A forward of nobody: (plane, slot, byte in the slot, bits) of each NONFINITE_RESERVED record, and of no other."""
    s.forward(NOBODY)
    assert all(v["reasons"] == Reason.NONFINITE_RESERVED for v in s.records)
    assert all((v["row"], v["position"], v["detail"]) == (-1, -1, Detail.RESERVED) for v in s.records)
    return sorted((int(v["plane"]), int(v["slot"]), int(v["found_digest"]), int(v["stored_digest"])) for v in s.records)


def checks(s: Script) -> int:
    return int(s.twins.words[abi.STATE_RESERVED_CHECKS])


# ---- what it sees ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", NAMES)
def test_every_special_value_is_found_where_it_is(sides: Sides, dtype: str) -> None:
    s, size = script(sides, spec_of(dtype)), ELEMENTS[dtype].n_bytes
    at = elements(s, 1)
    for i, bits in enumerate(SPECIAL[dtype]):
        slot, element = i % PAGE, (7 * i + 23) % 24
        at[...] = FINITE[dtype][0]
        at[slot, element] = bits
        assert step(s) == [(1, slot, element * size, bits)]


@pytest.mark.parametrize("dtype", NAMES)
def test_finite_values_are_none_of_its_business(sides: Sides, dtype: str) -> None:
    s = script(sides, spec_of(dtype, n=64))
    for layer in range(3):
        at = elements(s, layer)
        at[...] = np.resize(FINITE[dtype], at.shape)
    assert step(s) == []
    assert checks(s) == 3


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"])
def test_every_pattern_of_a_byte_at_every_place_of_a_load(sides: Sides, dtype: str) -> None:
    """One pattern for each plane; all others in its block are finite."""
    s = script(sides, spec_of(dtype, n=16, n_layers=256))
    for bits in range(256):
        elements(s, bits)[2, bits % 16] = bits
    bad = sorted(set(range(256)) - set(FINITE[dtype]))
    assert step(s) == [(bits, 2, bits % 16, bits) for bits in bad]


@pytest.mark.parametrize("slots", [(1, 2), (3, 0), (2, 2)])
def test_one_record_for_a_plane_and_block_with_the_first_element(sides: Sides, slots: tuple[int, int]) -> None:
    s = script(sides)
    for slot, element in zip(slots, (20, 3), strict=True):
        elements(s)[slot, element] = 0x7C00
    elements(s, 2)[:PAGE] = 0xFFFF
    first = min(zip(slots, (20, 3), strict=True))
    assert step(s) == [(0, first[0], 2 * first[1], 0x7C00), (2, 0, 0, 0xFFFF)]


def test_several_reserved_blocks(sides: Sides) -> None:
    s = script(sides, spec_of(reserved=(0, 3, 7)))
    elements(s)[3 * PAGE + 1, 5] = 0x7E00
    elements(s)[7 * PAGE + 3, 23] = 0xFC00
    elements(s)[4 * PAGE, 0] = 0x7E00  # of a request's
    assert step(s) == [(0, 3 * PAGE + 1, 10, 0x7E00), (0, 7 * PAGE + 3, 46, 0xFC00)]
    assert checks(s) == 9


def test_beside_requests_and_with_owners(sides: Sides) -> None:
    s = script(sides, lifecycle=True)
    s.own("allocate", [1, 2], 1)
    assert s.forward(Row(1, A, 0, 6, [1, 2]), Row(0, [0], 0, 1, [0], slots=[2])) == []
    for layer in range(3):
        elements(s, layer)[:PAGE] = 0  # what the padding row wrote
    elements(s)[2] = 0xFFFF
    (found,) = s.forward(Row(1, A, 6, 7, [1, 2]))
    assert (found.tag, found.slot, found.row, found.request) == ("HEAD_K_FULL", 2, -1, 0)


def test_all_bytes_are_looked_at_whatever_is_digested(sides: Sides) -> None:
    for real_data in ("none", "partial"):
        s = script(sides, real_data=real_data)
        elements(s, 2)[1, 23] = 0x7E00
        assert step(s) == [(2, 1, 46, 0x7E00)]


# ---- when it looks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_every_nth_step(sides: Sides, every: int) -> None:
    s = script(sides, every=every)
    elements(s)[1, 1] = 0x7E00
    found = [bool(step(s)) for _ in range(15)]
    assert found == [n % every == 0 for n in range(1, 16)]
    assert checks(s) == 3 * (15 // every)


def test_never_unless_it_is_asked_to(sides: Sides) -> None:
    s = script(sides, every=0)
    elements(s)[1, 1] = 0x7E00
    assert step(s) == []
    assert checks(s) == 0


def test_only_in_the_first_forward_of_a_step(sides: Sides) -> None:
    s = script(sides)
    elements(s)[1, 1] = 0x7E00
    assert len(step(s)) == 1
    s.twins.forward(batch_of([NOBODY]), index=1)
    assert len(s.twins.records) == 0
    assert checks(s) == 3


def test_not_while_paused(sides: Sides) -> None:
    s = script(sides)
    elements(s)[1, 1] = 0x7E00
    s.twins.set_paused(True)
    assert step(s) == []
    assert checks(s) == 0
    s.twins.set_paused(False)
    assert len(step(s)) == 1


# ---- what there is to look at ----------------------------------------------------------------------------------------
def test_no_reserved_block_and_no_floats_are_no_launch(sides: Sides) -> None:
    without, integers = spec_of(reserved=()), spec_of()
    build = integers.build

    def as_integers(given: Mapping[str, Any]) -> KvPool:
        pool = build(given)
        return replace(pool, planes=tuple(replace(p, dtype="uint16") for p in pool.planes))

    for spec in (without, PoolSpec(integers.buffers, as_integers)):
        s = script(sides, spec)
        elements(s)[:] = 0xFFFF
        assert step(s) == []
        assert checks(s) == 0
        for side in s.twins.sides:
            if isinstance(side, SimtSide):
                launched = {name for name, _ in side.manager.backend._driver.launches}  # type: ignore[attr-defined]
                assert "kvc_reserved_check" not in launched


def test_strided_interleaved_and_head_first_planes(sides: Sides) -> None:
    """K and V side by side in a block, in a row, and heads before tokens; what lies between is another's."""
    shape = (N_BLOCKS, 2, PAGE, 2, 6)
    arrays = {"side": np.zeros(shape, np.uint16), "row": np.zeros((N_BLOCKS, PAGE, 2, 12), np.uint16)}
    arrays["hnd"] = np.zeros((N_BLOCKS, 2, PAGE, 6), np.uint16)

    def build(given: Mapping[str, Any]) -> KvPool:
        side, row, hnd = (given[n] for n in ("side", "row", "hnd"))
        planes = [
            *layouts.nhd(k=[side[:, 0]], v=[side[:, 1]], dtype="float16").planes,
            *layouts.nhd(k=[row[..., :6]], v=[row[..., 6:]], dtype="float16").planes,
            *layouts.hnd(k=[hnd], dtype="float16").planes,
        ]
        return KvPool(planes=tuple(replace(p, layer=i) for i, p in enumerate(planes)), page_size=PAGE)

    s = script(sides, PoolSpec(arrays, build))
    buffers = s.twins.buffers[0]
    buffers["side"][0, 1, 2, 1, 3] = 0x7E00
    buffers["row"][0, 1, 1, 5] = 0x7C00
    buffers["row"][0, 3, 0, 6] = 0xFC00
    buffers["hnd"][0, 1, 2, 4] = 0xFFFF
    assert step(s) == [(1, 2, 18, 0x7E00), (2, 1, 22, 0x7C00), (3, 3, 0, 0xFC00), (4, 2, 20, 0xFFFF)]
    assert [int(v["tag"]) for v in s.records[np.argsort(s.records["plane"])]] == [1, 0, 1, 0]


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_planes_at_any_address(sides: Sides, dtype: str, offset: int) -> None:
    """Elements that are not aligned to their size; everything around the reserved block's elements is NaN."""
    size, n = ELEMENTS[dtype].n_bytes, 12
    row = n + 4
    data = np.full(offset + N_BLOCKS * PAGE * row, 0xFF, np.uint8)

    def build(given: Mapping[str, Any]) -> KvPool:
        place: dict[str, Any] = {"offset": offset, "page_stride": PAGE * row, "token_stride": row, "chunk_bytes": n}
        return KvPool(planes=(Plane(data=given["flat"], dtype=dtype, **place),), page_size=PAGE)

    s = script(sides, PoolSpec({"flat": data}, build))
    slots = s.twins.buffers[0]["flat"][offset:].reshape(N_BLOCKS * PAGE, row)
    slots[:PAGE, :n] = 0x11
    assert step(s) == []
    for element in range(n // size):
        slots[:PAGE, :n] = 0x11
        slots[3, element * size : (element + 1) * size] = 0xFF
        assert step(s) == [(0, 3, element * size, (1 << 8 * size) - 1)]


def test_a_group_names_its_plane(sides: Sides) -> None:
    """Planes that share a digest are looked at one by one; those of integers between them are not."""
    arrays = {name: np.zeros((N_BLOCKS, PAGE, 4), np.uint32) for name in ("k", "scale", "zero")}

    def build(given: Mapping[str, Any]) -> KvPool:
        strides: dict[str, Any] = {"page_stride": 16 * PAGE, "token_stride": 16, "chunk_bytes": 16, "group": "all"}
        types = {"k": "float32", "zero": "", "scale": "float32"}
        planes = [Plane(data=given[n], name=n, dtype=t, half=Half.K, layer=5, **strides) for n, t in types.items()]
        return KvPool(planes=tuple(planes), page_size=PAGE)

    s = script(sides, PoolSpec(arrays, build))
    s.twins.buffers[0]["scale"][0, 1, 2] = 0x7F800000
    s.twins.buffers[0]["zero"][0] = 0xFFFFFFFF
    assert step(s) == [(2, 1, 8, 0x7F800000)]
    (v,) = decode(s.records, [pool_names(s.twins.pools[0], "all")], 0, True)
    assert (v.plane_name, v.layer, v.element_offset, v.element_bits) == ("scale", 5, 8, 0x7F800000)


@pytest.mark.parametrize("seed", range(40))
def test_any_layout_with_random_bytes(sides: Sides, seed: int) -> None:
    """Random bytes hold NaN somewhere: the first of each plane and block is an argmax over what NumPy reads."""
    rng = random.Random(seed)
    reserved = tuple(rng.sample(range(5), rng.randint(1, 3)))
    layout = LAYOUTS[seed % len(LAYOUTS)]
    spec = random_pool(rng, n_blocks=5, page_size=rng.choice((1, 3, 4, 16)), layout=layout, reserved_blocks=reserved)
    types = rng.choices(NAMES, k=20)

    def build(given: Mapping[str, Any]) -> KvPool:
        pool = spec.build(given)
        fits = [
            t if p.chunk_bytes % ELEMENTS[t].n_bytes == 0 else "uint8" for p, t in zip(pool.planes, types, strict=False)
        ]
        return replace(pool, planes=tuple(replace(p, dtype=t) for p, t in zip(pool.planes, fits, strict=True)))

    s = Script(sides(), spec=PoolSpec(spec.buffers, build), check_reserved_every=1)
    pool = s.twins.pools[0]
    for thinned in (1, 50, 2000):  # bytes of which fewer and fewer are left as they were
        bytes_of = np.random.default_rng(seed + thinned)
        for buffer in s.twins.buffers[0].values():
            flat = buffer.reshape(-1).view(np.uint8)
            flat[bytes_of.random(flat.size) > 1 / thinned] = 0x22
        wanted = []
        for i, plane in enumerate(pool.ordered_planes):
            for block in reserved if plane.element else ():
                assert plane.element
                size, mask, value = plane.element[1:4]
                raw = pool.host_bytes(plane)[block].tobytes()
                words = [int.from_bytes(raw[j : j + size], "little") for j in range(0, len(raw), size)]
                first = next((j for j, bits in enumerate(words) if bits & mask == value), None)
                if first is not None:
                    slot, byte = divmod(first * size, plane.n_bytes)
                    wanted.append((i, block * pool.page_size + slot, byte, words[first]))
        assert step(s) == sorted(wanted)


# ---- words -----------------------------------------------------------------------------------------------------------
def toy(dtype: Any = np.float16, **config: Any) -> tuple[Any, list[NDArray[Any]]]:
    k = [np.zeros((4, PAGE, 2, 8), dtype) for _ in range(4)]
    pool = layouts.nhd(k=k[:2], v=k[2:], layers=[3, 4])
    return CanaryManager(CanaryConfig(**config), [pool], 2, 8), k


def run(manager: Any) -> list[Any]:
    with manager.step(), manager.forward(StepBatch(**batch_of([NOBODY], ["token_history"]))):
        pass
    manager.synchronize()
    return list(manager.violations())


def test_it_is_told_in_words_and_once_until_another_slot_is_the_first() -> None:
    manager, k = toy(check_reserved_every=1)
    k[0][0, 2, 1, 1] = np.nan
    (v,) = run(manager)
    assert (
        "reserved block 0 of layer 3 k holds NaN (float16 0x7e00) at slot 2, element 9: whatever gathers it (padding, "
        "unused table entries) spreads it"
    ) in v.summary()
    assert "holds NaN" in v.details()
    assert (v.stored_digest, v.found_digest, v.is_in_pool, v.request_id) == (None, None, True, 0)
    k[0][0, 2, 1, 1] = np.inf
    assert len(run(manager)) == 1, "the same slot is the first"
    k[0][0, 1, 0, 0] = -np.inf
    assert "holds -Inf (float16 0xfc00) at slot 1, element 0" in run(manager)[-1].summary()
    k[0][0] = 0
    assert len(run(manager)) == 2
    assert manager.stats().violations_total == 2
    assert manager.stats().observations_total == 3


def test_describe_says_what_is_looked_at() -> None:
    on, off = toy(check_reserved_every=5)[0].describe(), toy()[0].describe()
    assert "reserved blocks 0: looked through for NaN and Inf every 5 steps, 4 of 4 planes (float16)" in on
    assert "NONFINITE_RESERVED" in on.split("\non: ")[1]
    assert "off: NONFINITE_RESERVED (check_reserved_every=0)" in off
    integers = toy(np.uint16, check_reserved_every=5)[0].describe()
    assert "off: NaN and Inf in 4 planes of type uint16: give dtype= if they hold floats" in integers
    assert "off: NONFINITE_RESERVED (no reserved block in a plane of floats)" in integers


def test_the_estimate_counts_the_planes() -> None:
    on, off = (toy(check_reserved_every=every)[0] for every in (1, 0))
    estimates = [m.estimate_bytes(m.config, m.pools, 2) for m in (on, off)]
    assert estimates[0] - estimates[1] == 4 * abi.FLOAT_PLANE.itemsize


# ---- captured --------------------------------------------------------------------------------------------------------
def test_one_graph_looks_in_the_steps_that_are_due(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_toy.layouts.nhd", _as_fp8(layouts.nhd))
    toy, graph = prefilled(world, check_reserved_every=3)
    for layer in (*toy.k, *toy.v):
        layer[0] = 0
    assert len(graph.nodes) == 6 + 1 + 1  # and the model
    toy.v[1][0, 2, 1, 3] = 0xFF
    found = []
    for p in range(1, 7):  # steps 2 to 7
        toy.replay(graph, p)
        toy.manager.synchronize()
        found.append(
            (
                toy.manager.stats().observations_total,
                int(toy.manager.backend.snapshot_words()[abi.STATE_RESERVED_CHECKS]),
            )
        )
    assert found == [(0, 0), (1, 4), (1, 4), (1, 4), (2, 8), (2, 8)]
    (v,) = toy.manager.violations()
    assert (v.reasons, v.slot, v.layer, v.plane_name, v.step) == (Reason.NONFINITE_RESERVED, 2, 1, "v", 3)
    toy.manager.pause()
    for p in range(7, 10):
        toy.replay(graph, p)
    toy.manager.synchronize()
    assert toy.manager.stats().observations_total == 2


def _as_fp8(nhd: Any) -> Any:
    return lambda **fields: nhd(**fields, dtype="float8_e4m3fn")
