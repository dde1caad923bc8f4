"""Which layouts an array could have, by its shape alone: a help to find the constructor, no proof."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from kvcanary.arrays import ArrayView, view_of
from kvcanary.errors import LayoutError
from kvcanary.layouts.build import place_of, shape_words
from kvcanary.layouts.views import select

# Axes (see build.py), and whose they are.
_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("2bthd", ("vllm.flash_attn", "tensorrt.edge_llm_paged")),
    ("b2thd", ("vllm.flashinfer", "flashinfer.paged_kv_cache (NHD)", "tensorrt_llm.buffers (NHD)")),
    ("b2htd", ("flashinfer.paged_kv_cache (HND)", "tensorrt_llm.buffers (HND)", "tvm.paged_kv_cache")),
    ("2bhtd", ("onnxruntime.combined", "tinygrad.cache_kv")),
    ("bhxtc", ("vllm.paged_attention (keys)",)),
    ("bhtrd", ("sglang.mha_mxfp8 (interleaved scales)",)),
    ("bthd", ("nhd", "onnxruntime.genai_paged", "flashinfer.paged_kv_cache (a pair, NHD)")),
    ("bhtd", (
        "hnd", "vllm.packed", "sglang.mha_hnd", "transformers.static_cache", "onnxruntime.share_buffer",
        "tensorrt.kv_cache_update", "flashinfer.paged_kv_cache (a pair, HND)",
    )),
    ("bhtc", ("vllm.mla", "tinygrad.cache_k")),
    ("2shd", ("sglang.mha_fused",)),
    ("hbtd", ("jax.pallas",)),
    ("thbd", ("jax.maxtext",)),
    ("bhdt", ("vllm.paged_attention (values)",)),
    ("shd", ("nhd", "sglang.mha", "sglang.mha_mxfp8", "sglang.mla", "transformers.paged_cache")),
    ("btc", ("token_major", "vllm.mla", "tvm.mla", "llama_cpp.cache")),
    ("bct", ("llama_cpp.cache (values, v_trans=True)",)),
    ("sc", ("token_major",)),
)  # fmt: skip
# Pages of rows: bytes of a token, unit that a page is padded to, whose.
_PAGES = (
    (584, 576, ("vllm.deepseek_v4", "sglang.deepseek_v4 (v4)")),
    (528, 512, ("sglang.deepseek_v4 (v41)",)),
    (288, 256, ("sglang.deepseek_v4 (v41_fp4)",)),
    (528, 528, ("sglang.deepseek_v4 (v41_new)",)),
    (288, 288, ("sglang.deepseek_v4 (v41_fp4_new)",)),
    (512, 512, ("sglang.deepseek_v4 (uniform_fp8)",)),
    (132, 1, ("vllm.dsa_indexer", "sglang.dsa_index_k")),
)
_PAGE_SIZES = tuple(1 << i for i in range(13))


def guess(array: Any) -> str:
    """The layouts whose shape the array of one layer has, and what each would take it for.

    Raises:
        LayoutError: it is no array.
    """
    view = view_of(array, "describe()", LayoutError)
    strides = "in C order" if view.is_contiguous else f"strides {list(view.strides)} bytes"
    size = view.size * view.itemsize
    lines = [f"{view.dtype or f'{8 * view.itemsize}-bit'}{list(view.shape)} on {view.device}, {size} bytes, {strides}"]
    for letters, whose in _FORMS:
        told = _told(view, letters)
        if told:
            lines += _lines(shape_words(letters), told, whose)
    if len(view.shape) == 4 and view.shape[2] in (1, 2):
        lines += _lines("[blocks, layers, kv_factor, content]", f"{view.shape[1]} layers", ("tensorrt_llm.pool",))
    if len(view.shape) == 2 and view.is_contiguous:
        lines += _page_lines(view)
    if len(lines) == 1:
        lines.append("  no known layout has this shape: describe it by Planes of your own, one per run of bytes")
    return "\n".join(lines)


def _lines(axes: str, told: str, whose: Sequence[str]) -> list[str]:
    names = ", ".join(f"layouts.{name}" for name in whose)
    return [f"  as {axes}: {told}", *textwrap.wrap(names, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _told(view: ArrayView, letters: str) -> str:
    """What the array is with these axes; empty if it cannot be."""
    if len(letters) != len(view.shape) or not view.size:
        return ""
    sizes = dict(zip(letters, view.shape, strict=True))
    is_odd = {
        "bhxtc": sizes.get("c", 0) * view.itemsize != 16,
        "bhtrd": sizes.get("t") != 32,
        "bhtc": sizes.get("h") != 1,
    }
    if sizes.get("2", 2) != 2 or is_odd.get(letters, False):
        return ""
    half = view
    if "2" in letters:
        half, letters = select(view, letters.index("2"), 0), letters.replace("2", "")
    try:
        place = place_of(half, letters, 1 if "s" in letters else None, "")
    except LayoutError:
        return ""
    slots = f"{sizes['s']} slots" if "s" in sizes else f"{place.n_blocks} blocks of {place.page_size} slots"
    chunks = f" in {place.n_chunks} chunks" if place.n_chunks > 1 else ""
    of_each = " of each of K and V" if "2" in sizes else ""
    return f"{slots}, {place.n_chunks * place.chunk_bytes} bytes{of_each} a slot{chunks}"


def _page_lines(view: ArrayView) -> list[str]:
    n_bytes, lines = view.shape[1] * view.itemsize, []
    for token, align, whose in _PAGES:
        fitting = [n for n in _PAGE_SIZES if -(-n * token // align) * align == n_bytes]
        if fitting:
            told = f"{view.shape[0]} blocks of {fitting[0]} slots of {token} bytes"
            lines += _lines("[blocks, bytes of a page]", told, whose)
    return lines
