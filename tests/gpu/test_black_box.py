"""The black box of a process whose CUDA context died: an engine's own kernel writes where there is nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcanary import Reason
from kvcanary.box_reader import read_box
from kvcanary.cli import main

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parents[1]
# The engine decodes with a captured graph; then a bit of its cache flips, and a kernel of its own writes to address 16.
WORKER = """
import sys
import numpy as np
from gpu.toy import CudaToy

path, how = sys.argv[1:]
toy = CudaToy(verify_data_every=1, black_box_path=path)
cupy = toy.cupy
crash = cupy.RawModule(
    code='extern "C" __global__ void engine_crash(unsigned long long where) { *(volatile int*)where = 1; }'
).get_function("engine_crash")
assert crash.num_regs  # loaded
graph, stream = toy.capture(), cupy.cuda.Stream(non_blocking=True)

def step(kernel=None):
    with toy.manager.step(stream):
        graph.launch(stream)
        if kernel is not None:
            with stream:
                kernel((1,), (1,), (np.uint64(16),))
        stream.synchronize()

for _ in range(20):
    step()
assert toy.manager.violations() == ()
toy.flip(0, toy.page + 3)  # row 0, position 3
if how == "read before":
    step()
    assert len(toy.manager.violations()) == 1
try:
    if how == "outside a step":  # the guard's records are in pinned memory, and nobody has read them
        toy.launch_step(stream)
        with stream:
            crash((1,), (1,), (np.uint64(16),))
        stream.synchronize()
    else:  # the guard sees the flip and the context dies in one and the same step
        step(crash)
except Exception as error:
    print("the context died:", type(error).__name__, error, flush=True)
else:
    raise SystemExit("the engine's kernel did no harm")
try:
    cupy.cuda.runtime.deviceSynchronize()
except Exception:
    print("and is dead", flush=True)
"""


@pytest.mark.parametrize("how", ["read before", "in the same step", "outside a step"])
def test_what_was_found_before_the_context_died_is_in_the_black_box(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(tmp_path / "box"), how],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, errors = process.communicate(timeout=300)
    # How a process with a dead context ends (its libraries free what is gone) is not ours to say: no look at the code.
    assert "the context died:" in out and "and is dead" in out, out + errors
    box = read_box(tmp_path / "box")
    (run,) = box.runs
    assert not box.is_cut and run.pid == process.pid and run.start is not None
    ((_, found),) = run.violations
    assert (found.reasons, found.slot, found.layer, found.position) == (Reason.DATA, 16 + 3, 0, 3)
    assert (found.request_id, found.tag.name) == (1, "HEAD_K_FULL")
    assert run.start["backend"] == "cuda" and run.counters is not None and run.counters["violations_total"] == 1
    assert run.end is not None and run.end["how"] == "exit"
    assert main(["explain", str(tmp_path / "box")]) == 1
    assert "C24 bits changed in memory" in capsys.readouterr().out
