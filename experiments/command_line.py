"""From a command line to a config: `--config=FILE[:VARIANT]`, and a flag for every field of it.

What cannot be meant is refused in one line that names what can: a field, a file, a variant, a value of a list.
"""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from absl import flags
from ml_collections import config_flags

from experiments.config import Config

_CONFIGS = Path(__file__).parent / "configs"
# Fields that the command line sets to None, for which ml_collections has no word.
_NONE: list[str] = []

_SPLIT = flags.DEFINE_integer("split", None, "Which SNR expert to train; short for --config.process.split.")


def define_config(argv: list[str]) -> None:
    """Defines --config, and a flag for every field of it that `argv` sets.

    Raises:
      ValueError: there is no such field; the nearest one is named.
      FileNotFoundError: there is no such config file.
    """
    known = fields(Config)
    _NONE.clear()
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("no").removeprefix("config.")
        if argument.startswith("-") and name.removeprefix("no").startswith("config.") and field not in known:
            raise ValueError(f"there is no field --config.{field}; the nearest is --config.{nearest(field, known)}")
        if argument.startswith("-") and name == "config" and value and not Path(value.partition(":")[0]).is_file():
            shipped = ", ".join(sorted(p.stem for p in _CONFIGS.glob("[a-z]*.py")))
            raise FileNotFoundError(f"--config={value}: there is no such file; in {_CONFIGS} there are {shipped}")
        if value == "None" and type(None) in get_args(known.get(field)):
            _NONE.append(field)
            argv.remove(argument)
    check_variant(argv)
    explanation = "Config file; its fields, explained in experiments/config.py, are flags: --config.model.depth=8."
    config_flags.DEFINE_config_file("config", str(_CONFIGS / "mnist.py"), explanation, sys_argv=argv)


def check_variant(argv: list[str]) -> None:
    """Raises ValueError if --config=FILE:VARIANT names a variant that one of the shipped files does not have."""
    for argument in argv[1:]:
        name, _, value = argument.lstrip("-").partition("=")
        path, colon, variant = value.partition(":")
        if name != "config" or not colon or Path(path).resolve().parent != _CONFIGS.resolve():
            continue
        get_config = importlib.import_module(f"experiments.configs.{Path(path).stem}").get_config
        if not inspect.signature(get_config).parameters:
            raise ValueError(f"--config={value}: {Path(path).name} has no variants")
        get_config(variant)


def given_config() -> Config:
    """The config that the command line gives."""
    config: Config = flags.FLAGS.config
    for field in _NONE:
        section, _, name = field.rpartition(".")
        setattr(getattr(config, section) if section else config, name, None)
    if _SPLIT.value is not None:
        if config.process.split not in (None, _SPLIT.value):
            raise ValueError(f"--split={_SPLIT.value}, but the config is that of expert {config.process.split}")
        config.process.split = _SPLIT.value
    check_lists(config)
    return config


def check_lists(config: Config) -> None:
    """Raises ValueError for a list on the command line with something else in it than its field holds."""
    for name, hint in fields(Config).items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, field)
        lists = [part for part in (hint, *get_args(hint)) if get_origin(part) is tuple]
        element = get_args(lists[0])[0] if lists else None
        kinds = {float: (int, float), int: int, str: str}.get(element)
        if kinds and value is not None and not all(isinstance(v, kinds) for v in value):
            example = {float: "(1, 1.5)", int: "(16, 8)", str: "('sincos', 'rotary')"}[element]
            raise ValueError(f"--config.{name}={value} must list values of type {element.__name__}, as in {example}")


def fields(cls: type) -> dict[str, Any]:
    """Dotted names of all fields of a dataclass and of those inside it, "seed", "model.depth", and their types."""
    names = {}
    for name, hint in get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            names |= {f"{name}.{inner}": inner_hint for inner, inner_hint in fields(hint).items()}
        else:
            names[name] = hint
    return names


def nearest(name: str, known: Iterable[str]) -> str:
    """The name in `known` that was meant by `name`: the same field of another section, else the most similar."""
    own = name.rpartition(".")[2]
    elsewhere = [k for k in known if k.rpartition(".")[2] == own]
    return difflib.get_close_matches(name, elsewhere or list(known), 1, 0.0)[0]
