"""The CPU runtime of the kernels: each helper, each refusal, and what the seed decides."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from .build import DEVICE_DIR, BuildError, build, find_compiler, sanitizer_environment
from .runner import SimtError, SimtLibrary

HERE = Path(__file__).resolve().parent
TOY = HERE / "toy"
COLLECTIVES = np.dtype([("in", "u8"), ("out", "u8"), ("n", "u8"), ("mode", "u8")])
MEMORY = np.dtype([("in", "u8"), ("out", "u8"), ("n", "u4")], align=True)
SEEDS = range(5)
NOTHING = np.zeros(1, "u8")

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: install g++ or clang++")


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("simt")


@pytest.fixture(scope="module")
def toy(out_dir):
    return SimtLibrary(build(TOY, out_dir))


def collectives(source=NOTHING, out=NOTHING, n=0, mode=0):
    return np.array((source.ctypes.data, out.ctypes.data, n, mode), COLLECTIVES)


def memory(source=NOTHING, out=NOTHING, n=0):
    return np.array((source.ctypes.data, out.ctypes.data, n), MEMORY)


def check_sums(library):
    values = np.random.default_rng(1).integers(0, 1 << 40, 5000, "u8")
    for seed in SEEDS:
        partial = np.zeros(3, "u8")
        library.launch("kvc_toy_block_sum", 3, 256, collectives(values, partial, n=values.size), seed)
        assert partial.sum() == values.sum()
        tree = np.zeros(1, "u8")
        library.launch("kvc_toy_tree_sum", 1, 256, collectives(values, tree), seed)
        assert tree[0] == values[:256].sum()


def tickets(library, grid, seed):
    n_x, n_y = grid
    counter, out = np.zeros(1, "u8"), np.full((n_y, n_x, 256), 1 << 63, "u8")
    library.launch("kvc_toy_ticket", grid, 256, memory(counter, out), seed)
    return out


def test_the_library_lists_its_kernels(toy):
    assert "kvc_toy_block_sum" in toy.kernels
    assert toy.kernels == sorted(toy.kernels)
    assert toy.info["kvc_toy_warp_ops"] == (32, 32)
    assert toy.info["kvc_toy_ticket"] == (256, 24)


def test_block_reductions(toy):
    check_sums(toy)


def test_ucontext_switch(out_dir):
    check_sums(SimtLibrary(build(TOY, out_dir, defines=("KVC_SIMT_UCONTEXT",))))


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_helpers(toy, seed):
    lane = np.arange(32)
    wide = np.random.default_rng(2).integers(0, 1 << 64, 32, "u8")
    wide[4] = 1 << 63  # no low bits
    narrow = wide & 0xFFFFFFFF
    out = np.zeros((32, 12), "u8")
    toy.launch("kvc_toy_warp_ops", 1, 32, collectives(wide, out), seed)

    ballot = sum(1 << i for i in range(32) if int(wide[i]) % 2)
    expected = [
        np.full(32, ballot),
        narrow[(lane + 1) % 32],
        wide[::-1],
        np.where(lane < 3, narrow, np.roll(narrow, 3)),
        np.where(lane < 1, wide, np.roll(wide, 1)),
        wide[lane ^ 5],
        [int(v).bit_count() for v in narrow],
        [f"{int(v) | 1 << 31:032b}"[::-1].index("1") for v in narrow],
        narrow,
        wide[lane & 3],
        lane,
        np.zeros(32),
    ]
    for column, values in enumerate(expected):
        np.testing.assert_array_equal(out[:, column], np.asarray(values).astype("u8"), err_msg=f"column {column}")


@pytest.mark.parametrize("seed", SEEDS)
def test_warps_of_a_block_may_differ_in_trip_count(toy, seed):
    out = np.zeros(8, "u8")
    toy.launch("kvc_toy_trip_counts", 1, 256, collectives(out=out), seed)
    assert out.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_loads_and_stores(toy):
    source = aligned(np.array([0x8877665544332211, 0x0123456789ABCDEF], "u8"))
    out = aligned(np.zeros(10, "u8"))
    toy.launch("kvc_toy_copy", 1, 1, memory(source, out))
    expected = [0x8877665544332211, 0x88776655, 0x4433, 0x22, 0x8877665544332211, 0x44332211, *source.tolist(), 8, 9]
    assert out.tolist() == expected


def aligned(values):
    room = np.zeros(values.size + 2, values.dtype)
    start = -room.ctypes.data % 16 // values.itemsize
    room[start : start + values.size] = values
    return room[start : start + values.size]


def test_atomics(toy):
    out = np.zeros(4, "u8")
    toy.launch("kvc_toy_atomics", (3, 2), 256, memory(out=out), seed=4)
    assert out.tolist() == [1536, 1535, 1536, 0xFFFF]


def test_compare_and_swap_loses_races_and_recovers(toy):
    n_failed = 0
    for seed in SEEDS:
        out = np.zeros(2, "u8")
        toy.launch("kvc_toy_cas_sum", 2, 256, memory(out=out), seed)
        assert out[0] == 512 * 511 // 2
        n_failed += int(out[1])
    assert n_failed > 0


def test_every_thread_of_a_two_dimensional_grid_runs_once(toy):
    drawn = tickets(toy, (5, 3), seed=0)
    assert sorted(drawn.ravel().tolist()) == list(range(5 * 3 * 256))


def test_one_seed_is_one_order(toy):
    np.testing.assert_array_equal(tickets(toy, (4, 2), seed=7), tickets(toy, (4, 2), seed=7))


def test_seed_permutes_blocks_and_lanes(toy):
    drawn = [tickets(toy, (8, 1), seed) for seed in SEEDS]
    assert len({tuple(d.min(axis=-1).ravel().tolist()) for d in drawn}) > 1
    assert len({tuple(np.argsort(d[0, 0]).tolist()) for d in drawn}) == len(drawn)


def test_shared_memory_starts_as_junk_of_the_seed(toy):
    seen = set()
    for seed in SEEDS:
        out = np.zeros(32, "u8")
        toy.launch("kvc_toy_unwritten_shared", 1, 32, collectives(out=out), seed)
        assert out.all()
        seen.add(int(out[0]))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("mode", "block", "text"),
    [
        (0, 64, "divergent collective: lanes 0xffff0000 exited, lanes 0x0000ffff at ballot"),
        (1, 64, "divergent collective: lanes 0xffff0000 at sync_warp, lanes 0x0000ffff at ballot"),
        (2, 64, "divergent collective: lanes 0xffff0000 at sync_block, lanes 0x0000ffff at ballot"),
        (10, 40, "divergent collective: lanes 0x000000ff at ballot; the warp has only 8 threads"),
        (3, 64, "barrier divergence: 32 of 64 threads wait at sync_block"),
        (4, 64, "barrier divergence: 32 of 64 threads wait at sync_block"),
        (5, 64, "load of 8 bytes at misaligned address"),
        (6, 64, "lowest set bit of 0"),
        (8, 64, "atomic or volatile access of 8 bytes at misaligned address"),
        (9, 64, "spins without progress"),
    ],
)
def test_misuse_ends_the_launch_and_the_next_one_runs(toy, mode, block, text):
    out = np.zeros(2, "u8")
    with pytest.raises(SimtError, match=r"kvc_toy_misuse, block \(0, 0\).*" + text):
        toy.launch("kvc_toy_misuse", 1, block, collectives(out, out, mode=mode))
    check_sums(toy)


def test_shuffle_past_the_warp(toy):
    with pytest.raises(SimtError, match="shuffle up by 32 lanes, allowed 0 to 31"):
        toy.launch("kvc_toy_misuse", 1, 32, collectives(n=32, mode=7))


@pytest.mark.parametrize(
    ("name", "grid", "block", "params", "text"),
    [
        ("kvc_toy_missing", 1, 32, collectives(), "unknown kernel"),
        ("kvc_toy_spend", 1, 32, memory(), "params of 24 bytes, the kernel takes 32"),
        ("kvc_toy_spend", 1, 257, collectives(), "block of 257 threads, allowed 1 to 256"),
        ("kvc_toy_spend", 1, 0, collectives(), "block of 0 threads"),
        ("kvc_toy_spend", (0, 1), 32, collectives(), "grid of 0 x 1 blocks"),
        ("kvc_toy_spend", (1, 65536), 32, collectives(), "grid of 1 x 65536 blocks"),
    ],
)
def test_launches_that_the_device_would_refuse(toy, name, grid, block, params, text):
    with pytest.raises(SimtError, match=text):
        toy.launch(name, grid, block, params)


def test_an_equal_build_is_reused_and_a_changed_source_is_not(tmp_path):
    source = tmp_path / "one.cu"
    text = '#include "device.cuh"\nstruct P { uint64_t out; };\n'
    text += "KVC_KERNEL(32) kvc_one(\n    KVC_PARAM P p) { *(uint64_t*)p.out = 1; }\n// KVC_KERNEL in a comment\n"
    source.write_text(text)
    first = build(tmp_path, tmp_path / "out")
    made = first.stat().st_mtime_ns
    assert build(tmp_path, tmp_path / "out") == first
    assert first.stat().st_mtime_ns == made
    source.write_text(text.replace("= 1", "= 2"))
    assert build(tmp_path, tmp_path / "out") != first


def test_build_errors_say_why(tmp_path):
    with pytest.raises(BuildError, match=r"no \*\.cu in"):
        build(tmp_path, tmp_path / "out")
    (tmp_path / "odd.cu").write_text('#include "device.cuh"\nKVC_KERNEL(32) kvc_odd(int a, int b) {}\n')
    with pytest.raises(BuildError, match=r"odd\.cu: 0 of its KVC_KERNEL have the form"):
        build(tmp_path, tmp_path / "out")
    (tmp_path / "odd.cu").write_text("not C++\n")
    with pytest.raises(BuildError, match="error"):
        build(tmp_path, tmp_path / "out")


@pytest.mark.skipif(not any(DEVICE_DIR.glob("*.cu")), reason=f"no *.cu in {DEVICE_DIR.name}/ yet")
def test_the_project_kernels_compile(out_dir):
    names = SimtLibrary(build(DEVICE_DIR, out_dir)).kernels
    assert names
    assert all(name.startswith("kvc_") for name in names)


SANITIZED_RUN = textwrap.dedent("""
    import sys
    import numpy as np
    from runner import SimtError, SimtLibrary
    library = SimtLibrary(sys.argv[1])
    buffer, values = np.zeros(4096, "u1"), np.arange(256, dtype="u8")
    def run(name, n, fields, block=256, mode=0):
        dtype = [("in", "u8"), ("out", "u8"), ("n", "u4"), ("mode", "u8")][:fields]
        params = np.array((values.ctypes.data, buffer.ctypes.data, n, mode)[:fields], np.dtype(dtype, align=True))
        library.launch(name, 2, block, params, seed=3)
    for misuse in (1, 3, 5):
        try:
            run("kvc_toy_misuse", 0, 4, 64, misuse)
        except SimtError as error:
            print("refused:", error)
        run("kvc_toy_tree_sum", 0, 4)
        assert buffer.view("u8")[0] == values.sum()
    run(sys.argv[2], int(sys.argv[3]), 3)
    print("survived")
""")


@pytest.fixture(scope="module")
def run_sanitized(out_dir):
    environment = sanitizer_environment()
    if environment is None:
        pytest.skip("no libasan: install the compiler's address sanitizer runtime")
    library = build(TOY, out_dir, sanitize=True)

    def run(kernel, n):
        command = [sys.executable, "-c", SANITIZED_RUN, str(library), kernel, str(n)]
        env = {**os.environ, **environment, "PYTHONPATH": str(HERE)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return run


def test_sanitizers_accept_fibres_and_abandoned_launches(run_sanitized):
    done = run_sanitized("kvc_toy_fill", 4096)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused:") == 3
    assert "survived" in done.stdout


@pytest.mark.parametrize(
    ("kernel", "n", "text"),
    [
        ("kvc_toy_fill", 4097, "heap-buffer-overflow"),
        ("kvc_toy_shared_index", 256, "out of bounds"),
    ],
)
def test_sanitizers_see_a_write_past_the_end(run_sanitized, kernel, n, text):
    done = run_sanitized(kernel, n)
    assert done.returncode != 0
    assert "survived" not in done.stdout
    assert text in done.stderr
