"""What is fuzzed: each target takes a `Source` and lets out nothing but what the surface promises.

A `KvCanaryError` is an answer; any other exception is a finding, and goes on up.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from kvcanary import CanaryConfig, CanaryManager, KvCanaryError, KvPool, Plane, SlotBundle, StepBatch, layouts

from .boxes import black_box
from .source import Source
from .values import array, odd

_LOGGER = logging.getLogger("kvcanary")
_FIELDS = tuple(f.name for f in fields(CanaryConfig))
_TEXTS = (
    *(
        "",
        " ",
        "0",
        "1",
        "on",
        "OFF",
        "log",
        "raise",
        "all",
        "adopt",
        "yes",
        "none",
        "-1",
        "1_0",
        "1e3",
        "٣",
        "9" * 5000,
    ),
    *(
        "flip_used",
        "flip_used:p=0.01,seed=1;table_swap",
        "flip_used:seed=" + "9" * 5000,
        "flip_used:p=nan",
        ":;,=",
        "x:y=z",
    ),
)


def environment(source: Source) -> None:
    """`CanaryConfig.from_env`."""
    env = {}
    for _ in range(source.below(5)):
        name = source.choice(_FIELDS).upper() if source.below(8) else source.text()
        env["KVCANARY_" + name] = source.choice(_TEXTS) if source.maybe() else source.text()
    overrides = {source.choice((*_FIELDS, "nothing")): odd(source) for _ in range(source.below(3))}
    CanaryConfig.from_env(env, **overrides)


def configuration(source: Source) -> None:
    """`CanaryConfig(...)`, and a manager that it is for."""
    values = {
        source.choice(_FIELDS): source.choice((odd(source), source.choice(_TEXTS))) for _ in range(source.below(4))
    }
    config = CanaryConfig(**values)
    if config.ring_capacity <= 1 << 12:
        with _a_folder_of_its_own():  # a text may name a black box
            CanaryManager(config, [_pool()], 2, 8).close()


@contextmanager
def _a_folder_of_its_own() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _pool(**options: Any) -> KvPool:
    k, v = np.zeros((2, 6, 4, 1, 4), np.float16)
    return layouts.nhd(k=[k], v=[v], **options)


_SHAPES = {
    "block_table": ((2, 3), "i4"),
    "seq_lens": ((2,), "i4"),
    "query_start_loc": ((3,), "i4"),
    "input_ids": ((4,), "i4"),
    "slot_mapping": ((4,), "i8"),
    "request_slots": ((2,), "i4"),
    "request_ids": ((2,), "u4"),
    "salts": ((2,), "u8"),
    "prefix_chain": ((2,), "u8"),
    "token_history": ((2, 9), "i4"),
    "expected_tokens": ((4,), "i4"),
    "pending": ((2,), "u1"),
    "verify_all": ((2,), "u1"),
    "kv_indptr": ((3,), "i4"),
    "kv_indices": ((5,), "i4"),
    "kv_last_page_len": ((2,), "i4"),
}
_REQUIRED = ("query_start_loc", "input_ids", "slot_mapping", "seq_lens")


def batch(source: Source) -> None:
    """`StepBatch` in a forward, and what else takes one."""
    config = CanaryConfig(lifecycle=source.maybe(), real_data=source.choice(("all", "none")), verify_data_every=1)
    pools = [_pool(name=name) for name in ("a", "b")[: 1 + source.below(2)]]
    given: dict[str, Any] = {}
    for name, (shape, dtype) in _SHAPES.items():
        if name in _REQUIRED or source.below(3) == 1:
            given[name] = array(source, shape, dtype)
    if source.below(8) != 1:  # one kind of table, and what belongs together
        unwanted = ("kv_indptr", "kv_indices", "kv_last_page_len") if source.maybe() else ("block_table",)
        given = {name: value for name, value in given.items() if name not in unwanted}
        if "block_table" in given or "kv_indptr" not in given:
            given.setdefault("block_table", np.ones((2, 3), np.int32))
            given = {name: value for name, value in given.items() if not name.startswith("kv_")}
        given.setdefault("request_slots", np.arange(2, dtype=np.int32))
    if source.below(8) == 0:
        given["table_entries"] = source.choice(("blocks", "slots", odd(source)))
    with CanaryManager(config, pools, 2, 8) as manager:
        for _ in range(2):
            of_step = StepBatch(**given)
            manager.head(of_step, index=source.choice((0, 0, 1)), pools=_pools(source))
            if source.below(4) == 0:
                with suppress(KvCanaryError):
                    manager.verify_layer(of_step, source.choice((0, 0, odd(source))))
            manager.tail(of_step)
        if source.maybe():
            manager.prove(of_step)


def _pools(source: Source) -> Any:
    return None if source.below(8) else source.choice(([0], ["a"], [], ["a", 0], odd(source)))


def bundle(source: Source) -> None:
    """Bytes of a bundle, as they are or under a right header and checksum, into a pool."""
    what = source.below(4)
    pool = _pool()
    with CanaryManager(CanaryConfig(), [pool], 2, 8) as manager:
        manager.adopt_slots([4, 5, 6], [0, 1, 2], tokens=[1, 2, 3])
        good = manager.export_slots([4, 5, 6]).to_bytes()
        if what == 0:
            data = source.rest()
        else:
            body = bytearray(good[:-32])
            for _ in range(source.below(6)):
                body[source.below(len(body))] = source.byte()
            if what == 2:
                body = body[: len(body) - source.below(64)] + source.rest()
            if what >= 2 and len(body) >= 32:
                body[24:32] = struct.pack("<Q", len(body) + 32)
            data = bytes(body) + hashlib.blake2b(body, digest_size=32).digest()
        found = SlotBundle.from_bytes(data)
        assert SlotBundle.from_bytes(found.to_bytes()) == found
        half = found[: len(found) // 2]
        with suppress(KvCanaryError):
            manager.import_slots(SlotBundle.concatenate([half, found[len(half) :]]), [8, 9, 10, 12, 13][: len(found)])
        assert isinstance(manager.violations(), tuple)


_PLANE = {"offset": 0, "page_stride": 32, "token_stride": 8, "chunk_stride": 0, "n_chunks": 1, "chunk_bytes": 8}
_POOL = {"page_size": 4, "n_blocks": 6, "reserved_blocks": (0,), "window": None, "token_offset": 0, "slot_lut": None}


def pool(source: Source) -> None:
    """`Plane`, `KvPool` and the layouts."""
    if source.maybe():
        of_plane: dict[str, Any] = {**_PLANE, "data": np.zeros(192, np.uint8)}
        for _ in range(source.below(3)):
            of_plane[source.choice((*_PLANE, "half", "layer", "name", "group", "dtype"))] = odd(source)
        if source.below(4) == 0:
            of_plane["data"] = array(source, (192,), "u1")
        of_pool: dict[str, Any] = dict(_POOL)
        for _ in range(source.below(3)):
            of_pool[source.choice((*_POOL, "name", "kind", "expected_every_step"))] = odd(source)
        made = KvPool(planes=(Plane(**of_plane),), **of_pool)
    else:
        layout = source.choice((layouts.nhd, layouts.hnd))
        options = (
            {source.choice(("page_size", "layers", "dtype", "window", "kind")): odd(source)} if source.maybe() else {}
        )
        k = odd(source) if source.below(8) == 0 else [array(source, (6, 4, 1, 4), "f2") for _ in range(source.below(3))]
        made = layout(k=k, **{n: v for n, v in options.items() if layout is layouts.nhd or n != "page_size"})
    with CanaryManager(CanaryConfig(), [made], 2, 8) as manager:
        assert manager.describe()


_CALLS = {
    "copy_slots": 2,
    "export_slots": 1,
    "refresh_digests": 1,
    "adopt_slots": 2,
    "localize_slots": 1,
    "commit_slots": 4,
    "import_slots": 2,
    "shadow_arrays": 0,
    "allocate_blocks": 2,
    "share_blocks": 2,
    "free_blocks": 2,
}


def calls(source: Source) -> None:
    """The host-driven calls with odd arguments."""
    with CanaryManager(CanaryConfig(lifecycle=True, scrub_bytes_per_step=64), [_pool()], 2, 8) as manager:
        for _ in range(1 + source.below(3)):
            name = source.choice(tuple(_CALLS))
            args = [array(source, (2,), source.choice(("i4", "i8"))) for _ in range(_CALLS[name])]
            if name.endswith("_blocks") and source.maybe():
                args[1] = 1 + source.below(3)
            options = {source.choice(("pool", "blocks", "tokens", "salt", "request_slots")): odd(source)}
            takes = getattr(manager, name).__code__.co_varnames
            with suppress(KvCanaryError):
                getattr(manager, name)(*args, **{n: v for n, v in options.items() if n in takes and source.maybe()})
        with suppress(KvCanaryError):
            manager.lifecycle.apply([tuple(odd(source) for _ in range(source.below(6)))])
        with suppress(KvCanaryError):
            manager.reset(odd(source))


TARGETS: dict[str, Callable[[Source], None]] = {
    f.__name__: f for f in (environment, configuration, batch, bundle, pool, calls, black_box)
}


def play(name: str, data: bytes) -> bool:
    """One input of a target; whether it did what it says (else an error of kvcanary's was the answer).

    Raises:
        Exception: a finding.
    """
    level = _LOGGER.level
    _LOGGER.setLevel(logging.CRITICAL + 1)  # what it says of such input is read by nobody
    try:
        TARGETS[name](Source(data))
    except KvCanaryError:
        return False
    finally:
        _LOGGER.setLevel(level)
    return True
