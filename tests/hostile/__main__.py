"""The command line: see the package."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tests' own modules name each other without a package

from simt.build import DEVICE_DIR, build

from hostile.campaign import Campaign


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostile",
        description="Feed the real kernels, built for the CPU, and the reference with noise. Ends with 1 on a finding.",
    )
    parser.add_argument("--runs", type=int, default=10_000, help="calls with hostile input (default 10000)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time, whatever was done by then")
    parser.add_argument("--first-seed", type=int, default=0, help="of the worlds; each is 40 runs at most")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--sanitize", action="store_true", help="kernels with the address and undefined sanitizers")
    parser.add_argument("--max-silence", type=float, default=120, help="seconds after which a run counts as a hang")
    parser.add_argument("--kernels", type=Path, default=DEVICE_DIR, help="directory of the kernel sources")
    parser.add_argument("--build-dir", type=Path, help="where the built kernels are kept (default: nowhere)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        library = build(args.kernels, args.build_dir or Path(name), sanitize=args.sanitize)
        campaign = Campaign(library, args.processes, args.max_silence, args.sanitize)
        outcome = campaign.run(args.first_seed, args.runs, args.seconds)
    for seed, text in outcome.findings:
        print(f"\nFINDING in the world of seed {seed} (--first-seed {seed} --runs 40):\n{text}")
    ends = ", ".join(f"{n} {name}" for name, n in outcome.did.most_common())
    print(f"{outcome.n_runs} runs in {outcome.seconds:.0f} s from seed {args.first_seed} on: {ends}")
    print(f"{len(outcome.findings)} findings")
    return bool(outcome.findings)


if __name__ == "__main__":
    sys.exit(main())
