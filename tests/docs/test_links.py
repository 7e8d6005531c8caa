"""What the pages point to is there: pages, headings, figures, files."""

import re
from pathlib import Path

import pytest
from helpers.documentation import PAGES, PROJECT, ROOT, prose

# Where a path in a page may start.
ROOTS = [ROOT, ROOT / "configs", PROJECT, PROJECT / "dynamic_dino", ROOT / "kernels"]
ROOTS += [ROOT / "kernels/dynamic_dino_kernels", ROOT / "benchmarks"]
# Paths of the reader's own: runs, data, results of a machine.
OWN = re.compile(
    r"output/|evaluation/(val|NAME)/|datasets/|runs/|\w+_results/|results/<|(train|val|images|data)/?$|package:"
)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.M):
        words = re.sub(r"[^\w\- ]", "", heading.strip().lower())
        found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


def found(root: Path, name: str) -> bool:
    """A recipe may be named without its ending, as `himoe/dino` is, the recipe of a variant."""
    return any(root.glob(name)) or (root / f"{name}.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    missing = []
    for name in re.findall(r"`([\w.*-]+(?:/[\w.*-]+)+/?)`", prose(page)):
        starts = [root for root in [*ROOTS, page.parent] if (root / name.split("/")[0]).exists()]
        if starts and not OWN.match(name) and not any(found(root, name) for root in starts):
            missing.append(name)
    assert not missing, f"{page} names files that don't exist: {missing}"


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 140
