"""The black box of the CUDA backend over a stand-in device that dies: every call fails from then on, as CUDA's do.

What a real context leaves behind is for tests/gpu/test_black_box.py; this shows that our side asks nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_toy import FakeToy, fake_world, prefilled  # noqa: F401  a fixture
from simt.fake_cuda import FakeCuda, FakeEvent, FakeStream

from kvcanary import Reason
from kvcanary.box_reader import BoxRun, read_box


class DeadContextError(RuntimeError):
    """cudaErrorIllegalAddress, as every call answers from then on."""


@pytest.fixture
def die(world: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Kill the context."""

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise DeadContextError("an illegal memory access was encountered")

    def kill() -> None:
        runtime, core = world.cupy.cuda.runtime, world.core
        for name in [n for n, value in vars(runtime).items() if callable(value)]:
            monkeypatch.setattr(runtime, name, fail)
        for name in ("submit", "record", "wait", "sync", "synchronize"):
            monkeypatch.setattr(FakeStream, name, fail)
        monkeypatch.setattr(FakeEvent, "sync", fail)
        monkeypatch.setattr(FakeEvent, "is_done", property(fail), raising=False)
        monkeypatch.setattr(world.cupy, "zeros", fail)
        monkeypatch.setattr(core, "LegacyPinnedMemoryResource", fail)

    return kill


def decoding(world: FakeCuda, path: Path, **config: Any) -> tuple[FakeToy, Any]:
    """An engine in the middle of decoding, with a bit flipped in its cache before the next step."""
    settings = {"verify_data_every": 1, "health_check_every_n_steps": 2, "health_check_warmup_steps": 0, **config}
    toy, graph = prefilled(world, black_box_path=str(path), **settings)
    for p in range(1, 6):
        toy.replay(graph, p)
    toy.k[1][1, 2, 0, 0] ^= 1
    return toy, graph


def the_run(path: Path) -> BoxRun:
    # The toy's own manager, of the host, began and was dropped in the same file.
    (run,) = [run for run in read_box(path).runs if run.start is not None and run.start["backend"] == "cuda"]
    ((_, v),) = run.violations
    assert (v.reasons, v.layer, v.request_id, v.position) == (Reason.DATA, 1, 1, 2)
    return run


def test_a_context_that_dies_in_the_step_that_saw_the_flip(
    world: FakeCuda,
    die: Callable[[], None],
    tmp_path: Path,
) -> None:
    toy, graph = decoding(world, tmp_path / "box")
    toy.fill((0, 6, 1), (1, 6, 1))

    def step() -> None:
        with toy.manager.step(toy.stream):
            graph.launch(toy.stream)
            world.pump()  # the guard's kernels ran, and put their record into pinned memory; then the engine's died
            die()
            toy.stream.synchronize()

    with pytest.raises(DeadContextError):  # the engine's own, not masked
        step()
    assert toy.manager._box is not None and toy.manager._box.flush(10)
    assert the_run(tmp_path / "box").end is None
    with pytest.raises(DeadContextError):
        toy.manager.close()
    run = the_run(tmp_path / "box")
    assert run.end is not None and run.end["how"] == "close" and run.end["counters"]["violations_total"] == 1


def test_an_engine_that_does_not_notice_ends_its_step(
    world: FakeCuda,
    die: Callable[[], None],
    tmp_path: Path,
) -> None:
    toy, graph = decoding(world, tmp_path / "box")
    toy.fill((0, 6, 1), (1, 6, 1))
    with toy.manager.step(toy.stream):
        graph.launch(toy.stream)
        world.pump()
        die()
    assert toy.manager._box is not None and toy.manager._box.flush(10)
    assert len(toy.manager.violations()) == 1 and toy.manager.stats().observer_errors > 0
    the_run(tmp_path / "box")


def test_what_nobody_has_read_is_read_when_the_process_exits(
    world: FakeCuda,
    die: Callable[[], None],
    tmp_path: Path,
) -> None:
    toy, graph = decoding(world, tmp_path / "box")
    toy.fill((0, 6, 1), (1, 6, 1))
    graph.launch(toy.stream)
    world.pump()
    die()
    assert toy.manager._box is not None
    toy.manager._box._at_exit()  # what atexit calls
    run = the_run(tmp_path / "box")
    assert run.end is not None and run.end["how"] == "exit"
    assert run.end["counters"]["snapshot_step"] == 4  # the last snapshot that came
