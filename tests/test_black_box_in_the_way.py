"""The black box never gets in the way: disks that fail or hang, other processes, and what is no file."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from black_boxes import damaged, flip, flushed, lines_of
from engine import ToyEngine

from kvcanary import CanaryConfig, CanaryManager, box_file, layouts
from kvcanary.box_file import BoxFile
from kvcanary.box_reader import read_box
from kvcanary.violations import Violation


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

    def test_callbacks_and_log_handlers_that_raise_cost_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "box"
        engine = ToyEngine(verify_data_every=1, black_box_path=str(path))

        raised: list[Any] = []

        def boom(what: Any) -> None:
            raised.append(what)
            raise ValueError("boom")

        logger, handler = logging.getLogger("kvcanary"), logging.Handler()
        monkeypatch.setattr(handler, "emit", boom)
        monkeypatch.setattr(logger, "handlers", [handler])
        engine.manager.on_violation(boom)
        engine.step((0, 0, 6))
        flip(engine)
        engine.step((0, 6, 1))
        flushed(engine)
        assert {type(what) for what in raised} == {logging.LogRecord, Violation}
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

    def test_what_is_no_file_keeps_nothing_and_counts_as_an_error(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        engine = damaged(tmp_path / "pipe")
        assert len(engine.manager.violations()) == 1
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
