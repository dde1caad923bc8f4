"""Thousands of corruptions through the guard: many slots struck at once, one forward that digests them all.

Every layout family of `kvcanary.layouts` in turn. A round fills the pool, strikes each slot once, lets one forward
verify every byte, compares what was reported with what was struck, and puts the bytes back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcanary import layouts
from kvcanary.batch import StepBatch
from kvcanary.config import CanaryConfig
from kvcanary.layout import KvPool, Plane
from kvcanary.manager import CanaryManager
from kvcanary.sim.museum.memory import Memory
from kvcanary.sim.museum.places import Array, Place
from kvcanary.sim.sdc import Draws, Injection, explain_no_op
from kvcanary.tags import Half, Reason

ROWS, LENGTH = 8, 64  # requests that fill the pool, and tokens of each
N_LAYERS = 2
ZERO_SHARE = 0.05  # of slots whose bytes are zero, and of elements that are NaN: there some corruptions change nothing
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A layout: what arrays an engine keeps, and the pool that describes them.

    Attributes:
        itemsize: bytes of an element.
        make: zeroed host arrays of a pool with this many blocks.
        describe: the pool over such arrays, wherever they lie.
        array_name: the array that a plane lies in.
    """

    name: str
    page: int
    itemsize: int
    make: Callable[[int, int], Arrays]
    describe: Callable[[Arrays, int], KvPool]
    array_name: Callable[[Plane], str]
    lut: bool = False

    @property
    def n_blocks(self) -> int:
        return 1 + ROWS * (LENGTH // self.page + 1)

    def arrays(self) -> Arrays:
        return self.make(self.n_blocks, self.page)

    def pool(self, arrays: Arrays, slot_lut: Any = None) -> KvPool:
        return self.describe(arrays, self.page)


def _each(*names: str) -> Callable[[Arrays], dict[str, Any]]:
    return lambda arrays: {name: [arrays[f"{name}{i}"] for i in range(N_LAYERS)] for name in names}


def _zeros(dtype: Any, shape: Callable[[int, int], tuple[int, ...]], *names: str) -> Callable[[int, int], Arrays]:
    return lambda n, page: {f"{name}{i}": np.zeros(shape(n, page), dtype) for name in names for i in range(N_LAYERS)}


def _own(plane: Plane) -> str:
    return f"{'k' if plane.name == 'latent' else plane.name}{plane.layer}"


def _with_scales(arrays: Arrays, page: int) -> KvPool:
    """fp8 K and V, and beside each a small plane of scales that shares its digest."""
    nhd = layouts.nhd(**_each("k", "v")(arrays))
    planes = [
        Plane(
            data=arrays[f"{name}{layer}"],
            page_stride=page * size,
            token_stride=size,
            chunk_bytes=size,
            half=half,
            layer=layer,
            name=name,
            group=f"{half.name}{layer}",
        )
        for layer in range(N_LAYERS)
        for half, name, size in ((Half.K, "k", 32), (Half.K, "k_scale", 8), (Half.V, "v", 32), (Half.V, "v_scale", 8))
    ]
    return KvPool(planes=tuple(planes), page_size=page, n_blocks=nhd.n_blocks)


FAMILIES = (
    Family(
        "nhd blocks, 16-bit",
        16,
        2,
        _zeros(np.uint16, lambda n, p: (n, p, 2, 16), "k", "v"),
        lambda a, p: layouts.nhd(**_each("k", "v")(a)),
        _own,
    ),
    Family(
        "nhd slots, 32-bit",
        16,
        4,
        _zeros(np.uint32, lambda n, p: (n * p, 2, 8), "k", "v"),
        lambda a, p: layouts.nhd(**_each("k", "v")(a), page_size=p),
        _own,
    ),
    Family(
        "nhd halves of one array, 16-bit",
        8,
        2,
        _zeros(np.uint16, lambda n, p: (n, 2, p, 2, 16), "kv"),
        lambda a, p: layouts.nhd(
            k=[a[f"kv{i}"][:, 0] for i in range(N_LAYERS)], v=[a[f"kv{i}"][:, 1] for i in range(N_LAYERS)]
        ),
        lambda plane: f"kv{plane.layer}",
    ),
    Family(
        "hnd blocks, 16-bit",
        16,
        2,
        _zeros(np.uint16, lambda n, p: (n, 3, p, 16), "k", "v"),
        lambda a, p: layouts.hnd(**_each("k", "v")(a)),
        _own,
    ),
    Family(
        "latent blocks, 8-bit",
        16,
        1,
        _zeros(np.uint8, lambda n, p: (n, p, 72), "k"),
        lambda a, p: layouts.token_major(latent=_each("k")(a)["k"]),
        _own,
    ),
    Family(
        "latent slots, 16-bit",
        8,
        2,
        _zeros(np.uint16, lambda n, p: (n * p, 33), "k"),
        lambda a, p: layouts.token_major(latent=_each("k")(a)["k"], page_size=p),
        _own,
    ),
    Family(
        "nhd with scales, 8-bit, one digest",
        16,
        1,
        lambda n, p: {
            **_zeros(np.uint8, lambda n, p: (n, p, 2, 16), "k", "v")(n, p),
            **_zeros(np.uint8, lambda n, p: (n, p, 8), "k_scale", "v_scale")(n, p),
        },
        _with_scales,
        _own,
    ),
)


@dataclass
class SdcCount:
    """What became of the injections into one family."""

    family: str
    injected: int = 0
    seen: int = 0
    missed: int = 0
    false_alarms: int = 0  #: slots reported that were not struck
    no_ops: Counter[str] = field(default_factory=Counter)
    injections: list[Injection] = field(default_factory=list)
    first_missed: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything that changed a byte was seen, and nothing else."""
        return not (self.missed or self.false_alarms or self.no_ops["unexplained"])


def run_sdc(place: Place, n: int, seed: int = 0) -> list[SdcCount]:
    """Inject ``n`` corruptions, shared out over the families."""
    draws = Draws(seed)
    each = [n // len(FAMILIES) + (i < n % len(FAMILIES)) for i in range(len(FAMILIES))]
    return [_Rig(place, family, draws, seed).run(m) for family, m in zip(FAMILIES, each, strict=True) if m]


class _Rig:
    """One family's pool, filled by a few requests."""

    def __init__(self, place: Place, family: Family, draws: Draws, seed: int) -> None:
        place.forget_graphs()
        self._place, self._family, self._draws = place, family, draws
        self._rng = np.random.default_rng(seed + 1)
        self._memory = Memory(place, family)
        self._pool = self._memory.pool
        self._units = [
            i for i, unit in enumerate(self._pool.digest_units()) for _ in range(unit.n_planes)
        ]  # digest of each plane, in their order
        config = CanaryConfig.from_env(
            verify_data_every=1, ring_capacity=1 << 13, stats_print_every_n_steps=0, health_check_every_n_steps=0
        )
        self._manager = CanaryManager(config, [self._pool], ROWS, ROWS * LENGTH)
        blocks = LENGTH // family.page + 1
        self._table = 1 + np.arange(ROWS * blocks, dtype=np.int32).reshape(ROWS, blocks)
        self._slots = self._slots_of(np.arange(LENGTH))
        self._ids = place.put(np.zeros(ROWS, np.uint32))
        self._fill, self._verify = self._batch(0, LENGTH), self._batch(LENGTH, LENGTH + 1)
        self._n_requests = 0
        self._said: set[tuple[int, int]] = set()
        self._manager.on_violation(self._note)

    def run(self, n: int) -> SdcCount:
        count = SdcCount(self._family.name)
        try:
            while count.injected < n:
                self._round(count, min(n - count.injected, self._slots.size))
        finally:
            self._manager.close()
        return count

    def _note(self, violation: Any) -> None:
        if Reason.DATA in violation.reasons:
            self._said.add((violation.slot, violation.plane))
        else:
            self._said.add((violation.slot, -1))

    def _round(self, count: SdcCount, n: int) -> None:
        self._write_all()
        self._n_requests += ROWS
        self._place.assign(self._ids, np.arange(self._n_requests - ROWS + 1, self._n_requests + 1, dtype=np.uint32))
        self._forward("fill", self._fill)
        self._said.clear()
        whole = self._memory.save(self._slots.ravel().tolist())
        struck = self._rng.permutation(self._slots.ravel())[:n]
        planes = self._rng.integers(0, len(self._pool.ordered_planes), n)
        expected: dict[tuple[int, int], Injection] = {}
        for i, plane in enumerate(self._pool.ordered_planes):
            with self._memory.bytes_of(plane) as view:
                for slot in struck[planes == i].tolist():
                    self._strike(count, view, slot, self._units[i], expected)
        self._forward("verify", self._verify)
        self._manager.synchronize()
        self._memory.load(whole, self._slots.ravel().tolist())
        missed = expected.keys() - self._said
        count.seen += len(expected) - len(missed)
        count.missed += len(missed)
        count.false_alarms += len(self._said - expected.keys())
        if missed and not count.first_missed:
            slot, unit = min(missed)
            count.first_missed = f"slot {slot}, digest {unit}: {expected[slot, unit]}"

    def _strike(self, count: SdcCount, view: Array, slot: int, unit: int, expected: dict[Any, Injection]) -> None:
        at = slot // self._family.page, slot % self._family.page
        before = view[at].flatten()
        injection = self._draws.draw(len(before), self._family.itemsize)
        after = injection.apply(before, self._family.itemsize)
        view[at] = after.reshape(view[at].shape)
        count.injected += 1
        count.injections.append(injection)
        if why := explain_no_op(injection, before, after):
            count.no_ops[why] += 1
        else:
            expected[slot, unit] = injection

    def _write_all(self) -> None:
        """Fresh bytes everywhere; some slots all zero, some all ones, which is a NaN in every format."""
        for plane in self._pool.ordered_planes:
            with self._memory.bytes_of(plane) as view:
                data = self._rng.integers(0, 256, view.shape, np.uint8)
                data[self._rng.random(view.shape[:2]) < ZERO_SHARE] = 0
                data[self._rng.random(view.shape[:2]) < ZERO_SHARE] = 0xFF
                view[...] = data

    def _forward(self, key: str, batch: StepBatch) -> None:
        stream = self._place.stream

        def launch() -> None:
            with self._manager.forward(batch, stream):
                pass  # the bytes of the new tokens are there already

        with self._manager.step(stream):
            self._place.run(key, launch)

    def _slots_of(self, positions: Array) -> Array:
        """i64[rows, positions]."""
        blocks = self._table[:, positions // self._family.page].astype(np.int64)
        slots: Array = blocks * self._family.page + positions % self._family.page
        return slots

    def _batch(self, start: int, end: int) -> StepBatch:
        put, n = self._place.put, end - start
        return StepBatch(
            block_table=put(self._table),
            seq_lens=put(np.full(ROWS, end, np.int32)),
            query_start_loc=put(np.arange(0, ROWS * n + 1, n, dtype=np.int32)),
            input_ids=put(np.arange(ROWS * n, dtype=np.int32)),
            slot_mapping=put(self._slots_of(np.arange(start, end)).ravel()),
            request_slots=put(np.arange(ROWS, dtype=np.int32)),
            request_ids=self._ids,
        )
