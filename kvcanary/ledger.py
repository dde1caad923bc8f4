"""The host's ledger of block ownership: who holds which block of a pool, and which calls make no sense.

Pure NumPy. It decides what each call means for the device's words (`BlockChanges`), and refuses misuse before anything
is changed anywhere. A call costs some ten to twenty passes of NumPy over its ids, whoever shares what: for 1,000 ids 8
to 31 us (bench/bench_ledger.py). Memory: 20 to 36 bytes a block, and 8 to 128 a reference of a sharer's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary.errors import LifecycleError
from kvcanary.references import NOTHING, Found, References

PREFIX_CACHE = 0xFFFFFFFF  #: owner id for engines whose prefix cache holds references of its own
MAX_NAMED = 8  # bad blocks that one error names

Array = npt.NDArray[Any]
# A block's word: state << 62 | ODD << 61 | step of the last call << 32 | primary owner (of a FREE block: who freed it).
# Words of SHARED blocks are ODD, and have the number of references besides the primary's in place of the step.
_FREE, _SOLE, _SHARED, _RESERVED = range(4)  # SOLE: one reference, the primary owner's
_ODD = 1 << 61  # the word does not tell the last call: `_calls` does
_STATE_SHIFT, _COUNT_SHIFT, _STEP_MASK, _OWNER_MASK = 62, 32, (1 << 29) - 1, 0xFFFFFFFF
_LIVE = np.uint64(_SOLE << _STATE_SHIFT)  # words from here on are not of FREE blocks
_SHARED_BY_NONE = np.uint64(_SHARED << _STATE_SHIFT | _ODD)
_ONE_SHARER = np.uint64(1 << _COUNT_SHIFT)
_SHARED_BY_ONE = _SHARED_BY_NONE | _ONE_SHARER
_SHARED_BY_TWO = _SHARED_BY_ONE + _ONE_SHARER
_SHARED_BY_ONE_TO_SOLE = _ONE_SHARER + np.uint64((_SHARED - _SOLE) << _STATE_SHIFT)
_OWNER = np.uint64(_OWNER_MASK)
_STATE_AND_OWNER = np.uint64(3 << _STATE_SHIFT | _OWNER_MASK)
_KINDS = ("allocate", "share", "free", "claim")  # a call's word: kind << 62 | step << 32 | owner
_BY_SHARE, _BY_FREE, _BY_CLAIM = 1, 2, 3


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
    """A call on a block: "allocate", "share", "free" or "claim", by whom, in which step."""

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
        self.n_shared = 0  #: blocks with sharers
        self._n_reserved = len(set(reserved))
        self._word = np.zeros(n_blocks, np.uint64)
        self._word[list(reserved)] = np.uint64(_RESERVED << _STATE_SHIFT)
        self._mark = np.zeros(n_blocks, np.int32)  # scratch: where in a call's list an id stands
        self._places = np.arange(1024, dtype=np.int32)
        self._references = References(n_blocks)  # the sharers'
        self._calls = np.zeros(n_blocks, np.uint64)  # the last calls on blocks with an ODD word

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
        n, words = len(at), self._word.take(at)
        if n and words.item(words.argmax()) >= _LIVE:
            self._refuse("allocate", owner, at[words >= _LIVE], self._why_not_allocate)
        self._word[at] = _word_of(_SOLE, owner, step)
        self.n_live += n
        return BlockChanges(owner, at, (n, n, n, n, n, n))

    def share(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Take one more reference on blocks, for an owner who will only read; a free one is revived as it was.

        Raises:
            LifecycleError: bad ids or owner; a reserved block. Nothing is changed.
        """
        owner, at = self._check("share", ids, owner)
        n = len(at)
        if not n:
            return BlockChanges(owner, at, (0, 0, 0, 0, 0, 0))
        words = self._word.take(at)
        lowest, highest = _range_of(words)
        if highest >> _STATE_SHIFT == _RESERVED:
            self._refuse("share", owner, at[words >> _STATE_SHIFT == _RESERVED], self._why_reserved)
        if lowest >= _SHARED_BY_NONE:
            self._word[at] = words + _ONE_SHARER
        elif highest < _LIVE:
            self._word[at] = _SHARED_BY_ONE
            self.n_live += n
            self.n_shared += n
        elif lowest == highest:
            self._word[at] = _SHARED_BY_ONE | np.uint64(lowest & _OWNER_MASK)
            self.n_shared += n
        else:
            self._word[at] = self._shared_once_more(words, lowest, highest)
        self._calls[at] = _word_of(_BY_SHARE, owner, step)
        self._references.take(owner, at)
        return BlockChanges(owner, at, (0, n, n, n, n, n))

    def _shared_once_more(self, words: Array, lowest: int, highest: int) -> Array:
        """New words of FREE, SOLE and SHARED blocks."""
        n = n_unshared = len(words)
        new = words & _OWNER
        if lowest < _LIVE:
            is_live = words >= _LIVE
            self.n_live += n - int(np.count_nonzero(is_live))
            new *= is_live  # who freed a block is not its primary owner
        new |= _SHARED_BY_ONE
        if highest >= _SHARED_BY_NONE:
            is_shared = words >= _SHARED_BY_NONE
            n_unshared -= int(np.count_nonzero(is_shared))
            words += _ONE_SHARER
            new = np.where(is_shared, words, new)
        self.n_shared += n_unshared
        return new

    def free(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Give back one reference of an owner's on each block: one that it shared, or else its primary ownership.

        Raises:
            LifecycleError: bad ids or owner; a block that the owner does not hold. Nothing is changed.
        """
        owner, at = self._check("free", ids, owner)
        n, words = len(at), self._word.take(at)
        if not n:
            return BlockChanges(owner, at, (0, 0, 0, 0, 0, 0))
        found = self._references.find(owner, at, self._mark)
        if found.n == n:
            unshared, freed = self._end_of_shares(at, words, owner, step)
            self._references.give(owner, at, found)
            return _changes(owner, at[:0], unshared, freed)
        left, shared, sole = self._by_way_of_holding(at, words, owner, found)
        self._end_of_sole(sole, owner, step)
        if len(sole) == n:
            return BlockChanges(owner, at, (0, 0, 0, 0, n, n))
        if len(left):
            self._word[left] = (words if len(left) == n else self._word.take(left)) - np.uint64(owner)
            self._calls[left] = _word_of(_BY_FREE, owner, step)
            if len(left) == n:
                return BlockChanges(owner, at, (0, 0, n, n, n, n))
        if not found.n:
            return _changes(owner, left, at[:0], sole)
        unshared, freed = self._end_of_shares(shared, self._word.take(shared), owner, step)
        self._references.give(owner, at, found)
        return _changes(owner, left, unshared, sole if not len(freed) else np.concatenate((freed, sole)))

    def claim(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Make the only holder of blocks their primary owner, who may write them; their epoch goes on.

        For engines that write the last block of a text in place once its reference count is 1. Blocks of which the
        owner is the primary owner and only holder already stay as they are.

        Raises:
            LifecycleError: bad ids or owner; a block that the owner does not hold, or not alone. Nothing is changed.
        """
        owner, at = self._check("claim", ids, owner)
        words = self._word.take(at)
        is_sole = words & _STATE_AND_OWNER == _word_of(_SOLE, owner, 0)
        is_lone = words == _SHARED_BY_ONE  # by whom?
        lone, found = at[is_lone], NOTHING
        if len(lone):
            self._mark[lone] = self._places[: len(lone)]
            found = self._references.find(owner, lone, self._mark)
            if found.n < len(lone):
                is_lone[is_lone] = found.n > 0 if found.is_there is None else found.is_there
        is_ours = is_sole | is_lone
        if np.count_nonzero(is_ours) < len(at):
            self._refuse("claim", owner, at[~is_ours], self._why_not_claim)
        if len(lone):
            self._references.give(owner, lone, found)
            self.n_shared -= len(lone)
        self._word[at] = _word_of(_SOLE, owner, step) | _ODD
        self._calls[at] = _word_of(_BY_CLAIM, owner, step)
        return BlockChanges(owner, lone, (0, 0, 0, 0, 0, len(lone)))

    def _by_way_of_holding(self, at: Array, words: Array, owner: int, found: Found) -> tuple[Array, Array, Array]:
        """Blocks that others share and the owner does not, those that it shares, those that it alone holds."""
        none = at[:0]
        if not found.n and _is_uniform(words):
            word = words.item(0) & int(_STATE_AND_OWNER)
            if word == _word_of(_SOLE, owner, 0):
                return none, none, at
            if word == _word_of(_SHARED, owner, 0):
                return at, none, none
        mine = words & _STATE_AND_OWNER
        is_sole = mine == _word_of(_SOLE, owner, 0)
        n_sole = int(np.count_nonzero(is_sole))
        n_left = len(at) - n_sole - found.n  # if it holds them all
        left = none
        if n_left:
            is_left = mine == _word_of(_SHARED, owner, 0)
            if found.is_there is not None:
                is_left = is_left > found.is_there
            if np.count_nonzero(is_left) < n_left:
                is_held = is_sole | is_left if found.is_there is None else is_sole | is_left | found.is_there
                self._refuse("free", owner, at[~is_held], self._why_not_free)
            left = _those(at, is_left, n_left)
        shared = none if found.is_there is None else _those(at, found.is_there, found.n)
        return left, shared, _those(at, is_sole, n_sole)

    def _end_of_sole(self, at: Array, owner: int, step: int) -> None:
        self._word[at] = _word_of(_FREE, owner, step)
        self.n_live -= len(at)

    def _end_of_shares(self, at: Array, words: Array, owner: int, step: int) -> tuple[Array, Array]:
        """One sharer's reference less to SHARED blocks: those that only their primary owner holds now, and nobody."""
        none = at[:0]
        lowest, highest = _range_of(words)
        if highest == _SHARED_BY_ONE:
            self._end_of_sole(at, owner, step)
            self.n_shared -= len(at)
            return none, at
        self._calls[at] = _word_of(_BY_FREE, owner, step)
        if lowest >= _SHARED_BY_TWO:
            self._word[at] = words - _ONE_SHARER
            return none, none
        if lowest > _SHARED_BY_ONE and highest < _SHARED_BY_TWO:
            self._word[at] = words - _SHARED_BY_ONE_TO_SOLE
            self.n_shared -= len(at)
            return at, none
        is_freed, is_shared = words == _SHARED_BY_ONE, words >= _SHARED_BY_TWO
        shared, freed, unshared = (at.take(of.nonzero()[0]) for of in (is_shared, is_freed, ~(is_shared | is_freed)))
        self._word[shared] = self._word.take(shared) - _ONE_SHARER
        self._word[unshared] = self._word.take(unshared) - _SHARED_BY_ONE_TO_SOLE
        self._end_of_sole(freed, owner, step)
        self.n_shared -= len(at) - len(shared)
        return unshared, freed

    # ---- what it knows -----------------------------------------------------------------------------------------------
    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, cached ones among them; reserved ones do not count."""
        return self.n_blocks - self._n_reserved - self.n_live

    def owners(self, block: int) -> tuple[int, ...]:
        """Who holds a block: the primary owner first, if it still does, then the sharers in order of arrival."""
        return tuple(dict.fromkeys(self.holders(block)))

    def holders(self, block: int) -> tuple[int, ...]:
        """The owners of a block, each as often as it holds a reference. Looks through all references of the pool."""
        word = int(self._word[self._inside(block)])
        primary, state = word & _OWNER_MASK, word >> _STATE_SHIFT
        if state in (_FREE, _RESERVED):
            return ()
        sharers = self._references.sharers(block) if state == _SHARED else []
        return (*((primary,) if primary else ()), *(owner for owner, n in sharers for _ in range(n)))

    def n_references(self, block: int) -> int:
        """References that all owners of a block hold together."""
        word = int(self._word[self._inside(block)])
        state, n_sharers = word >> _STATE_SHIFT, word >> _COUNT_SHIFT & _STEP_MASK
        return (state in (_SOLE, _SHARED) and word & _OWNER_MASK > 0) + (n_sharers if state == _SHARED else 0)

    def last_call(self, block: int) -> BlockCall | None:
        """The last call on a block; None if there was none."""
        word = int(self._word[self._inside(block)])
        if word & _ODD:
            call = int(self._calls[block])
            return BlockCall(_KINDS[call >> _STATE_SHIFT], call & _OWNER_MASK, call >> _COUNT_SHIFT & _STEP_MASK)
        state, owner = word >> _STATE_SHIFT, word & _OWNER_MASK
        if state == _RESERVED or not owner:
            return None
        return BlockCall("allocate" if state == _SOLE else "free", owner, word >> 32 & _STEP_MASK)

    def _inside(self, block: int) -> int:
        if not hasattr(block, "__index__"):
            raise LifecycleError(f"block {block!r}: give a block id, an integer from 0 to {self.n_blocks - 1}")
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
            if not n or (self._mark.item(at.item(-1)) == n - 1 and _is_same(self._mark.take(at), places)):
                return owner, at  # as an earlier call left them: no two have one mark
            self._mark[at] = places
        except IndexError:
            self._refuse(kind, owner, given[at >= self.n_blocks], self._why_out_of_range)
        marks = self._mark.take(at)
        if not _is_same(marks, places):  # the later of two has left its mark
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

    def _why_not_claim(self, block: int, owner: int) -> str:
        if int(self._word[block]) >> _STATE_SHIFT in (_FREE, _RESERVED):
            return self._why_not_free(block, owner)
        n = self.n_references(block)
        return f"{self._held_by(block)}, {n} references: only its one holder can claim it; copy it instead"

    def _held_by(self, block: int) -> str:
        holders = " and ".join(owner_name(o) for o in self.owners(block))
        return f"is held by {holders} (the call before: {self.last_call(block)})"


def _word_of(state: int, owner: int, step: int) -> int:
    return state << _STATE_SHIFT | (step & _STEP_MASK) << 32 | owner


def _changes(owner: int, left: Array, unshared: Array, freed: Array) -> BlockChanges:
    n_left, n_unshared, n = len(left), len(unshared), len(left) + len(unshared) + len(freed)
    if n_left + n_unshared == 0:
        ids = freed
    elif n == n_unshared:
        ids = unshared
    else:
        ids = np.concatenate((left, unshared, freed))
    return BlockChanges(owner, ids, (0, 0, n_left, n_left + n_unshared, n, n))


def _those(at: Array, which: Array, n: int) -> Array:
    return at if n == len(at) else at.take(which.nonzero()[0]) if n else at[:0]


def _range_of(words: Array) -> tuple[int, int]:
    if _is_uniform(words):
        return words.item(0), words.item(0)
    return words.item(words.argmin()), words.item(words.argmax())  # which NumPy finds faster than min() and max()


def _is_same(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()  # the cheapest way to compare


def _is_uniform(words: Array) -> bool:
    """Whether all are the same: blocks of one past, as often."""
    return bool(words.item(0) == words.item(-1)) and words.tobytes() == words[:1].tobytes() * len(words)


def _array_of(kind: str, ids: Any) -> Array:
    try:
        at = np.asarray([operator.index(ids)] if hasattr(ids, "__index__") else list(ids))
    except (TypeError, ValueError):
        raise LifecycleError(f"{kind}: ids={ids!r}: give one integer, or a list or 1-d array of them") from None
    return at if at.size else at.astype(np.intp)
