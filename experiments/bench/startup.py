"""The time before anything is computed: imports, and the first training step of the main job.

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command
from experiments.bench import commands, tables, timing
from experiments.run_dir import RunDir

_RUNS = flags.DEFINE_integer("runs", 3, "How often the main job is started, cold and warm.", lower_bound=1)

CORE = "import diffusion.data, diffusion.sample, diffusion.train, diffusion.models.vit"
PROGRAMS = {
    "import jax": "import jax",
    "import diffusion": "import diffusion",
    "import its core modules": CORE,
    "nothing": "",
}
JOB = [sys.executable, "-m", "experiments.train"]
# Seconds that `import diffusion` may take beyond `import jax`.
TARGET = 0.2
PATIENCE = 600.0


def main(argv: Sequence[str]) -> None:
    measure = partial(run, argv[1:], rounds=flags.FLAGS.rounds, runs=_RUNS.value)
    commands.perform(argv[:1], measure, report)


def run(arguments: Sequence[str] = (), *, rounds: int = 3, runs: int = 1) -> dict[str, Any]:
    """All measurements, ready for JSON; `arguments` go to experiments.train.

    Raises:
      ValueError: the main job ended before its first step.
    """
    programs = {name: partial(execute, program) for name, program in PROGRAMS.items()}
    imports = timing.compare(programs, 1, rounds)
    with tempfile.TemporaryDirectory() as cache:
        starts = {
            "cold cache": partial(first_step_cold, arguments),
            "warm cache": partial(first_step, arguments, cache),
        }
        first = timing.compare(starts, 1, runs)
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
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "output").open("w+") as output:
        workdir = Path(folder) / "run"
        job = subprocess.Popen(
            [*JOB, *arguments, f"--workdir={workdir}"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
            stdout=output,
            stderr=output,
        )
        try:
            rows = RunDir(workdir).metrics
            deadline = time.monotonic() + PATIENCE
            while not (rows.exists() and rows.stat().st_size):
                if job.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise ValueError(
                        f"experiments.train made no first step in {PATIENCE:.0f} s, or ended before; it printed:\n"
                        f"{output.read()[-2000:]}"
                    )
                time.sleep(0.005)
        finally:
            job.kill()
            job.wait()


def report(result: dict[str, Any]) -> str:
    """The result in two tables."""
    lines = [tables.where(result["machine"], ["python", "jax"])]
    rows = result["import"]
    base = rows["import jax"]["seconds"]
    cells = [[name, f"{row['seconds']:.2f}", f"{row['seconds'] - base:+.2f}"] for name, row in rows.items()]
    lines += ["", tables.table("a process that does", ["s", "against import jax"], cells)]
    lines += [f"target: import diffusion at most {TARGET:+.1f} s against import jax"]
    rows = result["first_step"]
    cells = [[name, f"{row['seconds']:.1f}", tables.over(row, "cold cache")] for name, row in rows.items()]
    lines += ["", tables.table("to the first training step", ["s", "speed over cold"], cells)]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, commands.define_flags)
