"""The manager: phases, context managers, pause and reset, health and stats over real steps."""

from __future__ import annotations

import gc
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from engine import PAGE, ToyEngine

import kvcanary
from kvcanary import (
    BatchError,
    CanaryConfig,
    CanaryManager,
    CanaryStalledError,
    CaptureError,
    ConfigError,
    KvCanaryViolation,
    LayoutError,
    LifecycleError,
    PhaseError,
    Reason,
    StepBatch,
    layouts,
)
from kvcanary.state import CounterLayout
from kvcanary.tags import Stage


def flip(engine: ToyEngine, layer: int, slot: int) -> None:
    engine.k[layer][slot // PAGE, slot % PAGE, 0, 0] ^= 1


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

    def test_after_close_every_call_is_refused_and_closing_again_is_not(self) -> None:
        engine = ToyEngine()
        engine.manager.close()
        engine.manager.close()
        with pytest.raises(PhaseError, match="closed"):
            engine.manager.begin_step()
        with pytest.raises(PhaseError, match="closed"):
            engine.manager.head(engine.batch((0, 0, 1)))
        assert engine.manager.violations() == () and engine.manager.poll() == ()

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
        with pytest.raises(ConfigError, match="the pools are full"):
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


class TestPauseAndReset:
    def test_nothing_is_judged_while_paused_and_nothing_is_wrong_after(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        engine.manager.pause()
        flip(engine, 0, 5)
        engine.step((0, 6, 1))
        engine.step((0, 7, 1))
        assert engine.manager.violations() == ()
        engine.manager.resume()
        engine.step((0, 8, 1))
        assert [(v.slot, v.reasons) for v in engine.manager.violations()] == [(5, Reason.DATA)]

    def test_reset_forgets_the_cache(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        for layer in (*engine.k, *engine.v):
            layer[:] = 0
        engine.manager.reset()
        engine.history[0] = -1
        engine.step((0, 0, 6))
        engine.step((0, 6, 1))
        assert engine.manager.violations() == ()
        engine.manager.reset("full")
        engine.step((0, 7, 1))  # reads a prefix that the guard was told to forget
        assert {v.reasons for v in engine.manager.violations()} == {Reason.UNWRITTEN}

    def test_adoption_takes_what_was_there_before_the_guard(self) -> None:
        engine = ToyEngine(verify_data_every=1, on_unwritten="adopt")
        engine.history[0, :6] = 7
        engine.step((0, 6, 1))
        flip(engine, 0, 5)
        engine.step((0, 7, 1))
        assert [(v.slot, v.reasons) for v in engine.manager.violations()] == [(5, Reason.DATA)]
        assert engine.manager.backend.snapshot_words()[kvcanary.abi.STATE_ADOPTED_SLOTS] == 6


class TestSelfUnitManagerHealth:
    def run(self, engine: ToyEngine, n: int, *, with_forward: bool = True, idle: bool = False) -> None:
        for _ in range(n):
            with engine.manager.step(idle=idle):
                if with_forward:
                    batch = engine.batch((0, 0, 2))
                    with engine.manager.forward(batch):
                        engine.write(batch)

    def test_kernel_run_counter_watchdog_raises_on_zero(self) -> None:
        engine = ToyEngine(
            health_policy="raise",
            health_check_every_n_steps=2,
            health_check_warmup_steps=2,
            stats_print_every_n_steps=0,
        )
        with pytest.raises(CanaryStalledError) as caught:
            self.run(engine, 4, with_forward=False)
        assert isinstance(caught.value, RuntimeError)
        assert caught.value.step == 2
        assert {t.stage for t in caught.value.tags} == {Stage.HEAD, Stage.TAIL}

    def test_kernel_run_counter_watchdog_ignores_sweep_when_sweep_is_disabled(self) -> None:
        engine = ToyEngine(
            health_policy="raise", health_check_every_n_steps=1, health_check_warmup_steps=1, sweep_interval=0
        )
        engine.manager.attach_resident_set(lambda: None)
        self.run(engine, 5)
        swept = ToyEngine(
            health_policy="raise", health_check_every_n_steps=1, health_check_warmup_steps=1, sweep_interval=2
        )
        self.run(swept, 5)  # an interval, but nobody attached a resident set

    def test_periodic_stats_log_every_n_step(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(stats_print_every_n_steps=3, health_check_every_n_steps=0)
        with caplog.at_level(logging.INFO, "kvcanary"):
            self.run(engine, 10)
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
        steps = [int(re.match(r"\[canary\] step=(\d+) protected_tokens=", line)[1]) for line in lines]
        assert steps == [3, 6, 9]
        assert lines[0] == (
            "[canary] step=3 protected_tokens=24 sweep_passes=0 violations=0 launch_tags_active=4/4"
        )  # two tokens, K and V, HEAD and TAIL, three steps

    def test_a_guard_that_stops_is_found_and_mode_log_only_logs(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(health_check_every_n_steps=2, health_check_warmup_steps=2)
        self.run(engine, 4)
        assert not [r for r in caplog.records if r.levelno >= logging.ERROR]
        self.run(engine, 4, with_forward=False)
        assert "did not run" in caplog.text

    def test_idle_steps_and_pauses_are_no_stall(self) -> None:
        engine = ToyEngine(health_policy="raise", health_check_every_n_steps=2, health_check_warmup_steps=2)
        self.run(engine, 6, with_forward=False, idle=True)
        self.run(engine, 4)
        engine.manager.pause()
        self.run(engine, 6, with_forward=False)

    def test_no_active_tags_no_check(self) -> None:
        engine = ToyEngine(health_policy="raise", health_check_every_n_steps=1, health_check_warmup_steps=1)
        engine.manager._health.active_tags = {}
        self.run(engine, 5, with_forward=False)

    def test_a_pool_that_need_not_run_every_step_is_not_expected(self) -> None:
        shape = (8, 4, 2, 8)
        pools = [
            layouts.nhd(k=[np.zeros(shape, np.uint8)], v=None, page_size=4, name="target"),
            layouts.nhd(k=[np.zeros(shape, np.uint8)], v=None, page_size=4, name="draft", expected_every_step=False),
        ]
        manager = CanaryManager(CanaryConfig(), pools, 4, 16)
        assert [len(manager.active_tags[i]) for i in (0, 1)] == [2, 0]

    def test_a_violation_does_not_keep_the_health_check_from_its_step(self) -> None:
        engine = ToyEngine(mode="raise", verify_data_every=1, health_check_every_n_steps=1, health_check_warmup_steps=1)
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        with pytest.raises(KvCanaryViolation):
            engine.step((0, 6, 1))
        engine.step((0, 7, 1))
        assert engine.manager._health.latest is not None and engine.manager._health.latest.step == 2


class TestSweep:
    def resident(self, *slots: int) -> tuple[np.ndarray, ...]:
        s = np.array(slots, np.int32)
        return s, np.arange(len(s), dtype=np.int32), np.concatenate([[-1], s[:-1]]).astype(np.int32)

    def test_a_cached_slot_that_nobody_reads_is_checked(self) -> None:
        engine = ToyEngine(sweep_interval=2, health_policy="raise", health_check_every_n_steps=4)
        engine.manager.attach_resident_set(lambda: self.resident(4, 5, 6, 7))
        engine.step((0, 0, 4))
        flip(engine, 1, 6)
        for p in range(4):
            engine.step((1, p, 1))
        assert engine.manager.stats().sweep_passes == 2
        assert [(v.slot, v.layer, v.tag.stage) for v in engine.manager.violations()] == [(6, 1, Stage.SWEEP)]
        runs = engine.manager.state.kernel_run_counters[0]
        assert [int(runs[t]) for t in engine.manager.active_tags[0] if t.stage == Stage.SWEEP] == [2, 2]

    def test_positions_predecessors_and_unwritten_slots(self) -> None:
        engine = ToyEngine(sweep_interval=1)
        engine.step((0, 0, 4))
        slots = np.array([4, 6, 5, 50], np.int32)
        answer = (slots, np.array([0, 1, 2, 3], np.int32), np.array([-1, 4, 6, 5], np.int32))
        engine.manager.attach_resident_set(lambda: answer)
        engine.step((1, 0, 1))
        found = {v.slot: v.reasons for v in engine.manager.violations()}
        assert found[6] == found[5] == Reason.POSITION | Reason.CHAIN
        assert found[50] == Reason.UNWRITTEN and 4 not in found

    def test_a_provider_that_raises_does_not_hurt_the_step(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(sweep_interval=1)

        def provider() -> None:
            raise OSError("no tree")

        engine.manager.attach_resident_set(provider)
        engine.step((0, 0, 4))
        assert "no tree" in caplog.text and engine.manager.step_number == 1


class TestKnowing:
    def test_prove_names_every_plane_and_restores_every_bit(self) -> None:
        engine = ToyEngine(n_layers=5)
        batch = engine.step((0, 0, 6), (1, 0, 3))
        before = [a.copy() for a in (*engine.k, *engine.v)]
        proof = engine.manager.prove(batch)
        assert proof.ok and len(proof.planes) == 10, str(proof)
        assert all(np.array_equal(a, b) for a, b in zip(before, (*engine.k, *engine.v), strict=True))
        assert engine.manager.violations() == ()

    def test_prove_says_when_a_slot_is_already_damaged(self) -> None:
        engine = ToyEngine()
        batch = engine.step((0, 0, 6))
        flip(engine, 0, 4 + 5)  # position 5, the one that is probed
        proof = engine.manager.prove(batch)
        assert not proof.ok and "before any bit was flipped" in str(proof)

    def test_prove_needs_a_live_row(self) -> None:
        engine = ToyEngine()
        with pytest.raises(BatchError, match="run a guarded"):
            engine.manager.prove(engine.batch((0, 0, 4)))

    def test_describe_says_what_is_off_for_lack_of_which_input(self) -> None:
        engine = ToyEngine()
        assert "no batch was seen yet" in engine.manager.describe()
        batch = engine.step((0, 0, 4))
        text = engine.manager.describe()
        assert "off: WRITE_TOKEN (no expected_tokens)" in text and "TOKEN" in text.split("\non: ")[1]
        assert batch is not None

    def test_estimate_is_what_is_taken(self) -> None:
        engine = ToyEngine()
        estimate = engine.manager.estimate_bytes(engine.config, [engine.pool], 4)
        abi = kvcanary.abi  # the plane tables lie in the pool itself on the host
        tables = len(engine.pool.planes) * abi.PLANE.itemsize + 4 * abi.DIGEST.itemsize
        per_request = 4 * (abi.ROW.itemsize + 8 * abi.N_WORK)  # and so do row facts and work lists
        assert estimate - tables - per_request - kvcanary.abi.POOL_STATE.itemsize == engine.manager.memory_bytes

    def test_one_snapshot_is_a_few_hundred_bytes(self) -> None:
        assert [8 * CounterLayout(n).n_words for n in (1, 2)] == [416, 640]

    def test_chain_is_what_prefix_chain_takes(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        tokens = engine.history[0, :6].tolist()
        # A second request with the same blocks and no history: its prefix is anchored by the host's chain alone.
        engine.history[1, :6] = -1
        table = 1 + np.arange(3)
        for chain, expected in ((engine.manager.chain(tokens), ()), (engine.manager.chain([*tokens[:5], 9]), (9,))):
            batch = engine.batch(
                (1, 6, 1),
                block_table=table[None].astype(np.int32),
                slot_mapping=np.array([4 + 6], np.int64),
                prefix_chain=np.array([chain], np.uint64),
                request_ids=np.array([chain % 1000 + 5], np.uint32),
            )
            with engine.manager.step(), engine.manager.forward(batch):
                engine.write(batch)
            found = engine.manager.violations()
            assert tuple(v.slot for v in found) == expected
            assert all(v.reasons == Reason.CHAIN for v in found)

    def test_synchronize_brings_the_stats_up_to_date(self) -> None:
        engine = ToyEngine(stats_print_every_n_steps=0, health_check_every_n_steps=0)
        engine.step((0, 0, 6))
        assert engine.manager.stats().forwards == 0, "nothing was asked of the device yet"
        engine.manager.synchronize()
        stats = engine.manager.stats()
        assert (stats.step, stats.snapshot_step, stats.forwards) == (1, 1, 1) and stats.protected_tokens > 0

    def test_callbacks_and_polling_from_another_thread(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        seen: list[int] = []
        engine.manager.on_violation(lambda v: seen.append(v.slot))
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        batch = engine.batch((0, 6, 1))
        engine.manager.begin_step()
        with engine.manager.forward(batch):
            engine.write(batch)
        thread = threading.Thread(target=engine.manager.poll)
        thread.start()
        thread.join()
        engine.manager.end_step()
        assert seen == [5]


class TestConstruction:
    def test_bad_capacities_backends_and_pools(self) -> None:
        engine = ToyEngine()
        pool, config = engine.pool, engine.config
        for args, kwargs in (
            ((config, [], 4, 4), {}),
            ((config, [pool], 0, 4), {}),
            ((config, [pool], 4, True), {}),
            ((config, [pool, pool], 4, 4), {}),
            ((config, [pool], 4, 4), {"backend": "tpu"}),
        ):
            with pytest.raises(ConfigError):
                CanaryManager(*args, **kwargs)
        with pytest.raises(LayoutError, match="backend='host'"):
            CanaryManager(config, [pool], 4, 4, backend="cuda")

    def test_public_names_are_sorted_and_there(self) -> None:
        names = kvcanary.__all__
        assert names == sorted(names, key=lambda name: (not name.isupper(), name)), "constants first"
        assert all(getattr(kvcanary, n) is not None for n in names)

    def test_the_package_imports_no_framework(self) -> None:
        import subprocess
        import sys

        names = ("torch", "jax", "cupy", "cuda", "vllm", "sglang")
        code = f"import sys, kvcanary; print([m for m in {names} if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]"


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

    def test_a_log_handler_that_raises_does_not_reach_the_engine(self) -> None:
        class Full(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                raise OSError("disk full")

        engine = ToyEngine(verify_data_every=1, stats_print_every_n_steps=1)
        handler = Full()
        logging.getLogger("kvcanary").addHandler(handler)
        try:
            engine.step((0, 0, 6))
            flip(engine, 0, 5)
            for p in (6, 7, 8):
                engine.step((0, p, 1))
        finally:
            logging.getLogger("kvcanary").removeHandler(handler)
        assert [v.slot for v in engine.manager.violations()] == [5]
        assert engine.manager.n_observer_errors > 0 and engine.manager.step_number == 4

    def test_a_callback_may_close_the_manager(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.manager.on_violation(lambda _v: engine.manager.close())
        engine.step((0, 0, 6))
        flip(engine, 0, 5)
        engine.step((0, 6, 1))
        with pytest.raises(PhaseError, match="closed"):
            engine.manager.begin_step()

    @pytest.mark.parametrize("answer", [None, ([], [], [])])
    def test_a_resident_set_with_nothing_in_it_is_no_stall(self, answer: object) -> None:
        engine = ToyEngine(
            sweep_interval=2, health_policy="raise", health_check_every_n_steps=2, health_check_warmup_steps=2
        )
        engine.manager.attach_resident_set(lambda: answer)
        for p in range(8):
            engine.step((0, p, 1))
        assert engine.manager.stats().sweep_passes == 0

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

    def test_a_fault_that_goes_on_does_not_fill_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        engine = ToyEngine(max_requests=4)
        for _ in range(600):
            batch = engine.batch((0, 0, 2))
            batch.slot_mapping[:] += 1  # off by one, for ever
            with engine.manager.step(), engine.manager.forward(batch):
                engine.write(batch)
        lines = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert engine.manager.stats().violations_total > 1000
        assert len(lines) < 500
        assert "most are no longer written" in lines[-1].getMessage()

    def test_describe_remembers_the_inputs_of_batches_that_are_gone(self) -> None:
        engine = ToyEngine()
        engine.step((0, 0, 4))
        gc.collect()
        assert "no batch was seen yet" not in engine.manager.describe()

    def test_dropped_violations_are_counted_by_synchronize(self) -> None:
        engine = ToyEngine(ring_capacity=1, stats_print_every_n_steps=0, health_check_every_n_steps=0)
        batch = engine.batch((0, 0, 12))
        batch.slot_mapping[:] += 100000
        with engine.manager.step(), engine.manager.forward(batch):
            pass
        engine.manager.synchronize()
        words = engine.manager.backend.snapshot_words()
        assert engine.manager.stats().observations_total == words[kvcanary.abi.STATE_OBSERVATIONS] >= 12

    def test_prove_refuses_memory_that_it_may_not_write(self) -> None:
        engine = ToyEngine()
        batch = engine.step((0, 0, 6))
        for layer in engine.k:
            layer.setflags(write=False)
        pool = layouts.nhd(k=engine.k, v=engine.v, page_size=PAGE)
        manager = CanaryManager(engine.config, [pool], 4, 64)
        with pytest.raises(BatchError, match="read-only"):
            manager.prove(batch)

    def test_pools_must_be_a_list_of_some(self) -> None:
        engine = ToyEngine()
        for pools in ("full", [], [0, "full"]):
            with pytest.raises(ConfigError, match="each once"):
                engine.manager.head(engine.batch((0, 0, 4)), pools=pools)

    def test_arguments_of_a_wrong_kind_say_what_is_wanted(self) -> None:
        engine = ToyEngine(lifecycle=True)
        manager = engine.manager
        calls: list[tuple[Callable[[], object], type[Exception], str]] = [
            (lambda: CanaryManager({}, [engine.pool], 2, 8), ConfigError, "config is dict: give a CanaryConfig"),  # type: ignore[arg-type]
            (lambda: CanaryManager(manager.config, [None], 2, 8), ConfigError, "pools is a list of NoneType: give"),  # type: ignore[list-item]
            (lambda: manager.head({}), BatchError, "batch is dict: give a StepBatch"),  # type: ignore[arg-type]
            (lambda: manager.prove(None), BatchError, "batch is NoneType"),  # type: ignore[arg-type]
            (lambda: manager.on_violation(None), ConfigError, r"on_violation\(None\): give a function"),  # type: ignore[arg-type]
            (lambda: manager.attach_resident_set([1]), ConfigError, r"attach_resident_set\(list\)"),  # type: ignore[arg-type]
            (lambda: manager.attach_agreement(5), ConfigError, r"attach_agreement\(int\): give a RankAgreement"),  # type: ignore[arg-type]
            (lambda: manager.chain([1.5]), BatchError, r"tokens are float64\[1\]"),  # type: ignore[list-item]
            (lambda: manager.chain([[1]]), BatchError, r"tokens are int64\[1, 1\]"),  # type: ignore[list-item]
            (lambda: manager.chain([1], -1), BatchError, "salt=-1: give an integer from 0"),
            (lambda: manager.lifecycle.owners("a"), LifecycleError, "block 'a': give a block id"),  # type: ignore[arg-type]
            (lambda: manager.lifecycle.apply(None), LifecycleError, "events is NoneType"),  # type: ignore[arg-type]
        ]
        for call, error, text in calls:
            with pytest.raises(error, match=text):
                call()
        assert manager.violations() == ()

    def test_a_resident_set_that_is_never_swept_is_warned_of(self, caplog: pytest.LogCaptureFixture) -> None:
        ToyEngine().manager.attach_resident_set(lambda: None)
        assert "sweep_interval is 0: nothing is swept" in caplog.text

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
