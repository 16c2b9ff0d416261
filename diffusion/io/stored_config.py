"""Writes, reads and compares the config of a run, stored as JSON in its work directory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.io.files import atomic_write, check_writable

CONFIG = "config.json"


def write_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes `config`, a nested dict of plain values, as config.json in `workdir`, which is created if need be.

    Raises:
      TypeError: JSON has no such type; the message names the field.
      ValueError: a number is not finite, which JSON does not allow (use None); the message names the field.
      OSError: `workdir` is not writable.
    """
    text = json.dumps(_plain(config), indent=2) + "\n"
    check_writable(workdir)
    atomic_write(Path(workdir) / CONFIG, lambda file: file.write(text.encode()))


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config of the run in `workdir`.

    Raises:
      FileNotFoundError: `workdir` does not exist or is not the work directory of a run; the message says what to pass.
      ValueError: the stored config is damaged.
    """
    workdir = Path(workdir)
    path = workdir / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        problem = f"has no {CONFIG}" if workdir.exists() else "does not exist"
        around = [*sorted(workdir.glob("*")), *workdir.parents[:2]]
        runs = [str(p) for p in around if (p / CONFIG).is_file()][:3]
        hint = f", such as {', '.join(runs)}" if runs else ""
        raise FileNotFoundError(
            f"work directory {workdir} {problem}; pass the directory that a training run wrote{hint}"
        ) from None
    except ValueError as e:
        raise ValueError(f"{path} is damaged ({e}); put back a copy or pass the directory of another run") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} has {config!r:.40}, not the config of a run; pass the directory of another run")
    return config


def config_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields in which configs `a` and `b` differ, sorted by path. Values compare as JSON stores them.

    >>> config_differences({"model": {"depth": 6}, "seed": 0}, {"model": {"depth": 8, "width": 4}, "seed": 0})
    ['model.depth: 6 -> 8', 'model.width: (absent) -> 4']
    """
    old, new = (_fields(_plain(config)) for config in (a, b))
    lines = []
    for path in sorted(old.keys() | new.keys()):
        before, after = (json.dumps(side[path]) if path in side else "(absent)" for side in (old, new))
        equal_numbers = {type(side.get(path)) for side in (old, new)} == {int, float} and old[path] == new[path]
        if before != after and not equal_numbers:
            lines.append(f"{'.'.join(path)}: {before} -> {after}")
    return lines


def _fields(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Path -> value of every field that is not a section; an empty section counts as a value."""
    fields: dict[tuple[str, ...], Any] = {}
    for name, value in config.items():
        here = (*path, str(name))
        fields |= _fields(value, here) if isinstance(value, Mapping) and value else {here: value}
    return fields


def _plain(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """`config` after a round trip through JSON (tuples become lists); an error names a field that JSON cannot store."""
    plain = {}
    for name, value in config.items():
        here = (*path, str(name))
        if isinstance(value, Mapping):
            plain[here[-1]] = _plain(value, here)
            continue
        try:
            plain[here[-1]] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as e:
            raise type(e)(f"config field {'.'.join(here)}={value!r:.80} cannot be stored as JSON: {e}") from None
    return plain
