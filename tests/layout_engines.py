"""The engines' layouts: their arrays, the constructor that describes them, and the engine's own indexing of a slot.

An engine's arrays are carved out of one flat memory. The same lines carve them out of u8 (for the pool, on any device)
and out of i64 that hold their own index (for the indexing): what an index finds there are the bytes' places.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from agree import PoolSpec
from numpy.typing import NDArray

from kvcanary import KvPool, layouts

# Heads, head dim, tokens a page, pages, layers, positions and sequences of a static cache.
H, D, N, B, L, S, Q = 2, 128, 16, 3, 2, 32, 3
F16, U8, F32, I64 = np.dtype(np.float16), np.dtype(np.uint8), np.dtype(np.float32), np.dtype(np.int64)
Tags = NDArray[np.int64]
Arrays = dict[str, Any]
Slot = dict[tuple[int, str], Any]  # (layer, plane) -> places of the slot's bytes in the memory
Chunks = tuple[int, int, int]  # n_chunks, chunk_bytes, chunk_stride


class Memory:
    """Flat memory that arrays are taken from, one after the other, 16 bytes aligned."""

    def __init__(self, flat: Any) -> None:
        self.flat, self.n_bytes = flat, 0

    def take(self, *shape: int, dtype: np.dtype[Any] = F16, order: Sequence[int] | None = None) -> Any:
        """An array of this shape, in C order or in the physical ``order`` of its axes; tags have an axis of bytes."""
        order = range(len(shape)) if order is None else order
        n_bytes = math.prod(shape) * dtype.itemsize
        piece = self.flat[self.n_bytes : self.n_bytes + n_bytes]
        self.n_bytes += -(-n_bytes // 16) * 16
        physical, logical = [shape[i] for i in order], [int(i) for i in np.argsort(list(order))]
        if piece.dtype == np.int64:
            return piece.reshape(*physical, dtype.itemsize).transpose(*logical, len(shape))
        return piece.view(dtype).reshape(physical).transpose(logical)

    def layers(self, *shape: int, dtype: np.dtype[Any] = F16) -> list[Any]:
        return [self.take(*shape, dtype=dtype) for _ in range(L)]


class Engine(NamedTuple):
    """One layout of an engine.

    Attributes:
        arrays: what the engine has, carved out of a memory.
        pool: the constructor over them.
        slot: the engine's own indexing of the same arrays.
        planes: chunks and load width of each plane in order; of one layer, if all are alike.
    """

    arrays: Callable[[Memory], Arrays]
    pool: Callable[[Arrays], KvPool]
    slot: Callable[[Arrays, int], Slot]
    planes: list[tuple[Chunks, int]]

    @property
    def n_bytes(self) -> int:
        memory = Memory(np.zeros(1 << 21, np.int64))
        self.arrays(memory)
        return memory.n_bytes

    def build(self, flat: Any) -> KvPool:
        """The pool over a flat memory u8[n_bytes], in NumPy or CuPy."""
        return self.pool(self.arrays(Memory(flat)))

    def indexing(self) -> Callable[[int], dict[tuple[int, str], Tags]]:
        """slot -> sorted places of its bytes, per plane."""
        tags = self.arrays(Memory(np.arange(self.n_bytes, dtype=np.int64)))
        return lambda s: {key: np.sort(_flat(places)) for key, places in self.slot(tags, s).items()}

    def spec(self, seed: int = 7) -> PoolSpec:
        """Random contents, and the pool over any copy of them."""
        flat = np.random.default_rng(seed).integers(0, 256, self.n_bytes, np.uint8)

        def build(given: Mapping[str, Any]) -> KvPool:
            return self.build(given["kv"])

        return PoolSpec({"kv": flat}, build)


def _flat(places: Any) -> Tags:
    return np.concatenate([p.ravel() for p in places]) if isinstance(places, list) else places.ravel()


FLASH, HEADS, ROWS = ((1, 512, 0), 16), ((2, 256, 4096), 16), ((2, 256, 8192), 16)  # chunks, load of half a slot


def in_block(x: Any, s: int) -> Any:
    """[blocks, tokens, ...]"""
    return x[s // N, s % N]


def in_heads(x: Any, s: int) -> Any:
    """[blocks, heads, tokens, ...]"""
    return x[s // N, :, s % N]


def in_static(x: Any, s: int) -> Any:
    """[sequences, heads, positions, ...]"""
    return x[s // S, :, s % S]


def of_slot(x: Any, s: int) -> Any:
    """[slots, ...]"""
    return x[s]


# ---- what many engines have ------------------------------------------------------------------------------------------
def per_layer(*halves: Any) -> Slot:
    """Places of layers: lists for K and for V."""
    return {(i, name): layer for name, layers in zip("kv", halves, strict=False) for i, layer in enumerate(layers)}


def separate(
    k: tuple[int, ...],
    pool: Callable[..., KvPool],
    at: Callable[[Any, int], Any],
    planes: list[tuple[Chunks, int]],
    v: tuple[int, ...] | None = None,
) -> Engine:
    """K and V per layer in arrays of their own; ``at`` indexes one of them."""
    return Engine(
        lambda m: {"k": m.layers(*k), "v": m.layers(*(v or k))},
        lambda a: pool(a["k"], a["v"]),
        lambda t, s: per_layer([at(x, s) for x in t["k"]], [at(x, s) for x in t["v"]]),
        planes,
    )


def one_array(
    shape: tuple[int, ...],
    pool: Callable[[list[Any]], KvPool],
    at: Callable[[Any, int, int], Any],
    planes: list[tuple[Chunks, int]],
    order: Sequence[int] | None = None,
) -> Engine:
    """K and V of a layer in one array; ``at`` indexes one half of it."""
    return Engine(
        lambda m: {"kv": [m.take(*shape, order=order) for _ in range(L)]},
        lambda a: pool(a["kv"]),
        lambda t, s: per_layer(*([at(x, half, s) for x in t["kv"]] for half in (0, 1))),
        planes,
    )


def rows(
    shape: tuple[int, ...],
    pool: Callable[[list[Any]], KvPool],
    at: Callable[[Any, int], Any],
    planes: list[tuple[Chunks, int]],
    name: str = "latent",
    dtype: np.dtype[Any] = U8,
) -> Engine:
    """One array per layer that holds all of a token."""
    return Engine(
        lambda m: {"rows": m.layers(*shape, dtype=dtype)},
        lambda a: pool(a["rows"]),
        lambda t, s: {(i, name): at(x, s) for i, x in enumerate(t["rows"])},
        planes,
    )


def split_pages(
    page: int, kinds: dict[str, int], n_bytes: int, pool: Callable[[list[Any]], KvPool], loads: list[int]
) -> Engine:
    """Pages of all rows of each kind, one kind after the other, padded to ``n_bytes``."""

    def slot(t: Arrays, s: int) -> Slot:
        found, base = {}, 0
        for name, n in kinds.items():
            start = base + s % page * n
            found |= {(i, name): x[s // page, start : start + n] for i, x in enumerate(t["pages"])}
            base += page * n
        return found

    planes = [((1, n, 0), load) for n, load in zip(kinds.values(), loads, strict=True)]
    return Engine(lambda m: {"pages": m.layers(B, n_bytes, dtype=U8)}, lambda a: pool(a["pages"]), slot, planes)


def physical(order: str) -> Engine:
    """vLLM: logical [L, B, H, N, C] in a physical order, views per layer."""
    axes = ["LBHNC".index(axis) for axis in order]
    chunks = {"LBHNC": (2, 512, 8192), "LBNHC": (1, 1024, 0), "LHBNC": (2, 512, 24576), "BLHNC": (2, 512, 8192)}
    chunks |= {"BLNHC": (1, 1024, 0), "BHLNC": (2, 512, 16384)}
    return Engine(
        lambda m: {"kv": m.take(L, B, H, N, 2 * D, order=axes)},
        lambda a: layouts.vllm.packed([a["kv"][layer] for layer in range(L)]),
        lambda t, s: {(layer, "kv"): t["kv"][layer, s // N, :, s % N] for layer in range(L)},
        [(chunks[order], 16)],
    )


def buffer(order: str) -> Engine:
    """The same from the flat int8 buffer and the order's name."""
    by_axes = physical({"NHD": "LBNHC", "HND": "LBHNC"}.get(order, order))
    axes = {"NHD": "LBNHC", "HND": "LBHNC"}.get(order, order)
    sizes = dict(zip("LBHNC", (L, B, H, N, 4 * D), strict=True))
    names = ("num_layers", "num_blocks", "num_kv_heads", "block_size", "content_bytes")
    given = dict(zip(names, sizes.values(), strict=True))
    logical = [axes.index(axis) for axis in "LBHNC"]

    def slot(t: Arrays, s: int) -> Slot:
        kv = t["flat"].reshape([sizes[axis] for axis in axes]).transpose(logical)
        return {(layer, "kv"): kv[layer, s // N, :, s % N] for layer in range(L)}

    return Engine(
        lambda m: {"flat": m.take(math.prod(sizes.values()), dtype=U8)},
        lambda a: layouts.vllm.packed_tensor(a["flat"], layout=order, dtype="float16", **given),
        slot,
        by_axes.planes,
    )


def nvfp4() -> Engine:
    """vLLM: a page is K data, K scales, V data, V scales, each [H, N, width]."""
    widths = {"k": D // 2, "k_scale": D // 16, "v": D // 2, "v_scale": D // 16}
    n_bytes = H * N * sum(widths.values())

    def slot(t: Arrays, s: int) -> Slot:
        found, base = {}, 0
        for name, n in widths.items():
            for i, x in enumerate(t["pages"]):
                starts = [base + (h * N + s % N) * n for h in range(H)]
                found[i, name] = [x[s // N, a : a + n] for a in starts]
            base += H * N * n
        return found

    data, scale = ((2, 64, 1024), 16), ((2, 8, 128), 8)
    return Engine(
        lambda m: {"pages": m.layers(B, n_bytes, dtype=U8)},
        lambda a: layouts.vllm.nvfp4(a["pages"], num_kv_heads=H, head_size=D),
        slot,
        [data, scale, data, scale],
    )


def with_scales(
    data: tuple[int, ...],
    scales: tuple[int, ...],
    pool: Callable[..., KvPool],
    at: Callable[[Any, int], Any],
    scale_at: Callable[[Any, int], Any],
    planes: list[tuple[Chunks, int]],
    scale_type: np.dtype[Any] = U8,
) -> Engine:
    """K and V, and their scales, in four arrays per layer."""
    names = ("k", "v", "k_scale", "v_scale")

    def arrays(m: Memory) -> Arrays:
        return {n: m.layers(*(scales if "_" in n else data), dtype=scale_type if "_" in n else U8) for n in names}

    def slot(t: Arrays, s: int) -> Slot:
        return {(i, n): (scale_at if "_" in n else at)(x, s) for n in names for i, x in enumerate(t[n])}

    return Engine(arrays, lambda a: pool(*(a[n] for n in names)), slot, planes)


def two_latents() -> Engine:
    """FlashInfer MLA: ckv and kpe, two views of one [P, N, 576]."""

    def arrays(m: Memory) -> Arrays:
        both = m.layers(B, N, 576)
        return {"ckv": [x[:, :, :512] for x in both], "kpe": [x[:, :, 512:] for x in both]}

    return Engine(
        arrays,
        lambda a: layouts.flashinfer.mla(a["ckv"], a["kpe"]),
        lambda t, s: {(i, n): x[s // N, s % N] for n in ("ckv", "kpe") for i, x in enumerate(t[n])},
        [((1, 1024, 0), 16), ((1, 128, 0), 16)],
    )


def trtllm(kv_layout: str) -> Engine:
    """The pool, [blocks, layers, 2, H * T * D]."""
    inner = {"HND": (H, N, D), "NHD": (N, H, D)}[kv_layout]

    def slot(t: Arrays, s: int) -> Slot:
        blocks = t["pool"].reshape(B, L, 2, *inner, 2)
        of_slot = blocks[s // N, :, :, :, s % N] if kv_layout == "HND" else blocks[s // N, :, :, s % N]
        return {(i, name): of_slot[i, half] for i in range(L) for half, name in enumerate("kv")}

    sizes = {"num_kv_heads": H, "tokens_per_block": N, "head_dim": D}
    return Engine(
        lambda m: {"pool": m.take(B, L, 2, H * N * D)},
        lambda a: layouts.tensorrt_llm.pool(a["pool"], kv_layout=kv_layout, **sizes),
        slot,
        [HEADS if kv_layout == "HND" else FLASH] * 2,
    )


def trtllm_mla() -> Engine:
    """kv_factor 1."""
    sizes = {"num_kv_heads": 1, "tokens_per_block": N, "head_dim": 576}
    return Engine(
        lambda m: {"pool": m.take(B, L, 1, N * 576)},
        lambda a: layouts.tensorrt_llm.pool(a["pool"], **sizes),
        lambda t, s: {(i, "k"): t["pool"].reshape(B, L, N, 576, 2)[s // N, i, s % N] for i in range(L)},
        [((1, 1152, 0), 16)],
    )


def fused_rows(n_rows: int, page: int) -> Engine:
    """SGLang: K and V of a layer in one allocation, as views of their own; rows behind the last page are no slots."""

    def arrays(m: Memory) -> Arrays:
        both = m.layers(2, n_rows, H, D)
        return {"k": [x[0] for x in both], "v": [x[1] for x in both]}

    return Engine(
        arrays,
        lambda a: layouts.sglang.mha(a["k"], a["v"], page_size=page),
        lambda t, s: per_layer([x[s] for x in t["k"]], [x[s] for x in t["v"]]),
        [FLASH] * 2,
    )


def interleaved_scales() -> Engine:
    """SGLang MXFP8, pages of 128: token t of a page at (t % 32, t // 32)."""
    page, heads = 128, 2

    def scale_at(x: Any, s: int) -> Any:
        return x[s // page, :, s % page % 32, s % page // 32]

    return with_scales(
        (B * page, heads, D), (B, heads, 32, page // 32, D // 32),
        lambda *a: layouts.sglang.mha_mxfp8(*a, page_size=page),
        of_slot, scale_at, [((1, 256, 0), 16)] * 2 + [((2, 4, 512), 4)] * 2,
    )  # fmt: skip


def swa(of: int) -> Engine:
    """SGLang's pair of pools: full and sliding window, NHD, of different sizes."""

    def arrays(m: Memory) -> Arrays:
        kv = {f"{half}{i}": m.layers(n, H, D) for i, n in enumerate((B * N, 2 * N)) for half in "kv"}
        return {**kv, "lut": m.take(B * N + 1, dtype=I64)}

    def pool(a: Arrays) -> KvPool:
        full = layouts.sglang.mha(a["k0"], a["v0"], page_size=N, layers=[0, 2])
        window = layouts.sglang.mha(a["k1"], a["v1"], page_size=N, layers=[1, 3])
        return layouts.sglang.swa(full, window, full_to_swa_index_mapping=a["lut"], window=20)[of]

    def slot(t: Arrays, s: int) -> Slot:
        return {(2 * i + of, half): x[s] for half in "kv" for i, x in enumerate(t[f"{half}{of}"])}

    return Engine(arrays, pool, slot, [FLASH] * 2)


def continuous_batching() -> Engine:
    """Hugging Face: [(num_blocks + 2) * block_size, H, D]."""
    pool = functools.partial(layouts.transformers.paged_cache, block_size=N)
    return separate(((B + 2) * N, H, D), pool, of_slot, [FLASH] * 2)


def maxtext(order: str) -> Engine:
    """[S, H, b, D] by default: the sequences lie inside the tokens; scales in the same order."""
    axes = [int(axis) for axis in order.split(",")]
    sizes = [(Q, S, H, D)[axis] for axis in axes]

    def at(x: Any, s: int) -> Any:
        return x.transpose(*np.argsort(axes).tolist(), 4)[s // S, s % S]

    planes = {"1,2,0,3": ((2, 256, 768), 16), "0,1,2,3": ((1, 512, 0), 16)}
    pool = functools.partial(layouts.jax.maxtext, ar_cache_axis_order=order)
    return separate(tuple(sizes), pool, at, [planes[order]] * 2)


def llama(v_trans: bool) -> Engine:
    """[streams, cells, H * D]; V transposed is [streams, H * D, cells]."""
    v = (2, H * D, S) if v_trans else (2, S, H * D)
    return Engine(
        lambda m: {"k": m.layers(2, S, H * D), "v": m.layers(*v)},
        lambda a: layouts.llama_cpp.cache(a["k"], a["v"], v_trans=v_trans),
        lambda t, s: per_layer(
            [x[s // S, s % S] for x in t["k"]],
            [x[s // S, :, s % S] if v_trans else x[s // S, s % S] for x in t["v"]],
        ),
        [FLASH, ((256, 2, 64), 2) if v_trans else FLASH],
    )


def q8_0(heads: int, dim: int) -> Engine:
    """llama.cpp: 34 bytes for each 32 elements."""
    row = heads * dim // 32 * 34
    load = {68: 4, 136: 8, 1088: 16}[row]
    return Engine(
        lambda m: {"k": m.layers(1, S, row, dtype=U8), "v": m.layers(1, S, row, dtype=U8)},
        lambda a: layouts.llama_cpp.cache(a["k"], a["v"], v_trans=False),
        lambda t, s: per_layer([x[0, s] for x in t["k"]], [x[0, s] for x in t["v"]]),
        [((1, row, 0), load)] * 2,
    )


def dsv4(kv_layout: str, page: int, kinds: dict[str, int], align: int, loads: list[int]) -> Engine:
    n_bytes = -(-page * sum(kinds.values()) // align) * align
    pool = functools.partial(layouts.sglang.deepseek_v4, kv_layout=kv_layout, page_size=page)
    return split_pages(page, kinds, n_bytes, pool, loads)
