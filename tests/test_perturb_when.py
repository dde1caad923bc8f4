"""When the fault drill strikes, when it does not, and what it says of either."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import pytest
from drill_toy import DrillToy, Make, armed, drill_maker, the_one, warnings_of  # noqa: F401  a fixture
from engine import PAGE, ToyEngine

from kvcanary import CanaryManager, ConfigError, FaultKind, StepBatch, layouts
from kvcanary.deferred import HostStaging


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
