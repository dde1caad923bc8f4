"""Silent data corruption drawn from published fault models.

Two populations. *Computed* faults are those of permanent faults in a GPU's logic (arXiv 2605.04213, Tung et al.,
DSN 2026; body figures as third parties quote them): 50.68 % of corruptions become zero, 48.31 % are other bit flips, of
which less than 40 % flip a single bit, 1.01 % become NaN or infinite; corrupt elements repeat at a spacing of 2, 4, 8
or 16 in a warp of 32. *At rest* are upsets of HBM2 (MICRO'21, doi 10.1145/3466752.3480111): 31.5 % of events multi-bit,
about 75 % of those in contiguous bytes.

Not published, hence assumed here: that the bit position decays by 0.92 from the lowest bit up, 2 to 4 bits in a
multi-bit flip, equal shares of the spacings (and of spacing 1), 1 to 32 elements, and one upset at rest for four
computed faults.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

NULL_SHARE, FLIP_SHARE, NONFINITE_SHARE = 0.5068, 0.4831, 0.0101  # of computed faults; they add up to 1
SINGLE_BIT_SHARE = 0.39  # of computed flips: "less than 40 %"
STRIDES = (1, 2, 4, 8, 16)  # elements
MAX_ELEMENTS = 32  # a warp
REST_MULTI_SHARE, REST_CONTIGUOUS_SHARE = 0.315, 0.75  # of upsets at rest; of the multi-bit ones
REST_SHARE = 0.2  # of all injections (assumed)
BIT_DECAY = 0.92  # per bit, from the lowest (assumed)
MAX_BITS, MAX_BURST = 4, 8  # bits of a multi-bit flip; bytes of a burst (assumed)


class FaultKind(Enum):
    """What a corruption does to an element, or to bytes at rest."""

    NULL = "nullification"
    ONE_BIT = "single-bit flip"
    BITS = "multi-bit flip"
    NONFINITE = "NaN or infinity"
    REST_BIT = "single-bit upset at rest"
    REST_BURST = "upset of contiguous bytes"
    REST_SCATTERED = "upset of scattered bits"

    @property
    def is_at_rest(self) -> bool:
        return self in (FaultKind.REST_BIT, FaultKind.REST_BURST, FaultKind.REST_SCATTERED)


@dataclass(frozen=True)
class Injection:
    """One corruption of the bytes of one slot in one plane.

    Attributes:
        elements: the elements that are hit, base + k * stride; empty at rest.
        stride: in elements.
        value: what is XORed into an element, or what replaces it.
        mask: XORed into the bytes (at rest), u8[bytes of the slot].
    """

    kind: FaultKind
    elements: tuple[int, ...] = ()
    stride: int = 1
    value: int = 0
    mask: Bytes | None = None

    def apply(self, data: Bytes, itemsize: int) -> Bytes:
        """The corrupted copy of a slot's bytes."""
        out = data.copy()
        if self.mask is not None:
            return out ^ self.mask
        elements = out.view(f"<u{itemsize}")
        at = list(self.elements)
        if self.kind in (FaultKind.ONE_BIT, FaultKind.BITS):
            elements[at] ^= elements.dtype.type(self.value)
        else:
            elements[at] = elements.dtype.type(self.value)
        return out


class Draws:
    """Injections from one seed.

    Args:
        seed: the same seed gives the same injections.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def draw(self, n_bytes: int, itemsize: int) -> Injection:
        """One injection into a slot of ``n_bytes``, of elements of ``itemsize`` bytes."""
        if self._rng.random() < REST_SHARE:
            return self._at_rest(n_bytes)
        kind = self._computed_kind()
        elements, stride = self._footprint(n_bytes // itemsize)
        return Injection(kind, elements, stride, self._value(kind, 8 * itemsize))

    def _computed_kind(self) -> FaultKind:
        u = self._rng.random()
        if u < NULL_SHARE:
            return FaultKind.NULL
        if u < NULL_SHARE + NONFINITE_SHARE:
            return FaultKind.NONFINITE
        return FaultKind.ONE_BIT if self._rng.random() < SINGLE_BIT_SHARE else FaultKind.BITS

    def _footprint(self, n_elements: int) -> tuple[tuple[int, ...], int]:
        stride = int(self._rng.choice(STRIDES))
        most = min(MAX_ELEMENTS, max(1, n_elements // stride))
        n = int(self._rng.integers(1, most + 1))
        base = int(self._rng.integers(0, n_elements - (n - 1) * stride))
        return tuple(range(base, base + n * stride, stride)), stride

    def _value(self, kind: FaultKind, n_bits: int) -> int:
        if kind is FaultKind.NULL:
            return 0
        if kind is FaultKind.NONFINITE:
            return int(self._rng.choice(NONFINITE[n_bits]))
        weights = BIT_DECAY ** np.arange(n_bits)
        n = 1 if kind is FaultKind.ONE_BIT else int(self._rng.integers(2, min(MAX_BITS, n_bits) + 1))
        bits = self._rng.choice(n_bits, n, replace=False, p=weights / weights.sum())
        return sum(1 << int(bit) for bit in bits)

    def _at_rest(self, n_bytes: int) -> Injection:
        mask = np.zeros(n_bytes, np.uint8)
        if self._rng.random() >= REST_MULTI_SHARE:
            mask[self._rng.integers(n_bytes)] = 1 << int(self._rng.integers(8))
            return Injection(FaultKind.REST_BIT, mask=mask)
        if self._rng.random() < REST_CONTIGUOUS_SHARE:
            n = int(self._rng.integers(2, min(MAX_BURST, n_bytes) + 1))
            start = int(self._rng.integers(0, n_bytes - n + 1))
            mask[start : start + n] = self._rng.integers(1, 256, n)
            return Injection(FaultKind.REST_BURST, mask=mask)
        n = int(self._rng.integers(2, MAX_BITS + 1))
        for bit in self._rng.choice(8 * n_bytes, n, replace=False).tolist():
            mask[bit // 8] |= 1 << bit % 8
        return Injection(FaultKind.REST_SCATTERED, mask=mask)


# NaN, +Inf and -Inf (NaN of both signs in fp8 e4m3, which has no infinity), by bits of an element.
NONFINITE: dict[int, tuple[int, ...]] = {
    8: (0x7F, 0xFF),
    16: (0x7FC0, 0x7F80, 0xFF80),
    32: (0x7FC00000, 0x7F800000, 0xFF800000),
}


def explain_no_op(injection: Injection, before: Bytes, after: Bytes) -> str:
    """Why an injection changes nothing, "" if it does: no digest can see what is not there."""
    if not np.array_equal(before, after):
        return ""
    return {FaultKind.NULL: "zero over zero", FaultKind.NONFINITE: "NaN over NaN"}.get(injection.kind, "unexplained")


def shares(injections: list[Injection]) -> dict[str, float]:
    """Shares of what was drawn, as the sources give them; a key is missing where its population is empty."""
    computed = [i for i in injections if not i.kind.is_at_rest]
    rest = [i for i in injections if i.kind.is_at_rest]
    flips = [i for i in computed if i.kind in (FaultKind.ONE_BIT, FaultKind.BITS)]
    multi = [i for i in rest if i.kind is not FaultKind.REST_BIT]
    found: dict[str, float] = {}

    def note(name: str, of: list[Injection], *kinds: FaultKind) -> None:
        if of:
            found[name] = sum(i.kind in kinds for i in of) / len(of)

    note("nullification", computed, FaultKind.NULL)
    note("flip", computed, FaultKind.ONE_BIT, FaultKind.BITS)
    note("nonfinite", computed, FaultKind.NONFINITE)
    note("single-bit of flips", flips, FaultKind.ONE_BIT)
    note("multi-bit at rest", rest, FaultKind.REST_BURST, FaultKind.REST_SCATTERED)
    note("contiguous of multi-bit at rest", multi, FaultKind.REST_BURST)
    return found
