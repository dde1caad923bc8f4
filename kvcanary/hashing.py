"""Chain and digest in NumPy: the formulas that the kernels must meet bit for bit.

All arithmetic is mod 2^64. ``mix64`` is the finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary.abi import (
    CHAIN_ANCHOR,
    CHAIN_P,
    DIGEST_C0,
    DIGEST_C1,
    DIGEST_C2,
    DIGEST_PERIOD,
    DIGEST_R,
    DIGEST_SEED,
    MAX_PLANE_BYTES,
    MIX_1,
    MIX_1_INVERSE,
    MIX_2,
    MIX_2_INVERSE,
)

U64: TypeAlias = npt.NDArray[np.uint64]
Ints: TypeAlias = npt.NDArray[Any]
MASK = (1 << 64) - 1
N_DIGEST_WORDS = MAX_PLANE_BYTES // 4
_WORDS_AT_ONCE = 1 << 17


def mix64_int(x: int) -> int:
    """mix64 of one Python integer."""
    x &= MASK
    x = (x ^ x >> 30) * MIX_1 & MASK
    x = (x ^ x >> 27) * MIX_2 & MASK
    return x ^ x >> 31


def mix64(x: U64) -> U64:
    """mix64 of each element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
    return x ^ (x >> np.uint64(31))


def unmix64(v: U64) -> U64:
    """The x of which each element is ``mix64(x)``."""
    v = (v ^ (v >> np.uint64(31)) ^ (v >> np.uint64(62))) * np.uint64(MIX_2_INVERSE)
    v = (v ^ (v >> np.uint64(27)) ^ (v >> np.uint64(54))) * np.uint64(MIX_1_INVERSE)
    x: U64 = v ^ (v >> np.uint64(30)) ^ (v >> np.uint64(60))
    return x


# ---- chain -----------------------------------------------------------------------------------------------------------
def token_mix(tokens: Ints, positions: Ints) -> U64:
    """``mix64(u64(token) << 32 | position)`` of each pair; tokens and positions are taken mod 2^32."""
    low = np.uint64(0xFFFFFFFF)
    key = (tokens.astype(np.int64).astype(np.uint64) & low) << np.uint64(32)
    return mix64(key | (positions.astype(np.int64).astype(np.uint64) & low))


def anchor(salts: U64) -> U64:
    """chain(-1) of each salt."""
    return mix64(salts ^ np.uint64(CHAIN_ANCHOR))


def link(chains: U64, tokens: Ints, positions: Ints) -> U64:
    """chain(p) from chain(p - 1), token(p) and p, element by element."""
    return chains * np.uint64(CHAIN_P) + token_mix(tokens, positions)


def powers(base: int, n: int) -> U64:
    """``base**i`` for i in [0, n)."""
    out = np.full(n, base, np.uint64)
    out[:1] = 1
    return np.multiply.accumulate(out) if n else out


def chain_scan(start: int, tokens: Ints, first_position: int) -> U64:
    """chain after each of ``tokens``, which continue a chain whose last value is ``start``: u64[n].

    chain_k = P^(k+1) (start + sum_{j<=k} m_j P^-(j+1)): P is odd, so it has an inverse and the scan is a running sum.
    """
    n = len(tokens)
    mixed = token_mix(tokens, np.arange(first_position, first_position + n))
    down = powers(pow(CHAIN_P, -1, 1 << 64), n + 1)[1:]
    up = powers(CHAIN_P, n + 1)[1:]
    chains: U64 = up * (np.uint64(start) + np.cumsum(mixed * down, dtype=np.uint64))
    return chains


def prefix_chain(tokens: Sequence[int] | Ints, salt: int = 0, first_position: int = 0) -> int:
    """The chain over a whole prefix of ``tokens`` (the value that `StepBatch.prefix_chain` takes for it).

    Args:
        tokens: integers, one per position; only the low 32 bits count.
        salt: the request's salt (adapter id, tenant salt).
    """
    start = mix64_int(CHAIN_ANCHOR ^ salt)
    ids = np.asarray(tokens, np.int64)
    if ids.ndim != 1:
        raise ValueError(f"tokens have shape {ids.shape}: give a flat sequence of token ids")
    return int(chain_scan(start, ids, first_position)[-1]) if len(ids) else start


# ---- digest ----------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def digest_constants() -> U64:
    """K_i of words 0 .. 16383, all odd: ``K_i = k[i mod 128] * R^(i div 128)``, ``k[j] = mix64(SEED + j) | 1``."""
    k = mix64(np.arange(DIGEST_PERIOD, dtype=np.uint64) + np.uint64(DIGEST_SEED)) | np.uint64(1)
    constants: U64 = (powers(DIGEST_R, N_DIGEST_WORDS // DIGEST_PERIOD)[:, None] * k[None, :]).ravel()
    constants.setflags(write=False)
    return constants


def digest(data: npt.NDArray[np.uint8], digest_index: int, positions: Ints) -> U64:
    """Digest of each row: ``mix64(sum_i w_i K_i + n C0 + plane C1 + position C2)``, 0 replaced by 1: u64[rows].

    Args:
        data: u8[rows, bytes]; chunks concatenated; padded here with zeros to whole little-endian 32-bit words.
        digest_index: number of the digest (plane or group of planes) in its pool.
        positions: i32[rows]: the position in each slot's stamp.
    """
    rows, n_bytes = data.shape
    n = -(-n_bytes // 4)
    constants = digest_constants()[:n]
    total = np.full(rows, n * DIGEST_C0 + digest_index * DIGEST_C1 & MASK, np.uint64)
    total += (positions.astype(np.int64).astype(np.uint64) & np.uint64(0xFFFFFFFF)) * np.uint64(DIGEST_C2)
    at_once = max(1, _WORDS_AT_ONCE // max(n, 1))  # words widened to 64 bits at a time, so that they stay in the cache
    for start in range(0, rows, at_once):
        part = data[start : start + at_once]
        words = np.zeros((len(part), n * 4), np.uint8)
        words[:, :n_bytes] = part
        total[start : start + at_once] += words.view("<u4").astype(np.uint64) @ constants
    d = mix64(total)
    return np.where(d == 0, np.uint64(1), d)


def shift_digest(digests: U64, old: Ints, new: Ints) -> U64:
    """The digests of the same bytes at other positions: u64[n], without looking at the bytes.

    The sum under mix64 is linear in the position, and mix64 is a bijection. Of a stored 1 nobody knows whether it
    stands for 0: at another position it becomes 0, no digest.

    Args:
        digests: u64[n]; 0 = none.
        old, new: i32[n]: positions.
    """
    low = np.int64(0xFFFFFFFF)
    from_, to = ((p.astype(np.int64) & low).astype(np.uint64) * np.uint64(DIGEST_C2) for p in (old, new))
    d = mix64(unmix64(digests) + to - from_)
    shifted = np.where(digests <= np.uint64(1), np.uint64(0), np.where(d == 0, np.uint64(1), d))
    return np.where(old == new, digests, shifted)


def share_of(slots: Ints, run: int, n: int) -> Ints:
    """The share in [0, n) that each slot's physical run of ``run`` slots belongs to."""
    runs = (slots.astype(np.int64) // run).astype(np.uint64)
    shares: Ints = ((mix64(runs) >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)
    return shares
