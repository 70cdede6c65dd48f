"""List the images of a folder and their classes, without opening any of them.

    folder = find_files("PetImages")
    folder.class_names, folder.files       # ("Cat", "Dog"), [File("Cat/0.jpg", 0, "train", ...), ...]
    folder.skipped                         # [("Cat/Thumbs.db", "system file"), ...]

layout.py decides which folders are classes. Images may be nested deeper. Links are followed, each real file once.
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mnist.data.layout import Layout, Tree, a_few, find_layout
from mnist.errors import ConfigError, UserError
from mnist.launch.streams import printable


class File(NamedTuple):
    """A file that should be an image."""

    name: str  # relative to the folder, with slashes
    label: int
    part: str  # "train", "val" or "test"; always "train" if the folder is not split
    stamp: tuple[int, ...]  # changes when the file changes


@dataclass
class Folder:
    """The files of a dataset."""

    path: Path  # resolved
    class_names: tuple[str, ...] = ()
    files: list[File] = field(default_factory=list)  # sorted by name
    is_split: bool = False  # into train/ and test/ or val/, or all three
    skipped: list[tuple[str, str]] = field(default_factory=list)  # name and reason
    notes: list[str] = field(default_factory=list)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.flag}: {problem}")

    @property
    def flag(self) -> str:
        """The start of messages."""
        return f"--dataset {printable(str(self.path))}"


def find_files(path: str | Path, class_names: Sequence[str] | None = None) -> Folder:
    """Walk a folder of images. Raises ConfigError if it is not a dataset, UserError if it cannot be read.

    To test a model, pass its `class_names`; the folder may lack some of them.
    """
    folder = Folder(Path(path).resolve())
    check_folder(folder)
    tree = Tree(folder.path)
    try:
        layout = find_layout(tree, folder.error, class_names)
        walk = Walk(tree)
        walk.classes([(part, label, name) for part, named in layout.parts.items() for label, name in named.items()])
        root = str(folder.path)
        files = [File(name, label, part, _stamp(os.path.join(root, name))) for part, label, name in walk.found]
    except OSError as error:
        where = printable(str(error.filename or folder.path))
        raise UserError(f"{folder.flag}: {where} cannot be read: {error.strerror}.") from error
    folder.class_names, folder.is_split = layout.class_names, "test" in layout.parts
    folder.files = sorted(files)  # by name and not by label, so every order of the classes shares one cache
    folder.skipped = [*layout.skipped, *walk.skipped]
    folder.notes = layout.notes
    if walk.outside:
        folder.notes.append(f"followed links that lead out of the folder: {printable(a_few(walk.outside))}")
    _check_images(folder, layout, class_names is None)
    return folder


def check_folder(folder: Folder) -> None:
    """Raise ConfigError if there is no such folder."""
    if not folder.path.exists():
        raise folder.error("no such folder. If it has moved, pass its new path: --dataset PATH")
    if not folder.path.is_dir():
        raise folder.error("a file, not a folder with one folder per class.")


def _check_images(folder: Folder, layout: Layout, trains: bool) -> None:
    """Raise ConfigError if a class to train on has no images, or if there are no images to test on."""
    counts = Counter((file.part, file.label) for file in folder.files)
    empty = [name for label, name in layout.parts.get("train", {}).items() if trains and not counts["train", label]]
    if not empty and not folder.files:
        raise folder.error("its folders contain no images.")
    if folder.is_split and not any(file.part == "test" for file in folder.files):
        empty.append(layout.splits["test"])
    for name in empty:
        below = [skipped for skipped in folder.skipped if skipped[0] == name or skipped[0].startswith(f"{name}/")]
        only = f", only skipped files: {reasons(below)}" if below else ""
        raise folder.error(f"{printable(name)}/ contains no images{only}. Add some or remove it.")


class Walk:
    """Collects the images of the classes, each real file once: under its own name rather than that of a link to it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.found: list[tuple[str, int, str]] = []  # part, label and name of an image
        self.links: list[tuple[str, int, str]] = []  # part, label and name of a link to an image or a folder
        self.skipped: list[tuple[str, str]] = []
        self.outside: list[str] = []  # links that lead out of the dataset
        self.folders: set[str] = set()  # real paths of visited folders, to end cycles
        self.files: set[str] = set()  # real paths of images, filled only if there are links

    def classes(self, classes: Sequence[tuple[str, int, str]]) -> None:
        """Walk the class folders, each given as (part, label, name)."""
        self.links = [entry for entry in classes if os.path.islink(self.tree.path / entry[2])]
        for class_folder in classes:
            if class_folder not in self.links:
                self._below(*class_folder)
        if self.links:
            self.files.update(self.tree.real(name) for _, _, name in self.found)
        for part, label, name in self.links:  # grows while linked folders contain links
            self._follow(part, label, name)

    def _below(self, part: str, label: int, top: str) -> None:
        to_do = [top]
        while to_do:
            name = to_do.pop()
            real = self.tree.real(name)
            if real in self.folders:
                continue
            self.folders.add(real)
            contents = self.tree.scan(name)
            self.skipped += contents.skipped
            links, own = contents.links, contents.folders.values()
            self.links += [(part, label, path) for path in (*own, *contents.images) if path in links]
            self.found += [(part, label, path) for path in contents.images if path not in links]
            to_do += [path for path in own if path not in links]

    def _follow(self, part: str, label: int, link: str) -> None:
        real, count = self.tree.real(link), len(self.found)
        if self.tree.path.is_relative_to(real):
            self.skipped.append((link, "link to a parent of the dataset"))
            return
        if not Path(real).is_relative_to(self.tree.path):
            self.outside.append(link)
        if os.path.isdir(real):
            known = real in self.folders
            self._below(part, label, link)
            self.files.update(self.tree.real(name) for _, _, name in self.found[count:])
        else:
            known = real in self.files
            self.files.add(real)
            self.found += [] if known else [(part, label, link)]
        if known:
            self.skipped.append((link, "link to a file or folder already read"))


def _stamp(path: str) -> tuple[int, ...]:
    """Size, modification time and mode (changed permissions may make a file readable); () for a dangling link."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return (status.st_size, status.st_mtime_ns, status.st_mode)


def reasons(skipped: Any) -> str:
    """(name, reason) pairs -> `an empty file (2), hidden (1)`, without details of individual files."""
    plain = (re.sub(r"^\d+ x \d+ (is |pixels, )?", "", reason) for _, reason in skipped)
    kinds = Counter(re.split(r" \(|; |, or ", reason)[0] for reason in plain)
    return ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())
