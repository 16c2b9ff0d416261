"""Our side of every section: each is a function of a `Record`, which it fills.

Programs come from `PROGRAMS`, by section and name, so that what is compiled ahead of time (`compile_ahead`) is what is
run here. Times are medians of several timings of several calls, after calls that do not count. Operations are those of
the forward pass's matrix products and convolutions, three times as many for a training step:

    MFU = operations per second / operations per second of the machine's own matrix product        (1)
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion.patch import fold, patchify, unpatchify
from diffusion.patch.geometry import geometry
from experiments.bench.accelerator import image_grid, jobs
from experiments.bench.accelerator.jobs import Job, Program
from experiments.bench.accelerator.record import Attempt, Record, read

KEY = 0  # of everything random
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # options of the compiler
COPIES = 8  # inputs of one dispatch of a patch program: longer than a dispatch takes, more than a cache holds


# The amounts of work, on a device and tiny. Whatever comes first in a list is measured first.


def batches(tiny: bool) -> tuple[int, ...]:
    """Batch sizes of JiT-B/16's training step."""
    return (4,) if tiny else (128, 256, 64)


def sample_batch(tiny: bool) -> int:
    """Samples at a time."""
    return 2 if tiny else 64


def unet_batch(tiny: bool) -> int:
    """Batch size of the U-Net's training step."""
    return 2 if tiny else 64


def unet_sizes(tiny: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """(image size, patch size) of Patch Diffusion's network, and of one with as many positions and no patches."""
    return ((32, 4), (8, 1)) if tiny else ((256, 4), (64, 1))


def unet_name(size: int, patch_size: int) -> str:
    """What a size of the U-Net is called in results."""
    return f"{size} px, P = {patch_size}"


def attentions(tiny: bool) -> tuple[str, ...]:
    """Implementations of attention: cuDNN's needs a GPU and 16 bits."""
    return ("xla",) if tiny else ("cudnn", "xla")


def patch_cases(tiny: bool) -> tuple[tuple[int, int], ...]:
    """(patch size, stride) on images of 256x256: 16 every 10 is the overlapping one, 25x25 windows."""
    return ((4, 4), (10, 6)) if tiny else ((16, 16), (4, 4), (16, 10))


def patch_shape(tiny: bool) -> tuple[int, int, int, int]:
    """Images to cut; both sizes are tiled by all of `patch_cases`."""
    return (2, 28, 28, 3) if tiny else (64, 256, 256, 3)


def digits_batch(tiny: bool) -> int:
    """The main job's batch size."""
    return 4 if tiny else 64


SCAN = 10  # steps in one dispatch


def machine_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """The matrix product and the copies that the other sections are compared with."""
    n = 128 if tiny else 8192
    square = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)
    flat = jax.ShapeDtypeStruct((2**16 if tiny else 2**28,), jnp.float32)
    return {
        "matrix product": lambda: Program(jax.jit(jnp.matmul), (square, square)),
        "copy": lambda: Program(jax.jit(jnp.copy), (flat,)),
        "negation": lambda: Program(jax.jit(jnp.negative), (flat,)),
    }


def jit_train_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """Training steps of JiT-B/16; the first batch size with every attention before the others."""
    first, *others = batches(tiny)
    cases = [(first, a) for a in attentions(tiny)] + [(b, attentions(tiny)[0]) for b in others]
    make = lambda b, a: jobs.step_program(jobs.jit_b16(tiny=tiny, attention=a), b)  # noqa: E731
    found = {f"batch {b}, {a}": partial(make, b, a) for b, a in cases}
    if not tiny:
        no_triton = (("xla_gpu_enable_triton_gemm", False),)
        found[f"batch {first}, cudnn, products by cuBLAS only"] = lambda: make(first, "cudnn")._replace(
            options=no_triton
        )
    return found


def jit_sample_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """Sampling with JiT-B/16."""
    make = lambda a: jobs.sample_program(jobs.jit_b16(tiny=tiny, attention=a), sample_batch(tiny))  # noqa: E731
    return {f"batch {sample_batch(tiny)}, {a}": partial(make, a) for a in attentions(tiny)}


def unet_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """Training and sampling with Patch Diffusion's U-Net at two sizes with the same number of positions."""
    found = {}
    for kind in ("training", "sampling"):
        for size, patch_size in unet_sizes(tiny):
            job = partial(jobs.lsun, size, patch_size, tiny=tiny)
            if kind == "training":
                make = lambda job=job: jobs.step_program(job(), unet_batch(tiny))  # noqa: E731
            else:
                make = lambda job=job: jobs.sample_program(job(), sample_batch(tiny))  # noqa: E731
            found[f"{kind}, {unet_name(size, patch_size)}"] = make
    return found


def patch_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """Cutting and joining, `COPIES` independent arrays a dispatch, and plain copies of the tokens."""
    shape, found = patch_shape(tiny), {}

    def make(f: Callable[[Any], Any], shape: tuple[int, ...]) -> Program:
        like = [jax.ShapeDtypeStruct(shape, jnp.float32)] * COPIES
        return Program(jax.jit(lambda arrays: [f(a) for a in arrays]), (like,))

    for patch, stride in patch_cases(tiny):
        b, *size, channels = shape
        cut = geometry(size, patch, stride)
        tokens = (b, int(np.prod(cut.grid)), int(np.prod(cut.patch)) * channels)
        name = f"P = {patch}" if patch == stride else f"{patch} every {stride}"
        options = dict(size=tuple(size), patch_size=patch, stride=stride)
        found[f"copy of the tokens, {name}"] = partial(make, jnp.copy, tokens)
        found[f"patchify, {name}"] = partial(make, partial(patchify, patch_size=patch, stride=stride), shape)
        found[f"fold, {name}"] = partial(make, partial(fold, **options), tokens)
        found[f"unpatchify, {name}"] = partial(make, partial(unpatchify, **options), tokens)
    return found


def digits_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """The main job's step, one a dispatch and `SCAN` a dispatch."""
    b = digits_batch(tiny)
    return {
        "1 step a dispatch": lambda: jobs.step_program(jobs.digits(tiny=tiny), b),
        f"{SCAN} steps a dispatch": lambda: jobs.step_program(jobs.digits(tiny=tiny), b, SCAN),
    }


def numbers_programs(tiny: bool) -> dict[str, Callable[[], Program]]:
    """Gradients in two types, steps that are repeated, samples in two batch sizes."""
    b, half = (4, 2) if tiny else (8, 4)
    grid = np.linspace(1, 0, 3)
    unet_b = 2 if tiny else 8
    # Not cuDNN's attention: it ends in an IndexError when deterministic operations are asked for (jax 0.11.2, H200).
    narrow = partial(jobs.jit_b16, tiny=tiny, attention="xla")
    return {
        "gradient, float32": lambda: jobs.gradient_program(jobs.jit_b16(tiny=tiny, dtype=jnp.float32), b, "highest"),
        "gradient, bfloat16": lambda: jobs.gradient_program(narrow(), b),
        "JiT-B/16's step": lambda: jobs.step_program(narrow(), b),
        f"samples, batch {b}": lambda: jobs.sample_program(narrow(), b, grid),
        f"samples, batch {half}": lambda: jobs.sample_program(narrow(), half, grid),
        "the U-Net's step": lambda: jobs.step_program(jobs.lsun(tiny=tiny), unet_b),
    }


# The short training: batch size, steps a dispatch, made images, samples at its end.
TRAINING = {False: (128, 50, 16384, 9 * 7), True: (8, 4, 64, 9)}


def training_programs(tiny: bool, job: Job | None = None, count: int | None = None) -> dict[str, Callable[[], Program]]:
    """The short training's steps and its samples; by default on made images."""
    b, steps, made, samples = TRAINING[tiny]
    job = jobs.shapes((16 if tiny else 64,) * 2 + (3,), image_grid.NUM_CLASSES, tiny=tiny) if job is None else job
    return {
        "init": lambda: jobs.init_program(job),
        "steps": lambda: jobs.epoch_program(job, b, steps, made if count is None else count),
        "samples": lambda: jobs.sample_program(job, samples),
    }


PROGRAMS: dict[str, Callable[[bool], dict[str, Callable[[], Program]]]] = {
    "machine": machine_programs,
    "jit_train": jit_train_programs,
    "jit_sample": jit_sample_programs,
    "unet": unet_programs,
    "patch": patch_programs,
    "digits": digits_programs,
    "numbers": numbers_programs,
    "training": training_programs,
}


def programs_of(record: Record) -> dict[str, Callable[[], Program]]:
    """The programs of a record's section, for the images that are given where it is their number that counts."""
    if record.section != "training" or record.images is None:
        return PROGRAMS[record.section](record.tiny)
    x, _, classes = training_images(record)
    return training_programs(record.tiny, jobs.shapes(x.shape[1:], classes, tiny=record.tiny), len(x))


def machine(record: Record) -> None:
    """The upper limits: what a plain matrix product and a plain copy reach on this machine; and what the machine is."""
    device = jax.devices()[0]
    record.values["machine"] = {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "driver": driver(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    programs = machine_programs(record.tiny)

    def measure(name: str, work: float, unit: str) -> dict[str, Any]:
        run = compiled(record, programs[name]())
        rng = np.random.default_rng(0)
        shapes = programs[name]().args
        if name == "matrix product":  # not of numbers alike, which take less power and so run faster
            values = [jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype) for a in shapes]
        else:
            values = [jnp.arange(a.size, dtype=a.dtype) for a in shapes]
        timed = timing(lambda: run(*values), record)
        return timed | {unit: work / timed["seconds"]}

    n, flat = programs["matrix product"]().args[0].shape[0], programs["copy"]().args[0].size
    attempts = {"matrix product": Attempt(3, 3, lambda: measure("matrix product", 2 * n**3, "flops_per_second"))}
    for name in ("copy", "negation"):
        attempts[name] = Attempt(1, 0, partial(measure, name, 2 * 4 * flat, "bytes_per_second"))
    record.run(attempts)


def jit_train(record: Record) -> None:
    """JiT-B/16's training step."""
    job = jobs.jit_b16(tiny=record.tiny)
    operations = 3 * jobs.forward_flops(job)

    def measure(make: Callable[[], Program]) -> dict[str, Any]:
        row = trained(record, job, make())
        return row | utilisation(record, operations * row["images_per_second"])

    record.values["operations_per_image"] = operations
    programs = jit_train_programs(record.tiny)
    record.run({name: Attempt(7, 38, partial(measure, make)) for name, make in programs.items()})
    if record.tiny:
        record.leave_out("attention by cuDNN", "it needs a GPU")


def jit_sample(record: Record) -> None:
    """Sampling with JiT-B/16: Heun's method, two evaluations a step but the last, each with and without the label."""
    job = jobs.jit_b16(tiny=record.tiny)
    evaluations = 2 * (2 * (len(job.grid) - 1) - 1)
    operations = evaluations * jobs.forward_flops(job)

    def measure(make: Callable[[], Program]) -> dict[str, Any]:
        row = sampled(record, job, make())
        return row | utilisation(record, operations * row["images_per_second"])

    record.values["steps"] = len(job.grid) - 1
    programs = jit_sample_programs(record.tiny)
    record.run({name: Attempt(10, 20, partial(measure, make)) for name, make in programs.items()})


def unet(record: Record) -> None:
    """Patch Diffusion's U-Net: its training and sampling, and both at a size with as many positions without patches."""
    by_name = {unet_name(*case): jobs.lsun(*case, tiny=record.tiny) for case in unet_sizes(record.tiny)}

    def measure(name: str, make: Callable[[], Program]) -> dict[str, Any]:
        kind, _, size = name.partition(", ")
        job = by_name[size]
        operations = jobs.forward_flops(job)
        if kind == "training":
            row, passes = trained(record, job, make()), 3
        else:
            row, passes = sampled(record, job, make()), len(job.grid) - 1
            row["seconds_per_step"] = row["seconds"] / passes
        return row | utilisation(record, passes * operations * row["images_per_second"])

    programs = unet_programs(record.tiny)
    seconds = {"training": (8, 45), "sampling": (8, 25)}
    attempts = {
        name: Attempt(*seconds[name.partition(", ")[0]], partial(measure, name, make))
        for name, make in programs.items()
    }
    record.run(attempts)


def patch(record: Record) -> None:
    """`patchify`, `fold` and `unpatchify`: bytes read and written per second, over those of a copy of the tokens."""
    programs = patch_programs(record.tiny)

    def measure(name: str, make: Callable[[], Program]) -> dict[str, Any]:
        program = make()
        run = compiled(record, program)
        (like,) = program.args
        rng = np.random.default_rng(0)
        arrays = [jnp.asarray(rng.random(a.shape, np.float32)) for a in like]
        outputs = jax.tree.leaves(jax.eval_shape(program.function, like))
        moved = 4 * sum(a.size for a in [*like, *outputs])
        timed = timing(lambda: run(arrays), record)
        row = timed | {"bytes": moved, "bytes_per_second": moved / timed["seconds"]}
        copied = record.values["rows"].get(f"copy of the tokens, {name.partition(', ')[2]}")
        return row | ({} if copied is None else {"over_copy": row["bytes_per_second"] / copied["bytes_per_second"]})

    record.run({name: Attempt(1, 0.5, partial(measure, name, make)) for name, make in programs.items()})


def digits(record: Record) -> None:
    """The main job's step, with its batch sent to the device each time, and several steps a dispatch."""
    job, b = jobs.digits(tiny=record.tiny), digits_batch(record.tiny)

    def measure(make: Callable[[], Program], steps: int) -> dict[str, Any]:
        program = make()
        state, key = jobs.random_state(job), jax.random.key(KEY)
        begin = time.perf_counter()
        done = compiled(record, program)
        compiling = time.perf_counter() - begin
        batch = jobs.random_batch(job, b, (steps,) if steps > 1 else ())

        def run() -> Any:
            nonlocal state
            state, _ = done(key, state, jax.device_put(batch))
            return state

        timed = timing(run, record)
        rate = steps / timed["seconds"]
        return timed | {"compile_seconds": compiling, "steps_per_second": rate, "seconds_for_3600_steps": 3600 / rate}

    one, several = digits_programs(record.tiny).items()
    record.run(
        {
            one[0]: Attempt(6, 30, partial(measure, one[1], 1)),
            several[0]: Attempt(6, 30, partial(measure, several[1], SCAN)),
        }
    )


def numbers(record: Record) -> None:
    """How far bfloat16 is from float32, whether a step repeats bit for bit, whether a sample depends on its batch.

    The process is started with deterministic operations asked of XLA.
    """
    programs = numbers_programs(record.tiny)
    b = programs["gradient, float32"]().args[2]["x"].shape[0]
    job = jobs.jit_b16(tiny=record.tiny)
    key = jax.random.key(KEY)

    def gradients() -> dict[str, Any]:
        params = jax.tree.map(jnp.asarray, jobs.random_params(jobs.params_like(job)))
        batch = jobs.random_batch(job, b)
        exact = compiled(record, programs["gradient, float32"]())(params, key, batch)
        narrow = compiled(record, programs["gradient, bfloat16"]())(params, key, batch)
        difference = jax.tree.map(jnp.subtract, narrow, exact)
        return {
            "relative_difference": float(optax.tree.norm(difference) / optax.tree.norm(exact)),
            "by_module": {n: float(optax.tree.norm(difference[n]) / optax.tree.norm(exact[n])) for n in exact},
        }

    def repeated(name: str, job: Job) -> dict[str, Any]:
        program = programs[name]()
        done = compiled(record, program)
        batch = jobs.random_batch(job, program.args[2]["x"].shape[0])
        first, second = (jax.tree.map(np.asarray, done(key, jobs.random_state(job), batch)[0]) for _ in range(2))
        unequal = [
            float(np.abs(a.astype(np.float64) - c).max())
            for a, c in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
            if not np.array_equal(a, c)
        ]
        return {"equal": not unequal, "unequal_arrays": len(unequal), "max_difference": max(unequal, default=0.0)}

    def samples() -> dict[str, Any]:
        large, small = (programs[name]() for name in samplings)
        params = jax.tree.map(jnp.asarray, jobs.random_params(jobs.params_like(job)))
        n, half = large.args[2].shape[0], small.args[2].shape[0]
        index = jnp.arange(n, dtype=jnp.int32)
        labels = index % job.num_classes
        whole = np.asarray(compiled(record, large)(params, key, index, labels)).astype(int)
        last = slice(n - half, n)
        part = np.asarray(compiled(record, small)(params, key, index[last], labels[last])).astype(int)
        return {"batches": [n, half], "max_difference_of_255": int(np.abs(whole[last] - part).max())}

    step, unet_step = "JiT-B/16's step", "the U-Net's step"
    samplings = tuple(name for name in programs if name.startswith("samples"))
    record.values["deterministic"] = "xla_gpu_deterministic_ops=true" in xla_flags()
    attempts = {
        "gradients, bfloat16 against float32": Attempt(8, 55, gradients, ("gradient, float32", "gradient, bfloat16")),
        f"{step} twice": Attempt(8, 40, partial(repeated, step, job), (step,)),
        "samples in two batch sizes": Attempt(6, 45, samples, samplings),
        f"{unet_step} twice": Attempt(8, 50, partial(repeated, unet_step, jobs.lsun(tiny=record.tiny)), (unet_step,)),
    }
    if record.tiny:
        del attempts[f"{unet_step} twice"]
        record.leave_out("the U-Net's step twice", "tiny, it is JiT-B/16's once more, and takes long to compile")
    record.run(attempts)


def training(record: Record) -> None:
    """A JiT on 64x64 images for all that is left of the budget, and samples of its average."""
    b, steps, _, count = TRAINING[record.tiny]
    x, y, classes = training_images(record)
    image_grid.save_grid(record.folder / "training_images.png", x[:count], 9)

    def run() -> dict[str, Any]:
        job = jobs.shapes(x.shape[1:], classes, tiny=record.tiny)
        programs = training_programs(record.tiny, job, len(x))
        begin = time.perf_counter()
        sample, several = (compiled(record, programs[name]()) for name in ("samples", "steps"))
        params = compiled(record, programs["init"]())(jax.random.key(KEY + 1))
        state = jobs.first_state(job, params)
        labels = jnp.arange(count, dtype=jnp.int32) % max(classes, 1)
        arguments = (jax.random.key(KEY + 2), jnp.arange(count, dtype=jnp.int32), labels)
        np.asarray(sample(state.ema, *arguments))
        compiling = time.perf_counter() - begin
        begin = time.perf_counter()
        np.asarray(sample(state.ema, *arguments))
        sampling = time.perf_counter() - begin
        data, key, losses = {"x": jax.device_put(x), "y": jax.device_put(y)}, jax.random.key(KEY), []
        begin, once = time.perf_counter(), 0.0
        rounds = 0
        while rounds < (2 if record.tiny else 1) or (not record.tiny and record.left() > 2 * sampling + 2 * once + 3):
            started = time.perf_counter()
            state, values = several(key, state, data)
            losses.append(float(np.mean(values)))
            once, rounds = time.perf_counter() - started, rounds + 1
        seconds = time.perf_counter() - begin
        samples = np.asarray(sample(state.ema, *arguments))
        image_grid.save_grid(record.folder / "samples.png", samples, 9)
        return {
            "images": "made" if record.images is None else "given",
            "count": len(x),
            "classes": classes,
            "size": list(job.shape),
            "parameters": sum(p.size for p in jax.tree.leaves(state.params)),
            "batch_size": b,
            "steps": int(state.step),
            "seconds": seconds,
            "compile_seconds": compiling,
            "images_per_second": int(state.step) * b / seconds,
            "loss_every": steps,
            "loss": [round(value, 5) for value in losses],
            "sample_seconds": sampling,
            "written": ["samples.png", "training_images.png"],
        }

    name = "JiT, tiny" if record.tiny else "JiT at 64x64"
    record.run({name: Attempt(20, 35, run, tuple(training_programs(record.tiny)))})


def training_images(record: Record) -> tuple[np.ndarray, np.ndarray, int]:
    """Images of the short training, their labels (zeros if there are none), and the number of classes."""
    if record.images is None:
        x, y = image_grid.made(TRAINING[record.tiny][2], 16 if record.tiny else 64)
        return x, y, image_grid.NUM_CLASSES
    x, y = image_grid.load(record.images)
    return x, np.zeros(len(x), np.int32) if y is None else y, 0 if y is None else int(y.max()) + 1


OURS: dict[str, Callable[[Record], None]] = {
    "machine": machine,
    "jit_train": jit_train,
    "jit_sample": jit_sample,
    "unet": unet,
    "patch": patch,
    "digits": digits,
    "numbers": numbers,
    "training": training,
}


def trained(record: Record, job: Job, program: Program) -> dict[str, Any]:
    """A training step's time, compilation and memory, its batch on the device already."""
    begin = time.perf_counter()
    done = compiled(record, program)
    compiling = time.perf_counter() - begin
    b = program.args[2]["x"].shape[0]
    state, key = jobs.random_state(job), jax.random.key(KEY)
    batch = jax.device_put(jobs.random_batch(job, b))

    def run() -> Any:
        nonlocal state
        state, metrics = done(key, state, batch)
        return metrics

    timed = timing(run, record)
    return timed | _costs(done, compiling) | {"batch_size": b, "images_per_second": b / timed["seconds"]}


def sampled(record: Record, job: Job, program: Program) -> dict[str, Any]:
    """The time, compilation and memory of sampling a batch."""
    begin = time.perf_counter()
    done = compiled(record, program)
    compiling = time.perf_counter() - begin
    b = program.args[2].shape[0]
    params = jax.tree.map(jnp.asarray, jobs.random_params(jobs.params_like(job)))
    index = jnp.arange(b, dtype=jnp.int32)
    key, labels = jax.random.key(KEY), index % max(job.num_classes, 1)
    timed = timing(lambda: done(params, key, index, labels), record)
    return timed | _costs(done, compiling) | {"batch_size": b, "images_per_second": b / timed["seconds"]}


def compiled(record: Record, program: Program) -> jax.stages.Compiled:
    """A program for the device of this process; tiny ones are compiled quickly, for that is what they cost."""
    return program.compile(**(QUICK if record.tiny else {}))


def _costs(done: jax.stages.Compiled, compiling: float) -> dict[str, Any]:
    in_use = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"compile_seconds": compiling, "bytes": jobs.peak_bytes(done), "process_peak_bytes": in_use}


def utilisation(record: Record, flops: float) -> dict[str, Any]:
    """Operations per second, and eq. (1) where the matrix product has been measured."""
    peak = read(record.folder, "machine").get("rows", {}).get("matrix product", {}).get("flops_per_second")
    return {"flops_per_second": flops, "mfu": flops / peak if peak else None}


def timing(
    call: Callable[[], Any], record: Record, wait: Callable[[Any], Any] = jax.block_until_ready
) -> dict[str, Any]:
    """Median seconds of `call`, which starts work and returns what to `wait` for; each timing is of several calls.

    As many calls that a timing takes a quarter of a second; five timings, three of them if they are long.
    """
    wait(call())
    wait(call())
    begin = time.perf_counter()
    wait(call())
    once = time.perf_counter() - begin
    calls = 1 if record.tiny else max(1, min(200, round(0.25 / max(once, 1e-6))))
    rounds = 2 if record.tiny else 5 if calls * once < 1.5 else 3
    timings = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        timings.append((time.perf_counter() - begin) / calls)
    return {"seconds": statistics.median(timings), "timings": timings, "calls": calls}


def driver() -> str | None:
    """The GPU's name and driver in the words of nvidia-smi, if there is one."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def xla_flags() -> str:
    """What the process was told about XLA."""
    return os.environ.get("XLA_FLAGS", "")
