"""The picture of a pool against literal text, and against the engines' own indexing; the guess about an array."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from layout_catalogue import ENGINES
from layout_engines import Memory

from kvcanary import KvPool, layouts
from kvcanary.errors import LayoutError


def raw(*shape: int, itemsize: int = 2, at: int = 0) -> Any:
    """A device address that nobody reads."""
    return ((1 << 20) + (at << 16), shape, None, itemsize)


def u8(*shape: int, at: int = 0) -> Any:
    return raw(*shape, itemsize=1, at=at)


def flashinfer_hnd() -> KvPool:
    pages = [raw(3, 2, 2, 4, 8, at=i) for i in range(3)]
    return layouts.flashinfer.paged_kv_cache(pages, "HND", dtype="float16")


def flash_attn() -> KvPool:
    return layouts.vllm.flash_attn([raw(2, 3, 4, 2, 8)], dtype="bfloat16")


def layers_in_heads() -> KvPool:
    sizes = {"num_layers": 2, "num_blocks": 3, "num_kv_heads": 2, "block_size": 4, "content_bytes": 32}
    return layouts.vllm.packed_tensor(u8(2 * 3 * 2 * 4 * 32), layout="LHBNC", dtype="float16", **sizes)


def deepseek_v4() -> KvPool:
    return layouts.vllm.deepseek_v4([u8(2, 37440)], block_size=64)


def dsa_indexer() -> KvPool:
    return layouts.vllm.dsa_indexer([u8(2, 4 * 132)], block_size=4)


def mxfp8() -> KvPool:
    data, scales = [[u8(256, 1, 128, at=i)] for i in (0, 1)], [[u8(2, 1, 32, 4, 4, at=i)] for i in (2, 3)]
    return layouts.sglang.mha_mxfp8(*data, *scales)


def maxtext() -> KvPool:
    return layouts.jax.maxtext([raw(4, 2, 3, 8)], [raw(4, 2, 3, 8, at=1)])


PICTURES: dict[str, tuple[Callable[[], KvPool], str]] = {
    "heads before tokens, K and V in one page": (flashinfer_hnd, """
pool 'full' (FULL): 3 blocks of 4 slots, 3 layers, 192 bytes a slot; reserved blocks: none
layers 0 to 2
  A = k (K): 2 chunks of 16 bytes a slot, float16, loads of 16
      3 blocks every 256 > 2 chunks every 64 > 4 slots every 16 > 16 bytes
  B = v (V): 2 chunks of 16 bytes a slot, float16, loads of 16
      3 blocks every 256 > 2 chunks every 64 > 4 slots every 16 > 16 bytes
  block 0 of A, B: 256 bytes
    bytes 0 to 255: a character is 4, a digit a slot
      0000111122223333000011112222333300001111222233330000111122223333
      AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB
    slot 0: A 0-15 64-79, B 128-143 192-207
    slot 1: A 16-31 80-95, B 144-159 208-223
    slot 3: A 48-63 112-127, B 176-191 240-255
"""),
    "K and V apart": (flash_attn, """
pool 'full' (FULL): 3 blocks of 4 slots, 1 layer, 64 bytes a slot; reserved blocks: 0
layer 0
  A = k (K): 32 bytes a slot, bfloat16, loads of 16
      3 blocks every 128 > 4 slots every 32 > 32 bytes
  B = v (V): 32 bytes a slot, bfloat16, loads of 16
      3 blocks every 128 > 4 slots every 32 > 32 bytes
  block 0 of A and likewise of B: 128 bytes
    bytes 0 to 127: a character is 2, a digit a slot
      0000000000000000111111111111111122222222222222223333333333333333
    slot 0: 0-31
    slot 1: 32-63
    slot 3: 96-127
"""),
    "blocks inside heads": (layers_in_heads, """
pool 'full' (FULL): 3 blocks of 4 slots, 2 layers, 128 bytes a slot; reserved blocks: 0
layers 0, 1
  A = kv (K): 2 chunks of 32 bytes a slot, float16, loads of 16
      2 chunks every 384 > 3 blocks every 128 > 4 slots every 32 > 32 bytes
  block 0 of A: 512 bytes
    bytes 0 to 511: a character is 8, a digit a slot, . nothing here
      0000111122223333................................0000111122223333
    slot 0: 0-31 384-415
    slot 1: 32-63 416-447
    slot 3: 96-127 480-511
"""),
    "scales behind all rows": (deepseek_v4, """
pool 'full' (FULL): 2 blocks of 64 slots, 1 layer, 584 bytes a slot; reserved blocks: 0
layer 0
  A = latent (K): 576 bytes a slot, uint8, loads of 16
      2 blocks every 37440 > 64 slots every 576 > 576 bytes
  B = latent_scale (K): 8 bytes a slot, uint8, loads of 8
      2 blocks every 37440 > 64 slots every 8 > 8 bytes
  block 0 of A, B: 37376 bytes
    bytes 0 to 37375: a character is 1152, a digit 2 slots, * several
      0123456789abcdefghijklmnopqrstuv*
      AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB
    bytes 36864 to 37375: a character is 8, a digit 2 slots
      00112233445566778899aabbccddeeffgghhiijjkkllmmnnooppqqrrssttuuvv
      BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB
    slot 0: A 0-575, B 36864-36871
    slot 1: A 576-1151, B 36872-36879
    slot 63: A 36288-36863, B 37368-37375
"""),
    "one digest for two planes": (dsa_indexer, """
pool 'full' (FULL): 2 blocks of 4 slots, 1 layer, 132 bytes a slot; reserved blocks: 0
layer 0
  A = index_k (K): 128 bytes a slot, uint8, loads of 16, one digest with B
      2 blocks every 528 > 4 slots every 128 > 128 bytes
  B = index_k_scale (K): 4 bytes a slot, uint8, loads of 4, one digest with A
      2 blocks every 528 > 4 slots every 4 > 4 bytes
  block 0 of A, B: 528 bytes
    bytes 0 to 527: a character is 16, a digit a slot, * several
      00000000111111112222222233333333*
      AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB
    bytes 512 to 527: a character is 4, a digit a slot
      0123
      BBBB
    slot 0: A 0-127, B 512-515
    slot 1: A 128-255, B 516-519
    slot 3: A 384-511, B 524-527
"""),
    "interleaved tokens": (mxfp8, """
pool 'full' (FULL): 2 blocks of 128 slots, 1 layer, 264 bytes a slot; reserved blocks: 0
layer 0
  A = k (K): 128 bytes a slot, float8_e4m3fn, loads of 16
      2 blocks every 16384 > 128 slots every 128 > 128 bytes
  B = v (V): 128 bytes a slot, float8_e4m3fn, loads of 16
      2 blocks every 16384 > 128 slots every 128 > 128 bytes
  C = k_scale (K): 4 bytes a slot, uint8, loads of 4
      2 blocks every 512 > 32 slots every 16 > 4 runs of slots every 4 > 4 bytes
  D = v_scale (V): 4 bytes a slot, uint8, loads of 4
      2 blocks every 512 > 32 slots every 16 > 4 runs of slots every 4 > 4 bytes
  block 0 of A and likewise of B: 16384 bytes
    bytes 0 to 16383: a character is 256, a digit 4 slots
      00112233445566778899aabbccddeeffgghhiijjkkllmmnnooppqqrrssttuuvv
    slot 0: 0-127
    slot 1: 128-255
    slot 127: 16256-16383
  block 0 of C and likewise of D: 512 bytes
    bytes 0 to 511: a character is 8, a digit 4 slots, * several
      ****************************************************************
    bytes 0 to 255: a character is 4, a digit 4 slots
      08go08go08go08go19hp19hp19hp19hp2aiq2aiq2aiq2aiq3bjr3bjr3bjr3bjr
    slot 0: 0-3
    slot 1: 16-19
    slot 127: 508-511
"""),
    "sequences inside tokens": (maxtext, """
pool 'full' (FULL): 3 blocks of 4 slots, 1 layer, 64 bytes a slot; reserved blocks: none
layer 0
  A = k (K): 2 chunks of 16 bytes a slot, unknown type, loads of 16
      4 slots every 96 > 2 chunks every 48 > 3 blocks every 16 > 16 bytes
  B = v (V): 2 chunks of 16 bytes a slot, unknown type, loads of 16
      4 slots every 96 > 2 chunks every 48 > 3 blocks every 16 > 16 bytes
  block 0 of A and likewise of B: 352 bytes
    bytes 0 to 351: a character is 8, a digit a slot, . nothing here
      00....00....11....11....22....22....33....33
    slot 0: 0-15 48-63
    slot 1: 96-111 144-159
    slot 3: 288-303 336-351
"""),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture(name: str) -> None:
    build, text = PICTURES[name]
    assert layouts.describe(build()) == text.strip()


@pytest.mark.parametrize("name", ENGINES)
def test_the_ranges_told_are_those_the_engine_touches(name: str) -> None:
    engine = ENGINES[name]
    pool, touched = engine.build(np.zeros(engine.n_bytes, np.uint8)), engine.indexing()
    layer = pool.planes[0].layer
    text = layouts.describe(pool, layer=layer)
    names = dict(re.findall(r"^  ([A-Z]) = (\w+)", text, re.MULTILINE))
    assert sorted(names.values()) == sorted(p.name for p in pool.planes if p.layer == layer)
    groups = re.findall(r"^  block 0 of ([A-Z, a-z]+): \d+ bytes\n((?: {4}.*\n?)+)", text, re.MULTILINE)
    assert groups
    for those, drawing in groups:
        slots = re.findall(r"^    slot (\d+): (.*)$", drawing, re.MULTILINE)
        last = pool.page_size - 1
        assert [int(s) for s, _ in slots] == sorted({0, min(1, last), last})
        for letters in those.split(" and likewise of "):
            keys = {letter: (layer, names[letter]) for letter in letters.split(", ")}
            first = min(int(touched(s)[key][0]) for key in keys.values() for s in range(pool.page_size))
            for slot, told in slots:
                parts = dict(part.split(" ", 1) for part in told.split(", ")) if len(keys) > 1 else {letters: told}
                for letter, ranges in parts.items():
                    runs = [np.arange(int(a), int(b) + 1) for a, b in re.findall(r"(\d+)-(\d+)", ranges)]
                    places = touched(int(slot))[keys[letter]] - first
                    found = np.concatenate(runs)
                    if "..." in ranges:
                        assert found[0] == places[0] and found[-1] == places[-1]
                        assert np.isin(found, places).all()
                    else:
                        np.testing.assert_array_equal(found, places)


def test_other_blocks_layers_and_widths() -> None:
    pool = flashinfer_hnd()
    assert layouts.describe(pool, block=2).replace("block 2", "block 0") == layouts.describe(pool)
    assert "\nlayer 1\n" in layouts.describe(pool, layer=1)
    assert "\n      0123012301230123\n      AAAAAAAABBBBBBBB\n" in layouts.describe(pool, width=16)


def test_layers_that_differ_are_drawn_apart() -> None:
    two = layouts.nhd(k=[raw(3, 4, 2, 8), raw(3, 4, 2, 16, at=1), raw(3, 4, 2, 8, at=2)])
    text = layouts.describe(two)
    assert re.findall(r"^layers? .*$", text, re.MULTILINE) == ["layers 0, 2", "layer 1"]


def test_a_pair_of_pools_and_a_pool_without_planes() -> None:
    full, swa = (layouts.sglang.mha([raw(n, 2, 8, at=i)], page_size=4, layers=[i]) for i, n in enumerate((16, 8)))
    lut = (1 << 24, (17,), None, 8)
    pair = layouts.sglang.swa(full, swa, full_to_swa_index_mapping=lut, window=5)
    assert re.findall(r"^pool .*$", layouts.describe(pair), re.MULTILINE) == [
        "pool 'full' (FULL): 4 blocks of 4 slots, 1 layer, 32 bytes a slot; reserved blocks: 0",
        "pool 'swa' (SWA, window 5): 2 blocks of 4 slots, 1 layer, 32 bytes a slot; reserved blocks: 0",
    ]
    bare = KvPool(planes=(), page_size=4, n_blocks=2)
    assert layouts.describe(bare) == (
        "pool 'full' (FULL): 2 blocks of 4 slots, 0 layers, 0 bytes a slot; reserved blocks: 0"
    )


def test_a_block_of_millions_of_runs_is_told_in_words_alone() -> None:
    large = layouts.llama_cpp.cache([raw(1, 1 << 13, 1024)], [raw(1, 1024, 1 << 13, at=1 << 10)], v_trans=True)
    text = layouts.describe(large)
    assert "1024 chunks every 16384 > 8192 slots every 2 > 2 bytes" in text
    assert text.endswith("block 0 of B is too large to draw")


GUESSES: dict[str, tuple[Any, str]] = {
    "K and V first": (np.zeros((2, 3, 16, 2, 128), np.float16), """
float16[2, 3, 16, 2, 128] on cpu, 49152 bytes, in C order
  as [2, blocks, tokens, heads, dim]: 3 blocks of 16 slots, 512 bytes of each of K and V a slot
      layouts.vllm.flash_attn, layouts.tensorrt.edge_llm_paged
  as [2, blocks, heads, tokens, dim]: 3 blocks of 2 slots, 4096 bytes of each of K and V a slot in 16 chunks
      layouts.onnxruntime.combined, layouts.tinygrad.cache_kv
"""),
    "rows of slots": (raw(48, 2, 128), """
16-bit[48, 2, 128] on cuda:0, 24576 bytes, in C order
  as [slots, heads, dim]: 48 slots, 512 bytes a slot
      layouts.nhd, layouts.sglang.mha, layouts.sglang.mha_mxfp8, layouts.sglang.mla,
      layouts.transformers.paged_cache
  as [blocks, tokens, content]: 48 blocks of 2 slots, 256 bytes a slot
      layouts.token_major, layouts.vllm.mla, layouts.tvm.mla, layouts.llama_cpp.cache
  as [blocks, content, tokens]: 48 blocks of 128 slots, 4 bytes a slot in 2 chunks
      layouts.llama_cpp.cache (values, v_trans=True)
"""),
    "pages of bytes": (np.zeros((3, 37440), np.uint8), """
uint8[3, 37440] on cpu, 112320 bytes, in C order
  as [slots, content]: 3 slots, 37440 bytes a slot
      layouts.token_major
  as [blocks, bytes of a page]: 3 blocks of 64 slots of 584 bytes
      layouts.vllm.deepseek_v4, layouts.sglang.deepseek_v4 (v4)
"""),
    "interleaved scales": (np.zeros((3, 2, 32, 4, 4), np.uint8), """
uint8[3, 2, 32, 4, 4] on cpu, 3072 bytes, in C order
  as [blocks, 2, tokens, heads, dim]: 3 blocks of 32 slots, 16 bytes of each of K and V a slot
      layouts.vllm.flashinfer, layouts.flashinfer.paged_kv_cache (NHD), layouts.tensorrt_llm.buffers (NHD)
  as [blocks, 2, heads, tokens, dim]: 3 blocks of 4 slots, 128 bytes of each of K and V a slot in 32 chunks
      layouts.flashinfer.paged_kv_cache (HND), layouts.tensorrt_llm.buffers (HND), layouts.tvm.paged_kv_cache
  as [blocks, heads, tokens, runs, dim]: 3 blocks of 128 slots, 8 bytes a slot in 2 chunks
      layouts.sglang.mha_mxfp8 (interleaved scales)
"""),
    "another order in memory": (np.zeros((3, 2, 16, 8), np.float16).transpose(0, 2, 1, 3)[:, :, :1], """
float16[3, 16, 1, 8] on cpu, 768 bytes, strides [512, 16, 256, 2] bytes
  as [blocks, tokens, heads, dim]: 3 blocks of 16 slots, 16 bytes a slot
"""),
    "no layout": (np.zeros(3, np.float16), """
float16[3] on cpu, 6 bytes, in C order
  no known layout has this shape: describe it by Planes of your own, one per run of bytes
"""),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSES)
def test_the_guess(name: str) -> None:
    array, text = GUESSES[name]
    found = layouts.describe(array)
    assert found.startswith(text.strip()) if name == "another order in memory" else found == text.strip()


# A flat buffer, pages of unknown heads, two views of one array, pools of others, and, in the catalogue, pages of 20.
NOT_GUESSED = {
    "vllm.packed_tensor",
    "vllm.nvfp4",
    "flashinfer.mla",
    "sglang.swa",
    "sglang.mha_fp4",
    "sglang.deepseek_v4",
}


@pytest.mark.parametrize("name", [n for n in ENGINES if n.partition(" ")[0] not in NOT_GUESSED])
def test_a_constructor_is_guessed_for_its_own_arrays(name: str) -> None:
    arrays = ENGINES[name].arrays(Memory(np.zeros(ENGINES[name].n_bytes, np.uint8)))
    given = [a for value in arrays.values() for a in (value if isinstance(value, list) else [value])]
    given += [arrays["kv"][0]] if name.startswith("vllm.packed ") and "kv" in arrays else []
    assert any(f"layouts.{name.partition(' ')[0]}" in layouts.describe(array) for array in given)


def test_every_name_of_a_guess_is_a_constructor() -> None:
    shapes = [(3,) * n for n in range(1, 6)] + [(2,) * n for n in range(2, 6)] + [(2, 2, 2, 32, 8), (2, 2, 32, 4, 4)]
    pages = [(2, 37440), (2, 64 * 528), (2, 64 * 512), (2, 64 * 132), (2, 64 * 288)]
    text = "\n".join(layouts.describe(u8(*shape)) for shape in shapes + pages)
    text += layouts.describe(np.zeros((3, 2, 4, 16, 8), np.float16))
    names = set(re.findall(r"layouts\.([a-z0-9_.]+)", text))
    assert len(names) > 25
    for name in names:
        found: Any = layouts
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "block": (lambda: layouts.describe(maxtext(), block=3), "block=3: pool 'full' has blocks 0 to 2"),
    "layer": (lambda: layouts.describe(flashinfer_hnd(), layer=7), "layer=7: pool 'full' has layers 0 to 2"),
    "width": (lambda: layouts.describe(maxtext(), width=0), "width=0: give the characters of a drawing, at least 1"),
    "no array": (lambda: layouts.describe("kv"), r"describe\(\): str is no array; give"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    build, message = REFUSED[case]
    with pytest.raises(LayoutError, match=message):
        build()
