"""The fault drill on the reference and on the kernels: what it does is what it says, and the guard says it too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drill_toy import DrillToy, Make, armed, drill_maker, the_one, warnings_of  # noqa: F401  a fixture
from engine import PAGE

from kvcanary import CanaryManager, FaultKind, Perturbation, PoolKind, Reason, StepBatch, layouts

PREFIX_REASONS = Reason.TOKEN | Reason.POSITION | Reason.CHAIN | Reason.UNWRITTEN


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
