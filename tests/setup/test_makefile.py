"""`make lint` needs ruff alone; `make setup` leaves another checkout's environment as it is."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALLER = "projects/DynamicDINO/dynamic_dino/install_detectron2.py"


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the Makefile and what it reads, and nothing installed."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / INSTALLER).parent.mkdir(parents=True)
    for name in ("Makefile", "constraints.txt", "setup.py", INSTALLER):
        shutil.copy(ROOT / name, folder / name)
    return folder


def environment(folder: Path, **programs: str) -> Path:
    """An environment whose programs are shell scripts."""
    for name, script in programs.items():
        program = folder / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return folder


def make(checkout: Path, target: str, active: Path) -> subprocess.CompletedProcess:
    variables = {**os.environ, "VIRTUAL_ENV": str(active)}
    return subprocess.run(
        ["make", "-C", checkout, target], env=variables, capture_output=True, text=True
    )


def test_lint_runs_the_environments_ruff_and_nothing_else(checkout, tmp_path):
    version = (ROOT / "constraints.txt").read_text().split("ruff==")[1].split()[0]
    script = f'[ "$1" = --version ] && echo ruff {version} || echo "ran $@"'
    active = environment(tmp_path / "active", ruff=script, python="echo python ran; exit 1")
    run = make(checkout, "lint", active)
    assert run.returncode == 0, run.stderr
    assert "ran check" in run.stdout and "ran format --check" in run.stdout
    assert "python ran" not in run.stdout
    assert {path.name for path in active.iterdir()} == {"bin"}  # no stamp: nothing was installed
    assert not (checkout / ".venv-lint").exists()


@pytest.mark.parametrize("target", ["setup", "test", "demo"])
def test_environment_of_another_checkout_is_refused(checkout, tmp_path, target):
    other = tmp_path / "other/projects/DynamicDINO/dynamic_dino/__init__.py"
    active = environment(tmp_path / "active", python=f"echo {other}")
    run = make(checkout, target, active)
    assert run.returncode != 0
    assert f"runs another checkout's Dynamic-DINO: {other}" in run.stderr
    assert "deactivate" in run.stderr and "pip install --no-deps -e ." in run.stderr
    assert {path.name for path in active.iterdir()} == {"bin"}


@pytest.mark.parametrize("found", ["", "checkout/projects/x.py", "active/lib/site-packages/x.py"])
def test_own_environment_is_used(checkout, tmp_path, found):
    active = environment(tmp_path / "active", python=f"echo {tmp_path / found if found else ''}")
    run = make(checkout, "own", active)
    assert run.returncode == 0, run.stderr
