"""Serve prompts to the end and keep what is needed to compare two runs byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvcanary.sim.engine import Guard, SimEngine, StepInfo


@dataclass(frozen=True)
class Served:
    """What came out, per request in the order of the prompts; the first step is 1."""

    outputs: tuple[bytes, ...]
    byte_steps: tuple[tuple[int, ...], ...]  # the step that sampled each byte
    n_steps: int
    n_decode_steps: int  # steps in which every request brought one token


class Divergence(NamedTuple):
    """The first byte of a request that differs from the clean run, and the step that sampled it."""

    step: int
    request: int
    byte: int


def serve(
    engine: SimEngine,
    prompts: Sequence[bytes],
    max_tokens: int,
    guard: Guard | None = None,
    on_step: Callable[[StepInfo, int], None] | None = None,
) -> Served:
    """Serve all `prompts` through a fresh engine; `on_step` gets each step and how many bytes it sampled."""
    byte_steps: dict[int, list[int]] = {}
    n_decode_steps = 0

    def record(info: StepInfo) -> None:
        nonlocal n_decode_steps
        n_decode_steps += all(share.n_new == 1 for share in info.shares)
        n_new = 0
        for share in info.shares:
            steps = byte_steps.setdefault(share.request.id, [])
            if len(share.request.output) > len(steps):
                steps.append(info.step)
                n_new += 1
        if on_step is not None:
            on_step(info, n_new)

    outputs = engine.run(prompts, max_tokens, guard, record)
    in_order = tuple(tuple(byte_steps[request_id]) for request_id in sorted(byte_steps))
    return Served(tuple(outputs), in_order, engine.n_steps, n_decode_steps)


def divergences(clean: Served, other: Served) -> list[Divergence]:
    """Where each request of `other` first differs from `clean`, the earliest first."""
    found = []
    for i, (expected, got) in enumerate(zip(clean.outputs, other.outputs, strict=True)):
        byte = next((b for b, (x, y) in enumerate(zip(expected, got, strict=True)) if x != y), None)
        if byte is not None:
            found.append(Divergence(other.byte_steps[i][byte], i + 1, byte))
    return sorted(found)
