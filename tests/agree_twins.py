"""Several guards over equal bytes, driven alike and compared after every call, bit for bit.

`Twins` keeps the truth of the engine's memory in host arrays and copies it to each `agree.Side`; a side owns the arrays
that its guard reads. The first side is the one that the others are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from agree import Array, Arrays, PoolSpec, Side
from agree_differences import difference, record_difference, sorted_words

from kvcanary import CanaryConfig, LifecycleError, StepBatch, abi
from kvcanary.backends import Resident
from kvcanary.backends.moves import Move, MoveOp
from kvcanary.prove import Proof
from kvcanary.tags import CanaryLaunchTag, Stage

RING_CAPACITY = 1 << 14


class Twins:
    """Guards on several sides, and the engine's memory that they are all given copies of.

    Attributes:
        buffers: the truth: what every side's buffers hold after the next `publish`.
        pools: the pools over ``buffers``, for addressing.
        records: VIOLATION[n], what the first side reported in the last call; empty once the ring overflowed.
    """

    def __init__(
        self,
        specs: Sequence[PoolSpec],
        sides: Sequence[Side],
        max_requests: int = 8,
        max_new_tokens: int = 256,
        *,
        is_acknowledging: bool = True,
        **config: Any,
    ) -> None:
        self.config = CanaryConfig(**{"ring_capacity": RING_CAPACITY, **config})
        self.buffers = [{name: np.array(a, order="C") for name, a in s.buffers.items()} for s in specs]
        self.pools = [s.build(b) for s, b in zip(specs, self.buffers, strict=True)]
        self.sides = list(sides)
        for side in self.sides:
            side.start(self.config, specs, max_requests, max_new_tokens)
        self.records = np.zeros(0, abi.VIOLATION)
        self._n_rows: dict[int, int] = {}
        self._is_acknowledging = is_acknowledging
        self.is_paused = False
        self._words = {"forward": 0, "step": 0, "judged": 0}
        self._kernel_runs = np.zeros((len(specs), len(CanaryLaunchTag)), np.uint64)
        self._data_runs = np.zeros((len(specs), len(Stage)), np.uint64)

    @property
    def is_dropping(self) -> bool:
        """Whether a ring overflowed: which records it then holds is a matter of order."""
        return bool(self.words[abi.STATE_DROPPED])

    @property
    def words(self) -> Array:
        """State words and counters of the first side."""
        return self.sides[0].manager.backend.snapshot_words()

    def publish(self) -> None:
        """Copy the truth to every side."""
        for side in self.sides:
            for mine, theirs in zip(self.buffers, side.buffers, strict=True):
                for name, array in mine.items():
                    side.write(theirs[name], array)

    def write_kv(self, pool: int, slots: Array, bytes_of: np.random.Generator) -> None:
        """Random bytes into every plane of some slots (of the truth)."""
        kv = self.pools[pool]
        for plane in kv.planes:
            at = kv.host_bytes(plane)
            at[kv.slot_index(plane, slots)] = bytes_of.integers(0, 256, (len(slots), *at.shape[-2:]), np.uint8)

    # ---- a forward ----
    def bind(self, arrays: Arrays) -> list[StepBatch]:
        """The batch on every side, over copies of these arrays."""
        return [StepBatch(**{k: _place(side, v) for k, v in arrays.items()}) for side in self.sides]

    def rewrite(self, batches: Sequence[StepBatch], arrays: Arrays) -> None:
        """Give the arrays of bound batches other contents: what a captured graph would read."""
        for side, batch in zip(self.sides, batches, strict=True):
            for name, value in arrays.items():
                theirs = getattr(batch, name)
                pairs = zip(theirs, value, strict=True) if isinstance(value, list) else ((theirs, value),)
                for array, values in pairs:
                    if isinstance(values, np.ndarray):
                        side.write(array, values)

    def forward(
        self,
        arrays: Arrays,
        *,
        model: Callable[[], None] | None = None,
        between: Arrays | None = None,
        index: int = 0,
        pools: Sequence[int] | None = None,
        has_tail: bool = True,
        batches: Sequence[StepBatch] | None = None,
    ) -> Array:
        """HEAD, the model on the truth, TAIL; compared after each. Returns the records of both.

        Where HEAD of a side comes late, both are compared after TAIL.

        Args:
            between: arrays that change between HEAD and TAIL.
            has_tail: False: the model raises.
            batches: from `bind`, to go on with; None = new ones.
        """
        self.publish()
        if batches is None:
            batches = self.bind(arrays)
        else:
            self.rewrite(batches, arrays)
        chosen = list(range(len(self.pools))) if pools is None else list(pools)
        for side, batch in zip(self.sides, batches, strict=True):
            side.manager.head(batch, index=index, pools=pools)
            self._n_rows.update(dict.fromkeys(chosen, len(side.to_host(batch.query_start_loc)) - 1))
        self._expect_head(chosen, is_first=index == 0)
        is_late = any(side.is_late for side in self.sides)
        records = [self.records[:0]]
        if not is_late:
            self._check("HEAD")
            records = [self.records]
        if model is not None:
            model()
            self.publish()
        if between is not None:
            self.rewrite(batches, between)
        if not has_tail:
            for side in self.sides:
                side.manager.abandon_forward()
            if is_late:
                self._check("HEAD of a forward that raised")
                records = [self.records]
            return records[0]
        for side, batch in zip(self.sides, batches, strict=True):
            side.manager.tail(batch)
        self._expect_tail(chosen)
        self._check("TAIL")
        self.records = np.concatenate([*records, self.records])
        self._check_untouched(batches, {**arrays, **(between or {})})
        return self.records

    # ---- host-driven ----
    def sweep(self, pool: int, slots: Array, positions: Array, predecessors: Array, tokens: Array | None) -> Array:
        self.publish()
        for side in self.sides:
            lists = [None if a is None else side.to_device(a) for a in (slots, positions, predecessors, tokens)]
            assert side.manager.backend.sweep(pool, Resident(*lists), None)
        self._kernel_runs[pool, self._tags(pool, Stage.SWEEP)] += 1
        self._data_runs[pool, Stage.SWEEP] += self._has_digests(pool)
        self._check("SWEEP")
        return self.records

    def verify_layer(self, batches: Sequence[StepBatch], layer: int) -> Array:
        """Between HEAD and TAIL: from the ``model`` of `forward`, which was given ``batches``."""
        self.publish()
        for side, batch in zip(self.sides, batches, strict=True):
            side.manager.verify_layer(batch, layer)
        for pool, kv in enumerate(self.pools):
            units = kv.digest_units(self.config.real_data)
            self._data_runs[pool, Stage.HEAD] += not self.is_paused and any(unit.layer == layer for unit in units)
        self._check(f"layer {layer}")
        return self.records

    def lifecycle(self, events: Sequence[Any]) -> LifecycleError | None:
        """Say who owns which blocks; returns the error that every side raises alike, None if none does."""
        errors: list[LifecycleError | None] = []
        for side in self.sides:
            try:
                side.manager.lifecycle.apply(events)
                errors.append(None)
            except LifecycleError as error:
                errors.append(error)
        texts = {(str(error), error.event_index) if error else None for error in errors}
        assert len(texts) == 1, texts
        self._check("lifecycle")
        return errors[0]

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A call of `kvcanary.moves.MoveCalls` on every manager; the answer, which must be one."""
        self.publish()
        answers = [getattr(side.manager, name)(*args, **kwargs) for side in self.sides]
        assert all(answer == answers[0] for answer in answers), f"{name}() answers differently"
        self._check_moved(name, is_stamping=name not in ("export_slots", "refresh_digests"))
        return answers[0]

    def move(self, op: MoveOp, pool: int, slots: Array, is_wide: bool = False, **lists: Any) -> None:
        """A move whose lists lie on each side's device, so that nobody has checked them."""
        self.publish()
        n = len(slots) * lists.get("per_entry", 1)
        for side in self.sides:
            given = {**lists, "slots": slots}
            for name, values in given.items():
                if isinstance(values, np.ndarray):
                    width = "u8" if name == "chains" else "i8" if is_wide else "i4"
                    given[name] = side.to_list(values.astype(width))
            side.manager.backend.move(Move(op=op, pool=pool, n=n, is_wide=is_wide, **given), None)
        self._check_moved(op.name, is_stamping=op not in (MoveOp.EXPORT, MoveOp.REFRESH))

    def _check_moved(self, call: str, is_stamping: bool) -> None:
        if is_stamping and self.words[abi.STATE_FORWARD]:  # before the first forward, a move takes its number
            self._words["forward"] = max(1, self._words["forward"])
        self._check(call)

    def set_paused(self, is_paused: bool) -> None:
        self.is_paused = is_paused
        for side in self.sides:
            side.manager.pause() if is_paused else side.manager.resume()
        self._check("pause()" if is_paused else "resume()")

    def reset(self, pool: int | None = None) -> None:
        for side in self.sides:
            side.manager.reset(pool)
        self._check("reset()")

    def edit_guard(self, pool: int, name: str, change: Callable[[Array], None]) -> None:
        """Change a guard array on every side, behind the guard's back."""
        for side in self.sides:
            side.edit_guard(pool, name, change)

    def flip(self, pool: int, name: str, byte: int, mask: int) -> None:
        """XOR one byte of a guard array."""

        def change(values: Array) -> None:
            values.reshape(-1).view(np.uint8)[byte] ^= mask

        self.edit_guard(pool, name, change)

    def prove(self, arrays: Arrays) -> Proof:
        self.publish()
        proofs = [s.manager.prove(b) for s, b in zip(self.sides, self.bind(arrays), strict=True)]
        for proof in proofs:
            assert proof == proofs[0]
        self._check("prove()")
        return proofs[0]

    # ---- what must hold ----
    def _tags(self, pool: int, stage: Stage) -> list[int]:
        kv = self.pools[pool]
        return [CanaryLaunchTag.of(stage, half, kv.kind) for half in kv.halves]

    def _has_digests(self, pool: int) -> bool:
        return bool(self.pools[pool].digest_units(self.config.real_data))

    def _expect_head(self, pools: Sequence[int], is_first: bool) -> None:
        is_judging = not self.is_paused
        self._words["forward"] += 1
        self._words["step"] += is_first
        self._words["judged"] += is_judging
        for pool in pools:  # one launch writes stamps, one verifies them, one verifies data
            self._kernel_runs[pool, self._tags(pool, Stage.HEAD)] += 1 + is_judging
            self._data_runs[pool, Stage.HEAD] += is_judging and self._has_digests(pool)

    def _expect_tail(self, pools: Sequence[int]) -> None:
        for pool in pools:
            self._kernel_runs[pool, self._tags(pool, Stage.TAIL)] += 1
            self._data_runs[pool, Stage.TAIL] += self._has_digests(pool)

    def _check(self, call: str) -> None:
        """Everything that the guards know, compared; then the laws of the counters."""
        for side in self.sides:
            side.manager.backend.synchronize()
        first, *others = self.sides
        facts = self._facts(first)
        for side in others:
            for name, value in self._facts(side).items():
                assert np.array_equal(value, facts[name]), f"{call}: {difference(side.name, name, value, facts[name])}"
        self._check_laws(call)
        self.records = first.new_records(self._is_acknowledging)
        theirs = [s.new_records(self._is_acknowledging) for s in others]
        if self.is_dropping:
            self.records = self.records[:0]
            return
        mine = sorted_words(self.records)
        for side, records in zip(others, theirs, strict=True):
            found = sorted_words(records)
            assert np.array_equal(mine, found), f"{call}: {record_difference(side.name, mine, found)}"

    def _facts(self, side: Side) -> dict[str, Array]:
        facts = {"words": side.manager.backend.snapshot_words(), "taint": side.to_host(side.manager.taint)}
        for i, pool in enumerate(self.pools):
            names = [f"{plane}{h}" for plane in ("head", "tail") for h in range(len(pool.halves))]
            names += ["claims", "registers", "register_claims", *(["digests"] if self._has_digests(i) else [])]
            names += ["blocks"] if self.config.lifecycle else []
            for name in names:
                array = side.to_host(side.guard_array(i, name))
                facts[f"{name} of pool {i}"] = np.ascontiguousarray(array).reshape(-1).view("u4")
            facts[f"state of pool {i}"] = side.pool_state(i).view("u4")
            facts[f"rows of pool {i}"] = side.rows(i, self._n_rows.get(i, 0)).view("u4")
        return facts

    def _check_laws(self, call: str) -> None:
        words, layout = self.words, self.sides[0].manager.state.layout
        assert words[abi.STATE_OBSERVATIONS] == words[abi.STATE_CLAIMED] + words[abi.STATE_DROPPED]
        seen = [int(words[w]) for w in (abi.STATE_FORWARD, abi.STATE_STEP, abi.STATE_FORWARDS_JUDGED)]
        assert seen == list(self._words.values()), call
        assert np.array_equal(layout.kernel_runs(words), self._kernel_runs), f"{call}: a launch counts once per tag"
        assert np.array_equal(layout.data_runs(words), self._data_runs), f"{call}: a data launch counts once"
        for side in self.sides:
            alarm = int(side.manager.state.control[abi.CONTROL_ALARM])
            assert (alarm > 0) == (words[abi.STATE_CLAIMED] > 0), "the alarm word tells that there is a record"
            assert alarm <= words[abi.STATE_CLAIMED]

    def _check_untouched(self, batches: Sequence[StepBatch], arrays: Arrays) -> None:
        """The guard writes nothing of the engine's."""
        for side, batch in zip(self.sides, batches, strict=True):
            for mine, theirs in zip(self.buffers, side.buffers, strict=True):
                for name, array in mine.items():
                    assert np.array_equal(side.to_host(theirs[name]), array), f"{side.name} wrote to {name}"
            for name, value in arrays.items():
                theirs_too = getattr(batch, name)
                pairs = zip(theirs_too, value, strict=True) if isinstance(value, list) else ((theirs_too, value),)
                for found, given in pairs:
                    if isinstance(given, np.ndarray):
                        assert np.array_equal(side.to_host(found), given), f"{side.name} wrote to {name}"


def _place(side: Side, value: Any) -> Any:
    """A value of a StepBatch on a side; a table whose rows lie apart stays one."""
    if isinstance(value, list):
        return [_place(side, v) for v in value]
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == 2 and value.size and not value.flags.c_contiguous:
        return side.to_device_rows(value, value.strides[0])
    return side.to_device(value)
