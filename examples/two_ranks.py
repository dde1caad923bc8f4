"""Two ranks, one verdict: what one rank finds is raised by both at the same step; a rank that dies is reported.

    mpiexec -n 2 python examples/two_ranks.py                    # KV in host memory
    mpiexec -n 2 python examples/two_ranks.py --nccl cupy        # a GPU for each rank (or nccl4py)

``--fault flip`` damages the KV of rank 1, ``--fault die`` ends rank 1, ``--fault hang`` stops it. It is a toy of tensor
parallelism: every rank keeps half of the heads, and no rank ends a forward before the other.
"""

from __future__ import annotations

import argparse
import os
import time
from threading import Event

import numpy as np
from mpi4py import MPI

from kvcanary import CanaryConfig, CanaryManager, KvCanaryViolation, RankAgreement, RankStalledError, StepBatch, layouts

PAGE, N_BLOCKS, LAYERS, FAULT_AT, EVERY, WITHIN = 4, 40, 2, 21, 8, 4

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--nccl", choices=["cupy", "nccl4py"])
parser.add_argument("--fault", choices=["flip", "die", "hang"])
parser.add_argument("--steps", type=int, default=120)
options = parser.parse_args()

world = MPI.COMM_WORLD
rank, rng = world.Get_rank(), np.random.default_rng(world.Get_rank())
if options.nccl:
    import cupy as xp

    xp.cuda.Device(rank).use()
else:
    xp = np

kv = {half: [xp.zeros((N_BLOCKS, PAGE, 2, 8), np.float32) for _ in range(LAYERS)] for half in "kv"}
manager = CanaryManager(CanaryConfig(mode="raise", verify_data_every=1), [layouts.nhd(**kv, page_size=PAGE)], 1, 1)
agreement = RankAgreement(backend=options.nccl or "mpi4py", comm=world, every=EVERY, within=WITHIN)
manager.attach_agreement(agreement)

table = xp.arange(1, N_BLOCKS, dtype=np.int32).reshape(1, -1)
arrays = {name: xp.zeros(1, np.int32) for name in ("seq_lens", "input_ids", "slot_mapping", "request_slots")}
batch = StepBatch(
    block_table=table,
    query_start_loc=xp.arange(2, dtype=np.int32),
    request_ids=xp.ones(1, np.uint32),
    token_history=xp.arange(PAGE * N_BLOCKS, dtype=np.int32).reshape(1, -1),
    **arrays,
)
is_alone = Event()


def say(text: str) -> None:
    """In one write, or the lines of the ranks mix."""
    print(f"rank {rank}: {text}\n", end="", flush=True)


def wait_for_the_other() -> None:
    """What the all-reduce of a layer is to an engine; with the timeout of the engine's own watchdog."""
    request, end = world.Ibarrier(), time.monotonic() + 2
    while not request.Test() and not is_alone.is_set():
        if time.monotonic() > end:
            is_alone.set()


def decode(position: int) -> None:
    """A step of the engine: one new token in every layer."""
    arrays["seq_lens"][:], arrays["input_ids"][:] = position + 1, position
    slot = PAGE + position
    arrays["slot_mapping"][:] = slot
    with manager.step(), manager.forward(batch):
        for layer in (*kv["k"], *kv["v"]):
            layer.reshape(-1, 2, 8)[slot] = xp.asarray(rng.random((2, 8), np.float32))
        if not is_alone.is_set():
            wait_for_the_other()
    if position == FAULT_AT and rank == 1 and options.fault == "flip":
        kv["v"][0].reshape(-1, 2, 8)[PAGE + 7] *= -1
    if position == FAULT_AT and rank == 1 and options.fault == "die":
        os._exit(3)
    if position == FAULT_AT and rank == 1 and options.fault == "hang":
        time.sleep(5)


try:
    for position in range(options.steps):
        decode(position)
    say(f"{options.steps} steps, {agreement.n_agreements} agreements, all silent")
    manager.close()
except KvCanaryViolation as error:
    say(f"raises at step {manager.step_number}: {str(error).splitlines()[0]}")
    manager.close()
except RankStalledError as error:
    say(f"raises at step {manager.step_number}: {error}")
    os._exit(1)  # MPI_Finalize would wait for the rank that is gone
