"""What is no layout of an engine is refused, in words that name the next step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvcanary import layouts
from kvcanary.errors import LayoutError


def f16(*shape: int) -> Any:
    return np.zeros(shape, np.float16)


def u8(*shape: int) -> Any:
    return np.zeros(shape, np.uint8)


Case = tuple[Callable[[], Any], str]
ORDER: dict[str, Any] = {
    "num_layers": 2, "num_blocks": 3, "num_kv_heads": 2, "block_size": 16, "content_bytes": 64,
}  # fmt: skip
GENERIC: dict[str, Case] = {
    "one array": (lambda: layouts.nhd(k=f16(3, 16, 2, 8)), "k=ndarray: give a list with one array per layer"),
    "one raw array": (lambda: layouts.token_major(latent=(4096, (3, 16), None, 2)), "latent=tuple: give a list"),
    "no layers": (lambda: layouts.nhd(k=[]), "at least one"),
    "layers of two counts": (lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], v=[]), "v=list: give a list"),
    "V of fewer layers": (
        lambda: layouts.nhd(k=[f16(3, 16, 2, 8), f16(3, 16, 2, 8)], v=[f16(3, 16, 2, 8)]),
        "k for 2 layers, v for 1 layers: give as many of each",
    ),
    "numbers of other layers": (
        lambda: layouts.vllm.packed([f16(3, 2, 16, 16)], layers=[0, 1]),
        "kv_caches for 1 layers, layers for 2 layers: give as many of each",
    ),
    "a layer twice": (
        lambda: layouts.nhd(k=[f16(3, 16, 2, 8), f16(3, 16, 2, 8)], layers=[0, 0]),
        r"layers=\[0, 0\]: 0 is there twice, .* give the number of each layer once",
    ),
    "a layer below 0": (
        lambda: layouts.token_major(latent=[f16(3, 16, 8)], layers=[-1]),
        r"layers\[0\]=-1: give the number of the layer, an integer from 0 to 2147483647",
    ),
    "a layer beyond 32 bits": (lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], layers=[1 << 31]), "from 0 to 2147483647"),
    "a layer by name": (lambda: layouts.hnd(k=[f16(3, 16, 2, 8)], layers=["first"]), r"layers\[0\]='first': give"),
    "an unknown field": (
        lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], foo=1),
        r"^layouts\.nhd\(\): unknown keyword foo; beside its own arguments it takes those of KvPool: name, kind",
    ),
    "two unknown fields": (
        lambda: layouts.token_major(latent=[f16(3, 16, 8)], foo=1, bar=2),
        r"^layouts\.token_major\(\): unknown keyword foo, bar;",
    ),
    "blocks of arrays": (
        lambda: layouts.nhd(k=[f16(3, 16, 2, 8)], n_blocks=2),
        r"layouts\.nhd\(\): unknown keyword n_blocks \(n_blocks: the arrays tell it\)",
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
VLLM: dict[str, Case] = {
    "an unknown field, named by whom one called": (
        lambda: layouts.vllm.packed_tensor(u8(12288), layout="LBNHC", **ORDER, windows=3),
        r"^layouts\.vllm\.packed_tensor\(\): unknown keyword windows;",
    ),
    "an older shape": (
        lambda: layouts.vllm.packed([f16(2, 3, 16, 2, 8)]),
        r"\(2, 3, 16, 2, 8\): give \[blocks, heads, tokens, content\]; 3 axes .* 5 axes .* layouts.vllm.flash_attn",
    ),
    "an unknown order": (
        lambda: layouts.vllm.packed_tensor(u8(10), layout="BNLHC", **ORDER),
        "layout='BNLHC': give one of LBHNC, LBNHC, .*, NHD, HND",
    ),
    "a buffer too small": (
        lambda: layouts.vllm.packed_tensor(u8(12287), layout="LBNHC", **ORDER),
        r"tensor has 12287 bytes, .* takes 12288 in C order: check the sizes",
    ),
    "a buffer with gaps": (
        lambda: layouts.vllm.packed_tensor(u8(1 << 16)[::2], layout="LBNHC", **ORDER),
        "strides .2,.*in C order: check the sizes",
    ),
    "no layers in it": (
        lambda: layouts.vllm.packed_tensor(u8(10), layout="LBNHC", **{**ORDER, "num_layers": 0}),
        "takes 0 in C order: check the sizes",
    ),
    "blocks first": (
        lambda: layouts.vllm.flash_attn([f16(3, 2, 16, 2, 8)]),
        r"axis 0 is K and V, so 2 wide, not 3; give \[2, blocks, tokens, heads, dim\]; .* layouts.vllm.flashinfer",
    ),
    "K and V first": (
        lambda: layouts.vllm.flashinfer([f16(2, 3, 16, 2, 8)]),
        r"axis 1 is K and V, so 2 wide, not 3; .* layouts.vllm.flash_attn",
    ),
    "only the second is wrong": (
        lambda: layouts.vllm.flashinfer([f16(3, 2, 16, 2, 8), f16(3, 4, 16, 2, 8)]),
        r"kv_caches\[1\] has shape \(3, 4, 16, 2, 8\): axis 1",
    ),
    "K alone": (lambda: layouts.vllm.flashinfer([f16(3, 1, 16, 2, 8)]), "so 2 wide, not 1"),
    "FP4 pages of odd sizes": (
        lambda: layouts.vllm.nvfp4([u8(3, 1000)], num_kv_heads=2, head_size=128),
        "pages of 1000 bytes, no multiple of 288, the bytes of a token with num_kv_heads=2, head_size=128",
    ),
    "FP4 heads of odd sizes": (
        lambda: layouts.vllm.nvfp4([u8(3, 288)], num_kv_heads=2, head_size=100),
        "give the sizes of this rank",
    ),
    "pages with gaps": (
        lambda: layouts.vllm.nvfp4([u8(3, 2, 576)[:, :, ::2]], num_kv_heads=2, head_size=128),
        "in which the bytes of a page lie in line",
    ),
    "no pages": (lambda: layouts.vllm.dsa_indexer([u8(0, 8448)]), r"give \[blocks, bytes of a page\]"),
    "rows of another type": (
        lambda: layouts.vllm.mla([u8(3, 16, 576)], kv_cache_dtype="fp8_ds_mla"),
        "rows of 576 bytes, fp8_ds_mla has 656: give the engine's kv_cache_dtype",
    ),
    "a page-split row": (lambda: layouts.vllm.mla([u8(3, 37440)]), "layouts.vllm.deepseek_v4 or .dsa_indexer"),
    "pages not padded": (
        lambda: layouts.vllm.deepseek_v4([u8(3, 64 * 584)], block_size=64),
        r"pages of 37376 bytes; 64 tokens of 576 \+ 8 bytes take 37440: give the engine's block_size",
    ),
    "another block size": (
        lambda: layouts.vllm.dsa_indexer([u8(3, 64, 132)], block_size=32),
        "pages of 8448 bytes; 32 tokens of 128 \\+ 4 bytes take 4224",
    ),
}
OTHERS: dict[str, Case] = {
    "FlashInfer layout": (lambda: layouts.flashinfer.paged_kv_cache([f16(3, 2, 16, 2, 8)], "NDH"), "'NHD' or 'HND'"),
    "FlashInfer of four axes": (
        lambda: layouts.flashinfer.paged_kv_cache([f16(3, 16, 2, 8)]),
        r"give \[blocks, 2, tokens, heads, dim\]; or a tuple \(K, V\) of four axes",
    ),
    "FlashInfer pairs of five": (
        lambda: layouts.flashinfer.paged_kv_cache([(f16(3, 2, 16, 2, 8), f16(3, 2, 16, 2, 8))]),
        r"kv_cache \(K\)\[0\] has shape .*: give \[blocks, tokens, heads, dim\]",
    ),
    "SGLang page size": (lambda: layouts.sglang.mha([f16(40, 2, 8)], page_size=64), "not one page of page_size=64"),
    "SGLang page size 0": (lambda: layouts.sglang.mha_fused([f16(2, 40, 2, 8)], page_size=0), "not one page"),
    "SGLang views given as one": (
        lambda: layouts.sglang.mha_fused([f16(40, 2, 8)]),
        r"give \[2, slots, heads, dim\]; k_buffer and v_buffer go to layouts.sglang.mha",
    ),
    "SGLang scales of fewer slots": (
        lambda: layouts.sglang.mha_fp4([u8(48, 2, 8)], [u8(48, 2, 8)], [u8(32, 2)], [u8(48, 2)], page_size=16),
        r"k_scale_buffer\[0\] has 2 blocks of 16, the first array 3 of 16",
    ),
    "MXFP8 of another page size": (
        lambda: layouts.sglang.mha_mxfp8(*[[u8(256, 2, 64)]] * 2, *[[u8(2, 2, 32, 4, 2)]] * 2, page_size=64),
        r"shape \(2, 2, 32, 4, 2\), that is 128 slots a block, but page_size=64",
    ),
    "index layers without keys": (
        lambda: layouts.sglang.dsa_index_k([u8(3, 8448), u8(0, 8448)]),
        r"index_k_with_scale_buffer\[1\] has shape \(0, 8448\)",
    ),
    "DeepSeek layout": (
        lambda: layouts.sglang.deepseek_v4([u8(3, 100)], kv_layout="v5", page_size=4),
        "kv_layout='v5': give one of v4, v41, v41_fp4, uniform_fp8, v41_new, v41_fp4_new",
    ),
    "DeepSeek page size": (
        lambda: layouts.sglang.deepseek_v4([u8(3, 37440)], page_size=128),
        "128 tokens of 576 \\+ 8 bytes take 74880: give the page_size and kv_layout of this sub-pool",
    ),
    "TensorRT-LLM sizes": (
        lambda: layouts.tensorrt_llm.pool(f16(3, 2, 2, 100), num_kv_heads=2, tokens_per_block=16, head_dim=8),
        r"give \[blocks, layers, kv_factor, 256\], 2 heads x 16 tokens x 8 dim",
    ),
    "TensorRT-LLM layout": (
        lambda: layouts.tensorrt_llm.pool(
            f16(3, 2, 2, 256), num_kv_heads=2, tokens_per_block=16, head_dim=8, kv_layout="TRT"
        ),
        "kv_layout='TRT': give 'NHD' or 'HND'",
    ),
    "TensorRT-LLM kv_factor": (lambda: layouts.tensorrt_llm.buffers([f16(3, 3, 16, 2, 8)]), "2 wide, not 3"),
    "TensorRT-LLM layers of two factors": (
        lambda: layouts.tensorrt_llm.buffers([f16(3, 2, 16, 2, 8), f16(3, 1, 16, 2, 8)]),
        r"buffers\[1\] has shape \(3, 1, 16, 2, 8\): axis 1 is K and V, so 2 wide, not 1",
    ),
    "TensorRT-LLM pool as buffers": (
        lambda: layouts.tensorrt_llm.buffers([f16(3, 2, 2, 256)]),
        "the whole pool of 4 axes goes to .pool",
    ),
    "paged cache of two blocks": (
        lambda: layouts.transformers.paged_cache([f16(512, 2, 8)], [f16(512, 2, 8)]),
        "has 2 blocks of 256 tokens, two of which are the cache's own: give its block_size",
    ),
    "static cache with a table": (
        lambda: layouts.transformers.static_cache([f16(48, 2, 8)], [f16(48, 2, 8)]),
        r"keys\[0\] has shape \(48, 2, 8\): give \[blocks, heads, tokens, dim\]",
    ),
    "separate ORT caches": (
        lambda: layouts.onnxruntime.combined([f16(3, 2, 32, 8)]), "go to layouts.onnxruntime.share_buffer",
    ),
    "MaxText order": (
        lambda: layouts.jax.maxtext([f16(2, 2, 2, 2)], [f16(2, 2, 2, 2)], ar_cache_axis_order="1,2,0"),
        "ar_cache_axis_order='1,2,0': give an order of 0,1,2,3",
    ),
    "MaxText order in words": (
        lambda: layouts.jax.maxtext([f16(2, 2, 2, 2)], [f16(2, 2, 2, 2)], ar_cache_axis_order="b,s,h,d"),
        "give an order of 0,1,2,3",
    ),
    "Edge-LLM pages of one half": (
        lambda: layouts.tensorrt.edge_llm_paged([f16(3, 16, 2, 8)]), r"give \[2, blocks, tokens, heads, dim\]",
    ),
    "tinygrad MLA": (lambda: layouts.tinygrad.cache_kv([f16(3, 1, 32, 8)]), "layouts.tinygrad.cache_k"),
    "transposed V": (
        lambda: layouts.llama_cpp.cache([f16(2, 32, 8)], [f16(2, 8, 32)], v_trans=False),
        r"v\[0\] has 2 blocks of 8, the first array 2 of 32",
    ),
    "llama.cpp of two axes": (
        lambda: layouts.llama_cpp.cache([f16(32, 8)], [f16(32, 8)], v_trans=True),
        r"k\[0\] has shape \(32, 8\): give \[blocks, tokens, content\]; with v_trans=True, V is",
    ),
    "TVM MLA": (lambda: layouts.tvm.paged_kv_cache([f16(3, 16, 8)]), "give them to layouts.tvm.mla"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*GENERIC, *VLLM, *OTHERS])
def test_refused(case: str) -> None:
    build, message = {**GENERIC, **VLLM, **OTHERS}[case]
    with pytest.raises(LayoutError, match=message):
        build()


def test_every_constructor_names_itself_and_the_keyword() -> None:
    array = f16(4, 2, 16, 2, 8)
    calls: dict[str, Callable[[], Any]] = {
        "flashinfer.paged_kv_cache": lambda: layouts.flashinfer.paged_kv_cache([array], foo=1),
        "vllm.flashinfer": lambda: layouts.vllm.flashinfer([array], foo=1),
        "tensorrt_llm.buffers": lambda: layouts.tensorrt_llm.buffers([array], foo=1),
        "tensorrt_llm.pool": lambda: layouts.tensorrt_llm.pool(
            f16(3, 2, 2, 256), num_kv_heads=2, tokens_per_block=16, head_dim=8, foo=1
        ),
        "sglang.mha": lambda: layouts.sglang.mha([f16(64, 2, 8)], [f16(64, 2, 8)], page_size=16, foo=1),
        "transformers.static_cache": lambda: layouts.transformers.static_cache(
            [f16(4, 2, 9, 8)], [f16(4, 2, 9, 8)], foo=1
        ),
        "tvm.mla": lambda: layouts.tvm.mla([f16(3, 16, 8)], foo=1),
    }
    for name, call in calls.items():
        with pytest.raises(LayoutError, match=rf"^layouts\.{name}\(\): unknown keyword foo;"):
            call()


def test_numbers_of_layers_of_any_integer_type() -> None:
    pool = layouts.nhd(k=[f16(3, 16, 2, 8), f16(3, 16, 2, 8)], layers=[np.int64(7), np.uint8(3)])
    assert [(plane.layer, type(plane.layer)) for plane in pool.planes] == [(7, int), (3, int)]
