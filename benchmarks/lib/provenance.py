"""What every result file says about how it came to be: machine, versions, commit, command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

# Of the files that git knows or should: those that a measurement doesn't write itself.
CODE_CHANGES = (
    "status",
    "--porcelain",
    "--",
    ":/",
    ":(top,exclude)benchmarks/results",
    ":(top,exclude)*.md",
)


def provenance(packages: Sequence[str] = ("torch", "triton", "numpy"), device: str = "cpu") -> dict:
    """Machine, Python, versions of packages (those installed), commit, and this command."""
    return {
        "machine": machine_name(device),
        "python": platform.python_version(),
        "versions": {name: v for name in packages if (v := _version(name))},
        "commit": commit(),
        "command": " ".join(["python", *map(_relative, sys.argv)]),
    }


def commit() -> str:
    """That of the code, with "-dirty" where it was changed. Where there is no repository or no git,
    the environment variable DYNAMIC_DINO_COMMIT says it; else it is "unknown"."""
    if found := _git("rev-parse", "HEAD"):
        return found + ("-dirty" if _git(*CODE_CHANGES) else "")
    return os.environ.get("DYNAMIC_DINO_COMMIT") or "unknown"


def machine_name(device: str = "cpu") -> str:
    """The GPU's name; or the processor's model as /proc/cpuinfo has it where there is one, and the
    widest instructions that PyTorch uses on it, by which ratios differ too."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    model = found[1] if found else platform.processor()
    bf16 = " with bf16" if re.search(r"^flags.*_bf16\b", text, re.MULTILINE) else ""
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}{bf16}), {platform.system()}"


def settings(options: argparse.Namespace) -> dict:
    """What was asked for, but for where results go, and the threads that torch really uses."""
    left_out = ("json", "plot", "trace", "save", "threads")
    asked = {key: value for key, value in vars(options).items() if key not in left_out}
    return asked | {"threads": torch.get_num_threads()}


def results_folder(device: str = "cpu") -> Path:
    """benchmarks/results/cpu, or one named after the GPU, such as h200."""
    name = machine_name(device).removeprefix("NVIDIA ") if device.startswith("cuda") else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parents[1] / "results" / slug


def write_json(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    """What git prints of this repository; "" without git, or where there is none."""
    try:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent
        )
    except OSError:
        return ""
    return result.stdout.strip()


def _relative(argument: str) -> str:
    """Paths of this machine are nobody's business: of one outside of the checkout, its name."""
    argument = argument.replace(f"{Path.cwd()}/", "")
    return Path(argument).name if Path(argument).is_absolute() else argument
