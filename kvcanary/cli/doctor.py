"""`kvcanary doctor`: what works on this machine, what is missing, and the command that installs it."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import kvcanary
from kvcanary.backends.compile import INSTALL, compile_file, kernel_sources, kernels_dir
from kvcanary.cli import child
from kvcanary.cli.outputs import check_output, write_output
from kvcanary.cli.selftest import host_self_test
from kvcanary.errors import BackendError

DEFAULT_ARCH = "sm_90"  # to compile for where there is no GPU
OLDEST_DRIVER = 12000  # CUDA 12.0
DRIVER_TIMEOUT_S, KERNELS_TIMEOUT_S = 60, 300
GET_DRIVER = "install your distribution's NVIDIA driver (Ubuntu: sudo ubuntu-drivers install), then try nvidia-smi"
REINSTALL = "pip install --force-reinstall kvcanary"
PACKAGES = (("CuPy", "cupy"), ("cuda.core", "cuda.core"), ("cuda.bindings", "cuda.bindings"))


class Status(str, Enum):
    """How a check ended; only FAILED makes the exit code 1."""

    OK = "ok"
    MISSING = "missing"  # not there, and the host backend needs it not
    FAILED = "failed"  # there, and it does not work
    SKIPPED = "skipped"  # cannot be tried without something that is missing


@dataclass(frozen=True)
class Check:
    """One line of the table; `fix` is the command that mends it."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser("doctor", help="see what works here and what is missing", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the checks to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make every check, print each as it comes, and return 1 if one failed."""
    if arguments.json is not None:
        check_output("--json", arguments.json)
    checks = []
    for check in all_checks():
        checks.append(check)
        print(f"{check.status.value:8}{check.name:22}{check.detail}", flush=True)
        if check.fix:
            print(f"{'':8}{'':22}-> {check.fix}", flush=True)
    print(f"\n{verdict(checks)}")
    ok = all(check.status is not Status.FAILED for check in checks)
    if arguments.json is not None:
        report = {"ok": ok, "checks": [asdict(check) for check in checks]}
        write_output("--json", arguments.json, json.dumps(report, indent=2) + "\n")
    return 0 if ok else 1


def verdict(checks: Iterable[Check]) -> str:
    """The table in a sentence or two."""
    failed = [check.name for check in checks if check.status is Status.FAILED]
    if failed:
        return f"Something does not work: {', '.join(failed)}."
    missing: dict[str, list[str]] = {}
    for check in checks:
        if check.status is Status.MISSING:
            missing.setdefault(check.fix, []).append(check.name)
    if not missing:
        return "Everything works, on the host and on the GPU."
    lines = [f"  {', '.join(names)}: {fix}" for fix, names in missing.items()]
    return "\n".join(["The guard works on the host (NumPy). To run it on a GPU, this is missing:", *lines])


def all_checks() -> Iterator[Check]:
    """Every check, in the order in which they depend on each other; none raises, none hangs."""
    yield Check("kvcanary", Status.OK, kvcanary.__version__)
    yield Check("Python", Status.OK, f"{platform.python_version()}, {platform.machine()}")
    yield Check("NumPy", Status.OK, np.__version__)
    yield attempt("kernel sources", check_sources, REINSTALL)
    yield attempt("host backend", check_host, REINSTALL)
    facts = driver_facts()
    gpu = facts["gpus"][0] if facts["gpus"] else None
    yield check_driver(facts)
    yield check_gpu(facts)
    install = install_command(facts["version"])
    packages = [check_package(name, module, install) for name, module in PACKAGES]
    yield from packages
    nvrtc = check_nvrtc(install)
    yield nvrtc
    arch = DEFAULT_ARCH if gpu is None else f"sm_{gpu['capability'][0]}{gpu['capability'][1]}"
    yield from check_compile(arch, nvrtc)
    lacking = [c.name for c in (*packages, nvrtc) if c.status is not Status.OK]
    yield from check_kernels([*([] if gpu else ["a GPU"]), *lacking], install)


def attempt(name: str, check: Callable[[], str], fix: str = "") -> Check:
    """A check that returns its detail, or raises the reason why it failed."""
    try:
        return Check(name, Status.OK, check())
    except BackendError as error:
        return Check(name, Status.FAILED, str(error), fix)
    except Exception as error:  # noqa: BLE001  a doctor reports what it finds, whatever it is
        return Check(name, Status.FAILED, f"{type(error).__name__}: {error}", fix)


# ---- what the host backend needs -------------------------------------------------------------------------------------
def check_sources() -> str:
    return f"{', '.join(kernel_sources())} in {kernels_dir()}"


def check_host() -> str:
    problem = host_self_test()
    if problem:
        raise BackendError(f"self-test: {problem}")
    return "self-test passed: silent over sound KV, names every damage"


# ---- the GPU ---------------------------------------------------------------------------------------------------------
def driver_facts() -> dict[str, Any]:
    """As `child.driver`; a driver that does not answer has the status -1."""
    try:
        facts: dict[str, Any] = child.ask("driver", DRIVER_TIMEOUT_S)
    except BackendError as error:
        return {"status": -1, "text": str(error), "version": 0, "gpus": []}
    return facts


def check_driver(facts: dict[str, Any]) -> Check:
    """The driver library, and the CUDA version that it supports."""
    version = _version(facts["version"])
    if facts["status"] in (None, child.STUB):
        return Check("NVIDIA driver", Status.MISSING, f"none: {facts['text']}", GET_DRIVER)
    if facts["status"] == child.NO_GPU:
        return Check("NVIDIA driver", Status.OK, f"CUDA {version}")
    if facts["status"] != 0:
        detail = f"CUDA error {facts['status']}: {facts['text']}" if facts["status"] > 0 else facts["text"]
        return Check("NVIDIA driver", Status.FAILED, detail, GET_DRIVER)
    if facts["version"] < OLDEST_DRIVER:
        return Check("NVIDIA driver", Status.FAILED, f"CUDA {version}, needed is {_version(OLDEST_DRIVER)}", GET_DRIVER)
    return Check("NVIDIA driver", Status.OK, f"CUDA {version}")


def check_gpu(facts: dict[str, Any]) -> Check:
    """The first GPU, which is the one that is tested."""
    if not facts["gpus"]:
        fix = "run on a machine with an NVIDIA GPU; in a container: docker run --gpus all"
        return Check("GPU", Status.MISSING, "the driver shows none" if facts["version"] else "no driver", fix)
    gpu = facts["gpus"][0]
    more = f", and {len(facts['gpus']) - 1} more" if len(facts["gpus"]) > 1 else ""
    capability = ".".join(map(str, gpu["capability"]))
    memory = f"{gpu['bytes'] / 2**30:.0f} GiB"
    return Check("GPU", Status.OK, f"{gpu['name']}, compute capability {capability}, {memory}{more}")


def install_command(driver_version: int) -> str:
    """The extra that fits the driver; both where there is none."""
    if driver_version >= 13000:
        return 'pip install "kvcanary[cuda13]"'
    return 'pip install "kvcanary[cuda12]"' if driver_version >= OLDEST_DRIVER else INSTALL


def check_package(name: str, module: str, install: str) -> Check:
    """Whether a package can be imported, and its version."""
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        return Check(name, Status.MISSING, str(error), install)
    except Exception as error:  # noqa: BLE001  a package that is only half there raises anything
        return Check(name, Status.FAILED, f"{type(error).__name__}: {error}", install)
    return Check(name, Status.OK, str(getattr(found, "__version__", "version unknown")))


def check_nvrtc(install: str) -> Check:
    """Whether the kernel compiler can be loaded; it needs no driver."""
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")
        _status, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        return Check("NVRTC", Status.MISSING, str(error).splitlines()[0], install)
    return Check("NVRTC", Status.OK, f"{major}.{minor}")


def check_compile(arch: str, nvrtc: Check) -> Iterator[Check]:
    """Every kernel file, compiled for one architecture."""
    if nvrtc.status is not Status.OK:
        yield Check("kernel compilation", Status.SKIPPED, "needs NVRTC")
        return
    for source in kernel_sources():
        yield attempt(f"compile {source}", partial(_compiled, source, arch))


def _compiled(source: str, arch: str) -> str:
    compiled = compile_file(kernels_dir() / source, arch)
    use = compiled.usage()
    spilled = sum(kernel.spill_bytes for kernel in use)
    most = max((kernel.registers for kernel in use), default=0)
    return f"{arch}, {len(use)} kernels, at most {most} registers, {spilled} bytes spilled"


def check_kernels(lacking: list[str], install: str) -> Iterator[Check]:
    """Every kernel on the GPU against the host backend, eager and captured."""
    if lacking:
        yield Check("kernel self-test", Status.SKIPPED, f"needs {', '.join(lacking)}")
        return
    try:
        answers = child.ask("kernels", KERNELS_TIMEOUT_S)
    except BackendError as error:
        yield Check("kernel self-test", Status.FAILED, str(error), install)
        return
    for kernel, n_values, problem in answers:
        detail = problem or f"{n_values} values equal to the host's, eager and captured"
        yield Check(kernel, Status.FAILED if problem else Status.OK, detail)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
