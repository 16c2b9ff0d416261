"""Published networks, number by number: tests/data/*unet*.npz and dit*.npz hold what the PyTorch programs gave."""

import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.pretrained import layouts
from diffusion.models.unet import ADM, unet
from diffusion.models.vit import sincos_positions, vit
from diffusion.predict import WithVariance

DATA = Path(__file__).parent / "data"
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
}  # fmt: skip


def published(name):
    """The state dict of a vector, whose values follow from their names, and its other arrays."""
    with np.load(DATA / f"{name}.npz") as file:
        vectors = {k: file[k] for k in file.files}
    return {entry: value(entry, shape) for entry, shape in json.loads(str(vectors["params"]))}, vectors


def value(name, shape):
    if name == "pos_embed":
        side = int(shape[1] ** 0.5)
        return sincos_positions((side, side), shape[2])[None]
    draw = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return (draw / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return (1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw).astype(np.float32)


def inputs(vectors):
    xt, t, y = (jnp.asarray(vectors[k]) for k in ("x_nchw", "t", "y"))
    return xt.transpose(0, 2, 3, 1), t, y if y.size else None


def like(model, *args):
    return jax.eval_shape(model.init, jax.random.key(0), *args)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_give_the_published_numbers(name):
    make, layout = NETWORKS[name]
    model = make(clock=lambda t: t)
    arrays, vectors = published(name)
    args = inputs(vectors)
    params = layouts.from_torch(arrays, like(model, *args), layout)
    out = jax.jit(model.apply).lower(params, *args).compile(compiler_options=QUICK)(params, *args)
    assert isinstance(out, WithVariance) == ("sigma" in name)
    got = np.concatenate(out, -1) if isinstance(out, WithVariance) else np.asarray(out)
    wanted = vectors["out_nchw"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(got, wanted, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_that_does_not_fit_is_refused_with_everything_that_does_not(name):
    make, layout = NETWORKS[name]
    arrays, vectors = published(name)
    shapes = like(make(), *inputs(vectors))
    names = [n for n in arrays if n != "pos_embed"]
    del arrays[names[3]]
    arrays |= {names[4]: arrays[names[4]][..., None], names[5]: np.zeros(arrays[names[5]].shape, int)}
    arrays |= {"extra.weight": np.zeros((2, 3), np.float32), "num": np.zeros((), np.float32)}
    with pytest.raises(ValueError, match="the file does not fit this network") as caught:
        layouts.from_torch(arrays, shapes, layout)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        ["missing:", names[3]],
        ["misshapen:", names[4]],
        ["misshapen:", names[5]],
        ["surplus:", "extra.weight"],
        ["surplus:", "num"],
    ]
    assert "int64" in lines[2] and lines[3].endswith("[2, 3]")


def test_a_network_with_fields_of_its_own_has_no_published_entry():
    xt, t, y = jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, int)
    fields = {**SMALL, "num_channels": 8, "num_head_channels": 4}
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


def test_classes_published_without_a_null_get_one_of_zeros_and_with_one_keep_it():
    make, _ = NETWORKS["adm_unet_class_sigma"]
    arrays, vectors = published("adm_unet_class_sigma")
    shapes = like(make(), *inputs(vectors))
    table = layouts.from_torch(arrays, shapes, layouts.adm_unet())["classes"]["embedding"]
    np.testing.assert_array_equal(table[:10], arrays["label_emb.weight"])
    np.testing.assert_array_equal(table[10], 0)
    with pytest.raises(ValueError, match=r"misshapen: label_emb\.weight is \[10, 128\], must be \[11, 128\]"):
        layouts.from_torch(arrays, shapes, layouts.adm_unet(null_class=True))
    make, _ = NETWORKS["dit_p2_sigma"]
    arrays, vectors = published("dit_p2_sigma")
    shapes, name = like(make(), *inputs(vectors)), "y_embedder.embedding_table.weight"
    table = layouts.from_torch(arrays, shapes, layouts.dit(2))["classes"]["embedding"]
    np.testing.assert_array_equal(table, arrays[name])
    arrays[name] = arrays[name][:10]
    table = layouts.from_torch(arrays, shapes, layouts.dit(2, null_class=False))["classes"]["embedding"]
    np.testing.assert_array_equal(table[10], 0)


def test_the_upsampler_sees_its_condition_beside_the_picture():
    """Six channels in, three predicted and three of variance, as guided-diffusion's upsamplers have them."""
    fields = {**SMALL, **ADM, "out_channels": 3, "learned_variance": "channels", "attention_resolutions": (4,)}
    model = unet(**fields)
    xt, t = jnp.zeros((1, 8, 8, 6)), jnp.zeros(1)
    shapes = like(model, xt, t)
    flat = {tuple(k.key for k in p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(shapes)[0]}
    entries = {entry.name: entry.shape for entry in layouts.adm_unet().entries(flat).values()}
    assert entries["input_blocks.0.0.weight"] == (32, 6, 3, 3) and entries["out.2.weight"] == (6, 32, 3, 3)
    params = layouts.from_torch(
        {name: value(name, shape) for name, shape in entries.items()}, shapes, layouts.adm_unet()
    )
    out = jax.eval_shape(model.apply, params, xt, t)
    assert out.pred.shape == out.v.shape == (1, 8, 8, 3)


def test_every_block_of_a_deeper_network_has_its_published_place():
    """Two blocks per level, attention in the middle of three levels: places as guided-diffusion counts them."""
    fields = {"num_channels": 8, "num_heads": 2, "channel_mult": (1, 1, 1), "attention_resolutions": (4,)}
    places = {}
    for updown in (False, True):
        shapes = like(unet(**fields, **ADM, resblock_updown=updown), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
        flat = {tuple(k.key for k in p): x.shape for p, x in jax.tree_util.tree_flatten_with_path(shapes)[0]}
        names = [entry.name for entry in layouts.adm_unet().entries(flat).values()]
        assert len(set(names)) == len(names)
        places[updown] = {".".join(name.split(".")[:3]) for name in names}
    attending = {f"input_blocks.{i}.1" for i in (4, 5)} | {f"output_blocks.{i}.1" for i in (3, 4, 5)}
    blocks = {p for p in places[True] if p[-1].isdigit()}
    assert {p for p in blocks if p.startswith("input")} == {f"input_blocks.{i}.0" for i in range(9)} | {
        p for p in attending if p.startswith("input")
    }
    # The second level's way up is third in its block, after attention; the deepest level's is second.
    assert {p for p in blocks if p.startswith("output") and p[-1] != "0"} == {
        *(p for p in attending if p.startswith("output")),
        "output_blocks.2.1",
        "output_blocks.5.2",
    }


def test_positions_of_a_dit_must_be_the_fixed_ones():
    make, layout = NETWORKS["dit_p2_sigma"]
    arrays, vectors = published("dit_p2_sigma")
    shapes = like(make(), *inputs(vectors))
    with pytest.raises(ValueError, match="differs: pos_embed is off the fixed sine-cosine positions by 0.5"):
        layouts.from_torch(arrays | {"pos_embed": arrays["pos_embed"] + 0.5}, shapes, layout)
    with pytest.raises(ValueError, match=r"differs: pos_embed has shape \[1, 15, 48\]"):
        layouts.from_torch(arrays | {"pos_embed": arrays["pos_embed"][:, :15]}, shapes, layout)
    del arrays["pos_embed"]
    layouts.from_torch(arrays, shapes, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_files_of_all_kinds_hold_the_same(tmp_path, dtype):
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


def test_one_dict_of_a_training_checkpoint_is_picked_by_name(tmp_path):
    torch.save({"ema": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}, "step": 3}, tmp_path / "run.pt")
    np.testing.assert_array_equal(layouts.read(tmp_path / "run.pt", "ema")["w"], 1)
    with pytest.raises(ValueError, match=r"more than named arrays: ema \(dict\).*one of \['ema', 'model'\]"):
        layouts.read(tmp_path / "run.pt")
    with pytest.raises(ValueError, match="holds no entry 'opt'; there are ema"):
        layouts.read(tmp_path / "run.pt", "opt")
    with pytest.raises(ValueError, match="more than named arrays: int"):
        layouts.read(tmp_path / "run.pt", "step")


def test_files_that_cannot_be_read_are_refused(tmp_path):
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
    save_file({"x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
    with pytest.raises(ValueError, match=r"holds tensors of \['F8_E4M3'\]"):
        layouts.read(tmp_path / "f8.safetensors")


def test_a_vision_transformer_has_no_variance_head():
    with pytest.raises(ValueError, match="learned_variance='head' is not one of"):
        vit(patch_size=2, learned_variance="head")
