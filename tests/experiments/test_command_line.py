"""The command line: flags reach the config, and a wrong flag is one line that names the right one."""

import json
import re
import subprocess
import sys

import pytest

from experiments import advise, command_line
from experiments import config as configs
from experiments.configs import blog, jit, patch_unet_mnist, smoke
from tests.experiments.runs import ROOT

UNET = "--config=experiments/configs/patch_unet_mnist.py"
PROGRAM = """
import json, sys
from absl import flags
from experiments import command_line, config, train

for given in json.loads(sys.argv[1]):
    for name in [n for n in flags.FLAGS if n.startswith("config")]:
        delattr(flags.FLAGS, name)
    flags.FLAGS["split"].unparse()
    argv = ["train", *given]
    try:
        command_line.define_config(argv)
        flags.FLAGS(argv)
        print(json.dumps(config.to_dict(command_line.given_config())))
    except (flags.Error, ValueError, OSError) as e:
        print(json.dumps(str(e)))
"""


def parsed(*commands):
    """The stored config that each of these command lines gives, or its error as text; in one process of its own."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_arguments_of_a_config_give_it_back():
    given = [smoke.get_config(), patch_unet_mnist.get_config("1"), blog.get_config(), jit.get_config("l16")]
    given[0].data = configs.Data(name="folder:my pets", size=(8, 16), labels=False, flip=True)
    given[0].train.ema_power, given[0].train.clip, given[0].sample.sigma_max = (0.05, 0.1), None, 5e-7
    for config, found in zip(given, parsed(*map(advise.arguments, given)), strict=True):
        assert found == json.loads(json.dumps(configs.to_dict(config)))


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("--config.model.dept=8", "model.depth"),
        ("--config.model.dept", "model.depth"),
        ("-config.train.depth=8", "model.depth"),
        ("--config.batchsize=8", "train.batch_size"),
        ("--noconfig.data.flop", "data.flip"),
        ("--config.sed=1", "seed"),
        ("--config.model.num_head=8", "model.heads"),
    ],
)
def test_a_field_that_does_not_exist_names_the_nearest(argument, nearest):
    with pytest.raises(ValueError, match=rf"there is no field --config\..*; the nearest is --config\.{nearest}$"):
        command_line.define_config(["train", "--dry_run", argument])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--config.model.num_channels=8"],
            "num_channels belongs to UNet, and config.model is a ViT: patch_size, .*width",
        ),
        (
            ["--config.model.head_dim=8"],
            "head_dim belongs to Blog, and config.model is a ViT: patch_size, stride, width",
        ),
        ([UNET, "--config.model.depth=8"], "depth belongs to ViT and Blog, and config.model is a UNet: .*num_channels"),
    ],
)
def test_a_field_of_another_network_is_refused_with_the_fields_of_the_one_there_is(given, message):
    field = given[-1].partition("=")[0].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"^there is no field {field}; {message}"):
        command_line.define_config(["train", *given])


def test_a_config_file_that_does_not_exist_names_those_that_do():
    with pytest.raises(
        FileNotFoundError,
        match="mnst.py.*blog, ffhq1024, imagenet256, jit, lsun, mnist, mnist_onestep, patch_unet_mnist, smoke",
    ):
        command_line.define_config(["train", "--config=mnst.py"])


def test_wrong_values_are_named():
    wrong = {
        (UNET, "--config.model.channel_mult='1,2'"): r"--config\.model\.channel_mult=\('1,2',\) must list values of "
        r"type float, as in \(1, 1\.5\)",
        ("--config=experiments/configs/mnist.py:3",): r"--config=experiments/configs/mnist\.py:3: mnist\.py has no "
        "variants",
        ("--config=experiments/configs/lsun.py:3",): r"lsun:3: patches are of size 2, 4, 8, as in lsun\.py:4",
        ("--config.train.steps=many",): "flag --config.train.steps=many: invalid literal for int.*'many'",
    }
    for found, message in zip(parsed(*wrong), wrong.values(), strict=True):
        assert re.fullmatch(message, found), found


def test_a_wrong_flag_is_one_line():
    """Of the command itself, with its exit status."""
    command = [sys.executable, "-m", "experiments.train", "--wrkdir=runs/mine"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert re.fullmatch("error: Unknown command line flag 'wrkdir'. Did you mean: workdir .?", line)


def test_flags_reach_the_config():
    """Nested, tuple and optional fields, and a boolean switched off, through a real command line."""
    given = ["--config=experiments/configs/smoke.py", "--config.model.depth=3", "--config.data.size=(8, 12)"]
    given += ["--config.train.patience=4", "--noconfig.data.flip", "--config.model.positions=('rotary',)"]
    given += ["--config.train.clip=None", "--config.data.name=None"]
    other = [UNET, "--config.model.num_channels=8", "--config.model.channel_mult=(1, 1.5)", "--split=1"]
    other += ["--config.process.snr_splits=(0.25,)", "--noconfig.data.labels"]
    found, unet = (configs.from_dict(values) for values in parsed(given, other))
    expected = smoke.get_config()
    expected.model.depth, expected.data.size, expected.train.patience = 3, (8, 12), 4
    expected.model.positions = ("rotary",)
    expected.train.clip, expected.data.name = None, "None"  # only an optional field can be None
    assert found == expected
    assert (unet.model.num_channels, unet.model.channel_mult, unet.data.labels) == (8, (1, 1.5), False)
    assert (unet.process.split, unet.process.snr_splits) == (1, (0.25,))


def test_without_flags_the_main_job_is_trained():
    default = str(command_line.DEFAULT)
    for argv in (["train"], ["train", "--config", default], ["train", f"--config={default}"]):
        assert command_line.chosen_config(argv).name == "mnist"
    other = command_line.chosen_config(["train", "--config", UNET.partition("=")[2], "--split=1"])
    assert other.name == "patch_unet_mnist"
