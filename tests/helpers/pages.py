"""Is a page well-formed and complete, and does it look right in a browser?"""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.browser import find_browser, look_at

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that elements are closed in order; collects what could be loaded from elsewhere."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.images, self.addresses, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(found["alt"])
        assert tag not in ("script", "iframe", "object", "embed")
        self.addresses += [found[k] for k in ("src", "href") if k in found]
        self.ids += [found["id"]] if "id" in found else []

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag


def check_page(text: str) -> Page:
    """Well-formed, nothing from outside, every link leads somewhere."""
    page = Page(text)
    assert "url(" not in text and "@import" not in text
    for address in page.addresses:
        assert address.startswith(("data:", "#"))
        assert not address.startswith("#") or address[1:] in page.ids
    assert len(page.ids) == len(set(page.ids))
    return page


def check_in_browser(page: Path, titles: list[str]) -> None:
    """Nothing on the console, all figures loaded; wide tables and photos scroll in frames."""
    if find_browser() is None:
        pytest.skip("no browser and playwright: BROWSER=1 make test brings both")
    for width in (390, 1200):
        seen = look_at(page, width)
        assert not seen.console
        assert [image["alt"] for image in seen.images] == titles
        assert all(image["width"] > 200 for image in seen.images)
        assert seen.page <= width
        assert seen.edges and all(right <= width for right in seen.edges)
