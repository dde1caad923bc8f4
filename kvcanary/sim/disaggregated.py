"""Disaggregated prefill: one engine computes prompts and sends their KV, another one takes it in and decodes."""

from __future__ import annotations

from typing import NamedTuple

from kvcanary.sim.engine import SimEngine
from kvcanary.sim.memory import Slots
from kvcanary.sim.offload import Stored
from kvcanary.sim.protocols import Guard
from kvcanary.sim.requests import Request, slots_of
from kvcanary.sim.step_arrays import StepArrays


class Handoff(NamedTuple):
    """A prompt whose KV was computed elsewhere, and what was sampled behind it."""

    prompt: bytes
    salt: int
    kv: Stored
    first_token: int


class PrefillEngine:
    """Computes prompts, one call at a time, each in as many steps as its chunks need; the guard sees all of them."""

    def __init__(self, engine: SimEngine, guard: Guard) -> None:
        self.engine, self.guard = engine, guard
        self._blocks: dict[int, list[int]] = {}
        engine.before_forward.append(self._note_blocks)

    def prefill(self, prompt: bytes, salt: int = 0) -> Handoff:
        """Compute a prompt; its KV is sent before the step in which its blocks are given back begins."""
        request = self.engine.add_request(prompt, 1, salt=salt)
        while not request.is_finished:
            self.engine.step(self.guard)
        slots = self._slots(request)
        stored = Stored(0, request.tokens[: request.n_prompt].copy(), salt)
        stored.bundle = self.guard.exported(slots)
        stored.kv = self.engine.mover.memory.read(slots)
        return Handoff(prompt, salt, stored, int(request.tokens[request.n_prompt]))

    def _slots(self, request: Request) -> Slots:
        return slots_of(self._blocks.pop(request.id), self.engine.model.page_size, 0, request.n_prompt)

    def _note_blocks(self, arrays: StepArrays) -> None:
        """A finished request has no blocks any more by the time its step has ended."""
        for request in self.engine.scheduler.running:
            self._blocks[request.id] = list(request.blocks)


def receive(engine: SimEngine, handoff: Handoff, max_tokens: int) -> Request:
    """Queue a prompt whose KV has arrived, for at most `max_tokens` bytes, two at least: the first one is known."""
    if max_tokens < 2:
        raise ValueError(f"max_tokens is {max_tokens}, must be >= 2: the prefill has sampled the first byte")
    request = engine.add_request(handoff.prompt, max_tokens, salt=handoff.salt)
    engine.receive(request, handoff.kv, handoff.first_token)
    return request
