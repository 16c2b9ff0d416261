"""experiments.sample: what it writes, that every flag reaches the sampler, and what is refused."""

import dataclasses
import json
import re
import unicodedata

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from experiments import config as configs
from experiments import image_files, report, sample, sampling
from experiments.run_dir import RunDir
from tests.experiments.runs import call, files, samples, tiny


@pytest.fixture(scope="module")
def sampled(run, tmp_path_factory):
    """Seven samples in one batch, with their way from noise."""
    outdir = tmp_path_factory.mktemp("sampled")
    call(run.workdir, f"--outdir={outdir}", "--num_samples=7", "--batch_size=8", "--steps=5", "--trajectory")
    return outdir


def test_samples_have_the_layout_of_the_evaluators(sampled):
    images, labels = samples(sampled)
    assert (images.dtype, images.shape) == (np.uint8, (7, 28, 28, 1))
    assert labels.tolist() == [*range(7)]
    assert labels.dtype.kind == "i"
    assert {p.name for p in sampled.iterdir()} == {"samples.npz", "samples.png", "trajectory.png", "trajectory.gif"}


def test_samples_do_not_depend_on_the_batch_size(run, sampled, tmp_path):
    call(run.workdir, f"--outdir={tmp_path}", "--num_samples=7", "--batch_size=3", "--steps=5")
    np.testing.assert_array_equal(samples(tmp_path)[0], samples(sampled)[0])


def test_the_way_from_noise_ends_in_the_sample(sampled):
    images, _ = samples(sampled)
    with Image.open(sampled / "trajectory.gif") as film:
        assert film.n_frames == 6
        shown = []
        for i in range(6):
            film.seek(i)
            shown.append(np.asarray(film.convert("L")))
    np.testing.assert_array_equal(shown[-1], image_files.grid(images, 5))
    with Image.open(sampled / "trajectory.png") as strip:
        pixels = np.asarray(strip)
    cell = pixels.shape[1] // 6
    assert pixels.shape == (7 * cell + 2, 6 * cell + 2)
    np.testing.assert_array_equal(pixels[:, -cell - 2 :], image_files.grid(images, 1))
    assert (pixels[:, : cell + 2] != pixels[:, -cell - 2 :]).mean() > 0.1


@pytest.mark.slow
def test_another_seed_makes_other_samples_and_the_run_has_its_own(run, sampled, tmp_path):
    call(run.workdir, f"--outdir={tmp_path / 'own'}", "--num_samples=7", "--steps=5", "--seed=0")
    call(run.workdir, f"--outdir={tmp_path / 'other'}", "--num_samples=7", "--steps=5", "--seed=1")
    np.testing.assert_array_equal(samples(tmp_path / "own")[0], samples(sampled)[0])
    assert (samples(tmp_path / "other")[0] != samples(sampled)[0]).any((1, 2, 3)).all()


def test_labels_are_taken_in_turn_by_number_or_name():
    names = ("cat", "dog", "7")
    assert sample.parse_labels(["2", " 0"], 5, names).tolist() == [2, 0, 2, 0, 2]
    assert sample.parse_labels(["dog", "cat"], 3, names).tolist() == [1, 0, 1]
    assert sample.parse_labels(None, 4, names).tolist() == [0, 1, 2, 0]
    assert sample.parse_labels(None, 2, ()).tolist() == [0, 0]


def test_a_class_name_beats_a_number_and_is_compared_in_one_unicode_form():
    assert sample.parse_labels(["2", "0", "10"], 3, ("1", "2", "10")).tolist() == [1, 0, 2]
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "éclair")
        assert sample.parse_labels([name], 1, ("cat", unicodedata.normalize("NFC", "éclair"))).tolist() == [1]


def test_an_unknown_label_is_answered_with_the_names():
    with pytest.raises(ValueError, match=r"\['dgo'\] are not among .* of which dog is near: cat, dog, owl$"):
        sample.parse_labels(["cat", "dgo"], 2, ("cat", "dog", "owl"))
    with pytest.raises(ValueError, match="c99 and 900 more$"):
        sample.parse_labels(["x"], 1, tuple(f"c{i}" for i in range(1000)))


@pytest.mark.slow
def test_labels_and_the_sampler_of_the_run_reach_the_samples(folder_run, tmp_path):
    """The run samples with DPM-Solver++."""
    call(folder_run.workdir, f"--outdir={tmp_path / 'own'}", "--num_samples=3", "--seed=0")
    np.testing.assert_array_equal(samples(tmp_path / "own")[0], samples(folder_run.workdir)[0][:3])
    call(folder_run.workdir, f"--outdir={tmp_path / 'dog'}", "--num_samples=3", "--labels=dog")
    images, labels = samples(tmp_path / "dog")
    assert labels.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(images[1], samples(tmp_path / "own")[0][1])


def test_the_flags_are_the_explained_fields_of_the_config():
    fields = {f.name: f.metadata["help"] for f in dataclasses.fields(configs.Sample) if "help" in f.metadata}
    assert set(fields) == {f.name for f in dataclasses.fields(configs.Sample)} - {"count"}
    known = flags.FLAGS.flags_by_module_dict()["experiments.sample"]
    known = {flag.name: flag for flag in known}
    for name, explanation in fields.items():
        assert known[name].default is None
        assert known[name].help.startswith(explanation)


def test_every_flag_of_the_sampler_reaches_it(run):
    """Values unlike the run's, of every field that is a flag; one that excludes others leaves them out."""
    config, spec = RunDir(run.workdir).stored()
    given = {"seed": 5, "steps": 9, "sampler": "heun", "guidance": 1.5, "guidance_low": 0.1, "guidance_high": 0.8}
    given |= {"batch_size": 2, "shift": 2.0, "last": 0.1, "threshold": 0.9, "guidance_open": True, "floor": 0.05}
    others = (
        {"eta": 0.5, "overstep": 1.25, "clip": True, "guidance_kind": "rescale", "guidance_rescale": 0.5},
        {"respacing": "5", "sampler": "unipc", "order": 3, "guidance_kind": "cfg_zero", "guidance_zero_steps": 2},
        {"rho": 5.0, "sigma_min": 0.01, "sigma_max": 50.0, "sampler": "edm", "churn": 3.0, "churn_low": 0.1}
        | {"churn_high": 20.0, "churn_noise": 1.01},
        {"guidance_kind": "apg", "guidance_parallel": 0.1, "guidance_radius": 2.0, "guidance_momentum": -0.5},
        {},
    )
    assert {*given, *(name for other in others for name in other)} == {
        f.name for f in dataclasses.fields(configs.Sample)
    } - {"count"}
    for flagged in (given, *others):
        with flagsaver.flagsaver():
            flags.FLAGS.unparse_flags()
            flags.FLAGS(["sample", *(f"--{name}={value}" for name, value in flagged.items())])
            found = sample.overridden(config, spec)
        implied = {"steps": configs.Sample.steps} if "respacing" in flagged else {}
        assert found == dataclasses.replace(config, sample=dataclasses.replace(config.sample, **implied, **flagged))
    assert config == tiny()


def test_the_command_samples_as_the_flags_say(run, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(sampling, "sample_fn", lambda run, *_, **__: used.append(run) or (lambda *_: None))
    monkeypatch.setattr(report, "collect", lambda *_: (np.zeros((1, 28, 28, 1), np.uint8), 0.0, np.ones(1, bool)))
    call(run.workdir, f"--outdir={tmp_path}", "--num_samples=1", "--steps=9", "--guidance=1.5", "--seed=5")
    assert (len(used[0].grid), used[0].guidance.keywords["scale"], used[0].sample_seed) == (10, 1.5, 5)


def test_samples_that_hold_nan_are_written_counted_and_an_error(run, tmp_path, monkeypatch):
    images, finite = np.zeros((3, 28, 28, 1), np.uint8), np.array([True, False, False])
    monkeypatch.setattr(sampling, "sample_fn", lambda *_, **__: lambda *_: None)
    monkeypatch.setattr(report, "collect", lambda *_: (images, 0.0, finite))
    with pytest.raises(FloatingPointError, match="2 of 3 samples hold NaN or infinite values"):
        call(run.workdir, f"--outdir={tmp_path}", "--num_samples=3")
    np.testing.assert_array_equal(samples(tmp_path)[0], images)


@pytest.mark.slow
def test_each_call_has_a_new_folder_and_an_old_one_is_not_overwritten(copy):
    for number in ("001", "002"):
        assert f"written to {copy / 'samples' / number}" in call(copy, "--num_samples=1")
    first = files(copy / "samples" / "001")
    with pytest.raises(ValueError, match=r"001 holds samples.npz already; pass --overwrite or another --outdir"):
        call(copy, "--num_samples=1", "--seed=1", f"--outdir={copy / 'samples' / '001'}")
    assert files(copy / "samples" / "001") == first
    call(copy, "--num_samples=1", "--labels=4", f"--outdir={copy / 'samples' / '001'}", "--overwrite")
    assert files(copy / "samples" / "001") != first


def test_an_older_checkpoint_can_be_sampled_from(run, tmp_path):
    printed = call(run.workdir, f"--outdir={tmp_path / 'old'}", "--num_samples=1", "--checkpoint=3")
    assert "from step 3 of" in printed
    call(run.workdir, f"--outdir={tmp_path / 'new'}", "--num_samples=1")
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
        (["--sampler=dim"], r"'dim' is not one of ddim, ancestral, heun, dpmpp_2m"),
        (
            ["--sampler=heun", "--overstep=1.5"],
            r"--overstep=1\.5 has no effect on this run: leave it at 1\.0, or set --sampler=ddim",
        ),
        (["--overstep=-1"], r"overstep=-1\.0 must be positive"),
        (["--guidance=nan"], r"--guidance=nan must be a finite number"),
        (
            ["--guidance_low=0.9", "--guidance_high=0.5"],
            r"--guidance_low, guidance_high: guidance interval \[0\.9, 0\.5\]: its low end must",
        ),
        (["--steps=3", "--respacing=4"], r"--steps=3 and --respacing=4 exclude each other"),
        (["--checkpoint=5"], r"there is no checkpoint of step 5 in .*; there are \[3, 6\]"),
        (["--base_samples=x.npz"], r"--base_samples=x\.npz: this is not a super-resolution run"),
        (["--condition_noise=0.1"], r"--condition_noise=0\.1 belongs to a super-resolution run"),
        (["--outdir=FILE"], r"cannot write in FILE"),
        (["--outdir=FILE/below"], r"cannot write in FILE/below"),
        (["extra"], r"unexpected arguments \['extra'\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_refused_before_anything_is_sampled(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(report, "collect", lambda *_: pytest.fail("it sampled"))
    monkeypatch.setattr(jax, "eval_shape", lambda *_: None)
    file = tmp_path / "file"
    file.write_text("not mine")
    before = files(run.workdir)
    arguments, message = [a.replace("FILE", str(file)) for a in arguments], message.replace("FILE", str(file))
    with pytest.raises((ValueError, OSError, flags.Error, sample.app.UsageError), match=message) as refusal:
        call(run.workdir, *arguments)
    assert "\n" not in str(refusal.value)
    assert files(run.workdir) == before
    assert not (run.workdir / "samples").exists()
    assert file.read_text() == "not mine"


@pytest.mark.slow
def test_labels_and_guidance_belong_to_runs_with_labels(blog_run, monkeypatch):
    monkeypatch.setattr(report, "collect", lambda *_: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="--labels=3: this run was trained without labels"):
        call(blog_run.workdir, "--labels=3")
    with pytest.raises(ValueError, match=r"--guidance=2\.0 needs a run that was trained with labels"):
        call(blog_run.workdir, "--guidance=2")


def test_directories_that_are_not_runs_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="--workdir is missing: pass the directory"):
        call(None)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; pass the directory that a training run wrote"):
        call(tmp_path / "nowhere")
    shown = re.escape(str(run.workdir.parent))
    with pytest.raises(FileNotFoundError, match=rf"has no config\.json; .* such as {shown}"):
        call(run.workdir.parent)
    (tmp_path / "config.json").write_text('{"name": "of another program"}')
    with pytest.raises(ValueError, match=r"config\.json was not written by experiments\.train"):
        call(tmp_path)
    values = json.loads((run.workdir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"colour": "blue"}))
    with pytest.raises(ValueError, match=r"the stored config has the fields \['colour'\], unknown to this version"):
        call(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
        call(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_samples_of_the_size_of_the_training_by_windows_are_those_without(run, tmp_path):
    call(run.workdir, f"--outdir={tmp_path / 'a'}", "--num_samples=2")
    call(run.workdir, f"--outdir={tmp_path / 'b'}", "--num_samples=2", "--sample_size=28,28")
    np.testing.assert_array_equal(samples(tmp_path / "a")[0], samples(tmp_path / "b")[0])


def test_samples_can_be_larger_than_the_images_of_the_training(run, tmp_path):
    call(run.workdir, f"--outdir={tmp_path}", "--num_samples=2", "--sample_size=28,42", "--window_stride=14")
    images, labels = samples(tmp_path)
    assert images.shape == (2, 28, 42, 1) and labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window_stride=4"], "--window_stride=4 needs --sample_size=H,W"),
        (["--sample_size=30"], "--sample_size=30 must be 2 numbers of pixels, as in 56,56"),
        (["--sample_size=a,b"], "--sample_size=a,b must be 2 numbers"),
        (["--sample_size=28,30"], "windows of 28 pixels every 14 do not tile 30; 28 and 42 they do"),
        (["--sample_size=14,28"], "windows of 28 pixels every 14 do not tile 14; 28 and 42 they do"),
        (["--sample_size=28,60", "--window_stride=32"], "--window_stride=32 leaves pixels between windows of 28"),
    ],
)
def test_sizes_that_windows_do_not_tile_are_refused(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr(report, "collect", lambda *_: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match=message):
        call(run.workdir, *arguments, f"--outdir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
