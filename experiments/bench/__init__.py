"""Benchmarks, a command each; none is a part of the library.

What a new one is made of, in this order:

    jax_run     our training step and our samples as programs without arguments, and configs with fewer steps
    torch_run   a program in PyTorch: its device, compilation, precision, and waiting for it
    peers       check_same: that two programs compute the same, before either is timed
    timing      compare: medians of interleaved runs of several programs
    evaluations samples of trained runs for a number of evaluations, and what is measured of them
    tables      ratios and tables in Markdown
    commands    the flags that all share, and perform: report, --json file and --plot file

`blog` is the shortest example.
"""
