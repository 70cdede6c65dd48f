"""Who may import whom: an edge that is not in this table is a decision, to be made here."""

import ast
from pathlib import Path

from mnist.config import PROJECT_FOLDER

ALLOWED = {
    "__init__": {"predict"},
    "errors": set(),
    "config": {"errors"},
    "recipes": {"config"},
    "transforms": set(),
    "models": set(),
    "optim": set(),
    "metrics": set(),
    "predict": {"errors", "handwriting", "hub", "images", "saved_model", "transforms"},
    "hub": {"errors", "saved_model"},
    "images": {"errors"},
    "handwriting": set(),
    "evaluation": {"data", "metrics", "storage"},
    "hardware": set(),
    "gradients": set(),
    "distributed": {"errors"},
    "environment": {"config", "hardware"},
    "terminal": {"config", "evaluation"},
    "record": {"errors"},
    "pictures": {"record"},
    "report": {"pictures", "record", "storage"},
    "cli": {
        *("config", "data", "draw", "errors", "evaluation", "hardware", "images", "metrics", "optim", "pictures"),
        *("predict", "record", "report", "transforms"),
    },
    "draw": {"errors"},
    "data": {"transforms", "errors"},
    "progress": {"errors", "hardware", "metrics"},
    "storage": {"errors"},
    "interruption": set(),
    "checkpoint": {
        *("config", "distributed", "errors", "interruption", "progress", "run", "saved_model", "storage"),
    },
    "saved_model": {"data", "errors", "models", "storage"},
    "run": {"config", "distributed", "errors", "interruption", "storage"},
    "tracking": {"data", "errors", "record", "wandb_run"},
    "wandb_run": {"errors", "interruption", "record"},
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
            names |= {f"mnist.{alias.name}" for alias in node.names if node.module == "mnist"}
    return names


def test_imports_go_only_the_ways_that_are_allowed() -> None:
    found = {
        path.stem: {name.removeprefix("mnist.") for name in imports(path) if name.startswith("mnist.")}
        for path in (PROJECT_FOLDER / "mnist").glob("*.py")
    }
    assert found.keys() == ALLOWED.keys()
    for module, siblings in found.items():
        assert siblings <= ALLOWED[module], f"mnist/{module}.py imports {sorted(siblings - ALLOWED[module])}"


def test_only_one_module_knows_wandb_and_only_train_builds_the_accelerator() -> None:
    for path in [PROJECT_FOLDER / "train.py", *(PROJECT_FOLDER / "mnist").glob("*.py")]:
        assert "wandb" not in imports(path) or path.stem == "wandb_run"
        assert "Accelerator(\n" not in path.read_text(encoding="utf-8") or path.name == "train.py"
