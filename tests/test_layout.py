"""Planes and pools: any affine form against its definition, groups, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Form, any_forms, digested_offsets, nested_forms

from kvcanary import abi
from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool, Plane, plane_address
from kvcanary.tags import Half, PoolKind


# ---- planes and groups -----------------------------------------------------------------------------------------------
def plane(size: int = 8, at: int = 0, n_blocks: int = 4, **fields: Any) -> Plane:
    """A plane of ``size`` bytes a slot, 4 slots a block, at a device address that nobody reads."""
    data = ((1 << 20) + (at << 16), (n_blocks * 4 * size,), None, 1)
    return Plane(**{"data": data, "page_stride": 4 * size, "token_stride": size, "chunk_bytes": size, **fields})


def pool_of(*planes: Plane, **fields: Any) -> KvPool:
    return KvPool(**{"planes": planes, "page_size": 4, **fields})


def test_a_group_is_drawn_together_behind_its_first_member() -> None:
    pool = pool_of(
        plane(8, 0, name="a", group="g"),
        plane(16, 1, name="b"),
        plane(6, 2, name="c", group="g", n_chunks=3, chunk_bytes=2, chunk_stride=32, token_stride=2, page_stride=8),
        plane(3, 3, half=Half.V, layer=1),
        plane(8, 4, name="d", group="g"),
    )
    assert [p.name for p in pool.ordered_planes] == ["a", "c", "d", "b", "v"]
    units = [(u.first_plane, u.n_planes, u.n_words, u.half, u.name, u.layer) for u in pool.digest_units()]
    assert units == [(0, 3, 6, Half.K, "a+c+d", 0), (3, 1, 4, Half.K, "b", 0), (4, 1, 1, Half.V, "v", 1)]
    records = pool.digest_records()
    assert records.dtype == abi.DIGEST
    # A group and a plane of 3 bytes go the general way (no loads of 8 or 16 bytes).
    assert records.tolist() == [(0, 3, 6, 0, 0, 0), (3, 1, 4, 0, 1, 16), (4, 1, 1, 1, 0, 0)]
    planes = pool.plane_records()
    assert planes["byte_offset"].tolist() == [0, 8, 14, 0, 0]
    assert planes["load_bytes"].tolist() == [8, 2, 2, 16, 1], (
        "a load never reaches from one word of the group to the next"
    )
    assert pool.halves == (Half.K, Half.V) and pool.bytes_per_slot == 41


def test_chunks_that_touch_are_one() -> None:
    merged = plane(8, n_chunks=4, chunk_bytes=2, chunk_stride=2)
    assert (merged.n_chunks, merged.chunk_bytes, merged.chunk_stride) == (1, 8, 0)


def test_runs_of_tokens_in_line_are_no_split() -> None:
    split = {"page_stride": 256, "token_stride": 8, "chunk_bytes": 8, "tok_split": 4}
    in_line = plane(8, **split, tok_hi_stride=32)
    assert (in_line.tok_split, in_line.tok_hi_stride) == (0, 0)
    apart = plane(8, **split, tok_hi_stride=64)
    assert (apart.tok_split, apart.tok_hi_stride) == (4, 64)


def test_interleaved_tokens_go_the_general_way() -> None:
    """However wide their loads: the kernels' fast ways know of no split."""
    interleaved = plane(16, n_blocks=4, page_stride=64, token_stride=32, tok_split=2, tok_hi_stride=16)
    pool = pool_of(interleaved, plane(16, 1))
    assert pool.plane_records()["load_bytes"].tolist() == [16, 16]
    assert pool.digest_records()[["n_loads", "load_bytes"]].tolist() == [(0, 0), (1, 16)]
    starts = [plane_address(pool.plane_records()[0], slot, 4, 0) - (1 << 20) for slot in range(8)]
    assert starts == [0, 32, 16, 48, 64, 96, 80, 112]


def test_blocks_are_counted_from_the_array() -> None:
    assert pool_of(plane(8)).n_blocks == 4
    assert pool_of(plane(8), plane(8, 1, n_blocks=3)).n_slots == 12
    assert pool_of(plane(8), n_blocks=2).n_slots == 8
    two_of_each = {"page_stride": 16, "token_stride": 64, "chunk_bytes": 8}  # [4, 4 sequences, 2, 8]
    assert pool_of(Plane(data=(1 << 20, (256,), None, 1), **two_of_each)).n_blocks == 4


def test_without_data_there_are_no_planes_and_no_digests() -> None:
    pool = pool_of(plane(8))
    assert pool.digest_units("none") == []
    assert pool.plane_records("none").shape == pool.digest_records("none").shape == (0,)


# ---- any affine form -------------------------------------------------------------------------------------------------
def is_apart(form: Form) -> bool:
    touched = [s + i for s in form.starts for i in range(form.chunk_bytes)]
    return len(set(touched)) == len(touched)


@given(nested_forms())
def test_a_nested_form_addresses_what_its_strides_say(form: Form) -> None:
    flat = np.arange(form.span + 8, dtype=np.uint8)
    pool = form.pool(flat[3:], offset=5)
    starts = np.array(form.starts).reshape(form.n_blocks * form.page_size, form.n_chunks)
    at = pool.host_bytes(pool.planes[0])[pool.slot_index(pool.planes[0], np.arange(pool.n_slots))]
    assert at.reshape(pool.n_slots, -1).tolist() == pool.gather(pool.planes[0], np.arange(pool.n_slots)).tolist()
    for slot, chunks in enumerate(starts):
        expected = [8 + s + i for s in chunks for i in range(form.chunk_bytes)]
        assert digested_offsets(pool, flat, slot).tolist() == expected
        assert pool.gather(pool.planes[0], np.array([slot]))[0].tolist() == flat[expected].tolist()


@given(nested_forms(), st.integers(0, 16))
def test_loads_are_as_wide_as_every_chunk_allows(form: Form, offset: int) -> None:
    pool = form.pool((1 << 20, (form.span + offset,), None, 1), offset)
    (record,) = pool.plane_records()
    n_bytes = int(record["chunk_bytes"])
    every_chunk = [
        plane_address(record, slot, form.page_size, chunk * n_bytes)
        for slot in range(pool.n_slots)
        for chunk in range(record["n_chunks"])
    ]
    assert record["load_bytes"] == math.gcd(16, n_bytes, *every_chunk)


@given(nested_forms())
def test_one_byte_too_few_is_refused(form: Form) -> None:
    data = (1 << 20, (form.span - 1,), None, 1)
    with pytest.raises(LayoutError, match=r"take bytes 0 to \d+ of an array of \d+: check offset"):
        form.pool(data)
    with pytest.raises(LayoutError, match="take bytes -1 to"):
        form.pool((1 << 20, (form.span,), None, 1), offset=-1)


@given(any_forms())
@example(Form(2, 3, 1, 2, 6, 4, 0))  # apart, but not nested: 0 4 8 and 6 10 14
@example(Form(2, 1, 1, 2, 1, 0, 0))
def test_a_form_is_accepted_exactly_if_no_two_runs_share_a_byte(form: Form) -> None:
    data = (1 << 20, (form.span,), None, 1)
    if is_apart(form):
        assert form.pool(data).n_blocks == form.n_blocks
    else:
        with pytest.raises(LayoutError, match="slots overlap"):
            form.pool(data)


@pytest.mark.parametrize(("page", "token"), [(1 << 17, 16), (16, 1 << 14)], ids=["pages outside", "pages inside"])
def test_a_large_form_is_accepted_by_its_strides_alone(page: int, token: int) -> None:
    plane = Plane(data=(1 << 20, (1 << 27,), None, 1), page_stride=page, token_stride=token, chunk_bytes=16)
    assert KvPool(planes=(plane,), page_size=1 << 13).n_slots == 1 << 23


def test_a_large_form_that_is_not_nested_is_refused_unseen() -> None:
    data = (1 << 20, (1 << 30,), None, 1)
    strides = {"page_stride": 6, "token_stride": 4, "chunk_bytes": 2}
    with pytest.raises(LayoutError, match="or cannot be shown to be apart"):
        KvPool(planes=(Plane(data=data, **strides),), page_size=1 << 20, n_blocks=1 << 4)


# ---- refusals --------------------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "negative stride": (lambda: plane(token_stride=-8), "token_stride=-8; give an integer >= 0"),
    "stride beyond all memory": (lambda: plane(page_stride=1 << 64), "page_stride=18446744073709551616; no memory"),
    "offset beyond all memory": (lambda: plane(offset=(1 << 62) + 1), "no memory reaches that far, give bytes"),
    "stride of elements": (lambda: plane(token_stride=0.5), "token_stride=0.5; give an integer"),
    "empty chunk": (lambda: plane(chunk_bytes=0), "chunk_bytes=0; give an integer >= 1"),
    "strides in elements": (lambda: pool_of(plane(8, token_stride=4, page_stride=16)), "slots overlap.* not elements"),
    "negative split": (lambda: plane(tok_split=-1), "tok_split=-1; give an integer >= 0"),
    "runs without a length": (lambda: plane(tok_hi_stride=8), "tok_hi_stride=8 without tok_split: give the tokens"),
    "runs across pages": (
        lambda: pool_of(plane(8, tok_split=3, tok_hi_stride=8)),
        "tok_split=3 does not divide page_size=4: give the tokens of a run",
    ),
    "runs that overlap": (
        lambda: pool_of(plane(8, tok_split=2, tok_hi_stride=4)),
        "token_stride 8 in runs of 2 tokens every 4, 1 chunks",
    ),
    "no room": (lambda: pool_of(plane(8, n_blocks=4, page_stride=8, token_stride=64)), "4 slots needs 200 bytes"),
    "too few bytes": (lambda: pool_of(plane(8), n_blocks=5), "5 blocks .* bytes 0 to 160 of an array of 128"),
    "no pages": (lambda: pool_of(plane(8), page_size=0), "page_size=0, n_blocks=0: give both >= 1"),
    "nothing": (pool_of, "no plane to derive it from: give n_blocks"),
    "2^31 slots": (lambda: pool_of(n_blocks=1 << 29), "2147483648 slots; 1 to 2147483647 fit"),
    "window of a full pool": (lambda: pool_of(plane(), window=5), "kind FULL with window=5"),
    "a kind by name": (
        lambda: pool_of(plane(), kind="swa", window=4),
        r"kind='swa': choose one of PoolKind\.FULL, PoolKind\.SWA",
    ),
    "SWA without a window": (lambda: pool_of(plane(), kind=PoolKind.SWA), "needs a window of 1 to 2147483647"),
    "window beyond 32 bits": (lambda: pool_of(plane(), kind=PoolKind.SWA, window=1 << 31), "window=2147483648"),
    "ring of a full pool": (lambda: pool_of(plane(), ring_length=8), "ring_length=8 with window=None: a ring holds at"),
    "ring below its window": (
        lambda: pool_of(plane(), kind=PoolKind.SWA, window=5, ring_length=4),
        "ring_length=4 with window=5: a ring holds at least the window",
    ),
    "sinks of a full pool": (
        lambda: pool_of(plane(), sink=4),
        "sink=4 with window=None: give 0 to 128 tokens, to an SWA",
    ),
    "too many sinks": (lambda: pool_of(plane(), kind=PoolKind.SWA, window=5, sink=129), "sink=129 with window=5"),
    "bubble without a ring": (
        lambda: pool_of(plane(), kind=PoolKind.SWA, window=5, ring_bubble=2),
        "ring_bubble=2 with ring_length=0: places >= 0, and a bubble only before a ring",
    ),
    "empty window": (lambda: pool_of(plane(), kind=PoolKind.SWA, window=0), "kind SWA with window=0"),
    "reserved twice": (lambda: pool_of(plane(), reserved_blocks=(1, 1)), "at most 8 blocks, each once"),
    "reserved outside": (lambda: pool_of(plane(), reserved_blocks=(4,)), "blocks are 0 to 3; \\(\\) if none"),
    "all reserved": (
        lambda: pool_of(plane(), reserved_blocks=(0, 1, 2, 3)),
        r"\(0, 1, 2, 3\) are all of its 4 blocks, so nothing would be guarded: give more .* reserved_blocks=\(\) if",
    ),
    "one block, reserved": (lambda: pool_of(plane(n_blocks=1)), r"reserved_blocks=\(0,\) are all of its 1 blocks"),
    "planes of another kind": (lambda: pool_of(np.zeros(9999)), "planes is a list of ndarray: give a tuple of Planes"),
    "pool without a name": (lambda: pool_of(plane(), name=""), "pool name='': give one word of printable"),
    "plane of two words": (lambda: plane(name="k scale"), "plane name='k scale': give one word of printable"),
    "V alone": (lambda: pool_of(plane(half=Half.V)), "gives its planes half K"),
    "two layers in a group": (
        lambda: pool_of(plane(group=1), plane(at=1, group=1, layer=1)),
        "group 1 mixes 'k' \\(K, layer 0\\), 'k' \\(K, layer 1\\): one label per layer and half",
    ),
    "large plane in a group": (lambda: pool_of(plane(256, group=1)), "has 256 bytes; only planes of less than 256"),
    "K given as V": (lambda: pool_of(plane(), plane(half=Half.V)), "begin at the same byte: give shared memory once"),
    "two devices": (
        lambda: pool_of(plane(), plane(data=np.zeros(128, np.uint8), layer=1)),
        "'k' of layer 0 is on cuda:0, plane 'k' of layer 1 on cpu: one pool lies on one device",
    ),
    "narrow LUT": (lambda: pool_of(plane(), slot_lut=(4096, (32,), None, 4)), "give a contiguous int64\\[n_full\\]"),
    "LUT elsewhere": (lambda: pool_of(plane(), slot_lut=np.zeros(4, np.int64)), "on cpu, the planes on cuda:0"),
    "large plane": (lambda: pool_of(plane(65540)).check(), "digests 65540 bytes a slot, at most 65536 are allowed"),
    "nothing to digest": (lambda: pool_of(n_blocks=4).check(), "no planes, but real_data='all'"),
    "guard elsewhere": (lambda: pool_of(plane()).check("all", "cpu"), "on cuda:0, the guard runs on cpu: choose"),
    "read from the host": (lambda: pool_of(plane()).host_bytes(plane()), "only planes in host memory can be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(LayoutError, match=message):
        build()


def test_a_plane_may_have_64_kib() -> None:
    pool_of(plane(65536)).check("all", "cuda")


def test_a_large_plane_may_be_digested_in_part() -> None:
    wide = plane(70000, n_chunks=2, chunk_bytes=35000, chunk_stride=35000 * 16, token_stride=35000, page_stride=140000)
    pool_of(wide, n_blocks=1, reserved_blocks=()).check("partial", "cuda")
    pool_of(n_blocks=4).check("none", "cuda")


@pytest.mark.parametrize(
    "name", ["a b", "a\nb", "a\tb", "a=b", "a\x1b[31m", "a\u00a0b", "a\u2028b", "\ud800", " ", "="]
)
def test_names_are_one_word_since_they_stand_in_lines_of_key_and_value(name: str) -> None:
    with pytest.raises(LayoutError, match=r"pool name=.*give one word of printable characters, without spaces and '='"):
        pool_of(plane(), name=name)
    with pytest.raises(LayoutError, match=r"plane name=.*give one word"):
        plane(name=name)


@pytest.mark.parametrize("name", ["full", "swa-1", "k.0", "kv_cache[3]", "größe", "k:scale"])
def test_other_words_are_names(name: str) -> None:
    assert pool_of(plane(name=name), name=name).digest_units()[0].name == name


def test_what_is_printed_of_a_pool_is_short_and_holds_nothing_of_its_contents() -> None:
    data = np.full(1 << 16, 77, np.uint8)
    held = Plane(data=data, page_stride=32, token_stride=8, chunk_bytes=8, name="k", layer=3)
    assert repr(held) == "<Plane k of layer 3, half K: 8 bytes a slot, not resolved>"
    pool = KvPool(planes=(held,), page_size=4, name="swa", kind=PoolKind.SWA, window=4)
    assert repr(pool) == "<KvPool swa (SWA): 2048 blocks x 4 slots, 1 planes on cpu, 65536 bytes>"
    assert repr(held) == "<Plane k of layer 3, half K: 8 bytes a slot, uint8 on cpu>"
    assert repr(held.view) == f"<ArrayView uint8[65536], strides [1], at {data.ctypes.data:#x} on cpu>"
    assert repr(pool_of(n_blocks=2)) == "<KvPool full (FULL): 2 blocks x 4 slots, no planes, 0 bytes>"
    assert repr(plane(4).view).startswith("<ArrayView 1 bytes[64], strides [1]")
