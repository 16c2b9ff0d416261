"""Before training: what cannot work fails here, before anything is written; and the dry run."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import numpy as np

from diffusion import data, ledger, sharding
from diffusion.patch.geometry import geometry
from experiments import checks, costs, display, inputs, objective, parts, report, sampling
from experiments.config import Config, network_name, to_dict
from experiments.run_dir import RunDir


def check(config: Config) -> None:
    """Raises ValueError for values out of range and fields that do not fit each other, naming the flag."""
    c, devices = config.train, jax.device_count()
    parts.check(config)
    with checks.named("mesh"):
        sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    if c.batch_size % devices:
        raise ValueError(f"--config.train.batch_size={c.batch_size} must be a multiple of {devices} devices")
    if c.patience is not None and not c.eval_every:
        raise ValueError(f"--config.train.patience={c.patience} needs --config.train.eval_every")
    examples = c.batch_size * c.repeat
    if c.microbatch is not None and examples % c.microbatch:
        raise ValueError(f"--config.train.microbatch={c.microbatch} must divide the {examples} examples of a batch")
    if c.microbatch is not None and c.microbatch % devices:
        raise ValueError(f"--config.train.microbatch={c.microbatch} must be a multiple of {devices} devices")
    if config.process.snr_splits and config.process.split is None:
        raise ValueError(
            f"--config.process.split=None: with snr_splits={config.process.snr_splits} train one expert at a time, "
            f"--split=0 to --split={len(config.process.snr_splits)}"
        )


def check_shapes(config: Config, run: parts.Parts, *, fresh: bool = True) -> None:
    """Traces training and sampling without computing anything.

    Raises:
      ValueError: a field is wrong, or the network does not fit the images.
    """
    c, shape = config.data, run.spec.shape
    if c.flip or c.shift:
        with checks.named("data.flip, data.shift"):
            data.check_augmentation(shape, c.flip, c.shift)
    params = jax.eval_shape(partial(parts.init_params, run))
    state = jax.eval_shape(partial(objective.init_state, run), params)
    jax.eval_shape(objective.make_step(run), jax.random.key(0), state, examples(config.train.batch_size, run.spec))
    one, image = jax.ShapeDtypeStruct((1,), np.int32), examples(1, run.spec)["x"]
    if run.split is not None:
        jax.eval_shape(sampling.denoise_fn(run), params, one, one, image)
    else:
        low = [jax.eval_shape(partial(sampling.low_resolution, run), image)] if run.superres else []
        jax.eval_shape(sampling.sample_fn(run), params, one, one, *low)
    if config.train.init_from is not None and fresh:
        source = RunDir(Path(config.train.init_from))
        if config.objective.kind in checks.TEACHERS:
            source.check_teacher(config)
        source.initial_weights(params)
    used = config.train.eval_every or run.split is not None or run.superres
    if used or config.data.name.startswith("array:"):  # of arrays next to nothing is read
        held = inputs.source(config, config.data.held_out)
        if run.superres and run.spec.num_classes:
            asked = set(range(min(config.sample.count, run.spec.num_classes)))
            missing = sorted(asked - set(np.unique(held.labels).tolist()))
            if missing:
                raise ValueError(
                    f"samples are enlarged held-out images, and {held.name} has none of the classes "
                    f"{data.listed([run.spec.class_names[i] for i in missing])}; see --config.data.held_out and "
                    "--config.data.labels"
                )


def describe(config: Config, source: data.Source, params: parts.Any) -> str:
    """Which network is trained on which images, what images show of them, and what has no effect without labels."""
    count = sum(p.size for p in jax.tree.leaves(params))
    n, *shape = source.images.shape
    grid = geometry(shape[:-1], config.model.patch_size, getattr(config.model, "stride", None)).grid
    size = "x".join(map(str, shape))
    name = network_name(config.model)
    kind = display.kind(shape)
    line = f"{name}: {count:,} parameters, {math.prod(grid)} tokens, on {n:,} {kind} {size} of {source.name}"
    line += f"\n{data.describe(source)}"
    if shown := display.note(shape):
        line += f"\nimages show {shown}"
    if powers := config.train.ema_power:
        number = math.ceil(config.train.steps / config.train.snapshot_every)
        size = len(powers) * sum(p.size * p.dtype.itemsize for p in jax.tree.leaves(params))
        line += f"\n{number:,} snapshots of averages, {size / 1e6:,.1f} MB each: {number * size / 1e9:,.2f} GB on disk"
    if config.sample.guidance != 1 and not inputs.data_spec(config, source).num_classes:
        line += f"\nwithout labels, so --config.sample.guidance={config.sample.guidance} has no effect"
    try:
        report.features_for(config, tuple(shape))
    except (ImportError, ValueError) as e:
        line += f"\nsamples will be compared with real images by pixels alone: {e}"
    return line


def describe_mesh(mesh: jax.sharding.Mesh, state: parts.Any) -> str:
    """How many devices there are, and what each of them holds of the state."""
    leaves = [x for x in jax.tree.leaves(state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
    whole = sum(x.size * x.dtype.itemsize for x in leaves)
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return (
        f"{mesh.size} devices, data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']}, of {jax.process_count()} "
        f"process{'es' * (jax.process_count() > 1)}: each holds {own / 1e6:,.1f} of {whole / 1e6:,.1f} MB of the state"
    )


def dry_run(config: Config) -> None:
    """Prints the resolved config, the ledger of the network and the cost of a training step; computes nothing."""
    check(config)
    source = inputs.source(config)
    run = parts.resolve(config, inputs.data_spec(config, source))
    params = jax.eval_shape(partial(parts.init_params, run))
    found = costs.of_network(run)
    images = config.train.batch_size * config.train.repeat
    print(json.dumps(to_dict(config), indent=2))
    print(describe(config, source, params))
    print(costs.printed(costs.rows(found)))
    print(
        f"{3 * images * ledger.total(found).flops:.3e} FLOPs per training step: three forward passes of {images} images"
    )


def examples(b: int, spec: parts.DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    dtype = jax.dtypes.canonicalize_dtype(spec.dtype)  # a device gets 32 bits where the data has 64
    return {"x": jax.ShapeDtypeStruct((b, *spec.shape), dtype), "y": jax.ShapeDtypeStruct((b,), np.int32)}
