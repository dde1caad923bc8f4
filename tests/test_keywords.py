"""A keyword that a configuration or a batch does not have is told with the nearest; all else stays a dataclass's."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

import numpy as np
import pytest

from kvcanary import BatchError, CanaryConfig, ConfigError, StepBatch
from kvcanary.keywords import refuse_unknown_keywords

ARRAYS: dict[str, Any] = {name: np.zeros(1, np.int32) for name in ("query_start_loc", "input_ids", "slot_mapping")}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: CanaryConfig(verify_every=3),  # type: ignore[call-arg]
            ConfigError,
            r"^CanaryConfig\(\): unknown keyword verify_every \(did you mean verify_data_every\?\); it takes black",
        ),
        (lambda: CanaryConfig(mdoe="log", zzz=1), ConfigError, r"mdoe \(did you mean mode\?\), zzz; it takes"),  # type: ignore[call-arg]
        (lambda: replace(CanaryConfig(), mood="log"), ConfigError, r"mood \(did you mean mode\?\)"),  # type: ignore[call-arg]
        (
            lambda: StepBatch(**ARRAYS, seq_len=ARRAYS["input_ids"]),
            BatchError,
            r"^StepBatch\(\): unknown keyword seq_len \(did you mean seq_lens\?\); it takes block_table",
        ),
        (lambda: StepBatch(slot_mappings=1), BatchError, r"did you mean slot_mapping\?"),  # type: ignore[call-arg]
    ],
)
def test_the_nearest_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        make()
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_other_type_errors_are_pythons_own() -> None:
    with pytest.raises(TypeError, match="missing 3 required keyword-only arguments: 'query_start_loc'"):
        StepBatch()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="positional"):
        CanaryConfig("log")  # type: ignore[misc]


def test_a_type_error_from_within_is_not_mistaken_for_a_keyword() -> None:
    @dataclass
    class Raising:
        size: int

        def __post_init__(self) -> None:
            raise TypeError("from within")

    refuse_unknown_keywords(Raising, ConfigError)
    with pytest.raises(TypeError, match="from within"):
        Raising(size=1)


@pytest.mark.parametrize("cls", [CanaryConfig, StepBatch])
def test_the_signature_stays_what_it_was(cls: Any) -> None:
    names = [f.name for f in fields(cls)]
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == names
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert set(get_type_hints(cls.__init__)) == {*names, "return"}


def test_copies_are_made_as_before() -> None:
    config = CanaryConfig(ring_capacity=8)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == CanaryConfig(**asdict(config)) == config
    assert replace(config, mode="raise").ring_capacity == 8
    batch = StepBatch(**ARRAYS)
    assert replace(batch, salts=ARRAYS["input_ids"]).input_ids is batch.input_ids
