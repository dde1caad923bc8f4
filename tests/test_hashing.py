"""Chain and digest: literal known answers, a third oracle in plain integers, and what the digest promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import find_digest_constants as proof
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvcanary import abi, hashing

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint64]
Check = Callable[[Words], str]
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
POSITIONS = st.integers(0, 2**31 - 1)
PLANES = st.integers(0, 1 << 16)
TOKENS = st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 200_000)
N_BYTES = st.integers(1, 64) | st.integers(1, 4096) | st.integers(1, abi.MAX_PLANE_BYTES)


@given(st.lists(U64, min_size=1, max_size=9))
@example([0, 1, 2**64 - 1])
def test_unmix64_undoes_mix64_and_mix64_it(values: list[int]) -> None:
    x = np.array(values, np.uint64)
    assert np.array_equal(hashing.unmix64(hashing.mix64(x)), x)
    assert np.array_equal(hashing.mix64(hashing.unmix64(x)), x)


@given(st.binary(min_size=4, max_size=64), st.integers(0, 99), POSITIONS, POSITIONS)
def test_a_shifted_digest_is_that_of_the_same_bytes_at_the_other_position(
    data: bytes, plane: int, old: int, new: int
) -> None:
    row = np.frombuffer(data, np.uint8)[None]
    there, here = (hashing.digest(row, plane, np.array([p])) for p in (old, new))
    assert hashing.shift_digest(there, np.array([old]), np.array([new])) == here


def test_digests_that_cannot_be_shifted() -> None:
    """0 is no digest; 1 may stand for 0, and stays only where nothing is to be done. What becomes 0 is stored as 1."""
    becomes_zero = hashing.mix64(np.array([(5 - 6) * abi.DIGEST_C2 % 2**64], np.uint64))
    digests = np.array([0, 0, 1, 1, becomes_zero[0]], np.uint64)
    shifted = hashing.shift_digest(digests, np.array([3, 3, 3, 3, 5]), np.array([3, 4, 3, 4, 6]))
    assert shifted.tolist() == [0, 0, 1, 0, 1]


# ---- the third oracle: plain integers, nothing of the package, another way of writing each formula -------------------
def mix(x: int) -> int:
    for shift, factor in ((30, 13787848793156543929), (27, 10723151780598845931), (31, 1)):
        x = (x ^ x // 2**shift) * factor % 2**64
    return x


def walk(chain: int, tokens: list[int], position: int) -> list[int]:
    chains = []
    for i, token in enumerate(tokens):
        chain = (chain * 15074714826142052245 + mix(token % 2**32 * 2**32 + (position + i) % 2**32)) % 2**64
        chains.append(chain)
    return chains


@cache
def word_constants() -> list[int]:
    k = [mix(11400714819323198485 + j) | 1 for j in range(128)]
    while len(k) < 16384:
        k.append(k[-128] * 6364136223846793005 % 2**64)
    return k


def sum_of(data: bytes, plane: int, position: int) -> int:
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
    total = sum(w * k for w, k in zip(words, word_constants(), strict=False))
    return total + len(words) * 0xA0761D6478BD642F + plane * 0xE7037ED1A0B428DB + position * 0x8EBC6AF09C88C6E3


def digest_of(data: bytes, plane: int = 0, position: int = 0) -> int:
    return mix(sum_of(data, plane, position) % 2**64) or 1


def digest(data: Bytes, plane: int = 0, position: int = 0) -> int:
    return int(hashing.digest(data[None, :], plane, np.array([position], np.int32))[0])


def random_bytes(n: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, n, np.uint8)


# ---- mix64 -----------------------------------------------------------------------------------------------------------
def test_mix64_is_the_finalizer_of_splitmix64() -> None:
    assert hashing.mix64_int(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first output for seed 0, as published"
    states = [1234567 + i * 0x9E3779B97F4A7C15 for i in (1, 2, 3)]
    assert [hashing.mix64_int(s) for s in states] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [hashing.mix64_int(x) for x in (0, 1, 2**64 - 1)] == [0, 0x5692161D100B05E5, 0xB4D055FCF2CBBD7B]


@given(st.lists(U64, max_size=20))
def test_mix64_of_an_array_is_mix64_of_each_integer(values: list[int]) -> None:
    mixed = hashing.mix64(np.array(values, np.uint64)).tolist()
    assert mixed == [hashing.mix64_int(v) for v in values] == [mix(v) for v in values]


# ---- chain -----------------------------------------------------------------------------------------------------------
def test_chain_known_answers() -> None:
    assert hashing.anchor(np.array([0, 7], np.uint64)).tolist() == [0xE6588447CC478205, 0xC2E0F362A8BB46B7]
    assert hashing.prefix_chain([]) == 0xE6588447CC478205
    assert hashing.prefix_chain([72, 105, 33]) == 0x0B1B28AD5756D1BF
    scanned = hashing.chain_scan(0xC2E0F362A8BB46B7, np.array([-1, 2**31, 5]), 1000)
    assert scanned.tolist() == [0x7046DE551FF1D4CB, 0xE9A1BF08BE93AA94, 0x4BDB7112F4D3E0A5]


@given(U64, st.lists(TOKENS, max_size=300), POSITIONS)
@example(0, [], 0)
@example(2**64 - 1, [-1, 2**32 - 1, 2**31], 2**31 - 2)
def test_parallel_scan_is_the_serial_walk(start: int, tokens: list[int], position: int) -> None:
    ids = np.array(tokens, np.int64)
    assert hashing.chain_scan(start, ids, position).tolist() == walk(start, tokens, position)
    narrow = ids.astype(np.int32)
    assert hashing.chain_scan(start, narrow, position).tolist() == walk(start, tokens, position), "low 32 bits count"


@given(U64, st.lists(TOKENS, max_size=50), POSITIONS)
def test_link_is_one_step_of_the_walk(start: int, tokens: list[int], position: int) -> None:
    after = walk(start, tokens, position)
    before = np.array([start, *after][: len(tokens)], np.uint64)
    positions = np.arange(position, position + len(tokens))
    assert hashing.link(before, np.array(tokens, np.int64), positions).tolist() == after


@given(st.lists(TOKENS, max_size=100), st.integers(0, 100), U64)
def test_prefix_chain_splits_anywhere(tokens: list[int], cut: int, salt: int) -> None:
    whole = hashing.prefix_chain(tokens, salt)
    assert whole == [mix(0xC0FFEE ^ salt), *walk(mix(0xC0FFEE ^ salt), tokens, 0)][-1]
    rest = hashing.chain_scan(hashing.prefix_chain(tokens[:cut], salt), np.array(tokens[cut:], np.int64), cut)
    assert not tokens[cut:] or rest[-1] == whole


@given(st.lists(TOKENS, min_size=1, max_size=50), U64, U64, POSITIONS)
def test_prefix_chain_tells_salts_and_positions_apart(tokens: list[int], salt: int, other: int, position: int) -> None:
    assume(salt != other and position)
    assert hashing.prefix_chain(tokens, salt) != hashing.prefix_chain(tokens, other)
    assert hashing.prefix_chain(tokens, salt) != hashing.prefix_chain(tokens, salt, position)


def test_prefix_chain_refuses_a_table_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 2\).*flat sequence"):
        hashing.prefix_chain(np.zeros((2, 2), np.int64))


# ---- digest: values --------------------------------------------------------------------------------------------------
def test_digest_known_answers() -> None:
    ramp = np.array([i % 251 for i in range(2048)], np.uint8)
    assert digest(np.zeros(1, np.uint8)) == digest(np.zeros(4, np.uint8)) == 0x7DE53DE772EA694C
    assert digest(np.frombuffer(b"kv", np.uint8)) == 0x961F345BE098C6C2
    assert digest(np.frombuffer(b"kvcanary", np.uint8), 3, 41) == 0xBA0780F03B2B671D
    assert digest(ramp, 5, 4095) == 0x58FBECC4061573BB
    assert digest(np.full(65536, 0xFF, np.uint8), 63, 2**31 - 1) == 0xF494887BDD27470A


@given(st.lists(st.binary(min_size=7, max_size=7), max_size=5), PLANES, st.lists(POSITIONS, min_size=5, max_size=5))
def test_each_row_is_digested_on_its_own(rows: list[bytes], plane: int, positions: list[int]) -> None:
    data = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), 7)
    digests = hashing.digest(data, plane, np.array(positions[: len(rows)], np.int32))
    assert digests.tolist() == [digest_of(row, plane, p) for row, p in zip(rows, positions, strict=False)]


@settings(max_examples=25)
@given(N_BYTES, U32, PLANES, POSITIONS)
@example(abi.MAX_PLANE_BYTES, 0, 0, 0)
@example(abi.MAX_PLANE_BYTES - 1, 0, 0, 0)
def test_digest_is_the_formula(n_bytes: int, seed: int, plane: int, position: int) -> None:
    data = random_bytes(n_bytes, seed)
    assert digest(data, plane, position) == digest_of(data.tobytes(), plane, position)


@given(st.binary(min_size=1, max_size=64))
def test_padding_counts_as_zeros_but_a_word_more_does_not(data: bytes) -> None:
    padded = data + bytes(-len(data) % 4)
    row = np.frombuffer(padded, np.uint8)
    assert digest(np.frombuffer(data, np.uint8)) == digest(row)
    assert digest(np.concatenate([row, np.zeros(4, np.uint8)])) != digest(row)


@pytest.mark.parametrize("total", [0, proof.GAP])
def test_digest_is_never_zero(total: int) -> None:
    """Both sums whose mix64 is 0 or 1 give 1; a plane number is chosen that brings the sum there."""
    plane = (total - sum_of(b"kvcanary", 0, 9)) * pow(abi.DIGEST_C1, -1, 2**64) % 2**64
    assert digest(np.frombuffer(b"kvcanary", np.uint8), plane, 9) == 1


# ---- digest: what it always sees -------------------------------------------------------------------------------------
def flip(data: Bytes, bit: int) -> Bytes:
    out = data.copy()
    out[bit // 8] ^= np.uint8(1 << bit % 8)
    return out


def split_words(data: Bytes) -> NDArray[np.uint32]:
    """A copy of the whole words of data; a tail of less than a word is left out."""
    return data[: data.size // 4 * 4].copy().view("<u4")


@given(N_BYTES, U32, st.data())
def test_one_flip_and_two_flips_are_seen(n_bytes: int, seed: int, draw: st.DataObject) -> None:
    data = random_bytes(n_bytes, seed)
    bits = st.integers(0, n_bytes * 8 - 1)
    first, second = draw.draw(st.lists(bits, min_size=2, max_size=2, unique=True))
    once = flip(data, first)
    assert len({digest(data), digest(once), digest(flip(once, second))}) == 3


@given(N_BYTES.filter(lambda n: n >= 4), U32, U32, st.data())
def test_a_changed_word_is_seen(n_bytes: int, seed: int, value: int, draw: st.DataObject) -> None:
    data = random_bytes(n_bytes, seed)
    words = split_words(data)
    i = draw.draw(st.integers(0, words.size - 1))
    assume(words[i] != value)
    words[i] = value
    assert digest(np.concatenate([words.view(np.uint8), data[words.size * 4 :]])) != digest(data)


@given(N_BYTES.filter(lambda n: n >= 8), U32, st.data())
def test_exchanged_words_are_seen(n_bytes: int, seed: int, draw: st.DataObject) -> None:
    data = random_bytes(n_bytes, seed)
    words = split_words(data)
    i, j = draw.draw(st.lists(st.integers(0, words.size - 1), min_size=2, max_size=2, unique=True))
    assume(words[i] != words[j])
    words[[i, j]] = words[[j, i]]
    assert digest(np.concatenate([words.view(np.uint8), data[words.size * 4 :]])) != digest(data)


@given(st.integers(1, 512), U32, st.integers(2, 16).flatmap(lambda n: st.permutations(range(n))))
def test_chunks_in_another_order_are_seen(chunk_bytes: int, seed: int, order: list[int]) -> None:
    chunks = random_bytes(len(order) * chunk_bytes, seed).reshape(len(order), chunk_bytes)
    assume(not np.array_equal(chunks[order], chunks))
    assert digest(chunks[order].ravel()) != digest(chunks.ravel())


@given(N_BYTES, U32, PLANES, PLANES, POSITIONS, POSITIONS)
def test_another_plane_or_position_is_seen(n: int, seed: int, p: int, q: int, here: int, there: int) -> None:
    assume(p != q and here != there)
    data = random_bytes(n, seed)
    assert len({digest(data, p, here), digest(data, q, here), digest(data, p, there)}) == 3


# ---- digest: the proof for the constants in use ----------------------------------------------------------------------
def test_constants_are_those_that_the_proof_is_about() -> None:
    k = hashing.digest_constants()
    assert k.tolist() == word_constants() == proof.constants_of(abi.DIGEST_SEED).tolist()
    assert not k.flags.writeable


@pytest.mark.parametrize("check", proof.CHECKS, ids=lambda check: check.__name__)
def test_proof(check: Check) -> None:
    assert check(hashing.digest_constants()) == ""


def spoiled(value: int) -> Words:
    """The constants with K_5 replaced."""
    k = hashing.digest_constants().copy()
    k[5] = value % 2**64
    return k


K9 = int(hashing.digest_constants()[9])
THIRD = pow(3, -1, 2**64)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (proof.check_fixed, 10),
        (proof.check_pairs, K9 + 2**33),
        (proof.check_pairs, 2**40 - K9),
        (proof.check_flips, K9 + 2**33),
        (proof.check_flips, 2**40 - K9),
        (proof.check_collapse_by_one_word, (proof.GAP // 2) * THIRD),
        (proof.check_collapse_by_one_word, 2**63 - (proof.GAP // 2) * THIRD),
        (proof.check_collapse_by_two_flips, proof.GAP - K9),
        (proof.check_collapse_by_two_flips, 2**7 * K9 - proof.GAP),
        (proof.check_collapse_by_exchange, K9 + proof.GAP * THIRD),
        (proof.check_collapse_by_exchange, K9 - proof.GAP * THIRD),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_proof_fails_on_constants_that_break_a_promise(check: Check, value: int) -> None:
    assert check(spoiled(value)) != ""


# ---- shares ----------------------------------------------------------------------------------------------------------
def test_share_known_answers() -> None:
    assert hashing.share_of(np.array([0, 15, 16, 31, 1000, 99999]), 16, 127).tolist() == [0, 0, 42, 42, 30, 86]


@given(st.integers(1, 256), st.integers(1, 64), st.integers(0, 2**40))
def test_shares_cover_all_and_keep_runs_together(n: int, run: int, first_run: int) -> None:
    runs = np.arange(first_run, first_run + 60 * n)  # a share stays empty with probability n e^-60
    first = hashing.share_of(runs * run, run, n)
    assert np.array_equal(first, hashing.share_of(runs * run + run - 1, run, n))
    assert np.array_equal(np.unique(first), np.arange(n))
    assert first[:5].tolist() == [(mix(int(r)) // 2**32) * n // 2**32 for r in runs[:5]]
