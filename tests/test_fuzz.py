"""The Python surface answers anything with an error of its own, or does what it says: kept inputs, some by chance."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fuzz import targets
from fuzz.source import Source
from fuzz.targets import TARGETS, play
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from kvcanary import (
    BatchError,
    CanaryConfig,
    CanaryManager,
    ConfigError,
    KvPool,
    LayoutError,
    Plane,
    StepBatch,
    layouts,
)

HERE = Path(__file__).resolve().parent
KEPT = sorted(path for kind in ("corpus", "crashers") for path in (HERE / "fuzz" / kind).rglob("*") if path.is_file())


def test_a_source_reads_the_same_from_the_same_bytes() -> None:
    source = Source(b"\x05\x02abc\x03\xff\xfe!rest")
    assert (source.below(4), source.below(2), source.some(3), source.text()) == (1, 0, b"abc", "\udcff\udcfe!")
    assert source.rest() == b"rest" and source.byte() == 0 and source.choice("xyz") == "x" and not source.maybe()


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.parent.name}-{path.parent.name}-{path.name}")
def test_what_is_kept(path: Path) -> None:
    play(path.parent.name, path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_wrong_is_no_error(name: str) -> None:
    """Past the end of the bytes, everything is right: a target that refuses that would test nothing."""
    assert play(name, b"") or name in ("bundle", "pool"), "no bytes at all are no bundle, and no layers no pool"


def test_a_black_box_of_any_name_is_written_where_nobody_keeps_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made: list[str] = []
    real = targets.CanaryManager
    monkeypatch.setattr(
        targets, "CanaryManager", lambda config, *given: made.append(config.black_box_path) or real(config, *given)
    )
    monkeypatch.setattr(targets, "odd", lambda _source: None)
    name = targets._FIELDS.index("black_box_path")
    for text in range(len(targets._TEXTS)):
        with suppress(ConfigError):  # of an empty one
            targets.configuration(Source(bytes([1, name, text, 1])))
    assert "OFF" in made and not list(tmp_path.iterdir())


@examples(60)
@given(st.sampled_from(sorted(TARGETS)), st.binary(max_size=200))
def test_by_chance(name: str, data: bytes) -> None:
    play(name, data)


def test_the_command_line() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--target", "pool", "--runs", "50", "--by-chance"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "50 inputs by chance" in done.stdout


# ---- what was found, in words ----------------------------------------------------------------------------------------
def a_plane(**fields: object) -> Plane:
    place = {"page_stride": 32, "token_stride": 8, "chunk_bytes": 8}
    return Plane(data=np.zeros(192, np.uint8), **{**place, **fields})  # type: ignore[arg-type]


def a_pool(**fields: object) -> KvPool:
    return KvPool(**{"planes": (a_plane(),), "page_size": 4, "n_blocks": 6, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: CanaryConfig(mode=np.array(["log", "raise"])), "mode=.*choose one of log"),
        (lambda: CanaryConfig(perturb="flip_used:seed=" + "9" * 5000, perturb_armed=True), "give an integer from 0"),
    ],
)
def test_configurations(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: a_plane(half=9), "half=9.*give Half.K or Half.V"),
        (lambda: a_plane(name=3), "name=3"),
        (lambda: a_plane(layer="1"), "layer='1'; give the number"),
        (lambda: a_plane(group=[1]), r"group=\[1\]; give an integer or a string"),
        (lambda: a_pool(page_size="4"), "page_size='4': give an integer"),
        (lambda: a_pool(n_blocks=6.0), "n_blocks=6.0: give an integer"),
        (lambda: a_pool(window=b"1"), "window=b'1': give an integer"),
        (lambda: a_pool(token_offset=None), "token_offset=None: give an integer"),
        (lambda: a_pool(kind=7), "kind=7: choose one of"),
        (lambda: a_pool(name=[1]), r"name=\[1\]: give a string"),
        (lambda: a_pool(planes=(1,)), "planes is a list of int: give a tuple of Planes"),
        (lambda: a_pool(planes=None), "planes=None: give a tuple of Planes"),
        (lambda: a_pool(reserved_blocks=np.array(3)), "reserved_blocks=array.*give a tuple of block numbers"),
        (lambda: a_pool(reserved_blocks=("a",)), "a block of reserved_blocks='a': give an integer"),
        (lambda: a_pool(expected_every_step=1), "expected_every_step=1: give True or False"),
        (lambda: layouts.hnd(k=None), "None instead of arrays: give a list"),
        (lambda: layouts.hnd(k=None, v=[np.zeros((2, 1, 4, 2))]), "k=NoneType: give a list"),
        (lambda: layouts.nhd(k=[np.zeros((8, 1, 2))], page_size=np.arange(3)), "page_size=.*an integer"),
        (lambda: layouts.nhd(k=[np.zeros((8, 1, 2))], layers=3.5), "layers=3.5: give a list"),
    ],
)
def test_pools(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LayoutError, match=text):
        make()


def test_numbers_of_numpy_are_integers() -> None:
    pool = a_pool(page_size=np.int32(4), n_blocks=np.int64(6), reserved_blocks=np.array([0, 2]), planes=[a_plane()])
    assert (pool.page_size, pool.n_blocks, pool.reserved_blocks) == (4, 6, (0, 2))
    assert type(pool.page_size) is int and isinstance(pool.planes, tuple)


def test_batches_and_calls() -> None:
    with CanaryManager(CanaryConfig(), [a_pool()], 2, 8) as manager:
        given = {
            "query_start_loc": np.zeros(2, np.int32),
            "seq_lens": np.zeros(1, np.int32),
            "input_ids": np.zeros(0, "i4"),
        }
        batch = StepBatch(**given, slot_mapping=np.zeros(0, "i8"), block_table=np.zeros((1, 1), "i4"))
        for pools in (3, [[0]], np.array(1)):
            with pytest.raises(ConfigError, match="give a list of pool names or numbers"):
                manager.head(batch, pools=pools)
        with pytest.raises(BatchError, match="give 'blocks' or 'slots'"):
            manager.head(StepBatch(**given, slot_mapping=np.zeros(0, "i8"), table_entries=np.arange(2)))  # type: ignore[arg-type]
        layered = StepBatch(
            **given, slot_mapping=np.zeros(0, "i8"), block_table=np.zeros((1, 1), "i4"), pending=np.ones(1, "u1")
        )
        manager.head(layered)
        with pytest.raises(BatchError, match=r"layer \{\} has no digests"):
            manager.verify_layer(layered, {})  # type: ignore[arg-type]
        manager.tail(layered)
        with pytest.raises(BatchError, match="no list of numbers"):
            manager.export_slots([4, [5, 6]])
        with pytest.raises(BatchError, match=r"blocks=.*give True for lists of blocks"):
            manager.export_slots([4], blocks=np.zeros(2))  # type: ignore[arg-type]
        with pytest.raises(BatchError, match="give integers"):
            manager.export_slots((manager.alarm_address, (1,), None, 6, "cpu"))
