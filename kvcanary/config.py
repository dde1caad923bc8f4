"""Configuration: one frozen object, and the only module that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, get_type_hints

from kvcanary.errors import ConfigError
from kvcanary.keywords import refuse_unknown_keywords
from kvcanary.perturb_spec import parse_faults

ENV_PREFIX = "KVCANARY_"
_CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("log", "raise", "off"),
    "real_data": ("all", "partial", "none"),
    "health_policy": ("as-mode", "raise", "log"),
    "on_unwritten": ("violation", "adopt"),
    "log_format": ("text", "json"),
}
_RANGES: dict[str, tuple[int, int]] = {
    "verify_data_every": (1, 1 << 20),
    "full_verify_min_tokens": (0, 1 << 31),
    "scrub_bytes_per_step": (0, 1 << 40),
    "check_reserved_every": (0, 1 << 31),
    "sweep_interval": (0, 1 << 31),
    "stats_print_every_n_steps": (0, 1 << 31),
    "health_check_every_n_steps": (0, 1 << 31),
    "health_check_warmup_steps": (0, 1 << 31),
    "ring_capacity": (1, 1 << 20),
}
_OFF = ("off", "0", "false", "no", "none", "disabled")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True)
class CanaryConfig:
    """How the guard behaves; every field can be set by ``KVCANARY_<FIELD NAME>`` through :meth:`from_env`.

    Attributes:
        mode: "log" reports, "raise" also raises `KvCanaryViolation` in `end_step`, "off" launches nothing.
        real_data: which bytes of a slot are digested: "all", "partial" (the first 16 bytes of each chunk), "none".
        verify_data_every: every live byte is re-digested within this many forwards of its request (prime is best).
        full_verify_min_tokens: a row with more new tokens than this has its whole prefix digested.
        scrub_bytes_per_step: bytes that the in-graph patrol digests a step, over all pools, at least a block of each;
            0 = off. Needs lifecycle.
        check_reserved_every: steps between looks for NaN and Inf in the reserved blocks; 0 = off.
        sweep_interval: steps between sweeps over the attached resident set; 0 = off.
        stats_print_every_n_steps: steps between stats lines; 0 = off.
        health_check_every_n_steps: steps between health checks; 0 = off.
        health_check_warmup_steps: steps before the first health check.
        health_policy: what a stalled guard does: "raise", "log", or "as-mode" (raise in mode "raise").
        ring_capacity: violation records that can wait for the host.
        on_unwritten: "adopt" takes prefix slots that were never stamped (with lifecycle: not since their block was
            allocated) into the guard instead of reporting them.
        lifecycle: judge block ownership; the engine then says who owns the blocks of every pool
            (`CanaryManager.allocate_blocks`, `share_blocks`, `free_blocks`, `claim_blocks`).
        overlap_head: run HEAD on a stream of the guard's own, beside the model; TAIL waits for it. A forward must begin
            and end in one capture or outside of any; meanwhile the batch's arrays, a ``slot_lut`` and the KV that was
            written before must not change. Without effect on the host backend and in `CanaryManager.graphs`.
        check_write_position: judge that `slot_mapping` agrees with the block table (WRITE_POSITION).
        log_tokens: put token ids (user content) and raw chains into logs and record dumps.
        log_format: "json" logs violations, stalls and stats lines as one JSON object each.
        black_box_path: file to which violations and stalls are appended as they are seen, see `kvcanary.black_box`;
            ``~`` is the home, a relative path is of the folder where the manager is made; None = none.
        nvtx: mark the host phases with NVTX ranges, for Nsight Systems (extra ``nvtx``).
        perturb: faults that the guard itself puts into the running engine, see `kvcanary.perturb`; None = none.
        perturb_armed: the second switch, without which ``perturb`` is refused.
    """

    mode: str = "log"
    real_data: str = "all"
    verify_data_every: int = 127
    full_verify_min_tokens: int = 16
    scrub_bytes_per_step: int = 0
    check_reserved_every: int = 0
    sweep_interval: int = 0
    stats_print_every_n_steps: int = 100
    health_check_every_n_steps: int = 100
    health_check_warmup_steps: int = 100
    health_policy: str = "as-mode"
    ring_capacity: int = 1024
    on_unwritten: str = "violation"
    lifecycle: bool = False
    overlap_head: bool = False
    check_write_position: bool = True
    log_tokens: bool = False
    log_format: str = "text"
    black_box_path: str | None = None
    nvtx: bool = False
    perturb: str | None = None
    perturb_armed: bool = False

    def __post_init__(self) -> None:
        for name in (*_CHOICES, *_RANGES):
            _check_value(name, name, getattr(self, name))
        for name in _RANGES:
            object.__setattr__(self, name, int(getattr(self, name)))  # NumPy's are no JSON
        for name in ("lifecycle", "overlap_head", "check_write_position", "log_tokens", "nvtx", "perturb_armed"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.black_box_path is not None:
            object.__setattr__(self, "black_box_path", _checked_path(self.black_box_path))
        if self.scrub_bytes_per_step and not self.lifecycle:
            raise ConfigError(
                f"scrub_bytes_per_step={self.scrub_bytes_per_step} with lifecycle=False: the patrol must know which "
                "blocks somebody holds; set lifecycle=True and make its calls (allocate_blocks, ...), or "
                "scrub_bytes_per_step=0"
            )
        _check_perturb(self)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> CanaryConfig:
        """Defaults, then ``KVCANARY_*``, then keywords; except KVCANARY_MODE, the operator's switch, which always wins.

        Raises:
            ConfigError: an unknown ``KVCANARY_`` variable or keyword, or a value that does not parse.
        """
        env = os.environ if environ is None else environ
        if env.get(ENV_PREFIX + "MODE", "").strip().lower() in _OFF:
            return cls(mode="off")  # whatever else is set, and however badly: the switch must work
        hints = get_type_hints(cls)
        names = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, text in env.items():
            if not key.startswith(ENV_PREFIX) or not text.strip():
                continue  # set to nothing, as container files do, is not set
            name = key[len(ENV_PREFIX) :].lower()
            if name not in names:
                raise ConfigError(f"{key}: unknown; the settings are {', '.join(sorted(names))} (upper case)")
            values[name] = _parse(key, text, hints[name])
        unknown = sorted(set(overrides) - names)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(names))}")
        operator = {"mode": values["mode"]} if "mode" in values else {}
        for name, value in {**values, **operator}.items():
            if name in operator or name not in overrides:
                _check_value(ENV_PREFIX + name.upper(), name, value)
        return cls(**{**values, **overrides, **operator})

    @property
    def health_raises(self) -> bool:
        """Whether a stalled guard raises (else it logs)."""
        return self.health_policy == "raise" or (self.health_policy == "as-mode" and self.mode == "raise")


refuse_unknown_keywords(CanaryConfig, ConfigError)


def choices_of(name: str) -> tuple[str, ...]:
    """The words that a setting takes; empty if it takes no fixed ones."""
    return _CHOICES.get(name, ())


def range_of(name: str) -> tuple[int, int] | None:
    """The least and the greatest value of a setting that is a number."""
    return _RANGES.get(name)


def given_by_environment() -> list[str]:
    """The settings that `CanaryConfig.from_env` would take from the environment now, as NAME=value."""
    return sorted(f"{key}={text}" for key, text in os.environ.items() if key.startswith(ENV_PREFIX) and text.strip())


def _check_value(said: str, name: str, value: Any) -> None:
    """Of a setting with fixed words or a range; ``said``: what it was given by, its variable or its keyword."""
    if name in _CHOICES and (not isinstance(value, str) or value not in _CHOICES[name]):
        raise ConfigError(f"{said}={value!r}: choose one of {', '.join(_CHOICES[name])}")
    if name in _RANGES:
        low, high = _RANGES[name]
        number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
        if number is None or not low <= number <= high:
            raise ConfigError(f"{said}={value!r}: give an integer from {low} to {high}")


def _check_perturb(config: CanaryConfig) -> None:
    """A drill damages a running engine on purpose: a text that was left behind somewhere must not be enough for it."""
    if config.perturb is None:
        return
    if not isinstance(config.perturb, str):
        raise ConfigError(f"perturb={config.perturb!r}: give a string such as 'flip_used:p=0.01', or None")
    parse_faults(config.perturb)
    if not config.perturb_armed:
        raise ConfigError(
            f"perturb={config.perturb!r} would damage the engine's memory on purpose, and it is not armed: give "
            "perturb_armed=True as well (KVCANARY_PERTURB_ARMED=1 with from_env) for a drill, or take perturb "
            "(KVCANARY_PERTURB) away"
        )


def _checked_path(path: Any) -> str:
    """A path with the home instead of ``~``; any other stays as it was given."""
    if not isinstance(path, str):
        raise ConfigError(f"black_box_path={path!r}: give a path as a string, or None")
    if not path or "\0" in path:
        raise ConfigError(f"black_box_path={path!r}: give the path of a file, or None for none")
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"black_box_path={path!r}: {error}; give the path without ~") from error


def _parse(key: str, text: str, hint: Any) -> Any:
    value = text.strip()
    if hint is bool:
        if value.lower() in _TRUE or value.lower() in _FALSE:
            return value.lower() in _TRUE
        raise ConfigError(f"{key}={text!r}: give one of {', '.join(_TRUE + _FALSE)}")
    if hint is int:
        try:
            return int(value, 10)
        except ValueError:
            low, high = _RANGES[key[len(ENV_PREFIX) :].lower()]
            raise ConfigError(f"{key}={text!r}: give an integer from {low} to {high}") from None
    if hint is str:
        return value.lower()
    return value or None
