"""Launch one kernel of a case a few times, for a profiler: see ``bench/ncu.sh``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing

from bench.cases import CASES, SIZES
from bench.rig import Rig


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ncu_case", description=__doc__)
    parser.add_argument("case")
    parser.add_argument("kernel", help="its name, or the beginning of it")
    parser.add_argument("--launches", type=int, default=3)
    args = parser.parse_args(argv)
    case = next((case for case in (*CASES, *SIZES) if case.name == args.case), None)
    if case is None:
        parser.error(f"no case {args.case!r}; there are {', '.join(case.name for case in CASES)}")
    from bench.gpu import GpuPlace

    place = GpuPlace()
    with closing(Rig(case, place)) as rig:
        launch = rig.launcher((args.kernel,))
        for _ in range(args.launches):
            launch(place.stream)
        place.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
