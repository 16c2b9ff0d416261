"""Published PyTorch networks as our parameters: files, names and shapes.

    file (.safetensors, .npz, .pt)  --read-->  {name: array}  --from_torch-->  params                 (1)

A layout gives the entry of a state dict for each of our parameters: its name, its shape, and how the array is converted
to ours. The network is described once, by the arguments of its constructor: the shapes of our parameters, from
`jax.eval_shape(model.init, ...)`, determine what the file must contain. If a file does not fit, the error lists
everything that differs.

    patch_unet   Patch Diffusion (2207.04316): unet(...)
    adm_unet     guided-diffusion (2105.05233), its upsamplers too: unet(**ADM, ...)
    dit          DiT (2212.09748): vit(...)
    jit          JiT (2511.13720): vit(**JIT, ...)

PyTorch stores a linear map as [out, in] and a convolution as [out, in, h, w]; ours are [in, out] and [h, w, in, out].
JiT rotates neighbouring dimensions of a head as pairs, (2k, 2k + 1), and `vit` its halves, (k, k + D / 2): queries,
keys and the weights of their norms are put in that order, which leaves their scalar products as they are.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import layers
from diffusion.pretrained import torch_file

_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_SAFETENSORS |= {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}


class Entry(NamedTuple):
    """An entry of a state dict: its name, its shape, and the function that converts it to our parameter."""

    name: str
    shape: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]


ParamPath = tuple[str, ...]


class Layout(NamedTuple):
    """Names and shapes of published parameters.

    entries: maps the shapes of our parameters by path to their entries by path; ValueError if one has no entry.
    fixed: entries that are constants, not parameters: a function that describes what is wrong with the array, or None.
    prefix: what the names may begin with, where the network is a part of a larger module.
    """

    entries: Callable[[Mapping[ParamPath, tuple[int, ...]]], dict[ParamPath, Entry]]
    fixed: Mapping[str, Callable[[np.ndarray], str | None]] = {}
    prefix: str = ""


def read(path: str | os.PathLike, entry: str | None = None) -> dict[str, np.ndarray]:
    """The arrays in a .safetensors, .npz, .pt or .pth file, by name. Runs no code from the file and needs no PyTorch.

    `entry` selects one dict of a training checkpoint that has several, such as "ema".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another format, a damaged file, or content other than named arrays.
    """
    kind = Path(path).suffix
    if kind in (".pt", ".pth"):
        arrays = torch_file.read(path)
    elif kind == ".npz":
        arrays = _read_npz(path)
    elif kind == ".safetensors":
        arrays = _read_safetensors(path)
    else:
        raise ValueError(f"{path} must end in .safetensors, .npz, .pt or .pth")
    if entry is not None:
        if not isinstance(arrays, dict) or entry not in arrays:
            raise ValueError(f"{path} has no entry {entry!r}; there are {_brief(arrays)}")
        arrays = arrays[entry]
    if not isinstance(arrays, dict) or not all(isinstance(x, np.ndarray) for x in arrays.values()):
        inner = [k for k, v in arrays.items() if isinstance(v, dict)] if isinstance(arrays, dict) else []
        remedy = f"; pass one of {inner} as the entry to read" if inner else ""
        raise ValueError(f"{path} has other content than named arrays: {_brief(arrays)}{remedy}")
    return arrays


def from_torch(arrays: Mapping[str, np.ndarray], like: Any, layout: Layout) -> Any:
    """Our parameters, a nested dict of float32 arrays shaped like `like`, from the arrays of a state dict.

    `like` may have stacked layers (`diffusion.layers`).

    Raises:
      ValueError: missing or unexpected keys, shapes that differ, dtypes that are not floating point, all of which are
        listed; or `like` has a parameter for which the layout has no entry.
    """
    paths = jax.tree_util.tree_flatten_with_path(jax.eval_shape(layers.unstacked, like))[0]
    shapes = {tuple(key.key for key in path): tuple(leaf.shape) for path, leaf in paths}
    entries = layout.entries(shapes)
    expected = {entry.name: entry for entry in entries.values()}
    arrays = {name.removeprefix(layout.prefix): x for name, x in arrays.items()}
    lines = [f"missing key: {e.name} {list(e.shape)}" for e in expected.values() if e.name not in arrays]
    for name, x in arrays.items():
        if name in layout.fixed:
            problem = layout.fixed[name](np.asarray(x, np.float32))
            lines += [f"wrong value: {name} {problem}"] * (problem is not None)
        elif name not in expected:
            lines.append(f"unexpected key: {name} {list(x.shape)}")
        elif x.shape != expected[name].shape:
            lines.append(f"shape mismatch: {name} is {list(x.shape)}, must be {list(expected[name].shape)}")
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            lines.append(f"dtype mismatch: {name} is {x.dtype}, must be floating point")
    if lines:
        raise ValueError("\n  ".join(["the file does not fit this network:", *lines]))
    params: dict[str, Any] = {}
    for path, shape in shapes.items():
        entry = entries[path]
        value = entry.convert(np.asarray(arrays[entry.name], np.float32)).reshape(shape)
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = np.ascontiguousarray(value)
    return layers.stacked(params, like)


def patch_unet(*, new_attention_order: bool = False, null_class: bool = True) -> Layout:
    """Patch Diffusion's U-Net, as `unet` is by default.

    Args:
      new_attention_order: the published `use_new_attention_order`, which cannot be seen from the parameters.
      null_class: whether the class embedding has a row for "no class" (`classifier_free`); else this row is zero.
    """
    blocks = {"film": "emb_layers", "gate": "classemb_proj", "conv_out": "out_layers.2"}
    outer = {"classes": "label_embs", "variance_time": "variance_output_t_emb"}
    outer |= {"variance_in": "variance_output_model.0", "variance_out": "variance_output_model.2"}
    return Layout(lambda shapes: _unet_entries(shapes, blocks, outer, new_attention_order, null_class))


def adm_unet(*, new_attention_order: bool = False, null_class: bool = False) -> Layout:
    """Guided-diffusion's U-Net, as unet(**ADM) is; arguments as for `patch_unet`. Published ones have no null class."""
    blocks = {"film": "emb_layers.1", "norm_out": "out_layers.0", "conv_out": "out_layers.3"}
    outer = {"classes": "label_emb"}
    return Layout(lambda shapes: _unet_entries(shapes, blocks, outer, new_attention_order, null_class))


def dit(patch_size: int, *, null_class: bool = True) -> Layout:
    """DiT, as `vit` is by default, with patches of `patch_size`; `null_class` as for `patch_unet`."""
    inner = {"qkv": "attn.qkv", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    inner |= {"gates": "adaLN_modulation.1"}
    outer = {"embed": "x_embedder.proj", "classes": "y_embedder.embedding_table", "head": "final_layer.linear"}
    outer |= {"head_gates": "final_layer.adaLN_modulation.1"}

    def entries(shapes: Mapping[ParamPath, tuple[int, ...]]) -> dict[ParamPath, Entry]:
        found = {}
        for path, shape in shapes.items():
            module, leaf = path[:-1], path[-1]
            match module:
                case (block, name) if block.startswith("block_") and name in inner:
                    name = f"{block.replace('block_', 'blocks.')}.{inner[name]}"
                case ("clock_embed", name):
                    name = f"t_embedder.mlp.{'0' if name == 'in' else '2'}"
                case (name,) if name in outer:
                    name = outer[name]
                case _:
                    raise _no_entry(path)
            if module == ("embed",) and leaf == "kernel":
                found[path] = _patch_entry(name, shape, patch_size)
            else:
                found[path] = _entry(name, path, shape, per_head=False, null_class=null_class)
        return found

    return Layout(entries, {"pos_embed": _check_positions})


def jit(patch_size: int, *, null_class: bool = True) -> Layout:
    """JiT, as vit(**JIT, ...) with a bottleneck, with patches of `patch_size`, of every published size.

    Its checkpoints have three dicts: "model_ema1", the average that is sampled from, "model_ema2" and "model".
    """
    inner = {"qkv": "attn.qkv", "norm_q": "attn.q_norm", "norm_k": "attn.k_norm", "out": "attn.proj"}
    inner |= {"up": "mlp.w12", "down": "mlp.w3", "norm_attention": "norm1", "norm_mlp": "norm2"}
    inner |= {"gates": "adaLN_modulation.1"}
    outer = {"bottleneck": "x_embedder.proj1", "embed": "x_embedder.proj2", "classes": "y_embedder.embedding_table"}
    outer |= {"head_norm": "final_layer.norm_final", "head": "final_layer.linear"}
    outer |= {"head_gates": "final_layer.adaLN_modulation.1"}

    def entries(shapes: Mapping[ParamPath, tuple[int, ...]]) -> dict[ParamPath, Entry]:
        found = {}
        for path, shape in shapes.items():
            match path:
                case ("class_positions",):
                    found[path] = Entry("in_context_posemb", (1, *shape), lambda w: w[0])
                    continue
                case (block, name, _) if block.startswith("block_") and name in inner:
                    name = f"{block.replace('block_', 'blocks.')}.{inner[name]}"
                case ("clock_embed", name, _):
                    name = f"t_embedder.mlp.{'0' if name == 'in' else '2'}"
                case (name, _) if name in outer:
                    name = outer[name]
                case _:
                    raise _no_entry(path)
            if path == ("bottleneck", "kernel"):
                found[path] = _patch_entry(name, shape, patch_size)
                continue
            ones = 2 * (path[0] == "embed")  # a 1x1 convolution
            entry = _entry(name, path, shape, per_head=False, null_class=null_class, ones=ones)
            if path[1] in ("qkv", "norm_q", "norm_k"):
                entry = entry._replace(convert=_in_halves(entry.convert, is_qkv=path[1] == "qkv"))
            found[path] = entry
        return found

    return Layout(entries, {"pos_embed": _check_positions}, prefix="net.")


def _in_halves(convert: Callable[[np.ndarray], np.ndarray], *, is_qkv: bool) -> Callable[[np.ndarray], np.ndarray]:
    """`convert`, then pairs of neighbours become halves: of [..., D], or of the first two of [..., 3, H, D]."""

    def reordered(w: np.ndarray) -> np.ndarray:
        w = convert(w)
        halves = np.concatenate([w[..., 0::2], w[..., 1::2]], -1)
        return np.concatenate([halves[..., :2, :, :], w[..., 2:, :, :]], -3) if is_qkv else halves

    return reordered


def _patch_entry(name: str, shape: tuple[int, ...], patch_size: int) -> Entry:
    """The entry of a linear map [ph pw c, W] of patches, which in PyTorch is a convolution whose stride is its size."""
    size, width = shape
    wanted = (width, size // patch_size**2, patch_size, patch_size)
    return Entry(f"{name}.weight", wanted, lambda w: w.transpose(2, 3, 1, 0))


def _unet_entries(
    shapes: Mapping[ParamPath, tuple[int, ...]],
    blocks: Mapping[str, str],
    outer: Mapping[str, str],
    new_attention_order: bool,
    null_class: bool,
) -> dict[ParamPath, Entry]:
    """Entries of both U-Nets: `blocks` and `outer` name the modules that differ between them."""
    blocks = {"norm_in": "in_layers.0", "conv_in": "in_layers.2", "skip": "skip_connection", **blocks}
    blocks |= {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
    outer = {"time_in": "time_embed.0", "time_out": "time_embed.2", "head_norm": "out.0", "head": "out.2", **outer}
    modules = {path[0] for path in shapes}

    def prefix(module: str) -> str | None:
        """input_2_attention -> input_blocks.2.1: the last number is the layer's index in its block."""
        numbered = re.fullmatch(r"(input|middle|output)_(\d+)(?:_(attention|down|up))?", module)
        if not numbered:
            return None
        side, number, role = numbered.groups()
        if side == "middle":
            return f"middle_block.{number}"
        place = {"attention": 1, "up": 1 + (f"{side}_{number}_attention" in modules)}.get(role, 0)
        return f"{side}_blocks.{number}.{place}"

    found = {}
    for path, shape in shapes.items():
        module, *inner, _ = path
        name = prefix(module)
        if not inner:
            # Numbered modules without inner ones are the first convolution and those that change the size.
            ending = {"down": ".op", "up": ".conv"}.get(module.rpartition("_")[2], "")
            name = outer.get(module) if name is None else name + ending
        elif name is not None and inner[0] in blocks:
            name = f"{name}.{blocks[inner[0]]}"
        else:
            name = None
        if name is None:
            raise _no_entry(path)
        # Linear maps that are 1x1 or 1-wide convolutions in PyTorch.
        ones = {"qkv": 1, "out": 1, "variance_time": 2}.get(path[-2], 0)
        found[path] = _entry(name, path, shape, per_head=not new_attention_order, null_class=null_class, ones=ones)
    return found


def _entry(
    name: str, path: ParamPath, shape: tuple[int, ...], *, per_head: bool, null_class: bool, ones: int = 0
) -> Entry:
    """The entry of the parameter at `path` with our `shape`, in the PyTorch module `name`."""
    *_, module, leaf = path
    trailing = (1,) * ones
    name = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
    if module == "qkv":
        *width, _, heads, size = shape  # [W, 3, H, D], or [3, H, D] for the bias

        def split(w: np.ndarray) -> np.ndarray:
            rows = w.reshape(heads, 3, size, -1).swapaxes(0, 1) if per_head else w.reshape(3, heads, size, -1)
            return np.moveaxis(rows, -1, 0)

        return Entry(name, (3 * heads * size, *width, *(trailing if width else ())), split)
    if leaf == "embedding" and not null_class:
        rows, width = shape
        return Entry(name, (rows - 1, width), lambda w: np.concatenate([w, np.zeros((1, width), w.dtype)]))
    if leaf == "kernel" and len(shape) == 4:
        h, w, inward, outward = shape
        return Entry(name, (outward, inward, h, w), lambda w: w.transpose(2, 3, 1, 0))
    if leaf == "kernel":
        inward, outward = shape
        return Entry(name, (outward, inward, *trailing), lambda w: w.reshape(outward, inward).T)
    return Entry(name, shape, lambda w: w)


def _no_entry(path: ParamPath) -> ValueError:
    return ValueError(
        f"this layout has no entry for the parameter {'.'.join(path)}: published networks of this kind do not have it; "
        "change the arguments of the network"
    )


def _check_positions(x: np.ndarray) -> str | None:
    """What is wrong with the positions [1, N, W] of a DiT, which stores these constants; `vit` computes them."""
    from diffusion.models.positions import sincos_positions

    side = math.isqrt(x.shape[1]) if x.ndim == 3 else 0
    if not side or x.shape != (1, side * side, x.shape[2]):
        return f"has shape {list(x.shape)}, must be [1, N, W] with N a square number"
    wanted = sincos_positions((side, side), x.shape[2])
    error = np.abs(x[0] - wanted).max()
    return None if error < 1e-3 else f"differs from the sine-cosine positions by {error:.2g}"


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except Exception as e:  # A damaged archive makes NumPy raise almost any exception.
            raise ValueError(f"{path} is not a .npz file of arrays, or damaged ({type(e).__name__}: {e})") from None


def _read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(Path(path).read_bytes())
    except SafetensorError as e:
        raise ValueError(f"{path} is not a .safetensors file, or damaged ({e})") from None
    unknown = {e["dtype"] for _, e in entries} - set(_SAFETENSORS)
    if unknown:
        raise ValueError(f"{path} has tensors of dtype {sorted(unknown)}; supported are {', '.join(_SAFETENSORS)}")
    return {
        name: np.frombuffer(e["data"], np.dtype(_SAFETENSORS[e["dtype"]])).reshape(e["shape"]) for name, e in entries
    }


def _brief(value: Any) -> str:
    """One line that describes `value`."""
    if not isinstance(value, dict):
        return type(value).__name__
    names = [f"{k} ({type(v).__name__})" for k, v in value.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
