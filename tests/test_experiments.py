"""The commands from end to end: train, stop, continue, sample; what they write, and what they refuse."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from diffusion.io import checkpoint
from diffusion import data
from diffusion import train as training
from experiments import blog_figures, build, drawing, evaluate, measure, objective, image_files, runs, sample, session, train, watch
from experiments import config as configs
from experiments.configs import blog, smoke

ROOT = Path(__file__).parent.parent
STEPS = 6


def tiny() -> configs.Config:
    """The smoke config, as small as it gets; previews, checkpoints and log rows each keep their own rhythm."""
    config = smoke.get_config()
    config.model.width, config.model.depth = 16, 1
    config.train = configs.Train(
        steps=STEPS, batch_size=4, warmup=1, learning_rate=1e-2, log_every=2, sample_every=2, save_every=3
    )
    config.sample = configs.Sample(count=15, steps=2, guidance=2.0, batch_size=6)
    return config


def tiny_blog() -> configs.Config:
    """The blog's recipe with a small network, and a learning rate that grows until it gets worse."""
    config = blog.get_config()
    config.model.depth, config.model.heads, config.model.head_dim = 1, 2, 4
    config.process.steps = 10
    config.train.steps, config.train.batch_size, config.train.repeat = 40, 2, 3
    config.train.learning_rate, config.train.warmup = 0.2, 20
    config.train.log_every, config.train.save_every = 1, 100
    config.train.eval_every, config.train.eval_count, config.train.patience = 1, 12, 3
    config.sample = configs.Sample(count=4, steps=5, overstep=1.5, batch_size=4)
    return config


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Data sets are opened and seen once, and a program that one test compiled is read from a file by the next."""
    sources, features, settings = {}, {}, ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    open_source, digit_features = build.source, measure.evaluate.digit_features
    before = {name: getattr(jax.config, name) for name in settings}

    def source(config, split="train"):
        key = repr((config.data, split))
        if key not in sources:
            sources[key] = open_source(config, split)
        return sources[key]

    def features_of(images):
        key = images.tobytes()
        if key not in features:
            features[key] = digit_features(images)
        return features[key]

    def start():
        jax.config.update(settings[0], str(cache))
        jax.config.update(settings[1], 0.0)

    cache = tmp_path_factory.mktemp("xla")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "source", source)
        patch.setattr(measure.evaluate, "digit_features", features_of)
        patch.setattr(session, "start", start)
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        compilation_cache.reset_cache()
        start()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class Run(NamedTuple):
    workdir: Path
    config: configs.Config
    report: dict[str, Any]
    printed: str


def trained(config: configs.Config, workdir: Path) -> Run:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        report = train.train(config, workdir)
    return Run(workdir, config, report, printed.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """One whole training, of digits, with everything that follows it."""
    return trained(tiny(), tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def blog_run(tmp_path_factory) -> Run:
    """The blog's recipe, which stops early."""
    return trained(tiny_blog(), tmp_path_factory.mktemp("runs") / "blog")


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory) -> Run:
    """A run on a folder of rectangular colour image_files of two classes."""
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(8):
            Image.fromarray(draw.integers(0, 256, (16, 24, 3), np.uint8)).save(root / name / f"{i}.png")
    config = tiny()
    config.data = configs.Data(name=f"folder:{root}", size=(8, 12), flip=True)
    config.model.patch_size, config.train.steps, config.sample.count = 4, 2, 3
    return trained(config, tmp_path_factory.mktemp("runs") / "folder")


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the shared run to be harmed."""
    return shutil.copytree(run.workdir, tmp_path / "copy")


@pytest.fixture
def unmeasured(monkeypatch):
    """Trainings whose image_files are not the point are not measured."""
    monkeypatch.setattr(measure, "quality", lambda *_: {})


def state(config: configs.Config, workdir: Path, step: int | None = None) -> training.State:
    """The state in a checkpoint."""
    seen = build.stored(workdir)[1]
    params = jax.eval_shape(lambda: build.init_params(config, seen))
    like = jax.eval_shape(lambda p: objective.init_state(config, seen, p), params)
    return checkpoint.restore(workdir / "checkpoints", like, step)[0]


def assert_same_state(a: training.State, b: training.State) -> None:
    """Every leaf, bit for bit."""
    named = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (a, b)]
    assert [path for path, _ in named[0]] == [path for path, _ in named[1]]
    for (path, x), (_, y) in zip(*named, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def rows(workdir: Path, timings: bool = False) -> list[dict[str, float]]:
    """What was logged, without what depends on the clock."""
    clock = () if timings else ("seconds", "images_per_second")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def samples(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"][: len(file.files)]
        return file["arr_0"], file.get("arr_1")


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def killed_at(monkeypatch, step: int) -> None:
    """SIGTERM reaches this process, once, when the training loss of `step` is logged."""
    log = session.Log.scalars

    def scalars(self, done, values):
        log(self, done, values)
        if done == step and "loss" in values:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(session.Log, "scalars", scalars)


# What a run leaves


def test_a_run_writes_what_it_says(run):
    c, (images, labels) = run.config, samples(run.workdir)
    names = {p.name for p in run.workdir.iterdir()}
    expected = {"config.json", "metrics.jsonl", "checkpoints", "previews", "samples.npz", "samples.png", "report.json"}
    assert names == expected
    assert (images.dtype, images.shape) == (np.uint8, (c.sample.count, 28, 28, 1))
    assert labels.tolist() == [*range(10), *range(5)]
    assert labels.dtype.kind == "i"
    assert images.std() > 10
    with Image.open(run.workdir / "samples.png") as picture:
        np.testing.assert_array_equal(picture, image_files.grid(images, 10))


def test_every_interval_is_kept(run):
    assert checkpoint.steps(run.workdir / "checkpoints") == [3, STEPS]
    assert sorted(p.name for p in (run.workdir / "previews").iterdir()) == ["0000002.png", "0000004.png"]
    logged = rows(run.workdir, timings=True)
    assert [row["step"] for row in logged] == [1, 2, 4, STEPS]
    assert all(set(row) >= {"loss", "grad_norm", "images_per_second", "seconds"} for row in logged)
    seconds = [row["seconds"] for row in logged]
    assert seconds == sorted(seconds)


def test_previews_show_the_same_noise_as_it_becomes_digits(run):
    shape = image_files.grid(np.zeros((40, 28, 28, 1), np.uint8), 10).size
    shown = []
    for path in sorted((run.workdir / "previews").iterdir()):
        with Image.open(path) as image:
            assert image.size == shape
            shown.append(np.asarray(image))
    assert (shown[0] != shown[1]).any()


def test_the_report_says_what_was_reached_and_what_to_type_next(run):
    report = json.loads((run.workdir / "report.json").read_text())
    assert report == run.report
    assert report["train_steps"] == STEPS
    assert (report["sample_count"], report["sample_steps"], report["guidance"]) == (15, 2, 2.0)
    assert report["train_seconds"] > 0
    assert report["sample_seconds"] > 0
    assert report["distance"] > report["floor"] > 0
    assert 0 <= report["agreement"] <= 1
    end = run.printed[run.printed.index("Trained") :]
    assert f"Trained {STEPS} steps in" in end
    assert f"{report['distance']:.2f}" in end
    assert f"{report['agreement']:.1%}" in end
    assert end.strip().splitlines()[-1].startswith(f"Next: python -m experiments.sample --workdir={run.workdir} ")
    assert (
        "Of 15 image_files these numbers are mostly chance: draw 100 or more, better 1,000 (--config.sample.count)" in end
    )
    assert "chance" not in measure.paragraph(run.workdir, {**report, "measured": 100})


def test_the_network_is_rebuilt_from_the_stored_config(run):
    config, seen = build.stored(run.workdir)
    assert config == run.config
    assert seen == build.Seen((28, 28, 1), tuple("0123456789"))


# Stopping and continuing


def test_interrupted_and_continued_is_uninterrupted(run, tmp_path, monkeypatch, unmeasured):
    with monkeypatch.context() as patch:
        killed_at(patch, 4)
        with pytest.raises(session.Stopped, match=rf"Stopped at step 4 of {STEPS}; the same command continues"):
            trained(tiny(), tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 4]
    assert not (tmp_path / "report.json").exists()
    again = trained(tiny(), tmp_path)
    assert "continuing after step 4" in again.printed
    assert_same_state(state(tiny(), tmp_path, STEPS), state(tiny(), run.workdir, STEPS))
    assert rows(tmp_path) == rows(run.workdir)
    np.testing.assert_array_equal(samples(tmp_path)[0], samples(run.workdir)[0])
    assert files(tmp_path / "previews")["0000002.png"] == files(run.workdir / "previews")["0000002.png"]


def test_a_run_with_muon_continues_bit_for_bit(tmp_path, monkeypatch, unmeasured):
    config = tiny()
    config.train.optimizer = "muon"
    trained(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_at(patch, 4)
        with pytest.raises(session.Stopped):
            trained(config, tmp_path / "parts")
    trained(config, tmp_path / "parts")
    assert_same_state(state(config, tmp_path / "parts", STEPS), state(config, tmp_path / "whole", STEPS))


def test_a_run_from_before_a_field_existed_is_continued_and_drawn_from(copy, unmeasured):
    stored = json.loads((copy / "config.json").read_text())
    del stored["train"]["optimizer"], stored["train"]["matrix_rate"]
    (copy / "config.json").write_text(json.dumps(stored))
    assert "is finished" in trained(tiny(), copy).printed
    assert runs.trained([copy]).config == tiny()


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


def test_sigterm_to_the_command_saves_and_the_run_can_be_finished(tmp_path):
    """A process of its own, because its exit status and its messages matter."""
    given = {"model.width": 16, "model.depth": 1, "train.steps": 300, "train.batch_size": 2, "train.log_every": 1}
    given |= {"train.sample_every": 1000, "train.save_every": 1000, "sample.count": 2, "sample.steps": 1}
    command = [sys.executable, "-m", "experiments.train", "--config=experiments/configs/smoke.py"]
    command += [f"--workdir={tmp_path}", *(f"--config.{name}={value}" for name, value in given.items())]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for line in process.stdout:
            if line.startswith("training from step 0"):
                process.send_signal(signal.SIGTERM)
                break
        _, complaint = process.communicate()
    assert process.returncode == 130
    assert "SIGTERM: finishing this step and saving" in complaint
    assert "the same command continues from there" in complaint.splitlines()[-1]
    assert "Traceback" not in complaint
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    assert step < 300
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, step + 1)]

    again = trained(build.stored(tmp_path)[0], tmp_path)
    assert f"continuing after step {step} of 300" in again.printed
    assert "\nNext: python -m experiments.sample" in again.printed
    assert [row["step"] for row in rows(tmp_path)] == [*range(1, 301)]


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


def test_a_network_that_does_not_fit_the_pictures_is_refused_before_anything_is_written(tmp_path):
    config = tiny()
    config.model.patch_size = 5
    with pytest.raises(ValueError, match="patch_size=5 does not tile spatial axis 0 of length 28"):
        trained(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run_and_saves_nothing(tmp_path):
    config = tiny()
    config.train.learning_rate, config.train.warmup, config.train.clip = 1e30, 0, None
    config.train.log_every, config.train.save_every, config.train.sample_every = 100, 3, 100
    with pytest.raises(FloatingPointError, match=r"(nan|inf) at step 3; nothing was saved after step 0\. "):
        trained(config, tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == []
    assert [row["step"] for row in rows(tmp_path)] == [1]


# Early stopping


def test_early_stopping_keeps_the_best_weights(blog_run):
    losses = {row["step"]: row["held_out_loss"] for row in rows(blog_run.workdir) if "held_out_loss" in row}
    best = min(losses, key=losses.get)
    patience, last = blog_run.config.train.patience, max(losses)
    assert 1 < best < last == best + patience < blog_run.config.train.steps
    assert checkpoint.steps(blog_run.workdir / "checkpoints") == [last]
    kept = state(blog_run.config, blog_run.workdir)
    assert int(kept.step) == best
    assert blog_run.report["train_steps"] == last
    held_out = watch.HeldOut(blog_run.config, build.stored(blog_run.workdir)[1], blog_run.workdir, None)
    assert float(held_out._loss(kept.ema[0])) == losses[best]


def test_held_out_pictures_are_taken_in_batches_no_larger_than_those_of_training(blog_run, monkeypatch, tmp_path):
    sizes, objective = [], watch.objectives.objective

    def spied(*args, **kwargs):
        parts = objective(*args, **kwargs)

        def draw(key, batch, carry):
            sizes.append(len(batch["x"]))
            return parts.draw(key, batch, carry)

        return parts._replace(draw=draw)

    monkeypatch.setattr(watch.objectives, "objective", spied)
    config, seen = build.stored(blog_run.workdir)
    config.train.batch_size, config.train.repeat, config.train.eval_count = 5, 2, 24
    params = build.init_params(config, seen)
    value = watch.HeldOut(config, seen, tmp_path, None)._loss(params)
    assert sizes == [4]  # 12 image_files, twice each, in three batches
    parts, key = objective(config, seen, training=False), build.key(config.seed, "held out")
    held = data.batch(build.source(config, "test"), config.seed, 0, 12)
    batches = [{name: x[i : i + 4] for name, x in held.items()} for i in (0, 4, 8)]
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    losses = [parts.loss(params, k, parts.draw(k, b, None))[0] for k, b in zip(keys, batches, strict=True)]
    assert float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    config.train.microbatch = 6
    sizes.clear()
    jax.eval_shape(watch.HeldOut(config, seen, tmp_path, None)._loss, params)
    assert sizes == [3]


def test_a_run_that_stopped_early_is_not_taken_up_again(blog_run, tmp_path, unmeasured):
    copy = shutil.copytree(blog_run.workdir, tmp_path / "copy")
    (copy / "report.json").unlink()
    again = trained(tiny_blog(), copy)
    assert "training from" not in again.printed
    assert "continuing after" not in again.printed
    assert again.report["train_steps"] == blog_run.report["train_steps"]
    assert rows(copy) == rows(blog_run.workdir)
    np.testing.assert_array_equal(samples(copy)[0], samples(blog_run.workdir)[0])


def test_early_stopping_survives_an_interruption(blog_run, tmp_path, monkeypatch, unmeasured):
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(session.Stopped):
            trained(tiny_blog(), tmp_path)
    trained(tiny_blog(), tmp_path)
    assert rows(tmp_path) == rows(blog_run.workdir)
    assert_same_state(state(tiny_blog(), tmp_path), state(tiny_blog(), blog_run.workdir))


# Other data


def test_a_folder_of_colour_pictures(folder_run):
    images, labels = samples(folder_run.workdir)
    assert (images.dtype, images.shape) == (np.uint8, (3, 8, 12, 3))
    assert labels.tolist() == [0, 1, 0]
    assert build.stored(folder_run.workdir)[1] == build.Seen((8, 12, 3), ("cat", "dog"))
    assert "distance" not in folder_run.report
    assert "There is no feature network for image_files like these" in folder_run.printed
    with Image.open(folder_run.workdir / "samples.png") as picture:
        assert picture.mode == "RGB"


def test_tensorboard_without_its_extra_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=r"--tensorboard needs tensorboardX: pip install -e '\.\[tensorboard\]'"):
        train.train(tiny(), tmp_path, tensorboard=True)


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboardX")
    with session.Log(tmp_path, tensorboard=True) as log:
        log.scalars(3, {"loss": 0.5})
        log.image(3, "samples", np.zeros((4, 5), np.uint8))
        log.image(3, "colour", np.zeros((4, 5, 3), np.uint8))
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"loss", b"samples", b"colour", b"PNG"))


# Sampling


def draw(workdir: Path | None, *arguments: str, command=sample) -> str:
    """Runs the command with these flags as a shell would; returns what it printed."""
    given = [] if workdir is None else [f"--workdir={workdir}"]
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()) as printed:
        flags.FLAGS.unparse_flags()
        command.main(flags.FLAGS([command.__name__, *given, *arguments]))
    return printed.getvalue()


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory) -> Path:
    """Seven image_files in one batch, with their way from noise."""
    outdir = tmp_path_factory.mktemp("drawn")
    draw(run.workdir, f"--outdir={outdir}", "--num_samples=7", "--batch_size=8", "--steps=5", "--trajectory")
    return outdir


def test_samples_have_the_layout_of_the_evaluators(drawn):
    images, labels = samples(drawn)
    assert (images.dtype, images.shape) == (np.uint8, (7, 28, 28, 1))
    assert labels.tolist() == [*range(7)]
    assert labels.dtype.kind == "i"
    assert {p.name for p in drawn.iterdir()} == {"samples.npz", "samples.png", "trajectory.png", "trajectory.gif"}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_pictures_do_not_depend_on_the_batch_size(run, drawn, tmp_path, batch_size):
    draw(run.workdir, f"--outdir={tmp_path}", "--num_samples=7", f"--batch_size={batch_size}", "--steps=5")
    np.testing.assert_array_equal(samples(tmp_path)[0], samples(drawn)[0])


def test_the_way_from_noise_ends_in_the_sample(drawn):
    images, _ = samples(drawn)
    with Image.open(drawn / "trajectory.gif") as film:
        assert film.n_frames == 6
        shown = []
        for i in range(6):
            film.seek(i)
            shown.append(np.asarray(film.convert("L")))
    np.testing.assert_array_equal(shown[-1], image_files.grid(images, 5))
    with Image.open(drawn / "trajectory.png") as strip:
        pixels = np.asarray(strip)
    cell = pixels.shape[1] // 6
    assert pixels.shape == (7 * cell + 2, 6 * cell + 2)
    np.testing.assert_array_equal(pixels[:, -cell - 2 :], image_files.grid(images, 1))
    assert (pixels[:, : cell + 2] != pixels[:, -cell - 2 :]).mean() > 0.1


def test_another_seed_draws_other_pictures_and_the_run_has_its_own(run, drawn, tmp_path):
    draw(run.workdir, f"--outdir={tmp_path / 'own'}", "--num_samples=7", "--steps=5", "--seed=0")
    draw(run.workdir, f"--outdir={tmp_path / 'other'}", "--num_samples=7", "--steps=5", "--seed=1")
    np.testing.assert_array_equal(samples(tmp_path / "own")[0], samples(drawn)[0])
    assert (samples(tmp_path / "other")[0] != samples(drawn)[0]).any((1, 2, 3)).all()


def test_labels_are_taken_in_turn(run, tmp_path):
    draw(run.workdir, f"--outdir={tmp_path}", "--num_samples=5", "--labels=7, 3")
    assert samples(tmp_path)[1].tolist() == [7, 3, 7, 3, 7]


def test_labels_by_name(folder_run, tmp_path):
    draw(folder_run.workdir, f"--outdir={tmp_path / 'name'}", "--num_samples=2", "--labels=dog")
    draw(folder_run.workdir, f"--outdir={tmp_path / 'number'}", "--num_samples=2", "--labels=1")
    images, labels = samples(tmp_path / "name")
    assert labels.tolist() == [1, 1]
    np.testing.assert_array_equal(images, samples(tmp_path / "number")[0])


def test_every_flag_reaches_the_sampler(run, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(drawing, "drawer", lambda config, *_, **__: used.append(config) or (lambda *_: None))
    monkeypatch.setattr(measure, "collect", lambda *_: (np.zeros((1, 28, 28, 1), np.uint8), 0.0))
    given = {"seed": 5, "steps": 9, "sampler": "heun", "guidance": 1.5, "batch_size": 2}
    for flagged in (given, {"overstep": 1.25}, {}):
        arguments = [f"--{name}={value}" for name, value in flagged.items()]
        draw(run.workdir, f"--outdir={tmp_path / str(len(used))}", "--num_samples=1", *arguments)
        expected = tiny()
        expected.sample = dataclasses.replace(expected.sample, **flagged)
        assert used[-1] == expected


def test_each_call_has_a_new_folder_and_an_old_one_is_not_overwritten(copy):
    for number in ("001", "002"):
        assert f"written to {copy / 'samples' / number}" in draw(copy, "--num_samples=1")
    first = files(copy / "samples" / "001")
    with pytest.raises(ValueError, match=r"001 holds samples.npz already; pass --overwrite or another --outdir"):
        draw(copy, "--num_samples=1", "--seed=1", f"--outdir={copy / 'samples' / '001'}")
    assert files(copy / "samples" / "001") == first
    draw(copy, "--num_samples=1", "--seed=1", f"--outdir={copy / 'samples' / '001'}", "--overwrite")
    assert files(copy / "samples" / "001") != first


def test_an_older_checkpoint_can_be_drawn_from(run, tmp_path):
    printed = draw(run.workdir, f"--outdir={tmp_path / 'old'}", "--num_samples=2", "--checkpoint=3")
    assert "from step 3 of" in printed
    draw(run.workdir, f"--outdir={tmp_path / 'new'}", "--num_samples=2")
    assert (samples(tmp_path / "old")[0] != samples(tmp_path / "new")[0]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples=0"], r"flag --num_samples=0: 0 is not a positive integer"),
        (["--steps=0"], r"--steps=0 must be at least 1"),
        (["--batch_size=0"], r"--batch_size=0 must be at least 1"),
        (["--labels=3,10"], r"--labels: \['10'\] are not among the classes 0\.\.9 of this run"),
        (["--labels=-1"], r"--labels: \['-1'\] are not among the classes"),
        (["--labels=seven"], r"--labels: \['seven'\] are not among the classes"),
        (["--labels="], r"--labels: .* classes"),
        (["--sampler=dim"], r"'dim' is not one of ddim, ancestral, heun"),
        (["--sampler=heun", "--overstep=1.5"], r"overstep=1\.5 belongs to the ddim sampler"),
        (["--overstep=-1"], r"overstep=-1\.0 must be positive"),
        (["--guidance=nan"], r"--guidance=nan must be a finite number"),
        (["--checkpoint=5"], r"there is no checkpoint of step 5 in .*; there are \[3, 6\]"),
        (["--outdir=FILE"], r"cannot write in FILE"),
        (["--outdir=FILE/below"], r"cannot write in FILE/below"),
        (["extra"], r"unexpected arguments \['extra'\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(measure, "collect", lambda *_: pytest.fail("it drew"))
    file = tmp_path / "file"
    file.write_text("not mine")
    before = files(run.workdir)
    arguments, message = [a.replace("FILE", str(file)) for a in arguments], message.replace("FILE", str(file))
    with pytest.raises((ValueError, OSError, flags.Error, sample.app.UsageError), match=message) as refusal:
        draw(run.workdir, *arguments)
    assert "\n" not in str(refusal.value)
    assert files(run.workdir) == before
    assert not (run.workdir / "samples").exists()
    assert file.read_text() == "not mine"


def test_labels_and_guidance_belong_to_runs_with_labels(blog_run, monkeypatch):
    monkeypatch.setattr(measure, "collect", lambda *_: pytest.fail("it drew"))
    with pytest.raises(ValueError, match="--labels=3: this run was trained without labels"):
        draw(blog_run.workdir, "--labels=3")
    with pytest.raises(ValueError, match=r"--guidance=2\.0 needs a run that was trained with labels"):
        draw(blog_run.workdir, "--guidance=2")


def test_directories_that_are_no_runs_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="--workdir is missing: pass the directory"):
        draw(None)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; pass the directory that a training run wrote"):
        draw(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"holds no config\.json; .* such as {run.workdir}"):
        draw(run.workdir.parent)
    (tmp_path / "config.json").write_text('{"name": "of another program"}')
    with pytest.raises(ValueError, match=r"config\.json was not written by experiments\.train"):
        draw(tmp_path)
    values = json.loads((run.workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"colour": "blue"}))
    with pytest.raises(ValueError, match=r"the stored config has the fields \['colour'\] of Config, which this"):
        draw(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        draw(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


# Evaluation


def test_evaluation_repeats_the_numbers_of_the_report(run):
    printed = draw(run.workdir, "--json", command=evaluate)
    values = json.loads(printed)
    assert values.pop("samples") == str(run.workdir / "samples.npz")
    assert values.items() <= run.report.items()
    assert values["measured"] == 15
    assert {"agreement_0", "distance", "floor", "precision", "nearest_ratio"} <= set(values)


def test_evaluation_of_a_file_prints_a_table_with_the_floor(run):
    printed = draw(None, f"--samples={run.workdir / 'samples.npz'}", command=evaluate)
    title, _, *lines, _, caution = printed.splitlines()
    assert caution.startswith("Of 15 image_files these numbers are mostly chance")
    assert title.startswith(f"15 image_files of {run.workdir / 'samples.npz'}")
    table = {line[:18].strip(): line[18:28].strip() for line in lines}
    assert table["feature distance"] == f"{run.report['distance']:.2f}"
    assert table["of real digits"] == f"{run.report['floor']:.2f}"
    assert table["ratio"] == f"{run.report['ratio']:.2f}"
    assert table["agreement"] == f"{run.report['agreement']:.1%}"
    assert table["of 7"] == f"{run.report['agreement_7']:.1%}"


def test_pictures_without_labels_have_no_agreement(run, blog_run, tmp_path):
    np.savez(tmp_path / "unlabelled.npz", samples(run.workdir)[0])
    for where in ({"workdir": blog_run.workdir}, {"workdir": None, "samples": tmp_path / "unlabelled.npz"}):
        workdir, extra = where["workdir"], [f"--samples={path}" for path in [where.get("samples")] if path]
        values = json.loads(draw(workdir, *extra, "--json", command=evaluate))
        assert values["distance"] > 0
        assert not [name for name in values if "agreement" in name]
    assert not [name for name in blog_run.report if "agreement" in name]


def test_of_more_pictures_than_can_be_compared_some_are_measured(run, monkeypatch):
    given = []
    monkeypatch.setattr(measure.evaluate, "report", lambda images, labels, *_: given.append((images, labels)) or {})
    images = np.arange(3000).astype(np.uint8)[:, None, None, None]
    values = measure.quality(run.config, images, np.arange(3000))
    assert values == {"measured": 2500}
    ((chosen, labels),) = given
    assert len(set(labels.tolist())) == 2500
    assert set(labels % 2) == {0, 1}
    np.testing.assert_array_equal(chosen, images[labels])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((5, 28, 28, 1))}, "images must be uint8"),
        ({"arr_0": np.zeros((5, 28, 28, 3), np.uint8)}, r"must be digits of shape \[N, 28, 28, 1\].*\(5, 28, 28, 3\)"),
        ({"arr_0": np.zeros((5, 28, 28), np.uint8)}, r"must be digits of shape .*\(5, 28, 28\)"),
        ({"arr_0": np.zeros((2, 28, 28, 1), np.uint8)}, r"2 image_files are too few to measure"),
        ({"arr_0": np.zeros((5, 28, 28, 1), np.uint8), "arr_1": np.arange(4)}, r"there are 4 labels for 5 image_files"),
        ({"arr_0": np.zeros((5, 28, 28, 1), np.uint8), "arr_1": np.arange(8, 13)}, r"labels lie in 8 \.\. 12, outside"),
        ({"arr_0": np.zeros((5, 28, 28, 1), np.uint8), "arr_1": np.zeros(5)}, r"labels must be integers"),
        ({"images": np.zeros((5, 28, 28, 1), np.uint8)}, r"holds \['images'\], but no arr_0"),
        ({"arr_0": np.array([None])}, r"is not a whole npz file: .*pickle"),
    ],
    ids=lambda value: "",
)
def test_what_is_no_digits_is_refused(tmp_path, arrays, message):
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises((TypeError, ValueError), match=message) as refusal:
        draw(None, f"--samples={path}", command=evaluate)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_files_that_cannot_be_measured_are_refused(run, folder_run, tmp_path):
    for content in (b"", b"text", (run.workdir / "samples.npz").read_bytes()[:-100]):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz is not a whole npz file"):
            draw(None, f"--samples={tmp_path / 'broken.npz'}", command=evaluate)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "broken.npz", samples(run.workdir)[0])
        content = bytearray((tmp_path / "broken.npz").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz is not a whole npz file"):
            draw(None, f"--samples={tmp_path / 'broken.npz'}", command=evaluate)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"single\.npy is not a whole npz file"):
        draw(None, f"--samples={tmp_path / 'single.npy'}", command=evaluate)
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*none\.npz; experiments.train and experiments.sample write"
    ):
        draw(None, f"--samples={tmp_path / 'none.npz'}", command=evaluate)
    with pytest.raises(ValueError, match=r"was trained on folder:.*, and there is a feature network for digits only"):
        draw(folder_run.workdir, command=evaluate)
    with pytest.raises(ValueError, match=r"--workdir is missing"):
        draw(None, command=evaluate)


# The blog's figures


def test_the_blogs_figures(blog_run):
    printed = draw(blog_run.workdir, command=blog_figures)
    names = [Path(line).name for line in printed.splitlines() if line.endswith(".png")]
    grids = [f"{name}_step_scaling_{n}.png" for n in (10, 1) for name in ("without", "with")]
    assert names == ["noising.png", "denoising.png", *grids, "blog.png"]
    sizes, contents = {}, set()
    for name in names:
        with Image.open(blog_run.workdir / "figures" / name) as image:
            assert image.format == "PNG"
            sizes[name] = image.size
            contents.add(image.convert("L").tobytes())
    assert len(contents) == len(names)
    assert sizes["noising.png"][0] > 2 * sizes["noising.png"][1]
    assert all(sizes["blog.png"][1] > sizes[name][1] for name in names[:-1])


def test_strips_of_the_blog_begin_and_end_where_they_should(blog_run):
    config, seen = build.stored(blog_run.workdir)
    params, _ = runs.weights(blog_run.workdir, config)
    strip = blog_figures.noising(config)
    assert strip["names"] == [f"n = {n}" for n in (0, 2, 4, 6, 8, 10)]
    np.testing.assert_array_equal(strip["images"][0], build.source(config, "test").images[0])
    changed = [np.abs(frame.astype(int) - strip["images"][0]).mean() for frame in strip["images"]]
    assert changed == sorted(changed)

    labels = np.zeros(1, int)
    strip = blog_figures.denoising(config, seen, params, labels)
    assert strip["names"] == [f"n = {n}" for n in (10, 8, 6, 4, 2, 0)]
    config.sample.steps, config.sample.overstep = 10, 1.5
    (sample_drawn,) = drawing.drawer(config, seen)(params, np.zeros(1, int), labels)
    np.testing.assert_array_equal(strip["images"][-1], sample_drawn)
    assert (strip["images"][0] != strip["images"][-1]).any()


def test_the_blogs_figures_need_a_run_on_its_path(run, tmp_path):
    with pytest.raises(ValueError, match=r"was trained on the linear path.*--config=experiments/configs/blog\.py"):
        draw(run.workdir, command=blog_figures)
    assert not (run.workdir / "figures").exists()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        draw(tmp_path / "nowhere", command=blog_figures)
