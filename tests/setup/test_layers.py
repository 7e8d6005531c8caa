"""The stair: a package imports what stands below it, never the other way round."""

import ast
from pathlib import Path

import dynamic_dino

PACKAGE = Path(dynamic_dino.__file__).parent
# From the ground up; packages of one row import neither each other nor what stands above.
STAIR = [
    {"files", "sources", "renamed"},
    {"config", "moe"},
    {"modeling"},
    {"checkpoint", "data"},
    {"evaluation"},
    {"engine"},
    {"serving"},
    {"analysis"},
    {"demo", "__init__"},
]


def imported(path: Path) -> set[str]:
    """The packages and modules below `dynamic_dino` that a file imports, also within functions."""
    package = ("dynamic_dino", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        found |= {n.split(".")[1] for n in names if n.startswith("dynamic_dino.")}
    return found


def test_no_import_climbs():
    floor = {name: height for height, row in enumerate(STAIR) for name in row}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(path) - {room}:
            assert floor.get(other, -1) < floor[room], f"{path} imports {other}, which is above it"
