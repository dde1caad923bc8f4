"""The rule of `kvcanary.causes` for bytes that changed under right stamps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kvcanary import abi, hashing
from kvcanary.evidence import Records
from kvcanary.evidence_runs import Run
from kvcanary.violations import Violation

Found = Iterator[tuple[str, float, str]]


def data_rule(records: Records) -> Found:
    written = by_content(records.data)
    found = by_content(records.data, is_found=True)
    for run in records.runs(records.data):
        planes = {r.plane_name or "" for r in run.records}
        where = f"{run.words} on layers {run.layers} ({', '.join(sorted(planes))})"
        right = f"the stamps of {where} are right, the bytes are not"
        if len(run.slots) == len(run.records) == 1:
            yield "C24", 0.9, f"{right}: one slot of one plane: no engine writes so little"
        elif run.is_pending:
            yield from _not_arrived(found, run, right)
        elif all("scale" in name for name in planes):
            yield "C18", 0.9, f"{right}: only scales differ, what they scale is intact"
        elif len(run.records) > 1 and all(is_at_rest_zero(r) for r in run.records):
            yield from _zeroed(run, right)
        elif pairs := displaced(run.records, written):
            yield from _displaced(run, pairs, right)
        elif run.is_moved and (intact := intact_planes(run)):
            yield from _partial(run, right, intact)
        elif run.is_moved:
            yield from _since_loaded(run, right)
        else:
            yield from _stray_bytes(run, right)


def intact_planes(run: Run) -> str:
    """Which planes of the run's slots are intact for certain, in words; "" where the records do not say.

    Planes are counted from 0, without gaps; what lies behind the last one that differs may not exist.
    """
    planes = {r.plane for r in run.records if r.plane is not None}
    if planes == set(range(len(planes))):
        return ""
    if {r.plane_name for r in run.records} == {"v"}:
        return "K"
    return f"layers before {run.layers[0]}" if run.layers and 0 not in planes else "other planes"


def _partial(run: Run, right: str, intact: str) -> Found:
    """Of what was loaded, some planes came and others did not."""
    what = f"{right}, since they were loaded, and {intact} of the same slots are intact"
    yield "C16", 0.85, f"{what}: a part of the load never came"
    yield "C15", 0.7, f"{what}: the load of layers {run.layers} may not have arrived when they were read"
    yield "C13", 0.5, f"{what}: these planes may have another layout"


def _since_loaded(run: Run, right: str) -> Found:
    """All planes of what was loaded, from the beginning on or behind what is intact."""
    loaded = f"{right}, since they were loaded"
    if run.positions[0] == 0:
        yield "C13", 0.8, f"{right}, from the first position on, since they were loaded: another layout"
        yield "C14", 0.5, f"{loaded}: they may have gone to other slots than the stamps"
        return
    yield "C16", 0.8, f"{loaded}; what lies before position {run.positions[0]} is intact"
    if run.starts_block:
        yield "C02", 0.6, f"{loaded}: they may have been saved after their blocks were another's"


def _not_arrived(found: Mapping[int, Violation], run: Run, right: str) -> Found:
    """Bytes that are still being loaded when they are read, or that were loaded to another place."""
    elsewhere = (found[content] for content in by_content(run.records) if content in found)
    if (here := next((v for v in elsewhere if v.slot not in run.slots), None)) is not None:
        yield "C14", 0.97, f"{right}: what was loaded for them is in slot {here.slot}, and so on"
    yield "C15", 0.95, f"{right}, at the moment of the read: the load of layers {run.layers} has not arrived"


def _zeroed(run: Run, right: str) -> Found:
    """Nothing but zeros: what was there was wiped or, of what was copied or loaded, it never came."""
    zero = f"{right}: every byte is zero"
    if not run.is_moved:
        yield "C17", 0.9, f"{zero}: a memset after the write of forward {run.records[0].stamp_step}"
        return
    is_all = run.positions[0] == 0 and not intact_planes(run)
    yield "C17", 0.9 if is_all else 0.7, f"{zero}: a memset after they were copied or loaded"
    came = "" if is_all else ", though other parts of it did"
    yield "C16", 0.75 if is_all else 0.85, f"{zero}: what should have been copied or loaded there did not come{came}"


def _displaced(run: Run, pairs: Sequence[tuple[Violation, Violation]], right: str) -> Found:
    """The bytes are there, but elsewhere."""
    here, there = pairs[0]
    is_partial = run.is_moved and here.slot != there.slot and intact_planes(run)
    if is_partial:
        yield from _partial(run, right, is_partial)
        older = f"{right}: slot {here.slot} holds the bytes of slot {there.slot}, in some planes"
        yield "C14", 0.4, f"{older}: that part may have gone to other blocks, or be what they held before"
        return
    if here.slot == there.slot:
        what = f"{here.plane_name} of layer {here.layer} holds what was written to {there.plane_name} of {there.layer}"
        yield "C13", 0.95, f"{right}: {what}: the axes of the layout were taken for others"
    else:
        yield "C14", 0.9, f"{right}: slot {here.slot} holds the bytes that were written for slot {there.slot}"


def _stray_bytes(run: Run, right: str) -> Found:
    """Bytes of a request's own tokens that somebody else wrote: how much, and where it begins, tells who."""
    if len(run.layers) == 1:
        is_one_plane = len({r.plane for r in run.records}) == 1
        yield "C15", 0.5, f"{right}: one layer alone"
        yield "C24", 0.5 if is_one_plane or len(run.slots) == 1 else 0.3, f"{right}: memory may be failing"
        if not is_one_plane and not intact_planes(run):
            yield "C10", 0.55, f"{right}: KV that no stamp announced, as padding or another engine's write leaves it"
    elif run.starts_block and (run.ends_block or len(run.slots) >= run.page):
        yield "C02", 0.8, f"{right}: whole blocks, in all layers: a transfer that was not this request's"
        yield "C07", 0.5, f"{right}: a kernel may have written through a stale table entry"
    elif run.starts_block and len(run.slots) > 1:
        yield "C12", 0.7, f"{right}: the beginning of a block, in all layers: a writer ran on from the block before"
        yield "C10", 0.5, f"{right}: padded rows may have written there"
    elif {r.plane_name for r in run.records} == {"v"}:
        what = f"{right}, and K of the same slots is intact"
        yield "C12", 0.75, f"{what}: whatever writes V alone took another token's place"
        yield "C16", 0.5, f"{what}: a copy or transfer of V alone may have landed there"
    else:
        yield "C10", 0.7, f"{right}, in all layers: KV of tokens that no stamp announced, as padded rows write it"
        yield "C08", 0.5, f"{right}: a kernel may have used an overwritten slot mapping"


# ---- what digests say ------------------------------------------------------------------------------------------------
# mix64 backwards: its shifts, and the inverses of its factors.
_UNMIX = ((31, pow(abi.MIX_2, -1, 1 << 64)), (27, pow(abi.MIX_1, -1, 1 << 64)), (30, 1))


def _content(digest: int, plane: int, position: int) -> int:
    """What a digest says of the bytes alone: mix64 is a bijection, and plane and position are terms of the sum."""
    x = digest
    for shift, inverse in _UNMIX:
        x ^= x >> shift ^ x >> 2 * shift
        x = x * inverse % (1 << 64)
    return (x - plane * abi.DIGEST_C1 - position * abi.DIGEST_C2) % (1 << 64)


def by_content(records: Sequence[Violation], is_found: bool = False) -> dict[int, Violation]:
    """Findings by the bytes that were written or (``is_found``) are there now, as far as digests tell them."""
    told = ((v, v.found_digest if is_found else v.stored_digest) for v in records)
    return {_content(d, v.plane, v.stored_position): v for v, d in told if d is not None and v.plane is not None}


def displaced(records: Sequence[Violation], written: Mapping[int, Violation]) -> list[tuple[Violation, Violation]]:
    """(here, there): findings whose bytes are those that were written for the slot or plane of another finding."""
    told = [(v, v.found_digest) for v in records if v.plane is not None]
    pairs = [(v, written.get(_content(d, v.plane or 0, v.stored_position))) for v, d in told if d is not None]
    return [(here, there) for here, there in pairs if there is not None and there is not here]


def is_at_rest_zero(v: Violation) -> bool:
    """Whether the bytes that were found are all zero: the digest of zeros is known for every length."""
    if v.found_digest is None or v.plane is None:
        return False
    n_words = np.arange(abi.MAX_PLANE_BYTES // 4 + 1, dtype=np.uint64)
    terms = n_words * np.uint64(abi.DIGEST_C0)
    terms += np.uint64(v.plane * abi.DIGEST_C1 + v.stored_position * abi.DIGEST_C2 & 0xFFFFFFFFFFFFFFFF)
    return bool((hashing.mix64(terms) == np.uint64(v.found_digest)).any())
