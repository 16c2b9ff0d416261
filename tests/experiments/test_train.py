"""experiments.train from end to end: what a run leaves, stopping and continuing, early stopping, other data."""

import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion import data, sharding
from diffusion.io import checkpoint
from experiments import hooks, image_files, inputs, log, parts, report, run_dir, signals, train
from experiments.parts import DataSpec
from experiments.run_dir import RunDir
from tests.experiments.runs import (
    ROOT,
    STEPS,
    assert_same_state,
    files,
    killed_at,
    rows,
    samples,
    state,
    tiny,
    tiny_blog,
    tiny_chain,
    trained,
)

pytestmark = pytest.mark.usefixtures("kept")

# What a run leaves


def test_a_run_writes_what_it_says(run):
    c, (images, labels) = run.config, samples(run.workdir)
    names = {p.name for p in run.workdir.iterdir()}
    expected = {"config.json", "metrics.jsonl", "checkpoints", "previews", "samples.npz", "samples.png", "report.json"}
    expected |= {"trajectory.png", "nearest.png", "seams.png", "report.html"}
    assert names == expected
    assert (images.dtype, images.shape) == (np.uint8, (c.sample.count, 28, 28, 1))
    assert labels.tolist() == [*range(10), *range(5)]
    assert labels.dtype.kind == "i"
    assert images.std() > 10
    with Image.open(run.workdir / "samples.png") as image:
        np.testing.assert_array_equal(image, image_files.grid(images, 10))


def test_every_interval_is_kept(run):
    assert checkpoint.steps(run.workdir / "checkpoints") == [3, STEPS]
    assert sorted(p.name for p in (run.workdir / "previews").iterdir()) == ["0000002.png", "0000004.png"]
    logged = rows(run.workdir, timings=True)
    assert [row["step"] for row in logged] == [1, 2, 4, STEPS]
    assert all(set(row) >= {"loss", "grad_norm", "images_per_second", "seconds"} for row in logged)
    seconds = [row["seconds"] for row in logged]
    assert seconds == sorted(seconds)


def test_previews_show_samples_from_the_same_noise(run):
    shape = image_files.grid(np.zeros((40, 28, 28, 1), np.uint8), 10).size
    shown = []
    for path in sorted((run.workdir / "previews").iterdir()):
        with Image.open(path) as image:
            assert image.size == shape
            shown.append(np.asarray(image))
    assert (shown[0] != shown[1]).any()


def test_the_report_says_what_was_reached_and_what_to_type_next(run):
    values = json.loads((run.workdir / "report.json").read_text())
    assert values == run.report
    assert values["train_steps"] == STEPS
    assert (values["sample_count"], values["sample_steps"], values["guidance"]) == (15, 2, 2.0)
    assert values["train_seconds"] > 0
    assert values["sample_seconds"] > 0
    assert values["distance"] > values["reference"] > 0
    assert 0 <= values["agreement"] <= 1
    end = run.printed[run.printed.index("Trained") :]
    assert f"Trained {STEPS} steps in" in end
    assert f"{values['distance']:.2f}" in end
    assert f"{values['agreement']:.1%}" in end
    assert end.strip().splitlines()[-1].startswith(f"Next: python -m experiments.sample --workdir={run.workdir} ")
    assert (
        "Of 15 samples these numbers are mostly noise: make 100 or more, better 1,000 (experiments.sample --num_samples"
        in end
    )
    assert "mostly noise" not in report.paragraph(run.workdir, {**values, "measured": 100})
    assert "NaN" not in end
    assert "2 of 15 samples hold NaN" in report.paragraph(run.workdir, {**values, "sample_non_finite": 2})


def test_the_stored_config_says_what_the_run_is(run):
    config, spec = RunDir(run.workdir).stored()
    assert config == run.config
    assert spec == DataSpec((28, 28, 1), tuple("0123456789"))


# Stopping and continuing


@pytest.mark.slow
def test_interrupted_and_continued_is_uninterrupted(run, tmp_path, monkeypatch, unmeasured):
    with monkeypatch.context() as patch:
        killed_at(patch, 4)
        with pytest.raises(signals.Stopped, match=rf"Stopped at step 5 of {STEPS}; the same command continues"):
            trained(tiny(), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 5]
    assert not (tmp_path / "report.json").exists()
    again = trained(tiny(), tmp_path)
    assert "continuing after step 5" in again.printed
    assert_same_state(state(tiny(), tmp_path, STEPS), state(tiny(), run.workdir, STEPS))
    assert rows(tmp_path) == rows(run.workdir)
    np.testing.assert_array_equal(samples(tmp_path)[0], samples(run.workdir)[0])
    assert files(tmp_path / "previews")["0000002.png"] == files(run.workdir / "previews")["0000002.png"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_all_of_its_state(tmp_path, monkeypatch):
    """Muon's and NAdam's moments, two averages, and the losses that times of training follow."""
    config = tiny_chain()
    config.process.times, config.train.steps, config.train.log_every = "loss_second_moment", 4, 2
    config.train.optimizer, config.train.save_every, config.train.sample_every = "muon", 4, 9
    trained(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(signals.Stopped):
            trained(config, tmp_path / "stopped")
    trained(config, tmp_path / "stopped")
    one, other = (state(config, tmp_path / name) for name in ("whole", "stopped"))
    assert_same_state(one, other)
    assert one.carry.counts.sum() == 16 and len(one.ema) == 2


def test_a_run_from_before_a_field_existed_is_continued_and_sampled_from(copy):
    stored = json.loads((copy / "config.json").read_text())
    del stored["train"]["optimizer"], stored["train"]["matrix_rate"]
    (copy / "config.json").write_text(json.dumps(stored))
    assert "is finished" in trained(tiny(), copy).printed
    assert run_dir.trained([copy]).config == tiny()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(run, copy, unmeasured):
    (copy / "report.json").unlink()
    largest = max((copy / "checkpoints" / str(STEPS)).rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    again = trained(tiny(), copy)
    assert f"checkpoints/{STEPS} cannot be read" in again.printed
    assert "going back to step 3" in again.printed
    assert "continuing after step 3" in again.printed
    assert_same_state(state(tiny(), copy, STEPS), state(tiny(), run.workdir, STEPS))
    assert rows(copy) == rows(run.workdir)


@pytest.mark.slow
def test_sigterm_to_the_command_saves(tmp_path):
    """A process of its own, because its exit status and its messages matter."""
    config = tiny()
    config.train.steps, config.train.log_every = 300, 1
    config.train.sample_every = config.train.save_every = 1000
    (tmp_path / "config.py").write_text(
        f"from experiments.config import *\nfrom diffusion.models.vit import ViT\ndef get_config(): return {config!r}\n"
    )
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", f"--config={tmp_path}/config.py", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for line in process.stdout:
            if line.startswith("training from step 0"):
                process.send_signal(signal.SIGTERM)
                break
        _, printed = process.communicate()
    assert process.returncode == 130
    assert "SIGTERM: finishing this step and saving" in printed
    assert "the same command continues from there" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    (step,) = checkpoint.steps(workdir / "checkpoints")
    assert step < 300
    assert [row["step"] for row in rows(workdir)] == [*range(1, step + 1)]
    assert RunDir(workdir).stored()[0] == config


def test_a_finished_run_says_so_and_trains_nothing(run, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trained"))
    before = files(run.workdir)
    again = trained(tiny(), run.workdir)
    assert again.report == run.report
    assert again.printed.startswith(f"{run.workdir} is finished; nothing was trained again.")
    assert again.printed.endswith(run.printed[run.printed.index("Trained") :])
    assert files(run.workdir) == before


def test_a_work_directory_of_another_config_is_refused(run):
    config = tiny()
    config.train.learning_rate, config.model.depth, config.model.positions = 0.5, 2, ("sincos",)
    before = files(run.workdir)
    with pytest.raises(ValueError, match="another config") as refusal:
        trained(config, run.workdir)
    differing = [line.strip() for line in str(refusal.value).splitlines() if line.startswith("  ")]
    assert differing == [
        "model.depth: 1 -> 2",
        'model.positions: ["learned", "rotary"] -> ["sincos"]',
        "train.learning_rate: 0.01 -> 0.5",
    ]
    assert files(run.workdir) == before


def test_a_file_in_the_way_of_the_work_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trained"))
    (tmp_path / "file").write_text("not mine")
    with pytest.raises(OSError, match="cannot write in .*file"):
        trained(tiny(), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not mine"


def test_a_network_that_does_not_fit_the_images_is_refused_before_anything_is_written(tmp_path):
    config = tiny()
    config.model.patch_size = 5
    with pytest.raises(ValueError, match="patch_size=5 does not tile spatial axis 0 of length 28"):
        trained(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_non_finite_loss_ends_the_run_and_saves_nothing(tmp_path):
    config = tiny_chain()
    config.train.learning_rate, config.train.clip, config.train.steps = 1e30, None, 4
    config.train.log_every, config.train.save_every, config.train.sample_every = 100, 3, 100
    with pytest.raises(FloatingPointError, match=r"(nan|inf) at step 3; nothing was saved after step 0\. Lower"):
        trained(config, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize("eval_every", [None, 3])
def test_what_is_due_after_a_step(eval_every):
    config = tiny().train
    config.eval_every = eval_every
    found = [train.due(config, step) for step in range(1, STEPS + 1)]
    assert [i + 1 for i, now in enumerate(found) if now.log] == [1, 2, 4, 6]
    assert [i + 1 for i, now in enumerate(found) if now.save] == [3, 6]
    assert [i + 1 for i, now in enumerate(found) if now.preview] == [2, 4, 6]
    assert [i + 1 for i, now in enumerate(found) if now.validate] == ([3, 6] if eval_every else [])


# Early stopping


def validation(config, spec, workdir):
    run = parts.resolve(config, spec)
    return hooks.Validation(config, run, RunDir(workdir), log.Log(workdir / "metrics.jsonl"), sharding.make_mesh())


def test_early_stopping_keeps_the_best_weights(blog_run):
    losses = {row["step"]: row["held_out_loss"] for row in rows(blog_run.workdir) if "held_out_loss" in row}
    best = min(losses, key=losses.get)
    patience, last = blog_run.config.train.patience, max(losses)
    assert 1 < best < last == best + patience < blog_run.config.train.steps
    assert checkpoint.steps(blog_run.workdir / "checkpoints") == [last]
    kept = state(blog_run.config, blog_run.workdir)
    assert int(kept.step) == best
    assert blog_run.report["train_steps"] == last
    check = validation(*RunDir(blog_run.workdir).stored(), blog_run.workdir)
    assert check.should_stop()
    assert float(check._loss(kept.ema[0])) == losses[best]


@pytest.mark.slow
def test_validation_takes_batches_no_larger_than_those_of_training(blog_run, monkeypatch, tmp_path):
    sizes, seen, objective = [], [], hooks.objective

    def spied(*args, **kwargs):
        pieces = objective(*args, **kwargs)

        def draw(key, batch, state):
            sizes.append(len(batch["x"]))
            return pieces.draw(key, batch, state)

        def loss(params, key, drawn):
            seen.append(len(drawn["x0"]))
            return pieces.loss(params, key, drawn)

        return pieces._replace(draw=draw, loss=loss)

    monkeypatch.setattr(hooks, "objective", spied)
    config, spec = RunDir(blog_run.workdir).stored()
    config.train.batch_size, config.train.repeat, config.train.eval_count = 5, 2, 24
    run = parts.resolve(config, spec)
    params = parts.init_params(run)
    value = validation(config, spec, tmp_path)._loss(params)
    assert sizes == [4]  # 12 images, twice each, in three batches
    pieces, key = objective(run, training=False), parts.key(config.seed, "held out")
    held = data.batch(inputs.source(config, "test"), config.seed, 0, 12)
    batches = [{name: x[i : i + 4] for name, x in held.items()} for i in (0, 4, 8)]
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    loss = jax.jit(lambda k, b: pieces.loss(params, k, pieces.draw(k, b, None))[0])
    losses = [loss(k, b) for k, b in zip(keys, batches, strict=True)]
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    # Microbatches see the same noise: 8 examples are 6 and 2, and 4 more that do not count.
    config.train.microbatch = 6
    assert float(validation(config, spec, tmp_path)._loss(params)) == pytest.approx(float(value), rel=1e-6)
    assert set(seen) == {8, 6}


@pytest.mark.slow
def test_a_run_that_stopped_early_is_not_taken_up_again(blog_run, tmp_path, unmeasured):
    copy = shutil.copytree(blog_run.workdir, tmp_path / "copy")
    (copy / "report.json").unlink()
    again = trained(tiny_blog(), copy)
    assert "training from" not in again.printed
    assert "continuing after" not in again.printed
    assert again.report["train_steps"] == blog_run.report["train_steps"]
    assert rows(copy) == rows(blog_run.workdir)
    np.testing.assert_array_equal(samples(copy)[0], samples(blog_run.workdir)[0])


@pytest.mark.slow
def test_early_stopping_survives_an_interruption(blog_run, tmp_path, monkeypatch, unmeasured):
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(signals.Stopped):
            trained(tiny_blog(), tmp_path)
    trained(tiny_blog(), tmp_path)
    assert rows(tmp_path) == rows(blog_run.workdir)
    assert_same_state(state(tiny_blog(), tmp_path), state(tiny_blog(), blog_run.workdir))


# Other data


def test_a_folder_of_colour_images(folder_run):
    images, labels = samples(folder_run.workdir)
    assert (images.dtype, images.shape) == (np.uint8, (5, 8, 12, 3))
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert RunDir(folder_run.workdir).stored()[1] == DataSpec((8, 12, 3), ("cat", "dog"))
    found, missing = folder_run.report, "the weights of EfficientNet-Lite0 come in a package that is not installed"
    assert "distance" not in found and "features" not in found and found["measured"] == 5
    before, after = folder_run.printed.split("training from step 0")
    assert f"samples will be compared with real images by pixels alone: {missing}" in before
    assert f"Not compared in features: {missing}" in after
    numbers = f"{found['patch_distance']:.3f}, of as many real images {found['patch_reference']:.3f}"
    assert f"Sliced distance of patches of pixels: {numbers}" in after
    with Image.open(folder_run.workdir / "samples.png") as image:
        assert image.mode == "RGB"
