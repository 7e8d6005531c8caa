"""Files of weights: whatever wraps them, as a state dict, and that they are what was written.

A flipped bit in a file is a wrong number in a model, which nothing downstream notices. What we
write carries a checksum: .safetensors in its metadata, .pth the CRC-32 of each tensor that a ZIP
archive has; a list SHA256SUMS beside a file, as ``sha256sum`` writes it, counts too, which is how
the shipped weights have theirs. Reading checks whichever there is.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import sha256_of_file, written_whole
from .plain_data import plain_data_allowed

CHECKSUM = "sha256"  # in the metadata of .safetensors: that of `digest`
SUMS = "SHA256SUMS"


def write_safetensors(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Whole or not at all, with a checksum. Raises OSError where it can't be written."""
    state = {name: value.contiguous() for name, value in state.items()}
    metadata = {"format": "pt", CHECKSUM: digest(state)}
    try:
        with written_whole(Path(path), binary=True) as file:
            save_file(state, file.name, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"can't write {path}: {error}") from error


def digest(state: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def check_checksums(path: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Compares a file with the checksums that it has, if any; `state`: what .safetensors holds.

    Raises ValueError where they differ, naming the tensor where the file says that.
    """
    remedy = "it isn't what was written, a disk or a copy damaged it: fetch or copy it again"
    sums = path.with_name(SUMS)
    if sums.is_file():
        listed = dict(
            line.split(maxsplit=1)[::-1] for line in sums.read_text().splitlines() if line
        )
        wanted = listed.get(path.name) or listed.get(f"*{path.name}")
        if wanted and sha256_of_file(path) != wanted:
            raise ValueError(f"checkpoint {path} has another checksum than {sums}: {remedy}")
    elif state is not None:
        with safe_open(path, "pt") as file:
            wanted = (file.metadata() or {}).get(CHECKSUM)
        if wanted and digest(state) != wanted:
            raise ValueError(f"checkpoint {path} has another checksum than it says: {remedy}")
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except Exception as error:  # of many types, such as that of a name that is no UTF-8
            raise ValueError(f"checkpoint {path} is damaged ({error}): {remedy}") from error
        if damaged:
            raise ValueError(f"checkpoint {path} has another checksum in {damaged!r}: {remedy}")


def check_tensors(state: Mapping[str, Tensor], like: Mapping[str, Tensor], path: object) -> None:
    """Raises ValueError for a tensor of `state` of another kind of numbers than that of `like`,
    whole for fractional, or one that holds NaN or infinities."""
    for name, value in state.items():
        if name in like and _kind(value) != _kind(like[name]):
            raise ValueError(
                f"{path}: {name} holds {str(value.dtype).removeprefix('torch.')}, where the model "
                f"has {str(like[name].dtype).removeprefix('torch.')}: quantized or converted "
                "weights can't be loaded; take the original ones"
            )
        if value.is_meta:  # shapes alone
            continue
        # A sum is finite where all of it is; it reads each number once and stores none.
        if value.is_floating_point() and not value.sum(dtype=torch.float64).isfinite():
            bad = int((~value.double().isfinite()).sum())
            if bad:
                raise ValueError(
                    f"{path}: {bad:,} of the {value.numel():,} numbers of {name} are NaN or "
                    "infinite: the training diverged or the file is damaged; take an earlier "
                    "checkpoint"
                )


def _kind(value: Tensor) -> str:
    if value.layout != torch.strided or value.is_quantized:
        return f"{value.layout} {value.dtype}"
    if value.dtype == torch.bool:
        return "bool"
    return (
        "fractions" if value.is_floating_point() else "complex" if value.is_complex() else "whole"
    )


# What stands where a download went wrong, by its first bytes
_NO_WEIGHTS = (
    (rb"$", "is empty: fetch it again"),
    (rb"version https://git-lfs", "is a pointer of Git LFS, not the file itself: run git lfs pull"),
    (rb"\s*<(!doctype|html)", "is a web page, not the file itself: fetch it by its own address"),
    (rb"\s*<", "is XML, such as a server's error, no file of weights: fetch it again"),
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a file, whatever wraps them, and whatever plain data trainers stored beside
    them. Raises FileNotFoundError, or ValueError for a file that is corrupt or holds what could
    run code."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} doesn't exist")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with plain_data_allowed(path):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors', torch's and pickle's own are of many types
        if refused := _refused(str(error)):
            raise ValueError(
                f"checkpoint {path} holds {refused} besides weights, which could run code, so it "
                "isn't loaded. Get it as .safetensors; or, if you trust who wrote it, store the "
                "weights alone, where what it holds is installed: checkpoint = "
                f"torch.load({str(path)!r}, weights_only=False); "
                "torch.save(checkpoint['model'], 'weights.pth')  # or ['state_dict']"
            ) from error
        raise ValueError(f"checkpoint {path} {why_unreadable(path, error)}") from error
    check_checksums(path, state if path.suffix == ".safetensors" else None)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]  # of mmdetection
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        # What the trainer evaluates: the averaged weights, where the run has them.
        averaged = state.get("ema")
        averaged = averaged.get("weights", {}) if isinstance(averaged, dict) else {}
        state = {**state["model"], **averaged}
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise ValueError(f"{path} holds no weights: it should map names to tensors")
    return state


def why_unreadable(path: Path, error: Exception) -> str:
    """Says of a file, in one line, why it couldn't be read as weights, after "PATH "."""
    with path.open("rb") as file:
        head = file.read(256)
    for start, what in _NO_WEIGHTS:
        if re.match(start, head, re.IGNORECASE):
            return what
    if head.isascii() and head.decode().replace("\n", " ").isprintable():
        return f"is a text, {' '.join(head.decode().split())[:40]!r} ..., no file of weights"
    # torch's words on what isn't its own advise to load it by the way that runs code
    first = "" if "weights_only" in str(error) else str(error).strip().partition("\n")[0]
    return f"is corrupt or incomplete{first and f' ({first})'}: fetch or write it again"


def _refused(error: str) -> str | None:
    """What a pickle would have to import or call, from torch's words for it; None for others."""
    if name := re.search(r"GLOBAL ([\w.]+)", error):
        return name[1]
    return "a call of a method" if "call reduce for unrecognized function" in error else None


def read_directory(folder: Path) -> dict[str, Tensor]:
    """The weights of a directory of transformers: safetensors where it has them, also in parts."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = _parts(index)
            return {k: v for part in parts for k, v in read_state_dict(part).items()}
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin")


def _parts(index: Path) -> list[Path]:
    """The files that an index names; raises ValueError for what isn't one beside it."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{index} is no index of weights ({error!r}): it has a "weight_map" from names to '
            "files; fetch it again"
        ) from error
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
            raise ValueError(
                f"{index} names {name!r}, which is no file beside it: it may not point elsewhere; "
                "fetch the model again"
            )
    return [index.with_name(name) for name in names]
