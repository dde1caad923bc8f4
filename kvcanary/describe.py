"""describe() and estimate_bytes(): what the guard costs and what it can see, in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kvcanary import abi
from kvcanary.config import CanaryConfig
from kvcanary.history import NarrowHistory
from kvcanary.layout import KvPool
from kvcanary.patrol import Patrol, plan_patrol
from kvcanary.perturb_spec import parse_faults
from kvcanary.reserved import checked_planes
from kvcanary.state import CounterLayout


def pool_bytes(config: CanaryConfig, pool: KvPool, max_requests: int) -> int:
    """Memory that the guard takes for one pool, in bytes."""
    n_digests = len(pool.digest_units(config.real_data))
    per_slot = 2 * len(pool.halves) * abi.STAMP.itemsize + 8 + 8 * n_digests
    per_request = abi.REGISTER.itemsize + 8 + abi.ROW.itemsize + 8 * abi.N_WORK
    tables = len(pool.planes) * abi.PLANE.itemsize + n_digests * abi.DIGEST.itemsize
    capacity = abi.due_capacity(pool.n_slots, n_digests, config.verify_data_every)
    due = (capacity + 1) * abi.DUE.itemsize if capacity else 0
    blocks = pool.n_blocks * abi.BLOCK_STATE.itemsize if config.lifecycle else 0
    floats = len(checked_planes(config, pool)) * abi.FLOAT_PLANE.itemsize
    return pool.n_slots * per_slot + max_requests * per_request + tables + due + blocks + floats


def estimate_bytes(config: CanaryConfig, pools: Sequence[KvPool], max_requests: int) -> int:
    """Device and pinned memory of a manager of these pools, in bytes (allocators may round up)."""
    if config.mode == "off":
        return 0
    state = 8 * CounterLayout(len(pools)).n_words + 4 * max_requests + len(pools) * abi.POOL_STATE.itemsize
    ring = (config.ring_capacity + 1) * abi.VIOLATION.itemsize + 8 * abi.N_CONTROL_WORDS
    return sum(pool_bytes(config, p, max_requests) for p in pools) + state + ring


def _drill_lines(config: CanaryConfig) -> list[str]:
    """What is damaged on purpose."""
    if config.perturb is None:
        return []
    faults = "; ".join(str(fault) for fault in parse_faults(config.perturb))
    return [f"FAULT DRILL ARMED, the engine's memory is damaged on purpose: {faults}"]


# Reason -> (inputs it needs, what is not seen without them).
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "TOKEN": (("token_history",), "a slot that holds another token than the request's history (a kept rejected draft)"),
    "WRITE_TOKEN": (("expected_tokens",), "an input id that is not the one the scheduler meant"),
    "CHAIN anchored outside the cache": (
        ("request_slots", "request_ids"),
        "a whole, consistent substitution of a row by another request's blocks (rows are unanchored)",
    ),
}
_OWNERSHIP = "STALE_EPOCH, FOREIGN_WRITE (lifecycle=False): use of a block after it was freed, or of another's block"
_NO_READER = "FOREIGN_WRITE, and STALE_EPOCH by who reads (no request_ids): nobody can tell whose a row is"
_UNCHECKED = "NONFINITE_RESERVED ({}): NaN and Inf in a reserved block, which padding and unused table entries spread"


def describe_pools(
    config: CanaryConfig,
    pools: Sequence[KvPool],
    max_requests: int,
    inputs: Collection[str] | None,
    blocks: Sequence[tuple[int, int, int]] = (),
    narrow: NarrowHistory | None = None,
) -> str:
    """What is guarded, at which cost, and what is off for lack of which input (None: no batch yet).

    Args:
        blocks: with lifecycle, (live, shared, free) of each pool.
        narrow: a token history that ends before the table.
    """
    if config.mode == "off":
        return "kvcanary is off (mode='off'): nothing is allocated, launched or checked"
    lines = [f"kvcanary: mode {config.mode}, real data {config.real_data}, {max_requests} requests"]
    if config.overlap_head and any((pool.device or "").startswith("cuda") for pool in pools):
        lines[0] += ", HEAD beside the model"
    patrols = plan_patrol(config, pools)
    for i, pool in enumerate(pools):
        lines += _pool_lines(config, pool, max_requests, blocks[i] if blocks else None)
        lines += _patrol_lines(patrols[i]) + _reserved_lines(config, pool)
    on = ["CHAIN", "POSITION", "UNWRITTEN", "OUT_OF_RANGE", "DUPLICATE_WRITE"]
    if config.check_write_position:
        on.append("WRITE_POSITION")
    else:
        lines.append("off: WRITE_POSITION (check_write_position=False): a write that strays from the block table")
    if config.lifecycle:
        has_ids = inputs is None or "request_ids" in inputs
        on += ["STALE_EPOCH", "FOREIGN_WRITE"] if has_ids else ["STALE_EPOCH by the stamps' epochs alone"]
        lines += [] if has_ids else [f"off: {_NO_READER}"]
    else:
        lines.append(f"off: {_OWNERSHIP}")
    of_inputs, on_by_inputs = _by_inputs(inputs, narrow)
    lines, on = lines + of_inputs, on + on_by_inputs
    if any(checked_planes(config, pool) for pool in pools):
        on.append("NONFINITE_RESERVED")
    else:
        why = "no reserved block in a plane of floats" if config.check_reserved_every else "check_reserved_every=0"
        lines.append(f"off: {_UNCHECKED.format(why)}")
    return "\n".join([*_drill_lines(config), *lines, f"on: {', '.join(on)}"])


def _by_inputs(inputs: Collection[str] | None, narrow: NarrowHistory | None) -> tuple[list[str], list[str]]:
    """Lines on what is off or weaker for lack of which input, and the reasons that the given ones turn on."""
    if inputs is None:
        return ["no batch was seen yet: run a forward to see which inputs are given"], []
    lines, on = [], []
    for reason, (needs, loss) in _NEEDS.items():
        missing = [n for n in needs if n not in inputs]
        if missing:
            lines.append(f"off: {reason} (no {', no '.join(missing)}): {loss}")
        else:
            on.append(f"TOKEN below position {narrow.end}" if narrow and reason == "TOKEN" else reason)
    if narrow is not None:
        lines.append(f"weaker: {narrow}")
    if not {"token_history", "prefix_chain"} & set(inputs):
        lines.append(
            "weaker: CHAIN after a same-forward hit or an adopted prefix (no token_history, no prefix_chain): "
            "judged only between slots of which one was written as the continuation of the other"
        )
    return lines, on


def _patrol_lines(patrol: Patrol) -> list[str]:
    if not patrol.n_blocks:
        return []
    pace = f"{patrol.n_blocks} blocks a step with a forward, at most {patrol.n_bytes} bytes"
    return [f"  patrol: {pace}; a full pass every {patrol.n_turns} such steps"]


def _reserved_lines(config: CanaryConfig, pool: KvPool) -> list[str]:
    """Which planes are looked through for NaN and Inf, and which are not."""
    if not config.check_reserved_every or not pool.reserved_blocks or not pool.planes:
        return []
    checked = [plane for _, plane in checked_planes(config, pool)]
    types = sorted({plane.element.name for plane in checked if plane.element})
    which = f"{len(checked)} of {len(pool.planes)} planes" + (f" ({', '.join(types)})" if types else "")
    blocks = ", ".join(map(str, pool.reserved_blocks))
    lines = [
        f"  reserved blocks {blocks}: looked through for NaN and Inf every {config.check_reserved_every} steps, {which}"
    ]
    others = sorted({p.dtype or p.view.dtype or "unknown" for p in pool.planes if p.element is None})
    if others:
        n = len(pool.planes) - len(checked)
        lines.append(f"  off: NaN and Inf in {n} planes of type {', '.join(others)}: give dtype= if they hold floats")
    return lines


def _pool_lines(
    config: CanaryConfig, pool: KvPool, max_requests: int, blocks: tuple[int, int, int] | None
) -> list[str]:
    memory, n_digests = pool_bytes(config, pool, max_requests), len(pool.digest_units(config.real_data))
    kv = pool.bytes_per_slot * pool.n_slots
    window = f", window {pool.window}" if pool.window else ""
    window += f" in a ring of {pool.ring_length}" if pool.ring_length else ""
    window += f" beside {pool.sink} sinks" if pool.sink else ""
    data = f", and on average 1/{config.verify_data_every} of its KV bytes" if n_digests else ""
    share = f" ({memory / kv:.2%} of the KV bytes)" if kv else ""
    lines = [
        f"pool {pool.name!r} ({pool.kind.name}{window}): {pool.n_slots} slots in pages of {pool.page_size}",
        f"  guards: {pool.bytes_per_slot} KV bytes a slot in {len(pool.planes)} planes, {n_digests} digests",
        f"  memory: {memory} bytes{share}",
        f"  reads a forward, per prefix slot: {2 * len(pool.halves) * abi.STAMP.itemsize} bytes of stamps{data}",
    ]
    if blocks is not None:
        live, shared, free = blocks
        lines.append(f"  blocks: {live} held, {shared} of them shared, {free} free or cached")
    if pool.may_alias:
        lines.append("  shares memory with other pools: bytes are judged as long as somebody holds the block")
    if not n_digests:
        lines.append("  off: DATA (real_data='none', or no planes): damaged bytes are not seen")
    return lines
