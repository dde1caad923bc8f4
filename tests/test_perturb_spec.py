"""What the fault drill is told: the text, its errors, and the two switches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary import CanaryConfig, ConfigError, FaultKind
from kvcanary.perturb_spec import FaultSpec, parse_faults

TEXT = "flip_used:p=0.01,warmup=100,pool=full,seed=1,max=3;table_swap:p=0.5"


def test_a_text_names_faults_with_defaults_for_the_rest() -> None:
    first, second = parse_faults(TEXT)
    assert first == FaultSpec(FaultKind.FLIP_USED, 0.01, 100, "full", 1, 3)
    assert second == FaultSpec(FaultKind.TABLE_SWAP, p=0.5)
    assert (second.warmup, second.pool, second.seed, second.max_faults) == (100, None, 0, 1)


def test_spaces_and_a_last_semicolon_do_not_matter() -> None:
    assert parse_faults(" flip_used : p = 1 , seed=2 ; next_token_swap ; ") == (
        FaultSpec(FaultKind.FLIP_USED, p=1.0, seed=2),
        FaultSpec(FaultKind.NEXT_TOKEN_SWAP),
    )


SPECS = st.builds(
    FaultSpec,
    kind=st.sampled_from(FaultKind),
    p=st.floats(0, 1, exclude_min=True),
    warmup=st.integers(0, 1000),
    pool=st.sampled_from([None, "full", "Draft pool"]),
    seed=st.integers(0, 2**63 - 1),
    max_faults=st.integers(1, 1 << 20),
)


@given(st.lists(SPECS, min_size=1, max_size=4))
def test_a_spec_says_itself_in_the_words_it_is_told_in(specs: list[FaultSpec]) -> None:
    assert parse_faults(";".join(map(str, specs))) == tuple(specs)


BAD = [
    ("", "names no fault: give kind:key=value"),
    (" ; ", "names no fault"),
    ("flip_usd", "'flip_usd' is no kind of fault; the kinds are flip_used, flip_unused_cached, next_token_swap"),
    ("FLIP_USED", "is no kind of fault"),
    ("flip_used:prob=1", r"'prob=1' in 'flip_used:prob=1': give key=value, the keys are p, warmup, pool, seed, max"),
    ("flip_used:p", "'p' in 'flip_used:p': give key=value"),
    ("flip_used:p=1,p=0.5", "p comes twice"),
    ("flip_used:p=0", "'p=0': give a probability above 0 and at most 1"),
    ("flip_used:p=1.5", "give a probability above 0"),
    ("flip_used:p=nan", "give a probability above 0"),
    ("flip_used:p=often", "'p=often': give a probability"),
    ("flip_used:warmup=-1", "'warmup=-1': give an integer from 0 to 2147483647"),
    ("flip_used:max=0", "'max=0': give an integer from 1 to 1048576"),
    ("flip_used:max=2.5", "give an integer from 1"),
    ("flip_used:seed=x", "'seed=x': give an integer from 0"),
    ("flip_used:pool=", "give the name of a pool"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_a_text_that_cannot_be_meant_is_refused_at_construction(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CanaryConfig(perturb=text, perturb_armed=True)


def test_anything_but_a_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="perturb=3: give a string"):
        CanaryConfig(perturb=3, perturb_armed=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="perturb_armed='yes': give True or False"):
        CanaryConfig(perturb_armed="yes")  # type: ignore[arg-type]


UNARMED: list[dict[str, Any]] = [
    {"KVCANARY_PERTURB": TEXT},
    {"KVCANARY_PERTURB": TEXT, "KVCANARY_PERTURB_ARMED": "0"},
    {"KVCANARY_PERTURB": TEXT, "KVCANARY_PERTURB_ARMED": ""},
]


@pytest.mark.parametrize("environ", UNARMED, ids=str)
def test_one_switch_is_not_enough_and_the_message_says_how_to_arm(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"not armed: give perturb_armed=True as well \(KVCANARY_PERTURB_ARMED=1"):
        CanaryConfig.from_env(environ)
    with pytest.raises(ConfigError, match="not armed"):
        CanaryConfig(perturb=TEXT)


def test_both_switches_arm_whichever_way_they_come() -> None:
    both = {"KVCANARY_PERTURB": TEXT, "KVCANARY_PERTURB_ARMED": "1"}
    assert CanaryConfig.from_env(both).perturb == TEXT
    assert CanaryConfig.from_env({"KVCANARY_PERTURB_ARMED": "1"}, perturb=TEXT).perturb_armed
    assert CanaryConfig.from_env({"KVCANARY_PERTURB": TEXT}, perturb_armed=True).perturb_armed


def test_the_switch_alone_asks_for_nothing() -> None:
    config = CanaryConfig.from_env({"KVCANARY_PERTURB_ARMED": "1"})
    assert config.perturb is None and config.perturb_armed


def test_the_kill_switch_wins() -> None:
    assert CanaryConfig.from_env({"KVCANARY_PERTURB": "nonsense", "KVCANARY_MODE": "off"}).perturb is None
