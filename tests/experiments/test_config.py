"""Configs: every shipped file works, values survive JSON, and a wrong flag is one line that names the right one."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import data
from experiments import build, command_line, train
from experiments import config as configs

ROOT = Path(__file__).parent.parent
VARIANTS = {"lsun": ("2", "4", "8"), "imagenet256": ("0", "1"), "patch_unet_mnist": ("", "0", "1")}
FILES = sorted(path.stem for path in (ROOT / "experiments" / "configs").glob("[a-z]*.py"))
NAMES = [f"{name}:{variant}".rstrip(":") for name in FILES for variant in VARIANTS.get(name, ("",))]


def shipped(name):
    file, _, variant = name.partition(":")
    return importlib.import_module(f"experiments.configs.{file}").get_config(*([variant] if variant else []))


@pytest.fixture
def blank_pictures(monkeypatch):
    """Every data set is four black pictures of its size, so that none has to be there."""

    def source(config, split="train"):
        size, channels, classes = config.data.size or (28, 28), config.data.channels or 1, 1000
        images = np.zeros((4, *size, channels), np.uint8)
        return data.from_arrays(images, np.arange(4), tuple(map(str, range(classes))))

    monkeypatch.setattr(build, "source", source)


def test_the_promised_configs_are_there():
    assert set(FILES) >= {"mnist", "blog", "smoke", "jit_b16", "patch_unet_mnist", "imagenet256", "ffhq1024", "lsun"}


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


def test_a_stored_config_of_another_version_names_the_fields():
    values = configs.to_dict(configs.Config())
    values["model"]["colour"] = values["model"].pop("depth")
    with pytest.raises(ValueError, match=r"\['colour'\] of Model"):
        configs.from_dict(values)


def test_fields_newer_than_a_stored_config_take_their_defaults():
    config = configs.Config(train=configs.Train(steps=7))
    values = configs.to_dict(config)
    del values["train"]["optimizer"], values["condition"]
    assert configs.from_dict(values) == config


@pytest.mark.parametrize("name", ["mnist", "blog", "smoke", "jit_b16", "patch_unet_mnist", "patch_unet_mnist:0"])
def test_dry_run_says_what_would_be_trained(name, blank_pictures, capsys):
    config = shipped(name)
    train.dry_run(config)
    printed = capsys.readouterr().out
    values, end = json.JSONDecoder().raw_decode(printed)
    assert configs.from_dict(values) == config
    parameters, tokens = re.search(r"([\d,]+) parameters, (\d+) tokens", printed[end:]).groups()
    assert float(re.search(r"([\d.e+]+) FLOPs", printed[end:])[1]) > 2 * config.train.batch_size * int(tokens)
    if name == "blog":
        attention = 4 * 324 * 2000 + 3 * 2000 + 324
        assert (parameters, tokens) == (f"{3 * attention + 5 * 324:,}", "4")
    if name == "jit_b16":
        assert (parameters[:3], tokens) == ("131", "256")


# Counted by building the published PyTorch program's networks with its README's flags.
PUBLISHED = {"lsun:2": 122916120, "lsun:4": 121416544, "lsun:8": 121011584, "ffhq1024": 162645344}
PUBLISHED |= {"imagenet256:0": 202148704, "imagenet256:1": 202148704}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_have_the_published_networks(name):
    config = shipped(name)
    classes = tuple(map(str, range(1000))) if config.model.conditional else ()
    seen = build.Seen((*config.data.size, 3), classes)
    params = jax.eval_shape(lambda: build.init_params(config, seen))
    assert sum(p.size for p in jax.tree.leaves(params)) == PUBLISHED[name]
    train.check(config)


def test_a_variant_that_is_not_there_names_those_that_are():
    for name in ("lsun:3", "imagenet256:2", "patch_unet_mnist:2"):
        with pytest.raises(ValueError, match=f"{name.partition(':')[0]}:.*as in {name.partition(':')[0]}.py:"):
            shipped(name)


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--config.model.dept=8", "model.depth"),
        ("--config.model.dept", "model.depth"),
        ("-config.train.depth=8", "model.depth"),
        ("--config.batchsize=8", "train.batch_size"),
        ("--noconfig.data.flop", "data.flip"),
        ("--config.sed=1", "seed"),
    ],
)
def test_a_field_that_does_not_exist_names_the_nearest(argument, nearest):
    with pytest.raises(ValueError, match=rf"there is no field --config\..*; the nearest is --config\.{nearest}$"):
        command_line.define_config(["train", "--tensorboard", argument])


def test_a_config_file_that_does_not_exist_names_those_that_do():
    with pytest.raises(
        FileNotFoundError, match="mnst.py.*blog, ffhq1024, imagenet256, jit_b16, lsun, mnist, patch_unet_mnist, smoke"
    ):
        command_line.define_config(["train", "--config=mnst.py"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.model.dept=8", "there is no field --config.model.dept; the nearest is --config.model.depth"),
        (
            "--config.model.channel_mult='1,2'",
            "--config.model.channel_mult=('1,2',) must list values of type float, as in (1, 1.5)",
        ),
        (
            "--config=experiments/configs/mnist.py:3",
            "--config=experiments/configs/mnist.py:3: mnist.py has no variants",
        ),
        (
            "--config=experiments/configs/lsun.py:3",
            "lsun:3: patches are of size 2, 4, 8, as in lsun.py:4",
        ),
        ("--config.train.steps=many", "flag --config.train.steps=many: invalid literal for int() .*'many'"),
        ("--wrkdir=runs/mine", "Unknown command line flag 'wrkdir'. Did you mean: workdir .?"),
    ],
)
def test_a_wrong_flag_is_one_line(argument, message):
    command = [sys.executable, "-m", "experiments.train", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert re.fullmatch("error: " + message.replace("(", r"\(").replace(")", r"\)"), line)


def test_flags_reach_the_config():
    """Nested, tuple and optional fields, and a boolean switched off, through a real command line."""
    program = (
        "import json, sys; from absl import flags; from experiments import command_line, config, train\n"
        "command_line.define_config(sys.argv); flags.FLAGS(sys.argv)\n"
        "print(json.dumps(config.to_dict(command_line.given_config())))"
    )
    given = ["--config=experiments/configs/smoke.py", "--config.model.depth=3", "--config.data.size=(8, 12)"]
    given += ["--config.train.patience=4", "--noconfig.data.flip", "--config.model.positions=('rotary',)"]
    given += ["--config.train.clip=None", "--config.data.name=None"]
    done = subprocess.run([sys.executable, "-c", program, *given], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = shipped("smoke")
    expected.model.depth, expected.data.size, expected.train.patience = 3, (8, 12), 4
    expected.model.positions = ("rotary",)
    expected.train.clip, expected.data.name = None, "None"  # only an optional field can be None
    assert configs.from_dict(json.loads(done.stdout)) == expected


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("train", "steps", 0, r"--config\.train\.steps=0 must be at least 1"),
        ("train", "batch_size", 0, r"--config\.train\.batch_size=0 must be"),
        ("train", "log_every", -1, r"--config\.train\.log_every=-1 must be"),
        ("train", "clip", 0.0, r"--config\.train\.clip=0\.0 must be positive"),
        ("train", "patience", 3, r"--config\.train\.patience=3 needs --config\.train\.eval_every"),
        ("train", "warmup", 2000, r"train.warmup=2000 must be below --config.train.steps=2000"),
        ("train", "schedule", "cosin", r"schedule='cosin' is not one of"),
        ("sample", "steps", 0, r"--config\.sample\.steps=0 must be"),
        ("sample", "count", 0, r"--config\.sample\.count=0 must be"),
        ("sample", "sampler", "dim", r"--config\.sample\.sampler='dim' is not one of ddim, ancestral, heun"),
        ("process", "path", "strait", r"--config\.process\.path='strait' is not one of linear"),
        ("process", "times", "often", r"--config\.process\.times='often' is not one of uniform"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(section, field, value, message):
    config = configs.Config()
    train.check(config)
    setattr(getattr(config, section), field, value)
    with pytest.raises(ValueError, match=message):
        train.check(config)


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        ("vit", {"optimizer": "Muon", "matrix_rate": 0.1}, "optimizer='Muon' is not one of adamw, muon"),
        ("vit", {"matrix_rate": 0.1}, r"--config\.train\.matrix_rate=0\.1 has no effect on this run"),
        ("vit", {"optimizer": "muon", "matrix_rate": 0.0}, r"--config\.train\.matrix_rate=0\.0 must be positive"),
        ("unet", {"optimizer": "muon"}, r"optimizer=muon knows the matrices of --config\.model\.name=vit, not .* unet"),
    ],
)
def test_optimisers_that_cannot_be_meant_are_refused(network, fields, message):
    config = configs.Config(model=configs.Model(name=network), train=configs.Train(**fields))
    with pytest.raises(ValueError, match=message):
        train.check(config)


def test_each_rate_reaches_the_parameters_it_is_for():
    config = configs.Config(model=configs.Model(width=16, depth=1, heads=2))
    config.train.optimizer, config.train.schedule, config.train.warmup = "muon", "constant", 0
    params = build.init_params(config, build.Seen((8, 8, 1), ()))
    moved = {}
    for field in (None, "learning_rate", "matrix_rate"):
        now = dataclasses.replace(config.train, **({field: 2 * getattr(config.train, field)} if field else {}))
        optimizer = build.optimizer(dataclasses.replace(config, train=now))
        updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
        block = updates["block_0"]
        moved[field] = np.array([abs(block[name]["kernel"]).max() for name in ("qkv", "gates")])
    np.testing.assert_allclose(moved["learning_rate"] / moved[None], [1, 2], rtol=1e-5)
    np.testing.assert_allclose(moved["matrix_rate"] / moved[None], [2, 1], rtol=1e-5)


def test_overstepping_belongs_to_ddim():
    config = configs.Config()
    config.sample.overstep = 1.5
    train.check(config)
    config.sample.sampler = "heun"
    with pytest.raises(ValueError, match=r"--config\.sample\.overstep=1\.5 belongs to the ddim sampler, not to heun"):
        train.check(config)


@pytest.mark.parametrize(
    ("name", "field", "value"), [("blog", "width", 64), ("blog", "dtype", "bfloat16"), ("mnist", "head_dim", 8)]
)
def test_a_field_that_the_network_does_not_read_is_refused(name, field, value):
    config = shipped(name)
    setattr(config.model, field, value)
    with pytest.raises(ValueError, match=f"--config.model.{field}={value} has no effect on --config.model.name="):
        build.network(config, build.Seen((28, 28, 1), ()))
