"""review.html: what was found, to be looked over. One file that needs no other and no network."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from ..data.images import as_array, open_image
from ..data.visualization import phrase_colors
from ..files import write_text
from .run import Labels, load_ahead

FILE = "review.html"
TEMPLATE = Path(__file__).with_name("review.html")
SIDE = 320  # pixels of a thumbnail
QUALITY = 70  # of JPEG


def write_page(labels: Labels, output: Path, model: str, most: int = 400) -> Path:
    """Writes review.html: thumbnails with boxes, which a reader filters by name and by score.

    Args:
        output: the folder that it is written to; the images themselves, which the page opens where
            they are still in their place, are addressed from there.
        model: what found the boxes, in words.
        most: how many images it shows. They are those with the least certain boxes; those without a
            box come last. A thumbnail has about 20 KB.
    """
    chosen = least_certain(labels)[:most]
    files = {result["name"]: result["file"] for result in chosen}
    thumbnails = dict(load_ahead(files, lambda name: _thumbnail(files[name]), workers=2))
    numbers = {name: i for i, name in enumerate(labels.names)}
    colors = phrase_colors(labels.names)
    content = {
        "names": labels.names,
        "colors": ["#{:02x}{:02x}{:02x}".format(*colors[name]) for name in labels.names],
        "failed": labels.failed,
        "images": [
            {
                "name": result["name"],
                "href": _address(result["file"], output),
                "size": [result["width"], result["height"]],
                "thumbnail": thumbnails[result["name"]],
                "boxes": [
                    [numbers[d["phrase"]], d["score"], *d["box"]] for d in result["detections"]
                ],
            }
            for result in chosen
        ],
    }
    total, boxes = len(labels.results), sum(labels.boxes.values())
    shown = "" if len(chosen) == total else f" This page has the {len(chosen):,} least certain."
    text = f"{boxes:,} boxes in {total:,} images, found by {model}.{shown}"
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{text}}", html.escape(text))
    # In a script nothing is escaped, but what would end it is written otherwise.
    page = page.replace("{{data}}", data.replace("<", "\\u003c"))
    write_text(output / FILE, page)
    return output / FILE


def least_certain(labels: Labels) -> list[dict]:
    """The results, those with the lowest score of a box first, those without a box last."""
    return sorted(
        labels.results, key=lambda r: min((d["score"] for d in r["detections"]), default=2.0)
    )


def _thumbnail(file: str) -> str:
    """A JPEG as an address that holds it; none for an image that has gone since."""
    try:
        with open_image(file) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # of a JPEG, no more than that is decoded
            small = Image.fromarray(as_array(image))
    except (ValueError, OSError):
        return "data:,"
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _address(file: str, output: Path) -> str:
    try:
        path = Path(os.path.relpath(file, output)).as_posix()
    except ValueError:  # on another drive of Windows
        return Path(os.path.abspath(file)).as_uri()
    return quote(os.fsencode(path))
