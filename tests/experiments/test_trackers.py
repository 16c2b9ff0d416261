"""Trackers: what they are told, that they hold it without a network, and what is said before training."""

import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest

from experiments import log, trackers, train
from experiments.run_dir import RunDir
from tests.experiments.runs import ROOT, tiny

TOLD = """
import sys
from pathlib import Path
import numpy as np
from experiments import log, trackers
from experiments.run_dir import RunDir

folder = RunDir(Path(sys.argv[2]))
with log.Log(folder.metrics, trackers.start([sys.argv[1]], folder, "short", {"train": {"steps": 3}})) as written:
    for step in (1, 2, 3):
        written.scalars(step, {"loss": 1 / step})
    written.image(3, "samples", np.full((4, 5), 7, np.uint8))
"""


def told(name, folder):
    """What the tracker writes in a process of its own, that has no network."""
    environment = {**os.environ, "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder)}
    command = [sys.executable, "-c", TOLD, name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_tracker_is_told_numbers_and_images_and_closed_also_after_an_error(tmp_path):
    heard = [], []
    followers = [
        trackers.Tracker(
            lambda step, values, to=to: to.append((step, dict(values))),
            lambda step, name, image, to=to: to.append((step, name, image.shape, image.dtype)),
            lambda finished, to=to: to.append(finished),
        )
        for to in heard
    ]
    with pytest.raises(FloatingPointError), log.Log(tmp_path / "metrics.jsonl", followers) as written:
        written.scalars(1, {"loss": 0.5})
        written.tell(2, {"report/distance": 3.0})
        for shape in ((4, 5), (4, 5, 1), (4, 5, 3)):
            written.image(2, "samples", np.zeros(shape, np.uint8))
        raise FloatingPointError
    images = [(2, "samples", (4, 5, 3), np.uint8)] * 3
    assert heard[0] == heard[1] == [(1, {"loss": 0.5}), (2, {"report/distance": 3.0}), *images, False]
    assert written.rows() == [{"step": 1, "loss": 0.5}]


def test_a_tracker_that_fails_is_left_out_and_ends_nothing(tmp_path, capsys):
    def fail(*_):
        raise ConnectionError("no network")

    heard = []
    followers = [
        trackers.Tracker(fail, fail, fail),
        trackers.Tracker(lambda step, values: heard.append(step), fail, heard.append),
    ]
    with log.Log(tmp_path / "metrics.jsonl", followers) as written:
        for step in (1, 2):
            written.scalars(step, {"loss": 0.5})
    assert heard == [1, 2, True] and len(written.rows()) == 2
    assert capsys.readouterr().out == "a tracker failed and is left out from here on: ConnectionError: no network\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_tracker_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=rf"--track={name} needs {package}: pip install -e '\.\[{name}\]'"):
        train.train(tiny(), tmp_path, track=[name])


def test_unknown_trackers_are_named_with_those_that_are_known(tmp_path):
    with pytest.raises(
        ValueError, match=r"--track=wandb,mlflow: \['mlflow'\] are not among tensorboard, wandb, trackio"
    ):
        trackers.start(["wandb", "mlflow"], RunDir(tmp_path), "a", {})


def test_a_run_has_one_name_for_trackers_and_no_other_run_has_it(tmp_path):
    names = []
    for each in ("a", "b"):
        (tmp_path / each).mkdir()
        names.append({RunDir(tmp_path / each).tracker_id() for _ in range(2)})
    assert [len(found) for found in names] == [1, 1] and names[0] != names[1]


@pytest.mark.slow
def test_tensorboard_holds_numbers_and_images(tmp_path):
    pytest.importorskip("tensorboardX")
    told("tensorboard", tmp_path)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"loss", b"samples", b"PNG"))


@pytest.mark.slow
def test_wandb_offline_holds_numbers_and_images_under_one_id(tmp_path):
    pytest.importorskip("wandb")
    told("wandb", tmp_path)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith(RunDir(tmp_path).tracker_id())
    (content,) = (path.read_bytes() for path in run.glob("*.wandb"))
    assert b"loss" in content and b"samples" in content
    assert len(list((run / "files" / "media" / "images").iterdir())) == 1


@pytest.mark.slow
def test_trackio_holds_numbers_and_images_of_one_run_also_when_it_is_continued(tmp_path):
    pytest.importorskip("trackio")
    for _ in range(2):
        told("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / f"{trackers.PROJECT}.db") as database:
        rows = database.execute("select run_name, step, cast(metrics as text) from metrics").fetchall()
    assert {name for name, _, _ in rows} == {f"short-{RunDir(tmp_path).tracker_id()}"}
    assert {step for _, step, metrics in rows if "loss" in metrics} == {1, 2, 3}
    assert any("samples" in metrics for _, _, metrics in rows)
