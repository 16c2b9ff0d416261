"""What a folder's paths say about splits and classes, in the layouts that published data sets have."""

import json
import unicodedata

import pytest

from diffusion.data.layout import in_order, layout


def read_from(texts):
    return lambda path: texts.get("/".join(path))


def laid(paths, class_names_in="folders", **texts):
    """The layout of these paths; a text is named by its path with __ for / and _ for the dot."""
    texts = {name.replace("__", "/").replace("_json", ".json").replace("_txt", ".txt"): t for name, t in texts.items()}
    files = sorted(tuple(path.split("/")) for path in paths)
    return layout("folder:x", files, read_from(texts), class_names_in)


def by_file(found):
    """The class of each file by its name, None where it has none."""
    names = ["/".join(file) for file in found.files]
    if found.classes is None:
        return dict.fromkeys(names)
    classes = [found.class_names[i] if i >= 0 else None for i in found.classes]
    return dict(zip(names, classes, strict=True))


def split_of(found):
    return {"/".join(file): part for file, part in zip(found.files, found.part, strict=True)}


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize("held", ["val", "valid", "validation", "dev", "test", "testing", "Val", "TEST"])
def test_split_folders_have_their_common_names_in_any_case(train, held):
    found = laid([f"{train}/cat/1.png", f"{train}/dog/1.png", f"{held}/dog/2.png"])
    role = "test" if held.lower().startswith("test") else "validation"
    assert split_of(found) == {f"{train}/cat/1.png": "train", f"{train}/dog/1.png": "train", f"{held}/dog/2.png": role}
    assert found.class_names == ("cat", "dog")
    assert found.splits["test"] == found.splits[held] == (role,)
    assert set(found.splits["all"]) == {"train", role}


def test_three_splits_are_kept_apart_and_all_is_all_of_them():
    found = laid([f"{split}/cat/{split}.png" for split in ("train", "val", "test")])
    assert found.splits["test"] == ("test",)
    assert found.splits["validation"] == found.splits["val"] == found.splits["dev"] == ("validation",)
    assert found.splits["all"] == ("train", "validation", "test")


def test_two_folders_for_one_split_are_refused():
    with pytest.raises(ValueError, match="2 folders for one split, dev and val; keep one"):
        laid(["train/a/1.png", "dev/a/2.png", "val/a/3.png"])


@pytest.mark.parametrize("folder", ["train", "val"])
def test_a_split_folder_alone_is_no_class(folder):
    found = laid([f"{folder}/{name}/{i}.png" for name in ("cat", "dog") for i in range(3)])
    assert found.class_names == ("cat", "dog")
    assert set(found.part) == {"train", "test"}
    assert laid([f"{folder}/{i}.png" for i in range(3)]).class_names == ()


def test_held_out_folders_without_a_training_folder_are_refused():
    with pytest.raises(ValueError, match="held-out folders test, val, but no folder train"):
        laid(["val/a/1.png", "test/a/1.png"])


def test_a_class_that_only_a_held_out_split_has_is_refused_by_name():
    with pytest.raises(ValueError, match=r"val has classes that training lacks: Dog, cow \(near dog\)"):
        laid(["train/cat/1.png", "train/dog/1.png", "val/Dog/2.png", "val/cow/2.png", "val/cat/2.png"])
    with pytest.raises(ValueError, match="test has classes that training lacks: cow"):
        laid(["train/1.png", "test/cow/2.png"])


def test_images_in_no_split_are_counted():
    found = laid(["train/a/1.png", "test/a/1.png", "extra/a/1.png", "extra/a/2.png", "cover.png"])
    assert len(found.files) == 2
    assert found.notes == ("3 images are in no split: 2 in extra, 1 in the folder itself",)


def test_tiny_imagenet():
    paths = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in ("n01443537", "n01629819") for i in range(3)]
    paths += [f"val/images/val_{i}.JPEG" for i in range(2)] + ["test/images/test_0.JPEG"]
    annotations = "val_0.JPEG\tn01629819\t0\t32\t44\t62\r\nval_1.JPEG\tn01443537\t0\t0\t1\t2\n\n"
    found = laid(paths, val__val_annotations_txt=annotations)
    assert found.class_names == ("n01443537", "n01629819")
    classes = by_file(found)
    assert classes["train/n01629819/images/n01629819_2.JPEG"] == "n01629819"
    assert classes["val/images/val_0.JPEG"] == "n01629819"
    assert classes["val/images/val_1.JPEG"] == "n01443537"
    assert classes["test/images/test_0.JPEG"] is None
    assert "the images in test have no labels" in found.notes


def test_imagenet_with_a_flat_validation_folder():
    found = laid([f"train/n0{i}/n0{i}_{j}.JPEG" for i in range(2) for j in range(2)] + ["val/ILSVRC2012_val_1.JPEG"])
    assert found.class_names == ("n00", "n01")
    assert by_file(found)["val/ILSVRC2012_val_1.JPEG"] is None
    assert found.notes == ("the images in val have no labels",)


LABELS = {"labels": [["00000/img00000000.png", 2], ["00000/img00000001.png", 0], ["00001/img00001000.png", 10]]}
SHARDS = [name for name, _ in LABELS["labels"]]


@pytest.mark.parametrize("labels", [LABELS, {"labels": dict(LABELS["labels"])}])
def test_dataset_json_gives_the_labels(labels):
    found = laid(SHARDS, dataset_json=json.dumps(labels) + "\n\n")
    assert found.class_names == tuple(map(str, range(11)))
    assert found.classes.tolist() == [2, 0, 10]


def test_dataset_json_of_both_splits():
    text = lambda *labels: json.dumps({"labels": [[f"00000/img0000000{i}.png", n] for i, n in enumerate(labels)]})  # noqa: E731
    paths = ["train/00000/img00000000.png", "train/00000/img00000001.png", "val/00000/img00000000.png"]
    found = laid(paths, train__dataset_json=text(1, 0), val__dataset_json=text(1))
    assert (found.class_names, found.classes.tolist()) == (("0", "1"), [1, 0, 1])
    with pytest.raises(ValueError, match="val has classes that training lacks: 2"):
        laid(paths, train__dataset_json=text(1, 0), val__dataset_json=text(2))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[SHARDS[0], 1]], r"dataset.json has no label for 2 of 3 images: 00000/img00000001.png, 00001"),
        ([[name, [0.1, 0.2]] for name in SHARDS], r"the label \[0.1, 0.2\] of 00000/img00000000.png .*not the number"),
        ([[name, -1] for name in SHARDS], "the label -1 of"),
        ([[name, 123456789] for name in SHARDS], "the label 123456789 of"),
        ([[name, True] for name in SHARDS], "the label True of"),
        ([1, 2], "must be pairs such as"),
    ],
)
def test_what_dataset_json_must_hold(labels, message):
    with pytest.raises(ValueError, match=message):
        laid(SHARDS, dataset_json=json.dumps({"labels": labels}))
    assert laid(SHARDS, "none", dataset_json=json.dumps({"labels": labels})).class_names == ()


def test_a_damaged_dataset_json_is_refused_and_one_without_labels_is_said():
    with pytest.raises(ValueError, match=r"dataset.json is not JSON"):
        laid(SHARDS, dataset_json='{"labels": [["000')
    for text in ('{"labels": null}', '{"title": "pets"}', "[]"):
        found = laid(["cat/1.png", "dog/2.png"], dataset_json=text)
        assert found.class_names == ("cat", "dog")
        assert found.notes == ("dataset.json has no labels",)


@pytest.mark.parametrize(
    "paths",
    [
        ["00000/00000.png", "00000/00999.png", "01000/01000.png", "69000/69999.png"],  # FFHQ
        ["00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png"],  # StyleGAN, EDM
        ["0/1/2/a/b/c/012abcdef0.webp", "f/1/2/a/b/c/f12abcdef0.webp"],  # LSUN
    ],
)
def test_folders_that_only_number_the_files_are_no_classes(paths):
    found = laid(paths)
    assert (found.class_names, found.classes) == ((), None)
    assert "number the files: they are no classes" in found.notes[0]
    split = laid([f"{part}/{path}" for part in ("train", "val") for path in paths])
    assert split.class_names == ()


def test_numbered_folders_with_numbers_of_their_own_are_classes():
    found = laid([f"{c:05}/{i:05}.png" for c in range(3) for i in range(4)])
    assert found.class_names == ("00000", "00001", "00002")
    assert "class_names_in=none" in found.notes[0]
    assert laid([f"{c}/{i}.png" for c in range(3) for i in range(4)]).notes == ()


def test_classes_in_file_names():
    paths = ["airplane_00001.png", "polar_bear_7.png", "b/cat (2).png", "n01443537_10026.JPEG", "img00000012.png"]
    found = laid(paths, "names")
    assert by_file(found) == dict(zip(paths, ["airplane", "polar_bear", "cat", "n01443537", "img"], strict=True))
    assert laid(paths, "none").class_names == ()
    for wrong in ("00001.png", "cover.png", "___3.png"):
        with pytest.raises(ValueError, match=rf"{wrong} has no class in its name"):
            laid([*paths, wrong], "names")
    with pytest.raises(ValueError, match="val has classes that training lacks: dog"):
        laid(["train/cat_1.png", "val/dog_1.png"], "names")


def test_numbered_classes_are_sorted_by_value_others_by_name():
    assert in_order({"10", "2", "1", "02"}) == ("1", "02", "2", "10")
    assert in_order({"10", "2", "x"}) == ("10", "2", "x")
    found = laid([f"{c}/a.png" for c in (10, 9, 100, 0)])
    assert found.class_names == ("0", "9", "10", "100")
    assert by_file(found)["9/a.png"] == "9"


def test_names_are_compared_in_one_unicode_form():
    one, other = (unicodedata.normalize(form, "éclair") for form in ("NFC", "NFD"))
    assert one != other
    found = laid([f"train/{one}/1.png", "train/cat/1.png", f"val/{other}/2.png"])
    assert found.class_names == ("cat", one)
    assert by_file(found)[f"val/{other}/2.png"] == one
    with pytest.raises(ValueError, match=rf"two classes of one name: .*are both {one}"):
        laid([f"{one}/1.png", f"{other}/1.png"])
