"""Replays by the thousand leave device memory, resident memory, files and threads as they were.

KVC_LEAK_STEPS=10000000 for as long as it takes.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from kvcanary import abi
from kvcanary.sim.footprint import MIB, Footprint

from .toy import CudaToy

pytestmark = pytest.mark.gpu

N_STEPS, LENGTH = int(os.environ.get("KVC_LEAK_STEPS", "20000")), 1000


def test_replays_leave_nothing_behind() -> None:
    toy = CudaToy(
        verify_data_every=7, stats_print_every_n_steps=50, health_check_every_n_steps=50, health_check_warmup_steps=0
    )
    graph, stream = toy.capture(), toy.cupy.cuda.Stream(non_blocking=True)
    last = toy.manager.backend.snapshot_words()

    def serve_texts(n: int) -> None:
        """Each from the beginning: the same tokens in the same slots, written anew."""
        nonlocal last
        for i in range(n):
            toy.seq_lens.fill(0)
            toy.cupy.cuda.runtime.deviceSynchronize()
            if i % 3 == 2:
                toy.flip(0, toy.page + 3)  # before it is written again: nobody's business
            for p in range(LENGTH):
                with toy.manager.step(stream):
                    graph.launch(stream)
                if p % 256 == 255:
                    stream.synchronize()  # the host is not to run away
            toy.manager.synchronize()
            words = toy.manager.backend.snapshot_words()
            fell = set(np.flatnonzero(words < last).tolist())
            assert fell <= {abi.STATE_JUDGING, abi.STATE_PAUSE}, fell
            last = words

    serve_texts(3)
    before = Footprint.now(on_gpu=True)
    serve_texts(max(1, N_STEPS // LENGTH))
    after = Footprint.now(on_gpu=True)
    assert before is not None and after is not None
    print(before, after)
    assert after.on_device - before.on_device <= 2 * MIB
    assert after.resident - before.resident <= 16 * MIB
    assert (after.n_files, after.n_threads) == (before.n_files, before.n_threads)
    assert toy.manager.violations() == ()
    assert toy.manager.stats().forwards >= N_STEPS
