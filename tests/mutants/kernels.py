"""Bugs in the kernels, by file. The tests named are the narrowest that are enough to kill each."""

from __future__ import annotations

from .mutant import Mutant

AGREE, CATCH, MUSEUM = (f"tests/test_kernels_{name}.py" for name in ("agree", "catch", "museum"))
SHAPES, RESERVED, SCRUB = (f"tests/test_kernels_{name}.py" for name in ("shapes", "reserved", "scrub"))
OWNERSHIP = " ".join(f"tests/test_kernels_{name}.py" for name in ("ownership", "ownership_legal", "blocks"))
MOVES = " ".join(
    f"tests/test_{n}.py" for n in ("moves", "moves_lists", "moves_trees", "moves_museum", "kernels_limits")
)
MODEL, OVERFLOW = "tests/test_interleavings.py", "tests/test_overflow.py"
HONEST = "tests/test_kernels_honest.py"
LIMITS, RENUMBER = "tests/test_kernels_limits.py", "tests/test_renumber.py"


def _in(file: str, tests: str, *mutants: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, f"kernels/{file}", old, new, tests) for name, old, new in mutants]


# Whether a fence is there, or a race is lost, nothing on a CPU can tell: the explorer refutes the protocol that is then
# left, and the kernel's text is held against the explorer's model.
_FENCE, _COMMIT = "    kvc_fence_system();\n", "    kvc_store_volatile_u64(&record->commit, claim + 1);\n"
RACES = [
    Mutant(name, "kernels/report.cuh", old, new, MODEL, twin=twin)
    for name, old, new, twin in (
        ("fence missing", _FENCE, "", "no fence"),
        ("fence too late", _FENCE + _COMMIT, _COMMIT + _FENCE, "fence behind the commit word"),
        ("commit word in the row", "v.commit = 0;", "v.commit = claim + 1;", "commit word in the row"),
        ("claim not compared", "if (seen == claim) break;", "break;", "claim not compared"),
        ("unsigned room", "if ((int64_t)(claim", "if ((uint64_t)(claim", "unsigned room check"),
    )
]

REPORT = [
    *_in(
        "report.cuh",
        OVERFLOW,
        ("no room check", "if ((int64_t)(claim - n_read) >= (int64_t)guard.ring_capacity) {", "if (false) {"),
        ("room off by one", ">= (int64_t)guard.ring_capacity", "> (int64_t)guard.ring_capacity"),
        ("record 0 overwritten", "claim == 0 ? 0 : 1 + (claim - 1) % guard", "claim % guard"),
        ("dropped not counted", "kvc_atomic_add_u64(state + KVC_STATE_DROPPED, 1);", ""),
    ),
    *_in(
        "report.cuh",
        CATCH,
        ("taint lost", "kvc_atomic_or_u32(kvc_mutable_pointer<uint32_t>(guard.taint) + v.row, v.reasons);", ""),
        ("launches of V not counted", "++half) kvc_atomic_add_u64(runs + kvc_tag(stage, pool.kind, half), 1);",
         "half += 2) kvc_atomic_add_u64(runs + kvc_tag(stage, pool.kind, half), 1);"),
        ("entries not counted", "if (n == 0) return;\n    uint64_t* runs", "return;\n    uint64_t* runs"),
    ),
]  # fmt: skip

BEGIN = _in(
    "begin.cu",
    f"{CATCH} {LIMITS} {AGREE}",
    ("stale step", "state[KVC_STATE_STEP_DONE] + (p.batch.is_first_forward ? 1 : 0)", "state[KVC_STATE_STEP_DONE]"),
    ("padding test skipped", "    if (q1 - q0 > e.length) return e;  // padding\n", ""),
    ("window off by one", "e.prefix - pool.window + 1 : 0", "e.prefix - pool.window : 0"),
    ("order of rows not tested", "descends |= query[r + 1] < query[r]", "descends |= false"),
    ("register trusted too long", "prefix <= reg.length && prefix >= reg.first_length && prefix >= oldest) {\n            if",
     "prefix <= reg.length && prefix >= reg.first_length && prefix >= oldest - 1) {\n            if"),
    ("claim off by one", "(uint64_t)forward << 32 | (uint64_t)(t + 1);\n        if (any_fresh)",
     "(uint64_t)forward << 32 | (uint64_t)t;\n        if (any_fresh)"),
    ("taint not cleared", "i += n) taint[i] = 0;", "i += n) taint[i] |= 0;"),
    ("failed forward forgotten", "        pool_state.n_aborted += 1;\n", ""),
    ("judges while paused", "is_judging = state[KVC_STATE_PAUSE] == 0 &&", "is_judging ="),
)  # fmt: skip

STAMPS = _in(
    "stamps.cu",
    f"{CATCH} {LIMITS} {MUSEUM} {AGREE}",
    ("composed the wrong way round", "second.a * first.b + second.b}", "first.a * second.b + first.b}"),
    ("lanes left out of the scan", "d < (uint32_t)row.n_new; d <<= 1", "2 * d < (uint32_t)row.n_new; d <<= 1"),
    ("K not stamped", "half = 0; half < p.pool.n_halves; ++half) {\n        kvc_mutable_pointer<Stamp>(p.pool.head[half])",
     "half = p.pool.n_halves - 1; half < p.pool.n_halves; ++half) {\n        kvc_mutable_pointer<Stamp>(p.pool.head[half])"),
    ("register one short", "length = row.prefix + (int32_t)i + 1;", "length = row.prefix + (int32_t)i;"),
    ("carry lost between tiles", "        carry = all.a * carry + all.b;\n", ""),
)  # fmt: skip

VERIFY = [
    *_in(
        "prefix.cuh",
        f"{CATCH} {MUSEUM} {AGREE}",
        ("position not compared", "seen.is_whole && seen.position == position", "seen.is_whole"),
        ("anchor not compared", "is_healthy &= position != hot.anchored_at || seen.chain == hot.anchor;", ""),
        ("link between groups lost", "(linkable << 1 | carried.is_linkable) >> lane", "(linkable << 1) >> lane"),
        ("K and V not compared", "return slot >= 0 && is_same && is_healthy;", "return slot >= 0 && is_healthy;"),
    ),
    *_in(
        "verify.cu",
        f"{CATCH} {MUSEUM} {AGREE}",
        ("TAIL not verified", "if (is_judging) n_entries += kvc_verify_prefixes<KVC_STAGE_TAIL>(p, forward);", ""),
        ("loser of a claim not told", "is_loser = is_slot && !is_written &&", "is_loser = false &&"),
        ("end of a forward not noted", ".tail_forward = forward;", ".tail_forward = forward - 1;"),
    ),
    *_in(
        "prefix.cuh",
        f"{CATCH} {AGREE}",
        ("pending rows listed", "kvc_is_listed(p.pool, batch, row) && !(row.flags & KVC_ROW_PENDING))",
         "kvc_is_listed(p.pool, batch, row))"),
        ("fresh slots not listed", "slot, hot.any_fresh);", "slot, false);"),
        ("another share listed", "kvc_is_in_turn(pool, batch, hot.share,", "kvc_is_in_turn(pool, batch, 0,"),
        ("rings and sinks not listed", "if (STAGE == KVC_STAGE_HEAD) kvc_list_due_run(", "if (false) kvc_list_due_run("),
        ("second group of a run not listed", "g = 0; g < KVC_GROUPS; ++g) kvc_list_due(", "g = 0; g < 1; ++g) kvc_list_due("),
        ("one entry too many", "if (is_due && place < pool.due_capacity)", "if (is_due && place <= pool.due_capacity)"),
    ),
    *_in(
        "judge.cuh",
        f"{CATCH} {LIMITS} {MUSEUM} {AGREE}",
        ("floor of failed forwards off by one", "forward <= s.aborted_floor", "forward < s.aborted_floor"),
        ("link before the window judged", "may_link = (position > row.verify_start ||", "may_link = (true ||"),
    ),
]  # fmt: skip

BYTES = [
    *_in("mix.cuh", CATCH, ("wrong shift", "(x ^ (x >> 27)) * KVC_MIX_2;", "(x ^ (x >> 28)) * KVC_MIX_2;")),
    *_in("mix.cuh", f"{LIMITS} {AGREE}", ("power off by one", "kvc_pow(KVC_CHAIN_P, (n - 1 - own)", "kvc_pow(KVC_CHAIN_P, (n - own)")),
    *_in(
        "digest.cuh",
        f"{SHAPES} {CATCH}",
        ("part of one digest", "pool.digest_parts[kvc_block_y() + 1]}", "pool.digest_parts[kvc_block_y()] + 1}"),
        ("position not digested", "(uint32_t)position * KVC_DIGEST_C2", "0 * KVC_DIGEST_C2"),
        ("last slot of a turn dropped", "32 - (int)kvc_leading_zeros(there)", "31 - (int)kvc_leading_zeros(there)"),
        ("dropped lane", "kept + kvc_shfl_xor_u64(given, (uint32_t)half);", "kept + kvc_shfl_xor_u64(given, 0);"),
    ),
    *_in(
        "slots.cuh",
        f"{CATCH} {AGREE}",
        ("reserved one slot too far", "< (uint32_t)pool.page_size) return true;", "<= (uint32_t)pool.page_size) return true;"),
        ("last unit of work dropped", "return (n + of - 1) / of;", "return n / of;"),
        ("wrong share", "* n) >> 32);", "* n) >> 33);"),
    ),
]  # fmt: skip

BLOCKS = [
    *_in(
        "lifecycle.cu",
        OWNERSHIP,
        ("epoch not bumped", "const uint32_t epoch = block.epoch + 1;", "const uint32_t epoch = block.epoch;"),
        ("freed block keeps its owner", "{block.epoch, 0, 0, now};", "{block.epoch, block.owner, 0, now};"),
        ("epoch 0 given out", "return {epoch ? epoch : 1, owner,", "return {epoch, owner,"),
    ),
    *_in(
        "blocks.cuh",
        OWNERSHIP,
        ("foreign write gets the epoch", "? 0 : block.epoch;", "? block.epoch : block.epoch;"),
        ("anybody writes what is shared", "(block.flags & KVC_BLOCK_SHARED) != 0);", "false);"),
    ),
    *_in(
        "moves.cu",
        MOVES,
        ("unfinished moved as whole", "is_whole = head.step && head.step == tail.step;", "is_whole = head.step;"),
        ("moved bytes not fresh", "is_fresh && pool.n_digests ? KVC_CLAIM_FRESH", "false ? KVC_CLAIM_FRESH"),
        ("outlived stamps moved", "    if (p.pool.blocks && stamp.epoch != kvc_block_epoch(p.pool, slot)) return {};\n", ""),
    ),
    *_in(
        "scrub.cu",
        SCRUB,
        ("patrol judges moved bytes", "if (any_fresh && kvc_is_fresh(", "if (false && kvc_is_fresh("),
        ("patrol judges freed blocks", "if (!(kvc_block_state(pool, slot).flags & KVC_BLOCK_LIVE)) {", "if (false) {"),
    ),
    *_in(
        "judge.cuh",
        HONEST,
        ("a failed forward is swept", "(forward == s.head_forward && forward", "(false && forward"),
        ("a link to any slot before a window", "kvc_continued_slot(seen.stamp) == before.slot)) &&", "seen.stamp.prev_slot >= 0)) &&"),
    ),
    *_in("slots.cuh", HONEST, ("a move is as old as what it moved", "moved > step ? moved : step", "moved > step ? step : step")),
    *_in("begin.cu", MUSEUM, ("the prefix cache has rows", "if (row.request_id == KVC_PREFIX_CACHE) row.request_id = 0;", "")),
    *_in("begin.cu", HONEST, ("drafts are trusted", "if (prefix <= reg.confirmed || reg.is_relative) return false;", "return false;")),
    *_in(
        "verify.cu",
        HONEST,
        ("tokens behind the window must have a slot", "position >= pool.sink;", "false;"),
    ),
    *_in(
        "digests.cu",
        LIMITS,
        ("next digest too early", "turn.first + turn.n == n_listed", "true"),
        ("only the first turn of a share", "        item += turn.n;\n", "        item = share.last;\n"),
        ("a turn beyond the block", "return {digest, first, n < KVC_THREADS ? (uint32_t)n : KVC_THREADS}", "return {digest, first, (uint32_t)n}"),
    ),
    *_in("begin.cu", SCRUB, ("cursor not advanced", "pool_state.scrub_turn += 1;", "pool_state.scrub_turn = 1;")),
    *_in("reserved.cu", RESERVED, ("every step is due", " || state[KVC_STATE_STEP] % p.every) return;", ") return;")),
]  # fmt: skip

RENUMBERING = _in(
    "renumber.cu",
    RENUMBER,
    ("old predecessors still named", "if (stamp.step && stamp.step <= old) stamp.prev_slot =", "if (false) stamp.prev_slot ="),
    ("claims keep their numbers", "claims[slot] = kvc_renumbered_claim(claims[slot], old);", ""),
    ("failed forwards forgotten", "if (of_head == 2 && kvc_was_left(guard, pool, head.step)) of_head = 1;", ""),
    ("halves made whole", "if (of_tail == of_head) of_tail = 3 - of_head;", ""),
    ("one off", "number > old ? number - old + 2", "number > old ? number - old + 1"),
)  # fmt: skip

KERNELS = [*RACES, *REPORT, *BEGIN, *STAMPS, *VERIFY, *BYTES, *BLOCKS, *RENUMBERING]
