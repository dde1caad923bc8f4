"""The stage of the museum: a small paged pool, an engine that does what a scenario says, and the guard in front of it.

The pool has blocks of a few slots, block 0 reserved, three layers; what "the model" writes for a token is a function of
layer, token, position, salt and request, so that every fault is exact and repeatable. Everything goes through the
guard's public surface.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from kvcanary import hashing
from kvcanary.backends.reference_slots import place_of
from kvcanary.batch import StepBatch
from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError, KvCanaryViolation, LifecycleError
from kvcanary.manager import CanaryManager
from kvcanary.sim.museum.memory import Memory
from kvcanary.sim.museum.places import Place
from kvcanary.sim.museum.rows import (
    BYSTANDERS,
    MAX_LEN,
    MAX_REQUESTS,
    MAX_TOKENS,
    Array,
    Row,
    arrays_of,
    fill_history,
    late_table_of,
    padding,
)
from kvcanary.sim.museum.shapes import BYSTANDER_BLOCKS, N_BLOCKS, Shape, plane_name
from kvcanary.sim.museum.wishes import Wishes
from kvcanary.violations import Violation

N_STRAY = 16  # slots that a kernel may write beside those of its tokens
MAX_LOADED = 32  # slots that may be loaded inside a forward
_DEFAULTS: dict[str, Any] = {
    "verify_data_every": 1,
    "log_tokens": True,
    "stats_print_every_n_steps": 0,
    "health_check_every_n_steps": 0,
}


class MissingError(Exception):
    """This version of the guard lacks what a scenario needs; says what."""


def settings(lifecycle: bool, **more: Any) -> CanaryConfig:
    """The guard's settings in the drill, under the operator's own ``KVCANARY_*`` where the drill says nothing."""
    try:
        return CanaryConfig.from_env(lifecycle=lifecycle, **{**_DEFAULTS, **more})
    except ConfigError as error:
        if "not in this version" not in str(error):
            raise
        raise MissingError(str(error).split("=")[0]) from error


class Stage(Wishes):
    """One run of one scenario.

    Args:
        place: where it runs.
        shape: the pool.
        lifecycle: whether the guard is told who owns which block.
        config: more settings of the guard.

    Raises:
        MissingError: this version of the guard does not have what is asked for.
    """

    def __init__(self, place: Place, shape: Shape, lifecycle: bool = False, **config: Any) -> None:
        super().__init__()
        guard_settings = settings(lifecycle, **config)
        self.place, self.shape, self.lifecycle, self.page = place, shape, lifecycle, shape.page
        place.forget_graphs()
        self.memory = Memory(place, shape)
        self.pool = self.memory.pool
        self.manager = CanaryManager(guard_settings, [self.pool], MAX_REQUESTS, MAX_TOKENS)
        self.manager.on_violation(self.seen.append)
        self._history = np.full((MAX_REQUESTS, MAX_LEN), -1, np.int32)
        self._history_there = place.put(self._history)
        self._batches: dict[tuple[int, int], tuple[dict[str, Any], StepBatch]] = {}
        self._new_kv, self._loads = self._kv_lists(MAX_TOKENS + N_STRAY), self._kv_lists(MAX_LOADED)
        self._late: dict[tuple[int, int], Any] = {}
        self._n_crowd = 0
        for i, request in enumerate(BYSTANDERS if shape.crowd else ()):
            self.allocate(self._bystander_table(i), request)

    # ---- names -------------------------------------------------------------------------------------------------------
    def at(self, table: Sequence[int], *positions: int | range) -> list[int]:
        """Slots of the positions of a request with this table."""
        flat = [p for part in positions for p in ([part] if isinstance(part, int) else part)]
        places = place_of(self.pool, np.array(flat, np.int64)).tolist()
        return [table[p // self.page] * self.page + p % self.page for p in places]

    def of(self, *blocks: int) -> list[int]:
        """All slots of the blocks."""
        return [block * self.page + i for block in blocks for i in range(self.page)]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers."""
        return tuple(sorted({plane.layer for plane in self.pool.planes}))

    # ---- a step ------------------------------------------------------------------------------------------------------
    def forward(
        self,
        *rows: Row,
        stray: Sequence[int] = (),
        raises: bool = False,
        verify_layers: Sequence[int] = (),
        late_tables: bool = False,
        arrives: tuple[Mapping[str, Array], Sequence[int]] | None = None,
    ) -> None:
        """One step of one forward: HEAD, a model that writes the KV of the new tokens, TAIL.

        Args:
            stray: slots that the model's kernels write although no token belongs there.
            raises: the model raises after it has written.
            verify_layers: layers judged at the point where attention reads them.
            late_tables: rows' ``late_table`` replaces their table between HEAD and the model.
            arrives: saved bytes, and the slots into which they are loaded between HEAD and the layers' reads.
        """
        rows = self._with_crowd(rows)
        self._fill(rows, stray)
        if arrives is not None:
            self._fill_loads(*arrives)
        bucket = (len(rows), sum(row.end - row.start for row in rows))
        arrays, batch = self._bucket(bucket)
        values = arrays_of(rows, self.page)
        for name, array in arrays.items():
            self.place.assign(array, values[name])
        self.place.assign(self._late[bucket], late_table_of(rows, values["block_table"]))
        stream = self.place.stream

        def launch() -> None:
            self.manager.head(batch, stream)
            if arrives is not None:
                self._write_kv(self._loads)
            for layer in verify_layers:
                self._ask("verify_layer")(batch, layer, stream)
            if late_tables:
                self.place.copy(arrays["block_table"], self._late[bucket])
            self._write_kv(self._new_kv)
            if raises:
                self.manager.abandon_forward()
            else:
                self.manager.tail(batch, stream)

        self.n_steps += 1
        self.manager.begin_step(stream)
        self.place.run((bucket, raises, tuple(verify_layers), late_tables, arrives is None), launch)
        with suppress(KvCanaryViolation):  # an operator's mode="raise": it is in `seen` all the same
            self.manager.end_step()
        if self.manager.taint is not None:
            self.taints[self.n_steps] = self.place.read(self.manager.taint)[: len(rows)], [r.request for r in rows]

    def _bystander_table(self, i: int) -> list[int]:
        first = N_BLOCKS + i * BYSTANDER_BLOCKS
        return list(range(first, first + BYSTANDER_BLOCKS))

    def _with_crowd(self, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        if not self.shape.crowd:
            return rows
        n = self._n_crowd
        spans = [(0, self.page + 1) if n == 0 else (self.page + n, self.page + n + 1)] * 2
        first, second = (
            Row(request, *span, self._bystander_table(i))
            for i, (request, span) in enumerate(zip(BYSTANDERS, spans, strict=True))
        )
        self._n_crowd += 1
        return (first, *rows, second, padding(-1), padding(0))

    def _bucket(self, bucket: tuple[int, int]) -> tuple[dict[str, Any], StepBatch]:
        if bucket not in self._batches:
            n_rows, n_tokens = bucket
            first = Row(0, 0, n_tokens, [0], [0] * n_tokens, slots=[-1] * n_tokens)
            blank = arrays_of([first, *[Row(0, 0, 0, [0], [])] * (n_rows - 1)], self.page)
            arrays = {name: self.place.put(array) for name, array in blank.items()}
            self._late[bucket] = self.place.put(blank["block_table"])
            self._batches[bucket] = arrays, StepBatch(**arrays, token_history=self._history_there)
        return self._batches[bucket]

    def _fill(self, rows: Sequence[Row], stray: Sequence[int]) -> None:
        fill_history(self._history, rows)
        self.place.assign(self._history_there, self._history)
        slots = np.full(MAX_TOKENS + N_STRAY, -1, np.int64)
        seeds, is_padding = np.zeros(len(slots), np.uint64), np.zeros(len(slots), bool)
        n = 0
        for row in rows:
            targets = row.targets(self.page) if row.kv_slots is None else row.kv_slots
            for slot, token, position in zip(targets, row.tokens, range(row.start, row.end), strict=False):
                slots[n] = slot
                seeds[n] = hashing.prefix_chain([token, position, row.request, row.noise], row.salt)
                is_padding[n] = row.request == 0
                n += 1
        slots[n : n + len(stray)] = stray
        seeds[n : n + len(stray)] = [hashing.prefix_chain([s, self.n_steps], 77) for s in stray]
        for i, (plane, (there, data)) in enumerate(zip(self.pool.planes, self._new_kv, strict=True)):
            self.place.assign(there, slots)
            values = _bytes(seeds, i, plane.n_bytes)
            values[is_padding] &= 0x3F  # finite in every element type: NaN in the reserved block is planted
            self.place.assign(data, values)

    def _kv_lists(self, capacity: int) -> list[tuple[Any, Any]]:
        """Per plane: slots i64[capacity] (negative = none) and the bytes that are written there."""
        return [
            (self.place.put(np.full(capacity, -1, np.int64)), self.place.put(np.zeros((capacity, p.n_bytes), np.uint8)))
            for p in self.pool.planes
        ]

    def _write_kv(self, lists: list[tuple[Any, Any]]) -> None:
        for plane, (slots, data) in zip(self.pool.planes, lists, strict=True):
            self.place.write_kv(self.pool, plane, slots, data)

    def _fill_loads(self, saved: Mapping[str, Array], slots: Sequence[int]) -> None:
        for plane, (there, data) in zip(self.pool.planes, self._loads, strict=True):
            targets, values = np.full(MAX_LOADED, -1, np.int64), np.zeros((MAX_LOADED, plane.n_bytes), np.uint8)
            found = saved.get(plane_name(plane))
            if found is not None:
                targets[: len(slots)] = slots
                values[: len(slots)] = found.reshape(len(slots), -1)
            self.place.assign(there, targets)
            self.place.assign(data, values)

    # ---- ownership and moves -----------------------------------------------------------------------------------------
    def allocate(self, blocks: Sequence[int], owner: int) -> None:
        """The allocator gives blocks to a request, for new content."""
        if self.lifecycle:
            self._ask("allocate_blocks")(list(blocks), owner)

    def share(self, blocks: Sequence[int], owner: int) -> None:
        """A prefix hit: another request reads the blocks too."""
        if self.lifecycle:
            self._ask("share_blocks")(list(blocks), owner)

    def claim(self, blocks: Sequence[int], owner: int) -> None:
        """The last holder of blocks writes them from now on."""
        if self.lifecycle:
            self._ask("claim_blocks")(list(blocks), owner)

    def free(self, blocks: Sequence[int], owner: int) -> None:
        """A request lets go of its blocks."""
        if self.lifecycle:
            self._ask("free_blocks")(list(blocks), owner)

    @contextmanager
    def misuse(self, what: str) -> Iterator[None]:
        """Calls that the guard's ledger must refuse, if there is one; the engine goes on regardless."""
        refused = not self.lifecycle or not self.manager.is_on
        try:
            yield
        except LifecycleError as error:
            refused = True
            self.refusals.append(f"{what}: {error}")
        if not refused:
            self.problems.append(f"{what} was not refused")

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """A transfer inside the pool that carries bytes, stamps and digests."""
        copy_slots = self._ask("copy_slots")
        self.copy_bytes(source, target)
        copy_slots(self._slot_list(source), self._slot_list(target))

    def export(self, slots: Sequence[int]) -> tuple[Any, dict[str, Array]]:
        """What a store keeps of slots: the guard's bundle, and the bytes."""
        return self._ask("export_slots")(self._slot_list(slots)), self.memory.save(slots)

    def restore(self, stored: tuple[Any, Mapping[str, Array]], slots: Sequence[int]) -> None:
        """Load what `export` kept into other slots."""
        bundle, data = stored
        self.memory.load(data, slots)
        self._ask("import_slots")(bundle, self._slot_list(slots))

    def keep_resident(self, table: Sequence[int], n_tokens: int, text: Sequence[int]) -> None:
        """The prefix cache holds the first tokens of a text in these blocks: what a sweep goes over."""
        slots = np.array(self.at(table, range(n_tokens)), np.int32)
        before = np.concatenate(([-1], slots[:-1])).astype(np.int32)
        lists = slots, np.arange(n_tokens, dtype=np.int32), before, np.array(text[:n_tokens], np.int32)
        self.manager.attach_resident_set(lambda: lists)

    def flush(self) -> None:
        """The engine flushes its cache, tells the guard, and computes everything that still runs anew."""
        self.manager.reset()
        self._n_crowd = 0

    def _ask(self, method: str) -> Any:
        found = getattr(self.manager, method, None)
        if found is None:
            raise MissingError(method)
        return found

    @staticmethod
    def _slot_list(slots: Sequence[int]) -> Array:
        return np.array(list(slots), np.int64)

    # ---- bytes -------------------------------------------------------------------------------------------------------
    def copy_bytes(self, source: Sequence[int], target: Sequence[int]) -> None:
        """A transfer between slots that the guard is not told of."""
        self.memory.load(self.memory.save(source), target)

    # ---- end ---------------------------------------------------------------------------------------------------------
    def abandon(self) -> None:
        """Give up in the middle."""
        self.manager.abandon_step()
        self.manager.close()

    def finish(self) -> list[Violation]:
        """Read what is left; everything that was reported, in order."""
        if self.manager.is_on:
            self.manager.synchronize()
        self.manager.close()
        return self.seen


def _bytes(seeds: Array, plane: int, n_bytes: int) -> Array:
    """Bytes u8[n, n_bytes] that follow from a seed each, and the plane."""
    words = np.arange(-(-n_bytes // 8), dtype=np.uint64)
    salt = np.uint64(plane << 32)
    mixed = hashing.mix64(hashing.mix64(seeds[:, None] ^ salt) + words)
    found: Array = np.ascontiguousarray(mixed).view(np.uint8).reshape(len(seeds), -1)[:, :n_bytes]
    return found
