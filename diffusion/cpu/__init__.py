"""Work-arounds for XLA's CPU backend and the C library: each file can be deleted when its reason is gone.

conv: large convolutions in strips, those of single channels as sums.  lookup: patches by a lookup table.
memory: freed memory is kept by the process.
None changes a result beyond rounding; other backends do not run them.
"""
