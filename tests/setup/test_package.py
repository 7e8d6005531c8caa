"""What `pip install .` installs: every source file, recipe and data file, and nothing else; and the
command `dynamic-dino`."""

import argparse
import ast
import configparser
import email
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from dynamic_dino import cli, console

ROOT = Path(__file__).parents[2]
SOURCES = {  # where a folder of the checkout lands in the wheel
    "projects/DynamicDINO/dynamic_dino": "dynamic_dino",
    "configs": "dynamic_dino/configs",
    "kernels/dynamic_dino_kernels": "dynamic_dino_kernels",
}
DATA = {".py", ".json", ".html", ".safetensors", ".typed"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, because building leaves files beside setup.py; with a data file of each kind."""
    copy = tmp_path_factory.mktemp("checkout")
    named = (ROOT / "MANIFEST.in").read_text().split("include ")[1].splitlines()[0].split()
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", *named):
        shutil.copy(ROOT / file, copy)
    skip = shutil.ignore_patterns("__pycache__")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    package = copy / "projects/DynamicDINO/dynamic_dino"
    (package / "weights").mkdir(exist_ok=True)
    (package / "weights/drawn.safetensors").write_bytes(b"drawn")
    (package / "data/synthetic/stamps/drawn.json").write_text("{}")
    (copy / "configs/drawn/recipe.py").parent.mkdir()
    (copy / "configs/drawn/recipe.py").write_text("x = 1\n")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """Made of the source distribution, so that what is in it was in that too."""
    folder = tmp_path_factory.mktemp("wheel")
    sdist = [sys.executable, "setup.py", "--quiet", "sdist", f"--dist-dir={folder}"]
    subprocess.run(sdist, cwd=checkout, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*build, f"--wheel-dir={folder}", archive.with_suffix("").with_suffix("")], check=True
    )
    (path,) = folder.glob("dynamic_dino-*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.mark.slow
def test_wheel_holds_every_source_and_data_file_and_no_stray_package(checkout, wheel):
    names = set(wheel.namelist())
    expected = {
        f"{target}/{file.relative_to(checkout / source).as_posix()}"
        for source, target in SOURCES.items()
        for file in (checkout / source).rglob("*")
        if file.suffix in DATA
    }
    packaged = {name for name in names if ".dist-info/" not in name}
    assert expected - packaged == set()
    assert {name.split("/")[0] for name in packaged} == {"dynamic_dino", "dynamic_dino_kernels"}


def test_console_scripts_exist(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    config = configparser.ConfigParser()
    config.read_string(wheel.read(entry_points).decode())
    scripts = dict(config["console_scripts"])
    assert "dynamic-dino" in scripts
    assert set(scripts) - {"dynamic-dino"} == {
        f"dynamic-dino-{name}" for name in ("train", "predict", "finetune")
    }
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_metadata_says_what_it_is(wheel):
    import dynamic_dino
    import dynamic_dino_kernels

    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["License"] == "Apache-2.0" or metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(decode=True).decode().startswith("# Dynamic-DINO")
    assert metadata["Version"] == dynamic_dino.__version__ == dynamic_dino_kernels.__version__
    assert metadata["Project-URL"] and metadata["Classifier"]


def test_command_lists_and_finds_programs_without_torch():
    code = "import sys; from dynamic_dino.cli import main; main(['--help']); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, modules = run.stdout.splitlines()
    assert not {"torch", "numpy", "PIL"} & set(modules.split())
    for name, program in cli.PROGRAMS.items():
        assert any(line.split()[:1] == [name] and program.does in line for line in lines)
        file = ROOT / "projects/DynamicDINO/dynamic_dino" / (program.module.replace(".", "/"))
        tree = ast.parse(file.with_suffix(".py").read_text(encoding="utf-8"))
        assert "main" in [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]


def test_command_answers_what_it_cannot_run(monkeypatch, capsys):
    assert cli.main(["exprot", "nano-x16"]) == 2
    assert "did you mean export?" in capsys.readouterr().err
    given = []
    monkeypatch.setattr(cli, "import_module", lambda *_: argparse.Namespace(main=given.append))
    assert cli.main(["check", "mine"]) == 0 and given == [["check", "mine"]]


@pytest.mark.parametrize("name", ["serve", "predict", "finetune", "install-detectron2"])
def test_usage_names_what_was_typed(name, capsys):
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert f"usage: dynamic-dino {name} " in capsys.readouterr().out
    assert console.program() is None  # of pytest, or what comes next, nothing is said
    with pytest.raises(SystemExit):
        cli.run(name, ["--no-such-option"])
    assert "dynamic-dino" not in capsys.readouterr().err.split()[1]


NOT_THERE = """
import sys
class Nobody:
    def find_spec(name, path=None, target=None):
        if name == "detectron2":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Nobody)
"""


REMEDY = "Detectron2 is not installed: `dynamic-dino install-detectron2`"
USER = """
import sys
hook = sys.excepthook
from dynamic_dino.console import named_remedy
try:
    with named_remedy():
        import dynamic_dino.evaluation
except ModuleNotFoundError as error:
    print(error)
    print(error.name, sys.excepthook is hook)
from dynamic_dino.cli import main
main(["evaluate"])
"""


@pytest.mark.parametrize("started", [["-m", "dynamic_dino.evaluation"], ["-c", USER]])
def test_without_detectron2_programs_say_how_to_install_it(started, tmp_path, monkeypatch):
    """Also where a package's own imports fail, before any of a program's lines is run; what uses
    the package gets an exception, and its process stays as it was."""
    (tmp_path / "sitecustomize.py").write_text(NOT_THERE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    run = subprocess.run([sys.executable, *started], capture_output=True, text=True)
    assert run.returncode == 2
    assert re.fullmatch(f"error: {REMEDY}.*\n", run.stderr), run.stderr
    if "-c" in started:
        message, unchanged = run.stdout.splitlines()
        assert message.startswith(REMEDY) and unchanged == "detectron2 True"
