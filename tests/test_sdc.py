"""Corruptions drawn from published fault models: the shares are those of the sources, and the guard sees every one."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from kvcanary import hashing
from kvcanary.sim.museum.places import HostPlace
from kvcanary.sim.sdc import (
    FLIP_SHARE,
    MAX_ELEMENTS,
    NONFINITE,
    NONFINITE_SHARE,
    NULL_SHARE,
    REST_CONTIGUOUS_SHARE,
    REST_MULTI_SHARE,
    REST_SHARE,
    STRIDES,
    Draws,
    FaultKind,
    Injection,
    explain_no_op,
    shares,
)
from kvcanary.sim.sdc_run import FAMILIES, run_sdc

N = 20_000


@pytest.fixture(scope="module")
def drawn() -> list[Injection]:
    """Injections into slots of 128 bytes, 16-bit elements."""
    draws = Draws(7)
    return [draws.draw(128, 2) for _ in range(N)]


# ---- the distribution ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "share", "population"),
    [
        ("nullification", NULL_SHARE, 1 - REST_SHARE),
        ("flip", FLIP_SHARE, 1 - REST_SHARE),
        ("nonfinite", NONFINITE_SHARE, 1 - REST_SHARE),
        ("multi-bit at rest", REST_MULTI_SHARE, REST_SHARE),
        ("contiguous of multi-bit at rest", REST_CONTIGUOUS_SHARE, REST_SHARE * REST_MULTI_SHARE),
    ],
)
def test_the_shares_are_the_published_ones(name: str, share: float, population: float, drawn: list[Injection]) -> None:
    deviation = math.sqrt(share * (1 - share) / (N * population))
    assert abs(shares(drawn)[name] - share) < 4 * deviation


def test_the_published_shares_add_up() -> None:
    assert pytest.approx(1) == NULL_SHARE + FLIP_SHARE + NONFINITE_SHARE


def test_less_than_two_fifths_of_the_flips_are_of_a_single_bit(drawn: list[Injection]) -> None:
    assert 0.37 < shares(drawn)["single-bit of flips"] < 0.40


def test_footprints_are_strided_and_at_most_a_warp(drawn: list[Injection]) -> None:
    computed = [i for i in drawn if not i.kind.is_at_rest]
    assert {i.stride for i in computed} == set(STRIDES)
    assert max(len(i.elements) for i in computed) == MAX_ELEMENTS
    for i in computed:
        assert set(np.diff(i.elements)) <= {i.stride}
        assert 0 <= i.elements[0] <= i.elements[-1] < 64


def test_low_bits_flip_more_often_than_high_ones(drawn: list[Injection]) -> None:
    bits = Counter(i.value.bit_length() - 1 for i in drawn if i.kind is FaultKind.ONE_BIT)
    assert sum(bits[b] for b in range(8)) > 1.5 * sum(bits[b] for b in range(8, 16))
    assert set(bits) == set(range(16))


def test_multi_bit_flips_have_several_bits_and_bursts_are_contiguous(drawn: list[Injection]) -> None:
    assert {i.value.bit_count() for i in drawn if i.kind is FaultKind.BITS} == {2, 3, 4}
    for i in drawn:
        if i.kind is FaultKind.REST_BURST:
            assert i.mask is not None
            at = np.flatnonzero(i.mask)
            assert len(at) >= 2
            assert set(np.diff(at)) == {1}


def test_a_seed_draws_the_same_again() -> None:
    first, second = ([d.draw(72, 1) for _ in range(200)] for d in (Draws(3), Draws(3)))
    assert [(i.kind, i.elements, i.value) for i in first] == [(i.kind, i.elements, i.value) for i in second]
    assert [i.kind for i in first] != [Draws(4).draw(72, 1).kind for _ in range(200)]


@pytest.mark.parametrize(("itemsize", "dtype"), [(2, np.float16), (4, np.float32)])
def test_nonfinite_values_are_nonfinite(itemsize: int, dtype: type) -> None:
    if itemsize == 2:  # of bf16: the upper half of a float32
        values = (np.array(NONFINITE[16], np.uint32) << 16).view(np.float32)
    else:
        values = np.array(NONFINITE[32], np.uint32).view(dtype)
    assert not np.isfinite(values).any()
    assert np.isnan(values).any()
    assert np.isinf(values).any()


# ---- what an injection does ------------------------------------------------------------------------------------------
def test_an_injection_changes_its_elements_and_nothing_else() -> None:
    data = np.arange(1, 33, dtype=np.uint8)
    out = Injection(FaultKind.NULL, (1, 3, 5), 2).apply(data, 2)
    assert np.flatnonzero(out != data).tolist() == [2, 3, 6, 7, 10, 11]
    assert not out[[2, 3, 6, 7, 10, 11]].any()
    flipped = Injection(FaultKind.BITS, (0, 4), 4, value=0x8001).apply(data, 2)
    assert (flipped ^ data).view("<u2").tolist() == [0x8001, 0, 0, 0, 0x8001, *[0] * 11]
    assert data[0] == 1, "the slot's own bytes are not touched"


@pytest.mark.parametrize(
    ("injection", "byte", "why"),
    [
        (Injection(FaultKind.NULL, (0, 1)), 0, "zero over zero"),
        (Injection(FaultKind.NULL, (0, 1)), 1, ""),
        (Injection(FaultKind.NONFINITE, (2,), value=0xFF), 0xFF, "NaN over NaN"),
        (Injection(FaultKind.NONFINITE, (2,), value=0x7F), 0xFF, ""),
        (Injection(FaultKind.ONE_BIT, (2,), value=0), 5, "unexplained"),
    ],
)
def test_what_changes_nothing_is_explained(injection: Injection, byte: int, why: str) -> None:
    before = np.full(8, byte, np.uint8)
    assert explain_no_op(injection, before, injection.apply(before, 1)) == why


# ---- the guard -------------------------------------------------------------------------------------------------------
def test_the_guard_sees_every_injection_on_every_layout() -> None:
    counts = run_sdc(HostPlace(), 7 * 400, seed=5)
    assert [c.family for c in counts] == [f.name for f in FAMILIES]
    for count in counts:
        assert count.ok, count.first_missed
        assert count.injected == 400
        assert count.seen + sum(count.no_ops.values()) == 400
        assert count.no_ops["unexplained"] == 0
    assert sum(c.no_ops["zero over zero"] for c in counts) > 0, "some slots are zero, so that this is counted"


def test_the_layouts_cover_what_the_library_describes() -> None:
    assert {f.itemsize for f in FAMILIES} == {1, 2, 4}
    for builder in ("nhd", "hnd", "latent"):
        assert any(builder in f.name for f in FAMILIES), builder
    pools = [f.pool(f.arrays()) for f in FAMILIES]
    assert any(unit.n_planes > 1 for pool in pools for unit in pool.digest_units()), "several planes under one digest"
    assert any(plane.n_chunks > 1 for pool in pools for plane in pool.planes), "slots in several pieces"
    assert any(plane.page_stride != pool.page_size * plane.token_stride for pool in pools for plane in pool.planes)


def test_a_digest_without_weights_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An XOR of all words misses equal flips at a regular stride: the drill must miss them with it."""

    def folded(data: np.ndarray, index: int, positions: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(data), -(-data.shape[1] // 4) * 4), np.uint8)
        padded[:, : data.shape[1]] = data
        words = np.bitwise_xor.reduce(padded.view("<u4"), axis=1)
        return words.astype(np.uint64) + np.uint64(1)

    monkeypatch.setattr(hashing, "digest", folded)
    counts = run_sdc(HostPlace(), 700, seed=5)
    assert sum(c.missed for c in counts) > 20
    assert not all(c.ok for c in counts)
    assert any(c.first_missed for c in counts)


def test_a_guard_that_looks_at_a_part_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCANARY_REAL_DATA", "partial")
    assert sum(c.missed for c in run_sdc(HostPlace(), 700, seed=5)) > 100


def test_a_false_alarm_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest that is never the same twice accuses every slot."""
    calls = iter(range(1 << 20))
    honest = hashing.digest
    monkeypatch.setattr(hashing, "digest", lambda *a: honest(*a) ^ np.uint64(next(calls)))
    counts = run_sdc(HostPlace(), 70, seed=5)
    assert sum(c.false_alarms for c in counts) > 0
    assert not all(c.ok for c in counts)
