"""experiments.edit: the four edits of a trained run, what they write, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from absl import app, flags
from absl.testing import flagsaver
from PIL import Image

from experiments import config as configs
from experiments import edit, edits, parts, sample
from experiments.run_dir import RunDir
from tests.experiments.runs import call, samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def defined():
    """The command's own flags, which it defines when it runs."""
    with flagsaver.flagsaver():
        before = set(flags.FLAGS)
        edit.define_flags([])
        added = set(flags.FLAGS) - before
        yield
        for name in added:
            delattr(flags.FLAGS, name)


@pytest.fixture(scope="module")
def given(run, tmp_path_factory):
    """A folder with inputs: three digits as samples.npz and as images, and a mask whose right half is black."""
    folder = tmp_path_factory.mktemp("given")
    images, labels = samples(run.workdir)
    np.savez(folder / "three.npz", images[:3], labels[:3])
    (folder / "images").mkdir()
    for i in range(3):
        Image.fromarray(images[i, ..., 0]).save(folder / "images" / f"{i}.png")
    mask = np.full((28, 28), 255, np.uint8)
    mask[:, 14:] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(np.where(mask, 200, 0).astype(np.uint8)).save(folder / "grey.png")
    Image.fromarray(mask[:14]).save(folder / "small.png")
    Image.fromarray(np.full((28, 28), 255, np.uint8)).save(folder / "white.png")
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(folder / "colour.png")
    np.savez(folder / "other.npz", np.zeros((2, 8, 8, 1), np.uint8))
    np.savez(folder / "unlabelled.npz", images[:3])
    return folder


def edited(run, given, outdir, *arguments, images="three.npz"):
    """Results and labels, the numbers of edit.json, and what was printed."""
    printed = call(run.workdir, f"--init_images={given / images}", f"--outdir={outdir}", *arguments, command=edit)
    with Image.open(outdir / "edit.png") as picture:
        assert picture.width >= 3 * 56
    return *samples(outdir), json.loads((outdir / "edit.json").read_text()), printed


def test_full_strength_is_sampling_and_less_is_not(run, given, tmp_path):
    before = np.load(given / "three.npz")["arr_0"]
    little, labels, numbers, printed = edited(run, given, tmp_path / "a", "--strength=0.01", "--seed=5")
    assert little.shape == before.shape and labels.tolist() == [0, 1, 2]
    assert "rows of edit.png: image, noised, result" in printed
    whole, _, _, _ = edited(run, given, tmp_path / "b", "--strength=1", "--seed=5", "--batch_size=2")
    assert numbers["difference"] > 0 and (little != whole).any((1, 2, 3)).all()
    call(run.workdir, "--num_samples=3", "--seed=5", f"--outdir={tmp_path / 'c'}")
    np.testing.assert_array_equal(whole, samples(tmp_path / "c")[0])


def test_known_pixels_are_exactly_those_of_the_image(run, given, tmp_path):
    before = np.load(given / "three.npz")["arr_0"]
    after, _, numbers, _ = edited(run, given, tmp_path, f"--mask={given / 'mask.png'}", "--resamples=2", "--jump=1")
    np.testing.assert_array_equal(after[:, :, :14], before[:, :, :14])
    assert (after[:, :, 14:] != before[:, :, 14:]).any()
    assert numbers["largest_difference_of_known"] == 0


def test_inversion_reports_its_error_and_takes_a_sampler_without_noise(run, given, tmp_path):
    _, _, numbers, printed = edited(run, given, tmp_path, "--invert", "--steps=3", "--first=0.3", "--guidance=1")
    assert 0 < numbers["reconstruction_error"] < numbers["largest_error"] and numbers["noise_deviation"] > 0
    assert "reconstruction error: " in printed
    assert numbers["edit"] == "invert" and numbers["first"] == 0.3 and "strength" not in numbers


@pytest.mark.parametrize(
    ("own", "flagged", "found"),
    [
        ({"sampler": "ancestral"}, [], {"sampler": "heun"}),
        ({"sampler": "dpmpp_2m_sde", "shift": 2.0}, [], {"sampler": "heun", "shift": 2.0}),
        ({"sampler": "edm", "churn": 20.0, "churn_low": 0.1}, [], {"sampler": "heun", "churn": 0.0, "churn_low": 0.0}),
        ({"sampler": "ddim", "eta": 0.5, "overstep": 1.5}, [], {"sampler": "heun", "eta": 0.0, "overstep": 1.0}),
        ({"sampler": "edm"}, [], {"sampler": "edm"}),
        ({"sampler": "unipc", "order": 3}, [], {"sampler": "unipc", "order": 3}),
        ({"sampler": "ancestral"}, ["--sampler=dpmpp_2m"], {"sampler": "dpmpp_2m"}),
        ({}, ["--sampler=ancestral"], "--sampler=ancestral samples with noise.*: pass --sampler=heun"),
        ({"sampler": "ancestral"}, ["--sampler=dpmpp_2m_sde"], "--sampler=dpmpp_2m_sde samples with noise"),
        ({}, ["--eta=0.5"], r"--eta=0\.5 samples with noise, .*: pass --sampler=heun"),
    ],
    ids=str,
)
def test_inversion_takes_a_sampler_without_noise(run, own, flagged, found):
    config = dataclasses.replace(run.config, sample=dataclasses.replace(configs.Sample(), **own))
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["edit", "--invert", *flagged])
        config = sample.overridden(config, RunDir(run.workdir).stored()[1])
        if isinstance(found, str):
            with pytest.raises(ValueError, match=found):
                edit.with_sampler(config)
            return
        made = edit.with_sampler(config)
    assert {name: getattr(made.sample, name) for name in found} == found
    parts.resolve(made, RunDir(run.workdir).stored()[1])


def test_the_settings_are_written_and_labels_that_nobody_knows_are_not(run, given):
    folder = run.workdir / "edits" / "001"
    call(run.workdir, f"--init_images={given / 'unlabelled.npz'}", "--strength=0.5", "--guidance=0", "--seed=7",
         command=edit)  # fmt: skip
    found = json.loads((folder / "edit.json").read_text())
    assert (found["edit"], found["strength"], found["step"]) == ("strength", 0.5, 6) and "first" not in found
    assert (found["sample"]["sampler"], found["sample"]["seed"], found["sample"]["guidance"]) == ("ddim", 7, 0.0)
    assert found["init_images"].endswith("unlabelled.npz") and found["workdir"] == [str(run.workdir)]
    assert samples(folder)[1] is None
    shutil.rmtree(run.workdir / "edits")


def test_a_mean_flow_run_is_told_what_it_can_do(run):
    own_sampler = dataclasses.replace(run.config.sample, sampler="mean_flow")
    config = dataclasses.replace(run.config, objective=configs.Objective(kind="mean_flow"), sample=own_sampler)
    own, spec = RunDir(run.workdir).stored()
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["edit", "--measure=downscale:4", "--init_images=x"])
        with pytest.raises(ValueError, match="--measure=downscale:4 .* has none: pass --sampler=ddim --steps=50"):
            edit.chosen_edit("measure", parts.resolve(own, spec), config)
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ValueError, match="--labels is missing: .*, --labels=3,7$"),
        ):
            patch.setattr(edit, "read_images", lambda *_: (np.zeros((1, 28, 28, 1), np.uint8), None))
            edit.given_images(config, spec)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--measure=downscale:4"], ["--measure=downscale:4", "--dps_scale=0.5"], ["--measure=blur:1.5"],
                  ["--measure=mask", "--mask=MASK"]], ids=" ".join
)  # fmt: skip
def test_images_given_measurements_are_nearer_to_them_than_samples_are(run, given, tmp_path, arguments):
    arguments = [a.replace("MASK", str(given / "mask.png")) for a in arguments]
    before = np.load(given / "three.npz")["arr_0"]
    after, _, numbers, _ = edited(run, given, tmp_path / "a", *arguments, "--steps=20")
    call(run.workdir, "--num_samples=3", f"--outdir={tmp_path / 'b'}", "--steps=20", "--seed=5")
    unrelated = samples(tmp_path / "b")[0]
    shrink = lambda x: x.reshape(3, 7, 4, 7, 4, 1).mean((2, 4)) / 255  # noqa: E731
    assert after.shape == before.shape
    if "--measure=downscale:4" in arguments:
        assert numbers["residual"] < edits.rms(shrink(unrelated) - shrink(before))


def test_images_come_from_files_and_folders_in_order_and_in_turn(run, given, tmp_path):
    with flagsaver.flagsaver():
        flags.FLAGS(["edit", f"--init_images={given / 'images'}", "--labels=4,5", "--num_samples=5"])
        config, spec = run.config, edit.DataSpec((28, 28, 1), tuple(map(str, range(10))))
        images, labels = edit.given_images(config, spec)
    before = np.load(given / "three.npz")["arr_0"]
    np.testing.assert_array_equal(images, before[[0, 1, 2, 0, 1]])
    assert labels.tolist() == [4, 5, 4, 5, 4]
    np.testing.assert_array_equal(edit.read_images(given / "images" / "1.png", spec)[0], before[1:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init_images=three.npz"], "pass one of --strength, --mask, --measure and --invert, not none"),
        (["--init_images=three.npz", "--invert", "--strength=0.5"], "not --strength and --invert"),
        (["--strength=0.5"], "--init_images is missing: pass an image"),
        (["--init_images=three.npz", "--strength=1.5"], r"strength=1\.5 must lie in \(0, 1\]"),
        (["--init_images=nothing.png", "--strength=0.5"], "nothing.png: there is no such file or folder"),
        (["--init_images=other.npz", "--strength=0.5"], r"holds uint8 \(2, 8, 8, 1\), but this run has uint8 images"),
        (["--init_images=small.png", "--strength=0.5"], r"small.png is 14x28, but this run .*: resize it first"),
        (["--init_images=colour.png", "--strength=0.5"], "colour.png is a colour image, .*: convert it to grey first"),
        (["--init_images=images", "--strength=0.5"], "--labels is missing: this run has 10 classes, and"),
        (["--init_images=unlabelled.npz", "--strength=0.5"], "--labels is missing"),
        (["--init_images=images", "--labels=11", "--strength=0.5"], r"\['11'\] are not among the classes"),
        (["--init_images=three.npz", "--mask=nothing.png"], "--mask=.*nothing.png: there is no such file"),
        (["--init_images=three.npz", "--mask=grey.png"], "grey.png has the value 200: a mask is white"),
        (["--init_images=three.npz", "--mask=small.png"], r"small.png is of size \(14, 28\), but the images"),
        (["--init_images=three.npz", "--mask=white.png"], "white everywhere: paint black what is to be made anew"),
        (["--init_images=three.npz", "--measure=sharpen"], "--measure=sharpen is not one of downscale:FACTOR"),
        (["--init_images=three.npz", "--measure=downscale:3"], r"factor=3 must divide the images' size \(28, 28\)"),
        (["--init_images=three.npz", "--measure=downscale"], "--measure=downscale: invalid literal"),
        (["--init_images=three.npz", "--measure=mask"], "--measure=mask needs --mask=FILE"),
        (["--init_images=three.npz", "--measure=blur:2", "--measurement_noise=0"], "must be positive; for an exact"),
        (["--init_images=three.npz", "--invert", "--first=2"], r"--first=2\.0 must lie between 0 and 1"),
        (["--init_images=three.npz", "--strength=0.5", "--first=0.1"], r"--first=0\.1 has no effect without --invert"),
        (["--init_images=three.npz", "--strength=0.5", "--resamples=2"], "--resamples=2 has no effect without --mask"),
        (["--init_images=three.npz", "--mask=mask.png", "--dps_scale=1"], "has no effect without --measure: leave it"),
        (["--init_images=three.npz", "--strength=0.5", "--trajectory"], "--trajectory=True has no effect in"),
        (["--init_images=three.npz", "--strength=0.5", "--sample_size=56,56"], "--sample_size=56,56 has no effect in"),
        (["--init_images=three.npz", "--strength=0.5", "--guide_ema=0.9"], r"--guide_ema=0\.9 has no effect in"),
        (["--init_images=three.npz", "--invert", "--seed=3"], "--seed=3 has no effect with --invert"),
        (["extra"], r"unexpected arguments \['extra'\]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_makes_no_sense_is_refused_before_anything_is_edited(
    run, given, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(edit, "edit_images", lambda *_: pytest.fail("it edited"))
    arguments = [a.replace("=", f"={given}/", 1) if a.startswith(("--init", "--mask=")) else a for a in arguments]
    with pytest.raises((ValueError, OSError, app.UsageError), match=message) as refusal:
        call(run.workdir, *arguments, f"--outdir={tmp_path / 'out'}", command=edit)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
