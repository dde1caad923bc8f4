"""The layouts of the engines against their own indexing: byte for byte, for every slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from strategies import digested_offsets

from kvcanary import layouts
from kvcanary.errors import LayoutError
from kvcanary.layout import KvPool, Plane
from kvcanary.tags import Half, PoolKind

# Heads, head dim, tokens a page, pages, layers, bytes an element, positions and sequences of a static cache.
H, D, N, B, L, E, S, Q = 2, 128, 16, 3, 2, 2, 32, 3
Bytes = NDArray[np.uint8]
Tags = NDArray[np.int64]
Built = tuple[KvPool, Bytes, Callable[[int], Any]]
RAW = np.random.default_rng(7).integers(0, 256, 1 << 20, np.uint8)


def memory(shape: Sequence[int], order: Sequence[int] = ()) -> tuple[Bytes, Bytes, Tags]:
    """Flat memory; an array over it of ``shape`` (last axis bytes) in physical ``order``; the offset of each byte."""
    order = order or range(len(shape))
    physical = [shape[i] for i in order]
    flat = RAW[: int(np.prod(shape))].copy()
    logical = np.argsort(order)
    return flat, flat.reshape(physical).transpose(logical), np.arange(flat.size).reshape(physical).transpose(logical)


def half_floats(array: Bytes) -> NDArray[np.float16]:
    return array.view(np.float16)


# ---- the engines: (pool, memory, offsets of a slot's bytes as the engine indexes them) -------------------------------
def vllm(order: tuple[int, ...]) -> Built:
    """vLLM 0.33: logical [L, B, H, N, K and V]; both layers in one pool."""
    flat, kv, tags = memory((L, B, H, N, 2 * D * E), order)
    pool = layouts.hnd(k=[half_floats(layer) for layer in kv])
    return pool, flat, lambda s: tags[:, s // N, :, s % N]


def paged_5d(order: tuple[int, ...]) -> Built:
    """[2, B, N, H, D] of vLLM's FlashAttention, [B, 2, N, H, D] of FlashInfer, both in NHD and HND order."""
    flat, kv, tags = memory((2, B, N, H, D * E), order)
    pool = layouts.nhd(k=[half_floats(kv[0])], v=[half_floats(kv[1])])
    return pool, flat, lambda s: tags[:, s // N, s % N]


def paged_attention_k() -> Built:
    """[B, H, D / x, N, x]."""
    flat, k, tags = memory((B, H, D * E // 16, N, 16))
    runs = {"token_stride": 16, "chunk_stride": 16 * N, "n_chunks": H * D * E // 16, "chunk_bytes": 16}
    pool = KvPool(planes=(Plane(data=k, page_stride=k.strides[0], **runs),), page_size=N)
    return pool, flat, lambda s: tags[s // N, :, :, s % N]


def paged_attention_v() -> Built:
    """[B, H, D, N]: an element every N elements."""
    flat, v, tags = memory((B, H, D, N, E))
    pool = layouts.nhd(k=[half_floats(v)[..., 0].transpose(0, 3, 1, 2)])
    return pool, flat, lambda s: tags[s // N, :, :, s % N]


def latent(row: int) -> Built:
    """MLA: [B, N, row]."""
    flat, rows, tags = memory((B, N, row))
    return layouts.token_major(latent=[rows]), flat, lambda s: tags[s // N, s % N]


def block_split(n: int, parts: tuple[int, int], page_bytes: int, group: str | None) -> Built:
    """A page of n rows of parts[0] bytes, then n of parts[1]: DeepSeek-V4's latent and scales, the DSA indexer."""
    flat, pages, tags = memory((B, page_bytes))
    at = (0, n * parts[0])
    planes = [
        Plane(data=pages, offset=o, page_stride=page_bytes, token_stride=w, chunk_bytes=w, group=group)
        for o, w in zip(at, parts, strict=True)
    ]
    runs = [(o, w) for o, w in zip(at, parts, strict=True)]
    pool = KvPool(planes=tuple(planes), page_size=n, n_blocks=B)
    return pool, flat, lambda s: np.concatenate([tags[s // n, o + s % n * w : o + (s % n + 1) * w] for o, w in runs])


def nvfp4() -> Built:
    """vLLM NVFP4: a page is K data, K scales, V data, V scales, each [H, N, width]."""
    widths = (D // 2, D // 16, D // 2, D // 16)
    starts = np.cumsum([0, *(H * N * w for w in widths)])
    flat, pages, tags = memory((B, int(starts[-1])))
    parts = [(int(o), w, Half(i // 2)) for i, (o, w) in enumerate(zip(starts[:-1], widths, strict=True))]
    planes = tuple(
        Plane(data=pages, offset=o, page_stride=int(starts[-1]), token_stride=w, chunk_stride=N * w, n_chunks=H,
              chunk_bytes=w, half=half, group=half.name)
        for o, w, half in parts
    )  # fmt: skip
    split = [tags[:, o : o + H * N * w].reshape(B, H, N, w) for o, w, _ in parts]
    pool = KvPool(planes=planes, page_size=N, n_blocks=B)
    return pool, flat, lambda s: np.concatenate([part[s // N, :, s % N].ravel() for part in split])


def rows_of_slots(page_size: int) -> Built:
    """SGLang: [slots, H, D] of K and of V."""
    flat, kv, tags = memory((2, B * N, H, D * E))
    pool = layouts.nhd(k=[half_floats(kv[0])], v=[half_floats(kv[1])], page_size=page_size)
    return pool, flat, lambda s: tags[:, s]


def trtllm() -> Built:
    """[blocks, layers, 2, H, N, D]."""
    flat, kv, tags = memory((B, L, 2, H, N, D * E))
    k, v = ([half_floats(kv[:, layer, half]) for layer in range(L)] for half in (0, 1))
    return layouts.hnd(k=k, v=v), flat, lambda s: tags[s // N, :, :, :, s % N]


def static_hnd(shape: tuple[int, ...]) -> Built:
    """Hugging Face [b, H, S, D] (one half), tinygrad [2, b, H, S, D]."""
    flat, kv, tags = memory(shape)
    k, v = (kv, None) if len(shape) == 4 else (kv[0], [half_floats(kv[1])])
    pool = layouts.hnd(k=[half_floats(k)], v=v, reserved_blocks=())
    return pool, flat, lambda s: tags[..., s // S, :, s % S, :]


def maxtext() -> Built:
    """[S, H, b, D]: the sequences lie inside the tokens."""
    flat, kv, tags = memory((S, H, Q, D * E))
    pool = layouts.nhd(k=[half_floats(kv).transpose(2, 0, 1, 3)], reserved_blocks=())
    return pool, flat, lambda s: tags[s % S, :, s // S]


def pallas() -> Built:
    """JAX: [H, pages, N, D]."""
    flat, kv, tags = memory((H, B, N, D * E))
    return layouts.hnd(k=[half_floats(kv).transpose(1, 0, 2, 3)]), flat, lambda s: tags[:, s // N, s % N]


def llama_v() -> Built:
    """llama.cpp, transposed V: [streams, H * D, cells]."""
    flat, v, tags = memory((2, H * D, S, E))
    pool = layouts.token_major(latent=[half_floats(v)[..., 0].transpose(0, 2, 1)], reserved_blocks=())
    return pool, flat, lambda s: tags[s // S, :, s % S]


Chunks = tuple[int, int, int]  # n_chunks, chunk_bytes, chunk_stride
FLASH, HEADS = (1, 512, 0), (2, 256, 4096)
ENGINES: dict[str, tuple[Callable[[], Built], list[tuple[Chunks, int]]]] = {  # and per plane: chunks, load width
    "vLLM LBHNC": (lambda: vllm((0, 1, 2, 3, 4)), [((2, 512, 8192), 16)] * 2),
    "vLLM LBNHC": (lambda: vllm((0, 1, 3, 2, 4)), [((1, 1024, 0), 16)] * 2),
    "vLLM LHBNC": (lambda: vllm((0, 2, 1, 3, 4)), [((2, 512, 24576), 16)] * 2),
    "vLLM BLHNC": (lambda: vllm((1, 0, 2, 3, 4)), [((2, 512, 8192), 16)] * 2),
    "vLLM BLNHC": (lambda: vllm((1, 0, 3, 2, 4)), [((1, 1024, 0), 16)] * 2),
    "vLLM BHLNC": (lambda: vllm((1, 2, 0, 3, 4)), [((2, 512, 16384), 16)] * 2),
    "vLLM FA NHD": (lambda: paged_5d((0, 1, 2, 3, 4)), [(FLASH, 16)] * 2),
    "vLLM FA HND": (lambda: paged_5d((0, 1, 3, 2, 4)), [(HEADS, 16)] * 2),
    "FlashInfer NHD": (lambda: paged_5d((1, 0, 2, 3, 4)), [(FLASH, 16)] * 2),
    "FlashInfer HND": (lambda: paged_5d((1, 0, 3, 2, 4)), [(HEADS, 16)] * 2),
    "PagedAttention K": (paged_attention_k, [((32, 16, 256), 16)]),
    "PagedAttention V": (paged_attention_v, [((256, 2, 32), 2)]),
    "MLA bf16": (lambda: latent(1152), [((1, 1152, 0), 16)]),
    "MLA fp8": (lambda: latent(656), [((1, 656, 0), 16)]),
    "MLA nvfp4": (lambda: latent(352), [((1, 352, 0), 16)]),
    "MLA odd row": (lambda: latent(132), [((1, 132, 0), 4)]),
    "DSV4 584": (lambda: block_split(64, (576, 8), 37440, None), [((1, 576, 0), 16), ((1, 8, 0), 8)]),
    "DSA indexer 132": (lambda: block_split(64, (128, 4), 64 * 132, "k"), [((1, 128, 0), 16), ((1, 4, 0), 4)]),
    "NVFP4": (nvfp4, [((2, 64, 1024), 16), ((2, 8, 128), 8)] * 2),
    "int8 per token head": (lambda: latent(528), [((1, 528, 0), 16)]),
    "SGLang rows": (lambda: rows_of_slots(1), [(FLASH, 16)] * 2),
    "SGLang pages": (lambda: rows_of_slots(16), [(FLASH, 16)] * 2),
    "TRT-LLM": (trtllm, [(HEADS, 16)] * 4),
    "HF static": (lambda: static_hnd((Q, H, S, D * E)), [((2, 256, 8192), 16)]),
    "tinygrad": (lambda: static_hnd((2, Q, H, S, D * E)), [((2, 256, 8192), 16)] * 2),
    "MaxText": (maxtext, [((2, 256, 768), 16)]),
    "JAX pallas": (pallas, [((2, 256, 12288), 16)]),
    "llama.cpp V": (llama_v, [((256, 2, 64), 2)]),
    "llama.cpp q8_0 68": (lambda: latent(68), [((1, 68, 0), 4)]),
    "llama.cpp q8_0 136": (lambda: latent(136), [((1, 136, 0), 8)]),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bytes_of_a_slot_are_those_the_engine_touches(engine: str) -> None:
    pool, flat, touched = ENGINES[engine][0]()
    gathered = [pool.gather(p, np.arange(pool.n_slots)) for p in pool.ordered_planes]
    for slot in range(pool.n_slots):
        found = digested_offsets(pool, flat, slot)
        np.testing.assert_array_equal(np.sort(found), np.sort(touched(slot).ravel()))
        np.testing.assert_array_equal(np.concatenate([g[slot] for g in gathered]), flat[found])


@pytest.mark.parametrize("engine", ENGINES)
def test_chunks_are_as_long_and_loads_as_wide_as_the_layout_allows(engine: str) -> None:
    build, planes = ENGINES[engine]
    pool, flat, _ = build()
    records = pool.plane_records(base_of=lambda plane: plane.view.pointer - flat.ctypes.data)
    found = [((r["n_chunks"], r["chunk_bytes"], r["chunk_stride"]), r["load_bytes"]) for r in records]
    assert found == planes


def test_partial_takes_the_first_16_bytes_of_each_chunk() -> None:
    pool, flat, touched = paged_5d((0, 1, 3, 2, 4))
    for slot in (0, 5, 47):
        np.testing.assert_array_equal(digested_offsets(pool, flat, slot, "partial"), touched(slot)[..., :16].ravel())
        gathered = [pool.gather(p, np.array([slot]), "partial")[0] for p in pool.planes]
        np.testing.assert_array_equal(np.concatenate(gathered), flat[touched(slot)[..., :16].ravel()])
    assert [u.n_words for u in pool.digest_units("partial")] == [8, 8]


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


# ---- refusals --------------------------------------------------------------------------------------------------------
def f16(*shape: int) -> NDArray[np.float16]:
    return np.zeros(shape, np.float16)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "one array": (lambda: layouts.nhd(k=f16(3, 16, 2, 8)), "k=ndarray: give a list with one array per layer"),
    "one raw array": (lambda: layouts.token_major(latent=(4096, (3, 16), None, 2)), "latent=tuple: give a list"),
    "no layers": (lambda: layouts.nhd(k=[]), "at least one"),
    "layers of two counts": (lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], v=[]), "v=list: give a list"),
    "V of fewer layers": (
        lambda: layouts.nhd(k=[f16(3, 16, 2, 8), f16(3, 16, 2, 8)], v=[f16(3, 16, 2, 8)]),
        "k for 2 layers, v for 1 layers: give as many of each",
    ),
    "fused array": (lambda: layouts.nhd(k=[f16(2, 3, 16, 2, 8)]), "slice a fused array"),
    "ragged rows": (lambda: layouts.nhd(k=[f16(40, 2, 8)], page_size=16), "40 slots, no multiple of page_size=16"),
    "two page sizes": (lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], page_size=8), "16 slots a block, but page_size=8"),
    "pools of two sizes": (
        lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], v=[f16(2, 16, 2, 8)]),
        "v\\[0\\] has 2 blocks of 16, the first array 3 of 16",
    ),
    "two chunk axes": (
        lambda: layouts.nhd(k=[f16(3, 16, 4, 16)[:, :, :, ::2][:, :, ::2, :6]]),
        "several Planes, one per",
    ),
    "list of numbers": (lambda: layouts.nhd(k=[[1, 2]]), r"k\[0\]: list is no array; give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(LayoutError, match=message):
        build()
