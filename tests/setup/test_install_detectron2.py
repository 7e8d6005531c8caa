"""`dynamic-dino install-detectron2` on a drawn wheel like the real one: nothing is downloaded."""

import base64
import csv
import hashlib
import importlib.util
import os
import secrets
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "projects/DynamicDINO/dynamic_dino/install_detectron2.py"
INFO = "sal_detectron2-0.7.2.dist-info"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("dynamic_dino.install_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path, script, monkeypatch):
    """A small wheel like the published one, whose hash the script is made to expect."""
    files = {
        "detectron2/__init__.py": f"MARK = {secrets.token_hex(4)!r}\n",
        "detectron2/config/lazy.py": "",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
        "tools/__init__.py": "",
        "tools/train_net.py": "",
        f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n"
        "Requires-Dist: matplotlib\nRequires-Dist: numpy<2\nRequires-Dist: black\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        "Tag: cp310-cp310-linux_x86_64\n",
        f"{INFO}/top_level.txt": "detectron2\ntools\n",
        f"{INFO}/RECORD": "to be rewritten",
    }
    path = tmp_path / script.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_repacked_wheel_is_pure_python_and_its_record_is_true(script, wheel, tmp_path):
    repacked = script.repack(wheel, tmp_path)
    assert repacked.name == "sal_detectron2-0.7.2-py3-none-any.whl"
    with zipfile.ZipFile(repacked) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        assert {name.split("/")[0] for name in names} == {"detectron2", INFO}
        assert not [name for name in names if name.endswith(".so")]
        tag = archive.read(f"{INFO}/WHEEL").decode().splitlines()
        assert tag[1:] == ["Root-Is-Purelib: true", "Tag: py3-none-any"]
        requirements = archive.read(f"{INFO}/METADATA").decode().splitlines()[3:]
        assert requirements == [f"Requires-Dist: {n}" for n in ("matplotlib", "numpy", "black")]

        rows = list(csv.reader(archive.read(f"{INFO}/RECORD").decode().splitlines()))
        assert {row[0] for row in rows} == names
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            assert (digest, size) == (f"sha256={expected.rstrip('=')}", str(len(content)))


def test_given_wheel_is_installed_without_a_download(script, wheel, tmp_path, monkeypatch, capsys):
    site = tmp_path / "site"
    monkeypatch.setenv("PIP_TARGET", str(site))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    answers = iter([None, "sal-detectron2 0.7.2"])
    monkeypatch.setattr(script, "find_installed", lambda: next(answers))
    script.main(["--wheel", str(wheel)])
    assert "installed sal-detectron2 0.7.2" in capsys.readouterr().out
    assert sorted(path.name for path in site.iterdir()) == ["detectron2", INFO]
    original = zipfile.ZipFile(wheel).read("detectron2/__init__.py")
    assert (site / "detectron2/__init__.py").read_bytes() == original


def test_existing_detectron2_is_kept(script, tmp_path, monkeypatch, capsys):
    """Whatever its origin: a folder on the path without any metadata counts too."""
    own = tmp_path / "detectron2"
    own.mkdir()
    (own / "__init__.py").write_text("raise RuntimeError('looked for, not imported')")
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(script, "run_pip", lambda *args, **kwargs: pytest.fail("pip was called"))
    script.main([])
    output = capsys.readouterr().out
    assert "keeping" in output and str(own) in output


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_wheel_names_file_hashes_and_remedy(script, wheel, damage):
    content = bytearray(wheel.read_bytes())
    if damage == "truncated":
        del content[secrets.randbelow(len(content)) :]
    else:
        content[secrets.randbelow(len(content))] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        script.verify(wheel)
    message = str(error.value)
    assert str(wheel) in message and "Delete it" in message
    assert script.SHA256 in message and hashlib.sha256(content).hexdigest() in message


def test_missing_wheel_and_no_network_are_one_clear_error(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "find_installed", lambda: None)
    with pytest.raises(SystemExit, match="no such file"):
        script.main(["--wheel", str(tmp_path / "absent.whl")])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(SystemExit, match="--wheel PATH"):
        script.main([])


def test_help_teaches():
    result = subprocess.run(
        [sys.executable, "-m", "dynamic_dino.install_detectron2", "--help"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert result.returncode == 0
    assert "already installed is kept" in result.stdout and "--wheel PATH" in result.stdout
