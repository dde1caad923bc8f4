"""The fault drill: damage the memory of a running engine on purpose, to see that the guard says so.

Off unless two switches agree: `CanaryConfig.perturb` says what, ``perturb_armed`` that it is meant. The manager calls
in from `begin_step` and `end_step`, outside any graph. A fault acts on the batch that came last, by
``begin_step(batch=)`` or else by `head`, with what its arrays hold at that moment: so the engine fills them before
`begin_step`, and one that replays several captured batches, or makes a new one for each step, names the batch there.

- ``flip_used``: a bit of a prefix slot of a live row. DATA within ``verify_data_every`` forwards of that request, if
  the slot is still in its window then.
- ``flip_unused_cached``: a bit of a written slot that no row of the batch uses. DATA at the first forward of a request
  that hits it, or at the next sweep; nothing if it is rewritten first.
- ``flip_after_forward``: a bit of a slot of a live row, new ones included, after TAIL. As ``flip_used``.
- ``table_swap``: two entries of live rows' block tables exchanged until the end of the step. POSITION, TOKEN or CHAIN
  at HEAD of that step, unless both rows hold the same text there.
- ``next_token_swap``: the ids of the last new tokens of two rows exchanged, or that of the only row replaced.
  WRITE_TOKEN at once with ``expected_tokens``, TOKEN at the next forward with ``token_history``, else nothing.

What a GPU finds is read at the end of a later step, without waiting, as always. Only bytes that enter a digest are
flipped, and no slot twice until it is rewritten. A swapped table is put back in `end_step`, but what the model computed
from the wrong context stays, as after a real fault; entries that hold neither new tokens nor the one before them are
taken where there are any, so that no write goes astray. A fault waits for the device and allocates: a drill is no
production run. The guard's own memory is never touched.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from kvcanary.arrays import ArrayView
from kvcanary.backends import Backend
from kvcanary.backends.reference_arrays import Array
from kvcanary.backends.reference_slots import place_of
from kvcanary.batch import BoundBatch, StepBatch
from kvcanary.config import CanaryConfig
from kvcanary.errors import ConfigError
from kvcanary.layout import KvPool, plane_address
from kvcanary.perturb_record import Perturbation, Place
from kvcanary.perturb_spec import FaultKind, FaultSpec, parse_faults
from kvcanary.perturb_view import BatchView, Used, read_stamped

logger = logging.getLogger("kvcanary")


class _NotDone(Exception):
    """Nothing was changed; the text says why."""


class _Fault:
    """A fault of the drill with its dice: one pair for when, one for where, so that places do not shift the steps."""

    def __init__(self, spec: FaultSpec, nth: int) -> None:
        self.spec = spec
        kind = list(FaultKind).index(spec.kind)
        self.when, self.where = (np.random.default_rng((spec.seed, kind, nth, i)) for i in range(2))
        self.n_done = 0
        self.n_not_done: dict[str, int] = {}

    def is_due(self, step: int) -> bool:
        spec = self.spec
        return step > spec.warmup and self.n_done < spec.max_faults and self.when.random() < spec.p


class _Entry(NamedTuple):
    """A changed table entry, to be put back."""

    view: ArrayView
    at: tuple[int, ...]
    before: int
    after: int


def _say(text: str, *values: object) -> None:
    with suppress(Exception):  # a log handler that raises is not the engine's problem
        logger.warning("[canary] perturb: %s", text % values)


class Perturber:
    """Injects the faults of ``CanaryConfig.perturb``; made only when it is armed.

    Raises:
        ConfigError: a pool that is not there.
    """

    def __init__(self, config: CanaryConfig, pools: Sequence[KvPool], backend: Backend) -> None:
        specs = parse_faults(config.perturb or "")
        self._config, self._pools, self._backend = config, pools, backend
        self._names = [pool.name for pool in pools]
        for spec in specs:
            if spec.pool is not None and spec.pool not in self._names:
                known = ", ".join(map(repr, self._names))
                raise ConfigError(f"perturb: there is no pool={spec.pool!r} of '{spec}': give one of {known}")
        kinds = [spec.kind for spec in specs]
        faults = [_Fault(spec, kinds[:i].count(spec.kind)) for i, spec in enumerate(specs)]
        self._faults = sorted(faults, key=lambda fault: list(FaultKind).index(fault.spec.kind))
        self._batch: Callable[[], StepBatch | None] = lambda: None
        self._swapped: list[_Entry] = []
        self._damaged: dict[int, list[int]] = {}  # pool -> slot << 32 | forward that had written it
        self.done: list[Perturbation] = []
        self.n_skipped = 0
        logger.warning(
            "[canary] FAULT DRILL ARMED: this process damages its engine's KV cache and batches ON PURPOSE (%s); "
            "take KVCANARY_PERTURB away to stop",
            "; ".join(map(str, specs)),
        )

    # ---- called by the manager ---------------------------------------------------------------------------------------
    def note(self, batch: StepBatch) -> None:
        """This is the batch of the forward at hand, until another comes; it is not kept alive."""
        self._batch = weakref.ref(batch)

    def rebind(self, pools: Sequence[KvPool]) -> None:
        """The pools lie in other arrays from now on."""
        self._pools = pools

    @property
    def batch(self) -> StepBatch | None:
        """The batch that came last, if somebody still holds it."""
        return self._batch()

    def due(self, step: int, is_before_forward: bool) -> list[_Fault]:
        """Throw the dice of the faults of this half of the step."""
        mine = (f for f in self._faults if f.spec.kind.is_before_forward is is_before_forward)
        return [fault for fault in mine if fault.is_due(step)]

    def inject(self, faults: Sequence[_Fault], bound: Mapping[int, BoundBatch] | str, step: int, stream: Any) -> None:
        """Do what is due; what cannot be done is logged and counted, and is tried again when the dice say so.

        Args:
            bound: pool index -> the batch as it is bound to it; or why there is none.
        """
        for fault in faults:
            try:
                if isinstance(bound, str):
                    raise _NotDone(bound)  # noqa: TRY301  one way to say why, for all reasons
                done = self._inject(fault, bound, step, stream)
            except _NotDone as reason:
                self._skip(fault, step, str(reason))
            except Exception as error:  # noqa: BLE001  the drill must not be what brings the engine down
                self._skip(fault, step, f"{type(error).__name__}: {error}")
            else:
                fault.n_done += 1
                self.done.append(done)
                _say("%s", done)

    def restore(self, stream: Any) -> None:
        """Put swapped table entries back where the engine has not written since; never raises."""
        while self._swapped:
            entry = self._swapped.pop()
            try:
                now = int(self._backend.read_array(entry.view)[entry.at])
                if now == entry.after:
                    self._write(entry.view, entry.at, entry.before, stream)
                    continue
                _say("table entry %s was rewritten to %d while it was swapped; it is left so", list(entry.at), now)
            except Exception as error:  # noqa: BLE001  the engine may have raised, and its error must not be masked
                _say("table entry %s is still swapped (%s: %s)", list(entry.at), type(error).__name__, error)

    # ---- one fault ---------------------------------------------------------------------------------------------------
    def _inject(self, fault: _Fault, bound: Mapping[int, BoundBatch], step: int, stream: Any) -> Perturbation:
        spec = fault.spec
        index = int(fault.where.choice(sorted(bound))) if spec.pool is None else self._names.index(spec.pool)
        if index not in bound:
            raise _NotDone(f"the forward does not write pool {spec.pool!r}")
        view = BatchView.read(self._backend, self._pools[index], index, bound[index])
        inject = {
            FaultKind.FLIP_USED: self._flip_used,
            FaultKind.FLIP_UNUSED_CACHED: self._flip_unused_cached,
            FaultKind.FLIP_AFTER_FORWARD: self._flip_after_forward,
            FaultKind.TABLE_SWAP: self._table_swap,
            FaultKind.NEXT_TOKEN_SWAP: self._next_token_swap,
        }[spec.kind]
        done: dict[str, Any] = inject(view, fault.where, stream)
        return Perturbation(kind=spec.kind, step=step, pool=index, pool_name=view.pool.name, **done)

    def _skip(self, fault: _Fault, step: int, reason: str) -> None:
        self.n_skipped += 1
        n = fault.n_not_done[reason] = fault.n_not_done.get(reason, 0) + 1
        if n & (n - 1) == 0:  # ever fewer lines for what goes on
            _say("%s at step %d not done: %s (%d times so far)", fault.spec.kind.value, step, reason, n)

    def _flip_used(self, view: BatchView, dice: np.random.Generator, stream: Any) -> dict[str, Any]:
        used, lost = view.used(view.prefix), view.written_now()
        return self._flip_one_of(view, Used(*(a[~lost[used.slot]] for a in used)), dice, stream)

    def _flip_after_forward(self, view: BatchView, dice: np.random.Generator, stream: Any) -> dict[str, Any]:
        return self._flip_one_of(view, view.used(view.length), dice, stream)

    def _flip_one_of(self, view: BatchView, used: Used, dice: np.random.Generator, stream: Any) -> dict[str, Any]:
        stamped = read_stamped(self._backend, view.index, used.slot)
        key = used.slot << 32 | stamped.forward
        good = stamped.vouched & (stamped.position == used.position)
        i = self._choose(good & ~np.isin(key, self._damaged.get(view.index, [])), dice, "slot of a live row")
        row, position, slot = int(used.row[i]), int(used.position[i]), int(used.slot[i])
        flipped = self._flip(view, slot, (row, view.request_id(row), position), dice, stream)
        self._damaged.setdefault(view.index, []).append(int(key[i]))
        return {**flipped, "n_users": int((used.slot == slot).sum())}

    def _flip_unused_cached(self, view: BatchView, dice: np.random.Generator, stream: Any) -> dict[str, Any]:
        slots = np.arange(view.pool.n_slots)
        stamped = read_stamped(self._backend, view.index, slots)
        key = slots << 32 | stamped.forward
        unused = stamped.vouched & ~view.touched() & ~np.isin(key, self._damaged.get(view.index, []))
        unused &= ~np.isin(slots // view.pool.page_size, view.pool.reserved_blocks)
        slot = self._choose(unused, dice, "slot without a row")
        who = -1, int(stamped.owner[slot]), int(stamped.position[slot])
        flipped = self._flip(view, slot, who, dice, stream)
        self._damaged.setdefault(view.index, []).append(int(key[slot]))
        return flipped

    @staticmethod
    def _choose(may: Array, dice: np.random.Generator, what: str) -> int:
        found = np.flatnonzero(may)
        if not len(found):
            raise _NotDone(f"no {what} that was written under the guard and is undamaged")
        return int(dice.choice(found))

    def _flip(
        self, view: BatchView, slot: int, who: tuple[int, int, int], dice: np.random.Generator, stream: Any
    ) -> dict[str, Any]:
        pool, real_data = view.pool, self._config.real_data
        records, units = pool.plane_records(real_data), pool.digest_units(real_data)
        writable = [i for i in range(len(records)) if not pool.ordered_planes[i].view.readonly]
        if not writable:
            raise _NotDone("all planes are read-only" if len(records) else "no plane is digested (real_data='none')")
        i = int(dice.choice(writable))
        plane, d = pool.ordered_planes[i], max(d for d, unit in enumerate(units) if unit.first_plane <= i)
        byte = int(dice.integers(int(records[i]["n_chunks"]) * int(records[i]["chunk_bytes"])))
        mask = 1 << int(dice.integers(8))
        address = plane_address(records[i], slot, pool.page_size, byte)
        self._backend.flip_byte(address, mask, stream)
        place = Place(*who, slot, slot // pool.page_size, address, address - plane.view.pointer)
        return {
            "places": (place,), "plane": d, "plane_name": plane.name, "layer": plane.layer, "byte": byte, "mask": mask,
        }  # fmt: skip

    def _table_swap(self, view: BatchView, dice: np.random.Generator, stream: Any) -> dict[str, Any]:
        name = "block_table" if "block_table" in view.bound.views else "kv_indices"
        table = self._writable(view, name)
        page, arrays = view.arrays.table_page, view.arrays
        used = view.used(view.prefix)
        index = place_of(view.facts, used.position) // page
        first = np.flatnonzero(np.diff(used.row * (index.max(initial=0) + 1) + index, prepend=-1))
        last_prefix = dict(zip(view.rows.tolist(), view.prefix.tolist(), strict=True))
        quiet = [i for i in first if (index[i] + 1) * page < last_prefix[int(used.row[i])]]
        chosen = next((c for c in (quiet, first) if len({int(used.entry[i]) for i in c}) > 1), None)
        if chosen is None:
            raise _NotDone("the prefixes of live rows have less than two different table entries")
        one = int(dice.choice(chosen))
        two = int(dice.choice([i for i in chosen if used.entry[i] != used.entry[one]]))
        places = []
        for i, other in ((one, two), (two, one)):
            row, k = int(used.row[i]), int(index[i])
            at = (row, k) if arrays.kv_indptr is None else (int(arrays.kv_indptr[row]) + k,)
            entry = _Entry(table, at, int(used.entry[i]), int(used.entry[other]))
            offset = self._write(table, at, entry.after, stream)
            self._swapped.append(entry)
            slot = int(used.slot[i])
            places.append(
                Place(
                    row, view.request_id(row), int(used.position[i]), slot, slot // view.pool.page_size,
                    table.pointer + offset, offset, k, entry.before, entry.after,
                )
            )  # fmt: skip
        return {"places": tuple(places)}

    def _next_token_swap(self, view: BatchView, dice: np.random.Generator, stream: Any) -> dict[str, Any]:
        array, arrays = self._writable(view, "input_ids"), view.arrays
        token = arrays.query_start_loc[view.rows + 1].astype(np.int64) - 1
        ids, slots = arrays.input_ids[token].astype(np.int64), view.targets(token)
        known = np.flatnonzero((ids >= 0) & (slots >= 0))  # a negative id is still to be filled in on the device
        if not len(known):
            raise _NotDone("no live row has a token id for its last new token")
        one = int(dice.choice(known))
        others = [i for i in known if ids[i] != ids[one]]
        if others:
            two = int(dice.choice(others))
            changes = [(one, int(ids[two])), (two, int(ids[one]))]
        else:
            changes = [(one, int(ids[one]) - 1 if ids[one] else 1)]  # a neighbour that every vocabulary has
        places = []
        for i, after in changes:
            row, slot = int(view.rows[i]), int(slots[i])
            offset = self._write(array, (int(token[i]),), after, stream)
            shown = (int(ids[i]), after) if self._config.log_tokens else (None, None)
            places.append(
                Place(
                    row, view.request_id(row), int(view.length[i]) - 1, slot, slot // view.pool.page_size,
                    array.pointer + offset, offset, int(token[i]), *shown,
                )
            )  # fmt: skip
        return {"places": tuple(places)}

    # ---- engine memory -----------------------------------------------------------------------------------------------
    @staticmethod
    def _writable(view: BatchView, name: str) -> ArrayView:
        array = view.bound.views.get(name)
        if array is None:
            raise _NotDone("the batch has no table (a static cache)")
        if array.readonly:
            raise _NotDone(f"{name} is read-only")
        return array

    def _write(self, array: ArrayView, index: tuple[int, ...], value: int, stream: Any) -> int:
        """Write one element of i32 or i64; returns its offset in bytes."""
        offset = sum(i * stride for i, stride in zip(index, array.strides, strict=True))
        data = np.array([value], f"i{array.itemsize}").view(np.uint8)
        self._backend.write_memory(array.pointer + offset, data, stream)
        return offset
