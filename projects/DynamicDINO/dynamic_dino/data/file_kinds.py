"""What a file is that isn't read as a picture, by its first bytes, and what to do about it."""

from __future__ import annotations

import re
import struct
from contextlib import suppress
from typing import BinaryIO

from PIL import Image

from .image_files import FORMATS

HEIC = "HEIC, the format of iPhones"
_HEIC = "pip install pillow-heif, which reads it, or convert it to JPEG"
_CONVERT = "convert it to JPEG or PNG"
_FETCH = "fetch the picture itself"
# (what the first bytes are, what the file is, the remedy); the first that fits counts
_KINDS = (
    (rb"$", "empty", "fetch or write it again"),
    (rb"....ftyp(hei|hev|mif1|msf1)", HEIC, _HEIC),
    (rb"....ftypavi[fs]", "AVIF, which this Pillow doesn't read", f"update Pillow, or {_CONVERT}"),
    (rb"....ftyp", "a video (or a camera's raw format)", "name it NAME.mp4, or give its frames"),
    (rb"(\xff\x0a|\0\0\0\x0cJXL )", "JPEG XL", _CONVERT),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the picture", "run git lfs pull"),
    (rb"\s*(<!doctype html|<html)", "a web page", _FETCH),
    (rb"\s*(<\?xml|<!--|<svg)", "SVG or XML", _CONVERT),
    (rb"\s*[{\[]", "JSON", _FETCH),
    (rb"%PDF", "PDF", "convert its pages to PNG"),
    (rb"8BPS", "a Photoshop file", _CONVERT),
    (rb"\x93NUMPY", "a numpy array", "give the array itself, np.load(...)"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!", "an archive", "unpack it"),
    (rb".{128}DICM", "DICOM", _CONVERT),
    (rb"\0\x05\x16\x07", "what macOS stores beside a file (._NAME), not the picture", "remove it"),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF of a kind that Pillow doesn't decode", _CONVERT),
)


def what_it_is(file: BinaryIO) -> tuple[str, str]:
    """(what the file is, the remedy), empty if its content says nothing."""
    file.seek(0)
    head = file.read(256)
    for pattern, kind, remedy in _KINDS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            readable = kind is HEIC and "HEIF" in FORMATS  # then it is damaged
            return ("", "") if readable else (kind, remedy)
    # By what each of Pillow's formats begins with: what isn't read is never opened either, since
    # some formats run other programs (EPS) or are rarely tested against strangers' files.
    for name, (_, begins) in Image.OPEN.items():
        with suppress(IndexError, struct.error):  # as Pillow does: a file shorter than its mark
            if name not in FORMATS and begins is not None and begins(head[:16]) is True:
                return f"{name}, a format that isn't read here", _CONVERT
    return "", ""
