"""What the ledger of block ownership costs on the host: microseconds of a call with 1,000 ids. Needs no GPU.

``PYTHONPATH=. python bench/bench_ledger.py``
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from kvcanary.ledger import BlockLedger

N_BLOCKS, N_IDS, N_CALLS, N_RUNS = 1 << 16, 1000, 200, 15


def main() -> None:
    """The best of some runs, each the mean of many calls; blocks in no order."""
    ids = np.random.default_rng(0).permutation(N_BLOCKS)[:N_IDS].astype(np.int32)
    best: dict[str, float] = {}
    for _ in range(N_RUNS):
        ledger, spent = BlockLedger(N_BLOCKS, (0,) if 0 not in ids else ()), dict.fromkeys(CALLS, 0.0)
        for step in range(N_CALLS):
            for name, (kind, owner) in CALLS.items():
                call = getattr(ledger, kind)
                start = perf_counter()
                call(ids, owner, step)
                spent[name] += perf_counter() - start
        best = {name: min(s / N_CALLS * 1e6, best.get(name, 1e9)) for name, s in spent.items()}
    for name, us in best.items():
        print(f"{name:32} {us:7.1f} us per call of {N_IDS} ids")


CALLS = {
    "allocate": ("allocate", 7),
    "share": ("share", 8),
    "free, shared with another": ("free", 8),
    "free": ("free", 7),
}

if __name__ == "__main__":
    main()
