"""A model that only writes: KV bytes and next tokens are hashes, so that a step costs little. For long runs.

What the guard reads is as of any model: every layer's K and V of every new token, written to its slot. Nothing is read
from the cache, though: a wrong byte there is the guard's to see, the output does not show it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.model import F32, I32, ModelConfig, last_tokens, token_positions
from kvcanary.sim.step_arrays import StepArrays

# Odd multipliers of the bytes' hash; kernels/scribe.cu has the same.
OF_TOKEN, OF_SLOT, OF_WORD, OF_MIX = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F


def next_tokens(tokens: I32, positions: I32) -> I32:
    """The printable token behind each of `tokens: i32[n]`; it repeats itself often enough for drafts to be right."""
    mixed = (tokens.astype(np.uint32) * np.uint32(OF_TOKEN)) ^ ((positions >> 4).astype(np.uint32) * np.uint32(OF_SLOT))
    mixed ^= mixed >> np.uint32(15)
    following: I32 = (32 + (mixed * np.uint32(OF_MIX) >> np.uint32(8)) % 95).astype(np.int32)
    return following


def sampled_behind(arrays: StepArrays) -> I32:
    """What is sampled behind every new token that a row owns, i32[tokens]."""
    positions = token_positions(arrays)
    return next_tokens(arrays.input_ids[: len(positions)], positions + arrays.depths[: len(positions)])


def row_ends(arrays: StepArrays, following: I32) -> I32:
    """What is sampled behind each row's last new token, i32[rows], of what is behind all of them."""
    last = last_tokens(arrays)
    return following[np.minimum(last, len(following) - 1)] if len(following) else np.zeros(len(last), np.int32)


def kv_words(tokens: I32, slots: NDArray[np.int64], n_words: int, array: int) -> NDArray[np.uint32]:
    """The words u32[n, n_words] that one array of the cache gets for each token and slot."""
    of_row = tokens.astype(np.uint32) * np.uint32(OF_TOKEN) ^ slots.astype(np.uint32) * np.uint32(OF_SLOT)
    of_word = (np.arange(n_words, dtype=np.uint32) + np.uint32(array * n_words + 1)) * np.uint32(OF_WORD)
    words = of_row[:, None] ^ of_word
    words ^= words >> np.uint32(15)
    written: NDArray[np.uint32] = words * np.uint32(OF_MIX)
    return written


class ScribeModel:
    """The cache on the host: per layer K and V, each f32[n_blocks, page_size, n_heads, head_dim]."""

    takes_trees = True

    def __init__(self, config: ModelConfig, n_blocks: int, page_size: int = 16) -> None:
        self.config, self.n_blocks, self.page_size = config, n_blocks, page_size
        shape = (n_blocks, page_size, config.n_heads, config.head_dim)
        self.k_cache: list[F32] = [np.zeros(shape, np.float32) for _ in range(config.n_layers)]
        self.v_cache: list[F32] = [np.zeros(shape, np.float32) for _ in range(config.n_layers)]
        self.before_layer: Callable[[int], None] | None = None

    def forward(self, arrays: StepArrays) -> I32:
        """Write the new tokens' K and V; returns the next token i32[rows] of every row, padding included."""
        return row_ends(arrays, self.forward_all(arrays))

    def forward_all(self, arrays: StepArrays) -> I32:
        """The same forward, returning what comes behind every new token that a row owns."""
        n_tokens = int(arrays.query_start_loc[-1])
        slots = arrays.slot_mapping[:n_tokens]
        inside = (slots >= 0) & (slots < self.n_blocks * self.page_size)
        tokens, slots = arrays.input_ids[:n_tokens][inside], slots[inside]
        for layer in range(self.config.n_layers):
            if self.before_layer is not None:
                self.before_layer(layer)
            for half, cache in enumerate((self.k_cache[layer], self.v_cache[layer])):
                words = cache.view(np.uint32).reshape(self.n_blocks * self.page_size, -1)
                words[slots] = kv_words(tokens, slots, words.shape[1], 2 * layer + half)
        return sampled_behind(arrays)
