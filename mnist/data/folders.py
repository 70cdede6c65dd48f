"""What lies in a person's folder of pictures, before any of them is opened.

    folder = find_files("PetImages")
    folder.class_names, folder.files       # ("Cat", "Dog"), [File("Cat/0.jpg", 0, "train", ...), ...]
    folder.skipped                         # [("Cat/Thumbs.db", "left by a system"), ...]

The folder holds a folder a class, or train/ and test/ (or val/) with a folder a class in each. Images may lie deeper.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mnist.data.images import IMAGE_SUFFIXES, printable
from mnist.errors import ConfigError, UserError

PARTS = {  # how a split's folders are called
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
LINK_OUT = "a link that leads out of the folder"
LEFT_BY_SYSTEMS = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"}


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
    files: list[File] = field(default_factory=list)  # sorted by part, class and name
    is_split: bool = False  # into train/ and test/ or val/, or all three
    skipped: list[tuple[str, str]] = field(default_factory=list)  # what is no image, and why
    notes: list[str] = field(default_factory=list)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.flag}: {problem}")

    @property
    def flag(self) -> str:
        """How messages begin."""
        return f"--dataset {printable(str(self.path))}"


def find_files(path: str | Path) -> Folder:
    """Walk through a folder of pictures; raises ConfigError where it is no data set."""
    folder = Folder(Path(path).resolve())
    if not folder.path.exists():
        raise folder.error("no such folder. Where it lies elsewhere now, name it there: --dataset PATH")
    if not folder.path.is_dir():
        raise folder.error("a file, where a folder with a folder a class is needed.")
    try:
        _find_classes(folder)
    except OSError as error:
        where = printable(str(error.filename or folder.path))
        raise UserError(f"{folder.flag}: {where} cannot be read: {error.strerror}.") from error
    return folder


def _find_classes(folder: Folder) -> None:
    top = _subfolders(folder, "")
    if linked := [name for name, reason in folder.skipped if reason == LINK_OUT]:
        folder.notes.append(f"left out, for they are links that lead out of the folder: {printable(a_few(linked))}")
    called = {PARTS[name.lower()]: name for name in sorted(top, reverse=True) if name.lower() in PARTS}
    test_part = "test" if "test" in called else "val"
    if {"train", test_part} <= called.keys():
        folder.is_split = True
        parts = {part: _subfolders(folder, called[part]) for part in ("train", "val", "test") if part in called}
        if others := sorted(top.keys() - {called[part] for part in parts}):
            read = "/, ".join(called[part] for part in parts)
            folder.notes.append(f"beside {read}/, not read: {printable(', '.join(others))}")
    elif top and len(called) == len(top):
        raise folder.error(
            f"{'/, '.join(sorted(top))}/ is there, but not both train/ and test/ (or val/). Put the images to train on"
            " and those to test on there; or name the folder in which the classes are, and a share is taken for"
            f" testing: --dataset {printable(str(folder.path / min(top)))}"
        )
    else:
        parts = {"train": top}
    names = sorted(parts["train"])
    folder.class_names = tuple(printable(name) for name in names)
    if not names:
        place = called["train"] + "/" if folder.is_split else "it"
        raise folder.error(
            f"{place} holds no folders. Make a folder for each class, and put the images of the class there."
        )
    if len(names) == 1:
        raise folder.error(f"one class only, {printable(names[0])}: there is nothing to tell apart. Add a folder.")
    for part, classes in parts.items():
        if missing := sorted(set(classes) - set(names)):
            raise folder.error(
                f"{part}/ has classes that train/ lacks: {printable(a_few(missing))}. Training cannot learn them:"
                " move them out of there, or add images of theirs to train/."
            )
    for part, classes in parts.items():
        for label, name in enumerate(names):
            found = sorted(_images_below(folder, classes[name])) if name in classes else []
            # what is called val/ beside train/ alone is what to test on
            role = part if test_part == "test" or part == "train" else "test"
            folder.files += [File(it, label, role, _stamp(folder.path / it)) for it in found]
            if not found and part == "train":
                below = [it for it in folder.skipped if it[0].startswith(f"{classes[name]}/")]
                raise folder.error(
                    f"{printable(classes[name])}/ holds no image"
                    f"{f', only what is skipped: {reasons(below)}' if below else ''}. Put some there, or remove it."
                )
    if folder.is_split and not any(file.part == "test" for file in folder.files):
        raise folder.error(f"{test_part}/ holds no image of a class. Put some there, or remove it.")


def _subfolders(folder: Folder, parent: str) -> dict[str, str]:
    """The folders in a folder: their names -> where they are below the data set's. Its files are noted as skipped."""
    found = {}
    for entry in _entries(folder, parent):
        if os.path.isdir(entry.path):
            found[entry.name] = _below(parent, entry.name)
        else:
            folder.skipped.append((_below(parent, entry.name), "in no class's folder"))
    return found


def _images_below(folder: Folder, top: str) -> Iterator[str]:
    """The names of what should be an image in a folder and below."""
    seen, to_do = set(), [top]
    while to_do:
        parent = to_do.pop()
        real = os.path.realpath(folder.path / parent)
        if real in seen:  # links may go in circles
            continue
        seen.add(real)
        for entry in _entries(folder, parent):
            name = _below(parent, entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                to_do.append(name)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield name
            else:
                folder.skipped.append((name, "not called as images are"))


def _entries(folder: Folder, parent: str) -> Iterator["os.DirEntry[str]"]:
    """What is in a folder, but for what has no business there, which is noted as skipped."""
    with os.scandir(folder.path / parent) as entries:
        for entry in entries:
            reason = None
            if entry.name.startswith("."):
                reason = "hidden"
            elif entry.name.lower() in LEFT_BY_SYSTEMS:
                reason = "left by a system"
            elif entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(folder.path):
                reason = LINK_OUT
            if reason is None:
                yield entry
            else:
                folder.skipped.append((_below(parent, entry.name), reason))


def _below(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


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


def a_few(names: Sequence[str]) -> str:
    """`cat, dog, cow and 2 more`."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
