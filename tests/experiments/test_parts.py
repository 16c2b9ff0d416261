"""From a config to parts: what each field becomes, and what is refused before anything is done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import process
from diffusion.models.blog import Blog
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import parts, preflight
from experiments.configs import patch_unet_mnist
from experiments.parts import DataSpec

SPEC = DataSpec((8, 8, 1), ("a", "b", "c"))


def tiny():
    """A U-Net on 4x4 patches with a learned variance, and a chain of 20 steps."""
    config = patch_unet_mnist.get_config()
    config.model = UNet(patch_size=4, num_channels=8, num_res_blocks=1, channel_mult=(1.0,), num_heads=2, clock="index")
    config.process.steps, config.train.batch_size, config.train.warmup = 20, 8, 0
    config.sample.respacing = "10"
    return config


def change(config, fields):
    for name, value in fields.items():
        section, _, field = name.partition(".")
        setattr(getattr(config, section), field, value)


def test_resolving_leaves_the_config_alone():
    config = tiny()
    before = configs.to_dict(config)
    run = parts.resolve(config, SPEC)
    assert configs.to_dict(config) == before
    config.model.num_channels = 16
    assert jax.eval_shape(lambda: parts.init_params(run))["input_0"]["kernel"].shape[-1] == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process.vlb_weight": 0.0}, "variance=learned_sigmoid is learned from the variational term: .*vlb_weight=1"),
        ({"process.vlb_weight": -1.0}, "vlb_weight=-1.0 must not be negative"),
        (
            {"process.path": "linear", "process.betas": "linear", "sample.respacing": None, "model.clock": "1000 t"},
            "needs --config.process.path=vp and times=grid",
        ),
        ({"process.times": "uniform"}, "needs --config.process.path=vp and times=grid"),
        ({"data.low": 0.0}, r"needs images in \[-1, 1\], not \[0.0, 1.0\]"),
        ({"data.low": 1.0}, r"--config\.data\.low=1\.0 must be below --config\.data\.high=1\.0"),
        ({"process.variance": "fixed_small", "process.vlb_weight": 0.0, "process.vlb_only": True}, "needs a weight"),
        (
            {"process.path": "linear", "process.betas": "linear", "process.vlb_weight": 0.0}
            | {"process.variance": "fixed_small"},
            "path=linear is not a chain of steps, which this needs: set it to vp",
        ),
        ({"process.split": 0}, "split=0 needs --config.process.snr_splits"),
        ({"process.snr_splits": (0.25, 0.25), "process.split": 0}, "must fall"),
        ({"process.snr_splits": (0.25, 0.2499999), "process.split": 1}, "two thresholds are reached at the same time"),
        (
            {"process.snr_splits": (0.25,), "process.split": 0, "process.times": "antithetic"}
            | {"process.vlb_weight": 0.0, "process.variance": "fixed_small"},
            "not one of uniform, grid",
        ),
        ({"process.weighting": "p3"}, "weighting='p3' is not one of"),
        ({"condition.noise": 0.2}, "condition.noise=0.2 has no effect on this run"),
        ({"process.rate": 0.9}, "process.rate=0.9 has no effect on this run"),
        ({"process.weighting_gamma": 1.0}, "weighting_gamma=1.0 has no effect"),
        ({"model.num_head_channels": 4}, r"--config\.model\.num_heads=2 has no effect on this run: leave it at 4"),
        ({"train.label_drop": 3.0}, r"--config\.train\.label_drop=3\.0 must lie in \[0, 1\]"),
        ({"train.learning_rate": -1.0}, r"--config\.train\.learning_rate=-1\.0 must be positive"),
        ({"train.ema": (2.0,)}, r"--config\.train\.ema=\(2\.0,\) must list decays"),
        ({"train.eval_every": -5}, r"--config\.train\.eval_every=-5 must be at least 1"),
        ({"process.betas": "foo"}, r"--config\.process\.betas: betas='foo' are not one of linear"),
        (
            {"sample.respacing": "10", "sample.steps": 7},
            r"sample\.steps=7 has no effect .* set --config\.sample\.respacing=None",
        ),
        ({"process.prediction": "x"}, r"--config\.process\.prediction='x' is not one of x0, eps, v, flow"),
        ({"process.variance": "fixed_smal"}, "variance='fixed_smal' is not one of"),
        ({"condition.size": ()}, r"condition.size=\(\) must be a pair"),
        ({"condition.size": (3, 3)}, r"condition.size: size=\(3, 3\) must divide the images' \(8, 8\)"),
        ({"condition.size": (4, 4), "condition.sample_noise": 0.1}, "sample_noise=0.1 must not exceed"),
        ({"process.patches": True}, "needs a network that predicts patches, such as blog, not unet"),
        ({"model.dtype": "float8"}, r"--config\.model: dtype='float8' is not one of \('float32'"),
        ({"model.sinusoids": "vit"}, r"--config\.model: sinusoids='vit' is not one of"),
        ({"sample.sampler": "ddim", "sample.eta": 1.5}, r"eta=1.5 must lie in \[0, 1\]"),
        ({"sample.eta": 0.5}, r"--config\.sample\.eta=0\.5 has no effect on this run: leave it at 0\.0"),
        ({"sample.respacing": "30"}, "keeps 30 of a section of 20 steps"),
        ({"sample.respacing": "ddim6"}, "no integer stride keeps '6' of 20"),
        ({"sample.last": 0.2}, "leave out sample.shift and sample.last"),
        (
            {"process.noise_scale": 2.0},
            r"noise_scale=2\.0 has no effect .* set --config\.process\.path=linear",
        ),
        ({"sample.floor": 1.0}, r"--config\.sample\.floor=1\.0 must lie in \[0, 1\)"),
        (
            {"sample.floor": 0.05, "process.prediction": "v"},
            r"sample\.floor=0\.05 has no effect .* set --config\.process\.prediction=x0",
        ),
        (
            {"sample.guidance_kind": "cfg"},
            r"--config\.sample\.guidance_kind='cfg' is not one of classifier_free, rescale",
        ),
        (
            {"sample.guidance_radius": 2.0},
            r"guidance_radius=2\.0 has no effect .* set --config\.sample\.guidance_kind=apg",
        ),
        ({"sample.guidance_kind": "cfg_zero", "sample.guidance_zero_steps": 10}, "must be fewer than the 10 steps"),
        (
            {"sample.guidance_kind": "cfg_plus_plus"},
            "cfg_plus_plus is a step of DDIM without noise: set .*sampler=ddim",
        ),
        (
            {"sample.guidance_kind": "cfg_plus_plus", "sample.sampler": "ddim", "sample.guidance": 1.5},
            r"guidance=1\.5 must lie in \[0, 1\] for guidance_kind=cfg_plus_plus",
        ),
        (
            {"sample.guidance_kind": "apg", "sample.guidance_momentum": -0.5},
            "leave out sample.clip and sample.threshold",
        ),
        ({"sample.order": 3}, "order=3 has no effect on this run"),
        ({"sample.sampler": "unipc", "sample.order": 4}, r"--config\.sample: order=4 must be a whole number in 1\.\.3"),
        ({"sample.sampler": "edm", "sample.churn_low": 0.1}, "have no effect without churn"),
        ({"sample.sampler": "edm", "sample.churn": 1.0}, "churn=1.0 is spread over sample.steps"),
        (
            {"sample.sampler": "edm", "sample.respacing": None, "sample.churn": 1.0, "sample.churn_high": 0.5}
            | {"sample.churn_low": 0.5},
            "churn_low=0.5 must be below churn_high=0.5",
        ),
        ({"sample.rho": 7.0}, "leave out sample.rho"),
        ({"sample.rho": 7.0, "sample.respacing": None, "sample.last": 0.1}, "leave out sample.shift and sample.last"),
        ({"sample.sigma_min": 0.01}, r"sigma_min=0\.01 has no effect .* set --config\.sample\.rho=7\.0"),
        (
            {"sample.rho": 7.0, "sample.respacing": None, "sample.sigma_min": 100.0},
            r"--config\.sample\.rho, sigma_min, sigma_max: low=100\.0 must lie between 0 and high=80\.0",
        ),
        ({"sample.threshold": 0.9}, "threshold=0.9 keeps estimates in range already: leave out clip"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_refused(fields, message):
    config = tiny()
    change(config, fields)
    with pytest.raises(ValueError, match=message):
        parts.resolve(config, SPEC)


@pytest.mark.parametrize(("prediction", "floor"), [("x0", 0.1), ("eps", 0.05)])
def test_a_floor_is_one_of_time_whatever_the_scale_of_the_noise(prediction, floor):
    """|det| is sigma, scale t, for x0 and alpha, 1 - t, for eps."""
    config = configs.Config()
    config.process.noise_scale, config.sample.floor, config.process.prediction = 2.0, 0.05, prediction
    run = parts.resolve(config, SPEC)
    assert run.path == process.Linear(2.0) and run.denoiser_prediction == "flow" and run.floor == floor
    t = jnp.array([0.01, 0.05, 0.5, 0.95, 0.99])
    wanted = 1 / jnp.maximum(t, 0.05) if prediction == "x0" else 2 / jnp.maximum(1 - t, 0.05)
    np.testing.assert_allclose(run.weight(process.coefficients(run.path, t)), wanted**2, rtol=1e-5)


def test_the_denoiser_of_a_run_without_a_floor_predicts_what_the_network_does():
    assert parts.resolve(configs.Config(), SPEC).denoiser_prediction == "x0"


def test_labels_need_a_network_that_takes_them():
    config = configs.Config(model=Blog(patch_size=4, stride=None, depth=1, heads=1, head_dim=2))
    with pytest.raises(ValueError, match=r"the network blog is unconditional: set --noconfig\.data\.labels"):
        parts.resolve(config, SPEC)
    assert parts.resolve(config, DataSpec((8, 8, 1))).spec.num_classes == 0


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("train", "steps", 0, r"--config\.train\.steps=0 must be at least 1"),
        ("train", "batch_size", 0, r"--config\.train\.batch_size=0 must be"),
        ("train", "log_every", -1, r"--config\.train\.log_every=-1 must be"),
        ("train", "clip", 0.0, r"--config\.train\.clip=0\.0 must be positive"),
        ("train", "patience", 3, r"--config\.train\.patience=3 needs --config\.train\.eval_every"),
        ("train", "warmup", 2000, r"--config\.train: warmup=2000 must lie in \[0, steps=2000\)"),
        ("train", "schedule", "cosin", r"schedule='cosin' is not one of"),
        ("train", "ema", (), r"--config\.train\.ema=\(\) must list decays in \[0, 1\)"),
        ("train", "microbatch", 5, r"--config\.train\.microbatch=5 must divide the 64 examples"),
        ("sample", "steps", 0, r"--config\.sample\.steps=0 must be"),
        ("sample", "count", 0, r"--config\.sample\.count=0 must be"),
        (
            "sample",
            "sampler",
            "dim",
            r"--config\.sample\.sampler='dim' is not one of ddim, ancestral, heun, dpmpp_2m, euler",
        ),
        ("process", "path", "strait", r"--config\.process\.path='strait' is not one of linear"),
        ("process", "times", "often", r"--config\.process\.times='often' is not one of uniform"),
        ("process", "snr_splits", (0.25,), r"split=None: .* train one expert at a time, --split=0 to --split=1"),
    ],
)
def test_values_out_of_range_are_refused(section, field, value, message):
    config = configs.Config()
    preflight.check(config)
    if field == "snr_splits":
        config.process.times = "uniform"
    setattr(getattr(config, section), field, value)
    with pytest.raises(ValueError, match=message):
        preflight.check(config)


@pytest.mark.parametrize(
    ("network", "fields", "message"),
    [
        (ViT, {"optimizer": "Muon"}, "optimizer='Muon' is not one of adamw, muon"),
        (ViT, {"matrix_rate": 0.1}, r"--config\.train\.matrix_rate=0\.1 has no effect on this run"),
        (ViT, {"optimizer": "muon", "matrix_rate": 0.0}, r"--config\.train\.matrix_rate=0\.0 must be positive"),
        (UNet, {"optimizer": "muon"}, r"optimizer=muon needs a network .* such as vit, not unet: set it to adamw"),
    ],
)
def test_optimisers_that_do_not_fit_are_refused(network, fields, message):
    config = configs.Config(model=network(), train=configs.Train(**fields))
    with pytest.raises(ValueError, match=message):
        preflight.check(config)


@pytest.mark.slow
def test_each_rate_reaches_the_parameters_it_is_for():
    config = configs.Config(model=ViT(width=16, depth=1, heads=2))
    config.train.optimizer, config.train.schedule, config.train.warmup = "muon", "constant", 0
    rng = np.random.default_rng(0)
    shapes = {"qkv": (16, 3, 2, 8), "gates": (16, 96)}
    params = {"block_0": {name: {"kernel": jnp.asarray(rng.normal(size=shape))} for name, shape in shapes.items()}}
    moved = {}
    for field in (None, "learning_rate", "matrix_rate"):
        now = dataclasses.replace(config.train, **({field: 2 * getattr(config.train, field)} if field else {}))
        optimizer = parts.resolve(dataclasses.replace(config, train=now), DataSpec((8, 8, 1))).optimizer
        updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
        block = updates["block_0"]
        moved[field] = np.array([abs(block[name]["kernel"]).max() for name in ("qkv", "gates")])
    np.testing.assert_allclose(moved["learning_rate"] / moved[None], [1, 2], rtol=1e-5)
    np.testing.assert_allclose(moved["matrix_rate"] / moved[None], [2, 1], rtol=1e-5)


def test_images_survive_the_way_to_the_network_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    config = configs.Config()
    for low, high in ((-1.0, 1.0), (-0.5, 255 / 256 - 0.5), (0.0, 1.0)):
        config.data.low, config.data.high = low, high
        run = parts.resolve(config, SPEC)
        x = parts.to_float(run, images)
        assert (float(x.min()), float(x.max())) == (low, high)
        np.testing.assert_array_equal(parts.to_uint8(run, x), images)


def test_uses_of_a_seed_share_no_random_numbers():
    keys = [parts.key(seed, use) for seed in (0, 1) for use in ("init", "train", "sample")]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == 6


def test_the_last_step_of_a_grid_jumps_to_the_data():
    config = configs.Config()
    config.sample.steps, config.sample.last = 4, 0.3
    grid = parts.resolve(config, SPEC).grid
    assert len(grid) == 5 and grid[0] == 1 and grid[-1] == 0 and grid[-2] == pytest.approx(0.3)
