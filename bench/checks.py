"""Correctness before time: what the guard holds against `kvcanary.hashing`, and what it reports of one damaged byte."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from bench.cases import DATA, DIGEST, TAIL, VERIFY, WRITE
from bench.rig import Rig
from kvcanary import Reason, abi, hashing

N_ROWS, N_POSITIONS, N_DIGESTS = 8, 16, 500  # sampled
KERNELS = (WRITE, VERIFY, DATA, TAIL, DIGEST)  # what may be repeated alone after a forward


class CheckFailed(Exception):
    """The device and the reference differ: the case gets no time."""


def check(rig: Rig) -> None:
    """Everything that must hold before a time of this case is worth printing; waits.

    Raises:
        CheckFailed: with what differs.
    """
    check_silent(rig, 0)
    check_stamps(rig)
    check_digests(rig)
    measured = [name for name in KERNELS if any(name in measure for measure in rig.case.measures)]
    if DATA in measured:
        check_data_fault(rig)
    for name, stage in ((VERIFY, "head"), (TAIL, "tail")):
        if name in measured:
            check_stamp_faults(rig, name, stage)
    for name in measured:
        check_repeat(rig, name)


def check_silent(rig: Rig, n_known: int) -> None:
    """The guard has reported nothing beyond what this program provoked."""
    n = rig.n_observations
    if n != n_known:
        first = "; ".join(v.summary() for v in rig.manager.violations()[-3:])
        raise CheckFailed(f"{n - n_known} violations over honest KV, the newest: {first}")


# ---- stamps ----------------------------------------------------------------------------------------------------------
def expected_stamps(rig: Rig, row: int, positions: Any) -> Any:
    """STAMP[n] of positions of a row, as `kvcanary.hashing` and the batches say: HEAD and TAIL, either half."""
    case, tokens = rig.case, rig.tokens[row]
    chains = hashing.chain_scan(hashing.prefix_chain([]), tokens, 0)
    out = np.zeros(len(positions), abi.STAMP)
    out["chain"], out["token"], out["position"] = chains[positions], tokens[positions], positions
    previous = rig.slots[row, np.maximum(positions - 1, 0)]
    out["prev_slot"] = np.where(positions > 0, previous, abi.PREV_NONE)
    out["step"] = np.where(positions < case.prefix, rig.prefill_forward, rig.forward_number)
    out["owner"] = row + 1
    return out


def _some(rig: Rig, n: int, count: int, always: Iterable[int]) -> Any:
    """``count`` of [0, n), sorted, with the borders that are inside."""
    chosen = {int(i) for i in rig.rng.integers(0, n, count)} | {i for i in always if 0 <= i < n}
    return np.array(sorted(chosen))


def check_stamps(rig: Rig) -> None:
    """Sampled stamps, old and new, first and last, bit for bit."""
    case = rig.case
    for row in _some(rig, case.rows, N_ROWS, (0, case.rows - 1)):
        positions = _some(rig, case.length, N_POSITIONS, (0, case.prefix - 1, case.prefix, case.length - 1))
        expected = expected_stamps(rig, int(row), positions)
        slots = rig.slots[row, positions]
        for stage in ("head", "tail"):
            for half in range(case.layout.n_halves):
                found = rig.stamps(stage, half, slots)
                if found.tobytes() == expected.tobytes():
                    continue
                i = int(np.flatnonzero(found != expected)[0])
                raise CheckFailed(
                    f"{stage} stamp of row {row} position {positions[i]} half {half}: {found[i]}, not {expected[i]}"
                )


# ---- digests ---------------------------------------------------------------------------------------------------------
def check_digests(rig: Rig) -> None:
    """Sampled digests against the bytes as they lie on the device."""
    n_units = len(rig.units)
    if not n_units:
        return
    case = rig.case
    picks = np.stack(
        [rig.rng.integers(0, n, N_DIGESTS) for n in (n_units, case.rows, case.length)],
        axis=1,
    )
    for unit in np.unique(picks[:, 0]):
        rows, positions = picks[picks[:, 0] == unit, 1:].T
        slots = rig.slots[rows, positions]
        data = np.stack([rig.slot_bytes(int(unit), int(s)) for s in slots])
        expected = hashing.digest(data, int(unit), positions)
        found = np.array([rig.digest(int(unit), int(s)) for s in slots], np.uint64)
        if (found != expected).any():
            i = int(np.flatnonzero(found != expected)[0])
            raise CheckFailed(f"digest {unit} of slot {slots[i]}: {int(found[i]):#x}, not {int(expected[i]):#x}")


# ---- repeats ---------------------------------------------------------------------------------------------------------
def check_repeat(rig: Rig, name: str) -> None:
    """A launch repeated alone does all of its work again: it counts its entries, and writes what was spoilt."""
    case, n_new = rig.case, rig.case.rows * rig.case.n_new
    wanted = {WRITE: n_new, VERIFY: case.n_verified, TAIL: case.n_verified + n_new}
    if DATA in {n for measure in case.measures for n in measure}:
        wanted[DATA] = (case.n_verified if case.is_all_due else len(rig.due())) * len(rig.units)
    if name in wanted and (found := rig.work_of(name)) != wanted[name]:
        raise CheckFailed(f"{name} repeated alone handled {found} entries, not {wanted[name]}")
    slots = rig.slots[[0, -1, case.rows // 2], [case.prefix, case.length - 1, case.length - 1]]
    places = {
        WRITE: [rig.stamp_address("head", h, s) for s in slots for h in range(case.layout.n_halves)],
        TAIL: [rig.stamp_address("tail", h, s) for s in slots for h in range(case.layout.n_halves)],
        DIGEST: [rig.digest_address(u, s) for s in slots for u in {0, len(rig.units) - 1}],
    }
    for address in sorted(set(places.get(name, ()))):
        before = rig.byte(address)
        rig.flip(address, 1)
        rig.findings(name)
        if rig.byte(address) != before:
            raise CheckFailed(f"{name} repeated alone did not write what it wrote before")


# ---- faults ----------------------------------------------------------------------------------------------------------
def _expect(rig: Rig, name: str, wanted: set[tuple[int, int | None]], reason: Reason) -> None:
    """One launch reports exactly these (slot, plane), once each, and for this reason alone."""
    found, n_observed = rig.findings(name)
    seen = sorted((v.slot, v.plane) for v in found)
    if seen != sorted(wanted) or n_observed != len(wanted) or any(v.reasons != reason for v in found):
        told = "; ".join(v.summary() for v in found[:3]) or "nothing"
        raise CheckFailed(f"{name} over damage at {sorted(wanted)} reported {n_observed} violations: {told}")


def _expect_silence(rig: Rig, name: str) -> None:
    found, n_observed = rig.findings(name)
    if n_observed:
        raise CheckFailed(f"{name} over restored bytes reported {found[0].summary() if found else n_observed}")


def check_data_fault(rig: Rig) -> None:
    """One flipped bit of one byte of one slot: DATA there and nowhere else; then restored."""
    case = rig.case
    unit, row = int(rig.rng.integers(len(rig.units))), int(rig.rng.integers(case.rows))
    position = int(rig.rng.integers(case.verify_start, case.prefix))
    slot = int(rig.slots[row, position]) if case.is_all_due else int(rig.rng.choice(rig.due()["slot"]))
    runs = rig.runs(unit, slot)
    address, n = runs[int(rig.rng.integers(len(runs)))]
    address += int(rig.rng.integers(n))
    mask = 1 << int(rig.rng.integers(8))
    rig.flip(address, mask)
    try:
        _expect(rig, DATA, {(slot, unit)}, Reason.DATA)
    finally:
        rig.flip(address, mask)
    _expect_silence(rig, DATA)


def check_stamp_faults(rig: Rig, name: str, stage: str) -> None:
    """One flipped bit of one stamp's chain: CHAIN at that slot, and at the slot that continues it, and nowhere else.

    The last prefix position has no successor; between lanes, warps and blocks the link is carried in different ways.
    """
    case, last = rig.case, rig.case.prefix - 1
    borders = {case.verify_start + n - 1 for n in (1, 32, abi.VERIFY_UNIT, 128, abi.THREADS, 1024)}
    anywhere = int(rig.rng.integers(case.verify_start, case.prefix))
    for position in sorted(p for p in {last, anywhere, *borders} if p <= last):
        row, half = int(rig.rng.integers(case.rows)), int(rig.rng.integers(case.layout.n_halves))
        slots = rig.slots[row, position : min(position + 2, case.prefix)]
        address = rig.stamp_address(stage, half, int(slots[0])) + int(rig.rng.integers(8))
        rig.flip(address, 0x10)
        try:
            _expect(rig, name, {(int(s), None) for s in slots}, Reason.CHAIN)
        finally:
            rig.flip(address, 0x10)
        _expect_silence(rig, name)
