"""The fault drill on the reference and on the kernels: what it does is what it says, and the guard says it too."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from base import full_config
from drill_toy import DrillToy
from engine import PAGE, ToyEngine
from simt.driver import simt_backend

from kvcanary import (
    CanaryConfig,
    CanaryManager,
    ConfigError,
    FaultKind,
    Perturbation,
    PoolKind,
    Reason,
    StepBatch,
    layouts,
)
from kvcanary.deferred import HostStaging

Make = Callable[..., DrillToy]
PREFIX_REASONS = Reason.TOKEN | Reason.POSITION | Reason.CHAIN | Reason.UNWRITTEN


@pytest.fixture(params=["host", "kernels"])
def make(request: pytest.FixtureRequest) -> Make:
    if request.param == "host":
        return functools.partial(DrillToy, backend="host")
    return functools.partial(
        DrillToy, backend=functools.partial(simt_backend, library=request.getfixturevalue("library"))
    )


def armed(text: str, **config: Any) -> CanaryConfig:
    """For a manager that a test makes itself."""
    settings = {"verify_data_every": 1, "ring_capacity": 256, "perturb": text, "perturb_armed": True}
    return full_config(**{**settings, **config})


def the_one(toy: ToyEngine) -> Perturbation:
    (done,) = toy.manager.perturbations
    return done


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    return [line for line in lines if line.startswith("[canary] perturb:")]


def address_of(toy: DrillToy, done: Perturbation) -> int:
    """The address of the byte that a flip names, worked out from the arrays alone."""
    layers = {"k": toy.k, "v": toy.v}[done.plane_name]
    assert done.layer is not None and done.byte is not None
    layer, slot = layers[done.layer], done.places[0].slot
    return int(layer[slot // PAGE, slot % PAGE].ctypes.data) + done.byte


class TestFlips:
    @pytest.mark.parametrize("seed", range(4))
    def test_flip_used_changes_the_named_bit_and_the_guard_names_it(self, make: Make, seed: int) -> None:
        toy = make(perturb=f"flip_used:p=1,warmup=8,seed={seed}").run(8)
        before: list[np.ndarray[Any, Any]] = []
        changed: list[tuple[int, int]] = []
        toy.decode(lambda: before.extend(toy.memory()), lambda: changed.extend(toy.changed_bits(before)))
        done = the_one(toy)
        place = done.places[0]
        assert changed == [(place.address, done.mask)] == [(address_of(toy, done), done.mask)]
        assert (done.kind, done.step, done.pool_name, done.n_users) == (FaultKind.FLIP_USED, 9, "full", 1)
        assert place.position < 8 and place.request_id == place.row + 1
        assert place.slot == (1 + 3 * place.row) * PAGE + place.position and place.block == place.slot // PAGE
        (v,) = toy.manager.violations()
        assert (v.reasons, v.step, v.slot, v.plane) == (Reason.DATA, done.step, place.slot, done.plane)
        assert (v.layer, v.plane_name) == (done.layer, done.plane_name)
        assert (v.position, v.row, v.request_id) == (place.position, place.row, place.request_id)

    @pytest.mark.parametrize("seed", range(6))
    def test_flip_used_is_found_within_verify_data_every_forwards(self, make: Make, seed: int) -> None:
        toy = make(perturb=f"flip_used:p=1,warmup=4,seed={seed}", verify_data_every=7).run(4 + 7)
        (v,) = toy.manager.violations()
        assert v.slot == the_one(toy).places[0].slot and 5 <= v.step <= 5 + 7

    def test_flip_after_forward_comes_after_tail_and_is_found_in_the_next_step(self, make: Make) -> None:
        for seed in range(4):
            toy = make(perturb=f"flip_after_forward:p=1,warmup=6,seed={seed}").run(6)
            before: list[np.ndarray[Any, Any]] = []
            toy.decode(between=lambda toy=toy, before=before: before.extend(toy.memory()))
            done = the_one(toy)
            bits = toy.changed_bits(before)
            assert (done.places[0].address, done.mask) in bits or done.places[0].position == 6  # a new slot's bytes
            assert (done.step, done.places[0].address) == (7, address_of(toy, done))
            assert toy.manager.violations() == ()
            toy.decode()
            (v,) = toy.manager.violations()
            place = done.places[0]
            assert (v.reasons, v.step, v.slot, v.request_id) == (Reason.DATA, 8, place.slot, place.request_id)

    def test_flip_unused_cached_is_found_when_a_request_comes_back_to_it(self, make: Make) -> None:
        toy = make(perturb="flip_unused_cached:p=1,warmup=7")
        toy.step((2, 0, 6))
        toy.run(6)
        assert toy.manager.perturbations == ()
        toy.decode()
        done = the_one(toy)
        place = done.places[0]
        assert (place.row, place.request_id, done.step) == (-1, 3, 8)
        assert place.block in (7, 8) and place.slot == 7 * PAGE + place.position
        assert toy.manager.violations() == ()
        toy.step((2, 6, 1))
        (v,) = toy.manager.violations()
        assert (v.reasons, v.slot, v.plane, v.request_id) == (Reason.DATA, place.slot, done.plane, 3)

    def test_flip_unused_cached_is_found_by_the_sweep(self, make: Make) -> None:
        toy = make(perturb="flip_unused_cached:p=1,warmup=3", sweep_interval=1)
        toy.step((2, 0, 6))
        slots = np.arange(7 * PAGE, 7 * PAGE + 6, dtype=np.int32)
        toy.manager.attach_resident_set(lambda: (slots, slots - slots[0], np.r_[-1, slots[:-1]].astype(np.int32)))
        toy.run(3)
        assert [v.slot for v in toy.manager.violations()] == [the_one(toy).places[0].slot]

    def test_no_slot_is_flipped_twice_until_it_is_rewritten(self, make: Make) -> None:
        toy = make(perturb="flip_used:p=1,warmup=5,max=100", rows=1).run(6)
        for _ in range(30):
            toy.p = 5  # the same five prefix slots for ever
            toy.decode()
        slots = [p.places[0].slot for p in toy.manager.perturbations]
        assert sorted(slots) == list(range(PAGE, PAGE + 5))
        assert toy.manager.n_perturbations_skipped == 31 - 5
        assert {(v.slot, v.reasons) for v in toy.manager.violations()} == {(s, Reason.DATA) for s in slots}
        toy.history[:] = -1
        toy.step((0, 0, 5))  # rewritten
        toy.p = 5
        toy.decode()
        assert len(toy.manager.perturbations) == 6

    def test_only_digested_bytes_are_flipped(self) -> None:
        toy = DrillToy(backend="host")
        pool = layouts.hnd(k=[np.zeros((16, 2, PAGE, 32), np.uint8)])  # of two chunks of 32 bytes, 16 are digested
        manager = CanaryManager(armed("flip_used:p=1,warmup=1,max=50", real_data="partial"), [pool], 4, 64)
        with manager.step(), manager.forward(toy.batch((0, 0, 12))):
            pass
        batch = toy.batch((0, 11, 1))
        for _ in range(8):
            with manager.step(batch=batch), manager.forward(batch):
                pass
        assert len(manager.perturbations) == len(manager.violations()) == 8
        assert {p.byte // 16 for p in manager.perturbations if p.byte is not None} == {0, 1}

    def test_a_window_is_all_that_is_flipped_in(self) -> None:
        toy = DrillToy(backend="host")
        pool = layouts.nhd(k=toy.k, v=toy.v, page_size=PAGE, kind=PoolKind.SWA, window=4)
        toy.manager = CanaryManager(armed("flip_used:p=1,warmup=11,max=20"), [pool], 4, 64)
        toy.run(11)
        for _ in range(10):
            toy.p = 11
            toy.decode()
        assert {p.places[0].position for p in toy.manager.perturbations} == {8, 9, 10}
        assert len(toy.manager.perturbations) == 6  # three positions, two rows

    def flipped_until_none_is_left(self, toy: DrillToy, batch: StepBatch) -> set[int]:
        """The slots that the drill takes for used, one after the other, of a forward that never runs."""
        while not toy.manager.n_perturbations_skipped:
            toy.manager.begin_step(batch=batch)
            toy.manager.abandon_step()
        return {p.places[0].slot for p in toy.manager.perturbations}

    def test_a_slot_that_the_forward_rewrites_is_not_flipped(self, make: Make) -> None:
        toy = make(perturb="flip_used:p=1,warmup=1,max=20")
        toy.step((0, 0, 6))
        table = np.array([[1, 2, 3], [1, 5, 6]], np.int32)
        batch = toy.batch((0, 6, 1), (1, 0, 4), block_table=table, slot_mapping=np.array([10, 4, 5, 6, 7]))
        assert self.flipped_until_none_is_left(toy, batch) == {8, 9}

    @pytest.mark.parametrize("is_pending", [False, True])
    def test_padding_and_rows_whose_kv_is_being_loaded_are_not_flipped(self, make: Make, is_pending: bool) -> None:
        toy = make(perturb="flip_used:p=1,warmup=1,max=20")
        toy.step((0, 0, 3), (1, 0, 3))
        if is_pending:
            batch = toy.batch((0, 3, 1), (1, 3, 1), pending=np.array([0, 1], np.uint8))
        else:
            batch = toy.batch((0, 3, 1), (1, 3, 1))
            batch.slot_mapping[1] = -1
        assert self.flipped_until_none_is_left(toy, batch) == {4, 5, 6}

    def test_users_of_a_shared_slot_are_counted(self, make: Make) -> None:
        toy = make(perturb="flip_used:p=1,warmup=1").run(0)
        toy.step((0, 0, 4))
        toy.history[1, :4] = toy.history[0, :4]
        table = np.array([[1, 2, 3], [1, 5, 6]], np.int32)
        batch = toy.batch((0, 4, 1), (1, 4, 1), block_table=table, slot_mapping=np.array([8, 20]))
        with toy.manager.step(batch=batch), toy.manager.forward(batch):
            toy.write(batch)
        assert the_one(toy).n_users == 2 and "and 1 more rows" in str(the_one(toy))
        found = [(v.slot, v.request_id) for v in toy.manager.violations()]
        assert sorted(found) == [(the_one(toy).places[0].slot, request) for request in (1, 2)], "both are to be stopped"


class TestTableSwap:
    @pytest.mark.parametrize("seed", range(4))
    def test_two_entries_are_swapped_reported_and_put_back(self, make: Make, seed: int) -> None:
        toy = make(perturb=f"table_swap:p=1,warmup=10,seed={seed}").run(10)
        table = toy.fixed.block_table
        true, seen = table.copy(), []
        toy.decode(between=lambda: seen.append(table.copy()))
        done = the_one(toy)
        assert np.array_equal(table, true)
        one, two = done.places
        expected = true.copy()
        for place in (one, two):
            assert place.before == true[place.row, place.element] and place.address == (
                table.ctypes.data + 4 * (place.row * table.shape[1] + place.element)
            )
            expected[place.row, place.element] = place.after
        assert (one.before, one.after) == (two.after, two.before) and one.before != one.after
        assert np.array_equal(seen[0], expected) and not np.array_equal(seen[0], true)
        found = toy.manager.violations()
        swapped = {(place.row, place.element) for place in done.places}
        assert swapped <= {(v.row, v.position // PAGE) for v in found}
        assert {v.request_id for v in found} == {place.request_id for place in done.places}
        assert {v.step for v in found} == {done.step} and all(v.reasons & PREFIX_REASONS for v in found)

    def test_nothing_is_left_of_it_after_the_step(self, make: Make) -> None:
        toy = make(perturb="table_swap:p=1,warmup=9").run(10)  # at prefix 9, entries 0 and 1 have only old tokens
        assert len(toy.manager.perturbations) == 1
        before = toy.manager.stats().observations_total
        assert before > 0
        toy.run(2)
        assert toy.manager.stats().observations_total == before

    def test_a_csr_table_is_swapped_in_its_indices(self, make: Make) -> None:
        toy = make(perturb="table_swap:p=1,warmup=1")
        toy.step((0, 0, 9), (1, 0, 9))
        csr = {
            "block_table": None,
            "kv_indptr": np.array([0, 3, 6], np.int32),
            "kv_indices": np.array([1, 2, 3, 4, 5, 6], np.int32),
        }
        batch = toy.batch((0, 9, 1), (1, 9, 1), **csr)
        toy.manager.begin_step(batch=batch)
        swapped = csr["kv_indices"].copy()
        with toy.manager.forward(batch):
            toy.write(batch)
        toy.manager.end_step()
        one, two = the_one(toy).places
        expected = np.arange(1, 7)
        for place in (one, two):
            expected[3 * place.row + place.element] = place.after
        assert swapped.tolist() == expected.tolist() != [1, 2, 3, 4, 5, 6]
        assert csr["kv_indices"].tolist() == [1, 2, 3, 4, 5, 6]
        assert {v.row for v in toy.manager.violations()} == {one.row, two.row}

    def test_it_is_put_back_when_the_engine_raises_and_when_the_manager_closes(self, make: Make) -> None:
        toy = make(perturb="table_swap:p=1,warmup=10,max=2").run(10)
        true = toy.fixed.block_table.copy()
        toy.fill(10)

        def step() -> None:
            with toy.manager.step(batch=toy.fixed):
                assert not np.array_equal(toy.fixed.block_table, true)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            step()
        assert np.array_equal(toy.fixed.block_table, true)
        toy.manager.begin_step(batch=toy.fixed)
        assert not np.array_equal(toy.fixed.block_table, true)
        toy.manager.close()
        assert np.array_equal(toy.fixed.block_table, true) and len(toy.manager.perturbations) == 2

    def test_what_the_engine_wrote_meanwhile_is_left_alone(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="table_swap:p=1,warmup=10").run(10)
        toy.decode(between=lambda: toy.fixed.block_table.fill(9))
        assert (toy.fixed.block_table == 9).all()
        assert sum("was rewritten to 9" in line for line in warnings_of(caplog)) == 2

    def test_entries_that_name_one_block_are_not_swapped_with_each_other(self, make: Make) -> None:
        toy = make(perturb="table_swap:p=1,warmup=1,max=20")
        toy.step((0, 0, 4))
        toy.history[1, :4] = toy.history[0, :4]
        batch = toy.batch((0, 8, 1), (1, 8, 1), block_table=np.array([[1, 2, 3], [1, 2, 6]], np.int32))
        for _ in range(20):
            toy.manager.begin_step(batch=batch)
            toy.manager.abandon_step()
        assert len(toy.manager.perturbations) == 20
        assert all({q.before for q in p.places} == {1, 2} for p in toy.manager.perturbations)

    def test_one_table_for_all_rows_has_nothing_to_swap(self, make: Make) -> None:
        toy = make(perturb="table_swap:p=1,warmup=2", rows=1).run(4)  # one block so far
        assert toy.manager.perturbations == () and toy.manager.n_perturbations_skipped == 2


class TestTokenSwap:
    def swap(self, make: Make, **config: Any) -> tuple[DrillToy, list[int], list[int]]:
        toy = make(perturb="next_token_swap:p=1,warmup=5", **config).run(5)
        true: list[int] = []
        given: list[int] = []
        toy.decode(
            lambda: true.extend(toy.fixed.input_ids.tolist()), lambda: given.extend(toy.fixed.input_ids.tolist())
        )
        return toy, true, given

    def test_ids_are_exchanged_and_seen_at_the_next_forward(self, make: Make) -> None:
        toy, true, given = self.swap(make)
        assert given == true[::-1] != true
        assert {(p.row, p.request_id, p.position, p.element, p.before) for p in the_one(toy).places} == {
            (0, 1, 5, 0, None), (1, 2, 5, 1, None),
        }  # fmt: skip
        assert toy.manager.violations() == ()
        toy.decode()
        found = toy.manager.violations()
        assert {(v.row, v.slot, v.step) for v in found} == {(p.row, p.slot, 7) for p in the_one(toy).places}
        assert all(v.reasons & Reason.TOKEN for v in found)

    def test_expected_tokens_see_it_at_once(self, make: Make) -> None:
        toy, _true, _given = self.swap(make, extra=("expected_tokens",))
        found = toy.manager.violations()
        assert {(v.row, v.slot, v.step) for v in found} == {(p.row, p.slot, 6) for p in the_one(toy).places}
        assert all(v.reasons == Reason.WRITE_TOKEN for v in found)

    def test_a_lone_row_gets_another_id(self, make: Make) -> None:
        toy, true, given = self.swap(make, rows=1, extra=("expected_tokens",))
        assert given != true and given[0] >= 0
        assert len(the_one(toy).places) == 1
        assert [(v.reasons, v.request_id) for v in toy.manager.violations()] == [(Reason.WRITE_TOKEN, 1)]

    @pytest.mark.parametrize("log_tokens", [False, True])
    def test_ids_are_told_only_with_log_tokens(
        self, make: Make, log_tokens: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        toy, true, _given = self.swap(make, log_tokens=log_tokens)
        (line,) = warnings_of(caplog)
        assert line == f"[canary] perturb: {the_one(toy)}"
        shown = [(p.before, p.after) for p in the_one(toy).places]
        if log_tokens:
            assert sorted(shown) == sorted([(true[0], true[1]), (true[1], true[0])])
            assert f": {true[0]} -> {true[1]}" in line
        else:
            assert shown == [(None, None)] * 2 and "->" not in line and "withheld" in line


class TestWhen:
    def faults(self, make: Make, text: str, n: int = 60, **config: Any) -> list[tuple[Any, ...]]:
        toy = make(perturb=text, **config).run(n)
        return [
            (p.kind, p.step, p.plane, p.byte, p.mask, [(q.row, q.slot, q.offset, q.element) for q in p.places])
            for p in toy.manager.perturbations
        ]

    def test_the_same_seed_gives_the_same_faults_and_another_does_not(self, make: Make) -> None:
        text = "flip_used:p=0.2,warmup=6,max=9,seed={};table_swap:p=0.3,warmup=6,max=9,seed={}"
        first, again, other = (self.faults(make, text.format(s, s)) for s in (1, 1, 2))
        assert first == again != other
        assert {kind for kind, *_ in first} == {FaultKind.FLIP_USED, FaultKind.TABLE_SWAP}
        host = self.faults(functools.partial(DrillToy, backend="host"), text.format(1, 1))
        assert first == host

    def test_another_fault_beside_it_does_not_change_when_it_comes(self, make: Make) -> None:
        def steps(text: str) -> list[int]:
            return [f[1] for f in self.faults(make, text) if f[0] is FaultKind.NEXT_TOKEN_SWAP]

        alone = steps("next_token_swap:p=0.2,warmup=6,max=9")
        assert alone == steps("table_swap:p=0.5,max=9;next_token_swap:p=0.2,warmup=6,max=9") != []

    def test_probability_and_warm_up(self) -> None:
        toy = DrillToy(backend="host", perturb="next_token_swap:p=0.25,warmup=20,max=1000").run(420)
        steps = [p.step for p in toy.manager.perturbations]
        assert 400 * 0.25 - 35 <= len(steps) <= 400 * 0.25 + 35  # four standard deviations
        assert steps[0] > 20 and len(set(steps)) == len(steps)

    def test_no_more_than_max(self, make: Make) -> None:
        toy = make(perturb="next_token_swap:p=1,warmup=3,max=4").run(12)
        assert [p.step for p in toy.manager.perturbations] == [4, 5, 6, 7]
        assert toy.manager.n_perturbations_skipped == 0

    def test_not_in_idle_steps_and_not_while_paused(self, make: Make) -> None:
        toy = make(perturb="next_token_swap:p=1,max=9,warmup=0")
        with toy.manager.step(idle=True, batch=toy.fixed):
            pass
        toy.manager.pause()
        toy.run(2)
        assert toy.manager.perturbations == () and toy.manager.n_perturbations_skipped == 0
        toy.manager.resume()
        toy.run(1)
        assert the_one(toy).step == 4


class TestOff:
    def test_an_engine_with_the_drill_off_is_byte_for_byte_one_without_a_guard(self, make: Make) -> None:
        bare, guarded = make(mode="off").run(100), make().run(100)
        waiting = make(perturb="flip_used:p=1,warmup=100;table_swap:p=1,warmup=100;next_token_swap:p=1,warmup=100")
        waiting.run(100)
        for other in (guarded, waiting):
            assert all(np.array_equal(a, b) for a, b in zip(bare.memory(), other.memory(), strict=True))
            assert other.manager.perturbations == other.manager.violations() == ()
        waiting.run(1)  # and the same comparison sees a drill that is on
        bare.run(1)
        assert not all(np.array_equal(a, b) for a, b in zip(bare.memory(), waiting.memory(), strict=True))

    def test_the_guards_own_memory_is_never_touched(self) -> None:
        kinds = ";".join(f"{kind.value}:p=1,warmup=10" for kind in FaultKind)
        toy = DrillToy(backend="host", perturb=kinds)
        toy.step((2, 0, 6))
        toy.run(9)

        def guard() -> bytes:
            pool, state = toy.manager.backend._pools[0], toy.manager.state
            arrays = (*pool.head, *pool.tail, pool.claims, pool.digests, pool.registers, state.words, state.taint)
            return b"".join(a.tobytes() for a in (*arrays, state.violation_log, state.control))

        before: list[bytes] = []
        toy.decode(lambda: before.append(guard()), lambda: before.append(guard()))
        assert before[0] == before[1] and len(toy.manager.perturbations) == 5

    def test_mode_off_takes_no_notice(self) -> None:
        toy = DrillToy(backend="host", mode="off", perturb="next_token_swap:p=1,warmup=0").run(3)
        assert toy.manager.perturbations == () and toy.manager.n_perturbations_skipped == 0


class TestSaying:
    def test_an_armed_manager_says_so_loudly_and_describes_it(self, caplog: pytest.LogCaptureFixture) -> None:
        toy = DrillToy(backend="host", perturb="table_swap:p=0.5", perturb_armed=True)
        (record,) = [r for r in caplog.records if "FAULT DRILL ARMED" in r.getMessage()]
        assert record.levelno == logging.WARNING
        spec = "table_swap:p=0.5,warmup=100,seed=0,max=1"
        assert spec in record.getMessage() and spec in toy.manager.describe().splitlines()[0]
        assert "DRILL" not in DrillToy(backend="host").manager.describe()

    def test_a_flip_is_one_line_that_names_everything(self, caplog: pytest.LogCaptureFixture) -> None:
        toy = DrillToy(backend="host", perturb="flip_used:p=1,warmup=8").run(9)
        done, (line,) = the_one(toy), warnings_of(caplog)
        place = done.places[0]
        assert line == (
            f"[canary] perturb: flip_used at step 9: pool 'full', plane '{done.plane_name}' of layer {done.layer}, "
            f"block {place.block}, slot {place.slot}, position {place.position}, row {place.row}, "
            f"request {place.request_id}: byte {done.byte} at {place.address:#x} (array + {place.offset:#x}), "
            f"mask {done.mask:#04x}"
        )

    def test_a_table_swap_is_one_line_with_entries_before_and_after(self, caplog: pytest.LogCaptureFixture) -> None:
        toy = DrillToy(backend="host", perturb="table_swap:p=1,warmup=8").run(9)
        (line,) = warnings_of(caplog)
        for place in the_one(toy).places:
            assert f"table entry {place.element} of row {place.row} (request {place.request_id}, position" in line
            assert f": {place.before} -> {place.after}" in line
        assert line.endswith("until the end of the step")

    def test_a_pool_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"no pool='draft' of 'flip_used.*give one of 'full'"):
            DrillToy(backend="host", perturb="flip_used:pool=draft")


class TestSkipped:
    def skipped(self, toy: ToyEngine, caplog: pytest.LogCaptureFixture, reason: str) -> None:
        assert toy.manager.perturbations == () and toy.manager.n_perturbations_skipped > 0
        lines = warnings_of(caplog)
        assert lines and all(reason in line for line in lines), lines

    def test_read_only_arrays(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="table_swap:p=1,warmup=1;next_token_swap:p=1,warmup=1")
        batch = toy.batch((0, 0, 9), (1, 0, 9))
        for array in (batch.block_table, batch.input_ids):
            array.setflags(write=False)
        for _ in range(2):
            with toy.manager.step(batch=batch), toy.manager.forward(batch):
                toy.write(batch)
        self.skipped(toy, caplog, "is read-only")
        assert toy.manager.n_perturbations_skipped == 2

    def test_read_only_planes(self, caplog: pytest.LogCaptureFixture) -> None:
        toy = DrillToy(backend="host", perturb="flip_used:p=1,warmup=8")
        for plane in (*toy.k, *toy.v):
            plane.setflags(write=False)
        pool = layouts.nhd(k=toy.k, v=toy.v, page_size=PAGE)
        for plane in (*toy.k, *toy.v):
            plane.setflags(write=True)
        toy.manager = CanaryManager(toy.config, [pool], 4, 64, "host")
        before = toy.run(9).changed_bits([a.copy() for a in (*toy.k, *toy.v)])
        self.skipped(toy, caplog, "all planes are read-only")
        assert before == []

    def test_no_digests(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="flip_used:p=1,warmup=8", real_data="none").run(9)
        self.skipped(toy, caplog, "real_data='none'")

    def test_a_static_cache_has_no_table(self, caplog: pytest.LogCaptureFixture) -> None:
        pool = layouts.hnd(k=[np.zeros((4, 2, 16, 8), np.uint8)], reserved_blocks=())
        toy = DrillToy(backend="host")
        toy.manager = CanaryManager(armed("table_swap:p=1,warmup=0"), [pool], 4, 64)
        batch = StepBatch(
            seq_lens=np.full(2, 3, np.int32), query_start_loc=np.array([0, 3, 6], np.int32),
            input_ids=np.arange(6, dtype=np.int32), slot_mapping=np.array([0, 1, 2, 16, 17, 18], np.int64),
        )  # fmt: skip
        with toy.manager.step(batch=batch), toy.manager.forward(batch):
            pass
        self.skipped(toy, caplog, "no table (a static cache)")

    def test_nothing_was_written_yet(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="flip_used:p=1,warmup=0").run(1)
        self.skipped(toy, caplog, "no slot of a live row")

    def test_padding_rows_are_left_alone(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="next_token_swap:p=1,warmup=0")
        batch = toy.batch((0, 0, 1), (1, 0, 1))
        batch.slot_mapping[:] = -1
        with toy.manager.step(batch=batch), toy.manager.forward(batch):
            pass
        self.skipped(toy, caplog, "no live row has a token id")

    def test_a_batch_that_nobody_holds(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="table_swap:p=1,warmup=0")
        for p in (0, 9):
            toy.step((0, p, 9 if p == 0 else 1))
        self.skipped(toy, caplog, "begin_step(batch=)")

    def test_a_pool_that_the_forward_does_not_write(self, caplog: pytest.LogCaptureFixture) -> None:
        toy = DrillToy(backend="host")
        draft = layouts.nhd(k=[np.zeros((16, PAGE, 2, 8), np.uint8)], page_size=PAGE, name="draft")
        toy.manager = CanaryManager(armed("next_token_swap:p=1,pool=draft,warmup=1"), [toy.pool, draft], 4, 64)
        for _ in range(2):
            with toy.manager.step(), toy.manager.forward(toy.fixed, pools=["full"]):
                pass
        self.skipped(toy, caplog, "does not write pool 'draft'")

    def test_a_stream_that_is_captured(
        self, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        toy = make(perturb="next_token_swap:p=1,warmup=0")
        toy.fill(0)
        monkeypatch.setattr(HostStaging, "is_capturing", lambda *_: True)
        toy.manager.begin_step(batch=toy.fixed)
        self.skipped(toy, caplog, "is being captured")

    def test_a_batch_that_does_not_fit_is_for_head_to_refuse(
        self, make: Make, caplog: pytest.LogCaptureFixture
    ) -> None:
        toy = make(perturb="next_token_swap:p=1,warmup=0")
        toy.manager.begin_step(batch=toy.batch((0, 0, 4), seq_lens=np.zeros(1, np.int64)))
        self.skipped(toy, caplog, "seq_lens is int64")

    def test_an_error_of_the_drill_is_not_the_engines(
        self, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        toy = make(perturb="flip_used:p=1,warmup=8").run(8)

        def fail(*_: object) -> None:
            raise OSError("no such memory")

        monkeypatch.setattr(toy.manager.backend, "flip_byte", fail)
        toy.run(1)
        self.skipped(toy, caplog, "OSError: no such memory")

    def test_a_table_that_cannot_be_put_back_does_not_mask_the_engines_error(
        self, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        toy = make(perturb="table_swap:p=1,warmup=10").run(10)
        toy.fill(10)

        def fail(*_: object) -> None:
            raise OSError("no such memory")

        def step() -> None:
            with toy.manager.step(batch=toy.fixed):
                monkeypatch.setattr(toy.manager.backend, "write_memory", fail)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            step()
        assert sum("is still swapped (OSError: no such memory)" in line for line in warnings_of(caplog)) == 2

    def test_a_log_handler_that_raises_does_not_reach_the_engine(self, make: Make) -> None:
        class Full(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                raise OSError("disk full")

        toy = make(perturb="flip_used:p=1,warmup=0;next_token_swap:p=1,warmup=8")
        handler = Full()
        logging.getLogger("kvcanary").addHandler(handler)
        try:
            toy.run(9)
        finally:
            logging.getLogger("kvcanary").removeHandler(handler)
        assert {p.kind for p in toy.manager.perturbations} == {FaultKind.FLIP_USED, FaultKind.NEXT_TOKEN_SWAP}
        assert toy.manager.step_number == 9

    def test_what_goes_on_is_told_ever_less_often(self, make: Make, caplog: pytest.LogCaptureFixture) -> None:
        toy = make(perturb="flip_used:p=1,warmup=0", real_data="none").run(33)
        assert toy.manager.n_perturbations_skipped == 33
        times = [int(line.split(" (")[-1].split(" ")[0]) for line in warnings_of(caplog) if "real_data" in line]
        assert times == [1, 2, 4, 8, 16, 32]
