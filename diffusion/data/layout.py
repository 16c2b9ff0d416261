"""Which split and which class the files of a folder belong to, from their paths.

Splits. If the folder contains a training folder and a held-out one, under names in `ROLES` in any case, these are the
splits. If not, with h the SHA-256 of a file's path below the folder, as a fraction of its largest value,

    a file is in "test" when h <= 1/10, else in "train",                                           (1)

except that each split gets at least one file. Whether a file is held out does not depend on the other files.

A folder that holds nothing but one of these folders is read as that one. Without a test folder, validation is "test".

Classes. The class of a file is the first folder below that of its split; files directly in it have none. The classes of
a data set are those of its training split. Instead of folders,

- `dataset.json`, {"labels": [["00000/img00000000.png", 5], ...]}, gives the numbers of the classes, as for StyleGAN and
  EDM;
- `val_annotations.txt`, a file name and a class in each line, gives the classes of a held-out split (Tiny ImageNet);
- folders that only number the files are no classes: `01000/01234.png` (FFHQ), `00001/img00001234.png` (StyleGAN, EDM)
  and `a/b/abcdef.webp` (LSUN).

Class names are compared and returned in Unicode's form NFC. They are sorted, by value if all of them are numbers.
"""

import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

Parts = tuple[str, ...]  # a path, "cat/a.png" as ("cat", "a.png")
Reader = Callable[[Parts], str | None]
Labels = list[str | None]  # names of classes

CLASS_NAMES_IN = ("folders", "names", "none")
ROLES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
ROLES |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
DATASET_JSON, ANNOTATIONS = "dataset.json", "val_annotations.txt"
NO_CLASSES = "--config.data.class_names_in=none"


class Layout(NamedTuple):
    """N files of a folder, sorted, with split and class; what was decided about them in `notes`."""

    files: list[Parts]
    part: list[str]  # of each file: "train", "validation" or "test"
    splits: dict[str, tuple[str, ...]]  # name of a split -> the values of `part` in it
    class_names: tuple[str, ...]
    classes: np.ndarray | None  # number of the class [N], -1 where a held-out split has none; None without classes
    notes: tuple[str, ...] = ()


def layout(name: str, files: Sequence[Parts], read: Reader, class_names_in: str = "folders") -> Layout:
    """The layout of `files`, the sorted paths of all images of the data set `name`.

    Args:
      read: text of a small file, by its path; None if there is none.
      class_names_in: "folders", as described above; "names": the part of the file's name before its last number, as
        "airplane" of airplane_00001.png; "none": there are no classes.

    Raises:
      ValueError: two folders for one split; files with and without a class; a class that only a held-out split has; two
        classes of one name; labels that are no class numbers, or missing for a file.
    """
    roles, notes = _split_folders(name, files), []
    groups = {folder: [file[1:] for file in files if file[0] == folder and len(file) > 1] for folder in sorted(roles)}
    groups = groups or {"": list(files)}
    used = [(folder, *below) if folder else below for folder, group in groups.items() for below in group]
    if "train" in roles.values() and len(roles) > 1:
        part = [roles[file[0]] for file in used]
        splits = folder_splits(roles)
    else:
        part = hashed_split(used)
        splits = {"train": ("train",), "test": ("test",), "all": ("train", "test")}
        roles = dict.fromkeys(groups, "train")
    others = Counter(file[0] if len(file) > 1 else "the folder itself" for file in set(files) - set(used))
    if others:
        where = listed(f"{n:,} in {place}" for place, n in sorted(others.items()))
        notes.append(f"{others.total():,} images are in no split: {where}")

    labels: dict[str, Labels] = {}
    class_names: tuple[str, ...] = ()
    classes_are_folders = False
    for folder in sorted(groups, key=lambda folder: roles[folder] != "train"):  # classes come from training
        found, numbered = _labels(name, folder, groups[folder], read, class_names_in, notes)
        if roles[folder] == "train":
            _check_all_or_none(name, folder, groups[folder], found)
            class_names = tuple(map(str, range(numbered))) if numbered else in_order(set(found) - {None})
            classes_are_folders = class_names_in == "folders" and not numbered
        else:
            found = _held_out_labels(name, folder, groups[folder], found, class_names, notes)
        labels[folder] = found
    if not class_names:
        return Layout(used, part, splits, (), None, tuple(notes))
    if classes_are_folders and all(re.fullmatch("[0-9]{4,}", label) for label in class_names):
        notes.append(f"the names of all class folders are numbers; if they are no classes: {NO_CLASSES}")
    number = {label: i for i, label in enumerate(class_names)} | {None: -1}
    classes = np.array([number[label] for folder in groups for label in labels[folder]], np.int32)
    return Layout(used, part, splits, class_names, classes, tuple(notes))


def nfc(name: str) -> str:
    """A name in the Unicode form in which names are compared: an accented letter is one character."""
    return unicodedata.normalize("NFC", name)


def in_order(names: Collection[str]) -> tuple[str, ...]:
    """Sorted names; by value if all of them are numbers, so that 2 is before 10."""
    numbers = all(re.fullmatch(r"[0-9]+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if numbers else name))


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names separated by commas, the first `most` of them, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _split_folders(name: str, files: Sequence[Parts]) -> dict[str, str]:
    """The folders that are splits and their roles; one alone holds all images; {} without such folders."""
    tops = {file[0] for file in files if len(file) > 1}
    roles = {folder: ROLES[folder.casefold()] for folder in tops if folder.casefold() in ROLES}
    found = Counter(roles.values())
    only = roles.keys() == tops and all(len(file) > 1 for file in files)
    if not (only or ("train" in found and len(found) > 1)):
        return {}
    for role, count in found.items():
        if count > 1:
            folders = sorted(folder for folder in roles if roles[folder] == role)
            raise ValueError(f"{name} has {count} folders for one split, {' and '.join(folders)}; keep one of them")
    if "train" not in found and len(found) > 1:
        raise ValueError(f"{name} has the held-out folders {listed(sorted(roles))}, but no folder train beside them")
    return roles


def folder_splits(roles: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """The names of splits, folders' own names and their synonyms included; without a test folder, validation is it."""
    folder_of = {role: folder for folder, role in roles.items()}
    splits = {"train": ("train",), "test": ("test",) if "test" in folder_of else ("validation",)}
    splits |= {"all": tuple(role for role in ("train", "validation", "test") if role in folder_of)}
    splits |= {folder: (role,) for folder, role in roles.items()}
    return {synonym: (role,) for synonym, role in ROLES.items() if role in folder_of} | splits


def hashed_split(files: Sequence[Parts]) -> list[str]:
    """ "train" or "test" for each file, eq. (1)."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode("/".join(file))).digest()[:8]) for file in files]
    tenth, highest = max(2**64 // 10, min(hashes)), max(hashes)
    return ["test" if value <= tenth and value < highest else "train" for value in hashes]


def _labels(
    name: str, folder: str, files: Sequence[Parts], read: Reader, class_names_in: str, notes: list[str]
) -> tuple[Labels, int | None]:
    """Names of the classes of the files in a split's folder, and how many classes there are if they are numbered."""
    if class_names_in == "none":
        return [None] * len(files), None
    if class_names_in == "names":
        return [_class_in_name(name, file) for file in files], None
    at = (folder,) if folder else ()
    numbers = _dataset_json(name, (*at, DATASET_JSON), files, read, notes)
    if numbers is not None:
        return [str(number) for number in numbers], max(numbers) + 1
    if _only_number_files(files):
        shown = listed(sorted({file[0] for file in files}), 3)
        notes.append(f"the folders {shown} number the files: they are no classes, and there are no labels")
        return [None] * len(files), None
    text = read((*at, ANNOTATIONS))
    if text is not None:
        rows = [line.split("\t") for line in text.splitlines() if "\t" in line]
        annotated = {row[0].strip(): nfc(row[1].strip()) for row in rows}
        return [annotated.get(file[-1]) for file in files], None
    folders = {file[0] for file in files if len(file) > 1}
    same = [sorted(f for f in folders if nfc(f) == one) for one, n in Counter(map(nfc, folders)).items() if n > 1]
    if same:
        raise ValueError(
            f"{name} has two classes of one name: the folders {' and '.join(map(ascii, same[0]))} are both "
            f"{nfc(same[0][0])} in Unicode's form NFC; rename one of them"
        )
    return [nfc(file[0]) if len(file) > 1 else None for file in files], None


def _class_in_name(name: str, file: Parts) -> str:
    match = re.fullmatch(r"(.*?[^\W_\d].*?)[ _.\-]*\(?[0-9]+\)?", nfc(os.path.splitext(file[-1])[0]))
    if not match:
        raise ValueError(
            f"{name}: {'/'.join(file)} has no class in its name, as airplane_00001.png has (a name, then a number); "
            "pass --config.data.class_names_in=folders or none"
        )
    return match[1]


def _dataset_json(name: str, path: Parts, files: Sequence[Parts], read: Reader, notes: list[str]) -> list[int] | None:
    """The class numbers of files from a dataset.json; None where there is none, or one without labels."""
    text, shown = read(path), "/".join(path)
    if text is None:
        return None
    try:
        table = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: {shown} is not JSON ({error}); repair it, or pass {NO_CLASSES}") from error
    pairs = table.get("labels") if isinstance(table, dict) else None
    if pairs is None:
        notes.append(f"{shown} has no labels")
        return None
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise ValueError(f'{name}: the labels of {shown} must be pairs such as ["00000/img00000000.png", 5]')
    numbers = {nfc(file.replace("\\", "/")): label for file, label in pairs}
    found = [numbers.get(nfc("/".join(file))) for file in files]
    missing = ["/".join(file) for file, label in zip(files, found, strict=True) if label is None]
    if missing:
        raise ValueError(
            f"{name}: {shown} has no label for {len(missing):,} of {len(files):,} images: {listed(missing, 3)}. Add "
            f"them, or pass {NO_CLASSES}"
        )
    for file, label in zip(files, found, strict=True):
        if type(label) is not int or not 0 <= label < max(10 * len(files), 1000):
            raise ValueError(
                f"{name}: the label {str(label)[:40]} of {'/'.join(file)} in {shown} is not the number of a class, "
                f"counted from 0; pass {NO_CLASSES} to do without"
            )
    if len(numbers) > len(files):
        notes.append(f"{shown} also names {len(numbers) - len(files):,} images that are not there")
    return found


def _only_number_files(files: Sequence[Parts]) -> bool:
    """Whether the first folders follow from the names of the files: thousands of them, or their first letters."""

    def thousands(file: Parts) -> bool:
        number = re.search(r"([0-9]+)\.[^.]*$", file[-1])
        if len(file) != 2 or not number or not re.fullmatch(r"[0-9]{5,}", file[0]):
            return False
        return int(file[0]) in (int(number[1]) // 1000, int(number[1]) // 1000 * 1000)

    def letters(file: Parts) -> bool:
        *folders, own = file
        return len(folders) > 1 and all(len(f) == 1 for f in folders) and own.startswith("".join(folders))

    return all(map(thousands, files)) or all(map(letters, files))


def _check_all_or_none(name: str, folder: str, files: Sequence[Parts], labels: Labels) -> None:
    if all(label is None for label in labels):
        return
    without = ["/".join(filter(None, (folder, *file))) for file, label in zip(files, labels, strict=True) if not label]
    if without:
        labelled = next("/".join(filter(None, (folder, *f))) for f, label in zip(files, labels, strict=True) if label)
        raise ValueError(
            f"{name} mixes files with and without a class: {labelled} is in a sub-folder, {without[0]} is not "
            f"({len(without):,} such files). Move them into sub-folders, one per class, or all into one folder; or "
            f"pass {NO_CLASSES}"
        )


def _held_out_labels(
    name: str, folder: str, files: Sequence[Parts], labels: Labels, class_names: Sequence[str], notes: list[str]
) -> Labels:
    """Labels of a held-out split, all of them among `class_names`, or none at all."""
    new = set(labels) - set(class_names)
    if set(labels) == {None} or (new and {file[0].casefold() for file in files} == {"images"}):
        if class_names:
            notes.append(f"the images in {folder} have no labels")
        return [None] * len(files)
    _check_all_or_none(name, folder, files, labels)
    if new:
        new = in_order(new)
        near = difflib.get_close_matches(new[0], class_names, 1)
        raise ValueError(
            f"{name}: {folder} has classes that training lacks: {listed(new)}{f' (near {near[0]})' if near else ''}. "
            f"Classes are those of the training folder: add them there, or remove them from {folder}"
        )
    return labels
