"""Pools of the common layouts, and one constructor for each known layout of an engine, in the engine's own words."""

from kvcanary.layouts import (
    flashinfer,
    jax,
    llama_cpp,
    onnxruntime,
    sglang,
    tensorrt,
    tensorrt_llm,
    tinygrad,
    transformers,
    tvm,
    vllm,
)
from kvcanary.layouts.build import DEFAULT_PAGE_SIZE
from kvcanary.layouts.generic import hnd, nhd, token_major
from kvcanary.layouts.picture import describe

__all__ = [
    "DEFAULT_PAGE_SIZE",
    "describe",
    "flashinfer",
    "hnd",
    "jax",
    "llama_cpp",
    "nhd",
    "onnxruntime",
    "sglang",
    "tensorrt",
    "tensorrt_llm",
    "tinygrad",
    "token_major",
    "transformers",
    "tvm",
    "vllm",
]
