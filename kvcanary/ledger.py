"""The host's ledger of block ownership: who holds which block of a pool, and which calls make no sense.

Pure NumPy. It decides what each call means for the device's words (`BlockChanges`), and refuses misuse before anything
is changed anywhere. A call of 1,000 ids whose blocks are not shared costs some ten passes of NumPy over them; who
shares a block is kept in dicts, at about a microsecond for each shared block of a call (bench/bench_ledger.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.errors import LifecycleError

PREFIX_CACHE = 0xFFFFFFFF  #: owner id for engines whose prefix cache holds references of its own
MAX_NAMED = 8  # bad blocks that one error names

Array = npt.NDArray[Any]
# A block's word: state << 62 | ODD << 61 | step of the last call << 32 | primary owner (of a FREE block: who freed it).
_FREE, _SOLE, _SHARED, _RESERVED = range(4)  # SOLE: one reference, the primary owner's
_ODD = 1 << 61  # the word does not tell the last call: `_odd_calls` does
_STATE_SHIFT, _STEP_MASK, _OWNER_MASK = 62, (1 << 29) - 1, 0xFFFFFFFF
_LIVE = np.uint64(_SOLE << _STATE_SHIFT)  # words from here on are not of FREE blocks
_STATE_AND_OWNER = np.uint64(3 << _STATE_SHIFT | _OWNER_MASK)


class BlockChanges(NamedTuple):
    """What a call changes on the device: operation o (``abi.OP_*``) is done to ids[ends[o - 1]] up to ids[ends[o]].

    Attributes:
        owner: of allocated blocks.
        ids: int[n] blocks, none twice.
        ends: ``abi.N_BLOCK_OPS`` ascending numbers, the last is n.
    """

    owner: int
    ids: Array
    ends: tuple[int, ...]


class BlockCall(NamedTuple):
    """A call on a block: "allocate", "share" or "free", by whom, in which step."""

    kind: str
    owner: int
    step: int

    def __str__(self) -> str:
        return f"{self.kind} by {owner_name(self.owner)} in step {self.step}"


def owner_name(owner: int) -> str:
    """An owner for a reader."""
    return "nobody" if owner == 0 else "the prefix cache" if owner == PREFIX_CACHE else f"request {owner}"


class BlockLedger:
    """Owners of the blocks of one pool.

    A block has a primary owner, who allocated it, and sharers, who took references later; an owner may hold several
    references. A block that nobody holds any more is free, but stays cached: `share` revives it in its old epoch,
    `allocate` begins a new one (epochs are counted on the device). Every call is done for all of its ids or for none.
    Not thread-safe.

    Args:
        n_blocks: blocks of the pool.
        reserved: blocks that nobody may hold.
        name: of the pool, for messages.
    """

    def __init__(self, n_blocks: int, reserved: Sequence[int] = (), name: str = "") -> None:
        self.n_blocks = n_blocks
        self.name = name
        self.n_live = 0  #: blocks that somebody holds
        self._n_reserved = len(set(reserved))
        self._word = np.zeros(n_blocks, np.uint64)
        self._word[list(reserved)] = np.uint64(_RESERVED << _STATE_SHIFT)
        self._mark = np.zeros(n_blocks, np.int32)  # scratch: where in a call's list an id stands
        self._places = np.arange(1024, dtype=np.int32)
        self._sharers: dict[int, dict[int, int]] = {}  # of SHARED blocks: sharer -> references
        self._odd_calls: dict[int, BlockCall] = {}  # the last calls on blocks with an ODD word

    # ---- calls -------------------------------------------------------------------------------------------------------
    def allocate(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Give free (or cached) blocks to a new primary owner, each with a new epoch.

        Args:
            ids: one id, a sequence of them or an integer array; none twice.
            owner: 1 to 2^32 - 1: a request id, or `PREFIX_CACHE`.
            step: for the messages of later errors.

        Raises:
            LifecycleError: bad ids or owner; a block that is reserved, or that somebody holds. Nothing is changed.
        """
        owner, at = self._check("allocate", ids, owner)
        is_held = self._word.take(at) >= _LIVE
        if np.count_nonzero(is_held):
            self._refuse("allocate", owner, at[is_held], self._why_not_allocate)
        self._word[at] = _word_of(_SOLE, owner, step)
        n = len(at)
        self.n_live += n
        return BlockChanges(owner, at, (n, n, n, n, n))

    def share(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Take one more reference on blocks, for an owner who will only read; a free one is revived as it was.

        Raises:
            LifecycleError: bad ids or owner; a reserved block. Nothing is changed.
        """
        owner, at = self._check("share", ids, owner)
        words = self._word.take(at)
        is_reserved = words >> _STATE_SHIFT == _RESERVED
        if np.count_nonzero(is_reserved):
            self._refuse("share", owner, at[is_reserved], self._why_reserved)
        call = BlockCall("share", owner, step)
        for block, word in zip(at.tolist(), words.tolist(), strict=True):
            was_free = word >> _STATE_SHIFT == _FREE
            sharers = self._sharers.setdefault(block, {})
            sharers[owner] = sharers.get(owner, 0) + 1
            self._note(block, _SHARED, 0 if was_free else word & _OWNER_MASK, call)
            self.n_live += was_free
        n = len(at)
        return BlockChanges(owner, at, (0, n, n, n, n))

    def free(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Give back one reference of an owner's on each block: one that it shared, or else its primary ownership.

        Raises:
            LifecycleError: bad ids or owner; a block that the owner does not hold. Nothing is changed.
        """
        owner, at = self._check("free", ids, owner)
        words = self._word.take(at)
        words &= _STATE_AND_OWNER
        is_sole = words == _word_of(_SOLE, owner, 0)
        n = len(at)
        if np.count_nonzero(is_sole) == n:
            self._end_of_sole(at, owner, step)
            return BlockChanges(owner, at, (0, 0, 0, 0, n))
        sole, others = at[is_sole], at[~is_sole]
        strange = [block for block in others.tolist() if owner not in self.owners(block)]
        if strange:
            self._refuse("free", owner, np.array(strange), self._why_not_free)
        parts: list[list[int]] = [[] for _ in range(abi.N_BLOCK_OPS)]
        for block in others.tolist():
            op = self._let_go(block, owner, step)
            if op is not None:
                parts[op].append(block)
        self._end_of_sole(sole, owner, step)
        parts[abi.OP_FREE] += sole.tolist()
        ends = np.cumsum([len(part) for part in parts])
        return BlockChanges(owner, np.array([block for part in parts for block in part], np.intp), tuple(ends.tolist()))

    def _end_of_sole(self, at: Array, owner: int, step: int) -> None:
        self._word[at] = _word_of(_FREE, owner, step)
        self.n_live -= len(at)

    def _let_go(self, block: int, owner: int, step: int) -> int | None:
        """Take one reference from a holder of a SHARED block; returns what that is to the device, None: nothing."""
        primary, sharers = int(self._word[block]) & _OWNER_MASK, self._sharers[block]
        is_primary = owner not in sharers
        if is_primary:
            primary = 0
        elif sharers[owner] > 1:
            sharers[owner] -= 1
        else:
            del sharers[owner]
        if sharers:
            self._note(block, _SHARED, primary, BlockCall("free", owner, step))
            return abi.OP_LEAVE if is_primary else None
        del self._sharers[block]
        if primary:
            self._note(block, _SOLE, primary, BlockCall("free", owner, step))
            return abi.OP_UNSHARE
        self._word[block] = _word_of(_FREE, owner, step)
        self.n_live -= 1
        return abi.OP_FREE

    def _note(self, block: int, state: int, primary: int, call: BlockCall) -> None:
        self._word[block] = _word_of(state, primary, call.step) | _ODD
        self._odd_calls[block] = call

    # ---- what it knows -----------------------------------------------------------------------------------------------
    @property
    def n_shared(self) -> int:
        """Blocks with sharers."""
        return len(self._sharers)

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, cached ones among them; reserved ones do not count."""
        return self.n_blocks - self._n_reserved - self.n_live

    def owners(self, block: int) -> tuple[int, ...]:
        """Who holds a block: the primary owner first, if it still does, then the sharers in order of arrival."""
        word = int(self._word[self._inside(block)])
        primary, sharers = word & _OWNER_MASK, self._sharers.get(block, {})
        if word >> _STATE_SHIFT in (_FREE, _RESERVED):
            return ()
        return (*((primary,) if primary else ()), *(s for s in sharers if s != primary))

    def n_references(self, block: int) -> int:
        """References that all owners of a block hold together."""
        word = int(self._word[self._inside(block)])
        is_live = word >> _STATE_SHIFT in (_SOLE, _SHARED)
        return bool(is_live and word & _OWNER_MASK) + sum(self._sharers.get(block, {}).values())

    def last_call(self, block: int) -> BlockCall | None:
        """The last call on a block; None if there was none."""
        word = int(self._word[self._inside(block)])
        if word & _ODD:
            return self._odd_calls[block]
        state, owner = word >> _STATE_SHIFT, word & _OWNER_MASK
        if state == _RESERVED or not owner:
            return None
        return BlockCall("allocate" if state == _SOLE else "free", owner, word >> 32 & _STEP_MASK)

    def _inside(self, block: int) -> int:
        if not 0 <= block < self.n_blocks:
            raise LifecycleError(f"block {block}{self._where()} {self._why_out_of_range(block, 0)}", (block,))
        return block

    # ---- checks ------------------------------------------------------------------------------------------------------
    def _check(self, kind: str, ids: Any, owner: int) -> tuple[int, Array]:
        """The owner as an int, and the ids as a new intp[n], all of them in range and none twice."""
        try:
            owner = operator.index(owner)
        except TypeError:
            raise LifecycleError(f"{kind}: owner={owner!r}: give a request id, an integer from 1 to 2^32 - 1") from None
        if not 0 < owner <= PREFIX_CACHE:
            hint = "0 means nobody" if owner == 0 else "it must fit 32 bits"
            raise LifecycleError(f"{kind}: owner={owner}: {hint}; give a request id from 1 to 2^32 - 1")
        given = ids if isinstance(ids, np.ndarray) else _array_of(kind, ids)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            shape = f"{given.dtype}{list(given.shape)}"
            raise LifecycleError(
                f"{kind}: ids are {shape}: give one integer, or a list or 1-d array of them on the host"
            )
        # A negative id would count from the end; as an unsigned number it is out of range, as NumPy will find.
        if given.dtype == np.int32:
            at = given.view(np.uint32).astype(np.intp)
        else:
            at = given.astype(np.intp)
            if len(at) and int(at.min()) < 0:
                self._refuse(kind, owner, at[at < 0], self._why_out_of_range)
        n = len(at)
        if n > len(self._places):
            self._places = np.arange(2 * n, dtype=np.int32)
        places = self._places[:n]
        try:
            self._mark[at] = places
        except IndexError:
            self._refuse(kind, owner, given[at >= self.n_blocks], self._why_out_of_range)
        marks = self._mark.take(at)
        if marks.tobytes() != places.tobytes():  # the later of two has left its mark; the cheapest way to compare
            self._refuse(kind, owner, at[marks != places], lambda _block, _owner: "is named twice in this call")
        return owner, at

    def _refuse(self, kind: str, owner: int, blocks: Array, why: Callable[[int, int], str]) -> None:
        named = list(dict.fromkeys(blocks.tolist()))
        texts = [f"block {b} {why(b, owner)}" for b in named[:MAX_NAMED]]
        if len(named) > MAX_NAMED:
            texts.append(f"and {len(named) - MAX_NAMED} more")
        who = owner_name(owner)
        raise LifecycleError(f"{kind} by {who}{self._where()}: {'; '.join(texts)}. Nothing was changed.", named)

    def _where(self) -> str:
        return f" in pool '{self.name}'" if self.name else ""

    def _why_out_of_range(self, _block: int, _owner: int) -> str:
        return f"is out of range: the pool has blocks 0 to {self.n_blocks - 1}"

    def _why_reserved(self, _block: int, _owner: int) -> str:
        return "is reserved: no KV is expected there (see reserved_blocks of the pool)"

    def _why_not_allocate(self, block: int, owner: int) -> str:
        if int(self._word[block]) >> _STATE_SHIFT == _RESERVED:
            return self._why_reserved(block, owner)
        return f"{self._held_by(block)}: it would have two sole owners; free it first, or share it"

    def _why_not_free(self, block: int, owner: int) -> str:
        state, call = int(self._word[block]) >> _STATE_SHIFT, self.last_call(block)
        if state == _RESERVED:
            return self._why_reserved(block, owner)
        if state != _FREE:
            return f"{self._held_by(block)}, not by {owner_name(owner)}: free only what you hold"
        if call is None:
            return "was never allocated"
        return f"is freed twice: nobody holds it (the call before: {call})"

    def _held_by(self, block: int) -> str:
        holders = " and ".join(owner_name(o) for o in self.owners(block))
        return f"is held by {holders} (the call before: {self.last_call(block)})"


def _word_of(state: int, owner: int, step: int) -> int:
    return state << _STATE_SHIFT | (step & _STEP_MASK) << 32 | owner


def _array_of(kind: str, ids: Any) -> Array:
    try:
        at = np.asarray([operator.index(ids)] if hasattr(ids, "__index__") else list(ids))
    except (TypeError, ValueError):
        raise LifecycleError(f"{kind}: ids={ids!r}: give one integer, or a list or 1-d array of them") from None
    return at if at.size else at.astype(np.intp)
