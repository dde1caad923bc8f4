"""Arguments that no manager can be made from, or that a call of one cannot take."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine import ToyEngine

from kvcanary import BatchError, CanaryManager, ConfigError, LayoutError, LifecycleError


class TestConstruction:
    def test_bad_capacities_backends_and_pools(self) -> None:
        engine = ToyEngine()
        pool, config = engine.pool, engine.config
        for args, kwargs in (
            ((config, [], 4, 4), {}),
            ((config, [pool], 0, 4), {}),
            ((config, [pool], 4, True), {}),
            ((config, [pool, pool], 4, 4), {}),
            ((config, [pool], 4, 4), {"backend": "tpu"}),
        ):
            with pytest.raises(ConfigError):
                CanaryManager(*args, **kwargs)
        with pytest.raises(LayoutError, match="backend='host'"):
            CanaryManager(config, [pool], 4, 4, backend="cuda")

    def test_arguments_of_a_wrong_kind_say_what_is_wanted(self) -> None:
        engine = ToyEngine(lifecycle=True)
        manager = engine.manager
        calls: list[tuple[Callable[[], object], type[Exception], str]] = [
            (lambda: CanaryManager({}, [engine.pool], 2, 8), ConfigError, "config is dict: give a CanaryConfig"),  # type: ignore[arg-type]
            (lambda: CanaryManager(manager.config, [None], 2, 8), ConfigError, "pools is a list of NoneType: give"),  # type: ignore[list-item]
            (lambda: manager.head({}), BatchError, "batch is dict: give a StepBatch"),  # type: ignore[arg-type]
            (lambda: manager.prove(None), BatchError, "batch is NoneType"),  # type: ignore[arg-type]
            (lambda: manager.on_violation(None), ConfigError, r"on_violation\(None\): give a function"),  # type: ignore[arg-type]
            (lambda: manager.attach_resident_set([1]), ConfigError, r"attach_resident_set\(list\)"),  # type: ignore[arg-type]
            (lambda: manager.attach_agreement(5), ConfigError, r"attach_agreement\(int\): give a RankAgreement"),  # type: ignore[arg-type]
            (lambda: manager.chain([1.5]), BatchError, r"tokens are float64\[1\]"),  # type: ignore[list-item]
            (lambda: manager.chain([[1]]), BatchError, r"tokens are int64\[1, 1\]"),  # type: ignore[list-item]
            (lambda: manager.chain([1], -1), BatchError, "salt=-1: give an integer from 0"),
            (lambda: manager.lifecycle.owners("a"), LifecycleError, "block 'a': give a block id"),  # type: ignore[arg-type]
            (lambda: manager.lifecycle.apply(None), LifecycleError, "events is NoneType"),  # type: ignore[arg-type]
        ]
        for call, error, text in calls:
            with pytest.raises(error, match=text):
                call()
        assert manager.violations() == ()
