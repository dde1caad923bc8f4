"""Every interleaving of ring and deferred handler keeps what is promised, and each broken protocol is refuted."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path

import interleavings_deferred as deferred
import pytest
from interleavings import ALARM, BROKEN, CLEAR, CODE, COMMIT, FENCE, A, B, RefutedError, Ring
from interleavings_deferred import WaitedError, World

from kvcanary import abi
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.violation_ring import RingReader

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
# (records of each writer, capacity): several laps by one, races of two, of three.
SIZES = [((1, 1), 1), ((2, 1), 1), ((4,), 1), ((4,), 2), ((2, 2), 1), ((1, 1, 1), 1), ((2, 1), 2)]


# ---- the ring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n_records", "capacity"), SIZES)
def test_no_record_is_lost_torn_or_miscounted(n_records: tuple[int, ...], capacity: int) -> None:
    assert Ring(CODE, n_records, capacity).explore() > 500


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ring_is_refuted(name: str) -> None:
    def refute() -> None:
        for n_records, capacity in SIZES:
            Ring(BROKEN[name], n_records, capacity).explore()

    with pytest.raises(RefutedError):
        refute()


def in_order(text: str, steps: list[str]) -> list[int]:
    """Where each of the steps is, which must be there once."""
    for step in steps:
        assert text.count(step) == 1, f"{step!r} is {text.count(step)} times in\n{text}"
    return [text.index(step) for step in steps]


def test_the_kernel_does_what_the_model_does() -> None:
    text = (KERNELS / "report.cuh").read_text()
    body = text[text.index("void kvc_report(") : text.index("\n}", text.index("void kvc_report("))]
    claim = [
        "kvc_atomic_add_u64(state + KVC_STATE_OBSERVATIONS, 1);",
        "uint64_t claim = kvc_load_volatile_u64(state + KVC_STATE_CLAIMED);",
        "n_read = kvc_load_volatile_u64(control + KVC_CONTROL_READ);",
        "if ((int64_t)(claim - n_read) >= (int64_t)guard.ring_capacity) {",
        "kvc_atomic_add_u64(state + KVC_STATE_DROPPED, 1);\n            return;",
        "seen = kvc_atomic_cas_u64(state + KVC_STATE_CLAIMED, claim, claim + 1);",
        "if (seen == claim) break;\n        claim = seen;",
        "place = claim == 0 ? 0 : 1 + (claim - 1) % guard.ring_capacity;",
    ]
    stores = {
        (CLEAR, A, B): "v.commit = 0;\n    *record = v;",
        (FENCE,): "kvc_fence_system();",
        (COMMIT,): "kvc_store_volatile_u64(&record->commit, claim + 1);",
        (ALARM,): "kvc_store_volatile_u64(control + KVC_CONTROL_ALARM, claim + 1);",
    }
    places = in_order(body, claim + list(stores.values()))
    assert places == sorted(places)
    assert tuple(name for names in stores for name in names) == CODE.stores
    device = (KERNELS / "device.cuh").read_text()
    assert "void kvc_fence_system() { __threadfence_system(); }" in device


def test_the_reader_does_what_the_model_does() -> None:
    steps = ["self._commits[places]", "out = self._log[places[:n_complete]]", "self._control[abi.CONTROL_READ] ="]
    places = in_order(inspect.getsource(RingReader.read), steps)
    assert places == sorted(places) and CODE.reads == ("commits", "rows", "publish")
    assert abi.VIOLATION.names is not None and abi.VIOLATION.names[0] == "commit"
    assert re.search(r"int64_t\)\(claim - n_read\)", (KERNELS / "report.cuh").read_text()), "signed"


# ---- the deferred handler --------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _quiet() -> object:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(("depth", "n_steps"), [(1, 4), (2, 3)])
def test_snapshots_arrive_whole_in_order_and_nobody_waits(depth: int, n_steps: int) -> None:
    assert deferred.explore(World(DelayedDeviceHostHandler, depth), n_steps) > 100


@pytest.mark.parametrize("name", deferred.BROKEN)
def test_a_broken_handler_is_refuted(name: str) -> None:
    kind, device = deferred.BROKEN[name]

    def refute() -> None:
        for depth in (1, 2):
            deferred.explore(World(kind, depth, **device), 3)

    with pytest.raises((AssertionError, WaitedError)):
        refute()


def test_a_device_that_is_always_behind_starves_nobody() -> None:
    """A handler that dropped the oldest would deliver nothing, ever."""
    world = World(DelayedDeviceHostHandler, 2)
    for step in range(60):
        world.step()
        for _ in range(4):  # fewer than a snapshot takes
            if queues := world.device.queues():
                world.device.run(queues[step % len(queues)])
    assert len(world.delivered) > 5
