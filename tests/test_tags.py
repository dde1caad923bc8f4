"""Launch tags and reasons: packing, and the numbers that cross to the device."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcanary.tags import (
    N_HALVES,
    N_POOL_KINDS,
    N_STAGES,
    N_TAGS,
    CanaryLaunchTag,
    Detail,
    Half,
    PoolKind,
    Reason,
    Stage,
)


def test_the_tags_are_all_combinations_in_order() -> None:
    combinations = list(product(Stage, PoolKind, Half))
    assert [CanaryLaunchTag.of(stage, half, kind) for stage, kind, half in combinations] == list(CanaryLaunchTag)
    assert [tag.value for tag in CanaryLaunchTag] == list(range(N_TAGS)) == list(range(12))
    assert N_TAGS == N_STAGES * N_POOL_KINDS * N_HALVES


@pytest.mark.parametrize("tag", CanaryLaunchTag)
def test_a_tag_comes_apart_into_what_its_name_says(tag: CanaryLaunchTag) -> None:
    assert tag.name == f"{tag.stage.name}_{tag.half.name}_{tag.pool_kind.name}"
    assert CanaryLaunchTag.of(tag.stage, tag.half, tag.pool_kind) is tag


def test_reasons_keep_their_bits() -> None:
    """The table of DESIGN section 2: records and taints of other versions are read by these numbers."""
    assert {r.name: r.value for r in Reason} == {
        "CHAIN": 1,
        "POSITION": 2,
        "DATA": 4,
        "WRITE_TOKEN": 8,
        "WRITE_POSITION": 16,
        "TOKEN": 32,
        "UNWRITTEN": 64,
        "STALE_EPOCH": 128,
        "OUT_OF_RANGE": 256,
        "FOREIGN_WRITE": 512,
        "DUPLICATE_WRITE": 1024,
        "NONFINITE_RESERVED": 2048,
    }


@given(st.sets(st.sampled_from(list(Reason))))
def test_names_of_reasons_are_those_of_the_bits(reasons: set[Reason]) -> None:
    joined = Reason(sum(reasons))
    assert joined.names() == tuple(r.name for r in sorted(reasons))


def test_details_count_up_from_the_slot() -> None:
    assert [d.value for d in Detail] == list(range(len(Detail))) and Detail.SLOT == 0
