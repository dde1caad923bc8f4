"""The command line: see the package."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
NAMES = ("environment", "configuration", "batch", "bundle", "pool", "calls", "black_box")
MAX_BYTES = 400
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None


def known_inputs(name: str) -> list[bytes]:
    """Inputs that are kept in the tree."""
    folders = [HERE / kind / name for kind in ("corpus", "crashers")]
    return [path.read_bytes() for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]


def keep_crasher(name: str, data: bytes) -> Path:
    folder = HERE / "crashers" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]
    path.write_bytes(data)
    return path


# ---- by chance -------------------------------------------------------------------------------------------------------
def mutated(rng: random.Random, inputs: list[bytes]) -> bytes:
    """Random bytes, or a kept input with some of its bytes changed, cut off or repeated."""
    if not inputs or rng.random() < 0.5:
        return rng.randbytes(rng.choice((4, 16, 64, MAX_BYTES)))
    data = bytearray(rng.choice(inputs))
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        data[at : at + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
    return bytes(data[:MAX_BYTES])


def by_chance(name: str, n_runs: int, seconds: float, seed: int) -> int:
    from fuzz.targets import play

    rng, inputs, end = random.Random(seed), known_inputs(name), time.monotonic() + seconds
    n = n_done = 0
    while n < n_runs and time.monotonic() < end:
        data = mutated(rng, inputs)
        try:
            n_done += play(name, data)
        except Exception:  # noqa: BLE001  whatever is no error of kvcanary's is a finding
            print(f"FINDING in {name}, kept as {keep_crasher(name, data)}:\n{traceback.format_exc()}")
            return 1
        n += 1
    print(f"{name}: {n} inputs by chance, {n_done} of them did what they say, the others were refused; no finding")
    return 0


# ---- guided by coverage ----------------------------------------------------------------------------------------------
def guided(name: str, n_runs: int, seconds: float, seed: int, corpus: Path | None) -> int:
    """Ends the process: the fuzzer does not come back."""
    import atheris

    with atheris.instrument_imports(include=["kvcanary", "fuzz.targets"]):
        from fuzz.targets import play

    def one(data: bytes) -> None:
        try:
            play(name, data)
        except Exception:
            print(f"FINDING in {name}, kept as {keep_crasher(name, data)}")
            raise

    with tempfile.TemporaryDirectory() as folder:
        found = corpus or Path(folder)
        found.mkdir(parents=True, exist_ok=True)
        kept = [str(HERE / kind / name) for kind in ("corpus", "crashers") if (HERE / kind / name).is_dir()]
        options = [f"-runs={n_runs}", f"-max_total_time={max(1, int(min(seconds, 1e6)))}", f"-seed={seed or 1}"]
        options += [
            f"-max_len={MAX_BYTES}",
            f"-artifact_prefix={folder}/",
            "-timeout=60",
            "-verbosity=0",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *options, str(found), *kept], one)
        atheris.Fuzz()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Feed the Python surface with anything. Ends with 1 on a finding, which is kept in crashers/.",
    )
    parser.add_argument("--target", choices=NAMES, help="one target alone (default: all, one after the other)")
    parser.add_argument("--runs", type=int, default=2000, help="inputs of each target (default 2000)")
    parser.add_argument("--seconds", type=float, default=1e6, help="for each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--by-chance", action="store_true", help="without coverage, also where atheris is installed")
    parser.add_argument("--corpus", type=Path, help="where guided fuzzing keeps what reaches new code")
    args = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)
    if args.target is None:
        return max(subprocess.call([sys.executable, "-m", "tests.fuzz", "--target", n, *sys.argv[1:]]) for n in NAMES)
    if args.by_chance or not HAS_ATHERIS:
        return by_chance(args.target, args.runs, args.seconds, args.seed)
    return guided(args.target, args.runs, args.seconds, args.seed, args.corpus)


if __name__ == "__main__":
    sys.exit(main())
