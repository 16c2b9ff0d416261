"""All measurements on a GPU, in one call of at most eight minutes.

    python -m experiments.bench.accelerator                       everything, on the GPU or TPU of this machine
    python -m experiments.bench.accelerator --only=unet,patch     some sections; results of others are kept
    python -m experiments.bench.accelerator --compile_for=h100    compiles everything for a card that is not there
    python -m experiments.bench.accelerator --tiny                every section, small, on a CPU

    section     what
    machine     the machine's own matrix product and copy: the upper limits
    jit_train   JiT-B/16's training step at 256x256, attention by XLA and cuDNN, and in PyTorch
    jit_sample  its sampling, 50 steps of Heun with guidance, and in PyTorch
    unet        Patch Diffusion's U-Net at 256x256 with P = 4 and at 64x64 with P = 1, and in PyTorch
    patch       patchify, fold, unpatchify against a copy
    digits      the main job's step, one and ten a dispatch
    numbers     bfloat16 against float32, a step repeated, samples in two batch sizes
    training    a JiT on 64x64 images, `--images` or made ones, and samples to look at

On a GPU what is long to compile is compiled first, several programs at a time (`prepare`). A section that does not use
its share leaves it to those that follow, so the training lasts as long as the rest allows.
Each section, and each peer in PyTorch, is a process of its own: memory is its own, one that fails or hangs takes no
other with it, and XLA's flags are those it needs. `--out` then holds sections/NAME.json, written after each
measurement; results.json and results.md of all of them, after each section; samples.png.

Needs jax, flax, optax, numpy, numba and absl only; PyTorch is left out where it is missing.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from experiments.bench.accelerator import image_grid, prepare
from experiments.bench.accelerator.prepare import Piece, end_group
from experiments.bench.accelerator.record import OURS, PEER, TAIL, Record, path, prepared_path, read, write_json
from experiments.bench.accelerator.report import SECTIONS, collected, report
from experiments.paths import define_path

ROOT = Path(__file__).parents[3]
GRACE = 20.0  # seconds that a process may take beyond its share before it is ended
CLOSING = 3.0  # seconds that a process needs to close


class Task(NamedTuple):
    """A section's measurements of ours or of its peer, and its share of what compilation leaves of the budget."""

    section: str
    part: str
    share: float


# What the attempts take once their programs are compiled, with nine seconds to begin and to close.
TASKS = (
    Task("machine", OURS, 15),
    Task("jit_train", OURS, 45),
    Task("jit_train", PEER, 55),
    Task("jit_sample", OURS, 30),
    Task("jit_sample", PEER, 30),
    Task("unet", OURS, 42),
    Task("unet", PEER, 47),
    Task("patch", OURS, 22),
    Task("digits", OURS, 22),
    Task("numbers", OURS, 40),
    Task("training", OURS, 32),
)


def define_flags() -> None:
    """Defines the flags of this command; not on import, since other commands have flags of these names."""
    define_path("out", "runs/accelerator", "Folder for the results.")
    flags.DEFINE_list("only", [], f"Sections to run, some of {', '.join(SECTIONS)}; default: all.")
    flags.DEFINE_bool("tiny", False, "Sizes for a CPU, to see that everything runs.")
    flags.DEFINE_float("budget_s", 480.0, "Seconds for all sections together.", lower_bound=0)
    define_path("images", None, "Images to train on: an npz file with arr_0, uint8 [N, 64, 64, 3].")
    flags.DEFINE_string("compile_for", None, "Compile every program for this card, ahead of time, and run nothing.")
    flags.DEFINE_string("child", None, "Internal: the section:part that this process measures.")
    flags.DEFINE_float("until", None, "Internal: when its share ends, in seconds since the epoch.")
    flags.DEFINE_string("compile_only", None, "Internal: the program of --child to be compiled and not measured.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    given = flags.FLAGS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes that were started are ended
    try:
        sections = chosen(given.only)
        if given.compile_for:
            from experiments.bench.accelerator import compile_ahead

            compile_ahead.main(given.compile_for, sections, Path(given.out), tiny=given.tiny)
        elif given.compile_only:
            section, _, part = given.child.partition(":")
            prepare.here(Piece(section, part, given.compile_only), Path(given.out), given.images)
        elif given.child:
            child(given.child, Path(given.out), given.until, tiny=given.tiny, images=given.images)
        else:
            options = dict(budget=given.budget_s, tiny=given.tiny, images=given.images)
            print(run(Path(given.out), sections, start=in_process, **options))
    except ValueError as e:
        sys.exit(f"{e}")


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """The sections to run, in their order.

    Raises:
      ValueError: there is none of that name.
    """
    if unknown := set(only) - set(SECTIONS):
        raise ValueError(f"--only={','.join(only)}: {sorted(unknown)} are not among {', '.join(SECTIONS)}")
    return tuple(name for name in SECTIONS if not only or name in only)


Start = Callable[[Task, Record, float], None]


def run(
    folder: Path, sections: Sequence[str], *, budget: float, tiny: bool = False, images: str | None = None,
    start: Start,
) -> str:  # fmt: skip
    """Runs sections within `budget` seconds, and returns the report; the machine is always measured.

    Args:
      start: measures a task until its record says so, at most so many seconds beyond: `here` or `in_process`.
    """
    if images is not None:
        image_grid.load(images)  # refused now, not after all other sections
    try:
        (folder / "sections").mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(
            f"--out={folder}: results cannot be written there ({e.strerror}): choose another folder"
        ) from e
    end = time.time() + budget
    tasks = [task for task in TASKS if task.section in (*sections, "machine")]
    for task in tasks:
        path(folder, task.section).unlink(missing_ok=True)
    prepared_path(folder).unlink(missing_ok=True)
    for k, task in enumerate(tasks):
        now = time.time()
        share = max(end - now, 0) * task.share / sum(t.share for t in tasks[k:])
        record = Record(folder, task.section, now + share, tiny=tiny, images=images, part=task.part)
        if share <= 0:
            record.leave_out("PyTorch" if task.part == PEER else "all of it", "the budget was used up")
        else:
            begin = time.time()
            start(task, record, min(GRACE, end - now - share))
            tiny = without_accelerator(folder) or tiny
            log(folder, task, time.time() - begin)
            if k == 0 and not tiny and start is in_process:
                compile_first(folder, sections, end, images)
        write_report(folder)
    return write_report(folder)


def here(task: Task, record: Record, _: float) -> None:
    """Measures a task in this process."""
    from experiments.bench.accelerator.peers import PEERS
    from experiments.bench.accelerator.sections import OURS as FUNCTIONS

    try:
        (PEERS if task.part == PEER else FUNCTIONS)[task.section](record)
    except Exception:
        failed(record, traceback.format_exc())


def in_process(task: Task, record: Record, grace: float) -> None:
    """Measures a task in a process of its own, which is ended `grace` seconds after its share."""
    command = [sys.executable, "-m", "experiments.bench.accelerator", f"--child={task.section}:{task.part}"]
    command += [f"--out={record.folder}", f"--until={record.until - CLOSING}"]
    command += ["--tiny"] if record.tiny else []
    command += [f"--images={record.images}"] if record.images else []
    log = record.folder / "sections" / f"{task.section}_{task.part}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        options = dict(stdout=output, stderr=subprocess.STDOUT, env=environment(record.folder, task, record.tiny))
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            code = process.wait(max(record.left(), 0) + grace)
            why = None if code == 0 else f"the process ended with status {code}"
        except subprocess.TimeoutExpired:
            why = "the process was ended, its share of the budget being used up"
        finally:
            end_group(process)
    if why is not None:
        # What the process has written since.
        now = Record(record.folder, task.section, record.until, tiny=record.tiny)
        failed(now, f"{log.read_text(errors='replace')[-TAIL:]}\n{task.part}: {why}")


def compile_first(folder: Path, sections: Sequence[str], end: float, images: str | None) -> None:
    """Compiles what is long to compile (`prepare`), on a GPU and where there are cores for it."""
    if read(folder, "machine").get("machine", {}).get("backend") != "gpu":  # a TPU belongs to one process at a time
        return
    at_once, wanted = prepare.room(), prepare.pieces(sections)
    if not wanted:
        return
    if at_once < prepare.FEWEST:
        print(f"Programs are compiled as they are measured: there are cores for {at_once} at a time.", flush=True)
        return
    until = time.time() + prepare.SHARE * max(end - time.time(), 0)
    prepare.prepare(folder, wanted, until, partial(compiling, folder, images), at_once=at_once)


def compiling(folder: Path, images: str | None, piece: Piece) -> subprocess.Popen:
    """The process that compiles a program; what it prints is in sections/."""
    command = [sys.executable, "-m", "experiments.bench.accelerator", f"--child={piece.section}:{piece.part}"]
    command += [f"--compile_only={piece.name}", f"--out={folder}", *([f"--images={images}"] if images else [])]
    with prepare.log(folder, piece).open("wb") as output:
        options = dict(stdout=output, stderr=subprocess.STDOUT, env=environment(folder, piece, tiny=False))
        return subprocess.Popen(command, start_new_session=True, **options)


def failed(record: Record, error: str) -> None:
    """Writes down that a section ended early, and what it had still planned."""
    v = record.values
    v["error"] = (v.get("error", "") + "\n" + error).strip()[-TAIL:]
    said = {entry.partition(": ")[0] for entry in v["left_out"]}
    v["left_out"] += [
        f"{name}: not reached" for name in v.get("planned", []) if name not in {*v["rows"], *v["errors"], *said}
    ]
    record.save()


def environment(folder: Path, task: Task | Piece, tiny: bool) -> dict[str, str]:
    """What a task's process is started with: memory as needed, a cache of compiled programs, flags of XLA."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if tiny:
        env.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "patch-diffusion" / "xla"))
    else:
        # Kernels are chosen beside other processes: nobody else is to get them.
        env["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder).absolute() / "compiled" / "jax")
        env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder).absolute() / "compiled" / "torch")
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    # Not three quarters of the memory at once, but in the end nearly all of it.
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    if task.part == PEER:
        env["JAX_PLATFORMS"] = "cpu"  # the GPU is PyTorch's; JAX shows that the networks are the same
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    if task.section == "numbers" and not tiny:
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    return env


def child(name: str, folder: Path, until: float, *, tiny: bool, images: str | None) -> None:
    """What a task's process does."""
    section, _, part = name.partition(":")
    if part == OURS:
        import jax

        tiny = tiny or jax.default_backend() == "cpu"
    here(Task(section, part, 0), Record(folder, section, until, tiny=tiny, images=images, part=part), 0)


def without_accelerator(folder: Path) -> bool:
    """Whether the machine was found to have none."""
    return read(folder, "machine").get("machine", {}).get("backend") == "cpu"


def log(folder: Path, task: Task, seconds: float) -> None:
    """A line on what a task has done."""
    v = read(folder, task.section)
    counts = (
        f"{len(v.get('rows', {}))} measured, {len(v.get('left_out', []))} left out, {len(v.get('errors', {}))} failed"
    )
    print(
        f"{task.section}, {task.part}: {seconds:.0f} s; {counts}{'; ended early' if v.get('error') else ''}", flush=True
    )
    if task.section == "machine" and without_accelerator(folder):
        print("This machine has no accelerator: every section runs at its tiny size.", flush=True)


def write_report(folder: Path) -> str:
    """Writes results.json and results.md of all sections in `folder`, and returns the latter."""
    results: dict[str, Any] = collected(folder)
    write_json(folder / "results.json", results)
    text = report(results)
    (folder / "results.md").write_text(text)
    return text
