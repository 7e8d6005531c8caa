"""What `pip install .` installs: every source file, recipe and data file, and nothing else."""

import configparser
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {  # where a folder of the checkout lands in the wheel
    "projects/DynamicDINO/dynamic_dino": "dynamic_dino",
    "configs": "dynamic_dino/configs",
    "kernels/dynamic_dino_kernels": "dynamic_dino_kernels",
}
DATA = {".py", ".json", ".safetensors", ".typed"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy, because building leaves files beside setup.py; with a data file of each kind."""
    copy = tmp_path_factory.mktemp("checkout")
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
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
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, f"--wheel-dir={folder}", str(checkout)], check=True)
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


def test_both_packages_and_the_distribution_have_one_version(checkout):
    import dynamic_dino
    import dynamic_dino_kernels

    command = [sys.executable, "setup.py", "--version"]
    output = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    assert output.stdout.split()[-1] == dynamic_dino.__version__
    assert dynamic_dino.__version__ == dynamic_dino_kernels.__version__


def test_console_scripts_exist(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    config = configparser.ConfigParser()
    config.read_string(wheel.read(entry_points).decode())
    scripts = dict(config["console_scripts"])
    assert set(scripts) == {f"dynamic-dino-{name}" for name in ("train", "predict", "finetune")}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
