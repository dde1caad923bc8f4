"""Element types: where their names come from, and which bit patterns of them are not finite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvcanary import LayoutError, Plane, layouts
from kvcanary.arrays import ArrayView
from kvcanary.backends.reference_reserved import are_nonfinite
from kvcanary.elements import ELEMENTS, dtype_name

HALVES = np.arange(1 << 16, dtype=np.uint16)
# What the formats' papers say, spelled out.
SPECIAL_BYTES = {
    "float8_e4m3fn": {0x7F, 0xFF},
    "float8_e8m0fnu": {0xFF},
    "float8_e4m3fnuz": {0x80},
    "float8_e4m3b11fnuz": {0x80},
    "float8_e5m2fnuz": {0x80},
    "float8_e5m2": {0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF},
    "float8_e4m3": {*range(0x78, 0x80), *range(0xF8, 0x100)},
}


# ---- bit patterns ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SPECIAL_BYTES)
def test_all_patterns_of_a_byte(name: str) -> None:
    found = are_nonfinite(ELEMENTS[name], np.arange(256, dtype=np.uint8))
    assert set(np.flatnonzero(found)) == SPECIAL_BYTES[name]


@pytest.mark.parametrize(
    ("name", "finite"),
    [
        ("float16", np.isfinite(HALVES.view(np.float16))),
        ("bfloat16", np.isfinite((HALVES.astype(np.uint32) << 16).view(np.float32))),
    ],
)
def test_all_patterns_of_two_bytes(name: str, finite: NDArray[Any]) -> None:
    assert np.array_equal(are_nonfinite(ELEMENTS[name], HALVES), ~finite)


def test_patterns_of_four_bytes() -> None:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x8000, 0xFFFF):
        bits = upper | np.uint32(lower)
        assert np.array_equal(are_nonfinite(ELEMENTS["float32"], bits), ~np.isfinite(bits.view(np.float32)))


def test_every_type_is_looked_at_here() -> None:
    assert set(ELEMENTS) == {*SPECIAL_BYTES, "float16", "bfloat16", "float32"}


@pytest.mark.parametrize("name", ELEMENTS)
def test_no_pattern_of_zeros_is_one_and_nan_and_inf_are_told_apart(name: str) -> None:
    element = ELEMENTS[name]
    assert element.nonfinite != 0, "0 bits in a record mean that there is none"
    words = {element.word_for(bits) for bits in range(1 << 16) if are_nonfinite(element, np.array(bits))}
    if element.n_bytes == 1:
        words = {element.word_for(bits) for bits in SPECIAL_BYTES[name]}
    elif element.n_bytes == 4:
        words = {element.word_for(bits) for bits in (0x7F800000, 0xFF800000, 0x7FC00000)}
    assert words == ({"NaN", "Inf", "-Inf"} if element.fraction else {"NaN"})
    if name == "float16":
        inf = np.array([np.inf, -np.inf, np.nan], np.float16).view(np.uint16)
        assert [element.word_for(int(bits)) for bits in inf] == ["Inf", "-Inf", "NaN"]


# ---- names -----------------------------------------------------------------------------------------------------------
class BFloat16:
    """As ml_dtypes.bfloat16, a scalar type."""


BFloat16.__name__ = "bfloat16"


class TorchType:
    """As torch.float8_e5m2: only its text says what it is."""

    def __str__(self) -> str:
        return "torch.float8_e5m2"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("fp8", "float8_e4m3fn"),
        ("uint8", "uint8"),
        (np.float16, "float16"),
        (np.dtype(np.float32), "float32"),
        (np.uint16, "uint16"),
        (np.float64, "float64"),
        ("float64", "float64"),
        (BFloat16, "bfloat16"),
        (SimpleNamespace(name="float8_e4m3fn"), "float8_e4m3fn"),
        (TorchType(), "float8_e5m2"),
        (None, ""),
        ("", ""),
    ],
)
def test_names_and_type_objects(given: Any, name: str) -> None:
    assert dtype_name(given) == name


@pytest.mark.parametrize("given", ["fp9", "float1", np.str_, 3])
def test_other_types_are_refused(given: Any) -> None:
    with pytest.raises(LayoutError, match=r"dtype=.*give one of float32"):
        dtype_name(given)


# ---- planes ----------------------------------------------------------------------------------------------------------
def plane(data: Any, **fields: Any) -> Plane:
    return Plane(**{"data": data, "page_stride": 64, "token_stride": 16, "chunk_bytes": 16, **fields})


def type_of(p: Plane) -> str | None:
    return p.element and p.element.name


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_the_array_tells_it(name: str) -> None:
    size = ELEMENTS[name].n_bytes
    data = np.zeros(64 * 4 // size, f"u{size}")
    view = ArrayView(data.ctypes.data, data.shape, data.strides, size, "cpu", name, owner=data, host=data)
    assert type_of(plane(view)) == name


def test_layouts_take_it_from_the_arrays_or_the_argument() -> None:
    floats, integers = np.zeros((4, 2, 2, 8), np.float16), np.zeros((4, 2, 2, 8), np.uint16)
    for pool, name in (
        (layouts.nhd(k=[floats], v=[floats.copy()]), "float16"),
        (layouts.nhd(k=[integers]), None),
        (layouts.nhd(k=[integers], dtype="bfloat16"), "bfloat16"),
        (layouts.hnd(k=[integers], dtype="float16"), "float16"),
        (layouts.token_major(latent=[np.zeros((4, 2, 24), np.uint8)], dtype="fp8_e5m2"), "float8_e5m2"),
        (layouts.nhd(k=[floats.astype(">f2")]), None),
        (layouts.nhd(k=[floats], dtype="uint8"), None),
        (layouts.nhd(k=[floats.astype(np.float64)]), None),
        (layouts.nhd(k=[floats.astype(np.float64)], dtype="float64"), None),
        (layouts.nhd(k=[(integers.ctypes.data, (4, 2, 2, 8), None, 2, "cpu")], dtype=np.float16), "float16"),
    ):
        assert {type_of(p) for p in pool.planes} == {name}


def test_a_plane_that_does_not_lie_on_the_arrays_elements_is_of_something_else() -> None:
    data = np.zeros(256, np.float16)
    assert type_of(plane(data)) == "float16"
    assert type_of(plane(data, offset=1)) is None
    assert type_of(plane(data, chunk_bytes=15)) is None
    assert type_of(plane(data, token_stride=17, page_stride=68)) is None
    assert type_of(plane(data, offset=1, dtype="float16")) == "float16", "who says so must know"


def test_chunks_that_are_no_whole_elements_are_refused() -> None:
    with pytest.raises(LayoutError, match="dtype float32 in chunks of 6 bytes"):
        plane(np.zeros(256, np.uint8), chunk_bytes=6, dtype="float32")
