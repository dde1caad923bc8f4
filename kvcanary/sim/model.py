"""A decoder-only byte transformer with fixed random weights that attends through a paged KV cache (NumPy)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvcanary.sim.step_arrays import StepArrays

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

ROPE_BASE = 10_000.0
NORM_EPSILON = np.float32(1e-6)
MASKED = np.float32(-1e30)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, and the seed and scales of its random weights."""

    n_layers: int = 4
    n_heads: int = 4
    head_dim: int = 32
    vocab: int = 256
    mlp_ratio: int = 2
    seed: int = 0
    qk_scale: float = 2.0  # sharp attention: the output follows the context and does not run into a short cycle
    is_text: bool = True  # samples printable ASCII only
    window: int | None = None  # keys that a query sees, its own included; None = all before it

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, must be even and >= 2: rotary positions turn pairs")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}, must be >= 1 (the query's own key), or None for all keys")

    @property
    def width(self) -> int:
        """Elements of a token's hidden state."""
        return self.n_heads * self.head_dim


@dataclass(frozen=True)
class LayerWeights:
    """One layer, float32; the norms have no gain of their own, it would fold into the matrix that follows."""

    qkv: F32  # [width, 3 * width]
    out: F32  # [width, width]
    up: F32  # [width, mlp]
    down: F32  # [mlp, width]


@dataclass(frozen=True)
class Weights:
    """All parameters, float32, a pure function of the configuration."""

    embed: F32  # [vocab, width]
    layers: tuple[LayerWeights, ...]
    head: F32  # [width, vocab]
    logit_bias: F32  # [vocab]

    @classmethod
    def random(cls, config: ModelConfig) -> Weights:
        """Draw the weights from one generator in a fixed order: the same configuration gives the same bytes."""
        rng = np.random.default_rng(config.seed)
        width, mlp = config.width, config.width * config.mlp_ratio

        def matrix(n_in: int, n_out: int) -> F32:
            drawn: F32 = rng.standard_normal((n_in, n_out), np.float32) * np.float32(n_in**-0.5)
            return drawn

        def layer() -> LayerWeights:
            qkv = matrix(width, 3 * width)
            qkv[:, : 2 * width] *= np.float32(config.qk_scale)
            return LayerWeights(qkv, matrix(width, width), matrix(width, mlp), matrix(mlp, width))

        embed = rng.standard_normal((config.vocab, width), np.float32)
        layers = tuple(layer() for _ in range(config.n_layers))
        bias = np.zeros(config.vocab, np.float32)
        if config.is_text:
            ids = np.arange(config.vocab)
            bias[(ids < 0x20) | (ids > 0x7E)] = MASKED
        return cls(embed, layers, matrix(width, config.vocab), bias)


def rms_norm(x: F32) -> F32:
    """x / rms(x) over the last axis."""
    scaled: F32 = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON)
    return scaled


def rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Turn each pair (i, i + half) of `x: f32[tokens, heads, head_dim]` by `cos, sin: f32[tokens, 1, half]`."""
    low, high = np.split(x, 2, axis=-1)
    return np.concatenate((low * cos - high * sin, low * sin + high * cos), axis=-1)


def rotary_angles(positions: I32, head_dim: int) -> tuple[F32, F32]:
    """Cosine and sine, each f32[tokens, 1, head_dim / 2], of `positions: i32[tokens]`."""
    frequency = ROPE_BASE ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = positions[:, None, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def silu(x: F32) -> F32:
    """x * sigmoid(x), by way of tanh, which does not overflow."""
    half = np.float32(0.5)
    gated: F32 = x * (half + half * np.tanh(half * x))
    return gated


@dataclass(frozen=True)
class RowGroup:
    """Rows with equally many new tokens: their attention is one batched product."""

    tokens: NDArray[np.int64]  # [rows, new], index of each new token
    table: I32  # [rows, blocks], as far as the longest of them reaches
    hidden: Bool  # [rows, 1, new, blocks * page_size], True where the query may not see the key
    unread: Bool  # [rows, blocks * page_size], True where no query of the row may look


def row_groups(arrays: StepArrays, positions: I32, page_size: int, window: int | None = None) -> list[RowGroup]:
    """Single-token rows as one group, every longer row as its own."""
    starts = arrays.query_start_loc[:-1].astype(np.int64)
    n_new = np.diff(arrays.query_start_loc)
    groups = []
    for rows in [np.flatnonzero(n_new == 1), *np.flatnonzero(n_new > 1)[:, None]]:
        if not len(rows):
            continue
        tokens = starts[rows][:, None] + np.arange(n_new[rows[0]])
        query = positions[tokens]
        n_blocks = min(int(query.max()) // page_size + 1, arrays.block_table.shape[1])
        key = np.arange(n_blocks * page_size)
        hidden = key > query[:, :, None]
        if window is not None:
            hidden |= key <= query[:, :, None] - window
        groups.append(RowGroup(tokens, arrays.block_table[rows, :n_blocks], hidden[:, None], hidden.all(axis=1)))
    return groups


def token_positions(arrays: StepArrays) -> I32:
    """Position i32[tokens] of every new token that a row owns; a row shorter than its new tokens counts from 0."""
    n_new = np.diff(arrays.query_start_loc)
    first = np.maximum(arrays.seq_lens - n_new, 0) - arrays.query_start_loc[:-1]
    return (np.repeat(first, n_new) + np.arange(n_new.sum())).astype(np.int32)


def last_tokens(arrays: StepArrays) -> NDArray[np.int32]:
    """Index i32[rows] of each row's last new token."""
    return np.maximum(arrays.query_start_loc[1:] - 1, 0)


class PageReader:
    """Gathers pages through a block table into one buffer that it keeps: a fresh one per layer costs page faults."""

    def __init__(self) -> None:
        self._buffer: F32 = np.empty(0, np.float32)

    def read(self, cache: F32, table: I32) -> F32:
        """Keys or values f32[rows, blocks * page_size, heads, head_dim] of `table: i32[rows, blocks]`.

        A table entry outside the cache is clipped, as a GPU would read some memory or other instead of stopping.
        """
        size = table.size * cache[0].size
        if self._buffer.size < size:
            self._buffer = np.empty(size, np.float32)
        pages = self._buffer[:size].reshape(*table.shape, *cache.shape[1:])
        cache.take(table, axis=0, mode="clip", out=pages)
        return pages.reshape(len(table), -1, *cache.shape[2:])


def attention(query: F32, k: F32, v: F32, group: RowGroup) -> F32:
    """Attention f32[rows, new, heads, head_dim] of `query` (same shape) over `k, v` read through the table."""
    v[group.unread] = 0  # a weight of 0 does not silence a NaN left in an unwritten slot
    scores = query.transpose(0, 2, 1, 3) @ k.transpose(0, 2, 3, 1) / np.sqrt(np.float32(query.shape[-1]))
    np.copyto(scores, MASKED, where=group.hidden)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: F32 = (weights @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    return mixed


class NumpyModel:
    """The transformer and its cache: per layer K and V, each f32[n_blocks, page_size, n_heads, head_dim] (NHD)."""

    def __init__(self, config: ModelConfig, n_blocks: int, page_size: int = 16) -> None:
        self.config = config
        self.n_blocks = n_blocks
        self.page_size = page_size
        self.weights = Weights.random(config)
        shape = (n_blocks, page_size, config.n_heads, config.head_dim)
        self.k_cache: list[F32] = [np.zeros(shape, np.float32) for _ in range(config.n_layers)]
        self.v_cache: list[F32] = [np.zeros(shape, np.float32) for _ in range(config.n_layers)]
        self._k_reader, self._v_reader = PageReader(), PageReader()
        self.before_layer: Callable[[int], None] | None = None  # is called before a layer of a forward

    def forward(self, arrays: StepArrays) -> I32:
        """Write the new tokens' K and V, and return the greedy next token i32[rows] of every row (padding included)."""
        return self._sample(self._hidden(arrays)[last_tokens(arrays)])

    def forward_all(self, arrays: StepArrays) -> I32:
        """The same forward, returning the greedy next token i32[tokens] behind every new token that a row owns."""
        return self._sample(self._hidden(arrays))

    def logits(self, arrays: StepArrays) -> F32:
        """The same forward, returning f32[rows, vocab] at each row's last new token."""
        return self._logits(self._hidden(arrays)[last_tokens(arrays)])

    def _sample(self, x: F32) -> I32:
        with np.errstate(over="ignore", invalid="ignore"):
            sampled: I32 = self._logits(x).argmax(axis=-1).astype(np.int32)
        return sampled

    def _logits(self, x: F32) -> F32:
        return rms_norm(x) @ self.weights.head + self.weights.logit_bias

    def _hidden(self, arrays: StepArrays) -> F32:
        """Hidden states f32[tokens, width] after the last layer; a layer's K and V are all written before any is read.

        So a row may read blocks that another row writes in the same forward.
        """
        positions = token_positions(arrays)
        n_tokens = len(positions)  # tokens that no row owns are not computed
        angles = rotary_angles(positions, self.config.head_dim)
        groups = row_groups(arrays, positions, self.page_size, self.config.window)
        x = self.weights.embed[arrays.input_ids[:n_tokens]]
        slots = arrays.slot_mapping[:n_tokens]
        with np.errstate(over="ignore", invalid="ignore"):  # a damaged cache is computed with, as a GPU would
            for index, layer in enumerate(self.weights.layers):
                if self.before_layer is not None:
                    self.before_layer(index)
                x = x + self._attention(index, x, angles, slots, groups)
                x = x + silu(rms_norm(x) @ layer.up) @ layer.down
        return x

    def _attention(
        self, index: int, x: F32, angles: tuple[F32, F32], slots: NDArray[np.int64], groups: list[RowGroup]
    ) -> F32:
        c, layer = self.config, self.weights.layers[index]
        q, k, v = ((rms_norm(x) @ layer.qkv).reshape(len(x), 3, c.n_heads, c.head_dim)).transpose(1, 0, 2, 3)
        q, k = rotate(q, *angles), rotate(k, *angles)
        self._write(self.k_cache[index], slots, k)
        self._write(self.v_cache[index], slots, v)
        mixed = np.zeros_like(q)
        for group in groups:
            keys = self._k_reader.read(self.k_cache[index], group.table)
            values = self._v_reader.read(self.v_cache[index], group.table)
            mixed[group.tokens] = attention(q[group.tokens], keys, values, group)
        return mixed.reshape(len(x), c.width) @ layer.out

    def _write(self, cache: F32, slots: NDArray[np.int64], values: F32) -> None:
        by_slot = cache.reshape(-1, *cache.shape[2:])
        inside = (slots >= 0) & (slots < len(by_slot))
        by_slot[slots[inside]] = values[inside]
