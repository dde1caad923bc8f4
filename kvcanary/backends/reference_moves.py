"""Moves in NumPy: what ``kernels/moves.cu`` must agree with bit for bit; each function is the twin of a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvcanary import abi, hashing
from kvcanary.backends.moves import SlotImage
from kvcanary.backends.reference_arrays import Array, PoolArrays
from kvcanary.backends.reference_rows import MAX_POSITIONS
from kvcanary.backends.reference_stamps import block_epochs, continued_slots, is_fresh, is_relative, is_rewritten

_U32 = (1 << 32) - 1


def listed_slots(pool: PoolArrays, entries: Any, per_entry: int) -> Array:
    """Slots of a list of slots, or of blocks of ``per_entry`` slots: i64[n], -1 = none of the pool, or reserved."""
    named = np.asarray(entries).astype(np.int64)
    inside = (named >= 0) & (named < pool.n_slots)
    slots = (np.where(inside, named, 0)[:, None] * per_entry + np.arange(per_entry)).reshape(-1)
    good = np.repeat(inside, per_entry) & (slots < pool.n_slots)
    good &= ~np.isin(slots // pool.page_size, pool.reserved)
    return np.where(good, slots, -1)


def _planes(pool: PoolArrays) -> list[Array]:
    return [*pool.head, *pool.tail]


def is_whole(pool: PoolArrays, slots: Array) -> Array:
    """Whether both stages have stamped each half of the slots in one forward: bool[n]."""
    whole = np.ones(len(slots), bool)
    for head, tail in zip(pool.head, pool.tail, strict=True):
        step = head["step"][slots]
        whole &= (step != 0) & (tail["step"][slots] == step)
    return whole


def mark_fresh(pool: PoolArrays, slots: Array, step: int, fresh: Array) -> None:
    """Have the bytes of ``slots`` (each once) verified by the next forward that reads them, or not."""
    fresh = fresh & bool(len(pool.digests))
    n_before = int(is_fresh(pool, slots).sum())
    pool.claims[slots] = np.uint64(step << 32) | np.where(fresh, abi.CLAIM_FRESH, 0).astype(np.uint64)
    pool.state["n_fresh"] = (int(pool.state["n_fresh"]) + int(fresh.sum()) - n_before) & _U32


def gather(pool: PoolArrays, slots: Array) -> SlotImage:
    """The portable part of the slots, -1 = never written (kvc_moves_gather)."""
    n, inside = len(slots), slots >= 0
    at = np.maximum(slots, 0)
    before = np.concatenate([[-1], slots[:-1]]) if n else slots
    image = np.zeros((2 * len(pool.head), n), abi.STAMP)
    for portable, plane in zip(image, _planes(pool), strict=True):
        stamps = plane[at]
        before_step = np.where(before >= 0, plane["step"][np.maximum(before, 0)], 0)
        # Where a predecessor was rewritten since, nobody links the two.
        in_list = (before >= 0) & (continued_slots(stamps) == before)
        in_list &= (before_step != 0) & ~is_rewritten(pool, before, before_step, at, stamps["step"])
        for name in ("chain", "token", "position", "step"):
            portable[name] = stamps[name]
        portable["prev_slot"] = _prev_codes(is_relative(stamps), in_list)
        # Not written since its block was allocated, or by somebody else: a new epoch at the new place would hide that.
        is_stale = stamps["epoch"] != block_epochs(pool, at) if pool.blocks is not None else np.zeros(len(at), bool)
        portable[~inside | is_stale | (stamps["step"] == 0)] = np.zeros((), abi.STAMP)
    digests = np.where(inside, pool.digests[:, at], np.uint64(0))
    return SlotImage(image, digests)


def _prev_codes(relative: Array, in_list: Array) -> Array:
    absolute = np.where(in_list, abi.PREV_IN_LIST, abi.PREV_NONE)
    return np.where(relative, np.where(in_list, abi.PREV_RELATIVE_BASE - abi.PREV_IN_LIST, abi.PREV_RELATIVE), absolute)


def scatter(pool: PoolArrays, image: SlotImage, slots: Array, step: int, halves: Sequence[int]) -> None:
    """Put an image into slots, -1 = skipped (kvc_moves_scatter).

    Args:
        halves: of each digest.
    """
    n_halves, good = len(pool.head), np.flatnonzero(slots >= 0)
    at, before = slots[good], np.concatenate([[-1], slots[:-1]])[good] if len(slots) else slots
    stamps = image.stamps[:, good]
    fresh = np.ones(len(good), bool)
    for half in range(n_halves):
        head, tail = stamps[half], stamps[n_halves + half]
        whole = (head["step"] != 0) & (head["step"] == tail["step"])
        for plane, portable in ((pool.head[half], head), (pool.tail[half], tail)):
            plane[at] = _localized(pool, portable, before, at, np.where(whole, step, portable["step"]))
        fresh &= whole
    for d, half in enumerate(halves):
        pool.digests[d, at] = np.where(stamps[half]["step"] != 0, image.digests[d, good], np.uint64(0))
    mark_fresh(pool, at, step, fresh)


def _localized(pool: PoolArrays, portable: Array, before: Array, slots: Array, steps: Array) -> Array:
    """Portable stamps with the local part of their new slots; never written stays so."""
    stamps = portable.copy()
    moved = (continued_slots(portable) == abi.PREV_IN_LIST) & (before >= 0)
    relative = np.where(moved, abi.PREV_RELATIVE_BASE - before, abi.PREV_RELATIVE)
    stamps["prev_slot"] = np.where(is_relative(portable), relative, np.where(moved, before, abi.PREV_NONE))
    stamps["step"], stamps["owner"], stamps["epoch"] = steps, 0, block_epochs(pool, slots)
    stamps[portable["step"] == 0] = np.zeros((), abi.STAMP)
    return stamps


# ---- commit ----------------------------------------------------------------------------------------------------------
def commit(
    pool: PoolArrays, image: SlotImage, row_starts: Array, request_slots: Array | None, prefix_lens: Array
) -> int:
    """Give accepted paths the chains and positions where they belong, in the image; returns rows skipped."""
    n_skipped, n = 0, image.stamps.shape[1]
    for r in range(len(prefix_lens)):
        first, last, prefix = int(row_starts[r]), int(row_starts[r + 1]), int(prefix_lens[r])
        if not 0 <= first <= last <= n or prefix < 0 or prefix + last - first > MAX_POSITIONS:
            n_skipped += 1
        elif first < last:
            _commit_path(pool, image, first, last, prefix, -1 if request_slots is None else int(request_slots[r]))
    return n_skipped


def _commit_path(pool: PoolArrays, image: SlotImage, first: int, last: int, prefix: int, request_slot: int) -> None:
    path = slice(first, last)
    head = image.stamps[0, path].copy()
    reg = pool.registers[request_slot] if 0 <= request_slot < pool.max_requests else None
    if reg is not None and not reg["request_id"]:
        reg = None
    chain, relative, registered = _path_start(reg, head[0], prefix)
    positions = np.arange(prefix, prefix + last - first)
    chains = hashing.chain_scan(chain, head["token"], prefix)
    for d in range(len(image.digests)):
        image.digests[d, path] = hashing.shift_digest(image.digests[d, path], head["position"], positions)
    shift = (positions - head["position"].astype(np.int64)).astype(np.uint32)
    for plane in image.stamps:
        stamps = plane[path]
        written = stamps["step"] != 0
        stamps["chain"][written] = chains[written]
        moved = stamps["position"].view(np.uint32) + shift  # where planes differed, they still do
        stamps["position"][written] = moved.view(np.int32)[written]
        codes = _prev_codes(np.full(last - first, relative), np.arange(last - first) > 0)
        stamps["prev_slot"][written] = codes[written]
    if reg is None:
        return
    kept = np.arange(max(0, len(chains) - abi.N_REGISTER_LENGTHS), len(chains))
    reg["chain"][(prefix + kept + 1) % abi.N_REGISTER_LENGTHS] = chains[kept]
    oldest = int(reg["length"]) - abi.N_REGISTER_LENGTHS + 1
    reg["first_length"] = max(oldest, int(reg["first_length"])) if registered else prefix + 1
    reg["is_relative"], reg["length"], reg["confirmed"] = relative, prefix + len(chains), prefix + len(chains)


def _path_start(reg: Array | None, first: Array, prefix: int) -> tuple[int, bool, bool]:
    """The chain before a path, whether it is relative, and whether the register knew it."""
    if reg is not None:
        oldest = max(int(reg["first_length"]), int(reg["length"]) - abi.N_REGISTER_LENGTHS + 1)
        if oldest <= prefix <= int(reg["length"]):
            return int(reg["chain"][prefix % abi.N_REGISTER_LENGTHS]), bool(reg["is_relative"]), True
    if first["step"] and first["position"] == prefix:  # the tree's first node: its chain continued the prefix
        mix = int(hashing.token_mix(first["token"].reshape(1), np.array([prefix]))[0])
        before = (int(first["chain"]) - mix) * abi.CHAIN_P_INVERSE & hashing.MASK
        return before, bool(first["prev_slot"] <= abi.PREV_RELATIVE), False
    return 0, True, False


# ---- in place --------------------------------------------------------------------------------------------------------
def localize(pool: PoolArrays, slots: Array, step: int, drops_digests: bool) -> None:
    """Make the local part of stamps new that the engine itself has copied (kvc_moves_localize)."""
    fresh = is_whole(pool, slots) & (not drops_digests)
    for head, tail in zip(pool.head, pool.tail, strict=True):
        # The steps are another guard's: they only tell whether the stages are of one forward.
        tail["step"][slots[head["step"][slots] != tail["step"][slots]]] = 0
        for plane in (head, tail):
            stamps = plane[slots]
            stamps["prev_slot"] = np.where(is_relative(stamps), abi.PREV_RELATIVE, abi.PREV_NONE)
            plane[slots] = _localized(pool, stamps, np.full(len(slots), -1), slots, np.full(len(slots), step))
    if drops_digests:
        pool.digests[:, slots] = 0
    mark_fresh(pool, slots, step, fresh)


def adopt(pool: PoolArrays, slots: Array, positions: Array, tokens: Array, chains: Array, step: int) -> None:
    """Stamp what came without stamps (kvc_moves_adopt).

    Args:
        tokens: i64[n], negative = unknown.
        chains: u64[n], 0 = unknown: such a token is judged, its links are not.
    """
    stamps = np.zeros(len(slots), abi.STAMP)
    known = tokens >= 0
    stamps["chain"] = np.where(known, chains, np.uint64(0))
    stamps["token"] = np.where(known, tokens, abi.NO_TOKEN)
    stamps["position"] = positions
    stamps["prev_slot"] = np.where(known & (chains == 0), abi.PREV_RELATIVE, abi.PREV_NONE)
    stamps["step"], stamps["epoch"] = step, block_epochs(pool, slots)
    for plane in _planes(pool):
        plane[slots] = stamps
    mark_fresh(pool, slots, step, np.ones(len(slots), bool))
