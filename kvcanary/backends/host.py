"""The host backend: the reference, the fallback without a GPU, and the guard of KV caches in host memory.

It runs everything at the call, in the order in which `backends/device.py` launches the kernels; streams are ignored.
The semantics, with which the kernels must agree bit for bit, are in ``reference_*.py``: pure functions from the arrays
of engine and guard to facts and violation records, with names as in ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends import BoundCall, CapturedGraph, ProbeTarget, Resident, ownership
from kvcanary.backends import reference_data as ref_data
from kvcanary.backends import reference_moves as ref_moves
from kvcanary.backends import reference_patrol as patrol
from kvcanary.backends import reference_prefix as ref_prefix
from kvcanary.backends import reference_records as ref_records
from kvcanary.backends import reference_renumber as ref_renumber
from kvcanary.backends import reference_reserved as ref_reserved
from kvcanary.backends import reference_rows as ref_rows
from kvcanary.backends import reference_slots as ref_slots
from kvcanary.backends import reference_stamps as ref_stamps
from kvcanary.backends import reference_sweep as ref_sweep
from kvcanary.backends import reference_writes as ref_writes
from kvcanary.backends.host_recorder import Recorder, make_state
from kvcanary.backends.moves import Move, MoveOp, SlotImage
from kvcanary.backends.reference_arrays import Array, BatchArrays, PoolArrays, batch_arrays, pool_arrays
from kvcanary.backends.reference_slots import OK
from kvcanary.batch import BoundBatch
from kvcanary.config import CanaryConfig
from kvcanary.deferred import HostStaging, Staging
from kvcanary.errors import CaptureError
from kvcanary.layout import KvPool
from kvcanary.ledger import BlockChanges
from kvcanary.patrol import plan_patrol
from kvcanary.reserved import checked_planes
from kvcanary.state import CounterLayout
from kvcanary.tags import Detail, Reason, Stage


class HostBackend:
    """NumPy implementation of `kvcanary.backends.Backend`."""

    name = "host"

    def __init__(self, config: CanaryConfig, pools: Sequence[KvPool], max_requests: int, max_new_tokens: int) -> None:
        self._config = config
        self._kv_pools = tuple(pools)
        plans = plan_patrol(config, pools)
        self._pools = [pool_arrays(i, p, config, max_requests, plans[i].n_blocks) for i, p in enumerate(pools)]
        self._units = [p.digest_units(config.real_data) for p in pools]
        self._checked = [checked_planes(config, p) for p in pools]
        self.state = make_state(CounterLayout(len(pools)), max_requests, config.ring_capacity)
        self._recorder = Recorder(self.state, self._pools)
        self._rows: list[Array] = [np.zeros(0, abi.ROW) for _ in pools]

    # ---- a forward ---------------------------------------------------------------------------------------------------
    def bind(self, pool: int, bound: BoundBatch, is_first_forward: bool) -> BoundCall:
        return BoundCall(pool, batch_arrays(bound, self._config, is_first_forward))

    def head(self, calls: Sequence[BoundCall], stream: Any) -> None:
        for i, call in enumerate(calls):
            self._begin(call, is_first_pool=i == 0)
        for call in calls:
            pool, batch = self._pools[call.pool], call.batch
            self._write_head(pool, batch, self._rows[call.pool])
            if self._is_judging:
                self._recorder.count_launch(pool, Stage.HEAD)
                entries = ref_prefix.entries_of(pool, batch, self._rows[call.pool])
                self._verify(pool, batch, entries, Stage.HEAD)
                self._verify_data(pool, batch, entries)
            if batch.adopt:
                self._adopt(pool, batch, ref_prefix.entries_of(pool, batch, self._rows[call.pool]))
            if batch.is_first_forward and pool.scrub_blocks and self._is_judging:
                self._scrub(pool)
            if batch.is_first_forward and self._is_judging:
                self._check_reserved(pool)

    def tail(self, calls: Sequence[BoundCall], stream: Any) -> None:
        for call in calls:
            pool, batch, rows = self._pools[call.pool], call.batch, self._rows[call.pool]
            self._recorder.count_launch(pool, Stage.TAIL)
            pool.state["tail_forward"] = self._forward
            new = ref_writes.new_tokens(rows)
            target = ref_slots.write_slots(pool, batch, new.token)
            won = self._won(pool, new, target)
            if self._is_judging:
                # Stamps written in this forward are not judged at TAIL, so the order of the two halves does not matter.
                self._verify(pool, batch, ref_prefix.entries_of(pool, batch, rows), Stage.TAIL)
                for records in ref_writes.judge_new_tokens(pool, batch, rows, new, target, won, self._forward):
                    self._recorder.report(records)
                if pool.state["n_fresh"]:
                    ref_data.settle_fresh(pool, rows, ref_prefix.entries_of(pool, batch, rows))
            for half in range(len(pool.head)):
                pool.tail[half][target.slot[won]] = pool.head[half][target.slot[won]]
            self._recorder.count_entries(pool, Stage.TAIL, int(won.sum()))
            if self._units[call.pool]:
                self._recorder.count_data_launch(pool, Stage.TAIL)
                self._write_digests(pool, target.slot[won], pool.head[0]["position"][target.slot[won]])

    def abandon(self) -> None: ...

    def verify_layer(self, calls: Sequence[BoundCall], layer: int, stream: Any) -> None:
        for call in calls if self._is_judging else ():
            pool, rows = self._pools[call.pool], self._rows[call.pool]
            digests = [d for d, unit in enumerate(self._units[call.pool]) if unit.layer == layer]
            if not digests:
                continue
            self._recorder.count_data_launch(pool, Stage.HEAD)
            entries = ref_prefix.entries_of(pool, call.batch, rows)
            chosen = (rows["flags"][entries.row] & abi.ROW_PENDING != 0) & (entries.at.status == OK)
            about = ref_records.row_records(int(chosen.sum()), pool, pool.tag(Stage.HEAD), rows, entries.row[chosen])
            about["position"] = entries.position[chosen]
            self._compare_digests(self._recorder, pool, entries.at.slot[chosen], about, self._forward, digests)

    @property
    def _forward(self) -> int:
        return int(self.state.words[abi.STATE_FORWARD])

    @property
    def _is_judging(self) -> bool:
        return bool(self.state.words[abi.STATE_JUDGING])

    def _begin(self, call: BoundCall, is_first_pool: bool) -> None:
        pool, batch, words = self._pools[call.pool], call.batch, self.state.words
        if is_first_pool:
            forward = min(int(words[abi.STATE_FORWARD_DONE]) + 1, abi.LAST_FORWARD)
            words[abi.STATE_FORWARD] = forward
            if forward >= abi.RENUMBER_AT:
                self.state.control[abi.CONTROL_RENUMBER] = forward
            words[abi.STATE_STEP] = words[abi.STATE_STEP_DONE] + np.uint64(batch.is_first_forward)
            words[abi.STATE_JUDGING] = words[abi.STATE_PAUSE] == 0 and forward < abi.LAST_FORWARD
            words[abi.STATE_FORWARDS_JUDGED] += words[abi.STATE_JUDGING]
            if batch.is_first_forward:
                self.state.taint[:] = 0
        if pool.state["head_forward"] != pool.state["tail_forward"]:  # the forward before never reached TAIL
            place = int(pool.state["n_aborted"]) % abi.N_ABORTED
            if pool.state["n_aborted"] >= abi.N_ABORTED:
                pool.state["aborted_floor"] = pool.state["aborted"][place]
            pool.state["aborted"][place] = pool.state["head_forward"]
            pool.state["n_aborted"] += 1
        pool.state["head_forward"] = self._forward
        step = np.uint32(int(words[abi.STATE_STEP]) & 0xFFFFFFFF)
        pool.state["is_repeated"], pool.state["step"] = pool.state["step"] == step, step
        if pool.scrub_blocks and batch.is_first_forward and not words[abi.STATE_PAUSE]:
            pool.state["scrub_turn"] += 1
        self._rows[call.pool] = ref_rows.find_rows(pool, batch, self._forward)

    def _won(self, pool: PoolArrays, new: ref_writes.NewTokens, target: ref_slots.Slots) -> Array:
        claim = np.uint64(self._forward << 32) | (new.token + 1).astype(np.uint64)
        won: Array = (target.status == OK) & (pool.claims[np.maximum(target.slot, 0)] == claim)
        return won

    def _write_head(self, pool: PoolArrays, batch: BatchArrays, rows: Array) -> None:
        new = ref_writes.new_tokens(rows)
        target = ref_slots.write_slots(pool, batch, new.token)
        token = batch.input_ids[new.token].astype(np.int64).astype(np.int32)
        chain = np.zeros(len(token), np.uint64)
        starts = ref_rows.starts_of(pool, batch, rows, self._forward)
        for r in np.flatnonzero(rows["flags"] & abi.ROW_LIVE):
            mine = slice(*np.searchsorted(new.row, [r, r + 1]))
            chain[mine] = hashing.chain_scan(int(rows["anchor"][r]), token[mine], int(rows["prefix"][r]))
            ref_rows.keep_in_register(pool, rows[r], int(r), chain[mine], bool(starts.relative[r]), self._forward)
        if self._is_judging:
            self._recorder.report(ref_writes.judge_writes(pool, batch, rows, new, target, self._forward))
            self._recorder.report(ref_records.bad_rows(pool, rows))
            unanchored = rows["flags"] & (abi.ROW_LIVE | abi.ROW_ANCHORED) == abi.ROW_LIVE
            self._recorder.add(abi.STATE_UNANCHORED_ROWS, int(unanchored.sum()))
        stamps = np.zeros(len(token), abi.STAMP)
        stamps["chain"], stamps["token"], stamps["position"] = chain, token, new.position
        stamps["prev_slot"] = ref_writes.previous_slots(pool, batch, rows, starts, new)
        stamps["step"], stamps["owner"] = self._forward, rows["request_id"][new.row]
        if pool.blocks is not None:
            block = pool.block_states(target.slot)
            stamps["epoch"] = ownership.epochs_of_writes(block, batch.request_ids is not None, stamps["owner"])
            n_unowned = (ownership.is_unowned(block) & (target.status == OK)).sum()
            self._recorder.add(abi.STATE_UNOWNED_WRITES, int(n_unowned) * self._is_judging)
        won = self._won(pool, new, target)
        for half in range(len(pool.head)):
            pool.head[half][target.slot[won]] = stamps[won]
        self._recorder.count_entries(pool, Stage.HEAD, int(won.sum()))
        self._recorder.count_launch(pool, Stage.HEAD)
        words = self.state.words
        words[abi.STATE_FORWARD_DONE], words[abi.STATE_STEP_DONE] = words[abi.STATE_FORWARD], words[abi.STATE_STEP]

    # ---- verification ------------------------------------------------------------------------------------------------
    def _verify(self, pool: PoolArrays, batch: BatchArrays, entries: ref_prefix.Entries, stage: Stage) -> None:
        rows, recorder = self._rows[pool.index], self._recorder
        none = entries.at.status != OK
        at = ref_slots.Slots(*(a[none] for a in entries.at))
        tag = pool.tag(stage)
        recorder.report(ref_records.table_entry_records(pool, tag, rows, entries.row[none], entries.position[none], at))
        for half in range(len(pool.head)):
            recorder.report(ref_prefix.judge_stamps(pool, batch, rows, entries, stage, half, self._forward))
        left = ref_prefix.see_stamps(pool, stage, 0, entries.at, self._forward).left
        left &= ~ref_prefix.adoptable(pool, batch, rows, entries.row, entries.at)
        recorder.add(abi.STATE_UNJUDGED_SLOTS, int(left.sum()))
        recorder.count_entries(pool, stage, len(entries.row))

    def _verify_data(self, pool: PoolArrays, batch: BatchArrays, entries: ref_prefix.Entries) -> None:
        rows = self._rows[pool.index]
        if not self._units[pool.index]:
            return
        self._recorder.count_data_launch(pool, Stage.HEAD)
        due = ref_data.due_slots(pool, batch, rows, entries)
        about = ref_records.row_records(int(due.sum()), pool, pool.tag(Stage.HEAD), rows, entries.row[due])
        about["position"] = entries.position[due]
        self._compare_digests(self._recorder, pool, entries.at.slot[due], about, self._forward)

    def _compare_digests(
        self,
        recorder: Recorder,
        pool: PoolArrays,
        slots: Array,
        about: Array,
        forward: int,
        digests: Sequence[int] | None = None,
    ) -> None:
        units = self._units[pool.index]
        for d in range(len(units)) if digests is None else digests:
            unit = units[d]
            stored = pool.digests[d, slots]
            known = np.flatnonzero(stored)
            recorder.add(abi.STATE_DATA_SLOTS, len(known))
            differs = self._digest(pool.index, d, slots[known], about["position"][known]) != stored[known]
            odd = known[differs]  # judged in full: by what the stamps say
            judged = odd[ref_data.judgeable(pool, unit.half, slots[odd], forward)]
            stamps = pool.head[unit.half][slots[judged]]
            found = self._digest(pool.index, d, slots[judged], stamps["position"])
            bad = np.flatnonzero(found != stored[judged])
            v = about[judged[bad]]
            v["reasons"], v["slot"], v["plane"] = Reason.DATA, slots[judged[bad]], d
            v["tag"] += np.uint32(unit.half)
            ref_records.put_stamps(v, stamps[bad])
            v["stored_digest"], v["found_digest"] = stored[judged[bad]], found[bad]
            recorder.report(v)

    def _digest(self, pool: int, d: int, slots: Array, positions: Array) -> Array:
        unit, kv = self._units[pool][d], self._kv_pools[pool]
        planes = kv.ordered_planes[unit.first_plane : unit.first_plane + unit.n_planes]
        data = [kv.gather(plane, slots, self._config.real_data) for plane in planes]
        return hashing.digest(np.concatenate(data, axis=1) if len(data) > 1 else data[0], d, positions)

    def _write_digests(self, pool: PoolArrays, slots: Array, positions: Array) -> None:
        for d in range(len(self._units[pool.index])):
            pool.digests[d, slots] = self._digest(pool.index, d, slots, positions)

    def _adopt(self, pool: PoolArrays, batch: BatchArrays, entries: ref_prefix.Entries) -> None:
        rows = self._rows[pool.index]
        pending = rows["flags"][entries.row] & abi.ROW_PENDING != 0
        unknown = ref_prefix.adoptable(pool, batch, rows, entries.row, entries.at) & ~pending
        slots, claims = entries.at.slot[unknown], ref_prefix.adoption_claims(self._forward, entries.position[unknown])
        is_new = pool.claims[slots] >> np.uint64(32) != self._forward
        if pool.state["n_fresh"]:
            pool.state["n_fresh"] -= np.uint32(ref_stamps.is_fresh(pool, np.unique(slots)).sum())
        np.maximum.at(pool.claims, slots, claims)
        mine = pool.claims[slots] == claims
        slots, first = np.unique(slots[mine], return_index=True)
        positions = entries.position[unknown][mine][first]
        self._write_digests(pool, slots, positions)
        stamps = np.zeros(len(slots), abi.STAMP)
        stamps["token"], stamps["position"], stamps["prev_slot"] = abi.NO_TOKEN, positions, abi.PREV_NONE
        stamps["step"] = self._forward
        stamps["epoch"] = ref_stamps.block_epochs(pool, slots)
        for plane in (*pool.head, *pool.tail):
            plane[slots] = stamps
        self._recorder.add(abi.STATE_ADOPTED_SLOTS, int(is_new[mine][first].sum()))

    def _scrub(self, pool: PoolArrays) -> None:
        """The patrol's turn: digests and links of the written slots of the next blocks that somebody holds."""
        recorder = self._recorder
        self.state.scrub_run_counters[pool.index] += np.uint64(1)
        slots, n_orphans = patrol.patrolled_slots(pool, self._forward)
        recorder.add(abi.STATE_SCRUB_SLOTS, len(slots))
        recorder.add(abi.STATE_SCRUB_ORPHANS, n_orphans)
        about = ref_records.new_records(len(slots), pool, pool.tag(Stage.HEAD))
        about["detail"], about["position"] = Detail.SCRUB, pool.head[0]["position"][slots]
        self._compare_digests(recorder, pool, slots, about, self._forward)
        for half in range(len(pool.head)):
            recorder.report(patrol.judge_links(pool, half, slots))

    def _check_reserved(self, pool: PoolArrays) -> None:
        """NaN and Inf in the reserved blocks, in the steps that are due."""
        checked = self._checked[pool.index]
        if not checked or int(self.state.words[abi.STATE_STEP]) % self._config.check_reserved_every:
            return
        self._recorder.add(abi.STATE_RESERVED_CHECKS, len(checked) * len(pool.reserved))
        for index, plane in checked:
            self._recorder.report(ref_reserved.judge_reserved(pool, self._kv_pools[pool.index], index, plane))

    def graphs(self, calls: Sequence[BoundCall]) -> tuple[CapturedGraph, CapturedGraph]:
        raise CaptureError(
            "graphs(): the host backend runs NumPy, there is nothing to capture: call head() and tail() around the "
            "model, or guard KV on a GPU with backend='cuda'"
        )

    # ---- host-driven -------------------------------------------------------------------------------------------------
    def sweep(self, pool_index: int, resident: Resident, stream: Any) -> bool:
        pool, recorder = self._pools[pool_index], self._recorder
        recorder.count_launch(pool, Stage.SWEEP)
        recorder.count_entries(pool, Stage.SWEEP, len(resident.slots))
        slots = np.asarray(resident.slots, np.int64)
        inside = (slots >= 0) & (slots < pool.n_slots) & ~np.isin(slots // pool.page_size, pool.reserved)
        outside = ref_records.new_records(int((~inside).sum()), pool, pool.tag(Stage.SWEEP))
        outside["slot"], outside["position"] = slots[~inside], np.asarray(resident.positions)[~inside]
        outside["reasons"] = np.where(slots[~inside] >= pool.n_slots, Reason.OUT_OF_RANGE, Reason.UNWRITTEN)
        outside["detail"] = Detail.TABLE_ENTRY
        recorder.report(outside)
        for half in range(len(pool.head)):
            recorder.report(ref_sweep.judge_resident(pool, resident, half, inside))
        if self._units[pool_index]:
            recorder.count_data_launch(pool, Stage.SWEEP)
            inside &= ~ref_stamps.is_fresh(pool, np.where(inside, slots, 0))  # their bytes may be on their way
            about = ref_records.new_records(int(inside.sum()), pool, pool.tag(Stage.SWEEP))
            about["position"] = np.asarray(resident.positions)[inside]
            self._compare_digests(recorder, pool, slots[inside], about, forward=0)
        return True

    def update_blocks(self, pool: int, changes: BlockChanges, stream: Any) -> None:
        blocks, now = self._pools[pool].blocks, self._forward
        assert blocks is not None
        for op, (first, last) in enumerate(pairwise((0, *changes.ends))):
            if last > first:
                ownership.change_blocks(blocks, op, changes.ids[first:last], changes.owner, now)

    def move(self, move: Move, stream: Any) -> SlotImage | None:
        pool, halves = self._pools[move.pool], [unit.half for unit in self._units[move.pool]]
        slots = ref_moves.listed_slots(pool, move.slots, move.per_entry)
        n_skipped, image, inside = int((slots < 0).sum()), move.image, slots >= 0
        if move.op in (MoveOp.COPY, MoveOp.COMMIT):
            sources = ref_moves.listed_slots(pool, move.sources, move.per_entry)
            n_skipped += int((sources < 0).sum())
            image = ref_moves.gather(pool, sources)
        if move.op is MoveOp.EXPORT:
            image = ref_moves.gather(pool, slots)
        elif move.op is MoveOp.REFRESH:
            inside &= ref_moves.is_whole(pool, np.maximum(slots, 0))
            n_skipped = int((~inside).sum())
            self._write_digests(pool, slots[inside], pool.head[0]["position"][slots[inside]])
        elif move.op is MoveOp.LOCALIZE:
            ref_moves.localize(pool, slots[inside], self._move_step(), move.drops_digests)
        elif move.op is MoveOp.ADOPT:
            n_skipped = self._adopt_listed(pool, move, slots)
        else:
            assert image is not None
            if move.op is MoveOp.COMMIT:
                n_skipped += ref_moves.commit(pool, image, move.row_starts, move.request_slots, move.prefix_lens)
            ref_moves.scatter(pool, image, slots, self._move_step(), halves)
        self._recorder.add(abi.STATE_SKIPPED_MOVES, n_skipped)
        return image if move.op is MoveOp.EXPORT else None

    def _adopt_listed(self, pool: PoolArrays, move: Move, slots: Array) -> int:
        positions = np.asarray(move.positions).astype(np.int64)
        good = (slots >= 0) & (positions >= 0) & (positions <= ref_rows.MAX_POSITIONS)
        tokens = np.full(move.n, -1) if move.tokens is None else np.asarray(move.tokens).astype(np.int64)
        chains = np.zeros(move.n, np.uint64) if move.chains is None else move.chains
        ref_moves.adopt(pool, slots[good], positions[good], tokens[good], chains[good], self._move_step())
        self._write_digests(pool, slots[good], positions[good])
        return int((~good).sum())

    def _move_step(self) -> int:
        """The forward last begun; a move before the first one takes its number, as 0 would mean never written."""
        words = self.state.words
        if not words[abi.STATE_FORWARD]:
            words[abi.STATE_FORWARD] = words[abi.STATE_FORWARD_DONE] = 1
        return self._forward

    def shadow_arrays(self, pool: int) -> dict[str, Any]:
        arrays, halves = self._pools[pool], self._kv_pools[pool].halves
        found = {f"{stage}_{h.name}": getattr(arrays, stage.lower())[h] for h in halves for stage in ("HEAD", "TAIL")}
        shadow: dict[str, Any] = {name: a.view(np.uint8).reshape(len(a), -1) for name, a in found.items()}
        return shadow | {f"DIGEST_{d}": digests for d, digests in enumerate(arrays.digests)}

    def rebind(self, pool: int, kv: KvPool, stream: Any) -> None:
        self._kv_pools = (*self._kv_pools[:pool], kv, *self._kv_pools[pool + 1 :])
        self._checked[pool] = checked_planes(self._config, kv)

    def set_paused(self, is_paused: bool, stream: Any) -> None:
        self.state.words[abi.STATE_PAUSE] = is_paused

    def renumber(self, stream: Any) -> None:
        ref_renumber.renumber(self._pools, self.state)

    def reset(self, pool: int | None, stream: Any) -> None:
        for p in self._pools if pool is None else [self._pools[pool]]:
            for array in (*p.head, *p.tail, p.digests, p.registers):
                array[...] = np.zeros((), array.dtype)

    def staging(self, depth: int) -> Staging:
        return HostStaging(self.state.layout.n_words, depth)

    def snapshot_words(self) -> Array:
        words: Array = self.state.words.copy()
        return words

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self._pools.clear()

    @property
    def memory_bytes(self) -> int:
        lists = [(*p.head, *p.tail, p.claims, p.digests, p.registers, p.register_claims) for p in self._pools]
        state = (self.state.words, self.state.taint, self.state.violation_log, self.state.control)
        blocks = [p.blocks for p in self._pools if p.blocks is not None]
        return sum(a.nbytes for arrays in (*lists, state, blocks) for a in arrays)

    def read_blocks(self, pool: int) -> Array:
        blocks = self._pools[pool].blocks
        assert blocks is not None
        return blocks.copy()

    # ---- prove -------------------------------------------------------------------------------------------------------
    def read_stamps(self, pool: int, slots: Array) -> list[tuple[Array, Array]]:
        p = self._pools[pool]
        return [(head[slots].copy(), tail[slots].copy()) for head, tail in zip(p.head, p.tail, strict=True)]

    def read_array(self, view: Any) -> Array:
        array: Array = view.host.copy()
        return array

    def flip_byte(self, address: int, mask: int, stream: Any) -> None:
        from kvcanary.arrays import host_array

        host_array(address, (1,), (1,), np.uint8)[0] ^= mask

    def write_memory(self, address: int, data: Array, stream: Any) -> None:
        from kvcanary.arrays import host_array

        host_array(address, data.shape, (1,), np.uint8)[:] = data

    def probe(self, call: BoundCall, target: ProbeTarget, stream: Any) -> Array:
        """Compare all digests of one (row, position) into a state of its own; returns the records."""
        pool, batch = self._pools[call.pool], call.batch
        state = make_state(self.state.layout, len(self.state.taint), max(1, len(self._units[call.pool])))
        recorder = Recorder(state, self._pools)
        rows = np.zeros(batch.rows, abi.ROW)
        rows[target.row] = target.as_row()
        entries = ref_prefix.entries_of(replace(pool, sink=0), batch, rows)  # this position alone
        about = ref_records.row_records(len(entries.row), pool, pool.tag(Stage.HEAD), rows, entries.row)
        about["position"] = entries.position
        ok = entries.at.status == OK
        self._compare_digests(recorder, pool, entries.at.slot[ok], about[ok], forward=0)
        return state.violation_log[: int(state.words[abi.STATE_CLAIMED])]
