"""Configs of runs: round trips, differences, and errors about damaged files and wrong directories."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.io.stored_config import config_differences, read_config, write_config

CONFIG = {"seed": 0, "model": {"depth": 6, "size": (28, 28), "act": None}, "data": {"name": "mnist", "flip": False}}


def test_config_round_trip(tmp_path):
    workdir = tmp_path / "runs" / "mnist"
    write_config(workdir, CONFIG)
    stored = read_config(workdir)
    assert stored == {**CONFIG, "model": {**CONFIG["model"], "size": [28, 28]}}
    assert list(stored["model"]) == ["depth", "size", "act"]
    assert config_differences(CONFIG, stored) == []
    write_config(workdir, {"seed": 1})
    assert read_config(workdir) == {"seed": 1}
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_config_differences_name_fields_in_order():
    other = {"model": {"depth": 8, "size": [28, 32], "width": 64, "act": None}, "data": "mnist", "extra": {}}
    assert config_differences(CONFIG, other) == [
        'data: (absent) -> "mnist"',
        "data.flip: false -> (absent)",
        'data.name: "mnist" -> (absent)',
        "extra: (absent) -> {}",
        "model.depth: 6 -> 8",
        "model.size: [28, 28] -> [28, 32]",
        "model.width: (absent) -> 64",
        "seed: 0 -> (absent)",
    ]


def test_config_numbers_compare_by_value_and_booleans_do_not():
    assert config_differences({"rate": 1}, {"rate": 1.0}) == []
    assert config_differences({"rate": 1}, {"rate": True}) == ["rate: 1 -> true"]
    assert config_differences({"rate": 0}, {"rate": None}) == ["rate: 0 -> null"]
    assert config_differences({"a.b": 1}, {"a": {"b": 1}}) == ["a.b: (absent) -> 1", "a.b: 1 -> (absent)"]


VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab", max_size=2) | st.tuples(st.integers(0, 2))
CONFIGS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), VALUES), lambda c: st.dictionaries(st.sampled_from("abc"), VALUES | c)
)


@settings(max_examples=50, deadline=None)
@given(CONFIGS, CONFIGS)
def test_config_differences_are_none_exactly_for_equal_configs(a, b):
    assert config_differences(a, json.loads(json.dumps(a))) == []
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (config_differences(a, b) == []) == same
    assert len(config_differences(a, b)) == len(config_differences(b, a))


@pytest.mark.parametrize(
    ("config", "error", "field"),
    [
        ({"model": {"rate": float("nan")}}, ValueError, "model.rate=nan"),
        ({"data": {"path": Path("x")}}, TypeError, "data.path=PosixPath"),
        ({"sizes": [1, np.float32(2)]}, TypeError, "sizes=\\[1, "),
    ],
)
def test_config_values_that_json_cannot_store_are_named(tmp_path, config, error, field):
    with pytest.raises(error, match=f"config field {field}"):
        write_config(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_the_error_about_a_wrong_work_directory_says_what_to_pass(tmp_path):
    write_config(tmp_path / "runs" / "mnist", CONFIG)
    (tmp_path / "runs" / "mnist" / "checkpoints").mkdir()
    (tmp_path / "empty").mkdir()
    run = tmp_path / "runs" / "mnist"
    with pytest.raises(
        FileNotFoundError, match="missing does not exist; pass the directory that a training run wrote$"
    ):
        read_config(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="empty has no config.json; pass the directory"):
        read_config(tmp_path / "empty")
    for near in (tmp_path / "runs", run / "checkpoints", run / "config.json", run / "checkpoints" / "12"):
        with pytest.raises(FileNotFoundError, match=f"such as {run}$"):
            read_config(near)


@pytest.mark.parametrize("text", ['{"seed": 0', "", b"\xff\xfe{}", "[1, 2]"])
def test_a_damaged_config_is_an_error(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'} .* of another run"):
        read_config(tmp_path)
