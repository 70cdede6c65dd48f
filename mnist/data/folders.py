"""What lies in a person's folder of images, before any of them is opened.

    folder = find_files("PetImages")
    folder.class_names, folder.files       # ("Cat", "Dog"), [File("Cat/0.jpg", 0, "train", ...), ...]
    folder.skipped                         # [("Cat/Thumbs.db", "left by a system"), ...]

layout.py says which folders are classes. Images may lie deeper in them. Links are followed, each real file once.
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

    name: str  # below the folder, with slashes
    label: int
    part: str  # "train", "val" or "test", where the folder says so
    stamp: tuple[int, ...]  # by which a change of it is noticed


@dataclass
class Folder:
    """What a walk through a folder finds, before any image is opened."""

    path: Path  # without links
    class_names: tuple[str, ...] = ()
    files: list[File] = field(default_factory=list)  # sorted by name
    is_split: bool = False  # into train/ and test/ or val/, or all three
    skipped: list[tuple[str, str]] = field(default_factory=list)  # what is no image, and why
    notes: list[str] = field(default_factory=list)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.flag}: {problem}")

    @property
    def flag(self) -> str:
        """How messages begin."""
        return f"--dataset {printable(str(self.path))}"


def find_files(path: str | Path, class_names: Sequence[str] | None = None) -> Folder:
    """Walk through a folder of images; raises ConfigError where it is no data set.

    `class_names` are those of a model that is to be tested on it: the folder may lack some of them.
    """
    folder = Folder(Path(path).resolve())
    if not folder.path.exists():
        raise folder.error("no such folder. If it has moved, name its new place: --dataset PATH")
    if not folder.path.is_dir():
        raise folder.error("a file, where a folder with one folder per class is needed.")
    tree = Tree(folder.path)
    try:
        layout = find_layout(tree, folder.error, class_names)
        walk = Walk(tree)
        walk.classes([(part, label, name) for part, named in layout.parts.items() for label, name in named.items()])
        files = [File(name, label, part, _stamp(folder.path / name)) for part, label, name in walk.found]
    except OSError as error:
        where = printable(str(error.filename or folder.path))
        raise UserError(f"{folder.flag}: {where} cannot be read: {error.strerror}.") from error
    folder.class_names, folder.is_split = layout.class_names, "test" in layout.parts
    folder.files = sorted(files)  # by name, whatever classes a model numbers: so their decoded pixels are the same file
    folder.skipped = [*layout.skipped, *walk.skipped]
    folder.notes = layout.notes
    if walk.outside:
        folder.notes.append(f"links that lead out of the folder are followed: {printable(a_few(walk.outside))}")
    _check_images(folder, layout, class_names is None)
    return folder


def _check_images(folder: Folder, layout: Layout, trains: bool) -> None:
    """Raise ConfigError where a class to train on, or all that is to be tested on, has no image."""
    counts = Counter((file.part, file.label) for file in folder.files)
    for label, name in layout.parts.get("train", {}).items():
        if trains and not counts["train", label]:
            raise folder.error(f"{_holds_none(folder, name)}. Put some there, or remove it.")
    if not folder.files:
        raise folder.error("its folders hold no image.")
    if folder.is_split and not any(file.part == "test" for file in folder.files):
        raise folder.error(f"{_holds_none(folder, layout.splits['test'])}. Put some there, or remove it.")


def _holds_none(folder: Folder, name: str) -> str:
    below = [it for it in folder.skipped if it[0] == name or it[0].startswith(f"{name}/")]
    return f"{printable(name)}/ holds no image{f', only what is skipped: {reasons(below)}' if below else ''}"


class Walk:
    """The images of the classes, each real file once: what is there itself comes before what links lead to."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.found: list[tuple[str, int, str]] = []  # part, label and name of an image
        self.links: list[tuple[str, int, str]] = []  # the same of a link to an image or a folder
        self.skipped: list[tuple[str, str]] = []
        self.outside: list[str] = []  # links that lead out of the data set
        self.folders: set[str] = set()  # real paths of those that were walked through: so circles end
        self.files: set[str] = set()  # real paths of the images, once there are links to compare with

    def classes(self, classes: Sequence[tuple[str, int, str]]) -> None:
        """Walk through the folders of the classes: (part, label, name of the folder)."""
        self.links = [it for it in classes if os.path.islink(self.tree.path / it[2])]
        for it in classes:
            if it not in self.links:
                self._below(*it)
        if self.links:
            self.files.update(self.tree.real(name) for _, _, name in self.found)
        for part, label, name in self.links:  # which grows, where a link leads to a folder with links
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
            self.links += [(part, label, it) for it in (*own, *contents.images) if it in links]
            self.found += [(part, label, it) for it in contents.images if it not in links]
            to_do += [it for it in own if it not in links]

    def _follow(self, part: str, label: int, link: str) -> None:
        real, count = self.tree.real(link), len(self.found)
        if self.tree.path.is_relative_to(real):
            self.skipped.append((link, "a link to a folder around the data set"))
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
            self.skipped.append((link, "a link to what is read already"))


def _stamp(path: Path) -> tuple[int, ...]:
    """Size, time of the last change, and mode: a file that was forbidden may have become readable."""
    try:
        found = path.stat()
    except OSError:  # a link to nothing, say: counted with those that cannot be read
        return ()
    return (found.st_size, found.st_mtime_ns, found.st_mode)


def reasons(skipped: Any) -> str:
    """(name, reason) -> `an empty file (2), hidden (1)`, without what differs from one file to the next."""
    kinds = Counter(re.split(r" \(|; |, or ", re.sub(r"^\d+ x \d+ (is |pixels, )?", "", it))[0] for _, it in skipped)
    return ", ".join(f"{kind} ({count:,})" for kind, count in kinds.most_common())
