"""Element types of KV arrays: which bit patterns of them are NaN or Inf."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvcanary.errors import LayoutError


class Element(NamedTuple):
    """A floating-point type.

    Attributes:
        name: as NumPy, ml_dtypes, torch and JAX call it.
        n_bytes: of one element.
        mask: an element is not finite if its bits under the mask are ``nonfinite``.
        nonfinite: those bits.
        fraction: of an element that is not finite, all clear = Inf, else NaN; 0 = a type without Inf.
    """

    name: str
    n_bytes: int
    mask: int
    nonfinite: int
    fraction: int

    def word_for(self, bits: int) -> str:
        """`NaN`, `Inf` or `-Inf`, for the bits of an element that is not finite."""
        if not self.fraction or bits & self.fraction:
            return "NaN"
        return "-Inf" if bits >> (8 * self.n_bytes - 1) else "Inf"


def _ieee(name: str, n_bytes: int, exponent: int, fraction: int) -> Element:
    return Element(name, n_bytes, exponent, exponent, fraction)


ELEMENTS: dict[str, Element] = {
    e.name: e
    for e in (
        _ieee("float32", 4, 0x7F800000, 0x7FFFFF),
        _ieee("float16", 2, 0x7C00, 0x3FF),
        _ieee("bfloat16", 2, 0x7F80, 0x7F),
        _ieee("float8_e5m2", 1, 0x7C, 0x3),
        _ieee("float8_e4m3", 1, 0x78, 0x7),
        Element("float8_e4m3fn", 1, 0x7F, 0x7F, 0),  # NaN is 0x7F and 0xFF; there is no Inf
        Element("float8_e8m0fnu", 1, 0xFF, 0xFF, 0),  # scales: powers of two and one NaN
        *(Element(f"float8_{kind}fnuz", 1, 0xFF, 0x80, 0) for kind in ("e4m3", "e4m3b11", "e5m2")),  # NaN is 0x80
    )
}
_ALIASES = {
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
}
_INTEGERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (2, 4, 8, 16, 32, 64)))
_UNJUDGED = ("float64", "complex64", "complex128")  # floats that no KV cache of an engine has: NaN is not looked for


def dtype_name(dtype: Any) -> str:
    """The name of an element type that an engine hands in: "" for None, else one of `ELEMENTS`, or another's.

    Args:
        dtype: a name, or the type object of NumPy, ml_dtypes, torch or JAX, none of which is imported for it.

    Raises:
        LayoutError: no such type.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == ""):
        return ""
    own = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype).rpartition(".")[2]
    name = dtype if isinstance(dtype, str) else str(own)
    name = _ALIASES.get(name, name)
    if name not in ELEMENTS and name not in (*_INTEGERS, *_UNJUDGED):
        known = ", ".join((*ELEMENTS, *_ALIASES))
        raise LayoutError(f"dtype={dtype!r}: give one of {known}, or an integer type (uint8) for what holds no floats")
    return name
