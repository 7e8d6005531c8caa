"""The bytes of an image that is no file of its own: it lies at an address, or in a shard.

A shard is a ZIP file without compression. ``SHARD.zip/NAME#START+SIZE`` is an image in it: all that
reading it takes stands in its name, no index is loaded, and a remote shard is asked for that range.
"""

from __future__ import annotations

import re

from ..remote import address, read

IN_SHARD = re.compile(r"(.+\.zip)/.*#(\d+)\+(\d+)", re.DOTALL)


def name_in_shard(shard: str, name: str, start: int, size: int) -> str:
    return f"{shard}/{name}#{start}+{size}"


def stored_bytes(path: str) -> bytes | None:
    """The content of the image file; None for a path that is neither at an address nor in a shard.

    Raises FileNotFoundError where it isn't there, ValueError for a shard that ends before it, and
    `RemoteError`.
    """
    match = IN_SHARD.fullmatch(path)
    file, start, size = (match[1], int(match[2]), int(match[3])) if match else (path, 0, None)
    if url := address(file):
        return read(url, start, size)
    if size is None:
        return None
    try:
        with open(file, "rb") as shard:
            shard.seek(start)
            content = shard.read(size)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"shard {file} of image {path} does not exist: copy it there, or make it again"
        ) from None
    if len(content) != size:
        raise ValueError(f"shard {file} ends before image {path}: copy it again")
    return content
