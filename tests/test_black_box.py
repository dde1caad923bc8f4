"""The black box: what is in it, and that it outlives the process."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from black_boxes import damaged, flip, flushed, lines_of
from engine import PAGE, ToyEngine

import kvcanary
from kvcanary import Reason
from kvcanary.box_reader import read_box
from kvcanary.hashing import prefix_chain

TESTS = Path(__file__).resolve().parent


class TestContents:
    def test_a_finding_is_written_with_all_that_belongs_to_it(self, tmp_path: Path) -> None:
        path = tmp_path / "box.jsonl"
        engine = damaged(path)
        kinds = [line["kind"] for line in lines_of(path)]
        assert kinds == ["start", "violation", "counters"]
        assert {(line["black_box"], line["pid"]) for line in lines_of(path)} == {(1, os.getpid())}
        start, _, counters = lines_of(path)
        assert start["config"]["verify_data_every"] == 1
        assert start["versions"]["kvcanary"] == kvcanary.__version__
        (pool,) = start["pools"]
        assert (pool["name"], pool["page_size"], pool["n_blocks"], pool["reserved_blocks"]) == ("full", PAGE, 16, [0])
        assert [(p["name"], p["layer"], p["bytes"]) for p in pool["planes"]] == [
            ("k", 0, 16), ("v", 0, 16), ("k", 1, 16), ("v", 1, 16),
        ]  # fmt: skip
        assert counters["counters"]["violations_total"] == 1
        assert counters["counters"]["pools"]["full"]["violations"] == {"DATA": 1}
        (run,) = read_box(path).runs
        assert [v for _, v in run.violations] == list(engine.manager.violations())
        assert path.stat().st_mode & 0o777 == 0o600

    def test_honest_steps_write_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "box.jsonl"
        engine = ToyEngine(verify_data_every=1, black_box_path=str(path), stats_print_every_n_steps=1)
        flushed(engine)
        before = path.read_bytes()
        for p in range(10):
            engine.step((0, p, 1))
        assert threading.active_count() == len([t for t in threading.enumerate() if "black box" not in t.name])
        assert path.read_bytes() == before
        engine.manager.close()
        assert [line["kind"] for line in lines_of(path)] == ["start", "end"]

    def test_the_end_has_the_last_counters_and_comes_once(self, tmp_path: Path) -> None:
        path = tmp_path / "box.jsonl"
        engine = damaged(path)
        engine.manager.synchronize()
        engine.manager.close()
        engine.manager.close()
        end = lines_of(path)[-1]
        assert (end["kind"], end["how"], end["left_out"], end["errors"]) == ("end", "close", 0, 0)
        assert (end["counters"]["step"], end["counters"]["forwards"], end["counters"]["observations_total"]) == (
            3,
            3,
            2,
        )
        assert end["counters"]["pools"]["full"]["launches"]["HEAD_K_FULL"] == 6
        assert Counter(line["kind"] for line in lines_of(path))["end"] == 1

    def test_what_the_device_still_has_to_tell_is_read_at_the_end(self, tmp_path: Path) -> None:
        engine = ToyEngine(
            verify_data_every=1,
            black_box_path=str(tmp_path / "box"),
            stats_print_every_n_steps=0,
            health_check_every_n_steps=0,
        )
        for p in range(7):
            engine.step((0, p, 1))
        assert engine.manager.stats().forwards == 0, "nobody has taken a snapshot"
        engine.manager.close()
        counters = lines_of(tmp_path / "box")[-1]["counters"]
        assert (counters["step"], counters["snapshot_step"], counters["forwards"]) == (7, 7, 7)
        assert counters["protected_tokens"] > 0
        assert (engine.manager.stats().forwards, engine.manager.stats().lag_steps) == (7, 0)

    def test_a_device_that_does_not_answer_at_the_end_costs_only_its_counters(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = damaged(tmp_path / "box")
        monkeypatch.setattr(type(engine.manager.backend), "synchronize", lambda _self: 1 / 0)
        engine.manager.close()
        end = lines_of(tmp_path / "box")[-1]
        assert (end["how"], end["counters"]["violations_total"], end["counters"]["snapshot_step"]) == ("close", 1, 0)

    def test_tokens_and_raw_chains_are_withheld_unless_asked_for(self, tmp_path: Path) -> None:
        def run(path: Path, log_tokens: bool) -> str:
            engine = ToyEngine(verify_data_every=1, black_box_path=str(path), log_tokens=log_tokens)
            engine.history[:2, :12] = 1_900_000_000 + np.arange(24).reshape(2, 12)  # no other number looks like it
            engine.step((0, 0, 8), (1, 0, 8))
            batch = engine.batch((0, 8, 1), (1, 8, 1))
            batch.block_table[0] = batch.block_table[1]
            with engine.manager.step(), engine.manager.forward(batch):
                engine.write(batch)
            assert any(Reason.TOKEN in v.reasons for v in engine.manager.violations())
            engine.manager.close()
            return path.read_text()

        chains = [hex(prefix_chain(1_900_000_012 + np.arange(n), 0)) for n in range(1, 9)]
        hidden, shown = run(tmp_path / "hidden", False), run(tmp_path / "shown", True)
        assert "19000000" not in hidden and '_token"' not in hidden
        assert not any(chain in hidden for chain in chains)
        assert "1900000012" in shown and any(chain in shown for chain in chains)

    def test_a_stall_is_written(self, tmp_path: Path) -> None:
        path = tmp_path / "box.jsonl"
        engine = ToyEngine(black_box_path=str(path), health_check_every_n_steps=2, health_check_warmup_steps=2)
        for p in range(4):
            engine.step((0, p, 1))
        for _ in range(3):
            with engine.manager.step():
                pass
        engine.manager.close()
        stalls = [line for line in lines_of(path) if line["kind"] == "stall"]
        assert stalls[0]["error"] == "CanaryStalledError" and "HEAD_K_FULL" in stalls[0]["tags"]
        assert stalls[0]["step"] == 6 and "did not run" in stalls[0]["text"]

    def test_findings_of_an_engine_that_raised_are_written(self, tmp_path: Path) -> None:
        path = tmp_path / "box.jsonl"
        engine = ToyEngine(verify_data_every=1, black_box_path=str(path))
        engine.step((0, 0, 6))
        flip(engine)
        batch = engine.batch((0, 6, 1))
        with pytest.raises(RuntimeError, match="gone"), engine.manager.step(), engine.manager.forward(batch):
            raise RuntimeError("the engine's context is gone")
        flushed(engine)
        assert [v.slot for _, v in read_box(path).runs[0].violations] == [5]

    def test_nothing_is_made_with_the_guard_off(self, tmp_path: Path) -> None:
        path = tmp_path / "box.jsonl"
        ToyEngine(mode="off", black_box_path=str(path)).manager.close()
        assert not path.exists()


WORKER = """
import os, signal, sys
import numpy as np
from engine import PAGE, ToyEngine

engine = ToyEngine(verify_data_every=1, black_box_path=sys.argv[1], seed=int(sys.argv[3]))
engine.step((0, 0, 6))
def flip(): engine.k[1][1, 1, 0, 0] ^= np.uint8(1)
how = sys.argv[2]
if how == "unread":  # recorded, and nobody has read it
    flip()
    batch = engine.batch((0, 6, 1))
    with engine.manager.forward(batch):
        engine.write(batch)
    assert engine.manager._violations.violations_total == 0
    raise SystemExit(3)
if how == "many":
    for p in range(6, 11):
        engine.k[1][1 + p % 2, p % PAGE, 0, 0] ^= np.uint8(1)
        engine.step((0, p, 1))
    raise SystemExit(0)
flip()
engine.step((0, 6, 1))
if how == "killed":
    assert engine.manager._box.flush(30)
    os.kill(os.getpid(), signal.SIGKILL)
if how == "forked":
    child = os.fork()
    if child == 0:
        sys.exit(0)  # runs the child's exit handlers
    assert os.waitpid(child, 0)[1] == 0
if how == "raised":
    raise RuntimeError("the engine gave up")
"""


class TestOutlives:
    def start(self, path: Path, how: str, seed: int = 0) -> subprocess.Popen[str]:
        paths = os.pathsep.join((str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")))
        command = [sys.executable, "-c", WORKER, str(path), how, str(seed)]
        environ = {**os.environ, "PYTHONPATH": paths}
        return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)

    @pytest.mark.parametrize(
        ("how", "code", "end"),
        [
            ("closed by nobody", 0, "exit"),
            ("raised", 1, "exit"),
            ("unread", 3, "exit"),
            ("killed", -signal.SIGKILL, None),
            ("forked", 0, "exit"),
        ],
    )
    def test_a_process_that_ended_leaves_its_findings(
        self, how: str, code: int, end: str | None, tmp_path: Path
    ) -> None:
        process = self.start(tmp_path / "box", how)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        (run,) = read_box(tmp_path / "box").runs
        assert (run.pid, run.end and run.end["how"]) == (process.pid, end)
        assert [(v.slot, v.reasons) for _, v in run.violations] == [(5, Reason.DATA)]

    def test_processes_that_share_a_file_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        processes = [self.start(tmp_path / "box", "many", seed) for seed in range(4)]
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        runs = read_box(tmp_path / "box").runs
        assert sorted(run.pid for run in runs) == sorted(process.pid for process in processes)
        assert all(run.start and run.end and len(run.violations) >= 3 for run in runs)

    def test_a_manager_that_was_dropped_says_so(self, tmp_path: Path) -> None:
        engine = damaged(tmp_path / "box")
        del engine
        gc.collect()
        (run,) = read_box(tmp_path / "box").runs
        assert run.end is not None and run.end["how"] == "dropped"
        assert run.counters is not None and run.counters["violations_total"] == 1
