"""What one waits for before anything happens: imports, and the first training step of the main job.

    python -m experiments.bench.startup
    python -m experiments.bench.startup -- --config=experiments/configs/smoke.py       flags of experiments.train

Every timing is a process of its own, from its start to its end, or to the row of metrics.jsonl that the first training
step writes. "cold" finds an empty persistent compilation cache, "warm" one that an earlier run left. The data set is
prepared in both cases.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments import session
from experiments.bench import timing

_RUNS = flags.DEFINE_integer("runs", 3, "How often the main job is started, cold and warm.", lower_bound=1)

CORE = "import diffusion.data, diffusion.sample, diffusion.train, diffusion.models.vit"
PROGRAMS = {
    "import jax": "import jax",
    "import diffusion": "import diffusion",
    "import its core modules": CORE,
    "nothing": "",
}
# Seconds that `import diffusion` may take beyond `import jax`.
TARGET = 0.2
PATIENCE = 600.0


def main(argv: Sequence[str]) -> None:
    timing.check_json(timing.JSON.value)
    result = run(argv[1:], rounds=timing.ROUNDS.value, runs=_RUNS.value)
    print(report(result))
    timing.write_json(timing.JSON.value, result)


def run(arguments: Sequence[str] = (), *, rounds: int = 3, runs: int = 1) -> dict[str, Any]:
    """All measurements, ready for JSON; `arguments` go to experiments.train.

    Raises:
      ValueError: the main job ended before its first step.
    """
    programs = {name: partial(execute, program) for name, program in PROGRAMS.items()}
    imports = timing.summary(timing.interleave(programs, rounds), dict.fromkeys(programs, 1))
    with tempfile.TemporaryDirectory() as cache:
        starts = {
            "cold cache": partial(first_step_cold, arguments),
            "warm cache": partial(first_step, arguments, cache),
        }
        first = timing.summary(timing.interleave(starts, runs), dict.fromkeys(starts, 1))
    return {"machine": timing.machine(), "arguments": list(arguments), "import": imports, "first_step": first}


def execute(program: str) -> None:
    """Runs a program in a Python of its own."""
    subprocess.run([sys.executable, "-c", program], check=True)


def first_step_cold(arguments: Sequence[str]) -> None:
    """`first_step` with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        first_step(arguments, cache)


def first_step(arguments: Sequence[str], cache: str) -> None:
    """Starts the main job and returns when its first training step is done; the job is then ended.

    Raises:
      ValueError: it ended by itself before, or took longer than PATIENCE.
    """
