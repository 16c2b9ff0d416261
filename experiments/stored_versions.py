"""Configs stored by earlier versions, as today's: what was renamed or moved, version by version.

Version 1 (no "version" field): one `model` section with the fields of all networks, and with `name` and `conditional`;
the variational term was `bound` and `bound_alone`; the facts about the data were called "seen".
Version 2: `model.remat` was true or false, now "all" or "none".
"""

import dataclasses
from typing import Any

from diffusion.models.blog import Blog
from diffusion.models.unet import ADM, UNet
from diffusion.models.vit import ViT

_NETWORKS_1 = {"vit": ViT, "unet": UNet, "blog": Blog}
# Defaults that differ from today's, for fields that the stored config lacks.
_MODEL_1 = {"name": "vit", "patch_size": 4, "width": 128, "depth": 6, "heads": 4}
_PROCESS_1 = {"bound": "vlb_weight", "bound_alone": "vlb_only"}


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a stored config in today's form; `values` is not changed.

    Raises:
      ValueError: a later version stored it.
    """
    version = values.get("version", 1)
    if version not in (1, 2, 3):
        raise ValueError(f"the config has version {version!r}, of a later release; this release reads versions 1 to 3")
    values = _from_1(values) if version == 1 else values
    return _from_2(values) if version < 3 else dict(values)


def _from_2(values: dict[str, Any]) -> dict[str, Any]:
    model = dict(values.get("model", {}))
    if isinstance(model.get("remat"), bool):
        model["remat"] = "all" if model["remat"] else "none"
    return values | {"version": 3} | ({"model": model} if "model" in values else {})


def _from_1(values: dict[str, Any]) -> dict[str, Any]:
    values = {"version": 2} | values
    if "seen" in values:
        values["data_spec"] = values.pop("seen")
    process = values.get("process", {})
    values["process"] = {_PROCESS_1.get(name, name): value for name, value in process.items()}
    model = _MODEL_1 | values.get("model", {})
    name, conditional = model.pop("name"), model.pop("conditional", True)
    values["data"] = {**values.get("data", {}), "labels": conditional}
    kind = _NETWORKS_1.get(name)
    if kind is None:
        return values | {"model": {"network": name}}
    if kind is UNet:
        model["num_heads"] = model["heads"]
        if model.get("adm"):
            model |= ADM
    known = {f.name for f in dataclasses.fields(kind)}
    everywhere = known.union(*({f.name for f in dataclasses.fields(k)} for k in _NETWORKS_1.values()), {"adm"})
    # A field of another network had its default; one that no network has is reported by the reader.
    kept = {field: value for field, value in model.items() if field in known or field not in everywhere}
    return values | {"model": {"network": name} | kept}
