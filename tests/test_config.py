"""Configuration: what the environment, the keywords and the operator's switch each decide."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.config import CanaryConfig, range_of
from kvcanary.errors import ConfigError

# Another value than the default for each field, and how the environment spells it.
OTHER: dict[str, tuple[Any, str]] = {
    "mode": ("raise", "RAISE"),
    "real_data": ("partial", " Partial "),
    "verify_data_every": (7, "7"),
    "full_verify_min_tokens": (0, "0"),
    "scrub_bytes_per_step": (1 << 20, "1048576"),
    "check_reserved_every": (7, "7"),
    "sweep_interval": (10, "10"),
    "stats_print_every_n_steps": (0, "0"),
    "health_check_every_n_steps": (1, "1"),
    "health_check_warmup_steps": (0, " 0 "),
    "health_policy": ("log", "log"),
    "ring_capacity": (1 << 20, "1048576"),
    "on_unwritten": ("adopt", "adopt"),
    "lifecycle": (True, "on"),
    "overlap_head": (True, "yes"),
    "check_write_position": (False, "off"),
    "log_tokens": (True, "TRUE"),
    "log_format": ("json", "JSON"),
    "black_box_path": ("/Tmp/Box", "/Tmp/Box"),
    "nvtx": (True, "1"),
    "perturb": ("flip_used:pool=Full", " flip_used:pool=Full "),
    "perturb_armed": (True, "1"),
}
# perturb and the patrol have a second switch.
BUILT = [name for name in OTHER if name not in ("perturb", "scrub_bytes_per_step")]


def test_every_field_has_another_value_here() -> None:
    assert list(OTHER) == [f.name for f in fields(CanaryConfig)]
    assert all(getattr(CanaryConfig(), name) != value for name, (value, _) in OTHER.items())


@pytest.mark.parametrize("name", BUILT)
def test_a_field_is_set_by_keyword_and_by_environment(name: str) -> None:
    value, text = OTHER[name]
    assert getattr(CanaryConfig(**{name: value}), name) == value
    from_env = CanaryConfig.from_env({f"KVCANARY_{name.upper()}": text, "PATH": "/bin"})
    assert from_env == CanaryConfig(**{name: value}), "and nothing else changes"


@pytest.mark.parametrize("name", [n for n in BUILT if n != "mode"])
def test_a_keyword_wins_over_the_environment(name: str) -> None:
    default = getattr(CanaryConfig(), name)
    assert (
        getattr(CanaryConfig.from_env({f"KVCANARY_{name.upper()}": OTHER[name][1]}, **{name: default}), name) == default
    )


@given(st.sampled_from(["log", "raise", "off"]), st.sampled_from(["log", "raise", "off"]))
def test_the_operators_switch_wins_over_the_keyword(env: str, keyword: str) -> None:
    assert CanaryConfig.from_env({"KVCANARY_MODE": env}, mode=keyword).mode == env
    assert CanaryConfig.from_env({}, mode=keyword).mode == keyword


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCANARY_VERIFY_DATA_EVERY", "31")
    assert CanaryConfig.from_env().verify_data_every == 31
    assert CanaryConfig().verify_data_every == 127, "only from_env reads it"


@pytest.mark.parametrize("text", ["1", "true", "Yes", "ON"])
def test_true_in_words(text: str) -> None:
    assert CanaryConfig.from_env({"KVCANARY_LOG_TOKENS": text}).log_tokens
    assert not CanaryConfig.from_env({"KVCANARY_CHECK_WRITE_POSITION": "no"}).check_write_position


BAD_KEYWORDS: list[tuple[dict[str, Any], str]] = [
    ({"mode": "warn"}, "mode='warn': choose one of log, raise, off"),
    ({"real_data": True}, "real_data=True: choose one of all, partial, none"),
    ({"health_policy": "off"}, "choose one of as-mode, raise, log"),
    ({"on_unwritten": None}, "choose one of violation, adopt"),
    ({"verify_data_every": 0}, "verify_data_every=0: give an integer from 1 to"),
    ({"verify_data_every": 2.0}, r"verify_data_every=2\.0: give an integer"),
    ({"ring_capacity": True}, "ring_capacity=True: give an integer from 1 to 1048576"),
    ({"ring_capacity": 1 << 21}, "give an integer from 1 to 1048576"),
    ({"sweep_interval": -1}, "sweep_interval=-1: give an integer from 0"),
    ({"log_tokens": 1}, "log_tokens=1: give True or False"),
    ({"black_box_path": 3}, "black_box_path=3: give a path as a string"),
    ({"black_box_path": ""}, "black_box_path='': give the path of a file, or None for none"),
    ({"black_box_path": "box\0"}, r"black_box_path='box\\x00': give the path of a file"),
    ({"black_box_path": "~nobody-of-this-name/box"}, "black_box_path='~nobody-of-this-name/box': .* without ~"),
    ({"verify_data_every": np.int64(0)}, "give an integer from 1 to"),
    ({"verify_data_every": np.float64(5)}, "give an integer from 1 to"),
    ({"verify_data_every": np.bool_(True)}, "give an integer from 1 to"),
    ({"scrub_bytes_per_step": 4096}, "the patrol must know which blocks"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_KEYWORDS, ids=[str(s) for s, _ in BAD_KEYWORDS])
def test_bad_keywords(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CanaryConfig(**settings)


BAD_ENVIRONMENTS = [
    ({"KVCANARY_MODE": "quiet"}, "KVCANARY_MODE='quiet': choose one of"),
    ({"KVCANARY_VERIFY_DATA_EVERY": "0"}, "KVCANARY_VERIFY_DATA_EVERY=0: give an integer from 1 to 1048576"),
    ({"KVCANARY_MOOD": "log"}, "KVCANARY_MOOD: unknown; the settings are black_box_path"),
    ({"KVCANARY_RING_CAPACITY": "many"}, "KVCANARY_RING_CAPACITY='many': give an integer from 1 to"),
    ({"KVCANARY_LOG_TOKENS": "maybe"}, "KVCANARY_LOG_TOKENS='maybe': give one of 1, true"),
]


@pytest.mark.parametrize(("environ", "message"), BAD_ENVIRONMENTS, ids=[str(e) for e, _ in BAD_ENVIRONMENTS])
def test_bad_environments(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CanaryConfig.from_env(environ)


@pytest.mark.parametrize("name", [name for name in OTHER if range_of(name)])
@pytest.mark.parametrize("kind", [np.int64, np.uint32, np.int32])
def test_integers_of_numpy_are_integers(name: str, kind: Any) -> None:
    settings = {name: kind(range_of(name)[0] + 1), "lifecycle": True}  # type: ignore[index]
    value = getattr(CanaryConfig(**settings), name)
    assert type(value) is int and value == range_of(name)[0] + 1  # type: ignore[index]


def test_a_tilde_in_front_is_the_home_and_any_other_path_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/engine")
    assert CanaryConfig(black_box_path="~/kv.jsonl").black_box_path == "/home/engine/kv.jsonl"
    assert CanaryConfig.from_env({"KVCANARY_BLACK_BOX_PATH": "~/kv.jsonl"}).black_box_path == "/home/engine/kv.jsonl"
    for path in ("./kv.jsonl", "a/~/kv", "/var//log/kv"):
        assert CanaryConfig(black_box_path=path).black_box_path == path


def test_an_unknown_keyword_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown setting mood; the settings are"):
        CanaryConfig.from_env({}, mood="log")


def test_health_raises_follows_the_policy_and_else_the_mode() -> None:
    cases = [("log", "as-mode"), ("raise", "as-mode"), ("off", "as-mode"), ("log", "raise"), ("raise", "log")]
    found = [CanaryConfig(mode=mode, health_policy=policy).health_raises for mode, policy in cases]
    assert found == [False, True, False, True, False]


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        CanaryConfig().mode = "off"  # type: ignore[misc]


def test_a_variable_that_is_set_to_nothing_is_not_set() -> None:
    assert CanaryConfig.from_env({"KVCANARY_MODE": "", "KVCANARY_RING_CAPACITY": " "}, mode="raise").mode == "raise"
