"""``python -m tests.mutants``: plant every bug, one at a time, and list those that no test has seen."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import catalogue
from .mutant import MutantError, Tree, Verdict


def told(verdict: Verdict) -> str:
    """One line for a mutant."""
    mutant = verdict.mutant
    fate = f"killed by {verdict.killer}" if verdict.is_killed else "SURVIVES"
    if mutant.twin:
        fate += f" (refuted by the explorer: {mutant.twin})"
    if not verdict.is_killed and mutant.equivalent:
        fate = f"equivalent: {mutant.equivalent}"
    return f"{verdict.seconds:6.1f} s  {mutant.file}: {mutant.name}: {fate}"


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a bug survives that is not explained, or one that is said to be equivalent is killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="those whose file and name have one of these in them")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without any mutant first")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--quick", action="store_true", help="not all tests where a mutant's own let it live")
    arguments = parser.parse_args(argv)
    wanted = arguments.only or [""]
    chosen = [m for m in catalogue() if any(text in f"{m.file}: {m.name}" for text in wanted)]
    if not chosen:
        parser.error(f"--only {arguments.only}: no mutant has one of these in its name or file")
    verdicts: list[Verdict] = []
    odd: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kvcanary-mutants-") as directory:
        tree = Tree(Path(directory))
        if not arguments.no_baseline and (
            failed := tree.test(" ".join(sorted({t for m in chosen for t in m.tests.split()})))
        ):
            parser.exit(2, f"{failed} fails without any mutant: mend that first\n")
        for mutant in chosen:
            try:
                verdict = tree.judge(mutant, asks_everything=not arguments.quick)
            except MutantError as error:
                odd.append(str(error))
                print(f"ERROR {error}", flush=True)
                continue
            verdicts.append(verdict)
            print(told(verdict), flush=True)
    odd += [told(v) for v in verdicts if v.is_killed == bool(v.mutant.equivalent)]
    n_killed = sum(v.is_killed for v in verdicts)
    print(f"{n_killed} of {len(chosen)} killed in {sum(v.seconds for v in verdicts):.0f} s; {len(odd)} to look at")
    if arguments.json:
        rows = [{**vars(v.mutant), "killer": v.killer, "seconds": round(v.seconds, 1)} for v in verdicts]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return bool(odd)


if __name__ == "__main__":
    raise SystemExit(main())
