"""Bugs in the host logic and in the reference, by file."""

from __future__ import annotations

from .mutant import Mutant

OBSERVER, MANAGER = "tests/observers/test_violation_observer.py", "tests/test_manager.py"
HEALTH = " ".join(f"tests/observers/test_health{part}.py" for part in ("", "_pools", "_any_order"))
DEFERRED = "tests/test_deferred.py tests/test_interleavings.py"
LIMITS = "tests/test_kernels_limits.py"
OWNERSHIP = " ".join(f"tests/test_kernels_{name}.py" for name in ("ownership", "ownership_legal", "blocks"))
CATCH = f"tests/test_kernels_catch.py {LIMITS}"
LEDGER = "tests/test_ledger.py tests/test_lifecycle.py"


def _in(file: str, tests: str, *mutants: tuple[str, str, str], is_quick: bool = False) -> list[Mutant]:
    return [Mutant(name, f"kvcanary/{file}", old, new, tests, is_quick=is_quick) for name, old, new in mutants]


RING = [
    *_in(
        "violation_ring.py",
        "tests/test_violation_ring.py tests/test_overflow.py",
        ("reads what is not complete", "self._n_read += n_complete", "self._n_read += n"),
        ("places not handed back", "        self._control[abi.CONTROL_READ] = self._n_read\n", ""),
        ("laps confused", "self._commits[places] != np.arange", "self._commits[places] == 0 * np.arange"),
        is_quick=True,
    ),
    *_in(
        "observers/violations.py",
        OBSERVER,
        ("told at every forward", "            self._seen.move_to_end(key)\n            return False", "            return True"),
        ("mode raise raises twice", "            self._unraised.clear()\n", ""),
        ("newest is forgotten first", "self._seen.popitem(last=False)", "self._seen.popitem(last=True)"),
    ),
]  # fmt: skip

OBSERVERS = [
    *_in(
        "observers/health.py",
        HEALTH,
        ("stall not seen", "if now[pool][tag] == before[pool][tag]]", "if now[pool][tag] < before[pool][tag]]"),
        ("compared with the start", "        self.latest = now\n", "        self.latest = self.latest or now\n"),
        ("steps without a forward count", "if facts.n_counted_steps <= self._baseline_steps:", "if False:"),
        ("warm-up ignored", "is_due = facts.step >= self._warmup and", "is_due ="),
        is_quick=True,
    ),
    *_in(
        "observers/choices.py",
        HEALTH,
        ("one pool of a forward is enough", "pools <= running", "pools & running"),
        ("later forwards say who must run", "self._first or self._others", "self._first | self._others"),
    ),
    *_in(
        "deferred.py",
        DEFERRED,
        ("not asked whether it arrived", "and self._staging.is_done(self._in_flight[0][0]):", "and True:"),
        ("buffer reused in flight", "if len(self._in_flight) == self._depth:", "if len(self._in_flight) > self._depth:"),
        ("one buffer for all", "        self._n_staged += 1\n", ""),
        ("newest first", "index, receiver = self._in_flight.popleft()", "index, receiver = self._in_flight.pop()"),
        ("not counted", "        self.n_not_taken += 1\n        n =", "        n ="),
    ),
    *_in("sweep.py", "tests/test_sweep.py", ("sweeps at other steps", "if step % self.interval == 0 and", "if step % self.interval and")),
    *_in(
        "patrol.py",
        "tests/test_kernels_scrub.py",
        ("last turn left out", "-(-pool.n_blocks // n), n * n_bytes", "pool.n_blocks // n, n * n_bytes"),
    ),
]  # fmt: skip

MANAGER_LOGIC = [
    *_in(
        "phases.py",
        MANAGER,
        ("TAIL ends the step", "self.phase is _FORWARD_IN_STEP:\n            self.phase = _STEP",
         "self.phase is _FORWARD_IN_STEP:\n            self.phase = _OUTSIDE"),
        ("HEAD twice", "            self._refuse(\"head()\")\n", "            pass\n"),
        is_quick=True,
    ),
    *_in(
        "host_phase.py",
        "tests/test_host_phase.py",
        ("idle steps counted", "self._n_counted_steps += counted", "self._n_counted_steps += 1"),
    ),
    *_in(
        "ending.py",
        "tests/test_ending.py",
        ("dropped not told", "        self._violations.note_dropped(int(words[abi.STATE_DROPPED]))\n", ""),
    ),
    *_in("contexts.py", MANAGER, ("engine's error masked", "self._manager.abandon_step()", "self._manager.end_step()")),
    *_in("config.py", f"tests/test_config.py {MANAGER}", ("switch does not win", "return cls(mode=\"off\")", "pass")),
    *_in(
        "ledger.py",
        LEDGER,
        ("ids may come twice", "if not self._places_as_bytes.startswith(marks.tobytes()):", "if False:"),
        ("ids as before, it seems", "self._places_as_bytes.startswith(self._mark.take(at).tobytes())", "True"),
        ("as many ids as before, it seems", " and at.tobytes() == self._marked.tobytes()", ""),
        ("ids as before a refused call", "        self._marked = _NO_IDS\n        try", "        try"),
        ("places in too few bits", "self._mark = self._mark.astype(self._places.dtype)", "pass"),
        ("sharers not counted", "lowest + _SHARER if lowest == highest else held + _SHARER", "lowest + _SHARER"),
        ("freed by one who never had it", "left if is_uniform else int(np.bitwise_or.reduce(left))", "left if is_uniform else 0"),
        ("some shares given back, others taken", "(left < _SHARER) > is_freed", "left < _SHARER"),
    ),
    *_in(
        "references.py",
        f"tests/test_references.py {LEDGER}",
        ("as many are taken for the same", " and self._blocks.tobytes() == at.tobytes()", ""),
        ("blocks of several calls come once", " and isinstance(self._calls, int) and self._blocks", " and self._blocks"),
    ),
    *_in("lifecycle.py", LEDGER, ("wrong event named", "blocks, i) from error", "blocks, i + 1) from error")),
    *_in("batch.py", "tests/test_batch.py", ("a row too many", "if rows > max_requests:", "if rows > max_requests + 1:")),
    *_in(
        "bundle.py",
        "tests/test_bundle.py",
        ("damage on the way", "if _checksum(body) != data[-_CHECKSUM_BYTES:]:", "if False:"),
        ("link of the first kept", "    first[first == abi.PREV_IN_LIST] = abi.PREV_NONE\n", ""),
    ),
]  # fmt: skip

REFERENCE = [
    *_in(
        "backends/host.py",
        CATCH,
        ("taint not cleared", "                self.state.taint[:] = 0\n", "                pass\n"),
        ("swapped K and V", "v[\"tag\"] += np.uint32(unit.half)", "v[\"tag\"] += np.uint32(unit.half ^ 1)"),
        ("stale step", "words[abi.STATE_STEP_DONE] + np.uint64(batch.is_first_forward)", "words[abi.STATE_STEP_DONE]"),
    ),
    *_in(
        "backends/reference_rows.py",
        CATCH,
        ("padding test skipped", "    if q1 - q0 > length:\n        return row  # padding\n", ""),
        ("window off by one", "prefix - pool.window + 1 if", "prefix - pool.window if"),
    ),
    *_in(
        "backends/reference_data.py",
        CATCH,
        ("wrong stage", "(pool.tail[half][\"step\"][slots] == step)", "(pool.head[half][\"step\"][slots] == step)"),
    ),
    *_in("backends/ownership.py", OWNERSHIP, ("owner stays", "        words[\"owner\"] = 0\n", "        pass\n")),
    *_in(
        "hashing.py",
        "tests/test_hashing.py",
        ("wrong shift", "x = (x ^ (x >> np.uint64(27)))", "x = (x ^ (x >> np.uint64(26)))"),
    ),
]  # fmt: skip

ERRORS, STREAMS = "tests/test_abuse.py", "tests/test_abuse_cuda.py"
BESIDE = "tests/test_overlap_head.py"
LOGS, THREADS = "tests/test_abuse_logs.py", "tests/test_abuse_threads.py"
ABUSE = [
    *_in(
        "host_phase.py",
        ERRORS,
        ("first error lost", "            raise errors[0]\n\n    def _note", "            raise errors[-1]\n\n    def _note"),
    ),
    *_in(
        "host_phase.py",
        STREAMS,
        ("sweep on a dead stream", "            self._quietly(self._sweep_now)\n", "            self._sweep_now()\n"),
    ),
    *_in(
        "turns.py",
        THREADS,
        ("child is not told", "        owner.after_fork()\n", "        pass\n"),
        ("child frees what is the parent's", "        _kept.append(owner)\n", ""),
        ("waits too long", "self.lock.acquire(timeout=MAX_WAIT_S)", "self.lock.acquire(timeout=25)"),
    ),
    *_in(
        "manager.py",
        ERRORS,
        ("engine's error behind ours", "        self._quietly(self._violations.poll)  # first: it asks nothing of a device that may have died\n        self._quietly(self._restore_perturbed)\n\n    def step", "        self._violations.poll()\n        self._quietly(self._restore_perturbed)\n\n    def step"),
        ("half a manager left behind", "            backend_of_this.close()\n", ""),
    ),
    *_in("controls.py", STREAMS, ("driver's error comes through", "        except Exception as error:  # of the driver", "        except ZeroDivisionError as error:  # of the driver")),
    *_in("ending.py", THREADS, ("lock of a thread that is not there", "        self._turns.renew()\n", "")),
    *_in(
        "observers/violations.py",
        LOGS,
        ("log handler takes the violation along", "        self._quietly(lambda: self._log(new))\n", "        self._log(new)\n"),
        ("callback takes the next one along", "            except Exception:  # noqa: BLE001  whatever an", "            except ZeroDivisionError:  # whatever an"),
    ),
    *_in(
        "captured.py",
        STREAMS,
        ("memory of a live graph freed", "        _orphans.append(backend)\n", ""),
        ("memory of no graph kept", "        if not self.was_captured:\n            return\n", ""),
        ("closed, and kept all the same", "        self._finalizer.detach()\n", "        pass\n"),
    ),
    *_in(
        "backends/device.py",
        BESIDE,
        ("TAIL does not wait for HEAD", "        self._side.join(stream)\n", ""),
        ("a layer does not wait for HEAD", "        self._side.let_wait(stream)\n        for call", "        for call"),
        ("rebind does not wait for HEAD", "        self._side.let_wait(stream)  # HEAD", "        # HEAD"),
        ("a forward that raised leaves its stream out", "        self._side.abandon()\n", "        pass\n"),
        ("graphs of the guard leave their stream", "head, tail = self._launch_head, self._launch_tail", "head, tail = self.head, self.tail"),
    ),
    *_in(
        "backends/side_stream.py",
        BESIDE,
        ("HEAD does not wait for the engine", "        self._side.wait(self._left)\n", ""),
        ("TAIL waits for what was there before", "        self._side.record(self._done)\n", ""),
        ("captures are made invalid", "        if self._capture_of(pointer) != self._capture_of(self._pointer):", "        if False:"),
        ("captures are not told apart", "_ACTIVE: number.value}", "_ACTIVE: 1}"),
        ("a stream in a capture is taken for another forward", "        if capture and capture != self._capture_of(pointer):\n", "        if False:\n"),
        ("inner forwards of one capture are not beside the model", "        if capture and capture != self._capture_of(pointer):\n", "        if capture:\n"),
        ("an invalid capture is none", ".get(status.value, -1)", ".get(status.value, 0)"),
        ("a stream that was joined is joined again", "            self._order(stream_pointer(stream))\n            self._is_out = False\n", "            self._order(stream_pointer(stream))\n"),
        ("an error in front of the model's own", "            with contextlib.suppress(Exception):  # the device", "            with contextlib.nullcontext():  # the device"),
        ("a rebind joins a capture", "        if self._is_out and not (self._capture_of(self._pointer) and not self._capture_of(pointer)):\n", "        if self._is_out:\n"),
    ),
    *_in(
        "backends/context.py",
        "tests/test_context.py",
        ("captures are asked about in another context", "            with self._calls.pushed():\n                return question(*arguments)", "            return question(*arguments)"),
    ),
    *_in(
        "backends/cuda.py",
        STREAMS,
        ("memory not given back", "            self._cupy.get_default_memory_pool().free_all_blocks()\n", "            pass\n"),
        ("memory stays in the error", "    driver.close()\n    driver.give_back()\n    raise BackendError(text)\n",
         "        driver.close()\n        driver.give_back()\n        raise\n"),
    ),
]  # fmt: skip

HOST = [*RING, *OBSERVERS, *MANAGER_LOGIC, *REFERENCE, *ABUSE]
