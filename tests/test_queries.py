"""What a manager can be asked: descriptions, sizes, chains."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from engine import ToyEngine

import kvcanary
from kvcanary import ConfigError, Reason
from kvcanary.state import CounterLayout


class TestKnowing:
    def test_describe_says_what_is_off_for_lack_of_which_input(self) -> None:
        engine = ToyEngine()
        assert "no batch was seen yet" in engine.manager.describe()
        batch = engine.step((0, 0, 4))
        text = engine.manager.describe()
        assert "off: WRITE_TOKEN (no expected_tokens)" in text and "TOKEN" in text.split("\non: ")[1]
        assert batch is not None

    def test_describe_remembers_the_inputs_of_batches_that_are_gone(self) -> None:
        engine = ToyEngine()
        engine.step((0, 0, 4))
        gc.collect()
        assert "no batch was seen yet" not in engine.manager.describe()

    def test_estimate_is_what_is_taken(self) -> None:
        engine = ToyEngine()
        estimate = engine.manager.estimate_bytes(engine.config, [engine.pool], 4)
        abi = kvcanary.abi  # the plane tables lie in the pool itself on the host
        tables = len(engine.pool.planes) * abi.PLANE.itemsize + 4 * abi.DIGEST.itemsize
        per_request = 4 * (abi.ROW.itemsize + 8 * abi.N_WORK)  # and so do row facts and work lists
        assert estimate - tables - per_request - kvcanary.abi.POOL_STATE.itemsize == engine.manager.memory_bytes

    def test_an_estimate_takes_what_a_manager_does_and_refuses_what_it_refuses(self) -> None:
        engine = ToyEngine()
        estimate = engine.manager.estimate_bytes
        assert estimate(engine.config, engine.pool, 4) == estimate(engine.config, [engine.pool], 4)
        with pytest.raises(ConfigError, match="max_requests=0: give an integer from 1"):
            estimate(engine.config, [engine.pool], 0)
        with pytest.raises(ConfigError, match="pools is ndarray: give a list"):
            estimate(engine.config, engine.history, 4)

    def test_one_snapshot_is_a_few_hundred_bytes(self) -> None:
        assert [8 * CounterLayout(n).n_words for n in (1, 2)] == [416, 640]

    def test_chain_is_what_prefix_chain_takes(self) -> None:
        engine = ToyEngine(verify_data_every=1)
        engine.step((0, 0, 6))
        tokens = engine.history[0, :6].tolist()
        # A second request with the same blocks and no history: its prefix is anchored by the host's chain alone.
        engine.history[1, :6] = -1
        table = 1 + np.arange(3)
        for chain, expected in ((engine.manager.chain(tokens), ()), (engine.manager.chain([*tokens[:5], 9]), (9,))):
            batch = engine.batch(
                (1, 6, 1),
                block_table=table[None].astype(np.int32),
                slot_mapping=np.array([4 + 6], np.int64),
                prefix_chain=np.array([chain], np.uint64),
                request_ids=np.array([chain % 1000 + 5], np.uint32),
            )
            with engine.manager.step(), engine.manager.forward(batch):
                engine.write(batch)
            found = engine.manager.violations()
            assert tuple(v.slot for v in found) == expected
            assert all(v.reasons == Reason.CHAIN for v in found)
