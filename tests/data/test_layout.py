"""Folder layouts: clear ones are recognized, ambiguous ones are refused with a suggestion."""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pytest

from mnist.data.folders import find_files
from mnist.errors import ConfigError
from tests.data.test_folders import write_images

PETS = "cats", "dogs"


def lay_out(top: Path, counts: Mapping[str, int]) -> None:
    """Make folders with these numbers of images, no two alike."""
    for index, (folder, count) in enumerate(counts.items()):
        write_images(top / folder, count, first=1000 * index)


def of_classes(*folders: str, names: tuple[str, ...] = PETS) -> dict[str, int]:
    """Three images of each class in each of the folders."""
    return {f"{folder}/{name}".strip("/"): 3 for folder in folders for name in names}


@pytest.mark.parametrize(
    ("counts", "splits", "note"),
    [
        (of_classes("training_set", "test_set"), ("test", "train"), ""),
        (of_classes("Train", "TEST"), ("test", "train"), ""),
        (of_classes("training", "testing"), ("test", "train"), ""),
        (of_classes("train", "valid"), ("test", "train"), ""),
        (of_classes("Train", "dev"), ("test", "train"), ""),
        (of_classes("train", "eval"), ("test", "train"), ""),
        (of_classes("TrainImages", "test1"), ("test", "train"), ""),
        (of_classes("01_train", "02_validation", "03_test"), ("test", "train", "val"), ""),
        (of_classes("train", "val", "test", "dev2"), ("test", "train", "val"), "next to train/, val/, test/: dev2"),
        (
            of_classes("seg_train/seg_train", "seg_test/seg_test") | {"seg_pred/seg_pred": 5},
            ("test", "train"),
            "next to seg_train/, seg_test/: seg_pred",
        ),
        (of_classes("train", "val") | {"test": 4}, ("test", "train"), "next to train/, val/: test"),
        (of_classes("train", "val") | {"test": 0}, ("test", "train"), "next to train/, val/: test"),
        (of_classes("", "more data"), ("train",), "more data/, which repeats cats/, dogs/"),
    ],
)
def test_splits_in_any_spelling_are_recognized(
    counts: Mapping[str, int], splits: tuple[str, ...], note: str, tmp_path: Path
) -> None:
    lay_out(tmp_path, counts)
    folder = find_files(tmp_path)
    assert folder.class_names == PETS
    assert tuple(sorted({file.part for file in folder.files})) == splits
    assert len(folder.files) == 6 * len(splits)
    assert folder.is_split == (len(splits) > 1)
    assert [re.sub("^ignored:? ", "", it) for it in folder.notes] == ([note] if note else [])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (of_classes("pets"), "contains only pets/, with cats, dogs in it. If these are the classes, use: {}"),
        (of_classes("a", "b"), "a/ and b/ contain the same folders: cats, dogs. If these are the classes, rename"),
        (of_classes("a", "b", "c") | {"a/eels": 3}, "a/ and b/ contain the same folders: cats, dogs."),
        (of_classes("train_a", "train_b", "test"), "train_a/ and train_b/ both look like the train images. Rename"),
        (of_classes("train") | {"test": 5}, "test/ has no class folders. Add them, or split train/ by class: {}"),
        ({"train": 5, "test": 5}, "train/ contains no folders. Make one folder per class"),
        ({"images": 5}, "only one class, images. Add a folder for each other class. labels.csv is not read"),
    ],
)
def test_ambiguous_layouts_are_refused_with_a_suggestion(
    counts: Mapping[str, int], message: str, tmp_path: Path
) -> None:
    lay_out(tmp_path, counts)
    if "images" in counts:
        (tmp_path / "labels.csv").write_text("file,label\n")
    with pytest.raises(ConfigError) as raised:
        find_files(tmp_path)
    assert message.format(f"--dataset {tmp_path}") in str(raised.value)


def test_classes_in_file_names_are_suggested(tmp_path: Path) -> None:
    lay_out(tmp_path, {"train": 6, "test1": 6})
    for number, path in enumerate(sorted((tmp_path / "train").iterdir())):
        path.rename(path.with_name(f"{('cat', 'dog')[number % 2]}.{number}.png"))
    for path in (tmp_path, tmp_path / "train"):
        with pytest.raises(ConfigError, match="The file names begin with cat, dog: if these are the classes"):
            find_files(path)


def test_classes_may_be_named_like_splits(tmp_path: Path) -> None:
    vehicles = {"car": 3, "plane": 3, "train": 3, "test bench": 3}
    lay_out(tmp_path, vehicles)
    assert find_files(tmp_path).class_names == tuple(sorted(vehicles))


def test_folders_of_different_folders_are_classes(tmp_path: Path) -> None:
    lay_out(tmp_path, {"animals/cats": 3, "animals/dogs": 3, "vehicles/cars": 3, "vehicles/dogs": 3})
    assert find_files(tmp_path).class_names == ("animals", "vehicles")


@pytest.mark.parametrize("path", ["runs/x", "x"])
def test_runs_and_caches_are_not_classes(path: str, tmp_path: Path) -> None:
    lay_out(tmp_path, of_classes("") | {path: 3})
    (tmp_path / path / "config.yaml").write_text("recipe: tutorial\n")
    (tmp_path / path / "state.json").write_text(json.dumps({"status": "running"}))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "pets-01234567-0123456789abcdef.u8").write_bytes(b"")
    folder = find_files(tmp_path)
    assert folder.class_names == PETS
    assert dict(folder.skipped) == dict.fromkeys((path.split("/")[0], "cache"), "written by this project")


@pytest.mark.parametrize("other", ["CATS", unicodedata.normalize("NFD", "Kätzchen")])
def test_classes_that_differ_only_in_case_or_unicode_form_are_refused(other: str, tmp_path: Path) -> None:
    lay_out(tmp_path, {"cats": 3, "Kätzchen": 3, other: 3})
    with pytest.raises(ConfigError, match="differ only in case or Unicode form"):
        find_files(tmp_path)


def test_splits_may_spell_classes_in_any_case_and_unicode_form(tmp_path: Path) -> None:
    name = "Kätzchen"
    other = unicodedata.normalize("NFD", name).lower()
    lay_out(tmp_path, {f"train/{name}": 3, "train/dogs": 3, f"test/{other}": 2, "test/Dogs": 1})
    folder = find_files(tmp_path)
    assert folder.class_names == (name, "dogs")
    assert [(file.part, file.label) for file in folder.files].count(("test", 0)) == 2


def test_escaped_class_names_of_a_model_match_the_folder(tmp_path: Path) -> None:
    lay_out(tmp_path, {"a\u3000b": 2, "c\xa0d": 2})
    names = find_files(tmp_path).class_names
    assert find_files(tmp_path, class_names=names).class_names == names


def test_a_link_to_a_parent_of_the_data_set_is_not_followed(tmp_path: Path) -> None:
    lay_out(tmp_path / "data", of_classes(""))
    write_images(tmp_path / "elsewhere", 3, first=500)
    (tmp_path / "data" / "cats" / "up").symlink_to(tmp_path)
    folder = find_files(tmp_path / "data")
    assert len(folder.files) == 6
    assert ("cats/up", "link to a parent of the dataset") in folder.skipped


@pytest.mark.parametrize("loose", [0, 3])
def test_a_folder_without_classes_cannot_test_a_model(loose: int, tmp_path: Path) -> None:
    write_images(tmp_path, loose)
    with pytest.raises(ConfigError, match=r"it contains no folders\. Make one folder per class"):
        find_files(tmp_path, class_names=PETS)


def test_the_order_of_files_does_not_depend_on_a_models_classes(tmp_path: Path) -> None:
    lay_out(tmp_path, of_classes(""))
    names = [file.name for file in find_files(tmp_path).files]
    assert [file.name for file in find_files(tmp_path, class_names=PETS[::-1]).files] == names


@pytest.mark.parametrize("only", ["test", "val", "train"])
def test_one_split_is_enough_to_test_a_model(only: str, tmp_path: Path) -> None:
    lay_out(tmp_path, of_classes(only) | {f"{only}/empty": 0})
    folder = find_files(tmp_path, class_names=(*PETS, "empty"))
    assert {(file.part, file.label) for file in folder.files} == {("test", 0), ("test", 1)}


def test_links_to_training_images_are_not_test_images(tmp_path: Path) -> None:
    lay_out(tmp_path, of_classes("train") | {"test/cats": 0, "test/dogs": 0})
    for name in PETS:
        image = next((tmp_path / "train" / name).iterdir())
        (tmp_path / "test" / name / image.name).symlink_to(image)
    with pytest.raises(ConfigError, match=r"test/ contains no images, only skipped files: link to a file or folder"):
        find_files(tmp_path)


def test_a_class_with_a_file_named_like_a_cache_is_a_class(tmp_path: Path) -> None:
    lay_out(tmp_path, of_classes(""))
    (tmp_path / "cats" / "notes.u8").write_text("x")
    assert find_files(tmp_path).class_names == PETS


def test_a_model_can_be_tested_on_some_of_its_classes(tmp_path: Path) -> None:
    lay_out(tmp_path, {"dogs": 3})
    folder = find_files(tmp_path, class_names=("cats", "dogs", "eels"))
    assert folder.class_names == ("cats", "dogs", "eels")
    assert {file.label for file in folder.files} == {1}
    lay_out(tmp_path, {"fish": 3})
    with pytest.raises(ConfigError, match=r"it has classes the model does not know: fish\. It knows cats, dogs"):
        find_files(tmp_path, class_names=PETS)
