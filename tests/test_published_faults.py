"""Faults of the published Patch Diffusion program, and the tests that show that this one does not have them.

- Labels are never dropped in training, so that guidance relies on a class that was never learned:
    test_labels_are_dropped_in_training_and_nowhere_else, test_every_gradient_of_a_float16_network_is_unscaled
- The default network cannot be built for 64 x 64 images in patches of 4:
    test_networks_of_64x64_images_in_patches_of_4
- Class labels cannot be read from names that are not numbers:
    test_classes_named_by_words_are_numbered,
    data/test_folder.py::test_classes_are_sorted_first_sub_folders
- In float16 one group of gradients keeps the scale of the loss:
    test_every_gradient_of_a_float16_network_is_unscaled,
    test_train.py::test_scaled_gradients_are_unscaled_in_every_group_of_parameters
- Super-resolution ends in an error when it samples, attends at the wrong size, and takes any number for a variance:
    test_super_resolution_samples_with_a_learned_variance, test_attention_goes_by_the_grid_of_patches,
    pretrained/test_layouts.py::test_an_upsampler_has_its_condition_as_input_channels
- Without scaling by the time (use_scale_shift_norm) shapes do not fit:
    test_networks_of_64x64_images_in_patches_of_4,
    models/test_unet.py::test_every_branch_answers_in_the_images_shape_and_learns_with_every_parameter
- A learned variance works only if the first level has multiplier 1:
    test_networks_of_64x64_images_in_patches_of_4,
    models/test_unet.py::test_every_branch_answers_in_the_images_shape_and_learns_with_every_parameter
- Multipliers that fall from level to level build another network than was asked for:
    test_networks_of_64x64_images_in_patches_of_4,
    models/test_unet.py::test_widths_are_rounded_down_in_any_order_and_change_where_the_field_says
- The output folder is checked after everything was sampled:
    test_an_output_folder_is_made_first, test_likelihood_makes_its_folder_before_it_measures,
    experiments/test_sample.py::test_what_makes_no_sense_is_refused_before_anything_is_sampled,
    experiments/test_train.py::test_a_file_in_the_way_of_the_work_directory_is_refused
- Guidance fails with some clocks and some predictions:
    test_guidance_means_guided_noise_for_every_prediction_and_clock,
    test_guide.py::test_guidance_on_a_respaced_chain_sees_the_original_indices
- Names are used that NumPy has removed:
    test_every_name_of_numpy_and_jax_that_is_used_exists
- Imports that nothing needs, one of which breaks elsewhere:
    test_every_import_is_used, test_architecture.py::test_arrows_point_down
- Experts are numbered by one digit, thresholds may be in any order and ranges empty, a boundary belongs to one expert
  in training and to another in sampling, and pure noise belongs to none:
    test_more_than_ten_experts_train_on_the_times_that_they_sample_at, test_experts_that_do_not_fit_are_refused,
    test_pure_noise_has_an_expert, test_experts.py::test_more_than_ten_experts,
    test_experts.py::test_clean_data_and_pure_noise_have_experts,
    test_experts.py::test_a_boundary_belongs_to_the_noisier_expert,
    test_experts.py::test_training_times_are_those_that_sampling_gives_the_same_expert,
    test_experts.py::test_impossible_splits_are_refused
- Documented commands hand quotation marks on to the program, which cannot read them:
    test_documented_commands_give_fields_of_the_right_type
- Continuing on several devices waits forever for a message that only one process sends:
    test_no_process_waits_for_another_to_continue,
    io/test_checkpoint.py::test_restored_leaves_have_the_sharding_of_like,
    test_train.py::test_sharded_training_equals_training_on_one_device
- Likelihoods are those of images mirrored at random, and cannot be computed with experts:
    test_likelihood_is_that_of_the_images_as_they_are_and_asks_every_expert,
    test_vlb.py::test_experts_guidance_clipping_and_learned_variance_are_denoisers_here_too
- Thresholding large images by their quantile exceeds a limit on the number of values:
    test_guide.py::test_dynamic_thresholding_has_no_largest_batch,
    test_guide.py::test_dynamic_thresholding_matches_diffusers
- Which end of a learned variance is which is documented the wrong way round:
    test_the_documented_ends_of_a_learned_variance_are_its_ends,
    test_posterior.py::test_the_two_learned_conventions_run_in_opposite_directions
- Installation leaves out packages and modules:
    test_installation_names_everything_that_is_imported
- The trained weights are lost, and with them every number to compare with:
    pretrained/test_layouts.py::test_published_networks_give_the_published_outputs,
    metrics/test_digits.py::test_the_classifier_of_the_package_reads_held_out_digits,
    metrics/test_digits.py::test_a_flipped_byte_of_the_weights_is_detected
"""

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from PIL import Image

from diffusion import data, experts, posterior, train, vlb
from diffusion.io import checkpoint
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from diffusion.predict import Estimate, decode
from diffusion.process import Cosine, coefficients
from experiments import command, inputs, objective, parts, preflight, sampling
from experiments import config as configs
from experiments import likelihood as likelihoods
from experiments.parts import DataSpec
from experiments.run_dir import Trained

ROOT = Path(__file__).parents[1]
FILES = sorted(path for room in ("diffusion", "experiments") for path in (ROOT / room).rglob("*.py"))
pytestmark = pytest.mark.usefixtures("compiled_once")
TINY = {"num_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_heads": 2, "attention_resolutions": ()}
SPEC = DataSpec((8, 8, 1), ("a", "b", "c"))
DIGITS = DataSpec((28, 28, 1), tuple("0123456789"))


def test_the_table_names_tests_that_exist_and_every_test_here():
    rows = __doc__.split("\n- ")[1:]
    assert len(rows) == 20
    for row in rows:
        named = re.findall(r"(?:([\w/]*test_\w+\.py)::)?\b(test_\w+)\b(?!\.py)", row)
        assert named, row
        for file, name in named:
            assert name in names_of_tests(file or Path(__file__).name), f"{file or 'this file'} has no {name}"
    here = names_of_tests(Path(__file__).name) - {test_the_table_names_tests_that_exist_and_every_test_here.__name__}
    assert not here - set(re.findall(r"test_\w+", __doc__)), "tests that the table does not name"


@functools.cache
def names_of_tests(file):
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile()


def unet(**fields):
    """A config of a tiny U-Net on a chain, which samples with every step of it."""
    config = configs.Config(model=UNet(patch_size=2, **TINY))
    config.process = configs.Process(path="vp", betas="cosine", steps=4, times="grid", loss_in=None)
    config.sample = configs.Sample(respacing="", sampler="ancestral", clip=True)
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def vit(**fields):
    """The same with a tiny vision transformer, which compiles faster."""
    config = unet(**fields)
    config.model = ViT(patch_size=4, width=8, depth=1, heads=2, clock=config.model.clock)
    return config


def resolved(config, spec=SPEC):
    return parts.resolve(config, spec)


def random_params(config, spec=SPEC, seed=0):
    """Parameters of which none is at its initial zero."""
    rng, run = np.random.default_rng(seed), parts.resolve(config, spec)

    def value(leaf):
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 4
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan), jnp.float32)

    return jax.tree.map(value, jax.eval_shape(lambda: parts.init_params(run)))


def uint8_images(n, spec=SPEC):
    return np.random.default_rng(7).integers(0, 256, (n, *spec.shape), np.uint8)


@pytest.mark.slow
def test_labels_are_dropped_in_training_and_nowhere_else():
    config, n = configs.Config(), 4000
    batch = {"x": jnp.zeros((n, 2, 2, 1), jnp.uint8), "y": jnp.arange(n) % 10}

    def labels(training):
        pieces = objective.objective(resolved(config, DIGITS), training=training)
        return np.asarray(compiled(pieces.draw, jax.random.key(0), batch, None)(jax.random.key(0), batch, None)["y"])

    assert config.train.label_drop == 0.1
    seen = labels(training=True)
    np.testing.assert_allclose((seen == 10).mean(), 0.1, atol=0.02)
    np.testing.assert_array_equal(seen[seen != 10], batch["y"][seen != 10])
    np.testing.assert_array_equal(labels(training=False), batch["y"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__use_scale_shift_norm": False},
        {"model__channel_mult": (0.5, 1.5), "process__variance": "learned_sigmoid"},
        pytest.param({"model__channel_mult": (2, 1, 0.5)}, marks=pytest.mark.slow),
        pytest.param({"model__channel_mult": (1, 3, 1, 2)}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: " ".join(f"{name.split('__')[1]}={value}" for name, value in fields.items()) or "default",
)
def test_networks_of_64x64_images_in_patches_of_4(fields):
    """As `UNet` has it where nothing else is said, narrower."""
    config = configs.Config(model=UNet(patch_size=4, num_channels=32))
    if "process__variance" in fields:
        config.process = configs.Process(path="vp", times="grid", vlb_weight=1.0)
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    run = resolved(config, DataSpec((64, 64, 3), ("a", "b")))
    params = jax.eval_shape(lambda: parts.init_params(run))
    out = jax.eval_shape(run.model.apply, params, jnp.zeros((2, 64, 64, 3)), jnp.zeros(2), jnp.zeros(2, int))
    assert [leaf.shape for leaf in jax.tree.leaves(out)] == [(2, 64, 64, 3)] * (1 + ("process__variance" in fields))


@pytest.mark.slow
def test_classes_named_by_words_are_numbered(tmp_path):
    for name in ("n02084071", "n01440764", "n01443537"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    config = configs.Config(data=configs.Data(name=f"folder:{tmp_path}"))
    images = inputs.source(config)
    spec = inputs.data_spec(config, images)
    assert spec.class_names == ("n01440764", "n01443537", "n02084071") and spec.num_classes == 3
    assert set(images.labels.tolist()) == {0, 1, 2}
    batch = data.batch(images, 0, 0, 6)
    assert set(objective.objective(resolved(config, spec)).draw(jax.random.key(0), batch, None)["y"].tolist()) <= {
        0,
        1,
        2,
        3,
    }


@pytest.mark.slow
def test_every_gradient_of_a_float16_network_is_unscaled():
    """Kernels, tables (the null class among them) and vectors move by it, whatever the loss was multiplied by."""
    config = unet(model__dtype="float16", train__label_drop=0.5)
    pieces, params = objective.objective(resolved(config)), random_params(config)
    batch = {"x": jnp.asarray(uint8_images(8)), "y": jnp.arange(8) % 3}
    step = train.make_step(pieces.loss, optax.sgd(1.0), draw=pieces.draw, report=pieces.report)
    first = train.init_state(params, optax.sgd(1.0), log2_scale=2.0)
    run = compiled(step, jax.random.key(0), first, batch)
    moved = []
    for scale in (2.0, 8.0):
        after, metrics = run(jax.random.key(0), first._replace(log2_scale=jnp.float32(scale)), batch)
        assert np.isfinite(metrics["grad_norm"]) and metrics["log2_scale"] > scale
        moved.append(jax.tree.map(np.subtract, *jax.device_get((after.params, params))))
    assert {leaf.ndim for leaf in jax.tree.leaves(params)} == {1, 2, 3, 4}
    # Some are next to nothing, as that of a bias that a norm takes away again: rounding is all that is left of them.
    rounding = 1e-3 * np.sqrt(sum(np.square(change).sum() for change in jax.tree.leaves(moved[0])))
    for path, low in jax.tree_util.tree_leaves_with_path(moved[0]):
        high = functools.reduce(lambda tree, k: tree[k.key], path, moved[1])
        assert np.abs(low).max() > 0, path
        assert np.linalg.norm(low - high) < 0.05 * np.linalg.norm(low) + rounding, path
    assert np.abs(moved[0]["classes"]["embedding"][3]).max() > 0


@pytest.mark.slow
def test_super_resolution_samples_with_a_learned_variance():
    config = unet(process__variance="learned_sigmoid", process__vlb_weight=1.0, condition__size=(4, 4))
    run, params, low = resolved(config), random_params(config), uint8_images(4)[:, ::2, ::2]
    index, y = np.arange(4), np.array([0, 1, 2, 0])
    sample = sampling.sample_fn(run).lower(params, index, y, low).compile()
    images = np.asarray(sample(params, index, y, low))
    assert images.shape == (4, 8, 8, 1) and images.dtype == np.uint8
    others = np.asarray(sample(params, index, y, np.concatenate([low[:2], 255 - low[2:]])))
    np.testing.assert_array_equal(others[:2], images[:2])
    assert (others[2:] != images[2:]).any((1, 2, 3)).all()

    with_conditioning = 5 * jax.random.normal(jax.random.key(0), (2, 8, 8, 2))
    given = with_conditioning, jnp.array([0.25, 1.0]), jnp.array([0, 1])
    out = compiled(run.model.apply, params, *given)(params, *given)
    assert out.pred.shape == out.v.shape == (2, 8, 8, 1)
    assert ((out.v > 0) & (out.v < 1)).all() and out.v.std() > 0.1


@pytest.mark.parametrize("condition", [None, (4, 4)])
def test_attention_goes_by_the_grid_of_patches(condition):
    """With super-resolution as without, and whatever the size in pixels."""

    def attends(resolution):
        run = resolved(unet(model__attention_resolutions=(resolution,), condition__size=condition))
        return "input_1_attention" in jax.eval_shape(lambda: parts.init_params(run))

    assert attends(4) and not attends(8)


def test_an_output_folder_is_made_first(tmp_path):
    assert command.output_folder(tmp_path / "samples", "samples.npz", None, False).is_dir()
    assert command.output_folder(tmp_path, "samples.npz", str(tmp_path / "several" / "levels" / "down"), False).is_dir()


def test_likelihood_makes_its_folder_before_it_measures(tmp_path, monkeypatch):
    images = data.from_arrays(uint8_images(2), np.arange(2), SPEC.class_names)
    monkeypatch.setattr(inputs, "source", lambda *_: images)
    monkeypatch.setattr(vlb, "bits_per_dim", lambda *_, **__: pytest.fail("it measured"))
    (tmp_path / "file").write_text("in the way")
    config = vit()
    with pytest.raises(OSError, match="cannot write in"):
        likelihoods.measure(Trained(config, SPEC, random_params(config), 0), tmp_path / "file" / "below")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prediction", "clock"),
    [("x0", "1000 t"), ("eps", "index"), ("v", "1 - t"), ("flow", "index")],
)
def test_guidance_means_guided_noise_for_every_prediction_and_clock(prediction, clock):
    """eps = eps(null) + 3 (eps(y) - eps(null)), at times between the steps of the chain too."""
    xt, t, y = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([0.2, 0.5, 0.71]), jnp.array([0, 1, 2])
    config = vit(model__clock=clock, process__prediction=prediction)
    params, coef = random_params(config), coefficients(resolved(config).path, t)

    def answer(params, y, **options):
        config.sample = configs.Sample(**options)
        return Estimate(*decode(prediction, coef, xt, sampling.denoiser(resolved(config), params)(xt, t, y)))

    def answers(params):
        plain, null = answer(params, y), answer(params, jnp.full(3, 3))
        return plain, null, answer(params, y, guidance=3.0), answer(params, y, guidance=3.0, threshold=0.995)

    plain, null, guided, bounded = compiled(answers, params)(params)
    eps = null.eps + 3 * (plain.eps - null.eps)
    assert jnp.abs(plain.eps - null.eps).max() > 1e-3
    np.testing.assert_allclose(guided.eps, eps, atol=1e-4)
    alpha, sigma = coef.alpha.reshape(3, 1, 1, 1), coef.sigma.reshape(3, 1, 1, 1)
    np.testing.assert_allclose(guided.x0, (xt - sigma * eps) / alpha, atol=1e-3)
    assert jnp.abs(bounded.x0).max() < 1 + 1e-4


@pytest.mark.parametrize("room", ["diffusion", "experiments"])
def test_every_name_of_numpy_and_jax_that_is_used_exists(room):
    aliases = {"np": "numpy", "jnp": "jax.numpy", "jax": "jax"}
    missing = []
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = dotted(node)
            if len(names) > 1 and names[0] in aliases:
                try:
                    functools.reduce(getattr, names[1:], importlib.import_module(aliases[names[0]]))
                except AttributeError:
                    missing.append(f"{path.name}:{node.lineno} {'.'.join(names)}")
    assert not missing


def dotted(node):
    """["np", "linalg", "norm"] of that attribute, [] of anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (names := dotted(node.value)):
        return [*names, node.attr]
    return []


def imported(path):
    """(module, name that it is known by) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname or alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names)


@pytest.mark.slow
def test_every_import_is_used():
    idle = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}  # as in __all__
        idle += [f"{path.name}: {module}" for module, name in imported(path) if name not in used]
    assert not idle


@pytest.mark.slow
def test_more_than_ten_experts_train_on_the_times_that_they_sample_at():
    config = vit(process__snr_splits=tuple(2.0 ** np.arange(6, -6, -1)), process__steps=1000)
    for config.process.times, config.process.split in (("grid", 1), ("grid", 11), ("uniform", 12)):
        run = resolved(config)
        assert len(run.bounds) == 12
        for times in (run.times(jax.random.key(1), 500), sampling.expert_grid(run)[:-1]):
            np.testing.assert_array_equal(experts.expert_of(run.bounds, jnp.asarray(times)), config.process.split)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("splits", "split", "message"),
    [
        ((0.25, 1.0), 0, r"snr_splits=\(0.25, 1.0\) must fall"),
        ((1e9, 0.25), 0, "expert=0 has none of the 1000 times of the chain; its SNR range is empty"),
        ((1.0, 0.25), 3, r"--config.process.split=3: expert=3 must lie in 0\.\.2"),
        ((1.0, 0.25), -1, r"--config.process.split=-1"),
        ((1.0, 0.25), None, r"train one expert at a time"),
    ],
)
def test_experts_that_do_not_fit_are_refused(splits, split, message):
    config = vit(process__snr_splits=splits, process__split=split, process__steps=1000)
    config.process.betas = "linear"
    with pytest.raises(ValueError, match=message):
        preflight.check(config)


@pytest.mark.slow
def test_pure_noise_has_an_expert():
    """On a path that ends with an SNR of 0."""
    config = vit(process__snr_splits=(4.0, 0.25))
    config.process.path, config.process.betas, config.process.times = "cosine", "linear", "uniform"
    config.process.steps = configs.Process.steps
    config.sample = configs.Sample(steps=4)
    t = jnp.ones(2)
    assert Cosine()(t)[0].tolist() == [0, 0]
    xt, y = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.arange(2)
    run, params = resolved(config), tuple(random_params(config, seed=seed) for seed in range(3))

    def both(params):
        together = sampling.denoiser(run, params, members=[run] * 3)(xt, t, y)
        return together, sampling.denoiser(run, params[2])(xt, t, y)

    together, last = compiled(both, params)(params)
    np.testing.assert_array_equal(together, last)
    assert jnp.abs(last).max() > 1e-3


def documented():
    """Arguments of every `python -m experiments.train` in documents and docstrings, as a shell splits them."""
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *FILES):
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for typed in re.findall(r"python -m experiments\.train\b([^`\n]*)", text):
            # What two spaces set apart explains the command.
            yield tuple(shlex.split(typed.split("  ")[0], comments=True))


def test_documented_commands_give_fields_of_the_right_type():
    commands = sorted(set(documented()))
    assert len(commands) >= 8 and any("(" in argument for given in commands for argument in given)
    program = (
        "import json, sys; from absl import flags; from experiments import command_line, config, train\n"
        "for given in json.loads(sys.argv[1]):\n"
        "    for name in [n for n in flags.FLAGS if n.startswith('config')]: delattr(flags.FLAGS, name)\n"
        "    flags.FLAGS['split'].unparse()\n"
        "    command_line.define_config(argv := ['train', *given]); flags.FLAGS(argv)\n"
        "    print(json.dumps(config.to_dict(command_line.given_config())))"
    )
    command = [sys.executable, "-c", program, json.dumps(commands)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [configs.from_dict(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == len(commands)
    for config in found:
        check_tuples(config)


def check_tuples(config):
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, tuple):
            (inner,) = {get_args(option)[0] for option in (hint, *get_args(hint)) if get_args(option)[1:] == (...,)}
            assert all(isinstance(v, (int, float) if inner is float else inner) for v in value), (name, value)
        elif dataclasses.is_dataclass(value):
            check_tuples(value)


def test_no_process_waits_for_another_to_continue(tmp_path, monkeypatch):
    """All read the checkpoint alike: whatever one process waits for, every other one waits for too."""
    state = train.init_state({"w": jnp.arange(3.0)}, optax.sgd(1.0))
    checkpoint.save(tmp_path, 1, state)
    messages = [[], []]
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    for process, mine in enumerate(messages):
        monkeypatch.setattr(jax, "process_index", lambda *_, process=process: process)
        for name in ("sync_global_devices", "broadcast_one_to_all", "process_allgather", "assert_equal"):
            monkeypatch.setattr(multihost_utils, name, lambda *_, name=name, mine=mine, **__: mine.append(name))
        found, step = checkpoint.restore(tmp_path, state)
        checkpoint.restore_ema(tmp_path)
        assert step == 1
        np.testing.assert_array_equal(found.params["w"], [0, 1, 2])
    assert messages[0] == messages[1]


@pytest.mark.slow
def test_likelihood_is_that_of_the_images_as_they_are_and_asks_every_expert(tmp_path, monkeypatch):
    images = data.from_arrays(uint8_images(3), np.arange(3), SPEC.class_names)
    monkeypatch.setattr(inputs, "source", lambda *_: images)

    def terms(name, params, **options):
        config = vit(data__flip=not options, data__shift=0 if options else 2, process__snr_splits=(0.5,))
        members = {name: (config,) * n for name, n in options.items()}
        values = likelihoods.measure(Trained(config, SPEC, params, 0, **members), tmp_path / name)
        with np.load(tmp_path / name / "likelihood.npz") as stored:
            np.testing.assert_allclose(values["bits_per_dim"], stored["total"].mean(), rtol=1e-6)
            return config, stored["terms"]

    params = [random_params(vit(), seed=seed) for seed in range(2)]
    config, clean = terms("clean", params[0])
    _, noisy = terms("noisy", params[1])
    _, together = terms("together", tuple(params), members=2)
    run = resolved(config)
    owner = np.asarray(experts.expert_of(run.bounds, jnp.asarray(run.chain[:-1])))
    assert set(owner.tolist()) == {0, 1} and (np.abs(clean - noisy) > 1e-3).any(1).all()
    np.testing.assert_allclose(together, np.where(owner[:, None] == 0, clean, noisy), rtol=1e-5)


def test_the_documented_ends_of_a_learned_variance_are_its_ends():
    """v = 1 is the small one, v = 0 the large one, as equation (4) of `posterior` says in words that this reads."""
    assert "log var = v log small + (1 - v) log large,  v in [0, 1]" in posterior.__doc__
    config, t, s = unet(), jnp.array([0.75]), jnp.array([0.5])
    path, xt = resolved(config).path, jnp.ones((1, 1))
    step = posterior.between(path, t, s)
    for v, expected in ((1.0, step.small), (0.0, step.large)):
        estimate = Estimate(xt, xt, jnp.full_like(xt, v))
        found = posterior.reverse("learned_sigmoid", path, estimate, xt, t, s).log_var
        np.testing.assert_allclose(jnp.exp(found[0]), expected, rtol=1e-5)
    assert step.small < step.large


def test_installation_names_everything_that_is_imported(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in FILES}
    assert folders == set(given["packages"])

    def normal(requirement):
        return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")

    extras = {name: {normal(each) for each in needed} for name, needed in given["extras_require"].items()}
    library = {normal(requirement) for requirement in given["install_requires"]}
    library |= extras["numba"] | extras["data"] | extras["io"]
    assert extras["numba"] | extras["data"] | extras["io"] <= extras["experiments"] <= extras["test"]
    library |= extras["parquet"]  # imported if such a data set is asked for
    for guest, host in {
        "llvmlite": "numba",
        "ml-dtypes": "jax",
        "scipy": "jax",
    }.items():  # each in the version that its host asks for
        library |= {guest} & {normal(needed) for needed in importlib.metadata.requires(host)}
    trackers = extras["tensorboard"] | extras["wandb"] | extras["trackio"]  # imported if asked for
    commands = library | extras["experiments"] | trackers
    sources = importlib.metadata.packages_distributions()
    for path in FILES:
        if "bench" in path.parts:  # where rivals that are not there are left out
            continue
        for module, _ in imported(path):
            root = module.split(".")[0]
            if root in sys.stdlib_module_names or root in ("diffusion", "experiments"):
                continue
            offered = {normal(name) for name in sources.get(root, [root])}
            always = library if path.is_relative_to(ROOT / "diffusion") else commands
            assert offered & always, f"{path.name} imports {root}, of {sorted(offered)}, which setup.py does not name"
