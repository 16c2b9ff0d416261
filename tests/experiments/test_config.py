"""Configs: every shipped file works, values survive JSON, and the dry run says what would be trained."""

import importlib
import json
import re

import jax
import numpy as np
import pytest

from diffusion import data
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import inputs, parts, preflight
from experiments.configs import jit
from experiments.parts import DataSpec
from tests.experiments.runs import ROOT

VARIANTS = {"lsun": ("2", "4", "8"), "imagenet256": ("0", "1"), "patch_unet_mnist": ("", "0", "1")}
VARIANTS["jit"] = tuple(jit.GUIDANCE)
FILES = sorted(path.stem for path in (ROOT / "experiments" / "configs").glob("[a-z]*.py"))
NAMES = [f"{name}:{variant}".rstrip(":") for name in FILES for variant in VARIANTS.get(name, ("",))]


def shipped(name):
    file, _, variant = name.partition(":")
    return importlib.import_module(f"experiments.configs.{file}").get_config(*([variant] if variant else []))


@pytest.fixture
def blank_images(monkeypatch):
    """Every data set is four black images of its size, so that none has to be there."""

    def source(config, split="train"):
        size, channels, classes = config.data.size or (28, 28), config.data.channels or 1, 1000
        images = np.zeros((4, *size, channels), np.uint8)
        return data.from_arrays(images, np.arange(4), tuple(map(str, range(classes))))

    monkeypatch.setattr(inputs, "source", source)


def test_the_promised_configs_are_there():
    assert set(FILES) >= {"mnist", "blog", "smoke", "jit", "patch_unet_mnist", "imagenet256", "ffhq1024", "lsun"}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_survives_json(name):
    config = shipped(name)
    assert config.name.startswith(name.partition(":")[0])
    text = json.dumps(configs.to_dict(config))
    assert configs.from_dict(json.loads(text)) == config


def test_tuples_and_nones_survive_json():
    config = configs.Config()
    config.data.size, config.model.positions, config.train.clip = (32, 48), ("sincos", "rotary"), None
    back = configs.from_dict(json.loads(json.dumps(configs.to_dict(config))))
    assert back == config
    assert isinstance(back.data.size, tuple)


@pytest.mark.parametrize("network", [ViT(patch_size=2), UNet(num_channels=8)], ids=configs.network_name)
def test_a_stored_config_names_its_network_and_version(network):
    values = configs.to_dict(configs.Config(model=network))
    assert values["version"] == 3 and values["model"]["network"] == configs.network_name(network)
    assert configs.from_dict(values).model == network


def test_a_stored_config_of_another_version_names_the_fields():
    values = configs.to_dict(configs.Config())
    values["model"]["colour"] = values["model"].pop("depth")
    with pytest.raises(ValueError, match=r"\['colour'\] of ViT, unknown to this version"):
        configs.from_dict(values)
    values = configs.to_dict(configs.Config())
    values["model"]["network"] = "mamba"
    with pytest.raises(ValueError, match="the network 'mamba', which is not one of vit, unet, blog"):
        configs.from_dict(values)
    with pytest.raises(ValueError, match="the config has version 4, of a later release"):
        configs.from_dict(values | {"version": 4})


def test_fields_newer_than_a_stored_config_take_their_defaults():
    config = configs.Config(train=configs.Train(steps=7))
    values = configs.to_dict(config)
    del values["train"]["optimizer"], values["condition"]
    assert configs.from_dict(values) == config


# Millions of parameters: tables 7 and 8 of 2511.13720, where JiT-G has "2B".
JITS = {"b16": 131, "l16": 459, "h16": 953, "g16": 2000, "b32": 133, "l32": 462, "h32": 956, "g32": 2000}
JITS = {f"jit:{variant}": count for variant, count in JITS.items()}
SLOW_DRY_RUNS = ("patch_unet_mnist:0", "jit:b16")  # the others of JiT have more blocks of the same kind


@pytest.mark.parametrize(
    "name", ["mnist", "blog", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_DRY_RUNS)]
)
def test_dry_run_says_what_would_be_trained(name, blank_images, capsys):
    config = shipped(name)
    preflight.dry_run(config)
    printed = capsys.readouterr().out
    values, end = json.JSONDecoder().raw_decode(printed)
    assert configs.from_dict(values) == config
    parameters, tokens = re.search(r"([\d,]+) parameters, (\d+) tokens", printed[end:]).groups()
    ledger = printed[end:].partition("module ")[2].splitlines()
    assert len(ledger) <= 25 + 1  # and the line below it
    assert ledger[-2].split()[:2] == ["network", parameters]
    assert float(re.search(r"([\d.e+]+) FLOPs", printed[end:])[1]) > 2 * config.train.batch_size * int(tokens)
    if name == "blog":
        attention = 4 * 324 * 2000 + 3 * 2000 + 324
        assert (parameters, tokens) == (f"{3 * attention + 5 * 324:,}", "4")
    if name in JITS:
        assert tokens == "256" and published_size(int(parameters.replace(",", "")), JITS[name])


@pytest.mark.slow
def test_dry_run_counts_the_blocks_of_a_loop_as_often_as_they_run(blank_images, capsys):
    counted = []
    for scan in (False, True):
        config = shipped("smoke")
        config.model.depth, config.model.scan = 3, scan
        preflight.dry_run(config)
        counted.append(capsys.readouterr().out.splitlines()[-1])
    assert counted[0] == counted[1] and "FLOPs" in counted[0]


@pytest.mark.slow
def test_guidance_without_labels_is_said_to_have_no_effect(blank_images, capsys):
    config = shipped("mnist")
    config.data.labels = False
    preflight.dry_run(config)
    assert "without labels, so --config.sample.guidance=1.42 has no effect" in capsys.readouterr().out


def published_size(count, millions):
    """Whether a number of parameters is the published one, which has as many digits as are given."""
    return round(count / 1e6) == millions if millions < 1000 else round(count / 1e9) == millions / 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in ("jit:b16", "jit:b32") else pytest.param(name, marks=pytest.mark.slow) for name in JITS]
)
def test_every_jit_has_the_published_size_and_recipe(name):
    """Table 9 of 2511.13720; the guidance of the published commands."""
    config = shipped(name)
    preflight.check(config)
    size = config.data.size[0]
    assert config.model.patch_size * 16 == size and config.process.noise_scale == size / 256
    run = parts.resolve(config, DataSpec((size, size, 3), tuple(map(str, range(1000)))))
    params = jax.eval_shape(lambda: parts.init_params(run))
    assert published_size(sum(p.size for p in jax.tree.leaves(params)), JITS[name])
    assert run.dropout == (name[4] in "hg") and run.path(1.0) == (0, size / 256)
    assert run.floor == 0.05 * size / 256 and run.denoiser_prediction == "flow"


# Counted by building the published PyTorch program's networks with its README's flags.
PUBLISHED = {"lsun:2": 122916120, "lsun:4": 121416544, "lsun:8": 121011584, "ffhq1024": 162645344}
PUBLISHED |= {"imagenet256:0": 202148704, "imagenet256:1": 202148704}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in ("lsun:4", "imagenet256:0") else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_published_configs_have_the_published_networks(name):
    config = shipped(name)
    preflight.check(config)
    classes = tuple(map(str, range(1000))) if config.data.labels else ()
    run = parts.resolve(config, DataSpec((*config.data.size, 3), classes))
    params = jax.eval_shape(lambda: parts.init_params(run))
    assert sum(p.size for p in jax.tree.leaves(params)) == PUBLISHED[name]


def test_a_variant_that_is_not_there_names_those_that_are():
    for name in ("lsun:3", "imagenet256:2", "patch_unet_mnist:2"):
        with pytest.raises(ValueError, match=f"{name.partition(':')[0]}:.*as in {name.partition(':')[0]}.py:"):
            shipped(name)


def test_every_field_of_a_config_has_a_dotted_name():
    config = configs.Config(model=UNet())
    names = configs.fields(config)
    assert {"seed", "data.size", "model.num_channels", "sample.count"} <= set(names)
    assert "model.depth" not in names
    assert names["model.channel_mult"] == tuple[float, ...] and names["data.size"] == tuple[int, ...] | None
