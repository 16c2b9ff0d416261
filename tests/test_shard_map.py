"""`jax.shard_map` with its default check: patches, experts, samplers and their gradients, on two devices of one CPU."""

import os
import subprocess
import sys

PROGRAM = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from diffusion import experts, grids, process, sample, solvers
from diffusion.patch import fold, patchify, unpatchify

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))

def same(f, x):
    for g in (f, jax.grad(lambda x: (f(x) ** 2).sum())):
        np.testing.assert_allclose(jax.jit(split(g))(x), jax.jit(g)(x), atol=1e-6)

tokens, images = jax.random.normal(jax.random.key(0), (4, 4, 8)), jax.random.normal(jax.random.key(1), (4, 10, 2))
same(lambda x: fold(x, (10,), 4, 2), tokens)
same(lambda x: unpatchify(x, (10,), 4, 2), tokens)
same(lambda x: patchify(x, 4, 2), images)

# Times that differ between the devices, so that they need different experts, and parameters that both share.
def network(params, xt, t, y):
    return jnp.tanh(xt @ params)

def squared(params, x, t):
    pick = experts.experts([partial(network, params[k]) for k in range(3)], np.array([0.3, 0.6], np.float32))
    return jnp.square(pick(x, t, None)).mean()

params, t = jax.random.normal(jax.random.key(2), (3, 2, 2)), jnp.array([0.1, 0.2, 0.7, 0.8])
mean = lambda params, x, t: jax.lax.pmean(squared(params, x, t), "data")
sharded = jax.shard_map(
    jax.value_and_grad(mean), mesh=mesh, in_specs=(jax.P(), jax.P("data"), jax.P("data")), out_specs=jax.P()
)
for ours, wanted in zip(jax.jit(sharded)(params, images, t), jax.value_and_grad(squared)(params, images, t)):
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
assert (np.abs(wanted[1]).max() == 0) and (np.abs(wanted[jnp.array([0, 2])]) > 0).all()

# Samplers with a memory, which must vary over the mesh as its images do, and one that searches a time.
pick = experts.experts([partial(network, params[k]) for k in range(3)], np.array([0.3, 0.6], np.float32))
def run(sampler, a):
    keys = sample.sample_keys(jax.random.key(0), a[1])
    return sample.sample(keys, pick, process.Linear(), a[0], grids.uniform_grid(3, 0.9), prediction="v",
                         sampler=sampler)
a = images, jnp.arange(4)
for sampler in sample.dpmpp_2m(), solvers.unipc(), solvers.adams_bashforth(), solvers.dpmpp_2m_sde(), solvers.edm(0.3):
    of = partial(run, sampler)
    np.testing.assert_allclose(jax.jit(split(of))(a), jax.jit(of)(a), atol=1e-6)
print("done")
"""


def test_patches_experts_and_samplers_agree_with_one_device():
    devices = "--xla_force_host_platform_device_count=2"
    flags = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}", "NPROC": "16", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | flags, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "done" in done.stdout, done.stderr
