"""Lists of moves: what names no slot, whatever is in them, none at all, and misuse."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from agree import Sides
from agree_pools import random_pool
from agree_script import PAGE, A, B, Row, Script, kinds, pool_spec, skipped, stamps
from agree_twins import Twins
from engine import ToyEngine

from kvcanary import BatchError, BundleError, ConfigError, PhaseError, Reason, SlotBundle
from kvcanary.backends.moves import MoveOp


# ---- lists on the device ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("is_wide", [False, True])
def test_entries_on_the_device_that_name_no_slot_are_skipped_and_counted(sides: Sides, is_wide: bool) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]), Row(2, B, 0, 4, [6]))
    far = [1 << 40, -(1 << 40)] if is_wide else [(1 << 31) - 1, -(1 << 31)]
    #         fine   bad source, good destination     bad destination            both (padding)
    source = [4, 5, 3, -1, 32, *far, 0, 6, 6, 7, 7, 6, 6, 0, -1, 32, *far]
    target = [12, 13, 20, 21, 22, 23, 24, 25, 0, 3, -1, 32, *far, 0, -1, 32, *far]
    s.copy([4, 5], [12, 13], stamps_too=False)
    s.twins.move(MoveOp.COPY, 0, np.array(target), sources=np.array(source), is_wide=is_wide)
    assert skipped(s) == 6 + 6 + 2 * 5
    assert stamps(s, "head0", [12, 13])["token"].tolist() == A[:2]
    assert not stamps(s, "head0", range(20, 24))["step"].any() and not stamps(s, "head0", [25])["step"].any()
    assert kinds(s.forward(Row(2, B, 4, 5, [6, 7])))[24] == Reason.UNWRITTEN
    assert not stamps(s, "head0", range(4))["step"].any(), "the reserved block"


def test_blocks_on_the_device(sides: Sides) -> None:
    s = Script(sides())
    s.forward(Row(1, A, 0, 8, [1, 2]))
    s.copy(range(4, 12), range(12, 20), stamps_too=False)
    blocks = np.array([3, -1, 8, 4, 0]), np.array([1, 1, 1, 2, 1])
    s.twins.move(MoveOp.COPY, 0, blocks[0], sources=blocks[1], per_entry=PAGE)
    assert skipped(s) == 3 * PAGE
    assert s.forward(Row(4, A, 8, 9, [3, 4, 5])) == []


@pytest.mark.parametrize("op", [MoveOp.REFRESH, MoveOp.LOCALIZE, MoveOp.ADOPT, MoveOp.IMPORT])
def test_every_move_leaves_out_what_is_no_slot(sides: Sides, op: MoveOp) -> None:
    s = Script(sides(), has_v=True)
    s.forward(Row(1, A, 0, 8, [1, 2]))
    bundle = s.twins.call("export_slots", range(4, 12))
    slots = np.array([4, 0, 3, -1, 32, (1 << 31) - 1, 30, 5])
    more: dict[str, Any] = {}
    if op is MoveOp.ADOPT:
        more = {"positions": np.array([0, 1, 2, 3, 4, 5, -1, 1]), "tokens": np.array([-1, 1, 1, 1, 1, 1, 1, 7])}
    if op is MoveOp.IMPORT:
        more = {"image": bundle.to_image()}
    s.twins.move(op, 0, slots, **more)
    assert skipped(s) == 5 + (op in (MoveOp.REFRESH, MoveOp.ADOPT)), "slot 30 was never written, or has no position"


# ---- layouts, random moves -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_random_moves_in_random_layouts_agree(sides: Sides, seed: int) -> None:
    """Whatever is in the lists, and whatever the stamps: reference and kernels do the same."""
    rng = random.Random(seed)
    bytes_of = np.random.default_rng(seed)
    page = rng.choice((1, 4, 5, 16))
    reserved = rng.choice(((), (0,), (0, 3)))
    spec = random_pool(rng, n_blocks=320 // page, page_size=page, reserved_blocks=reserved)
    twins = Twins([spec], sides(), 4, 256, real_data=rng.choice(("all", "all", "partial", "none")))
    n_slots = twins.pools[0].n_slots
    for _ in range(6):
        change_stamps(twins, bytes_of)
        n = rng.choice((0, 1, 31, 300, n_slots))
        slots = bytes_of.permutation(np.arange(-8, n_slots + 8))[:n]
        op = rng.choice(list(MoveOp))
        lists: dict[str, Any] = {"per_entry": 1}
        if op in (MoveOp.COPY, MoveOp.COMMIT):
            lists["sources"] = bytes_of.integers(-2, n_slots + 2, n)
        if op is MoveOp.COMMIT:
            starts = np.sort(bytes_of.integers(0, n + 1, 5))
            lists |= {"row_starts": starts, "prefix_lens": bytes_of.integers(-1, 40, 4)}
            lists["request_slots"] = bytes_of.permutation(np.arange(-1, 6))[:4]
        if op is MoveOp.ADOPT:
            lists |= {"positions": bytes_of.integers(-1, 1 << 20, n), "tokens": bytes_of.integers(-2, 9, n)}
            lists["chains"] = bytes_of.integers(0, 3, n).astype(np.uint64)
        if op is MoveOp.LOCALIZE:
            lists["drops_digests"] = rng.random() < 0.5
        if op is MoveOp.IMPORT:
            taken = [slot for slot in bytes_of.permutation(n_slots).tolist() if slot // page not in reserved]
            bundle = twins.call("export_slots", taken[:n])
            slots, lists["image"] = slots[: len(bundle)], bundle[: len(slots)].to_image()
        twins.move(op, 0, slots, rng.random() < 0.5, **lists)


def change_stamps(twins: Twins, bytes_of: np.random.Generator) -> None:
    """Stamps, digests and registers of all kinds, as forwards and damage may leave them."""
    for half in range(len(twins.pools[0].halves)):
        head = twins.sides[0].read_guard(0, f"head{half}").copy()
        n = len(head)
        at = bytes_of.random(n) < 0.5
        for name, low, high in (("chain", 0, 1 << 62), ("token", -1, 99), ("position", -1, 99), ("prev_slot", -n, n)):
            head[name][at] = bytes_of.integers(low, high, n)[at]
        in_order = bytes_of.random(n) < 0.3
        head["prev_slot"][in_order] = np.arange(-1, n - 1)[in_order]
        head["step"][at] = bytes_of.integers(0, 3, n)[at]
        tail = head.copy()
        differs = bytes_of.random(n) < 0.1
        tail["step"][differs], tail["token"][differs] = bytes_of.integers(0, 3, n)[differs], 7
        for name, values in ((f"head{half}", head), (f"tail{half}", tail)):
            set_alike(twins, name, values)
    registers = twins.sides[0].read_guard(0, "registers").copy()
    for name, low, high in (("request_id", 0, 3), ("length", 0, 60), ("first_length", 0, 50), ("is_relative", 0, 2)):
        registers[name] = bytes_of.integers(low, high, 4)
    registers["chain"] = bytes_of.integers(0, 1 << 62, registers["chain"].shape)
    set_alike(twins, "registers", registers)
    if twins.config.real_data != "none":
        digests = twins.sides[0].read_guard(0, "digests")
        shape = digests.shape
        values = bytes_of.integers(0, 1 << 62, shape).astype(np.uint64) * bytes_of.integers(0, 2, shape).astype(
            np.uint64
        )
        values[bytes_of.random(shape) < 0.1] = 1
        set_alike(twins, "digests", values)


def set_alike(twins: Twins, name: str, values: np.ndarray[Any, Any]) -> None:
    twins.edit_guard(0, name, lambda array: array.__setitem__(..., values))


# ---- misuse ----------------------------------------------------------------------------------------------------------
# The toy engine has 64 slots: 16 blocks of 4, of which block 0 is reserved.
MISUSE = [
    (
        lambda m: m.copy_slots([4, 5], [8]),
        BatchError,
        r"copy_slots\(\): src has 2, dst has 1 entries: give lists of one",
    ),
    (lambda m: m.copy_slots([4, 64], [8, 9]), BatchError, r"src\[1\]=64: the slots of pool 'full' are 0 to 63"),
    (lambda m: m.copy_slots([4, 5], [8, -1]), BatchError, r"dst\[1\]=-1: the slots of pool 'full' are 0 to 63"),
    (lambda m: m.copy_slots([4, 5], [3, 8]), BatchError, r"dst\[0\]=3 is in block 0, which pool 'full' reserves"),
    (lambda m: m.copy_slots([1], [8]), BatchError, r"src\[0\]=1 is in block 0"),
    (lambda m: m.copy_slots([4, 5, 6], [9, 8, 9]), BatchError, r"dst has 9 2 times: give each once"),
    (lambda m: m.copy_slots([1], [16], blocks=True), BatchError, r"dst\[0\]=16: the blocks of pool 'full' are 0 to 15"),
    (lambda m: m.copy_slots([1], [0], blocks=True), BatchError, r"dst\[0\]=0 is in block 0"),
    (lambda m: m.copy_slots([1.5], [8]), BatchError, "src is float64: give integers"),
    (lambda m: m.copy_slots([[4]], [[8]]), BatchError, r"src has shape \(1, 1\): give a flat list"),
    (lambda m: m.copy_slots("4", [8]), BatchError, "copy_slots"),
    (lambda m: m.copy_slots([4], [8], pool="other"), ConfigError, "no pool 'other': give one of 'full', or 0 to 0"),
    (lambda m: m.export_slots([0]), BatchError, r"export_slots\(\): slots\[0\]=0 is in block 0"),
    (
        lambda m: m.import_slots(m.export_slots([4, 5]), [8]),
        BatchError,
        "1 slots for a bundle of 2: give one per entry",
    ),
    (lambda m: m.import_slots(m.export_slots([4, 5]), [8, 8]), BatchError, "slots has 8 2 times"),
    (lambda m: m.import_slots(SlotBundle.of_nothing(), []), BundleError, "mode='off'.*adopt_slots"),
    (lambda m: m.adopt_slots([4, 5], [0, -1]), BatchError, r"positions\[1\]=-1: give 0 to 2147483647"),
    (lambda m: m.adopt_slots([4, 5], [0, 1], tokens=[7]), BatchError, "slots has 2, positions has 2, tokens has 1"),
    (lambda m: m.adopt_slots([4], None), BatchError, r"adopt_slots\(\): positions is None: give the position of each"),
    (
        lambda m: m.adopt_slots([4, 5], [0, 1], tokens=[1, 2], salt=None),
        BatchError,
        "salt=None: give an integer from 0",
    ),
    (lambda m: m.adopt_slots([4], [0], salt=-1), BatchError, r"adopt_slots\(\): salt=-1: .* to 2\^64 - 1"),
    (lambda m: m.refresh_digests([4, 4]), BatchError, "slots has 4 2 times"),
    (lambda m: m.localize_slots([70]), BatchError, r"slots\[0\]=70"),
    (
        lambda m: m.commit_slots([4, 5], [4, 6], [0, 1], [0]),
        BatchError,
        r"row_starts=\[0, 1\]: give ascending .* 0 to 2",
    ),
    (lambda m: m.commit_slots([4, 5], [4, 6], [0, 2], [0, 1]), BatchError, "row_starts has 2 entries, 2 rows need 3"),
    (
        lambda m: m.commit_slots([4], [4], [0, 1], [0], request_slots=[4]),
        BatchError,
        r"request_slots\[0\]=4: negative is none, and request slots are 0 to 3$",
    ),
    (lambda m: m.commit_slots([4], [4], [0, 1], [0], request_slots=[]), BatchError, "request_slots has 0 entries"),
    (lambda m: m.commit_slots([4], [4], None, [0]), BatchError, "row_starts and prefix_lens are needed"),
]


@pytest.mark.parametrize("number", range(len(MISUSE)))
def test_misuse_is_refused_with_a_message_and_changes_nothing(number: int) -> None:
    call, error, text = MISUSE[number]
    engine = ToyEngine(verify_data_every=1)
    engine.step((0, 0, 6), (1, 0, 3))
    arrays = engine.manager.shadow_arrays()
    before = {name: array.copy() for name, array in arrays.items()}
    with pytest.raises(error, match=text):
        call(engine.manager)
    assert all(np.array_equal(arrays[name], before[name]) for name in arrays)


def test_moves_come_between_forwards() -> None:
    engine = ToyEngine()
    batch = engine.batch((0, 0, 6))
    with engine.manager.step(), engine.manager.forward(batch):
        for call in (engine.manager.copy_slots, engine.manager.adopt_slots):
            with pytest.raises(PhaseError, match="_slots"):
                call([4], [8])


def test_a_guard_that_is_off_does_nothing() -> None:
    engine = ToyEngine(mode="off")
    engine.manager.copy_slots([4], [8])
    bundle = engine.manager.export_slots([4])
    assert len(bundle) == 0
    engine.manager.import_slots(bundle, [8])
    engine.manager.adopt_slots([4], [0])
    engine.manager.refresh_digests([4])
    engine.manager.localize_slots([4])
    engine.manager.commit_slots([4], [8], [0, 1], [0])
    assert engine.manager.shadow_arrays() == {}


def test_an_empty_list_is_nothing_to_do(sides: Sides) -> None:
    twins = Twins([pool_spec()], sides())
    twins.call("copy_slots", [], [])
    twins.call("commit_slots", [], [], [0], [])
    assert len(twins.call("export_slots", [])) == 0
