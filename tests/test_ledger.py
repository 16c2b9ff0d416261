"""The ledger: exact for parameters and operations, by module, and what a gradient keeps; against XLA's own counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from diffusion import ledger, process
from diffusion.ledger import Cost
from diffusion.models.blog import blog
from diffusion.models.unet import unet
from diffusion.models.vit import JIT, vit
from experiments import costs

VIT = dict(patch_size=4, width=64, depth=2, heads=2, bottleneck=8, class_tokens=3, class_tokens_from=1, num_classes=5)
JIT_B16 = dict(patch_size=16, width=768, heads=12, bottleneck=128, class_tokens=32, dtype="bfloat16")  # of 2 blocks
# Channels as wide as published ones: of narrow ones norms and activations are not a few per cent.
UNET = dict(num_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(8,), num_classes=3)


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


def inputs(size, channels, labelled):
    return shape(1, *size, channels), shape(1), shape(1, dtype=jnp.int32) if labelled else None


@pytest.mark.parametrize(
    ("model", "given", "tolerance"),
    [
        (vit(**VIT, **JIT), inputs((16, 16), 3, True), 0.07),
        (unet(**UNET), inputs((16, 16), 3, True), 0.02),
        (blog(process.Geometric(), patch_size=7, stride=7, heads=4, head_dim=64), inputs((28, 28), 1, False), 0.05),
        pytest.param(vit(**VIT | JIT_B16, **JIT), inputs((256, 256), 3, True), 0.02, marks=pytest.mark.slow),
    ],
    ids=["vit", "unet", "blog", "jit"],
)
def test_totals_are_those_of_the_parameters_and_of_xla(model, given, tolerance):
    """Exact in the parameters. XLA also counts what is done once per value: the tolerance is for these widths."""
    params = jax.eval_shape(model.init, jax.random.key(0), *given)
    found = ledger.ledger(model.apply, params, *given)
    whole = ledger.total(found)
    assert whole.parameters == sum(p.size for p in jax.tree.leaves(params))
    assert whole.flops == ledger.flops(model.apply, params, *given)
    counted = jax.jit(model.apply).lower(params, *given).cost_analysis()["flops"]
    assert 1 - tolerance < whole.flops / counted < 1


def test_costs_are_those_of_the_modules():
    """Of a block by hand: 4 W^2 of attention's matrices; and what has class tokens costs more, with as many values."""
    model, given = vit(**VIT, **JIT), inputs((16, 16), 3, True)
    params = jax.eval_shape(model.init, jax.random.key(0), *given)
    found = ledger.ledger(model.apply, params, *given)
    assert found["_ViT", "bottleneck"][:2] == (48 * 8, 2 * 16 * 48 * 8)
    assert found["_ViT", "classes"][:2] == (6 * 64, 0)
    attend, n = found["_ViT", "block_0", "block_0._attend", "qkv"], 16
    assert attend[:2] == (64 * 192 + 192, 2 * n * 64 * 192)
    of_block = [ledger.total({p: c for p, c in found.items() if f"block_{i}" in p}) for i in (0, 1)]
    assert of_block[0].parameters == of_block[1].parameters and of_block[0].flops < of_block[1].flops
    parts = [line.name for line in costs.lines(found, 100) if line.depth]
    assert {"attend", "feed", "gates"} <= set(parts)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16, name="down")(nn.relu(nn.Dense(64, name="up")(x))), None


class Stack(nn.Module):
    scan: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        if self.scan:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5)
            return stack(name="blocks_0_4")(x, None)[0]
        for i in range(5):
            x, _ = block(name=f"block_{i}")(x, None)
        return x


def of_stack(**fields):
    stack, x = Stack(**fields), shape(1, 7, 16)
    return ledger.ledger(stack.apply, jax.eval_shape(stack.init, jax.random.key(0), x), x)


def test_what_is_scanned_counts_as_often_as_it_runs():
    scanned, unrolled = of_stack(scan=True), of_stack(scan=False)
    assert ledger.total(scanned)[:2] == ledger.total(unrolled)[:2] == (5 * (2 * 1024 + 80), 5 * 7 * 2 * 2 * 1024)
    name = ("Stack", "blocks_0_4", "up")
    assert scanned[name][:2] == (5 * (1024 + 64), 5 * 7 * 2 * 1024)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_recomputed_is_not_kept(scan):
    """Without: at least the hidden layers. With: the inputs of blocks alone, the first of which is the network's."""
    kept, recomputed = (ledger.total(of_stack(scan=scan, remat=remat)).kept for remat in (False, True))
    inner = 7 * 16 * 4
    assert kept >= 5 * 7 * 64 * 4
    assert recomputed == (5 if scan else 4) * inner


def test_kept_are_operands_of_products_and_what_elementwise_results_are_made_of():
    """Hidden layer h: for exp(h) @ v only exp(h), which is its own derivative; for silu(h) also h."""
    params = {"w": shape(4, 32), "v": shape(32, 3)}

    def kept(activation):
        apply = lambda params, x: activation(x @ params["w"]) @ params["v"]  # noqa: E731
        return ledger.total(ledger.ledger(apply, params, shape(1, 4))).kept / (32 * 4)

    assert kept(lambda h: h) == 1
    assert kept(jnp.exp) == 1
    assert kept(lambda h: jax.nn.sigmoid(h) * h) == 2
    # A chain of such operations needs its beginning alone, beside the operand.
    assert kept(lambda h: jnp.sin(jnp.exp(jnp.cos(jax.nn.sigmoid(h) * h)))) == 2


def test_a_function_in_a_function_costs_the_same_and_long_chains_are_followed():
    """Also without any modules, and where one function is called twice: its results are two arrays."""

    @jax.jit
    def layer(x):
        for _ in range(1200):
            x = jnp.sin(x)
        return x

    def apply(w, x):
        return layer(layer(x @ w[0]) @ w[1]) @ w[2]

    params, x = shape(3, 8, 8), shape(1, 8)
    plain, jitted = (ledger.ledger(f, params, x) for f in (apply, jax.jit(apply)))
    assert ledger.total(plain) == ledger.total(jitted)
    # Each product's result, and what it makes of it for the next.
    assert ledger.total(plain) == Cost(3 * 64, 3 * 2 * 64, 4 * 8 * 4)


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="SAME"),
        dict(window_strides=(2, 1), padding="SAME"),
        dict(window_strides=(1, 1), padding=((2, 0), (1, 3)), rhs_dilation=(2, 1)),
        dict(window_strides=(1, 1), padding=((1, 0), (0, 2)), lhs_dilation=(2, 3)),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
    ],
)
def test_convolutions_are_counted_as_xla_does(options):
    kernel = shape(3, 2, 8 // options.get("feature_group_count", 1), 6)

    def apply(kernel, x):
        return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)

    counted = jax.jit(apply).lower(kernel, shape(1, 9, 7, 8)).cost_analysis()["flops"]
    assert ledger.flops(apply, kernel, shape(1, 9, 7, 8)) == counted


def test_of_a_condition_the_costliest_branch_counts():
    def apply(w, x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x, x)

    assert ledger.flops(apply, shape(8, 8), shape(1, 8)) == 2 * 64
