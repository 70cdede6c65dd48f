"""Which folders of a data set are classes, and which are splits into training, validation and test images.

    layout = find_layout(Tree(Path("PetImages")), error)
    layout.parts        # {"train": {0: "train/Cat", 1: "train/Dog"}, "test": {0: "test/Cat", ...}}

The folder holds a folder for each class, or a folder for each split with those of the classes in it. Splits are known
by their names in any spelling (train, Training, seg_train, train_images). What may be meant in two ways is refused.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
FILLING = r"(set|sets|data|images|imgs|folder|split)?"  # what may follow: trainset
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}
OURS = "written by this project"
CHILDREN_LOOKED_AT = 5  # of a folder that may be one of runs
TABLES = (".csv", ".tsv", ".xls", ".xlsx")
NO_IMAGE, IN_NO_CLASS = "not called as images are", "in no class's folder"
MAKE_FOLDERS = "Make a folder for each class, and put the images of the class there."
MOST_DESCENTS = 3


class Contents(NamedTuple):
    """What is in one folder; all names begin at the folder of the data set."""

    folders: dict[str, str]  # by their own names, sorted
    images: list[str]  # what is called as images are, sorted
    skipped: list[tuple[str, str]]  # the rest, and why
    links: set[str]  # those of the folders and images that are links


class Tree:
    """A folder, looked into as far as somebody asks, and only once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Contents] = {}

    def scan(self, name: str) -> Contents:
        """What is in the folder `name`, "" for the top. Raises OSError."""
        if name not in self.known:
            self.known[name] = self._scan(name)
        return self.known[name]

    def _scan(self, name: str) -> Contents:
        found = Contents({}, [], [], set())
        with os.scandir(self.path / name) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                below = f"{name}/{entry.name}" if name else entry.name
                is_link = entry.is_symlink()
                if entry.name.startswith("."):
                    found.skipped.append((below, "hidden"))
                elif entry.name.lower() in LEFT_BY_SYSTEMS:
                    found.skipped.append((below, "left by a system"))
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
        """Whether the folder `name` is a run, a folder of runs, or one of decoded images."""
        try:
            contents = self.scan(name)
        except OSError:  # it may be none that anybody reads
            return False
        runs = [name, *list(contents.folders.values())[:CHILDREN_LOOKED_AT]]
        is_cache = not contents.images and any(file.endswith(".u8") for file, _ in contents.skipped)
        return is_cache or any(
            (self.path / run / "config.yaml").is_file() and (self.path / run / "state.json").is_file() for run in runs
        )

    def real(self, name: str) -> str:
        return os.path.realpath(self.path / name)


Problem = Callable[[str], Exception]  # makes an error that names the data set


@dataclass
class Layout:
    """The folders of the classes."""

    class_names: tuple[str, ...]
    parts: dict[str, dict[int, str]]  # "train", "val", "test" -> label -> folder; "train" alone is not split yet
    splits: dict[str, str] = field(default_factory=dict)  # the splits -> their folders; empty where there are none
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_layout(tree: Tree, problem: Problem, class_names: Sequence[str] | None = None) -> Layout:
    """The layout of a data set. Raises `problem(...)` where it has none, or where more than one may be meant.

    `class_names` are those of a model to be tested on it: the folder may lack some of them, but has no others.
    """
    top = tree.scan("")
    ours = [name for name, place in top.folders.items() if tree.is_ours(place)]
    folders = {name: place for name, place in top.folders.items() if name not in ours}
    skipped, notes = [*_strays(top), *((name, OURS) for name in ours)], []
    if splits := _find_splits(tree, folders, problem, measures=class_names is not None):
        named = {part: tree.scan(place).folders for part, place in splits.items()}
        for place in splits.values():
            skipped += _strays(tree.scan(place))
        read = [place.split("/")[0] for place in splits.values()]
        if others := sorted(folders.keys() - set(read)):
            notes.append(f"beside {'/, '.join(read)}/, not read: {printable(', '.join(others))}")
    else:
        copies = _find_copies(tree, folders)
        notes += [f"not read: {printable(name)}/, which holds {inner} again" for name, inner in copies.items()]
        named = {"train": {name: place for name, place in folders.items() if name not in copies}}
        _refuse_same_folders(tree, named["train"], problem)
    if class_names is None:
        _refuse_fewer_than_two(tree, named["train"], splits.get("train", ""), problem)
        class_names = sorted(named["train"])
        lacks = "train/ lacks", "Training cannot learn them: move them away, or add images of theirs to train/"
    else:
        if not any(named.values()):
            raise problem(f"it holds no folders. {MAKE_FOLDERS}{_hint(tree, top)}")
        lacks = "the model does not know", f"It knows {printable(', '.join(class_names))}"
    labels = _number(class_names, problem)
    parts: dict[str, dict[int, str]] = {}
    for part, classes in named.items():
        _number(classes, problem)
        if unknown := [name for name in classes if _key(name) not in labels]:
            where = f"{part}/ has" if splits else "it has"
            raise problem(f"{where} classes that {lacks[0]}: {printable(a_few(unknown))}. {lacks[1]}.")
        parts[part] = {labels[_key(name)]: place for name, place in classes.items()}
    return Layout(tuple(map(printable, class_names)), parts, splits, skipped, notes)


def _find_splits(tree: Tree, folders: Mapping[str, str], problem: Problem, measures: bool) -> dict[str, str]:
    """The folders that hold the folders of the classes, by split; none where the folders are the classes themselves.

    Where a model is to be measured, one split is enough.
    """
    meant = {name: part for name in folders if (part := _part_of(name))}
    with_classes: dict[str, dict[str, str]] = {}
    for name, part in meant.items():
        place = _descend(tree, folders[name], part)
        if tree.scan(place).folders:
            with_classes.setdefault(part, {})[name] = place
    found = {part: _choose(part, places, problem) for part, places in with_classes.items()}
    if "train" in found and len(found) > 1:
        if "test" not in found:  # what is called val/ beside train/ alone is what to test on
            found["test"] = found.pop("val")
        return {part: found[part] for part in PARTS if part in found}
    if measures and found and len(meant) == len(folders):
        return {"test": found.get("test") or found.get("val") or found["train"]}
    exact = {part for name, part in meant.items() if name.casefold() in WORDS[part]}
    if not meant or not (len(meant) == len(folders) or {"train"} < exact):
        return {}
    if "train" in found:
        empty = ", ".join(f"{name}/" for name in sorted(meant) if meant[name] != "train")
        lacking = f"{empty} holds no folders of classes" if empty else "train/ is there, but no test/ (or val/)"
        raise problem(
            f"{lacking}. Add them, or let a share of each class be tested on: --dataset {_path(tree, found['train'])}"
        )
    flat = [name for name, part in meant.items() if part == "train"]
    if not flat:
        raise problem(
            f"{'/, '.join(sorted(meant))}/ is there, but no train/. Add it; or name the folder where the classes are,"
            f" and a share of each is taken for testing: --dataset {_path(tree, min(meant))}"
        )
    raise problem(f"{flat[0]}/ holds no folders. {MAKE_FOLDERS}{_hint(tree, tree.scan(folders[flat[0]]))}")


def _part_of(name: str) -> str | None:
    """The split that a folder's name means, in any spelling; None where it means none, or more than one."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    parts = {part for part, known in WORDS.items() for it in words if re.fullmatch(f"({'|'.join(known)}){FILLING}", it)}
    return parts.pop() if len(parts) == 1 else None


def _descend(tree: Tree, place: str, part: str) -> str:
    """As deep as a split lies: `seg_train/seg_train` of `seg_train`, where there is nothing else in it."""
    for _ in range(MOST_DESCENTS):
        contents = tree.scan(place)
        inner = list(contents.folders)
        if contents.images or len(inner) != 1 or part != _part_of(inner[0]):
            break
        place = contents.folders[inner[0]]
    return place


def _choose(part: str, places: Mapping[str, str], problem: Problem) -> str:
    """The one of several folders that mean the same split which is called exactly so."""
    names = [name for name in places if name.casefold() in WORDS[part]] if len(places) > 1 else list(places)
    if len(names) != 1:
        both = " and ".join(f"{printable(name)}/" for name in sorted(places)[:2])
        raise problem(f"{both} both seem to hold the {part} images. Rename the one that is meant to {part}/.")
    return places[names[0]]


def _find_copies(tree: Tree, folders: Mapping[str, str]) -> dict[str, str]:
    """Folders that hold nothing but folders called as those beside them, augmented copies perhaps; and these names."""
    found, keys = {}, {_key(name) for name in folders}
    for name, place in folders.items():
        contents = tree.scan(place)
        inner = {_key(it) for it in contents.folders}
        if len(inner) > 1 and not contents.images and inner <= keys and _key(name) not in inner:
            found[name] = printable(a_few([f"{it}/" for it in contents.folders]))
    return found


def _refuse_same_folders(tree: Tree, classes: Mapping[str, str], problem: Problem) -> None:
    """Raise where two folders hold no images but the same folders: splits without a name, as likely as classes."""
    inner = {name: tree.scan(place) for name, place in classes.items()}
    folders = {
        name: {_key(it) for it in contents.folders}
        for name, contents in inner.items()
        if len(contents.folders) > 1 and not contents.images
    }
    counts = Counter(key for keys in folders.values() for key in keys)
    shared = {name: {key for key in keys if counts[key] > 1} for name, keys in folders.items()}
    for one, other in combinations([name for name, keys in shared.items() if len(keys) > 1], 2):
        if len(shared[one] & shared[other]) >= max(2, min(len(folders[one]), len(folders[other])) / 2):
            same = sorted(it for it in inner[one].folders if _key(it) in folders[other])
            raise problem(
                f"{printable(one)}/ and {printable(other)}/ hold the same folders: {printable(a_few(same))}. If these"
                " are the classes, rename the two to train/ and test/, or name one of them:"
                f" --dataset {_path(tree, classes[one])}. If not, move the images out of them."
            )


def _refuse_fewer_than_two(tree: Tree, classes: Mapping[str, str], parent: str, problem: Problem) -> None:
    where = f"{parent}/" if parent else "it"
    if not classes:
        raise problem(f"{where} holds no folders. {MAKE_FOLDERS}{_hint(tree, tree.scan(parent))}")
    if len(classes) == 1:
        ((name, place),) = classes.items()
        inner = tree.scan(place)
        if len(inner.folders) > 1 and not inner.images:
            below = printable(a_few(list(inner.folders)))
            raise problem(
                f"{where} holds one folder only, {printable(name)}/, with {below} in it. If these are the classes, name"
                f" it: --dataset {_path(tree, place)}"
            )
        raise problem(
            f"one class only, {printable(name)}: there is nothing to tell apart. Add a folder."
            f"{_hint(tree, inner, tree.scan(parent))}"
        )


def _hint(tree: Tree, *contents: Contents) -> str:
    """Where else it may stand what the images show: in their names, in a table."""
    names = Counter(re.sub(r"[\W\d_]+$", "", Path(it).stem) for it in contents[0].images)
    names_hint = table_hint = ""
    if len(names) > 1 and "" not in names and min(names.values()) > 1:
        first = printable(a_few(sorted(names)))
        names_hint = f" The images' names begin with {first}: if these are the classes, make folders of these names."
    tables = [name for it in (*contents, tree.scan("")) for name, _ in it.skipped if name.lower().endswith(TABLES)]
    if tables:
        table_hint = f" {printable(tables[0])} is not read, whatever it says of the images: classes are folders."
    return names_hint + table_hint


def _strays(contents: Contents) -> list[tuple[str, str]]:
    """What lies beside the folders of classes."""
    others = [(name, IN_NO_CLASS if reason == NO_IMAGE else reason) for name, reason in contents.skipped]
    return [*others, *((name, IN_NO_CLASS) for name in contents.images)]


def _number(names: Iterable[str], problem: Problem) -> dict[str, int]:
    """Labels by the keys of names. Raises for names that are one and the same on other systems."""
    labels: dict[str, int] = {}
    known: dict[str, str] = {}
    for label, name in enumerate(names):
        if (other := known.setdefault(_key(name), name)) != name:
            raise problem(
                f"the classes {other!a} and {name!a} differ in case or Unicode form only, and are the same on other"
                " systems. Rename or merge them."
            )
        labels[_key(name)] = label
    return labels


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", printable(name)).lower()  # as a model that knows it has it


def _path(tree: Tree, place: str) -> str:
    return printable(str(tree.path / place))


def a_few(names: Sequence[str]) -> str:
    """`cat, dog, cow and 2 more`."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
