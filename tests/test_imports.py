"""Who may import whom: the rooms of the house in their order, each allowed to import only from those before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

from mnist.config.settings import PROJECT_FOLDER

ROOMS = (
    "errors",
    "files",
    "config",
    "launch",
    "data",
    "models",
    "runs",
    "training",
    "tracking",
    "reporting",
    "inference",
    "session",
    "cli",
    "__main__",
)
PACKAGE = PROJECT_FOLDER / "mnist"


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """`data` of `mnist.data.loader.Split`."""
    return module.split(".")[1]


def test_a_room_imports_only_from_those_before_it() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]  # which is above all of them
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in paths} == set(ROOMS)
    for path in paths:
        own = ROOMS.index(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
        for module in imports(path):
            if module.startswith("mnist."):
                assert ROOMS.index(room(module)) <= own, f"{path} imports {module}"


def test_each_room_says_in_one_line_what_it_is_for() -> None:
    for package in PACKAGE.glob("*/__init__.py"):
        tree = ast.parse(package.read_text(encoding="utf-8"))
        assert len(tree.body) == 1  # no imports, so that what needs one module loads one
        docstring = ast.get_docstring(tree)
        assert docstring is not None, package
        assert "\n" not in docstring, package


def calls(path: Path) -> set[str]:
    """The names that a file calls, but for those with a dot."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def test_only_one_module_knows_wandb_and_only_what_composes_builds_an_accelerator() -> None:
    paths = [PROJECT_FOLDER / "train.py", *PACKAGE.rglob("*.py")]
    assert {path.stem for path in paths if any(it.startswith("wandb") for it in imports(path))} == {"wandb_run"}
    assert {path.stem for path in paths if {"Accelerator", "LeanAccelerator"} & calls(path)} == {"session", "cli"}
