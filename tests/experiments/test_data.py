"""experiments.data: a data set is described, and a grid shows images of each class."""

import numpy as np
import pytest
from absl import flags
from PIL import Image

from experiments import data


@pytest.fixture
def pets(tmp_path):
    """Red cats, green dogs and blue éclairs."""
    for c, name in enumerate(("cat", "dog", "éclair")):
        for i in range(12 + c):
            (tmp_path / "pets" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.eye(3, dtype=np.uint8)[c] * np.full((60, 60, 1), 200 + i, np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.png"
            )
    (tmp_path / "pets" / "notes.txt").write_text("x")
    return tmp_path / "pets"


@pytest.fixture
def show(monkeypatch, capsys):
    """Runs the command with these flags; returns what it printed."""

    def call(*arguments):
        own = flags.FlagValues()
        with monkeypatch.context() as patch:
            for name in ("string", "list", "enum", "integer"):
                define = getattr(flags, f"DEFINE_{name}")
                patch.setattr(
                    flags, f"DEFINE_{name}", lambda *a, define=define, **k: define(*a, **{**k, "flag_values": own})
                )
            patch.setattr(data, "define_path", lambda name, default, text: flags.DEFINE_string(name, default, text))
            patch.setattr(flags, "FLAGS", own)
            data.define_flags([])
            data.main(own(["data", *arguments]))
        return capsys.readouterr().out

    return call


def test_a_folder_is_described_and_shown(pets, show, tmp_path):
    printed = show(f"--name=folder:{pets}", "--split=all", f"--out={tmp_path / 'sub' / 'grid.png'}", "--columns=5")
    assert "split all: 39 images of 60x60, 3 channels (RGB)" in printed
    assert "3: cat (12), dog (13), éclair (14)" in printed
    assert "1 .txt" in printed
    assert "15 images, 3 rows" in printed
    with Image.open(tmp_path / "sub" / "grid.png") as image:
        pixels = np.asarray(image)
    right, rows = pixels[:, -5 * 62 :], pixels.shape[0] // 3
    for c in range(3):
        row = right[c * rows + 5 : (c + 1) * rows - 5].reshape(-1, 3)
        coloured = row[(row != 255).any(-1)]
        assert (coloured.argmax(-1) == c).all()
        assert {200, 209} <= set(coloured.max(-1).tolist())  # 0.png and 9.png, the first and the last
    left = pixels[:, : -5 * 62 - 2]
    assert (left < 128).any(), "there are no names"


def test_images_without_labels_fill_rows(pets, show, tmp_path):
    out = tmp_path / "grid.png"
    printed = show(f"--name=folder:{pets}", "--split=all", "--class_names_in=none", "--size=16", f"--out={out}")
    assert "none: the images have no labels" in printed and "39 images of 16x16" in printed
    assert "32 images, 4 rows" in printed


def test_more_classes_than_rows_are_said(pets, show, tmp_path):
    printed = show(f"--name=folder:{pets}", f"--out={tmp_path / 'a.png'}", "--rows=2", "--size=16,24")
    assert "2 rows of 3 classes" in printed and "of 16x24" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--name is missing"),
        (["--name=folder:PETS", "--split=tset"], "split='tset'"),
        (["--name=folder:PETS", "--size=large"], "--size=large must be one number or two"),
        (["--name=folder:PETS", "--out=grid.gif"], "--out=grid.gif must end in .png or .webp"),
        (["--name=mnist5k", "--bad_files=skip"], "bad_files='skip' is for folder"),
    ],
)
def test_what_makes_no_sense_is_refused(pets, show, arguments, message):
    with pytest.raises(ValueError, match=message):
        show(*(argument.replace("PETS", str(pets)) for argument in arguments))


def test_fields_are_named_as_flags_of_this_command(pets, show):
    (pets / "cat" / "0.png").write_text("not an image")
    with pytest.raises(ValueError, match="or pass --bad_files=skip"):
        show(f"--name=folder:{pets}")
    for name in ("folder:nowhere", "array:nowhere.npy"):  # an OSError
        with pytest.raises(OSError, match=f"set by --name={name[:6]}") as refusal:
            show(f"--name={name}")
        assert "--config" not in str(refusal.value)
    assert "skipped     1 that" in show(f"--name=folder:{pets}", "--bad_files=skip", "--split=all")
