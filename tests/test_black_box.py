"""The black box: what is in it, that it never gets in the way, and that it outlives the process."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import PAGE, ToyEngine

import kvcanary
from kvcanary import CanaryConfig, CanaryManager, Reason, box_file, layouts
from kvcanary.box_file import BoxFile
from kvcanary.box_reader import read_box
from kvcanary.hashing import prefix_chain

TESTS = Path(__file__).resolve().parent


def flip(engine: ToyEngine, layer: int = 1, slot: int = 5) -> None:
    engine.k[layer][slot // PAGE, slot % PAGE, 0, 0] ^= np.uint8(1)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flushed(engine: ToyEngine) -> None:
    assert engine.manager._box is not None
    assert engine.manager._box.flush(10)


def damaged(path: Path, **config: Any) -> ToyEngine:
    """A run of three steps with a flipped bit; all is written."""
    engine = ToyEngine(**{"verify_data_every": 1, "black_box_path": str(path), **config})
    engine.step((0, 0, 6), (1, 0, 3))
    flip(engine)
    engine.step((0, 6, 1), (1, 3, 1))
    engine.step((0, 7, 1), (1, 4, 1))
    flushed(engine)
    return engine


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


class TestNeverInTheWay:
    @pytest.mark.parametrize("where", ["no/such/folder/box", ".", "on a full disk"])
    def test_what_cannot_be_written_is_warned_of_once_and_counted(
        self, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write(_fd: int, _data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        if where == "on a full disk":
            monkeypatch.setattr(os, "write", write)
        engine = damaged(tmp_path / where)
        assert [v.slot for v in engine.manager.violations()] == [5]
        assert engine.manager.stats().black_box_errors == 2
        (line,) = [r.getMessage() for r in caplog.records if "black box" in r.getMessage()]
        assert "cannot be written" in line and "black_box_path" in line
        engine.manager.close()
        assert engine.manager.stats().black_box_errors == 3

    def test_a_disk_that_hangs_holds_nobody_and_what_waits_is_counted_and_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, real = threading.Event(), os.fsync

        def fsync(fd: int) -> None:
            assert gate.wait(30)
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr("kvcanary.black_box.END_WAIT_S", 0.05)
        monkeypatch.setattr(box_file, "MAX_PENDING", 3)
        engine = ToyEngine(verify_data_every=1, black_box_path=str(tmp_path / "box"))
        engine.step((0, 0, 4))
        start = time.perf_counter()
        for p in range(4, 11):
            flip(engine, slot=4 + p - 4)
            engine.step((0, p, 1))
        engine.manager.close()
        assert time.perf_counter() - start < 5
        assert len(engine.manager.violations()) == 7
        assert engine.manager.stats().black_box_errors == 9  # the start, seven findings and the end
        (line,) = [r.getMessage() for r in caplog.records if "black box" in r.getMessage()]
        assert "9 events were not on the disk 0.05 s after the end" in line and "black_box_path" in line
        gate.set()
        assert engine.manager._box is not None and engine.manager._box.flush(10)
        (run,) = read_box(tmp_path / "box").runs
        assert [v.slot for _, v in run.violations] == [4, 5, 6]  # the oldest ones
        assert run.end is not None and run.end["errors"] == 4
        assert engine.manager.stats().black_box_errors == 9, "a counter never falls"

    def test_a_disk_that_fails_late_is_counted_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gate = threading.Event()

        def fsync(_fd: int) -> None:
            assert gate.wait(30)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr("kvcanary.black_box.END_WAIT_S", 0.05)
        engine = ToyEngine(black_box_path=str(tmp_path / "box"))
        engine.manager.close()
        assert engine.manager.stats().black_box_errors == 2
        gate.set()
        assert engine.manager._box is not None and engine.manager._box.flush(10)
        assert engine.manager.stats().black_box_errors == 2

    def test_events_that_found_too_many_waiting_are_warned_of_when_the_disk_is_back(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, real = threading.Event(), os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: gate.wait(30) and real(fd))
        monkeypatch.setattr(box_file, "MAX_PENDING", 3)
        file = BoxFile(str(tmp_path / "box"))
        for i in range(9):
            file.put(lambda i=i: [{"i": i}])  # type: ignore[misc]
        assert not caplog.records, "nobody who puts waits for a log handler"
        gate.set()
        assert file.flush(10)
        (line,) = [r.getMessage() for r in caplog.records]
        assert "more than 3 events waited for the disk" in line and file.n_errors in (5, 6)
        assert len(lines_of(tmp_path / "box")) == 9 - file.n_errors

    def test_a_process_that_changes_its_folder_keeps_one_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        monkeypatch.chdir(tmp_path / "a")
        engine = ToyEngine(verify_data_every=1, black_box_path="box")
        engine.step((0, 0, 6))
        monkeypatch.chdir(tmp_path / "b")
        flip(engine)
        engine.step((0, 6, 1))
        engine.manager.close()
        (run,) = read_box(tmp_path / "a" / "box").runs
        assert run.start and run.end and len(run.violations) == 1
        assert not list((tmp_path / "b").iterdir())

    def test_a_folder_that_was_taken_away_is_an_error_like_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        engine = damaged(Path("box"))
        monkeypatch.chdir(tmp_path)
        assert len(engine.manager.violations()) == 1 and engine.manager.stats().black_box_errors == 2

    def test_one_process_has_its_share_and_no_more(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "box"
        monkeypatch.setattr(box_file, "MAX_PROCESS_BYTES", 16_000)
        monkeypatch.setattr(box_file, "_RESERVE_BYTES", 4_000)
        engine = ToyEngine(verify_data_every=1, black_box_path=str(path), ring_capacity=256)
        engine.step((0, 0, 8), (1, 0, 8))
        for layer in (*engine.k, *engine.v):
            layer[...] ^= 1
        engine.step((0, 8, 1), (1, 8, 1))
        engine.manager.close()
        (run,) = read_box(path).runs
        assert path.stat().st_size < 16_000
        assert run.end is not None and run.end["left_out"] > 0
        assert len(run.violations) + run.end["left_out"] == len(engine.manager.violations()) + 1  # and its counters

    def test_a_large_file_is_put_aside_by_the_next_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "box"
        damaged(path).manager.close()
        size = path.stat().st_size
        damaged(path).manager.close()
        assert path.stat().st_size > 1.9 * size
        monkeypatch.setattr(box_file, "MAX_FILE_BYTES", size)
        damaged(path).manager.close()
        assert path.stat().st_size < 1.1 * size
        assert len(read_box(tmp_path / "box.old").runs) == 2 and len(read_box(path).runs) == 1

    def test_a_writer_that_died_in_a_line_costs_only_that_line(self, tmp_path: Path) -> None:
        path = tmp_path / "box"
        damaged(path).manager.close()
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        damaged(path).manager.close()
        box = read_box(path)
        assert len(box.damaged) == 1 and [len(run.violations) for run in box.runs] == [1, 1]
        assert [run.end is None for run in box.runs] == [True, False]

    def test_callbacks_and_log_handlers_that_raise_cost_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "box"
        engine = ToyEngine(verify_data_every=1, black_box_path=str(path))

        def boom(_violation: Any) -> None:
            raise ValueError("boom")

        engine.manager.on_violation(boom)
        engine.step((0, 0, 6))
        flip(engine)
        engine.step((0, 6, 1))
        flushed(engine)
        assert len(read_box(path).runs[0].violations) == 1

    def test_a_second_event_wakes_a_new_thread(self, tmp_path: Path) -> None:
        file = BoxFile(str(tmp_path / "box"))
        for i in range(20):
            file.put(lambda i=i: [{"i": i}])  # type: ignore[misc]
            if i % 3 == 0:
                assert file.flush(10)
        assert file.flush(10)
        assert [line["i"] for line in lines_of(tmp_path / "box")] == list(range(20))

    def test_without_new_threads_the_event_is_written_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def start(_self: threading.Thread) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", start)
        file = BoxFile(str(tmp_path / "box"))
        for i in range(3):
            file.put(lambda i=i: [{"i": i}])  # type: ignore[misc]
            assert lines_of(tmp_path / "box")[-1] == {"i": i}
        assert file.flush(0)

    def test_a_pipe_without_a_reader_is_an_error_like_others(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "box")
        engine = damaged(tmp_path / "box")
        assert len(engine.manager.violations()) == 1
        engine.manager.close()

    def test_what_is_no_file_keeps_nothing_and_counts_as_an_error(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        engine = damaged(tmp_path / "pipe")
        assert engine.manager.stats().black_box_errors == 2
        (line,) = [r.getMessage() for r in caplog.records if "black box" in r.getMessage()]
        assert "it is a pipe, not a regular file" in line and "black_box_path" in line
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            assert damaged(tmp_path / "s").manager.stats().black_box_errors == 2

    @pytest.mark.parametrize("device", ["/dev/null", "/dev/full", "/dev/zero"])
    def test_nothing_is_written_to_a_device(
        self, device: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not Path(device).exists():
            pytest.skip(f"no {device}")
        written: list[Any] = []
        monkeypatch.setattr(os, "write", lambda *what: written.append(what) or len(what[1]))
        engine = damaged(Path(device))
        assert not written
        assert engine.manager.stats().black_box_errors == 2
        (line,) = [r.getMessage() for r in caplog.records if "black box" in r.getMessage()]
        assert "it is a character device, not a regular file" in line

    def test_the_home_of_the_user_is_where_the_tilde_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        engine = damaged(Path("~/box"))
        assert engine.config.black_box_path == str(tmp_path / "box")
        engine.manager.close()
        assert lines_of(tmp_path / "box")[-1]["kind"] == "end"

    def test_sizes_of_numpys_own_types_are_written_as_numbers(self, tmp_path: Path) -> None:
        pool = layouts.nhd(k=[np.zeros((4, 4, 2, 8), np.uint8)])
        pool = replace(pool, planes=[replace(plane, layer=np.int64(3)) for plane in pool.planes])
        config = CanaryConfig(black_box_path=str(tmp_path / "box"), ring_capacity=np.int32(8))  # type: ignore[arg-type]
        manager = CanaryManager(config, [pool], np.int64(4), np.int16(64))  # type: ignore[arg-type]
        manager.close()
        assert manager.stats().black_box_errors == 0
        start = lines_of(tmp_path / "box")[0]
        assert (start["max_requests"], start["max_new_tokens"], start["config"]["ring_capacity"]) == (4, 64, 8)
        assert start["pools"][0]["planes"][0]["layer"] == start["pools"][0]["digests"][0]["layer"] == 3


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
