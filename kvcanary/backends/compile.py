"""Kernel sources to cubins through NVRTC: needs no GPU and no driver, and knows nothing of what the kernels do.

``python -m kvcanary.backends.compile sm_80 sm_90`` compiles every kernel file and prints size, registers and spills.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvcanary.errors import BackendError

INSTALL = 'pip install "kvcanary[cuda13]" (CUDA 13) or "kvcanary[cuda12]" (CUDA 12); in a checkout -e ".[cuda13]"'
_PACKAGE = Path(__file__).resolve().parents[1]
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_KERNEL = re.compile(r"\bKVC_KERNEL\s*\([^()]*\)\s*(kvc_\w+)\s*\(")
_ARCH = re.compile(r"sm_(\d+)[af]?")
_PTXAS = re.compile(
    r"Compiling entry function '(\w+)'.*?Function properties for \1\b"
    r".*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@dataclass(frozen=True)
class KernelUsage:
    """What one kernel takes of a multiprocessor; spill_bytes counts stores and loads."""

    name: str
    registers: int
    spill_bytes: int


@dataclass(frozen=True)
class Compiled:
    """A cubin and the compiler's log: warnings, and ptxas's account of each kernel."""

    cubin: bytes
    log: str

    def usage(self) -> list[KernelUsage]:
        """The kernels that the log accounts for; empty when the compiler gave no account."""
        found = _PTXAS.findall(self.log)
        return [KernelUsage(name, int(regs), int(stored) + int(loaded)) for name, stored, loaded, regs in found]


def kernels_dir() -> Path:
    """Where the kernel sources are: ``kvcanary/_kernels`` (wheel), else ``kernels`` beside the package (checkout).

    Raises:
        BackendError: in neither place.
    """
    places = (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels")
    for place in places:
        if (place / "device.cuh").is_file():
            return place
    raise BackendError(
        f"no device.cuh in {places[0]} nor in {places[1]}: the installation is incomplete; reinstall with "
        "pip install --force-reinstall kvcanary, or from a checkout with pip install -e ."
    )


def kernel_sources() -> list[str]:
    """The names of the kernel files, sorted."""
    names = sorted(path.name for path in kernels_dir().glob("*.cu"))
    if not names:
        raise BackendError(f"no *.cu in {kernels_dir()}: the installation is incomplete; reinstall kvcanary")
    return names


def source_hash() -> str:
    """SHA-256 over the names and bytes of all kernel files and headers: the key of whatever caches compiled kernels."""
    digest = hashlib.sha256()
    for path in sorted(p for p in kernels_dir().iterdir() if p.suffix in (".cu", ".cuh")):
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def kernel_names(source: str) -> tuple[str, ...]:
    """The kernels that a source text defines with ``KVC_KERNEL(threads) name(``, in its order."""
    return tuple(_KERNEL.findall(_COMMENT.sub("", source)))


def compile_cubin(source_name: str, arch: str) -> bytes:
    """The cubin of one kernel file, compiled once per process, arch and state of the sources.

    Args:
        source_name: a file of `kernels_dir`, such as "stamps.cu".
        arch: "sm_90" and the like.

    Raises:
        BackendError: NVRTC is missing, it does not know the arch, or the source does not compile (with its log).
    """
    return _compile_cached(source_name, arch, source_hash())


@lru_cache(maxsize=64)
def _compile_cached(source_name: str, arch: str, _sources: str) -> bytes:
    return compile_file(kernels_dir() / source_name, arch).cubin


def compile_file(path: Path, arch: str) -> Compiled:
    """Compile one file, wherever it is, with `kernels_dir` as its include path; raises like `compile_cubin`."""
    nvrtc = _import_nvrtc()
    _check_arch(nvrtc, arch)
    try:
        source = path.read_bytes()
    except OSError as error:
        names = ", ".join(kernel_sources())
        raise BackendError(f"{path} cannot be read ({error.strerror}); the kernel files are {names}") from error
    options = ["-std=c++17", f"-I{kernels_dir()}", f"-arch={arch}", "--ptxas-options=-v"]
    program = _ok(nvrtc, nvrtc.nvrtcCreateProgram(source, path.name.encode(), 0, None, None))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        text = bytearray(_ok(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
        _ok(nvrtc, nvrtc.nvrtcGetProgramLog(program, text))
        log = text.decode(errors="replace").strip("\0\n ")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(f"{path.name} does not compile for {arch} ({status.name}); the compiler says:\n{log}")
        cubin = bytearray(_ok(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _ok(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return Compiled(bytes(cubin), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _import_nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library, which is a package of its own
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"the kernel compiler NVRTC is missing; install it with {INSTALL}: {error}") from error
    return nvrtc


def _check_arch(nvrtc: Any, arch: str) -> None:
    known = _ok(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    match = _ARCH.fullmatch(arch)
    if match is None or int(match[1]) not in known:
        version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
        raise BackendError(
            f"arch {arch!r}: NVRTC {version} compiles for {', '.join(f'sm_{n}' for n in known)}; "
            "a newer GPU needs a newer NVRTC (pip install -U nvidia-cuda-nvrtc)"
        )


def _ok(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    """The value that an NVRTC call returned behind its status, None if it returns none."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed with {status.name}; check the installation with kvcanary doctor")
    return values[0] if values else None


def main(argv: Sequence[str] | None = None) -> int:
    """Compile every kernel file for each arch and print what came out; 1 when something does not compile."""
    parser = argparse.ArgumentParser(prog="python -m kvcanary.backends.compile", description=main.__doc__)
    parser.add_argument("arch", nargs="+", help="such as sm_80 sm_90 sm_100 sm_120")
    arguments = parser.parse_args(argv)
    try:
        for name in kernel_sources():
            for arch in arguments.arch:
                compiled = compile_file(kernels_dir() / name, arch)
                print(f"{name}  {arch}  {len(compiled.cubin)} bytes")
                for use in compiled.usage():
                    print(f"  {use.name}  {use.registers} registers, {use.spill_bytes} bytes spilled")
    except BackendError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
