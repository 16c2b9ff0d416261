"""Paths: flags that name files and folders, and the folder of what is kept between runs."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from absl import flags

flags.disclaim_key_flags()  # a flag defined by `define_path` is one of the module that calls it


class _Parser(flags.ArgumentParser):
    """Reads a path, or several with commas between them: ~ is the home folder, which a shell leaves after "="."""

    def parse(self, argument: str) -> str:
        if not argument.strip():
            raise ValueError(
                "it names nothing; if it is a shell variable, it may not be set. Leave the flag out, or pass a path"
            )
        return ",".join(map(os.path.expanduser, argument.split(",")))


def define_path(name: str, default: str | None, explanation: str) -> flags.FlagHolder:
    """Defines a flag that names a file or folder; all of them understand ~."""
    return flags.DEFINE(_Parser(), name, default, explanation, serializer=flags.ArgumentSerializer())


def expand_paths(section: Any) -> None:
    """Replaces ~ in the fields of a config's section that are paths."""
    for each in dataclasses.fields(section):
        value = getattr(section, each.name)
        if each.metadata.get("path") and value is not None:
            setattr(section, each.name, os.path.expanduser(value))


def cache_folder() -> Path:
    """Where compiled programs and lists of checked images are kept: $PATCH_DIFFUSION_CACHE, or in the user's cache."""
    return Path(os.environ.get("PATCH_DIFFUSION_CACHE") or Path.home() / ".cache" / "patch-diffusion")
