"""Finding, hashing and compiling kernel sources; a toy kernel that calls every helper of device.cuh."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcanary.backends import compile as kc
from kvcanary.errors import BackendError

ARCHES = ("sm_80", "sm_90", "sm_100", "sm_120")
TOY = """
#include "device.cuh"

struct Toy { uint64_t* words; uint32_t* small; };

KVC_KERNEL(64) kvc_toy_indices(KVC_PARAM Toy p) {
    const uint32_t at = kvc_block_y() * kvc_n_blocks() + kvc_block();
    p.small[at * 64 + kvc_thread()] = kvc_n_blocks_y() + kvc_lane() + kvc_warp_in_block();
}

// KVC_KERNEL(1) kvc_toy_commented_out(KVC_PARAM Toy p) {}
KVC_KERNEL(64) kvc_toy_collectives(KVC_PARAM Toy p) {
    KVC_SHARED uint64_t shared[2];
    uint64_t v = p.words[kvc_lane()];
    const uint32_t mask = kvc_ballot(v > 3) | 1u;
    v += kvc_shfl_u32((uint32_t)v, 5) + kvc_shfl_u64(v, kvc_lowest_bit(mask)) + kvc_popcount(mask & KVC_FULL_WARP);
    v += kvc_leading_zeros(mask) + (uint32_t)kvc_divide_roughly((float)v, 2.0f) + kvc_sync_block_or(v > 9);
    v += kvc_shfl_up_u32((uint32_t)v, 1) + kvc_shfl_up_u64(v, 2) + kvc_shfl_xor_u64(v, 16);
    kvc_sync_warp();
    if (kvc_lane() == 0) shared[kvc_warp_in_block()] = v;
    kvc_sync_block();
    p.words[kvc_lane()] = shared[0] + shared[1];
}

KVC_KERNEL(64) kvc_toy_memory(KVC_PARAM Toy p) {
    kvc_u128 wide = kvc_load_once_u128(p.words);
    wide.x += kvc_load_u128_if(p.words, kvc_load_u32_if(p.small, wide.y > 7) > 3).x;
    kvc_prefetch(p.words);
    wide.y += (uint32_t)kvc_load_u64_if(p.words, wide.x > 7);
    uint64_t v = kvc_load_once_u64(p.words + 2) + kvc_load_once_u32(p.small) + kvc_load_once_u16(p.small + 1);
    v += kvc_load_once_u8(p.small + 2) + kvc_load_volatile_u64(p.words + 3) + kvc_load_volatile_u32(p.small + 3);
    kvc_store_u128(p.words + 4, wide);
    kvc_fence_system();
    kvc_store_volatile_u64(p.words + 6, v);
    kvc_store_volatile_u32(p.small + 4, (uint32_t)v);
    v = kvc_atomic_add_u64(p.words + 7, v) + kvc_atomic_max_u64(p.words + 8, v) + kvc_atomic_cas_u64(p.words + 9, 0, v);
    p.words[10] = v + kvc_atomic_add_u32(p.small + 5, 1) + kvc_atomic_or_u32(p.small + 6, 2);
}
"""
TOY_NAMES = ("kvc_toy_indices", "kvc_toy_collectives", "kvc_toy_memory")


@pytest.fixture
def nvrtc() -> None:
    """Skips where the compiler is not installed."""
    reason = 'NVRTC missing: pip install "kvcanary[dev]"'
    bindings = pytest.importorskip("cuda.bindings.nvrtc", reason=reason)
    try:
        bindings.nvrtcVersion()
    except RuntimeError:  # the bindings are there, the library is not
        pytest.skip(reason)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.cu"
    path.write_text(TOY)
    return path


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty package directory in place of kvcanary's; its parent is empty too."""
    package = tmp_path / "site" / "kvcanary"
    package.mkdir(parents=True)
    monkeypatch.setattr(kc, "_PACKAGE", package)
    yield package
    kc._compile_cached.cache_clear()


def write_one_kernel(package: Path, body: str) -> None:
    place = package / "_kernels"
    place.mkdir(exist_ok=True)
    (place / "device.cuh").write_text('#define KVC_KERNEL(n) extern "C" __global__ void\n')
    (place / "one.cu").write_text(f'#include "device.cuh"\nKVC_KERNEL(32) kvc_one(int* p) {{ {body} }}\n')


# ---- where the sources are -------------------------------------------------------------------------------------------
def test_sources_of_this_installation_are_found() -> None:
    assert (kc.kernels_dir() / "abi.cuh").is_file()
    assert kc.kernels_dir().name in ("_kernels", "kernels")


def test_sources_inside_the_package_come_first(installation: Path) -> None:
    for place in (installation.parent / "kernels", installation / "_kernels"):
        place.mkdir()
        (place / "device.cuh").touch()
        assert kc.kernels_dir() == place


def test_missing_sources_are_named_with_the_next_step(installation: Path) -> None:
    (installation / "_kernels").mkdir()
    with pytest.raises(BackendError, match=r"no device\.cuh in .*_kernels nor in .*kernels: .*pip install"):
        kc.kernels_dir()


def test_no_kernel_file_is_an_error(installation: Path) -> None:
    (installation / "_kernels").mkdir()
    (installation / "_kernels" / "device.cuh").touch()
    with pytest.raises(BackendError, match=r"no \*\.cu in"):
        kc.kernel_sources()


def test_source_hash_sees_every_edit(installation: Path) -> None:
    place = installation / "_kernels"
    place.mkdir()
    seen = set()
    for name, text in (("device.cuh", ""), ("a.cu", "x"), ("a.cu", "y"), ("b.cuh", "x"), ("device.cuh", "z")):
        (place / name).write_text(text)
        seen.add(kc.source_hash())
    assert len(seen) == 5
    before = kc.source_hash()
    (place / "notes.txt").write_text("not a source")
    assert kc.source_hash() == before
    (place / "a.cu").rename(place / "c.cu")
    assert kc.source_hash() != before


def test_kernel_names_in_the_order_of_the_source() -> None:
    assert kc.kernel_names(TOY) == TOY_NAMES
    assert kc.kernel_names("KVC_KERNEL(A /* , */) kvc_a(int x) {} /* KVC_KERNEL(A) kvc_b() {} */") == ("kvc_a",)


# ---- the compiler ----------------------------------------------------------------------------------------------------
def test_missing_compiler_names_the_install_command(monkeypatch: pytest.MonkeyPatch, toy: Path) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(BackendError, match=r'NVRTC is missing; install it with pip install "kvcanary\[cuda13\]"'):
        kc.compile_file(toy, "sm_90")


def test_toy_calls_every_helper() -> None:
    helpers = re.findall(r"^KVC_DEVICE .*?\b(kvc_\w+)\(", (kc.kernels_dir() / "device.cuh").read_text(), re.MULTILINE)
    assert len(helpers) > 20
    assert [name for name in helpers if not re.search(rf"{name}[(<]", TOY)] == []


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", ARCHES)
def test_every_helper_compiles(toy: Path, arch: str) -> None:
    compiled = kc.compile_file(toy, arch)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert "warning" not in compiled.log
    usage = compiled.usage()
    assert sorted(use.name for use in usage) == sorted(TOY_NAMES)
    assert all(use.registers > 0 and use.spill_bytes == 0 for use in usage)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", kc.kernel_sources())
def test_kernel_files_compile(name: str) -> None:
    compiled = kc.compile_file(kc.kernels_dir() / name, "sm_90")
    names = kc.kernel_names((kc.kernels_dir() / name).read_text())
    assert names
    assert sorted(use.name for use in compiled.usage()) == sorted(names)
    assert "warning" not in compiled.log


@pytest.mark.usefixtures("nvrtc")
def test_error_carries_the_compiler_log(tmp_path: Path) -> None:
    path = tmp_path / "broken.cu"
    path.write_text('#include "device.cuh"\nKVC_KERNEL(32) kvc_broken(KVC_PARAM int n) { undeclared = n; }\n')
    with pytest.raises(BackendError, match=r"(?s)broken\.cu does not compile for sm_90 .*undeclared"):
        kc.compile_file(path, "sm_90")


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("arch", ["sm_20", "90", "compute_90", "sm_90; rm"])
def test_unknown_arch_lists_the_known_ones(toy: Path, arch: str) -> None:
    with pytest.raises(BackendError, match=re.escape(repr(arch)) + r".*sm_80, .*sm_90"):
        kc.compile_file(toy, arch)


@pytest.mark.usefixtures("nvrtc")
def test_missing_file_lists_the_present_ones() -> None:
    with pytest.raises(BackendError, match=f"no_such.cu cannot be read .*{kc.kernel_sources()[0]}"):
        kc.compile_cubin("no_such.cu", "sm_90")


@pytest.mark.usefixtures("nvrtc")
def test_compiled_once_until_a_source_changes(installation: Path) -> None:
    write_one_kernel(installation, "*p = 1;")
    first = kc.compile_cubin("one.cu", "sm_90")
    assert kc.compile_cubin("one.cu", "sm_90") is first
    write_one_kernel(installation, "*p = 2;")
    assert kc.compile_cubin("one.cu", "sm_90") != first


@pytest.mark.usefixtures("nvrtc")
def test_command_line(installation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_one_kernel(installation, "*p = 1;")
    assert kc.main(["sm_80", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"one\.cu  sm_80  \d+ bytes\n  kvc_one  \d+ registers, 0 bytes spilled\none\.cu  sm_90", out)
    assert kc.main(["sm_1"]) == 1
    assert "arch 'sm_1'" in capsys.readouterr().err
