"""`kvcanary drill`: play every known kind of KV-cache corruption, and its legal twins, and see what the guard says."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvcanary.cli import fleet
from kvcanary.cli.drill_options import check_options
from kvcanary.cli.drill_readme import render
from kvcanary.cli.drill_report import as_json, causes_ok, print_causes, print_sdc, print_table, sdc_as_json, verdict_of
from kvcanary.cli.outputs import write_output
from kvcanary.cli.rig import choose_backend
from kvcanary.config import given_by_environment
from kvcanary.errors import ConfigError
from kvcanary.sim import soak, soak_options
from kvcanary.sim.museum import SCENARIOS, Outcome, Scenario, play
from kvcanary.sim.museum.places import Place, make_place
from kvcanary.sim.sdc_run import SdcCount, run_sdc

LIFECYCLES = {"off": (False,), "on": (True,), "both": (False, True)}
DEFAULT_SDC = 2000
SEED = 0


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "drill", help="play known faults and legal twins against the guard", description=__doc__
    )
    parser.add_argument("--backend", choices=["auto", "host", "cuda"], default="auto", help="default: %(default)s")
    parser.add_argument(
        "--scenario",
        nargs="+",
        action="extend",
        default=[],
        metavar="ID",
        help="a class (C01) or one scenario (C01-write)",
    )
    parser.add_argument(
        "--lifecycle",
        choices=list(LIFECYCLES),
        help="tell the guard who owns which block (both)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened to FILE")
    parser.add_argument(
        "--sdc",
        type=_count,
        metavar="N",
        help=f"corruptions drawn from published faults (default: {DEFAULT_SDC}; 0: none)",
    )
    parser.add_argument(
        "--render-readme", type=Path, metavar="FILE", help="renew the section of FILE that tells all this"
    )
    soaking = parser.add_argument_group("soak: honest load of everything that engines do, instead of the drill")
    soaking.add_argument("--soak", action="store_true", help="serve random prompts; the guard must stay silent")
    soak_options.add_arguments(soaking)
    fleet.add_arguments(soaking)
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not >= 0")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Run the drill and return 0 if everything held, 1 if not."""
    check_options(arguments)
    if fleet.is_asked(arguments):
        return fleet.run(arguments)
    chosen = choose(arguments.scenario)
    choice = choose_backend(arguments.backend)
    print(f"backend {choice.backend}: {choice.why}")
    given = ", ".join(given_by_environment())
    if given and arguments.soak:
        print(f"without the settings of the environment ({given}): a soak draws its own")
    elif given:
        print(f"with settings of the environment: {given} (unset them to drill the defaults)")
    if arguments.soak:
        arguments.backend = choice.backend
        return soak.run(arguments)
    place = make_place(choice.backend)
    start = time.perf_counter()
    outcomes = play_all(place, chosen, LIFECYCLES[arguments.lifecycle or "both"])
    print_table(outcomes)
    print_causes(outcomes)
    n_sdc = arguments.sdc if arguments.sdc is not None else 0 if arguments.scenario else DEFAULT_SDC
    counts = run_sdc(place, n_sdc, SEED) if n_sdc else []
    print_sdc(counts)
    ok, words = verdict(outcomes, counts, is_whole=not arguments.scenario)
    print(f"\n{words} ({time.perf_counter() - start:.0f} s)")
    if arguments.json is not None:
        report = [*map(as_json, outcomes), *sdc_as_json(counts)]
        write_output("--json", arguments.json, json.dumps(report, indent=1) + "\n")
        print(f"written to {arguments.json}")
    if arguments.render_readme is not None:
        text = arguments.render_readme.read_text(encoding="utf-8")
        write_output("--render-readme", arguments.render_readme, render(text, outcomes))
        print(f"renewed {arguments.render_readme}")
    return 0 if ok else 1


def choose(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these ids or classes, in the order of the museum; all without names.

    Raises:
        ConfigError: a name that no scenario has.
    """
    for name in names:
        if not any(name in (s.id, s.class_id) for s in SCENARIOS.values()):
            classes = sorted({s.class_id for s in SCENARIOS.values()})
            raise ConfigError(f"--scenario {name}: unknown; the classes are {', '.join(classes)}")
    return [s for s in SCENARIOS.values() if not names or s.id in names or s.class_id in names]


def play_all(
    place: Place, scenarios: Sequence[Scenario], lifecycles: Sequence[bool], play: Callable[..., Outcome] = play
) -> list[Outcome]:
    """Every scenario on each of its shapes, without and with ownership."""
    return [
        play(scenario, place, shape, lifecycle)
        for scenario in scenarios
        for lifecycle in lifecycles
        if lifecycle in scenario.lifecycle
        for shape in scenario.shapes
    ]


def verdict(outcomes: Sequence[Outcome], counts: Sequence[SdcCount], is_whole: bool) -> tuple[bool, str]:
    """Whether all held, and in words; the score of the causes counts where the whole drill was played."""
    n_failed = sum(o.ok is False for o in outcomes)
    n_skipped = sum(o.ok is None for o in outcomes)
    n_ok = len(outcomes) - n_failed - n_skipped
    parts = [f"{n_ok} of {len(outcomes)} runs as expected, {n_failed} not, {n_skipped} not played"]
    ok = not n_failed
    if not n_ok:
        ok = False
        parts.append("nothing was played")
    if is_whole and not causes_ok(outcomes):
        ok = False
        parts.append("the root cause is named first too seldom")
    if not all(count.ok for count in counts):
        ok = False
        parts.append("corruptions went unseen")
    return ok, f"{verdict_of(ok)}: {'; '.join(parts)}"
