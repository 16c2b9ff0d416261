"""Every figure that a GPU must answer, from one prepared command: `python -m experiments.bench.accelerator`."""
