"""The order of the packages, each of which may import only from those before it, and the length of functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

from mnist.config.settings import PROJECT_FOLDER

ORDER = (
    *("errors", "files", "config", "launch", "data", "models", "runs", "training", "tracking", "reporting"),
    *("inference", "session", "verify", "cli", "__main__"),
)
PACKAGE = PROJECT_FOLDER / "mnist"


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, including those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_a_package_imports_only_from_those_before_it() -> None:
    paths = {path: path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    del paths[PACKAGE / "__init__.py"]
    assert set(paths.values()) == set(ORDER)
    for path, package in paths.items():
        for module in imports(path):
            if module.startswith("mnist."):
                assert ORDER.index(module.split(".")[1]) <= ORDER.index(package), f"{path} imports {module}"


def test_each_package_has_a_docstring_of_one_line_and_no_code() -> None:
    for package in PACKAGE.glob("*/__init__.py"):
        tree = ast.parse(package.read_text(encoding="utf-8"))
        assert len(tree.body) == 1  # importing one module must not load the others
        assert len((ast.get_docstring(tree) or "").splitlines()) == 1, package


def calls(path: Path) -> set[str]:
    """The names without a dot that a file calls."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def test_one_module_imports_wandb_and_two_build_accelerators() -> None:
    paths = [PROJECT_FOLDER / "train.py", *PACKAGE.rglob("*.py")]
    assert {path.stem for path in paths if any(name.startswith("wandb") for name in imports(path))} == {"wandb_run"}
    assert {path.stem for path in paths if {"Accelerator", "LeanAccelerator"} & calls(path)} == {"session", "cli"}


def test_no_function_is_longer_than_60_lines() -> None:
    for path in [PROJECT_FOLDER / "train.py", *PACKAGE.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
