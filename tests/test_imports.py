"""Imports point one way, and what can do without torch does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fate_moe

ROOT = Path(fate_moe.__file__).parent

# Each room may import from the rooms of the lines above its own, and from itself.
ORDER = [
    {"errors", "core", "demo", "machine", "switches", "units"},
    {"turns"},
    {"quant"},
    {"io"},
    {"kernels"},
    {"adapter"},
    {"checkpoints"},
    {"store", "memory"},
    {"journal", "predict"},
    {"gpu", "runtime"},
    {"registry"},
    {"config", "trace"},
    {"layers"},
    {"engine"},
    {"schedule"},
    {"tools"},
    {"serve"},
    {"cli", "__init__"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# A module, or what is in it, written as a string.
BY_STRING = re.compile(r"fate_moe(\.\w+)+(:\w+)?")
FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Rooms that the file imports from, at any depth of its code: for type checkers alone and by string count too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the way"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and BY_STRING.fullmatch(node.value):
            names = [node.value.replace(":", ".")]  # importlib.import_module("fate_moe.x"), "fate_moe.x:name" of a registry
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("fate_moe.") and name.split(".")[1] in LEVEL}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    assert room in LEVEL, f"{room} has no place in the order of rooms"
    for other in imports_of(path) - {room}:
        same_level_of_nouns = LEVEL[other] == LEVEL[room] == 0
        assert LEVEL[other] < LEVEL[room] or same_level_of_nouns, f"{room} imports {other}"


def test_core_and_errors_import_nothing_of_ours() -> None:
    assert imports_of(ROOT / "core.py") == imports_of(ROOT / "errors.py") == set()


@pytest.mark.parametrize(
    "name",
    [
        "fate_moe",
        "fate_moe.config",
        "fate_moe.core",
        "fate_moe.errors",
        "fate_moe.registry",
        "fate_moe.switches",
        "fate_moe.units",
        "fate_moe.kernels.extension",
        "fate_moe.cli",
        "fate_moe.memory.policies",
        "fate_moe.predict.prefetcher",
        "fate_moe.trace.simulate",
        "fate_moe.memory.statistics",
        "fate_moe.demo",
    ],
)
def test_no_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_are_small() -> None:
    lengths = sorted(len(path.read_text().splitlines()) for path in FILES)
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] < 150
