"""`python -m experiments.bench.accelerator`; see `command`."""

from absl import app

from experiments.bench.accelerator import command

if __name__ == "__main__":
    command.define_flags()
    app.run(command.main)
