"""Paths that the user gives: ~ in every flag and field that is one, and the folder of what is kept."""

import ast
import dataclasses
from pathlib import Path

import pytest
from absl import flags

from experiments import command_line, paths
from experiments.config import Config
from tests.experiments.runs import ROOT

# The text flags that are no paths. One that is must be defined by `define_path`, which replaces ~.
NO_PATHS = {"split_name", "respacing", "entry", "compile_for", "compile_only", "child", "name", "split", "reference"}
NO_PATHS |= {"coordinator", "data", "measure", "sampler", "target"}


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")


def calls(name):
    """The first arguments of all calls of a function of this name in the commands."""
    for file in (ROOT / "experiments").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and name in (getattr(node.func, "attr", ""), getattr(node.func, "id", "")):
                yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def test_every_text_flag_is_a_path_or_listed_as_none():
    assert set(calls("DEFINE_string")) <= NO_PATHS
    assert set(calls("define_path")) >= {"workdir", "outdir", "base_samples", "samples", "source", "data_dir", "json"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [("~/x", "/home/me/x"), ("~", "/home/me"), ("a/~/b", "a/~/b"), ("~/a,b,~/c", "/home/me/a,b,/home/me/c")],
)
def test_a_path_flag_replaces_the_home_folder(given, meant):
    own = flags.FlagValues()
    flags.DEFINE(paths._Parser(), "place", "~/default", "A place.", flag_values=own)
    own(["program"])
    assert own.place == "/home/me/default"
    own(["program", f"--place={given}"])
    assert own.place == meant


def test_a_path_flag_belongs_to_the_module_that_defines_it():
    import experiments.command  # noqa: F401

    assert "workdir" in {flag.name for flag in flags.FLAGS.flags_by_module_dict()["experiments.command"]}


def test_fields_that_are_paths_replace_the_home_folder():
    config = Config()
    config.data.data_dir, config.train.init_from, config.data.name = "~/data", "~/runs/a", "~"
    for section in (config.data, config.train):
        paths.expand_paths(section)
    assert (config.data.data_dir, config.train.init_from) == ("/home/me/data", "/home/me/runs/a")
    assert config.data.name == "~"
    for section in (config.process, config.sample, config.condition, config.model):
        fields = dataclasses.fields(section)
        assert not any("path" in f.metadata for f in fields), "given_config replaces ~ in the sections data and train"


def test_a_config_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("from experiments.configs.smoke import get_config\n")
    monkeypatch.setattr(command_line.config_flags, "DEFINE_config_file", lambda *_, **__: None)
    argv = ["train", "--config=~/mine.py", "--config.model.depth=3"]
    command_line.define_config(argv)
    assert argv[1] == f"--config={tmp_path}/mine.py"


def test_what_is_kept_has_one_folder(monkeypatch):
    monkeypatch.delenv("PATCH_DIFFUSION_CACHE", raising=False)
    assert paths.cache_folder() == Path("/home/me/.cache/patch-diffusion")
    monkeypatch.setenv("PATCH_DIFFUSION_CACHE", "/tmp/kept")
    assert paths.cache_folder() == Path("/tmp/kept")


def test_a_path_of_an_unset_variable_is_refused():
    values = flags.FlagValues()
    flags.DEFINE(paths._Parser(), "file", None, "A file.", flag_values=values)
    with pytest.raises(flags.IllegalFlagValueError, match="it names nothing; if it is a shell variable"):
        values(["program", "--file="])
    values(["program", "--file=~/a"])
    assert values.file == "/home/me/a"
