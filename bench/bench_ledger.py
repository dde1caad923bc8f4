"""What the ledger of block ownership costs on the host: microseconds of a call with 1,000 ids. Needs no GPU.

``PYTHONPATH=. python bench/bench_ledger.py``
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from kvcanary import PREFIX_CACHE
from kvcanary.ledger import BlockLedger

N_BLOCKS, N_IDS, N_CALLS, N_RUNS = 1 << 16, 1000, 50, 15
N_OTHERS = 20_000  # blocks that the prefix cache holds besides

# A case: the calls before it, its own, those after it; all of them as (kind, owner, which ids). The ids are 1,000
# blocks in no order; "half": every other one of them, "others": the rest, "in order": both, one after the other;
# "turned": all in another order; "i of 8": every eighth; "one": the first.
Call = tuple[str, int, str]
Case = tuple[list[Call], Call, list[Call]]
A, B, C, CACHE = 7, 8, 9, PREFIX_CACHE
OWNED: list[Call] = [("allocate", A, "all")]
MANY: list[Call] = [("allocate", 100 + i, f"{i} of 8") for i in range(8)]
MANY_END: list[Call] = [("free", 100 + i, f"{i} of 8") for i in range(8)]
CASES: dict[str, Case] = {
    "allocate": ([], ("allocate", A, "all"), [("free", A, "all")]),
    "allocate, together for the first time": (
        [("allocate", A, "turned"), ("free", A, "turned")],
        ("allocate", A, "all"),
        [("free", A, "all")],
    ),
    "free, sole owner": (OWNED, ("free", A, "all"), []),
    "share of live": (OWNED, ("share", B, "all"), [("free", B, "all"), ("free", A, "all")]),
    "share of shared": (
        [*OWNED, ("share", B, "all")],
        ("share", C, "all"),
        [("free", C, "all"), ("free", B, "all"), ("free", A, "all")],
    ),
    "share of cached": ([*OWNED, ("free", A, "all")], ("share", B, "all"), [("free", B, "all")]),
    "share, half live, half cached": (
        [("allocate", A, "half")],
        ("share", B, "all"),
        [("free", B, "all"), ("free", A, "half")],
    ),
    "share, half shared, half live": (
        [*OWNED, ("share", C, "half")],
        ("share", B, "all"),
        [("free", B, "all"), ("free", C, "half"), ("free", A, "all")],
    ),
    "share by the cache": (OWNED, ("share", CACHE, "all"), [("free", CACHE, "all"), ("free", A, "all")]),
    "free by one of two sharers": (
        [*OWNED, ("share", B, "all"), ("share", C, "all")],
        ("free", B, "all"),
        [("free", C, "all"), ("free", A, "all")],
    ),
    "free by the only sharer": ([*OWNED, ("share", B, "all")], ("free", B, "all"), [("free", A, "all")]),
    "the same, in another order": ([*OWNED, ("share", B, "all")], ("free", B, "turned"), [("free", A, "all")]),
    "free by the primary of shared": ([*OWNED, ("share", B, "all")], ("free", A, "all"), [("free", B, "all")]),
    "free by the last, a sharer": ([("share", B, "all")], ("free", B, "all"), []),
    "free by the cache": ([*OWNED, ("share", CACHE, "all")], ("free", CACHE, "all"), [("free", A, "all")]),
    "free, half shared, half sole": ([*OWNED, ("share", B, "half")], ("free", A, "all"), [("free", B, "half")]),
    "free, half a prefix, half its own": (
        [("share", B, "half"), ("allocate", A, "others"), ("share", A, "half")],
        ("free", A, "turned"),
        [("free", B, "half")],
    ),
    "free, a prefix, then its own": (
        [("share", B, "half"), ("allocate", A, "others"), ("share", A, "half")],
        ("free", A, "in order"),
        [("free", B, "half")],
    ),
    "share of live, of many pasts": (MANY, ("share", B, "all"), [("free", B, "all"), *MANY_END]),
    "free by a sharer, of many pasts": ([*MANY, ("share", B, "all")], ("free", B, "all"), MANY_END),
    "free by one of two, of many pasts": (
        [*MANY, ("share", B, "all"), ("share", C, "all")],
        ("free", B, "all"),
        [("free", C, "all"), *MANY_END],
    ),
    "allocate, one id": ([], ("allocate", A, "one"), [("free", A, "one")]),
    "share, one id": ([("allocate", A, "one")], ("share", B, "one"), [("free", B, "one"), ("free", A, "one")]),
    "free by a sharer, one id": (
        [("allocate", A, "one"), ("share", B, "one")],
        ("free", B, "one"),
        [("free", A, "one")],
    ),
    "free by the cache, one id": (
        [("allocate", A, "one"), ("share", CACHE, "one")],
        ("free", CACHE, "one"),
        [("free", A, "one")],
    ),
}


def main() -> None:
    """The best of some runs, each the median of calls in a row; the calls around them are not timed."""
    shuffled = np.random.default_rng(0).permutation(N_BLOCKS).astype(np.int32)
    ids = shuffled[:N_IDS]
    which = {"all": ids, "half": ids[::2], "others": ids[1::2], "turned": np.random.default_rng(1).permutation(ids)}
    which |= {"one": ids[:1], "in order": np.concatenate((ids[::2], ids[1::2]))}
    which |= {f"{i} of 8": ids[i::8] for i in range(8)}
    for name, (before, timed, after) in CASES.items():
        ledger = BlockLedger(N_BLOCKS)
        ledger.share(shuffled[N_IDS : N_IDS + N_OTHERS], CACHE)
        best = np.inf
        for step in range(N_RUNS):
            spent = []
            for _ in range(N_CALLS):
                for kind, owner, of in before:
                    getattr(ledger, kind)(which[of], owner, step)
                call, given, owner = getattr(ledger, timed[0]), which[timed[2]], timed[1]
                start = perf_counter()
                call(given, owner, step)
                spent.append(perf_counter() - start)
                for kind, owner, of in after:
                    getattr(ledger, kind)(which[of], owner, step)
            best = min(best, float(np.median(spent)))
        assert (ledger.n_live, ledger.n_shared) == (N_OTHERS, N_OTHERS), f"{name}: the calls do not cancel out"
        print(f"{name:38} {best * 1e6:7.1f} us per call of {len(given)} ids", flush=True)


if __name__ == "__main__":
    main()
