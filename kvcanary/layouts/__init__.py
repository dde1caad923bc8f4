"""Pools of the common layouts, and one constructor for each known layout of an engine, in the engine's own words.

What most constructors take, and their docstrings do not repeat:

- the arrays, under the engine's names for them, in the order of the layers; nothing is copied, and no element is read;
- ``page_size`` or ``block_size``: slots per block, where the arrays' shapes do not tell it;
- ``layers``: numbers of the layers, for reports and `CanaryManager.verify_layer`; None = 0, 1, ...;
- ``dtype``: name or type object of the elements, where the arrays do not tell it (uint8, uint16, raw pointers);
- further fields of `KvPool`: ``name``, ``kind``, ``window``, ``reserved_blocks``, ...

All raise `LayoutError` for arrays of another shape or type, and for keywords that there are not.
"""

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
