"""The self-test passes on the real kernels (run on the CPU), and notices each kernel that does not do its work."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from simt.build import build, find_compiler
from simt.driver import SimtDriver
from simt.runner import SimtLibrary

from kvcanary.backends.compile import kernels_dir
from kvcanary.backends.device import DeviceBackend
from kvcanary.backends.launches import KERNELS
from kvcanary.cli import selftest
from kvcanary.cli.script import Script
from kvcanary.cli.selftest import HOST, Device, host_self_test, self_test

NAMES = [kernel for names in KERNELS.values() for kernel in names]
needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler: install g++ or clang++")


class LazyDriver(SimtDriver):
    """Launches all kernels but one."""

    def __init__(self, library: SimtLibrary, left_out: str | None) -> None:
        super().__init__(library, n_multiprocessors=2)
        self._left_out = left_out

    def launch(self, kernel: str, grid: tuple[int, int], params: Any, stream: Any) -> None:
        if kernel != self._left_out:
            super().launch(kernel, grid, params, stream)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SimtLibrary:
    return SimtLibrary(build(Path(kernels_dir()), tmp_path_factory.getbasetemp() / "kvcanary-kernels"))


def backend_without(library: SimtLibrary, left_out: str | None) -> Callable[..., DeviceBackend]:
    return lambda *arguments: DeviceBackend("simt", LazyDriver(library, left_out), *arguments)


def test_the_host_backend_passes() -> None:
    assert host_self_test() == ""


def test_the_host_backend_passes_without_asserts() -> None:
    code = "from kvcanary.cli.selftest import host_self_test; print(repr(host_self_test()))"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "''", "an assert did some of the work"


def test_a_deaf_host_backend_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selftest,
        "_config",
        lambda on_unwritten: selftest.CanaryConfig(real_data="none", lifecycle=True, check_reserved_every=1),
    )
    assert host_self_test() == "it does not report DATA"


def test_a_host_backend_that_cries_wolf_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "Script", lambda is_damaged: Script(is_damaged=True))
    assert host_self_test().endswith("where nothing is wrong")


@needs_compiler
def test_the_kernels_pass(library: SimtLibrary) -> None:
    recorded = []

    def record(launch: Callable[[Any], None]) -> Callable[[], None]:
        recorded.append(launch)
        return partial(launch, None)

    ways = {"eager": HOST, "captured": Device(HOST.to_device, HOST.to_host, HOST.assign, record)}
    checks = self_test(backend_without(library, None), ways)
    assert [check.kernel for check in checks] == NAMES
    assert {check.problem for check in checks} == {""}
    assert all(check.n_values > 0 for check in checks)
    assert len(recorded) == 6  # HEAD, a layer and TAIL, over a reporting and an adopting guard


@needs_compiler
@pytest.mark.parametrize("left_out", NAMES)
def test_a_kernel_that_does_nothing_is_named(library: SimtLibrary, left_out: str) -> None:
    problems = {check.kernel: check.problem for check in self_test(backend_without(library, left_out), {"eager": HOST})}
    assert problems[left_out]
    assert problems[left_out].endswith("(eager)")


class ForgetfulDriver(SimtDriver):
    """Loses the list of slots that fall due before it is read."""

    def launch(self, kernel: str, grid: tuple[int, int], params: Any, stream: Any) -> None:
        if kernel == "kvc_digests_verify" and (due := int(params.record["pool"]["due"])):
            ctypes.c_uint32.from_address(due).value = 0
        super().launch(kernel, grid, params, stream)


@needs_compiler
def test_a_list_that_is_lost_is_told(library: SimtLibrary) -> None:
    def backend(*arguments: Any) -> DeviceBackend:
        return DeviceBackend("simt", ForgetfulDriver(library), *arguments)

    problems = {check.kernel: check.problem for check in self_test(backend, {"eager": HOST}) if check.problem}
    assert list(problems) == ["kvc_digests_verify"]
    assert problems["kvc_digests_verify"].startswith("listed slots compared: ")
