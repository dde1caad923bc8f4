"""KV that leaves the pool and comes back elsewhere: offload, loads layer by layer, disaggregated prefill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sim_moves import PAGE, TEXTS, Guarded, plain, zeros_like

from kvcanary.ledger import PREFIX_CACHE
from kvcanary.sim import blocks
from kvcanary.sim.disaggregated import Handoff, PrefillEngine, receive
from kvcanary.sim.habits import Habits
from kvcanary.sim.memory import Mover
from kvcanary.sim.model import ModelConfig, NumpyModel
from kvcanary.sim.offload import HostStore, Stored
from kvcanary.sim.protocols import NoGuard
from kvcanary.sim.requests import Move
from kvcanary.tags import Reason

WRONG_KV = Reason.CHAIN | Reason.TOKEN | Reason.POSITION
OFFLOAD = Habits(n_offload=100)
BY_LAYER = Habits(n_offload=100, loads_by_layer=True)


def evict_and_come_back(run: Guarded) -> None:
    """The first text is served, its blocks are evicted for others, and it is asked again."""
    for text in (TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4]):
        run.add(text)
        run.finish()
    again = run.add(TEXTS[0])
    run.finish()
    assert again.n_shared_tokens == 48


@pytest.mark.parametrize("lifecycle", [False, True])
@pytest.mark.parametrize("cache_owns", [False, True])
@pytest.mark.parametrize("loads_by_layer", [False, True])
def test_evicted_blocks_come_back_elsewhere(cache_owns: bool, loads_by_layer: bool, lifecycle: bool) -> None:
    habits = Habits(n_offload=100, cache_owns=cache_owns, loads_by_layer=loads_by_layer, zeroes=True)
    run = Guarded(habits, n_blocks=25, model=NumpyModel, lifecycle=lifecycle)
    pending: list[int] = []
    run.engine.before_forward.append(lambda arrays: pending.append(int(arrays.pending.sum())))
    evict_and_come_back(run)
    last = run.add(TEXTS[0])
    run.assert_silent()
    assert last.output == plain(TEXTS[0], 12)
    assert run.engine.scheduler.store.n_restored >= 12 and run.engine.allocator.n_evictions > 20
    assert (max(pending) > 0) == loads_by_layer


@pytest.mark.parametrize("habits", [OFFLOAD, BY_LAYER], ids=["at-once", "by-layer"])
def test_bytes_that_are_lost_on_the_way_are_reported(habits: Habits, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Mover._load

    def lose(self: Mover, move: Any, guard: Any) -> None:
        move.detail.kv[2:] = zeros_like(move.detail.kv[2:])  # K and V of the second layer
        right(self, move, guard)

    monkeypatch.setattr(Mover, "_load", lose)
    run = Guarded(habits, n_blocks=25, log=True)
    evict_and_come_back(run)
    assert run.reasons() == Reason.DATA
    assert {plane.layer for plane in run.manager.violations()} == {1}


def test_a_layer_that_arrives_after_it_was_read_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mover, "load_layer", lambda self, layer: self._late.clear() if layer else None)
    run = Guarded(BY_LAYER, n_blocks=25, log=True)
    evict_and_come_back(run)
    assert run.reasons() == Reason.DATA


def test_what_is_late_arrives_before_its_slots_become_another_requests() -> None:
    """Blocks may leave a window right after they were asked for; their last layer must not be laid over the heir's."""
    model = NumpyModel(ModelConfig(n_layers=2), 8, PAGE)
    mover, slots = Mover(model, by_layer=True), np.arange(PAGE, 2 * PAGE)
    shape = (PAGE, *model.k_cache[0].shape[2:])
    tokens = np.zeros(PAGE, np.int32)
    first, second = (Stored(0, tokens, 0, [np.full(shape, value, np.float32)] * 4) for value in (1, 2))
    first.bundle = b"known"
    for stored in (first, second):
        mover.do(Move("load", slots, detail=stored), NoGuard())
    for layer in range(2):
        mover.load_layer(layer)
    assert all((values == 2).all() for values in mover.memory.read(slots))


def test_bytes_of_another_prefix_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = HostStore.match

    def mixed_up(self: HostStore, *args: Any) -> list[Stored]:
        found = right(self, *args)
        if len(found) > 2:
            a, b = found[1:3]
            a.bundle, b.bundle, a.kv, b.kv = b.bundle, a.bundle, b.kv, a.kv
        return found

    run = Guarded(OFFLOAD, n_blocks=25, log=True)
    for text in (TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[4]):
        run.add(text)
        run.finish()
    monkeypatch.setattr(HostStore, "match", mixed_up)
    run.add(TEXTS[0])
    run.step()
    assert run.reasons() & WRONG_KV


def test_store_keeps_the_newest() -> None:
    store = HostStore(2, PAGE)
    tokens = np.arange(12, dtype=np.int32)
    keys = [blocks.prefix_key(tokens, n, salt=9) for n in (4, 8, 12)]
    found = [store.put(key) for key in keys]
    assert store.put(keys[2]) is None and store.n_stored == 3
    assert store.match(tokens, 1, 9) == found[1:] and store.match(tokens, 0, 9) == store.match(tokens, 1, 8) == []
    assert found[1] is not None and (found[1].first, found[1].salt, found[1].tokens.tolist()) == (4, 9, [4, 5, 6, 7])
    assert HostStore(0, PAGE).put(keys[0]) is None


# ---- who owns cached blocks, and what is in them ---------------------------------------------------------------------
def test_a_cache_that_owns_its_blocks() -> None:
    run = Guarded(Habits(cache_owns=True), n_blocks=25)
    request = run.add(TEXTS[0])
    run.step(2)
    owners = [run.manager.lifecycle.owners(block) for block in request.blocks[:12]]
    assert set(owners) == {(request.id, PREFIX_CACHE)}
    block = request.blocks[0]
    run.finish()
    assert run.manager.lifecycle.owners(block) == (PREFIX_CACHE,)
    for text in TEXTS[1:]:
        run.add(text)
    run.assert_silent()


def test_a_cached_block_that_is_evicted_in_use_is_reported() -> None:
    run = Guarded(Habits(cache_owns=True), log=True)
    request = run.add(TEXTS[0], 30)
    run.step(2)
    run.engine.scheduler.note("free", request.blocks[:3], PREFIX_CACHE)
    run.engine.scheduler.note("free", request.blocks[:3], request.id)  # whose reference it was
    run.step()
    assert run.reasons() & Reason.STALE_EPOCH


def test_same_text_under_two_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(run: Guarded) -> list[int]:
        requests = []
        for salt in (0, 1, 2, 1):
            requests.append(run.add(TEXTS[0], salt=salt))
            run.finish()
        return [request.n_shared_tokens for request in requests]

    run = Guarded()
    assert serve(run) == [0, 0, 0, 48]
    run.assert_silent()
    right = blocks.prefix_key
    monkeypatch.setattr(blocks, "prefix_key", lambda tokens, n, salt=0: right(tokens, n))
    wrong = Guarded(log=True)
    assert serve(wrong) == [0, 48, 48, 48]
    assert {v.request_id for v in wrong.manager.violations()} == {2, 3, 4}
    assert wrong.reasons() & Reason.CHAIN


def test_zeroing_a_block_that_is_in_use_is_reported() -> None:
    run = Guarded(Habits(zeroes=True), log=True)
    request = run.add(TEXTS[0])
    run.step(2)
    assert run.engine.mover.n_done["zero"] > 0 and run.reasons() == Reason(0)
    run.engine.mover.memory.zero(np.arange(request.blocks[1] * PAGE, request.blocks[1] * PAGE + PAGE))
    run.step()
    assert run.reasons() == Reason.DATA


def test_changes_in_place_are_silent_when_they_are_told() -> None:
    run = Guarded()
    request = run.add(TEXTS[0])
    run.step(3)
    before = run.model.k_cache[1].copy()
    run.engine.refresh(request)
    run.step()
    assert (run.model.k_cache[1][request.blocks[0]] != before[request.blocks[0]]).any()
    run.assert_silent()


def test_changes_in_place_are_reported_when_they_are_not_told() -> None:
    run = Guarded(log=True)
    request = run.add(TEXTS[0])
    run.step(3)
    run.engine.mover.memory.coarsen(np.arange(request.blocks[1] * PAGE, request.blocks[1] * PAGE + PAGE))
    run.step()
    assert run.reasons() == Reason.DATA


def test_new_weights() -> None:
    run = Guarded(Habits(cache_owns=True, n_offload=9))
    requests = [run.add(text) for text in TEXTS]
    run.step(3)
    run.engine.reload()
    run.step()
    assert [request.n_shared_tokens for request in requests] == [0] * 5
    run.assert_silent()
    wrong = Guarded(log=True)
    wrong.add(TEXTS[0])
    wrong.step(3)
    wrong.manager.reset()  # and the engine goes on with what it has
    wrong.step()
    assert wrong.reasons() & Reason.UNWRITTEN


# ---- disaggregated prefill -------------------------------------------------------------------------------------------
def prefill_engine(**options: Any) -> tuple[PrefillEngine, Guarded]:
    run = Guarded(page=8, chunk=20, **options)
    return PrefillEngine(run.engine, run.guard), run


@pytest.mark.parametrize("loads_by_layer", [False, True])
def test_prompts_that_another_engine_has_computed(loads_by_layer: bool) -> None:
    prefill, first = prefill_engine(model=NumpyModel)
    run = Guarded(Habits(loads_by_layer=loads_by_layer), model=NumpyModel)
    prompts = [*TEXTS, TEXTS[0] + b" and more", TEXTS[0]]  # the last two hit what has arrived before
    requests = []
    for prompt in prompts:
        requests.append(receive(run.engine, prefill.prefill(prompt), 10))
        run.step(2)
    run.assert_silent()
    first.assert_silent()
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.output == plain(prompt, 10)
        assert request.n_shared_tokens == len(prompt)
    with pytest.raises(ValueError, match="must be >= 2"):
        receive(run.engine, prefill.prefill(b"abc"), 1)


def damaged(handoff: Handoff, what: str) -> Handoff:
    """What a transfer did to it."""
    kv = handoff.kv
    if what == "last slot":
        for values in kv.kv:
            values[-1] = 0
    else:  # its text is another one than its request's
        text = bytearray(handoff.prompt)
        text[7] ^= 1
        return handoff._replace(prompt=bytes(text))
    return handoff


@pytest.mark.parametrize(("what", "reasons"), [("last slot", Reason.DATA), ("text", WRONG_KV)])
def test_what_a_transfer_loses_or_mixes_up_is_reported(what: str, reasons: Reason) -> None:
    prefill, _ = prefill_engine()
    run = Guarded(log=True)
    receive(run.engine, damaged(prefill.prefill(TEXTS[0]), what), 10)
    run.step()
    assert run.reasons() & reasons
