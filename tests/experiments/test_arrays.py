"""Runs on arrays other than uint8 images: volumes, sequences, many channels, 16 bits and floats, from end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.data.values import PLAIN
from diffusion.metrics.features import Extracted, Named
from diffusion.models.unet import UNet
from diffusion.models.vit import ViT
from experiments import config as configs
from experiments import (
    display,
    evaluate,
    image_files,
    inputs,
    likelihood,
    page,
    parts,
    preflight,
    report,
    sampling,
    signals,
)
from experiments.parts import DataSpec
from experiments.run_dir import RunDir, Trained
from tests.experiments.runs import (
    assert_same_state,
    call,
    files,
    killed_at,
    rows,
    samples,
    state,
    trained,
)


def config_of(path, **fields):
    """Three steps of a network with patches of 8."""
    config = configs.Config(model=ViT(patch_size=8, width=24, depth=1, heads=2, positions=("learned", "rotary")))
    config.data = configs.Data(name=f"array:{path}", **fields)
    config.train = configs.Train(
        steps=3, batch_size=4, warmup=0, learning_rate=1e-2, log_every=1, sample_every=2, save_every=9
    )
    config.sample = configs.Sample(count=5, steps=2, batch_size=5)
    return config


@pytest.fixture(scope="module")
def volumes(shared_folder):
    """Volumes of 16^3 from -2 to 6, of two classes: balls of two sizes."""
    path = shared_folder / "volumes.npz"
    x = np.stack(np.meshgrid(*[np.linspace(-1, 1, 16)] * 3, indexing="ij"))
    far = np.sqrt((x**2).sum(0))
    labels = np.arange(40) % 2
    # Each ball has a value of its own, so that no two volumes are equal.
    value = np.linspace(4, 6, 40)[:, None, None, None]
    images = np.where(far < 0.4 + 0.4 * labels[:, None, None, None], value, -2)
    np.savez(path, images=images[..., None].astype(np.float32), labels=labels, class_names=["small", "large"])
    return config_of(path, range=(-2.0, 6.0))


@pytest.fixture(scope="module")
def volume_run(quick, volumes, shared_folder):
    return trained(volumes, shared_folder / "volumes" / "digits")  # the name of the run that is also drawn


@pytest.fixture(scope="module")
def series_run(quick, shared_folder):
    """Sequences [32, 2] of uint16 around 40,000: less than one step of 8 bits apart."""
    path = shared_folder / "series.npy"
    np.save(path, np.random.default_rng(0).integers(40_000, 40_100, (30, 32, 2)).astype(np.uint16))
    config = config_of(path, range=(0, 65535))
    config.train.steps, config.train.sample_every = 1, 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "write", lambda folder: None)  # takes two seconds
        return trained(config, shared_folder / "series")


# Volumes


def test_a_volume_is_trained_and_sampled_in_its_own_type_and_range(volume_run):
    images, labels = samples(volume_run.workdir)
    assert (images.dtype, images.shape) == (np.float32, (5, 16, 16, 16, 1))
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert -2 <= images.min() < images.max() <= 6 and len(np.unique(images)) > 256
    assert RunDir(volume_run.workdir).stored()[1] == DataSpec(
        (16, 16, 16, 1), ("small", "large"), "float32", (-2.0, 6.0)
    )
    assert "8 tokens, on " in volume_run.printed and " volumes 16x16x16x1 of array:" in volume_run.printed
    assert "float32 from -2 to 6" in volume_run.printed
    assert "images show the middle slice of each volume" in volume_run.printed


@pytest.mark.slow
def test_images_of_a_volume_are_its_middle_slices(volume_run):
    images, _ = samples(volume_run.workdir)
    with Image.open(volume_run.workdir / "samples.png") as image:
        middle = np.rint((images[:, 8] + 2) / 8 * 255).astype(np.uint8)
        np.testing.assert_array_equal(image, image_files.grid(middle, 2))
    names = {p.name for p in volume_run.workdir.iterdir()}
    assert {"trajectory.png", "nearest.png", "previews", "report.html"} <= names and "seams.png" not in names
    assert "Images show the middle slice of each volume." in page.page(RunDir(volume_run.workdir))


def test_volumes_are_compared_by_their_values_and_the_reason_is_given(volume_run, capsys):
    reason = "there are features for images with 1 or 3 channels, and none for arrays of shape (16, 16, 16, 1)"
    found = volume_run.report
    assert found["unmeasured"] == reason
    assert f"Not compared in features: {reason}." in volume_run.printed
    assert found["patch_distance"] > 2 * found["patch_reference"] > 0 and found["nearest_ratio"] > 0
    printed = call(volume_run.workdir, command=evaluate)
    assert reason in capsys.readouterr().err and f"{found['patch_distance']:.3f}" in printed
    with pytest.raises(ValueError, match="there are features for images with 1 or 3 channels, and none for arrays"):
        call(volume_run.workdir, "--reference=folder:.", command=evaluate)


@pytest.mark.slow
def test_a_volume_that_was_stopped_goes_on_bit_for_bit(volume_run, volumes, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(patch, 1)
        with pytest.raises(signals.Stopped, match="Stopped at step 2 of 3"):
            trained(volumes, tmp_path)
    trained(volumes, tmp_path)
    assert_same_state(state(volumes, tmp_path, 3), state(volumes, volume_run.workdir, 3))
    assert rows(tmp_path) == rows(volume_run.workdir)
    np.testing.assert_array_equal(samples(tmp_path)[0], samples(volume_run.workdir)[0])


@pytest.mark.slow
def test_volumes_are_sampled_by_the_command(volume_run, tmp_path):
    printed = call(
        volume_run.workdir, f"--outdir={tmp_path}", "--num_samples=5", "--trajectory", "--labels=small,large"
    )
    assert "samples.npz, samples.png, trajectory.gif, trajectory.png" in printed
    again, _ = samples(tmp_path)
    np.testing.assert_array_equal(again, samples(volume_run.workdir)[0])
    with Image.open(tmp_path / "trajectory.gif") as film:
        assert film.n_frames == 3


# Sequences, and 16 bits


@pytest.mark.slow
def test_a_sequence_is_trained_with_all_16_bits(series_run):
    images, labels = samples(series_run.workdir)
    assert (images.dtype, images.shape, labels) == (np.uint16, (5, 32, 2), None)
    assert (images % 257).any(), "only values that 8 bits can have"
    assert "sequences of 32, 2 channels, uint16 from 0 to 65535" in series_run.printed
    assert "curves of all 2 channels (red, green)" in series_run.printed
    spec = RunDir(series_run.workdir).stored()[1]
    run = parts.resolve(series_run.config, spec)
    batch = inputs.batch(series_run.config, inputs.source(series_run.config), 0)["x"]
    x0 = np.asarray(jax.jit(lambda x: parts.to_float(run, x))(batch))
    np.testing.assert_allclose(x0, batch / 32767.5 - 1, atol=2e-7)
    assert len(np.unique(x0)) > 50
    np.testing.assert_array_equal(jax.jit(lambda x: parts.to_data(run, x))(x0), batch)


@pytest.mark.slow
def test_nothing_is_drawn_that_has_no_meaning_for_a_sequence(series_run):
    with Image.open(series_run.workdir / "samples.png") as image:
        curves = display.as_images(samples(series_run.workdir)[0], (0.0, 65535.0))
        np.testing.assert_array_equal(image, image_files.grid(curves, 5))
    assert report.patches(series_run.config, RunDir(series_run.workdir).stored()[1]) is None


# Types and ranges


@pytest.mark.parametrize(
    ("dtype", "value_range"),
    [
        ("uint8", (0, 1)),
        ("int16", (-1000, 1000)),
        ("uint16", (0, 65535)),
        ("int64", (-(1 << 20), 1 << 20)),
        ("float16", (0, 1)),
        ("float32", (-0.1, 0.1)),
        ("float64", (-0.1, 0.1)),
    ],
)
def test_every_type_survives_the_network_and_its_range_becomes_that_of_the_network(
    dtype, value_range, tmp_path, monkeypatch
):
    rng = np.random.default_rng(0)
    x = rng.uniform(*value_range, (40, 2, 2, 1))
    x.ravel()[:2] = value_range
    x = (np.rint(x) if np.dtype(dtype).kind in "ui" else x).astype(dtype)
    spec = DataSpec((2, 2, 1), (), dtype, tuple(map(float, value_range)))
    config = config_of("made", range=value_range)
    config.data.low, config.data.high, config.model.patch_size = -0.5, 2.0, 2
    run = parts.resolve(config, spec)
    assert not spec.plain
    x0 = parts.to_float(run, jnp.asarray(x))
    assert x0.dtype == jnp.float32
    np.testing.assert_allclose(x0.ravel()[:2], [-0.5, 2.0], rtol=1e-6)
    made = np.asarray(parts.to_data(run, x0))
    back = report.of_type(made, spec)
    assert back.dtype == dtype
    assert back.min() >= spec.value_range[0] or dtype in ("float16", "float32")
    if np.dtype(dtype).kind in "ui":
        np.testing.assert_array_equal(back, x)
    else:
        np.testing.assert_allclose(back, x, rtol=0, atol=1e-7 if dtype != "float16" else 1e-3)
    beyond = report.of_type(np.asarray(parts.to_data(run, jnp.full((1, 2, 2, 1), 9.0))), spec)
    np.testing.assert_array_equal(beyond, np.full((1, 2, 2, 1), value_range[1], dtype))
    report.save(tmp_path / "samples.npz", tmp_path / "samples.png", made, np.zeros(40, int), spec)
    assert samples(tmp_path)[0].dtype == dtype
    if dtype == "float64":  # which JAX does not have here
        monkeypatch.setattr(inputs, "source", lambda *_: None)
        preflight.check_shapes(config, run)
        params, one = jax.eval_shape(lambda: parts.init_params(run)), jax.ShapeDtypeStruct((1,), np.int32)
        assert jax.eval_shape(sampling.sample_fn(run), params, one, one).dtype == np.float32


def test_uint8_images_are_computed_as_before():
    """0 .. 255 stated is 0 .. 255 not stated, and neither is the arithmetic of other types."""
    assert DataSpec((2, 2, 1)) == DataSpec((2, 2, 1), (), "uint8", PLAIN) and DataSpec((2, 2, 1)).plain
    config = config_of("made")
    config.model.patch_size = 2
    run = parts.resolve(config, DataSpec((2, 2, 1)))
    x = np.arange(256, dtype=np.uint8).reshape(64, 2, 2, 1)
    programs = {
        str(jax.make_jaxpr(f)(x))
        for f in (lambda x: parts.to_float(run, x), lambda x: -1.0 + 2.0 * (x.astype(jnp.float32) / 255))
    }
    assert len(programs) == 1
    assert parts.to_data(run, parts.to_float(run, x)).dtype == jnp.uint8


def test_features_of_images_of_other_types_are_those_of_uint8(tmp_path, monkeypatch):
    images = np.random.default_rng(0).uniform(0, 1, (60, 6, 6, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", images)
    config, seen = config_of(tmp_path / "a.npy", range=(0.0, 1.0)), []

    def features(x):
        seen.append(x)
        return Extracted(x.reshape(len(x), -1)[:, :4].astype(np.float32), None, None)

    spec = inputs.data_spec(config, inputs.source(config))
    values = report.quality(config, evaluate.measurable(images[:20], spec), None, Named("some", features))
    assert values["measured"] == 20 and all(x.dtype == np.uint8 for x in seen)
    assert sum(map(len, seen)) == 80
    np.testing.assert_array_equal(seen[0], np.rint(images[:20] * 255).astype(np.uint8))
    close = 0.5 + images / 1000  # one value in 8 bits
    np.save(tmp_path / "a.npy", close)
    values = report.quality(config, close[:20], None, None)
    assert values["patch_distance"] > 0 and values["nearest_ratio"] < 0.5
    with pytest.raises(TypeError, match="it holds float64, but the run was trained on float32"):
        evaluate.measurable(images.astype(float), spec)


def test_samples_are_compared_with_arrays_of_another_file(tmp_path):
    images = np.random.default_rng(0).integers(0, 1000, (40, 6, 6, 3)).astype(np.uint16)
    np.savez(tmp_path / "a.npz", images=images)
    name, config = f"array:{tmp_path / 'a.npz'}", config_of("made", range=(0, 1000))

    def features(x):
        assert x.dtype == np.uint8
        return Extracted(x.reshape(len(x), -1)[:, :4].astype(np.float32), None, None)

    shown = display.eight_bit(images[:10], (0, 1000))
    values = evaluate.against_reference(config, shown, name, Named("some", features))
    assert values["measured"] == 10 and values["distance"] >= 0
    with pytest.raises(ValueError, match=r"has arrays of shape \(6, 6, 3\), and the samples \(6, 5, 3\)"):
        evaluate.against_reference(config, shown[:, :, :5], name, Named("some", features))
    with pytest.raises(
        ValueError, match="holds other values than uint8, of a range that a run states: pass its --work"
    ):
        evaluate.against_reference(configs.Config(), shown, name, Named("some", features))


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"range": None},
            r'are float32, of unknown range: .* smallest is -2\.0 and the largest 6\.0.*range="\(-2\.0, 6\.0\)"',
        ),
        ({"range": (0.0, 1.0)}, r"values from -2\.0 to 6\.0, outside the stated range 0 to 1"),
        ({"range": (1.0, 0.0)}, r'--config\.data\.range="\(1\.0, 0\.0\)" must be the smallest and the largest value'),
        ({"range": (1.0,)}, r'as in --config\.data\.range="\(0\.0, 1\.0\)"'),
        ({"held_out": "validation"}, r"split='validation' of array:.* is not one of \('train', 'test', 'all'\)"),
        ({"flip": True}, r"--config\.data\.flip, data\.shift: flip=True and shift=0 .* not volumes of shape"),
        ({"size": (16, 16)}, r"--config\.data\.size=\(16, 16\): the arrays of array:"),
        ({"channels": 3}, r"--config\.data\.channels=3, but the arrays of .* have 1 channels"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(quick, volumes, tmp_path, fields, message):
    config = configs.from_dict(configs.to_dict(volumes))
    for name, value in fields.items():
        setattr(config.data, name, value)
    with pytest.raises(ValueError, match=message):
        trained(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_some_parts_of_a_run_are_for_images_alone():
    volume = DataSpec((16, 16, 16, 1), (), "float32", (0.0, 1.0))
    config = config_of("made")
    config.condition.size = (8, 8)
    with pytest.raises(
        ValueError, match=r"condition\.size=\(8, 8\): super-resolution is of images .* \(16, 16, 16, 1\)"
    ):
        parts.resolve(config, volume)
    config.condition.size, config.model = None, UNet(patch_size=4, num_channels=8, channel_mult=(1.0,), num_heads=2)
    with pytest.raises(ValueError, match=r"the U-Net works on images \[B, H, W, C\]"):
        preflight.check_shapes(config, parts.resolve(config, volume))


def test_bits_per_dimension_are_those_of_uint8(tmp_path):
    config = config_of("made")
    config.process = configs.Process(
        path="vp", prediction="eps", loss_in=None, times="grid", vlb_weight=1.0, steps=20, variance="learned_range"
    )
    with pytest.raises(ValueError, match=r"vlb_weight=1\.0 counts the bits of uint8 in 0 \.\. 255, not of float32"):
        parts.resolve(config, DataSpec((8, 8, 1), (), "float32", (0.0, 1.0)))
    parts.resolve(config, DataSpec((8, 8, 1)))
    config.process.vlb_weight, config.process.variance = 0.0, "fixed_small"
    run = Trained(config, DataSpec((8, 8, 1), (), "float32", (0.0, 1.0)), {}, 0)
    with pytest.raises(ValueError, match=r"likelihoods count the bits of uint8 in 0 \.\. 255, and the run has float32"):
        likelihood.measure(run, tmp_path)


def test_a_run_from_before_there_were_other_types_is_one_of_uint8(volume_run, tmp_path):
    folder = RunDir(tmp_path)
    config = configs.Config()
    folder.open(config, DataSpec((28, 28, 1), ("a", "b")))
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["data"]["range"], stored["data_spec"]["dtype"], stored["data_spec"]["value_range"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert folder.stored() == (config, DataSpec((28, 28, 1), ("a", "b")))
    before = files(tmp_path)
    folder.open(config, DataSpec((28, 28, 1), ("a", "b")))
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match=r"data_spec\.dtype: \"uint8\" -> \"float32\""):
        folder.open(config, DataSpec((28, 28, 1), ("a", "b"), "float32"))


# Images to look at


def test_images_of_many_channels_show_three_or_one():
    x = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 13), np.uint8)
    np.testing.assert_array_equal(display.as_images(x), x[..., :3])
    np.testing.assert_array_equal(display.as_images(x[..., :2]), x[..., :1])
    assert display.note((5, 4, 13)) == "the first 3 of 13 channels"
    assert display.note((5, 4, 2)) == "the first 1 of 2 channels"
    assert display.note((9, 5, 4, 4)) == "the middle slice of each volume, the first 3 of 4 channels"
    assert display.note((5, 4, 3)) is None and display.note((5, 4, 1)) is None
    wide = x.astype(np.float64)
    wide[0, 0, 0, 0], wide[0, 0, 1, 0] = np.nan, 1e9
    shown = display.as_images(wide / 10, (0.0, 25.5))
    assert shown.dtype == np.uint8 and (shown[0, 0, 0, 0], shown[0, 0, 1, 0]) == (0, 255)
    np.testing.assert_array_equal(shown[1:], x[1:, ..., :3])


def test_curves_pass_through_their_values_without_gaps():
    x = np.array([[[0], [255], [128], [128]]], np.uint8)
    (drawn,) = display.as_images(x)[..., 0]
    assert drawn.shape == (64, 4)
    assert (drawn[:, 0] == 255).all()  # from the lowest row to the next value, in the highest
    assert np.flatnonzero(drawn[:, 1]).tolist() == [*range(0, 33)]
    assert np.flatnonzero(drawn[:, 3]).tolist() == [32]
    long = np.zeros((1, 5000, 2), np.uint8)
    long[0, 2505, 0] = 255
    shown = display.as_images(long)
    assert shown.shape == (1, 64, display.WIDEST, 3) and (shown[0, 0, :, 0] == 255).sum() == 1
    assert (shown[0, 63, :, 1] == 255).all() and not shown[..., 2].any()


def test_a_source_is_shown_as_uint8_when_it_is_read():
    images = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 3, 2, 1)
    source = data.from_arrays(images, value_range=(-1, 1))
    shown = display.converted(source, display.eight_bit)
    np.testing.assert_array_equal(shown.images[[2, 0]], np.rint((images[[2, 0]] + 1) * 127.5).astype(np.uint8))
    assert (shown.dtype, shown.value_range, len(shown.images)) == (np.uint8, PLAIN, 4)
    plain = data.from_arrays(np.zeros((2, 2, 2, 1), np.uint8))
    assert display.converted(plain, display.eight_bit) is plain
    exact = display.converted(source, display.scaled).images[[2, 0]]
    np.testing.assert_allclose(exact, (images[[2, 0]] + 1) * 127.5, rtol=1e-6)
