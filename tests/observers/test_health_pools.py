"""Pools that forwards leave out: one that rests is no stall, a guard that stopped is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from base import full_config
from engine import N_BLOCKS, PAGE, ToyEngine

from kvcanary import CanaryManager, layouts
from kvcanary.errors import CanaryStalledError

from .health_rig import ALL, IN_GRAPH, Rig, T


class TwoPools:
    """An engine with a draft pool that its forwards may leave out."""

    def __init__(self, **config: Any) -> None:
        self.engine = ToyEngine()
        self.draft = [np.zeros((N_BLOCKS, PAGE, 2, 8), np.uint8)]
        pools = [self.engine.pool, layouts.nhd(k=self.draft, page_size=PAGE, name="draft")]
        values = {"health_check_every_n_steps": 4, "health_check_warmup_steps": 0, "health_policy": "raise", **config}
        self.manager = CanaryManager(full_config(**values), pools, 4, 64)
        self.n = 0

    def step(self, *forwards: list[str] | None) -> None:
        """One step with a forward for each list of pools, the first of which has index 0."""
        batch = self.engine.batch((0, self.n % 8, 1))
        with self.manager.step():
            for index, pools in enumerate(forwards):
                with self.manager.forward(batch, index=index, pools=pools):
                    self.engine.write(batch)
        self.n += 1

    def run(self, n_steps: int, *forwards: list[str] | None) -> None:
        for _ in range(n_steps):
            self.step(*forwards)


class TestPoolsThatForwardsLeaveOut:
    """A draft pool that rests is no stall; a guard that stopped is one."""

    @pytest.mark.parametrize("both", [None, ["full", "draft"]])
    def test_a_pool_that_rests_is_no_stall(self, both: list[str] | None) -> None:
        rig = TwoPools()
        rig.run(6, both)
        rig.run(12, ["full"])
        rig.run(6, both)
        assert rig.manager.stats().health == "running" and rig.manager.stats().stalls_total == 0

    def test_one_that_is_never_taken_is_none(self) -> None:
        rig = TwoPools()
        rig.run(12, ["full"])
        assert rig.manager.stats().health == "running"

    def test_pools_that_take_turns_may_rest_both(self) -> None:
        rig = TwoPools()
        for pool in ("full", "draft", "full"):
            rig.run(12, [pool])
        assert rig.manager.stats().health == "running"

    def test_a_later_forward_of_a_step_may_rest(self) -> None:
        rig = TwoPools()
        rig.run(6, ["full"], ["draft"])
        rig.run(12, ["full"])
        assert rig.manager.stats().health == "running"

    @pytest.mark.parametrize("sets", [([None], [["full"]]), ([["full"]], [["draft"]]), ([["full"], ["draft"]],)])
    def test_the_stop_of_all_pools_is_a_stall(self, sets: Any) -> None:
        rig = TwoPools()
        for forwards in sets:
            rig.run(6, *forwards)
        with pytest.raises(CanaryStalledError, match=r"did not run .*HEAD_K_FULL of pool 'full'.* of pool 'draft'"):
            rig.run(12)

    def test_a_pool_that_every_first_forward_takes_must_run(self) -> None:
        rig = TwoPools()
        rig.run(6, None)
        rig.run(6, ["full"])
        rig.manager._bind(rig.engine.batch((0, 0, 1)), False, ["draft"])
        checker, state = rig.manager._health, rig.manager.state
        before = state.kernel_run_counters.copy()
        now = before.copy()
        now[1] += np.uint64(1)  # what runs has the draft pool alone
        assert checker.choices.left_out(before, now) == ()
        now[0, T.HEAD_K_FULL] += np.uint64(1)
        now[1] = before[1]
        assert checker.choices.left_out(before, now) == {1}

    def test_where_no_choice_was_ever_made_all_pools_must_run(self) -> None:
        rig = Rig({0: frozenset({T.HEAD_K_FULL}), 1: frozenset({T.HEAD_K_SWA})}, n_pools=2)
        rig.checker.choices.note([0, 1], is_first=True)
        with pytest.raises(CanaryStalledError) as caught:
            rig.run(3, frozenset({T.HEAD_K_FULL}))
        assert caught.value.tags == (T.HEAD_K_SWA,)

    def test_a_pool_that_may_rest_runs_whole_or_not_at_all(self) -> None:
        rig = Rig({0: frozenset({T.HEAD_K_FULL}), 1: frozenset({T.HEAD_K_SWA, T.TAIL_K_SWA})}, n_pools=2)
        rig.checker.choices.note([0], is_first=True)
        rig.checker.choices.note([0, 1], is_first=True)
        rig.run(4, frozenset({T.HEAD_K_FULL}))
        rig.launch(frozenset({T.HEAD_K_SWA}), 1)  # a graph that lost its TAIL
        with pytest.raises(CanaryStalledError, match=r"TAIL_K_SWA of pool 'swa' \(0 -> 0\)") as caught:
            rig.run(3, frozenset({T.HEAD_K_FULL}))
        assert caught.value.tags == (T.TAIL_K_SWA,)

    def test_a_sweep_of_a_pool_that_rests_is_expected_all_the_same(self) -> None:
        rig = Rig({0: IN_GRAPH, 1: ALL}, n_pools=2)
        for pools in ([0], [0, 1]):
            rig.checker.choices.note(pools, is_first=True)
        rig.n_sweeps[1] = 1
        with pytest.raises(CanaryStalledError) as caught:
            rig.run(3, IN_GRAPH)
        assert caught.value.tags == (T.SWEEP_K_FULL,)
