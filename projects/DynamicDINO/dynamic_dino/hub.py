"""Models of transformers: a local directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

PREFIX = "hf:"


def is_hub_spec(spec: str | Path) -> bool:
    """Whether it is written as "hf:OWNER/NAME" or "hf:DIRECTORY"."""
    return str(spec).startswith(PREFIX)


def locate_directory(spec: str | Path) -> Path:
    """The directory that "hf:..." (or what would follow it) names, downloaded if it is an id.

    Raises:
        FileNotFoundError: there is no such directory, and the hub doesn't have it or can't be
            reached.
    """
    name = str(spec).removeprefix(PREFIX)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name} is no directory, and no id of the Hugging Face hub (OWNER/NAME)"
        )
    try:
        files = ["*.json", "*.txt"]
        folder = Path(snapshot_download(name, allow_patterns=[*files, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*files, "*.bin"]))
        return folder
    except (OSError, ValueError) as error:  # all of the hub's errors are one of them
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"model {name!r} is no local directory, and can't be fetched from the Hugging Face hub "
            f"({reason[0]}): check the id, or download it where there is internet, `hf download "
            f"{name} --local-dir DIRECTORY`, and give hf:DIRECTORY"
        ) from error
