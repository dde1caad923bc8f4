"""What HEAD beside the model sees otherwise than before it, as docs/performance.md says; as late as it may come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from agree import LateSide, Side
from agree_script import N_BLOCKS, PAGE, A, B, Row, Script, batch_of, kinds, pool_spec, seen

from kvcanary import Reason

Make = Callable[..., Script]


@pytest.fixture(params=[False, True], ids=["before", "beside"])
def beside(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make(beside: bool, library: Any) -> Make:
    """A script whose guard is the reference, or the kernels with HEAD once the model is through."""

    def make(**config: Any) -> Script:
        return Script([LateSide(library) if beside else Side()], **config)

    return make


def test_the_patrol_sees_what_the_model_changes_in_a_block_that_somebody_holds(beside: bool, make: Make) -> None:
    s = make(lifecycle=True, scrub_bytes_per_step=1 << 20, verify_data_every=1 << 20)
    s.own("allocate", [1, 2], 1)
    s.own("allocate", [5], 2)
    assert s.forward(Row(1, A, 0, 5, [1, 2]), Row(2, B, 0, 4, [5])) == []
    found = s.forward(Row(1, A, 5, 6, [1, 2], kv_slots=[9, 22]))
    assert kinds(found) == ({22: Reason.DATA} if beside else {})
    assert kinds(s.forward(Row(1, A, 6, 7, [1, 2]))) == {22: Reason.DATA}


def test_nan_that_this_forwards_padding_overwrites_is_seen_before_the_model_alone(beside: bool, make: Make) -> None:
    s = make(check_reserved_every=1, spec=pool_spec(dtype="float16"))
    reserved = s.kv(0)[:PAGE]
    reserved[...] = 0xFF

    def model() -> None:
        reserved[...] = 0

    records = s.twins.forward(batch_of([Row(0, [0], 0, 1, [0], slots=[0])]), model=model)
    assert {v.reasons for v in seen(records)} == (set() if beside else {Reason.NONFINITE_RESERVED})


def test_what_no_row_reads_may_be_written_as_ever(make: Make) -> None:
    s = make()
    assert s.forward(Row(1, A, 0, 4, [1]), Row(2, B, 0, 4, [5])) == []
    of_the_other = s.kv(0)[20:24].copy()
    assert s.forward(Row(1, A, 4, 5, [1, 2], kv_slots=[8, *range(20, N_BLOCKS * PAGE)])) == []
    assert (s.kv(0)[20:24] != of_the_other).any(axis=1).all()
