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
    "models": {"errors"},  # a network that does not take images of some size says so
    "optim": set(),
    "metrics": set(),
    "predict": {"errors", "handwriting", "hub", "images", "saved_model", "transforms"},
    "hub": {"errors", "saved_model"},
    "images": {"errors"},
    "handwriting": set(),
    "evaluation": {"data", "metrics", "storage"},
    "hardware": set(),
    "distributed": {"errors"},
    "compiled": {"errors"},
    "environment": {"config", "hardware"},
    "terminal": {"config", "evaluation"},
    "record": {"errors"},
    "pictures": {"record"},
    "report": {"pictures", "record", "storage"},
    "cli": {
        *(
            "config",
            "data",
            "draw",
            "errors",
            "evaluation",
            "folders",
            "hardware",
            "images",
            "metrics",
            "optim",
            "pictures",
        ),
        *("datasets", "export", "predict", "record", "report", "transforms"),
    },
    "draw": {"errors"},
    "export": {"errors", "predict", "storage", "transforms"},
    "data": {"transforms", "errors", "hardware"},  # where the images lie depends on the memory that is free there
    "datasets": {"data", "decoding", "errors", "folders", "images"},
    "decoding": {"data", "errors", "folders", "hardware", "images", "storage"},
    "folders": {"errors", "images"},
    "profiling": {"progress"},
    "progress": {"errors", "hardware", "metrics"},
    "storage": {"errors"},
    "interruption": set(),
    "command_line": {"config", "errors"},
    "process": {"command_line", "config", "distributed", "errors", "interruption"},
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


def calls(path: Path) -> set[str]:
    """The names that a file calls, but for those with a dot."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def test_only_one_module_knows_wandb_and_only_what_composes_builds_an_accelerator() -> None:
    paths = [PROJECT_FOLDER / "train.py", *(PROJECT_FOLDER / "mnist").glob("*.py")]
    assert {path.stem for path in paths if "wandb" in imports(path)} == {"wandb_run"}
    assert {path.stem for path in paths if {"Accelerator", "LeanAccelerator"} & calls(path)} == {"train", "cli"}
