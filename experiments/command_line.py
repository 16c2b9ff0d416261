"""From a command line to a config: `--config=FILE[:VARIANT]`, and a flag for every field of it.

An unknown field, file or variant, or a list with a wrong value, is an error of one line that names the known ones.
"""

import difflib
import importlib.util
import inspect
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_origin

from absl import flags
from ml_collections import config_flags

from experiments.config import AnyNetwork, Config, fields
from experiments.paths import expand_paths

_CONFIGS = Path(__file__).parent / "configs"
DEFAULT = _CONFIGS / "mnist.py"
# Fields that the command line sets to None, which ml_collections cannot express.
_NONE: list[str] = []

_SPLIT = flags.DEFINE_integer("split", None, "Which SNR expert to train; short for --config.process.split.")


def define_config(argv: list[str]) -> None:
    """Defines --config, and a flag for every field of it that `argv` sets.

    Raises:
      ValueError: there is no such field; the nearest one is named, or the fields of the config's network.
      FileNotFoundError: there is no such config file.
    """
    _NONE.clear()
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "config" and equals:
            argv[i] = f"{name}={os.path.expanduser(value)}"
    config = chosen_config(argv)
    known = fields(config)
    for argument in list(argv[1:]):
        name, _, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("no").removeprefix("config.")
        if not argument.startswith("-") or not name.removeprefix("no").startswith("config."):
            continue
        if field not in known:
            raise ValueError(f"there is no field --config.{field}; {instead(field, config)}")
        if value == "None" and type(None) in get_args(known[field]):
            _NONE.append(field)
            argv.remove(argument)
    explanation = "Config file; its fields, explained in experiments/config.py, are flags: --config.model.depth=8."
    config_flags.DEFINE_config_file("config", str(DEFAULT), explanation, sys_argv=argv)


def chosen_config(argv: list[str]) -> Config:
    """The config of the file that `argv` names, --config=FILE[:VARIANT] or --config FILE, before fields are set.

    Raises:
      FileNotFoundError: there is no such file; the shipped ones are named.
      ValueError: the file has no such variant.
    """
    given = str(DEFAULT)
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            given = value if equals else following
    file, colon, variant = given.partition(":")
    if not Path(file).is_file():
        shipped = ", ".join(sorted(p.stem for p in _CONFIGS.glob("[a-z]*.py")))
        raise FileNotFoundError(f"--config={given}: there is no such file; in {_CONFIGS} there are {shipped}")
    spec = importlib.util.spec_from_file_location("chosen_config", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if colon and not inspect.signature(module.get_config).parameters:
        raise ValueError(f"--config={given}: {Path(file).name} has no variants")
    return module.get_config(*([variant] if colon else []))


def given_config() -> Config:
    """The config that the command line gives."""
    config: Config = flags.FLAGS.config
    for field in _NONE:
        section, _, name = field.rpartition(".")
        setattr(getattr(config, section) if section else config, name, None)
    for section in (config.data, config.train):
        expand_paths(section)
    if _SPLIT.value is not None:
        if config.process.split not in (None, _SPLIT.value):
            raise ValueError(f"--split={_SPLIT.value}, but the config is that of expert {config.process.split}")
        config.process.split = _SPLIT.value
    check_lists(config)
    return config


def check_lists(config: Config) -> None:
    """Raises ValueError for a list on the command line with something else in it than its field holds."""
    for name, hint in fields(config).items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, field)
        lists = [part for part in (hint, *get_args(hint)) if get_origin(part) is tuple]
        element = get_args(lists[0])[0] if lists else None
        kinds = {float: (int, float), int: int, str: str}.get(element)
        if kinds and value is not None and not all(isinstance(v, kinds) for v in value):
            example = {float: "(1, 1.5)", int: "(16, 8)", str: "('sincos', 'rotary')"}[element]
            raise ValueError(f"--config.{name}={value} must list values of type {element.__name__}, as in {example}")


def instead(field: str, config: Config) -> str:
    """What to pass instead of a field that this config does not have."""
    section, _, name = field.rpartition(".")
    others = [kind.__name__ for kind in get_args(AnyNetwork) if section == "model" and name in fields(kind())]
    if others:
        own = type(config.model).__name__
        return (
            f"{name} belongs to {' and '.join(others)}, and config.model is a {own}: {', '.join(fields(config.model))}"
        )
    return f"the nearest is --config.{nearest(field, fields(config))}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known` that was meant by `name`: the same field of another section, else the most similar."""
    own = name.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == own]
    return difflib.get_close_matches(name, elsewhere or list(known), 1, 0.0)[0]
