"""Arrays on many devices: where they lie, and that training is the same on one device and on eight."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import data, sharding
from diffusion.models.unet import unet
from diffusion.models.vit import vit


def mesh(data_, fsdp):
    """A mesh of devices that this process lacks."""
    return jax.sharding.AbstractMesh((data_, fsdp), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)


def specs(shapes, fsdp, **options):
    tree = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return [tuple(s.spec) for s in sharding.of_state(mesh(2, fsdp), tree, **options)]


def test_an_array_is_split_along_its_longest_axis_that_can_be():
    shapes = [(64, 128), (128, 64), (128, 128), (12, 64, 126), (8191,), (8192,), (), (63, 65)]
    assert specs(shapes, 4) == [
        (None, "fsdp"), ("fsdp",), (None, "fsdp"), (None, "fsdp"), (), ("fsdp",), (), ()
    ]  # fmt: skip


def test_small_arrays_and_a_mesh_without_fsdp_are_whole():
    assert specs([(64, 63)], 4) == [()]
    assert specs([(64, 63)], 4, smallest=64 * 63) == [("fsdp",)]
    assert specs([(64, 128)], 1) == [()]


def test_a_mesh_has_all_devices():
    assert sharding.make_mesh().shape == {"data": jax.device_count(), "fsdp": 1}
    with pytest.raises(ValueError, match="fsdp=3 must divide the number of devices, 1"):
        sharding.make_mesh(fsdp=3)
    with pytest.raises(ValueError, match="data=2 times fsdp=1 must be the number of devices, 1"):
        sharding.make_mesh(2)


def test_rows_of_a_batch_are_those_of_the_whole_batch():
    rng = np.random.default_rng(0)
    source = data.from_arrays(rng.integers(0, 256, (10, 6, 6, 1), np.uint8), rng.integers(0, 3, 10))
    whole = data.batch(source, 1, 3, 8, flip=True, shift=2)
    for rows in (np.arange(8), np.array([2, 3, 7]), np.array([5])):
        part = data.batch(source, 1, 3, 8, flip=True, shift=2, rows=rows)
        np.testing.assert_array_equal(part["x"], whole["x"][rows])
        np.testing.assert_array_equal(part["y"], whole["y"][rows])


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(ValueError, match="batch_size=12 must be a multiple of the 8 devices"):
        sharding.rows(mesh(2, 4), 12)


SMALL = dict(patch_size=4, width=16, depth=2, heads=2)
UNET = dict(patch_size=2, num_channels=8, channel_mult=(1.0,), num_heads=2)


@pytest.mark.parametrize("make", [partial(vit, **SMALL), partial(vit, **SMALL, scan=True), partial(unet, **UNET)])
def test_networks_split_their_examples_over_the_mesh_in_use(make):
    def constraints(n, in_use):
        given = jax.eval_shape(lambda: (jnp.zeros((n, 8, 8, 1)), jnp.zeros(n)))
        params = jax.eval_shape(model.init, jax.random.key(0), *given)
        with sharding.in_use(in_use):
            return str(jax.make_jaxpr(lambda p, xt, t: model.apply(p, xt, t))(params, *given)).count(
                "sharding_constraint"
            )

    model = make()
    assert constraints(16, mesh(2, 4)) > 0
    assert constraints(16, None) == 0
    assert constraints(16, mesh(1, 1)) == 0
    assert constraints(12, mesh(2, 4)) == 0, "12 images cannot be split over 8 devices"


PROGRAM = """
import sys
import jax, numpy as np
from diffusion import sharding
from diffusion.models.unet import UNet
from experiments import objective, parts
from tests.experiments import runs

sharding.SMALLEST = 64

def muon(c):
    c.train.optimizer, c.train.microbatch = "muon", 8

def mean_flow(c):
    c.model.times, c.objective.kind, c.process.loss_in = 2, "mean_flow", None

def expert(c):
    c.process.snr_splits, c.process.split, c.train.ema_power = (0.25,), 1, (0.1,)

def unet(c):
    c.model = UNet(patch_size=4, num_channels=8, channel_mult=(1.0,), num_res_blocks=1, num_heads=2)
    # A bias before a norm of single channels has a gradient of rounding alone, which Adam would divide by its own size.
    c.train.adam_eps = 1e-5

CASES = {"vit": (runs.tiny, lambda c: None, 8), "muon": (runs.tiny, muon, 4), "mean_flow": (runs.tiny, mean_flow, 2),
         "expert": (runs.tiny_chain, expert, 2), "unet": (runs.tiny, unet, 2)}
make, change, fsdp = CASES[sys.argv[1]]
config = make()
change(config)
config.train.batch_size, config.train.steps, config.train.learning_rate = 16, 12, 1e-3
shape, classes = ((8, 8, 1) if make is runs.tiny_chain else (28, 28, 1)), tuple("abc")
rng = np.random.default_rng(0)
batches = [{"x": rng.integers(0, 256, (16, *shape), np.uint8), "y": rng.integers(0, 3, 16).astype(np.int32)}
           for _ in range(10)]
run = parts.resolve(config, parts.DataSpec(shape, classes))

def trained(mesh):
    placed = sharding.of_state(mesh, jax.eval_shape(lambda: objective.init_state(run, parts.init_params(run))))
    state = sharding.put(objective.init_state(run, parts.init_params(run)), placed)
    step = objective.sharded_step(run, mesh, placed)
    key, losses = sharding.put(parts.key(0, "train"), sharding.whole(mesh)), []
    for batch in batches:
        # What must move to the devices is moved before, so that anything else that moves is an error.
        batch = sharding.put_rows(mesh, batch, 16)
        with jax.transfer_guard("disallow"):
            state, metrics = step(key, state, batch)
        losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "compiled again"
    return state, losses

one, few = trained(sharding.make_mesh(devices=jax.devices()[:1])), trained(sharding.make_mesh(8 // fsdp, fsdp))
split = [leaf for leaf in jax.tree.leaves(few[0]) if not leaf.sharding.is_fully_replicated]
assert len(split) > 8 and all(leaf.addressable_data(0).size == leaf.size // fsdp for leaf in split), len(split)
np.testing.assert_allclose(few[1], one[1], rtol=1e-6)
worst = {}
for name in ("params", "ema", "power"):
    a, b = sharding.gathered((getattr(one[0], name), getattr(few[0], name)))
    worst[name] = max([float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))], default=0)
moved = max(float(np.abs(x - y).max()) for x, y in zip(
    jax.tree.leaves(sharding.gathered(one[0].params)), jax.tree.leaves(jax.device_get(parts.init_params(run)))))
print(sys.argv[1], worst, moved)
assert max(worst.values()) < 1e-6 < 1e-3 < moved
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vit", "muon", "mean_flow", "expert", "unet"])
def test_ten_steps_on_eight_devices_are_those_of_one(case):
    devices = "--xla_force_host_platform_device_count=8"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case], env=os.environ | flags, capture_output=True, text=True, timeout=300
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr


FEATURES = """
import jax, numpy as np
from diffusion.metrics.features import digits
from diffusion.metrics.features.batches import in_batches

digits.BATCH_SIZE = 5
images = np.random.default_rng(0).integers(0, 256, (23, 28, 28, 1), np.uint8)
shapes = []

def forward(x):
    shapes.append((x.shape[0], len(x.sharding.device_set)))
    return digits._forward(digits._default_params(), x)

logits, features = in_batches(forward, images, 5)
assert shapes == [(10, 2)] * 3, shapes
one = [np.asarray(digits._forward(digits._default_params(), images[i : i + 1])[1][0]) for i in (0, 9, 22)]
np.testing.assert_allclose(features[[0, 9, 22]], one, rtol=1e-4, atol=1e-4)
found = digits.digit_features(images)
np.testing.assert_array_equal(found.features, features)
assert found.logits.shape == (23, 10)
"""


def test_features_are_computed_on_all_devices():
    devices = "--xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", FEATURES], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
