"""Who may import whom: an edge that is not in this table is a decision, to be made here."""

import ast
from pathlib import Path

from mnist.config import PROJECT_FOLDER

ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "config": {"errors"},
    "recipes": {"config"},
    "transforms": set(),
    "models": set(),
    "optim": set(),
    "metrics": set(),
    "hardware": set(),
    "gradients": set(),
    "distributed": {"errors", "hardware"},
    "terminal": {"config"},
    "report": set(),
    "data": {"transforms", "errors"},
    "progress": {"metrics", "errors"},
    "storage": {"errors"},
    "interruption": set(),
    "checkpoint": {"data", "distributed", "errors", "interruption", "models", "progress", "storage"},
    "run": {"config", "distributed", "errors", "interruption", "storage"},
    "tracking": {"errors"},
}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def test_imports_go_only_the_ways_that_are_allowed() -> None:
    found = {
        path.stem: {name.removeprefix("mnist.") for name in imports(path) if name.startswith("mnist.")}
        for path in (PROJECT_FOLDER / "mnist").glob("*.py")
    }
    assert found.keys() == ALLOWED.keys()
    for module, siblings in found.items():
        assert siblings <= ALLOWED[module], f"mnist/{module}.py imports {sorted(siblings - ALLOWED[module])}"


def test_only_tracking_knows_wandb_and_only_train_builds_the_accelerator() -> None:
    for path in [PROJECT_FOLDER / "train.py", *(PROJECT_FOLDER / "mnist").glob("*.py")]:
        assert "wandb" not in imports(path) or path.stem == "tracking"
        assert "Accelerator(\n" not in path.read_text(encoding="utf-8") or path.name == "train.py"
