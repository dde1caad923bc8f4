"""Measure the kernels on this machine's GPU: ``python -m bench``; see `bench/RESULTS.md` for what came out.

A case that was not compared with the reference prints no time. The exit status is 1 if any comparison failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.cases import CASES, SIZES, Case
from bench.checks import CheckFailed
from bench.report import replace_section, section, verdict_lines, verdicts
from bench.runner import Measurement, Options, run_case
from bench.targets import TARGETS
from bench.timing import N_QUICK_REPLAYS, N_REPLAYS
from kvcanary import BackendError
from kvcanary.sim.cuda_model import import_cupy

HERE = Path(__file__).resolve().parent
RESULTS, JSON = HERE / "RESULTS.md", HERE / "results.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only what the targets name, few repeats, no cold L2")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name contains this, or matches it as a glob")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write (copies of) the results there")
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--no-sizes", action="store_true", help="without the axes of the plot")
    parser.add_argument("--seconds", type=float, default=345.0, help="begin no further case after this (default 345)")
    parser.add_argument("--commit", help="what was measured, where the checkout does not tell")
    parser.add_argument("--render", type=Path, metavar="FILE", help="rewrite RESULTS.md from this JSON; needs no GPU")
    return parser.parse_args(argv)


def chosen(args: argparse.Namespace) -> tuple[list[Case], Options]:
    """The cases of a run and what is taken of them."""
    wanted = frozenset(k for target in TARGETS for k in (target.key, *target.over))
    cases = [*CASES, *(() if args.no_sizes or args.quick else SIZES)]
    if args.quick:
        cases = [case for case in cases if any(k.startswith(f"{case.name} ") for k in wanted)]
    if args.only:
        cases = [case for case in cases if args.only in case.name or fnmatch.fnmatch(case.name, args.only)]
    has_cold, has_baselines = not args.quick, not args.no_baselines
    keys = wanted if args.quick else None
    return cases, Options(keys=keys, has_cold=has_cold, has_baselines=has_baselines)


def attempt(case: Case, run: Callable[[Case], None], failures: list[str]) -> None:
    """Run a case; what goes wrong is printed and noted, and the run goes on."""
    try:
        run(case)
    except CheckFailed as error:
        failures.append(f"`{case.name}`: {error}")
    except Exception as error:  # noqa: BLE001 - one case that cannot run must not cost the others
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        failures.append(f"`{case.name}`: {type(error).__name__} at {where}: {str(error)[:400]}")
    else:
        return
    print(f"NO TIME  {failures[-1]}", flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, on the GPU."""
    try:
        import_cupy()
    except BackendError as error:
        raise SystemExit(f"python -m bench measures on a GPU: {error}") from None
    from bench.gpu import GpuPlace

    start = time.perf_counter()
    cases, options = chosen(args)
    place = GpuPlace()
    timer = place.timer(N_QUICK_REPLAYS if args.quick else N_REPLAYS)
    machine, ceiling = place.describe(), place.ceilings(timer)
    machine["commit"] = args.commit or machine["commit"]
    place.release()
    print(*(f"{name}={value}" for name, value in machine.items()))
    print(*(f"{n}={v:.3f}" if isinstance(v, float) else f"{n}={v}" for n, v in ceiling.items()), sep="  ", flush=True)
    found: list[dict[str, Any]] = []
    failures: list[str] = []

    def on_result(measurement: Measurement) -> None:
        found.append(measurement.record())
        print(measurement.line(), flush=True)

    def run(case: Case) -> None:
        run_case(case, place, timer, ceiling["read_tb_s"], options, on_result)

    for i, case in enumerate(cases):
        if time.perf_counter() - start > args.seconds:
            failures.append(f"{len(cases) - i} cases from `{case.name}` on: no time left (--seconds {args.seconds:g})")
            print(failures[-1])
            break
        attempt(case, run, failures)
        try:
            place.release()
        except Exception as error:  # noqa: BLE001 - a GPU that is lost for this process: keep what was measured
            failures.append(f"all after `{case.name}`: {error}")
            print(failures[-1])
            break
    print(f"{len(found)} measurements of {len(cases)} cases in {time.perf_counter() - start:.0f} s")
    return {
        "machine": machine,
        "ceiling": ceiling,
        "quick": args.quick,
        "only": args.only,
        "failures": failures,
        "measurements": found,
    }


def write(run: dict[str, Any], out: Path | None) -> None:
    """The files of a run. Those of the repository change only with a complete one; copies go to ``out``."""
    is_complete = not (run["quick"] or run["only"])
    results = replace_section(RESULTS.read_text() if RESULTS.is_file() else "# Results\n", section(run))
    text = json.dumps(run, indent=1) + "\n"
    for directory in ([HERE] if is_complete else []) + ([out] if out else []):
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in ((JSON.name, text), (RESULTS.name, results)):
            try:
                (directory / name).write_text(content)
            except OSError as error:  # a read-only checkout still has --out
                print(f"{directory / name} was not written: {error}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.render:
        run = json.loads(args.render.read_text())
        RESULTS.write_text(replace_section(RESULTS.read_text() if RESULTS.is_file() else "# Results\n", section(run)))
        print("\n".join(verdict_lines(verdicts(run))))
        return 0
    logging.getLogger("kvcanary").setLevel(logging.ERROR)  # the violations that are provoked here are no news
    run = measure(args)
    print()
    print("\n".join(verdict_lines(verdicts(run))))
    write(run, args.out)
    return 1 if run["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
