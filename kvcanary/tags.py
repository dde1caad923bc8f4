"""Launch tags: which check, of which half, of which kind of pool."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Stage(IntEnum):
    """When a check runs.

    Attributes:
        HEAD: before the model, inside the graph.
        TAIL: after the model, inside the graph.
        SWEEP: host-driven, outside the graph.
    """

    HEAD = 0
    TAIL = 1
    SWEEP = 2


class Half(IntEnum):
    """Which part of the cache; a fused or latent array counts as K."""

    K = 0
    V = 1


class PoolKind(IntEnum):
    """FULL keeps every position, SWA only those inside a sliding window."""

    FULL = 0
    SWA = 1


N_STAGES, N_HALVES, N_POOL_KINDS = len(Stage), len(Half), len(PoolKind)
N_TAGS = N_STAGES * N_POOL_KINDS * N_HALVES


class CanaryLaunchTag(IntEnum):
    """Stage x pool kind x half, packed as ``stage * 4 + kind * 2 + half``."""

    HEAD_K_FULL = 0
    HEAD_V_FULL = 1
    HEAD_K_SWA = 2
    HEAD_V_SWA = 3
    TAIL_K_FULL = 4
    TAIL_V_FULL = 5
    TAIL_K_SWA = 6
    TAIL_V_SWA = 7
    SWEEP_K_FULL = 8
    SWEEP_V_FULL = 9
    SWEEP_K_SWA = 10
    SWEEP_V_SWA = 11

    @classmethod
    def of(cls, stage: Stage, half: Half, kind: PoolKind) -> CanaryLaunchTag:
        """Pack the three parts."""
        return cls(stage * (N_POOL_KINDS * N_HALVES) + kind * N_HALVES + half)

    @property
    def stage(self) -> Stage:
        return Stage(self.value // (N_POOL_KINDS * N_HALVES))

    @property
    def half(self) -> Half:
        return Half(self.value % N_HALVES)

    @property
    def pool_kind(self) -> PoolKind:
        return PoolKind(self.value // N_HALVES % N_POOL_KINDS)


class Reason(IntFlag):
    """Why a slot, a write or a row was reported; bits, of which a violation may have several.

    Attributes:
        CHAIN: the slot does not continue its predecessor, or the prefix is not this request's.
        POSITION: the slot holds a token of another position.
        DATA: the bytes are not the bytes that were written.
        WRITE_TOKEN: the model was given another token than ``expected_tokens`` says.
        WRITE_POSITION: ``slot_mapping`` disagrees with the block table.
        TOKEN: the slot holds another token than ``token_history`` says.
        UNWRITTEN: nothing was written where the request reads, or a write did not arrive.
        STALE_EPOCH: the block is free, another's, or was handed on since its KV was written. Needs ``lifecycle``.
        OUT_OF_RANGE: a table entry, slot, length or offset outside its array.
        FOREIGN_WRITE: a write into a block of another request's, or one that is only shared. Needs ``lifecycle``.
        DUPLICATE_WRITE: two tokens of one forward claimed one slot.
        NONFINITE_RESERVED: NaN or Inf in a reserved block. Needs ``check_reserved_every``.
    """

    CHAIN = 1
    POSITION = 2
    DATA = 4
    WRITE_TOKEN = 8
    WRITE_POSITION = 16
    TOKEN = 32
    UNWRITTEN = 64
    STALE_EPOCH = 128
    OUT_OF_RANGE = 256
    FOREIGN_WRITE = 512
    DUPLICATE_WRITE = 1024
    NONFINITE_RESERVED = 2048

    def names(self) -> tuple[str, ...]:
        """The names of the set bits, lowest bit first."""
        return tuple(r.name for r in Reason if r in self and r.name is not None)


class Detail(IntEnum):
    """What a record speaks of, when it is not a slot of the pool that a row reads or writes."""

    SLOT = 0  #: the record's slot is a slot of the pool
    TABLE_ENTRY = 1  #: a block table (or slot LUT) entry; `slot` holds the raw entry
    SLOT_MAPPING = 2  #: a write target; `slot` holds the raw value
    SEQ_LEN = 3  #: the row's length goes beyond its table row; `slot` holds the length
    QUERY_START_LOC = 4  #: the row's token range is not inside the batch; `slot` holds its end
    REQUEST_SLOT = 5  #: request slot >= max_requests; `slot` holds it
    UNFINISHED = 6  #: UNWRITTEN at TAIL: HEAD and TAIL stamps are of different, completed forwards
    SCRUB = 7  #: a slot of the pool, which the patrol has looked at, for no row
    #: the first slot of a reserved block with an element that is not finite; ``plane`` counts in
    #: `KvPool.ordered_planes`, ``found_digest`` is the element's offset in the slot (bytes), ``stored_digest`` its bits
    RESERVED = 8
    KV_INDPTR = 9  #: the row's part of a CSR table is not inside ``kv_indices``; `slot` holds its end

    @property
    def is_slot(self) -> bool:
        """Whether `slot` is a slot of the pool, if it is not negative."""
        return self in (Detail.SLOT, Detail.UNFINISHED, Detail.SCRUB, Detail.RESERVED)
