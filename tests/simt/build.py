"""Compile kernel sources for the CPU, together with the runtime that stands in for the device."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEVICE_DIR = HERE.parents[1] / "kernels"  # where device.cuh is

_KERNEL = re.compile(r"\bKVC_KERNEL\(([^(),]+)[^()]*\)\s+(kvc_\w+)\(\s*KVC_PARAM\s+(\w+)\s+\w+\s*\)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_WARNING_FLAGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas")
_BASE_FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", *_WARNING_FLAGS)
_SANITIZE_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class BuildError(Exception):
    """The kernels cannot be compiled for the CPU; the text says why."""


def find_compiler() -> str | None:
    """The path of g++ or, failing that, clang++; None when there is neither."""
    return shutil.which("g++") or shutil.which("clang++")


def sanitizer_environment() -> dict[str, str] | None:
    """What a process needs in its environment to load a sanitized library; None when the runtime is not installed."""
    compiler = find_compiler()
    if compiler is None:
        return None
    found = Path(_output_of([compiler, "-print-file-name=libasan.so"]).strip())
    # The interpreter's own allocations at exit would be reported as leaks.
    return (
        {"LD_PRELOAD": str(found), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
        if found.is_absolute()
        else None
    )


def build(kernels_dir: Path, out_dir: Path, sanitize: bool = False, defines: Iterable[str] = ()) -> Path:
    """The shared library of all `*.cu` in kernels_dir, compiled if no equal one is in out_dir.

    sanitize: with the address and undefined-behaviour sanitizers, see sanitizer_environment.
    defines: extra preprocessor definitions, `NAME` or `NAME=value`.
    Raises BuildError.
    """
    kernels_dir, out_dir = Path(kernels_dir).resolve(), Path(out_dir).resolve()
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler: install g++ or clang++")
    sources = sorted(kernels_dir.glob("*.cu"))
    if not sources:
        raise BuildError(f"no *.cu in {kernels_dir}: name the directory of the kernel sources")
    out_dir.mkdir(parents=True, exist_ok=True)

    include_dirs = dict.fromkeys((kernels_dir, DEVICE_DIR, HERE))
    flags = [*_BASE_FLAGS, *(_SANITIZE_FLAGS if sanitize else ()), "-DKVC_SIMT", *(f"-D{d}" for d in defines)]
    flags += [f"-I{d}" for d in include_dirs]
    headers = sorted(h for d in include_dirs for pattern in ("*.cuh", "*.hpp") for h in d.glob(pattern))
    common = _digest(_output_of([compiler, "--version"]), *flags, *(h.read_text() for h in headers))

    # Kernel sources as C++17, which is what the device compilers are given.
    units = [(s.stem, _table_of(s), s.read_text(), "-std=c++17") for s in sources]
    units += [(s.stem, s.read_text(), "", "-std=c++20") for s in (HERE / "fiber.cpp", HERE / "simt.cpp")]
    objects = []
    for stem, text, included, standard in units:
        target = out_dir / f"{stem}-{_digest(common, text, included, standard)}.o"
        _make(target, [compiler, standard, *flags, "-c"], text)
        objects.append(str(target))
    library = out_dir / f"libkvc_simt-{_digest(*objects)}.so"
    _make(library, [compiler, *flags, "-shared", *objects])
    return library


def _table_of(source: Path) -> str:
    """The C++ text that includes one kernel source and registers its kernels.

    Each source is in a namespace of its own, so that two of them may give one name to different things, as they may on
    the device, where each is a module of its own.
    """
    text = _COMMENT.sub(" ", source.read_text())
    kernels = _KERNEL.findall(text)
    if len(kernels) != len(re.findall(r"\bKVC_KERNEL\b", text)):
        form = "KVC_KERNEL(threads[, blocks]) kvc_name(KVC_PARAM Struct name)"
        raise BuildError(f"{source.name}: {len(kernels)} of its KVC_KERNEL have the form {form}; write all like that")
    lines = [f"// Made from {source.name}: its kernels, by name."]
    lines += ["#include <simt.hpp>", "#include <kvc_simt_device.cuh>"]
    lines += [f"namespace kvc_{re.sub(r'[^0-9A-Za-z]', '_', source.stem)}_cu {{", f'#include "{source.name}"']
    for bound, name, struct in kernels:
        lines += [
            f'static_assert(__is_trivially_copyable({struct}), "{name}: params cross to the device as bytes");',
            f"static void run_{name}(const void* p) {{ {name}(*static_cast<const {struct}*>(p)); }}",
            f'static ::kvc_simt::Kernel kernel_{name}{{"{name}", {bound}, sizeof({struct}), run_{name}}};',
            f"static ::kvc_simt::Registration registration_{name}(kernel_{name});",
        ]
    return "\n".join([*lines, "}"]) + "\n"


def _make(target: Path, command: list[str], text: str | None = None) -> None:
    """Runs the command, on a source of this text if there is one, unless target exists.

    Two processes may make one target at once: each writes to a name of its own.
    """
    if target.exists():
        return
    temporary = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
    source = temporary.with_suffix(".cpp")
    try:
        if text is not None:
            source.write_text(text)
            command = [*command, str(source)]
        _output_of([*command, "-o", str(temporary)])
        temporary.replace(target)
    finally:
        source.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)


def _output_of(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)  # warnings
    return done.stdout


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
