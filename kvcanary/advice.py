"""What to do about it: for each root cause that `kvcanary.causes` names, in the words of somebody who was woken."""

from __future__ import annotations

CONTAIN = (
    "Abort the requests named above and compute them anew from their prompts; what they have generated since then "
    "is not to be trusted. Keep their blocks out of use, and out of the prefix cache, until the cause is known."
)
CONTAIN_UNREAD = (
    "No request has read it, as far as these findings tell: take the blocks named above out of the prefix cache, so "
    "that none will, and keep them out of use until the cause is known. Watch the requests that share them."
)
CONTAIN_RESERVED = (
    "No request's KV is wrong, but answers may be: look at the outputs, and abort requests that answer with nothing or "
    "with one repeated token. Zero the reserved block, or restart; it comes back with the next such padding."
)
# By class of `kvcanary.causes.NAMES`; "" is "cannot tell".
ADVICE: dict[str, str] = {
    "C01": "Free blocks only after the last dispatched step that reads or writes them has ended on the device: look "
    "at abort, preemption and completion while a step is in flight.",
    "C02": "Free blocks only after the transfer has reported their end: look at aborts and time-outs of the connector.",
    "C03": "Look for a block that was handed out twice or freed twice in the allocator; lifecycle=True refuses both "
    "at the call.",
    "C04": "Look at where the prefix index is updated when a block is evicted or rewritten; flush the prefix cache "
    "now. If the prefix hit is right, the guard was not told of it: call share_blocks() for each hit.",
    "C05": "Put everything that changes the KV into the cache key (adapter, tenant, images, position scheme), and "
    "use a hash that does not collide; flush the prefix cache now. If no prefix was hit: look at that row's salts.",
    "C06": "Publish a block to the prefix index only when the forward that writes it has been launched before any "
    "reader.",
    "C07": "Look at how the block table reaches the device: a copy that is missing, late, too short, or of the step "
    "before.",
    "C08": "The host overwrites metadata while the device still reads it: use one buffer per step in flight, or wait "
    "for the event of the step before.",
    "C09": "A captured graph replays an argument of its capture: pass it through a buffer at a fixed address, and "
    "update the buffer before the replay. Without graphs: look for a slot_mapping of -1, or of the step before.",
    "C10": "Padding and dummy rows must write a reserved block or nothing: fill slot_mapping with -1 (or a reserved "
    "slot) behind the last real token.",
    "C12": "Check the arithmetic of the slot mapping (page size, offsets, 32-bit overflow) against the block table.",
    "C13": "Exporter and importer do not agree on the layout (heads, ranks, page size, dtype): compare both sides.",
    "C14": "Look at the block and position offsets with which KV is restored.",
    "C15": "Wait for the load of a layer before that layer reads it; the completion that is waited for comes too "
    "early.",
    "C16": "A transfer was reported complete that was not: check how completions are counted, and what happens on "
    "error.",
    "C17": "Something zeroes blocks after they were written: order the zeroing before the write, on the same stream.",
    "C18": "Move the scales with the quantised bytes: look at copies, offload and swaps that forget the scale array.",
    "C19": "Look at the map from window or ring positions to slots, around the place where it wraps.",
    "C20": "Look at how rejected drafts are taken back: lengths, slot mapping and accepted counts of that step. "
    "If nothing is drafted, take the next cause.",
    "C21": "A fork writes into a block that it shares: copy the last, partly filled block before the first write, "
    "or, as its last holder, claim_blocks().",
    "C22": "Off by one in the length of the prefix that is reused: compare the number of cached tokens with what was "
    "read.",
    "C24": "Look at the GPU first: ECC and XID errors (nvidia-smi -q, dmesg), then run compute-sanitizer to rule out "
    "a stray write. Take the GPU out of service if it comes again.",
    "": "The records do not say. Keep the file, run with verify_data_every=1 and lifecycle=True, and look at all "
    "findings of the next time together.",
}
# Where lifecycle=True is on already, and the guard was not told.
WITH_LIFECYCLE: dict[str, str] = {
    "C03": "Look for a block that was handed out without telling the guard (allocate_blocks() and free_blocks() refuse "
    "what they are told twice), and for a table row that names a block of another request.",
    "": "The records do not say. Keep the file, run with verify_data_every=1, and look at all findings of the next "
    "time together.",
}
# Where the KV lies in host memory: there is no GPU to look at.
ON_HOST: dict[str, str] = {
    "C24": "Look at the memory first: machine-check and ECC errors (dmesg, edac-util), then run AddressSanitizer or "
    "valgrind to rule out a stray write. Take the machine out of service if it comes again.",
}
STALLED = (
    "The guard did not run, so nothing was checked: capture the graphs again inside forward(), and mark steps that "
    "run no forward as idle."
)
RANK_GONE = (
    "Another rank died, hangs or is behind: look at its process and its log. If it is gone, restart the group, and end "
    "this process without waiting for it. If all ranks live, give RankAgreement a larger within=. If the agreement "
    "failed on this rank, as the line says then, mend what carries out the maximum."
)
FALLEN_ON_HOST = (
    "A counter of the guard fell: something wrote into its memory, and perhaps elsewhere. Take the process out of "
    "service and look for the stray write with AddressSanitizer or valgrind."
)
FALLEN = (
    "A counter of the guard fell: something wrote into its device memory, and perhaps elsewhere. Take the process "
    "out of service and look for the stray write with compute-sanitizer."
)


def advice_on(class_id: str, is_on_host: bool, has_lifecycle: bool = False) -> str:
    """What to do about a cause, "" for none.

    Args:
        is_on_host: the KV lies in host memory.
        has_lifecycle: the guard was told of owners: lifecycle=True is no advice.
    """
    advice = {**ADVICE, **(WITH_LIFECYCLE if has_lifecycle else {}), **(ON_HOST if is_on_host else {})}
    return advice[class_id]
