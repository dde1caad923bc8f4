"""The kernel benches: cases and targets as data, the report, and all of a case but the timing, run on the CPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import why_no_gpu
from simt.build import find_compiler

from kvcanary import CanaryConfig
from kvcanary.backends.compile import compile_file
from kvcanary.errors import BackendError
from kvcanary.planes import PARTIAL_BYTES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `bench` is in the checkout, not in the package
cases = pytest.importorskip("bench.cases", reason="bench/ is not beside the tests")
program, baselines, checks, plot, report, rig, runner, targets, timing = (
    import_module(f"bench.{name}")
    for name in ("__main__", "baselines", "checks", "plot", "report", "rig", "runner", "targets", "timing")
)

ALL = [*cases.CASES, *cases.SIZES]
BY_NAME = {case.name: case for case in ALL}
MEASURED = {cases.key(c, m) for c in ALL for m in c.measures}
BASELINES = {baselines.baseline_key(c, name) for c in ALL for name in c.baselines}


# ---- cases and targets as data ---------------------------------------------------------------------------------------
def test_names_and_keys_are_unique() -> None:
    assert len(BY_NAME) == len(ALL)
    assert len(MEASURED | BASELINES) == sum(len(c.measures) + len(c.baselines) for c in ALL)


@pytest.mark.parametrize("case", ALL, ids=lambda c: c.name)
def test_case_is_well_formed(case: cases.Case) -> None:
    assert case.rows > 0 and case.n_new > 0 and case.prefix >= 0
    assert case.device_bytes < 40e9
    assert set(case.baselines) <= set(baselines.BASELINES)
    assert case.axis in ("", "slots", "plane_bytes")
    for measure in case.measures:
        assert cases.bytes_of(case, measure) > 0
        if cases.DATA in measure:
            assert case.real_data == "all" and case.n_verified > 0
        if cases.VERIFY in measure or cases.TAIL in measure:
            assert case.n_verified > 1


def test_constants_are_those_of_the_guard() -> None:
    config = CanaryConfig()
    assert config.verify_data_every == cases.VERIFY_DATA_EVERY
    assert config.full_verify_min_tokens == cases.FULL_VERIFY_MIN_TOKENS
    assert PARTIAL_BYTES == cases.PARTIAL_BYTES


def test_bytes_of_known_cases() -> None:
    n = 256 * 4096
    assert cases.bytes_of(BY_NAME["verify_data/nhd2048/pages"], (cases.DATA,)) == n * 2048
    assert cases.bytes_of(BY_NAME["verify_stamps/256x4096"], (cases.VERIFY,)) == n * 64 + n // 16 * 4
    assert cases.bytes_of(BY_NAME["verify_stamps/256x4096/slots"], (cases.VERIFY,)) == n * 64 + n * 4
    assert BY_NAME["verify_stamps/swa128x10240"].n_verified == 128 * 127  # the window counts the query's own key
    assert cases.V4.page_bytes(64) == 37440
    assert BY_NAME["e2e_decode_steady/partial"].layout.digested_bytes("partial") == 32
    assert cases.HND2048.digested_bytes("partial") == 128


def test_targets_name_measurements() -> None:
    assert {t.key for t in targets.TARGETS} <= MEASURED
    assert {k for t in targets.TARGETS for k in t.over} <= BASELINES
    assert len({(t.key, t.kind) for t in targets.TARGETS}) == len(targets.TARGETS)


def test_quick_takes_what_the_targets_name() -> None:
    chosen, options = program.chosen(program.parse(["--quick"]))
    taken = {cases.key(c, m) for c in chosen for m in c.measures if options.takes(cases.key(c, m))}
    assert taken == {t.key for t in targets.TARGETS}
    assert [c.name for c in program.chosen(program.parse(["--only", "swa*"]))[0]] == [
        f"swa_decode_long_prefix/{real_data}" for real_data in ("none", "partial", "all")
    ]


@pytest.mark.parametrize(
    ("kind", "bound", "us", "is_reached"),
    [("us", 20.0, 19.0, True), ("us", 20.0, 21.0, False), ("share", 0.9, 10.0, True), ("ratio", 4.0, 10.0, True)],
)
def test_verdicts(kind: str, bound: float, us: float, is_reached: bool) -> None:
    found = {"a": {"us": us, "share": 9.5 / us, "cold_us": 30.0}, "b": {"us": 25.0}, "c": {"us": 16.0}}
    (verdict,) = targets.judge([targets.Target("a", kind, bound, ("b", "c") if kind == "ratio" else ())], found)
    assert verdict.is_reached is is_reached
    assert verdict.cold == (30.0 if kind == "us" else None)


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    verdicts = targets.judge(targets.TARGETS, {})
    assert {v.word for v in verdicts} == {"not measured"}


# ---- times -----------------------------------------------------------------------------------------------------------
def test_copies_fill_a_replay() -> None:
    assert [timing.copies_for(us) for us in (0.0, 1.0, 20.0, 476.0, 50_000.0)] == [200, 200, 100, 5, 1]
    found = timing.timing_of([300.0, 200.0, 240.0], 10)
    assert (found.us, found.spread_us, found.n_replays) == (24.0, 10.0, 3)
    assert timing.difference(timing.Timing(80.0, 1.0), timing.Timing(60.0, 0.5)) == timing.Timing(20.0, 1.5)


# ---- the report ------------------------------------------------------------------------------------------------------
def small_run() -> dict[str, Any]:
    common = {"spread_us": 0.5, "n_copies": 5, "n_replays": 15, "bytes": 2147483648, "tb_s": 4.5, "floor_us": 472.0}
    own = runner.Measurement(
        key="verify_data/nhd2048/pages digests_verify", case="verify_data/nhd2048/pages", group="verify data",
        measure="digests_verify", us=476.0, share=0.991, is_in_l2=False, **common,
    )  # fmt: skip
    slots = replace(own, key="slots/kv/1024 stamps_verify", group="sizes", axis="slots", x=1024, layout="kv", us=2.0)
    plane = replace(own, key="plane_bytes/16 digests_verify", group="sizes", axis="plane_bytes", x=16, cold_us=5.0)
    base = replace(own, key="verify_data/nhd2048/pages fold_verify", group="baselines", us=1428.0, note="per-thread")
    return {
        "machine": {"gpu": "NVIDIA TEST", "date": "2026-01-01", "commit": "abc", "driver": "1"},
        "ceiling": {
            "read_tb_s": 4.55, "read_shape": "s", "read_bytes": 4 << 30, "copy_tb_s": 4.0, "launch_floor_us": 1.2,
            "l2_bytes": 60 << 20,
        },
        "quick": False,
        "only": None,
        "failures": ["`a/b`: a stamp differs"],
        "measurements": [m.record() for m in (own, slots, plane, base)],
    }  # fmt: skip


def test_the_section_tells_machine_ceiling_targets_and_failures() -> None:
    text = report.section(small_run())
    for part in ("NVIDIA TEST", "4.550 TB/s read", "476.00", "a stamp differs", "3.0x", "| reached |", "not measured"):
        assert part in text


def test_rendering_leaves_the_rest_of_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, data = tmp_path / "RESULTS.md", tmp_path / "results.json"
    results.write_text("# Results\n\nbefore\n\n<!-- kernels: begin -->\nof last year\n<!-- kernels: end -->\n\nafter\n")
    monkeypatch.setattr(program, "RESULTS", results)
    data.write_text(program.json.dumps(small_run()))
    assert program.main(["--render", str(data)]) == 0
    once = results.read_text()
    assert once.startswith("# Results\n\nbefore\n\n<!-- kernels: begin -->\n## Kernels")
    assert once.endswith("<!-- kernels: end -->\n\nafter\n") and "of last year" not in once
    assert program.main(["--render", str(data)]) == 0
    assert results.read_text() == once


def test_a_file_without_the_section_gets_it_at_its_end() -> None:
    assert report.replace_section("# R\n", "s") == "# R\n\n<!-- kernels: begin -->\ns\n<!-- kernels: end -->\n"
    with pytest.raises(ValueError, match="one of each"):
        report.replace_section("<!-- kernels: end --> <!-- kernels: begin -->", "s")


@pytest.mark.parametrize("option", ["--quick", "--only"])
def test_an_incomplete_run_goes_to_out_alone(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "HERE", tmp_path / "here")
    run = small_run() | {option[2:]: True}
    program.write(run, tmp_path / "out")
    assert not (tmp_path / "here").exists()
    assert program.json.loads((tmp_path / "out" / "results.json").read_text())["measurements"] == run["measurements"]


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib missing: pip install matplotlib")
    plot.draw(small_run(), tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_a_case_that_raises_costs_only_itself(capsys: pytest.CaptureFixture[str]) -> None:
    failures: list[str] = []

    def run(case: cases.Case) -> None:
        raise checks.CheckFailed("differs") if case is ALL[0] else KeyError("kvc_new")

    for case in ALL[:2]:
        program.attempt(case, run, failures)
    assert len(failures) == 2 and "differs" in failures[0] and "KeyError" in failures[1]
    assert capsys.readouterr().out.count("NO TIME") == 2


def test_the_kernels_of_the_benches_compile() -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason='NVRTC missing: pip install "kvcanary[dev]"')
    gpu = import_module("bench.gpu")
    try:
        compiled = compile_file(gpu.SOURCE, "sm_90")
    except BackendError as error:
        if "missing" in str(error):
            pytest.skip(str(error))
        raise
    assert {use.name for use in compiled.usage()} == set(gpu.KERNELS)
    assert not any(use.spill_bytes for use in compiled.usage())


# ---- the rig, over the CPU build of the kernels ----------------------------------------------------------------------
_SHIM = r"""
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __align__(n) alignas(n)
struct Dim { unsigned x; };
static Dim blockIdx, blockDim, gridDim, threadIdx;
struct alignas(16) uint4 { unsigned x, y, z, w; };
static unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) { auto old = *p; *p += v; return old; }
template <typename T> static T __ldcs(const T* p) { return *p; }
#include "baselines.cu"
extern "C" void be(unsigned block, unsigned thread, unsigned blocks, unsigned threads) {
    blockIdx.x = block; threadIdx.x = thread; gridDim.x = blocks; blockDim.x = threads;
}
"""


class HostPlace:
    """`bench.rig.Place` in host memory; `baselines.cu` runs a thread at a time, with a smaller grid."""

    xp, stream, l2_bytes = np, None, 1 << 20

    def __init__(self, backend: Callable[..., Any], baselines_library: Any) -> None:
        self.backend, self._library = backend, baselines_library

    def upload(self, values: Any) -> Any:
        return np.array(values)

    to_host = upload

    def random_bytes(self, n: int, seed: int) -> Any:
        words = np.zeros(-(-n // 8), np.uint64)
        self.launch("bench_fill", 1, 1, (words, np.int64(len(words)), np.uint64(seed)), None)
        return words.view(np.uint8)[:n]

    def launch(self, name: str, grid: int, threads: int, args: Sequence[Any], stream: Any) -> None:
        kernel, is_wide = getattr(self._library, name), grid > 1
        grid, threads = (2, 8) if is_wide else (grid, threads)
        passed = [
            ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else np.ctypeslib.as_ctypes_type(a.dtype)(a)
            for a in args
        ]
        for block, thread in np.ndindex(grid, threads):
            self._library.be(block, thread, grid, threads)
            kernel(*passed)

    def copy(self, to: Any, source: Any, stream: Any) -> None:
        to[...] = source

    def synchronize(self) -> None: ...
    def release(self) -> None: ...


class NoTimer:
    """Launches a few times, as a timer does."""

    def time(self, launch: timing.Launch) -> timing.Timing:
        for _ in range(3):
            launch(None)
        return timing.Timing(1.0, 0.1, 3)

    cold = time

    def eager(self, run: Callable[[], None]) -> timing.Timing:
        run()
        return timing.Timing(1.0, 0.1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> HostPlace:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    from agree import simt_library
    from simt.driver import simt_backend

    directory = tmp_path_factory.mktemp("bench")
    source, library = directory / "baselines.cpp", directory / "baselines.so"
    source.write_text(_SHIM)
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-w", f"-I{ROOT / 'bench'}"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    kernels = simt_library(tmp_path_factory.getbasetemp())
    return HostPlace(partial(simt_backend, library=kernels), ctypes.CDLL(str(library)))


def tiny(case: cases.Case) -> cases.Case:
    """The same case in a size that takes milliseconds."""
    return replace(
        case,
        rows=min(case.rows, 3),
        prefix=min(case.prefix, 290),
        n_new=min(case.n_new, 70),
        window=case.window and min(case.window, 100),
        layout=replace(case.layout, n_layers=min(case.layout.n_layers, 2)),
    )


REHEARSED = (
    *(c for c in cases.CASES if not c.group.startswith("whole")),
    *(c for c in cases.CASES if c.name.startswith(("e2e_decode_steady", "prefill_chunk_at_4096", "small", "swa"))),
    cases.SIZES[0],
    cases.SIZES[-1],
)


@pytest.mark.parametrize("case", REHEARSED, ids=lambda c: c.name)
def test_a_case_runs_through(case: cases.Case, place: HostPlace) -> None:
    found: list[runner.Measurement] = []
    runner.run_case(tiny(case), place, NoTimer(), 4.5, runner.Options(), found.append)
    assert {m.key for m in found} == {
        *(cases.key(case, m) for m in case.measures),
        *(baselines.baseline_key(case, name) for name in case.baselines),
    }
    assert all(m.line() for m in found)


def test_a_wrong_stamp_or_digest_ends_the_case(place: HostPlace) -> None:
    made = rig.Rig(tiny(BY_NAME["e2e_decode_steady/all"]), place)
    checks.check(made)
    row, position = 0, made.case.prefix - 1  # always among the sampled
    address = made.stamp_address("tail", 1, int(made.slots[row, position]))
    made.flip(address, 1)
    with pytest.raises(checks.CheckFailed, match=f"tail stamp of row 0 position {position} half 1"):
        checks.check_stamps(made)
    made.flip(address, 1)
    checks.check_stamps(made)
    made._backend._arrays[0]["digests"][1] ^= np.uint64(1)
    with pytest.raises(checks.CheckFailed, match="digest 1 of slot"):
        checks.check_digests(made)
    made.close()


def test_a_guard_that_sees_nothing_ends_the_case(place: HostPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    made = rig.Rig(tiny(BY_NAME["verify_data/nhd256/pages"]), place)
    monkeypatch.setattr(rig.Rig, "flip", lambda self, address, mask: None)  # no damage, so nothing to see
    with pytest.raises(checks.CheckFailed, match="reported 0 violations: nothing"):
        checks.check_data_fault(made)
    made.close()


def test_the_twin_of_the_host_bench_tells_what_the_guard_takes() -> None:
    """It stands for a whole driver: it must have what the backend asks of one."""
    found = import_module("bench.host_twin").memory()
    assert len(found) == 6
    assert {round(row["guard_bytes_per_slot"]) for row in found if "8B" in row["pool"]} == {648, 136}


@pytest.mark.skipif(not why_no_gpu(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_what_is_missing() -> None:
    with pytest.raises(SystemExit, match=r"measures on a GPU: .*(NVIDIA driver|pip install)"):
        program.measure(program.parse([]))
