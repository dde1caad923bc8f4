"""Every constructor of an engine's layout, each with the engine's own indexing, under its name and variant."""

from __future__ import annotations

from layout_engines import (
    F16,
    F32,
    FLASH,
    HEADS,
    ROWS,
    U8,
    B,
    D,
    Engine,
    H,
    N,
    Q,
    S,
    buffer,
    continuous_batching,
    dsv4,
    fused_rows,
    in_block,
    in_heads,
    in_static,
    interleaved_scales,
    llama,
    maxtext,
    nvfp4,
    of_slot,
    one_array,
    per_layer,
    physical,
    q8_0,
    rows,
    separate,
    split_pages,
    swa,
    trtllm,
    trtllm_mla,
    two_latents,
    with_scales,
)

from kvcanary import layouts

V, FI, SG, TF, OX, TR, JX, TG, TV = (
    layouts.vllm, layouts.flashinfer, layouts.sglang, layouts.transformers, layouts.onnxruntime, layouts.tensorrt,
    layouts.jax, layouts.tinygrad, layouts.tvm,
)  # fmt: skip

ENGINES: dict[str, Engine] = {
    **{f"vllm.packed {order}": physical(order) for order in V.ORDERS},
    **{f"vllm.packed_tensor {order}": buffer(order) for order in (*V.ORDERS, "NHD", "HND")},
    "vllm.packed per_token_head": rows(
        (B, H, N, 2 * (D + 4)), lambda x: V.packed(x, dtype="uint8"), in_heads, [((2, 264, 4224), 8)], "kv"
    ),
    "vllm.nvfp4": nvfp4(),
    "vllm.mla bf16": rows((B, N, 576), V.mla, in_block, [((1, 1152, 0), 16)], dtype=F16),
    "vllm.mla one head": rows((B, 1, N, 576), V.mla, in_heads, [((1, 1152, 0), 16)], dtype=F16),
    **{
        f"vllm.mla {kind}": rows(
            (B, N, n), lambda x, kind=kind: V.mla(x, kv_cache_dtype=kind), in_block, [((1, n, 0), 16)]
        )
        for kind, n in {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352, "v4.1 fp8": 528, "v4.1 fp4": 288}.items()
    },
    "vllm.deepseek_v4": split_pages(
        64, {"latent": 576, "latent_scale": 8}, 37440, lambda x: V.deepseek_v4(x, block_size=64), [16, 8]
    ),
    "vllm.dsa_indexer": split_pages(64, {"index_k": 128, "index_k_scale": 4}, 64 * 132, V.dsa_indexer, [16, 4]),
    "vllm.flash_attn NHD": one_array((2, B, N, H, D), V.flash_attn, lambda x, h, s: x[h, s // N, s % N], [FLASH] * 2),
    "vllm.flash_attn HND": one_array(
        (2, B, N, H, D), V.flash_attn, lambda x, h, s: x[h, s // N, s % N], [HEADS] * 2, (0, 1, 3, 2, 4)
    ),
    "vllm.flashinfer NHD": one_array((B, 2, N, H, D), V.flashinfer, lambda x, h, s: x[s // N, h, s % N], [FLASH] * 2),
    "vllm.flashinfer HND": one_array(
        (B, 2, N, H, D), V.flashinfer, lambda x, h, s: x[s // N, h, s % N], [HEADS] * 2, (0, 1, 3, 2, 4)
    ),
    "vllm.paged_attention": Engine(
        lambda m: {"k": m.layers(B, H, D // 8, N, 8), "v": m.layers(B, H, D, N)},
        lambda a: V.paged_attention(a["k"], a["v"]),
        lambda t, s: per_layer([x[s // N, :, :, s % N] for x in t["k"]], [x[s // N, :, :, s % N] for x in t["v"]]),
        [((32, 16, 256), 16), ((256, 2, 32), 2)],
    ),
    "flashinfer.paged_kv_cache NHD": one_array(
        (B, 2, N, H, D), FI.paged_kv_cache, lambda x, h, s: x[s // N, h, s % N], [FLASH] * 2
    ),
    "flashinfer.paged_kv_cache HND": one_array(
        (B, 2, H, N, D), lambda x: FI.paged_kv_cache(x, "HND"), lambda x, h, s: x[s // N, h, :, s % N], [HEADS] * 2
    ),
    "flashinfer.paged_kv_cache tuple NHD": separate(
        (B, N, H, D), lambda k, v: FI.paged_kv_cache(list(zip(k, v, strict=True))), in_block, [FLASH] * 2
    ),
    "flashinfer.paged_kv_cache tuple HND": separate(
        (B, H, N, D), lambda k, v: FI.paged_kv_cache(list(zip(k, v, strict=True)), "HND"), in_heads, [HEADS] * 2
    ),
    "flashinfer.mla": two_latents(),
    "sglang.mha page 1": fused_rows(B * N, 1),
    "sglang.mha page 16": fused_rows(B * N + 5, 16),
    "sglang.mha separate": separate(
        (B * N, H, D),
        lambda k, v: SG.mha(k, v, page_size=N),
        of_slot,
        [FLASH, ((1, 256, 0), 16)],
        (B * N, H, D // 2),
    ),
    "sglang.mha_fused": one_array(
        (2, B * N, H, D), lambda x: SG.mha_fused(x, page_size=N), lambda x, h, s: x[h, s], [FLASH] * 2
    ),
    "sglang.mha_hnd": separate((B, H, N, D), SG.mha_hnd, in_heads, [HEADS] * 2),
    "sglang.mha_fp4": with_scales(
        (B * N, H, D // 2),
        (B * N, H * D // 16),
        lambda *a: SG.mha_fp4(*a, page_size=N),
        of_slot,
        of_slot,
        [((1, 128, 0), 16)] * 2 + [((1, 16, 0), 16)] * 2,
    ),
    "sglang.mha_mxfp8 flat": with_scales(
        (B * N, H, D),
        (B * N, H, D // 32),
        lambda *a: SG.mha_mxfp8(*a, page_size=N),
        of_slot,
        of_slot,
        [((1, 256, 0), 16)] * 2 + [((1, 8, 0), 8)] * 2,
    ),
    "sglang.mha_mxfp8 interleaved": interleaved_scales(),
    "sglang.mla": rows((B * N, 1, 576), lambda x: SG.mla(x, page_size=N), of_slot, [((1, 1152, 0), 16)], dtype=F16),
    "sglang.mla fp4": Engine(
        lambda m: {"rows": m.layers(B * N, 1, 288, dtype=U8), "scales": m.layers(B * N, 36, dtype=U8)},
        lambda a: SG.mla(a["rows"], a["scales"], page_size=N),
        lambda t, s: {
            (i, name): x[s]
            for name, key in (("latent", "rows"), ("latent_scale", "scales"))
            for i, x in enumerate(t[key])
        },
        [((1, 288, 0), 16), ((1, 36, 0), 4)],
    ),
    "sglang.dsa_index_k": split_pages(64, {"index_k": 128, "index_k_scale": 4}, 64 * 132, SG.dsa_index_k, [16, 4]),
    "sglang.swa full": swa(0),
    "sglang.swa window": swa(1),
    "sglang.deepseek_v4 v4": dsv4("v4", 20, {"latent": 576, "latent_scale": 8}, 576, [16, 8]),
    "sglang.deepseek_v4 v41": dsv4("v41", 20, {"latent": 512, "latent_scale": 16}, 512, [16, 16]),
    "sglang.deepseek_v4 v41_fp4": dsv4("V41_FP4", 20, {"latent": 256, "latent_scale": 32}, 256, [16, 16]),
    "sglang.deepseek_v4 uniform_fp8": dsv4("uniform_fp8", 20, {"latent": 512}, 512, [16]),
    "sglang.deepseek_v4 v41_new": dsv4("v41_new", 20, {"latent": 528}, 528, [16]),
    "sglang.deepseek_v4 v41_fp4_new": dsv4("v41_fp4_new", 20, {"latent": 288}, 288, [16]),
    "tensorrt_llm.pool HND": trtllm("HND"),
    "tensorrt_llm.pool NHD": trtllm("NHD"),
    "tensorrt_llm.pool MLA": trtllm_mla(),
    "tensorrt_llm.buffers NHD": one_array(
        (B, 2, N, H, D), layouts.tensorrt_llm.buffers, lambda x, h, s: x[s // N, h, s % N], [FLASH] * 2
    ),
    "tensorrt_llm.buffers HND": one_array(
        (B, 2, H, N, D),
        lambda x: layouts.tensorrt_llm.buffers(x, "HND"),
        lambda x, h, s: x[s // N, h, :, s % N],
        [HEADS] * 2,
    ),
    "transformers.static_cache": separate((Q, H, S, D), TF.static_cache, in_static, [ROWS] * 2),
    "transformers.paged_cache": continuous_batching(),
    "onnxruntime.share_buffer": separate((Q, H, S, D), OX.share_buffer, in_static, [ROWS] * 2),
    "onnxruntime.combined": one_array((2, Q, H, S, D), OX.combined, lambda x, h, s: x[h, s // S, :, s % S], [ROWS] * 2),
    "onnxruntime.genai_paged": separate((B, N, H, D), OX.genai_paged, in_block, [FLASH] * 2),
    "tensorrt.kv_cache_update": separate((Q, H, S, D), TR.kv_cache_update, in_static, [ROWS] * 2),
    "tensorrt.edge_llm_paged": one_array(
        (2, B, N, H, D), TR.edge_llm_paged, lambda x, h, s: x[h, s // N, s % N], [FLASH] * 2
    ),
    "jax.pallas": separate((H, B, N, D), JX.pallas, lambda x, s: x[:, s // N, s % N], [((2, 256, 12288), 16)] * 2),
    "jax.pallas scales": with_scales(
        (H, B, N, D),
        (H, B, N),
        JX.pallas,
        lambda x, s: x[:, s // N, s % N],
        lambda x, s: x[:, s // N, s % N],
        [((2, 128, 6144), 16)] * 2 + [((2, 4, 192), 4)] * 2,
        F32,
    ),
    "jax.maxtext": maxtext("1,2,0,3"),
    "jax.maxtext batch first": maxtext("0,1,2,3"),
    "jax.maxtext scales": with_scales(
        (S, H, Q, D),
        (S, H, Q, 1),
        JX.maxtext,
        lambda x, s: x[s % S, :, s // S],
        lambda x, s: x[s % S, :, s // S],
        [((2, 128, 384), 16)] * 2 + [((2, 2, 6), 2)] * 2,
        F16,
    ),
    "tinygrad.cache_kv": one_array((2, Q, H, S, D), TG.cache_kv, lambda x, h, s: x[h, s // S, :, s % S], [ROWS] * 2),
    "tinygrad.cache_k": rows((Q, 1, S, 576), TG.cache_k, in_static, [((1, 1152, 0), 16)], dtype=F16),
    "llama_cpp.cache": llama(v_trans=False),
    "llama_cpp.cache v_trans": llama(v_trans=True),
    **{f"llama_cpp.cache q8_0 {h}x{d}": q8_0(h, d) for h, d in ((1, 64), (1, 128), (8, 128))},
    "tvm.paged_kv_cache": one_array(
        (B, 2, H, N, D), TV.paged_kv_cache, lambda x, h, s: x[s // N, h, :, s % N], [HEADS] * 2
    ),
    "tvm.mla": rows((B, N, 576), TV.mla, in_block, [((1, 1152, 0), 16)], dtype=F16),
}
