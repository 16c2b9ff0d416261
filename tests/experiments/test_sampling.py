"""Sampling with experts, averages, chains and super-resolution, through the commands' own functions."""

import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from diffusion import data
from diffusion.models.vit import ViT
from diffusion.sample import initial_noise
from experiments import config as configs
from experiments import inputs, likelihood, parts, preflight, report, sample, sampling
from experiments.parts import DataSpec
from experiments.run_dir import RunDir, trained
from tests.experiments import runs
from tests.experiments.runs import call, noisy, samples, tiny_chain, with_unet


def sampled(outdir, *arguments):
    """samples.npz of experiments.sample with these flags."""
    call(None, *arguments, f"--outdir={outdir}")
    return samples(outdir)


@pytest.mark.slow
def test_an_expert_shows_what_it_denoises_and_says_how_to_go_on(expert_runs):
    workdirs, printed = expert_runs
    for workdir, words in zip(workdirs, printed, strict=True):
        assert "of 2, 2 steps" in words and "experiments.sample --workdir=" in words
        with Image.open(workdir / "previews" / "0000001.png") as image:
            assert image.height > 8 * 28
        assert not (workdir / "samples.npz").exists()
    assert "starting from the averaged weights" in printed[1]


@pytest.mark.slow
def test_experts_sample_together_in_any_order(expert_runs, tmp_path):
    workdirs, _ = expert_runs
    one, labels = sampled(tmp_path / "a", f"--workdir={workdirs[0]},{workdirs[1]}", "--num_samples=6", "--batch_size=3")
    other, _ = sampled(tmp_path / "b", f"--workdir={workdirs[1]},{workdirs[0]}", "--num_samples=6", "--batch_size=3")
    np.testing.assert_array_equal(one, other)
    assert one.shape == (6, 8, 8, 1) and labels.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_each_expert_has_its_own_part_in_a_sample(expert_runs):
    run = trained(expert_runs[0])
    resolved, members = run.parts()
    sample = sampling.sample_fn(resolved, members=members)
    index, labels = np.arange(4), np.arange(4)
    together = np.asarray(sample(run.params, index, labels))
    for split in (0, 1):
        params = list(run.params)
        params[split] = jax.tree.map(lambda p: p + 0.3, params[split])
        assert not np.array_equal(sample(tuple(params), index, labels), together)


@pytest.mark.slow
def test_a_floor_acts_on_every_sampler_and_is_no_part_of_a_likelihood(chain_run, tmp_path, monkeypatch):
    """A network that predicts x0 and learns a variance, sampled by ancestral steps and by DDIM."""
    arguments = [f"--workdir={chain_run}", "--num_samples=3"]
    for i, sampler in enumerate(("ancestral", "ddim")):
        plain, _ = sampled(tmp_path / f"{i} plain", *arguments, f"--sampler={sampler}")
        floored, _ = sampled(tmp_path / f"{i} floor", *arguments, f"--sampler={sampler}", "--floor=0.5")
        tiny, _ = sampled(tmp_path / f"{i} tiny", *arguments, f"--sampler={sampler}", "--floor=1e-6")
        assert (floored != plain).any()
        assert np.abs(tiny.astype(int) - plain).max() <= 1
    run = trained([chain_run])
    run.config.sample.floor = 0.5
    seen = {}
    monkeypatch.setattr(likelihood.vlb, "bits_per_dim", lambda *_, prediction, **__: seen.update(prediction=prediction))
    with pytest.raises(TypeError):  # nothing was measured
        likelihood.measure(run, tmp_path, count=1)
    assert seen == {"prediction": "x0"}


@pytest.mark.slow
def test_flags_of_the_chain_reach_the_sampler(chain_run, tmp_path):
    arguments = [f"--workdir={chain_run}", "--num_samples=3"]
    plain, _ = sampled(tmp_path / "a", *arguments)
    same, _ = sampled(tmp_path / "b", *arguments, "--respacing=4", "--clip")
    np.testing.assert_array_equal(plain, same)
    for i, other in enumerate((["--sampler=ddim", "--eta=0.5", "--respacing=2,1"], ["--ema=0.9"])):
        changed, _ = sampled(tmp_path / str(i), *arguments, *other)
        assert not np.array_equal(plain, changed), other
    with pytest.raises(ValueError, match=r"--ema=0\.7: .* averages with the decays 0\.0, 0\.9"):
        sampled(tmp_path / "c", *arguments, "--ema=0.7")


@pytest.mark.slow
def test_super_resolution_needs_held_out_images_of_every_class_that_it_samples(monkeypatch):
    config = tiny_chain("large")
    config.condition.size, config.sample.count = (4, 4), 4
    run = parts.resolve(config, DataSpec((8, 8, 1), ("a", "b", "c", "d", "e")))
    held = data.from_arrays(np.zeros((4, 8, 8, 1), np.uint8), [0, 1, 3, 3], "abcde")
    monkeypatch.setattr(inputs, "source", lambda *_: held)
    with pytest.raises(ValueError, match="arrays has none of the classes c; see --config.data.held_out"):
        preflight.check_shapes(config, run)
    monkeypatch.setattr(inputs, "source", lambda *_: held._replace(labels=np.arange(4)))
    preflight.check_shapes(config, run)


@pytest.mark.slow
def test_a_cascade_enlarges_the_samples_of_another_run(tmp_path):
    """With a vision transformer, that learns a variance."""
    config = tiny_chain("large")
    config.condition.size, config.condition.noise = (4, 4), 0.2
    runs.trained(config, tmp_path / "large")
    assert (tmp_path / "large" / "samples.npz").exists()
    small = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    base = tmp_path / "small.npz"
    np.savez(base, small, np.arange(5))
    arguments = [f"--workdir={tmp_path / 'large'}", f"--base_samples={base}"]
    images, labels = sampled(tmp_path / "a", *arguments)
    assert images.shape == (5, 8, 8, 1) and labels.tolist() == [0, 1, 2, 3, 4]
    noisy, _ = sampled(tmp_path / "b", *arguments, "--condition_noise=0.2")
    assert not np.array_equal(images, noisy)
    few, _ = sampled(tmp_path / "few", *arguments, "--condition_noise=0.2", "--batch_size=2")
    np.testing.assert_array_equal(few, noisy)
    for wrong, message in (
        (["--condition_noise=0.3"], "sample_noise=0.3 must not exceed"),
        (["--num_samples=9"], "holds only 5 images"),
        (["--labels=12"], "not among the classes"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(tmp_path / "c", *arguments, *wrong)
    np.savez(base, np.zeros((5, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"holds uint8 \(5, 8, 8, 1\), but this run enlarges uint8 \('N', 4, 4, 1\)"):
        sampled(tmp_path / "c", *arguments)
    with pytest.raises(ValueError, match="this run enlarges images of 4x4: pass some, --base_samples="):
        sampled(tmp_path / "c", arguments[0])
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vit", "unet"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_super_resolution_predicts_the_image_and_not_its_conditioning_input(network, noise):
    """Shapes: the input has the low-resolution image, and the level of noise on it, as further channels."""
    config = tiny_chain() if network == "vit" else with_unet(tiny_chain())
    config.condition.size, config.condition.noise = (4, 4), noise
    run = parts.resolve(config, DataSpec((8, 8, 3), ("a", "b")))
    params = jax.eval_shape(lambda: parts.init_params(run))
    channels = 6 + (noise > 0)
    first = params["embed" if network == "vit" else "input_0"]["kernel"]
    assert first.shape[-2] == 4 * 4 * channels
    out = jax.eval_shape(run.model.apply, params, *(np.zeros((2, 8, 8, channels), np.float32), np.zeros(2, np.float32)))
    assert out.pred.shape == out.v.shape == (2, 8, 8, 3)
    one, low = np.zeros(2, np.int32), np.zeros((2, 4, 4, 3), np.uint8)
    images = jax.eval_shape(sampling.sample_fn(run), params, one, one, low)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="needs low-resolution images to start from"):
        jax.eval_shape(sampling.sample_fn(run), params, one, one)


def test_noise_on_the_conditioning_image_is_not_the_noise_that_sampling_starts_from():
    config = tiny_chain()
    config.condition.size, config.condition.noise, config.condition.sample_noise = (8, 8), 1.0, 1.0
    run, low = parts.resolve(config, DataSpec((8, 8, 1))), np.zeros((50, 8, 8, 1), np.uint8)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(50))
    noise = sampling.conditioning(run, keys, low)[..., :1] + 1
    start = initial_noise(keys, (8, 8, 1))
    assert abs(np.corrcoef(noise.ravel(), start.ravel())[0, 1]) < 0.1
    assert 0.9 < noise.std() < 1.1


SAMPLERS = "ddim ancestral heun dpmpp_2m euler unipc adams_bashforth dpmpp_2m_sde edm"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS.split())
def test_every_sampler_of_the_config_samples(sampler):
    config = tiny_chain()
    config.model = ViT(patch_size=8, width=4, depth=1, heads=1)
    config.sample.sampler, config.sample.clip = sampler, False
    if sampler == "edm":
        config.sample.respacing, config.sample.steps, config.sample.rho, config.sample.churn = None, 4, 7.0, 2.0
    run = parts.resolve(config, DataSpec((8, 8, 1)))
    params = noisy(parts.init_params(run), 0.3)
    images = np.asarray(sampling.sample_fn(run)(params, np.arange(2), np.zeros(2, np.int32)))
    assert images.shape == (2, 8, 8, 1) and len(np.unique(images)) > 10


def test_noise_on_edms_grid_has_the_scale_of_its_first_time():
    config = tiny_chain()
    config.process, config.model = configs.Process(), ViT(patch_size=8, width=4, depth=1, heads=1)
    config.sample = configs.Sample(steps=4, rho=7.0, sigma_max=1.5)
    keys = jax.random.split(jax.random.key(0), 50)
    assert np.std(sampling.initial_noise(parts.resolve(config, DataSpec((8, 8, 1))), keys)) == pytest.approx(0.6, 0.05)
    config.sample = configs.Sample(steps=4)
    keys = jax.random.split(jax.random.key(1), 50)
    assert np.std(sampling.initial_noise(parts.resolve(config, DataSpec((8, 8, 1))), keys)) == pytest.approx(1.0, 0.05)


KINDS = {
    "classifier_free": {},
    "rescale": {"guidance_rescale": 1.0},
    "cfg_zero": {"guidance_zero_steps": 2},
    "apg": {"guidance_radius": 0.5},
    "apg with momentum": {"guidance_radius": 0.5, "guidance_momentum": -0.5},
    "cfg_plus_plus": {"guidance": 0.9},
}


@pytest.mark.slow
def test_every_kind_of_guidance_reaches_the_samples_and_each_is_another():
    config = tiny_chain()
    config.process, config.model = configs.Process(), ViT(patch_size=8, width=4, depth=1, heads=1)
    made = {}
    for kind, options in KINDS.items():
        options = {"guidance": 3.0, "guidance_kind": kind.removesuffix(" with momentum"), **options}
        config.sample = configs.Sample(steps=5, **options)
        run = parts.resolve(config, DataSpec((8, 8, 1), ("a", "b")))
        params = noisy(parts.init_params(run), 0.3)
        made[kind] = np.asarray(sampling.sample_fn(run)(params, np.arange(2), np.arange(2)))
    stacked = np.stack(list(made.values())).astype(int)
    assert (np.abs(stacked[:, None] - stacked[None]).sum((2, 3, 4, 5)) > 0).sum() == len(KINDS) * (len(KINDS) - 1)


@pytest.mark.slow
def test_autoguidance_leads_away_from_the_weaker_run(chain_run, tmp_path):
    """The second average of the run, or an earlier checkpoint; the same weights guide nowhere."""
    arguments = [f"--workdir={chain_run}", "--num_samples=3", "--guidance=3"]
    plain, _ = sampled(tmp_path / "plain", *arguments[:2], "--guidance=1")
    average, _ = sampled(tmp_path / "average", *arguments, "--guide_ema=0.9", "--trajectory")
    assert not np.array_equal(plain, average)
    same, _ = sampled(tmp_path / "same", *arguments, f"--guide_workdir={chain_run}", "--guide_ema=0.9")
    np.testing.assert_array_equal(same, average)
    earlier, _ = sampled(tmp_path / "earlier", *arguments, "--guide_checkpoint=1")
    assert not np.array_equal(earlier, plain) and not np.array_equal(earlier, average)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guide_ema=0.5", "--guidance=3"], r"--guide_ema=0\.5: .* has averages with the decays 0\.0, 0\.9"),
        (["--guide_ema=0.9", "--guidance=3", "--guidance_kind=apg"], "--guidance_kind=apg is of guidance by labels"),
        (["--guide_ema=0.9", "--guidance=1"], "--guidance=1.0 is no guidance"),
        (["--guide_ema=0.9"], "--guidance is missing: pass how far to go"),
        (["--guide_workdir=nowhere", "--guidance=3"], "nowhere"),
        (["--guide_workdir=RUN", "--guidance=3"], "--guide_workdir=.* has the weights of the run itself"),
        (["--guide_ema=0", "--guidance=3"], r"--guide_ema=0\.0 has the weights of the run itself"),
        (["--guide_workdir=RUN", "--checkpoint=1", "--guidance=3"], "has the weights of the run itself"),
        (["--guide_ema=0.9", "--ema=0.9", "--guidance=3"], "has the weights of the run itself"),
        (["--guide_checkpoint=2", "--guidance=3"], "--guide_checkpoint=2 has the weights of the run itself"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_weaker_run_that_guides_nowhere_is_refused(chain_run, tmp_path, arguments, message):
    arguments = [argument.replace("RUN", str(chain_run)) for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(chain_run, *arguments, f"--outdir={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_scale_and_interval_of_labels_are_not_those_of_a_weaker_run(chain_run):
    config, spec = RunDir(chain_run).stored()
    config.sample.guidance_high, config.sample.guidance_open = 0.8, True
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["sample", "--guidance=3", "--guidance_low=0.1"])
        found = sample.overridden(config, spec, autoguided=True).sample
    interval = (found.guidance_low, found.guidance_high, found.guidance_open)
    assert (found.guidance, interval) == (3.0, (0.1, 1.0, False))


def test_another_scale_of_noise_is_another_path(run, copy):
    stored = json.loads((copy / "config.json").read_text())
    stored["process"]["noise_scale"] = 2.0
    (copy / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="was trained on other data or on another path"):
        call(run.workdir, f"--guide_workdir={copy}", "--guidance=2")


@pytest.mark.slow
def test_a_run_on_other_data_or_another_path_cannot_guide(chain_run, expert_runs, run):
    for weaker, message in (
        (run.workdir, "was trained on other data or on another path"),
        (expert_runs[0][0], "cannot sample alone|another path"),
    ):
        with pytest.raises(ValueError, match=message):
            call(chain_run, f"--guide_workdir={weaker}", "--guidance=2")


def test_held_out_images_have_the_labels_asked_for():
    config = tiny_chain()
    labels = np.arange(130) % 10
    images = inputs.held_out(config, labels)
    source = inputs.source(config, "test")
    places = [np.flatnonzero((source.images == image).all((1, 2, 3)))[0] for image in images]
    np.testing.assert_array_equal(source.labels[places], labels)
    assert len(set(places[:100])) == 100


@pytest.mark.slow
def test_which_samples_are_finite_is_known():
    """A label whose embedding is NaN spoils its own samples, also in a batch that is filled up; the others stay."""
    config = tiny_chain()
    config.model = ViT(patch_size=8, width=4, depth=1, heads=1)
    run = parts.resolve(config, DataSpec((8, 8, 1), ("a", "b")))
    params = parts.init_params(run)
    table = next(name for name in params if params[name].get("embedding") is not None)
    spoilt = {**params, table: {"embedding": params[table]["embedding"].at[1].set(np.nan)}}
    sample, labels = sampling.sample_fn(run, finite=True), np.array([0, 1, 1, 0, 0], np.int32)
    images, _, finite = report.collect(sample, spoilt, labels, 3)
    assert finite.tolist() == [True, False, False, True, True]
    whole, _, every = report.collect(sample, params, labels, 3)
    assert every.all()
    np.testing.assert_array_equal(images[finite], whole[finite])
    np.testing.assert_array_equal(images[1:3], 0)
    (_, frames), known = jax.eval_shape(sampling.sample_fn(run, 3, finite=True), params, labels, labels)
    assert frames.shape == (3, 5, 8, 8, 1) and known.shape == (5,)
