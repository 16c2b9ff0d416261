"""experiments.advise: the advice for images whose detail is known, beside a trained network, and its messages."""

import json
import shlex
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from PIL import Image

from diffusion import data, process
from experiments import advise, advise_report, inputs
from experiments import config as configs
from experiments.configs import mnist, patch_unet_mnist
from experiments.parts import DataSpec, resolve
from experiments.run_dir import trained
from tests.experiments.runs import own_flags

SPEC = DataSpec((8, 8, 1))
QUICK = advise.Options(snr=(64.0, 1.0, 1 / 16), count=30, batch_size=16, block_size=64)


def images(limit, n=150):
    """Training and held-out images of 8x8, 16 bits, with frequencies below `limit` of 8 alone."""
    c = np.zeros((n, 8, 8, 1))
    c[:, :limit, :limit] = np.random.default_rng(limit).normal(0, 1, (n, limit, limit, 1))
    x = np.clip(scipy.fft.idctn(c, axes=(1, 2), norm="ortho") * 2 / limit, -1, 1)  # standard deviation 1/4
    x = np.round((x + 1) * 30_000).astype(np.uint16)
    return [data.from_arrays(part, value_range=(0, 60_000)) for part in (x[:-30], x[-30:])]


@pytest.fixture(scope="module")
def coarse():
    return advise.measure(*images(2), process.Linear(), QUICK)


@pytest.mark.slow
def test_patches_are_as_large_as_the_finest_detail_allows(coarse):
    """Frequencies below 2 of 8 fit on a 2x2 grid, patches of 4; those below 8 need every pixel at little noise."""
    found, _ = coarse
    assert found["patch_sizes"] == [1, 2, 4] and found["conditional"] is False
    assert all(row["held_out"]["lost"][of]["4"] < 1e-3 for row in found["levels"] for of in advise.OF)
    assert found["advice"]["1"]["patch_sizes"] == [4] and found["advice"]["2"]["snr_splits"] == []
    fine, _ = advise.measure(*images(8), process.Linear(), QUICK)
    least = fine["levels"][0]["held_out"]["lost"]["image"]
    assert least["4"] > least["2"] > 0.3 and fine["advice"]["1"]["patch_sizes"] == [1]


def test_what_is_found_at_each_level_is_consistent(coarse):
    found, shown = coarse
    for row in found["levels"]:
        for kind in ("held_out", "finite"):
            numbers = row[kind]
            recovered, energy = np.array(numbers["recoverable"]), np.array(numbers["energy"])
            assert (recovered <= energy * (1 + 1e-9)).all()
            error = (energy - recovered).sum() / 64
            assert numbers["error"]["combined"] == pytest.approx(error, abs=1e-9)
            assert numbers["error"]["combined"] <= numbers["error"]["ideal"] * (1 + 1e-6)
    known = [advise_report.known(row["held_out"]) for row in found["levels"]]
    assert known == sorted(known, reverse=True) and known[0] > 0.8
    assert sum(row["times"] for row in found["levels"]) == pytest.approx(1)
    assert shown["truth"].shape == (8, 8, 1) and len(shown["ideal"]) == 3
    # A noised training image is recovered from little noise, and a held-out one is not: the mean is another image.
    assert found["levels"][0]["finite"]["error"]["ideal"] < 0.1 * found["levels"][0]["held_out"]["error"]["ideal"]


def test_the_error_of_the_ideal_denoiser_is_that_on_pixels(coarse):
    """The transform is orthonormal, and the mean image cancels."""
    found, _ = coarse
    train, held_out = images(2)
    to_float = lambda x: jnp.asarray(x / 30_000 - 1, jnp.float32)  # noqa: E731
    row = found["levels"][1]
    assert row["finite"]["entropy"] >= 0 and row["snr"] == 1
    x = to_float(train.images)
    mean = x.mean(0)
    energy = np.square(np.asarray(to_float(held_out.images) - mean[None])).sum((1, 2, 3)).mean()
    assert np.sum(row["held_out"]["energy"]) == pytest.approx(float(energy), rel=1e-4)


def level(snr, times, recoverable):
    return {"snr": snr, "times": times, "held_out": {"recoverable": recoverable, "energy": [1.0, 1.0, 1.0, 1.0]}}


def test_thresholds_lie_where_they_save_most():
    """Of four levels the two noisy ones have coarse detail alone; the threshold is between the second and the third."""
    rows = [level(100, 0.25, [1, 1, 1, 1]), level(4, 0.25, [1, 1, 0.5, 0.5]), level(0.25, 0.25, [1, 0, 0, 0]),
            level(0.01, 0.25, [0.1, 0, 0, 0])]  # fmt: skip
    one, two, three = (advise.suggest(rows, [1, 2, 4], QUICK, n) for n in (1, 2, 3))
    assert one["patch_sizes"] == [1] and one["snr_splits"] == [] and one["cost"] == 1
    assert two["patch_sizes"] == [1, 4] and two["snr_splits"] == [1.0]
    assert two["cost"] == pytest.approx(0.5 + 0.5 / 16) and two["times"] == pytest.approx([0.5, 0.5])
    assert three == two, "a third expert saves nothing"


def test_what_can_hardly_be_recovered_counts_as_a_share_of_the_image_or_of_itself():
    rows = [level(1, 0.5, [0.02, 0.02, 0.02, 0.02]), level(0.1, 0.5, [0.01, 0, 0, 0])]
    image = advise.suggest(rows, [1, 2], QUICK, 1)
    itself = advise.suggest(rows, [1, 2], QUICK._replace(of="recoverable"), 1)
    assert image["patch_sizes"] == [2] and image["lost"] == pytest.approx([0.005])
    assert itself["patch_sizes"] == [1]


def test_shares_of_times_are_those_of_the_path():
    shares = advise.time_shares(process.Linear(), (9.0, 1 / 9))
    assert shares == pytest.approx([0.5, 0.5], abs=1e-6)
    shares = advise.time_shares(process.Linear(), (81.0, 1.0, 1 / 81))  # middles at SNR 9 and 1/9: t = 1/4 and 3/4
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=1e-6)


def test_the_text_has_a_row_for_each_level_and_flags_that_training_takes(coarse):
    train = data.from_arrays(np.zeros((4, 8, 8, 1), np.uint8))
    config = advise.to_train(train, configs.Data(name="folder:my pets", size=(8, 8), crop="resize", labels=False))
    found = {"data": "folder:pets", "path": None, "workdir": None, "training": advise.advised(config), **coarse[0]}
    text = advise_report.text(found)
    assert sum(line.startswith(("64 ", "1 ", "0.0625 ")) for line in text.splitlines()) == 3
    typed = ["--config=experiments/configs/patch_unet_mnist.py", "--config.data.name=folder:my pets",
             "--config.data.size=(8, 8)", "--config.data.crop=resize", "--noconfig.data.labels"]  # fmt: skip
    assert shlex.join(["python", "-m", "experiments.train", *typed, "--config.model.patch_size=4"]) in text
    two = {"snr_splits": [0.5], "patch_sizes": [2, 4], "lost": [0.01, 0.0], "times": [0.5, 0.5], "cost": 0.1}
    words = advise_report.advice({**found, "advice": {"2": two}}, 2)
    for i, p in enumerate((2, 4)):
        assert f"patch_size={p} '--config.process.snr_splits=(0.5,)' --config.process.split={i}" in words
    assert "of the path linear, not of the trainings below" in advise_report.text({**found, "path": "linear"})


def test_the_training_beside_a_run_is_that_run_with_other_patches(coarse):
    config = mnist.get_config()
    config.process.snr_splits, config.process.split, config.train.steps = (0.5,), 1, 99
    argv = advise.advised(config)
    file = "--config=experiments/configs/mnist.py"
    assert argv["one"] == [file, "--config.model.stride=None", "--config.train.steps=99"]
    assert {"--config.process.times=uniform", "--config.process.times_mean=0.0"} <= set(argv["experts"])
    assert not any("times" in argument for argument in advise.advised(patch_unet_mnist.get_config())["experts"])
    two = {"snr_splits": [0.5], "patch_sizes": [2, 4], "lost": [0.01, 0.0], "times": [0.5, 0.5], "cost": 0.1}
    found = {**coarse[0], "training": argv, "workdir": "runs/a", "advice": {"2": two}}
    words = advise_report.advice(found, 2)
    assert "--workdir=runs/a_patch2_split0" in words and "--workdir=runs/a_patch4_split1" in words


def test_arrays_of_other_types_are_trained_without_the_bits_of_uint8():
    train = data.from_arrays(np.zeros((4, 8, 8, 1), np.uint16), value_range=(0, 60_000))
    fields = configs.Data(name="array:x.npy", channels=1, range=(0.0, 60_000.0))
    config = advise.to_train(train, fields)
    own = resolve(config, inputs.data_spec(config, train)).path, resolve(patch_unet_mnist.get_config(), SPEC).path
    np.testing.assert_array_equal(*(path.betas for path in own))
    assert {"--config.process.vlb_weight=0.0", "--config.data.range=(0.0, 60000.0)"} <= set(
        advise.advised(config)["one"]
    )


def test_the_figure_has_a_column_for_each_level(coarse):
    figure = advise_report.figure(*coarse)
    assert len(figure.axes) == 3 * 4 + 3  # noised, ideal and best estimate; three charts
    assert [axis.get_title() for axis in figure.axes[:4]] == ["image", "SNR 64", "SNR 1", "SNR 0.0625"]


@pytest.mark.slow
def test_a_trained_network_is_compared_at_the_times_of_its_own_path(run, quick):
    from experiments import inputs

    found = trained([run.workdir])
    network = advise.of_run(found)
    splits = [inputs.source(found.config, split) for split in ("train", "test")]
    numbers, shown = advise.measure(*splits, network.path, QUICK._replace(snr=(4.0, 0.25)), network)
    row = numbers["levels"][0]["held_out"]
    assert numbers["network"] and numbers["conditional"] and len(shown["network"]) == 2
    # After 8 steps it is a bad denoiser; what can be recovered does not suffer from it.
    assert row["error"]["network"] > row["error"]["combined"] > 0
    assert np.sum(row["recoverable_network"]) <= np.sum(row["recoverable"]) * (1 + 1e-9)
    assert "network" not in numbers["levels"][0]["finite"]["error"]


@pytest.mark.parametrize("given", [["1", "x"], ["1"], ["4", "0"], ["4", "inf"], ["2", "2"]])
def test_levels_are_two_or_more_positive_numbers(given):
    with pytest.raises(ValueError, match=f"--snr={','.join(given)} must be two or more positive numbers"):
        advise.levels(given)
    assert advise.levels(["0.25", "4", "1"]) == (4, 1, 0.25)


@pytest.mark.slow
def test_the_command_writes_its_advice(tmp_path, mnist5k_root):
    command = [sys.executable, "-m", "experiments.advise", f"--data_dir={mnist5k_root}", f"--outdir={tmp_path / 'a'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "--data is missing: pass a data set" in done.stderr
    some = ["--data=mnist5k", "--snr=4,0.1", "--count=20", "--most=200", "--nolabels"]
    done = subprocess.run([*command, *some], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20 held-out images of 28x28, noised; posterior over 200 training images." in done.stdout
    found = json.loads((tmp_path / "a" / "advice.json").read_text())
    assert f"--config=experiments/configs/patch_unet_mnist.py --config.data.data_dir={mnist5k_root} " in done.stdout
    assert found["patch_sizes"] == [1, 2, 4, 7, 14] and [row["snr"] for row in found["levels"]] == [4, 0.1]
    with Image.open(tmp_path / "a" / "advice.png") as image:
        assert image.width > 400
    done = subprocess.run([*command, *some], capture_output=True, text=True)
    assert done.returncode == 1 and "advice.json already; pass --overwrite or another --outdir" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--data=mnist5k", "--data=mnist5k has no effect beside --workdir"),
        ("--size=8,8", "--size=8,8 has no effect beside --workdir"),
        ("--range=0,1", "--range=0,1 has no effect"),
        ("--path=linear", "--path=linear has no effect"),
        ("--nolabels", "--labels=False has no effect"),
    ],
)
def test_what_a_run_says_itself_is_no_flag(tmp_path, monkeypatch, given, message):
    own = own_flags(monkeypatch, tmp_path, advise, advise.data)
    with pytest.raises(ValueError, match=message):
        advise.main(own(["advise", given]))


def test_images_without_patches_and_splits_of_other_shapes_are_refused():
    train, held_out = images(2)
    odd = data.from_arrays(np.zeros((4, 7, 7, 1), np.uint8))
    with pytest.raises(ValueError, match=r"no patch size divides images of \(7, 7\): pass another --size"):
        advise.measure(odd, odd, process.Linear(), QUICK)
    with pytest.raises(ValueError, match=r"training images have the shape \(8, 8, 1\), held-out ones \(7, 7, 1\)"):
        advise.measure(train, odd, process.Linear(), QUICK)
