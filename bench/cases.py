"""What the kernel benches measure, as data: layouts, cases, and the bytes that each launch has to move.

A case is one pool and one batch over it. Its measures name the launches that are timed: one kernel, several in their
order, or `FORWARD`, all launches of HEAD and TAIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

VERIFY_DATA_EVERY = 127  # the default of CanaryConfig; a test compares them
FULL_VERIFY_MIN_TOKENS = 16  # likewise
PARTIAL_BYTES = 16  # digested of each chunk with real_data="partial"; likewise
STAMP_BYTES = 32
PAGE_MULTIPLE = 576  # bytes that pages of a split layout are padded to a multiple of

FORWARD = ("forward",)
BEGIN, WRITE, VERIFY, TAIL = "kvc_begin", "kvc_stamps_write", "kvc_stamps_verify", "kvc_stamps_tail"
DATA, DIGEST = "kvc_digests_verify", "kvc_digests_write"
Measure = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """What a pool keeps for a slot.

    Attributes:
        form: "nhd", "hnd", "token_major", or "split": in each page the rows of the first plane, then the second's.
        plane_bytes: bytes of each plane of a layer and half; two only with "split".
        n_chunks: heads of "hnd": runs that a slot's bytes are split into.
        has_v: V planes like the K planes.
    """

    name: str
    form: str
    plane_bytes: tuple[int, ...]
    n_chunks: int = 1
    n_layers: int = 1
    has_v: bool = False

    @property
    def n_halves(self) -> int:
        return 1 + self.has_v

    @property
    def n_planes(self) -> int:
        return len(self.plane_bytes) * self.n_halves * self.n_layers

    @property
    def slot_bytes(self) -> int:
        """KV bytes of a slot, all planes together."""
        return sum(self.plane_bytes) * self.n_halves * self.n_layers

    def digested_bytes(self, real_data: str) -> int:
        """Bytes of a slot that enter its digests."""
        if real_data == "all":
            return self.slot_bytes
        per_half = sum(min(PARTIAL_BYTES, n // self.n_chunks) * self.n_chunks for n in self.plane_bytes)
        return per_half * self.n_halves * self.n_layers if real_data == "partial" else 0

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a page of a split layout."""
        return -(-page_size * sum(self.plane_bytes) // PAGE_MULTIPLE) * PAGE_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pool and one batch.

    Attributes:
        group: heading in the report.
        rows: requests in the batch; ``prefix`` positions each before the forward, ``n_new`` tokens each in it.
        page_size: slots per block of the pool.
        entries: what the table numbers, "blocks" or "slots".
        order: "shuffled" or "ascending": blocks (slots) in the table.
        window: of an SWA pool; None = FULL.
        has_history: whether the batch brings `token_history`.
        baselines: names in `bench.baselines.BASELINES` that are timed over the same pool.
        axis: of a case in a plot: "slots" or "plane_bytes".
    """

    name: str
    group: str
    layout: Layout
    rows: int
    prefix: int
    n_new: int = 1
    page_size: int = 16
    entries: str = "blocks"
    order: str = "shuffled"
    real_data: str = "all"
    window: int | None = None
    verify_all: bool = False
    has_history: bool = False
    measures: tuple[Measure, ...]
    baselines: tuple[str, ...] = ()
    axis: str = ""

    @property
    def length(self) -> int:
        """Tokens of each row after the forward."""
        return self.prefix + self.n_new

    @property
    def n_slots(self) -> int:
        """Slots of the pool, the reserved block 0 included."""
        per_row = -(-self.length // self.page_size)
        n_blocks = self.rows * per_row if self.entries == "blocks" else -(-self.rows * self.length // self.page_size)
        return (1 + n_blocks) * self.page_size

    @property
    def verify_start(self) -> int:
        """First position of a row whose stamp is verified; the window counts the query's own key."""
        return max(0, self.prefix - self.window + 1) if self.window else 0

    @property
    def n_verified(self) -> int:
        """Prefix positions that are verified, all rows together."""
        return self.rows * (self.prefix - self.verify_start)

    @property
    def is_all_due(self) -> bool:
        """Whether the data of every verified slot is due, not just a share."""
        return self.verify_all or self.n_new > FULL_VERIFY_MIN_TOKENS

    @property
    def device_bytes(self) -> int:
        """About what the case takes on the device: KV, stamps, claims, digests, and the arrays of the batches."""
        layout = self.layout
        kv = layout.slot_bytes if layout.form != "split" else layout.page_bytes(self.page_size) / self.page_size
        guard = 2 * STAMP_BYTES * layout.n_halves + 8 + (8 * layout.n_planes if self.real_data != "none" else 0)
        tokens = self.rows * (self.length * (4 + 4 * self.has_history) + max(self.prefix, self.n_new) * 12)
        return int(self.n_slots * (kv + guard) + tokens)


def label(measure: Measure) -> str:
    """How lines and keys call a measure."""
    return "+".join(name.removeprefix("kvc_") for name in measure)


def key(case: Case, measure: Measure) -> str:
    """Name of a measurement, unique in a run."""
    return f"{case.name} {label(measure)}"


# ---- bytes -----------------------------------------------------------------------------------------------------------
def bytes_of(case: Case, measure: Measure) -> int:
    """Bytes that the launches of a measure must move at least: what "TB/s" and "floor" are computed from."""
    if measure == FORWARD:
        has_data = case.real_data != "none"
        measure = (BEGIN, WRITE, VERIFY, TAIL, *((DATA, DIGEST) if has_data else ()))
    return sum(_KERNEL_BYTES[name](case) for name in measure)


def _table_bytes(case: Case) -> int:
    return 4 * case.n_verified // (case.page_size if case.entries == "blocks" else 1)


def _new(case: Case) -> int:
    return case.rows * case.n_new


def _verify_bytes(case: Case) -> int:
    history = 4 if case.has_history else 0
    return case.n_verified * (STAMP_BYTES * case.layout.n_halves + history) + _table_bytes(case)


def _tail_bytes(case: Case) -> int:
    # HEAD and TAIL stamps of the prefix; HEAD read and TAIL written of the new tokens, with their claims and slots.
    halves = 2 * STAMP_BYTES * case.layout.n_halves
    return case.n_verified * halves + _table_bytes(case) + _new(case) * (halves + 16)


def _data_bytes(case: Case) -> int:
    due = case.n_verified if case.is_all_due else case.n_verified // VERIFY_DATA_EVERY
    return due * case.layout.digested_bytes(case.real_data)


_KERNEL_BYTES = {
    BEGIN: lambda c: _new(c) * (8 + 2 * 8),  # slot mapping; claim read and written
    WRITE: lambda c: _new(c) * (STAMP_BYTES * c.layout.n_halves + 4 + 8 + 8),  # stamps; token, slot, claim
    VERIFY: _verify_bytes,
    TAIL: _tail_bytes,
    DATA: _data_bytes,
    DIGEST: lambda c: _new(c) * (c.layout.digested_bytes(c.real_data) + 8 * c.layout.n_planes),
}

# ---- layouts ---------------------------------------------------------------------------------------------------------
NHD2048 = Layout("nhd2048", "nhd", (2048,))
HND2048 = Layout("hnd8x256", "hnd", (2048,), n_chunks=8)
NHD512 = Layout("nhd512", "nhd", (512,))
V4 = Layout("split576+8", "split", (576, 8))
PLANES64 = Layout("64x2048", "nhd", (2048,), n_layers=32, has_v=True)
STAMPS = Layout("kv", "nhd", (1,), has_v=True)  # K and V for their stamps alone: a byte of each
KV1024 = Layout("kv1024", "nhd", (1024,), has_v=True)  # 8 heads x 64 x fp16
_DATA_LAYOUTS = (
    NHD2048,
    HND2048,
    Layout("nhd1024", "nhd", (1024,)),
    Layout("mla1152", "token_major", (1152,)),
    NHD512,
    Layout("fp8_ds_mla656", "token_major", (656,)),
    V4,
    Layout("nhd256", "nhd", (256,)),
    PLANES64,
)


# ---- verify data -----------------------------------------------------------------------------------------------------
def _verify_data() -> list[Case]:
    cases = []
    for layout in _DATA_LAYOUTS:
        rows, prefix = (64, 1024) if layout is PLANES64 else (256, 4096)
        paged = Case(
            name=f"verify_data/{layout.name}/pages",
            group="verify data",
            layout=layout,
            rows=rows,
            prefix=prefix,
            page_size=64 if layout is V4 else 16,
            verify_all=True,
            measures=((DATA,),),
            baselines=("fold_verify", "array_digest", "copy") if layout is NHD2048 else (),
        )
        # Layouts whose pages hold more than rows keep their page: the table numbers slots instead.
        keeps_page = layout.form in ("hnd", "split")
        single = {"entries": "slots"} if keeps_page else {"page_size": 1}
        random = replace(paged, name=f"verify_data/{layout.name}/slots", baselines=(), **single)
        cases += [paged, random]
    cases.append(replace(cases[0], name="verify_data/nhd2048/ascending", order="ascending", baselines=()))
    # A decode step of an 8B model: single slots, far from each other.
    due = next(case for case in cases if case.layout is PLANES64)
    cases.append(replace(due, name="verify_due/64x2048/127th", prefix=4096, verify_all=False))
    return cases


# ---- verify and write stamps -----------------------------------------------------------------------------------------
def _stamps(name: str, rows: int, prefix: int, measures: tuple[Measure, ...], n_new: int = 1, **more: Any) -> Case:
    return Case(
        name=f"{name}/{rows}x{n_new if n_new > 1 else prefix}",
        group=name.replace("_", " "),
        layout=STAMPS,
        rows=rows,
        prefix=prefix,
        n_new=n_new,
        real_data="none",
        measures=measures,
        **more,
    )


def _verify_stamps() -> list[Case]:
    both = ((VERIFY,), (TAIL,))
    plain = _stamps("verify_stamps", 256, 4096, both, baselines=("plan_verify",))
    return [
        plain,
        replace(plain, name="verify_stamps/256x4096/slots", page_size=1, baselines=()),
        replace(plain, name="verify_stamps/256x4096/ascending", order="ascending", baselines=()),
        replace(plain, name="verify_stamps/256x4096/history", has_history=True, baselines=()),
        _stamps("verify_stamps", 1024, 1024, both),
        replace(_stamps("verify_stamps", 128, 10240, both, window=128), name="verify_stamps/swa128x10240"),
    ]


def _write_stamps() -> list[Case]:
    measures = ((WRITE,), (BEGIN,), (BEGIN, WRITE))
    serial = ("serial_write",)
    return [
        _stamps("write_stamps", 1, 0, measures, 4096, baselines=serial),
        _stamps("write_stamps", 1, 0, measures, 16384, baselines=serial),
        _stamps("write_stamps", 1, 0, measures, 131072),
        _stamps("write_stamps", 32, 4096, measures, 128),
        replace(_stamps("write_stamps", 256, 4096, measures), name="write_stamps/256x1"),
    ]


def _digest_write() -> list[Case]:
    one = Case(
        name="digest_write/1x4096/nhd2048",
        group="digest write",
        layout=NHD2048,
        rows=1,
        prefix=0,
        n_new=4096,
        measures=((DIGEST,),),
        baselines=("serial_fold",),
    )
    return [one, replace(one, name="digest_write/1x4096/64x2048", layout=PLANES64, baselines=())]


# ---- whole forwards --------------------------------------------------------------------------------------------------
_FORWARDS: dict[str, tuple[int, int, int, int | None]] = {  # name: rows, prefix, new tokens a row, window
    "e2e_decode_steady": (256, 4096, 1, None),
    "decode_large_batch_short_prefix": (1024, 1024, 1, None),
    "decode_mid_batch": (128, 4096, 1, None),
    "e2e_decode_tail": (1, 5120, 1, None),
    "prefill_chunk_at_0": (1, 0, 4096, None),
    "prefill_chunk_at_4096": (1, 4096, 4096, None),
    "prefill_chunk_at_8192": (1, 8192, 4096, None),
    "prefill_chunk_at_12288": (1, 12288, 4096, None),
    "small_extend_batch": (32, 4096, 128, None),
    "swa_decode_long_prefix": (128, 10240, 1, 128),
}


def _forwards() -> list[Case]:
    return [
        Case(
            name=f"{name}/{real_data}",
            group="whole forwards",
            layout=KV1024,
            rows=rows,
            prefix=prefix,
            n_new=n_new,
            real_data=real_data,
            window=window,
            measures=(FORWARD,),
        )
        for name, (rows, prefix, n_new, window) in _FORWARDS.items()
        for real_data in ("none", "partial", "all")
    ]


# ---- axes of the plots -----------------------------------------------------------------------------------------------
STAMP_SLOTS = tuple(1 << n for n in range(10, 25, 2))
DATA_SLOTS = {"nhd2048": tuple(1 << n for n in range(10, 23, 2)), "nhd512": tuple(1 << n for n in range(10, 25, 2))}
PLANE_BYTES = (16, 64, 128, 256, 512, 656, 1024, 1152, 2048, 4096, 8192)
_ROW_LENGTH = 4096  # positions of a row on the axes; fewer only where a case has fewer slots


def _sized(name: str, layout: Layout, n_slots: int, axis: str, measures: tuple[Measure, ...]) -> Case:
    length = min(n_slots, _ROW_LENGTH)
    is_data = measures == ((DATA,),)
    return Case(
        name=name,
        group="sizes",
        layout=layout,
        rows=n_slots // length,
        prefix=length,
        real_data="all" if is_data else "none",
        verify_all=is_data,
        measures=measures,
        axis=axis,
    )


def _sizes() -> list[Case]:
    cases = [_sized(f"slots/stamps/{n}", STAMPS, n, "slots", ((VERIFY,),)) for n in STAMP_SLOTS]
    for layout in (NHD2048, NHD512):
        cases += [_sized(f"slots/{layout.name}/{n}", layout, n, "slots", ((DATA,),)) for n in DATA_SLOTS[layout.name]]
    for n_bytes in PLANE_BYTES:
        n_slots = min(1 << 22, max(1 << 18, (1 << 31) // n_bytes // _ROW_LENGTH * _ROW_LENGTH))
        layout = Layout(f"nhd{n_bytes}", "nhd", (n_bytes,))
        cases.append(_sized(f"plane_bytes/{n_bytes}", layout, n_slots, "plane_bytes", ((DATA,),)))
    return cases


CASES: Sequence[Case] = (*_verify_data(), *_verify_stamps(), *_write_stamps(), *_digest_write(), *_forwards())
SIZES: Sequence[Case] = tuple(_sizes())
