"""What the fault drill is told: ``flip_used:p=0.01,warmup=100,pool=full,seed=1,max=3;table_swap:p=0.1``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from kvcanary.errors import ConfigError

_MAX_DIGITS = 100  # Python refuses to read numbers of thousands
_MAX_STEPS, _MAX_FAULTS, _MAX_SEED = (1 << 31) - 1, 1 << 20, (1 << 63) - 1


class FaultKind(Enum):
    """What is done to the engine's memory; within a step in this order, so that what a fault reads is undamaged.

    Attributes:
        FLIP_USED: one bit in a prefix slot of a live row, before the forward.
        FLIP_UNUSED_CACHED: one bit in a written slot that no row of the batch uses.
        NEXT_TOKEN_SWAP: the input ids of two rows exchanged; of a lone row, another id.
        TABLE_SWAP: two block table entries of live rows exchanged, put back at the end of the step.
        FLIP_AFTER_FORWARD: one bit in a slot of a live row, after the forward.
    """

    FLIP_USED = "flip_used"
    FLIP_UNUSED_CACHED = "flip_unused_cached"
    NEXT_TOKEN_SWAP = "next_token_swap"
    TABLE_SWAP = "table_swap"
    FLIP_AFTER_FORWARD = "flip_after_forward"

    @property
    def is_before_forward(self) -> bool:
        """Whether it is done in `begin_step`, before the engine launches its forward; else in `end_step`."""
        return self is not FaultKind.FLIP_AFTER_FORWARD


@dataclass(frozen=True)
class FaultSpec:
    """One fault of the drill.

    Attributes:
        p: probability of each step that it is done, in (0, 1].
        warmup: steps before the first that may have it.
        pool: name of the pool; None = drawn anew each time.
        seed: of the steps and of the places; the same engine run gives the same faults.
        max_faults: how often it is done at most (``max`` in the text).
    """

    kind: FaultKind
    p: float = 0.01
    warmup: int = 100
    pool: str | None = None
    seed: int = 0
    max_faults: int = 1

    def __str__(self) -> str:
        pool = "" if self.pool is None else f",pool={self.pool}"
        return f"{self.kind.value}:p={self.p},warmup={self.warmup}{pool},seed={self.seed},max={self.max_faults}"


def parse_faults(text: str) -> tuple[FaultSpec, ...]:
    """The faults of a ``CanaryConfig.perturb``, in the order of the text.

    Raises:
        ConfigError: a kind, key or value that is not known; the text says which are.
    """
    faults = tuple(_parse_fault(part.strip()) for part in text.split(";") if part.strip())
    if not faults:
        raise ConfigError(f"perturb={text!r} names no fault: give kind:key=value,... ({_KINDS}), or None")
    return faults


_KINDS = ", ".join(kind.value for kind in FaultKind)


def _parse_fault(part: str) -> FaultSpec:
    name, _, rest = part.partition(":")
    if name.strip() not in [kind.value for kind in FaultKind]:
        raise ConfigError(f"perturb: {name.strip()!r} is no kind of fault; the kinds are {_KINDS}")
    values: dict[str, Any] = {}
    for pair in (pair.strip() for pair in rest.split(",") if pair.strip()):
        key, equals, text = (s.strip() for s in pair.partition("="))
        if key not in _KEYS or not equals:
            raise ConfigError(f"perturb: {pair!r} in {part!r}: give key=value, the keys are {', '.join(_KEYS)}")
        field, read = _KEYS[key]
        if field in values:
            raise ConfigError(f"perturb: {key} comes twice in {part!r}: give each key once")
        values[field] = read(pair, text)
    return FaultSpec(FaultKind(name.strip()), **values)


def _probability(pair: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1.0:  # also refuses nan
        raise ConfigError(f"perturb: {pair!r}: give a probability above 0 and at most 1, as p=0.01")
    return value


def _integer(low: int, high: int) -> Callable[[str, str], int]:
    def read(pair: str, text: str) -> int:
        is_number = text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS
        if not is_number or not low <= int(text) <= high:
            raise ConfigError(f"perturb: {pair!r}: give an integer from {low} to {high}")
        return int(text)

    return read


def _name(pair: str, text: str) -> str:
    if not text:
        raise ConfigError(f"perturb: {pair!r}: give the name of a pool, or leave pool= out for any")
    return text


_KEYS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "p": ("p", _probability),
    "warmup": ("warmup", _integer(0, _MAX_STEPS)),
    "pool": ("pool", _name),
    "seed": ("seed", _integer(0, _MAX_SEED)),
    "max": ("max_faults", _integer(1, _MAX_FAULTS)),
}
