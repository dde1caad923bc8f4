"""The manager over real steps: forwards, the order of calls, the binding of batches, mode off."""

from __future__ import annotations

import gc
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from engine import ToyEngine, flip

import kvcanary
from kvcanary import (
    BatchError,
    CanaryConfig,
    CanaryManager,
    CaptureError,
    ConfigError,
    KvCanaryViolation,
    PhaseError,
    Reason,
    StepBatch,
    layouts,
)


class TestForward:
    def test_an_honest_run_is_silent(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6), (1, 0, 3))
        for p in range(6, 11):
            engine.step((0, p, 1), (1, p - 3, 1))
        engine.manager.synchronize()
        assert engine.manager.violations() == ()
        assert engine.manager.stats().step == 6

    def test_a_flipped_bit_is_named_with_slot_layer_and_request(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6), (1, 0, 3))
        flip(engine, 1, 5)  # request slot 0, block 1, offset 1: position 1
        engine.step((0, 6, 1), (1, 3, 1))
        (v,) = engine.manager.violations()
        assert (v.reasons, v.slot, v.layer, v.position, v.request_id, v.row) == (Reason.DATA, 5, 1, 1, 1, 0)
        assert engine.manager.taint.tolist() == [Reason.DATA, 0, 0, 0]

    def test_it_is_reported_once_until_the_slot_is_rewritten(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        for p in (6, 7, 8):
            engine.step((0, p, 1))
        assert len(engine.manager.violations()) == 1
        assert engine.manager.stats().violations_total == 1
        assert engine.manager.stats().observations_total == 3
        engine.history[0] = -1
        engine.step((0, 0, 6))  # recomputed in the same blocks
        flip(engine, 0, 5)
        engine.step((0, 6, 1))
        assert len(engine.manager.violations()) == 2

    def test_several_inner_forwards_make_one_step_and_keep_its_taint(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        with engine.manager.step():
            for i in range(3):
                batch = engine.batch((0, 6 + i, 1))
                if i == 1:
                    flip(engine, 0, 5)  # healthy again for the forwards after the first
                with engine.manager.forward(batch, index=i):
                    engine.write(batch)
        words = engine.manager.backend.snapshot_words()
        assert (words[kvcanary.abi.STATE_FORWARD], words[kvcanary.abi.STATE_STEP]) == (4, 2)
        assert engine.manager.taint[0] == Reason.DATA

    def test_a_rejected_draft_may_be_rewritten(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 5))
        engine.step((0, 5, 4))  # four drafts
        engine.history[0, 6:] = -1  # one accepted
        engine.step((0, 6, 2))
        engine.step((0, 8, 1))
        assert engine.manager.violations() == ()

    def test_a_model_that_raises_leaves_neither_alarm_nor_silence(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 5))
        batch = engine.batch((0, 5, 3))
        with (
            pytest.raises(RuntimeError, match="out of luck"),
            engine.manager.step(),
            engine.manager.forward(batch),
        ):
            raise RuntimeError("out of luck")
        engine.write(batch)  # the bytes may come or not; nobody vouches for them
        engine.step((0, 8, 1))
        assert engine.manager.violations() == ()
        assert engine.manager.backend.snapshot_words()[kvcanary.abi.STATE_UNJUDGED_SLOTS] == 3

    def test_the_engines_error_is_never_masked(self) -> None:
        engine = ToyEngine(verify_data_every=1, mode="raise")
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        batch = engine.batch((0, 6, 1))

        def step() -> None:
            with engine.manager.step():
                with engine.manager.forward(batch):
                    engine.write(batch)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            step()
        with pytest.raises(KvCanaryViolation) as caught:  # it was kept for the next step
            engine.step((0, 7, 1))
        assert caught.value.violations[0].slot == 5

    def test_mode_raise_raises_once_per_batch_of_new_records(self) -> None:
        engine = ToyEngine(verify_data_every=1, mode="raise")
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        with pytest.raises(KvCanaryViolation, match="DATA"):
            engine.step((0, 6, 1))
        engine.step((0, 7, 1))


class TestPhases:
    def test_wrong_orders_say_what_came_and_what_was_expected(self) -> None:
        engine = ToyEngine()
        manager, batch = engine.manager, engine.batch((0, 0, 4))
        with pytest.raises(PhaseError, match=r"end_step\(\) came .* expected: begin_step\(\)"):
            manager.end_step()
        with pytest.raises(PhaseError, match=r"tail\(\) came"):
            manager.tail(batch)
        manager.begin_step()
        with pytest.raises(PhaseError, match=r"begin_step\(\) came in phase STEP"):
            manager.begin_step()
        manager.head(batch)
        for call in (lambda: manager.head(batch), manager.end_step, manager.begin_step, manager.pause, manager.reset):
            with pytest.raises(PhaseError, match=r"expected: tail\(\)"):
                call()
        with pytest.raises(PhaseError, match="another batch"):
            manager.tail(engine.batch((0, 0, 4)))
        manager.tail(batch)
        manager.end_step()

    def test_forwards_outside_a_step_are_for_warm_up_and_capture(self) -> None:
        engine = ToyEngine()
        batch = engine.batch((0, 0, 4))
        with engine.manager.forward(batch):
            engine.write(batch)
        engine.step((0, 4, 1))
        assert engine.manager.violations() == ()

    def test_a_bad_batch_leaves_the_manager_usable(self) -> None:
        engine = ToyEngine()
        with engine.manager.step():
            with pytest.raises(BatchError):
                engine.manager.head(engine.batch((0, 0, 4), seq_lens=np.zeros(1, np.int64)))
            batch = engine.batch((0, 0, 4))
            with engine.manager.forward(batch):
                engine.write(batch)

    def test_pools_are_chosen_by_name_or_number(self) -> None:
        engine = ToyEngine()
        batch = engine.batch((0, 0, 4))
        with engine.manager.forward(batch, pools=["full"]):
            pass
        with pytest.raises(ConfigError, match="there is no pool 'draft': give one of 'full'"):
            engine.manager.head(batch, pools=["draft"])

    def test_a_step_under_capture_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = ToyEngine()
        monkeypatch.setattr(kvcanary.deferred.HostStaging, "is_capturing", lambda *_: True)
        with pytest.raises(CaptureError):
            engine.step((0, 0, 4))
        with pytest.raises(CaptureError):
            engine.manager.pause()


class TestOff:
    def test_mode_off_allocates_and_launches_nothing(self) -> None:
        engine = ToyEngine(mode="off")
        manager = engine.manager
        before = gc.get_count()
        engine.step((0, 0, 4))
        assert not manager.is_on and manager.memory_bytes == 0 and before is not None
        assert manager.estimate_bytes(engine.config, [engine.pool], 4) == 0
        assert manager.violations() == manager.poll() == () and manager.stats().step == 0
        manager.pause(), manager.resume(), manager.reset(), manager.synchronize(), manager.close()
        assert "off" in manager.describe()

    def test_the_kill_switch_wins_over_keywords(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVCANARY_MODE", "off")
        config = CanaryConfig.from_env(mode="raise")
        manager = CanaryManager(config, [], 0, 0, backend="cuda")  # nothing is even looked at
        with manager.step(), manager.forward(StepBatch(query_start_loc=None, input_ids=None, slot_mapping=None)):
            pass


class TestWhatAFirstUserFound:
    def test_a_batch_cannot_be_changed_behind_the_guards_back(self) -> None:
        engine = ToyEngine()
        batch = engine.step((0, 0, 4))
        with pytest.raises(FrozenInstanceError):
            batch.seq_lens = np.zeros(1, np.int32)  # type: ignore[misc]

    @pytest.mark.parametrize("value", ["off", "0", "False", "disabled"])
    def test_the_switch_works_whatever_else_is_set(self, value: str) -> None:
        environ = {"KVCANARY_MODE": value, "KVCANARY_NOBODY_KNOWS": "1", "KVCANARY_RING_CAPACITY": "many"}
        assert CanaryConfig.from_env(environ, mode="raise").mode == "off"

    def test_an_engine_that_proves_and_reads_taint_lives_with_the_guard_off(self) -> None:
        engine = ToyEngine(mode="off")
        proof = engine.manager.prove(engine.batch((0, 0, 4)))
        assert proof.ok and proof.is_off
        taint = engine.manager.taint
        assert taint.dtype == np.uint32 and taint.tolist() == [0] * engine.manager.max_requests
        assert engine.manager.taint is taint, "at a fixed address"

    def test_a_static_cache_may_not_reserve_a_block(self) -> None:
        shape = (4, 2, 16, 8)
        arrays = {
            "seq_lens": np.full(2, 3, np.int32),
            "query_start_loc": np.array([0, 3, 6], np.int32),
            "input_ids": np.arange(6, dtype=np.int32),
            "slot_mapping": np.array([0, 1, 2, 16, 17, 18], np.int64),
        }
        for reserved, is_refused in (((0,), True), ((), False)):
            pool = layouts.hnd(k=[np.zeros(shape, np.uint8)], reserved_blocks=reserved)
            manager = CanaryManager(CanaryConfig(), [pool], 4, 16)
            if is_refused:
                with pytest.raises(BatchError, match=r"reserved_blocks=\(\)"):
                    manager.head(StepBatch(**arrays))
            else:
                with manager.step(), manager.forward(StepBatch(**arrays)):
                    pass
                assert manager.violations() == () and manager.state.slot_run_counters[0].sum() == 12

    def test_pools_must_be_a_list_of_some(self) -> None:
        engine = ToyEngine()
        for pools in ("full", [], [0, "full"]):
            with pytest.raises(ConfigError, match="each once"):
                engine.manager.head(engine.batch((0, 0, 4)), pools=pools)

    def test_tables_without_width_are_read_as_empty(self) -> None:
        engine = ToyEngine()
        engine.step((0, 0, 6))
        engine.step((0, 6, 1), block_table=np.zeros((1, 0), np.int32))
        assert Reason.OUT_OF_RANGE in {v.reasons for v in engine.manager.violations()}

    def test_a_last_page_of_noise_is_a_violation(self) -> None:
        engine = ToyEngine()
        csr = {
            "block_table": None,
            "seq_lens": None,
            "kv_indptr": np.array([0, 3], np.int32),
            "kv_indices": np.array([1, 2, 3], np.int32),
            "kv_last_page_len": np.array([2**31 - 1], np.int32),
        }
        engine.step((0, 0, 6), **csr)
        assert Reason.OUT_OF_RANGE in {v.reasons for v in engine.manager.violations()}
