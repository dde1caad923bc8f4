"""Hostile input: whatever an engine hands in, the kernels stay inside their arrays, end, and agree with the reference.

`python -m tests.hostile --runs N --seconds S --first-seed K [--sanitize]` from the root. A world is a seed: pools, a
configuration, guards on the reference and on the real kernels; a run is one call with arrays of noise. Every run must
end in violations, counters and a state that both sides agree on bit for bit, or in one error of kvcanary's that both
raise. Out-of-bounds accesses, undefined arithmetic, hangs and other exceptions are findings; `seeds.txt` keeps the
seeds of worlds that were some.
"""
