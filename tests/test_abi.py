"""What crosses to the device: literal sizes, no hidden padding, and a header that a compiler agrees with."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvcanary import abi
from kvcanary.tags import N_TAGS, Detail, Reason, Stage

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "kernels" / "abi.cuh"
SIZES = {
    "Stamp": 32,
    "Register": 152,
    "Plane": 64,
    "Digest": 24,
    "FloatPlane": 88,
    "Row": 56,
    "Due": 16,
    "BlockState": 16,
    "PoolState": 264,
    "Violation": 144,
    "Guard": 80,
    "Pool": 272,
    "Batch": 192,
    "BeginParams": 552,
    "StepParams": 544,
    "LayerParams": 608,
    "SweepParams": 392,
    "RenumberParams": 360,
    "ReservedParams": 368,
    "LifecycleParams": 4048,
    "MoveParams": 448,
}
DTYPES: dict[str, np.dtype[Any]] = {
    "Stamp": abi.STAMP,
    "Register": abi.REGISTER,
    "Plane": abi.PLANE,
    "Digest": abi.DIGEST,
    "FloatPlane": abi.FLOAT_PLANE,
    "Row": abi.ROW,
    "Due": abi.DUE,
    "BlockState": abi.BLOCK_STATE,
    "PoolState": abi.POOL_STATE,
    "Violation": abi.VIOLATION,
    "Guard": abi.GUARD,
    "Pool": abi.POOL,
    "Batch": abi.BATCH,
    **abi.PARAMS,
}


def alignment(dtype: np.dtype[Any]) -> int:
    base = dtype.base
    return max(alignment(sub) for sub, *_ in base.fields.values()) if base.fields else base.itemsize


def test_the_header_is_the_one_that_abi_renders() -> None:
    assert HEADER.read_text() == abi.c_header(), "render it anew: python -m kvcanary.abi > kernels/abi.cuh"


@pytest.mark.parametrize("name", DTYPES)
def test_sizes(name: str) -> None:
    assert DTYPES[name].itemsize == SIZES[name]
    assert f"static_assert(sizeof({name}) == {SIZES[name]}," in abi.c_header()


@pytest.mark.parametrize("name", DTYPES)
def test_no_compiler_needs_padding(name: str) -> None:
    dtype, at = DTYPES[name], 0
    assert dtype.fields is not None
    for field, (sub, offset, *_) in dtype.fields.items():
        assert offset == at and offset % alignment(sub) == 0, field
        at += sub.itemsize
    assert at == dtype.itemsize and at % alignment(dtype) == 0


def test_every_structure_of_the_header_is_listed_here() -> None:
    assert re.findall(r"^struct (?:alignas\(32\) )?(\w+) \{", abi.c_header(), re.MULTILINE) == list(DTYPES)


def test_a_stamp_is_one_sector_and_parameters_fit_every_driver() -> None:
    assert 32 % abi.STAMP.itemsize == 0
    assert max(p.itemsize for p in abi.PARAMS.values()) <= 4096
    assert "struct alignas(32) Stamp" in abi.c_header()


def test_zeros_of_is_one_assignable_structure() -> None:
    batch = abi.zeros_of(abi.BATCH)
    batch["rows"] = 3
    assert batch.shape == () and batch[()]["rows"] == 3 and batch["n_tokens"] == 0


def test_constants_and_enums_are_defined_with_their_values() -> None:
    defined = dict(re.findall(r"^#define KVC_(\w+) (.+)$", HEADER.read_text(), re.MULTILINE))
    assert int(defined["CHAIN_P"].removesuffix("ull"), 16) == abi.CHAIN_P
    assert (defined["N_TAGS"], defined["DIGEST_PERIOD"], defined["PREV_RELATIVE"]) == (str(N_TAGS), "128", "(-2)")
    for enum, prefix in ((Stage, "STAGE"), (Reason, "REASON"), (Detail, "DETAIL")):
        assert {m.name: defined[f"{prefix}_{m.name}"] for m in enum} == {m.name: f"{m.value}u" for m in enum}
    flags = [int(v) for n, v in defined.items() if n.startswith("ROW_")]
    assert sorted(flags) == [1 << i for i in range(len(flags))]


def test_a_compiler_puts_every_field_where_numpy_does(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++ or clang++")
    lines = ["#include <cstddef>", "#include <cstdint>", *abi.c_header().splitlines()[1:]]
    source = [line for line in lines if not line.startswith(("#pragma", '#include "'))]
    for name, dtype in DTYPES.items():
        assert dtype.fields is not None
        for field, (_, offset, *_) in dtype.fields.items():
            source.append(f'static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");')
    path = tmp_path / "abi.cpp"
    path.write_text("\n".join(source) + "\n")
    done = subprocess.run(
        [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-Wpadded", "-fsyntax-only", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
