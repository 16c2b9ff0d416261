"""report.html: that it stands alone, says what was measured, and can be made of whatever a run has."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from experiments import charts, page
from experiments.run_dir import RunDir
from tests.experiments.runs import tiny

NAMESPACE = "{http://www.w3.org/1999/xhtml}"


def parsed(folder):
    """The page that was written, as XML: tags that are not closed or values that are not escaped end here."""
    root = ElementTree.fromstring(page.write(folder).read_text().removeprefix("<!DOCTYPE html>"))
    for each in root.iter():
        for name in ("src", "href"):
            assert each.get(name, "data:image/").startswith("data:image/"), "needs nothing but this file"
    for image in root.iter(f"{NAMESPACE}img"):
        assert len(image.get("alt")) > 10
    return root


@pytest.fixture(scope="module")
def whole(run):
    """The page of a finished run."""
    return parsed(RunDir(run.workdir))


def texts(root, tag):
    return ["".join(each.itertext()) for each in root.iter(f"{NAMESPACE}{tag}")]


def test_training_ends_with_a_page_that_has_every_part(run, whole):
    assert texts(whole, "h2") == [
        "Samples",
        "Metrics",
        "Nearest training images",
        "Seams",
        "Training",
        "Samples during training",
        "Config",
        "Commands",
    ]
    (viewport,) = (each for each in whole.iter(f"{NAMESPACE}meta") if each.get("name") == "viewport")
    assert "width=device-width" in viewport.get("content")
    # samples, film strip, classes, pairs, seams; loss, its quarters, gradient norm, images/s and error; previews
    assert len(list(whole.iter(f"{NAMESPACE}img"))) == 5 + 5 + len(list(RunDir(run.workdir).previews.iterdir()))


def test_the_table_has_the_numbers_of_the_report(run, whole):
    rows = {}
    for row in whole.find(f".//{NAMESPACE}table/{NAMESPACE}tbody"):
        name, value, real = row
        rows[name.text] = (value.text, "".join(each.text for each in value), real.text)
    found = run.report
    assert rows["Frechet distance"][0] == f"{found['distance']:.2f}"
    assert rows["Frechet distance"][1] == f"{found['distance_low']:.2f} to {found['distance_high']:.2f}"
    assert rows["Frechet distance"][2] == f"{found['reference']:.2f}"
    assert rows["Kernel distance"][2] == f"{found['kernel_reference']:.4f}"
    assert rows["Recall"][2] == f"{found['recall_reference']:.1%}"
    interval = f"{found['nearest_ratio_low']:.2f} to {found['nearest_ratio_high']:.2f}"
    assert rows["Nearest ratio"] == (f"{found['nearest_ratio']:.2f}", interval, None)
    assert len(rows) == 13


def test_names_that_look_like_html_are_shown_as_they_are(copy):
    odd = "<b>&\"'$x$"
    stored = json.loads((copy / "config.json").read_text())
    stored["name"], stored["data_spec"]["class_names"][0] = odd, odd
    (copy / "config.json").write_text(json.dumps(stored))
    root = parsed(RunDir(copy))
    assert texts(root, "h1") == [copy.name] and f"Config {odd}, data mnist5k." in texts(root, "p")[0]
    assert any(odd in image.get("alt") for image in root.iter(f"{NAMESPACE}img"))


def test_a_run_that_is_not_finished_has_a_page_of_what_there_is(copy):
    folder = RunDir(copy)
    for path in (copy / "report.json", folder.samples_image, folder.nearest_image, folder.seam_image):
        path.unlink()
    root = parsed(folder)
    assert texts(root, "h2") == ["Training", "Samples during training", "Config", "Commands"]
    assert "Step 6 of 6: this run is training, or was stopped" in texts(root, "p")[0]
    for path in folder.previews.iterdir():
        path.unlink()
    folder.metrics.unlink()
    root = parsed(folder)
    assert texts(root, "h2") == ["Config", "Commands"]
    assert "Step 0 of 6" in texts(root, "p")[0]


@pytest.mark.slow
def test_without_features_there_are_the_numbers_of_pixels_and_the_reason(folder_run, copy):
    root = parsed(RunDir(folder_run.workdir))
    assert "Not compared in features: " + folder_run.report["unmeasured"] in " ".join(texts(root, "p"))
    names = [row[0].text for row in root.find(f".//{NAMESPACE}table/{NAMESPACE}tbody")]
    assert names == ["Nearest ratio", "Patch distance", "Seam"]
    nothing = {"train_steps": 6, "train_seconds": 1, "sample_count": 4, "sample_seconds": 1, "sample_steps": 2}
    (copy / "report.json").write_text(json.dumps(nothing | {"unmeasured": "too few"}))
    root = parsed(RunDir(copy))
    assert "Nothing was measured: too few." in " ".join(texts(root, "p"))


@pytest.mark.slow
def test_an_expert_has_a_page_without_samples(expert_runs):
    root = parsed(RunDir(expert_runs[0][0]))
    assert "Samples" not in texts(root, "h2") and "expert 0 of 2" in texts(root, "p")[0]


def test_fields_other_than_the_default_are_bold(whole):
    bold = {row[0].text: row[1][0].text for row in whole.iter(f"{NAMESPACE}tr") if len(row[1])}
    config = tiny()
    assert bold["train.steps"] == str(config.train.steps) and bold["model.width"] == str(config.model.width)
    assert "seed" not in bold and "data.name" not in bold


@pytest.mark.slow
def test_wide_images_are_made_smaller(copy):
    folder = RunDir(copy)
    noise = np.random.default_rng(0).integers(0, 256, (60, 3000, 3), np.uint8)
    Image.fromarray(noise).save(folder.samples_image)
    before = folder.page.stat().st_size
    page.write(folder)
    assert folder.page.stat().st_size < before + 200_000 < before + noise.size


@pytest.mark.slow
def test_tall_images_are_made_smaller_too(copy, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    folder = RunDir(copy)
    Image.new("L", (300, 17_000)).save(folder.samples_image)
    assert b"image/webp" in page.write(folder).read_bytes()
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("name", ["samples.png", "report.json"])
def test_a_damaged_file_is_named_with_what_to_do(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{name} is damaged .*: delete it"):
        page.write(RunDir(copy))
    (copy / name).unlink()
    page.write(RunDir(copy))


def test_quarters_of_an_expert_have_the_times_that_they_are(copy):
    folder = RunDir(copy)
    rows = [{"step": step, "loss": 1.0, "loss_q2": 0.5, "loss_q3": 0.25} for step in (1, 2)]
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alts = [image.get("alt") for image in parsed(folder).iter(f"{NAMESPACE}img")]
    assert any("0.5 to 0.75: 0.5 at step 2; 0.75 to 1: 0.25 at step 2" in alt for alt in alts)


def test_a_folder_without_a_run_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(page.command, "workdir", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no run in .*pass the --workdir of experiments.train"):
        page.main(["page"])


def test_the_command_of_a_run_is_on_its_page(copy):
    folder = RunDir(copy)
    config, spec = folder.stored()
    typed = "python -m experiments.train --config.name='a b'"
    folder.open(config, spec, typed)
    assert not folder.command.exists()  # it is finished
    (copy / "report.json").unlink()
    folder.open(config, spec, typed)
    config.seed += 1
    with pytest.raises(ValueError, match="another config"):
        folder.open(config, spec, "python -m experiments.train --config.seed=1")
    assert typed in texts(parsed(folder), "pre")[0]


def test_long_curves_are_means_of_their_stretches():
    values = np.random.default_rng(0).standard_normal(charts.POINTS * 7)
    np.testing.assert_allclose(charts.averaged(values), values.reshape(-1, 7).mean(1))
    assert charts.averaged(values[:5]) is not None and len(charts.averaged(values[:5])) == 5
    odd = charts.averaged(np.arange(charts.POINTS + 1.0))
    assert len(odd) == charts.POINTS and (np.diff(odd) > 0).all()


def test_equal_curves_are_equal_files():
    line = {"loss": (np.arange(4.0), np.ones(4))}
    assert charts.curves(line) == charts.curves(line)
