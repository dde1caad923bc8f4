"""The Python surface, fed with anything: each call ends in an error of kvcanary's, or does what it says.

`python -m tests.fuzz [--target NAME] [--runs N] [--seconds S]` from the root, guided by coverage with `pip install
"kvcanary[fuzz]"`, by chance alone without. `corpus/` holds inputs to begin with, `crashers/` what was found;
tests/test_fuzz.py plays both again.
"""
