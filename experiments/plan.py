"""What a training costs on devices that are not there: memory, operations, communication, images per second.

    python -m experiments.plan --config=experiments/configs/jit.py:g16 --target=v5p:4x4x4 --config.mesh.fsdp=16
    python -m experiments.plan --config=experiments/configs/jit.py:b16 --target=h100:8 --batch_size=1024 --compile=false
    python -m experiments.plan --table --target=h100:1                      # JiT-B to JiT-G on 1 to 256 of a device

The training step of a config is compiled for the target, its state and batches split as config.mesh says, and the
compiler's memory is set against the device's. TPUs need the package libtpu, GPUs JAX's CUDA plugin, no device. Without
them, or with --compile=false, the ledger of the network (`diffusion.ledger`) answers alone: what it says of activations
is an estimate. Nothing is computed and the data set is not opened, so a config that leaves the size
of images open needs --image_size, and one with labels of an unknown data set --num_classes.

    seconds of a step = 3 operations of a forward pass / (utilisation x peak of all devices)            (1)
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from diffusion import ledger
from experiments import command, costs, parts, plan_program, plan_report, plan_targets
from experiments.bench.accelerator import compile_ahead
from experiments.command_line import define_config, given_config
from experiments.config import Config
from experiments.configs import jit
from experiments.parts import DataSpec
from experiments.plan_targets import Target

UTILISATIONS = (0.3, 0.4, 0.5)
# (shape, classes) of data sets that configs name without saying so.
KNOWN = {
    "mnist5k": ((28, 28, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": (None, 1000),
}


def define_flags(argv: list[str]) -> None:
    """The config's flags and those of this command, some of whose names other commands have."""
    define_config(argv)
    flags.DEFINE_string("target", None, f"Devices: {plan_targets.EXAMPLES}.")
    flags.DEFINE_integer("batch_size", None, "Images of a step, of all devices; default: the config's.", lower_bound=1)
    flags.DEFINE_bool("compile", True, "Compile the training step for the target.")
    flags.DEFINE_bool("largest", False, "Compile other batches too, until the largest that fits is known.")
    flags.DEFINE_list("image_size", None, "Height,width of images, where the config does not say.")
    flags.DEFINE_integer("num_classes", None, "Classes of the data set, where its name does not say.", lower_bound=0)
    flags.DEFINE_bool("table", False, "JiT-B, L, H and G at 256x256 and 512x512 on 1 to 256 of the target's devices.")
    flags.DEFINE_bool("json", False, "Print JSON.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; fields are set as in --config.train.batch_size=256")
    f = flags.FLAGS
    if f.target is None:
        raise ValueError(f"--target is missing: name devices, as in {plan_targets.EXAMPLES}")
    target = plan_targets.parse(f.target)
    if f.table:
        command.refuse_given(("compile", "largest", "batch_size"), "with --table")
        rows = table(target)
        print(json.dumps(rows) if f.json else plan_report.table(rows))
        return
    package = plan_targets.missing(target)
    compiles = f.compile and package is None
    if compiles:
        restart_in(plan_targets.environment(target))
    config = given_config()
    check_attention(config)
    run = parts.resolve(config, data_spec(config, f.image_size, f.num_classes))
    why = "--compile=false" if not f.compile else f"the compiler is missing: pip install '{package}'"
    result = {"config": config.name, "not_compiled": None if compiles else why}
    result |= plan(
        run,
        target,
        f.batch_size or config.train.batch_size,
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        compiles=compiles,
        largest=f.largest,
        dtype=getattr(config.model, "dtype", "float32"),
    )
    print(json.dumps(result) if f.json else plan_report.report(result))


def restart_in(environment: dict[str, str]) -> None:
    """Runs this command anew with these variables, which JAX reads when it is imported, unless they are set."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | environment)


def check_attention(config: Config) -> None:
    """Raises ValueError for cuDNN's attention, which is not even traced without JAX's CUDA plugin."""
    package = compile_ahead.missing_plugin()
    if getattr(config.model, "attention", None) == "cudnn" and package is not None:
        raise ValueError(
            f"--config.model.attention=cudnn needs JAX's CUDA plugin, also to count: pip install '{package}', or pass "
            "--config.model.attention=xla, which keeps more"
        )


def data_spec(config: Config, image_size: Sequence[str] | None = None, num_classes: int | None = None) -> DataSpec:
    """Shape and classes of a config's data, which is not opened.

    Raises:
      ValueError: neither the config nor the name of the data set says them; the flags are named.
    """
    c = config.data
    shape, classes = KNOWN.get(c.name, (None, None))
    try:
        size = tuple(map(int, image_size)) if image_size else c.size
    except ValueError as e:
        raise ValueError(f"--image_size={','.join(image_size)} must be numbers, as in --image_size=256,256") from e
    size = size or (shape and shape[:-1])
    channels = c.channels or (shape[-1] if shape else None if c.name.startswith("array:") else 3)
    if not size or not channels:
        raise ValueError(
            f"the shape of {c.name} is not known without opening it: pass --image_size=HEIGHT,WIDTH, and "
            "--config.data.channels for arrays"
        )
    classes = classes if num_classes is None else num_classes
    if c.labels and classes is None:
        raise ValueError(
            f"the number of classes of {c.name} is not known without opening it: pass --num_classes=N, 0 if it has "
            "none, or --config.data.labels=false"
        )
    return DataSpec((*size, channels), tuple(map(str, range(classes if c.labels else 0))))


def plan(
    run: parts.Parts,
    target: Target,
    batch_size: int,
    *,
    data: int | None = None,
    fsdp: int = 1,
    compiles: bool = False,
    largest: bool = False,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The plan of a run on a target, ready for JSON: bytes are those of one device, operations those of all."""
    devices = plan_targets.devices(target) if compiles else None
    mesh = plan_program.mesh_of(data, fsdp, target.count, devices)
    network = costs.of_network(run)
    cost, images, device = ledger.total(network), batch_size * run.repeat, target.device
    given = plan_program.shapes(run, batch_size, mesh)
    state = plan_program.state_bytes(given)
    refused, found = compiled_or_refused(run, given) if compiles else (None, None)
    at_a_time = plan_program.images_at_a_time(run, batch_size, target.count)
    temporary = found.temporary if found else plan_program.estimated(given, cost.kept, at_a_time)
    room = device.memory and device.memory * (compile_ahead.FRACTION if device.kind == "gpu" else 1)
    needed = found.bytes if found else sum(state.values()) + temporary
    result = {
        "target": str(target),
        "devices": target.count,
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "dtype": dtype,
        "denoises": run.method is None,
        "ledger": [row._asdict() | {"cost": row.cost._asdict()} for row in costs.rows(network)],
        "state_bytes": state,
        "temporary_bytes": temporary,
        "bytes": needed,
        "memory": device.memory,
        "usable": room,
        "fits": False if refused else room and needed <= room,
        "refused": refused,
        "compiled": found and found._asdict(),
        "flops": 3 * cost.flops * images,
        "peak_flops": device.flops,
        "bandwidth": target.bandwidth,
    }
    if room:
        fits = compiled_fits(run, mesh, room) if largest and compiles else None
        scaled = found and found.temporary / at_a_time
        result["largest"] = largest_batch(run, mesh, room, scaled or cost.kept, known=bool(found), fits=fits)
        result["largest_compiled"] = fits is not None
    if device.flops:
        result["speed"] = [
            {"utilisation": share, "seconds": s, "images_per_second": images / s}
            for share in UTILISATIONS
            for s in [result["flops"] / (device.flops * target.count * share)]
        ]
    return result


def compiled_or_refused(
    run: parts.Parts, given: plan_program.Shapes
) -> tuple[str | None, plan_program.Compiled | None]:
    """(why it does not fit, None), or (None, the compiled step)."""
    try:
        return None, plan_program.compiled(run, given)
    except Exception as e:
        if not plan_program.out_of_memory(e):
            raise
        return str(e).splitlines()[0][:300], None


def largest_batch(run: parts.Parts, mesh: Any, room: float, per_image: float, *, known: bool, fits: Any = None) -> int:
    """The largest power of two of images for each device whose step fits; 0 if none does.

    By `fits(batch_size)`, or else from the bytes that an image needs; `known` if these have the gradients in them.
    """

    def estimate(each: int) -> bool:
        given = plan_program.shapes(run, each * mesh.size, mesh)
        at_a_time = plan_program.images_at_a_time(run, each * mesh.size, mesh.size)
        temporary = per_image * at_a_time if known else plan_program.estimated(given, int(per_image), at_a_time)
        return sum(plan_program.state_bytes(given).values()) + temporary <= room

    guess = plan_program.largest_power(estimate)
    if fits is None:
        return guess
    return plan_program.largest_power(lambda each: fits(each * mesh.size), max(guess, 1))


def compiled_fits(run: parts.Parts, mesh: Any, room: float) -> Any:
    """batch_size -> whether the compiled step fits."""

    def fits(batch_size: int) -> bool:
        _, found = compiled_or_refused(run, plan_program.shapes(run, batch_size, mesh))
        return found is not None and found.bytes <= room

    return fits


def table(target: Target, variants: Sequence[str] = tuple(jit.GUIDANCE)) -> list[dict[str, Any]]:
    """JiT at 256x256 and 512x512: its ledger, its state on each of so many devices, and images per second."""
    rows = []
    for variant in variants:
        config = jit.get_config(variant)
        run = parts.resolve(config, data_spec(config))
        cost = ledger.total(costs.of_network(run))
        row = {"network": f"JiT-{variant[0].upper()}/{variant[1:]}", "size": config.data.size[0], **cost._asdict()}
        for n in (1, 8, 64, 256):
            given = plan_program.shapes(run, n, plan_program.mesh_of(1, n, n))
            held = plan_program.state_bytes(given)
            row[f"state_{n}"] = sum(value for name, value in held.items() if name != "batch")
            if target.device.flops:
                row[f"images_per_second_{n}"] = 0.4 * n * target.device.flops / (3 * cost.flops)
        rows.append(row)
    return rows


if __name__ == "__main__":
    command.run(main, define_flags)
