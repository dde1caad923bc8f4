"""What the tests of several modules share: a config with every field given, a small device state, a ring writer."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcanary import abi
from kvcanary.config import CanaryConfig
from kvcanary.observers import StepFacts
from kvcanary.state import CanaryDeviceState, CounterLayout
from kvcanary.violations import PoolNames

EVERY_FIELD: dict[str, Any] = {
    "mode": "log",
    "real_data": "all",
    "verify_data_every": 7,
    "full_verify_min_tokens": 16,
    "scrub_bytes_per_step": 0,
    "check_reserved_every": 0,
    "sweep_interval": 0,
    "stats_print_every_n_steps": 10,
    "health_check_every_n_steps": 10,
    "health_check_warmup_steps": 20,
    "health_policy": "as-mode",
    "ring_capacity": 8,
    "on_unwritten": "violation",
    "lifecycle": False,
    "overlap_head": False,
    "check_write_position": True,
    "log_tokens": False,
    "log_format": "text",
    "black_box_path": None,
    "nvtx": False,
    "perturb": None,
    "perturb_armed": False,
}
POOL_NAMES = (
    PoolNames("full", 16, (("k.0", 0), ("v.0", 0), ("k.1", 1), ("v.1", 1))),
    PoolNames("swa", 4, (("kv.2", 2),)),
)
SECRET = 0x0123456789ABCDEF


def full_config(**overrides: Any) -> CanaryConfig:
    """A config in which no field is left to its default."""
    return CanaryConfig(**{**EVERY_FIELD, **overrides})


def make_state(n_pools: int = 1, ring_capacity: int = EVERY_FIELD["ring_capacity"]) -> CanaryDeviceState:
    """The host backend's arrays, all zero."""
    layout = CounterLayout(n_pools)
    return CanaryDeviceState(
        layout=layout,
        words=np.zeros(layout.n_words, np.uint64),
        taint=np.zeros(4, np.uint32),
        violation_log=np.zeros(ring_capacity + 1, abi.VIOLATION),
        control=np.zeros(abi.N_CONTROL_WORDS, np.uint64),
    )


def make_facts(state: CanaryDeviceState, step: int, **overrides: Any) -> StepFacts:
    """Facts of a step before which every step had a forward."""
    values: dict[str, Any] = {
        "stream": None,
        "n_counted_steps": step,
        "sweep_passes": 0,
        "n_sweeps": {},
        "violations_total": 0,
        "observations_total": 0,
    }
    return StepFacts(step=step, state=state, **{**values, **overrides})


def make_record(**fields: Any) -> np.ndarray[Any, np.dtype[Any]]:
    """VIOLATION[1] as the kernels start it, with ``fields`` set."""
    record = np.zeros(1, abi.VIOLATION)
    unknown = ("plane", "row", "request_slot", "stored_token", "expected_token", "stored_position", "prev_slot")
    for name in unknown:
        record[name] = -1
    for name, value in fields.items():
        record[name] = value
    return record


class RingWriter:
    """The device's end of the ring, one record at a time: claim if there is room, write, commit."""

    def __init__(self, state: CanaryDeviceState) -> None:
        self._state = state
        self._capacity = len(state.violation_log) - 1

    def claim(self) -> int | None:
        """The number of the next record, or None when the ring is full (counted)."""
        words = self._state.words
        words[abi.STATE_OBSERVATIONS] += 1
        claimed, read = int(words[abi.STATE_CLAIMED]), int(self._state.control[abi.CONTROL_READ])
        if claimed - read >= self._capacity:
            words[abi.STATE_DROPPED] += 1
            return None
        words[abi.STATE_CLAIMED] += 1
        return claimed

    def commit(self, claim: int, record: np.ndarray[Any, np.dtype[Any]]) -> None:
        """Write record number ``claim`` and make it complete."""
        place = claim if claim == 0 else (claim - 1) % self._capacity + 1
        row = record.copy()
        row["commit"] = claim + 1
        self._state.violation_log[place] = row[0]
        self._state.control[abi.CONTROL_ALARM] = claim + 1

    def put(self, **fields: Any) -> None:
        """Claim and commit one record; a full ring drops it."""
        claim = self.claim()
        if claim is not None:
            self.commit(claim, make_record(**fields))
