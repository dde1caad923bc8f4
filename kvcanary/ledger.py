"""The host's ledger of block ownership: who holds which block of a pool, and which calls make no sense.

Pure NumPy. It decides what each call means for the device's words (`BlockChanges`), and refuses misuse before anything
is changed anywhere. A call costs some five to twenty passes of NumPy over its ids, whoever shares what: for 1,000 ids 7
to 32 us (bench/bench_ledger.py). Memory: 18 to 36 bytes a block, and 8 to 128 a reference of a sharer's.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcanary import abi
from kvcanary.errors import LifecycleError
from kvcanary.references import NOTHING, References

PREFIX_CACHE = abi.PREFIX_CACHE  #: owner id for engines whose prefix cache holds references of its own
MAX_NAMED = 8  # bad blocks that one error names

Array = npt.NDArray[Any]
# A block is two numbers, side by side, so that a call writes both in one pass over its ids:
# who holds it: references of sharers << 32 | primary owner; 0: nobody does, _RESERVED: nobody may;
# the last call: kind << 62 | step << 32 | owner; 0: there was none.
_SHARER, _OWNER_MASK, _RESERVED = 1 << 32, (1 << 32) - 1, 1 << 63
_KIND_SHIFT, _STEP_SHIFT, _STEP_MASK = 62, 32, (1 << 30) - 1
_KINDS = ("allocate", "share", "free", "claim")
_ALLOCATE, _SHARE, _FREE, _CLAIM = range(4)
_INT32, _UINT32, _INTP, _UINT64 = (np.dtype(t) for t in (np.int32, np.uint32, np.intp, np.uint64))
_NO_IDS = np.zeros(0, _INTP)
_PAIR, _pack_pair = np.dtype((np.void, 16)), struct.Struct("=QQ").pack_into


@dataclass(slots=True)
class BlockChanges:
    """What a call changes on the device: operation o (``abi.OP_*``) is done to ids[ends[o - 1]] up to ids[ends[o]].

    Attributes:
        owner: of allocated blocks.
        ids: int[n] blocks, none twice; not to be changed.
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
        self._blocks = np.zeros(n_blocks, _PAIR)
        self._held, self._calls = self._blocks.view(_UINT64).reshape(n_blocks, 2).T
        self._held[list(reserved)] = _RESERVED
        self._pair = np.zeros((), _PAIR)  # scratch: what a call makes of all its blocks alike
        self._pair_memory = self._pair.reshape(1).view(np.uint8).data
        self._mark = np.zeros(n_blocks, np.uint16)  # scratch: where in a call's list an id stands
        self._places = np.arange(1024, dtype=np.uint16)
        self._places_as_bytes = self._places.tobytes()
        self._marked = _NO_IDS  # ids whose marks stand
        self._references = References(n_blocks)  # the sharers'

    # ---- calls -------------------------------------------------------------------------------------------------------
    def allocate(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Give free (or cached) blocks to a new primary owner, each with a new epoch.

        Args:
            ids: one id, a sequence of them or an integer array; none twice.
            owner: a request id from 1 to 2^32 - 2, or `PREFIX_CACHE`.
            step: for the messages of later errors.

        Raises:
            LifecycleError: bad ids or owner; a block that is reserved, or that somebody holds. Nothing is changed.
        """
        owner, given, at = self._array("allocate", ids, owner)
        self._mark_all("allocate", owner, given, at)  # new blocks seldom were named together before
        n, held = len(at), self._held[at]
        if n and held.item(held.argmax()):
            self._refuse("allocate", owner, at[held > 0], self._why_not_allocate)
        self._write(at, owner, _ALLOCATE, owner, step)
        self.n_live += n
        return BlockChanges(owner, at, (n, n, n, n, n, n))

    def share(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Take one more reference on blocks, for an owner who will only read; a free one is revived as it was.

        Raises:
            LifecycleError: bad ids or owner; a reserved block. Nothing is changed.
        """
        owner, given, at = self._array("share", ids, owner)
        n = len(at)
        if not n:
            return BlockChanges(owner, at, (0, 0, 0, 0, 0, 0))
        if not self._are_marked(at):
            self._mark_all("share", owner, given, at)
        held = self._held[at]
        lowest, highest = _range_of(held)
        if highest >= _RESERVED:
            self._refuse("share", owner, at[held >= _RESERVED], self._why_reserved)
        self._write(at, lowest + _SHARER if lowest == highest else held + _SHARER, _SHARE, owner, step)
        self._references.take(owner, at)
        if not lowest:
            self.n_live += n - int(np.count_nonzero(held))
        if lowest < _SHARER:
            self.n_shared += n if highest < _SHARER else int(np.count_nonzero(held < _SHARER))
        return BlockChanges(owner, at, (0, n, n, n, n, n))

    def free(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Give back one reference of an owner's on each block: one that it shared, or else its primary ownership.

        Raises:
            LifecycleError: bad ids or owner; a block that the owner does not hold. Nothing is changed.
        """
        owner, given, at = self._array("free", ids, owner)
        if not len(at):
            return BlockChanges(owner, at, (0, 0, 0, 0, 0, 0))
        references = self._references
        if references.are_all_of(owner, at):  # named by a call before, so they are in range and none comes twice
            changes = self._end_shares(at, self._held[at], owner, step)
            references.end(owner)
            return changes
        if not self._are_marked(at):
            self._mark_all("free", owner, given, at)
        held, found = self._held[at], references.find(owner, at, self._mark)
        if not found.n:
            return self._end_ownership(at, held, owner, step)
        if found.is_there is None:
            changes = self._end_shares(at, held, owner, step)
        else:
            own, shared = _those(at, ~found.is_there), _those(at, found.is_there)
            changes = self._end_ownership(own, self._held[own], owner, step)  # first: it may refuse
            changes = _both(changes, self._end_shares(shared, self._held[shared], owner, step))
        references.give(owner, at, found)
        return changes

    def claim(self, ids: Any, owner: int, step: int = 0) -> BlockChanges:
        """Make the only holder of blocks their primary owner, who may write them; their epoch goes on.

        For engines that write the last block of a text in place once its reference count is 1. Blocks of which the
        owner is the primary owner and only holder already stay as they are.

        Raises:
            LifecycleError: bad ids or owner; a block that the owner does not hold, or not alone. Nothing is changed.
        """
        owner, given, at = self._array("claim", ids, owner)
        if not self._are_marked(at):
            self._mark_all("claim", owner, given, at)
        held = self._held[at]
        is_lone = held == _SHARER  # by whom?
        lone, found = at[is_lone], NOTHING
        if len(lone):
            self._mark[lone], self._marked = self._places[: len(lone)], lone
            found = self._references.find(owner, lone, self._mark)
            if found.n < len(lone):
                is_lone[is_lone] = found.n > 0 if found.is_there is None else found.is_there
        is_ours = is_lone | (held == owner)
        if np.count_nonzero(is_ours) < len(at):
            self._refuse("claim", owner, at[~is_ours], self._why_not_claim)
        if len(lone):
            self._references.give(owner, lone, found)
            self.n_shared -= len(lone)
        self._write(at, owner, _CLAIM, owner, step)
        return BlockChanges(owner, lone, (0, 0, 0, 0, 0, len(lone)))

    def _end_shares(self, at: Array, held: Array, owner: int, step: int) -> BlockChanges:
        """Take a sharer's reference from each block."""
        n, (lowest, highest) = len(at), _range_of(held)
        left: Any = lowest - _SHARER if lowest == highest else held - _SHARER
        self._write(at, left, _FREE, owner, step)
        if highest == _SHARER:
            changes = BlockChanges(owner, at, (0, 0, 0, 0, n, n))
        elif lowest >= 2 * _SHARER:
            changes = BlockChanges(owner, at[:0], (0, 0, 0, 0, 0, 0))
        elif lowest > _SHARER and highest < 2 * _SHARER:
            changes = BlockChanges(owner, at, (0, 0, 0, n, n, n))
        else:
            is_freed = left == 0
            unshared, freed = _those(at, (left < _SHARER) > is_freed), _those(at, is_freed)
            n_unshared, n_ended = len(unshared), len(unshared) + len(freed)
            ends = (0, 0, 0, n_unshared, n_ended, n_ended)
            changes = BlockChanges(owner, np.concatenate((unshared, freed)), ends)
        _, _, _, n_unshared, n_ended, _ = changes.ends
        self.n_live -= n_ended - n_unshared
        self.n_shared -= n_ended
        return changes

    def _end_ownership(self, at: Array, held: Array, owner: int, step: int) -> BlockChanges:
        """Take the primary owner's reference from each block."""
        n, (lowest, highest) = len(at), _range_of(held)
        is_uniform = lowest == highest
        left: Any = lowest - owner if is_uniform else held - owner
        bits_left = left if is_uniform else int(np.bitwise_or.reduce(left))
        if bits_left & _OWNER_MASK:  # of another owner
            self._refuse("free", owner, at[held & _OWNER_MASK != owner], self._why_not_free)
        self._write(at, left, _FREE, owner, step)
        if highest == owner:
            self.n_live -= n
            return BlockChanges(owner, at, (0, 0, 0, 0, n, n))
        if lowest > owner:
            return BlockChanges(owner, at, (0, 0, n, n, n, n))
        still, freed = _those(at, left > 0), _those(at, left == 0)
        n_left = len(still)
        self.n_live -= n - n_left
        return BlockChanges(owner, np.concatenate((still, freed)), (0, 0, n_left, n_left, n, n))

    def _write(self, at: Array, held: Any, kind: int, owner: int, step: int) -> None:
        """What blocks are from now on. held: an int for all of them, or u64[n]."""
        call = kind << _KIND_SHIFT | (step & _STEP_MASK) << _STEP_SHIFT | owner
        if type(held) is int:
            _pack_pair(self._pair_memory, 0, held, call)
            self._blocks[at] = self._pair
        else:
            pairs = np.empty((len(at), 2), _UINT64)
            pairs[:, 0], pairs[:, 1] = held, call
            self._blocks[at] = pairs.view(_PAIR)[:, 0]

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
        held = int(self._held[self._inside(block)])
        if held in (0, _RESERVED):
            return ()
        primary, sharers = held & _OWNER_MASK, self._references.sharers(block) if held >= _SHARER else []
        return (*((primary,) if primary else ()), *(owner for owner, n in sharers for _ in range(n)))

    def n_references(self, block: int) -> int:
        """References that all owners of a block hold together."""
        held = int(self._held[self._inside(block)])
        return 0 if held == _RESERVED else held // _SHARER + (held & _OWNER_MASK > 0)

    def last_call(self, block: int) -> BlockCall | None:
        """The last call on a block; None if there was none."""
        call = int(self._calls[self._inside(block)])
        if not call:
            return None
        return BlockCall(_KINDS[call >> _KIND_SHIFT], call & _OWNER_MASK, call >> _STEP_SHIFT & _STEP_MASK)

    def _inside(self, block: int) -> int:
        if not hasattr(block, "__index__"):
            raise LifecycleError(f"block {block!r}: give a block id, an integer from 0 to {self.n_blocks - 1}")
        if not 0 <= block < self.n_blocks:
            raise LifecycleError(f"block {block}{self._where()} {self._why_out_of_range(block, 0)}", (block,))
        return block

    # ---- checks ------------------------------------------------------------------------------------------------------
    def _array(self, kind: str, ids: Any, owner: int) -> tuple[int, Array, Array]:
        """The owner as an int, the ids as an array, and as a new intp[n]: of negative ones, numbers out of range."""
        try:
            owner = operator.index(owner)
        except TypeError:
            raise LifecycleError(f"{kind}: owner={owner!r}: give a request id, an integer from 1 to 2^32 - 2") from None
        if not 0 < owner <= PREFIX_CACHE:
            hint = "0 means nobody" if owner == 0 else "it must fit 32 bits"
            raise LifecycleError(f"{kind}: owner={owner}: {hint}; give a request id from 1 to 2^32 - 2")
        given = ids if isinstance(ids, np.ndarray) else _array_of(kind, ids)
        if given.dtype == _INT32 and given.ndim == 1:
            # A negative id would count from the end; as an unsigned number it is out of range, as NumPy will find.
            return owner, given, given.view(_UINT32).astype(_INTP)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            shape = f"{given.dtype}{list(given.shape)}"
            raise LifecycleError(
                f"{kind}: ids are {shape}: give one integer, or a list or 1-d array of them on the host"
            )
        at = given.astype(_INTP)
        if len(at) and int(at.min()) < 0:
            self._refuse(kind, owner, at[at < 0], self._why_out_of_range)
        return owner, given, at

    def _are_marked(self, at: Array) -> bool:
        """Whether a call before has named these ids, in range and none twice, and mark[at[i]] still is i."""
        n = len(at)
        if n == len(self._marked) and at.tobytes() == self._marked.tobytes():
            return True  # the call before, as when blocks are shared with a cache and then freed
        try:
            if self._mark.item(at.item(-1)) != n - 1:
                return False
            is_marked = self._places_as_bytes.startswith(self._mark.take(at).tobytes())  # no two have one mark
        except IndexError:
            return False
        if is_marked:
            self._marked = at
        return is_marked

    def _mark_all(self, kind: str, owner: int, given: Array, at: Array) -> None:
        """Refuse ids that are out of range or come twice; mark[at[i]] is i from here on."""
        n = len(at)
        if n > len(self._places):
            self._places = np.arange(2 * n, dtype=np.min_scalar_type(2 * n))
            self._places_as_bytes = self._places.tobytes()
            self._mark = self._mark.astype(self._places.dtype)
        self._marked = _NO_IDS
        try:
            self._mark[at] = self._places[:n]
        except IndexError:
            self._refuse(kind, owner, given[at >= self.n_blocks], self._why_out_of_range)
        marks = self._mark.take(at)
        if not self._places_as_bytes.startswith(marks.tobytes()):  # the later of two has left its mark
            is_twice = marks != self._places[:n]
            self._refuse(kind, owner, at[is_twice], lambda _block, _owner: "is named twice in this call")
        self._marked = at

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
        if int(self._held[block]) == _RESERVED:
            return self._why_reserved(block, owner)
        return f"{self._held_by(block)}: it would have two sole owners; free it first, or share it"

    def _why_not_free(self, block: int, owner: int) -> str:
        held, call = int(self._held[block]), self.last_call(block)
        if held == _RESERVED:
            return self._why_reserved(block, owner)
        if held:
            return f"{self._held_by(block)}, not by {owner_name(owner)}: free only what you hold"
        if call is None:
            return "was never allocated"
        return f"is freed twice: nobody holds it (the call before: {call})"

    def _why_not_claim(self, block: int, owner: int) -> str:
        if int(self._held[block]) in (0, _RESERVED):
            return self._why_not_free(block, owner)
        n = self.n_references(block)
        return f"{self._held_by(block)}, {n} references: only its one holder can claim it; copy it instead"

    def _held_by(self, block: int) -> str:
        holders = " and ".join(owner_name(o) for o in self.owners(block))
        return f"is held by {holders} (the call before: {self.last_call(block)})"


def _both(own: BlockChanges, shared: BlockChanges) -> BlockChanges:
    """What comes of the ends of ownership and of shares."""
    n_left, n_unshared = own.ends[2], shared.ends[3]
    n_kept, n = n_left + n_unshared, len(own.ids) + len(shared.ids)
    parts = (own.ids[:n_left], shared.ids, own.ids[n_left:])  # left, unshared, freed
    return BlockChanges(own.owner, np.concatenate(parts), (0, 0, n_left, n_kept, n, n))


def _those(at: Array, which: Array) -> Array:
    return at.take(which.nonzero()[0])  # faster than at[which]


def _range_of(numbers: Array) -> tuple[int, int]:
    """The lowest and the highest of at least one."""
    as_bytes = numbers.tobytes()
    if as_bytes.startswith(as_bytes[8:]):  # all the same, as blocks of one past are
        return numbers.item(0), numbers.item(0)
    return numbers.item(numbers.argmin()), numbers.item(numbers.argmax())  # faster than min() and max()


def _array_of(kind: str, ids: Any) -> Array:
    try:
        at = np.asarray([operator.index(ids)] if hasattr(ids, "__index__") else list(ids))
    except (TypeError, ValueError):
        raise LifecycleError(f"{kind}: ids={ids!r}: give one integer, or a list or 1-d array of them") from None
    return at if at.size else at.astype(np.intp)
