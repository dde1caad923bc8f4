"""The paged transformer against a dense one, and the things a paged cache must not do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kvcanary.sim.engine import SimEngine
from kvcanary.sim.model import ModelConfig, NumpyModel, Weights, rms_norm
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.sim.texts import load_texts

N_BLOCKS, PAGE, MAX_BLOCKS = 40, 4, 12
SMALL = ModelConfig(n_layers=2, n_heads=2, head_dim=8)
F32_TOLERANCE = 2e-3  # logits have unit scale; float32 against float64

Row = tuple[bytes, int, list[int]]  # all tokens so far, how many of them are new, blocks


def make_arrays(rows: list[Row], *, n_padded: int = 0, pad_slot: int = -1) -> StepArrays:
    """A batch of `rows`, then `n_padded` decode padding rows."""
    n_tokens = sum(n_new for _, n_new, _ in rows)
    arrays = StepArrays.allocate(len(rows) + n_padded, n_tokens + n_padded, MAX_BLOCKS, np.zeros((8, 64), np.int32))
    arrays.clear(pad_slot)
    for text, n_new, blocks in rows:
        row, start = arrays.n_rows, arrays.n_tokens
        arrays.block_table[row, : len(blocks)] = blocks
        arrays.seq_lens[row] = len(text)
        for offset in range(n_new):
            position = len(text) - n_new + offset
            arrays.input_ids[start + offset] = text[position]
            arrays.slot_mapping[start + offset] = blocks[position // PAGE] * PAGE + position % PAGE
        arrays.n_rows, arrays.n_tokens = row + 1, start + n_new
        arrays.query_start_loc[row + 1] = arrays.n_tokens
    arrays.pad_rows(one_token_each=True)
    return arrays


def dense_logits(config: ModelConfig, tokens: bytes) -> NDArray[np.float64]:
    """Oracle f64[vocab]: no cache, no batch, one head and one query at a time, rotary positions as complex numbers."""
    weights, n, half = Weights.random(config), len(tokens), config.head_dim // 2
    turn = np.exp(1j * np.outer(np.arange(n), 10_000.0 ** (-np.arange(half) / half)))

    def norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack([v / np.sqrt((v**2).mean() + 1e-6) for v in x])

    def rotated(x: NDArray[np.float64]) -> NDArray[np.float64]:
        z = (x[:, :half] + 1j * x[:, half:]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    x = weights.embed[list(tokens)].astype(np.float64)
    for layer in weights.layers:
        q, k, v = np.split(norm(x) @ layer.qkv, 3, axis=1)
        mixed = np.zeros_like(x)
        for head in range(config.n_heads):
            part = slice(head * config.head_dim, (head + 1) * config.head_dim)
            qh, kh, vh = rotated(q[:, part]), rotated(k[:, part]), v[:, part]
            for i in range(n):
                first = 0 if config.window is None else max(0, i + 1 - config.window)
                score = np.array([qh[i] @ kh[j] for j in range(first, i + 1)]) / np.sqrt(config.head_dim)
                weight = np.exp(score - score.max())
                mixed[i, part] = (weight / weight.sum()) @ vh[first : i + 1]
        x = x + mixed @ layer.out
        up = norm(x) @ layer.up
        x = x + (up / (1 + np.exp(-up))) @ layer.down
    return np.asarray(norm(x)[-1] @ weights.head + weights.logit_bias)


def shuffled_blocks(n_tokens: int, seed: int) -> list[int]:
    blocks = np.random.default_rng(seed).permutation(N_BLOCKS - 1) + 1
    return [int(block) for block in blocks[: -(-n_tokens // PAGE)]]


@pytest.fixture
def model() -> NumpyModel:
    return NumpyModel(SMALL, N_BLOCKS, PAGE)


@pytest.mark.parametrize("config", [SMALL, ModelConfig()])
@pytest.mark.parametrize("text", [b"a", b"page", b"a prompt over several pages, read"])
def test_paged_attention_equals_dense(config: ModelConfig, text: bytes) -> None:
    logits = NumpyModel(config, N_BLOCKS, PAGE).logits(make_arrays([(text, len(text), shuffled_blocks(len(text), 1))]))
    np.testing.assert_allclose(logits[0], dense_logits(config, text), rtol=0, atol=F32_TOLERANCE)


@pytest.mark.parametrize("window", [1, 5, 8, 33])
@pytest.mark.parametrize("n_cached", [0, 7, 31])
def test_window_equals_dense(window: int, n_cached: int) -> None:
    config, text = replace(SMALL, window=window), b"a prompt over several pages, read"
    model, blocks = NumpyModel(config, N_BLOCKS, PAGE), shuffled_blocks(len(text), 1)
    if n_cached:
        model.logits(make_arrays([(text[:n_cached], n_cached, blocks)]))
    n_passed = max(0, n_cached - window + 1)  # no query sees these
    for cache in (*model.k_cache, *model.v_cache):
        cache[[0, *set(range(N_BLOCKS)) - set(blocks), *blocks[: n_passed // PAGE]]] = np.nan
    logits = model.logits(
        make_arrays([(text, len(text) - n_cached, [0] * (n_passed // PAGE) + blocks[n_passed // PAGE :])])
    )
    np.testing.assert_allclose(logits[0], dense_logits(config, text), rtol=0, atol=F32_TOLERANCE)


@pytest.mark.parametrize("window", [None, 5])
def test_every_new_token_has_its_next(window: int | None) -> None:
    config = replace(SMALL, window=window)
    model, text = NumpyModel(config, N_BLOCKS, PAGE), b"verify me"
    model.forward(make_arrays([(text[:4], 4, [3, 5, 8])]))
    arrays = make_arrays([(text, 5, [3, 5, 8]), (b"x", 1, [9])], n_padded=1)
    expected = [int(dense_logits(config, text[:n]).argmax()) for n in range(5, 10)]
    every = model.forward_all(arrays)
    assert every[:6].tolist() == [*expected, int(dense_logits(config, b"x").argmax())]
    assert model.forward(arrays).tolist() == [every[4], every[5], every[6]]


def test_row_may_read_what_another_row_of_the_forward_writes(model: NumpyModel) -> None:
    text = b"twelve bytes and more"
    shared = make_arrays([(text[:12], 12, [1, 2, 3]), (text, 9, [1, 2, 3, 4, 5, 6])])
    for order in (shared, make_arrays([(text, 9, [11, 12, 13, 4, 5, 6]), (text[:12], 12, [11, 12, 13])])):
        row = int(order.seq_lens.argmax())
        np.testing.assert_allclose(model.logits(order)[row], dense_logits(SMALL, text), rtol=0, atol=F32_TOLERANCE)


@pytest.mark.parametrize("ends", [(5, 6, 30), (16, 17, 18, 30), tuple(range(1, 31))])
def test_chunks_equal_one_forward(model: NumpyModel, ends: tuple[int, ...]) -> None:
    text, blocks = b"thirty bytes of prompt, or so.", shuffled_blocks(30, 2)
    for start, end in zip((0, *ends), ends, strict=False):
        logits = model.logits(make_arrays([(text[:end], end - start, blocks)]))
    np.testing.assert_allclose(logits[0], dense_logits(SMALL, text), rtol=0, atol=F32_TOLERANCE)


def test_batch_equals_one_by_one() -> None:
    texts = [b"first", b"the second row is longer", b"3", b"and a fourth"]
    new = [5, 1, 1, 4]
    blocks = [[1, 2], [9, 3, 11, 4, 12, 5], [6], [8, 7, 10]]
    single, batch = NumpyModel(SMALL, N_BLOCKS, PAGE), NumpyModel(SMALL, N_BLOCKS, PAGE)
    for text, n, own in zip(texts, new, blocks, strict=True):
        if n < len(text):
            for model in (single, batch):
                model.logits(make_arrays([(text[:-n], len(text) - n, own)]))
    together = batch.logits(make_arrays(list(zip(texts, new, blocks, strict=True))))
    for row, alone in enumerate(zip(texts, new, blocks, strict=True)):
        np.testing.assert_allclose(together[row], single.logits(make_arrays([alone]))[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pad_slot", [-1, 0])
def test_padded_rows_change_nothing(pad_slot: int) -> None:
    rows: list[Row] = [(b"x", 1, [3]), (b"y", 1, [5])]
    plain, padded = NumpyModel(SMALL, N_BLOCKS, PAGE), NumpyModel(SMALL, N_BLOCKS, PAGE)
    expected = plain.logits(make_arrays(rows))
    logits = padded.logits(make_arrays(rows, n_padded=6, pad_slot=pad_slot))
    np.testing.assert_allclose(logits[:2], expected, rtol=0, atol=1e-4)
    for cache in (*padded.k_cache, *padded.v_cache):
        assert np.any(cache[0, 0]) == (pad_slot == 0)
        assert not np.any(cache[0, 1:])
        assert np.flatnonzero(cache[1:].any(axis=(1, 2, 3))).tolist() == [2, 4]


def test_rows_without_tokens_and_tokens_without_row_are_ignored(model: NumpyModel) -> None:
    arrays = make_arrays([(b"abc", 3, [2])], n_padded=2)
    expected = model.logits(arrays)[0].copy()
    arrays.pad_rows(one_token_each=False)  # the two spare tokens now belong to no row
    arrays.slot_mapping[3:] = 7 * PAGE
    np.testing.assert_array_equal(model.logits(arrays)[0], expected)
    assert not model.k_cache[0][7].any()


def test_stale_table_changes_the_output(model: NumpyModel) -> None:
    text, other = b"the right twelve", b"some other tail."
    model.logits(make_arrays([(text, 16, [1, 2, 3, 4]), (other, 16, [5, 6, 7, 8])]))
    right = model.logits(make_arrays([(text, 1, [1, 2, 3, 4])]))
    stale = make_arrays([(text, 1, [1, 2, 3, 4])])
    stale.block_table[0, 1] = 6
    assert np.abs(model.logits(stale)[:, 0x20:0x7F] - right[:, 0x20:0x7F]).max() > 0.05


def test_only_positions_below_the_length_are_read(model: NumpyModel) -> None:
    arrays = make_arrays([(b"abcdef", 6, [1, 2])])
    expected = model.logits(arrays)
    for cache in (*model.k_cache, *model.v_cache):
        cache[2, 2:] = np.nan
        cache[[0, *range(3, N_BLOCKS)]] = np.nan
    np.testing.assert_array_equal(model.logits(arrays), expected)


def test_indices_outside_the_cache_do_not_raise(model: NumpyModel) -> None:
    arrays = make_arrays([(b"abcdef", 6, [1, 2])])
    arrays.block_table[0, :2] = [10_000, -3]
    arrays.slot_mapping[:2] = [-1, N_BLOCKS * PAGE]
    arrays.seq_lens[0] = 10_000
    assert np.isfinite(model.logits(arrays)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.float32(3e38), np.float32("inf"), np.float32("nan")])
def test_damaged_cache_is_computed_with_silently(model: NumpyModel, value: np.float32) -> None:
    model.forward(make_arrays([(b"abcdef", 6, [1, 2])]))
    for cache in (*model.k_cache, *model.v_cache):
        cache[1, 0] = value
    assert model.forward(make_arrays([(b"abcdefg", 1, [1, 2])])).shape == (1,)


def test_weights_are_a_function_of_the_configuration() -> None:
    first, again, other = Weights.random(SMALL), Weights.random(SMALL), Weights.random(ModelConfig(2, 2, 8, seed=1))
    assert first.head.tobytes() == again.head.tobytes()
    assert first.head.tobytes() != other.head.tobytes()
    arrays = (first.embed, first.head, first.logit_bias, *(vars(first.layers[0]).values()))
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def test_norm_has_unit_mean_square() -> None:
    assert np.mean(rms_norm(np.array([[3.0, -4.0]], np.float32)) ** 2) == pytest.approx(1.0)


def test_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        ModelConfig(window=0)


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim is 7"):
        ModelConfig(head_dim=7)


def test_greedy_output_is_lively_and_deterministic() -> None:
    texts = list(load_texts().values())
    outputs = SimEngine(NumpyModel(ModelConfig(), 128)).run(texts, 80)
    assert outputs == SimEngine(NumpyModel(ModelConfig(), 128)).run(texts, 80)
    assert len(set(outputs)) == len(texts)
    for output in outputs:
        assert all(0x20 <= byte <= 0x7E for byte in output)
        assert len({output[i : i + 4] for i in range(len(output) - 3)}) > 60, "it runs in a cycle"


def test_shipped_texts() -> None:
    texts = load_texts()
    assert 3 <= len(texts) <= 4
    assert all(300 <= len(text) <= 900 and text.isascii() for text in texts.values())
    n_shared = 7 * 16
    assert texts["lighthouse_summer"][:n_shared] == texts["lighthouse_winter"][:n_shared]
