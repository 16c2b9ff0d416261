"""U-Nets from end to end: averages, experts, likelihoods, super-resolution, through the commands' own functions."""

import contextlib
import io
import json

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from diffusion.io import checkpoint, stored_config
from experiments import config as configs
from experiments import drawing, likelihood, measure, objective, runs, sample, session, train
from experiments.configs import patch_unet_mnist
from tests.test_experiments import assert_same_state, killed_at


def tiny(name: str = "whole") -> configs.Config:
    """Two steps of a U-Net, or vision transformer where it does not matter, on a chain of 8."""
    config = patch_unet_mnist.get_config()
    config.name, config.data.size = name, (8, 8)
    config.model = configs.Model(patch_size=4, width=8, depth=1, heads=2, clock="index")
    config.process.variance, config.process.steps = "learned_range", 8
    config.train = configs.Train(
        steps=2, batch_size=4, warmup=0, log_every=1, sample_every=1, save_every=1, learning_rate=1e-2, ema=(0.0, 0.9)
    )
    config.sample = configs.Sample(count=4, respacing="4", sampler="ancestral", guidance=2.0, batch_size=4, clip=True)
    return config


def with_unet(config: configs.Config) -> configs.Config:
    unet = configs.Model(name="unet", patch_size=4, num_channels=8, channel_mult=(1.0,), num_res_blocks=1, heads=2)
    config.model, config.process.variance = unet, "learned_sigmoid"
    return config


def trained(config, workdir):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        report = train.train(config, workdir)
    return report, printed.getvalue()


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """Work directories of two experts, the second begun with the first, and what their trainings said."""
    folder, said = tmp_path_factory.mktemp("experts"), []
    for split in (0, 1):
        config = tiny()
        config.process.snr_splits, config.process.split = (0.25,), split
        config.train.init_from = str(folder / "0") if split else None
        said.append(trained(config, folder / str(split))[1])
    return [folder / "0", folder / "1"], said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    trained(tiny(), workdir)
    return workdir


def sampled(tmp_path, *arguments):
    """samples.npz of the command with these flags."""
    with flagsaver.flagsaver(), contextlib.redirect_stdout(io.StringIO()):
        flags.FLAGS(["sample", *arguments, f"--outdir={tmp_path}"])
        sample.main(["sample"])
    with np.load(tmp_path / "samples.npz") as file:
        return file["arr_0"], file["arr_1"]


def test_an_expert_restores_and_says_how_to_go_on(team):
    workdirs, said = team
    for workdir, words in zip(workdirs, said, strict=True):
        assert "of 2, 2 steps" in words and "experiments.sample --workdir=" in words
        with Image.open(workdir / "previews" / "0000001.png") as image:
            assert image.height > 8 * 28
        assert not (workdir / "samples.npz").exists()
    assert "beginning with the averaged weights" in said[1]


def test_an_expert_begins_with_the_other_ones_average(team):
    workdirs, _ = team
    average, _ = runs.weights(workdirs[0], tiny())
    template = jax.tree.map(np.zeros_like, average)
    jax.tree.map(np.testing.assert_array_equal, runs.begin_with(workdirs[0], template), average)
    leaves, structure = jax.tree.flatten(template)
    other = structure.unflatten([np.zeros((3, 3)), *leaves[1:]])
    with pytest.raises(ValueError, match=r"is another network; 1 parameters differ:\n.*\(3, 3\) here"):
        runs.begin_with(workdirs[0], other)


def test_training_begins_with_those_weights_and_needs_them_only_once(team, tmp_path, monkeypatch):
    config, workdirs = tiny(), team[0]
    config.process.snr_splits, config.process.split = (0.25,), 1
    config.train.init_from, config.train.learning_rate = str(workdirs[0]), 0.0
    trained(config, tmp_path / "run")
    begun, _ = runs.weights(tmp_path / "run", config)
    jax.tree.map(np.testing.assert_array_equal, begun, runs.weights(workdirs[0], config)[0])
    monkeypatch.setattr(runs, "begin_with", None)
    assert "is finished" in trained(config, tmp_path / "run")[1]


def test_experts_draw_together_in_any_order(team, tmp_path):
    workdirs, _ = team
    one, labels = sampled(tmp_path / "a", f"--workdir={workdirs[0]},{workdirs[1]}", "--num_samples=6", "--batch_size=3")
    other, _ = sampled(tmp_path / "b", f"--workdir={workdirs[1]},{workdirs[0]}", "--num_samples=6")
    np.testing.assert_array_equal(one, other)
    assert one.shape == (6, 8, 8, 1) and labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_each_expert_has_its_own_part_in_a_picture(team):
    workdirs, _ = team
    run = runs.trained(workdirs)
    draw = drawing.drawer(run.config, run.seen, team=run.team)
    index, labels = np.arange(4), np.arange(4)
    together = np.asarray(draw(run.params, index, labels))
    for split in (0, 1):
        params = list(run.params)
        params[split] = jax.tree.map(lambda p: p + 0.3, params[split])
        assert not np.array_equal(draw(tuple(params), index, labels), together)


def test_teams_that_are_none_are_refused(team, whole, tmp_path):
    workdirs, _ = team
    with pytest.raises(ValueError, match="holds expert 0 of 2, which draws nothing alone: pass --workdir=A,B"):
        runs.trained(workdirs[:1])
    with pytest.raises(ValueError, match=r"holds the experts \[0, 0\], .* each of 0..1 once"):
        runs.trained([workdirs[0], workdirs[0]])
    stranger = tmp_path / "stranger"
    config = stored_config.read_config(workdirs[1])
    config["process"]["betas"], config["data"]["data_dir"] = "linear", "elsewhere"
    stored_config.write_config(stranger, config)
    with pytest.raises(ValueError, match=r"does not belong to the experts of[^\n]*in:\n  process.betas[^\n]*$"):
        runs.trained([workdirs[0], stranger])


def test_a_stopped_run_goes_on_with_all_that_it_remembers(tmp_path, monkeypatch):
    config = tiny()
    config.process.times, config.train.steps, config.train.log_every = "loss_second_moment", 4, 2
    trained(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        killed_at(patch, 2)
        with pytest.raises(session.Stopped):
            trained(config, tmp_path / "stopped")
    trained(config, tmp_path / "stopped")
    seen = runs.build.stored(tmp_path / "whole")[1]
    like = jax.eval_shape(lambda: objective.init_state(config, seen, runs.build.init_params(config, seen)))
    one, other = (checkpoint.restore(tmp_path / name / "checkpoints", like)[0] for name in ("whole", "stopped"))
    assert_same_state(one, other)
    assert one.carry.counts.sum() == 16 and len(one.ema) == 2


def test_averages_are_chosen_by_their_decay(whole, tmp_path):
    config = tiny()
    fast, slow = (runs.weights(whole, config, decay=decay)[0] for decay in (0.0, 0.9))
    first, _ = runs.weights(whole, config)
    jax.tree.map(np.testing.assert_array_equal, first, fast)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow), strict=True))
    with pytest.raises(ValueError, match=r"--ema=0.7: .* averages with the decays 0.0, 0.9"):
        runs.weights(whole, config, decay=0.7)


def test_flags_of_the_chain_reach_the_sampler(whole, tmp_path):
    arguments = [f"--workdir={whole}", "--num_samples=3"]
    plain, _ = sampled(tmp_path / "a", *arguments)
    same, _ = sampled(tmp_path / "b", *arguments, "--respacing=4", "--clip")
    np.testing.assert_array_equal(plain, same)
    changes = [["--respacing=2,3"], ["--sampler=ddim", "--eta=0.5"], ["--ema=0.9"]]
    for i, other in enumerate(changes):
        drawn, _ = sampled(tmp_path / str(i), *arguments, *other)
        assert not np.array_equal(plain, drawn), other
    with pytest.raises(ValueError, match="both say which steps"):
        sampled(tmp_path / "c", *arguments, "--steps=3", "--respacing=4")
    with pytest.raises(ValueError, match="this run was not trained to enlarge"):
        sampled(tmp_path / "c", *arguments, "--base_samples=x.npz")


def test_bits_depend_on_the_picture_alone_and_add_up(whole, tmp_path):
    options = {"count": 5, "pictures": "test"}
    values = likelihood.measure(runs.trained([whole]), tmp_path / "a", batch_size=5, **options)
    again = likelihood.measure(runs.trained([whole]), tmp_path / "b", batch_size=2, **options)
    assert values["bits_per_dim"] == pytest.approx(again["bits_per_dim"], rel=1e-5)
    parts = values["prior"] + values["between"] + values["decoder"]
    assert values["bits_per_dim"] == pytest.approx(parts, rel=1e-5)
    assert json.loads((tmp_path / "a" / "likelihood.json").read_text()) == values
    with np.load(tmp_path / "a" / "likelihood.npz") as file:
        assert file["terms"].shape == (8, 5)
        np.testing.assert_allclose(file["prior"] + file["terms"].sum(0), file["total"], rtol=1e-5)
    with Image.open(tmp_path / "a" / "likelihood.png") as image:
        assert image.width > 500


def test_experts_code_pictures_each_at_its_own_times(team, tmp_path):
    workdirs, _ = team
    run = runs.trained(workdirs)
    likelihood.measure(run, tmp_path / "both", count=3)
    worse = (run.params[0], jax.tree.map(lambda p: p + 0.3, run.params[1]))
    likelihood.measure(runs.trained(workdirs)._replace(params=worse), tmp_path / "worse", count=3)
    with np.load(tmp_path / "both" / "likelihood.npz") as a, np.load(tmp_path / "worse" / "likelihood.npz") as b:
        same = np.isclose(a["terms"], b["terms"]).all(1)
    assert same.any() and not same.all()
    assert (np.diff(same.astype(int)) >= 0).all(), "the noisier steps come first, and only they are the second expert's"


def test_likelihood_needs_a_chain(whole, tmp_path):
    run = runs.trained([whole])
    run.config.process.path, run.config.process.betas = "linear", "linear"
    with pytest.raises(ValueError, match="path=linear is no chain"):
        likelihood.measure(run, tmp_path)


def test_a_cascade_enlarges_the_samples_of_another_run(tmp_path):
    config = with_unet(tiny("large"))
    config.condition.size, config.condition.noise = (4, 4), 0.2
    trained(config, tmp_path / "large")
    assert (tmp_path / "large" / "samples.npz").exists()
    small = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    base = tmp_path / "small.npz"
    np.savez(base, small, np.arange(5))
    arguments = [f"--workdir={tmp_path / 'large'}", f"--base_samples={base}"]
    drawn, labels = sampled(tmp_path / "a", *arguments)
    assert drawn.shape == (5, 8, 8, 1) and labels.tolist() == [0, 1, 2, 3, 4]
    noisy, _ = sampled(tmp_path / "b", *arguments, "--condition_noise=0.2")
    assert not np.array_equal(drawn, noisy)
    few, _ = sampled(tmp_path / "few", *arguments, "--condition_noise=0.2", "--batch_size=2")
    np.testing.assert_array_equal(few, noisy)
    for wrong, message in (
        (["--condition_noise=0.3"], "sample_noise=0.3 must not exceed"),
        (["--num_samples=9"], "holds only 5 pictures"),
        (["--labels=12"], "not among the classes"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(tmp_path / "c", *arguments, *wrong)
    np.savez(base, np.zeros((5, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match=r"holds uint8 \(5, 8, 8, 1\), but this run enlarges uint8 \('N', 4, 4, 1\)"):
        sampled(tmp_path / "c", *arguments)
    with pytest.raises(ValueError, match="pass some, --base_samples="):
        sampled(tmp_path / "c", arguments[0])
    assert not (tmp_path / "c").exists()


def test_noise_on_the_condition_is_not_the_noise_that_sampling_starts_from():
    config = with_unet(tiny())
    config.condition.size, config.condition.noise, config.condition.sample_noise = (8, 8), 1.0, 1.0
    seen, low = measure.build.Seen((8, 8, 1), ()), np.zeros((50, 8, 8, 1), np.uint8)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(50))
    noise = drawing.beside(config, seen, keys, low)[..., :1] + 1
    start = drawing.sampling.initial_noise(keys, (8, 8, 1))
    assert abs(np.corrcoef(noise.ravel(), start.ravel())[0, 1]) < 0.1
    assert 0.9 < noise.std() < 1.1


def test_held_out_pictures_have_the_labels_asked_for():
    config = tiny()
    labels = np.arange(130) % 10
    images = measure.held_out(config, labels)
    source = measure.build.source(config, "test")
    places = [np.flatnonzero((source.images == image).all((1, 2, 3)))[0] for image in images]
    np.testing.assert_array_equal(source.labels[places], labels)
    assert len(set(places[:100])) == 100
