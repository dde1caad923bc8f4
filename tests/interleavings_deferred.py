"""All ways in which a device may run beside the deferred handler: the real handler over a staging that is a model.

A device has two queues, the step's stream and the side stream, and runs the head of either whenever it likes, or never.
The handler is driven a step at a time; before each of its calls into the staging the device may have done nothing, or
all that it can.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np

from kvcanary.deferred import DelayedDeviceHostHandler


class WaitedError(Exception):
    """The handler waits for the device."""


class Device:
    """The staging's model, and both queues. ``choose(n)`` picks one of n ways for the device to go on before a call."""

    def __init__(self, depth: int, *, waits_for_clone: bool = True) -> None:
        self.source = [0, 0]
        self.clones = [[0, 0] for _ in range(depth)]
        self.buffers = [np.zeros(2, np.uint64) for _ in range(depth)]
        self.cloned, self.arrived = [0] * depth, [0] * depth  # records done, of each event
        self.n_copies = [0] * depth
        self.stream: list[tuple[Any, ...]] = []
        self.side: list[tuple[Any, ...]] = []
        self.waits_for_clone = waits_for_clone
        self.choose: Callable[[int], int] = lambda _n: 0
        self.in_flight: set[int] = set()

    # ---- the device --------------------------------------------------------------------------------------------------
    def queues(self) -> list[list[tuple[Any, ...]]]:
        """Those whose head can run."""
        found = [self.stream] if self.stream else []
        if self.side and (self.side[0][0] != "await" or self.cloned[self.side[0][1]] >= self.side[0][2]):
            found.append(self.side)
        return found

    def run(self, queue: list[tuple[Any, ...]]) -> None:
        what, *rest = queue.pop(0)
        if what == "compute":
            self.source[rest[0]] = rest[1]
        elif what == "clone":
            index, word = rest
            self.clones[index][word] = self.source[word]
        elif what == "copy":
            index, word = rest
            self.buffers[index][word] = self.clones[index][word]
        elif what in ("cloned", "arrived"):
            getattr(self, what)[rest[0]] += 1

    def compute(self, step: int) -> None:
        """A forward that leaves its number in both words of the source."""
        self.stream += [("compute", word, step) for word in (0, 1)]

    def _go_on(self) -> None:
        """Nothing, or everything: what lies between is what happens between two steps."""
        is_running = self.choose(2)
        while is_running and (found := self.queues()):
            self.run(found[0])

    # ---- Staging -----------------------------------------------------------------------------------------------------
    def copy(self, index: int, source: Any, stream: Any) -> None:
        assert index not in self.in_flight, f"buffer {index} is used again before it was delivered"
        self._go_on()
        self.in_flight.add(index)
        self.n_copies[index] += 1
        self.stream += [("clone", index, 0), ("clone", index, 1), ("cloned", index)]
        waits = [("await", index, self.n_copies[index])] if self.waits_for_clone else []
        self.side += [*waits, ("copy", index, 0), ("copy", index, 1), ("arrived", index)]

    def is_done(self, index: int) -> bool:
        self._go_on()
        return self.arrived[index] == self.n_copies[index]

    def wait(self, index: int) -> None:
        raise WaitedError(f"step() waits for buffer {index}")

    def host(self, index: int) -> Any:
        self._go_on()
        assert index in self.in_flight, f"buffer {index} is delivered and was never staged"
        self.in_flight.discard(index)
        return self.buffers[index]

    def is_capturing(self, stream: Any) -> bool:
        return False

    def close(self) -> None: ...


class World:
    """A handler, its device, and what was delivered."""

    def __init__(self, kind: type[DelayedDeviceHostHandler], depth: int, **device: bool) -> None:
        self.device = Device(depth, **device)
        self.handler = kind(self.device, "world", depth)
        self.n_steps = 0
        self.taken: list[int] = []
        self.delivered: list[int] = []

    def step(self) -> None:
        """A forward, then the handler's step, which wants a snapshot of it."""
        self.n_steps += 1
        label = self.n_steps
        self.device.compute(label)
        before = self.handler.n_not_taken
        self.handler.step(lambda: self.device.source, Receiver(self, label), None)
        if self.handler.n_not_taken == before:
            self.taken.append(label)
        self.check()

    def check(self) -> None:
        assert self.delivered == self.taken[: len(self.delivered)], f"{self.delivered} delivered of {self.taken}"
        assert self.handler.n_in_flight <= len(self.device.buffers)
        n_kept = len(self.delivered) + self.handler.n_in_flight
        assert n_kept + self.handler.n_not_taken == self.n_steps, "a snapshot is neither kept nor counted as not taken"

    @property
    def key(self) -> Any:
        """All that decides how it goes on."""
        d, h = self.device, self.handler
        flying = tuple((index, receiver.label) for index, receiver in h._in_flight)  # type: ignore[attr-defined]
        memory = str((d.source, d.clones, [b.tolist() for b in d.buffers], d.cloned, d.arrived, d.n_copies))
        queues = str((d.stream, d.side))
        return (flying, memory, queues, self.n_steps, tuple(self.taken), tuple(self.delivered), h._n_staged)


class Receiver:
    """What a snapshot is delivered to: it must be the one of its own step, whole."""

    def __init__(self, world: World, label: int) -> None:
        self.world, self.label = world, label

    def __call__(self, words: Any) -> None:
        assert words.tolist() == [self.label] * 2, f"the snapshot of step {self.label} holds {words.tolist()}"
        self.world.delivered.append(self.label)


def explore(world: World, n_steps: int) -> int:
    """Every way of ``n_steps`` steps; the number of states. Raises AssertionError or `WaitedError`."""
    known, stack = {world.key}, [world]
    while stack:
        state = stack.pop()
        for after in _moves(state, n_steps):
            if after.key not in known:
                known.add(after.key)
                stack.append(after)
    return len(known)


def _moves(world: World, n_steps: int) -> Iterator[World]:
    for i in range(len(world.device.queues())):
        after = copy.deepcopy(world)
        after.device.run(after.device.queues()[i])
        yield after
    if world.n_steps < n_steps:
        yield from _steps(world)


def _steps(world: World) -> Iterator[World]:
    """The handler's step once for each way in which the device goes on meanwhile."""
    plan: list[tuple[int, int]] = []  # (choice, of how many) at each call
    while True:
        after, calls = copy.deepcopy(world), count()

        def choose(n: int, calls: Iterator[int] = calls) -> int:
            i = next(calls)
            if i == len(plan):
                plan.append((0, n))
            return plan[i][0]

        after.device.choose = choose
        after.step()
        after.device.choose = lambda _n: 0
        yield after
        while plan and plan[-1][0] + 1 == plan[-1][1]:
            plan.pop()
        if not plan:
            return
        plan[-1] = (plan[-1][0] + 1, plan[-1][1])


# ---- broken twins ----------------------------------------------------------------------------------------------------
class DeliversAtOnce(DelayedDeviceHostHandler):
    """Does not ask whether the copy has arrived."""

    def step(self, compute_on_device: Any, postprocess_on_host: Any, stream: Any = None) -> None:
        while self._in_flight:
            self._deliver_now()
        self._stage(compute_on_device, postprocess_on_host, stream)

    def _deliver_now(self) -> None:
        index, receiver = self._in_flight.popleft()
        receiver(self._staging.host(index))


class ReusesInFlight(DelayedDeviceHostHandler):
    """Takes the next buffer whether or not it is free."""

    def _stage(self, compute_on_device: Any, receiver: Any, stream: Any) -> None:
        index = self._n_staged % self._depth
        self._staging.copy(index, compute_on_device(), stream)
        self._in_flight.append((index, receiver))
        self._n_staged += 1


class NewestFirst(DelayedDeviceHostHandler):
    """Delivers whatever has arrived, the newest first."""

    def step(self, compute_on_device: Any, postprocess_on_host: Any, stream: Any = None) -> None:
        for found in [f for f in reversed(self._in_flight) if self._staging.is_done(f[0])]:
            self._in_flight.remove(found)
            found[1](self._staging.host(found[0]))
        if len(self._in_flight) < self._depth:
            free = next(i for i in range(self._depth) if i not in [f[0] for f in self._in_flight])
            self._staging.copy(free, compute_on_device(), stream)
            self._in_flight.append((free, postprocess_on_host))
        else:
            self._count_not_taken()


class WaitsWhenFull(DelayedDeviceHostHandler):
    """Waits for the oldest instead of leaving the newest out."""

    def _stage(self, compute_on_device: Any, receiver: Any, stream: Any) -> None:
        if len(self._in_flight) == self._depth:
            self._staging.wait(self._in_flight[0][0])
        super()._stage(compute_on_device, receiver, stream)


class LosesCount(DelayedDeviceHostHandler):
    """Leaves the newest out and does not say so."""

    def _count_not_taken(self) -> None: ...


BROKEN: dict[str, tuple[type[DelayedDeviceHostHandler], dict[str, bool]]] = {
    "delivers at once": (DeliversAtOnce, {}),
    "reuses a buffer in flight": (ReusesInFlight, {}),
    "newest first": (NewestFirst, {}),
    "waits when full": (WaitsWhenFull, {}),
    "loses count": (LosesCount, {}),
    "side stream does not wait for the clone": (DelayedDeviceHostHandler, {"waits_for_clone": False}),
}
