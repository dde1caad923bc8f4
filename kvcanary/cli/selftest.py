"""The self-test of `kvcanary doctor`: one short guarded sequence on two backends, compared kernel by kernel.

What the kernels leave behind (stamps, digests, registers, counters, violations) must be what the host backend leaves,
bit for bit. It needs no GPU itself: a `Device` says where arrays lie and how launches are run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.backends import Backend, Resident
from kvcanary.backends.device import DeviceBackend
from kvcanary.backends.host import HostBackend
from kvcanary.backends.launches import KERNELS
from kvcanary.backends.moves import Move, MoveOp, SlotImage
from kvcanary.batch import StepBatch
from kvcanary.cli.script import N_ROWS, N_TOKENS, PENDING_ROW, PENDING_STEP, Script, pools_over
from kvcanary.config import CanaryConfig
from kvcanary.ledger import BlockChanges
from kvcanary.tags import Detail, Reason, Stage

Array: TypeAlias = npt.NDArray[Any]
Facts: TypeAlias = dict[str, dict[str, Array]]  # kernel -> what it left behind
MakeBackend: TypeAlias = Callable[..., Backend]

# What the damaged script must make the guard say.
EXPECTED = (
    *(Reason.CHAIN, Reason.POSITION, Reason.DATA, Reason.WRITE_POSITION, Reason.TOKEN, Reason.UNWRITTEN),
    *(Reason.OUT_OF_RANGE, Reason.DUPLICATE_WRITE, Reason.STALE_EPOCH, Reason.FOREIGN_WRITE),
    Reason.NONFINITE_RESERVED,
)


@dataclass(frozen=True)
class Device:
    """Where the arrays of a guard lie.

    Attributes:
        to_device: a copy of a host array there.
        to_host: the copy back.
        assign: overwrite a device array's contents; what is run later sees them.
        record: make of a function that launches on a stream one that runs those launches at every call and waits for
            them: by calling it, or by capturing it once and replaying the graph.
    """

    to_device: Callable[[Array], Any]
    to_host: Callable[[Any], Array]
    assign: Callable[[Any, Array], None]
    record: Callable[[Callable[[Any], None]], Callable[[], None]]


HOST = Device(np.array, np.array, np.copyto, lambda launch: partial(launch, None))


class KernelCheck(NamedTuple):
    """One kernel: how many values were compared, and what differed ("" if nothing did)."""

    kernel: str
    n_values: int
    problem: str


class Side:
    """A guard, and the copy of the script's memory that it reads."""

    def __init__(self, make_backend: MakeBackend, device: Device, script: Script, config: CanaryConfig) -> None:
        self._device = device
        self._planes = [device.to_device(plane) for plane in script.planes]
        self._arrays = {name: device.to_device(array) for name, array in script.arrays.items()}
        pools = pools_over(self._planes)
        self.backend = make_backend(config, pools, N_ROWS, N_TOKENS)
        kind = (pools[0].device or "cpu").split(":")[0]
        bound = StepBatch(**self._arrays).validate(pools, N_ROWS, N_TOKENS, kind)
        calls = [self.backend.bind(i, b, True) for i, b in enumerate(bound)]
        self.head = device.record(lambda stream: self.backend.head(calls, stream))
        self.layer = device.record(lambda stream: self.backend.verify_layer(calls, 0, stream))
        self.tail = device.record(lambda stream: self.backend.tail(calls, stream))
        self.n_halves = [len(pool.halves) for pool in pools]

    def publish(self, script: Script) -> None:
        """Copy what the script's memory holds now."""
        for mine, theirs in zip(self._planes, script.planes, strict=True):
            self._device.assign(mine, theirs)
        for name, array in script.arrays.items():
            self._device.assign(self._arrays[name], array)

    def own(self, changes: Sequence[BlockChanges]) -> None:
        """Change who owns which blocks, in every pool."""
        for change in changes:
            for pool in range(len(self.n_halves)):
                self.backend.update_blocks(pool, change, None)
        self.backend.synchronize()

    def sweep(self, resident: Resident) -> None:
        """Sweep the same resident slots in every pool."""
        for pool in range(len(self.n_halves)):
            self.backend.synchronize()
            is_swept = self.backend.sweep(pool, resident, None)
            assert is_swept, "the lists of the sweep before are still being copied"
        self.backend.synchronize()

    def array(self, pool: int, name: str) -> Array:
        """One of the guard's own arrays, on the host."""
        backend: Any = self.backend
        if isinstance(backend, DeviceBackend):
            return self._device.to_host(backend._arrays[pool][name])
        arrays = backend._pools[pool]
        is_half = name[:4] in ("head", "tail")
        found: Array = getattr(arrays, name[:4])[int(name[4])] if is_half else getattr(arrays, name)
        return found

    def arrays(self, *names: str) -> Array:
        """Arrays of all pools end to end as bytes; "head" and "tail" stand for both halves."""
        found: list[Array] = []
        for pool, n_halves in enumerate(self.n_halves):
            for name in names:
                halves = [f"{name}{h}" for h in range(n_halves)] if name in ("head", "tail") else [name]
                found += [np.ascontiguousarray(self.array(pool, n)).reshape(-1).view(np.uint8) for n in halves]
        return np.concatenate(found)

    def records(self) -> Array:
        """The violations, in an order of their own, without their commit words."""
        state = self.backend.state
        n = int(self.backend.snapshot_words()[abi.STATE_CLAIMED])
        records: Array = state.violation_log[:n].copy()
        records["commit"] = 0
        return np.array(sorted(records, key=lambda record: record.tobytes()), abi.VIOLATION)

    def facts(self) -> Facts:
        """What each kernel left behind."""
        words = self.backend.snapshot_words()
        layout, records = self.backend.state.layout, self.records()
        runs, slots, data = layout.kernel_runs(words), layout.slot_runs(words), layout.data_runs(words)
        is_patrol, is_reserved = (records["detail"] == detail for detail in (Detail.SCRUB, Detail.RESERVED))
        is_layer = (records["row"] == PENDING_ROW) & (records["step"] == PENDING_STEP + 1)
        stage, is_data = records["tag"] // 4, records["reasons"] & Reason.DATA != 0
        taint = self._device.to_host(self.backend.state.taint)

        def counters(of: Stage) -> Array:
            return np.concatenate([c[:, 4 * of : 4 * of + 4] for c in (runs, slots)], axis=None)

        def about(of: Stage, has_data: bool) -> Array:
            apart = is_patrol | is_reserved | (is_layer & has_data)
            found: Array = records[(stage == of) & (is_data == has_data) & ~apart]
            return found.view(np.uint8)

        return {
            "kvc_blocks_update": {"block owners": self.arrays("blocks")},
            "kvc_begin": {"forwards": words[: abi.STATE_JUDGING], "claims": self.arrays("claims", "register_claims")},
            "kvc_stamps_write": {"HEAD stamps": self.arrays("head"), "registers": self.arrays("registers")},
            "kvc_stamps_verify": {
                "HEAD counters": counters(Stage.HEAD),
                "HEAD violations": about(Stage.HEAD, False),
                "taint": taint,
            },
            "kvc_stamps_tail": {
                "TAIL stamps": self.arrays("tail"),
                "TAIL counters": counters(Stage.TAIL),
                "TAIL violations": about(Stage.TAIL, False),
            },
            "kvc_stamps_sweep": {
                "SWEEP counters": counters(Stage.SWEEP),
                "SWEEP violations": about(Stage.SWEEP, False),
            },
            "kvc_digests_verify": {
                "data launches": data[:, Stage.HEAD],
                "slots compared": words[abi.STATE_DATA_SLOTS : abi.STATE_DATA_SLOTS + 1],
                "DATA violations": about(Stage.HEAD, True),
            },
            "kvc_digests_layer": {"DATA violations": records[is_layer & is_data & ~is_patrol].view(np.uint8)},
            "kvc_digests_write": {"data launches": data[:, Stage.TAIL], "digests": self.arrays("digests")},
            "kvc_digests_sweep": {"data launches": data[:, Stage.SWEEP], "DATA violations": about(Stage.SWEEP, True)},
            "kvc_scrub": {
                "turns": layout.scrub_runs(words),
                "slots": words[abi.STATE_SCRUB_SLOTS : abi.STATE_SCRUB_ORPHANS + 1],
                "violations": records[is_patrol].view(np.uint8),
            },
            "kvc_reserved_check": {
                "blocks": words[abi.STATE_RESERVED_CHECKS : abi.STATE_RESERVED_CHECKS + 1],
                "violations": records[is_reserved].view(np.uint8),
            },
        }

    def moved(self, script: Script) -> Facts:
        """What the kernels of moves left behind, each in slots of its own of the first pool."""
        unused, second, third = script.unused_slots(), script.slots(1), script.slots(2)
        copied, imported, adopted = unused[:12], unused[12:21], unused[24:32]
        self._move(MoveOp.COPY, copied, sources=script.slots(0)[:12])
        image = self._move(MoveOp.EXPORT, third[:9])
        assert image is not None
        self._move(MoveOp.IMPORT, imported, image=image)
        n = len(second)  # as if the last three were a tree, and the last of them had been accepted after the first
        self._move(
            *(MoveOp.COMMIT, second[[n - 3, n - 2]]),
            sources=second[[n - 3, n - 1]],
            row_starts=np.array([0, 2]),
            prefix_lens=np.array([n - 3]),
            request_slots=script.arrays["request_slots"][1:2],
        )
        self._move(MoveOp.LOCALIZE, script.slots(3)[:5])
        self._move(MoveOp.ADOPT, adopted, positions=np.arange(8), tokens=np.arange(70, 78))
        self._move(MoveOp.REFRESH, third[:9])
        self.backend.synchronize()
        return {
            "kvc_moves_gather": {"image": np.concatenate([a.reshape(-1).view(np.uint8) for a in image])},
            "kvc_moves_scatter": {"stamps": self.stamps_at(copied, imported), "fresh slots": self.arrays("claims")},
            "kvc_moves_commit": {"stamps": self.stamps_at(second), "registers": self.arrays("registers")},
            "kvc_moves_localize": {"stamps": self.stamps_at(script.slots(3))},
            "kvc_moves_adopt": {"stamps": self.stamps_at(adopted)},
            "kvc_moves_digest": {"digests": self.arrays("digests")},
        }

    def _move(self, op: MoveOp, slots: Array, image: SlotImage | None = None, **lists: Any) -> SlotImage | None:
        given: dict[str, Any] = {name: values.astype(np.int32) for name, values in {**lists, "slots": slots}.items()}
        move = Move(op=op, pool=0, n=len(slots), image=image, **given)
        return self.backend.move(move, None)

    def stamps_at(self, *slots: Array) -> Array:
        """All stamps of some slots of the first pool, as bytes."""
        names = [f"{stage}{half}" for stage in ("head", "tail") for half in range(self.n_halves[0])]
        found = [np.ascontiguousarray(self.array(0, name)).reshape(-1).view(abi.STAMP) for name in names]
        return np.concatenate([stamps[at].view(np.uint8) for stamps in found for at in slots])

    def renumbered(self) -> Facts:
        """What moving the numbers of forwards down left behind, as if very many forwards had gone by."""
        words = self.backend.snapshot_words()
        words[abi.STATE_FORWARD] = words[abi.STATE_FORWARD_DONE] = abi.RENUMBER_AT
        self._device.assign(self.backend.state.words, words)
        self.backend.renumber(None)
        self.backend.synchronize()
        numbers = self.backend.snapshot_words()[[abi.STATE_FORWARD, abi.STATE_FORWARD_DONE, abi.STATE_FORWARD_BASE]]
        names = ("head", "tail", "claims", "register_claims", "blocks")
        return {"kvc_renumber": {"numbers": self.arrays(*names)}, "kvc_renumber_end": {"forwards": numbers}}

    def adopted(self) -> Facts:
        """What the adopting launch left behind, and how much was compared of data of which little falls due."""
        words = self.backend.snapshot_words()
        n = words[abi.STATE_ADOPTED_SLOTS : abi.STATE_ADOPTED_SLOTS + 1]
        return {
            "kvc_digests_adopt": {"adopted slots": n, "stamps and digests": self.arrays("head", "tail", "digests")},
            "kvc_digests_verify": {"listed slots compared": words[abi.STATE_DATA_SLOTS : abi.STATE_DATA_SLOTS + 1]},
        }


def self_test(make_backend: MakeBackend, devices: Mapping[str, Device]) -> list[KernelCheck]:
    """Compare every kernel of a backend with the host backend.

    Args:
        make_backend: as `HostBackend`: (config, pools, max_requests, max_new_tokens).
        devices: ways to run its launches, by name ("eager", "captured").

    Returns:
        One check per kernel of `kvcanary.backends.device.KERNELS`, in that order.
    """
    n_values: dict[str, int] = {}
    problems: dict[str, list[str]] = {}
    for way, device in devices.items():
        for found, wanted in _both_facts(make_backend, device):
            for kernel, facts in wanted.items():
                for name, values in facts.items():
                    n_values[kernel] = n_values.get(kernel, 0) + values.size
                    text = _difference(name, found[kernel][name], values)
                    problems.setdefault(kernel, []).extend([f"{text} ({way})"] if text else [])
    kernels = [kernel for names in KERNELS.values() for kernel in names]
    return [KernelCheck(k, n_values.get(k, 0), "; ".join(problems.get(k, ["nothing tests it"]))) for k in kernels]


def _both_facts(make_backend: MakeBackend, device: Device) -> list[tuple[Facts, Facts]]:
    """(found, wanted) of the damaged script, once reporting and once adopting slots that were never written."""
    pairs = []
    for on_unwritten in ("violation", "adopt"):
        script = Script(is_damaged=True)
        config = _config(on_unwritten)
        sides = [Side(make_backend, device, script, config), Side(HostBackend, HOST, script, config)]
        play(script, sides)
        if on_unwritten == "adopt":
            pairs.append((sides[0].adopted(), sides[1].adopted()))
        else:
            pairs.append((sides[0].facts(), sides[1].facts()))
            pairs.append((sides[0].moved(script), sides[1].moved(script)))
            pairs.append((sides[0].renumbered(), sides[1].renumbered()))
        for side in sides:
            side.backend.close()
    return pairs


def play(script: Script, sides: Sequence[Side]) -> None:
    """Run the whole script on every side, then a sweep."""
    for _ in script.steps():
        for side in sides:
            side.own(script.block_changes)
            side.publish(script)
            side.head()
            side.layer()
        script.write()
        for side in sides:
            side.publish(script)
            side.tail()
    for side in sides:
        side.sweep(script.resident())


def host_self_test() -> str:
    """Whether the host backend is silent over an undamaged script and names every damage; "" or what is wrong."""
    said: list[Reason] = []
    for is_damaged in (False, True):
        script = Script(is_damaged=is_damaged)
        side = Side(HostBackend, HOST, script, _config("violation"))
        play(script, [side])
        said.append(Reason(int(np.bitwise_or.reduce(side.records()["reasons"], initial=0))))
    clean, damaged = said
    if clean:
        return f"it reports {', '.join(clean.names())} where nothing is wrong"
    missed = [reason.name or "" for reason in EXPECTED if reason not in damaged]
    return f"it does not report {', '.join(missed)}" if missed else ""


def _config(on_unwritten: str) -> CanaryConfig:
    is_listed = on_unwritten == "adopt"  # the slots that fall due, which are few then
    return CanaryConfig(
        verify_data_every=abi.LIST_MIN_EVERY if is_listed else 2,
        lifecycle=True,
        scrub_bytes_per_step=1 << 14,
        check_reserved_every=2,
        on_unwritten=on_unwritten,
        ring_capacity=1 << 14,
    )


def _difference(name: str, found: Array, wanted: Array) -> str:
    if not wanted.any():
        return f"{name}: the script did not exercise this"
    if found.shape != wanted.shape:
        return f"{name}: {found.size} values instead of {wanted.size}"
    at = np.flatnonzero(found != wanted)
    return f"{name}: {len(at)} of {wanted.size} values differ, the first at {at[0]}" if len(at) else ""
