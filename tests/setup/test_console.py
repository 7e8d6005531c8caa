"""Every command line goes through `console.command`, which keeps a console's encoding from ending
it; what that does is tested with predict.py. Its usage names it by `console.program`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [
    path
    for folder in ("projects/DynamicDINO/dynamic_dino", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "ArgumentParser(" in (text := path.read_text(encoding="utf-8")) and "def main(" in text
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_programs_take_any_console(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    ours = "dynamic_dino/" in path.as_posix().rpartition("projects")[2]
    if not ours and not any(module.startswith("dynamic_dino.") for module in modules):
        pytest.skip("prints nothing of the data's")
    parsers = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    parsers = [n for n in parsers if ast.unparse(n.func).endswith("ArgumentParser")]
    if ours:
        assert all("prog=program()" in ast.unparse(parser) for parser in parsers)
    [main] = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert "command" in [d.id for d in main.decorator_list if isinstance(d, ast.Name)]
