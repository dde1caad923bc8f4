"""The layouts of the engines against their own indexing: byte for byte, for every slot."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from layout_catalogue import ENGINES
from layout_engines import FLASH, HEADS, B, Engine, H, L, N
from numpy.typing import NDArray
from strategies import digested_offsets

from kvcanary import KvPool, layouts
from kvcanary.layout import Plane, plane_address
from kvcanary.tags import Half, PoolKind


def f16(*shape: int) -> NDArray[np.float16]:
    return np.zeros(shape, np.float16)


# ---- every engine ----------------------------------------------------------------------------------------------------
def places_of(pool: KvPool, i: int, base: int, slot: int) -> NDArray[np.int64]:
    """Offset from ``base`` of every byte of a slot in plane i, in digest order, by its record."""
    record = pool.plane_records()[i]
    n = int(record["chunk_bytes"])
    starts = [plane_address(record, slot, pool.page_size, c * n) - base for c in range(int(record["n_chunks"]))]
    return (np.array(starts)[:, None] + np.arange(n)).ravel()


@pytest.mark.parametrize("name", ENGINES)
def test_the_bytes_of_a_slot_are_those_the_engine_touches(name: str) -> None:
    engine = ENGINES[name]
    flat = engine.spec().buffers["kv"]
    pool, touched = engine.build(flat), engine.indexing()
    keys = [(p.layer, p.name) for p in pool.ordered_planes]
    assert sorted(keys) == sorted(touched(0)), "the planes, by layer and name"
    gathered = [pool.gather(p, np.arange(pool.n_slots)) for p in pool.ordered_planes]
    for slot in range(pool.n_slots):
        wanted = touched(slot)
        for i, key in enumerate(keys):
            found = places_of(pool, i, flat.ctypes.data, slot)
            np.testing.assert_array_equal(np.sort(found), wanted[key])
            np.testing.assert_array_equal(gathered[i][slot], flat[found])


@pytest.mark.parametrize("name", ENGINES)
def test_chunks_are_as_long_and_loads_as_wide_as_the_layout_allows(name: str) -> None:
    engine = ENGINES[name]
    flat = np.zeros(engine.n_bytes, np.uint8)
    pool = engine.build(flat)
    records = pool.plane_records(base_of=lambda plane: plane.view.pointer - flat.ctypes.data)
    found = [((r["n_chunks"], r["chunk_bytes"], r["chunk_stride"]), r["load_bytes"]) for r in records]
    assert found == engine.planes * (len(found) // len(engine.planes))
    assert len(found) == L * len(engine.planes)


def test_every_constructor_is_in_the_catalogue() -> None:
    there = {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in (getattr(layouts, name) for name in layouts.__all__)
        if isinstance(module, ModuleType)
        for name, value in vars(module).items()
        if callable(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert there == {name.partition(" ")[0] for name in ENGINES}


RESERVED = {"vllm": (0,), "sglang": (0,), "transformers.paged_cache": (B, B + 1)}


@pytest.mark.parametrize("name", ENGINES)
def test_reserved_blocks_are_the_engines(name: str) -> None:
    pool = ENGINES[name].build(np.zeros(ENGINES[name].n_bytes, np.uint8))
    constructor = name.partition(" ")[0]
    module = constructor.partition(".")[0]
    assert pool.reserved_blocks == RESERVED.get(constructor, RESERVED.get(module, ()))


def pool_of(name: str) -> KvPool:
    return ENGINES[name].build(np.zeros(ENGINES[name].n_bytes, np.uint8))


def test_k_and_v_in_one_row_count_as_k() -> None:
    for name in ("vllm.packed LBNHC", "vllm.mla bf16", "sglang.deepseek_v4 v4", "flashinfer.mla", "tinygrad.cache_k"):
        assert pool_of(name).halves == (Half.K,)
    for name in ("vllm.flash_attn NHD", "sglang.mha_fp4", "llama_cpp.cache v_trans", "tensorrt_llm.pool HND"):
        assert pool_of(name).halves == (Half.K, Half.V)


def test_small_scales_share_the_digest_of_small_keys_only() -> None:
    assert [u.name for u in pool_of("sglang.dsa_index_k").digest_units()] == ["index_k+index_k_scale"] * L
    assert [u.name for u in pool_of("vllm.deepseek_v4").digest_units()] == ["latent", "latent_scale"] * L


def test_only_interleaved_scales_are_split() -> None:
    for name in ENGINES:
        split = [p.name for p in pool_of(name).planes if p.tok_split]
        assert split == (["k_scale", "v_scale"] * L if name == "sglang.mha_mxfp8 interleaved" else [])


def test_rows_behind_the_last_page_are_no_slots() -> None:
    assert pool_of("sglang.mha page 16").n_slots == B * N
    assert layouts.sglang.mha([f16(B * N + 5, 2, 8)], page_size=1).n_slots == B * N + 5


def test_the_swa_pair_has_a_pool_of_each_kind() -> None:
    full = layouts.sglang.mha([f16(48, 2, 8)], [f16(48, 2, 8)], page_size=16, layers=[1])
    window = layouts.sglang.mha([f16(32, 2, 8)], [f16(32, 2, 8)], page_size=16, layers=[0])
    lut = np.zeros(49, np.int64)
    pools = layouts.sglang.swa(full, window, full_to_swa_index_mapping=lut, window=20)
    assert [(p.name, p.kind, p.window, p.n_slots) for p in pools] == [
        ("full", PoolKind.FULL, None, 48), ("swa", PoolKind.SWA, 20, 32),
    ]  # fmt: skip
    assert pools[0] is full and pools[1].lut_view is not None and pools[1].lut_view.pointer == lut.ctypes.data
    assert [p.layer for pool in pools for p in pool.planes] == [1, 1, 0, 0]


def test_what_an_array_does_not_tell_of_its_elements() -> None:
    types = {
        "vllm.packed LBNHC": "float16", "vllm.packed_tensor LBNHC": "float16", "vllm.packed per_token_head": None,
        "vllm.mla fp8_ds_mla": None, "vllm.nvfp4": None, "sglang.deepseek_v4 v4": None, "llama_cpp.cache": "float16",
    }  # fmt: skip
    for name, wanted in types.items():
        assert {p.element.name if p.element else None for p in pool_of(name).planes} == {wanted}, name
    scaled = {p.name: p.element.name if p.element else None for p in pool_of("jax.pallas scales").planes}
    assert scaled == {"k": None, "v": None, "k_scale": "float32", "v_scale": "float32"}
    mxfp8 = {p.name: p.element.name if p.element else None for p in pool_of("sglang.mha_mxfp8 flat").planes}
    assert mxfp8 == {"k": "float8_e4m3fn", "v": "float8_e4m3fn", "k_scale": None, "v_scale": None}


def test_raw_pointers_are_sliced_like_arrays() -> None:
    """A device address that nobody reads: tinygrad, TensorRT and ONNX Runtime give no more."""
    raw = (1 << 20, (2, 3, 2, 32, 128), None, 2, "cuda:0")
    k, v = layouts.tinygrad.cache_kv([raw], dtype="float16").planes
    assert (k.view.pointer, v.view.pointer) == (1 << 20, (1 << 20) + 3 * 2 * 32 * 256)
    assert (k.element, k.chunk_bytes, k.n_chunks) == (v.element, 256, 2) and k.element is not None


# ---- nhd, hnd, token_major -------------------------------------------------------------------------------------------
def one(engine: Engine) -> tuple[NDArray[np.uint8], KvPool]:
    flat = engine.spec().buffers["kv"]
    return flat, engine.build(flat)


def test_partial_takes_the_first_16_bytes_of_each_chunk() -> None:
    engine = ENGINES["vllm.flash_attn HND"]
    flat, pool = one(engine)
    assert engine.planes == [HEADS] * 2
    for slot in (0, 5, 47):
        places = [places_of(pool, i, flat.ctypes.data, slot).reshape(H, -1)[:, :16] for i in range(len(pool.planes))]
        np.testing.assert_array_equal(digested_offsets(pool, flat, slot, "partial"), np.ravel(places))
        gathered = [pool.gather(p, np.array([slot]), "partial")[0] for p in pool.planes]
        np.testing.assert_array_equal(np.concatenate(gathered), flat[np.ravel(places)])
    assert [u.n_words for u in pool.digest_units("partial")] == [8] * 4


def test_the_generic_ones_describe_the_same() -> None:
    """Slices by hand are what the engines' constructors do."""
    flat, pool = one(ENGINES["flashinfer.paged_kv_cache HND"])
    assert ENGINES["flashinfer.paged_kv_cache NHD"].planes == [FLASH] * 2
    kv = flat.view(np.float16).reshape(L, B, 2, H, N, -1)
    by_hand = layouts.hnd(k=list(kv[:, :, 0]), v=list(kv[:, :, 1]), reserved_blocks=())
    assert by_hand.plane_records().tolist() == pool.plane_records().tolist()


def test_elements_apart_are_chunks_of_one_element() -> None:
    (plane,) = layouts.nhd(k=[f16(3, 16, 2, 16)[..., ::2]]).planes
    assert (plane.n_chunks, plane.chunk_bytes, plane.chunk_stride) == (16, 2, 4)


def test_the_fields_of_the_pool_pass_through() -> None:
    two = [f16(3, 16, 2, 8), f16(3, 16, 2, 8)]
    pool = layouts.nhd(k=two, layers=[1, 5], name="swa", kind=PoolKind.SWA, window=8, reserved_blocks=(2,))
    assert [(p.layer, p.name, p.half) for p in pool.planes] == [(1, "k", Half.K), (5, "k", Half.K)]
    assert (pool.name, pool.kind, pool.window, pool.reserved_blocks) == ("swa", PoolKind.SWA, 8, (2,))
    assert (pool.page_size, pool.n_blocks, pool.device) == (16, 3, "cpu")
    assert layouts.nhd(k=[f16(48, 2, 8)]).page_size == 16, "where the arrays do not show it"
    assert layouts.token_major(latent=[f16(4, 4, 8)], half=Half.K).planes[0].name == "latent"
    more = [f16(3, 16, 2, 8), f16(3, 16, 2, 8)]
    own = layouts.onnxruntime.genai_paged(two, more, layers=[2, 4], reserved_blocks=(1,), name="paged")
    assert (own.name, own.reserved_blocks, [p.layer for p in own.planes]) == ("paged", (1,), [2, 2, 4, 4])


def test_planes_made_by_hand() -> None:
    """PagedAttention's K [B, H, D / x, N, x], as the constructor has it."""
    flat, pool = one(ENGINES["vllm.paged_attention"])
    k = flat[: flat.size // 4]
    runs = {"token_stride": 16, "chunk_stride": 256, "n_chunks": 32, "chunk_bytes": 16}
    by_hand = KvPool(planes=(Plane(data=k, page_stride=8192, **runs),), page_size=N)
    assert by_hand.plane_records().tolist() == pool.plane_records()[:1].tolist()
