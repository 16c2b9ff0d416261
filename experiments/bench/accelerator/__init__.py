"""All measurements on a GPU, as one command: `python -m experiments.bench.accelerator`."""
