"""Find out which folders of a dataset are classes and which are splits (train, val, test).

    layout = find_layout(Tree(Path("PetImages")), error)
    layout.parts        # {"train": {0: "train/Cat", 1: "train/Dog"}, "test": {0: "test/Cat", ...}}

There is one folder per class, or one per split with the class folders in it. Splits are recognized by name in any
spelling (train, Training, seg_train, train_images). Ambiguous layouts are refused.
"""

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from mnist.data.images import IMAGE_SUFFIXES
from mnist.launch.streams import printable

PARTS = ("train", "val", "test")
WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
FILLING = r"(set|sets|data|images|imgs|folder|split)?"  # may follow one of WORDS, as in trainset
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
OURS = "written by this project"
CHILDREN_LOOKED_AT = 5  # of a folder that may contain runs
TABLES = (".csv", ".tsv", ".xls", ".xlsx")
NO_IMAGE, IN_NO_CLASS = "no image file extension", "not in a class folder"
MAKE_FOLDERS = "Make one folder per class and put its images there."
MAX_DESCENTS = 3


class Contents(NamedTuple):
    """The contents of one folder; paths are relative to the dataset."""

    folders: dict[str, str]  # name -> path, sorted
    images: list[str]  # files with an image extension, sorted
    skipped: list[tuple[str, str]]  # path and reason of the rest
    links: set[str]  # the folders and images that are links


class Tree:
    """A folder, scanned lazily and only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scan = functools.cache(self._scan)

    def _scan(self, name: str) -> Contents:
        """The contents of the folder `name` ("" is the dataset itself). Raises OSError."""
        found = Contents({}, [], [], set())
        with os.scandir(self.path / name) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                below = f"{name}/{entry.name}" if name else entry.name
                is_link = entry.is_symlink()
                if entry.name.startswith("."):
                    found.skipped.append((below, "hidden"))
                elif entry.name.lower() in SYSTEM_FILES:
                    found.skipped.append((below, "system file"))
                elif os.path.isdir(entry.path) if is_link else entry.is_dir():
                    found.folders[entry.name] = below
                    found.links.update([below] if is_link else [])
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    found.images.append(below)
                    found.links.update([below] if is_link else [])
                else:
                    found.skipped.append((below, NO_IMAGE))
        return found

    def is_ours(self, name: str) -> bool:
        """Whether the folder `name` is a run, a folder of runs, or a cache of decoded images."""
        try:
            contents = self.scan(name)
        except OSError:  # a later scan raises if it matters
            return False
        runs = [name, *list(contents.folders.values())[:CHILDREN_LOOKED_AT]]
        is_cache = not contents.images and any(file.endswith(".u8") for file, _ in contents.skipped)
        return is_cache or any(
            (self.path / run / "config.yaml").is_file() and (self.path / run / "state.json").is_file() for run in runs
        )

    def real(self, name: str) -> str:
        return os.path.realpath(self.path / name)


Problem = Callable[[str], Exception]  # makes an error that names the dataset


class Layout(NamedTuple):
    """The class folders of a dataset."""

    class_names: tuple[str, ...]
    parts: dict[str, dict[int, str]]  # "train", "val", "test" -> label -> folder; only "train" if it is not split
    splits: dict[str, str]  # "train", "val", "test" -> folder; empty if it is not split
    skipped: list[tuple[str, str]]
    notes: list[str]


def find_layout(tree: Tree, problem: Problem, class_names: Sequence[str] | None = None) -> Layout:
    """The layout of a dataset. Raises `problem(...)` if it has none or is ambiguous.

    To test a model, pass its `class_names`: the folder may lack some of them, but must have no others.
    """
    top = tree.scan("")
    ours = [name for name, path in top.folders.items() if tree.is_ours(path)]
    folders = {name: path for name, path in top.folders.items() if name not in ours}
    skipped, notes = [*_strays(top), *((name, OURS) for name in ours)], []
    if splits := _find_splits(tree, folders, problem, measures=class_names is not None):
        named = {part: tree.scan(path).folders for part, path in splits.items()}
        for path in splits.values():
            skipped += _strays(tree.scan(path))
        read = [path.split("/")[0] for path in splits.values()]
        if others := sorted(folders.keys() - set(read)):
            notes.append(f"ignored next to {'/, '.join(read)}/: {printable(', '.join(others))}")
    else:
        copies = _find_copies(tree, folders)
        notes += [f"ignored: {printable(name)}/, which repeats {inner}" for name, inner in copies.items()]
        named = {"train": {name: path for name, path in folders.items() if name not in copies}}
        _refuse_same_folders(tree, named["train"], problem)
    if class_names is None:
        _refuse_fewer_than_two(tree, named["train"], splits.get("train", ""), problem)
        class_names = sorted(named["train"])
        lacks = "that train/ lacks", "Remove them, or add training images of them"
    else:
        if not any(named.values()):
            raise problem(f"it contains no folders. {MAKE_FOLDERS}{_hint(tree, top)}")
        lacks = "the model does not know", f"It knows {printable(', '.join(class_names))}"
    labels = _number(class_names, problem)
    parts: dict[str, dict[int, str]] = {}
    for part, classes in named.items():
        _number(classes, problem)
        if unknown := [name for name in classes if _key(name) not in labels]:
            where = f"{part}/ has" if splits else "it has"
            raise problem(f"{where} classes {lacks[0]}: {printable(a_few(unknown))}. {lacks[1]}.")
        parts[part] = {labels[_key(name)]: path for name, path in classes.items()}
    return Layout(tuple(map(printable, class_names)), parts, splits, skipped, notes)


def _find_splits(tree: Tree, folders: Mapping[str, str], problem: Problem, measures: bool) -> dict[str, str]:
    """The folder of each split; empty if the folders are classes. To test a model (`measures`), one split is enough."""
    meant = {name: part for name in folders if (part := _part_of(name))}
    with_classes: dict[str, dict[str, str]] = {}
    for name, part in meant.items():
        path = _descend(tree, folders[name], part)
        if tree.scan(path).folders:
            with_classes.setdefault(part, {})[name] = path
    found = {part: _choose(part, paths, problem) for part, paths in with_classes.items()}
    if "train" in found and len(found) > 1:
        if "test" not in found:  # without test/, val/ is the test split
            found["test"] = found.pop("val")
        return {part: found[part] for part in PARTS if part in found}
    if measures and found and len(meant) == len(folders):
        return {"test": found.get("test") or found.get("val") or found["train"]}
    exact = {part for name, part in meant.items() if name.casefold() in WORDS[part]}
    if not meant or not (len(meant) == len(folders) or {"train"} < exact):
        return {}
    if "train" in found:
        empty = ", ".join(f"{name}/" for name in sorted(meant) if meant[name] != "train")
        lacking = f"{empty} has no class folders" if empty else "there is a train/, but no test/ (or val/)"
        raise problem(f"{lacking}. Add them, or split train/ by class: --dataset {_path(tree, found['train'])}")
    flat = [name for name, part in meant.items() if part == "train"]
    if not flat:
        raise problem(
            f"there is {'/, '.join(sorted(meant))}/, but no train/. Add it, or choose a folder to be split by class:"
            f" --dataset {_path(tree, min(meant))}"
        )
    raise problem(f"{flat[0]}/ contains no folders. {MAKE_FOLDERS}{_hint(tree, tree.scan(folders[flat[0]]))}")


def _part_of(name: str) -> str | None:
    """The split that a folder's name means, in any spelling; None if none or several."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    parts = {
        part for part, known in WORDS.items() for word in words if re.fullmatch(f"({'|'.join(known)}){FILLING}", word)
    }
    return parts.pop() if len(parts) == 1 else None


def _descend(tree: Tree, path: str, part: str) -> str:
    """Descend while a folder contains only another one for the same split, as in `seg_train/seg_train`."""
    for _ in range(MAX_DESCENTS):
        contents = tree.scan(path)
        inner = list(contents.folders)
        if contents.images or len(inner) != 1 or part != _part_of(inner[0]):
            break
        path = contents.folders[inner[0]]
    return path


def _choose(part: str, paths: Mapping[str, str], problem: Problem) -> str:
    """Of several folders for one split, the one whose name is exactly one of WORDS."""
    names = [name for name in paths if name.casefold() in WORDS[part]] if len(paths) > 1 else list(paths)
    if len(names) != 1:
        both = " and ".join(f"{printable(name)}/" for name in sorted(paths)[:2])
        raise problem(f"{both} both look like the {part} images. Rename the right one to {part}/.")
    return paths[names[0]]


def _find_copies(tree: Tree, folders: Mapping[str, str]) -> dict[str, str]:
    """Folders whose subfolders are named like the folder's siblings, e.g. augmented copies -> the subfolders' names."""
    found, keys = {}, {_key(name) for name in folders}
    for name, path in folders.items():
        contents = tree.scan(path)
        inner = {_key(folder) for folder in contents.folders}
        if len(inner) > 1 and not contents.images and inner <= keys and _key(name) not in inner:
            found[name] = printable(a_few([f"{folder}/" for folder in contents.folders]))
    return found


def _refuse_same_folders(tree: Tree, classes: Mapping[str, str], problem: Problem) -> None:
    """Raise if two folders contain the same folders and no images: they may be splits or classes."""
    inner = {name: tree.scan(path) for name, path in classes.items()}
    folders = {
        name: {_key(folder) for folder in contents.folders}
        for name, contents in inner.items()
        if len(contents.folders) > 1 and not contents.images
    }
    counts = Counter(key for keys in folders.values() for key in keys)
    shared = {name: {key for key in keys if counts[key] > 1} for name, keys in folders.items()}
    for one, other in combinations([name for name, keys in shared.items() if len(keys) > 1], 2):
        if len(shared[one] & shared[other]) >= max(2, min(len(folders[one]), len(folders[other])) / 2):
            same = sorted(folder for folder in inner[one].folders if _key(folder) in folders[other])
            raise problem(
                f"{printable(one)}/ and {printable(other)}/ contain the same folders: {printable(a_few(same))}. If"
                " these are the classes, rename the two to train/ and test/, or choose one of them:"
                f" --dataset {_path(tree, classes[one])}. If not, move the images out of them."
            )


def _refuse_fewer_than_two(tree: Tree, classes: Mapping[str, str], parent: str, problem: Problem) -> None:
    where = f"{parent}/" if parent else "it"
    if not classes:
        raise problem(f"{where} contains no folders. {MAKE_FOLDERS}{_hint(tree, tree.scan(parent))}")
    if len(classes) == 1:
        ((name, path),) = classes.items()
        inner = tree.scan(path)
        if len(inner.folders) > 1 and not inner.images:
            below = printable(a_few(list(inner.folders)))
            raise problem(
                f"{where} contains only {printable(name)}/, with {below} in it. If these are the classes, use:"
                f" --dataset {_path(tree, path)}"
            )
        hint = _hint(tree, inner, tree.scan(parent))
        raise problem(f"only one class, {printable(name)}. Add a folder for each other class.{hint}")


def _hint(tree: Tree, *contents: Contents) -> str:
    """A hint if the labels seem to be in file names or in a table."""
    names = Counter(re.sub(r"[\W\d_]+$", "", Path(image).stem) for image in contents[0].images)
    names_hint = table_hint = ""
    if len(names) > 1 and "" not in names and min(names.values()) > 1:
        first = printable(a_few(sorted(names)))
        names_hint = f" The file names begin with {first}: if these are the classes, make folders with these names."
    skipped = [name for folder in (*contents, tree.scan("")) for name, _ in folder.skipped]
    tables = [name for name in skipped if name.lower().endswith(TABLES)]
    if tables:
        table_hint = f" {printable(tables[0])} is not read: folders are the classes."
    return names_hint + table_hint


def _strays(contents: Contents) -> list[tuple[str, str]]:
    """The files next to class folders."""
    others = [(name, IN_NO_CLASS if reason == NO_IMAGE else reason) for name, reason in contents.skipped]
    return [*others, *((name, IN_NO_CLASS) for name in contents.images)]


def _number(names: Iterable[str], problem: Problem) -> dict[str, int]:
    """The label of each name's key. Raises if two names would be the same on other systems."""
    labels: dict[str, int] = {}
    known: dict[str, str] = {}
    for label, name in enumerate(names):
        if (other := known.setdefault(_key(name), name)) != name:
            raise problem(
                f"the classes {other!a} and {name!a} differ only in case or Unicode form, which other systems ignore."
                " Rename or merge them."
            )
        labels[_key(name)] = label
    return labels


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", printable(name)).lower()  # models store printable names


def _path(tree: Tree, path: str) -> str:
    return printable(str(tree.path / path))


def a_few(names: Sequence[str]) -> str:
    """`cat, dog, cow and 2 more`."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
