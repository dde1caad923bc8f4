"""Moves that went wrong in real engines, abstracted, and their legal twins, on reference and kernels.

The recipes of `test_kernels_museum.py` whose KV is copied or transferred, with the guard told of the move.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from agree import PoolSpec, Sides
from agree_script import N_BLOCKS, N_LAYERS, PAGE, A, B, C, Row, Script, kinds

from kvcanary import Half, KvPool, Plane, Reason, SlotBundle

SUBSTITUTED = Reason.CHAIN | Reason.TOKEN
FIRST, SECOND = range(4, 12), range(12, 20)  # the slots of blocks 1 and 2, and of 3 and 4


def sent(bundle: SlotBundle) -> SlotBundle:
    """A bundle after a journey."""
    return SlotBundle.from_bytes(bundle.to_bytes())


def bytes_of(s: Script, slots: range) -> list[Any]:
    return [s.kv(layer)[list(slots)] for layer in range(N_LAYERS)]


def put_bytes(s: Script, data: list[Any], slots: range) -> None:
    for layer, values in enumerate(data):
        s.kv(layer)[list(slots)] = values[: len(slots)]


def exported(s: Script) -> tuple[SlotBundle, list[Any]]:
    """A's first eight tokens leave blocks 1 and 2."""
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    return sent(s.twins.call("export_slots", FIRST)), bytes_of(s, FIRST)


# ---- positives -------------------------------------------------------------------------------------------------------
def test_c02a_late_transfer_of_bytes(sides: Sides) -> None:
    s = Script(sides())
    _bundle, data = exported(s)
    assert s.forward(Row(2, B, 0, 8, [3, 4])) == []
    put_bytes(s, data, SECOND)
    found = s.forward(Row(2, B, 8, 9, [3, 4, 5]))
    assert kinds(found) == dict.fromkeys(SECOND, Reason.DATA)
    assert len(found) == 8 * N_LAYERS


def test_c02b_late_transfer_with_its_stamps(sides: Sides) -> None:
    s = Script(sides())
    bundle, data = exported(s)
    assert s.forward(Row(2, B, 0, 8, [3, 4])) == []
    put_bytes(s, data, SECOND)
    s.twins.call("import_slots", bundle, SECOND)
    found = kinds(s.forward(Row(2, B, 8, 9, [3, 4, 5])))
    assert found == {**dict.fromkeys(range(12, 19), Reason.TOKEN), 19: SUBSTITUTED}


def test_c02_store_of_blocks_that_others_write_by_then(sides: Sides) -> None:
    """The image of a store job is mixed: the later hit names exactly the slots that came from somebody else."""
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    assert s.forward(Row(2, B, 0, 4, [2])) == []
    bundle, data = sent(s.twins.call("export_slots", FIRST)), bytes_of(s, FIRST)
    put_bytes(s, data, SECOND)
    s.twins.call("import_slots", bundle, SECOND)
    found = kinds(s.forward(Row(4, A, 8, 9, [3, 4, 5])))
    assert set(found) == set(range(16, 20)) and all(Reason.TOKEN in reasons for reasons in found.values())


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_c13_wrong_layout_on_restore(sides: Sides, is_recomputed: bool) -> None:
    s = Script(sides())
    bundle, data = exported(s)
    put_bytes(s, [values[:, ::-1] for values in data], SECOND)
    s.twins.call("import_slots", bundle, SECOND)
    if is_recomputed:  # what the design warns of: whoever digests what arrived accepts it
        s.twins.call("refresh_digests", SECOND)
    found = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(found) == ({} if is_recomputed else dict.fromkeys(SECOND, Reason.DATA))
    assert len(found) == (0 if is_recomputed else 8 * N_LAYERS)


def test_c14_restored_to_the_wrong_blocks(sides: Sides) -> None:
    s = Script(sides())
    bundle, data = exported(s)
    assert s.forward(Row(3, C, 0, 4, [3])) == []
    target = range(16, 24)  # blocks 4 and 5, where the request has 3 and 4
    put_bytes(s, data, target)
    s.twins.call("import_slots", bundle, target)
    found = kinds(s.forward(Row(4, A, 8, 9, [3, 4, 6])))
    assert set(found) == set(SECOND)
    assert all(Reason.TOKEN in found[slot] for slot in range(12, 16)), "what C left in block 3"
    assert all(Reason.POSITION in found[slot] for slot in range(16, 20)), "the first block where the second belongs"


def test_c16_second_descriptor_lost_with_its_stamps(sides: Sides) -> None:
    s = Script(sides())
    bundle, data = exported(s)
    assert s.forward(Row(3, C, 0, 8, [3, 4])) == []
    put_bytes(s, data, SECOND[:4])
    s.twins.call("import_slots", bundle[:4], SECOND[:4])
    found = kinds(s.forward(Row(4, A, 8, 9, [3, 4, 5])))
    assert set(found) == set(range(16, 20)) and all(Reason.TOKEN in reasons for reasons in found.values())
    assert found[19] == SUBSTITUTED


def test_c16_second_descriptor_lost_into_a_fresh_block(sides: Sides) -> None:
    s = Script(sides())
    bundle, data = exported(s)
    put_bytes(s, data, SECOND[:4])
    s.twins.call("import_slots", bundle[:4], SECOND[:4])
    found = kinds(s.forward(Row(4, A, 8, 9, [3, 4, 5])))
    assert found == dict.fromkeys(range(16, 20), Reason.UNWRITTEN)


def test_c16_stamps_arrived_bytes_lost(sides: Sides) -> None:
    s = Script(sides())
    bundle, data = exported(s)
    assert s.forward(Row(3, C, 0, 8, [3, 4])) == []
    put_bytes(s, data, SECOND[:4])
    s.twins.call("import_slots", bundle, SECOND)
    found = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(found) == dict.fromkeys(range(16, 20), Reason.DATA)
    assert sorted({v.plane for v in found}) == list(range(N_LAYERS))


def test_c16_half_of_the_shadow_planes_lost(sides: Sides) -> None:
    """The engine sent the stamp planes along as layers, and the last one did not arrive."""
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    assert s.forward(Row(3, C, 0, 8, [3, 4])) == []
    s.copy(FIRST, SECOND, stamps_too=False)
    raw_copy(s, FIRST, SECOND, leave_out="TAIL_K")
    s.twins.call("localize_slots", SECOND)
    found = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(found, "TAIL") == dict.fromkeys(SECOND, Reason.UNWRITTEN)


def raw_copy(s: Script, source: range, target: range, leave_out: str = "") -> None:
    """What an engine's copy does to arrays that it takes for layers."""
    for side in s.twins.sides:
        for name, array in side.manager.shadow_arrays().items():
            if name != leave_out:
                values = side.to_host(array)
                values[list(target)] = values[list(source)]
                side.write(array, values)


def quantised_pool() -> PoolSpec:
    """K of one byte an element and its scales, in arrays of their own but with one digest."""

    def build(given: Mapping[str, Any]) -> KvPool:
        planes = [
            Plane(
                data=given[f"{name}{i}"], page_stride=PAGE * n, token_stride=n, chunk_bytes=n,
                half=Half.K, layer=i, name=name, group=f"layer{i}",
            )
            for i in range(N_LAYERS)
            for name, n in (("k", 4), ("scale", 2))
        ]  # fmt: skip
        return KvPool(planes=tuple(planes), page_size=PAGE, n_blocks=N_BLOCKS)

    sizes = {f"{name}{i}": n for i in range(N_LAYERS) for name, n in (("k", 4), ("scale", 2))}
    return PoolSpec({name: np.zeros((N_BLOCKS, PAGE, n), np.uint8) for name, n in sizes.items()}, build)


@pytest.mark.parametrize("has_scales", [False, True])
def test_c18_scales_left_behind(sides: Sides, has_scales: bool) -> None:
    s = Script(sides(), spec=quantised_pool())
    bundle, data = exported(s)
    assert s.forward(Row(3, C, 0, 8, [3, 4])) == []
    put_bytes(s, data, SECOND)
    for i in range(N_LAYERS if has_scales else 0):
        scales = s.twins.buffers[0][f"scale{i}"].reshape(PAGE * N_BLOCKS, -1)
        scales[list(SECOND)] = scales[list(FIRST)]
    s.twins.call("import_slots", bundle, SECOND)
    found = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(found) == ({} if has_scales else dict.fromkeys(SECOND, Reason.DATA))
    assert len(found) == (0 if has_scales else 8 * N_LAYERS)


def test_c21b_fork_without_the_copy(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    assert kinds(s.forward(Row(6, [*A[:6], 333], 6, 7, [1, 5]))) == {20: Reason.UNWRITTEN, 21: Reason.UNWRITTEN}


def test_c21b_fork_whose_copy_moved_no_bytes(sides: Sides) -> None:
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.twins.call("copy_slots", [12, 13], [20, 21])
    found = s.forward(Row(6, [*A[:6], 333], 6, 7, [1, 5]))
    assert kinds(found) == {20: Reason.DATA, 21: Reason.DATA}
    assert len(found) == 2 * N_LAYERS


def test_damage_travels(sides: Sides) -> None:
    """What was wrong with the source is wrong with the copy: a flipped bit, a foreign stamp, a stamp half written."""
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.damage(1, 5)
    for name in ("head0", "tail0"):
        s.twins.edit_guard(0, name, lambda stamps: stamps["token"].__setitem__(7, 999))
    s.twins.edit_guard(0, "tail0", lambda stamps: stamps["step"].__setitem__(9, 0))
    s.copy(FIRST, SECOND, stamps_too=False)
    s.twins.call("copy_slots", FIRST, SECOND)
    found = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(found, "HEAD") == {13: Reason.DATA, 15: SUBSTITUTED}
    assert kinds(found, "TAIL") == {15: SUBSTITUTED, 17: Reason.UNWRITTEN}


# ---- negative twins --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("leave_out", [[], ["token_history"], ["token_history", "request_ids"]], ids=str)
def test_n02_copy_on_write(sides: Sides, leave_out: list[str]) -> None:
    s = Script(sides(), leave_out=leave_out)
    first, second = [*A[:6], 111, 5], [*A[:6], 222, 6]
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.copy([12, 13], [20, 21], stamps_too=False)
    s.twins.call("copy_slots", [12, 13], [20, 21])
    for n in (6, 7):
        assert s.forward(Row(1, first, n, n + 1, [1, 3]), Row(2, second, n, n + 1, [1, 5])) == []


def test_n02_copy_of_a_whole_block_to_several_branches(sides: Sides) -> None:
    """The unwritten rest of the block goes along; and the guard may hear of the copy before it is done."""
    s = Script(sides())
    assert s.forward(Row(1, A, 0, 6, [1, 3])) == []
    s.twins.call("copy_slots", [3, 3], [5, 6], blocks=True)
    for block in (5, 6):
        s.copy(range(12, 16), range(4 * block, 4 * block + 4), stamps_too=False)
    branches = [[*A[:6], t, t + 1] for t in (111, 222, 333)]
    for n in (6, 7):
        rows = [Row(r, branches[r - 1], n, n + 1, [1, b]) for r, b in ((1, 3), (2, 5), (3, 6))]
        assert s.forward(*rows) == []


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("leave_out", [[], ["token_history"]], ids=str)
def test_n13_offload_and_restore(sides: Sides, window: int | None, leave_out: list[str]) -> None:
    s = Script(sides(), window=window, leave_out=leave_out)
    bundle, data = exported(s)
    assert s.forward(Row(3, C, 0, 8, [1, 2])) == [], "its blocks are others' by now"
    target = range(20, 28)
    put_bytes(s, data, target)
    s.twins.call("import_slots", bundle, target)
    for n in (8, 9):
        assert s.forward(Row(4, A, n, n + 1, [5, 6, 7])) == []


def test_n13_as_the_first_thing_that_happens(sides: Sides) -> None:
    """A decode worker that has run no forward yet: what came in is judged from its first forward on."""
    source = Script(sides())
    bundle, data = exported(source)
    s = Script(sides())
    put_bytes(s, data, SECOND)
    s.twins.call("import_slots", bundle, SECOND)
    assert s.forward(Row(4, A, 8, 9, [3, 4, 5])) == []
    s = Script(sides())
    put_bytes(s, data, SECOND)
    s.damage(2, 14)
    s.twins.call("import_slots", bundle, SECOND)
    assert kinds(s.forward(Row(4, A, 8, 9, [3, 4, 5]))) == {14: Reason.DATA}


def test_n13_by_the_shadow_planes(sides: Sides) -> None:
    s = Script(sides(), has_v=True)
    assert s.forward(Row(1, A, 0, 8, [1, 2])) == []
    s.copy(FIRST, SECOND, stamps_too=False)
    raw_copy(s, FIRST, SECOND)
    s.twins.call("localize_slots", SECOND)
    assert s.forward(Row(4, A, 8, 9, [3, 4, 5])) == []
    s.damage(0, 12, half="v")
    assert kinds(s.forward(Row(4, A, 9, 10, [3, 4, 5]))) == {12: Reason.DATA}, "the digests have come along"


def test_n20_failed_load_and_recompute(sides: Sides) -> None:
    """The forward over the failed load is reported, and only that one: the recomputed request is another matter."""
    s = Script(sides())
    bundle, _data = exported(s)
    s.twins.call("import_slots", bundle, SECOND)
    bad = s.forward(Row(4, A, 8, 9, [3, 4, 5]))
    assert kinds(bad) == dict.fromkeys(SECOND, Reason.DATA)
    assert set(s.records["forward"]) == {2}
    assert s.forward(Row(5, A, 0, 8, [3, 4])) == []
    assert s.forward(Row(5, A, 8, 9, [3, 4, 5])) == []


@pytest.mark.parametrize("arrives", [True, False])
def test_n26_layer_by_layer_load(sides: Sides, arrives: bool) -> None:
    """A pending row is not judged; what it read stays fresh until a forward has verified it."""
    s = Script(sides(), verify_data_every=127)
    bundle, data = exported(s)
    s.twins.call("import_slots", bundle, SECOND)
    pending = s.forward(Row(4, A, 8, 9, [3, 4, 5]), pending=np.ones(1, np.uint8))
    assert pending == []
    if arrives:
        put_bytes(s, data, SECOND)
    found = kinds(s.forward(Row(4, A, 9, 10, [3, 4, 5])))
    assert found == ({} if arrives else dict.fromkeys(SECOND, Reason.DATA))
