"""Published networks: their outputs (tests/data/*unet*, dit* and jit_p*.npz, from PyTorch), their names, their files.

Tests that take `torch` write files with PyTorch and are skipped without it.
"""

import argparse
import functools
import importlib
import json
import struct
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.base import Task
from diffusion.models.positions import sincos_positions
from diffusion.models.unet import ADM, unet
from diffusion.models.vit import JIT, vit
from diffusion.predict import WithVariance
from diffusion.pretrained import layouts

DATA = Path(__file__).parents[1] / "data"
# What costs time here is the compiler.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

SMALL = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 2), "num_head_channels": 16}
NETWORKS = {
    "seed_unet_p4": (
        lambda **f: unet(**SMALL, patch_size=4, attention_resolutions=(8, 4), **f),
        layouts.patch_unet(),
    ),
    "seed_unet_p2_class_sigma": (
        lambda **f: unet(
            **SMALL, patch_size=2, attention_resolutions=(4,), num_classes=10, learned_variance="head", **f
        ),
        layouts.patch_unet(new_attention_order=True),
    ),
    "adm_unet_plain": (
        lambda **f: unet(**SMALL, **ADM, attention_resolutions=(8,), use_scale_shift_norm=False, **f),
        layouts.adm_unet(),
    ),
    "adm_unet_class_sigma": (
        lambda **f: unet(
            **SMALL, **ADM, attention_resolutions=(8,), num_classes=10, resblock_updown=True,
            learned_variance="channels", **f,
        ),
        layouts.adm_unet(new_attention_order=True),
    ),
    "dit_p2_sigma": (
        lambda **f: vit(patch_size=2, width=48, depth=2, heads=4, num_classes=10, learned_variance="channels", **f),
        layouts.dit(2),
    ),
    "jit_p2": (
        lambda **f: vit(patch_size=2, width=48, depth=2, heads=2, bottleneck=8, num_classes=4, **JIT | f),
        layouts.jit(2),
    ),
    "jit_p4_tokens3": (
        lambda **f: vit(
            patch_size=4, width=64, depth=4, heads=4, bottleneck=24, class_tokens=3, class_tokens_from=2,
            num_classes=10, **JIT | f,
        ),
        layouts.jit(4),
    ),
}  # fmt: skip


def published(name):
    """The state dict of a vector file, whose values follow from their names, and its other arrays."""
    with np.load(DATA / f"{name}.npz") as file:
        vectors = {k: file[k] for k in file.files}
    return {entry: value(entry, shape) for entry, shape in json.loads(str(vectors["params"]))}, vectors


def value(name, shape):
    if name == "pos_embed":
        side = int(shape[1] ** 0.5)
        return sincos_positions((side, side), shape[2])[None]
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return (normal / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.1 * normal if name.endswith("weight") else 0.1 * normal).astype(np.float32)


def inputs(vectors):
    xt, t, y = (jnp.asarray(vectors[k]) for k in ("x_nchw", "t", "y"))
    return xt.transpose(0, 2, 3, 1), t, y if y.size else None


def like(model, *args):
    return jax.eval_shape(model.init, jax.random.key(0), *args)


@functools.cache
def shapes_of(name):
    return like(NETWORKS[name][0](), *inputs(published(name)[1]))


def flat(shapes):
    return {tuple(k.key for k in p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(shapes)[0]}


SCANNED = "jit_p4_tokens3, scanned"  # its four blocks in one array, as two loops


@pytest.mark.parametrize("name", [*NETWORKS, SCANNED])
def test_published_networks_give_the_published_outputs(name):
    scan, name = {"scan": True} if name == SCANNED else {}, name.partition(",")[0]
    make, layout = NETWORKS[name]
    model = make(clock=lambda t: t, **scan)
    arrays, vectors = published(name)
    args = inputs(vectors)
    params = layouts.from_torch(arrays, like(model, *args), layout)
    assert ("blocks_0_4" in params) == bool(scan)
    out = jax.jit(model.apply).lower(params, *args).compile(compiler_options=QUICK)(params, *args)
    assert isinstance(out, WithVariance) == ("sigma" in name)
    got = np.concatenate(out, -1) if isinstance(out, WithVariance) else np.asarray(out)
    wanted = vectors["out_nchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_about_a_file_that_does_not_fit_lists_everything_that_differs(name):
    layout, shapes = NETWORKS[name][1], shapes_of(name)
    arrays, _ = published(name)
    names = [n for n in arrays if n != "pos_embed"]
    del arrays[names[3]]
    arrays |= {names[4]: arrays[names[4]][..., None], names[5]: np.zeros(arrays[names[5]].shape, int)}
    arrays |= {"extra.weight": np.zeros((2, 3), np.float32), "num": np.zeros((), np.float32)}
    with pytest.raises(ValueError, match="the file does not fit this network") as caught:
        layouts.from_torch(arrays, shapes, layout)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[:3] for line in lines] == [
        ["missing", "key:", names[3]],
        ["shape", "mismatch:", names[4]],
        ["dtype", "mismatch:", names[5]],
        ["unexpected", "key:", "extra.weight"],
        ["unexpected", "key:", "num"],
    ]
    assert "int64" in lines[2] and lines[3].endswith("[2, 3]")


def test_a_network_that_was_not_published_has_no_entries():
    xt, t, y = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int)
    fields = {"num_channels": 8, "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": ()}
    with pytest.raises(ValueError, match=r"no entry for the parameter input_1\.norm_out\.bias"):
        layouts.from_torch({}, like(unet(**fields, film_norm="affine"), xt, t), layouts.patch_unet())
    with pytest.raises(ValueError, match=r"no entry for the parameter input_1\.gate\.bias"):
        layouts.from_torch(
            {}, like(unet(**fields, **ADM | {"class_in": "gate"}, num_classes=2), xt, t, y), layouts.adm_unet()
        )
    with pytest.raises(ValueError, match=r"no entry for the parameter variance_in\.bias"):
        layouts.from_torch({}, like(unet(**fields, **ADM, learned_variance="head"), xt, t), layouts.adm_unet())
    model = vit(patch_size=4, width=16, depth=1, heads=2, bottleneck=4)
    with pytest.raises(ValueError, match=r"no entry for the parameter bottleneck\.kernel"):
        layouts.from_torch({}, like(model, xt, t), layouts.dit(4))


def test_a_missing_null_class_becomes_zeros_and_an_existing_one_is_kept():
    (arrays, _), shapes = published("adm_unet_class_sigma"), shapes_of("adm_unet_class_sigma")
    table = layouts.from_torch(arrays, shapes, layouts.adm_unet())["classes"]["embedding"]
    np.testing.assert_array_equal(table[:10], arrays["label_emb.weight"])
    np.testing.assert_array_equal(table[10], 0)
    with pytest.raises(ValueError, match=r"shape mismatch: label_emb\.weight is \[10, 128\], must be \[11, 128\]"):
        layouts.from_torch(arrays, shapes, layouts.adm_unet(null_class=True))
    (arrays, _), shapes = published("dit_p2_sigma"), shapes_of("dit_p2_sigma")
    name = "y_embedder.embedding_table.weight"
    table = layouts.from_torch(arrays, shapes, layouts.dit(2))["classes"]["embedding"]
    np.testing.assert_array_equal(table, arrays[name])
    arrays[name] = arrays[name][:10]
    table = layouts.from_torch(arrays, shapes, layouts.dit(2, null_class=False))["classes"]["embedding"]
    np.testing.assert_array_equal(table[10], 0)


def test_an_upsampler_has_its_condition_as_input_channels():
    """Six channels in, three predicted and three of variance, as in guided-diffusion's upsamplers."""
    fields = {**SMALL, **ADM, "out_channels": 3, "learned_variance": "channels", "attention_resolutions": (4,)}
    model = unet(**fields)
    xt, t = jnp.zeros((1, 8, 8, 6)), jnp.zeros(1)
    shapes = like(model, xt, t)
    entries = {entry.name: entry.shape for entry in layouts.adm_unet().entries(flat(shapes)).values()}
    assert entries["input_blocks.0.0.weight"] == (32, 6, 3, 3) and entries["out.2.weight"] == (6, 32, 3, 3)
    params = layouts.from_torch(
        {name: value(name, shape) for name, shape in entries.items()}, shapes, layouts.adm_unet()
    )
    out = jax.eval_shape(model.apply, params, xt, t)
    assert out.pred.shape == out.v.shape == (1, 8, 8, 3)


def test_every_block_of_a_deeper_network_has_its_published_index():
    """Two blocks per level, attention in the second of three levels: indices as in guided-diffusion."""
    fields = {"num_channels": 8, "num_heads": 2, "channel_mult": (1, 1, 1), "attention_resolutions": (4,)}
    places = {}
    for updown in (False, True):
        shapes = like(unet(**fields, **ADM, resblock_updown=updown), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
        names = [entry.name for entry in layouts.adm_unet().entries(flat(shapes)).values()]
        assert len(set(names)) == len(names)
        places[updown] = {".".join(name.split(".")[:3]) for name in names}
    attending = {f"input_blocks.{i}.1" for i in (4, 5)} | {f"output_blocks.{i}.1" for i in (3, 4, 5)}
    blocks = {p for p in places[True] if p[-1].isdigit()}
    assert {p for p in blocks if p.startswith("input")} == {f"input_blocks.{i}.0" for i in range(9)} | {
        p for p in attending if p.startswith("input")
    }
    # The upsampling layer of the second level is third in its block, after attention; that of the lowest is second.
    assert {p for p in blocks if p.startswith("output") and p[-1] != "0"} == {
        *(p for p in attending if p.startswith("output")),
        "output_blocks.2.1",
        "output_blocks.5.2",
    }


def test_positions_of_a_dit_must_be_the_sine_cosine_ones():
    (arrays, _), shapes, layout = published("dit_p2_sigma"), shapes_of("dit_p2_sigma"), NETWORKS["dit_p2_sigma"][1]
    with pytest.raises(ValueError, match="wrong value: pos_embed differs from the sine-cosine positions by 0.5"):
        layouts.from_torch(arrays | {"pos_embed": arrays["pos_embed"] + 0.5}, shapes, layout)
    with pytest.raises(ValueError, match=r"wrong value: pos_embed has shape \[1, 15, 48\]"):
        layouts.from_torch(arrays | {"pos_embed": arrays["pos_embed"][:, :15]}, shapes, layout)
    del arrays["pos_embed"]
    layouts.from_torch(arrays, shapes, layout)


def test_a_checkpoint_of_jit_is_read_with_its_prefix_and_its_other_content(tmp_path):
    """As its training program saves it: dicts of a module that holds the network, the optimiser, the arguments."""
    torch = pytest.importorskip("torch")
    arrays, _ = published("jit_p4_tokens3")
    net = {f"net.{name}": torch.tensor(x) for name, x in arrays.items()}
    average = {name: torch.nn.Parameter(x + 1, requires_grad=name != "net.pos_embed") for name, x in net.items()}
    average["net.pos_embed"] = net["net.pos_embed"]
    arguments = argparse.Namespace(model="JiT-B/16", lr=None, proj_dropout=0.2, cfg=2.9, distributed=True)
    optimizer = {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"betas": (0.9, 0.95), "params": [0]}]}
    content = {"model": net, "model_ema1": average, "optimizer": optimizer, "epoch": 7, "args": arguments}
    torch.save(content, tmp_path / "checkpoint-last.pth")
    with pytest.raises(ValueError, match=r"pass one of \['model', 'model_ema1', 'optimizer', 'args'\] as the entry"):
        layouts.read(tmp_path / "checkpoint-last.pth")
    shapes = shapes_of("jit_p4_tokens3")
    bare = layouts.from_torch(arrays, shapes, layouts.jit(4))
    read = [
        layouts.from_torch(layouts.read(tmp_path / "checkpoint-last.pth", entry), shapes, layouts.jit(4))
        for entry in ("model", "model_ema1")
    ]
    jax.tree.map(np.testing.assert_array_equal, read[0], bare)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b + np.float32(1)), read[1], bare)


@pytest.mark.parametrize("variant", ["b16", *(pytest.param(v, marks=pytest.mark.slow) for v in ("l32", "h16", "g32"))])
def test_every_published_jit_fits_its_layout(variant):
    """Shapes alone: every parameter of the config's network has an entry, of the size that the published one has."""
    config = importlib.import_module("experiments.configs.jit").get_config(variant)
    model, (side, _) = config.model.model(Task(num_classes=1000)), config.data.size
    depth, width, patch, bottleneck = config.model.depth, config.model.width, side // 16, config.model.bottleneck
    hidden = int(int(4 * width) * 2 / 3)
    args = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32), jnp.zeros(1), jnp.zeros(1, int)
    entries = layouts.jit(patch).entries(flat(jax.eval_shape(model.init, jax.random.key(0), *args)))
    shapes = {entry.name: entry.shape for entry in entries.values()}
    assert len(shapes) == len(entries) == 14 + 14 * depth
    for name, shape in {
        "x_embedder.proj1.weight": (bottleneck, 3, patch, patch),
        "x_embedder.proj2.weight": (width, bottleneck, 1, 1),
        "in_context_posemb": (1, 32, width),
        "y_embedder.embedding_table.weight": (1001, width),
        f"blocks.{depth - 1}.mlp.w12.weight": (2 * hidden, width),
        f"blocks.{depth - 1}.attn.q_norm.weight": (width // config.model.heads,),
        "final_layer.linear.weight": (patch * patch * 3, width),
    }.items():
        assert shapes[name] == shape


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_files_of_all_formats_give_the_same_arrays(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    dtype = getattr(torch, dtype)
    tensors = {"a.weight": torch.randn(3, 2, dtype=dtype), "a.bias": torch.randn(3, dtype=dtype)}
    torch.save(tensors, tmp_path / "x.pt")
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **{k: v.to(torch.float64).numpy() for k, v in tensors.items()})
    for kind in ("pt", "pth", "safetensors", "npz"):
        found = layouts.read(tmp_path / f"x.{kind}")
        assert found.keys() == tensors.keys()
        for name, x in found.items():
            np.testing.assert_array_equal(x.astype(np.float64), tensors[name].double().numpy())


def test_one_dict_of_a_training_checkpoint_is_selected_by_name():
    path = DATA / "torch_save.pt"  # {"ema": tensors, "step": 3, "name": "é"}
    np.testing.assert_array_equal(layouts.read(path, "ema")["int8"], [[-2, -1, 0], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"other content than named arrays: ema \(dict\).*pass one of \['ema'\]"):
        layouts.read(path)
    with pytest.raises(ValueError, match="has no entry 'opt'; there are ema"):
        layouts.read(path, "opt")
    with pytest.raises(ValueError, match="other content than named arrays: int"):
        layouts.read(path, "step")


def test_files_that_cannot_be_read_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.npz, \.pt or \.pth"):
        layouts.read(tmp_path / "model.bin")
    for kind in ("pt", "npz", "safetensors"):
        with pytest.raises(FileNotFoundError):
            layouts.read(tmp_path / f"none.{kind}")
        (tmp_path / f"bad.{kind}").write_bytes(b"hello hello hello")
        with pytest.raises(ValueError, match=rf"bad\.{kind} is not a .*damaged"):
            layouts.read(tmp_path / f"bad.{kind}")
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match="objects.npz is not a .npz file of arrays"):
        layouts.read(tmp_path / "objects.npz")
    header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "f8.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(ValueError, match=r"has tensors of dtype \['F8_E4M3'\]"):
        layouts.read(tmp_path / "f8.safetensors")


def test_a_vision_transformer_has_no_variance_head():
    with pytest.raises(ValueError, match="learned_variance='head' is not one of"):
        vit(patch_size=2, learned_variance="head")
