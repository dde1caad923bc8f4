"""The calls for KV that changes its place, or comes from elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvcanary import hashing
from kvcanary.backends import Backend
from kvcanary.backends.moves import Move, MoveOp
from kvcanary.bundle import Geometry, SlotBundle
from kvcanary.checks import check_salt
from kvcanary.config import CanaryConfig
from kvcanary.deferred import DelayedDeviceHostHandler
from kvcanary.errors import BatchError, BundleError, CaptureError
from kvcanary.layout import KvPool
from kvcanary.phases import PhaseChecker
from kvcanary.slot_lists import SlotLists, length_of
from kvcanary.turns import Turns, one_at_a_time

Array = npt.NDArray[Any]
_MAX_POSITION = (1 << 31) - 1


class MoveCalls:
    """`CanaryManager`'s part for moves.

    All of these are host-driven: between forwards, never on a stream that is captured; with mode "off" they do nothing.
    They are ordered on ``stream`` (None: that of the current step) and, but for `export_slots`, do not wait for the
    device, except for buffers of their own: when four calls before are still under way, or when a call is larger than
    any before it. Lists of slots are sequences of integers, NumPy arrays, or i32[n] or i64[n] on the guard's device,
    which only the device reads. A slot is one of the pool itself: a ``slot_lut`` is not applied.

    In lists that the host can read, a slot outside the pool, in a reserved block, or given twice as a destination is a
    `BatchError`, and nothing is done. In lists on the device, an entry whose destination is no such slot is skipped,
    one whose source is none leaves its destination never written; both are counted (`CanaryStats.skipped_moves`), and
    of two sources for one destination any may win.
    """

    config: CanaryConfig
    pools: tuple[KvPool, ...]
    max_requests: int
    _backend: Backend | None
    _handlers: list[DelayedDeviceHostHandler]
    _phases: PhaseChecker
    _stream: Any
    _turns: Turns

    if TYPE_CHECKING:

        def _host_driven(self, call: str, stream: Any = None) -> Backend: ...

        def _pool_index(self, pool: str | int) -> int: ...

    # ---- within a pool -----------------------------------------------------------------------------------------------
    @one_at_a_time
    def copy_slots(self, src: Any, dst: Any, *, blocks: bool = False, pool: str | int = 0, stream: Any = None) -> None:
        """Carry stamps and digests of slots whose KV bytes the engine copies: copy-on-write, forks, defragmentation.

        Call it beside the engine's own copy, before or after it on the same stream. What was known of the source is
        then known of the destination, whose bytes are verified by the next forward that reads it: a copy that lost or
        changed bytes is reported, and so is whatever was wrong with the source. A source that was never written leaves
        the destination so; one of a forward that never ended stays unfinished. All sources are read before any
        destination is written, so the lists may overlap: see to it that the copy of the bytes does the same.

        Args:
            src, dst: [n] slots, integers on the host, or i32 or i64 on the guard's device; a source may go to several
                destinations.
            blocks: the lists are of blocks, and all slots of each are carried.
            pool: name or number.
            stream: where it is ordered; None = the stream of the current (or the last) step.

        Raises:
            BatchError: lists of different lengths, or with entries that cannot be (on the device these are skipped and
                counted). ConfigError: no such pool. PhaseError, CaptureError: inside a forward, or a capture.
        """
        if self._backend is None:
            return
        lists = SlotLists("copy_slots()", self.pools[self._pool_index(pool)], blocks)
        sources, slots = lists.slots("src", src), lists.slots("dst", dst, is_target=True)
        lists.check_lengths(src=sources, dst=slots)
        self._move(lists, MoveOp.COPY, pool, stream, slots=slots, sources=sources)

    @one_at_a_time
    def commit_slots(
        self,
        src: Any,
        dst: Any,
        row_starts: Any,
        prefix_lens: Any,
        *,
        request_slots: Any = None,
        pool: str | int = 0,
        stream: Any = None,
    ) -> None:
        """Re-stamp the accepted paths of draft trees.

        To the guard, a tree is a row whose nodes are its new tokens in any order, the root first: it stamps them in the
        slots that the block table gives for the positions behind the prefix, one after the other, and
        ``token_history`` is negative there. After the forward the engine copies the KV of the accepted nodes to their
        home slots; call this beside that copy, in place of `copy_slots`, before the row's next forward. Tokens are
        those that were stamped (wrong ones still differ from the history), chains and positions are those of the path,
        and the digests are taken to the new position by arithmetic, not from the bytes: a copy that went wrong is
        reported by the next forward. The nodes that were rejected stay where they are, to be rewritten.

        The chain goes on from the register of the request. A tree of more than 15 nodes has pushed the prefix out of
        it: then the chain comes from the stamp of the root, which must be the first of the path, and the register
        holds what follows.

        Args:
            src, dst: the accepted nodes' slots and their home slots, row after row, each row from the root on.
            row_starts: [rows + 1]: row r has the entries row_starts[r] to row_starts[r + 1].
            prefix_lens: [rows]: tokens of each row before its first entry: its position.
            request_slots: [rows]; negative = none. Without them the registers are left as the tree wrote them, so that
                the rows' next forwards are reported.
            pool, stream: as in `copy_slots`.

        Raises:
            BatchError: lists that do not fit together, or with entries that cannot be; else as `copy_slots`.
        """
        if self._backend is None:
            return
        lists = SlotLists("commit_slots()", self.pools[self._pool_index(pool)], False)
        sources, slots = lists.slots("src", src), lists.slots("dst", dst, is_target=True)
        lists.check_lengths(src=sources, dst=slots)
        starts = lists.numbers("row_starts", row_starts, 0, length_of(slots))
        prefixes = lists.numbers("prefix_lens", prefix_lens, 0, _MAX_POSITION)
        of = "negative is none, and request slots"
        registers = lists.numbers("request_slots", request_slots, -(1 << 31), self.max_requests - 1, of)
        lists.check_rows(starts, prefixes, registers, length_of(slots))
        self._move(
            *(lists, MoveOp.COMMIT, pool, stream),
            slots=slots, sources=sources, row_starts=starts, prefix_lens=prefixes, request_slots=registers,
        )  # fmt: skip

    # ---- out and in --------------------------------------------------------------------------------------------------
    @one_at_a_time
    def export_slots(self, slots: Any, *, blocks: bool = False, pool: str | int = 0, stream: Any = None) -> SlotBundle:
        """What is known of slots whose KV leaves the pool: offload, prefix stores, transfers to another engine.

        Waits for the device. Send the bundle (`SlotBundle.to_bytes`) with the KV and give it to `import_slots` where
        the KV arrives; it holds token ids, which are user content. An engine that copies arrays layer by layer may take
        `shadow_arrays` along instead, without waiting. With mode "off" the bundle is empty.

        Args:
            slots: [n], as in `copy_slots`, as are ``blocks``, ``pool`` and ``stream``.

        Returns:
            The bundle, with an entry for each slot, in the order of the list.

        Raises:
            BatchError: slots that cannot be; else as `copy_slots`.
        """
        if self._backend is None:
            return SlotBundle.of_nothing()
        kv = self.pools[self._pool_index(pool)]
        lists = SlotLists("export_slots()", kv, blocks)
        image = self._move(lists, MoveOp.EXPORT, pool, stream, slots=lists.slots("slots", slots))
        return SlotBundle.from_image(Geometry.of(kv, self.config.real_data), image)

    @one_at_a_time
    def import_slots(
        self, bundle: SlotBundle, slots: Any, *, blocks: bool = False, pool: str | int = 0, stream: Any = None
    ) -> None:
        """Take over what an exporter knew of KV that arrives in ``slots``, one per entry of the bundle.

        Digests are those of the bytes that were written at the source: what was lost or changed on the way is reported
        by the first forward that reads it. Entries that were not whole leave their slots never written. It does not
        matter whether the bytes arrive before or after this call, but they must be there before a forward reads them.

        Args:
            slots: [n], each once; as in `copy_slots`, as are ``blocks``, ``pool`` and ``stream``.

        Raises:
            BundleError: the bundle comes from another kind of cache, or from a guard that is off: then nothing is known
                of the KV, and `adopt_slots` is for it. BatchError: slots that cannot be, or not one per entry; else as
                `copy_slots`.
        """
        if self._backend is None:
            return
        kv = self.pools[self._pool_index(pool)]
        if not isinstance(bundle, SlotBundle):
            given = type(bundle).__name__
            raise BundleError(f"import_slots(): {given} is no SlotBundle: make it one with SlotBundle.from_bytes()")
        lists = SlotLists("import_slots()", kv, blocks)
        if not bundle.geometry.halves:
            raise BundleError("the bundle was exported with mode='off' and is empty: stamp with adopt_slots() instead")
        if text := bundle.geometry.difference(Geometry.of(kv, self.config.real_data)):
            raise BundleError(
                f"the bundle does not fit pool {kv.name!r}: {text}; both sides need the same layers and real_data"
            )
        taken = lists.slots("slots", slots, is_target=True)
        n = length_of(taken) * lists.per_entry
        if n != len(bundle):
            raise BatchError(f"import_slots(): {n} slots for a bundle of {len(bundle)}: give one per entry")
        self._move(lists, MoveOp.IMPORT, pool, stream, slots=taken, image=bundle.to_image())

    # ---- in place ----------------------------------------------------------------------------------------------------
    @one_at_a_time
    def refresh_digests(self, slots: Any, *, blocks: bool = False, pool: str | int = 0, stream: Any = None) -> None:
        """Digest anew what lies in slots whose bytes were changed on purpose (re-quantised, rotated, zero-filled).

        Whatever else is wrong with the bytes is accepted with it. Stamps stay; a slot whose stamps are not whole keeps
        its digests and is counted (`CanaryStats.skipped_moves`). Arguments and errors are those of `copy_slots`.
        """
        if self._backend is not None:
            lists = SlotLists("refresh_digests()", self.pools[self._pool_index(pool)], blocks)
            self._move(lists, MoveOp.REFRESH, pool, stream, slots=lists.slots("slots", slots, is_target=True))

    @one_at_a_time
    def adopt_slots(
        self,
        slots: Any,
        positions: Any,
        *,
        tokens: Any = None,
        salt: int = 0,
        pool: str | int = 0,
        stream: Any = None,
    ) -> None:
        """Stamp and digest the KV that lies in ``slots``, of which nobody knows anything: loaded without a bundle.

        From here on it is guarded; what was wrong before is not seen. The bytes must be there (on ``stream``).

        Args:
            slots: [n], as in `copy_slots`; each once.
            positions: [n] of each slot, in the KV sequence.
            tokens: [n] of each slot; negative = unknown: then only the position is judged. Neighbouring entries with
                the positions 0, 1, 2 ... whose tokens are all known also get their chain; any other known token is
                judged, but not what it continues.
            salt: of the request, for the chain, 0 to 2^64 - 1.
            pool, stream: as in `copy_slots`.

        Raises:
            BatchError: lists of different lengths, or with entries that cannot be; else as `copy_slots`.
        """
        if self._backend is None:
            return
        lists = SlotLists("adopt_slots()", self.pools[self._pool_index(pool)], False)
        taken = lists.slots("slots", slots, is_target=True)
        if positions is None:
            raise BatchError("adopt_slots(): positions is None: give the position of each slot in the KV sequence")
        salt = check_salt("adopt_slots()", salt)
        at = lists.numbers("positions", positions, 0, _MAX_POSITION)
        known = lists.numbers("tokens", tokens, -(1 << 31), _MAX_POSITION)
        lists.check_lengths(slots=taken, positions=at, tokens=known)
        chains = None
        if isinstance(at, np.ndarray) and isinstance(known, np.ndarray):
            chains = _chains_from_zero(at, known, salt)
        self._move(lists, MoveOp.ADOPT, pool, stream, slots=taken, positions=at, tokens=known, chains=chains)

    @one_at_a_time
    def localize_slots(
        self,
        slots: Any,
        *,
        has_digests: bool = True,
        blocks: bool = False,
        pool: str | int = 0,
        stream: Any = None,
    ) -> None:
        """Make stamps this guard's own that the engine has copied into `shadow_arrays` as if they were layers.

        Call it once they have all arrived, before a forward reads the slots. Stamps of which a part did not arrive are
        unfinished, and reported as such.

        Args:
            has_digests: whether the DIGEST arrays were copied as well. If not, the digests that the slots had before
                are dropped: nothing is known of the bytes then (`refresh_digests` would accept them as they are).
            slots, blocks, pool, stream: as in `copy_slots`.

        Raises:
            BatchError: slots that cannot be; else as `copy_slots`.
        """
        if self._backend is not None:
            lists = SlotLists("localize_slots()", self.pools[self._pool_index(pool)], blocks)
            taken = lists.slots("slots", slots, is_target=True)
            self._move(lists, MoveOp.LOCALIZE, pool, stream, slots=taken, drops_digests=not has_digests)

    def shadow_arrays(self, pool: str | int = 0) -> dict[str, Any]:
        """The guard's own arrays of a pool, for an engine to copy or send as if they were layers; {} with mode "off".

        Never a copy: NumPy arrays of the host backend, CuPy arrays on a GPU. HEAD_K, TAIL_K and, with a V half, HEAD_V
        and TAIL_V are u8[n_slots, 32]; DIGEST_0, DIGEST_1 ... (a row each, which only together with the stamps make
        sense) are u64[n_slots]. Copy them to slots of a pool of the same geometry, after `forward` has exited, then
        call `localize_slots`. Stamps hold token ids, which are user content.
        """
        if self._backend is None:
            return {}
        self._phases.need_open("shadow_arrays()")
        return self._backend.shadow_arrays(self._pool_index(pool))

    # ---- common ------------------------------------------------------------------------------------------------------
    def _move(self, lists: SlotLists, op: MoveOp, pool: str | int, stream: Any, **values: Any) -> Any:
        backend = self._host_driven(lists.call)
        stream = self._stream if stream is None else stream
        if self._handlers and self._handlers[0].is_capturing(stream):
            raise CaptureError(f"{lists.call} came with a stream that is being captured: call it outside the capture")
        n = length_of(values["slots"]) * lists.per_entry
        if not n and op is not MoveOp.EXPORT:
            return None
        given = {k: lists.in_one_width(v) if k != "chains" else v for k, v in values.items()}
        index, is_wide = self._pool_index(pool), lists.is_wide
        return backend.move(Move(op=op, pool=index, n=n, per_entry=lists.per_entry, is_wide=is_wide, **given), stream)


def _chains_from_zero(positions: Array, tokens: Array, salt: int) -> Array:
    """chain of each entry, where a run of neighbours begins at position 0 and all tokens are known; else 0."""
    chains = np.zeros(len(positions), np.uint64)
    breaks = np.flatnonzero((np.diff(positions) != 1) | (tokens[1:] < 0)) + 1
    for start, end in zip([0, *breaks], [*breaks, len(positions)], strict=True):
        if start < end and positions[start] == 0 and tokens[start] >= 0:
            chains[start:end] = hashing.chain_scan(hashing.prefix_chain([], salt), tokens[start:end], 0)
    return chains
