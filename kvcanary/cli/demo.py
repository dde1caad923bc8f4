"""`kvcanary demo`: serve a batch of prompts, put one fault into its KV cache, and see whether the guard names it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcanary.cli.outputs import check_output, write_output
from kvcanary.cli.report import Outcome, as_json, judge, print_outcome
from kvcanary.cli.rig import MAX_NEW_TOKENS, MAX_REQUESTS, Choice, Rig, Sizes, choose_backend, make_rig
from kvcanary.cli.show import guard_log, progress
from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError
from kvcanary.sim.engine import SimEngine, StepInfo
from kvcanary.sim.faults import FAULTS, Fault, decoding_rows
from kvcanary.sim.serve import Served, serve
from kvcanary.sim.step_arrays import StepArrays
from kvcanary.sim.texts import load_texts

VERIFY_DATA_EVERY = 4  # forwards of a request within which every live byte of it is checked again
MIN_STEPS_LEFT = VERIFY_DATA_EVERY + 2  # of the struck request
MAX_PROMPT_BYTES = 2048  # of each file, so that the demo stays short on a small machine
MAX_TOKENS = 1024  # of each request, likewise
HEALTH_EVERY = 10  # steps
NO_FAULT = "none"
SEED = 0


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("demo", help="damage the cache of a small engine, see it found", description=__doc__)
    parser.add_argument("--prompt", nargs="+", type=Path, default=[], metavar="FILE", help="default: shipped texts")
    parser.add_argument("--fault", choices=[*FAULTS, NO_FAULT], default="bit-flip", help="default: %(default)s")
    parser.add_argument("--at-step", type=_positive, metavar="N", help="default: in the middle of decoding")
    parser.add_argument("--backend", choices=["auto", "host", "cuda"], default="auto", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=_max_tokens, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened to FILE")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not >= 1")
    return value


def _max_tokens(text: str) -> int:
    value = _positive(text)
    if value > MAX_TOKENS:
        raise argparse.ArgumentTypeError(f"{value} is not <= {MAX_TOKENS}")
    return value


@dataclass(frozen=True)
class Demo:
    """What is served, where, and what goes wrong."""

    choice: Choice
    prompts: dict[str, bytes]
    max_tokens: int
    fault: str

    def rig(self, config: CanaryConfig | None) -> Rig:
        return make_rig(self.choice.backend, Sizes.of(self.texts, self.max_tokens), config)

    @property
    def texts(self) -> list[bytes]:
        return list(self.prompts.values())

    @property
    def n_bytes(self) -> int:
        """Bytes that the requests generate together."""
        return len(self.prompts) * self.max_tokens

    def strike(self, engine: SimEngine, at_step: int) -> Fault | None:
        """The fault, armed in an engine; None when nothing shall go wrong."""
        kind = FAULTS.get(self.fault)
        return None if kind is None else kind(engine, at_step, min_steps_left=MIN_STEPS_LEFT, seed=SEED)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and return 0 if the guard said just what it promises to say, 1 if not."""
    if arguments.json is not None:
        check_output("--json", arguments.json)
    prompts = _read_prompts(arguments.prompt)
    demo = Demo(choose_backend(arguments.backend), prompts, arguments.max_tokens, arguments.fault)
    _print_plan(demo)
    clean, targets = _run_clean(demo)
    at_step = arguments.at_step or _middle_of_decoding(targets)
    outcome = _run_guarded(demo, clean, at_step)
    if demo.fault != NO_FAULT:
        outcome.unguarded = _run_unguarded(demo, at_step)
    print_outcome(outcome)
    if arguments.json is not None:
        write_output("--json", arguments.json, json.dumps(as_json(outcome), indent=2) + "\n")
        print(f"written to {arguments.json}")
    return 0 if judge(outcome).ok else 1


def _read_prompts(paths: Sequence[Path]) -> dict[str, bytes]:
    if not paths:
        return load_texts()
    prompts: dict[str, bytes] = {}
    for i, path in enumerate(paths):
        try:
            text = path.read_bytes().rstrip()
        except OSError as error:
            raise ConfigError(f"--prompt {path} cannot be read ({error.strerror}): give a text file") from error
        if not text:
            raise ConfigError(f"--prompt {path} holds no text: give a file with at least one character")
        if len(text) > MAX_PROMPT_BYTES:
            print(f"{path}: only the first {MAX_PROMPT_BYTES} of {len(text)} bytes are served")
        prompts[f"{i + 1} {path.name}"] = text[:MAX_PROMPT_BYTES]
    return prompts


def _print_plan(demo: Demo) -> None:
    print(f"backend {demo.choice.backend}: {demo.choice.why}")
    lengths = ", ".join(f"{name} ({len(text)} bytes)" for name, text in demo.prompts.items())
    print(f"{len(demo.prompts)} requests, {demo.max_tokens} bytes to generate for each: {lengths}")
    print(f"at most {MAX_REQUESTS} requests and {MAX_NEW_TOKENS} new tokens a step; fault: {demo.fault}")
    print(f"verify_data_every={VERIFY_DATA_EVERY}: each live byte is checked again within {VERIFY_DATA_EVERY} forwards")


def _run_clean(demo: Demo) -> tuple[Served, list[int]]:
    """The truth: neither guard nor fault; and for each step the number of requests that a fault may strike."""
    targets: list[int] = []
    with demo.rig(None) as rig:

        def count(arrays: StepArrays) -> None:
            targets.append(len(decoding_rows(rig.engine, arrays, MIN_STEPS_LEFT)))

        rig.engine.before_forward.append(count)
        return _serve(demo, rig, "clean run"), targets


def _run_guarded(demo: Demo, clean: Served, at_step: int) -> Outcome:
    config = CanaryConfig(
        verify_data_every=VERIFY_DATA_EVERY,
        stats_print_every_n_steps=_stats_period(clean.n_steps),
        health_check_every_n_steps=HEALTH_EVERY,
        health_check_warmup_steps=HEALTH_EVERY,
        health_policy="raise",
    )
    with demo.rig(config) as rig:
        assert rig.manager is not None
        fault = demo.strike(rig.engine, at_step)
        guarded = _serve(demo, rig, "guarded run" if fault is None else f"guarded run, {demo.fault}")
        if fault is not None and fault.injected is None:
            raise ConfigError(
                f"{demo.fault} found no target from step {at_step} of {clean.n_steps} on: it needs {fault.needs}, with "
                f"{MIN_STEPS_LEFT} more steps to run; give more prompts, a larger --max-tokens or a smaller --at-step"
            )
        layout, words = rig.manager.state.layout, rig.manager.backend.snapshot_words()
        return Outcome(
            backend=demo.choice.backend,
            fault_name=demo.fault,
            fault=fault,
            verify_data_every=VERIFY_DATA_EVERY,
            clean=clean,
            guarded=guarded,
            violations=rig.manager.violations(),
            protected_tokens=int(layout.slot_runs(words).sum()),
            graph_launches=None if rig.runner is None else rig.runner.n_graph_launches,
        )


def _run_unguarded(demo: Demo, at_step: int) -> Served:
    with demo.rig(None) as rig:
        demo.strike(rig.engine, at_step)
        return _serve(demo, rig, f"unguarded run, {demo.fault}")


def _serve(demo: Demo, rig: Rig, title: str) -> Served:
    start = time.perf_counter()
    with progress(title, demo.n_bytes) as shown, guard_log(shown):

        def on_step(info: StepInfo, n_bytes: int) -> None:
            shown.advance(n_bytes, info.step)

        served = serve(rig.engine, demo.texts, demo.max_tokens, rig.guard, on_step)
        if rig.manager is not None:
            rig.manager.synchronize()
        seconds = time.perf_counter() - start
        shown.line(f"{title}: {served.n_steps} steps in {seconds:.1f} s, {served.n_decode_steps} of them decode only")
        if rig.runner is not None:
            shown.line(f"{title}: {rig.runner.n_graph_launches} launches of {rig.runner.n_graphs} CUDA graphs")
    return served


def _stats_period(n_steps: int) -> int:
    """A few stats lines a run, the last of them as near as can be to its end."""
    return min(range(max(1, n_steps // 6), max(1, n_steps // 2) + 1), key=lambda period: n_steps % period)


def _middle_of_decoding(targets: Sequence[int]) -> int:
    """The middle one of the steps in which the most requests can be struck; the first step is 1."""
    most = [step for step, n in enumerate(targets, start=1) if n == max(targets)]
    return most[len(most) // 2]
