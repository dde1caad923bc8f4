"""The toy engine on a stand-in for a GPU: its steps are eager, captured and replayed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine
from simt.fake_cuda import FakeArray, FakeCuda, FakeStream
from simt.runner import SimtLibrary

from kvcanary import CanaryManager, StepBatch, layouts
from kvcanary.backends import cuda, side_stream


@pytest.fixture(name="world")
def fake_world(library: SimtLibrary, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A device that runs the kernels' CPU build; what asks for the driver finds it."""
    world = FakeCuda(library)
    monkeypatch.setattr(cuda, "check_driver", lambda: None)
    monkeypatch.setattr(cuda, "import_cuda", lambda: (world.cupy, world.core))
    monkeypatch.setattr(side_stream, "libcuda", lambda: world.libcuda)
    return world


class FakeToy(ToyEngine):
    """The toy engine with its arrays on the stand-in device; a batch keeps its addresses, its contents change."""

    def __init__(self, world: FakeCuda, **config: Any) -> None:
        super().__init__(**config)
        self.world, self.stream = world, world.new_stream()
        on_device = [[FakeArray(a) for a in half] for half in (self.k, self.v)]
        self.pool = layouts.nhd(k=on_device[0], v=on_device[1], page_size=PAGE)
        self.manager = CanaryManager(self.config, [self.pool], 4, 64)
        assert self.manager.backend.name == "cuda"
        self.host: dict[str, Any] = {}
        self.device_batch: StepBatch | None = None

    def fill(self, *rows: tuple[int, int, int]) -> StepBatch:
        """Put these rows into the one set of arrays, all on the device."""
        new = self.batch(*rows)
        given = {n: getattr(new, n) for n in StepBatch.__dataclass_fields__ if isinstance(getattr(new, n), np.ndarray)}
        if self.device_batch is None:
            self.host = {n: a if n == "token_history" else a.copy() for n, a in given.items()}
            self.device_batch = StepBatch(**{n: FakeArray(a) for n, a in self.host.items()})
        for name, array in given.items():
            self.host[name][...] = array
        return self.device_batch

    def write_now(self) -> None:
        host = StepBatch(**{n: self.host[n] for n in ("query_start_loc", "input_ids", "slot_mapping")})
        self.write(host)

    def forward(self, stream: FakeStream, batch: StepBatch) -> None:
        with self.manager.forward(batch, stream):
            stream.submit(self.write_now)

    def capture(self, batch: StepBatch) -> Any:
        stream = self.world.new_stream()
        stream.begin_capture()
        self.forward(stream, batch)
        return stream.end_capture()

    def replay(self, graph: Any, p: int) -> None:
        self.fill((0, p, 1), (1, p, 1))
        with self.manager.step(self.stream):
            graph.launch(self.stream)
        self.world.pump()


def prefilled(world: FakeCuda, **config: Any) -> tuple[FakeToy, Any]:
    toy = FakeToy(world, **config)
    batch = toy.fill((0, 0, 1), (1, 0, 1))
    with toy.manager.step(toy.stream):
        toy.forward(toy.stream, batch)
    world.pump()
    return toy, toy.capture(batch)


def copy_block(toy: FakeToy, source: int, target: int) -> None:
    """What an engine's copy kernel does, on its stream."""

    def copy() -> None:
        for layer in (*toy.k, *toy.v):
            layer[target] = layer[source]

    toy.stream.submit(copy)


def swap_blocks(toy: FakeToy, source: int, target: int, p: int) -> StepBatch:
    """The batch of one token at position p of request 0, whose table has another block in the place of one."""
    batch = toy.fill((0, p, 1), (1, p, 1))
    table = toy.host["block_table"]
    table[table == source] = target
    slots = toy.host["slot_mapping"]
    slots[slots // PAGE == source] += (target - source) * PAGE
    return batch
