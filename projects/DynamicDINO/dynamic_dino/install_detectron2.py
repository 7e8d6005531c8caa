"""Install Detectron2 into the environment of the Python that runs this.

Detectron2 is not on PyPI under its own name, and building it needs a compiler. PyPI has one wheel
of it, `sal-detectron2`: upstream at commit a59f0563 with a fix for Python 3.11. It is tagged for
CPython 3.10 only because of one compiled file that Dynamic-DINO doesn't use. This program downloads
that wheel, checks it, leaves that file out and installs the rest, which is plain Python.

A Detectron2 that is already installed is kept, whoever made it.
"""

import argparse
import base64
import csv
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .console import command, program

REQUIREMENT = "sal-detectron2==0.7.2"
WHEEL = "sal_detectron2-0.7.2-cp310-none-any.whl"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def find_installed() -> str | None:
    """Name, version and place of the Detectron2 that this Python would import, or None."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec("detectron2")
    if spec is None or spec.origin is None:
        return None
    names = importlib.metadata.packages_distributions().get("detectron2", [])
    versions = [f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names)]
    return f"{', '.join(versions) or 'detectron2'} in {Path(spec.origin).parent}"


def download(folder: Path) -> Path:
    """Let pip fetch the wheel, as the Python 3.10 that its tag asks for."""
    tags = ["--python-version=3.10", "--implementation=cp", "--only-binary=:all:", "--no-deps"]
    run_pip(
        ["download", "--quiet", *tags, f"--dest={folder}", REQUIREMENT],
        remedy=f"Without access to PyPI, fetch {WHEEL} elsewhere and run\n"
        f"  {sys.executable} -m dynamic_dino.install_detectron2 --wheel PATH\n"
        "or install Detectron2 yourself: an existing one is kept.",
    )
    return folder / WHEEL


def verify(wheel: Path) -> None:
    """Exit with one clear error unless `wheel` is the published file, byte for byte."""
    if not wheel.is_file():
        raise SystemExit(f"error: {wheel}: no such file; expected the wheel {WHEEL}.")
    content = wheel.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != SHA256:
        raise SystemExit(
            f"error: {wheel}: not the expected file, or a truncated download.\n"
            f"  expected sha256 {SHA256}\n"
            f"  actual   sha256 {actual} ({len(content):,} bytes)\n"
            "Delete it and run this again; if pip keeps returning it, clear its cache first\n"
            f"with `{sys.executable} -m pip cache remove sal_detectron2`."
        )


def repack(wheel: Path, folder: Path) -> Path:
    """Write a pure-Python edition of `wheel` into `folder` and return its path.

    Left out: the compiled `detectron2/_C`, which only Python 3.10 could load, and the scripts that
    the wheel would put into a top-level package with the all too common name `tools`.
    Rewritten: the tag, the list of files, and `numpy<2`, which nothing in the Python code needs.
    """
    name, version = WHEEL.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    repacked = folder / f"{name}-{version}-py3-none-any.whl"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(repacked, "w") as target:
        for entry in source.infolist():
            if entry.filename.startswith(("detectron2/_C.", "tools/")):
                continue
            if entry.filename == f"{info}/RECORD":
                continue  # written last, from what was really packed
            content = source.read(entry)
            if entry.filename == f"{info}/METADATA":
                content = content.replace(b"Requires-Dist: numpy<2\n", b"Requires-Dist: numpy\n")
            elif entry.filename == f"{info}/WHEEL":
                content = re.sub(rb"Root-Is-Purelib: .*", b"Root-Is-Purelib: true", content)
                content = re.sub(rb"Tag: .*", b"Tag: py3-none-any", content)
            elif entry.filename == f"{info}/top_level.txt":
                content = b"detectron2\n"
            target.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            rows.writerow([entry.filename, f"sha256={digest.decode()}", len(content)])
        rows.writerow([f"{info}/RECORD", "", ""])
        target.writestr(f"{info}/RECORD", record.getvalue(), compress_type=zipfile.ZIP_DEFLATED)
    return repacked


def run_pip(arguments: list[str], remedy: str) -> None:
    status = subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode
    if status != 0:
        command = " ".join(arguments[:1] + arguments[-1:])
        raise SystemExit(f"error: `pip {command}` failed; its own message is above.\n{remedy}")


@command
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog=program(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="PATH",
        help=f"use this copy of {WHEEL}, without a download",
    )
    options = parser.parse_args(arguments)

    if installed := find_installed():
        print(f"Detectron2: keeping {installed}")
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(Path(folder))
        verify(wheel)
        repacked = repack(wheel, Path(folder))
        # Without dependencies: setup.py lists them, so that constraints.txt can pin them.
        run_pip(
            ["install", "--quiet", "--no-deps", str(repacked)],
            remedy="Run it with the Python of a virtual environment you can write to.",
        )
    print(f"Detectron2: installed {find_installed()}")


if __name__ == "__main__":
    main()
